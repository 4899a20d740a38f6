//! What packets on `lo` that are for others take with the unit `names` attached there, with a program that does
//! nothing, and without any: by the clock, in network namespaces of their own.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Instant;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::figures::{Figures, Goal};

pub const CASES: [&str; 6] = [
    "TCP, with names",
    "TCP, a program of nothing",
    "TCP",
    "datagrams, with names",
    "datagrams, a program of nothing",
    "datagrams",
];

/// TCP by what a megabyte takes, thus 1 / 0.97.
pub const GOALS: [Goal; 2] = [
    Goal::Times(1.03, "TCP, with names", "TCP"),
    Goal::Over(70.0, "datagrams, with names", "datagrams"),
];

/// What is measured: the time of one of so many, in ns.
type Job = fn(usize) -> f64;

/// A thread in a network namespace of its own.
struct Elsewhere {
    work: Sender<Job>,
    result: Receiver<f64>,
    thread: JoinHandle<()>,
}

impl Elsewhere {
    /// It keeps what `prepare` returns.
    fn start<T>(n_calls: usize, prepare: impl FnOnce() -> T + Send + 'static) -> Elsewhere {
        let (work, received) = channel::<Job>();
        let (sender, result) = channel();
        let thread = std::thread::spawn(move || {
            let _kept = prepare();
            let mut jobs = received.into_iter();
            let _ = jobs.try_for_each(|job| sender.send(job(n_calls)));
        });
        Elsewhere { work, result, thread }
    }

    fn run(&self, job: Job) -> f64 {
        self.work.send(job).expect("the thread runs");
        self.result.recv().expect("the thread runs")
    }

    /// Drops what `prepare` returned.
    fn end(self) {
        drop(self.work);
        self.thread.join().expect("the thread doesn't panic");
    }
}

/// Measures in turn; `unshare` moves the thread that calls it to a new network namespace, and `attach` attaches a
/// program that does nothing to that one's `lo`.
pub fn measure<T>(
    n_rounds: usize,
    n_calls: usize,
    unshare: fn(),
    attach: impl FnOnce() -> T + Send + 'static,
) -> Figures {
    let nothing = Elsewhere::start(n_calls, move || {
        unshare();
        attach()
    });
    let without = Elsewhere::start(n_calls, unshare);
    let places: [&dyn Fn(Job) -> f64; 3] =
        [&|job| job(n_calls), &|job| nothing.run(job), &|job| without.run(job)];
    let mut figures = Figures::of(CASES.into_iter());
    for round in 0..n_rounds {
        // None is always the first.
        let of_all = |job: Job| {
            let mut took = [0.0; 3];
            for nth in (0..3).map(|nth| (round + nth) % 3) {
                took[nth] = places[nth](job);
            }
            took
        };
        figures.add([of_all(transfer), of_all(exchange)].into_iter().flatten());
    }
    [nothing, without].into_iter().for_each(Elsewhere::end);
    figures
}

/// The time that a megabyte takes from one thread to another, in ns.
fn transfer(n_calls: usize) -> f64 {
    const LEN: usize = 1 << 20;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a socket");
    let address = listener.local_addr().expect("it is bound");
    let started = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut stream = TcpStream::connect(address).expect("it is connected");
            let bytes = vec![7; LEN];
            (0..n_calls).for_each(|_| stream.write_all(&bytes).expect("it is sent"));
        });
        let (mut stream, _) = listener.accept().expect("a connection");
        let mut bytes = vec![0; LEN];
        while stream.read(&mut bytes).expect("it is received") != 0 {}
    });
    started.elapsed().as_nanos() as f64 / n_calls as f64
}

/// The time that a datagram takes from one socket to another of this thread, in ns. On one processor, since others
/// may be slower or busier.
fn exchange(n_calls: usize) -> f64 {
    let all = sched_getaffinity(None).expect("a thread has processors");
    let mut first = CpuSet::new();
    first.set((0..CpuSet::MAX_CPU).find(|&cpu| all.is_set(cpu)).expect("it has one"));
    sched_setaffinity(None, &first).expect("it may run there");
    let [from, to] = [(); 2].map(|()| UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a socket"));
    from.connect(to.local_addr().expect("it is bound")).expect("it is connected");
    let mut bytes = [7; 64];
    let n_datagrams = 20 * n_calls;
    let started = Instant::now();
    for _ in 0..n_datagrams {
        from.send(&bytes).expect("it is sent");
        to.recv(&mut bytes).expect("it came");
    }
    let took = started.elapsed();
    sched_setaffinity(None, &all).expect("it may run anywhere again");
    took.as_nanos() as f64 / n_datagrams as f64
}

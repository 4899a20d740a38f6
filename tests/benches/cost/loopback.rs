//! What packets on `lo` that are for others take with the unit `names` attached there, and without it: by
//! the clock, in this network namespace and in another one.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::figures::{Figures, Goal};

pub const CASES: [&str; 4] = ["TCP, with names", "TCP", "datagrams, with names", "datagrams"];

/// TCP by what a megabyte takes, thus 1 / 0.97.
pub const GOALS: [Goal; 2] = [
    Goal::Times(1.03, "TCP, with names", "TCP"),
    Goal::Over(70.0, "datagrams, with names", "datagrams"),
];

/// A thread in a network namespace without the unit.
struct Without {
    work: Sender<fn(usize) -> f64>,
    result: Receiver<f64>,
}

/// Measures in turn; `unshare` moves the thread that calls it to a new network namespace.
pub fn measure(n_rounds: usize, n_calls: usize, unshare: fn()) -> Figures {
    let (work, received) = channel::<fn(usize) -> f64>();
    let (sender, result) = channel();
    let thread = std::thread::spawn(move || {
        unshare();
        received.into_iter().try_for_each(|job| sender.send(job(n_calls)).map_err(drop))
    });
    let without = Without { work, result };
    let mut figures = Figures::of(CASES.into_iter());
    for round in 0..n_rounds {
        let pair = |job: fn(usize) -> f64| {
            let other = || {
                without.work.send(job).expect("the thread runs");
                without.result.recv().expect("the thread runs")
            };
            // Neither is always the first.
            if round % 2 == 0 {
                let other = other();
                [job(n_calls), other]
            } else {
                [job(n_calls), other()]
            }
        };
        figures.add([pair(transfer), pair(exchange)].into_iter().flatten());
    }
    drop(without);
    let _ = thread.join();
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

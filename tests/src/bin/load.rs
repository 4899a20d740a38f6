//! `load ADDR:PORT --rate R --at-most S --threads T`: opens R connections a second until SIGTERM, S
//! seconds at most, each with a request, whatever became of those before. It prints `opened N` for
//! each second's worth, and at the end one JSON document: how many were asked for, how often each
//! answer and each error came, how many SYNs were sent again, how long it took, and whether it was
//! stopped or ran out of time.
#![deny(unsafe_code)]

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use signal_hook::consts::SIGTERM;
use signal_hook::flag;

/// How long a connection, and each read, may take before it counts as failed.
const PATIENCE: Duration = Duration::from_secs(30);

/// The most that is read of an answer, in bytes.
const MAX_ANSWER: u64 = 64 * 1024;

/// What is asked for.
struct Schedule {
    address: SocketAddr,
    rate: u32,
    /// The most connections that are opened.
    n_max: u32,
    start: Instant,
    next: AtomicU32,
    /// Whether no further connection is to be opened.
    is_stopped: Arc<AtomicBool>,
}

#[derive(Default)]
struct Counts {
    answers: BTreeMap<String, u64>,
    errors: BTreeMap<String, u64>,
    n_opened: u64,
    n_syn_retransmits: u64,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some((address, rate, n_seconds, n_threads)) = parse(&arguments) else {
        eprintln!("usage: load ADDR:PORT --rate R --at-most S --threads T");
        return ExitCode::from(2);
    };
    let is_stopped = Arc::new(AtomicBool::new(false));
    if let Err(error) = flag::register(SIGTERM, Arc::clone(&is_stopped)) {
        eprintln!("can't handle SIGTERM: {error}");
        return ExitCode::FAILURE;
    }
    let (n_max, start) = (rate * n_seconds, Instant::now());
    let next = AtomicU32::new(0);
    let schedule = Schedule { address, rate, n_max, start, next, is_stopped };
    let counts = thread::scope(|scope| {
        let threads: Vec<_> = (0..n_threads).map(|_| scope.spawn(|| schedule.work())).collect();
        let counts = threads.into_iter().filter_map(|thread| thread.join().ok());
        counts.fold(Counts::default(), Counts::add)
    });
    let took = start.elapsed();
    let Counts { answers, errors, n_opened, n_syn_retransmits } = counts;
    let report = json!({
        "asked": n_opened,
        "was_stopped": schedule.is_stopped.load(Ordering::Relaxed),
        "answers": answers,
        "errors": errors,
        "syn_retransmits": n_syn_retransmits,
        "took_ms": took.as_millis() as u64,
    });
    println!("{report}");
    ExitCode::SUCCESS
}

fn parse(arguments: &[String]) -> Option<(SocketAddr, u32, u32, u32)> {
    let [address, rate, n_rate, seconds, n_seconds, threads, n_threads] = arguments else {
        return None;
    };
    let positive = |text: &String| text.parse().ok().filter(|n| (1..=100_000).contains(n));
    let named = rate == "--rate" && seconds == "--at-most" && threads == "--threads";
    let numbers = (positive(n_rate)?, positive(n_seconds)?, positive(n_threads)?);
    named.then_some((address.parse().ok()?, numbers.0, numbers.1, numbers.2))
}

impl Schedule {
    /// Opens connections, each when it is due, until it is stopped or all are opened.
    fn work(&self) -> Counts {
        let mut counts = Counts::default();
        loop {
            let n = self.next.fetch_add(1, Ordering::Relaxed);
            if n >= self.n_max {
                return counts;
            }
            let due = self.start + Duration::from_secs(1) * n / self.rate;
            thread::sleep(due.saturating_duration_since(Instant::now()));
            if self.is_stopped.load(Ordering::Relaxed) {
                return counts;
            }
            counts.n_opened += 1;
            if n > 0 && n.is_multiple_of(self.rate) {
                println!("opened {n}");
            }
            let connected =
                TcpStream::connect_timeout(&self.address, PATIENCE).and_then(|stream| {
                    counts.n_syn_retransmits += u64::from(n_retransmits(&stream)?);
                    ask(stream)
                });
            let count = match connected {
                Ok(answer) => counts.answers.entry(answer),
                Err(error) => counts.errors.entry(format!("{:?}", error.kind())),
            };
            *count.or_default() += 1;
        }
    }
}

/// How many segments of a connection were sent again: right after connect(), its SYN alone.
#[expect(unsafe_code, reason = "no library wraps TCP_INFO")]
fn n_retransmits(stream: &TcpStream) -> io::Result<u32> {
    // SAFETY: integers alone, for which zero is a value.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = size_of_val(&info) as libc::socklen_t;
    let (level, option) = (libc::IPPROTO_TCP, libc::TCP_INFO);
    // SAFETY: the descriptor is open, and the kernel writes at most `length` bytes, as many as there are.
    let done = unsafe {
        libc::getsockopt(stream.as_raw_fd(), level, option, (&raw mut info).cast(), &raw mut length)
    };
    if done != 0 { Err(io::Error::last_os_error()) } else { Ok(info.tcpi_total_retrans) }
}

/// Sends a request, and returns the body of the answer.
fn ask(mut stream: TcpStream) -> io::Result<String> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.take(MAX_ANSWER).read_to_string(&mut answer)?;
    let body = answer.split_once("\r\n\r\n").map(|(_, body)| body.trim_end().to_owned());
    body.ok_or(io::ErrorKind::UnexpectedEof.into())
}

impl Counts {
    fn add(mut self, other: Counts) -> Counts {
        let pairs = [(&mut self.answers, other.answers), (&mut self.errors, other.errors)];
        for (sum, part) in pairs {
            part.into_iter().for_each(|(key, n)| *sum.entry(key).or_default() += n);
        }
        self.n_opened += other.n_opened;
        self.n_syn_retransmits += other.n_syn_retransmits;
        self
    }
}

//! `connect ADDR:PORT --times N --threads T`: connections N times, each time with a request, and prints one
//! JSON document: how often each answer came, each error, and each peer address.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::json;

/// How long a connection, and each read, may take before it counts as failed.
const PATIENCE: Duration = Duration::from_secs(30);

/// The most that is read of an answer, in bytes.
const MAX_ANSWER: u64 = 64 * 1024;

/// The most connections at once.
const MAX_THREADS: u32 = 64;

#[derive(Default)]
struct Counts {
    answers: BTreeMap<String, u64>,
    errors: BTreeMap<String, u64>,
    peers: BTreeMap<String, u64>,
}

fn main() -> ExitCode {
    let Some((address, n_times, n_threads)) = parse(&std::env::args().collect::<Vec<_>>()) else {
        eprintln!("usage: connect ADDR:PORT --times N --threads T (T at most {MAX_THREADS})");
        return ExitCode::from(2);
    };
    let n_left = AtomicU32::new(n_times);
    let counts = thread::scope(|scope| {
        let threads: Vec<_> =
            (0..n_threads).map(|_| scope.spawn(|| connect_all(address, &n_left))).collect();
        threads
            .into_iter()
            .filter_map(|thread| thread.join().ok())
            .fold(Counts::default(), Counts::add)
    });
    let Counts { answers, errors, peers } = counts;
    println!("{}", json!({ "answers": answers, "errors": errors, "peers": peers }));
    ExitCode::SUCCESS
}

fn parse(arguments: &[String]) -> Option<(SocketAddr, u32, u32)> {
    let [_, address, times, n_times, threads, n_threads] = arguments else { return None };
    let n_threads = n_threads.parse().ok().filter(|n| (1..=MAX_THREADS).contains(n))?;
    let named = times == "--times" && threads == "--threads";
    named.then_some((address.parse().ok()?, n_times.parse().ok()?, n_threads))
}

/// Connects until nothing is left to do.
fn connect_all(address: SocketAddr, n_left: &AtomicU32) -> Counts {
    let mut counts = Counts::default();
    let take_one = |n: u32| n.checked_sub(1);
    while n_left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take_one).is_ok() {
        let outcome = TcpStream::connect_timeout(&address, PATIENCE).and_then(|stream| {
            *counts.peers.entry(stream.peer_addr()?.to_string()).or_default() += 1;
            ask(stream)
        });
        let count = match outcome {
            Ok(answer) => counts.answers.entry(answer),
            Err(error) => counts.errors.entry(format!("{:?}", error.kind())),
        };
        *count.or_default() += 1;
    }
    counts
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
        let pairs = [
            (&mut self.answers, other.answers),
            (&mut self.errors, other.errors),
            (&mut self.peers, other.peers),
        ];
        for (sum, part) in pairs {
            part.into_iter().for_each(|(key, n)| *sum.entry(key).or_default() += n);
        }
        self
    }
}

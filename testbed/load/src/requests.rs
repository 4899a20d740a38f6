//! `requests`: HTTP requests, each on a connection of its own, and what became of each.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use serde_json::{Value, json};
use signal_hook::consts::SIGTERM;
use signal_hook::flag;

/// How long a connection, and each read, may take before it counts as failed.
const PATIENCE: Duration = Duration::from_secs(30);

/// The most that is read of an answer, in bytes.
const MAX_ANSWER: u64 = 64 * 1024;

/// The arguments of this command.
#[derive(Args, Clone, Debug)]
pub struct Requests {
    /// Where to connect to
    #[arg(value_name = "ADDR:PORT")]
    pub address: SocketAddr,
    /// How many requests at most; SIGTERM ends them earlier
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100_000_000))]
    pub times: u32,
    /// Connections opened a second, whatever became of those before; `opened N` is printed for each
    /// second's worth. Without it, as fast as it goes
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub rate: Option<u32>,
    /// How many connections at once
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub threads: u16,
}

/// The remaining work, which all threads share.
struct Work<'a> {
    requests: &'a Requests,
    start: Instant,
    next: AtomicU32,
    is_stopped: Arc<AtomicBool>,
}

#[derive(Default)]
struct Counts {
    n_opened: u64,
    answers: BTreeMap<String, u64>,
    errors: BTreeMap<String, u64>,
    peers: BTreeMap<String, u64>,
}

impl Requests {
    /// Runs, and reports: how many connections were opened, how often each answer, each error (a
    /// `std::io::ErrorKind`) and each peer address came, how long it took, and whether it was stopped.
    ///
    /// # Errors
    /// When SIGTERM can't be handled.
    pub fn run(&self) -> anyhow::Result<Value> {
        let is_stopped = Arc::new(AtomicBool::new(false));
        flag::register(SIGTERM, Arc::clone(&is_stopped)).context("handle SIGTERM")?;
        let (start, next) = (Instant::now(), AtomicU32::new(0));
        let work = Work { requests: self, start, next, is_stopped };
        let counts = thread::scope(|scope| {
            let threads: Vec<_> = (0..self.threads).map(|_| scope.spawn(|| work.run())).collect();
            let counts = threads.into_iter().filter_map(|thread| thread.join().ok());
            counts.fold(Counts::default(), Counts::add)
        });
        let Counts { n_opened, answers, errors, peers } = counts;
        Ok(json!({
            "requests": n_opened,
            "was_stopped": work.is_stopped.load(Ordering::Relaxed),
            "answers": answers,
            "errors": errors,
            "peers": peers,
            "took_ms": start.elapsed().as_millis() as u64,
        }))
    }
}

impl Work<'_> {
    /// Opens connections, each when it is due, until it is stopped or all are opened.
    fn run(&self) -> Counts {
        let Requests { address, times, rate, .. } = *self.requests;
        let mut counts = Counts::default();
        loop {
            let n = self.next.fetch_add(1, Ordering::Relaxed);
            if n >= times {
                return counts;
            }
            if let Some(rate) = rate {
                let due = self.start + Duration::from_secs(1) * n / rate;
                thread::sleep(due.saturating_duration_since(Instant::now()));
            }
            if self.is_stopped.load(Ordering::Relaxed) {
                return counts;
            }
            counts.n_opened += 1;
            if n > 0 && rate.is_some_and(|rate| n.is_multiple_of(rate)) {
                println!("opened {n}");
            }
            let answered = counts.ask(address);
            let count = match answered {
                Ok(answer) => counts.answers.entry(answer),
                Err(error) => counts.errors.entry(format!("{:?}", error.kind())),
            };
            *count.or_default() += 1;
        }
    }
}

impl Counts {
    /// Connects, sends a request, and returns the body of the answer.
    fn ask(&mut self, address: SocketAddr) -> io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        *self.peers.entry(stream.peer_addr()?.to_string()).or_default() += 1;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.take(MAX_ANSWER).read_to_string(&mut answer)?;
        let body = answer.split_once("\r\n\r\n").map(|(_, body)| body.trim_end().to_owned());
        body.ok_or(io::ErrorKind::UnexpectedEof.into())
    }

    fn add(mut self, other: Counts) -> Counts {
        let pairs = [
            (&mut self.answers, other.answers),
            (&mut self.errors, other.errors),
            (&mut self.peers, other.peers),
        ];
        for (sum, part) in pairs {
            part.into_iter().for_each(|(key, n)| *sum.entry(key).or_default() += n);
        }
        self.n_opened += other.n_opened;
        self
    }
}

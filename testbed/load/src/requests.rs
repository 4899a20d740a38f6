//! `requests`: HTTP requests, each on a connection of its own, and what became of each.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use serde_json::{Value, json};
use signal_hook::consts::SIGTERM;
use signal_hook::flag;

use crate::clock::now_ns;
use crate::latency::Latency;

/// How long a connection, and each read, may take before it counts as failed.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long a lookup may take: as long as resolvers wait before they ask again.
const LOOKUP_PATIENCE: Duration = Duration::from_secs(5);

/// The most that is read of an answer, in bytes.
const MAX_ANSWER: u64 = 64 * 1024;

/// The arguments of this command.
#[derive(Args, Clone, Debug)]
pub struct Requests {
    /// Where to connect to
    #[arg(value_name = "ADDR:PORT")]
    pub address: SocketAddr,
    /// Look this name up before each connection, by one query that isn't repeated, and connect to its
    /// address; of ADDR:PORT only the port is used then
    #[arg(long, value_parser = name)]
    pub name: Option<Name>,
    /// The DNS server that is asked for it
    #[arg(long, default_value = "127.0.0.1:53")]
    pub resolver: SocketAddr,
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

/// A domain name on the wire.
#[derive(Clone, Debug)]
pub struct Name(Vec<u8>);

fn name(text: &str) -> Result<Name, String> {
    let mut wire = Vec::new();
    for label in text.trim_end_matches('.').split('.') {
        let len = u8::try_from(label.len()).ok().filter(|len| (1..64).contains(len));
        wire.push(len.ok_or("a label has 1 to 63 bytes")?);
        wire.extend(label.bytes());
    }
    wire.push(0);
    Ok(Name(wire))
}

/// The remaining work, which all threads share.
struct Work<'a> {
    requests: &'a Requests,
    start: Instant,
    next: AtomicU32,
    is_stopped: Arc<AtomicBool>,
}

struct Counts {
    n_opened: u64,
    answers: BTreeMap<String, u64>,
    errors: BTreeMap<String, u64>,
    peers: BTreeMap<String, u64>,
    lookups: Latency,
    all: Latency,
}

impl Requests {
    /// Runs, and reports: how many connections were opened, how often each answer, each error (a
    /// `std::io::ErrorKind`; of a lookup with `lookup: ` before it) and each peer address came, how long
    /// lookups and whole requests took, how long it took in all, and whether it was stopped.
    ///
    /// # Errors
    /// When SIGTERM can't be handled.
    pub fn run(&self) -> anyhow::Result<Value> {
        let is_stopped = Arc::new(AtomicBool::new(false));
        flag::register(SIGTERM, Arc::clone(&is_stopped)).context("handle SIGTERM")?;
        let (start, next) = (Instant::now(), AtomicU32::new(0));
        let work = Work { requests: self, start, next, is_stopped };
        let none = Counts::new()?;
        let counts = thread::scope(|scope| {
            let threads: Vec<_> = (0..self.threads).map(|_| scope.spawn(|| work.run())).collect();
            let counts = threads.into_iter().filter_map(|thread| thread.join().ok()?.ok());
            counts.fold(none, Counts::add)
        });
        let Counts { n_opened, answers, errors, peers, lookups, all } = counts;
        Ok(json!({
            "requests": n_opened,
            "was_stopped": work.is_stopped.load(Ordering::Relaxed),
            "answers": answers,
            "errors": errors,
            "peers": peers,
            "lookup_us": lookups.to_json_us(),
            "request_us": all.to_json_us(),
            "took_ms": start.elapsed().as_millis() as u64,
        }))
    }
}

impl Work<'_> {
    /// Opens connections, each when it is due, until it is stopped or all are opened.
    fn run(&self) -> anyhow::Result<Counts> {
        let Requests { times, rate, .. } = *self.requests;
        let mut counts = Counts::new()?;
        loop {
            let n = self.next.fetch_add(1, Ordering::Relaxed);
            if n >= times {
                return Ok(counts);
            }
            if let Some(rate) = rate {
                let due = self.start + Duration::from_secs(1) * n / rate;
                thread::sleep(due.saturating_duration_since(Instant::now()));
            }
            if self.is_stopped.load(Ordering::Relaxed) {
                return Ok(counts);
            }
            counts.n_opened += 1;
            if n > 0 && rate.is_some_and(|rate| n.is_multiple_of(rate)) {
                println!("opened {n}");
            }
            let start_ns = now_ns();
            let count = match counts.find(self.requests, n) {
                Err(error) => counts.errors.entry(format!("lookup: {:?}", error.kind())),
                Ok(address) => match counts.ask(address) {
                    Ok(answer) => counts.answers.entry(answer),
                    Err(error) => counts.errors.entry(format!("{:?}", error.kind())),
                },
            };
            *count.or_default() += 1;
            counts.all.record(now_ns() - start_ns);
        }
    }
}

impl Counts {
    fn new() -> anyhow::Result<Counts> {
        Ok(Counts {
            n_opened: 0,
            answers: BTreeMap::new(),
            errors: BTreeMap::new(),
            peers: BTreeMap::new(),
            lookups: Latency::coarse()?,
            all: Latency::coarse()?,
        })
    }

    /// The address to connect to, by a lookup where a name is given.
    fn find(&mut self, requests: &Requests, n: u32) -> io::Result<SocketAddr> {
        let Some(Name(name)) = &requests.name else { return Ok(requests.address) };
        let start_ns = now_ns();
        let address = lookup(name, requests.resolver, n as u16)?;
        self.lookups.record(now_ns() - start_ns);
        Ok(SocketAddr::new(address.into(), requests.address.port()))
    }

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
        self.lookups.add(&other.lookups);
        self.all.add(&other.all);
        self
    }
}

/// The first address of a name, by one query from a socket of its own (RFC 1035, section 4.1).
fn lookup(name: &[u8], resolver: SocketAddr, id: u16) -> io::Result<Ipv4Addr> {
    let any = if resolver.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any)?;
    socket.connect(resolver)?;
    socket.set_read_timeout(Some(LOOKUP_PATIENCE))?;
    let [high, low] = id.to_be_bytes();
    let query = [&[high, low, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0], name, &[0, 1, 0, 1]].concat();
    socket.send(&query)?;
    let mut answer = [0; 512];
    let len = socket.recv(&mut answer)?;
    let answer = answer.get(..len).unwrap_or_default();
    let wrong = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    if answer.len() < query.len() || answer[..2] != query[..2] {
        return Err(wrong("no answer to the query"));
    }
    match (answer[3] & 0xf, answer[7]) {
        (0, 1..) => {}
        (2, _) => return Err(io::Error::other("SERVFAIL")),
        (3, _) => return Err(io::Error::new(io::ErrorKind::NotFound, "NXDOMAIN")),
        _ => return Err(wrong("no address")),
    }
    // A pointer to the name, the type, the class, the time to live, the length, the address.
    let record: Option<&[u8; 16]> = answer.get(query.len()..).and_then(<[u8]>::first_chunk);
    match record {
        Some([0xc0, 12, 0, 1, 0, 1, _, _, _, _, 0, 4, a, b, c, d]) => {
            Ok(Ipv4Addr::new(*a, *b, *c, *d))
        }
        _ => Err(wrong("another record than A")),
    }
}

//! `udp serve ADDR:PORT NAME`: answers each datagram with `NAME DATAGRAM`.
//! `udp ask ADDR:PORT connected|unconnected N`: N sockets ask in turn, each waiting for its answer,
//! round after round. For each round it prints one JSON document: who answered in it, and since the
//! start how many questions got no answer, how many answers came from another address than was
//! asked, how often the sockets were told that their backend had left (in all, and the most of one
//! socket), and how often each other error came.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

/// How long an answer may take before it counts as lost.
const PATIENCE: Duration = Duration::from_secs(30);

/// Between two rounds.
const PAUSE: Duration = Duration::from_millis(10);

fn main() -> io::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let usage = || -> io::Error { ErrorKind::InvalidInput.into() };
    let address = |text: &str| text.parse::<SocketAddr>().map_err(|_| usage());
    match words[..] {
        ["serve", listen, name] => serve(address(listen)?, name),
        ["ask", connected, how, n] => {
            let is_connected = how == "connected";
            ask(address(connected)?, is_connected, n.parse().map_err(|_| usage())?)
        }
        _ => Err(usage()),
    }
}

fn serve(listen: SocketAddr, name: &str) -> io::Result<()> {
    let socket = UdpSocket::bind(listen)?;
    println!("listening on {}", socket.local_addr()?);
    let mut datagram = [0; 1024];
    loop {
        // A client that is gone is its own affair.
        let Ok((length, from)) = socket.recv_from(&mut datagram) else { continue };
        let mut answer = format!("{name} ").into_bytes();
        answer.extend_from_slice(&datagram[..length]);
        let _ = socket.send_to(&answer, from);
    }
}

#[derive(Default)]
struct Counts {
    n_asked: u64,
    n_lost: u64,
    n_strange: u64,
    errors: BTreeMap<String, u64>,
}

struct Asker {
    socket: UdpSocket,
    n_told: u64,
}

fn ask(connected: SocketAddr, is_connected: bool, n_sockets: usize) -> io::Result<()> {
    let mut askers = Vec::new();
    for _ in 0..n_sockets {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        if is_connected {
            socket.connect(connected)?;
        }
        askers.push(Asker { socket, n_told: 0 });
    }
    let mut counts = Counts::default();
    loop {
        let mut answered_by = BTreeSet::new();
        for asker in &mut askers {
            counts.n_asked += 1;
            let question = counts.n_asked.to_string();
            match asker.ask(connected, is_connected, &question, &mut counts.n_strange) {
                Ok(name) => drop(answered_by.insert(name)),
                Err(error) if asker.is_told(&error)? => {
                    asker.n_told += 1;
                    asker.discard_queued()?;
                    asker.socket.connect(connected)?;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => counts.n_lost += 1,
                Err(error) => {
                    *counts.errors.entry(format!("{:?}", error.kind())).or_default() += 1;
                }
            }
        }
        let report = json!({
            "answered_by": answered_by,
            "asked": counts.n_asked,
            "lost": counts.n_lost,
            "strange": counts.n_strange,
            "told": askers.iter().map(|asker| asker.n_told).sum::<u64>(),
            "most_told": askers.iter().map(|asker| asker.n_told).max(),
            "errors": counts.errors,
        });
        println!("{report}");
        thread::sleep(PAUSE);
    }
}

impl Asker {
    /// Whether the kernel says that the socket's backend left. It says so to whoever receives; who
    /// sends first gets EDESTADDRREQ, because the socket isn't connected any more, and finds the
    /// reason in SO_ERROR.
    fn is_told(&self, error: &io::Error) -> io::Result<bool> {
        let reason = self.socket.take_error()?;
        let mut reasons = reason.iter().chain([error]);
        Ok(reasons.any(|error| error.kind() == ErrorKind::ConnectionAborted))
    }

    /// Discards what came before the backend left: once the socket is connected again, it would be
    /// shown as its sender's, not as the VIP's.
    fn discard_queued(&self) -> io::Result<()> {
        self.socket.set_nonblocking(true)?;
        while self.socket.recv(&mut [0; 1024]).is_ok() {}
        self.socket.set_nonblocking(false)
    }

    /// Asks once, and returns the name of who answered.
    fn ask(
        &self,
        connected: SocketAddr,
        is_connected: bool,
        question: &str,
        n_strange: &mut u64,
    ) -> io::Result<String> {
        if is_connected {
            self.socket.send(question.as_bytes())?;
        } else {
            self.socket.send_to(question.as_bytes(), connected)?;
        }
        let deadline = Instant::now() + PATIENCE;
        let mut datagram = [0; 1024];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ErrorKind::WouldBlock.into());
            }
            self.socket.set_read_timeout(Some(left))?;
            let (length, from) = self.socket.recv_from(&mut datagram)?;
            if from != connected {
                // Taken out of its queue in the moment in which the socket was told.
                if let Some(told) = self.socket.take_error()? {
                    return Err(told);
                }
                *n_strange += 1;
            }
            let answer = String::from_utf8_lossy(&datagram[..length]).into_owned();
            // What answers an earlier question came too late to count.
            if let Some((name, answered)) = answer.split_once(' ')
                && answered == question
            {
                return Ok(name.to_owned());
            }
        }
    }
}

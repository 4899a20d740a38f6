//! `udp-rounds`: sockets that ask in turn, each waiting for its answer, round after round. Each round is
//! one JSON document: who answered in it, and since the start how many questions got no answer, how many
//! answers came from another address than the request's, how often sockets were disconnected because their
//! backend had left (in all, and the most of one socket), and how often each other error came.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::json;

/// How long an answer may take before it counts as lost.
const PATIENCE: Duration = Duration::from_secs(30);

/// Between two rounds.
const PAUSE: Duration = Duration::from_millis(10);

/// The arguments of this command.
#[derive(Args, Clone, Debug)]
pub struct UdpRounds {
    /// Where the server is
    #[arg(value_name = "ADDR:PORT")]
    pub address: SocketAddr,
    /// How many sockets
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub sockets: u32,
    /// Name the address with each datagram instead of connecting
    #[arg(long)]
    pub unconnected: bool,
}

#[derive(Default)]
struct Counts {
    n_requests: u64,
    n_lost: u64,
    n_wrong_source: u64,
    errors: BTreeMap<String, u64>,
}

struct Client {
    socket: UdpSocket,
    n_aborted: u64,
}

impl UdpRounds {
    /// Sends requests without end.
    ///
    /// # Errors
    /// When a socket can't be opened or connected.
    pub fn run(&self) -> anyhow::Result<()> {
        let mut clients = Vec::new();
        for _ in 0..self.sockets {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            if !self.unconnected {
                socket.connect(self.address)?;
            }
            clients.push(Client { socket, n_aborted: 0 });
        }
        let mut counts = Counts::default();
        loop {
            let mut answered_by = BTreeSet::new();
            for client in &mut clients {
                counts.n_requests += 1;
                let question = counts.n_requests.to_string();
                match client.ask(self, &question, &mut counts.n_wrong_source) {
                    Ok(name) => drop(answered_by.insert(name)),
                    Err(error) if client.is_aborted(&error)? => {
                        client.n_aborted += 1;
                        client.discard_queued()?;
                        client.socket.connect(self.address)?;
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => counts.n_lost += 1,
                    Err(error) => {
                        *counts.errors.entry(format!("{:?}", error.kind())).or_default() += 1;
                    }
                }
            }
            let round = json!({
                "answered_by": answered_by,
                "requests": counts.n_requests,
                "lost": counts.n_lost,
                "wrong_source": counts.n_wrong_source,
                "aborted": clients.iter().map(|client| client.n_aborted).sum::<u64>(),
                "most_aborted": clients.iter().map(|client| client.n_aborted).max(),
                "errors": counts.errors,
            });
            println!("{round}");
            thread::sleep(PAUSE);
        }
    }
}

impl Client {
    /// Whether the socket was disconnected because its backend left. A receiver gets ECONNABORTED; a
    /// sender gets EDESTADDRREQ, because the socket isn't connected any more, and finds the reason in
    /// SO_ERROR.
    fn is_aborted(&self, error: &io::Error) -> io::Result<bool> {
        let reason = self.socket.take_error()?;
        let mut reasons = reason.iter().chain([error]);
        Ok(reasons.any(|error| error.kind() == ErrorKind::ConnectionAborted))
    }

    /// Discards answers from before the backend left: once the socket is connected again, it would be
    /// shown as its sender's, not as the VIP's.
    fn discard_queued(&self) -> io::Result<()> {
        self.socket.set_nonblocking(true)?;
        while self.socket.recv(&mut [0; 1024]).is_ok() {}
        self.socket.set_nonblocking(false)
    }

    /// Sends one request, and returns the name in the answer.
    fn ask(
        &self,
        UdpRounds { address, unconnected, .. }: &UdpRounds,
        question: &str,
        n_wrong_source: &mut u64,
    ) -> io::Result<String> {
        if *unconnected {
            self.socket.send_to(question.as_bytes(), address)?;
        } else {
            self.socket.send(question.as_bytes())?;
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
            if from != *address {
                // Taken out of its queue in the moment in which the socket was disconnected.
                if let Some(reason) = self.socket.take_error()? {
                    return Err(reason);
                }
                *n_wrong_source += 1;
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

//! `delay`: a TCP proxy that is slow on purpose, and by how much is known.

use std::collections::VecDeque;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;

use clap::Args;
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::sockopt::set_tcp_nodelay;
use rustix::net::{RecvFlags, SendFlags, Shutdown, SocketFlags, accept_with, recv, send, shutdown};

use crate::clock::now_ns;
use crate::epoll::{ENDED, Poller, STREAM};
use crate::print_address;
use crate::{banner_server, stream};

/// The most bytes that wait in one direction of a connection. Further ones stay in the kernel.
const MAX_WAITING: usize = 4 * 1024 * 1024;

/// Connections accepted between two looks at the others.
const N_BURST: usize = 64;

/// The token of the listener; a pair's tokens are twice its place, and one more for the server.
const LISTENER: u64 = u64::MAX;

/// The arguments of this command.
#[derive(Args, Clone, Debug)]
pub struct Delay {
    /// Where to listen
    #[arg(value_name = "LISTEN_ADDR:PORT")]
    pub address: SocketAddr,
    /// Where to forward to
    #[arg(value_name = "BACKEND_ADDR:PORT")]
    pub backend: SocketAddr,
    /// How long what a client sends waits before it is forwarded, in microseconds
    #[arg(long, value_parser = clap::value_parser!(u64).range(0..=60_000_000))]
    pub delay_us: u64,
}

impl Delay {
    /// Forwards until it is killed.
    ///
    /// # Errors
    /// When it can't listen there.
    pub fn run(&self) -> anyhow::Result<()> {
        let listener = banner_server::listen(self.address)?;
        print_address(listener.local_addr()?);
        serve(listener, self.backend, self.delay_us * 1000)
    }
}

/// Forwards until it is killed.
///
/// # Errors
/// When the machine lacks memory, threads or file descriptors.
pub fn serve(listener: TcpListener, backend: SocketAddr, delay_ns: u64) -> anyhow::Result<()> {
    listener.set_nonblocking(true)?;
    let poller = Poller::new()?;
    poller.add(&listener, LISTENER, EventFlags::IN)?;
    let mut proxy = Proxy {
        poller,
        listener,
        backend,
        delay_ns,
        pairs: Vec::new(),
        vacant: Vec::new(),
        timers: VecDeque::new(),
        buffer: vec![0; 64 * 1024],
    };
    loop {
        proxy.turn()?;
    }
}

struct Proxy {
    poller: Poller,
    listener: TcpListener,
    backend: SocketAddr,
    delay_ns: u64,
    pairs: Vec<Option<Pair>>,
    /// Places in `pairs` that are free.
    vacant: Vec<usize>,
    /// When something of which pair may be forwarded, in order, since all wait for equally long. One
    /// that outlives its pair makes another one check once without a result.
    timers: VecDeque<(u64, usize)>,
    buffer: Vec<u8>,
}

/// A client and its server.
struct Pair {
    client: Side,
    server: Side,
    up: Direction,
    down: Direction,
}

/// A stream, and what may be tried on it.
struct Side {
    socket: OwnedFd,
    is_readable: bool,
    is_writable: bool,
    has_ended: bool,
}

/// From one side to the other.
struct Direction {
    delay_ns: u64,
    /// Each with the time from which it may be forwarded. An empty one is the end.
    chunks: VecDeque<(u64, Vec<u8>)>,
    /// How much of the first one is forwarded already.
    n_forwarded: usize,
    n_waiting: usize,
    is_read: bool,
    is_done: bool,
}

impl Proxy {
    fn turn(&mut self) -> anyhow::Result<()> {
        let release_ns = self.timers.front().map(|(release_ns, _)| *release_ns);
        let timeout_ns = release_ns.map(|release_ns| release_ns.saturating_sub(now_ns()));
        let mut is_requested = false;
        for event_idx in 0..self.poller.wait(timeout_ns)? {
            let (token, flags) = self.poller.event(event_idx);
            if token == LISTENER {
                is_requested = true;
                continue;
            }
            let pair_idx = (token / 2) as usize;
            let Some(Some(pair)) = self.pairs.get_mut(pair_idx) else { continue };
            let side = if token % 2 == 0 { &mut pair.client } else { &mut pair.server };
            side.is_readable |= flags.intersects(EventFlags::IN | ENDED);
            side.is_writable |= flags.intersects(EventFlags::OUT | ENDED);
            side.has_ended |= flags.intersects(ENDED);
            self.pump(pair_idx);
        }
        while let Some(&(release_ns, pair_idx)) = self.timers.front() {
            if release_ns > now_ns() {
                break;
            }
            self.timers.pop_front();
            self.pump(pair_idx);
        }
        if is_requested {
            for _ in 0..N_BURST {
                let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
                // A client that closes its connection is no error.
                let Ok(client) = accept_with(&self.listener, flags) else { break };
                let _ = self.pair(client);
            }
        }
        Ok(())
    }

    /// Pairs a client with a server. Where that fails, the client is hung up on.
    fn pair(&mut self, client: OwnedFd) -> Result<(), Errno> {
        set_tcp_nodelay(&client, true)?;
        let server = stream::connect(self.backend)?;
        let pair_idx = self.vacant.last().copied().unwrap_or(self.pairs.len());
        self.poller.add(&client, 2 * pair_idx as u64, STREAM)?;
        self.poller.add(&server, 2 * pair_idx as u64 + 1, STREAM)?;
        let pair = Pair {
            client: Side::new(client),
            server: Side::new(server),
            up: Direction::new(self.delay_ns),
            down: Direction::new(0),
        };
        if self.vacant.pop().is_some() {
            self.pairs[pair_idx] = Some(pair);
        } else {
            self.pairs.push(Some(pair));
        }
        Ok(())
    }

    /// Moves what can be moved, and drops the pair when that is all, or when it broke.
    fn pump(&mut self, pair_idx: usize) {
        let Some(Some(Pair { client, server, up, down })) = self.pairs.get_mut(pair_idx) else {
            return;
        };
        let timers = &mut self.timers;
        let wake_at = |release_ns| timers.push_back((release_ns, pair_idx));
        let moved = up
            .pump(client, server, &mut self.buffer, wake_at)
            .and_then(|()| down.pump(server, client, &mut self.buffer, |_| {}));
        if moved.is_err() || up.is_done && down.is_done {
            self.pairs[pair_idx] = None;
            self.vacant.push(pair_idx);
        }
    }
}

impl Side {
    fn new(socket: OwnedFd) -> Side {
        Side { socket, is_readable: false, is_writable: false, has_ended: false }
    }

    /// What arrived; `None` when nothing more is there now.
    fn read(&mut self, buffer: &mut [u8]) -> Result<Option<usize>, Errno> {
        if !self.is_readable {
            return Ok(None);
        }
        match recv(&self.socket, &mut *buffer, RecvFlags::empty()) {
            Ok((n_received, _)) => {
                // Once it has ended, there is no further event.
                self.is_readable = n_received == buffer.len() || self.has_ended;
                Ok(Some(n_received))
            }
            Err(Errno::AGAIN) => {
                self.is_readable = false;
                Ok(None)
            }
            Err(errno) => Err(errno),
        }
    }
}

impl Direction {
    fn new(delay_ns: u64) -> Direction {
        Direction {
            delay_ns,
            chunks: VecDeque::new(),
            n_forwarded: 0,
            n_waiting: 0,
            is_read: false,
            is_done: false,
        }
    }

    /// Moves what can be moved.
    fn pump(
        &mut self,
        from: &mut Side,
        to: &mut Side,
        buffer: &mut [u8],
        mut wake_at: impl FnMut(u64),
    ) -> Result<(), Errno> {
        loop {
            self.forward(to)?;
            if self.is_read || self.n_waiting >= MAX_WAITING {
                return Ok(());
            }
            let Some(n_received) = from.read(buffer)? else { return Ok(()) };
            let release_ns = now_ns() + self.delay_ns;
            self.is_read = n_received == 0;
            self.n_waiting += n_received;
            self.chunks.push_back((release_ns, buffer[..n_received].to_vec()));
            wake_at(release_ns);
        }
    }

    /// Writes what waited for long enough.
    fn forward(&mut self, to: &mut Side) -> Result<(), Errno> {
        while to.is_writable
            && let Some((release_ns, chunk)) = self.chunks.front()
        {
            if *release_ns > now_ns() {
                return Ok(());
            }
            if chunk.is_empty() {
                self.is_done = true;
                self.chunks.clear();
                // The other side may be gone already.
                let _ = shutdown(&to.socket, Shutdown::Write);
                return Ok(());
            }
            match send(&to.socket, &chunk[self.n_forwarded..], SendFlags::NOSIGNAL) {
                Ok(n_sent) => {
                    self.n_forwarded += n_sent;
                    self.n_waiting -= n_sent;
                    if self.n_forwarded == chunk.len() {
                        self.n_forwarded = 0;
                        self.chunks.pop_front();
                    }
                }
                Err(Errno::AGAIN) => to.is_writable = false,
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpStream;
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;

    /// So long that a stall of the machine isn't taken for many of them.
    const DELAY: Duration = Duration::from_millis(500);

    /// A proxy before a server that does `serve` with each connection.
    fn delayed(serve_one: fn(TcpStream)) -> SocketAddr {
        let backend = TcpListener::bind("127.0.0.1:0").unwrap();
        let backend_address = backend.local_addr().unwrap();
        thread::spawn(move || {
            for stream in backend.incoming() {
                thread::spawn(move || serve_one(stream.unwrap()));
            }
        });
        let listener = banner_server::listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || serve(listener, backend_address, DELAY.as_nanos() as u64));
        address
    }

    fn echo(mut stream: TcpStream) {
        let mut buffer = [0; 1024];
        loop {
            match stream.read(&mut buffer).unwrap() {
                0 => return,
                n_read => stream.write_all(&buffer[..n_read]).unwrap(),
            }
        }
    }

    #[test]
    fn each_request_of_a_connection_waits() {
        let address = delayed(echo);
        let mut streams = [(); 8].map(|()| TcpStream::connect(address).unwrap());
        let start = Instant::now();
        for _ in 0..2 {
            let sent = Instant::now();
            streams.iter_mut().for_each(|stream| stream.write_all(b"ping").unwrap());
            for stream in &mut streams {
                let mut answer = [0; 4];
                stream.read_exact(&mut answer).unwrap();
                assert_eq!(&answer, b"ping");
                assert!(sent.elapsed() >= DELAY, "{:?}", sent.elapsed());
            }
        }
        // They don't wait for each other: 16 requests, but two waits.
        assert!(start.elapsed() < 16 * DELAY, "{:?}", start.elapsed());
    }

    #[test]
    fn an_end_is_passed_on_and_the_answer_still_comes() {
        // Answers only after the client has ended its side.
        let address = delayed(|mut stream| {
            let mut all = Vec::new();
            stream.read_to_end(&mut all).unwrap();
            stream.write_all(&all).unwrap();
        });
        let mut stream = TcpStream::connect(address).unwrap();
        let sent: Vec<u8> = (0..1_000_000).map(|n| n as u8).collect();
        stream.write_all(&sent).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        assert!(answer == sent, "{} bytes of {}", answer.len(), sent.len());
    }

    #[test]
    fn without_a_backend_the_client_is_hung_up_on() {
        let backend = TcpListener::bind("127.0.0.1:0").unwrap();
        let backend_address = backend.local_addr().unwrap();
        drop(backend);
        let listener = banner_server::listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || serve(listener, backend_address, 0));
        let mut stream = TcpStream::connect(address).unwrap();
        assert!(!matches!(stream.read(&mut [0]), Ok(1)));
    }
}

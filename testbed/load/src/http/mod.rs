//! `http`: requests at a fixed rate, whatever became of those before.

mod tally;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use clap::Args;
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use serde_json::Value;

use crate::answer::Answer;
use crate::clock::{MILLISECOND_NS, now_ns};
use crate::epoll::{ENDED, Poller, STREAM};
use crate::errors::{self, Name};
use crate::limits::{path, rate, seconds};
use crate::pacer::Schedule;
use crate::stream;
use tally::Tally;

/// Requests sent between two looks at the answers, so that those aren't found too late.
const N_BURST: usize = 16;

/// How long the server may take to end a connection that is done with. Who ends it first keeps the
/// port busy for a while, and a server has only one.
const LINGER_NS: u64 = 100 * MILLISECOND_NS;

/// The arguments of this command.
#[derive(Args, Clone, Debug)]
pub struct Http {
    /// Where the server is
    #[arg(value_name = "ADDR:PORT")]
    pub address: SocketAddr,
    /// Requests a second
    #[arg(long, value_parser = rate)]
    pub rate: f64,
    /// How long requests are due, in seconds, the warm-up included
    #[arg(long, value_parser = seconds)]
    pub seconds: f64,
    /// The most requests in flight, each on a connection of its own
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=60_000))]
    pub connections: u32,
    /// Open a new connection for each request
    #[arg(long)]
    pub close: bool,
    /// How long after it was due a request has failed, in milliseconds
    #[arg(long, default_value_t = 3000, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    pub timeout_ms: u64,
    /// How long after it was due an answer is slow, in milliseconds
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    pub slow_ms: u64,
    /// What to ask for
    #[arg(long, default_value = "/", value_parser = path)]
    pub path: String,
    /// Requests due in the first so many milliseconds aren't counted
    #[arg(long, default_value_t = 0)]
    pub warmup_ms: u64,
}

impl Http {
    /// The problem of the combined arguments, if there is one.
    pub fn problem(&self) -> Option<String> {
        (self.warmup_ms as f64 >= self.seconds * 1000.0).then(|| {
            format!(
                "invalid value '{}' for '--warmup-ms': nothing would be counted; make it less than \
                 the {} ms of '--seconds'",
                self.warmup_ms,
                self.seconds * 1000.0
            )
        })
    }

    /// Makes the requests, and reports.
    ///
    /// # Errors
    /// When the machine can't, such as for too many open files.
    pub fn run(&self) -> anyhow::Result<Value> {
        println!("requesting");
        let start_ns = now_ns();
        let counted_ns = start_ns + self.warmup_ms * MILLISECOND_NS;
        let mut client = Client {
            poller: Poller::new()?,
            address: self.address,
            request: self.request().into_bytes(),
            is_keeping: !self.close,
            n_most: self.connections as usize,
            timeout_ns: self.timeout_ms * MILLISECOND_NS,
            schedule: Schedule::new(start_ns, self.rate, self.seconds),
            tally: Tally::new(counted_ns, self.slow_ms * MILLISECOND_NS)?,
            connections: Vec::new(),
            vacant: Vec::new(),
            idle: VecDeque::new(),
            in_flight: VecDeque::new(),
            lingering: VecDeque::new(),
            n_open: 0,
            n_busy: 0,
            n_requests: 0,
            buffer: vec![0; 64 * 1024],
        };
        client.run()?;
        Ok(client.tally.to_json())
    }

    fn request(&self) -> String {
        let connection = if self.close { "Connection: close\r\n" } else { "" };
        format!("GET {} HTTP/1.1\r\nHost: {}\r\n{connection}\r\n", self.path, self.address)
    }
}

struct Client {
    poller: Poller,
    address: SocketAddr,
    request: Vec<u8>,
    /// Whether connections are kept for further requests.
    is_keeping: bool,
    /// The most requests in flight, and the most connections that may bear one.
    n_most: usize,
    timeout_ns: u64,
    schedule: Schedule,
    tally: Tally,
    connections: Vec<Option<Connection>>,
    /// Places in `connections` that are free.
    vacant: Vec<usize>,
    /// Those that wait for a request, the longest waiting first.
    idle: VecDeque<Reference>,
    /// In the order in which their requests were due.
    in_flight: VecDeque<Reference>,
    /// In the order in which they are given up: when, and which.
    lingering: VecDeque<(u64, Reference)>,
    /// Connections but the lingering ones.
    n_open: usize,
    n_busy: usize,
    n_requests: u64,
    buffer: Vec<u8>,
}

struct Connection {
    socket: OwnedFd,
    state: State,
    /// The number of the last request on it.
    request_n: u64,
    /// When that was due.
    due_ns: u64,
    answer: Answer,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    Connecting,
    Waiting,
    Idle,
    Lingering,
}

/// A connection as it was during a request. It means nothing any more after the next one.
#[derive(Clone, Copy)]
struct Reference {
    connection_idx: usize,
    request_n: u64,
}

impl Client {
    fn run(&mut self) -> anyhow::Result<()> {
        loop {
            self.expire(now_ns());
            for _ in 0..N_BURST {
                if !self.send_next()? {
                    break;
                }
            }
            if self.n_busy == 0 && self.schedule.next_due_ns().is_none() {
                return Ok(());
            }
            let wake_ns = [self.send_ns(), self.expiry_ns()].into_iter().flatten().min();
            let timeout_ns = wake_ns.map(|wake_ns| wake_ns.saturating_sub(now_ns()));
            for event_idx in 0..self.poller.wait(timeout_ns)? {
                let (token, flags) = self.poller.event(event_idx);
                self.handle(token as usize, flags);
            }
        }
    }

    /// When the next request can be sent; `None` while all connections are busy.
    fn send_ns(&self) -> Option<u64> {
        (self.n_busy < self.n_most).then(|| self.schedule.next_due_ns()).flatten()
    }

    /// When the next connection runs out of time.
    fn expiry_ns(&self) -> Option<u64> {
        let in_flight = self.in_flight.front().and_then(|first| self.get(*first));
        let timeout_ns = in_flight.map(|connection| connection.due_ns + self.timeout_ns);
        let linger_ns = self.lingering.front().map(|(until_ns, _)| *until_ns);
        timeout_ns.into_iter().chain(linger_ns).min()
    }

    fn get(&self, reference: Reference) -> Option<&Connection> {
        let connection = self.connections.get(reference.connection_idx)?.as_ref();
        connection.filter(|connection| connection.request_n == reference.request_n)
    }

    /// Fails the requests, and drops the connections, that ran out of time.
    fn expire(&mut self, now_ns: u64) {
        while let Some(&first) = self.in_flight.front() {
            let is_waiting = |connection: &&Connection| {
                matches!(connection.state, State::Connecting | State::Waiting)
            };
            if let Some(connection) = self.get(first).filter(is_waiting) {
                if connection.due_ns + self.timeout_ns > now_ns {
                    break;
                }
                self.fail(first.connection_idx, now_ns, errors::TIMEOUT);
            }
            self.in_flight.pop_front();
        }
        while let Some(&(until_ns, first)) = self.lingering.front() {
            if until_ns > now_ns && self.get(first).is_some() {
                break;
            }
            if self.get(first).is_some() {
                self.vacate(first.connection_idx);
            }
            self.lingering.pop_front();
        }
    }

    /// Sends one request if one is due and a connection is free for it.
    fn send_next(&mut self) -> anyhow::Result<bool> {
        if self.n_busy >= self.n_most {
            return Ok(false);
        }
        let now_ns = now_ns();
        let Some(due_ns) = self.schedule.take(now_ns) else { return Ok(false) };
        self.tally.due(due_ns);
        if due_ns + self.timeout_ns <= now_ns {
            self.tally.failed(due_ns, now_ns, errors::TIMEOUT);
            return Ok(true);
        }
        self.tally.sent(due_ns, now_ns);
        self.n_requests += 1;
        while self.n_open >= self.n_most {
            let Some(longest) = self.idle.pop_front() else { break };
            if self.get(longest).is_some_and(|connection| connection.state == State::Idle)
                && self.reuse(longest.connection_idx, due_ns)
            {
                return Ok(true);
            }
        }
        if let Err(errno) = self.open(due_ns) {
            self.tally.failed(due_ns, now_ns, errors::of_errno(errno));
        }
        Ok(true)
    }

    /// Sends on a connection that is open; false when it had ended meanwhile.
    fn reuse(&mut self, connection_idx: usize, due_ns: u64) -> bool {
        let Some(connection) = self.connections[connection_idx].as_mut() else { return false };
        if send_request(&connection.socket, &self.request).is_err() {
            self.n_open -= 1;
            self.vacate(connection_idx);
            return false;
        }
        connection.state = State::Waiting;
        connection.due_ns = due_ns;
        connection.request_n = self.n_requests;
        self.n_busy += 1;
        self.in_flight.push_back(Reference { connection_idx, request_n: self.n_requests });
        true
    }

    /// Opens a connection, and sends on it if that works at once, as it does on one machine.
    fn open(&mut self, due_ns: u64) -> Result<(), Errno> {
        let socket = stream::connect(self.address)?;
        let state = match send_request(&socket, &self.request) {
            Ok(()) => State::Waiting,
            Err(Errno::AGAIN) => State::Connecting,
            Err(errno) => return Err(errno),
        };
        let connection_idx = self.vacant.last().copied().unwrap_or(self.connections.len());
        self.poller.add(&socket, connection_idx as u64, STREAM)?;
        let request_n = self.n_requests;
        let connection = Connection { socket, state, request_n, due_ns, answer: Answer::default() };
        if self.vacant.pop().is_some() {
            self.connections[connection_idx] = Some(connection);
        } else {
            self.connections.push(Some(connection));
        }
        self.n_open += 1;
        self.n_busy += 1;
        self.in_flight.push_back(Reference { connection_idx, request_n });
        Ok(())
    }

    fn handle(&mut self, connection_idx: usize, flags: EventFlags) {
        let Some(Some(connection)) = self.connections.get_mut(connection_idx) else { return };
        match connection.state {
            State::Connecting => {
                if flags.intersects(EventFlags::OUT | ENDED) {
                    match send_request(&connection.socket, &self.request) {
                        Ok(()) => connection.state = State::Waiting,
                        Err(Errno::AGAIN) => {}
                        Err(errno) => {
                            self.fail(connection_idx, now_ns(), errors::of_errno(errno));
                        }
                    }
                }
            }
            State::Waiting => {
                if flags.intersects(EventFlags::IN | ENDED) {
                    self.read(connection_idx, flags.intersects(ENDED));
                }
            }
            State::Idle => {
                // The server ended it, or sends without a request.
                if flags.intersects(EventFlags::IN | ENDED) {
                    self.n_open -= 1;
                    self.vacate(connection_idx);
                }
            }
            State::Lingering => {
                if flags.intersects(ENDED) {
                    self.vacate(connection_idx);
                }
            }
        }
    }

    /// Reads all available bytes. Once the connection has ended, there is no further event.
    fn read(&mut self, connection_idx: usize, has_ended: bool) {
        let Some(connection) = self.connections[connection_idx].as_mut() else { return };
        let failure = loop {
            let received = recv(&connection.socket, &mut self.buffer[..], RecvFlags::empty());
            let n_received = match received {
                Ok((n_received, _)) => n_received,
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR) => continue,
                Err(errno) => break errors::of_errno(errno),
            };
            let now_ns = now_ns();
            let fed = match n_received {
                0 => connection.answer.end().map(Some).ok_or(errors::CLOSED),
                n => connection.answer.feed(&self.buffer[..n]).map_err(|_| errors::MALFORMED),
            };
            match fed {
                Ok(Some(complete)) => {
                    let due_ns = connection.due_ns;
                    match complete.status {
                        200 => self.tally.answered(due_ns, now_ns, complete.name),
                        status => {
                            self.tally.failed(due_ns, now_ns, errors::of_status(status));
                        }
                    }
                    let is_kept = self.is_keeping && complete.keep_alive && !has_ended;
                    let has_ended = has_ended || n_received == 0;
                    return self.finish(connection_idx, now_ns, is_kept, has_ended);
                }
                Ok(None) if n_received < self.buffer.len() && !has_ended => return,
                Ok(None) => {}
                Err(name) => break name,
            }
        };
        self.fail(connection_idx, now_ns(), failure);
    }

    /// The connection has answered.
    fn finish(&mut self, connection_idx: usize, now_ns: u64, is_kept: bool, has_ended: bool) {
        let Some(connection) = self.connections[connection_idx].as_mut() else { return };
        let reference = Reference { connection_idx, request_n: connection.request_n };
        self.n_busy -= 1;
        if is_kept {
            connection.answer.clear();
            connection.state = State::Idle;
            self.idle.push_back(reference);
            return;
        }
        self.n_open -= 1;
        if has_ended {
            self.vacate(connection_idx);
        } else {
            connection.state = State::Lingering;
            self.lingering.push_back((now_ns + LINGER_NS, reference));
        }
    }

    fn fail(&mut self, connection_idx: usize, now_ns: u64, name: Name) {
        if let Some(connection) = &self.connections[connection_idx] {
            self.tally.failed(connection.due_ns, now_ns, name);
            self.n_open -= 1;
            self.n_busy -= 1;
            self.vacate(connection_idx);
        }
    }

    /// Closes a connection. Its place is taken again only after all events of this wait.
    fn vacate(&mut self, connection_idx: usize) {
        self.connections[connection_idx] = None;
        self.vacant.push(connection_idx);
    }
}

/// Sends all of a request: on a connection that owes nothing, it fits.
fn send_request(socket: &OwnedFd, request: &[u8]) -> Result<(), Errno> {
    let n_sent = send(socket, request, SendFlags::NOSIGNAL)?;
    if n_sent == request.len() { Ok(()) } else { Err(Errno::NOBUFS) }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::net::{TcpListener, TcpStream};
    use std::thread;

    use serde_json::json;

    use super::*;

    /// Serves each connection in a thread: the n-th request of the n-th connection, both from 0,
    /// is answered with `answer`'s result; `None` ends the connection without one.
    fn serve(answer: impl Fn(u64, u64) -> Option<String> + Clone + Send + 'static) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            for (connection_n, stream) in (0..).zip(listener.incoming()) {
                let (stream, answer) = (stream.unwrap(), answer.clone());
                thread::spawn(move || converse(stream, |n| answer(connection_n, n)));
            }
        });
        address
    }

    fn converse(mut stream: TcpStream, answer: impl Fn(u64) -> Option<String>) {
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
        let mut n_requests = 0;
        while let Some(Ok(line)) = lines.next() {
            if line.is_empty() {
                let Some(answer) = answer(n_requests) else { return };
                stream.write_all(answer.as_bytes()).unwrap();
                n_requests += 1;
                if answer.contains("Connection: close") {
                    return;
                }
            }
        }
    }

    fn ok(name: &str) -> Option<String> {
        let length = name.len() + 1;
        Some(format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{name}\n"))
    }

    fn options(address: SocketAddr) -> Http {
        Http {
            address,
            rate: 1000.0,
            seconds: 0.2,
            connections: 4,
            close: false,
            timeout_ms: 3000,
            slow_ms: 3000,
            path: "/".to_owned(),
            warmup_ms: 0,
        }
    }

    fn total(report: &Value) -> u64 {
        report["answered"].as_u64().unwrap() + report["n_failed"].as_u64().unwrap()
    }

    #[test]
    fn all_are_answered_on_few_connections() {
        let address = serve(|connection_n, _| ok(&format!("b{connection_n}")));
        let report = Http { warmup_ms: 100, ..options(address) }.run().unwrap();
        assert_eq!(report["requests"], 100, "{report}");
        assert_eq!(report["requests_warmup"], 100, "{report}");
        assert_eq!(report["answered"], 100, "{report}");
        let servers = report["servers"].as_object().unwrap();
        assert_eq!(servers.keys().collect::<Vec<_>>(), ["b0", "b1", "b2", "b3"]);
        assert_eq!(report["by_second"], json!([{ "requests": 100, "failed": 0, "slow": 0 }]));
    }

    #[test]
    fn each_gets_a_connection_of_its_own() {
        let address = serve(|_, request_n| ok(&format!("r{request_n}")));
        let report = Http { close: true, ..options(address) }.run().unwrap();
        assert_eq!(report["answered"], 200, "{report}");
        assert_eq!(report["servers"], json!({ "r0": 200 }));
    }

    #[test]
    fn an_answer_without_a_length_ends_with_its_connection() {
        let answer = "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nb1\n";
        let address = serve(move |_, _| Some(answer.to_owned()));
        for close in [false, true] {
            let report = Http { close, ..options(address) }.run().unwrap();
            assert_eq!(report["servers"], json!({ "b1": 200 }), "{report}");
        }
    }

    #[test]
    fn a_server_that_says_close_is_left_silently() {
        let answer = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nb1";
        let address = serve(move |_, _| Some(answer.to_owned()));
        let report = options(address).run().unwrap();
        assert_eq!(report["answered"], 200, "{report}");
    }

    #[test]
    fn a_connection_that_ends_under_a_request_fails_it() {
        let address = serve(|_, request_n| if request_n == 0 { ok("b1") } else { None });
        let report = Http { connections: 1, ..options(address) }.run().unwrap();
        assert_eq!(total(&report), 200);
        // With a single connection, every second request is the one that ends it.
        assert_eq!(report["answered"], 100, "{report}");
        assert_eq!(report["failed"]["closed"], 100, "{report}");
    }

    #[test]
    fn a_reset_fails_the_request() {
        // To close with something unread resets.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let stream = stream.unwrap();
                stream.peek(&mut [0]).unwrap();
            }
        });
        let report = options(address).run().unwrap();
        assert_eq!(report["failed"]["reset"], 200, "{report}");
    }

    #[test]
    fn another_status_is_a_failure() {
        let answer = "HTTP/1.1 503 Unavailable\r\nContent-Length: 0\r\n\r\n";
        let report = options(serve(|_, _| Some(answer.to_owned()))).run().unwrap();
        assert_eq!(report["failed"]["status_503"], 200, "{report}");
        assert_eq!(report["servers"], json!({}));
    }

    #[test]
    fn nobody_listens() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        for close in [false, true] {
            let report = Http { close, ..options(address) }.run().unwrap();
            assert_eq!(report["failed"]["refused"], 200, "{report}");
            assert_eq!(report["n_failed"], 200, "{report}");
        }
    }

    #[test]
    fn what_is_never_answered_ends_in_time() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let report = Http { timeout_ms: 50, ..options(address) }.run().unwrap();
        assert_eq!(report["failed"]["timeout"], 200, "{report}");
        assert_eq!(report["answered"], 0);
        drop(listener);
    }
}

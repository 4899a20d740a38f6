//! `udp`: datagrams that are to come back.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use clap::Args;
use rustix::event::epoll::EventFlags;
use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_send_buffer_size};
use serde_json::{Value, json};

use crate::clock::{MILLISECOND_NS, SECOND_NS, now_ns};
use crate::epoll::Poller;
use crate::errors::{self, Failures};
use crate::latency::Latency;
use crate::limits::{rate, seconds};
use crate::pacer::Schedule;

/// After so long one of a window is lost, and the next one takes its place.
const LOST_WINDOW_NS: u64 = 200 * MILLISECOND_NS;

/// After so long one of a schedule is lost.
const LOST_RATE_NS: u64 = SECOND_NS;

/// The requested size of buffers, in bytes.
const BUFFER: usize = 4 * 1024 * 1024;

/// Datagrams received from a socket, and sent by a schedule, between two looks at the others.
const N_BURST: usize = 32;

/// The arguments of this command.
#[derive(Args, Clone, Debug)]
#[command(group(clap::ArgGroup::new("pace").required(true).args(["window", "rate"])))]
pub struct Udp {
    /// Where the servers are; of several, the sockets ask one each, in turn
    #[arg(value_name = "ADDR:PORT", required = true)]
    pub addresses: Vec<SocketAddr>,
    /// How long datagrams are sent, in seconds
    #[arg(long, value_parser = seconds)]
    pub seconds: f64,
    /// How many sockets
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub sockets: u32,
    /// Datagrams that each socket keeps outstanding
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub window: Option<u32>,
    /// Datagrams a second, of all sockets in turn
    #[arg(long, value_parser = rate)]
    pub rate: Option<f64>,
    /// Name the address with each datagram instead of connecting
    #[arg(long)]
    pub unconnected: bool,
    /// Bytes of each datagram
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(8..=65_507))]
    pub size: u16,
}

/// Requests big buffers; smaller ones do too.
pub fn widen(socket: &UdpSocket) {
    let _ = set_socket_recv_buffer_size(socket, BUFFER);
    let _ = set_socket_send_buffer_size(socket, BUFFER);
}

impl Udp {
    /// Sends, receives, and reports.
    ///
    /// # Errors
    /// When the machine can't, such as for too many open files.
    pub fn run(&self) -> anyhow::Result<Value> {
        let poller = Poller::new()?;
        let mut sockets = Vec::new();
        let addresses = self.addresses.iter().copied().cycle().take(self.sockets as usize);
        let addresses: Vec<SocketAddr> = addresses.collect();
        for (token, address) in (0..).zip(&addresses) {
            let socket = self.open(*address)?;
            poller.add(&socket, token, EventFlags::IN)?;
            sockets.push(socket);
        }
        let start_ns = now_ns();
        let lost_ns = if self.window.is_some() { LOST_WINDOW_NS } else { LOST_RATE_NS };
        let mut client = Client {
            poller,
            sockets,
            addresses,
            is_connected: !self.unconnected,
            datagram: vec![0; usize::from(self.size)],
            buffer: vec![0; 65_536],
            pending: Pending { lost_ns, first_n: 0, questions: VecDeque::new() },
            is_window: self.window.is_some(),
            end_ns: start_ns + (self.seconds * SECOND_NS as f64) as u64,
            counts: Counts::new(start_ns)?,
        };
        match (self.window, self.rate) {
            (Some(window), _) => client.keep_window(window)?,
            (None, Some(rate)) => {
                client.keep_rate(Schedule::new(start_ns, rate, self.seconds))?;
            }
            (None, None) => anyhow::bail!("neither --window nor --rate"),
        }
        Ok(client.counts.to_json())
    }

    fn open(&self, address: SocketAddr) -> io::Result<UdpSocket> {
        let any: SocketAddr = match address {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let socket = UdpSocket::bind(any)?;
        widen(&socket);
        socket.set_nonblocking(true)?;
        if !self.unconnected {
            socket.connect(address)?;
        }
        Ok(socket)
    }
}

struct Client {
    poller: Poller,
    sockets: Vec<UdpSocket>,
    /// The server of each socket.
    addresses: Vec<SocketAddr>,
    is_connected: bool,
    /// The datagram; it begins with its number, as eight bytes, little end first.
    datagram: Vec<u8>,
    buffer: Vec<u8>,
    pending: Pending,
    is_window: bool,
    /// After this a window isn't filled any more.
    end_ns: u64,
    counts: Counts,
}

struct Counts {
    start_ns: u64,
    n_sent: u64,
    n_answered: u64,
    n_lost: u64,
    n_strange: u64,
    errors: Failures,
    latency: Latency,
    last_answer_ns: u64,
}

/// Questions in the order in which they were due. The first of them is the oldest without an answer.
struct Pending {
    lost_ns: u64,
    /// The number of the first one.
    first_n: u64,
    questions: VecDeque<Question>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Question {
    due_ns: u64,
    socket_idx: usize,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    Sent,
    /// It couldn't be sent: it waits like one that was, so that a socket isn't tried in a frenzy.
    Unsent,
    Answered,
}

impl Pending {
    /// The number of the next question.
    fn next_n(&self) -> u64 {
        self.first_n + self.questions.len() as u64
    }

    /// The question of that number, if it has no answer yet. From now on it has one.
    fn answer(&mut self, n: u64) -> Option<Question> {
        let question_idx = usize::try_from(n.checked_sub(self.first_n)?).ok()?;
        let question = self.questions.get_mut(question_idx)?;
        if question.state != State::Sent {
            return None;
        }
        let answered = *question;
        question.state = State::Answered;
        Some(answered)
    }

    /// Takes the first question whose time is over.
    fn take_lost(&mut self, now_ns: u64) -> Option<Question> {
        loop {
            let first = *self.questions.front()?;
            if first.state != State::Answered && first.due_ns + self.lost_ns > now_ns {
                return None;
            }
            self.questions.pop_front();
            self.first_n += 1;
            if first.state != State::Answered {
                return Some(first);
            }
        }
    }

    /// When the time of the first one is over.
    fn expiry_ns(&self) -> Option<u64> {
        self.questions.front().map(|first| first.due_ns + self.lost_ns)
    }
}

impl Client {
    fn keep_window(&mut self, window: u32) -> anyhow::Result<()> {
        for _ in 0..window {
            (0..self.sockets.len()).for_each(|socket_idx| self.ask(socket_idx, now_ns()));
        }
        loop {
            self.expire();
            let Some(expiry_ns) = self.pending.expiry_ns() else { return Ok(()) };
            self.receive(expiry_ns)?;
        }
    }

    fn keep_rate(&mut self, mut schedule: Schedule) -> anyhow::Result<()> {
        let mut socket_idx = 0;
        loop {
            for _ in 0..N_BURST {
                let Some(due_ns) = schedule.take(now_ns()) else { break };
                self.ask(socket_idx, due_ns);
                socket_idx = (socket_idx + 1) % self.sockets.len();
            }
            self.expire();
            let wakes_ns = [schedule.next_due_ns(), self.pending.expiry_ns()];
            let Some(wake_ns) = wakes_ns.into_iter().flatten().min() else { return Ok(()) };
            self.receive(wake_ns)?;
        }
    }

    fn ask(&mut self, socket_idx: usize, due_ns: u64) {
        self.datagram[..8].copy_from_slice(&self.pending.next_n().to_le_bytes());
        let socket = &self.sockets[socket_idx];
        let sent = if self.is_connected {
            socket.send(&self.datagram)
        } else {
            socket.send_to(&self.datagram, self.addresses[socket_idx])
        };
        let state = match sent {
            Ok(_) => {
                self.counts.n_sent += 1;
                State::Sent
            }
            Err(error) => {
                self.take_note(socket_idx, &error);
                State::Unsent
            }
        };
        self.pending.questions.push_back(Question { due_ns, socket_idx, state });
    }

    /// Counts lost questions, and replaces them in a window.
    fn expire(&mut self) {
        let now_ns = now_ns();
        while let Some(lost) = self.pending.take_lost(now_ns) {
            self.counts.n_lost += u64::from(lost.state == State::Sent);
            self.replace(lost.socket_idx, now_ns);
        }
    }

    fn replace(&mut self, socket_idx: usize, now_ns: u64) {
        if self.is_window && now_ns < self.end_ns {
            self.ask(socket_idx, now_ns);
        }
    }

    /// Waits for answers until then, and takes them.
    fn receive(&mut self, until_ns: u64) -> anyhow::Result<()> {
        let timeout_ns = until_ns.saturating_sub(now_ns());
        for event_idx in 0..self.poller.wait(Some(timeout_ns))? {
            let (token, _) = self.poller.event(event_idx);
            let socket_idx = token as usize;
            for _ in 0..N_BURST {
                match self.receive_one(socket_idx) {
                    Ok(()) => {}
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) => self.take_note(socket_idx, &error),
                }
            }
        }
        Ok(())
    }

    fn receive_one(&mut self, socket_idx: usize) -> io::Result<()> {
        let socket = &self.sockets[socket_idx];
        let (n_bytes, from) = if self.is_connected {
            (socket.recv(&mut self.buffer)?, self.addresses[socket_idx])
        } else {
            socket.recv_from(&mut self.buffer)?
        };
        let now_ns = now_ns();
        let n = self.buffer[..n_bytes].first_chunk().map(|bytes| u64::from_le_bytes(*bytes));
        let Some(question) = n.and_then(|n| self.pending.answer(n)) else { return Ok(()) };
        self.counts.n_strange += u64::from(from != self.addresses[socket_idx]);
        self.counts.answered(question.due_ns, now_ns);
        self.replace(socket_idx, now_ns);
        Ok(())
    }

    /// Counts an error, and connects a socket again that isn't connected any more.
    fn take_note(&mut self, socket_idx: usize, error: &io::Error) {
        let is_busy = error.kind() == ErrorKind::WouldBlock;
        let name = if is_busy { "other_EAGAIN".into() } else { errors::of_error(error) };
        let left = ["other_ECONNABORTED", "other_EDESTADDRREQ", "other_ENOTCONN"];
        if self.is_connected && left.contains(&name.as_ref()) {
            // If that fails, the next send reports it.
            let _ = self.sockets[socket_idx].connect(self.addresses[socket_idx]);
        }
        self.counts.errors.add(name);
    }
}

impl Counts {
    fn new(start_ns: u64) -> anyhow::Result<Counts> {
        Ok(Counts {
            start_ns,
            n_sent: 0,
            n_answered: 0,
            n_lost: 0,
            n_strange: 0,
            errors: Failures::default(),
            // Half a microsecond, which is how coarse the other one is, is much of an answer on one host.
            latency: Latency::fine()?,
            last_answer_ns: start_ns,
        })
    }

    fn answered(&mut self, due_ns: u64, now_ns: u64) {
        self.n_answered += 1;
        self.latency.record(now_ns.saturating_sub(due_ns));
        self.last_answer_ns = now_ns;
    }

    fn to_json(&self) -> Value {
        let answering_s = crate::clock::seconds(self.last_answer_ns - self.start_ns);
        let rate = if answering_s > 0.0 { self.n_answered as f64 / answering_s } else { 0.0 };
        json!({
            "sent": self.n_sent,
            "answered": self.n_answered,
            "lost": self.n_lost,
            "strange": self.n_strange,
            "errors": self.errors.to_json(),
            "rate": rate,
            "latency_us": self.latency.to_json_us(),
            "took_s": crate::clock::seconds(now_ns() - self.start_ns),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::echo;

    fn options(address: SocketAddr) -> Udp {
        Udp {
            addresses: vec![address],
            seconds: 0.2,
            sockets: 2,
            window: Some(4),
            rate: None,
            unconnected: false,
            size: 64,
        }
    }

    fn echoer() -> SocketAddr {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        thread::spawn(move || echo::serve(&socket, b""));
        address
    }

    #[test]
    fn a_window_comes_back() {
        let address = echoer();
        for unconnected in [false, true] {
            // Long enough for a machine that stalls.
            let report = Udp { unconnected, seconds: 1.0, ..options(address) }.run().unwrap();
            assert_eq!(report["sent"], report["answered"], "{report}");
            assert!(report["answered"].as_u64().unwrap() > 8, "{report}");
            assert_eq!(report["strange"], 0, "{report}");
        }
    }

    #[test]
    fn several_servers_take_turns() {
        let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
        let addresses = vec![echoer(), silent.local_addr().unwrap()];
        let paced = Udp { addresses, window: None, rate: Some(100.0), ..options(echoer()) };
        let report = paced.run().unwrap();
        assert_eq!((&report["answered"], &report["lost"]), (&json!(10), &json!(10)), "{report}");
    }

    #[test]
    fn a_schedule_comes_back() {
        let paced = Udp { window: None, rate: Some(1000.0), ..options(echoer()) };
        let report = paced.run().unwrap();
        assert_eq!(report["sent"], 200, "{report}");
        assert_eq!(report["answered"], 200, "{report}");
    }

    #[test]
    fn what_never_comes_back_is_lost_and_replaced() {
        let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
        let report = options(silent.local_addr().unwrap()).run().unwrap();
        // Two sockets, four each; they are lost when it is over.
        assert_eq!(report["answered"], 0, "{report}");
        assert_eq!(report["lost"], report["sent"], "{report}");
        assert!(report["lost"].as_u64().unwrap() >= 8, "{report}");
    }

    #[test]
    fn an_answer_from_elsewhere_is_strange() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let elsewhere = UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        thread::spawn(move || {
            let mut datagram = [0; 64];
            while let Ok((n_bytes, from)) = socket.recv_from(&mut datagram) {
                elsewhere.send_to(&datagram[..n_bytes], from).unwrap();
            }
        });
        let report = Udp { unconnected: true, ..options(address) }.run().unwrap();
        assert_eq!(report["strange"], report["answered"], "{report}");
        assert!(report["strange"].as_u64().unwrap() > 0, "{report}");
    }

    #[test]
    fn questions_are_answered_once_or_lost() {
        let question = |due_ns, socket_idx| Question { due_ns, socket_idx, state: State::Sent };
        let questions = (0..4).map(|n| question(10 * n, n as usize)).collect();
        let mut pending = Pending { lost_ns: 100, first_n: 7, questions };
        assert_eq!(pending.next_n(), 11);
        assert_eq!(pending.answer(6), None);
        assert_eq!(pending.answer(11), None);
        assert_eq!(pending.answer(8), Some(question(10, 1)));
        assert_eq!(pending.answer(8), None);
        assert_eq!(pending.take_lost(99), None);
        assert_eq!(pending.take_lost(120), Some(question(0, 0)));
        assert_eq!(pending.take_lost(120), Some(question(20, 2)));
        assert_eq!(pending.take_lost(120), None);
        assert_eq!((pending.first_n, pending.expiry_ns()), (10, Some(130)));
        assert_eq!(pending.answer(9), None);
    }
}

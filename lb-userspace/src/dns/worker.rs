//! The thread of a UDP socket: it receives queries, answers from the table or has the relay forward
//! them, and sends, all in batches. What has to wait for something else goes to the runtime.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hickory_proto::op::ResponseCode;
use rustix::event::epoll;
use rustix::io::Errno;
use rustix::time::Timespec;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tracing::{debug, warn};

use super::acl::ClientKey;
use super::encode;
use super::handler::{Deferred, Handler, ThreadView};
use super::mailbox::{Mailbox, RequeuedQuery};
use super::message::ClientQuery;
use super::origin::AnswerOrigin;
use super::query_log::Arrival;
use super::relay::{Completion, ForwardError, Relay, RelayIo, SocketId, Waiter};
use super::resolve::{self, Missing, Resolution, ResolveContext};
use super::socket_pool::{self, SocketPool};
use super::sockets::Transport;
use super::udp::{LocalAddress, RecvBatch, SendBatch, UdpEndpoint};
use super::upstreams::RoutePlan;

/// The data of epoll events: the listener, the mailbox, or the id of a socket of the pool.
const LISTENER: u64 = 0;
const MAILBOX: u64 = 1;

/// How long a stop lets pending queries finish.
pub(super) const DRAIN: Duration = Duration::from_millis(300);

/// The pause after a socket failed.
const BACKOFF: Duration = Duration::from_millis(100);

/// The period between two checks for sockets of the pool that have reached their age.
const CLOSE_PERIOD: Duration = Duration::from_secs(5);

/// How many events are taken at a time.
const N_EVENTS: usize = 64;

/// Everything that a thread owns.
pub(super) struct Worker {
    endpoint: Arc<UdpEndpoint>,
    mailbox: Arc<Mailbox>,
    inbox: RecvBatch,
    /// The next message in `inbox`.
    next: usize,
    /// Whether the listener isn't read, because a message waits for a permit.
    is_paused: bool,
    /// Whether the socket was passed to this process: the next one reads what this one leaves in it.
    was_passed: bool,
    core: WorkerCore,
}

/// What handles a message, apart from the buffers that hold it.
struct WorkerCore {
    handler: Arc<Handler>,
    view: ThreadView,
    runtime: Handle,
    /// Ends tasks.
    stopped: watch::Receiver<bool>,
    endpoint: Arc<UdpEndpoint>,
    mailbox: Arc<Mailbox>,
    plan: RoutePlan,
    plan_version: u64,
    relay: Relay,
    line: WorkerIo,
    out: Vec<u8>,
}

/// The sockets as the relay sees them.
struct WorkerIo {
    handler: Arc<Handler>,
    sockets: SocketPool,
    outbox: SendBatch,
    now: Instant,
    /// Whether responses are logged.
    is_logging: bool,
}

impl RelayIo for WorkerIo {
    fn draw(&mut self, server: SocketAddr) -> Option<SocketId> {
        self.sockets.draw(server, self.now)
    }

    fn id(&mut self) -> u16 {
        self.sockets.id()
    }

    fn send(&mut self, port: SocketId, message: &[u8]) {
        self.sockets.send(port, message);
    }

    fn done(&mut self, port: SocketId) {
        self.sockets.done(port);
    }

    fn mismatch(&mut self, port: SocketId) -> bool {
        self.sockets.mismatch(port)
    }

    fn answer(&mut self, waiter: &Waiter, question: &[u8], message: &[u8], end: Completion<'_>) {
        let code = match end {
            Completion::Answered(_, code) => code,
            Completion::Truncated => ResponseCode::NoError,
            Completion::Failed(why) => {
                debug!(client = %waiter.client, "not forwarded: {why}");
                why.code()
            }
        };
        self.handler.stats.count(code);
        if self.is_logging {
            let Waiter { client, arrived: at, .. } = *waiter;
            Arrival { client, transport: Transport::Udp, at }.log(question, code, message);
        }
        self.handler.origins.note(waiter.id, question, || match end {
            Completion::Answered(server, _) => AnswerOrigin::Upstream(server),
            Completion::Truncated => {
                AnswerOrigin::Nowhere("too many messages arrived that match no query".to_owned())
            }
            Completion::Failed(why) => AnswerOrigin::Nowhere(why.to_string()),
        });
        self.outbox.push(message, waiter.client, waiter.to);
    }
}

impl Worker {
    /// One for `endpoint`, which was passed to this process or ends with it, and which counts at `shard`.
    ///
    /// # Errors
    /// Where the kernel has no more file descriptors.
    pub(super) fn new(
        handler: Arc<Handler>,
        endpoint: UdpEndpoint,
        mailbox: Arc<Mailbox>,
        stopped: watch::Receiver<bool>,
        was_passed: bool,
        shard: usize,
    ) -> io::Result<Worker> {
        let endpoint = Arc::new(endpoint);
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let data = epoll::EventData::new_u64(MAILBOX);
        epoll::add(&epoll, &mailbox, data, epoll::EventFlags::IN)?;
        listen(&epoll, &endpoint)?;
        let view = handler.view();
        let forwarder = view.forwarder();
        let relay = Relay::new(forwarder.limits, forwarder.loops.clone(), view.max_ttls(), shard);
        let line = WorkerIo {
            handler: handler.clone(),
            sockets: SocketPool::new(epoll),
            outbox: SendBatch::default(),
            now: Instant::now(),
            is_logging: view.policy().log,
        };
        let core = WorkerCore {
            handler,
            view,
            runtime: Handle::current(),
            stopped,
            endpoint: endpoint.clone(),
            mailbox: mailbox.clone(),
            plan: RoutePlan::default(),
            plan_version: 0,
            relay,
            line,
            out: Vec::new(),
        };
        let inbox = RecvBatch::new();
        Ok(Worker { endpoint, mailbox, inbox, next: 0, is_paused: false, was_passed, core })
    }

    /// Serves until it is stopped, and then for at most [`DRAIN`] while a client waits: of a socket that was
    /// passed nothing more is read then, of another one all is, because it would be lost.
    pub(super) fn run(mut self) {
        let mut events = Vec::with_capacity(N_EVENTS);
        let (mut upstream, mut unreachable) = (socket_pool::ReceiveBuffer::default(), Vec::new());
        let mut next_close = Instant::now() + CLOSE_PERIOD;
        let mut rest_until: Option<Instant> = None;
        let mut drained_by: Option<Instant> = None;
        loop {
            let stops_at =
                drained_by.map(|by| if self.core.relay.is_idle() { Instant::now() } else { by });
            let deadlines = [self.core.relay.deadline(), Some(next_close), rest_until, stops_at];
            let deadline = deadlines.into_iter().flatten().min();
            self.wait(&mut events, deadline);
            let now = Instant::now();
            let is_quiet = events.iter().all(|event| event.data.u64() != LISTENER);
            self.core.line.now = now;
            self.core.refresh();
            for event in events.drain(..) {
                match event.data.u64() {
                    LISTENER if self.is_paused => {}
                    LISTENER => {
                        if let Err(error) = self.receive() {
                            warn!("a DNS socket can't be read for a moment: {error}");
                            self.pause();
                            rest_until = Some(now + BACKOFF);
                        }
                    }
                    MAILBOX => self.read_mailbox(now),
                    port => {
                        let port = port as SocketId; // it was made of one
                        let WorkerCore { relay, line, .. } = &mut self.core;
                        match line.sockets.receive(port, &mut upstream) {
                            Ok(()) => {
                                for message in upstream.iter() {
                                    relay.receive(port, message, now, line);
                                }
                            }
                            Err(error) => {
                                debug!(%error, "an upstream can't be reached");
                                unreachable.push(port);
                            }
                        }
                    }
                }
            }
            if rest_until.is_some_and(|until| now >= until) {
                rest_until = None;
                self.resume();
            }
            let WorkerCore { relay, line, .. } = &mut self.core;
            relay.expire(now, line);
            // A query to an unreachable upstream goes to the next one, and so on: no further than
            // the routes are long, as each socket fails once.
            loop {
                line.sockets.flush(&mut unreachable);
                let Some(port) = unreachable.pop() else { break };
                relay.unreachable(port, now, line);
            }
            self.endpoint.flush(&mut line.outbox);
            if relay.take_suspicion() {
                self.core.view.forwarder().suspect();
            }
            if now >= next_close {
                self.core.line.sockets.close_old(now);
                next_close = now + CLOSE_PERIOD;
            }
            if self.mailbox.is_stopped() {
                let drained_by = *drained_by.get_or_insert(now + DRAIN);
                if self.was_passed {
                    self.pause();
                }
                let is_done = self.core.relay.is_idle() && (self.is_paused || is_quiet);
                if is_done || now >= drained_by {
                    return;
                }
            }
        }
    }

    fn wait(&self, events: &mut Vec<epoll::Event>, deadline: Option<Instant>) {
        let limit = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        let room = rustix::buffer::spare_capacity(events);
        match epoll::wait(self.core.line.sockets.epoll(), room, limit.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                warn!("a DNS socket can't be waited for: {error}");
                std::thread::sleep(BACKOFF);
            }
        }
    }

    /// Receives messages.
    fn receive(&mut self) -> io::Result<()> {
        match self.endpoint.receive(&mut self.inbox) {
            Ok(()) => {}
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                return Ok(());
            }
            Err(error) => return Err(error),
        }
        self.next = 0;
        self.take_received();
        Ok(())
    }

    /// Handles the received messages until one has no permit to wait: those after it stay in the
    /// socket.
    fn take_received(&mut self) {
        while self.next < self.inbox.received.len() {
            let (_, client, to) = self.inbox.received[self.next];
            if !self.core.take(self.inbox.message(self.next), client, to) {
                self.pause();
                self.core.wake_when_reliable();
                return;
            }
            self.next += 1;
        }
    }

    fn read_mailbox(&mut self, now: Instant) {
        for returned in self.mailbox.take() {
            self.core.take_returned(&returned);
        }
        let WorkerCore { relay, line, .. } = &mut self.core;
        relay.recheck(now, line);
        if self.is_paused && !self.mailbox.is_stopped() {
            self.resume();
        }
    }

    fn pause(&mut self) {
        if !self.is_paused {
            self.is_paused = true;
            let deleted = epoll::delete(self.core.line.sockets.epoll(), &self.endpoint);
            debug_assert!(deleted.is_ok(), "{deleted:?}");
        }
    }

    fn resume(&mut self) {
        if !self.is_paused || self.mailbox.is_stopped() {
            return;
        }
        match listen(self.core.line.sockets.epoll(), &self.endpoint) {
            Ok(()) => {
                self.is_paused = false;
                self.take_received();
            }
            Err(error) => {
                warn!("a DNS socket can't be waited for: {error}");
                self.core.wake_after(BACKOFF);
            }
        }
    }
}

/// Adds the listener to epoll. If several threads have one socket, as systemd passes it, a message
/// wakes one of them (EPOLLEXCLUSIVE).
fn listen(epoll: impl AsFd, endpoint: &UdpEndpoint) -> rustix::io::Result<()> {
    let flags = epoll::EventFlags::IN | epoll::EventFlags::EXCLUSIVE;
    epoll::add(epoll, endpoint, epoll::EventData::new_u64(LISTENER), flags)
}

impl WorkerCore {
    /// Applies what has changed.
    fn refresh(&mut self) {
        if self.handler.refresh(&mut self.view) {
            let forwarder = self.view.forwarder();
            self.relay.reconfigure(forwarder.loops.clone(), self.view.max_ttls());
            self.line.is_logging = self.view.policy().log;
            self.plan_version = 0; // that of another forwarder
        }
    }

    /// Handles a client's message. Returns false if it has no permit to wait for the zone, which
    /// will be ready soon.
    fn take(&mut self, bytes: &[u8], client: SocketAddr, to: LocalAddress) -> bool {
        let arrival = Arrival { client, transport: Transport::Udp, at: self.line.now };
        let refusal = self.handler.refusal(self.view.policy(), bytes, &arrival);
        if let Some(refusal) = refusal {
            if let Some(refusal) = refusal {
                self.line.outbox.push(&refusal, client, to);
            }
            return true;
        }
        let waits = !self.view.is_ready() && self.handler.in_startup_grace();
        self.dispatch(bytes, arrival, to, waits, self.handler.missing())
    }

    /// Handles a query that has waited, by what is known now.
    fn take_returned(&mut self, returned: &RequeuedQuery) {
        let RequeuedQuery { bytes, arrival, to, is_unknown } = returned;
        let missing = if *is_unknown { Missing::Unknown } else { Missing::Absent };
        self.dispatch(bytes, *arrival, *to, false, missing);
    }

    fn dispatch(
        &mut self,
        bytes: &[u8],
        arrival: Arrival,
        to: LocalAddress,
        waits: bool,
        missing: Missing,
    ) -> bool {
        let client = arrival.client;
        let mut known = ResolveContext { waits, missing, ..self.view.known() };
        let mut outcome = resolve::answer(bytes, Transport::Udp, known, &mut self.out);
        if matches!(outcome, Resolution::Wait | Resolution::Warm(_)) {
            if let Some(place) = self.handler.place() {
                let (handler, endpoint) = (self.handler.clone(), self.endpoint.clone());
                let (bytes, mailbox) = (bytes.to_vec(), self.mailbox.clone());
                let mut stopped = self.stopped.clone();
                self.runtime.spawn(async move {
                    let deferred = tokio::select! {
                        deferred = handler.resolve_deferred(&bytes, &arrival) => deferred,
                        _ = stopped.wait_for(|stopped| *stopped) => Deferred::Nothing,
                    };
                    match deferred {
                        Deferred::Answer(answer) => endpoint.send(&answer, client, to),
                        Deferred::Forward { is_unknown } => {
                            mailbox.give_back(RequeuedQuery { bytes, arrival, to, is_unknown });
                        }
                        Deferred::Nothing => {}
                    }
                    // The socket goes first: a stop waits for all permits, and then expects the port
                    // to be free.
                    drop(endpoint);
                    drop(place);
                });
                return true;
            }
            if matches!(outcome, Resolution::Wait) {
                return false;
            }
            (known.waits, known.missing) = (false, Missing::Unknown);
            outcome = resolve::answer(bytes, Transport::Udp, known, &mut self.out);
        }
        match outcome {
            Resolution::Forward(query) => {
                let forwarder = self.view.forwarder();
                forwarder.upstreams.refresh(self.line.now);
                let version = forwarder.upstreams.version();
                if version != self.plan_version {
                    self.plan = forwarder.upstreams.plan().unshared();
                    self.plan_version = version;
                }
                let client_key = self.view.client_key(client.ip());
                let is_unknown = known.missing == Missing::Unknown;
                let query = ForwardRequest { query: &query, arrival, to, client_key, is_unknown };
                forward(query, &self.plan, &mut self.relay, &mut self.line, &mut self.out);
            }
            outcome => {
                let (policy, query) = (self.view.policy(), (bytes, &arrival));
                if self.handler.finish_answer(policy, outcome, query, &self.out) {
                    self.line.outbox.push(&self.out, client, to);
                }
            }
        }
        true
    }

    fn wake_when_reliable(&self) {
        let (handler, mailbox) = (self.handler.clone(), self.mailbox.clone());
        self.runtime.spawn(async move {
            handler.wait_ready().await;
            mailbox.wake();
        });
    }

    fn wake_after(&self, pause: Duration) {
        let mailbox = self.mailbox.clone();
        self.runtime.spawn(async move {
            tokio::time::sleep(pause).await;
            mailbox.wake();
        });
    }
}

/// A query to forward.
struct ForwardRequest<'a> {
    query: &'a ClientQuery<'a>,
    arrival: Arrival,
    to: LocalAddress,
    client_key: ClientKey,
    is_unknown: bool,
}

/// Has the relay forward a query.
fn forward(
    forwarded: ForwardRequest<'_>,
    plan: &RoutePlan,
    relay: &mut Relay,
    line: &mut WorkerIo,
    out: &mut Vec<u8>,
) {
    let ForwardRequest { query, arrival, to, client_key, is_unknown } = forwarded;
    let now = line.now;
    let mut waiter = Waiter::new(arrival.client, to, client_key, query, now);
    (waiter.is_unknown, waiter.arrived) = (is_unknown, arrival.at);
    let why = if relay.is_probe(&query.name) {
        ForwardError::OwnProbe
    } else if let Some(route) = plan.of(&query.name) {
        // For a tracked query that ends before an upstream answers.
        let waits = || AnswerOrigin::Nowhere("no resolver has answered in time".to_owned());
        line.handler.origins.note(query.id(), query.question(), waits);
        return relay.ask(query, route, waiter, now, line);
    } else {
        ForwardError::NotForwarded
    };
    encode::error(out, query, why.code(), encode::max_len(query, Transport::Udp));
    line.answer(&waiter, query.question(), out, Completion::Failed(&why));
}

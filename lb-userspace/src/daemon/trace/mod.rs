//! Traced connections, from the programs' events to the clients of `GET /v1/trace`.
//!
//! A thread reads events while there are clients; without one the programs' switch is off. The
//! switch has an end, which the thread moves ahead: a daemon that dies leaves nothing on.

mod cgroups;
mod join;

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use hyper::body::Bytes;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::sync::{mpsc, watch};

use crate::admin::api::{FlowTraceRecord, TraceLine, TraceRecord};
use crate::admin::{TraceFilter, TraceRefusal};
use crate::capabilities;
use crate::datapath::{
    Begun, Counters, SharedDatapath, TraceEvents, TracedFlow, is_sampled, trace_now_ns,
};
use crate::table::{Table, display_name};
use cgroups::{CgroupPaths, allocation, client_name};
use join::{Joined, Joiner, Outcome};

/// The clients at a time.
const MAX_CLIENTS: usize = 8;

/// The lines that wait for a client.
const MAX_LINES: usize = 1_024;

/// How long the programs' switch stays on by itself.
const SWITCH: Duration = Duration::from_secs(5);

/// How long the thread waits for an event, before it looks after the switch and the clients.
const TICK: Timespec = Timespec { tv_sec: 0, tv_nsec: 250_000_000 };

/// While cgroups are still looked for, it doesn't wait.
const NO_WAIT: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

/// The events of one unit that are read before they are handed on.
const MAX_EVENTS: usize = 2_048;

/// Accepts clients, and serves them.
pub struct Tracer(Arc<TraceState>);

struct TraceState {
    datapath: Arc<SharedDatapath>,
    counters: Counters,
    table: watch::Receiver<Arc<Table>>,
    clients: Mutex<Clients>,
    /// A client has come.
    came: Condvar,
}

#[derive(Default)]
struct Clients {
    /// Why there can be none.
    refusal: Option<TraceRefusal>,
    list: Vec<Client>,
}

struct Client {
    filter: TraceFilter,
    lines: mpsc::Sender<Bytes>,
    /// When it came, in nanoseconds of CLOCK_MONOTONIC: earlier events aren't for it.
    since_ns: u64,
    n_lost: u64,
}

impl Tracer {
    /// Starts the thread, with the events where they can be read.
    pub fn start(
        events: Option<TraceEvents>,
        datapath: Arc<SharedDatapath>,
        counters: Counters,
        table: watch::Receiver<Arc<Table>>,
        scope: PathBuf,
        is_allowed: bool,
    ) -> io::Result<Tracer> {
        let clients = Mutex::new(Clients::default());
        let state =
            Arc::new(TraceState { datapath, counters, table, clients, came: Condvar::new() });
        match events {
            Some(events) => {
                let state = Arc::clone(&state);
                let thread = std::thread::Builder::new().name("trace".into());
                thread.spawn(move || {
                    capabilities::for_datapath();
                    state.serve(events, CgroupPaths::new(scope));
                })?;
            }
            None => state.lock().refusal = Some(TraceRefusal::Unavailable),
        }
        let tracer = Tracer(state);
        tracer.allow(is_allowed);
        Ok(tracer)
    }

    /// Allows clients, or forbids them; those that there are then end.
    pub fn allow(&self, is_allowed: bool) {
        let mut clients = self.0.lock();
        match (is_allowed, clients.refusal) {
            (_, Some(TraceRefusal::Unavailable)) => {}
            (true, _) => clients.refusal = None,
            (false, _) => {
                clients.refusal = Some(TraceRefusal::Forbidden);
                clients.list.clear();
            }
        }
        self.0.switch(&clients);
    }

    /// The lines of a new client. Connections are traced once this returns.
    ///
    /// # Errors
    /// When it is forbidden, or there are too many clients.
    pub fn subscribe(&self, filter: TraceFilter) -> Result<mpsc::Receiver<Bytes>, TraceRefusal> {
        let mut clients = self.0.lock();
        clients.list.retain(|client| !client.lines.is_closed());
        if let Some(refusal) = clients.refusal {
            return Err(refusal);
        }
        if clients.list.len() >= MAX_CLIENTS {
            return Err(TraceRefusal::TooMany);
        }
        let (lines, receiver) = mpsc::channel(MAX_LINES);
        clients.list.push(Client { filter, lines, since_ns: trace_now_ns(), n_lost: 0 });
        self.0.switch(&clients);
        self.0.came.notify_all();
        Ok(receiver)
    }
}

impl TraceState {
    fn lock(&self) -> MutexGuard<'_, Clients> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Switches the programs' reports on for a while, or off without clients.
    fn switch(&self, clients: &Clients) {
        let most = clients.list.iter().map(|client| client.filter.max_hash()).max();
        self.datapath.set_trace(most.map(|max_hash| (SWITCH, max_hash)));
    }

    fn serve(&self, mut events: TraceEvents, mut cgroups: CgroupPaths) {
        loop {
            let clients = self.came.wait_while(self.lock(), |clients| clients.list.is_empty());
            drop(clients);
            // What is left of earlier clients is of no use to later ones.
            let mut joiner = Joiner::default();
            let mut n_lost = self.counters.trace_lost();
            while !self.lock().list.is_empty() {
                let mut fds: Vec<_> =
                    events.fds().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
                let timeout = if cgroups.is_walking() { NO_WAIT } else { TICK };
                if let Err(error) = poll(&mut fds, Some(&timeout))
                    && error != rustix::io::Errno::INTR
                {
                    tracing::warn!("events of traced connections can't be read: {error}");
                    self.lock().list.clear();
                }
                drop(fds);
                let has_outcomes = self.datapath.counts_in_flight();
                let mut joined = Vec::new();
                events.read(MAX_EVENTS, |event| joined.extend(joiner.add(event, has_outcomes)));
                joined.extend(joiner.expire(trace_now_ns()));
                let mut flows = Vec::new();
                events.read_flows(MAX_EVENTS, |flow| flows.push(flow));
                let seen = joined.iter().map(|Joined { begun, .. }| (begun.cgroup_id, begun.pid));
                cgroups.look_for(seen);
                let now_lost = self.counters.trace_lost();
                let table = self.table.borrow().clone();
                let mut clients = self.lock();
                for client in &mut clients.list {
                    client.n_lost += now_lost.saturating_sub(n_lost);
                }
                n_lost = now_lost;
                let joined = joined.into_iter().map(Item::Connection);
                let items: Vec<Item> = joined.chain(flows.into_iter().map(Item::Flow)).collect();
                distribute(&mut clients.list, &items, &cgroups, &table);
                clients.list.retain(|client| !client.lines.is_closed());
                self.switch(&clients);
            }
        }
    }
}

/// What a line is about.
enum Item {
    Connection(Joined),
    Flow(TracedFlow),
}

impl Item {
    fn cookie(&self) -> u64 {
        match self {
            Item::Connection(joined) => joined.cookie,
            Item::Flow(flow) => flow.cookie,
        }
    }

    fn at_ns(&self) -> u64 {
        match self {
            Item::Connection(joined) => joined.at_ns,
            Item::Flow(flow) => flow.at_ns,
        }
    }

    fn service(&self) -> Option<&str> {
        match self {
            Item::Connection(joined) => joined.begun.service.as_deref(),
            Item::Flow(flow) => flow.service.as_deref(),
        }
    }

    fn outcome(&self) -> &'static str {
        match self {
            Item::Connection(joined) => joined.outcome.name(),
            Item::Flow(flow) => flow.step.name(),
        }
    }

    fn line(&self, cgroups: &CgroupPaths, table: &Table) -> TraceLine {
        match self {
            Item::Connection(joined) => {
                TraceLine::Connection(Box::new(record(joined, cgroups, table)))
            }
            Item::Flow(flow) => TraceLine::Flow(Box::new(flow_record(flow))),
        }
    }
}

/// Sends each connection, and what happened to flows, to the clients that want it; one that is behind loses it.
fn distribute(clients: &mut [Client], items: &[Item], cgroups: &CgroupPaths, table: &Table) {
    for each in items {
        let mut line = None;
        for client in clients.iter_mut().filter(|client| client.wants(each)) {
            let line = line.get_or_insert_with(|| line_of(&each.line(cgroups, table)));
            client.send(line.clone());
        }
    }
    // Also where nothing follows.
    clients.iter_mut().for_each(Client::report_loss);
}

impl Client {
    fn wants(&self, item: &Item) -> bool {
        let TraceFilter { service, not, outcome, .. } = &self.filter;
        let name = item.service();
        let is = |wanted: &String| name.is_some_and(|name| name.eq_ignore_ascii_case(wanted));
        item.at_ns() >= self.since_ns
            && is_sampled(item.cookie(), self.filter.max_hash())
            && service.as_ref().is_none_or(is)
            && !not.iter().any(is)
            && outcome.as_ref().is_none_or(|outcome| outcome == item.outcome())
    }

    fn send(&mut self, line: Bytes) {
        self.report_loss();
        if self.n_lost > 0 || self.lines.try_send(line).is_err() {
            self.n_lost += 1;
        }
    }

    fn report_loss(&mut self) {
        let lost = self.n_lost;
        if lost > 0 && self.lines.try_send(line_of(&TraceLine::Lost { lost })).is_ok() {
            self.n_lost = 0;
        }
    }
}

fn line_of(line: &TraceLine) -> Bytes {
    // A document of strings and numbers.
    let mut line = serde_json::to_vec(line).unwrap_or_default();
    line.push(b'\n');
    line.into()
}

impl Outcome {
    fn name(self) -> &'static str {
        match self {
            Outcome::Established(_) => "established",
            Outcome::Refused => "refused",
            Outcome::Failed(_) => "failed",
            Outcome::Aborted => "aborted",
            Outcome::Sent => "sent",
            Outcome::Unknown => "unknown",
            Outcome::Intercepted => "intercepted",
            Outcome::Passed => "passed",
        }
    }
}

fn record(joined: &Joined, cgroups: &CgroupPaths, table: &Table) -> TraceRecord {
    let Joined { at_ns, begun, outcome, .. } = joined;
    let cgroup = cgroups.find(begun.cgroup_id);
    let (allocation, task) = cgroup.and_then(allocation).unzip();
    let instance = instance(begun, table);
    let named = instance.as_deref().zip(begun.service.as_deref());
    TraceRecord {
        time: wall_clock(*at_ns),
        comm: begun.comm.clone(),
        pid: begun.pid,
        cgroup: cgroup.map(|path| path.display().to_string()),
        client_name: cgroup.map(client_name),
        allocation: allocation.map(str::to_owned),
        task: task.map(str::to_owned),
        service: begun.service.as_deref().map(str::to_owned),
        frontend: begun.frontend.to_string(),
        protocol: if begun.is_tcp { "tcp" } else { "udp" }.to_owned(),
        backend: begun.backend.map(|backend| backend.to_string()),
        instance_name: named.map(|(id, service)| display_name(id, service)),
        instance,
        reason: Some(begun.reason.to_owned()),
        outcome: outcome.name().to_owned(),
        error: match outcome {
            Outcome::Failed(error) => error.map(errno_name),
            _ => None,
        },
        connect_us: match outcome {
            Outcome::Established(connect_us) => *connect_us,
            _ => None,
        },
    }
}

fn flow_record(flow: &TracedFlow) -> FlowTraceRecord {
    let (backend, source) = flow.backend.unzip();
    FlowTraceRecord {
        time: wall_clock(flow.at_ns),
        client: flow.client.to_string(),
        vip: flow.vip.to_string(),
        service: flow.service.as_deref().map(str::to_owned),
        protocol: if flow.protocol == 6 { "tcp" } else { "udp" }.to_owned(),
        backend: backend.map(|address| address.to_string()),
        source: source.map(|address| address.to_string()),
        outcome: flow.step.name().to_owned(),
        reason: flow.reason.to_owned(),
        state: flow.state.map(|state| state.name().to_owned()),
        packets: flow.packets,
        bytes: flow.bytes,
    }
}

/// The instance that a connection goes to.
fn instance(begun: &Begun, table: &Table) -> Option<String> {
    let mut backends = table.services.get(begun.service.as_deref()?)?.backends.iter();
    let chosen = backends.find(|it| it.address.is_some() && it.address == begun.backend);
    chosen.map(|backend| backend.id.to_string())
}

/// A time of CLOCK_MONOTONIC in seconds of the Unix epoch, to the microsecond.
fn wall_clock(at_ns: u64) -> f64 {
    let age = Duration::from_nanos(trace_now_ns().saturating_sub(at_ns));
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    now.saturating_sub(age).as_micros() as f64 / 1e6
}

/// The name of an error of connect(2); numbers from asm-generic/errno.h.
fn errno_name(error: i32) -> String {
    let name = match error {
        101 => "ENETUNREACH",
        104 => "ECONNRESET",
        110 => "ETIMEDOUT",
        111 => "ECONNREFUSED",
        112 => "EHOSTDOWN",
        113 => "EHOSTUNREACH",
        number => return format!("errno {number}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(filter: TraceFilter) -> (Client, mpsc::Receiver<Bytes>) {
        let (lines, receiver) = mpsc::channel(2);
        (Client { filter, lines, since_ns: 5, n_lost: 0 }, receiver)
    }

    fn joined(service: &str, at_ns: u64, outcome: Outcome) -> Item {
        let begun = Begun {
            pid: 7,
            comm: "curl".into(),
            cgroup_id: 1,
            service: Some(service.into()),
            frontend: "127.128.0.1:80".parse().unwrap(),
            is_tcp: true,
            backend: Some("10.0.0.1:8080".parse().unwrap()),
            reason: "at random",
        };
        Item::Connection(Joined { cookie: 1, at_ns, begun, outcome })
    }

    #[test]
    fn a_client_gets_what_its_filter_lets_through() {
        let filter = |service: Option<&str>, not: &[&str], outcome: Option<&str>| TraceFilter {
            service: service.map(str::to_owned),
            not: not.iter().map(|name| (*name).to_owned()).collect(),
            outcome: outcome.map(str::to_owned),
            sample: 1,
        };
        let web = joined("web", 5, Outcome::Failed(Some(111)));
        for (filter, expected) in [
            (filter(None, &[], None), true),
            (filter(Some("WEB"), &[], Some("failed")), true),
            (filter(Some("api"), &[], None), false),
            (filter(None, &["api", "web"], None), false),
            (filter(None, &["api"], Some("refused")), false),
            (TraceFilter { sample: u32::MAX, ..filter(None, &[], None) }, false),
        ] {
            let shown = format!("{filter:?}");
            assert_eq!(client(filter).0.wants(&web), expected, "{shown}");
        }
        let early = joined("web", 4, Outcome::Sent);
        assert!(!client(filter(None, &[], None)).0.wants(&early));
    }

    #[test]
    fn what_a_client_that_is_behind_has_lost_is_reported_in_line() {
        let (mut client, mut lines) = client(TraceFilter::default());
        let cgroups = CgroupPaths::new("/nonexistent".into());
        let five = [(); 5].map(|()| joined("web", 5, Outcome::Established(Some(150))));
        distribute(std::slice::from_mut(&mut client), &five, &cgroups, &Table::default());
        let mut read = || -> Vec<TraceLine> {
            let lines = std::iter::from_fn(|| lines.try_recv().ok());
            lines.map(|line| serde_json::from_slice(&line).unwrap()).collect()
        };
        let TraceLine::Connection(first) = &read()[0] else { panic!("a connection") };
        assert_eq!((first.outcome.as_str(), first.connect_us), ("established", Some(150)));
        distribute(std::slice::from_mut(&mut client), &[], &cgroups, &Table::default());
        assert_eq!(read(), [TraceLine::Lost { lost: 3 }]);
        distribute(std::slice::from_mut(&mut client), &five[..1], &cgroups, &Table::default());
        assert_eq!(read().len(), 1);
    }
}

//! Events of traced connections, from the programs.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use aya::maps::{Map, MapData, RingBuf};
use lb_common::{
    Address, ChoiceReason, EdgeCounter, FlowEnd, FlowEvent, FlowEventKind, FlowState, Interception,
    RefusalReason, TraceEvent, TraceKind,
};
use zerocopy::FromBytes;

use super::edge::kernel::address_of;
use super::edge::status::{EdgeFlow, EdgeFlowState};
use super::error::DatapathError;
use super::kernel::ServiceNames;
use super::pins::monotonic_ns;

/// The programs' events of traced connections, of all units.
pub struct TraceEvents {
    rings: Vec<RingBuf<MapData>>,
    /// That of the unit `intercept`, which is loaded when it is wanted.
    intercept: Option<RingBuf<MapData>>,
    next_intercept: NextRing,
    /// The unit `edge`'s, whose events are of another kind.
    flows: Option<RingBuf<MapData>>,
    ended: EndedFlows,
    names: ServiceNames,
}

/// The ring buffer of a unit that was loaded, until the reader takes it.
#[derive(Clone, Debug, Default)]
pub(super) struct NextRing(Arc<Mutex<Option<Map>>>);

impl NextRing {
    /// Has the reader go on with this one.
    pub(super) fn set(&self, map: Map) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(map);
    }

    fn take(&self) -> Option<Map> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Flows through the edge that the daemon ended, while a client traces: the programs report the others.
#[derive(Clone, Debug, Default)]
pub(super) struct EndedFlows(Arc<EndedQueue>);

#[derive(Debug, Default)]
struct EndedQueue {
    is_traced: AtomicBool,
    flows: Mutex<Vec<TracedFlow>>,
}

impl EndedFlows {
    /// How many may wait for the reader, which comes four times a second.
    const MAX: usize = 65_536;

    /// Whether a client traces.
    pub(super) fn set_traced(&self, is_traced: bool) {
        self.0.is_traced.store(is_traced, Ordering::Relaxed);
    }

    /// Adds a flow that has timed out.
    pub(super) fn add(&self, flow: impl FnOnce() -> Option<EdgeFlow>) {
        if self.0.is_traced.load(Ordering::Relaxed)
            && let Some(flow) = flow()
        {
            let mut flows = self.0.flows.lock().unwrap_or_else(PoisonError::into_inner);
            if flows.len() < EndedFlows::MAX {
                flows.push(TracedFlow::timed_out(flow));
            }
        }
    }

    fn take(&self) -> Vec<TracedFlow> {
        std::mem::take(&mut self.0.flows.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Something that happened to a flow through the edge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TracedFlow {
    /// By what it is sampled.
    pub cookie: u64,
    /// When it happened, in nanoseconds of CLOCK_MONOTONIC.
    pub at_ns: u64,
    /// What happened.
    pub step: FlowStep,
    /// Why that backend was chosen, or why it is refused or over.
    pub reason: &'static str,
    /// The service, where there is one.
    pub service: Option<Arc<str>>,
    /// The client.
    pub client: SocketAddr,
    /// What it sends to.
    pub vip: SocketAddr,
    /// Where its packets go, and from where; `None` where it is refused.
    pub backend: Option<(SocketAddr, SocketAddr)>,
    /// The protocol number.
    pub protocol: u8,
    /// Its state; `None` where it is refused.
    pub state: Option<EdgeFlowState>,
    /// The packets of both directions until then.
    pub packets: u64,
    /// Their bytes, from the IP header on.
    pub bytes: u64,
}

/// What happened to a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowStep {
    /// It began.
    Begun,
    /// It was refused.
    Refused,
    /// It is over.
    Ended,
}

impl FlowStep {
    /// As `nohop trace` shows it.
    pub fn name(self) -> &'static str {
        match self {
            FlowStep::Begun => "begun",
            FlowStep::Refused => "refused",
            FlowStep::Ended => "ended",
        }
    }
}

impl TracedFlow {
    fn timed_out(flow: EdgeFlow) -> TracedFlow {
        let client = address_of(flow.client.ip());
        TracedFlow {
            cookie: lb_common::flow_cookie(&client, flow.client.port(), flow.vip.port()),
            at_ns: monotonic_ns(),
            step: FlowStep::Ended,
            reason: FlowEnd::name(FlowEnd::Timeout as u8),
            service: flow.service,
            client: flow.client,
            vip: flow.vip,
            backend: Some((flow.backend, flow.source)),
            protocol: flow.protocol,
            state: Some(flow.state),
            packets: flow.packets,
            bytes: flow.bytes,
        }
    }

    /// `None` for an event of another version.
    fn of(event: &FlowEvent, names: &ServiceNames) -> Option<TracedFlow> {
        const BEGUN: u8 = FlowEventKind::Begun as u8;
        const REFUSED: u8 = FlowEventKind::Refused as u8;
        const ENDED: u8 = FlowEventKind::Ended as u8;
        let (step, reason) = match event.kind {
            BEGUN => (FlowStep::Begun, ChoiceReason(event.reason).name()),
            REFUSED => (FlowStep::Refused, flow_refusal(event.reason)),
            ENDED => (FlowStep::Ended, FlowEnd::name(event.reason)),
            _ => return None,
        };
        let backend = socket_addr(event.backend, event.backend_port);
        let source = socket_addr(event.source, event.source_port);
        Some(TracedFlow {
            cookie: event.cookie,
            at_ns: event.at_ns,
            step,
            reason,
            service: names.name(event.service),
            client: socket_addr(event.client, event.client_port),
            vip: socket_addr(event.vip, event.vip_port),
            backend: (step != FlowStep::Refused).then_some((backend, source)),
            protocol: event.protocol,
            state: FlowState::of(event.state).and_then(EdgeFlowState::of),
            packets: event.packets,
            bytes: event.bytes,
        })
    }
}

/// Why the edge began no flow, by the number of an [`EdgeCounter`].
fn flow_refusal(number: u8) -> &'static str {
    let refusals = [
        (EdgeCounter::NoFrontend, "no service has this address and port"),
        (EdgeCounter::NoBackend, "the service has no backend"),
        (EdgeCounter::NoPort, "no source port is free: more addresses in edge.source"),
        (EdgeCounter::TableFull, "the table of flows is full"),
        (EdgeCounter::SynFlood, "too many first packets, while room is short"),
        (EdgeCounter::UnknownFlow, "a packet of no known flow"),
        (EdgeCounter::HopLimit, "its hop limit is used up"),
        (EdgeCounter::Martian, "it comes from its own destination, or from edge.source"),
        (EdgeCounter::BadChecksum, "its checksum is wrong"),
    ];
    let found = refusals.into_iter().find(|(counter, _)| *counter as u32 == u32::from(number));
    found.map_or("unknown", |(_, text)| text)
}

/// An event of a traced connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Traced {
    /// The socket, by its cookie.
    pub cookie: u64,
    /// When, in nanoseconds of CLOCK_MONOTONIC.
    pub at_ns: u64,
    /// What happened.
    pub step: TraceStep,
}

/// What happened to a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TraceStep {
    /// It was sent to a backend, or refused.
    Begun(Box<Begun>),
    /// It is established.
    Established {
        /// How long that took in microseconds, where it is known.
        connect_us: Option<u32>,
    },
    /// It ended by an error.
    Failed {
        /// The error's number, where it is known.
        error: Option<i32>,
    },
    /// The client gave up.
    Aborted,
    /// No connection to a VIP: a DNS query to the `frontend`, which is sent to the `backend` of nohop's,
    /// or to none and passes.
    Query(Box<Begun>),
}

/// What is known of a connection when it begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Begun {
    /// The process.
    pub pid: u32,
    /// Its name.
    pub comm: String,
    /// The id of its cgroup, the inode of a directory.
    pub cgroup_id: u64,
    /// The service, where there is one.
    pub service: Option<Arc<str>>,
    /// What the application connects to.
    pub frontend: SocketAddr,
    /// Whether by TCP; else by UDP.
    pub is_tcp: bool,
    /// Where it goes; `None` for one that is refused.
    pub backend: Option<SocketAddr>,
    /// Why that backend was chosen, or why it is refused.
    pub reason: &'static str,
}

impl TraceEvents {
    pub(super) fn new(
        maps: impl Iterator<Item = Map>,
        flows: Option<Map>,
        ended: EndedFlows,
        names: ServiceNames,
        next_intercept: NextRing,
    ) -> Result<TraceEvents, DatapathError> {
        let ring = |map| RingBuf::try_from(map).map_err(|source| DatapathError::Map { source });
        let rings = maps.map(ring).collect::<Result<_, _>>()?;
        let flows = flows.map(ring).transpose()?;
        Ok(TraceEvents { rings, intercept: None, next_intercept, flows, ended, names })
    }

    /// The descriptors that are readable while there are events.
    pub fn fds(&mut self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.follow_intercept();
        self.rings.iter().chain(&self.intercept).chain(&self.flows).map(AsFd::as_fd)
    }

    fn follow_intercept(&mut self) {
        if let Some(next) = self.next_intercept.take() {
            let ring = RingBuf::try_from(next);
            let failed = |error| tracing::warn!("intercepted queries can't be traced: {error}");
            self.intercept = ring.map_err(failed).ok();
        }
    }

    /// Reads the events that there are, those of one unit after those of another, at most `max_each` of
    /// each: programs may report faster than this reads.
    pub fn read(&mut self, max_each: usize, mut each: impl FnMut(Traced)) {
        self.follow_intercept();
        for ring in self.rings.iter_mut().chain(&mut self.intercept) {
            for _ in 0..max_each {
                let Some(event) = ring.next() else { break };
                // One of another size would be another version's.
                let event = TraceEvent::read_from_bytes(&event);
                if let Some(event) = event.ok().and_then(|event| traced(&event, &self.names)) {
                    each(event);
                }
            }
        }
    }
}

impl TraceEvents {
    /// Reads what happened to flows through the edge, at most `max` of the programs' events.
    pub fn read_flows(&mut self, max: usize, mut each: impl FnMut(TracedFlow)) {
        let ended = self.ended.take();
        if let Some(ring) = &mut self.flows {
            for _ in 0..max {
                let Some(event) = ring.next() else { break };
                let event = FlowEvent::read_from_bytes(&event).ok();
                if let Some(flow) = event.and_then(|event| TracedFlow::of(&event, &self.names)) {
                    each(flow);
                }
            }
        }
        ended.into_iter().for_each(each);
    }
}

/// CLOCK_MONOTONIC, by which events are dated.
pub fn now_ns() -> u64 {
    monotonic_ns()
}

fn traced(event: &TraceEvent, names: &ServiceNames) -> Option<Traced> {
    let &TraceEvent { cookie, at_ns, kind, .. } = event;
    const SENT: u8 = TraceKind::Sent as u8;
    const REFUSED: u8 = TraceKind::Refused as u8;
    const ESTABLISHED: u8 = TraceKind::Established as u8;
    const FAILED: u8 = TraceKind::Failed as u8;
    const ABORTED: u8 = TraceKind::Aborted as u8;
    const INTERCEPTED: u8 = TraceKind::Intercepted as u8;
    let step = match kind {
        SENT => {
            let backend = socket_addr(event.backend, event.backend_port);
            let reason = ChoiceReason(event.reason).name();
            TraceStep::Begun(Box::new(begun(event, names, Some(backend), reason)))
        }
        REFUSED => TraceStep::Begun(Box::new(begun(event, names, None, refusal(event.reason)))),
        ESTABLISHED => {
            TraceStep::Established { connect_us: Some(event.connect_us).filter(|us| *us > 0) }
        }
        FAILED => {
            TraceStep::Failed { error: i32::try_from(event.error).ok().filter(|error| *error > 0) }
        }
        ABORTED => TraceStep::Aborted,
        INTERCEPTED => {
            let decided = *Interception::ALL.get(usize::from(event.reason))?;
            let server = socket_addr(event.backend, event.backend_port);
            let server = (decided == Interception::Sent).then_some(server);
            TraceStep::Query(Box::new(begun(event, names, server, interception(decided))))
        }
        _ => return None,
    };
    Some(Traced { cookie, at_ns, step })
}

fn begun(
    event: &TraceEvent,
    names: &ServiceNames,
    backend: Option<SocketAddr>,
    reason: &'static str,
) -> Begun {
    let comm = event.comm.split(|&octet| octet == 0).next().unwrap_or_default();
    Begun {
        pid: event.pid,
        comm: String::from_utf8_lossy(comm).into_owned(),
        cgroup_id: event.cgroup_id,
        service: names.name(event.service),
        frontend: socket_addr(event.frontend, event.frontend_port),
        is_tcp: event.protocol == lb_common::IPPROTO_TCP,
        backend,
        reason,
    }
}

fn interception(decided: Interception) -> &'static str {
    match decided {
        Interception::Sent => "dns.intercept",
        Interception::NoDaemon => "interception is off, or the daemon doesn't listen",
        Interception::Own => "nohop's own",
        Interception::Excluded => "of datapath.exclude_cgroups, or of a DNS server",
        Interception::Local => "to a loopback address of a container",
        Interception::Unreachable => "nohop isn't reached from there",
        Interception::NoMemory => "no memory",
    }
}

fn refusal(reason: u8) -> &'static str {
    const NO_FRONTEND: u8 = RefusalReason::NoFrontend as u8;
    const NO_BACKEND: u8 = RefusalReason::NoBackend as u8;
    const FAMILY: u8 = RefusalReason::Family as u8;
    match reason {
        NO_FRONTEND => "no service has this address and port",
        NO_BACKEND => "the service has no backend",
        FAMILY => "no backend is of an address family that the socket reaches",
        _ => "the backend isn't there",
    }
}

fn socket_addr(address: Address, port: u16) -> SocketAddr {
    let address: IpAddr = match address.to_v4() {
        Some(octets) => octets.into(),
        None => address.octets.into(),
    };
    SocketAddr::new(address, port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_reasons_are_those_of_people() {
        let v4 = socket_addr(Address::v4([127, 186, 3, 9]), 80);
        assert_eq!(v4.to_string(), "127.186.3.9:80");
        let octets = "fd00::9".parse::<std::net::Ipv6Addr>().unwrap().octets();
        assert_eq!(socket_addr(Address { octets }, 1).to_string(), "[fd00::9]:1");
        let texts: std::collections::BTreeSet<_> = (1..=4).map(refusal).collect();
        assert_eq!(texts.len(), 4);
    }
}

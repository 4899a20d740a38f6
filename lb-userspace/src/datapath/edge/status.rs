//! What an edge reports of itself.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use lb_common::FlowState;

/// How an edge does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EdgeStatus {
    /// The configured interfaces, in order.
    pub interfaces: Vec<EdgeInterface>,
    /// The configured addresses that backends see: of a family without one there are no flows.
    pub sources: Vec<IpAddr>,
    /// The configured services whose backends are shown clients' addresses.
    pub client_address: Vec<String>,
    /// How many flows there are.
    pub n_flows: u32,
    /// How many there is room for.
    pub max_flows: u32,
    /// What keeps it from working, a sentence each.
    pub problems: Vec<String>,
    /// Whether packets of IPv4, and of IPv6, can be sent on: each interface forwards them, and there is a source.
    pub forwards: [bool; 2],
    /// The proof of IPv4, and of IPv6.
    pub proofs: [Proof; 2],
}

/// Whether a packet of the daemon's own was translated by the attached programs, and the answer to it; why it
/// wasn't. `None` where that isn't known.
pub type Proof = Option<Result<(), String>>;

impl EdgeStatus {
    /// The proofs of both address families as one: it has failed where one has.
    pub fn proof(&self) -> Option<Result<(), &str>> {
        let results =
            self.proofs.iter().flatten().map(|proof| proof.as_ref().map_err(String::as_str));
        results.map(|result| result.copied()).reduce(Result::and)
    }
}

/// An interface of an edge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EdgeInterface {
    /// Its name.
    pub name: String,
    /// How the program is attached; `None` where it isn't.
    pub mode: Option<EdgeMode>,
    /// Why it isn't attached, or not in a better way: the driver's or the kernel's words.
    pub message: Option<String>,
}

/// How a program is attached to an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EdgeMode {
    /// By tcx, from Linux 6.6 on.
    Tcx,
    /// By a filter of the qdisc clsact.
    Clsact,
    /// By the driver, and by tcx what that leaves.
    XdpAndTcx,
    /// The same by a filter of clsact.
    XdpAndClsact,
}

impl EdgeMode {
    /// As `nohop status` shows it.
    pub fn name(self) -> &'static str {
        match self {
            EdgeMode::Tcx => "tcx",
            EdgeMode::Clsact => "clsact",
            EdgeMode::XdpAndTcx => "xdp-native+tcx",
            EdgeMode::XdpAndClsact => "xdp-native+clsact",
        }
    }

    /// The same with the fast path in the driver.
    pub fn with_xdp(self) -> EdgeMode {
        match self {
            EdgeMode::Tcx | EdgeMode::XdpAndTcx => EdgeMode::XdpAndTcx,
            EdgeMode::Clsact | EdgeMode::XdpAndClsact => EdgeMode::XdpAndClsact,
        }
    }
}

/// A flow through an edge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EdgeFlow {
    /// The service, where the table has it still.
    pub service: Option<Arc<str>>,
    /// The client.
    pub client: SocketAddr,
    /// What it sent to.
    pub vip: SocketAddr,
    /// Where its packets go.
    pub backend: SocketAddr,
    /// From where they go there.
    pub source: SocketAddr,
    /// The protocol number.
    pub protocol: u8,
    /// Its state.
    pub state: EdgeFlowState,
    /// The packets of both directions.
    pub packets: u64,
    /// Their bytes, from the IP header on.
    pub bytes: u64,
    /// The time since its first packet.
    pub age: Duration,
    /// The time since its last one.
    pub idle: Duration,
}

/// A flow's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EdgeFlowState {
    /// TCP: the client's SYN was sent on.
    SynSent,
    /// TCP: the backend has answered.
    SynReceived,
    /// TCP: the client has confirmed that.
    Established,
    /// TCP: one side has closed it.
    HalfClosed,
    /// TCP: both have, or one has reset it.
    Closed,
    /// UDP.
    Udp,
}

impl EdgeFlowState {
    /// That of a record; `None` for no flow's.
    pub fn of(state: FlowState) -> Option<EdgeFlowState> {
        Some(match state {
            FlowState::None => return None,
            FlowState::SynSent => EdgeFlowState::SynSent,
            FlowState::SynReceived => EdgeFlowState::SynReceived,
            FlowState::Established => EdgeFlowState::Established,
            FlowState::HalfClosed => EdgeFlowState::HalfClosed,
            FlowState::Closed => EdgeFlowState::Closed,
            FlowState::Udp | FlowState::UdpUnanswered => EdgeFlowState::Udp,
        })
    }

    /// As `nohop flows` shows it.
    pub fn name(self) -> &'static str {
        match self {
            EdgeFlowState::SynSent => "syn-sent",
            EdgeFlowState::SynReceived => "syn-received",
            EdgeFlowState::Established => "established",
            EdgeFlowState::HalfClosed => "half-closed",
            EdgeFlowState::Closed => "closed",
            EdgeFlowState::Udp => "udp",
        }
    }
}

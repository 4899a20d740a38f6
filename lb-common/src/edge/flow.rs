//! Flows: their records, keys and states.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::Address;
use crate::edge::packet::{Packet, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN};

/// How many source addresses of each family an edge has room for.
pub const MAX_EDGE_SOURCES: usize = 4;
/// How many networks of public VIPs of each family are compared with.
pub const MAX_EDGE_NETWORKS: usize = 4;
/// How many accounts of first packets there are.
pub const N_EDGE_ACCOUNTS: u32 = 16_384;
/// How many flows there is room for by default.
pub const DEFAULT_MAX_FLOWS: u32 = 131_072;

/// The key of `EDGE_FLOWS`: a packet's addresses and ports, as it arrives. Each flow has two: the client's
/// packets to the VIP, and the backend's to the source address.
#[repr(C, align(8))]
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    FromBytes,
    Immutable,
    IntoBytes,
)]
pub struct FlowKey4 {
    /// The packet's source.
    pub source: [u8; 4],
    /// Its destination.
    pub destination: [u8; 4],
    /// The port of the source.
    pub source_port: u16,
    /// The port of the destination.
    pub destination_port: u16,
    /// The protocol number.
    pub protocol: u8,
    /// Zero.
    pub padding: [u8; 3],
}

/// The key of `EDGE_FLOWS6`: see [`FlowKey4`].
#[repr(C, align(8))]
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    FromBytes,
    Immutable,
    IntoBytes,
)]
pub struct FlowKey6 {
    /// The packet's source.
    pub source: Address,
    /// Its destination.
    pub destination: Address,
    /// The port of the source.
    pub source_port: u16,
    /// The port of the destination.
    pub destination_port: u16,
    /// The protocol number.
    pub protocol: u8,
    /// Zero.
    pub padding: [u8; 3],
}

/// The value of `EDGE_FLOWS` and `EDGE_FLOWS6`. One word.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct FlowRef {
    /// The index into `EDGE_RECORDS`.
    pub record: u32,
    /// 1 where it is the backend's side; else 0.
    pub is_back: u32,
}

/// The value of `EDGE_RECORDS`: a flow, in one cache line. All zero where there is none. The addresses of
/// IPv6 are in `EDGE_ADDRESSES6`.
///
/// The programs write it. Who frees or takes it adds 1 to `claims` first, and goes on only where that is
/// what was to be expected of one alone.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct FlowRecord {
    /// 0 where it is free, 1 where it is a flow's, more while others look at it. Changed by atomic additions
    /// alone.
    pub claims: u32,
    /// The number of a [`FlowState`]. It is written last.
    pub state: u8,
    /// The protocol number.
    pub protocol: u8,
    /// [`FlowRecord::IPV6`] and others.
    pub flags: u8,
    /// Zero.
    pub padding: u8,
    /// The index into `BACKENDS`.
    pub backend_idx: u32,
    /// The backend's generation then.
    pub generation: u32,
    /// When its last packet came: the low 32 bits of CLOCK_MONOTONIC in milliseconds.
    pub last_ms: u32,
    /// When its first one did.
    pub begun_ms: u32,
    /// The client's port.
    pub client_port: u16,
    /// The VIP's.
    pub vip_port: u16,
    /// The backend's.
    pub backend_port: u16,
    /// That of the source address.
    pub source_port: u16,
    /// The client; of IPv6 zero, as the next three.
    pub client: [u8; 4],
    /// What it sends to.
    pub vip: [u8; 4],
    /// Where its packets go.
    pub backend: [u8; 4],
    /// From where they go there. The client's own address where the backend is on this host.
    pub source: [u8; 4],
    /// The packets of both directions.
    pub packets: u64,
    /// Their bytes, from the IP header on.
    pub bytes: u64,
}

impl FlowRecord {
    /// The flow is IPv6.
    pub const IPV6: u8 = 1;
    /// The client has sent a FIN.
    pub const CLIENT_FIN: u8 = 2;
    /// The backend has.
    pub const BACKEND_FIN: u8 = 4;
    /// It is one of the backend's connections in flight.
    pub const IN_FLIGHT: u8 = 8;
    /// It is one of its pending ones.
    pub const PENDING: u8 = 16;
    /// The backend is on this host.
    pub const LOCAL: u8 = 32;
    /// It was the trial of an ejected backend.
    pub const TRIAL: u8 = 64;
}

/// The value of `EDGE_ADDRESSES6`: the addresses of an IPv6 flow, at the index of its record.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct FlowAddresses6 {
    /// See [`FlowRecord::client`].
    pub client: Address,
    /// See [`FlowRecord::vip`].
    pub vip: Address,
    /// See [`FlowRecord::backend`].
    pub backend: Address,
    /// See [`FlowRecord::source`].
    pub source: Address,
}

/// Room for the numbers of [`FlowState`], a power of two.
pub const N_FLOW_STATES: usize = 8;

/// A flow's state, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FlowState {
    /// There is no flow.
    None = 0,
    /// TCP: the client's SYN was sent on.
    SynSent = 1,
    /// TCP: the backend has answered it.
    SynReceived = 2,
    /// TCP: the client has confirmed that.
    Established = 3,
    /// TCP: one side has closed it.
    HalfClosed = 4,
    /// TCP: both have, or one has reset it.
    Closed = 5,
    /// UDP.
    Udp = 6,
}

impl FlowState {
    /// The state with this number.
    #[inline(always)]
    pub const fn from_number(number: u8) -> FlowState {
        match number {
            1 => FlowState::SynSent,
            2 => FlowState::SynReceived,
            3 => FlowState::Established,
            4 => FlowState::HalfClosed,
            5 => FlowState::Closed,
            6 => FlowState::Udp,
            _ => FlowState::None,
        }
    }
}

/// The state, and the flags, of a TCP flow after a packet, by which side it came from.
#[inline(always)]
pub fn next_state(state: u8, flags: u8, tcp_flags: u8, is_back: bool) -> (u8, u8) {
    const SYN_SENT: u8 = FlowState::SynSent as u8;
    const SYN_RECEIVED: u8 = FlowState::SynReceived as u8;
    const ESTABLISHED: u8 = FlowState::Established as u8;
    const CLOSED: u8 = FlowState::Closed as u8;
    if tcp_flags & TCP_RST != 0 || state == CLOSED {
        return (CLOSED, flags);
    }
    let mut state = state;
    if state == SYN_SENT && is_back && tcp_flags & (TCP_SYN | TCP_ACK) == TCP_SYN | TCP_ACK {
        state = SYN_RECEIVED;
    }
    if state == SYN_RECEIVED && !is_back && tcp_flags & (TCP_SYN | TCP_ACK) == TCP_ACK {
        state = ESTABLISHED;
    }
    if tcp_flags & TCP_FIN == 0 || state == SYN_SENT {
        return (state, flags);
    }
    const BOTH: u8 = FlowRecord::CLIENT_FIN | FlowRecord::BACKEND_FIN;
    let flags = flags | if is_back { FlowRecord::BACKEND_FIN } else { FlowRecord::CLIENT_FIN };
    let is_closed = flags & BOTH == BOTH;
    (if is_closed { CLOSED } else { FlowState::HalfClosed as u8 }, flags)
}

/// Whether a packet is a client's first of a TCP connection.
#[inline(always)]
pub fn is_first_syn(tcp_flags: u8) -> bool {
    tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN) == TCP_SYN
}

/// The value of `EDGE_CONTROL`, which the daemon writes.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct EdgeControl {
    /// The networks that public VIPs of IPv4 are in: address and mask, as they lie in memory. Unused ones
    /// have the mask 0xffff_ffff and the address 0.
    pub networks: [[u32; 2]; MAX_EDGE_NETWORKS],
    /// The source addresses of IPv4, as they lie in memory; 0 for none.
    pub sources: [u32; MAX_EDGE_SOURCES],
    /// The networks of IPv6: the first 64 bits of address and mask, likewise.
    pub networks6: [[u64; 2]; MAX_EDGE_NETWORKS],
    /// The source addresses of IPv6; all zero for none.
    pub sources6: [Address; MAX_EDGE_SOURCES],
    /// How many of [`EdgeControl::sources`] there are.
    pub n_sources: u32,
    /// How many of [`EdgeControl::sources6`].
    pub n_sources6: u32,
    /// How many records there are.
    pub n_records: u32,
    /// 1 once a flow has gone to a backend on this host: what leaves is looked up from then on. A program
    /// writes it.
    pub has_local: u32,
    /// After how long without a packet a flow ends, in milliseconds, by its state.
    pub timeouts_ms: [u32; N_FLOW_STATES],
}

/// Whether a time, by the low 32 bits of milliseconds, is that long ago.
#[inline(always)]
pub fn is_long_ago(last_ms: u32, now_ms: u32, timeout_ms: u32) -> bool {
    now_ms.wrapping_sub(last_ms) as i32 >= 0 && now_ms.wrapping_sub(last_ms) >= timeout_ms
}

/// The value of `EDGE_COUNTERS`: what was decided on packets. All only grow.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct EdgeCounters {
    /// Indexed by [`EdgeCounter`].
    pub words: [u64; 32],
}

/// A word of [`EdgeCounters`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum EdgeCounter {
    /// Packets that were translated and sent on from TC, but for those that the fast path counts.
    Forwarded = 0,
    /// Flows that began.
    Begun = 1,
    /// ICMP errors that were translated.
    Errors = 2,
    /// Dropped: a fragment.
    Fragment = 3,
    /// Dropped: from an address that can't be answered.
    Martian = 4,
    /// Dropped: lengths that don't agree.
    BadHeader = 5,
    /// Dropped: to a VIP's port that no service has.
    NoFrontend = 6,
    /// Refused: no backend.
    NoBackend = 7,
    /// Refused: all ports that were tried are in use.
    NoPort = 8,
    /// Refused: no record is free.
    TableFull = 9,
    /// Dropped: too many first packets while there are no free records.
    SynFlood = 10,
    /// A RST was sent: a packet of no known flow.
    UnknownFlow = 11,
    /// Dropped: no route to where it goes.
    NoRoute = 12,
    /// Dropped: the hop limit is used up.
    HopLimit = 13,
    /// Dropped: longer than the way takes.
    TooLong = 14,
    /// Flows that ended by their time, or whose record another one got.
    Expired = 15,
    /// Dropped: what was to be changed couldn't be.
    Broken = 16,
}

impl EdgeCounter {
    /// All, by their names in `status` and in metrics.
    pub const ALL: [(&'static str, EdgeCounter); 17] = [
        ("forwarded", EdgeCounter::Forwarded),
        ("flows_begun", EdgeCounter::Begun),
        ("icmp_errors", EdgeCounter::Errors),
        ("fragment", EdgeCounter::Fragment),
        ("martian", EdgeCounter::Martian),
        ("bad_header", EdgeCounter::BadHeader),
        ("no_frontend", EdgeCounter::NoFrontend),
        ("no_backend", EdgeCounter::NoBackend),
        ("no_port", EdgeCounter::NoPort),
        ("table_full", EdgeCounter::TableFull),
        ("syn_flood", EdgeCounter::SynFlood),
        ("unknown_flow", EdgeCounter::UnknownFlow),
        ("no_route", EdgeCounter::NoRoute),
        ("hop_limit", EdgeCounter::HopLimit),
        ("too_long", EdgeCounter::TooLong),
        ("flows_expired", EdgeCounter::Expired),
        ("broken", EdgeCounter::Broken),
    ];
}

impl FlowKey4 {
    /// The key of packets from one address and port to another.
    #[inline(always)]
    pub fn of(from: ([u8; 4], u16), to: ([u8; 4], u16), protocol: u8) -> FlowKey4 {
        let ((source, source_port), (destination, destination_port)) = (from, to);
        FlowKey4 { source, destination, source_port, destination_port, protocol, padding: [0; 3] }
    }
}

impl FlowKey6 {
    /// The key of packets from one address and port to another.
    #[inline(always)]
    pub fn of(from: (Address, u16), to: (Address, u16), protocol: u8) -> FlowKey6 {
        let ((source, source_port), (destination, destination_port)) = (from, to);
        FlowKey6 { source, destination, source_port, destination_port, protocol, padding: [0; 3] }
    }

    /// A packet's.
    #[inline(always)]
    pub fn of_packet(packet: &Packet) -> FlowKey6 {
        let &Packet { source, destination, source_port, destination_port, protocol, .. } = packet;
        FlowKey6::of((source, source_port), (destination, destination_port), protocol)
    }
}

const _: () = {
    assert!(size_of::<FlowKey4>() == 16 && size_of::<FlowKey6>() == 40);
    assert!(size_of::<FlowRecord>() == 64 && size_of::<FlowAddresses6>() == 64);
    assert!(size_of::<FlowRef>() == 8);
};

//! Flows: their records, keys and states.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::edge::packet::{Packet, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN};
use crate::{Address, IPPROTO_TCP};

/// How many source addresses of each family an edge has room for.
pub const MAX_EDGE_SOURCES: usize = 4;
/// How many networks of public VIPs of each family are compared with.
pub const MAX_EDGE_NETWORKS: usize = 4;
/// How many accounts of first packets there are: half of them those of networks, then those of VIPs.
pub const N_EDGE_ACCOUNTS: u32 = 16_384;
/// How many addresses of its host an edge knows.
pub const MAX_OWN_ADDRESSES: u32 = 4_096;
/// The generation of the backend of a flow by which a daemon proves that the programs translate: no backend has it.
pub const PROOF_GENERATION: u32 = u32::MAX;
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

/// The value of `EDGE_FRONTENDS` and `EDGE_FRONTENDS6`: the service behind a public frontend. One word.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct EdgeServiceRef {
    /// The index into `SERVICES` and `SERVICE_STATS`; `u32::MAX` for none.
    pub service: u32,
    /// 1 where backends are shown the client's address, by an option of the SYN; else 0.
    pub shows_client: u32,
}

/// The value of `EDGE_RECORDS`: a flow, in one cache line. All zero where there is none. The addresses of
/// IPv6 are in `EDGE_ADDRESSES6`.
///
/// The programs write it. Who frees it, takes it, or changes what is counted of its backend adds 1 to `claims`
/// first, and goes on only where that is what was to be expected of one alone. What each side has shown is a
/// byte of its own, so that packets of both sides at once lose nothing of it: see [`FlowWord`].
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct FlowRecord {
    /// 0 where it is free, 1 where it is a flow's, more while others look at it. Changed by atomic additions
    /// alone.
    pub claims: u32,
    /// What it is, and its state.
    pub word: FlowWord,
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
    /// The client; of an IPv6 flow it says nothing, as the next three.
    pub client: [u8; 4],
    /// What it sends to.
    pub vip: [u8; 4],
    /// Where its packets go.
    pub backend: [u8; 4],
    /// From where they go there. The client's own address where the backend is on this host.
    pub source: [u8; 4],
    /// The packets of both directions.
    pub packets: u64,
    /// Their bytes, from the IP header on. The upper half is something else of a connection that isn't established
    /// ([`FlowWord::has_only_low_bytes`]): while it is pending, when its SYN was sent on, as the low 32 bits of
    /// CLOCK_MONOTONIC in microseconds; then what the client has to acknowledge ([`acknowledges`]), until it does.
    pub bytes: u64,
}

/// What a flow is, and what its sides have shown, within [`FlowRecord`]. All zero for none.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct FlowWord {
    /// What the client has sent: [`FlowWord::FIRST`] and others. Not zero where there is a flow; written
    /// last when it begins. Changed for packets of the client alone.
    pub client: u8,
    /// What the backend has, likewise.
    pub backend: u8,
    /// [`FlowWord::IPV6`] and others. Changed under a claim alone.
    pub flags: u8,
    /// The protocol number.
    pub protocol: u8,
}

impl FlowWord {
    /// The client's SYN, or the backend's that acknowledges it; a datagram.
    pub const FIRST: u8 = 1;
    /// The client's acknowledgement of the backend's SYN.
    pub const ACK: u8 = 2;
    /// A FIN.
    pub const FIN: u8 = 4;
    /// A RST, after which nothing else came.
    pub const RST: u8 = 8;
    /// Of a backend: something else than an answer to the SYN, such as the acknowledgement by which a connection in
    /// TIME-WAIT answers one that isn't acceptable (RFC 9293, section 3.10.7.4).
    pub const OTHER: u8 = 16;

    /// The flow is IPv6.
    pub const IPV6: u8 = 1;
    /// It is one of the backend's connections in flight.
    pub const IN_FLIGHT: u8 = 2;
    /// It is one of its pending ones.
    pub const PENDING: u8 = 4;
    /// The backend is on this host.
    pub const LOCAL: u8 = 8;
    /// It was the trial of an ejected backend.
    pub const TRIAL: u8 = 16;
    /// The backend is shown the client's address ([`EdgeServiceRef::shows_client`]).
    pub const SHOWS_CLIENT: u8 = 32;
    /// It isn't pending, but that its SYN is refused shows what it does for one that is.
    pub const SHOWS_REFUSAL: u8 = 64;
    /// It isn't pending, but that its SYN is answered shows what it does for one that is: its backend was ejected.
    pub const SHOWS_ANSWER: u8 = 128;

    /// For how long nothing may have come after a RST before a packet shows that the RST wasn't its sender's, in
    /// milliseconds. Packets that were sent before it may come after it.
    pub const RESET_IS_FINAL_MS: u32 = 1_000;

    /// Whether the flow is IPv6.
    #[inline(always)]
    pub const fn is_ipv6(self) -> bool {
        self.flags & FlowWord::IPV6 != 0
    }

    /// Whether the backend is on this host.
    #[inline(always)]
    pub const fn is_local(self) -> bool {
        self.flags & FlowWord::LOCAL != 0
    }

    /// Whether a TCP connection is open or being established.
    #[inline(always)]
    pub const fn is_open(self) -> bool {
        let Self { client, backend, .. } = self;
        (client | backend) & FlowWord::RST == 0 && client & backend & FlowWord::FIN == 0
    }

    /// Its state.
    #[inline(always)]
    pub const fn state(self) -> FlowState {
        let Self { client, backend, protocol, .. } = self;
        let is_answered = backend & FlowWord::FIRST != 0;
        if client == 0 {
            return FlowState::None;
        }
        if protocol != IPPROTO_TCP {
            return if is_answered { FlowState::Udp } else { FlowState::UdpUnanswered };
        }
        if !self.is_open() {
            FlowState::Closed
        } else if (client | backend) & FlowWord::FIN != 0 {
            FlowState::HalfClosed
        } else if !is_answered {
            FlowState::SynSent
        } else if client & FlowWord::ACK == 0 {
            FlowState::SynReceived
        } else {
            FlowState::Established
        }
    }

    /// Whether the upper half of [`FlowRecord::bytes`] isn't of the number of bytes.
    #[inline(always)]
    pub const fn has_only_low_bytes(self) -> bool {
        self.flags & FlowWord::PENDING != 0 || self.is_unconfirmed()
    }

    /// Whether it is a connection whose backend has answered, and whose client hasn't confirmed that, also where a side
    /// has reset it since.
    #[inline(always)]
    pub const fn is_unconfirmed(self) -> bool {
        let Self { client, backend, protocol, .. } = self;
        protocol == IPPROTO_TCP
            && client != 0
            && backend & FlowWord::FIRST != 0
            && client & FlowWord::ACK == 0
    }

    /// What a side has shown after a packet of its own. `idle_ms` is for how long none came before it.
    ///
    /// The sequence number of a RST isn't known to be right, so it is one of many signs: a side that sends
    /// something else later wasn't it. Those of other packets aren't either: of a client's, while the connection is
    /// [unconfirmed](FlowWord::is_unconfirmed), the caller leaves out all flags but a RST's, unless it [`acknowledges`]
    /// the backend's SYN.
    #[inline(always)]
    pub const fn after(self, tcp_flags: u8, is_back: bool, idle_ms: u32) -> u8 {
        let shown = if is_back { self.backend } else { self.client };
        if self.protocol != IPPROTO_TCP {
            return shown | FlowWord::FIRST;
        }
        if tcp_flags & TCP_RST != 0 {
            // It ends an earlier connection of the backend's, not this one, whose SYN comes again.
            let is_of_other =
                !is_back && self.backend & (FlowWord::FIRST | FlowWord::OTHER) == FlowWord::OTHER;
            return if is_of_other { shown } else { shown | FlowWord::RST };
        }
        let mut shown = shown;
        if shown & FlowWord::RST != 0 && idle_ms >= FlowWord::RESET_IS_FINAL_MS {
            shown &= !FlowWord::RST;
        }
        let kind = tcp_flags & (TCP_SYN | TCP_ACK);
        if is_back && kind == TCP_SYN | TCP_ACK {
            shown |= FlowWord::FIRST;
        } else if is_back && shown & FlowWord::FIRST == 0 {
            shown |= FlowWord::OTHER;
        }
        // Nothing but the backend's answer leads on.
        let answers = if is_back { shown } else { self.backend };
        if answers & FlowWord::FIRST == 0 {
            return shown;
        }
        if !is_back && kind == TCP_ACK {
            shown |= FlowWord::ACK;
        }
        if tcp_flags & TCP_FIN != 0 {
            shown |= FlowWord::FIN;
        }
        shown
    }

    /// Whether what is counted of the backend's connections isn't what it is to be by the state of this one.
    #[inline(always)]
    pub const fn is_unsettled(self) -> bool {
        let Self { backend, flags, .. } = self;
        let (is_open, is_answered) = (self.is_open(), backend & FlowWord::FIRST != 0);
        is_open != (flags & FlowWord::IN_FLIGHT != 0)
            || flags & FlowWord::PENDING != 0 && (backend != 0 || !is_open)
            || flags & FlowWord::SHOWS_ANSWER != 0 && is_answered
    }
}

impl FlowRecord {
    /// The bytes of its packets.
    pub const fn n_bytes(&self) -> u64 {
        let is_low = self.word.has_only_low_bytes();
        if is_low { self.bytes & u32::MAX as u64 } else { self.bytes }
    }
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
    /// UDP: the backend has sent nothing yet.
    UdpUnanswered = 7,
}

impl FlowState {
    /// The state with this number.
    pub const fn of(number: u8) -> Option<FlowState> {
        Some(match number {
            0 => FlowState::None,
            1 => FlowState::SynSent,
            2 => FlowState::SynReceived,
            3 => FlowState::Established,
            4 => FlowState::HalfClosed,
            5 => FlowState::Closed,
            6 => FlowState::Udp,
            7 => FlowState::UdpUnanswered,
            _ => return None,
        })
    }
}

/// Whether a client that sends this acknowledgement number has seen the backend's SYN: `expected` is the number after
/// the SYN's own, 0 where it isn't known. What it has seen beyond that may be data that was sent along with the SYN
/// (RFC 7413), of at most a window without scaling. Who hasn't seen the SYN finds a right number once in 65,536 times.
#[inline(always)]
pub const fn acknowledges(number: u32, expected: u32) -> bool {
    expected == 0 || number.wrapping_sub(expected) < 65_536
}

/// Whether a packet is a client's first of a TCP connection.
#[inline(always)]
pub fn is_first_syn(tcp_flags: u8) -> bool {
    tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN) == TCP_SYN
}

/// The value of `EDGE_CONTROL`.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct EdgeControl {
    /// What the daemon writes.
    pub settings: EdgeSettings,
    /// 1 once a flow has gone to a backend on this host: what leaves is looked up from then on. The programs
    /// write it.
    pub has_local: u32,
    /// Zero.
    pub padding: u32,
}

/// What the daemon writes for the programs, within [`EdgeControl`]. Who reads it may see a part of it changed.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct EdgeSettings {
    /// The networks that public VIPs of IPv4 are in: address and mask, as they lie in memory. Unused ones
    /// have the mask 0xffff_ffff and the address 0.
    pub networks: [[u32; 2]; MAX_EDGE_NETWORKS],
    /// The source addresses of IPv4, as they lie in memory; 0 for none. Those beyond `n_sources` are former
    /// ones, which flows still have.
    pub sources: [u32; MAX_EDGE_SOURCES],
    /// The networks of IPv6: the first 64 bits of address and mask, likewise.
    pub networks6: [[u64; 2]; MAX_EDGE_NETWORKS],
    /// The source addresses of IPv6, likewise; all zero for none.
    pub sources6: [Address; MAX_EDGE_SOURCES],
    /// How many of [`EdgeSettings::sources`] new flows get.
    pub n_sources: u32,
    /// How many of [`EdgeSettings::sources6`].
    pub n_sources6: u32,
    /// How many records there are.
    pub n_records: u32,
    /// A random number, so that outsiders can't find out who shares an account of first packets.
    pub seed: u32,
    /// After how long without a packet a flow ends, in milliseconds, by its state.
    pub timeouts_ms: [u32; N_FLOW_STATES],
    /// The last heartbeat of a daemon that keeps the frontends, in nanoseconds of CLOCK_MONOTONIC. One that
    /// doesn't know them, because it is of another version, has heartbeats of its own alone.
    pub heartbeat_ns: u64,
}

/// For how long the frontends are kept after the last heartbeat of a daemon that keeps them while another one
/// has heartbeats, in nanoseconds.
pub const EDGE_HEARTBEAT_NS: u64 = 5_000_000_000;

/// The first port of source addresses. Ordinary sockets get theirs from 32,768 on
/// (net.ipv4.ip_local_port_range).
pub const FIRST_EDGE_PORT: u32 = 1_024;
/// How many ports of each source address are used.
pub const N_EDGE_PORTS: u32 = 31_740;

/// The value of `EDGE_PORTS`, by a backend's index: which source address and port the next flow to it gets.
///
/// All ports of all source addresses come one after the other, so that each is used again as late as can be. A flow
/// that ends keeps its port in its own record for a while; one whose record was taken from it early, doesn't.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct PortCursor {
    /// Room, so that each has a cache line of its own.
    pub unused: [u32; 15],
    /// The place of the last one that a flow got, or tried to.
    pub last: u32,
}

/// The place of a port among those of all source addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortPlace {
    /// Its number.
    pub place: u32,
    /// The number of the source address.
    pub source: u32,
    /// The port.
    pub port: u16,
}

impl PortPlace {
    /// The place with this number, from the first one on again after the last, where there are so many source
    /// addresses: 1 to [`MAX_EDGE_SOURCES`].
    #[inline(always)]
    pub fn of(place: u32, n_sources: u32) -> PortPlace {
        // The compiler sees no division by zero.
        let n_sources = n_sources.clamp(1, MAX_EDGE_SOURCES as u32);
        let place = place % (n_sources * N_EDGE_PORTS);
        let nth = place / n_sources;
        PortPlace { place, source: place % n_sources, port: (FIRST_EDGE_PORT + nth) as u16 }
    }

    /// How far from the first place of a search the nth one is: further each time, because the flows that
    /// have the ports may have begun one after the other.
    #[inline(always)]
    pub fn step(nth: u32) -> u32 {
        if nth == 0 { 0 } else { (1 << nth) - 1 }
    }
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
    /// Flows that ended by their time.
    Expired = 15,
    /// Dropped: what was to be changed couldn't be.
    Broken = 16,
    /// Dropped: a SYN whose checksum is wrong.
    BadChecksum = 17,
    /// Flows whose record or port another one got before their time was over: closed ones, UDP, and connections that
    /// weren't established.
    Taken = 18,
    /// SYNs that were sent on with the client's address.
    Shown = 19,
    /// SYNs that were to be, without: their header has no room, or they have data.
    NotShown = 20,
}

impl EdgeCounter {
    /// All, by their names in `status` and in metrics.
    pub const ALL: [(&'static str, EdgeCounter); 21] = [
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
        ("bad_checksum", EdgeCounter::BadChecksum),
        ("flows_taken", EdgeCounter::Taken),
        ("client_shown", EdgeCounter::Shown),
        ("client_not_shown", EdgeCounter::NotShown),
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
    assert!(size_of::<FlowRef>() == 8 && size_of::<FlowWord>() == 4);
    assert!(size_of::<PortCursor>() == 64);
};

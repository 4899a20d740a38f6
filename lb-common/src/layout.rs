//! The maps' keys and values, as bytes.
//!
//! Integers are in native byte order unless the name ends in `_be`; addresses are octets in the
//! order in which people write them, which is network order. Padding is explicit and zero.
//! What a reader in the kernel must never see half-written is one aligned word.
//!
//! zerocopy's derives turn each type into bytes and words and back, so neither side writes an
//! offset by hand. What is reserved is zero, and zero will mean what this version does: a version
//! that uses it takes these maps over, and this version takes over that one's.

use core::mem::offset_of;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::{Address, Cause, Ejection, EjectionLimits, Sign, TraceSwitch};

/// The version of this layout, in the paths of the pins. It grows when a map is removed or changed;
/// a map that is added is made empty where it is absent. The sockets' storage and records
/// ([`crate::RevNat`], [`crate::Flows`], [`crate::ConnRecord`]) are frozen and not part of it.
pub const LAYOUT: u16 = 3;

/// The number of services that the maps have room for unless the configuration says otherwise.
pub const DEFAULT_MAX_SERVICES: u32 = 16_384;
/// The number of backends, over all services, that the maps have room for by default.
pub const DEFAULT_MAX_BACKENDS: u32 = 131_072;
/// The largest number of backends that one service can have.
pub const MAX_SERVICE_BACKENDS: u32 = 4_096;
/// Slots for each backend: a service's new slots are written while the old ones are still read, and
/// ranges of slots are powers of two. ARCHITECTURE.md derives the number.
pub const SLOTS_PER_BACKEND: u32 = 4;
/// Backend entries for each backend: an entry that was given up is quarantined until no reader is
/// left.
pub const ENTRIES_PER_BACKEND: u32 = 2;
/// Frontends (VIP, port and protocol) for each service.
pub const FRONTENDS_PER_SERVICE: u32 = 4;
/// The number of groups of backends that a service has room for.
pub const N_GROUPS: usize = 3;

/// The most networks that public VIPs may come from.
pub const N_PUBLIC_NETWORKS: usize = 4;
/// The number of cgroups that `BYPASS` has room for.
pub const MAX_BYPASS_CGROUPS: usize = 1_024;
/// The number of depths below the root of the hierarchy at which a cgroup can be bypassed: 0..32.
pub const N_BYPASS_LEVELS: u32 = 32;

/// The protocol number of TCP, as in an IPv4 header.
pub const IPPROTO_TCP: u8 = 6;
/// The protocol number of UDP.
pub const IPPROTO_UDP: u8 = 17;

/// The port of a frontend that stands for every port without a frontend of its own.
pub const ANY_PORT: u16 = 0;

/// The key of `FRONTENDS`: what an application connects to by IPv4.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, FromBytes, Immutable, IntoBytes,
)]
pub struct Frontend {
    /// The VIP.
    pub address: [u8; 4],
    /// The port, or [`ANY_PORT`].
    pub port: u16,
    /// The protocol number, [`IPPROTO_TCP`] or [`IPPROTO_UDP`].
    pub protocol: u8,
    /// Zero.
    pub padding: u8,
}

/// The key of `FRONTENDS6`: what an application connects to by IPv6.
#[repr(C)]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, FromBytes, Immutable, IntoBytes,
)]
pub struct Frontend6 {
    /// The VIP.
    pub address: [u8; 16],
    /// The port, or [`ANY_PORT`].
    pub port: u16,
    /// The protocol number, [`IPPROTO_TCP`] or [`IPPROTO_UDP`].
    pub protocol: u8,
    /// Zero.
    pub padding: u8,
}

/// The value of `FRONTENDS` and `FRONTENDS6`: the service behind a frontend. One word.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct ServiceRef {
    /// The index into `SERVICES`, `SERVICE_STATS` and `SERVICE_NAMES`.
    pub service: u32,
    /// 1 where the frontend applies in the host's network namespace only, as a pin does; else 0.
    pub host_only: u32,
}

/// Some of a service's slots: `n_slots` of them in `SLOTS`, from `first_slot` on. One word, so that
/// storing it swaps a service's backends at once.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, Immutable, IntoBytes)]
pub struct SlotRange {
    /// The index of the first slot.
    pub first_slot: u32,
    /// The number of slots, which is the number of backends: 0..=[`MAX_SERVICE_BACKENDS`].
    pub n_slots: u32,
}

/// What connections select from, by the addresses that their sockets can reach.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct BackendSets {
    /// The backends with IPv4 addresses: by an IPv4 VIP, in its mapped form too.
    pub ipv4: SlotRange,
    /// The backends with IPv6 addresses: by an IPv6 VIP, for datagrams and for sockets that can't reach
    /// IPv4.
    pub ipv6: SlotRange,
    /// All: for other AF_INET6 sockets that connect to an IPv6 VIP, and by a mapped one where there
    /// are none at IPv4 addresses.
    pub all: SlotRange,
}

/// A group of a service's backends, within [`ServiceEntry`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct Group {
    /// What a connection from the host's network namespace selects from.
    pub host_netns: BackendSets,
    /// What a connection from any other network namespace selects from: the same, but for backends
    /// on the host's loopback, which would be another machine's loopback there.
    pub other_netns: BackendSets,
}

impl Group {
    /// The number of ranges of slots.
    pub const N_RANGES: usize = size_of::<Group>() / size_of::<SlotRange>();

    /// The ranges of slots, in the order in which they lie in memory.
    pub fn ranges(self) -> [SlotRange; Group::N_RANGES] {
        zerocopy::transmute!(self)
    }

    /// The group with these ranges.
    pub fn of(ranges: [SlotRange; Group::N_RANGES]) -> Group {
        zerocopy::transmute!(ranges)
    }
}

/// A group that is used where those before it have no backend for a connection, within
/// [`ServiceEntry`]: one cache line.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct Fallback {
    /// Its backends.
    pub group: Group,
    /// In the last fallback: slots that no connection selects from, of backends that get no new
    /// connections but are still the table's, so that those that they have are still counted. Else
    /// empty.
    pub unselected: SlotRange,
    /// Zero.
    pub reserved: u64,
}

/// How connections of a service are treated, within [`ServiceEntry`]: one word.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct ServiceFlags {
    /// 1 where the next connection is to be reported ([`Event`]), because the daemon doesn't follow
    /// the service's instances. The daemon writes it; the connection that was reported makes it 0.
    pub report_next: u32,
    /// The number of an [`Algorithm`](crate::Algorithm).
    pub algorithm: u32,
}

/// The value of `SERVICES`: all that a connection touches of a service. A connection that finds a
/// backend in the first group touches the first cache line alone.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct ServiceEntry {
    /// The group that is used first. The daemon writes it.
    pub group: Group,
    /// Connects that were sent to a backend: connects by TCP, and choices for datagrams. It only grows.
    pub connects: u64,
    /// How connections are treated.
    pub flags: ServiceFlags,
    /// The groups after it, in order. The daemon writes them.
    pub fallbacks: [Fallback; N_GROUPS - 1],
}

/// The value of `SLOTS`: one column of an alias table (Walker 1977, in Vose's form of 1991).
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct Slot {
    /// The index into `BACKENDS` of this slot's own backend.
    pub backend: u32,
    /// The slot, counted from the range's first, whose backend takes the rest of the column.
    pub alias: u16,
    /// How much of the column is this slot's own, in 1/65536.
    pub threshold: u16,
}

/// Where to connect to, within [`BackendEntry`].
///
/// It is written before anything leads to it, and never again while a reader may know it, but for
/// the generation, which is part of a word of its own.
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
pub struct Backend {
    /// The address; IPv4 as `::ffff:a.b.c.d`.
    pub address: Address,
    /// The port.
    pub port: u16,
    /// The weight by which its connections in flight count: 1..=65535, or 0 for 1. The daemon may
    /// change it while readers know the entry.
    pub weight: u16,
    /// A number that no other backend of this boot has; 0 once it left the table. A socket that
    /// remembers an index remembers this with it.
    pub generation: u32,
}

/// The value of `BACKENDS`: all that a connection touches of a backend, in one cache line.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct BackendEntry {
    /// Where to connect to. The daemon writes it.
    pub backend: Backend,
    /// Connects that were sent there. It only grows, until the entry is another backend's.
    pub connects: u64,
    /// What this node has learnt of it by its connections.
    pub outcomes: BackendOutcomes,
}

/// What this node has learnt of a backend by its TCP connections, within [`BackendEntry`]. All zero
/// for a backend of which nothing is known, which is how the daemon writes a new one, and while the
/// unit `outcomes` isn't attached.
///
/// That unit writes it: `in_flight` by atomic additions, the rest by plain stores, of which the last
/// of two at once wins. The daemon corrects `in_flight`, by atomic additions as well.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct BackendOutcomes {
    /// Open connections, and those that are being established. Below zero only for a moment, while a
    /// correction of the daemon's races with a connection that ends: a reader takes that as 0.
    pub in_flight: i32,
    /// Connections that are being established: connect() was called, and nothing has come back yet.
    /// As above, below zero is 0.
    pub pending: i32,
    /// Whether it is ejected.
    pub ejection: EjectionWord,
    /// Since when connections are pending and none has been answered: the low 32 bits of
    /// CLOCK_MONOTONIC in microseconds; 0 while none is pending. It wraps after 71 minutes, which no
    /// pending connection lasts.
    pub unanswered_since_us: u32,
    /// The time from a connection's SYN to the answer in microseconds, by [`peak_average_us`](crate::peak_average_us); 0 for
    /// none yet. Connections whose SYN had to be sent again have none.
    pub connect_us: u32,
    /// The smoothed round-trip time of its connections when they ended (`srtt_us` of struct tcp_sock,
    /// divided by 8) in microseconds, as a moving average; 0 for none yet.
    pub srtt_us: u32,
    /// When it was added beside others: the low 32 bits of CLOCK_MONOTONIC in milliseconds; 0 where it
    /// doesn't ramp up, or not any more. The daemon writes it.
    pub added_ms: u32,
}

/// An [`Ejection`], within [`BackendOutcomes`]: one word, which is loaded and stored at once.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct EjectionWord {
    /// Until when, or when the last one ended: the low 32 bits of CLOCK_MONOTONIC in milliseconds.
    pub until_ms: u32,
    /// See [`Ejection::failures`].
    pub failures: u8,
    /// See [`Ejection::resets`].
    pub resets: u8,
    /// See [`Ejection::ejections`].
    pub ejections: u8,
    /// The number of a [`Cause`], and [`EjectionWord::CLAIMED`].
    pub cause: u8,
}

impl EjectionWord {
    /// Whether it is for what shows nothing but of the TCP port: that it refuses or resets.
    #[inline(always)]
    pub const fn is_of_port(self) -> bool {
        const REFUSED: u8 = Cause::Refused as u8;
        const RESETS: u8 = Cause::Resets as u8;
        matches!(self.cause & !EjectionWord::CLAIMED, REFUSED | RESETS)
    }

    /// The bit of [`EjectionWord::cause`] for [`Ejection::is_claimed`].
    pub const CLAIMED: u8 = 1 << 7;

    /// Why it is ejected.
    #[inline(always)]
    pub const fn cause(self) -> Cause {
        Cause::from_number(self.cause & !EjectionWord::CLAIMED)
    }

    /// See [`Ejection::is_claimed`].
    #[inline(always)]
    pub const fn is_claimed(self) -> bool {
        self.cause & EjectionWord::CLAIMED != 0
    }

    /// The word for an ejection. Its end is rounded up to a millisecond.
    #[inline(always)]
    pub fn of(ejection: Ejection) -> EjectionWord {
        let Ejection { until_ns, failures, resets, ejections, cause, is_claimed } = ejection;
        let until_ms = until_ns.div_ceil(1_000_000) as u32;
        let cause = cause as u8 | if is_claimed { EjectionWord::CLAIMED } else { 0 };
        EjectionWord { until_ms, failures, resets, ejections, cause }
    }

    /// The ejection, as it is now. Ends wrap after 49 days: one is taken to be within 24 of now.
    #[inline(always)]
    pub fn at(self, now_ns: u64) -> Ejection {
        let EjectionWord { until_ms, failures, resets, ejections, .. } = self;
        let (cause, is_claimed) = (self.cause(), self.is_claimed());
        let until_ns = near_ns(until_ms, now_ns);
        // An end that is over isn't ahead: it was longer than 24 days ago.
        let is_long_ago = cause == Cause::None && until_ns > now_ns;
        let until_ns = if is_long_ago { 0 } else { until_ns };
        Ejection { until_ns, failures, resets, ejections, cause, is_claimed }
    }

    /// Whether a sign may change it. A connection that succeeds is mostly none that does.
    #[inline(always)]
    pub fn is_changed_by(self, sign: Sign) -> bool {
        match sign {
            Sign::Answered => self.cause != Cause::None as u8 || self.failures != 0,
            Sign::TrialAborted => self.cause != Cause::None as u8,
            Sign::Closed => self.resets != 0,
            _ => true,
        }
    }

    /// The word after a sign, and what is to be reported of it: that the backend is ejected, or that
    /// it returns. An ejection for resets that is over with its time isn't reported, nor is one that a
    /// trial left as it was.
    #[inline(always)]
    pub fn after(
        self,
        sign: Sign,
        now_ns: u64,
        limits: &EjectionLimits,
    ) -> (EjectionWord, Option<EventKind>) {
        let ejection = self.at(now_ns).after(sign, now_ns, limits);
        let next = EjectionWord::of(ejection);
        let is_over = self.cause() == Cause::Resets && sign == Sign::Answered;
        let is_ended =
            self.cause != Cause::None as u8 && next.cause == Cause::None as u8 && !is_over;
        let event = if sign == Sign::TrialAborted {
            None
        } else if ejection.is_ejected(now_ns, limits)
            && (next.until_ms, next.cause()) != (self.until_ms, self.cause())
        {
            Some(EventKind::Ejected)
        } else if is_ended && matches!(sign, Sign::Answered | Sign::Probed) {
            Some(EventKind::Returned)
        } else {
            None
        };
        (next, event)
    }
}

/// The time in nanoseconds of which these are the low 32 bits in milliseconds, and which is within 24
/// days of `now_ns`.
#[inline(always)]
pub fn near_ns(ms: u32, now_ns: u64) -> u64 {
    let now_ms = now_ns / 1_000_000;
    let later_ms = ms.wrapping_sub(now_ms as u32).cast_signed();
    // Sign-extended. A time before the boot is its beginning.
    let at_ms = now_ms.wrapping_add(later_ms as u64);
    if later_ms < 0 && at_ms > now_ms { 0 } else { at_ms.wrapping_mul(1_000_000) }
}

/// The value of `SERVICE_NAMES`: a service's name, for people who look at the maps, and for a daemon
/// that takes them over.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct ServiceName {
    /// ASCII, filled up with zeros.
    pub octets: [u8; 64],
}

/// connect() of a service's VIP by UDP sockets, within [`ServiceStats`]: it shows nothing of
/// datagrams, because an address lookup (getaddrinfo(), RFC 6724) connects a socket to each
/// address and sends nothing. So these are counted apart from connects and refusals. All only grow.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct UdpConnects {
    /// Sent to a backend.
    pub connects: u64,
    /// Refused, because there was no backend at all for them.
    pub no_backend: u64,
    /// Refused, because this socket can't reach any of the backends by its address family.
    pub family: u64,
}

/// The value of `SERVICE_STATS`: connections of a service that weren't sent to a backend, and
/// connect() of UDP sockets. All only grow. One cache line.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct ServiceStats {
    /// Refused, because there was no backend at all for them.
    pub no_backend: u64,
    /// Refused, because this socket can't reach any of the backends by its address family.
    pub family: u64,
    /// Passed untouched, because connections were only counted ([`Control::is_shadow`]).
    pub shadowed: u64,
    /// connect() of UDP sockets.
    pub udp: UdpConnects,
    /// TCP connections that were sent to a backend and never established, because that refused
    /// them, didn't answer or couldn't be reached. A client that gave up is none. The unit `outcomes`
    /// writes it.
    pub failed: u64,
    /// Ejections of its backends: how often [`EventKind::Ejected`] was reported, or was to be.
    pub ejections: u64,
}

/// What the programs send to the daemon through `EVENTS`.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct Event {
    /// The index into `SERVICES` of the service that it is about; `u32::MAX` where it isn't known.
    pub service: u32,
    /// The number of an [`EventKind`]. A reader ignores those that it doesn't know.
    pub kind: u32,
    /// The index into `BACKENDS` of the backend that it is about, where it is about one; else 0.
    pub backend: u32,
    /// The backend's generation; else 0.
    pub generation: u32,
}

/// What an event reports.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// A connection of a service whose next one was to be reported ([`ServiceFlags::report_next`]).
    Connected = 1,
    /// A backend is ejected, or for another reason than before: its [`EjectionWord`] has why.
    Ejected = 2,
    /// A connection, or a probe, ended a backend's ejection.
    Returned = 3,
}

impl EventKind {
    /// The kind with this number.
    #[inline(always)]
    pub const fn from_number(number: u32) -> Option<EventKind> {
        match number {
            1 => Some(EventKind::Connected),
            2 => Some(EventKind::Ejected),
            3 => Some(EventKind::Returned),
            _ => None,
        }
    }
}

/// The value of `CONTROL`: what the daemon tells the programs, and the next daemon. It alone writes
/// it. Layout 2 has the first cache line, as `DAEMON`.
///
/// Times are in nanoseconds of CLOCK_MONOTONIC, which is `bpf_ktime_get_ns`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct Control {
    /// The daemon's last heartbeat.
    pub heartbeat_ns: u64,
    /// When the table was last known to be right.
    pub table_ns: u64,
    /// The generation of the table.
    pub table_generation: u64,
    /// The cookie of the host's network namespace; 0 while it isn't known.
    pub host_netns: u64,
    /// The daemon's process id, as it sees it.
    pub pid: u64,
    /// The same as the kernel sees it: its connections are bypassed.
    pub tgid: u64,
    /// 1 once the maps have held a whole table: before that nothing may be switched to them.
    pub is_synced: u32,
    /// 1 from when a daemon starts until it has applied a table of its own: what the maps have is an
    /// earlier daemon's, for which `max_age_ns` applies as if no daemon were alive. Earlier versions
    /// have one word of both, in which they write `is_synced`; so 1 only where that is 1.
    pub is_inherited: u32,
    /// 1 while connections are only counted and pass untouched; 0 while they are translated.
    pub is_shadow: u64,
    /// The depths at which `BYPASS` has cgroups: bit 3 for those at depth 3.
    pub bypass_levels: u64,
    /// How backends are chosen.
    pub balance: BalanceSettings,
    /// Which connections are traced.
    pub trace: TraceSwitch,
    /// 1 while TCP connections are kept as records ([`ConnRecord`](crate::ConnRecord)): the unit
    /// `outcomes`, which releases them, is attached. 0 while sockets' storage has them.
    pub keeps_records: u64,
    /// How old the table may be (`table_ns`) while no daemon is alive that has applied it: from then on services have no
    /// backend, and names are SERVFAIL. In nanoseconds; 0 for any age. An age rather than a moment,
    /// since every version writes `table_ns`: what one that doesn't know this word leaves is no
    /// deadline in the past.
    pub max_age_ns: u64,
}

/// How backends of all services are chosen, within [`Control`]. All zero: nothing is ejected, nothing
/// ramps up.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct BalanceSettings {
    /// See [`EjectionLimits::refused`](crate::EjectionLimits::refused).
    pub refused: u8,
    /// See [`EjectionLimits::failures`](crate::EjectionLimits::failures).
    pub failures: u8,
    /// See [`EjectionLimits::silence`](crate::EjectionLimits::silence).
    pub silence: u8,
    /// What Maglev hashes: the number of a [`MaglevKey`].
    pub key: u8,
    /// See [`EjectionLimits::share`](crate::EjectionLimits::share).
    pub share: u16,
    /// Zero.
    pub padding: u16,
    /// The time of a first ejection, in milliseconds.
    pub base_ms: u32,
    /// The longest time of an ejection, in milliseconds.
    pub max_ms: u32,
    /// See [`SlowStart::per_tick`](crate::SlowStart::per_tick).
    pub slow_start_per_tick: u32,
    /// Zero.
    pub reserved: u32,
}

impl BalanceSettings {
    /// What ejects.
    #[inline(always)]
    pub fn limits(self) -> EjectionLimits {
        EjectionLimits {
            refused: self.refused,
            failures: self.failures,
            silence: self.silence,
            base_ns: u64::from(self.base_ms) * 1_000_000,
            max_ns: u64::from(self.max_ms) * 1_000_000,
            share: self.share,
        }
    }
}

/// What Maglev hashes of a connection, so that those that have it in common go to one backend.
#[repr(u8)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MaglevKey {
    /// The client's cgroup.
    #[default]
    Cgroup = 0,
    /// The client's network namespace.
    Netns = 1,
    /// The address that the socket is bound to, or its network namespace where it is bound to none.
    Source = 2,
}

impl MaglevKey {
    /// The key with this number; the first where it is unknown.
    #[inline(always)]
    pub const fn from_number(number: u8) -> MaglevKey {
        match number {
            1 => MaglevKey::Netns,
            2 => MaglevKey::Source,
            _ => MaglevKey::Cgroup,
        }
    }
}

/// The value of `PROBE`: what the connect hook saw of the daemon's last connect() to the pool's own
/// address, which no service has. The daemon writes the cookie of the socket that is about to
/// connect, and zeros; the hook writes the rest, once. No other socket of this boot has that cookie,
/// so no other process can pass for the daemon.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct Probe {
    /// The socket that connects, by its cookie (SO_COOKIE); 0 while none is expected.
    pub cookie: u64,
    /// The process that connected.
    pub tgid: u64,
    /// The cookie of its network namespace.
    pub netns: u64,
}

/// The key of `BYPASS`: a cgroup whose processes, and those of the cgroups below it, are bypassed:
/// their connections pass untouched.
#[repr(C, align(8))]
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, FromBytes, Immutable, IntoBytes,
)]
pub struct BypassCgroup {
    /// The cgroup's id, its directory's inode.
    pub cgroup_id: u64,
}

/// The value of `BYPASS`.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, FromBytes, Immutable, IntoBytes)]
pub struct BypassLevel {
    /// The cgroup's depth below the root of the hierarchy, which has 0; below [`N_BYPASS_LEVELS`].
    pub level: u64,
}

/// The value of `COUNTERS`: events that no service owns. All only grow.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct GlobalCounters {
    /// Connections into the pool that no frontend matches: an address that was never given to a
    /// service, or a port that isn't one of the service's. They were refused. A UDP socket's connect()
    /// isn't among them, see [`GlobalCounters::udp_no_frontend`].
    pub refused_no_frontend: u64,
    /// Connections whose socket storage couldn't be had. They went on; `getpeername` shows the
    /// backend.
    pub storage_alloc_failed: u64,
    /// Connections that met a slot or a backend that isn't there, which can't happen unless the maps
    /// were written by another program. They were refused.
    pub inconsistent: u64,
    /// Connections to frontends that passed untouched: of the kernel's own sockets, of bypassed
    /// cgroups, of the daemon.
    pub bypassed: u64,
    /// Choices made again because the backend that a socket had kept left the table.
    pub stale_backend: u64,
    /// Connections to frontends that passed untouched because connections were only counted.
    pub shadowed: u64,
    /// Connections into the pool that no frontend matches, and that passed untouched for that reason:
    /// they would have been refused.
    pub shadowed_no_frontend: u64,
    /// connect() of UDP sockets into the pool that no frontend matches: address lookups, mostly, which
    /// connect to a port of their own choice (9, 65535), or to one that is served by TCP alone.
    pub udp_no_frontend: u64,
    /// Datagrams whose socket remembered as many flows as it can, all in use: the next one may go to
    /// another backend, and the reply comes from the backend's own address.
    pub flows_full: u64,
    /// Events ([`Event`]) for which `EVENTS` had no room, as no daemon read them.
    pub events_lost: u64,
    /// Events of traced connections ([`TraceEvent`](crate::TraceEvent)) for which `TRACE` had no room.
    pub trace_lost: u64,
    /// Connections from edges of `datapath.client_address_from` that show the client's address.
    pub client_shown: u64,
    /// Those that show the edge's, since their SYN had no such option.
    pub client_no_option: u64,
    /// Those that show the edge's, since the kernel didn't keep their SYN.
    pub client_no_syn: u64,
    /// Zero. Room for further counters.
    pub reserved: [u64; 18],
}

/// A field of [`GlobalCounters`].
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// [`GlobalCounters::refused_no_frontend`]
    RefusedNoFrontend = word_of(offset_of!(GlobalCounters, refused_no_frontend)),
    /// [`GlobalCounters::storage_alloc_failed`]
    StorageAllocFailed = word_of(offset_of!(GlobalCounters, storage_alloc_failed)),
    /// [`GlobalCounters::inconsistent`]
    Inconsistent = word_of(offset_of!(GlobalCounters, inconsistent)),
    /// [`GlobalCounters::bypassed`]
    Bypassed = word_of(offset_of!(GlobalCounters, bypassed)),
    /// [`GlobalCounters::stale_backend`]
    StaleBackend = word_of(offset_of!(GlobalCounters, stale_backend)),
    /// [`GlobalCounters::shadowed`]
    Shadowed = word_of(offset_of!(GlobalCounters, shadowed)),
    /// [`GlobalCounters::shadowed_no_frontend`]
    ShadowedNoFrontend = word_of(offset_of!(GlobalCounters, shadowed_no_frontend)),
    /// [`GlobalCounters::udp_no_frontend`]
    UdpNoFrontend = word_of(offset_of!(GlobalCounters, udp_no_frontend)),
    /// [`GlobalCounters::flows_full`]
    FlowsFull = word_of(offset_of!(GlobalCounters, flows_full)),
    /// [`GlobalCounters::events_lost`]
    EventsLost = word_of(offset_of!(GlobalCounters, events_lost)),
    /// [`GlobalCounters::trace_lost`]
    TraceLost = word_of(offset_of!(GlobalCounters, trace_lost)),
    /// [`GlobalCounters::client_shown`]
    ClientShown = word_of(offset_of!(GlobalCounters, client_shown)),
    /// [`GlobalCounters::client_no_option`]
    ClientNoOption = word_of(offset_of!(GlobalCounters, client_no_option)),
    /// [`GlobalCounters::client_no_syn`]
    ClientNoSyn = word_of(offset_of!(GlobalCounters, client_no_syn)),
}

/// The word that begins at an offset.
const fn word_of(offset: usize) -> u32 {
    assert!(offset.is_multiple_of(8));
    (offset / 8) as u32
}

/// How a program refuses a connection with ECONNREFUSED.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RejectMethod {
    /// `bpf_set_retval`. Kernel 6.1 and later.
    Errno = 0,
    /// By a rewrite to loopback's port 0, where nothing can listen; `sendto` gets EPERM. Any kernel.
    PortZero = 1,
}

// The derives assert that there is no padding but what is named.
const _: () = {
    assert!(size_of::<Frontend>() == 8 && offset_of!(Frontend, port) == 4);
    assert!(size_of::<Frontend6>() == 20);
    // One word each, which is stored and loaded at once.
    assert!(size_of::<ServiceRef>() == 8 && align_of::<ServiceRef>() == 8);
    assert!(size_of::<SlotRange>() == 8 && align_of::<SlotRange>() == 8);
    assert!(size_of::<Slot>() == 8 && align_of::<Slot>() == 8);
    // Whole cache lines, and what ordinary connections touch in the first one.
    assert!(size_of::<ServiceEntry>() == 64 * N_GROUPS && size_of::<Fallback>() == 64);
    assert!(offset_of!(ServiceEntry, fallbacks) == 64);
    assert!(size_of::<BackendEntry>() == 64 && size_of::<ServiceStats>() == 64);
    assert!(size_of::<BackendOutcomes>() == 32 && offset_of!(BackendEntry, outcomes) == 32);
    assert!(size_of::<Control>() == 128 && offset_of!(Control, bypass_levels) == 64);
    assert!(size_of::<BalanceSettings>() == 24 && size_of::<EjectionWord>() == 8);
    assert!(size_of::<GlobalCounters>() == 256);
    // The daemon stores the generation's whole word, in which the port is.
    assert!(size_of::<Backend>() == 24 && offset_of!(Backend, port) == 16);
    // A slot's alias is an index into its own range.
    assert!(MAX_SERVICE_BACKENDS <= 1 << 16);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ejections_and_returns_are_reported() {
        let limits = EjectionLimits::default();
        const S: u64 = 1_000_000_000;
        // What happens, after how many milliseconds, and what is reported of it.
        let rows: &[&[(u64, Sign, Option<EventKind>)]] = &[
            &[
                (0, Sign::Answered, None),
                (1, Sign::Refused, Some(EventKind::Ejected)),
                (2, Sign::Refused, None),
                (3, Sign::Answered, Some(EventKind::Returned)),
                (4, Sign::Answered, None),
            ],
            &[
                (0, Sign::Silence, Some(EventKind::Ejected)),
                (1, Sign::Refused, Some(EventKind::Ejected)),
                (2_000, Sign::Probed, Some(EventKind::Returned)),
            ],
            &[
                (0, Sign::Reset, None),
                (1, Sign::Reset, None),
                (2, Sign::Reset, Some(EventKind::Ejected)),
                (3, Sign::Reset, None),
                (200, Sign::Answered, None),
            ],
            &[(0, Sign::Silence, Some(EventKind::Ejected)), (1_500, Sign::TrialAborted, None)],
        ];
        for signs in rows {
            let mut word = EjectionWord::default();
            for &(ms, sign, expected) in *signs {
                let (next, event) = word.after(sign, S + ms * 1_000_000, &limits);
                assert_eq!(event, expected, "{sign:?} after {ms} ms");
                assert!(next == word || word.is_changed_by(sign), "{sign:?} after {ms} ms");
                word = next;
            }
        }
        // Without limits nothing is ejected, and nothing reported.
        let none = EjectionLimits { refused: 0, failures: 0, silence: 0, max_ns: 0, ..limits };
        for sign in [Sign::Refused, Sign::Reset, Sign::Failed, Sign::Silence] {
            let word = (0..9).fold(EjectionWord::default(), |word, _| {
                let (next, event) = word.after(sign, S, &none);
                assert_eq!(event, None, "{sign:?}");
                next
            });
            assert!(word.at(S).standing(S, &none).is_eligible(), "{sign:?}");
        }
    }

    #[test]
    fn an_ejection_fits_in_a_word_whenever_it_is() {
        const MS: u64 = 1_000_000;
        for now_ms in [1, 500_000, u64::from(u32::MAX) - 5, u64::from(u32::MAX) * 3 + 7] {
            for later_ms in [0i64, 1, 1_000, 300_000, -1, -86_400_000] {
                let until_ns = now_ms.saturating_add_signed(later_ms) * MS;
                let ejection = Ejection {
                    until_ns,
                    failures: 3,
                    resets: 255,
                    ejections: 9,
                    cause: Cause::Silence,
                    is_claimed: later_ms == 1_000,
                };
                let word = EjectionWord::of(ejection);
                // What was before the boot is its beginning.
                assert_eq!(word.at(now_ms * MS + 999_999), ejection, "{now_ms} {later_ms}");
            }
        }
        for now_ms in [77, 3 << 30, 5 << 30] {
            let until_ns = EjectionWord::default().at(now_ms * MS).until_ns;
            assert!(until_ns <= now_ms * MS, "{now_ms}");
        }
        assert_eq!(EjectionWord::of(Ejection::default()), EjectionWord::default());
        let odd = Ejection { until_ns: MS + 1, ..Ejection::default() };
        assert_eq!(EjectionWord::of(odd).until_ms, 2);
    }
}

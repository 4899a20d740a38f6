//! The maps' keys and values, as bytes.
//!
//! Integers are in native byte order unless the name ends in `_be`; addresses are octets in the
//! order in which people write them, which is network order. Padding is explicit and zero.
//! What a reader in the kernel must never see half-written is one aligned word.

use crate::Address;

/// The version of this layout, in the paths of the pins. It grows when a map is added, removed or
/// changed; the sockets' storage ([`crate::RevNat`], [`crate::Flows`]) is frozen and not part of it.
pub const LAYOUT: u16 = 2;

/// The number of services that the maps have room for unless the configuration says otherwise.
pub const DEFAULT_MAX_SERVICES: u32 = 16_384;
/// The number of backends, over all services, that the maps have room for by default.
pub const DEFAULT_MAX_BACKENDS: u32 = 131_072;
/// The largest number of backends that one service can have.
pub const MAX_SERVICE_BACKENDS: u32 = 4_096;
/// Slots for each backend: a service's new region is written while the old one is still read, and
/// regions are powers of two. ARCHITECTURE.md derives the number.
pub const SLOTS_PER_BACKEND: u32 = 4;
/// Backend entries for each backend: an entry that was given up rests until no reader is left.
pub const ENTRIES_PER_BACKEND: u32 = 2;
/// Frontends (VIP, port and protocol) for each service.
pub const FRONTENDS_PER_SERVICE: u32 = 4;
/// The number of cgroups that can be left alone.
pub const MAX_EXCLUDED: usize = 16;

/// The protocol number of TCP, as in an IPv4 header.
pub const IPPROTO_TCP: u8 = 6;
/// The protocol number of UDP.
pub const IPPROTO_UDP: u8 = 17;

/// The port of a frontend that stands for every port without a frontend of its own.
pub const ANY_PORT: u16 = 0;

/// The key of `FRONTENDS`: what an application connects to by IPv4.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServiceRef {
    /// The index into `SERVICES`, `UNSENT` and `NAMES`.
    pub service: u32,
    /// 1 where the frontend counts in the host's network namespace only, as a pin does; else 0.
    pub host_only: u32,
}

/// Some of a service's slots: `n_slots` of them in `SLOTS`, from `first_slot` on. One word, so that
/// storing it swaps a service's backends at once.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SlotRange {
    /// The index of the first slot.
    pub first_slot: u32,
    /// The number of slots, which is the number of backends: 0..=[`MAX_SERVICE_BACKENDS`].
    /// 0 means that connects to are refused.
    pub n_slots: u32,
}

/// What connections choose from, by the addresses that their sockets can reach.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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

/// What connections of a service choose from, within [`ServiceEntry`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Group {
    /// What a connection from the host's network namespace chooses from.
    pub host: BackendSets,
    /// What a connection from any other network namespace chooses from: the same, but for backends on
    /// the host's loopback, which would be another machine's loopback there.
    pub elsewhere: BackendSets,
}

impl Group {
    /// The number of regions.
    pub const N_REGIONS: usize = 6;

    /// The regions, in the order in which they lie in memory.
    pub fn regions(self) -> [SlotRange; Group::N_REGIONS] {
        let Group { host, elsewhere } = self;
        [host.ipv4, host.ipv6, host.all, elsewhere.ipv4, elsewhere.ipv6, elsewhere.all]
    }
}

/// The value of `SERVICES`: all that a connection touches of a service, in one cache line.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServiceEntry {
    /// What connections choose from. The daemon writes it.
    pub service: Group,
    /// Connects that were sent to a backend: connects by TCP, and choices for datagrams. It only grows.
    pub connects: u64,
    /// 1 where the next connection is to be reported ([`Event`]), because the daemon doesn't follow the
    /// service's instances. The daemon writes it; the connection that was reported makes it 0.
    pub report_next: u64,
}

/// The value of `SLOTS`: one column of an alias table (Walker 1977, in Vose's form of 1991).
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slot {
    /// The index into `BACKENDS` of this slot's own backend.
    pub backend: u32,
    /// The slot, counted from the region's first, whose backend takes the rest of the column.
    pub alias: u16,
    /// How much of the column is this slot's own, in 1/65536.
    pub threshold: u16,
}

/// Where to connect to, within [`BackendEntry`].
///
/// It is written before anything leads to it, and never again while a reader may know it, but for
/// the generation, which is a word of its own.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Backend {
    /// The address; IPv4 as `::ffff:a.b.c.d`.
    pub address: Address,
    /// The port.
    pub port: u16,
    /// Zero.
    pub padding: u16,
    /// A number that no other backend of this boot has; 0 once it left the table. A socket that
    /// remembers an index remembers this with it.
    pub generation: u32,
}

/// The value of `BACKENDS`: all that a connection touches of a backend, half a cache line.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BackendEntry {
    /// Where to connect to. The daemon writes it.
    pub backend: Backend,
    /// Connects that were sent there. It only grows, until the entry is another backend's.
    pub connects: u64,
}

/// The value of `NAMES`: a service's name, for people who look at the maps, and for a daemon that
/// takes them over.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServiceName {
    /// ASCII, filled up with zeros.
    pub octets: [u8; 64],
}

/// The value of `UNSENT`: connections of a service that weren't sent to a backend. All only grow.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RefusedStats {
    /// Refused, because there was no backend at all for them.
    pub no_backend: u64,
    /// Refused, because this socket can't reach any of the backends by its address family.
    pub family: u64,
    /// Passed untouched, because connections were only counted ([`Control::is_shadow`]).
    pub shadowed: u64,
}

/// The value of `UDP_CONNECTS`: connect() of a service's VIP by UDP sockets, which tells nothing of
/// datagrams: whoever looks up a name (getaddrinfo(), RFC 6724) connects a socket to each address and
/// sends nothing. So they are counted apart from connections and refusals. All only grow, from the start of
/// each daemon: the map isn't pinned.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UdpConnects {
    /// Sent to a backend.
    pub connects: u64,
    /// Refused, because there was no backend at all for them.
    pub no_backend: u64,
    /// Refused, because this socket can't reach any of the backends by its address family.
    pub family: u64,
}

/// What the programs send to the daemon through `REPORTS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// The index into `SERVICES` of the service that it is about.
    pub service: u32,
    /// A [`EventKind`].
    pub reason: u32,
}

/// Why something is reported.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// A connection of a service whose connection was awaited ([`ServiceEntry::report_next`]).
    Connected = 1,
}

/// The value of `DAEMON`: what the daemon says of itself. It alone writes it. One cache line.
///
/// Times are in nanoseconds of CLOCK_MONOTONIC, which is `bpf_ktime_get_ns`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Control {
    /// When the daemon last said that it lives.
    pub heartbeat_ns: u64,
    /// When the table was last known to be right.
    pub table_ns: u64,
    /// The generation of the table.
    pub table_generation: u64,
    /// The cookie of the host's network namespace; 0 while it isn't known.
    pub host_netns: u64,
    /// The daemon's process id, as it sees it.
    pub pid: u64,
    /// The same as the kernel sees it: its connections are left alone.
    pub tgid: u64,
    /// 1 once the maps have held a whole table: before that nothing may be switched to them.
    pub is_synced: u64,
    /// 1 while connections are only counted and pass untouched; 0 while they are translated.
    pub is_shadow: u64,
}

/// The value of `PROBE`: what the connect hook saw of the daemon's last connect() to the pool's own
/// address, which no service has. The daemon writes the cookie of the socket that is about to
/// connect, and zeros; the hook writes the rest, once. No other socket of this boot has that cookie,
/// so no other process can pass for the daemon.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Probe {
    /// The socket that connects, by its cookie (SO_COOKIE); 0 while none is expected.
    pub cookie: u64,
    /// The process that connected.
    pub tgid: u64,
    /// The cookie of its network namespace.
    pub netns: u64,
}

/// The value of `EXCLUDED`: a cgroup whose processes, and those of the cgroups below it, are left
/// alone. The daemon alone writes it: the level first, so that a cgroup is never read with the level of
/// its predecessor. The first entry of zeros ends the list; see [`BypassCgroup::HOLE`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BypassCgroup {
    /// The cgroup's id, its directory's inode; 0 for an entry that isn't used.
    pub cgroup_id: u64,
    /// Its depth below the root of the hierarchy, which has 0.
    pub level: u64,
}

impl BypassCgroup {
    /// An entry that excludes nothing and has others behind it: what is excluded keeps its place when
    /// a cgroup before it goes.
    pub const HOLE: BypassCgroup = BypassCgroup { cgroup_id: 0, level: u64::MAX };
}

/// Events that no service owns: the indices of `COUNTERS`, and behind those the ones of `EVENTS`, which
/// isn't pinned, so that what came after the layout begins anew with each daemon.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// Connects into the pool that no frontend matches: an address that was never given to a service,
    /// or a port that isn't one of the service's. They were refused. A UDP socket's connect() isn't among
    /// them, see [`Counter::UdpNoFrontend`].
    RefusedNoFrontend = 0,
    /// Connects whose socket storage couldn't be had. They went on; `getpeername` shows the backend.
    StorageAllocFailed = 1,
    /// Connects that met a slot or a backend that isn't there, which can't happen unless the maps
    /// were written by somebody else. They were refused.
    Inconsistent = 2,
    /// Connects to frontends that passed untouched: of the kernel's own sockets, of excluded cgroups,
    /// of the daemon.
    Bypassed = 3,
    /// Choices made again because the backend that a socket had kept left the table.
    StaleBackend = 4,
    /// Connects to frontends that passed untouched because connections were only counted.
    Shadowed = 5,
    /// Connects into the pool that no frontend matches, and that passed untouched for that reason: they
    /// would have been refused.
    ShadowedNoFrontend = 6,
    /// connect() of UDP sockets into the pool that no frontend matches: address lookups, mostly, which
    /// connect to a port of their own choice (9, 65535), or to one that is served by TCP alone.
    UdpNoFrontend = 7,
    /// Datagrams whose socket remembered as many flows as it can, all in use: the next one may go to
    /// another backend, and the reply comes from the backend's own address.
    FlowsFull = 8,
}

/// The number of [`Counter`]s that `COUNTERS` has.
pub const N_PINNED_COUNTERS: usize = 7;
/// The number of [`Counter`]s.
pub const N_COUNTERS: usize = 9;

/// How a program refuses a connection with ECONNREFUSED.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RejectMethod {
    /// `bpf_set_retval`. Kernel 6.1 and later.
    Errno = 0,
    /// By a rewrite to loopback's port 0, where nothing can listen; `sendto` gets EPERM. Any kernel.
    PortZero = 1,
}

const _: () = {
    use core::mem::{align_of, offset_of, size_of};
    assert!(size_of::<Frontend>() == 8 && offset_of!(Frontend, port) == 4);
    assert!(size_of::<Frontend6>() == 20);
    assert!(size_of::<ServiceRef>() == 8 && align_of::<ServiceRef>() == 8);
    assert!(size_of::<SlotRange>() == 8 && align_of::<SlotRange>() == 8);
    assert!(size_of::<Group>() == 8 * Group::N_REGIONS);
    assert!(size_of::<Slot>() == 8 && align_of::<Slot>() == 8);
    assert!(size_of::<Backend>() == 24 && offset_of!(Backend, generation) == 20);
    assert!(size_of::<ServiceEntry>() == 64 && offset_of!(ServiceEntry, connects) == 48);
    assert!(size_of::<BackendEntry>() == 32 && offset_of!(BackendEntry, connects) == 24);
    assert!(size_of::<Control>() == 64 && size_of::<Probe>() == 24);
    assert!(size_of::<RefusedStats>() == 24 && size_of::<Event>() == 8);
    assert!(size_of::<UdpConnects>() == 24);
    // A slot's alias is an index into its own region.
    assert!(MAX_SERVICE_BACKENDS <= 1 << 16);
};

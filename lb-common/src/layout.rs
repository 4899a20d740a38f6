//! The maps' keys and values, as bytes.
//!
//! Integers are in native byte order unless the name ends in `_be`; addresses are four octets in
//! the order in which people write them, which is network order. Padding is explicit and zero.
//! What a reader in the kernel must never see half-written is one aligned 8-byte word.

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
/// Frontends (VIP and port) for each service.
pub const FRONTENDS_PER_SERVICE: u32 = 4;

/// The protocol number of TCP, as in an IPv4 header.
pub const IPPROTO_TCP: u8 = 6;

/// The key of `FRONTENDS`: what an application dials.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Frontend {
    /// The VIP.
    pub address: [u8; 4],
    /// The port.
    pub port: u16,
    /// The protocol number, [`IPPROTO_TCP`].
    pub protocol: u8,
    /// Zero.
    pub padding: u8,
}

/// The value of `FRONTENDS`: the service behind a frontend. One word.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// The index into `SERVICES` and `SERVICE_STATS`.
    pub service: u32,
    /// 1 where the frontend counts in the host's network namespace only, as a pin does; else 0.
    pub host_only: u32,
}

/// A service's slots: `n_slots` of them in `SLOTS`, from `first_slot` on. One word, so that
/// storing it swaps a service's backends at once.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// The index of the first slot.
    pub first_slot: u32,
    /// The number of slots, which is the number of backends: 0..=[`MAX_SERVICE_BACKENDS`].
    /// 0 means that dials are refused.
    pub n_slots: u32,
}

/// The value of `SERVICES`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// What a dial from the host's network namespace chooses from.
    pub host: Region,
    /// What a dial from any other network namespace chooses from: the same, but for backends on
    /// the host's loopback, which would be another machine's loopback there.
    pub elsewhere: Region,
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

/// The value of `BACKENDS`: where to connect to. One word.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Backend {
    /// The address.
    pub address: [u8; 4],
    /// The port.
    pub port: u16,
    /// Zero.
    pub padding: u16,
}

/// The value of `SERVICE_STATS`; both only grow.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServiceCounters {
    /// Dials that were sent to a backend.
    pub dials: u64,
    /// Dials that were refused because there was no backend for them.
    pub refused: u64,
}

/// What `SOCKETS`, the socket storage, remembers of a dial, so that `getpeername` shows the VIP.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dial {
    /// What the application dialled.
    pub frontend_address: [u8; 4],
    /// The port that the application dialled.
    pub frontend_port: u16,
    /// Zero.
    pub padding: u16,
    /// What the dial was rewritten to.
    pub backend: Backend,
}

/// The indices of `COUNTERS`: events that no service owns.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counter {
    /// Dials into the pool that no frontend matches: an address that was never given to a service,
    /// or a port that isn't one of the service's. They were refused.
    RefusedNoFrontend = 0,
    /// Dials whose socket storage couldn't be had. They went on; `getpeername` shows the backend.
    NoStorage = 1,
    /// Dials that met a slot or a backend that isn't there, which can't happen unless the maps
    /// were written by somebody else. They were refused.
    Inconsistent = 2,
}

/// The number of [`Counter`]s.
pub const N_COUNTERS: usize = 3;

/// How a program refuses a dial with ECONNREFUSED.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// `bpf_set_retval`. Kernel 6.1 and later.
    Errno = 0,
    /// By a rewrite to 127.0.0.1 port 0, where nothing can listen. Any kernel; TCP only.
    PortZero = 1,
}

const _: () = {
    use core::mem::{align_of, offset_of, size_of};
    assert!(size_of::<Frontend>() == 8 && offset_of!(Frontend, port) == 4);
    assert!(size_of::<Target>() == 8 && align_of::<Target>() == 8);
    assert!(size_of::<Region>() == 8 && align_of::<Region>() == 8);
    assert!(size_of::<Service>() == 16 && offset_of!(Service, elsewhere) == 8);
    assert!(size_of::<Slot>() == 8 && align_of::<Slot>() == 8);
    assert!(size_of::<Backend>() == 8 && align_of::<Backend>() == 8);
    assert!(size_of::<ServiceCounters>() == 16);
    assert!(size_of::<Dial>() == 16 && offset_of!(Dial, backend) == 8);
    // A slot's alias is an index into its own region.
    assert!(MAX_SERVICE_BACKENDS <= 1 << 16);
};

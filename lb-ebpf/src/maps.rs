//! The maps. ARCHITECTURE.md says why they are laid out like this.
//!
//! The daemon writes all but the counters, the probe and the socket storage. The arrays are
//! memory-mapped by it, so that it can store a word at once; sizes are defaults that it overrides
//! when it loads.

use aya_ebpf::bindings::BPF_F_MMAPABLE;
use aya_ebpf::btf_maps::{Array, HashMap, RingBuf, SkStorage};
use aya_ebpf::macros::btf_map;
use core::intrinsics::{AtomicOrdering, atomic_xadd};
use lb_common::{
    Backend, BackendEntry, BackendSets, BypassCgroup, Control, Counter, DEFAULT_MAX_BACKENDS,
    DEFAULT_MAX_SERVICES, ENTRIES_PER_BACKEND, Event, EventKind, FRONTENDS_PER_SERVICE, Flows,
    Frontend, Frontend6, MAX_EXCLUDED, N_COUNTERS, N_PINNED_COUNTERS, Probe, RefusedStats, RevNat,
    SLOTS_PER_BACKEND, ServiceEntry, ServiceName, ServiceRef, Slot, SlotRange, UdpConnects,
};

const MMAPABLE: usize = BPF_F_MMAPABLE as usize;
const N_EVENTS: usize = N_COUNTERS - N_PINNED_COUNTERS;
const N_SERVICES: usize = DEFAULT_MAX_SERVICES as usize;
const N_FRONTENDS: usize = (DEFAULT_MAX_SERVICES * FRONTENDS_PER_SERVICE) as usize;
const N_SLOTS: usize = (DEFAULT_MAX_BACKENDS * SLOTS_PER_BACKEND) as usize;
const N_BACKENDS: usize = (DEFAULT_MAX_BACKENDS * ENTRIES_PER_BACKEND) as usize;

#[btf_map]
static FRONTENDS: HashMap<Frontend, ServiceRef, N_FRONTENDS> = HashMap::new();
#[btf_map]
static FRONTENDS6: HashMap<Frontend6, ServiceRef, N_FRONTENDS> = HashMap::new();
#[btf_map]
static SERVICES: Array<ServiceEntry, N_SERVICES, MMAPABLE> = Array::new();
#[btf_map]
static SLOTS: Array<Slot, N_SLOTS, MMAPABLE> = Array::new();
#[btf_map]
static BACKENDS: Array<BackendEntry, N_BACKENDS, MMAPABLE> = Array::new();
/// The programs don't read it; here, so that it is part of the object like the others.
#[btf_map]
static NAMES: Array<ServiceName, N_SERVICES, MMAPABLE> = Array::new();
#[btf_map]
static UNSENT: Array<RefusedStats, N_SERVICES, MMAPABLE> = Array::new();
#[btf_map]
static COUNTERS: Array<u64, N_PINNED_COUNTERS, MMAPABLE> = Array::new();
/// Counters that came after the layout. Neither this nor the next is pinned: to a version that doesn't
/// know them the pinned maps are whole, and they begin anew with each daemon.
#[btf_map]
static EVENTS: Array<u64, N_EVENTS, MMAPABLE> = Array::new();
#[btf_map]
static UDP_CONNECTS: Array<UdpConnects, N_SERVICES, MMAPABLE> = Array::new();
#[btf_map]
static DAEMON: Array<Control, 1, MMAPABLE> = Array::new();
#[btf_map]
static PROBE: Array<Probe, 1, MMAPABLE> = Array::new();
#[btf_map]
static EXCLUDED: Array<BypassCgroup, MAX_EXCLUDED, MMAPABLE> = Array::new();
/// What the daemon hears at once: 4,096 of them at most wait for it. It isn't pinned: each daemon has
/// its own, and asks anew.
#[btf_map]
static REPORTS: RingBuf<Event, 65_536> = RingBuf::new();
/// What each connected socket connected. It lives and dies with the socket.
#[btf_map]
pub static PEERS: SkStorage<RevNat> = SkStorage::new();
/// What a UDP socket connected before, while `PEERS` says what it connected last: that connect() may have
/// failed. It lives and dies with the socket.
#[btf_map]
pub static FORMER_PEERS: SkStorage<RevNat> = SkStorage::new();
/// Where the datagrams of each socket went. It lives and dies with the socket.
#[btf_map]
pub static FLOWS: SkStorage<Flows> = SkStorage::new();

/// The service behind a frontend.
#[inline(always)]
pub fn target(frontend: &Frontend) -> Option<ServiceRef> {
    FRONTENDS.get_ptr(frontend).map(copy_target)
}

/// The service behind an IPv6 frontend.
#[inline(always)]
pub fn target6(frontend: &Frontend6) -> Option<ServiceRef> {
    FRONTENDS6.get_ptr(frontend).map(copy_target)
}

#[inline(always)]
fn copy_target(target: *const ServiceRef) -> ServiceRef {
    // SAFETY: the kernel may recycle the element once it is deleted, so it is copied out at once,
    // as the one word that it is. The daemon inserts nothing between a deletion and the end of the
    // readers that may have seen the element, so the word is this frontend's.
    unsafe { core::mem::transmute::<u64, ServiceRef>(target.cast::<u64>().read_volatile()) }
}

/// What a connection can reach by its addresses.
#[derive(Clone, Copy, PartialEq)]
pub enum Reach {
    /// IPv4 backends.
    Ipv4,
    /// IPv6 backends.
    Ipv6,
    /// IPv4 backends, or all where there are none.
    Ipv4First,
    /// IPv6 backends, or all where there are none.
    Ipv6First,
    /// All.
    All,
}

/// A service's slots, for connections from the host's network namespace and for those from elsewhere; and
/// whether the daemon waits for a connection.
#[derive(Clone, Copy)]
pub struct Scopes {
    pub host: SlotRange,
    pub elsewhere: SlotRange,
    pub report_next: bool,
}

impl Scopes {
    /// Whether it matters where a connection comes from.
    #[inline(always)]
    pub fn differ(&self) -> bool {
        word(self.host) != word(self.elsewhere)
    }
}

#[inline(always)]
fn word(region: SlotRange) -> u64 {
    u64::from(region.first_slot) << 32 | u64::from(region.n_slots)
}

/// The slots of a service.
#[inline(always)]
pub fn scopes(service: u32, reach: Reach) -> Option<Scopes> {
    let service = SERVICES.get_ptr(service)?;
    // SAFETY: the pointer is to an array's element, which stays.
    unsafe {
        let host = region(&raw const (*service).service.host, reach);
        let elsewhere = region(&raw const (*service).service.elsewhere, reach);
        let report_next = (&raw const (*service).report_next).read_volatile() != 0;
        Some(Scopes { host, elsewhere, report_next })
    }
}

/// # Safety
/// `regions` is part of an array's element.
#[inline(always)]
unsafe fn region(regions: *const BackendSets, reach: Reach) -> SlotRange {
    // SAFETY: an array's element stays.
    unsafe {
        match reach {
            Reach::Ipv4 => load(&raw const (*regions).ipv4),
            Reach::Ipv6 => load(&raw const (*regions).ipv6),
            Reach::All => load(&raw const (*regions).all),
            Reach::Ipv4First => {
                let ipv4 = load(&raw const (*regions).ipv4);
                if ipv4.n_slots != 0 { ipv4 } else { load(&raw const (*regions).all) }
            }
            Reach::Ipv6First => {
                let ipv6 = load(&raw const (*regions).ipv6);
                if ipv6.n_slots != 0 { ipv6 } else { load(&raw const (*regions).all) }
            }
        }
    }
}

/// # Safety
/// `region` is part of an array's element.
#[inline(always)]
unsafe fn load(region: *const SlotRange) -> SlotRange {
    // SAFETY: an array's element stays; the daemon replaces each region by one aligned store, and
    // this is one aligned load.
    unsafe { core::mem::transmute::<u64, SlotRange>(region.cast::<u64>().read_volatile()) }
}

/// A slot. Its region is not written again while a program that found it may still run.
#[inline(always)]
pub fn slot(index: u32) -> Option<Slot> {
    // SAFETY: an array's element stays; the daemon wrote it by one aligned store.
    let word = |slot: *const Slot| unsafe { slot.cast::<u64>().read_volatile() };
    // SAFETY: a slot is one word of plain integers.
    SLOTS.get_ptr(index).map(|slot| unsafe { core::mem::transmute::<u64, Slot>(word(slot)) })
}

/// A copy of a backend. Its entry is not written again while a program that found it may still run,
/// but for its generation.
#[inline(always)]
pub fn backend(index: u32) -> Option<Backend> {
    // SAFETY: an array's element stays, and a backend is plain integers.
    BACKENDS.get_ptr(index).map(|line| unsafe { (&raw const (*line).backend).read_volatile() })
}

/// Whether a backend that a socket remembers is still in the table.
#[inline(always)]
pub fn is_in_table(backend_idx: u32, generation: u32) -> bool {
    // SAFETY: the pointer is to an aligned word of an array's element, which stays.
    let now = |line: *const BackendEntry| unsafe {
        (&raw const (*line).backend.generation).read_volatile()
    };
    BACKENDS.get_ptr(backend_idx).is_some_and(|line| now(line) == generation)
}

/// What the daemon says of itself, word by word as it is now.
#[derive(Clone, Copy)]
pub struct ControlWords(*const Control);

macro_rules! words {
    ($($(#[$doc:meta])* $word:ident)*) => {
        impl ControlWords {
            $($(#[$doc])*
            #[inline(always)]
            pub fn $word(self) -> u64 {
                // SAFETY: an array's element stays, and this is an aligned word of it; volatile,
                // because the daemon writes it.
                unsafe { (&raw const (*self.0).$word).read_volatile() }
            })*
        }
    };
}

words! {
    /// When the daemon last said that it lives.
    heartbeat_ns
    /// The cookie of the host's network namespace.
    host_netns
    /// The daemon's process.
    tgid
    /// Whether connections are only counted.
    is_shadow
}

/// What the daemon says of itself.
#[inline(always)]
pub fn daemon() -> Option<ControlWords> {
    DAEMON.get_ptr(0).map(ControlWords)
}

/// Whether connections are only counted. It is asked of connections to the pools and the pins alone.
#[inline(always)]
pub fn is_shadow() -> bool {
    daemon().is_some_and(|daemon| daemon.is_shadow() != 0)
}

/// Shows the daemon its own connect(), which is that of the socket whose cookie it named. Other
/// processes may connect to the same address.
#[inline(always)]
pub fn show_probe(cookie: u64, tgid: u64, netns: u64) {
    if let Some(probe) = PROBE.get_ptr_mut(0) {
        // SAFETY: an array's element stays, and these are aligned words of it. The daemon waits for
        // its connect() to end before it reads.
        unsafe {
            if (&raw const (*probe).cookie).read_volatile() == cookie
                && (&raw const (*probe).tgid).read_volatile() == 0
            {
                (&raw mut (*probe).netns).write_volatile(netns);
                (&raw mut (*probe).tgid).write_volatile(tgid);
            }
        }
    }
}

/// A cgroup that is left alone, or a hole, whose id is 0; `None` past the last one. It is a copy: the
/// daemon may write another one there meanwhile.
#[inline(always)]
pub fn excluded(index: u32) -> Option<BypassCgroup> {
    let entry = EXCLUDED.get_ptr(index)?;
    // SAFETY: an array's element stays, and its words are aligned.
    let cgroup_id = unsafe { (&raw const (*entry).cgroup_id).read_volatile() };
    // SAFETY: as above.
    let level = unsafe { (&raw const (*entry).level).read_volatile() };
    (cgroup_id != 0 || level != 0).then_some(BypassCgroup { cgroup_id, level })
}

/// Counts a connection of `service` that goes to `backend`.
#[inline(always)]
pub fn count_connect(service: u32, backend: u32) {
    // SAFETY: an array's element stays; this word of it is written by atomic addition only.
    unsafe {
        if let Some(line) = SERVICES.get_ptr_mut(service) {
            add_one(&raw mut (*line).connects);
        }
        if let Some(line) = BACKENDS.get_ptr_mut(backend) {
            add_one(&raw mut (*line).connects);
        }
    }
}

/// Counts a connection of `service` that is refused: for want of any backend, or of one that this
/// socket's address family can reach.
#[inline(always)]
pub fn count_refused(service: u32, by_family: bool) {
    if let Some(unsent) = UNSENT.get_ptr_mut(service) {
        // SAFETY: as above.
        add_one(unsafe {
            if by_family { &raw mut (*unsent).family } else { &raw mut (*unsent).no_backend }
        });
    }
}

/// Counts a connect() of a UDP socket to `service`: sent, or refused as [`count_refused`] says.
#[inline(always)]
pub fn count_udp_connect(service: u32, refused_by_family: Option<bool>) {
    if let Some(connects) = UDP_CONNECTS.get_ptr_mut(service) {
        // SAFETY: as above.
        add_one(unsafe {
            match refused_by_family {
                None => &raw mut (*connects).connects,
                Some(false) => &raw mut (*connects).no_backend,
                Some(true) => &raw mut (*connects).family,
            }
        });
    }
}

/// Counts a connection of `service` that passes untouched because connections are only counted.
#[inline(always)]
pub fn count_shadowed(service: u32) {
    if let Some(unsent) = UNSENT.get_ptr_mut(service) {
        // SAFETY: as above.
        add_one(unsafe { &raw mut (*unsent).shadowed });
    }
}

/// Tells the daemon of a connection that it waits for. Where there is no room, the next one does.
#[inline(always)]
pub fn report_connect(service: u32) {
    let report = Event { service, reason: EventKind::Connected as u32 };
    if REPORTS.output(report, 0).is_ok()
        && let Some(line) = SERVICES.get_ptr_mut(service)
    {
        // SAFETY: an array's element stays, and this is an aligned word of it. Two connections that come
        // at once are both reported, which is no harm.
        unsafe { (&raw mut (*line).report_next).write_volatile(0) };
    }
}

/// Counts an event that no service owns.
#[inline(always)]
pub fn count(counter: Counter) {
    let (index, n_pinned) = (counter as u32, N_PINNED_COUNTERS as u32);
    let counter = if index < n_pinned {
        COUNTERS.get_ptr_mut(index)
    } else {
        EVENTS.get_ptr_mut(index - n_pinned)
    };
    if let Some(counter) = counter {
        add_one(counter);
    }
}

#[inline(always)]
fn add_one(counter: *mut u64) {
    // SAFETY: the pointer is to an aligned u64 in an array map. The result is unused, which makes
    // this XADD: the verifier of 5.10 rejects a fetching addition.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(counter, 1) };
}

//! The maps. docs/maps.md shows how to read them, ARCHITECTURE.md why they are laid out like this.
//!
//! The daemon writes all but the counters, the probe and the socket storage. The arrays are
//! memory-mapped by it, so that it can store a word at once; sizes are defaults that it overrides
//! when it loads.

use aya_ebpf::bindings::BPF_F_MMAPABLE;
use aya_ebpf::btf_maps::{Array, HashMap, RingBuf, SkStorage};
use aya_ebpf::macros::btf_map;
use lb_common::{
    BackendEntry, BypassCgroup, BypassLevel, ControlWords, Counter, DEFAULT_MAX_BACKENDS,
    DEFAULT_MAX_SERVICES, ENTRIES_PER_BACKEND, Event, EventKind, FRONTENDS_PER_SERVICE, Flows,
    Frontend, Frontend6, GlobalCounters, INDEX_WAYS, IndexBucket, IndexKey, MAX_BYPASS_CGROUPS,
    N_INDEX_BUCKETS, Probe, RevNat, ServiceName, ServiceRef, ServiceStats, ServiceWords,
    TraceSwitch, expected_service, is_expired,
};

use crate::tables::{BACKENDS, CONTROL, SERVICES};
pub use crate::tables::{add_one, backend, control, count_connect, service};

const MMAPABLE: usize = BPF_F_MMAPABLE as usize;
const N_SERVICES: usize = DEFAULT_MAX_SERVICES as usize;
const N_FRONTENDS: usize = (DEFAULT_MAX_SERVICES * FRONTENDS_PER_SERVICE) as usize;
const N_BACKENDS: usize = (DEFAULT_MAX_BACKENDS * ENTRIES_PER_BACKEND) as usize;

#[btf_map]
static FRONTENDS: HashMap<Frontend, ServiceRef, N_FRONTENDS> = HashMap::new();
#[btf_map]
static FRONTENDS6: HashMap<Frontend6, ServiceRef, N_FRONTENDS> = HashMap::new();
/// It isn't pinned: each daemon has its own for the programs that it loads, and fills it from `FRONTENDS`
/// before these are attached. So none is left for a later daemon by one that doesn't know of it.
#[btf_map]
static FRONTEND_INDEX: Array<IndexBucket, { N_INDEX_BUCKETS as usize }, MMAPABLE> = Array::new();
/// Failures of each backend, which the unit `outcomes` counts; here, so that it is there without it.
#[btf_map]
static BACKEND_FAILURES: Array<u64, N_BACKENDS, MMAPABLE> = Array::new();
/// SYNs of each service that were sent again, likewise.
#[btf_map]
static SYN_RETRANSMITS: Array<u64, N_SERVICES, MMAPABLE> = Array::new();
/// The programs don't read it; here, so that it is part of the object like the others.
#[btf_map]
static SERVICE_NAMES: Array<ServiceName, N_SERVICES, MMAPABLE> = Array::new();
#[btf_map]
static SERVICE_STATS: Array<ServiceStats, N_SERVICES, MMAPABLE> = Array::new();
#[btf_map]
static COUNTERS: Array<GlobalCounters, 1, MMAPABLE> = Array::new();
#[btf_map]
static PROBE: Array<Probe, 1, MMAPABLE> = Array::new();
#[btf_map]
static BYPASS: HashMap<BypassCgroup, BypassLevel, MAX_BYPASS_CGROUPS> = HashMap::new();
/// Events for the daemon: 2,730 of them at most wait for it. It isn't pinned: each daemon has its own,
/// and requests its events again.
#[btf_map]
static EVENTS: RingBuf<Event, 65_536> = RingBuf::new();
/// What each connected socket connected, unless it has a record. It lives and dies with the socket.
#[btf_map]
pub static SK_REVNAT: SkStorage<RevNat> = SkStorage::new();
/// What a UDP socket connected before, while `SK_REVNAT` has what it connected last: that connect()
/// may have failed. It lives and dies with the socket.
#[btf_map]
pub static SK_REVNAT_PREV: SkStorage<RevNat> = SkStorage::new();
/// Where the datagrams of each socket went. It lives and dies with the socket.
#[btf_map]
pub static FLOWS: SkStorage<Flows> = SkStorage::new();

/// The service behind a frontend.
#[inline(always)]
pub fn frontend(frontend: &Frontend) -> Option<ServiceRef> {
    FRONTENDS.get_ptr(frontend).map(copy_ref)
}

/// The service behind a VIP's frontend: by the index, else as [`frontend`].
#[inline(always)]
pub fn indexed_frontend(frontend: &Frontend) -> Option<ServiceRef> {
    // Of no use but to have the entry in the cache by the time that the index, which may take as long, leads
    // there. Where it leads elsewhere, that is loaded then.
    if let Some(service) = service(expected_service(frontend.address)) {
        service.connects();
    }
    let key = IndexKey::of(frontend);
    if let Some(bucket) = FRONTEND_INDEX.get_ptr(key.bucket) {
        let mut way = 0;
        while way < INDEX_WAYS {
            // SAFETY: an array's element stays; the daemon replaces each word by one aligned store, and
            // this is one aligned load.
            let word = unsafe { (&raw const (*bucket).words[way]).read_volatile() };
            if let Some(service) = key.service_of(word) {
                return Some(ServiceRef { service, host_only: 0 });
            }
            way += 1;
        }
    }
    self::frontend(frontend)
}

/// The service behind an IPv6 frontend.
#[inline(always)]
pub fn frontend6(frontend: &Frontend6) -> Option<ServiceRef> {
    FRONTENDS6.get_ptr(frontend).map(copy_ref)
}

#[inline(always)]
fn copy_ref(service: *const ServiceRef) -> ServiceRef {
    // SAFETY: the kernel may recycle the element once it is deleted, so it is copied out at once,
    // as the one word that it is. The daemon inserts nothing between a deletion and the end of the
    // readers that may have seen the element, so the word is this frontend's.
    zerocopy::transmute!(unsafe { service.cast::<u64>().read_volatile() })
}

/// Whether a backend that a socket remembers is still in the table.
#[inline(always)]
pub fn is_in_table(backend_idx: u32, generation: u32) -> bool {
    // SAFETY: the pointer is to an aligned word of an array's element, which stays.
    let now = |entry: *const BackendEntry| unsafe {
        (&raw const (*entry).backend.generation).read_volatile()
    };
    BACKENDS.get_ptr(backend_idx).is_some_and(|entry| now(entry) == generation)
}

macro_rules! word {
    // SAFETY: an array's element stays, and this is an aligned word of it; volatile, because the
    // daemon writes it.
    ($control:ident . $($word:ident).+) => {
        unsafe { (&raw const (*$control.0).$($word).+).read_volatile() }
    };
}

/// Whether nothing is translated as before: connections are only counted, or the table is too old. It is
/// asked of datagrams to the pools and the pins alone.
#[inline(always)]
pub fn is_suspended(now_ns: impl FnOnce() -> u64) -> bool {
    control().is_some_and(|control| control.is_shadow() || is_expired(control, now_ns))
}

/// Whether TCP connections are kept as records.
#[inline(always)]
pub fn keeps_records() -> bool {
    control().is_some_and(|control| word!(control.keeps_records) != 0)
}

/// Which connections are traced.
#[inline(always)]
pub fn trace_switch() -> TraceSwitch {
    let Some(control) = control() else { return TraceSwitch::default() };
    TraceSwitch {
        until_ns: word!(control.trace.until_ns),
        max_hash: word!(control.trace.max_hash),
        padding: 0,
    }
}

/// Switches the trace off, whose time is over. Where the daemon switches it on again at that moment, that
/// may be lost; it does so again while a client is there.
#[inline(always)]
pub fn end_trace() {
    if let Some(control) = CONTROL.get_ptr_mut(0) {
        // SAFETY: an array's element stays, and this is an aligned word of it.
        unsafe { (&raw mut (*control).trace.until_ns).write_volatile(0) };
    }
}

/// The depths at which cgroups are bypassed, a bit each.
#[inline(always)]
pub fn bypass_levels() -> u64 {
    control().map_or(0, |control| word!(control.bypass_levels))
}

/// Whether a cgroup is bypassed.
#[inline(always)]
pub fn is_bypassed(cgroup_id: u64) -> bool {
    BYPASS.get_ptr(BypassCgroup { cgroup_id }).is_some()
}

/// Shows the daemon its own connect(), which is that of the socket whose cookie it named. Other
/// processes may connect to the same address.
#[inline(always)]
pub fn record_probe(cookie: u64, tgid: u64, netns: u64) {
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

/// Counts a connection of `service` that is refused: for lack of any backend, or of one that this
/// socket's address family can reach.
#[inline(always)]
pub fn count_refused(service: u32, by_family: bool) {
    if let Some(stats) = SERVICE_STATS.get_ptr_mut(service) {
        // SAFETY: as above.
        add_one(unsafe {
            if by_family { &raw mut (*stats).family } else { &raw mut (*stats).no_backend }
        });
    }
}

/// Counts a connect() of a UDP socket to `service`: sent, or refused as [`count_refused`] says.
#[inline(always)]
pub fn count_udp_connect(service: u32, refused_by_family: Option<bool>) {
    if let Some(stats) = SERVICE_STATS.get_ptr_mut(service) {
        // SAFETY: as above.
        add_one(unsafe {
            match refused_by_family {
                None => &raw mut (*stats).udp.connects,
                Some(false) => &raw mut (*stats).udp.no_backend,
                Some(true) => &raw mut (*stats).udp.family,
            }
        });
    }
}

/// Counts a connection of `service` that passes untouched because connections are only counted.
#[inline(always)]
pub fn count_shadowed(service: u32) {
    if let Some(stats) = SERVICE_STATS.get_ptr_mut(service) {
        // SAFETY: as above.
        add_one(unsafe { &raw mut (*stats).shadowed });
    }
}

/// Reports a connection to the daemon. Where there is no room, the next one is reported.
#[inline(always)]
pub fn emit_connected(service: u32) {
    if emit(EventKind::Connected, service, 0, 0)
        && let Some(entry) = SERVICES.get_ptr_mut(service)
    {
        // SAFETY: an array's element stays, and this is an aligned word of it. Two connections that come
        // at once are both reported, which is no harm.
        unsafe { (&raw mut (*entry).flags.report_next).write_volatile(0) };
    }
}

/// Reports to the daemon that a backend is ejected, or returns, and counts the former.
#[inline(always)]
pub fn emit_ejection(kind: EventKind, service: u32, backend: u32, generation: u32) {
    emit(kind, service, backend, generation);
    if kind == EventKind::Ejected
        && let Some(stats) = SERVICE_STATS.get_ptr_mut(service)
    {
        // SAFETY: an array's element stays; this word of it is written by atomic addition only.
        add_one(unsafe { &raw mut (*stats).ejections });
    }
}

/// Returns false where there is no room.
#[inline(always)]
fn emit(kind: EventKind, service: u32, backend: u32, generation: u32) -> bool {
    let event = Event { service, kind: kind as u32, backend, generation };
    let is_sent = EVENTS.output(event, 0).is_ok();
    if !is_sent {
        count(Counter::EventsLost);
    }
    is_sent
}

/// Counts an event that no service owns.
#[inline(always)]
pub fn count(counter: Counter) {
    if let Some(counters) = COUNTERS.get_ptr_mut(0) {
        // SAFETY: the counter is a word within the element, which stays.
        add_one(unsafe { counters.cast::<u64>().add(counter as usize) });
    }
}

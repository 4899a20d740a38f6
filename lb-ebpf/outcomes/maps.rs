//! The maps of the unit `connect` that this one shares with it by their pins.

use aya_ebpf::bindings::{BPF_F_MMAPABLE, bpf_sock};
use aya_ebpf::btf_maps::{Array, HashMap, RingBuf, SkStorage};
use aya_ebpf::helpers::generated::bpf_sk_storage_get;
use aya_ebpf::macros::btf_map;
use core::intrinsics::{AtomicOrdering, atomic_xadd};
use lb_common::{
    ANY_PORT, BackendEntry, BalanceSettings, ConnRecord, Control, Counter, DEFAULT_MAX_BACKENDS,
    DEFAULT_MAX_SERVICES, ENTRIES_PER_BACKEND, EjectionLimits, EjectionWord, Event, EventKind,
    FRONTENDS_PER_SERVICE, Frontend, Frontend6, GlobalCounters, IPPROTO_TCP, LAYOUT, N_CONNS,
    RevNat, ServiceRef, ServiceStats, TraceSwitch,
};

const MMAPABLE: usize = BPF_F_MMAPABLE as usize;
const N_SERVICES: usize = DEFAULT_MAX_SERVICES as usize;
const N_FRONTENDS: usize = (DEFAULT_MAX_SERVICES * FRONTENDS_PER_SERVICE) as usize;
const N_BACKENDS: usize = (DEFAULT_MAX_BACKENDS * ENTRIES_PER_BACKEND) as usize;

#[btf_map]
static FRONTENDS: HashMap<Frontend, ServiceRef, N_FRONTENDS> = HashMap::new();
#[btf_map]
static FRONTENDS6: HashMap<Frontend6, ServiceRef, N_FRONTENDS> = HashMap::new();
#[btf_map]
static BACKENDS: Array<BackendEntry, N_BACKENDS, MMAPABLE> = Array::new();
#[btf_map]
static BACKEND_FAILURES: Array<u64, N_BACKENDS, MMAPABLE> = Array::new();
#[btf_map]
static SYN_RETRANSMITS: Array<u64, N_SERVICES, MMAPABLE> = Array::new();
#[btf_map]
static SERVICE_STATS: Array<ServiceStats, N_SERVICES, MMAPABLE> = Array::new();
#[btf_map]
static COUNTERS: Array<GlobalCounters, 1, MMAPABLE> = Array::new();
#[btf_map]
static CONTROL: Array<Control, 1, MMAPABLE> = Array::new();
/// This object's own: the daemon reads that of the other as well.
#[btf_map]
static EVENTS: RingBuf<Event, 65_536> = RingBuf::new();
#[btf_map]
static SK_REVNAT: SkStorage<RevNat> = SkStorage::new();

#[btf_map]
static CONNS: Array<ConnRecord, { N_CONNS as usize }, MMAPABLE> = Array::new();

/// The layout that the maps have.
#[unsafe(no_mangle)]
static MAP_LAYOUT: u32 = LAYOUT as u32;

/// See [`MAP_LAYOUT`].
#[inline(always)]
pub fn layout() -> u16 {
    // SAFETY: a static is valid and aligned; volatile, because its value comes after compilation.
    unsafe { (&raw const MAP_LAYOUT).read_volatile() as u16 }
}

/// What the record of the socket with this cookie has; null where the socket has none.
#[inline(always)]
pub fn recorded(cookie: u64) -> *mut RevNat {
    let Some(record) = CONNS.get_ptr_mut(ConnRecord::index(cookie)) else {
        return core::ptr::null_mut();
    };
    // SAFETY: an array's element stays, and this is an aligned word of it.
    let owner = unsafe { (&raw const (*record).cookie).read_volatile() };
    // SAFETY: as above.
    if cookie != 0 && owner == cookie {
        unsafe { &raw mut (*record).revnat }
    } else {
        core::ptr::null_mut()
    }
}

/// Releases the record of the socket with this cookie, which has it.
#[inline(always)]
pub fn release(cookie: u64) {
    if let Some(record) = CONNS.get_ptr_mut(ConnRecord::index(cookie)) {
        // SAFETY: an array's element stays. While it is this socket's, nothing else writes this word
        // of it.
        unsafe { (&raw mut (*record).cookie).write_volatile(0) };
    }
}

/// What the storage of a socket has; null for one that has none.
#[inline(always)]
pub fn stored(socket: *mut bpf_sock) -> *mut RevNat {
    let map = (&raw const SK_REVNAT).cast_mut().cast();
    // SAFETY: the helper takes the socket of the context.
    unsafe { bpf_sk_storage_get(map, socket.cast(), core::ptr::null_mut(), 0) }.cast()
}

/// The same, made as zeros where there is none; null for lack of memory.
#[inline(always)]
pub fn made(socket: *mut bpf_sock) -> *mut RevNat {
    const CREATE: u64 = 1;
    let map = (&raw const SK_REVNAT).cast_mut().cast();
    // SAFETY: as above.
    unsafe { bpf_sk_storage_get(map, socket.cast(), core::ptr::null_mut(), CREATE) }.cast()
}

/// The entry of a backend that is still the one that a socket was sent to.
#[inline(always)]
pub fn backend(backend_idx: u32, generation: u32) -> Option<BackendPtr> {
    let entry = BACKENDS.get_ptr_mut(backend_idx)?;
    // SAFETY: the pointer is to an aligned word of an array's element, which stays.
    let now = unsafe { (&raw const (*entry).backend.generation).read_volatile() };
    (generation != 0 && now == generation).then_some(BackendPtr(entry))
}

/// A backend's entry.
#[derive(Clone, Copy)]
pub struct BackendPtr(*mut BackendEntry);

macro_rules! outcome {
    // SAFETY: an array's element stays, and this is an aligned word of it; volatile, because other
    // programs write it.
    ($backend:ident . $word:ident) => {
        unsafe { (&raw const (*$backend.0).outcomes.$word).read_volatile() }
    };
    // SAFETY: as above. Of two stores at once the last one wins.
    ($backend:ident . $word:ident = $value:expr) => {{
        let value = $value;
        unsafe { (&raw mut (*$backend.0).outcomes.$word).write_volatile(value) }
    }};
}

impl BackendPtr {
    /// Adds to the connections in flight: 1 or -1.
    #[inline(always)]
    pub fn add_in_flight(self, n: i32) {
        // SAFETY: an array's element stays; this word of it is written by atomic addition only.
        add(unsafe { &raw mut (*self.0).outcomes.in_flight }, n);
    }

    /// Adds to those that are being established: 1 or -1.
    #[inline(always)]
    pub fn add_pending(self, n: i32) {
        // SAFETY: as above.
        add(unsafe { &raw mut (*self.0).outcomes.pending }, n);
    }

    /// Those that are being established.
    #[inline(always)]
    pub fn pending(self) -> i32 {
        outcome!(self.pending)
    }

    /// Since when they are and none was answered.
    #[inline(always)]
    pub fn unanswered_since_us(self) -> u32 {
        outcome!(self.unanswered_since_us)
    }

    /// See [`BackendPtr::unanswered_since_us`].
    #[inline(always)]
    pub fn set_unanswered_since_us(self, us: u32) {
        outcome!(self.unanswered_since_us = us);
    }

    /// The average of connect times.
    #[inline(always)]
    pub fn connect_us(self) -> u32 {
        outcome!(self.connect_us)
    }

    /// See [`BackendPtr::connect_us`].
    #[inline(always)]
    pub fn set_connect_us(self, us: u32) {
        outcome!(self.connect_us = us);
    }

    /// The average of round-trip times.
    #[inline(always)]
    pub fn srtt_us(self) -> u32 {
        outcome!(self.srtt_us)
    }

    /// See [`BackendPtr::srtt_us`].
    #[inline(always)]
    pub fn set_srtt_us(self, us: u32) {
        outcome!(self.srtt_us = us);
    }

    /// Its ejection, by one load.
    #[inline(always)]
    pub fn ejection(self) -> EjectionWord {
        // SAFETY: an array's element stays, and this is an aligned word of it.
        zerocopy::transmute!(unsafe {
            (&raw const (*self.0).outcomes.ejection).cast::<u64>().read_volatile()
        })
    }

    /// Replaces its ejection, by one store. Of two at once the last one wins.
    #[inline(always)]
    pub fn set_ejection(self, ejection: EjectionWord) {
        let word: u64 = zerocopy::transmute!(ejection);
        // SAFETY: as above.
        unsafe { (&raw mut (*self.0).outcomes.ejection).cast::<u64>().write_volatile(word) };
    }
}

/// Adds to one of the counts of connections: 1 or -1.
#[inline(always)]
fn add(count: *mut i32, n: i32) {
    // SAFETY: the pointer is to an aligned i32 in an array map. The result is unused, which makes
    // this XADD: the verifier of 5.10 rejects a fetching addition.
    unsafe {
        atomic_xadd::<u32, u32, { AtomicOrdering::Relaxed }>(count.cast(), n.cast_unsigned());
    }
}

/// What ejects.
#[inline(always)]
pub fn limits() -> Option<EjectionLimits> {
    let control = CONTROL.get_ptr(0)?;
    // SAFETY: an array's element stays; volatile, because the daemon writes it.
    let balance: BalanceSettings = unsafe { (&raw const (*control).balance).read_volatile() };
    Some(balance.limits())
}

/// Whether connections are only counted.
#[inline(always)]
pub fn is_shadow() -> bool {
    let Some(control) = CONTROL.get_ptr(0) else { return false };
    // SAFETY: an array's element stays; volatile, because the daemon writes it.
    unsafe { (&raw const (*control).is_shadow).read_volatile() != 0 }
}

/// Which connections are traced.
#[inline(always)]
pub fn trace_switch() -> TraceSwitch {
    let Some(control) = CONTROL.get_ptr(0) else { return TraceSwitch::default() };
    // SAFETY: an array's element stays; volatile, because the daemon writes it.
    unsafe {
        TraceSwitch {
            until_ns: (&raw const (*control).trace.until_ns).read_volatile(),
            max_hash: (&raw const (*control).trace.max_hash).read_volatile(),
            padding: 0,
        }
    }
}

/// Reports to the daemon that a backend is ejected, or returns, and counts the former.
#[inline(always)]
pub fn emit_ejection(kind: EventKind, kept: &RevNat) {
    let RevNat { backend_idx: backend, generation, .. } = *kept;
    let service = service_of(kept);
    let event =
        Event { service: service.unwrap_or(u32::MAX), kind: kind as u32, backend, generation };
    if EVENTS.output(event, 0).is_err() {
        count(Counter::EventsLost);
    }
    if kind == EventKind::Ejected
        && let Some(stats) = service.and_then(|service| SERVICE_STATS.get_ptr_mut(service))
    {
        // SAFETY: an array's element stays; this word of it is written by atomic addition only.
        add_one(unsafe { &raw mut (*stats).ejections });
    }
}

/// Counts a failure of a backend.
#[inline(always)]
pub fn count_backend_failure(backend_idx: u32) {
    if let Some(failures) = BACKEND_FAILURES.get_ptr_mut(backend_idx) {
        add_one(failures);
    }
}

/// Counts a failure of the service that a frontend leads to now, where it leads to one.
#[inline(always)]
pub fn count_service_failure(kept: &RevNat) {
    if let Some(stats) = service_of(kept).and_then(|service| SERVICE_STATS.get_ptr_mut(service)) {
        // SAFETY: an array's element stays; this word of it is written by atomic addition only.
        add_one(unsafe { &raw mut (*stats).failed });
    }
}

/// Counts SYNs that were sent again, of the service that a frontend leads to now.
#[inline(always)]
pub fn count_syn_retransmits(kept: &RevNat, n: u32) {
    if let Some(count) = service_of(kept).and_then(|service| SYN_RETRANSMITS.get_ptr_mut(service)) {
        // SAFETY: as in `add`.
        unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(count, n.into()) };
    }
}

#[inline(always)]
fn service_of(kept: &RevNat) -> Option<u32> {
    service(kept, kept.frontend_port).or_else(|| service(kept, ANY_PORT))
}

#[inline(always)]
fn service(kept: &RevNat, port: u16) -> Option<u32> {
    let protocol = IPPROTO_TCP;
    let found = match kept.frontend.to_v4() {
        Some(address) => FRONTENDS.get_ptr(Frontend { address, port, protocol, padding: 0 }),
        None => {
            let address = kept.frontend.octets;
            FRONTENDS6.get_ptr(Frontend6 { address, port, protocol, padding: 0 })
        }
    };
    // SAFETY: the kernel may recycle the element once it is deleted, so it is copied out at once, as
    // the one word that it is.
    let word = found.map(|service| unsafe { service.cast::<u64>().read_volatile() });
    let service: Option<ServiceRef> = word.map(|word| zerocopy::transmute!(word));
    service.map(|found| found.service)
}

/// Counts an event that no service owns.
#[inline(always)]
pub fn count(counter: Counter) {
    if let Some(counters) = COUNTERS.get_ptr_mut(0) {
        // SAFETY: the counter is a word within the element, which stays.
        add_one(unsafe { counters.cast::<u64>().add(counter as usize) });
    }
}

#[inline(always)]
fn add_one(counter: *mut u64) {
    // SAFETY: as in `add`.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(counter, 1) };
}

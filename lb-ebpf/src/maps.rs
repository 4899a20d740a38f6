//! The maps. ARCHITECTURE.md says why they are laid out like this.
//!
//! The daemon writes all but the counters and the socket storage. The arrays are memory-mapped by
//! it, so that it can store a word at once; sizes are defaults that it overrides when it loads.

use aya_ebpf::bindings::BPF_F_MMAPABLE;
use aya_ebpf::btf_maps::{Array, HashMap, SkStorage};
use aya_ebpf::macros::btf_map;
use core::intrinsics::{AtomicOrdering, atomic_xadd};
use lb_common::{
    Backend, Counter, DEFAULT_MAX_BACKENDS, DEFAULT_MAX_SERVICES, Dial, ENTRIES_PER_BACKEND,
    FRONTENDS_PER_SERVICE, Frontend, N_COUNTERS, Region, SLOTS_PER_BACKEND, Service,
    ServiceCounters, Slot, Target,
};

const MMAPABLE: usize = BPF_F_MMAPABLE as usize;
const N_SERVICES: usize = DEFAULT_MAX_SERVICES as usize;
const N_FRONTENDS: usize = (DEFAULT_MAX_SERVICES * FRONTENDS_PER_SERVICE) as usize;
const N_SLOTS: usize = (DEFAULT_MAX_BACKENDS * SLOTS_PER_BACKEND) as usize;
const N_BACKENDS: usize = (DEFAULT_MAX_BACKENDS * ENTRIES_PER_BACKEND) as usize;

#[btf_map]
static FRONTENDS: HashMap<Frontend, Target, N_FRONTENDS> = HashMap::new();
#[btf_map]
static SERVICES: Array<Service, N_SERVICES, MMAPABLE> = Array::new();
#[btf_map]
static SLOTS: Array<Slot, N_SLOTS, MMAPABLE> = Array::new();
#[btf_map]
static BACKENDS: Array<Backend, N_BACKENDS, MMAPABLE> = Array::new();
#[btf_map]
static SERVICE_STATS: Array<ServiceCounters, N_SERVICES, MMAPABLE> = Array::new();
#[btf_map]
static BACKEND_DIALS: Array<u64, N_BACKENDS, MMAPABLE> = Array::new();
#[btf_map]
static COUNTERS: Array<u64, N_COUNTERS, MMAPABLE> = Array::new();
/// What each translated socket dialled. It lives and dies with the socket.
#[btf_map]
pub static SOCKETS: SkStorage<Dial> = SkStorage::new();

/// The service behind a frontend.
#[inline(always)]
pub fn target(frontend: &Frontend) -> Option<Target> {
    // SAFETY: the kernel may recycle the element once it is deleted, so it is copied out at once,
    // as the one word that it is. The daemon inserts nothing between a deletion and the end of the
    // readers that may have seen the element, so the word is this frontend's.
    unsafe {
        let word = FRONTENDS.get_ptr(frontend)?.cast::<u64>().read_volatile();
        Some(core::mem::transmute::<u64, Target>(word))
    }
}

/// The slots of a service, for a dial from the host's network namespace or from elsewhere.
#[inline(always)]
pub fn region(service: u32, from_host: bool) -> Option<Region> {
    let service = SERVICES.get_ptr(service)?;
    // SAFETY: the pointer is to an array's element, which stays; the daemon replaces each region by
    // one aligned store, and this is one aligned load.
    unsafe {
        let region =
            if from_host { &raw const (*service).host } else { &raw const (*service).elsewhere };
        Some(core::mem::transmute::<u64, Region>(region.cast::<u64>().read_volatile()))
    }
}

/// A slot. Its region is not written again while a program that found it may still run.
#[inline(always)]
pub fn slot(index: u32) -> Option<Slot> {
    SLOTS.get(index).copied()
}

/// A backend's address. Its entry is not written again while a program that found it may still run.
#[inline(always)]
pub fn backend(index: u32) -> Option<Backend> {
    BACKENDS.get(index).copied()
}

/// Counts a dial of `service` that goes to `backend`.
#[inline(always)]
pub fn count_dial(service: u32, backend: u32) {
    if let Some(stats) = SERVICE_STATS.get_ptr_mut(service) {
        // SAFETY: an array's element stays; it is written by atomic addition only.
        add_one(unsafe { &raw mut (*stats).dials });
    }
    if let Some(dials) = BACKEND_DIALS.get_ptr_mut(backend) {
        add_one(dials);
    }
}

/// Counts a dial of `service` that is refused.
#[inline(always)]
pub fn count_refused(service: u32) {
    if let Some(stats) = SERVICE_STATS.get_ptr_mut(service) {
        // SAFETY: as above.
        add_one(unsafe { &raw mut (*stats).refused });
    }
}

/// Counts an event that no service owns.
#[inline(always)]
pub fn count(counter: Counter) {
    if let Some(counter) = COUNTERS.get_ptr_mut(counter as u32) {
        add_one(counter);
    }
}

#[inline(always)]
fn add_one(counter: *mut u64) {
    // SAFETY: the pointer is to an aligned u64 in an array map. The result is unused, which makes
    // this XADD: the verifier of 5.10 rejects a fetching addition.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(counter, 1) };
}

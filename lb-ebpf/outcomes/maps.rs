//! The maps of the unit `connect` that this one shares with it by their pins.

use aya_ebpf::bindings::{BPF_F_MMAPABLE, bpf_sock};
use aya_ebpf::btf_maps::{Array, HashMap, SkStorage};
use aya_ebpf::helpers::generated::bpf_sk_storage_get;
use aya_ebpf::macros::btf_map;
use core::intrinsics::{AtomicOrdering, atomic_xadd};
use lb_common::{
    ANY_PORT, BackendEntry, DEFAULT_MAX_BACKENDS, DEFAULT_MAX_SERVICES, ENTRIES_PER_BACKEND,
    FRONTENDS_PER_SERVICE, Frontend, Frontend6, IPPROTO_TCP, RevNat, ServiceRef, ServiceStats,
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
static SERVICE_STATS: Array<ServiceStats, N_SERVICES, MMAPABLE> = Array::new();
#[btf_map]
static SK_REVNAT: SkStorage<RevNat> = SkStorage::new();

/// What a socket connected; null for one that connected no VIP, and for no socket.
#[inline(always)]
pub fn revnat(socket: *mut bpf_sock) -> *mut RevNat {
    if socket.is_null() {
        return core::ptr::null_mut();
    }
    let map = (&raw const SK_REVNAT).cast_mut().cast();
    // SAFETY: the helper takes the socket of the context.
    unsafe { bpf_sk_storage_get(map, socket.cast(), core::ptr::null_mut(), 0) }.cast()
}

/// The entry of a backend that is still the one that a socket was sent to.
#[inline(always)]
pub fn backend(backend_idx: u32, generation: u32) -> Option<*mut BackendEntry> {
    let entry = BACKENDS.get_ptr_mut(backend_idx)?;
    // SAFETY: the pointer is to an aligned word of an array's element, which stays.
    let now = unsafe { (&raw const (*entry).backend.generation).read_volatile() };
    (generation != 0 && now == generation).then_some(entry)
}

/// Adds to a backend's connections in flight: 1 or -1.
#[inline(always)]
pub fn add_in_flight(entry: *mut BackendEntry, n: i32) {
    // SAFETY: the pointer is to an aligned i32 in an array map. The result is unused, which makes
    // this XADD: the verifier of 5.10 rejects a fetching addition.
    unsafe {
        let in_flight = (&raw mut (*entry).outcomes.in_flight).cast::<u32>();
        atomic_xadd::<u32, u32, { AtomicOrdering::Relaxed }>(in_flight, n.cast_unsigned());
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
    let Some(service) = service(kept, kept.frontend_port).or_else(|| service(kept, ANY_PORT))
    else {
        return;
    };
    if let Some(stats) = SERVICE_STATS.get_ptr_mut(service) {
        // SAFETY: an array's element stays; this word of it is written by atomic addition only.
        add_one(unsafe { &raw mut (*stats).failed });
    }
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

#[inline(always)]
fn add_one(counter: *mut u64) {
    // SAFETY: as in `add_in_flight`.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(counter, 1) };
}

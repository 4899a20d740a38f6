//! The tables by which backends are chosen, as the objects share them by their pins: `SERVICES`, `SLOTS`,
//! `BACKENDS` and `CONTROL`.

use aya_ebpf::bindings::BPF_F_MMAPABLE;
use aya_ebpf::btf_maps::Array;
use aya_ebpf::macros::btf_map;
use core::intrinsics::{AtomicOrdering, atomic_xadd};
use lb_common::{
    Algorithm, Backend, BackendEntry, BackendSets, BackendWords, BalanceSettings, Control,
    ControlWords, DEFAULT_MAX_BACKENDS, DEFAULT_MAX_SERVICES, ENTRIES_PER_BACKEND, EjectionWord,
    Fallback, Family, MaglevKey, Netns, SLOTS_PER_BACKEND, ServiceEntry, ServiceWords, Slot,
    SlotRange,
};

const MMAPABLE: usize = BPF_F_MMAPABLE as usize;
const N_SERVICES: usize = DEFAULT_MAX_SERVICES as usize;
const N_SLOTS: usize = (DEFAULT_MAX_BACKENDS * SLOTS_PER_BACKEND) as usize;
const N_BACKENDS: usize = (DEFAULT_MAX_BACKENDS * ENTRIES_PER_BACKEND) as usize;

#[btf_map]
pub static SERVICES: Array<ServiceEntry, N_SERVICES, MMAPABLE> = Array::new();
#[btf_map]
static SLOTS: Array<Slot, N_SLOTS, MMAPABLE> = Array::new();
#[btf_map]
pub static BACKENDS: Array<BackendEntry, N_BACKENDS, MMAPABLE> = Array::new();
#[btf_map]
pub static CONTROL: Array<Control, 1, MMAPABLE> = Array::new();

/// A service's entry.
#[derive(Clone, Copy)]
pub struct ServicePtr(*const ServiceEntry);

impl ServiceWords for ServicePtr {
    #[inline(always)]
    fn range(self, group: usize, netns: Netns, family: Family) -> SlotRange {
        // The first group lies where it would in a fallback.
        let offset = group * size_of::<Fallback>()
            + netns as usize * size_of::<BackendSets>()
            + family as usize * size_of::<SlotRange>();
        // SAFETY: the offset is that of a range within the entry, whose group the caller bounds. An
        // array's element stays; the daemon replaces each range by one aligned store, and this is one
        // aligned load.
        let word = unsafe { self.0.byte_add(offset).cast::<u64>().read_volatile() };
        zerocopy::transmute!(word)
    }

    #[inline(always)]
    fn report_next(self) -> bool {
        // SAFETY: an array's element stays, and this is an aligned word of it.
        unsafe { (&raw const (*self.0).flags.report_next).read_volatile() != 0 }
    }

    #[inline(always)]
    fn algorithm(self) -> Algorithm {
        // SAFETY: as above.
        Algorithm::from_number(unsafe { (&raw const (*self.0).flags.algorithm).read_volatile() })
    }

    #[inline(always)]
    fn connects(self) -> u64 {
        // SAFETY: as above.
        unsafe { (&raw const (*self.0).connects).read_volatile() }
    }
}

const _: () = assert!(
    core::mem::offset_of!(ServiceEntry, fallbacks) == size_of::<Fallback>()
        && core::mem::offset_of!(ServiceEntry, group) == core::mem::offset_of!(Fallback, group)
);

/// A service.
#[inline(always)]
pub fn service(index: u32) -> Option<ServicePtr> {
    SERVICES.get_ptr(index).map(ServicePtr)
}

/// A slot. Its range is not written again while a program that found it may still run.
#[inline(always)]
pub fn slot(index: u32) -> Option<Slot> {
    // SAFETY: an array's element stays; the daemon wrote it by one aligned store.
    let word = |slot: *const Slot| unsafe { slot.cast::<u64>().read_volatile() };
    SLOTS.get_ptr(index).map(|slot| zerocopy::transmute!(word(slot)))
}

/// A backend's entry.
#[derive(Clone, Copy)]
pub struct BackendPtr(pub *mut BackendEntry);

macro_rules! outcome {
    // SAFETY: an array's element stays, and this is an aligned word of it; volatile, because other
    // programs write it.
    ($backend:ident . $word:ident) => {
        unsafe { (&raw const (*$backend.0).outcomes.$word).read_volatile() }
    };
}

impl BackendWords for BackendPtr {
    /// A copy. The entry is not written again while a program that found it may still run, but for its
    /// weight and its generation.
    #[inline(always)]
    fn backend(self) -> Backend {
        // SAFETY: an array's element stays, and a backend is plain integers.
        unsafe { (&raw const (*self.0).backend).read_volatile() }
    }

    #[inline(always)]
    fn weight(self) -> u16 {
        // SAFETY: as above.
        let weight = unsafe { (&raw const (*self.0).backend.weight).read_volatile() };
        if weight == 0 { 1 } else { weight }
    }

    #[inline(always)]
    fn in_flight(self) -> i32 {
        outcome!(self.in_flight)
    }

    #[inline(always)]
    fn pending(self) -> i32 {
        outcome!(self.pending)
    }

    #[inline(always)]
    fn ejection(self) -> EjectionWord {
        // SAFETY: as above; one aligned load.
        let word =
            unsafe { (&raw const (*self.0).outcomes.ejection).cast::<u64>().read_volatile() };
        zerocopy::transmute!(word)
    }

    #[inline(always)]
    fn unanswered_since_us(self) -> u32 {
        outcome!(self.unanswered_since_us)
    }

    #[inline(always)]
    fn connect_us(self) -> u32 {
        outcome!(self.connect_us)
    }

    #[inline(always)]
    fn srtt_us(self) -> u32 {
        outcome!(self.srtt_us)
    }

    #[inline(always)]
    fn added_ms(self) -> u32 {
        outcome!(self.added_ms)
    }
}

impl BackendPtr {
    /// Replaces its ejection by one store. Of two at once the last one wins.
    #[inline(always)]
    pub fn set_ejection(self, ejection: EjectionWord) {
        let word: u64 = zerocopy::transmute!(ejection);
        // SAFETY: as above.
        unsafe { (&raw mut (*self.0).outcomes.ejection).cast::<u64>().write_volatile(word) };
    }
}

/// A backend.
#[inline(always)]
pub fn backend(index: u32) -> Option<BackendPtr> {
    BACKENDS.get_ptr_mut(index).map(BackendPtr)
}

/// What the daemon writes for the programs, word by word as it is now.
#[derive(Clone, Copy)]
pub struct ControlPtr(pub *const Control);

macro_rules! word {
    // SAFETY: an array's element stays, and this is an aligned word of it; volatile, because the
    // daemon writes it.
    ($control:ident . $($word:ident).+) => {
        unsafe { (&raw const (*$control.0).$($word).+).read_volatile() }
    };
}

impl ControlWords for ControlPtr {
    #[inline(always)]
    fn heartbeat_ns(self) -> u64 {
        word!(self.heartbeat_ns)
    }

    #[inline(always)]
    fn table_ns(self) -> u64 {
        word!(self.table_ns)
    }

    #[inline(always)]
    fn max_age_ns(self) -> u64 {
        word!(self.max_age_ns)
    }

    #[inline(always)]
    fn is_inherited(self) -> bool {
        word!(self.is_inherited) != 0
    }

    #[inline(always)]
    fn host_netns(self) -> u64 {
        word!(self.host_netns)
    }

    #[inline(always)]
    fn tgid(self) -> u64 {
        word!(self.tgid)
    }

    #[inline(always)]
    fn is_shadow(self) -> bool {
        word!(self.is_shadow) != 0
    }

    #[inline(always)]
    fn balance(self) -> BalanceSettings {
        word!(self.balance)
    }

    #[inline(always)]
    fn maglev_key(self) -> MaglevKey {
        // SAFETY: as above.
        MaglevKey::from_number(unsafe { (&raw const (*self.0).balance.key).read_volatile() })
    }
}

/// What the daemon writes for the programs.
#[inline(always)]
pub fn control() -> Option<ControlPtr> {
    CONTROL.get_ptr(0).map(ControlPtr)
}

/// Counts a connection of `service` that goes to `backend`.
#[inline(always)]
pub fn count_connect(service: u32, backend: u32) {
    // SAFETY: an array's element stays; this word of it is written by atomic addition only.
    unsafe {
        if let Some(entry) = SERVICES.get_ptr_mut(service) {
            add_one(&raw mut (*entry).connects);
        }
        if let Some(entry) = BACKENDS.get_ptr_mut(backend) {
            add_one(&raw mut (*entry).connects);
        }
    }
}

/// Adds 1 to a counter.
#[inline(always)]
pub fn add_one(counter: *mut u64) {
    // SAFETY: the pointer is to an aligned u64 in an array map. The result is unused, which makes
    // this XADD: the verifier of 5.10 rejects a fetching addition.
    unsafe { atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(counter, 1) };
}

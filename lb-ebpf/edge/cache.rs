//! The cache in front of the hashes of flows; see `lb_common::CacheLine`.

use aya_ebpf::bindings::BPF_F_MMAPABLE;
use aya_ebpf::btf_maps::Array;
use aya_ebpf::macros::btf_map;
use lb_common::{
    CacheKey, CacheLine, DEFAULT_MAX_FLOWS, FlowRef, N_CACHED, cached_flow, n_cache_lines,
};

use crate::{hops, settings};

/// Its elements begin at a page, so each is a cache line, as those of arrays that can be mapped do.
#[btf_map]
static EDGE_CACHE: Array<
    CacheLine,
    { n_cache_lines(DEFAULT_MAX_FLOWS) as usize },
    { BPF_F_MMAPABLE as usize },
> = Array::new();

/// The place of a packet's flow in the cache.
#[derive(Clone, Copy)]
pub struct CachePtr {
    line: *mut u64,
    key: CacheKey,
}

/// That of packets with these addresses and ports.
#[inline(always)]
pub fn place<const N: usize>(ends: &[u32; N], protocol: u8) -> Option<CachePtr> {
    let key = CacheKey::of(ends, protocol);
    let line = EDGE_CACHE.get_ptr_mut(key.line(n_cache_lines(settings::n_records())))?;
    Some(CachePtr { line: line.cast(), key })
}

impl CachePtr {
    #[inline(always)]
    fn entry(self, nth: usize) -> *mut u64 {
        // SAFETY: the line has as many.
        unsafe { self.line.add(nth) }
    }

    #[inline(always)]
    fn load(self, nth: usize) -> u64 {
        // SAFETY: an array's element stays, and this is an aligned word of it; volatile, because other processors
        // write it.
        unsafe { self.entry(nth).read_volatile() }
    }

    /// The flow that may be the packet's.
    #[inline(always)]
    pub fn find(self) -> Option<FlowRef> {
        let mut nth = 0;
        while nth < N_CACHED {
            let entry = self.load(nth);
            if self.key.is_of(entry) {
                return Some(cached_flow(entry));
            }
            nth += 1;
        }
        None
    }

    /// Keeps the packet's flow, in the place of one with its tag, of none, or of any other.
    #[inline(always)]
    pub fn keep(self, flow: FlowRef) {
        let (mut place, mut nth) = (hops::jiffies() as usize & (N_CACHED - 1), 0);
        while nth < N_CACHED {
            let entry = self.load(nth);
            if entry == 0 {
                place = nth;
            }
            if self.key.is_of(entry) {
                place = nth;
                break;
            }
            nth += 1;
        }
        // The mask is for the verifier.
        let place = core::hint::black_box(place) & (N_CACHED - 1);
        // SAFETY: as above.
        unsafe { self.entry(place).write_volatile(self.key.entry(flow)) };
    }
}

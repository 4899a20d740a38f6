//! Random numbers for the choice of a backend.
//!
//! A generator of our own in an array costs a few nanoseconds where the kernel's helper, whose code
//! and state are cold after the network's, costs about 40.

use aya_ebpf::bindings::BPF_F_MMAPABLE;
use aya_ebpf::btf_maps::Array;
use aya_ebpf::helpers::{bpf_get_prandom_u32, bpf_get_smp_processor_id};
use aya_ebpf::macros::btf_map;

/// Processors beyond that share the generators of the first ones.
const N_GENERATORS: usize = 256;

/// A processor's generator, in a cache line of its own.
#[repr(C, align(8))]
struct Generator {
    state: u64,
    padding: [u64; 7],
}

#[btf_map]
static RANDOM: Array<Generator, N_GENERATORS, { BPF_F_MMAPABLE as usize }> = Array::new();

/// A number that is uniform over its whole range: SplitMix64 (Steele, Lea, Flood 2014), of which the
/// upper half is taken. Each generator begins with a number of the kernel's, so that no two nodes
/// choose alike. Two programs that come at once on one processor may get the same number.
#[inline(always)]
pub fn next() -> u32 {
    // SAFETY: the helpers have no preconditions, and the pointer is to an array's element, which
    // stays; the state is one aligned word.
    unsafe {
        let processor = bpf_get_smp_processor_id() % N_GENERATORS as u32;
        let Some(generator) = RANDOM.get_ptr_mut(processor) else { return bpf_get_prandom_u32() };
        let state = &raw mut (*generator).state;
        let mut word = state.read_volatile();
        if word == 0 {
            word = u64::from(bpf_get_prandom_u32()) << 32 | u64::from(bpf_get_prandom_u32());
        }
        word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
        state.write_volatile(word);
        word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((word ^ word >> 31) >> 32) as u32
    }
}

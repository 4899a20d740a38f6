//! The maps of the fast path.

use aya_ebpf::bindings::BPF_F_MMAPABLE;
use aya_ebpf::btf_maps::{Array, PerCpuArray};
use aya_ebpf::helpers::generated::{bpf_jiffies64, bpf_ktime_get_ns};
use aya_ebpf::macros::btf_map;
use lb_common::{
    DEFAULT_MAX_FLOWS, EdgeInterface, EdgeProcessor, FastPath, FlowHops, HOP_JIFFIES, Hop,
    N_EDGE_INTERFACES, N_NEIGHBOUR_TIMES,
};

use crate::fib::{self, Fib};

#[btf_map]
static EDGE_HOPS: Array<FlowHops, { DEFAULT_MAX_FLOWS as usize }> = Array::new();
#[btf_map]
static EDGE_INTERFACES: Array<
    EdgeInterface,
    { N_EDGE_INTERFACES as usize },
    { BPF_F_MMAPABLE as usize },
> = Array::new();
/// When a packet to each neighbour last left by the kernel's own output; see [`is_unverified`].
#[btf_map]
static EDGE_NEIGHBOURS: Array<u32, { N_NEIGHBOUR_TIMES as usize }, { BPF_F_MMAPABLE as usize }> =
    Array::new();
#[btf_map]
static EDGE_PROCESSORS: PerCpuArray<EdgeProcessor, 1> = PerCpuArray::new();

/// A next hop in its map.
#[derive(Clone, Copy)]
pub struct HopPtr(*mut Hop);

/// How a packet leaves.
#[derive(Clone, Copy)]
pub struct NextHop {
    /// The index of the interface.
    pub egress: u32,
    /// See [`Hop::ethernet`].
    pub ethernet: [u32; 3],
}

/// Where the next hop of a flow's packets is kept.
#[inline(always)]
pub fn hop(record: u32, is_back: bool) -> Option<HopPtr> {
    let hops = EDGE_HOPS.get_ptr_mut(record)?.cast::<Hop>();
    // SAFETY: there are two.
    Some(HopPtr(if is_back { unsafe { hops.add(1) } } else { hops }))
}

/// The number of jiffies, which is one load: the verifier makes it of the call.
#[inline(always)]
pub fn jiffies() -> u64 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_jiffies64() }
}

macro_rules! field {
    // SAFETY: an array's element stays, and this is an aligned field of it; volatile, because other processors
    // and the daemon write it.
    ($pointer:expr, $($field:tt)+) => {
        unsafe { (&raw const (*$pointer).$($field)+).read_volatile() }
    };
}

macro_rules! set_field {
    // SAFETY: as above.
    ($pointer:expr, $field:ident = $value:expr) => {
        unsafe { (&raw mut (*$pointer).$field).write_volatile($value) }
    };
}

impl HopPtr {
    /// The next hop for a packet of this length that came by that interface, if it was looked up a short time
    /// ago.
    #[inline(always)]
    pub fn get(self, now: u64, ingress: u32, len: u32) -> Option<NextHop> {
        let looked_up = field!(self.0, looked_up);
        if now.wrapping_sub(looked_up) >= HOP_JIFFIES
            || field!(self.0, ingress) != ingress
            || field!(self.0, max_len) < len
        {
            return None;
        }
        let hop = NextHop { egress: field!(self.0, egress), ethernet: field!(self.0, ethernet) };
        // Another processor may have begun to replace it.
        (field!(self.0, looked_up) == looked_up).then_some(hop)
    }

    /// Has it looked up again.
    #[inline(always)]
    pub fn forget(self) {
        set_field!(self.0, looked_up = 0);
    }

    /// Keeps what was looked up.
    #[inline(always)]
    pub fn set(self, now: u64, ingress: u32, len: u32, fib: &Fib) -> NextHop {
        let hop = NextHop { egress: fib::egress(fib), ethernet: fib::ethernet(fib) };
        set_field!(self.0, looked_up = 0);
        set_field!(self.0, egress = hop.egress);
        set_field!(self.0, ingress = ingress);
        set_field!(self.0, max_len = len);
        set_field!(self.0, ethernet = hop.ethernet);
        set_field!(self.0, looked_up = now);
        hop
    }
}

#[inline(always)]
fn neighbour(fib: &Fib) -> Option<*mut u32> {
    EDGE_NEIGHBOURS.get_ptr_mut(fib::neighbour_time(fib))
}

/// Whether a packet to this next hop is to leave by the kernel's own output, as one does now and then: that alone
/// has the kernel find out whether a hardware address still is right, when nothing has shown that for a while. What
/// leaves by redirects may go to an old one for ever. Two neighbours may share a time.
#[inline(always)]
pub fn is_unverified(fib: &Fib, now_ms: u32) -> bool {
    // SAFETY: an array's element stays, and is an aligned word; volatile, because other processors write it.
    neighbour(fib)
        .is_some_and(|last| lb_common::is_unverified(unsafe { last.read_volatile() }, now_ms))
}

/// Takes note that one does.
#[inline(always)]
pub fn set_verified(fib: &Fib, now_ms: u32) {
    if let Some(last) = neighbour(fib) {
        // SAFETY: as above.
        unsafe { last.write_volatile(now_ms) };
    }
}

/// What an edge's interface can do at XDP, and its hardware address in the lower 48 bits; 0 for others.
#[inline(always)]
pub fn interface(index: u32) -> u64 {
    let Some(entry) = EDGE_INTERFACES.get_ptr(index % N_EDGE_INTERFACES) else { return 0 };
    // SAFETY: an array's element stays, and its first eight octets are an aligned word of it; volatile, because
    // the daemon writes it.
    let word = unsafe { entry.cast::<u64>().read_volatile() };
    if field!(entry, index) == index { u64::from_le(word) } else { 0 }
}

/// What the fast path keeps for this processor.
#[derive(Clone, Copy)]
pub struct ProcessorPtr(*mut EdgeProcessor);

/// This processor's.
#[inline(always)]
pub fn processor() -> Option<ProcessorPtr> {
    EDGE_PROCESSORS.get_ptr_mut(0).map(ProcessorPtr)
}

impl ProcessorPtr {
    /// The low 32 bits of CLOCK_MONOTONIC in milliseconds, as it was when this jiffy was first seen.
    #[inline(always)]
    pub fn now_ms(self, jiffies: u64) -> u32 {
        if field!(self.0, jiffies) != jiffies {
            // SAFETY: the helper has no preconditions.
            let now_ns = unsafe { bpf_ktime_get_ns() };
            set_field!(self.0, now_ms = now_ns / 1_000_000);
            set_field!(self.0, jiffies = jiffies);
        }
        field!(self.0, now_ms) as u32
    }

    /// Counts a packet. No other processor writes here, and no other program interrupts this one.
    #[inline(always)]
    pub fn count(self, path: FastPath) {
        // SAFETY: an array's element stays, and there is a word for each.
        unsafe {
            let word = (&raw mut (*self.0).forwarded).cast::<u64>().add(path as usize);
            word.write_volatile(word.read_volatile() + 1);
        }
    }
}

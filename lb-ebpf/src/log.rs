//! What the programs have to say in rare cases, to the daemon's log. Never on the way of an ordinary
//! connect, and never more than once a second for each kind.

use aya_ebpf::bindings::BPF_F_MMAPABLE;
use aya_ebpf::btf_maps::Array;
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::macros::btf_map;
use aya_ebpf::programs::SockAddrContext;
use aya_log_ebpf::{info, warn};
use lb_common::Counter;

use crate::context::Refused;
use crate::maps;

const SECOND_NS: u64 = 1_000_000_000;

/// When each kind was last said, in nanoseconds since boot.
#[btf_map]
static SAID: Array<u64, 4, { BPF_F_MMAPABLE as usize }> = Array::new();

#[repr(u32)]
enum Kind {
    Inconsistent = 0,
    StorageAllocFailed = 1,
    StaleBackend = 2,
    FlowsFull = 3,
}

/// A service leads to a slot or a backend that isn't there.
#[inline(always)]
pub fn inconsistent(ctx: &SockAddrContext, service: u32) -> Refused {
    maps::count(Counter::Inconsistent);
    if is_due(Kind::Inconsistent) {
        warn!(
            ctx,
            "service {} leads to a backend that isn't there: connections are refused", service
        );
    }
    Refused
}

/// A socket has no memory left for its storage.
#[inline(always)]
pub fn no_storage(ctx: &SockAddrContext) {
    if is_due(Kind::StorageAllocFailed) {
        warn!(
            ctx,
            "no socket storage: a connection goes on, and will show its backend as the peer"
        );
    }
}

/// A socket's backend left the table.
#[inline(always)]
pub fn backend_gone(ctx: &SockAddrContext, backend_idx: u32) {
    if is_due(Kind::StaleBackend) {
        info!(ctx, "backend {} is gone: a socket's datagrams go to another one", backend_idx);
    }
}

/// A socket sends to more VIPs and ports than it can remember, all the time.
#[inline(always)]
pub fn flows_full(ctx: &SockAddrContext) {
    if is_due(Kind::FlowsFull) {
        warn!(
            ctx,
            "a UDP socket sends to more than eight VIPs and ports: the replies of one show its backend"
        );
    }
}

#[inline(always)]
fn is_due(kind: Kind) -> bool {
    let Some(said) = SAID.get_ptr_mut(kind as u32) else { return false };
    // SAFETY: the helper has no preconditions, and an array's element stays. Two CPUs that come at
    // once both speak, which is no harm.
    unsafe {
        let now = bpf_ktime_get_ns();
        if now - said.read_volatile() < SECOND_NS {
            return false;
        }
        said.write_volatile(now);
    }
    true
}

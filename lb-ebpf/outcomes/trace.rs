//! The outcomes of connections to VIPs, while a client traces.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::btf_maps::RingBuf;
use aya_ebpf::helpers::{bpf_get_socket_cookie, bpf_ktime_get_ns};
use aya_ebpf::macros::btf_map;
use aya_ebpf::programs::SockOpsContext;
use lb_common::{Counter, TraceEvent, TraceKind, is_sampled};

use crate::maps;

/// Of this object; the unit `connect` has one of its own. It isn't pinned: each daemon has its own.
#[btf_map]
static TRACE: RingBuf<TraceEvent, 262_144> = RingBuf::new();

/// An outcome: what it is, the time to connect in microseconds or 0, and the error's number or 0.
pub type Outcome = (TraceKind, u32, u32);

/// Reports what became of a connection. While nothing is traced that is one load.
#[inline(always)]
pub fn report(ctx: &SockOpsContext, outcome: impl Fn() -> Outcome) {
    let switch = maps::trace_switch();
    if switch.until_ns == 0 {
        return;
    }
    // SAFETY: the helpers have no preconditions but a valid context.
    let (at_ns, cookie) = unsafe { (bpf_ktime_get_ns(), bpf_get_socket_cookie(ctx.as_ptr())) };
    if at_ns >= switch.until_ns || !is_sampled(cookie, switch.max_hash) {
        return;
    }
    let (kind, connect_us, error) = outcome();
    let Some(mut entry) = TRACE.reserve(0) else { return maps::count(Counter::TraceLost) };
    let kind = kind as u8;
    entry.write(TraceEvent { cookie, at_ns, kind, connect_us, error, ..TraceEvent::default() });
    entry.submit(0);
}

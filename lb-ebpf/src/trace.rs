//! Connections to VIPs, one by one, while a client traces: the verdict on each.

use core::hint::black_box;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::btf_maps::RingBuf;
use aya_ebpf::helpers::{
    bpf_get_current_cgroup_id, bpf_get_current_comm, bpf_get_current_pid_tgid,
    bpf_get_socket_cookie, bpf_ktime_get_ns,
};
use aya_ebpf::macros::btf_map;
use aya_ebpf::programs::SockAddrContext;
use lb_common::{
    Address, BackendWords, Counter, Destination, NO_BACKEND, RefusalReason, RefuseReason, Request,
    Selection, TraceEvent, TraceKind, is_sampled,
};

use crate::maps;

/// Of this object; the unit `outcomes` has one of its own. It isn't pinned: each daemon has its own.
#[btf_map]
static TRACE: RingBuf<TraceEvent, 262_144> = RingBuf::new();

/// Reports a connection that is sent to a backend. While nothing is traced that is one load.
#[inline(always)]
pub fn sent(ctx: &SockAddrContext, request: &Request, selection: &Selection) {
    if maps::trace_switch().until_ns != 0 {
        let where_to = [selection.service, selection.backend_idx];
        report(ctx, request, [TraceKind::Sent as u8, selection.reason.0], where_to);
    }
}

/// Reports a connection that is refused.
#[inline(always)]
pub fn refused(ctx: &SockAddrContext, request: &Request, reason: RefuseReason) {
    if maps::trace_switch().until_ns == 0 {
        return;
    }
    // Opaque, where there is one: "R8 pointer arithmetic with <<= operator prohibited", the verifier reports
    // of what the compiler shifts in its place where there is none.
    let (service, reason) = match reason {
        RefuseReason::Probe => return,
        RefuseReason::NoFrontend => (u32::MAX, RefusalReason::NoFrontend),
        RefuseReason::NoBackend { service, has_other_family: true, .. } => {
            (black_box(service), RefusalReason::Family)
        }
        RefuseReason::NoBackend { service, .. } => (black_box(service), RefusalReason::NoBackend),
        RefuseReason::Inconsistent { service } => (black_box(service), RefusalReason::Inconsistent),
    };
    report(ctx, request, [TraceKind::Refused as u8, reason as u8], [service, NO_BACKEND]);
}

#[inline(always)]
fn report(ctx: &SockAddrContext, request: &Request, what: [u8; 2], where_to: [u32; 2]) {
    let [first, second] = match request.destination {
        Destination::V4(address) => Address::v4(address),
        Destination::V6(octets) => Address { octets },
    }
    .words();
    let ([kind, reason], [low, high]) = (what, request.port.to_ne_bytes());
    let what = u64::from_ne_bytes([kind, reason, request.protocol, 0, low, high, 0, 0]);
    let [service, backend_idx] = where_to.map(u64::from);
    // SAFETY: the context is valid.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    nohop_trace_verdict(cookie, what, first, second, service << 32 | backend_idx);
}

/// A global function, which takes words: the verifier follows it once, and the event takes none of the
/// stack that is short where a backend is chosen. Returns nothing of use, as such a function has to
/// return a number.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_trace_verdict(
    cookie: u64,
    what: u64,
    first: u64,
    second: u64,
    where_to: u64,
) -> u64 {
    let switch = maps::trace_switch();
    // SAFETY: the helper has no preconditions.
    let at_ns = unsafe { bpf_ktime_get_ns() };
    if at_ns >= switch.until_ns {
        // Nothing is traced any more, so those that follow are spared the clock.
        maps::end_trace();
        return 0;
    }
    if !is_sampled(cookie, switch.max_hash) {
        return 0;
    }
    let Some(mut entry) = TRACE.reserve(0) else {
        maps::count(Counter::TraceLost);
        return 0;
    };
    let [kind, reason, protocol, _, low, high, ..] = what.to_ne_bytes();
    let event = entry.write(TraceEvent {
        cookie,
        at_ns,
        frontend: Address { octets: zerocopy::transmute!([first, second]) },
        frontend_port: u16::from_ne_bytes([low, high]),
        protocol,
        kind,
        reason,
        service: (where_to >> 32) as u32,
        // SAFETY: the helper has no preconditions.
        cgroup_id: unsafe { bpf_get_current_cgroup_id() },
        pid: (bpf_get_current_pid_tgid() >> 32) as u32,
        comm: bpf_get_current_comm().unwrap_or_default(),
        ..TraceEvent::default()
    });
    if let Some(backend) = maps::backend(where_to as u32).map(BackendWords::backend) {
        event.backend = backend.address;
        event.backend_port = backend.port;
    }
    entry.submit(0);
    0
}

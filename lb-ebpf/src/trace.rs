//! Connections to VIPs, one by one, while somebody traces: what the verdict on each was.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::btf_maps::RingBuf;
use aya_ebpf::helpers::{
    bpf_get_current_cgroup_id, bpf_get_current_comm, bpf_get_current_pid_tgid,
    bpf_get_socket_cookie, bpf_ktime_get_ns,
};
use aya_ebpf::macros::btf_map;
use aya_ebpf::programs::SockAddrContext;
use lb_common::{
    Address, Counter, Destination, RefusalReason, RefuseReason, Request, Selection, TraceEvent,
    TraceKind, TraceSwitch, is_sampled,
};

use crate::maps;

/// Of this object; the unit `outcomes` has one of its own. It isn't pinned: each daemon has its own.
#[btf_map]
static TRACE: RingBuf<TraceEvent, 262_144> = RingBuf::new();

/// Reports a connection that is sent to a backend. While nothing is traced that is one load.
#[inline(always)]
pub fn sent(ctx: &SockAddrContext, request: &Request, selection: &Selection) {
    let switch = maps::trace_switch();
    if switch.until_ns != 0 {
        let event = TraceEvent {
            kind: TraceKind::Sent as u8,
            service: selection.service,
            backend: selection.backend.address,
            backend_port: selection.backend.port,
            ..TraceEvent::default()
        };
        emit(ctx, switch, request, event);
    }
}

/// Reports a connection that is refused.
#[inline(always)]
pub fn refused(ctx: &SockAddrContext, request: &Request, reason: RefuseReason) {
    let switch = maps::trace_switch();
    if switch.until_ns == 0 {
        return;
    }
    let (service, reason) = match reason {
        RefuseReason::Probe => return,
        RefuseReason::NoFrontend => (u32::MAX, RefusalReason::NoFrontend),
        RefuseReason::NoBackend { service, has_other_family: true, .. } => {
            (service, RefusalReason::Family)
        }
        RefuseReason::NoBackend { service, .. } => (service, RefusalReason::NoBackend),
        RefuseReason::Inconsistent { service } => (service, RefusalReason::Inconsistent),
    };
    let (kind, reason) = (TraceKind::Refused as u8, reason as u8);
    emit(ctx, switch, request, TraceEvent { kind, reason, service, ..TraceEvent::default() });
}

#[inline(always)]
fn emit(ctx: &SockAddrContext, switch: TraceSwitch, request: &Request, event: TraceEvent) {
    // SAFETY: the helpers have no preconditions but a valid context.
    let (at_ns, cookie) = unsafe { (bpf_ktime_get_ns(), bpf_get_socket_cookie(ctx.as_ptr())) };
    if at_ns >= switch.until_ns || !is_sampled(cookie, switch.max_hash) {
        return;
    }
    let Some(mut entry) = TRACE.reserve(0) else { return maps::count(Counter::TraceLost) };
    let frontend = match request.destination {
        Destination::V4(address) => Address::v4(address),
        Destination::V6(octets) => Address { octets },
    };
    entry.write(TraceEvent {
        cookie,
        at_ns,
        // SAFETY: the helper has no preconditions.
        cgroup_id: unsafe { bpf_get_current_cgroup_id() },
        frontend,
        frontend_port: request.port,
        protocol: request.protocol,
        pid: (bpf_get_current_pid_tgid() >> 32) as u32,
        comm: bpf_get_current_comm().unwrap_or_default(),
        ..event
    });
    entry.submit(0);
}

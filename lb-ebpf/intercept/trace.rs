//! DNS queries, one by one, while a client traces: what was decided on each.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::btf_maps::RingBuf;
use aya_ebpf::helpers::{
    bpf_get_current_cgroup_id, bpf_get_current_comm, bpf_get_current_pid_tgid,
    bpf_get_socket_cookie, bpf_ktime_get_ns,
};
use aya_ebpf::macros::btf_map;
use aya_ebpf::programs::SockAddrContext;
use lb_common::{
    Address, Counter, DNS_PORT, DnsServer, Interception, TraceEvent, TraceKind, is_sampled,
};

use crate::{context, maps};

/// Of this object; the units `connect` and `outcomes` have one each. It isn't pinned.
#[btf_map]
static TRACE: RingBuf<TraceEvent, 262_144> = RingBuf::new();

/// Reports what was decided on a query. While nothing is traced that is one load.
#[inline(always)]
pub fn report(ctx: &SockAddrContext, asked: &Address, is_host: bool, decided: Interception) {
    if maps::trace_switch().until_ns == 0 {
        return;
    }
    // SAFETY: the context is valid.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let [first, second] = asked.words();
    let what = [decided as u8, context::protocol(ctx), is_host.into(), 0, 0, 0, 0, 0];
    nohop_dns_trace(cookie, u64::from_ne_bytes(what), first, second);
}

/// A global function: the verifier follows it once, and the event takes none of its callers' stack. It
/// returns nothing of use, as such a function has to return a number.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_dns_trace(cookie: u64, what: u64, first: u64, second: u64) -> u64 {
    let switch = maps::trace_switch();
    // SAFETY: the helper has no preconditions.
    let at_ns = unsafe { bpf_ktime_get_ns() };
    if at_ns >= switch.until_ns || !is_sampled(cookie, switch.max_hash) {
        return 0;
    }
    let Some(mut entry) = TRACE.reserve(0) else {
        maps::count_lost(Counter::TraceLost);
        return 0;
    };
    let [reason, protocol, is_host, ..] = what.to_ne_bytes();
    let asked = Address { octets: zerocopy::transmute!([first, second]) };
    let DnsServer { address, port, .. } = maps::server(is_host != 0, asked.to_v4().is_some());
    entry.write(TraceEvent {
        cookie,
        at_ns,
        // SAFETY: the helper has no preconditions.
        cgroup_id: unsafe { bpf_get_current_cgroup_id() },
        frontend: asked,
        frontend_port: DNS_PORT,
        backend: address,
        backend_port: port,
        protocol,
        kind: TraceKind::Intercepted as u8,
        reason,
        service: u32::MAX,
        pid: (bpf_get_current_pid_tgid() >> 32) as u32,
        comm: bpf_get_current_comm().unwrap_or_default(),
        ..TraceEvent::default()
    });
    entry.submit(0);
    0
}

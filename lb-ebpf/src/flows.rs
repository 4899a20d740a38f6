//! Where the datagrams of a socket that isn't connected go, and whom their replies come from.
//!
//! The kernel runs these hooks with the socket locked (BPF_CGROUP_RUN_SA_PROG_LOCK: lock_sock()), so
//! nothing else reads or writes the socket's flows meanwhile. The lock in the value is for nobody any
//! more; it stays because the format does.

use aya_ebpf::bindings::{BPF_F_MMAPABLE, bpf_sock_addr};
use aya_ebpf::btf_maps::Array;
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::helpers::generated::bpf_jiffies64;
use aya_ebpf::macros::btf_map;
use aya_ebpf::programs::SockAddrContext;
use lb_common::{Address, Backend, BackendWords, Counter, N_FLOWS, NO_BACKEND, flow_clock};
use zerocopy::{FromBytes, IntoBytes};

use crate::context::{self, Endpoint};
use crate::xlate::{self, is_bypassed};
use crate::{config, log, maps, revnat};

/// The backend that earlier datagrams to the same VIP went to, while it is in the table.
#[inline(always)]
pub fn lookup(ctx: &SockAddrContext, connected: &Endpoint) -> Option<Backend> {
    // SAFETY: the helper has no preconditions.
    if is_bypassed() || maps::is_suspended(|| unsafe { bpf_ktime_get_ns() }) {
        return None;
    }
    let [first, second] = connected.address.words();
    let found = nohop_find_flow(ctx.sock_addr, first, second, connected.port.into()) as u32;
    // What the flow was sent to: the entry has its generation, or another one only now, when the flow's
    // backend has left the table and the entry isn't written yet.
    (found != NO_BACKEND).then(|| maps::backend(found).map(BackendWords::backend))?
}

/// A global function, as the next two are: the verifier follows it once, and each has a stack of its own.
/// Returns the backend's index, or [`NO_BACKEND`].
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_find_flow(ctx: *mut bpf_sock_addr, first: u64, second: u64, port: u64) -> u64 {
    let (ctx, address) = (&SockAddrContext::new(ctx), address_of(first, second));
    let none = u64::from(NO_BACKEND);
    // SAFETY: a non-null pointer is to this socket's own storage, and the socket is locked.
    let Some(flows) = (unsafe { maps::FLOWS.get_ptr_mut(ctx).as_mut() }) else { return none };
    let Some(index) = flows.lookup_fwd(&address, port as u16) else { return none };
    flows.mark_used(index, now());
    let found = flows.flow(index);
    let (layout, backend_idx) = (found.layout, found.backend_idx);
    if layout == config::layout() && maps::is_in_table(backend_idx, found.generation) {
        return backend_idx.into();
    }
    maps::count(Counter::StaleBackend);
    log::nohop_log_stale_backend(backend_idx.into());
    none
}

/// Keeps where a datagram to `connected` goes, for those after it and for the replies. Where there is no
/// memory for it, or all flows of the socket are in use, it goes on, and the next one may go elsewhere.
#[inline(always)]
pub fn store(ctx: &SockAddrContext, connected: &Endpoint, backend_idx: u32) {
    let [first, second] = connected.address.words();
    nohop_keep_flow(ctx.sock_addr, first, second, connected.port.into(), backend_idx.into());
}

/// Returns nothing of use: a global function has to return a number.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_keep_flow(
    ctx: *mut bpf_sock_addr,
    first: u64,
    second: u64,
    port: u64,
    backend_idx: u64,
) -> u64 {
    let ctx = &SockAddrContext::new(ctx);
    let backend_idx = backend_idx as u32;
    let Some(backend) = maps::backend(backend_idx).map(BackendWords::backend) else { return 0 };
    let now = now();
    let place = nohop_flow_place(ctx.sock_addr, first, second, port, now.into());
    // SAFETY: as above.
    let flows = unsafe { maps::FLOWS.get_ptr_mut(ctx).as_mut() };
    let Some(flows) = flows else {
        maps::count(Counter::StorageAllocFailed);
        log::nohop_log_storage_alloc_failed();
        return 0;
    };
    if place < N_FLOWS as u64 {
        let connected = Endpoint { address: address_of(first, second), port: port as u16 };
        flows.put(place as usize, &xlate::revnat(&backend, backend_idx, &connected), now);
    } else {
        flows.supersede(&backend.address, backend.port);
        maps::count(Counter::FlowsFull);
        log::nohop_log_flows_full();
    }
    0
}

/// The place for a new flow to a VIP and port, below [`N_FLOWS`] unless all are in use. It is a number that
/// the verifier knows nothing of, which would else follow what comes next for each place.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_flow_place(
    ctx: *mut bpf_sock_addr,
    first: u64,
    second: u64,
    port: u64,
    now: u64,
) -> u64 {
    let none = N_FLOWS as u64;
    // SAFETY: as above. Without a value, the storage begins as zeros.
    let flows =
        unsafe { maps::FLOWS.get_or_insert_ptr_mut(&SockAddrContext::new(ctx), None).as_mut() };
    let Some(flows) = flows else { return none };
    flows.renew(&address_of(first, second), port as u16);
    flows.victim(now as u32).map_or(none, |place| place as u64)
}

/// Notes that a datagram passes untouched to `address`: its reply comes from there, though a VIP's
/// datagrams went there as well. `peer` is what the socket is connected to.
#[inline(always)]
pub fn pass(ctx: &SockAddrContext, address: &Endpoint, peer: impl FnOnce() -> Endpoint) {
    // SAFETY: as above.
    let has_flows = unsafe { !maps::FLOWS.get_ptr_mut(ctx).is_null() };
    // A connection's own datagrams: udpv6_sendmsg() names the peer where it is a mapped address.
    if has_flows && !address.is(&peer()) {
        let [first, second] = address.address.words();
        nohop_supersede_flow(ctx.sock_addr, first, second, address.port.into());
    }
}

/// Returns nothing of use, likewise.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_supersede_flow(
    ctx: *mut bpf_sock_addr,
    first: u64,
    second: u64,
    port: u64,
) -> u64 {
    // SAFETY: as above.
    if let Some(flows) = unsafe { maps::FLOWS.get_ptr_mut(&SockAddrContext::new(ctx)).as_mut() } {
        flows.supersede(&address_of(first, second), port as u16);
    }
    0
}

#[inline(always)]
fn address_of(first: u64, second: u64) -> Address {
    Address { octets: zerocopy::transmute!([first, second]) }
}

/// Whom a datagram from `sender` comes from, as the application should see it: the VIP that it is a
/// reply of, or the sender itself. `peer` is what the socket is connected to.
#[inline(always)]
pub fn reverse_xlate(ctx: &SockAddrContext, sender: &Endpoint, peer: &Endpoint) -> Endpoint {
    if sender.is(peer) {
        return revnat::reverse_xlate(ctx, sender);
    }
    // What was received by a socket that has been disconnected (AF_UNSPEC) and has sent nothing since.
    if peer.port == 0
        && context::source_port(ctx) == 0
        && let Some(kept) = revnat::association(ctx, sender)
    {
        return Endpoint::of_frontend(kept);
    }
    // What others sent came before the socket was connected, or connected to this peer.
    // SAFETY: as above.
    if let Some(flows) = unsafe { maps::FLOWS.get_ptr_mut(ctx).as_mut() }
        && let Some(index) = flows.lookup_rev(&sender.address, sender.port)
    {
        let flow = flows.flow(index);
        return Endpoint { address: flow.frontend, port: flow.frontend_port };
    }
    if peer.port == 0 { *sender } else { revnat::reverse_xlate_prev(ctx, sender) }
}

/// The time by which flows are dated, as it was when `tick` began.
#[repr(C, align(8))]
#[derive(FromBytes, IntoBytes)]
struct Clock {
    /// The time, by [`flow_clock`].
    now: u32,
    /// The upper bits of the jiffies, without the [`TICK_SHIFT`] lowest.
    tick: u32,
}

/// A tick is 64 jiffies: 64 to 640 ms, less than a unit of [`flow_clock`].
const TICK_SHIFT: u32 = 6;

#[btf_map]
static FLOW_CLOCK: Array<Clock, 1, { BPF_F_MMAPABLE as usize }> = Array::new();

/// The time by which flows are dated, which may be a unit behind what another processor got just now
/// ([`Flows::victim`](lb_common::Flows::victim) allows for it). Reading the clock costs as much as finding a flow, while the
/// verifier makes a load of `bpf_jiffies64` (do_misc_fixups() in kernel/bpf/verifier.c); so it is read
/// once a tick.
#[inline(always)]
fn now() -> u32 {
    // SAFETY: the helpers have no preconditions, and the pointer is to an array's element, which
    // stays; it is one aligned word.
    unsafe {
        let read = || flow_clock(bpf_ktime_get_ns());
        let Some(clock) = FLOW_CLOCK.get_ptr_mut(0).map(<*mut Clock>::cast::<u64>) else {
            return read();
        };
        let tick = (bpf_jiffies64() >> TICK_SHIFT) as u32;
        let kept: Clock = zerocopy::transmute!(clock.read_volatile());
        if kept.tick == tick {
            return kept.now;
        }
        let now = read();
        clock.write_volatile(zerocopy::transmute!(Clock { now, tick }));
        now
    }
}

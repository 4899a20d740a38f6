//! Where the datagrams of a socket that isn't connected go, and whom their replies come from.
//!
//! The kernel runs these hooks with the socket locked (BPF_CGROUP_RUN_SA_PROG_LOCK: lock_sock()), so
//! nothing else reads or writes the socket's flows meanwhile. The lock in the value is for nobody any
//! more; it stays because the format does.

use aya_ebpf::bindings::BPF_F_MMAPABLE;
use aya_ebpf::btf_maps::Array;
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::helpers::generated::bpf_jiffies64;
use aya_ebpf::macros::btf_map;
use aya_ebpf::programs::SockAddrContext;
use lb_common::{Address, Counter, RevNat, flow_clock};
use zerocopy::{FromBytes, IntoBytes};

use crate::context::Endpoint;
use crate::xlate::is_bypassed;
use crate::{config, log, maps, revnat};

/// Where a datagram goes.
#[derive(Clone, Copy)]
pub struct Session {
    pub backend: Address,
    pub port: u16,
}

/// The backend that earlier datagrams to the same VIP went to, while it is in the table.
#[inline(always)]
pub fn lookup(ctx: &SockAddrContext, connected: &Endpoint) -> Option<Session> {
    if is_bypassed() || maps::is_shadow() {
        return None;
    }
    // SAFETY: a non-null pointer is to this socket's own storage, and the socket is locked.
    let flows = unsafe { maps::FLOWS.get_ptr_mut(ctx).as_mut() }?;
    let index = flows.lookup_fwd(&connected.address, connected.port)?;
    flows.mark_used(index, now());
    let found = *flows.flow(index);
    if found.layout == config::layout() && maps::is_in_table(found.backend_idx, found.generation) {
        return Some(Session { backend: found.backend, port: found.backend_port });
    }
    maps::count(Counter::StaleBackend);
    log::stale_backend(ctx, found.backend_idx);
    None
}

/// Keeps where a datagram goes, for those after it and for the replies. Where there is no memory
/// for it, or all flows of the socket are in use, it goes on, and the next one may go elsewhere.
#[inline(always)]
pub fn store(ctx: &SockAddrContext, flow: &RevNat) {
    // SAFETY: as above. Without a value, the storage begins as zeros.
    match unsafe { maps::FLOWS.get_or_insert_ptr_mut(ctx, None).as_mut() } {
        Some(flows) => {
            if !flows.insert(flow, now()) {
                maps::count(Counter::FlowsFull);
                log::flows_full(ctx);
            }
        }
        None => {
            maps::count(Counter::StorageAllocFailed);
            log::storage_alloc_failed(ctx);
        }
    }
}

/// Notes that a datagram passes untouched to `address`: its reply comes from there, though a VIP's
/// datagrams went there as well. `peer` is what the socket is connected to.
#[inline(always)]
pub fn pass(ctx: &SockAddrContext, address: &Endpoint, peer: impl FnOnce() -> Endpoint) {
    // SAFETY: as above.
    if let Some(flows) = unsafe { maps::FLOWS.get_ptr_mut(ctx).as_mut() }
        // A connection's own datagrams: udpv6_sendmsg() names the peer where it is a mapped address.
        && !address.is(&peer())
    {
        flows.supersede(&address.address, address.port);
    }
}

/// Whom a datagram from `sender` comes from, as the application should see it: the VIP that it is a
/// reply of, or the sender itself. `peer` is what the socket is connected to.
#[inline(always)]
pub fn reverse_xlate(ctx: &SockAddrContext, sender: &Endpoint, peer: &Endpoint) -> Endpoint {
    if sender.is(peer) {
        return revnat::reverse_xlate(ctx, sender);
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

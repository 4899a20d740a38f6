//! Where the datagrams of a socket that isn't connected go, and whom their replies come from.

use aya_ebpf::helpers::generated::{bpf_spin_lock, bpf_spin_unlock};
use aya_ebpf::programs::SockAddrContext;
use lb_common::{Address, Counter, Flows, Peer};

use crate::context::Endpoint;
use crate::translate::is_excluded;
use crate::{maps, peers, settings, voice};

/// Where a datagram goes.
#[derive(Clone, Copy)]
pub struct Followed {
    pub backend: Address,
    pub port: u16,
}

/// The backend that earlier datagrams to the same VIP went to, while it is in the table.
#[inline(always)]
pub fn follow(ctx: &SockAddrContext, dialled: &Endpoint) -> Option<Followed> {
    if is_excluded() || maps::is_shadow() {
        return None;
    }
    // SAFETY: a non-null pointer is to this socket's own storage.
    let flows = unsafe { maps::FLOWS.get_ptr_mut(ctx).as_mut() }?;
    lock(flows);
    let index = flows.current(&dialled.address, dialled.port);
    let found = index.map_or_else(Peer::default, |index| {
        flows.touch(index);
        *flows.flow(index)
    });
    unlock(flows);
    index?;
    if found.layout == settings::layout() && maps::is_in_table(found.backend_idx, found.generation)
    {
        return Some(Followed { backend: found.backend, port: found.backend_port });
    }
    maps::count(Counter::BackendGone);
    voice::backend_gone(ctx, found.backend_idx);
    None
}

/// Keeps where a datagram goes, for those after it and for the replies. Where there is no memory
/// for it, it goes on, and the next one may go elsewhere.
#[inline(always)]
pub fn keep(ctx: &SockAddrContext, flow: &Peer) {
    // What the compiler knows of its octets, such as that those of an IPv4 address begin with zeros,
    // it would write by a call of memset, with the lock held.
    // SAFETY: a reference is valid and aligned.
    let flow = unsafe { (&raw const *flow).read_volatile() };
    // SAFETY: as above. Without a value, the storage begins as zeros.
    match unsafe { maps::FLOWS.get_or_insert_ptr_mut(ctx, None).as_mut() } {
        Some(flows) => {
            lock(flows);
            flows.keep(&flow);
            unlock(flows);
        }
        None => {
            maps::count(Counter::NoStorage);
            voice::no_storage(ctx);
        }
    }
}

/// Whom a datagram from `sender` comes from, as the application should see it: the VIP that it is a
/// reply of, or the sender itself. `peer` is what the socket is connected to.
#[inline(always)]
pub fn shown(ctx: &SockAddrContext, sender: &Endpoint, peer: &Endpoint) -> Endpoint {
    // What others sent came before the socket was connected.
    if sender.is(peer) {
        return peers::shown(ctx, sender);
    }
    let mut shown = *sender;
    // SAFETY: as above.
    if let Some(flows) = unsafe { maps::FLOWS.get_ptr_mut(ctx).as_mut() } {
        lock(flows);
        if let Some(index) = flows.replied(&sender.address, sender.port) {
            let flow = flows.flow(index);
            shown = Endpoint { address: flow.frontend, port: flow.frontend_port };
        }
        unlock(flows);
    }
    shown
}

/// Locks the flows. Until they are unlocked, nothing may be called that isn't inlined: "function
/// calls are not allowed while holding a lock", says 5.10.
#[inline(always)]
fn lock(flows: &mut Flows) {
    // SAFETY: the lock is the one in the map's value; it is given back on every way out.
    unsafe { bpf_spin_lock((&raw mut flows.lock).cast()) };
}

#[inline(always)]
fn unlock(flows: &mut Flows) {
    // SAFETY: as above.
    unsafe { bpf_spin_unlock((&raw mut flows.lock).cast()) };
}

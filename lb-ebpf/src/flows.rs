//! Where the datagrams of a socket that isn't connected go, and whom their replies come from.

use aya_ebpf::bindings::bpf_spin_lock;
use aya_ebpf::helpers::generated::{bpf_spin_lock, bpf_spin_unlock};
use aya_ebpf::programs::SockAddrContext;
use lb_common::{Address, Counter, Flows, Peer};

use crate::context::{self, Endpoint};
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
    // SAFETY: a non-null pointer is to this socket's own storage.
    let flows = unsafe { maps::FLOWS.get_ptr_mut(ctx).as_mut() }?;
    let found = locked(flows, |flows| {
        let index = flows.current(&dialled.address, dialled.port)?;
        flows.touch(index);
        Some(*flows.flow(index))
    })?;
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
    // SAFETY: as above. Without a value, the storage begins as zeros.
    match unsafe { maps::FLOWS.get_or_insert_ptr_mut(ctx, None).as_mut() } {
        Some(flows) => locked(flows, |flows| flows.keep(flow)),
        None => {
            maps::count(Counter::NoStorage);
            voice::no_storage(ctx);
        }
    }
}

/// The VIP that a datagram from `sender` is a reply of.
#[inline(always)]
pub fn dialled(ctx: &SockAddrContext, sender: &Endpoint) -> Option<Endpoint> {
    // A connection that was dissolved by connect(AF_UNSPEC) left its entry behind.
    if context::is_connected(ctx)
        && let Some(dialled) = peers::dialled(ctx, sender)
    {
        return Some(dialled);
    }
    // SAFETY: as above.
    let flows = unsafe { maps::FLOWS.get_ptr_mut(ctx).as_mut() }?;
    locked(flows, |flows| {
        let flow = flows.flow(flows.replied(&sender.address, sender.port)?);
        Some(Endpoint { address: flow.frontend, port: flow.frontend_port })
    })
}

/// Runs `work`, which must not call anything that isn't inlined, with the flows locked.
#[inline(always)]
fn locked<R>(flows: &mut Flows, work: impl FnOnce(&mut Flows) -> R) -> R {
    let lock: *mut bpf_spin_lock = (&raw mut flows.lock).cast();
    // SAFETY: the lock is the one in the map's value; it is given back on every way out.
    unsafe { bpf_spin_lock(lock) };
    let result = work(flows);
    // SAFETY: as above.
    unsafe { bpf_spin_unlock(lock) };
    result
}

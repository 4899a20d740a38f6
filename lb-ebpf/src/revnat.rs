//! What a connected socket remembers of its connection.
//!
//! A hook runs before the kernel connects, and doesn't know whether that succeeds. A UDP socket that
//! is connected stays so when a further connect() fails, so what it remembers of the association that
//! it has is kept beside what it is to have next. Whichever of the two names the peer that the kernel
//! has is the one that is true.

use aya_ebpf::helpers::generated::{bpf_sk_storage_get, bpf_skc_to_mptcp_sock};
use aya_ebpf::programs::SockAddrContext;
use lb_common::{Counter, IPPROTO_TCP, IPPROTO_UDP, Origin, RevNat};

use crate::context::{self, Endpoint};
use crate::{config, conns, log, maps};

/// Stores what was connected to. Where there is no memory for it the connection goes on. `connected` is
/// what a UDP socket is connected to until now.
#[inline(always)]
pub fn store(
    ctx: &SockAddrContext,
    entry: RevNat,
    origin: Origin,
    connected: impl FnOnce() -> Endpoint,
) {
    // A subflow has no record: its storage is also that of its MPTCP socket, for which no callback comes.
    let may_record = !matches!(origin, Origin::Subflow);
    if context::protocol(ctx) == IPPROTO_TCP && conns::store(ctx, &entry, may_record) {
        return;
    }
    // Made as zeros, which mean none, and written once: a value for the kernel to begin with would
    // be copied twice, and storage that was there already has an earlier connect in it.
    // SAFETY: a non-null pointer is to this socket's own storage, which only hooks of this socket
    // read and write, and they run with it locked.
    match unsafe { maps::SK_REVNAT.get_or_insert_ptr_mut(ctx, None).as_mut() } {
        Some(kept) => {
            if context::protocol(ctx) == IPPROTO_UDP {
                set_aside(ctx, kept, &connected(), &Endpoint::of_backend(&entry));
            }
            *kept = entry;
        }
        None => {
            maps::count(Counter::StorageAllocFailed);
            log::nohop_log_storage_alloc_failed();
        }
    }
    if let Origin::Subflow = origin {
        store_outside(ctx, entry);
    }
}

/// Clears what an earlier connect() stored: the socket goes to `address` itself. Most sockets have
/// nothing stored.
#[inline(always)]
pub fn clear(ctx: &SockAddrContext, address: &Endpoint, connected: impl FnOnce() -> Endpoint) {
    if context::protocol(ctx) == IPPROTO_TCP {
        if conns::has_nothing(ctx) {
            return;
        }
        conns::clear(ctx);
    }
    // SAFETY: as above.
    let Some(kept) = (unsafe { maps::SK_REVNAT.get_ptr_mut(ctx).as_mut() }) else { return };
    if context::protocol(ctx) == IPPROTO_UDP {
        set_aside(ctx, kept, &connected(), address);
    } else {
        clear_outside(ctx);
    }
    *kept = RevNat::default();
}

/// Keeps what is remembered of the association that a UDP socket has beyond `kept`, which is about to be
/// written, until the socket is connected to `next`.
#[inline(always)]
fn set_aside(ctx: &SockAddrContext, kept: &RevNat, connected: &Endpoint, next: &Endpoint) {
    let is_kept = kept.backend_port != 0;
    // SAFETY: as above.
    let former = unsafe {
        if is_kept && connected.port != 0 {
            maps::SK_REVNAT_PREV.get_or_insert_ptr_mut(ctx, None).as_mut()
        } else {
            maps::SK_REVNAT_PREV.get_ptr_mut(ctx).as_mut()
        }
    };
    let Some(former) = former else { return };
    let is_former = former.matches_backend(&connected.address, connected.port)
        && !kept.matches_backend(&connected.address, connected.port);
    if !is_former && is_kept {
        *former = *kept;
    }
    // What it is to be connected to by another name, or by none.
    if former.matches_backend(&next.address, next.port) {
        *former = RevNat::default();
    }
}

/// What a connected socket remembers of its association with `peer`, if it connected a VIP.
#[inline(always)]
pub fn association(ctx: &SockAddrContext, peer: &Endpoint) -> Option<&'static RevNat> {
    // SAFETY: as above; the storage lives as long as the socket, which is longer than the program
    // runs.
    unsafe {
        let kept = maps::SK_REVNAT.get_ptr_mut(ctx).as_ref()?;
        if kept.matches_backend(&peer.address, peer.port) {
            return Some(kept);
        }
    }
    if context::protocol(ctx) == IPPROTO_UDP { former(ctx, peer) } else { None }
}

#[inline(always)]
fn former(ctx: &SockAddrContext, peer: &Endpoint) -> Option<&'static RevNat> {
    // SAFETY: as above.
    let former = unsafe { maps::SK_REVNAT_PREV.get_ptr_mut(ctx).as_ref() };
    former.filter(|former| former.matches_backend(&peer.address, peer.port))
}

/// What the application should see of the socket's peer: what was connected to, if the peer is the
/// backend that the connection became, or the peer itself.
#[inline(always)]
pub fn reverse_xlate(ctx: &SockAddrContext, peer: &Endpoint) -> Endpoint {
    // What was kept is about another connection if the peer is another one.
    association(ctx, peer).map_or(*peer, Endpoint::of_frontend)
}

/// The same of a socket of any protocol: one by TCP may have a record.
#[inline(always)]
pub fn shown_peer(ctx: &SockAddrContext, peer: &Endpoint) -> Endpoint {
    if context::protocol(ctx) == IPPROTO_TCP {
        if conns::has_nothing(ctx) {
            return *peer;
        }
        if let Some(kept) = conns::find(ctx)
            && kept.matches_backend(&peer.address, peer.port)
        {
            return Endpoint::of_frontend(kept);
        }
    }
    reverse_xlate(ctx, peer)
}

/// The same for a sender that the socket was connected to before.
#[inline(always)]
pub fn reverse_xlate_prev(ctx: &SockAddrContext, sender: &Endpoint) -> Endpoint {
    former(ctx, sender).map_or(*sender, Endpoint::of_frontend)
}

/// Keeps the same for the MPTCP socket that a subflow is of: connect() runs the hook on the subflow,
/// and getpeername() on the other.
#[inline(always)]
fn store_outside(ctx: &SockAddrContext, entry: RevNat) {
    if let Some(kept) = outside(ctx, true) {
        *kept = entry;
    }
}

#[inline(always)]
fn clear_outside(ctx: &SockAddrContext) {
    if let Some(kept) = outside(ctx, false) {
        *kept = RevNat::default();
    }
}

/// What the MPTCP socket remembers that this socket is a subflow of, if it is one and the kernel lets
/// a program know (`bpf_skc_to_mptcp_sock`, 5.19).
#[inline(always)]
fn outside(ctx: &SockAddrContext, create: bool) -> Option<&'static mut RevNat> {
    if !config::has_mptcp() {
        return None;
    }
    // SAFETY: the helpers take the context's own socket, and one that the kernel knows; a non-null
    // pointer is to the MPTCP socket's own storage, which lives as long as that does.
    unsafe {
        let mptcp = bpf_skc_to_mptcp_sock(context::socket(ctx).cast());
        if mptcp.is_null() {
            return None;
        }
        let map = (&raw const maps::SK_REVNAT).cast_mut().cast();
        let value = core::ptr::null_mut();
        bpf_sk_storage_get(map, mptcp.cast(), value, u64::from(create)).cast::<RevNat>().as_mut()
    }
}

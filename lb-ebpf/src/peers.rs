//! What a connected socket remembers of its dial.

use aya_ebpf::programs::SockAddrContext;
use lb_common::{Counter, Peer};

use crate::context::Endpoint;
use crate::{maps, voice};

/// Keeps what was dialled. Where there is no memory for it the dial goes on.
#[inline(always)]
pub fn remember(ctx: &SockAddrContext, mut peer: Peer) {
    // SAFETY: a non-null pointer is to this socket's own storage, which only connect() on this
    // socket writes.
    unsafe {
        let kept = maps::PEERS.get_or_insert_ptr_mut(ctx, Some(&mut peer));
        if kept.is_null() {
            maps::count(Counter::NoStorage);
            voice::no_storage(ctx);
        } else {
            // Storage that was there already has an earlier dial in it.
            *kept = peer;
        }
    }
}

/// Forgets an earlier dial: the socket goes elsewhere. Most sockets have nothing to forget.
#[inline(always)]
pub fn forget(ctx: &SockAddrContext) {
    // SAFETY: as above.
    unsafe {
        if let Some(kept) = maps::PEERS.get_ptr_mut(ctx).as_mut() {
            *kept = Peer::default();
        }
    }
}

/// What the application should see of the socket's peer: what was dialled, if the peer is the
/// backend that the dial became, or the peer itself.
#[inline(always)]
pub fn shown(ctx: &SockAddrContext, peer: &Endpoint) -> Endpoint {
    // SAFETY: as above.
    match unsafe { maps::PEERS.get_ptr_mut(ctx).as_ref() } {
        // What was kept is about another dial if the peer is another one.
        Some(kept) if kept.was_sent_to(&peer.address, peer.port) => {
            Endpoint { address: kept.frontend, port: kept.frontend_port }
        }
        _ => *peer,
    }
}

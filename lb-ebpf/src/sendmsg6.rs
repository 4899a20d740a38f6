//! sendto() and sendmsg() to an IPv6 address: where datagrams go that name it. The kernel can't send
//! them to an IPv4 backend from here (udpv6_sendmsg(): ENOTSUPP).

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;

use crate::context::{self, Endpoint, FAIL, PROCEED, Refused};
use crate::maps::Reach;
use crate::translate::{self, Call, choose6};
use crate::{config, flows, revnat};

/// Attached to BPF_CGROUP_UDP6_SENDMSG.
#[cgroup_sock_addr(sendmsg6)]
pub fn nohop_sendmsg6(ctx: SockAddrContext) -> i32 {
    match try_sendmsg6(&ctx) {
        Ok(()) => PROCEED,
        Err(Refused) => context::refuse(|| FAIL),
    }
}

#[inline(always)]
fn try_sendmsg6(ctx: &SockAddrContext) -> Result<(), Refused> {
    let connected = Endpoint { address: context::address6(ctx), port: context::port(ctx) };
    if !config::in_pool6(&connected.address) {
        flows::pass(ctx, &connected, || context::peer6(ctx));
        return Ok(());
    }
    if context::peer_port(ctx) != 0 {
        let peer = context::peer6(ctx);
        if peer.is(&connected) {
            return Ok(());
        }
        if revnat::association(ctx, &peer)
            .is_some_and(|kept| kept.matches_vip(&connected.address, connected.port))
        {
            if peer.address.to_v4().is_some() {
                return Err(translate::refuse_family6(&connected));
            }
            context::set6(ctx, peer.address, peer.port);
            return Ok(());
        }
    }
    if let Some(followed) = flows::follow(ctx, &connected) {
        context::set6(ctx, followed.backend, followed.port);
        return Ok(());
    }
    let Some(choice) = choose6(ctx, &connected, Call::Send, |_| Reach::Ipv6)? else {
        flows::pass(ctx, &connected, || context::peer6(ctx));
        return Ok(());
    };
    context::set6(ctx, choice.backend.address, choice.backend.port);
    flows::keep(ctx, &choice.peer(connected));
    Ok(())
}

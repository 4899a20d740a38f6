//! sendto() and sendmsg() to an IPv4 address: where datagrams go that name it. An IPv6 socket that
//! sends to `::ffff:a.b.c.d` comes here too, also when it is connected to it and names nothing:
//! udpv6_sendmsg() hands its datagrams to udp_sendmsg() with the address.

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use lb_common::Address;

use crate::context::{self, Endpoint, FAIL, PROCEED, Refused};
use crate::maps::Reach;
use crate::translate::{self, Call, choose4, may_be_ours};
use crate::{flows, log, revnat};

/// Attached to BPF_CGROUP_UDP4_SENDMSG.
#[cgroup_sock_addr(sendmsg4)]
pub fn nohop_sendmsg4(ctx: SockAddrContext) -> i32 {
    match try_sendmsg4(&ctx) {
        Ok(()) => PROCEED,
        Err(Refused) => context::refuse(|| FAIL),
    }
}

#[inline(always)]
fn try_sendmsg4(ctx: &SockAddrContext) -> Result<(), Refused> {
    let address = context::address4(ctx);
    let connected = Endpoint { address: Address::v4(address), port: context::port(ctx) };
    if !may_be_ours(address) {
        flows::pass(ctx, &connected, || context::peer(ctx));
        return Ok(());
    }
    if context::peer_port(ctx) != 0 {
        let peer = context::peer(ctx);
        if peer.is(&connected) {
            // What a connection became isn't looked up again.
            return Ok(());
        }
        if revnat::association(ctx, &peer)
            .is_some_and(|kept| kept.matches_vip(&connected.address, connected.port))
        {
            // udp_sendmsg() can't send to IPv6.
            let Some(backend) = peer.address.to_v4() else {
                return Err(translate::refuse_family4(ctx, address));
            };
            context::set4(ctx, backend, peer.port);
            return Ok(());
        }
    }
    if let Some(followed) = flows::follow(ctx, &connected)
        && let Some(backend) = followed.backend.to_v4()
    {
        context::set4(ctx, backend, followed.port);
        return Ok(());
    }
    let Some(choice) = choose4(ctx, address, Call::Send, || Reach::Ipv4)? else {
        flows::pass(ctx, &connected, || context::peer(ctx));
        return Ok(());
    };
    let Some(backend) = choice.backend.address.to_v4() else {
        return Err(log::inconsistent(ctx, choice.service));
    };
    context::set4(ctx, backend, choice.backend.port);
    flows::keep(ctx, &choice.peer(connected));
    Ok(())
}

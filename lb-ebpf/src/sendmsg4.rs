//! sendto() and sendmsg() to an IPv4 address: where datagrams go that name it. An IPv6 socket that
//! sends to `::ffff:a.b.c.d` comes here too, also when it is connected to it and names nothing:
//! udpv6_sendmsg() hands its datagrams to udp_sendmsg() with the address.

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use lb_common::{Address, Call, Destination, FamilyFilter};

use crate::context::{self, Endpoint, FAIL, PROCEED, Reject};
use crate::xlate::{self, in_vip_range, xlate};
use crate::{flows, log, revnat};

/// Attached to BPF_CGROUP_UDP4_SENDMSG.
#[cgroup_sock_addr(sendmsg4)]
pub fn nohop_sendmsg4(ctx: SockAddrContext) -> i32 {
    match try_sendmsg4(&ctx) {
        Ok(()) => PROCEED,
        Err(Reject) => context::reject(|| FAIL),
    }
}

#[inline(always)]
fn try_sendmsg4(ctx: &SockAddrContext) -> Result<(), Reject> {
    let address = context::dst4(ctx);
    let connected = Endpoint { address: Address::v4(address), port: context::port(ctx) };
    if !in_vip_range(address) {
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
                return Err(xlate::refuse_family(ctx, Destination::V4(address)));
            };
            context::set_dst4(ctx, backend, peer.port);
            return Ok(());
        }
    }
    if let Some(backend) = flows::lookup(ctx, &connected)
        && let Some(address) = backend.address.to_v4()
    {
        context::set_dst4(ctx, address, backend.port);
        return Ok(());
    }
    let Some(selection) = xlate(ctx, Destination::V4(address), Call::Send, |_| FamilyFilter::Ipv4)?
    else {
        flows::pass(ctx, &connected, || context::peer(ctx));
        return Ok(());
    };
    let Some(backend) = selection.backend.address.to_v4() else {
        return Err(log::inconsistent(selection.service));
    };
    context::set_dst4(ctx, backend, selection.backend.port);
    flows::store(ctx, &connected, selection.backend_idx);
    Ok(())
}

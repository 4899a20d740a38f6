//! sendto() and sendmsg() to an IPv6 address: where datagrams go that name it. The kernel can't send
//! them to an IPv4 backend from here (udpv6_sendmsg(): ENOTSUPP).

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use lb_common::{Call, Destination, FamilyFilter};

use crate::context::{self, Endpoint, FAIL, PROCEED, Reject};
use crate::xlate::{self, in_vip_range6, xlate};
use crate::{flows, revnat};

/// Attached to BPF_CGROUP_UDP6_SENDMSG.
#[cgroup_sock_addr(sendmsg6)]
pub fn nohop_sendmsg6(ctx: SockAddrContext) -> i32 {
    match try_sendmsg6(&ctx) {
        Ok(()) => PROCEED,
        Err(Reject) => context::reject(|| FAIL),
    }
}

#[inline(always)]
fn try_sendmsg6(ctx: &SockAddrContext) -> Result<(), Reject> {
    let connected = destination6(ctx);
    if !in_vip_range6(&connected.address) {
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
                return Err(xlate::refuse_family(ctx, Destination::V6(connected.address.octets)));
            }
            context::set_dst6(ctx, peer.address, peer.port);
            return Ok(());
        }
    }
    if let Some(backend) = flows::lookup(ctx, &connected) {
        context::set_dst6(ctx, backend.address, backend.port);
        return Ok(());
    }
    let Some(selection) =
        xlate(ctx, Destination::V6(connected.address.octets), Call::Send, |_| FamilyFilter::Ipv6)?
    else {
        flows::pass(ctx, &destination6(ctx), || context::peer6(ctx));
        return Ok(());
    };
    flows::store(ctx, &destination6(ctx), selection.backend_idx);
    context::set_dst6(ctx, selection.backend.address, selection.backend.port);
    Ok(())
}

/// Where the datagram goes. Read again, rather than kept on the stack, which is short below what chooses.
#[inline(always)]
fn destination6(ctx: &SockAddrContext) -> Endpoint {
    Endpoint { address: context::dst6(ctx), port: context::port(ctx) }
}

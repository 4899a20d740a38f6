//! sendto() and sendmsg() to an IPv6 address: where the datagrams of a socket that isn't connected
//! go. The kernel can't send them to an IPv4 backend from here.

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;

use crate::context::{self, Endpoint, FAIL, PROCEED, Refused};
use crate::maps::Reach;
use crate::translate::choose6;
use crate::{flows, settings};

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
    let dialled = Endpoint { address: context::address6(ctx), port: context::port(ctx) };
    if !settings::in_pool6(&dialled.address) {
        return Ok(());
    }
    if let Some(followed) = flows::follow(ctx, &dialled) {
        context::set6(ctx, followed.backend, followed.port);
        return Ok(());
    }
    let Some(choice) = choose6(ctx, &dialled, Reach::Ipv6)? else { return Ok(()) };
    context::set6(ctx, choice.backend.address, choice.backend.port);
    flows::keep(ctx, &choice.peer(dialled));
    Ok(())
}

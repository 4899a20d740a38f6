//! sendto() and sendmsg() to an IPv4 address: where the datagrams of a socket that isn't connected
//! go. An IPv6 socket that sends to `::ffff:a.b.c.d` comes here too.

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use lb_common::Address;

use crate::context::{self, Endpoint, FAIL, PROCEED, Refused};
use crate::maps::Reach;
use crate::translate::{choose4, may_be_ours};
use crate::{flows, voice};

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
    if !may_be_ours(address) {
        return Ok(());
    }
    let dialled = Endpoint { address: Address::v4(address), port: context::port(ctx) };
    if let Some(followed) = flows::follow(ctx, &dialled)
        && let Some(backend) = followed.backend.to_v4()
    {
        context::set4(ctx, backend, followed.port);
        return Ok(());
    }
    let Some(choice) = choose4(ctx, address, Reach::Ipv4)? else { return Ok(()) };
    let Some(backend) = choice.backend.address.to_v4() else {
        return Err(voice::inconsistent(ctx, choice.service));
    };
    context::set4(ctx, backend, choice.backend.port);
    flows::keep(ctx, &choice.peer(dialled));
    Ok(())
}

//! connect() of an IPv4 socket, TCP or UDP: a connection to a frontend becomes a connection to a backend of it.

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use lb_common::Address;

use crate::context::{self, Endpoint, PROCEED, Refused};
use crate::maps::Reach;
use crate::translate::{Call, choose4, may_be_ours};
use crate::{log, revnat};

/// Attached to BPF_CGROUP_INET4_CONNECT.
#[cgroup_sock_addr(connect4)]
pub fn nohop_connect4(ctx: SockAddrContext) -> i32 {
    match try_connect4(&ctx) {
        Ok(()) => PROCEED,
        Err(Refused) => context::refuse(|| {
            // Nothing can listen on port 0.
            context::set4(&ctx, [127, 0, 0, 1], 0);
            PROCEED
        }),
    }
}

#[inline(always)]
fn try_connect4(ctx: &SockAddrContext) -> Result<(), Refused> {
    let address = context::address4(ctx);
    let connected = Endpoint { address: Address::v4(address), port: context::port(ctx) };
    if !may_be_ours(address) {
        revnat::forget(ctx, &connected, || context::peer4(ctx));
        return Ok(());
    }
    let Some(choice) = choose4(ctx, address, Call::Connect, || Reach::Ipv4)? else {
        revnat::forget(ctx, &connected, || context::peer4(ctx));
        return Ok(());
    };
    let Some(backend) = choice.backend.address.to_v4() else {
        return Err(log::inconsistent(ctx, choice.service));
    };
    context::set4(ctx, backend, choice.backend.port);
    revnat::remember(ctx, choice.peer(connected), choice.socket, || context::peer4(ctx));
    Ok(())
}

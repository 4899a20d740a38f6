//! connect() of an IPv4 socket, TCP or UDP: a connection to a frontend becomes one to a backend of it.

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use lb_common::{Address, Call, Destination, FamilyFilter};

use crate::context::{self, Endpoint, PROCEED, Reject};
use crate::xlate::{self, in_vip_range, xlate};
use crate::{log, revnat};

/// Attached to BPF_CGROUP_INET4_CONNECT.
#[cgroup_sock_addr(connect4)]
pub fn nohop_connect4(ctx: SockAddrContext) -> i32 {
    match try_connect4(&ctx) {
        Ok(()) => PROCEED,
        Err(Reject) => context::reject(|| {
            // Nothing can listen on port 0.
            context::set_dst4(&ctx, [127, 0, 0, 1], 0);
            PROCEED
        }),
    }
}

#[inline(always)]
fn try_connect4(ctx: &SockAddrContext) -> Result<(), Reject> {
    let address = context::dst4(ctx);
    let connected = Endpoint { address: Address::v4(address), port: context::port(ctx) };
    if !in_vip_range(address) {
        revnat::clear(ctx, &connected, || context::peer4(ctx));
        return Ok(());
    }
    let Some(selection) =
        xlate(ctx, Destination::V4(address), Call::Connect, |_| FamilyFilter::Ipv4)?
    else {
        revnat::clear(ctx, &connected, || context::peer4(ctx));
        return Ok(());
    };
    let Some(backend) = selection.backend.address.to_v4() else {
        return Err(log::inconsistent(selection.service));
    };
    context::set_dst4(ctx, backend, selection.backend.port);
    let entry = xlate::revnat(&selection.backend, selection.backend_idx, &connected);
    revnat::store(ctx, entry, selection.origin, || context::peer4(ctx));
    Ok(())
}

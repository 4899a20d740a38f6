//! connect() of an IPv6 socket, TCP or UDP. `::ffff:a.b.c.d`, which is how dual-stack clients dial
//! IPv4, is looked up as the IPv4 address that it is.

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use lb_common::{Address, IPPROTO_TCP};

use crate::context::{self, Endpoint, PROCEED, Refused};
use crate::maps::Reach;
use crate::peers;
use crate::settings;
use crate::translate::{choose4, choose6, may_be_ours};

const LOOPBACK6: Address = Address { octets: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1] };

/// Attached to BPF_CGROUP_INET6_CONNECT.
#[cgroup_sock_addr(connect6)]
pub fn nohop_connect6(ctx: SockAddrContext) -> i32 {
    match try_connect6(&ctx) {
        Ok(()) => PROCEED,
        Err(Refused) => context::refuse(|| {
            // Nothing can listen on port 0. A UDP socket that sends there by IPv4's form gets EINVAL
            // instead, and a TCP one may have no route to IPv6.
            let by_ipv4 =
                context::address6(&ctx).to_v4().is_some() && context::protocol(&ctx) == IPPROTO_TCP;
            let loopback = if by_ipv4 { Address::v4([127, 0, 0, 1]) } else { LOOPBACK6 };
            context::set6(&ctx, loopback, 0);
            PROCEED
        }),
    }
}

#[inline(always)]
fn try_connect6(ctx: &SockAddrContext) -> Result<(), Refused> {
    let dialled = Endpoint { address: context::address6(ctx), port: context::port(ctx) };
    let choice = match dialled.address.to_v4() {
        Some(address) if may_be_ours(address) => choose4(ctx, address, Reach::All)?,
        None if settings::in_pool6(&dialled.address) => choose6(ctx, &dialled, Reach::All)?,
        _ => None,
    };
    let Some(choice) = choice else {
        peers::forget(ctx);
        return Ok(());
    };
    context::set6(ctx, choice.backend.address, choice.backend.port);
    peers::remember(ctx, choice.peer(dialled));
    Ok(())
}

//! recvfrom() and recvmsg() of an IPv4 socket: a reply comes from the VIP that was sent to.

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use lb_common::Address;

use crate::context::{self, Endpoint, PROCEED};
use crate::flows;

/// Attached to BPF_CGROUP_UDP4_RECVMSG.
#[cgroup_sock_addr(recvmsg4)]
pub fn nohop_recvmsg4(ctx: SockAddrContext) -> i32 {
    show_frontend(&ctx);
    PROCEED
}

#[inline(always)]
fn show_frontend(ctx: &SockAddrContext) -> Option<()> {
    let sender =
        Endpoint { address: Address::v4(context::address4(ctx)), port: context::port(ctx) };
    let dialled = flows::dialled(ctx, &sender)?;
    // An IPv4 socket dialled an IPv4 address.
    context::set4(ctx, dialled.address.to_v4()?, dialled.port);
    Some(())
}

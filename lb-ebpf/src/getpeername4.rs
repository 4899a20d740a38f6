//! getpeername() of an IPv4 socket: the application sees what it dialled.

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use lb_common::Address;

use crate::context::{self, Endpoint, PROCEED};
use crate::peers;

/// Attached to BPF_CGROUP_INET4_GETPEERNAME. It runs on every accept() too.
#[cgroup_sock_addr(getpeername4)]
pub fn nohop_getpeer4(ctx: SockAddrContext) -> i32 {
    show_frontend(&ctx);
    PROCEED
}

#[inline(always)]
fn show_frontend(ctx: &SockAddrContext) -> Option<()> {
    let peer = Endpoint { address: Address::v4(context::address4(ctx)), port: context::port(ctx) };
    let dialled = peers::dialled(ctx, &peer)?;
    // An IPv4 socket dialled an IPv4 address.
    context::set4(ctx, dialled.address.to_v4()?, dialled.port);
    Some(())
}

//! getpeername() of an IPv6 socket: the application sees what it connected.

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;

use crate::context::{self, Endpoint, PROCEED};
use crate::revnat;

/// Attached to BPF_CGROUP_INET6_GETPEERNAME. It runs on every accept() too.
#[cgroup_sock_addr(getpeername6)]
pub fn nohop_getpeer6(ctx: SockAddrContext) -> i32 {
    let peer = Endpoint { address: context::dst6(&ctx), port: context::port(&ctx) };
    let shown = revnat::shown_peer(&ctx, &peer);
    context::set_dst6(&ctx, shown.address, shown.port);
    PROCEED
}

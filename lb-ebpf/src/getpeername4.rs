//! getpeername() of an IPv4 socket: the application sees what it connected.

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use lb_common::Address;

use crate::context::{self, Endpoint, PROCEED};
use crate::revnat;

/// Attached to BPF_CGROUP_INET4_GETPEERNAME. It runs on every accept() too.
#[cgroup_sock_addr(getpeername4)]
pub fn nohop_getpeer4(ctx: SockAddrContext) -> i32 {
    let peer = Endpoint { address: Address::v4(context::dst4(&ctx)), port: context::port(&ctx) };
    let shown = revnat::shown_peer(&ctx, &peer);
    // An IPv4 socket connected an IPv4 address.
    if let Some(address) = shown.address.to_v4() {
        context::set_dst4(&ctx, address, shown.port);
    }
    PROCEED
}

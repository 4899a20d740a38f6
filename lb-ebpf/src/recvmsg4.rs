//! recvfrom() and recvmsg() of an IPv4 socket: a reply comes from the VIP that was sent to.

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use lb_common::Address;

use crate::context::{self, Endpoint, PROCEED};
use crate::flows;

/// Attached to BPF_CGROUP_UDP4_RECVMSG.
#[cgroup_sock_addr(recvmsg4)]
pub fn nohop_recvmsg4(ctx: SockAddrContext) -> i32 {
    let sender = Endpoint { address: Address::v4(context::dst4(&ctx)), port: context::port(&ctx) };
    let shown = flows::reverse_xlate(&ctx, &sender, &context::peer4(&ctx));
    // An IPv4 socket connected an IPv4 address.
    if let Some(address) = shown.address.to_v4() {
        context::set_dst4(&ctx, address, shown.port);
    }
    PROCEED
}

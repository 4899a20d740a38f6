//! recvfrom() and recvmsg() of an IPv6 socket, from IPv4 senders too: a reply comes from the VIP that
//! was sent to.

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;

use crate::context::{self, Endpoint, PROCEED};
use crate::flows;

/// Attached to BPF_CGROUP_UDP6_RECVMSG.
#[cgroup_sock_addr(recvmsg6)]
pub fn nohop_recvmsg6(ctx: SockAddrContext) -> i32 {
    let sender = Endpoint { address: context::dst6(&ctx), port: context::port(&ctx) };
    let shown = flows::reverse_xlate(&ctx, &sender, &context::peer6(&ctx));
    context::set_dst6(&ctx, shown.address, shown.port);
    PROCEED
}

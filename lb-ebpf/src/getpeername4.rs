//! getpeername() of an IPv4 socket: the application sees what it dialled.

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;

use crate::maps;

/// The kernel hands out the address as it now is; this hook can't say otherwise.
const PROCEED: i32 = 1;

/// Attached to BPF_CGROUP_INET4_GETPEERNAME. It runs on every accept() too.
#[cgroup_sock_addr(getpeername4)]
pub fn nohop_getpeer4(ctx: SockAddrContext) -> i32 {
    show_frontend(&ctx);
    PROCEED
}

#[inline(always)]
fn show_frontend(ctx: &SockAddrContext) -> Option<()> {
    // SAFETY: a non-null pointer is to this socket's own storage; connect() alone writes it.
    let dial = *unsafe { maps::SOCKETS.get_ptr_mut(ctx).as_ref() }?;
    // SAFETY: the kernel hands every program a valid context, and both fields are writable here.
    unsafe {
        let sock_addr = ctx.sock_addr;
        // What was kept is about another dial if the peer is another one.
        if (*sock_addr).user_ip4 == u32::from_ne_bytes(dial.backend.address)
            && (*sock_addr).user_port as u16 == dial.backend.port.to_be()
        {
            (*sock_addr).user_ip4 = u32::from_ne_bytes(dial.frontend_address);
            (*sock_addr).user_port = u32::from(dial.frontend_port.to_be());
        }
    }
    Some(())
}

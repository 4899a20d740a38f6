//! connect() of an IPv4 socket: a dial to a frontend becomes a dial to one of its backends.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::bpf_sock_addr;
use aya_ebpf::helpers::{bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_set_retval};
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use lb_common::{Backend, Counter, Dial, Frontend, IPPROTO_TCP, choose};

use crate::{maps, settings};

/// The kernel goes on with the address as it now is.
const PROCEED: i32 = 1;
/// The kernel fails the call, with the errno that was set.
const FAIL: i32 = 0;
const ECONNREFUSED: i32 = 111;

/// A dial that must not reach anything.
struct Refused;

/// Attached to BPF_CGROUP_INET4_CONNECT.
#[cgroup_sock_addr(connect4)]
pub fn nohop_connect4(ctx: SockAddrContext) -> i32 {
    match try_connect4(&ctx) {
        Ok(()) => PROCEED,
        Err(Refused) => refuse(&ctx),
    }
}

#[inline(always)]
fn try_connect4(ctx: &SockAddrContext) -> Result<(), Refused> {
    // SAFETY: the kernel hands every program a valid context.
    let (protocol, address_be, port_be) = unsafe {
        let sock_addr = ctx.sock_addr;
        ((*sock_addr).protocol, (*sock_addr).user_ip4, (*sock_addr).user_port)
    };
    if protocol != u32::from(IPPROTO_TCP) {
        return Ok(());
    }
    let frontend = Frontend {
        address: address_be.to_ne_bytes(),
        port: u16::from_be(port_be as u16),
        protocol: IPPROTO_TCP,
        padding: 0,
    };
    let Some(target) = maps::target(&frontend) else {
        return pass(ctx, address_be);
    };
    // SAFETY: the context is valid.
    let from_host = settings::is_host(unsafe { bpf_get_netns_cookie(ctx.as_ptr()) });
    if target.host_only != 0 && !from_host {
        return pass(ctx, address_be);
    }
    let region = maps::region(target.service, from_host).ok_or_else(inconsistent)?;
    if region.n_slots == 0 {
        maps::count_refused(target.service);
        return Err(Refused);
    }
    // SAFETY: the helper has no preconditions.
    let random = unsafe { bpf_get_prandom_u32() };
    let backend_idx = choose(random, region.n_slots, |slot| maps::slot(region.first_slot + slot))
        .ok_or_else(inconsistent)?;
    let backend = maps::backend(backend_idx).ok_or_else(inconsistent)?;
    if backend.port == 0 {
        return Err(inconsistent());
    }
    remember(ctx, &frontend, backend);
    redirect(ctx, backend);
    maps::count_dial(target.service, backend_idx);
    Ok(())
}

/// A dial to what is no frontend: none of our business, unless the address is the pool's.
#[inline(always)]
fn pass(ctx: &SockAddrContext, address_be: u32) -> Result<(), Refused> {
    if settings::in_pool(u32::from_be(address_be)) {
        maps::count(Counter::RefusedNoFrontend);
        return Err(Refused);
    }
    // The socket may have dialled a frontend before, and failed. Most have no storage at all, which
    // the helper sees first. SAFETY: `sk` is the context's own socket.
    let _ = unsafe { maps::SOCKETS.delete((*ctx.sock_addr).__bindgen_anon_1.sk) };
    Ok(())
}

/// Keeps what was dialled, for getpeername. Where there is no memory for it the dial goes on.
#[inline(always)]
fn remember(ctx: &SockAddrContext, frontend: &Frontend, backend: Backend) {
    let mut dial = Dial {
        frontend_address: frontend.address,
        frontend_port: frontend.port,
        padding: 0,
        backend,
    };
    // SAFETY: a non-null pointer is to this socket's own storage, which only the socket's owner, in
    // connect() with the socket locked, writes.
    unsafe {
        let kept = maps::SOCKETS.get_or_insert_ptr_mut(ctx, Some(&mut dial));
        if kept.is_null() {
            maps::count(Counter::NoStorage);
        } else {
            // Storage that was there already has an earlier dial in it.
            *kept = dial;
        }
    }
}

#[inline(always)]
fn redirect(ctx: &SockAddrContext, backend: Backend) {
    let sock_addr: *mut bpf_sock_addr = ctx.sock_addr;
    // SAFETY: these two fields are writable in this kind of program, each as a whole.
    unsafe {
        (*sock_addr).user_ip4 = u32::from_ne_bytes(backend.address);
        (*sock_addr).user_port = u32::from(backend.port.to_be());
    }
}

/// Makes connect() fail with ECONNREFUSED.
#[inline(always)]
fn refuse(ctx: &SockAddrContext) -> i32 {
    if settings::can_set_errno() {
        // SAFETY: the helper takes any errno.
        unsafe { bpf_set_retval(-ECONNREFUSED) };
        return FAIL;
    }
    redirect(ctx, Backend { address: [127, 0, 0, 1], port: 0, padding: 0 });
    PROCEED
}

#[cold]
fn inconsistent() -> Refused {
    maps::count(Counter::Inconsistent);
    Refused
}

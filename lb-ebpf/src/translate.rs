//! From what an application dials to the backend that the dial goes to.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::generated::bpf_skc_to_tcp_sock;
use aya_ebpf::helpers::{
    bpf_get_current_ancestor_cgroup_id, bpf_get_current_pid_tgid, bpf_get_netns_cookie,
    bpf_get_socket_cookie, bpf_ktime_get_ns, bpf_probe_read_kernel,
};
use aya_ebpf::programs::SockAddrContext;
use lb_common::{
    ANY_PORT, Backend, Counter, Daemon, Frontend, Frontend6, IPPROTO_TCP, IPPROTO_UDP,
    MAX_EXCLUDED, Peer, Target, choose,
};

use crate::context::{self, Endpoint, Refused};
use crate::maps::{self, Reach};
use crate::{random, settings, voice};

/// How long the daemon's word that it lives is taken for true.
const HEARTBEAT_LASTS_NS: u64 = 10_000_000_000;

/// Where a dial goes.
#[derive(Clone, Copy)]
pub struct Choice {
    pub service: u32,
    pub backend_idx: u32,
    pub backend: &'static Backend,
}

impl Choice {
    /// What a socket that was sent there remembers.
    #[inline(always)]
    pub fn peer(&self, dialled: Endpoint) -> Peer {
        Peer {
            frontend: dialled.address,
            backend: self.backend.address,
            frontend_port: dialled.port,
            backend_port: self.backend.port,
            layout: settings::layout(),
            padding: 0,
            backend_idx: self.backend_idx,
            generation: self.backend.generation,
        }
    }
}

/// Whether a dial to an IPv4 address may be ours. What is no VIP pays for this alone.
#[inline(always)]
pub fn may_be_ours(address: [u8; 4]) -> bool {
    settings::in_pool(address) || settings::may_be_pin(address)
}

/// Where a dial to an IPv4 address goes; `None` when it passes untouched.
#[inline(always)]
pub fn choose4(
    ctx: &SockAddrContext,
    address: [u8; 4],
    reach: Reach,
) -> Result<Option<Choice>, Refused> {
    let protocol = context::protocol(ctx);
    if protocol != IPPROTO_TCP && protocol != IPPROTO_UDP {
        return Ok(None);
    }
    let mut frontend = Frontend { address, port: context::port(ctx), protocol, padding: 0 };
    let mut target = maps::target(&frontend);
    if target.is_none() {
        if !settings::in_pool(address) {
            return Ok(None);
        }
        if settings::is_pools_own(address) {
            show_probe(ctx);
            return if maps::is_shadow() { Ok(None) } else { Err(Refused) };
        }
        frontend.port = ANY_PORT;
        target = maps::target(&frontend);
    }
    choose_backend(ctx, target, reach)
}

/// Where a dial to an address of the IPv6 pool goes; `None` when it passes untouched.
#[inline(always)]
pub fn choose6(
    ctx: &SockAddrContext,
    dialled: &Endpoint,
    reach: Reach,
) -> Result<Option<Choice>, Refused> {
    let protocol = context::protocol(ctx);
    if protocol != IPPROTO_TCP && protocol != IPPROTO_UDP {
        return Ok(None);
    }
    let address = dialled.address.octets;
    let mut frontend = Frontend6 { address, port: dialled.port, protocol, padding: 0 };
    let mut target = maps::target6(&frontend);
    if target.is_none() {
        frontend.port = ANY_PORT;
        target = maps::target6(&frontend);
    }
    choose_backend(ctx, target, reach)
}

#[inline(always)]
fn choose_backend(
    ctx: &SockAddrContext,
    target: Option<Target>,
    reach: Reach,
) -> Result<Option<Choice>, Refused> {
    let Some(daemon) = maps::daemon() else { return Ok(None) };
    if is_daemons(daemon) || is_kernels(ctx) || is_excluded() {
        maps::count(Counter::LeftAlone);
        return Ok(None);
    }
    if maps::shadows(daemon) {
        count_shadowed(ctx, daemon, target);
        return Ok(None);
    }
    let Some(target) = target else {
        maps::count(Counter::RefusedNoFrontend);
        return Err(Refused);
    };
    let service = target.service;
    let scopes = maps::scopes(service, reach).ok_or_else(|| voice::inconsistent(ctx, service))?;
    // Asking where a dial comes from is spared where it makes no difference. One of the two words
    // may be newer than the other: if they are the same, each is what either dial is to have.
    let from_host = target.host_only == 0 && !scopes.differ()
        // SAFETY: the context is valid.
        || unsafe { bpf_get_netns_cookie(ctx.as_ptr()) } == daemon.host_netns;
    if target.host_only != 0 && !from_host {
        return Ok(None);
    }
    if scopes.is_awaited {
        maps::report_dial(service);
    }
    let region = if from_host { scopes.host } else { scopes.elsewhere };
    if region.n_slots == 0 {
        maps::count_refused(service, has_others(ctx, daemon, service));
        return Err(Refused);
    }
    let backend_idx =
        choose(random::next(), region.n_slots, |slot| maps::slot(region.first_slot + slot))
            .ok_or_else(|| voice::inconsistent(ctx, service))?;
    match maps::backend(backend_idx) {
        Some(backend) if backend.port != 0 => {
            maps::count_dial(service, backend_idx);
            Ok(Some(Choice { service, backend_idx, backend }))
        }
        _ => Err(voice::inconsistent(ctx, service)),
    }
}

/// Counts a dial that passes because dials are only counted, if it had not passed anyway.
#[inline(always)]
fn count_shadowed(ctx: &SockAddrContext, daemon: &Daemon, target: Option<Target>) {
    let Some(Target { service, host_only }) = target else {
        maps::count(Counter::ShadowedNoFrontend);
        return;
    };
    // SAFETY: the context is valid.
    if host_only == 0 || unsafe { bpf_get_netns_cookie(ctx.as_ptr()) } == daemon.host_netns {
        maps::count(Counter::Shadowed);
        maps::count_shadowed(service);
    }
}

/// Whether a service that has no backend for this socket's address family has some for others.
#[inline(always)]
fn has_others(ctx: &SockAddrContext, daemon: &Daemon, service: u32) -> bool {
    maps::scopes(service, Reach::All).is_some_and(|all| {
        // SAFETY: the context is valid.
        let from_host = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) } == daemon.host_netns;
        let all = if from_host { all.host } else { all.elsewhere };
        all.n_slots != 0
    })
}

/// Whether the daemon itself dials. Once it is gone, another process may get its number.
#[inline(always)]
fn is_daemons(daemon: &Daemon) -> bool {
    bpf_get_current_pid_tgid() >> 32 == daemon.tgid
        // SAFETY: the helper has no preconditions.
        && unsafe { bpf_ktime_get_ns() }.wrapping_sub(daemon.heartbeat_ns) < HEARTBEAT_LASTS_NS
}

/// Whether the kernel itself uses this socket, as NFS does.
#[inline(always)]
fn is_kernels(ctx: &SockAddrContext) -> bool {
    let Some((offset, mask)) = settings::kernel_socket_bit() else { return false };
    let byte = match context::protocol(ctx) {
        IPPROTO_TCP => byte_of_tcp_socket(ctx, offset),
        _ => byte_of_socket(ctx, offset),
    };
    if byte & mask == 0 {
        return false;
    }
    // The kernel also makes the TCP sockets that an application's MPTCP socket consists of.
    match settings::subflow_offset() {
        Some(offset) if context::protocol(ctx) == IPPROTO_TCP => byte_of_socket(ctx, offset) == 0,
        _ => true,
    }
}

/// A byte of the kernel's own structure of a TCP socket, which begins with that of any socket. The
/// verifier knows the structure, and lets a program load from it, which is quicker than a helper.
#[inline(always)]
fn byte_of_tcp_socket(ctx: &SockAddrContext, offset: u32) -> u8 {
    // SAFETY: the helper takes the context's own socket; the offset is that of a field in what it
    // returns, as the kernel's own type information says.
    unsafe {
        let socket = bpf_skc_to_tcp_sock(context::socket(ctx).cast()).cast::<u8>();
        if socket.is_null() { 0 } else { socket.add(offset as usize).read_volatile() }
    }
}

/// A byte of the kernel's own structure of the socket; 0 where it can't be read.
#[inline(always)]
fn byte_of_socket(ctx: &SockAddrContext, offset: u32) -> u8 {
    let byte = (context::socket_address(ctx) + offset as usize) as *const u8;
    // SAFETY: the helper reads safely, whatever the address.
    unsafe { bpf_probe_read_kernel(byte) }.unwrap_or(0)
}

/// Whether the process is in a cgroup that is left alone, or below one.
#[inline(always)]
pub fn is_excluded() -> bool {
    if !settings::has_excluded() {
        return false;
    }
    for index in 0..MAX_EXCLUDED as u32 {
        let Some(excluded) = maps::excluded(index) else { return false };
        // SAFETY: the helper takes any level, and says 0 where there is none.
        let ancestor = unsafe { bpf_get_current_ancestor_cgroup_id(excluded.level as i32) };
        if ancestor == excluded.cgroup_id {
            return true;
        }
    }
    false
}

/// The pool's own address is no service's VIP: the daemon connects to it to see whether this hook
/// runs.
#[inline(always)]
fn show_probe(ctx: &SockAddrContext) {
    // SAFETY: the context is valid.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    // SAFETY: as above.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let tgid = bpf_get_current_pid_tgid() >> 32;
    maps::show_probe(cookie, tgid, netns);
}

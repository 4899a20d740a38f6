//! From what an application connects to to the backend that the connection goes to.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::generated::{bpf_skc_to_tcp_sock, bpf_skc_to_udp6_sock};
use aya_ebpf::helpers::{
    bpf_get_current_ancestor_cgroup_id, bpf_get_current_pid_tgid, bpf_get_netns_cookie,
    bpf_get_socket_cookie, bpf_ktime_get_ns, bpf_probe_read_kernel,
};
use aya_ebpf::programs::SockAddrContext;
use lb_common::{
    ANY_PORT, Backend, Counter, Frontend, Frontend6, IPPROTO_TCP, IPPROTO_UDP, MAX_EXCLUDED,
    RevNat, ServiceRef, choose,
};

use crate::context::{self, Endpoint, Refused};
use crate::maps::{self, ControlWords, Reach};
use crate::{config, log, random};

/// How long the daemon's word that it lives is taken for true.
const HEARTBEAT_LASTS_NS: u64 = 10_000_000_000;

/// Where a connection goes.
#[derive(Clone, Copy)]
pub struct Choice {
    pub service: u32,
    pub backend_idx: u32,
    pub backend: Backend,
    /// Whose socket it is.
    pub socket: Socket,
}

/// What connections.
#[derive(Clone, Copy, PartialEq)]
pub enum Call {
    /// connect(). Of a UDP socket it is counted apart: it may never send.
    Connect,
    /// A datagram.
    Send,
}

/// Whose socket it is.
#[derive(Clone, Copy, PartialEq)]
pub enum Socket {
    /// An application's.
    Application,
    /// The kernel's part of an application's MPTCP socket.
    Subflow,
    /// The kernel's own, as NFS has them.
    Kernel,
}

impl Choice {
    /// What a socket that was sent there remembers.
    #[inline(always)]
    pub fn peer(&self, connected: Endpoint) -> RevNat {
        RevNat {
            frontend: connected.address,
            backend: self.backend.address,
            frontend_port: connected.port,
            backend_port: self.backend.port,
            layout: config::layout(),
            naming: 0,
            backend_idx: self.backend_idx,
            generation: self.backend.generation,
        }
    }
}

/// Whether a connection to an IPv4 address may be ours. What is no VIP pays for this alone.
#[inline(always)]
pub fn may_be_ours(address: [u8; 4]) -> bool {
    config::in_pool(address) || config::may_be_pin(address)
}

/// Where a connection to an IPv4 address goes; `None` when it passes untouched.
#[inline(always)]
pub fn choose4(
    ctx: &SockAddrContext,
    address: [u8; 4],
    call: Call,
    reach: impl FnOnce() -> Reach,
) -> Result<Option<Choice>, Refused> {
    let protocol = context::protocol(ctx);
    if protocol != IPPROTO_TCP && protocol != IPPROTO_UDP {
        return Ok(None);
    }
    let target = target4(ctx, address, protocol);
    if target.is_none() {
        if !config::in_pool(address) {
            return Ok(None);
        }
        if config::is_pools_own(address) {
            show_probe(ctx);
            return if maps::is_shadow() { Ok(None) } else { Err(Refused) };
        }
    }
    choose_backend(ctx, target, call, false, |_| reach())
}

/// Where a connection to an address of the IPv6 pool goes; `None` when it passes untouched. `reach` is told
/// of a socket that connects whether it is closed to IPv4.
#[inline(always)]
pub fn choose6(
    ctx: &SockAddrContext,
    connected: &Endpoint,
    call: Call,
    reach: impl FnOnce(bool) -> Reach,
) -> Result<Option<Choice>, Refused> {
    let protocol = context::protocol(ctx);
    if protocol != IPPROTO_TCP && protocol != IPPROTO_UDP {
        return Ok(None);
    }
    choose_backend(ctx, target6(connected, protocol), call, call == Call::Connect, reach)
}

/// The service behind an IPv4 address and the context's port.
#[inline(always)]
fn target4(ctx: &SockAddrContext, address: [u8; 4], protocol: u8) -> Option<ServiceRef> {
    let mut frontend = Frontend { address, port: context::port(ctx), protocol, padding: 0 };
    let target = maps::target(&frontend);
    if target.is_some() || !config::in_pool(address) || config::is_pools_own(address) {
        return target;
    }
    frontend.port = ANY_PORT;
    maps::target(&frontend)
}

/// The service behind an IPv6 address and port.
#[inline(always)]
fn target6(connected: &Endpoint, protocol: u8) -> Option<ServiceRef> {
    let address = connected.address.octets;
    let mut frontend = Frontend6 { address, port: connected.port, protocol, padding: 0 };
    let target = maps::target6(&frontend);
    if target.is_some() {
        return target;
    }
    frontend.port = ANY_PORT;
    maps::target6(&frontend)
}

/// Refuses a datagram to an IPv4 VIP: the socket is connected to an instance at an IPv6 address by it.
#[inline(always)]
pub fn refuse_family4(ctx: &SockAddrContext, address: [u8; 4]) -> Refused {
    refuse_family(target4(ctx, address, IPPROTO_UDP))
}

/// Refuses a datagram to an IPv6 VIP: the socket is connected to an instance at an IPv4 address by it.
#[inline(always)]
pub fn refuse_family6(connected: &Endpoint) -> Refused {
    refuse_family(target6(connected, IPPROTO_UDP))
}

#[inline(always)]
fn refuse_family(target: Option<ServiceRef>) -> Refused {
    match target {
        Some(ServiceRef { service, .. }) => maps::count_refused(service, true),
        None => maps::count(Counter::RefusedNoFrontend),
    }
    Refused
}

#[inline(always)]
fn choose_backend(
    ctx: &SockAddrContext,
    target: Option<ServiceRef>,
    call: Call,
    asks_ipv6_only: bool,
    reach: impl FnOnce(bool) -> Reach,
) -> Result<Option<Choice>, Refused> {
    let Some(daemon) = maps::daemon() else { return Ok(None) };
    if is_daemons(daemon) {
        maps::count(Counter::Bypassed);
        return Ok(None);
    }
    let (socket, is_ipv6_only) = whose(ctx, asks_ipv6_only);
    if socket == Socket::Kernel || is_excluded() {
        maps::count(Counter::Bypassed);
        return Ok(None);
    }
    let is_udp_connect = call == Call::Connect && context::protocol(ctx) == IPPROTO_UDP;
    if daemon.is_shadow() != 0 {
        count_shadowed(ctx, daemon, target, is_udp_connect);
        return Ok(None);
    }
    let Some(target) = target else {
        let refused = Counter::RefusedNoFrontend;
        maps::count(if is_udp_connect { Counter::UdpNoFrontend } else { refused });
        return Err(Refused);
    };
    let service = target.service;
    let scopes = maps::scopes(service, reach(is_ipv6_only))
        .ok_or_else(|| log::inconsistent(ctx, service))?;
    // Asking where a connection comes from is spared where it makes no difference. One of the two words
    // may be newer than the other: if they are the same, each is what either connect is to have.
    let from_host = target.host_only == 0 && !scopes.differ()
        // SAFETY: the context is valid.
        || unsafe { bpf_get_netns_cookie(ctx.as_ptr()) } == daemon.host_netns();
    if target.host_only != 0 && !from_host {
        return Ok(None);
    }
    if scopes.report_next {
        maps::report_connect(service);
    }
    let region = if from_host { scopes.host } else { scopes.elsewhere };
    if region.n_slots == 0 {
        let by_family = has_others(ctx, daemon, service);
        if is_udp_connect {
            maps::count_udp_connect(service, Some(by_family));
        } else {
            maps::count_refused(service, by_family);
        }
        return Err(Refused);
    }
    let backend_idx =
        choose(random::next(), region.n_slots, |slot| maps::slot(region.first_slot + slot))
            .ok_or_else(|| log::inconsistent(ctx, service))?;
    match maps::backend(backend_idx) {
        Some(backend) if backend.port != 0 => {
            if is_udp_connect {
                maps::count_udp_connect(service, None);
            } else {
                maps::count_connect(service, backend_idx);
            }
            Ok(Some(Choice { service, backend_idx, backend, socket }))
        }
        _ => Err(log::inconsistent(ctx, service)),
    }
}

/// Counts a connection that passes because connections are only counted, if it had not passed anyway.
#[inline(always)]
fn count_shadowed(
    ctx: &SockAddrContext,
    daemon: ControlWords,
    target: Option<ServiceRef>,
    is_udp_connect: bool,
) {
    let Some(ServiceRef { service, host_only }) = target else {
        let shadowed = Counter::ShadowedNoFrontend;
        maps::count(if is_udp_connect { Counter::UdpNoFrontend } else { shadowed });
        return;
    };
    // SAFETY: the context is valid.
    if host_only == 0 || unsafe { bpf_get_netns_cookie(ctx.as_ptr()) } == daemon.host_netns() {
        maps::count(Counter::Shadowed);
        maps::count_shadowed(service);
    }
}

/// Whether a service that has no backend for this socket's address family has some for others.
#[inline(always)]
fn has_others(ctx: &SockAddrContext, daemon: ControlWords, service: u32) -> bool {
    maps::scopes(service, Reach::All).is_some_and(|all| {
        // SAFETY: the context is valid.
        let from_host = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) } == daemon.host_netns();
        let all = if from_host { all.host } else { all.elsewhere };
        all.n_slots != 0
    })
}

/// Whether the daemon itself connections. Once it is gone, another process may get its number.
#[inline(always)]
fn is_daemons(daemon: ControlWords) -> bool {
    bpf_get_current_pid_tgid() >> 32 == daemon.tgid()
        // SAFETY: the helper has no preconditions.
        && unsafe { bpf_ktime_get_ns() }.wrapping_sub(daemon.heartbeat_ns()) < HEARTBEAT_LASTS_NS
}

/// Whose socket it is; and, where that is asked, whether it is an IPv6 socket that is closed to IPv4
/// (IPV6_V6ONLY, net.ipv6.bindv6only).
#[inline(always)]
fn whose(ctx: &SockAddrContext, asks_ipv6_only: bool) -> (Socket, bool) {
    let (kernel_offset, kernel_mask) = config::kernel_socket_bit().unwrap_or_default();
    let ipv6_only = if asks_ipv6_only { config::ipv6_only_bit() } else { None };
    let (only_offset, only_mask) = ipv6_only.unwrap_or_default();
    let is_tcp = context::protocol(ctx) == IPPROTO_TCP;
    let (mut kernel, mut only) = (0, 0);
    if is_tcp {
        if kernel_mask != 0 || only_mask != 0 {
            let socket = tcp_socket(ctx);
            if !socket.is_null() {
                kernel = if kernel_mask != 0 { byte_at(socket, kernel_offset) } else { 0 };
                only = if only_mask != 0 { byte_at(socket, only_offset) } else { 0 };
            }
        }
    } else {
        kernel = if kernel_mask != 0 { byte_of_socket(ctx, kernel_offset) } else { 0 };
        only = if only_mask != 0 { byte_of_udp6_socket(ctx, only_offset) } else { 0 };
    }
    let is_ipv6_only = only & only_mask != 0;
    if kernel & kernel_mask == 0 {
        return (Socket::Application, is_ipv6_only);
    }
    // The kernel also makes the TCP sockets that an application's MPTCP socket consists of.
    match config::subflow_offset() {
        Some(offset) if is_tcp && byte_of_socket(ctx, offset) != 0 => {
            (Socket::Subflow, is_ipv6_only)
        }
        _ => (Socket::Kernel, is_ipv6_only),
    }
}

/// The kernel's own structure of a TCP socket, which begins with that of any socket. The verifier knows
/// the structure, and lets a program load from it, which is quicker than a helper.
#[inline(always)]
fn tcp_socket(ctx: &SockAddrContext) -> *const u8 {
    // SAFETY: the helper takes the context's own socket.
    unsafe { bpf_skc_to_tcp_sock(context::socket(ctx).cast()) }.cast::<u8>().cast_const()
}

/// A byte of such a structure.
#[inline(always)]
fn byte_at(socket: *const u8, offset: u32) -> u8 {
    // SAFETY: the offset is that of a field in the structure, as the kernel's own type information
    // says.
    unsafe { socket.add(offset as usize).read_volatile() }
}

/// A byte of the kernel's own structure of a UDP socket of AF_INET6; 0 for any other.
#[inline(always)]
fn byte_of_udp6_socket(ctx: &SockAddrContext, offset: u32) -> u8 {
    // SAFETY: the helper takes the context's own socket.
    let socket = unsafe { bpf_skc_to_udp6_sock(context::socket(ctx).cast()) };
    if socket.is_null() { 0 } else { byte_at(socket.cast::<u8>().cast_const(), offset) }
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
    if !config::has_excluded() {
        return false;
    }
    for index in 0..MAX_EXCLUDED as u32 {
        let Some(excluded) = maps::excluded(index) else { return false };
        if excluded.cgroup_id == 0 {
            continue;
        }
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

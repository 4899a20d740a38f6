//! From what an application connects to to the backend that the connection goes to: the tables and
//! the caller as `decide` reads them, and what follows from its verdict.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::generated::bpf_skc_to_udp6_sock;
use aya_ebpf::helpers::{
    bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id, bpf_get_current_pid_tgid,
    bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_probe_read_kernel,
};
use aya_ebpf::programs::SockAddrContext;
use lb_common::{
    Address, Backend, Call, Caller, Counter, Destination, FamilyFilter, IPPROTO_TCP,
    N_BYPASS_LEVELS, Origin, PassReason, RefuseReason, Request, RevNat, Selection, ServiceRef,
    Verdict, decide, lookup,
};

use crate::choice::Kernel;
use crate::context::{self, Endpoint, Reject};
use crate::{config, conns, log, maps, trace};

/// Whether a connection to an IPv4 address may be to a frontend. What is no VIP pays for this alone.
#[inline(always)]
pub fn in_vip_range(address: [u8; 4]) -> bool {
    config::in_pool(address) || config::in_pin_range(address) || config::in_public(address)
}

/// The same for an IPv6 address.
#[inline(always)]
pub fn in_vip_range6(address: &Address) -> bool {
    config::in_pool6(address) || config::in_public6(address)
}

/// Where a connection to an address goes for which [`in_vip_range`] or [`in_vip_range6`] holds; `None` when it passes
/// untouched. For a socket that connects to IPv6 `filter` is given whether it is closed to IPv4.
#[inline(always)]
pub fn xlate(
    ctx: &SockAddrContext,
    destination: Destination,
    call: Call,
    filter: impl Fn(bool) -> FamilyFilter,
) -> Result<Option<Selection>, Reject> {
    let request = request(ctx, destination, call);
    let asks_ipv6_only = call == Call::Connect && matches!(destination, Destination::V6(_));
    let may_record = call == Call::Connect && request.protocol == IPPROTO_TCP;
    let client = Client { ctx, asks_ipv6_only, may_record, filter };
    apply(ctx, &request, decide(&Kernel, &client, &request))
}

#[inline(always)]
fn request(ctx: &SockAddrContext, destination: Destination, call: Call) -> Request {
    Request { destination, port: context::port(ctx), protocol: context::protocol(ctx), call }
}

/// Refuses a datagram to a VIP: the socket is connected by it to a backend of an address family that
/// the call can't reach.
#[inline(always)]
pub fn refuse_family(ctx: &SockAddrContext, destination: Destination) -> Reject {
    match lookup(&Kernel, &request(ctx, destination, Call::Send)) {
        Some(ServiceRef { service, .. }) => maps::count_refused(service, true),
        None => maps::count(Counter::RefusedNoFrontend),
    }
    Reject
}

/// What a socket remembers that was sent to a backend.
#[inline(always)]
pub fn revnat(backend: &Backend, backend_idx: u32, connected: &Endpoint) -> RevNat {
    let &Backend { address, port, generation, .. } = backend;
    RevNat {
        frontend: connected.address,
        backend: address,
        frontend_port: connected.port,
        backend_port: port,
        layout: config::layout(),
        naming: 0,
        backend_idx,
        generation,
    }
}

/// Counts and reports what a verdict says.
#[inline(always)]
fn apply(
    ctx: &SockAddrContext,
    request: &Request,
    verdict: Verdict,
) -> Result<Option<Selection>, Reject> {
    match verdict {
        Verdict::Send(selection) => {
            trace::sent(ctx, request, &selection);
            if selection.report {
                maps::emit_connected(selection.service);
            }
            if request.is_udp_connect() {
                maps::count_udp_connect(selection.service, None);
            } else {
                maps::count_connect(selection.service, selection.backend_idx);
            }
            Ok(Some(selection))
        }
        Verdict::Refuse(reason) => {
            trace::refused(ctx, request, reason);
            Err(refuse(ctx, request, reason))
        }
        Verdict::Pass(reason) => {
            pass(ctx, request, reason);
            Ok(None)
        }
    }
}

#[inline(always)]
fn refuse(ctx: &SockAddrContext, request: &Request, reason: RefuseReason) -> Reject {
    match reason {
        RefuseReason::Probe => record_probe(ctx),
        RefuseReason::NoFrontend if request.is_udp_connect() => maps::count(Counter::UdpNoFrontend),
        RefuseReason::NoFrontend => maps::count(Counter::RefusedNoFrontend),
        RefuseReason::NoBackend { service, has_other_family, report } => {
            if report {
                maps::emit_connected(service);
            }
            if request.is_udp_connect() {
                maps::count_udp_connect(service, Some(has_other_family));
            } else {
                maps::count_refused(service, has_other_family);
            }
        }
        RefuseReason::Inconsistent { service } => return log::inconsistent(service),
    }
    Reject
}

#[inline(always)]
fn pass(ctx: &SockAddrContext, request: &Request, reason: PassReason) {
    match reason {
        PassReason::NoFrontend => {}
        PassReason::Bypassed => maps::count(Counter::Bypassed),
        PassReason::Shadow { service } => {
            maps::count(Counter::Shadowed);
            maps::count_shadowed(service);
        }
        PassReason::ShadowNoFrontend if request.is_udp_connect() => {
            maps::count(Counter::UdpNoFrontend);
        }
        PassReason::ShadowNoFrontend => maps::count(Counter::ShadowedNoFrontend),
        PassReason::ShadowProbe => record_probe(ctx),
    }
}

/// The process that makes the call, and its socket.
struct Client<'a, F> {
    ctx: &'a SockAddrContext,
    /// Whether it matters if the socket is closed to IPv4.
    asks_ipv6_only: bool,
    /// Whether what it connects to may be kept as a record.
    may_record: bool,
    filter: F,
}

impl<F: Fn(bool) -> FamilyFilter> Caller for Client<'_, F> {
    #[inline(always)]
    fn tgid(&self) -> u64 {
        bpf_get_current_pid_tgid() >> 32
    }

    #[inline(always)]
    fn origin(&self) -> (Origin, bool) {
        origin(self.ctx, self.asks_ipv6_only)
    }

    #[inline(always)]
    fn is_bypassed(&self) -> bool {
        is_bypassed()
    }

    #[inline(always)]
    fn prepare(&self) {
        if self.may_record {
            conns::touch(self.ctx);
        }
    }

    #[inline(always)]
    fn filter(&self, is_ipv6_only: bool) -> FamilyFilter {
        (self.filter)(is_ipv6_only)
    }

    #[inline(always)]
    fn netns_cookie(&self) -> u64 {
        // SAFETY: the context is valid.
        unsafe { bpf_get_netns_cookie(self.ctx.as_ptr()) }
    }

    #[inline(always)]
    fn cgroup_id(&self) -> u64 {
        // SAFETY: the helper has no preconditions.
        unsafe { bpf_get_current_cgroup_id() }
    }

    #[inline(always)]
    fn source(&self) -> u64 {
        context::source_number(self.ctx)
    }
}

/// Whose socket it is; and, where that is asked, whether it is an IPv6 socket that is closed to IPv4
/// (IPV6_V6ONLY, net.ipv6.bindv6only).
#[inline(always)]
fn origin(ctx: &SockAddrContext, asks_ipv6_only: bool) -> (Origin, bool) {
    let (kernel_offset, kernel_mask) = config::kernel_socket_bit().unwrap_or_default();
    let ipv6_only = if asks_ipv6_only { config::ipv6_only_bit() } else { None };
    let (only_offset, only_mask) = ipv6_only.unwrap_or_default();
    let is_tcp = context::protocol(ctx) == IPPROTO_TCP;
    let (mut kernel, mut only) = (0, 0);
    if is_tcp {
        if kernel_mask != 0 || only_mask != 0 {
            let socket = context::tcp_socket(ctx);
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
        return (Origin::Application, is_ipv6_only);
    }
    // The kernel also makes the TCP sockets that an application's MPTCP socket consists of.
    match config::subflow_offset() {
        Some(offset) if is_tcp && byte_of_socket(ctx, offset) != 0 => {
            (Origin::Subflow, is_ipv6_only)
        }
        _ => (Origin::Kernel, is_ipv6_only),
    }
}

/// A byte of such a structure as [`context::tcp_socket`] returns.
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

/// Whether the process is in a cgroup that is bypassed, or below one.
#[inline(always)]
pub fn is_bypassed() -> bool {
    config::has_bypass() && nohop_is_bypassed() != 0
}

/// [`is_bypassed`], as a function that the verifier follows once.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_is_bypassed() -> u64 {
    let levels = maps::bypass_levels();
    for level in 0..N_BYPASS_LEVELS {
        if levels >> level & 1 == 0 {
            continue;
        }
        // SAFETY: the helper takes any level, and returns 0 where there is none.
        let ancestor = unsafe { bpf_get_current_ancestor_cgroup_id(level as i32) };
        if ancestor != 0 && maps::is_bypassed(ancestor) {
            return 1;
        }
    }
    0
}

/// The pool's own address is no service's VIP: the daemon connects to it to see whether this hook
/// runs.
#[inline(always)]
fn record_probe(ctx: &SockAddrContext) {
    // SAFETY: the context is valid.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    // SAFETY: as above.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let tgid = bpf_get_current_pid_tgid() >> 32;
    maps::record_probe(cookie, tgid, netns);
}

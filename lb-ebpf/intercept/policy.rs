//! Which queries are intercepted.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{BPF_F_CURRENT_NETNS, bpf_sock_tuple};
use aya_ebpf::helpers::generated::{bpf_ktime_get_ns, bpf_sk_lookup_udp, bpf_sk_release};
use aya_ebpf::helpers::{
    bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id, bpf_get_current_pid_tgid,
    bpf_get_netns_cookie,
};
use aya_ebpf::programs::SockAddrContext;
use lb_common::{
    Address, DNS_PORT, DnsServer, Interception, N_BYPASS_LEVELS, is_bound_to_loopback, is_loopback,
    is_multicast,
};

use crate::{context, maps, trace};

/// The pools of VIPs, which the daemon sets when it loads the object: constants to the verifier.
/// IPv4: in native byte order; all ones with a network of 0 mean no pool.
#[unsafe(no_mangle)]
static POOL_NETWORK: u32 = 0;
#[unsafe(no_mangle)]
static POOL_MASK: u32 = u32::MAX;
/// IPv6: the halves as they lie in memory; 0 for no such pool.
#[unsafe(no_mangle)]
static POOL6_NETWORK_HIGH: u64 = 0;
#[unsafe(no_mangle)]
static POOL6_NETWORK_LOW: u64 = 0;
#[unsafe(no_mangle)]
static POOL6_MASK_HIGH: u64 = 0;
#[unsafe(no_mangle)]
static POOL6_MASK_LOW: u64 = 0;

macro_rules! setting {
    // SAFETY: a static is valid and aligned; volatile, because its value comes after compilation.
    ($name:ident) => {
        unsafe { core::ptr::read_volatile(&raw const $name) }
    };
}

/// How a query is sent.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Call {
    Connect,
    Send,
}

/// A connection or datagram to port 53.
pub struct Query {
    pub address: Address,
    pub call: Call,
}

/// The address of nohop's that a query is sent to, if it is; the socket remembers it.
#[inline(always)]
pub fn server_for(ctx: &SockAddrContext, query: &Query) -> Option<DnsServer> {
    // A connection's own datagram, and addresses of which nohop's answers nothing.
    let named = DnsServer::new(query.address, DNS_PORT);
    if query.call == Call::Send && context::peer(ctx) == named {
        return None;
    }
    if is_vip(ctx, &query.address) || is_multicast(&query.address) {
        return None;
    }
    let is_host = is_host(ctx);
    let server = maps::server(is_host, query.address.to_v4().is_some());
    if server == named {
        // What is asked is nohop already.
        if let Some(asked) = maps::asked(ctx, query.address.to_v4().is_some()) {
            match query.call {
                Call::Connect => asked.connect(query.address, server),
                Call::Send => asked.send(query.address, server, now_ns()),
            }
        }
        return None;
    }
    let decided = decide(ctx, query, is_host, &server);
    let decided = if decided == Interception::Sent && !remember(ctx, query, server) {
        Interception::NoMemory
    } else {
        decided
    };
    maps::count(decided);
    trace::report(ctx, &query.address, is_host, decided);
    (decided == Interception::Sent).then_some(server)
}

/// A socket is about to be bound: what has a port of DNS servers is one, and what its cgroup asks is
/// intercepted no more from now on, as nohop may forward to it. The daemon finds those that were bound
/// before the program was attached, and forgets those that have gone.
#[inline(always)]
pub fn bind(ctx: &SockAddrContext, address: &Address) {
    const IPPROTO_UDP: u8 = 17;
    let port = context::port(ctx);
    if context::protocol(ctx) != IPPROTO_UDP || port != DNS_PORT && !maps::is_upstream_port(port) {
        return;
    }
    let is_host = is_host(ctx);
    // In a container a server on loopback serves that container alone, and is one of its own.
    if is_host || !is_bound_to_loopback(address) {
        maps::add_resolver(cgroup_id(), is_host, now_ns());
    }
}

#[inline(always)]
fn decide(ctx: &SockAddrContext, query: &Query, is_host: bool, server: &DnsServer) -> Interception {
    if now_ns() >= maps::until_ns() {
        return Interception::NoDaemon;
    }
    if bpf_get_current_pid_tgid() >> 32 == maps::daemon_tgid() {
        return Interception::Own;
    }
    if is_excluded(is_host) {
        return Interception::Excluded;
    }
    if !is_host && is_loopback(&query.address) {
        return Interception::Local;
    }
    let is_unreached = || !is_host && maps::is_unreached(netns_cookie(ctx));
    if server.port == 0 || context::is_bound_to_interface(ctx) || is_unreached() {
        return Interception::Unreachable;
    }
    // A daemon that was killed has no socket any more, long before its heartbeat is old. From another
    // network namespace that can't be seen.
    if is_host && !has_socket(ctx, server) {
        return Interception::NoDaemon;
    }
    Interception::Sent
}

/// Whether the socket has the memory to remember the query.
#[inline(always)]
fn remember(ctx: &SockAddrContext, query: &Query, server: DnsServer) -> bool {
    let Some(asked) = maps::asked_or_new(ctx, server.address.to_v4().is_some()) else {
        return false;
    };
    match query.call {
        Call::Connect => asked.connect(query.address, server),
        Call::Send => asked.send(query.address, server, now_ns()),
    }
    true
}

/// Whether an address is a VIP, also by a pin: then the unit `connect` decides.
#[inline(always)]
fn is_vip(ctx: &SockAddrContext, address: &Address) -> bool {
    if let Some(octets) = address.to_v4() {
        return u32::from_be_bytes(octets) & setting!(POOL_MASK) == setting!(POOL_NETWORK)
            || maps::is_frontend(octets, context::protocol(ctx));
    }
    let network_high = setting!(POOL6_NETWORK_HIGH);
    let [high, low] = address.words();
    network_high != 0
        && high & setting!(POOL6_MASK_HIGH) == network_high
        && low & setting!(POOL6_MASK_LOW) == setting!(POOL6_NETWORK_LOW)
}

/// Whether the socket is in the host's network namespace.
#[inline(always)]
fn is_host(ctx: &SockAddrContext) -> bool {
    netns_cookie(ctx) == maps::host_netns()
}

/// The cookie of the socket's network namespace.
#[inline(always)]
fn netns_cookie(ctx: &SockAddrContext) -> u64 {
    // SAFETY: the context is valid.
    unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }
}

/// Whether the process is in a cgroup that is bypassed, or below one, or in a resolver's.
#[inline(always)]
fn is_excluded(is_host: bool) -> bool {
    if maps::is_resolver(cgroup_id(), is_host) {
        return true;
    }
    let levels = maps::bypass_levels();
    levels != 0 && is_bypassed(levels)
}

/// The id of the process's cgroup.
#[inline(always)]
fn cgroup_id() -> u64 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_get_current_cgroup_id() }
}

#[inline(always)]
fn is_bypassed(levels: u64) -> bool {
    for level in 0..N_BYPASS_LEVELS {
        if levels >> level & 1 == 0 {
            continue;
        }
        // SAFETY: the helper takes any level, and returns 0 where there is none.
        let ancestor = unsafe { bpf_get_current_ancestor_cgroup_id(level as i32) };
        if ancestor != 0 && maps::is_bypassed(ancestor) {
            return true;
        }
    }
    false
}

/// Whether a socket of this network namespace receives what is sent to the server.
#[inline(always)]
fn has_socket(ctx: &SockAddrContext, server: &DnsServer) -> bool {
    let port = u32::from(server.port.to_be()) << 16;
    let [a, b, c, d]: [u32; 4] = zerocopy::transmute!(server.address);
    let is_ipv4 = server.address.to_v4().is_some();
    // The source, which is none; the destination; the ports.
    let mut words =
        if is_ipv4 { [0, d, port, 0, 0, 0, 0, 0, 0] } else { [0, 0, 0, 0, a, b, c, d, port] };
    // SAFETY: the tuple is as long as said; the socket that is found is released.
    unsafe {
        let tuple = words.as_mut_ptr().cast::<bpf_sock_tuple>();
        let netns = BPF_F_CURRENT_NETNS as u64;
        let socket = if is_ipv4 {
            bpf_sk_lookup_udp(ctx.as_ptr(), tuple, 12, netns, 0)
        } else {
            bpf_sk_lookup_udp(ctx.as_ptr(), tuple, 36, netns, 0)
        };
        if socket.is_null() {
            return false;
        }
        bpf_sk_release(socket.cast());
    }
    true
}

/// CLOCK_MONOTONIC.
#[inline(always)]
pub fn now_ns() -> u64 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_ktime_get_ns() }
}

//! The maps. `CONTROL`, `COUNTERS`, `BYPASS` and `FRONTENDS` are the unit `connect`'s, by their pins. The others are
//! each daemon's own, and end with it.

use aya_ebpf::bindings::BPF_F_MMAPABLE;
use aya_ebpf::btf_maps::{Array, HashMap, SkStorage};
use aya_ebpf::macros::btf_map;
use aya_ebpf::programs::SockAddrContext;
use core::intrinsics::{AtomicOrdering, atomic_xadd};
use lb_common::{
    Asked, BypassCgroup, BypassLevel, Control, Counter, DEFAULT_MAX_SERVICES, DNS_PORT, DnsServer,
    FRONTENDS_PER_SERVICE, Frontend, GlobalCounters, InterceptControl, InterceptedSocket,
    Interception, MAX_BYPASS_CGROUPS, MAX_RESOLVERS, MAX_UNREACHED, MAX_UPSTREAM_PORTS,
    ResolverCgroup, ServiceRef, TraceSwitch,
};

const MMAPABLE: usize = BPF_F_MMAPABLE as usize;
const N_FRONTENDS: usize = (DEFAULT_MAX_SERVICES * FRONTENDS_PER_SERVICE) as usize;

#[btf_map]
static CONTROL: Array<Control, 1, MMAPABLE> = Array::new();
#[btf_map]
static COUNTERS: Array<GlobalCounters, 1, MMAPABLE> = Array::new();
#[btf_map]
static BYPASS: HashMap<BypassCgroup, BypassLevel, MAX_BYPASS_CGROUPS> = HashMap::new();
#[btf_map]
static FRONTENDS: HashMap<Frontend, ServiceRef, N_FRONTENDS> = HashMap::new();
#[btf_map]
static INTERCEPT_CONTROL: Array<InterceptControl, 1, MMAPABLE> = Array::new();
/// By the number of an [`Interception`].
#[btf_map]
static INTERCEPT_COUNTERS: Array<u64, { Interception::ALL.len() }, MMAPABLE> = Array::new();
/// Cgroups that have a DNS server of their own, and when that was found.
#[btf_map]
static INTERCEPT_RESOLVERS: HashMap<ResolverCgroup, u64, MAX_RESOLVERS> = HashMap::new();
/// Other ports than 53 of the resolvers that the daemon forwards to.
#[btf_map]
static INTERCEPT_PORTS: HashMap<u64, u64, MAX_UPSTREAM_PORTS> = HashMap::new();
/// The network namespaces, by their cookies, whose queries nohop doesn't get.
#[btf_map]
static INTERCEPT_UNREACHED: HashMap<u64, u64, MAX_UNREACHED> = HashMap::new();
/// What each socket asked. It lives and dies with the socket.
#[btf_map]
static SK_INTERCEPT: SkStorage<InterceptedSocket> = SkStorage::new();

macro_rules! read {
    // SAFETY: an array's element stays, and this is an aligned word of it; volatile, because the daemon
    // writes it.
    ($map:ident . $($field:tt)+) => {
        $map.get_ptr(0).map_or(0, |value| unsafe { (&raw const (*value).$($field)+).read_volatile() })
    };
}

/// Until when queries are intercepted.
#[inline(always)]
pub fn until_ns() -> u64 {
    read!(INTERCEPT_CONTROL.until_ns)
}

/// Whether connections are traced, and which.
#[inline(always)]
pub fn trace_switch() -> TraceSwitch {
    let until_ns = read!(CONTROL.trace.until_ns);
    TraceSwitch { until_ns, max_hash: read!(CONTROL.trace.max_hash), padding: 0 }
}

/// The daemon's process id.
#[inline(always)]
pub fn daemon_tgid() -> u64 {
    read!(CONTROL.tgid)
}

/// The cookie of the host's network namespace.
#[inline(always)]
pub fn host_netns() -> u64 {
    read!(CONTROL.host_netns)
}

/// The depths at which cgroups are bypassed, a bit each.
#[inline(always)]
pub fn bypass_levels() -> u64 {
    read!(CONTROL.bypass_levels)
}

/// Where queries to an address of a family go, from the host's network namespace or another one.
#[inline(always)]
pub fn server(is_host: bool, is_ipv4: bool) -> DnsServer {
    let Some(control) = INTERCEPT_CONTROL.get_ptr(0) else { return DnsServer::default() };
    // SAFETY: an array's element stays. The daemon intercepts nothing while it writes these.
    unsafe {
        match (is_host, is_ipv4) {
            (true, true) => (&raw const (*control).on_host.ipv4).read_volatile(),
            (true, false) => (&raw const (*control).on_host.ipv6).read_volatile(),
            (false, true) => (&raw const (*control).elsewhere.ipv4).read_volatile(),
            (false, false) => (&raw const (*control).elsewhere.ipv6).read_volatile(),
        }
    }
}

/// Whether a cgroup is bypassed.
#[inline(always)]
pub fn is_bypassed(cgroup_id: u64) -> bool {
    BYPASS.get_ptr(BypassCgroup { cgroup_id }).is_some()
}

/// Whether a cgroup has a DNS server.
#[inline(always)]
pub fn is_resolver(cgroup_id: u64, is_host: bool) -> bool {
    INTERCEPT_RESOLVERS.get_ptr(ResolverCgroup { cgroup_id, is_host: is_host.into() }).is_some()
}

/// Adds a cgroup that has a DNS server from now on.
#[inline(always)]
pub fn add_resolver(cgroup_id: u64, is_host: bool, now_ns: u64) {
    let resolver = ResolverCgroup { cgroup_id, is_host: is_host.into() };
    // Where the map is full the daemon has reported that.
    let _ = INTERCEPT_RESOLVERS.insert(resolver, now_ns, 0);
}

/// Whether nohop gets no queries from a network namespace.
#[inline(always)]
pub fn is_unreached(netns: u64) -> bool {
    INTERCEPT_UNREACHED.get_ptr(netns).is_some()
}

/// Whether a resolver that the daemon forwards to has this port, which isn't 53.
#[inline(always)]
pub fn is_upstream_port(port: u16) -> bool {
    INTERCEPT_PORTS.get_ptr(u64::from(port)).is_some()
}

/// Whether a service has port 53 of an address.
#[inline(always)]
pub fn is_frontend(address: [u8; 4], protocol: u8) -> bool {
    FRONTENDS.get_ptr(Frontend { address, port: DNS_PORT, protocol, padding: 0 }).is_some()
}

/// What the socket asked by IPv4 or by IPv6, if it asked anything.
#[inline(always)]
pub fn asked(ctx: &SockAddrContext, is_ipv4: bool) -> Option<&'static mut Asked> {
    // SAFETY: see `of_family`.
    of_family(unsafe { SK_INTERCEPT.get_ptr_mut(ctx) }, is_ipv4)
}

/// The same; `None` where there is no memory for it.
#[inline(always)]
pub fn asked_or_new(ctx: &SockAddrContext, is_ipv4: bool) -> Option<&'static mut Asked> {
    // SAFETY: see `of_family`. Without a value, the storage begins as zeros.
    of_family(unsafe { SK_INTERCEPT.get_or_insert_ptr_mut(ctx, None) }, is_ipv4)
}

#[inline(always)]
fn of_family(kept: *mut InterceptedSocket, is_ipv4: bool) -> Option<&'static mut Asked> {
    // SAFETY: a non-null pointer is to this socket's own storage, which only hooks of this socket
    // read and write, and they run with it locked.
    let kept = unsafe { kept.as_mut()? };
    Some(if is_ipv4 { &mut kept.ipv4 } else { &mut kept.ipv6 })
}

/// Counts what was decided on a query.
#[inline(always)]
pub fn count(decided: Interception) {
    if let Some(counter) = INTERCEPT_COUNTERS.get_ptr_mut(decided as u32) {
        add_one(counter);
    }
}

/// Counts what there was no room to report.
#[inline(always)]
pub fn count_lost(counter: Counter) {
    if let Some(counters) = COUNTERS.get_ptr_mut(0) {
        // SAFETY: the counter is a word within the element, which stays.
        add_one(unsafe { counters.cast::<u64>().add(counter as usize) });
    }
}

#[inline(always)]
fn add_one(counter: *mut u64) {
    // SAFETY: the pointer is to an aligned u64 in an array map. The result is unused, which makes this
    // XADD: the verifier of 5.10 rejects a fetching addition.
    unsafe {
        atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(counter, 1);
    }
}

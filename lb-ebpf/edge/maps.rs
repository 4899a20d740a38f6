//! The maps of this unit. The tables are the unit `connect`'s, by their pins.

use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_NOEXIST};
use aya_ebpf::btf_maps::{Array, HashMap, PerCpuArray, RingBuf};
use aya_ebpf::macros::btf_map;
use lb_common::{
    ANY_PORT, Address, BackendEntry, Counter, DEFAULT_MAX_BACKENDS, DEFAULT_MAX_FLOWS,
    DEFAULT_MAX_SERVICES, ENTRIES_PER_BACKEND, EdgeControl, EdgeCounter, EdgeCounters,
    EdgeServiceRef, Event, EventKind, FlowAddresses6, FlowEvent, FlowKey4, FlowKey6, FlowRecord,
    FlowRef, Frontend, Frontend6, GlobalCounters, IPPROTO_ICMPV6, IPPROTO_TCP, MAX_OWN_ADDRESSES,
    N_EDGE_ACCOUNTS, OptionWalk, Packet, PortCursor, PortPlace, ServiceRef, ServiceStats,
    SynOptions, Target, Window,
};

use crate::record::RecordPtr;
pub use crate::tables::add_one;
use crate::tables::{BACKENDS, control as table_control};

const MMAPABLE: usize = BPF_F_MMAPABLE as usize;
const N_SERVICES: usize = DEFAULT_MAX_SERVICES as usize;
const N_BACKENDS: usize = (DEFAULT_MAX_BACKENDS * ENTRIES_PER_BACKEND) as usize;
const N_RECORDS: usize = DEFAULT_MAX_FLOWS as usize;
/// How many public addresses, ports and protocols there are at most.
const N_FRONTENDS: usize = 16_384;

#[btf_map]
static EDGE_FRONTENDS: HashMap<Frontend, EdgeServiceRef, N_FRONTENDS> = HashMap::new();
#[btf_map]
static EDGE_FRONTENDS6: HashMap<Frontend6, EdgeServiceRef, N_FRONTENDS> = HashMap::new();
#[btf_map]
static EDGE_FLOWS: HashMap<FlowKey4, FlowRef, { 2 * N_RECORDS }> = HashMap::new();
#[btf_map]
static EDGE_FLOWS6: HashMap<FlowKey6, FlowRef, { 2 * N_RECORDS }> = HashMap::new();
#[btf_map]
static EDGE_RECORDS: Array<FlowRecord, N_RECORDS, MMAPABLE> = Array::new();
#[btf_map]
static EDGE_ADDRESSES6: Array<FlowAddresses6, N_RECORDS, MMAPABLE> = Array::new();
#[btf_map]
pub static EDGE_CONTROL: Array<EdgeControl, 1, MMAPABLE> = Array::new();
#[btf_map]
static EDGE_COUNTERS: Array<EdgeCounters, 1, MMAPABLE> = Array::new();
#[btf_map]
static EDGE_PORTS: Array<PortCursor, N_BACKENDS, MMAPABLE> = Array::new();
/// When each account of first packets is full again, in nanoseconds of CLOCK_MONOTONIC.
#[btf_map]
static EDGE_ACCOUNTS: Array<u64, { N_EDGE_ACCOUNTS as usize }, MMAPABLE> = Array::new();
/// This host's addresses.
#[btf_map]
static EDGE_OWN: HashMap<Address, u32, { MAX_OWN_ADDRESSES as usize }> = HashMap::new();
#[btf_map]
static COUNTERS: Array<GlobalCounters, 1, MMAPABLE> = Array::new();
/// This object's own: the daemon reads those of the others as well.
#[btf_map]
static EVENTS: RingBuf<Event, 65_536> = RingBuf::new();
#[btf_map]
static SERVICE_STATS: Array<ServiceStats, N_SERVICES, MMAPABLE> = Array::new();

/// Where each processor looked last.
#[btf_map]
static EDGE_CURSORS: PerCpuArray<Cursors, 1> = PerCpuArray::new();
/// Room that the stack lacks.
#[btf_map]
static EDGE_SCRATCH: PerCpuArray<Scratch, 1> = PerCpuArray::new();

/// See [`EDGE_CURSORS`].
#[repr(C, align(8))]
pub struct Cursors {
    /// The record that is looked at next.
    pub record: u64,
    /// In a search, one more than the place of a flow that is over, or as good as that; 0 for none.
    pub spent: u64,
    /// Likewise of a connection that isn't established, or UDP that rests.
    pub pending: u64,
    /// When an ICMP error was sent, in milliseconds: about a hop limit, and about a length.
    pub error_ms: [u64; 2],
}

/// What a program works on. It runs with bottom halves disabled, so the processor's is its own. The
/// verifier doesn't know what it keeps here, and so follows no cases of it afterwards.
#[repr(C, align(8))]
pub struct Scratch {
    pub window: Window,
    pub packet: Packet,
    pub target: Target,
    /// CLOCK_MONOTONIC when the packet was read.
    pub now_ns: u64,
    /// struct bpf_fib_lookup.
    pub fib: [u32; 16],
    /// Whether the backend of the flow that is about to begin is shown the client's address.
    pub shows_client: bool,
    /// Whether a backend that is well accepts the SYN that the flow is about to begin with; false for a datagram.
    pub is_conclusive: bool,
    /// Through the options of that SYN.
    pub options: SynOptions,
    /// Through them as they are changed.
    pub walk: OptionWalk,
    pub shown: Shown,
    /// The number of the [`ChoiceReason`](lb_common::ChoiceReason) by which a backend was chosen.
    pub choice: u32,
    /// What is to be reported of a flow, see `trace.rs`: the number of a `FlowEventKind`, and above that the reason
    /// and the state; 0 for nothing.
    pub traced: u32,
    pub traced_record: u32,
    pub padding: u32,
    pub event: FlowEvent,
}

/// What a flow showed of its backend, which is to be applied when the flow may be over.
#[repr(C, align(8))]
pub struct Shown {
    /// One more than the number of a `Sign`; 0 for nothing.
    pub sign: u32,
    /// The backend, and its generation.
    pub backend_idx: u32,
    pub generation: u32,
    /// The VIP.
    pub vip_port: u16,
    pub is_ipv6: bool,
    pub vip: Address,
}

/// See [`Scratch`].
#[inline(always)]
pub fn scratch() -> Option<&'static mut Scratch> {
    // SAFETY: the element stays, and nothing else has the processor's meanwhile.
    EDGE_SCRATCH.get_ptr_mut(0).map(|scratch| unsafe { &mut *scratch })
}

/// See [`Cursors`].
#[inline(always)]
pub fn cursors() -> Option<&'static mut Cursors> {
    // SAFETY: as above.
    EDGE_CURSORS.get_ptr_mut(0).map(|cursors| unsafe { &mut *cursors })
}

/// When the packet that was read came: CLOCK_MONOTONIC in nanoseconds.
#[inline(always)]
pub fn now_ns() -> u64 {
    scratch().map_or(0, |scratch| scratch.now_ns)
}

/// The low 32 bits of that in milliseconds.
#[inline(always)]
pub fn now_ms() -> u32 {
    (now_ns() / 1_000_000) as u32
}

/// Whether an address is this host's.
#[inline(always)]
pub fn is_own(address: &Address) -> bool {
    EDGE_OWN.get_ptr(address).is_some()
}

/// The place of the source address and port that a flow to a backend tries, the nth of them. Two processors that get the
/// same one find that by its key.
#[inline(always)]
pub fn next_port(backend_idx: u32, n_sources: u32, nth: u32) -> Option<PortPlace> {
    let cursor = EDGE_PORTS.get_ptr_mut(backend_idx)?;
    // SAFETY: an array's element stays, and this is an aligned word of it; volatile, because other processors
    // write it.
    unsafe {
        let last = &raw mut (*cursor).last;
        let before = PortPlace::of(last.read_volatile(), n_sources);
        let next = PortPlace::of(before.place + 1 + PortPlace::step(nth), n_sources);
        last.write_volatile(next.place);
        Some(next)
    }
}

/// An account of first packets.
#[inline(always)]
pub fn account(idx: u32) -> Option<*mut u64> {
    EDGE_ACCOUNTS.get_ptr_mut(idx)
}

/// The service of the frontend that a packet goes to.
#[inline(always)]
pub fn service_of(packet: &Packet) -> Option<EdgeServiceRef> {
    service_ref(&packet.destination, packet.destination_port, packet.protocol, packet.is_ipv6 != 0)
}

/// Whether an address, a packet's source or destination, is that of some frontend of its protocol: the daemon inserts one
/// of any port for each.
#[inline(always)]
pub fn is_vip(packet: &Packet, address: &Address) -> bool {
    service_at(address, ANY_PORT, packet.protocol, packet.is_ipv6 != 0).is_some()
}

/// Whether the packet in the window goes to a VIP, if its headers have an address at all. Neighbour discovery is the
/// host's, from and to any address.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn nohop_edge_goes_to_vip(is_ipv6: u64) -> u64 {
    let Some(Scratch { window, .. }) = scratch() else { return 0 };
    let is_ipv6 = is_ipv6 != 0;
    if is_ipv6 && window.octet(6) == IPPROTO_ICMPV6 {
        return 0;
    }
    let destination = if is_ipv6 { window.ipv6(24) } else { Address::v4(window.ipv4(16)) };
    service_at(&destination, ANY_PORT, IPPROTO_TCP, is_ipv6).is_some().into()
}

/// The service at a public address.
#[inline(always)]
pub fn service_at(address: &Address, port: u16, protocol: u8, is_ipv6: bool) -> Option<u32> {
    service_ref(address, port, protocol, is_ipv6).map(|found| found.service)
}

#[inline(always)]
fn service_ref(
    address: &Address,
    port: u16,
    protocol: u8,
    is_ipv6: bool,
) -> Option<EdgeServiceRef> {
    let found = if is_ipv6 {
        let address = address.octets;
        EDGE_FRONTENDS6.get_ptr(Frontend6 { address, port, protocol, padding: 0 })
    } else {
        let [.., a, b, c, d] = address.octets;
        EDGE_FRONTENDS.get_ptr(Frontend { address: [a, b, c, d], port, protocol, padding: 0 })
    };
    // SAFETY: the kernel may recycle the element once it is deleted, so it is copied out at once, as
    // the one word that it is. The daemon inserts nothing between a deletion and the end of the
    // readers that may have seen the element, so the word is this frontend's.
    Some(zerocopy::transmute!(unsafe { found?.cast::<u64>().read_volatile() }))
}

/// For the choice: frontends of the hooks, of which there are none here.
#[inline(always)]
pub fn frontend(_: &Frontend) -> Option<ServiceRef> {
    None
}

/// See [`frontend`].
#[inline(always)]
pub fn indexed_frontend(_: &Frontend) -> Option<ServiceRef> {
    None
}

/// See [`frontend`].
#[inline(always)]
pub fn frontend6(_: &Frontend6) -> Option<ServiceRef> {
    None
}

/// Until when flows are traced, in nanoseconds of CLOCK_MONOTONIC; 0 while they aren't.
#[inline(always)]
pub fn trace_until_ns() -> u64 {
    // SAFETY: an array's element stays, and this is an aligned word of it; volatile, because the daemon writes it.
    table_control()
        .map_or(0, |control| unsafe { (&raw const (*control.0).trace.until_ns).read_volatile() })
}

/// The greatest hash of a flow that is traced.
#[inline(always)]
pub fn trace_max_hash() -> u32 {
    // SAFETY: as above.
    table_control()
        .map_or(0, |control| unsafe { (&raw const (*control.0).trace.max_hash).read_volatile() })
}

/// Counts an event of a traced flow that there was no room for.
#[inline(always)]
pub fn count_trace_lost() {
    count_lost(Counter::TraceLost);
}

#[inline(always)]
fn count_lost(counter: Counter) {
    if let Some(counters) = COUNTERS.get_ptr_mut(0) {
        // SAFETY: the counter is a word within the element, which stays.
        add_one(unsafe { counters.cast::<u64>().add(counter as usize) });
    }
}

/// Reports to the daemon that a backend is ejected, or returns, and counts the former.
#[inline(always)]
pub fn emit_ejection(kind: EventKind, service: u32, backend: u32, generation: u32) {
    if EVENTS.output(Event { service, kind: kind as u32, backend, generation }, 0).is_err() {
        count_lost(Counter::EventsLost);
    }
    if kind == EventKind::Ejected
        && let Some(stats) = SERVICE_STATS.get_ptr_mut(service)
    {
        // SAFETY: an array's element stays; this word of it is written by atomic addition only.
        add_one(unsafe { &raw mut (*stats).ejections });
    }
}

/// Counts a connection of a service that failed.
#[inline(always)]
pub fn count_failure(service: u32) {
    if let Some(stats) = SERVICE_STATS.get_ptr_mut(service) {
        // SAFETY: as above.
        add_one(unsafe { &raw mut (*stats).failed });
    }
}

/// Counts a connection of a service without a backend.
#[inline(always)]
pub fn count_no_backend(service: u32) {
    if let Some(stats) = SERVICE_STATS.get_ptr_mut(service) {
        // SAFETY: as above.
        add_one(unsafe { &raw mut (*stats).no_backend });
    }
}

/// Whether a backend that a flow remembers is still in the table.
#[inline(always)]
pub fn is_in_table(backend_idx: u32, generation: u32) -> bool {
    // SAFETY: the pointer is to an aligned word of an array's element, which stays.
    let now = |entry: *const BackendEntry| unsafe {
        (&raw const (*entry).backend.generation).read_volatile()
    };
    BACKENDS.get_ptr(backend_idx).is_some_and(|entry| now(entry) == generation)
}

/// Counts a decision.
#[inline(always)]
pub fn count(counter: EdgeCounter) {
    if let Some(counters) = EDGE_COUNTERS.get_ptr_mut(0) {
        // SAFETY: the counter is a word within the element, which stays.
        add_one(unsafe { counters.cast::<u64>().add(counter as usize) });
    }
}

/// The record with this index.
#[inline(always)]
pub fn record(idx: u32) -> Option<RecordPtr> {
    EDGE_RECORDS.get_ptr_mut(idx).map(RecordPtr)
}

/// The addresses of an IPv6 flow.
#[inline(always)]
pub fn addresses6(idx: u32) -> Option<*mut FlowAddresses6> {
    EDGE_ADDRESSES6.get_ptr_mut(idx)
}

/// Where the packets with this key belong to.
#[inline(always)]
pub fn flow4(key: &FlowKey4) -> Option<FlowRef> {
    EDGE_FLOWS.get_ptr(key).map(copy_ref)
}

/// The same of IPv6.
#[inline(always)]
pub fn flow6(key: &FlowKey6) -> Option<FlowRef> {
    EDGE_FLOWS6.get_ptr(key).map(copy_ref)
}

#[inline(always)]
fn copy_ref(found: *const FlowRef) -> FlowRef {
    // SAFETY: the kernel may recycle the element once it is deleted, so it is copied out at once, as the one
    // word that it is. Whether it is that of the packet's flow is compared with the record.
    zerocopy::transmute!(unsafe { found.cast::<u64>().read_volatile() })
}

/// Inserts a key; returns whether it wasn't there.
#[inline(always)]
pub fn insert4(key: &FlowKey4, flow: FlowRef) -> bool {
    EDGE_FLOWS.insert(key, flow, BPF_NOEXIST.into()).is_ok()
}

/// The same of IPv6.
#[inline(always)]
pub fn insert6(key: &FlowKey6, flow: FlowRef) -> bool {
    EDGE_FLOWS6.insert(key, flow, BPF_NOEXIST.into()).is_ok()
}

/// Removes a key.
#[inline(always)]
pub fn remove4(key: &FlowKey4) {
    // It may be gone.
    let _ = EDGE_FLOWS.remove(key);
}

/// The same of IPv6.
#[inline(always)]
pub fn remove6(key: &FlowKey6) {
    let _ = EDGE_FLOWS6.remove(key);
}

/// What ejects; none while nothing does.
#[inline(always)]
pub fn limits() -> Option<lb_common::EjectionLimits> {
    use lb_common::ControlWords as _;
    table_control().map(|control| control.balance().limits())
}

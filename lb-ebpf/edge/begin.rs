//! The first packet of a flow: the backend, the source port and the record.

use aya_ebpf::bindings::__sk_buff;
use lb_common::{
    Address, Algorithm, BackendWords as _, EdgeCounter, Family, FlowRecord, FlowState, IPPROTO_TCP,
    Netns, Question, Reach, ServiceWords as _, TCP_RST, Tables as _, first_group, hop_limit,
    is_expired, is_first_syn, unpack,
};

use crate::choice::Kernel;
use crate::fib::Route;
use crate::flows::{self, Found, nohop_edge_claim, nohop_edge_end};
use crate::forward;
use crate::maps::{self, Cursors, count};
use crate::skb::Skb;
use crate::{outcomes, random, tables};

/// What becomes of a packet instead of a flow: it goes on as it came. No [`Found`] has these numbers.
pub const PASS: u64 = 0;
/// It is dropped.
pub const DROP: u64 = u64::MAX;
/// A RST answers it.
pub const RESET: u64 = u64::MAX - 1;

/// How many source ports are tried.
const N_TRIES: u32 = 4;
/// The ports of source addresses, which ordinary sockets get theirs above of
/// (net.ipv4.ip_local_port_range).
const FIRST_PORT: u32 = 1_024;
const N_PORTS: u32 = 32_768 - FIRST_PORT;

/// First packets a second that may take the record of a connection that isn't established: from a network
/// (IPv4 /24, IPv6 /48), and for a VIP. In nanoseconds between them.
const NETWORK_NS: u64 = 1_000_000_000 / 100;
const VIP_NS: u64 = 1_000_000_000 / 20_000;

/// Begins a flow with the packet that was read, in the place of one that is over. Returns a [`Found`],
/// [`PASS`], [`DROP`] or [`RESET`].
///
/// One step after the other, not one within the other, as all their stacks together have 512 bytes.
#[inline(always)]
pub fn begin(skb: &Skb, over: Found) -> u64 {
    let service = nohop_edge_admit();
    if service >= RESET || service == PASS {
        return service;
    }
    if !over.is_none() {
        nohop_edge_end(over.record().into());
        outcomes::apply();
    }
    let backend = nohop_edge_choose(service - 1);
    if backend == 0 {
        return nohop_edge_refuse(service - 1);
    }
    let claimed = nohop_edge_reserve();
    outcomes::apply();
    if claimed >= RESET {
        return claimed;
    }
    let is_local = nohop_edge_is_local(skb.0, backend - 1);
    let begun = nohop_edge_insert(claimed - 1, backend - 1, is_local);
    nohop_edge_begun(claimed - 1, service - 1, begun)
}

/// One more than the index of the service that the packet which was read begins a flow of; or [`PASS`],
/// [`DROP`] or [`RESET`].
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_edge_admit() -> u64 {
    let Some(scratch) = maps::scratch() else { return PASS };
    let packet = &scratch.packet;
    if packet.is_error != 0 {
        return PASS;
    }
    let Some(service) = maps::service_of(packet) else {
        if !maps::is_vip(packet) {
            return PASS;
        }
        count(EdgeCounter::NoFrontend);
        return DROP;
    };
    if packet.protocol == IPPROTO_TCP && !is_first_syn(packet.tcp_flags) {
        if packet.tcp_flags & TCP_RST != 0 {
            return DROP;
        }
        count(EdgeCounter::UnknownFlow);
        return RESET;
    }
    // Before it is a connection without an answer, by which anyone could have a backend ejected.
    if hop_limit(&scratch.window, packet.is_ipv6 != 0) <= 1 {
        count(EdgeCounter::HopLimit);
        return DROP;
    }
    u64::from(service) + 1
}

/// What becomes of a packet that can't be sent on: by TCP a RST answers it.
#[inline(always)]
fn refused() -> u64 {
    let is_tcp = maps::scratch().is_some_and(|scratch| scratch.packet.protocol == IPPROTO_TCP);
    if is_tcp { RESET } else { DROP }
}

/// A service has no backend: counts that, and returns what becomes of the packet.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_edge_refuse(service: u64) -> u64 {
    count(EdgeCounter::NoBackend);
    maps::count_no_backend(service as u32);
    refused()
}

/// Claims a record. Returns one more than its index; or [`DROP`] or [`RESET`].
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_edge_reserve() -> u64 {
    let now_ms = u64::from(forward::now_ms());
    let mut claimed = nohop_edge_claim(now_ms, 0);
    if claimed == flows::ONLY_PENDING {
        if nohop_edge_is_flooded() != 0 {
            count(EdgeCounter::SynFlood);
            return DROP;
        }
        claimed = nohop_edge_claim(now_ms, 1);
    }
    if claimed == 0 || claimed == flows::ONLY_PENDING {
        count(EdgeCounter::TableFull);
        return refused();
    }
    claimed
}

/// A flow was inserted, or there was no port for it. Returns what [`begin`] does.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_edge_begun(record_idx: u64, service: u64, begun: u64) -> u64 {
    let Some(record) = maps::record(record_idx as u32) else { return DROP };
    if begun == 0 {
        record.add_claims(-1);
        count(EdgeCounter::NoPort);
        return refused();
    }
    count(EdgeCounter::Begun);
    tables::count_connect(service as u32, record.backend_idx());
    if record.protocol() == IPPROTO_TCP {
        outcomes::begun(record);
    }
    begun
}

/// Chooses a backend of a service: one more than its index; 0 for none.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_edge_choose(service: u64) -> u64 {
    let Some(scratch) = maps::scratch() else { return 0 };
    let (is_ipv6, is_tcp) = (scratch.packet.is_ipv6 != 0, scratch.packet.protocol == IPPROTO_TCP);
    let service = service as u32;
    let (Some(words), Some(control)) = (tables::service(service), tables::control()) else {
        return 0;
    };
    if is_expired(control, || Kernel.now_ns()) {
        return 0;
    }
    let family = if is_ipv6 { Family::Ipv6 } else { Family::Ipv4 };
    let reach = Reach { netns: Netns::Other, family, or_all: false };
    let (group, range) = first_group(words, reach);
    if range.n_slots == 0 {
        return 0;
    }
    let key = match words.algorithm() {
        Algorithm::Maglev => {
            let [high, low] = scratch.packet.source.words();
            high ^ low
        }
        _ => 0,
    };
    let question = Question { service, reach, group, range, key, is_udp_connect: false, is_tcp };
    let (backend_idx, _) = unpack(Kernel.choose_for(question));
    let Some(backend) = tables::backend(backend_idx) else { return 0 };
    if backend.backend().port == 0 { 0 } else { u64::from(backend_idx) + 1 }
}

/// Whether a backend is on this host.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_edge_is_local(ctx: *mut __sk_buff, backend_idx: u64) -> u64 {
    let (Some(scratch), Some(backend)) = (maps::scratch(), tables::backend(backend_idx as u32))
    else {
        return 0;
    };
    let packet = &scratch.packet;
    let (from, to) = (packet.source, backend.backend().address);
    let route = forward::route(ctx, &mut scratch.fib, packet, &from, &to);
    (route == Route::Local).into()
}

/// Inserts a flow with the record that was claimed. Returns a [`Found`]; 0 where no port was free.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_edge_insert(record_idx: u64, backend_idx: u64, is_local: u64) -> u64 {
    let n_tries = if is_local != 0 { 1 } else { N_TRIES };
    let mut nth = 0;
    while nth < n_tries {
        nth += 1;
        if nohop_edge_prepare(record_idx, backend_idx, is_local) == 0 {
            return 0;
        }
        if insert_keys(record_idx) {
            if is_local != 0 {
                maps::set_local();
            }
            return Found::of(record_idx as u32, false, is_local != 0).0;
        }
        // This port is in use, or another processor has begun the same flow: of a client that sends its first
        // packet twice the next one finds that.
        if let Some(record) = maps::record(record_idx as u32) {
            record.set_state(FlowState::None as u8);
        }
    }
    0
}

/// Writes the record of a flow, with the next source port. Returns 1, or 0 where there is no source address.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_edge_prepare(record_idx: u64, backend_idx: u64, is_local: u64) -> u64 {
    let (idx, backend_idx) = (record_idx as u32, backend_idx as u32);
    let (Some(record), Some(backend), Some(scratch), Some(cursors)) =
        (maps::record(idx), tables::backend(backend_idx), maps::scratch(), maps::cursors())
    else {
        return 0;
    };
    let (packet, source) = (&scratch.packet, &raw mut scratch.target.source);
    let (is_ipv6, is_local) = (packet.is_ipv6 != 0, is_local != 0);
    // SAFETY: an array's element stays, and these are aligned fields of it, which aren't written again while
    // a program that found it may still run, but for the generation.
    let (address, port, generation) = unsafe {
        let backend = &raw const (*backend.0).backend;
        let generation = (&raw const (*backend).generation).read_volatile();
        (&raw const (*backend).address, (&raw const (*backend).port).read_volatile(), generation)
    };
    let source_port = if is_local {
        copy(&raw const packet.source, source);
        packet.source_port
    } else {
        match next_source(cursors, is_ipv6, source) {
            0 => return 0,
            port => port,
        }
    };
    let ipv6 = if is_ipv6 { FlowRecord::IPV6 } else { 0 };
    let local = if is_local { FlowRecord::LOCAL } else { 0 };
    let is_tcp = packet.protocol == IPPROTO_TCP;
    let state = if is_tcp { FlowState::SynSent } else { FlowState::Udp };
    record.set_state(FlowState::None as u8);
    record.set_backend(backend_idx, generation);
    record.set_begun(packet.protocol, ipv6 | local, forward::now_ms());
    record.set_ports([packet.source_port, packet.destination_port, port, source_port]);
    if is_ipv6 {
        let Some(addresses) = maps::addresses6(idx) else { return 0 };
        // SAFETY: an array's element stays; its record is claimed, and no key leads to it yet.
        unsafe {
            copy(&raw const packet.source, &raw mut (*addresses).client);
            copy(&raw const packet.destination, &raw mut (*addresses).vip);
            copy(address, &raw mut (*addresses).backend);
            copy(source, &raw mut (*addresses).source);
        }
    } else {
        let all = [&raw const packet.source, &raw const packet.destination, address, source];
        record.set_addresses(all.map(low_at));
    }
    record.set_state(state as u8);
    1
}

/// Copies an address by words: octets would be copied one by one, by way of the stack.
#[inline(always)]
fn copy(from: *const Address, to: *mut Address) {
    // SAFETY: both are aligned addresses within elements of maps, which stay.
    unsafe {
        let (from, to) = (from.cast::<u64>(), to.cast::<u64>());
        to.write_volatile(from.read_volatile());
        to.add(1).write_volatile(from.add(1).read_volatile());
    }
}

/// An IPv4 address as it lies in memory.
#[inline(always)]
fn low_at(address: *const Address) -> u32 {
    // SAFETY: as above; it is in the last four octets.
    unsafe { address.cast::<u32>().add(3).read_volatile() }
}

/// Inserts both keys of a record's flow. Returns whether neither was another's.
#[inline(always)]
fn insert_keys(record: u64) -> bool {
    if flows::nohop_edge_insert_key(record, 1) == 0 {
        return false;
    }
    if flows::nohop_edge_insert_key(record, 0) != 0 {
        return true;
    }
    flows::nohop_edge_remove_key(record, 1);
    false
}

/// The next source address and port of this processor's; 0 where there is none. Ports come one after the other, and those of a
/// processor far from the others', so that one is used again as late as can be.
#[inline(always)]
fn next_source(cursors: &mut Cursors, is_ipv6: bool, source: *mut Address) -> u16 {
    let n_sources = maps::n_sources(is_ipv6);
    if n_sources == 0 {
        return 0;
    }
    if cursors.port == 0 {
        cursors.port = random::next() >> 8;
    }
    cursors.port = cursors.port.wrapping_add(1);
    let nth = cursors.port;
    let Some(from) = maps::source(is_ipv6, nth % n_sources) else { return 0 };
    match from {
        maps::Source::V4(address) => {
            // SAFETY: as above.
            unsafe {
                source.cast::<u64>().write_volatile(0);
                let mapped = u64::from(address) << 32 | 0xffff_0000u64.to_le();
                source.cast::<u64>().add(1).write_volatile(mapped);
            }
        }
        maps::Source::V6(address) => copy(address, source),
    }
    (FIRST_PORT + nth / n_sources % N_PORTS) as u16
}

/// Whether more first packets come from a packet's network, or to its VIP, than may take the records of
/// connections that aren't established. By the generic cell rate algorithm (ITU-T I.371), for up to a second's worth
/// at once.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_edge_is_flooded() -> u64 {
    let Some(scratch) = maps::scratch() else { return 1 };
    let packet = &scratch.packet;
    let [high, low] = packet.source.words();
    let network = match packet.is_ipv6 {
        0 => u64::from_be(low) >> 8,
        _ => u64::from_be(high) >> 16,
    };
    let [high, low] = packet.destination.words();
    let vip = high ^ low ^ u64::from(packet.destination_port) << 48 ^ 1;
    let now_ns = Kernel.now_ns();
    let is_over = take(network, NETWORK_NS, now_ns) || take(vip, VIP_NS, now_ns);
    is_over.into()
}

/// Takes one off an account; returns whether there is none left.
#[inline(always)]
fn take(key: u64, interval_ns: u64, now_ns: u64) -> bool {
    // SplitMix64's finalizer (Steele, Lea, Flood 2014).
    let mut hash = (key ^ key >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ hash >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    let Some(account) = maps::account((hash >> 32) as u32) else { return true };
    // SAFETY: the pointer is to an aligned word of an array's element, which stays.
    unsafe {
        let full_at_ns = account.read_volatile().max(now_ns);
        if full_at_ns - now_ns > 1_000_000_000 {
            return true;
        }
        account.write_volatile(full_at_ns + interval_ns);
    }
    false
}

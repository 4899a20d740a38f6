//! The first packet of a flow: the backend, the source port and the record.

use aya_ebpf::bindings::__sk_buff;
use lb_common::{
    Address, Algorithm, BackendWords as _, EdgeCounter, Family, FlowEnd, FlowWord, IPPROTO_TCP,
    Netns, PortPlace, Question, Reach, ServiceWords as _, TCP_RST, Tables as _, first_group,
    hop_limit, is_expired, is_first_syn, unpack,
};

use crate::choice::Kernel;
use crate::fib::Route;
use crate::flows::{self, Found, nohop_edge_claim, nohop_edge_end};
use crate::forward;
use crate::maps::{self, count};
use crate::settings::Side;
use crate::skb::Skb;
use crate::{hops, outcomes, rate, settings, syn, tables, trace};

/// What becomes of a packet instead of a flow: it goes on as it came. No [`Found`] has these numbers.
pub const PASS: u64 = 0;
/// It is dropped.
pub const DROP: u64 = u64::MAX;
/// A RST answers it.
pub const RESET: u64 = u64::MAX - 1;
/// An ICMP error does, as its hop limit is used up.
pub const EXPIRED: u64 = u64::MAX - 2;

/// How many source ports are tried: with [`PortPlace::step`] as far as there are any.
const N_TRIES: u32 = 16;
/// How many of them before one is taken from a flow that is as good as over.
const N_FREE_TRIES: u32 = 4;

/// Begins a flow with the packet that was read, in the place of one that is over. Returns a [`Found`],
/// [`PASS`], [`DROP`], [`RESET`] or [`EXPIRED`].
///
/// One step after the other, not one within the other, as all their stacks together have 512 bytes.
#[inline(always)]
pub fn begin(skb: &Skb, over: Found) -> u64 {
    let service = nohop_edge_admit();
    if service >= EXPIRED || service == PASS {
        return service;
    }
    if syn::judge(skb) == 0 {
        trace::refused(EdgeCounter::BadChecksum);
        return DROP;
    }
    if !over.is_none() {
        nohop_edge_end(over.record().into(), FlowEnd::Replaced as u64);
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
    // Of a flow whose port it got.
    outcomes::apply();
    nohop_edge_begun(claimed - 1, service - 1, begun)
}

/// One more than the index of the service that the packet which was read begins a flow of; or [`PASS`],
/// [`DROP`], [`RESET`] or [`EXPIRED`].
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_edge_admit() -> u64 {
    let Some(scratch) = maps::scratch() else { return PASS };
    let packet = &scratch.packet;
    if packet.is_error != 0 {
        return PASS;
    }
    if !settings::may_begin() {
        return PASS;
    }
    let Some(service) = maps::service_of(packet) else {
        if !maps::is_vip(packet, &packet.destination) {
            return PASS;
        }
        trace::refused(EdgeCounter::NoFrontend);
        return DROP;
    };
    if packet.protocol == IPPROTO_TCP && !is_first_syn(packet.tcp_flags) {
        if packet.tcp_flags & TCP_RST != 0 {
            return DROP;
        }
        trace::refused(EdgeCounter::UnknownFlow);
        return RESET;
    }
    // No host sends to itself by this one, and no packet of this edge's comes back to it. Two services of datagrams
    // could answer each other for ever.
    let is_own = match settings::side(&packet.source, packet.is_ipv6 != 0) {
        Side::None => false,
        Side::Source => true,
        Side::Vip if packet.protocol == IPPROTO_TCP => packet.source == packet.destination,
        Side::Vip => maps::is_vip(packet, &packet.source),
    };
    if is_own {
        trace::refused(EdgeCounter::Martian);
        return DROP;
    }
    // Before it is a connection without an answer, by which anyone could have a backend ejected.
    if hop_limit(&scratch.window, packet.is_ipv6 != 0) <= 1 {
        trace::refused(EdgeCounter::HopLimit);
        return EXPIRED;
    }
    scratch.shows_client = service.shows_client != 0 && packet.is_ipv6 == 0;
    u64::from(service.service) + 1
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
    trace::refused(EdgeCounter::NoBackend);
    maps::count_no_backend(service as u32);
    refused()
}

/// How many other places are searched: one may lie among flows that are in use.
const N_JUMPS: u32 = 3;

/// Claims a record. Returns one more than its index; or [`DROP`] or [`RESET`].
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_edge_reserve() -> u64 {
    let now_ms = u64::from(maps::now_ms());
    let Some(cursors) = maps::cursors() else { return DROP };
    let mut claimed = nohop_edge_claim(now_ms, 0);
    if claimed == 0 || claimed == flows::ONLY_PENDING {
        let (first, found) = (cursors.record, claimed);
        claimed = 0;
        let mut nth = 0;
        while nth < N_JUMPS && claimed == 0 {
            flows::nohop_edge_jump();
            claimed = nohop_edge_claim(now_ms, 0);
            nth += 1;
        }
        if claimed == 0 {
            (cursors.record, claimed) = (first, found);
        }
    }
    if claimed == flows::ONLY_PENDING {
        if rate::nohop_edge_is_flooded() != 0 {
            trace::refused(EdgeCounter::SynFlood);
            return DROP;
        }
        claimed = nohop_edge_claim(now_ms, 1);
    }
    if claimed == 0 || claimed == flows::ONLY_PENDING {
        trace::refused(EdgeCounter::TableFull);
        return refused();
    }
    claimed
}

/// A flow was inserted, or there was no port for it. Returns what [`begin`] does.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_edge_begun(record_idx: u64, service: u64, begun: u64) -> u64 {
    let Some(record) = maps::record(record_idx as u32) else { return DROP };
    if begun == DROP {
        record.add_claims(-1);
        return DROP;
    }
    if begun == 0 {
        record.add_claims(-1);
        trace::refused(EdgeCounter::NoPort);
        return refused();
    }
    count(EdgeCounter::Begun);
    trace::begun(record, record_idx as u32);
    tables::count_connect(service as u32, record.backend_idx());
    if record.word().protocol == IPPROTO_TCP {
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
    if is_expired(control, maps::now_ns) {
        return 0;
    }
    let family = if is_ipv6 { Family::Ipv6 } else { Family::Ipv4 };
    let reach = Reach { netns: Netns::Other, family };
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
    let (backend_idx, reason) = unpack(Kernel.choose_for(question));
    scratch.choice = reason.0.into();
    let Some(backend) = tables::backend(backend_idx) else { return 0 };
    if backend.backend().port == 0 { 0 } else { u64::from(backend_idx) + 1 }
}

/// Whether a backend is on this host. To an address that there is no route to the kernel's answer is the same as to
/// one of the host.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_edge_is_local(ctx: *mut __sk_buff, backend_idx: u64) -> u64 {
    let (Some(scratch), Some(backend)) = (maps::scratch(), tables::backend(backend_idx as u32))
    else {
        return 0;
    };
    let packet = &scratch.packet;
    let (from, to) = (packet.source, backend.backend().address);
    scratch.target.destination = to;
    if !maps::is_own(&scratch.target.destination) {
        return 0;
    }
    // Of any length.
    let route = forward::route(ctx, &mut scratch.fib, packet, 0, &from, &to);
    (route == Route::Local).into()
}

/// Inserts a flow with the record that was claimed. Returns a [`Found`]; 0 where no port was free, or [`DROP`].
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_edge_insert(record_idx: u64, backend_idx: u64, is_local: u64) -> u64 {
    let n_tries = if is_local != 0 { 1 } else { N_TRIES };
    let mut nth = 0;
    while nth < n_tries {
        let how = u64::from(nth) | is_local << 32;
        nth += 1;
        if nohop_edge_prepare(record_idx, backend_idx, how) == 0 {
            return 0;
        }
        // The flow begins with its second key.
        let mut has_port = flows::nohop_edge_insert_key(record_idx, 1) != 0;
        if !has_port && (nth > N_FREE_TRIES || nth == n_tries) {
            let taken = nohop_edge_take_port(record_idx);
            if taken == FLOODED {
                clear(record_idx);
                trace::refused(EdgeCounter::SynFlood);
                return DROP;
            }
            has_port = taken != 0 && flows::nohop_edge_insert_key(record_idx, 1) != 0;
        }
        if has_port && flows::nohop_edge_insert_key(record_idx, 0) != 0 {
            if is_local != 0 {
                settings::set_local();
            }
            return Found::of(record_idx as u32, false, is_local != 0).0;
        }
        clear(record_idx);
        if has_port {
            // Another processor has begun the same flow: of a client that sends its first packet twice the next
            // one finds that.
            flows::nohop_edge_remove_key(record_idx, 1);
            return DROP;
        }
    }
    0
}

/// Makes a record no flow's.
#[inline(always)]
fn clear(record_idx: u64) {
    if let Some(record) = maps::record(record_idx as u32) {
        record.clear();
    }
}

/// See [`nohop_edge_take_port`].
const FLOODED: u64 = 2;

/// Ends the flow that has the port which was tried, where it needs it as little as a record. Returns 1 if it did, 0 if
/// that flow needs it; [`FLOODED`] where too many come to take it.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_edge_take_port(record_idx: u64) -> u64 {
    let holder = flows::nohop_edge_holder(record_idx, maps::now_ms().into());
    let seen = holder >> 32;
    if holder == 0 {
        return 0;
    }
    if seen == flows::PENDING && rate::nohop_edge_is_flooded() != 0 {
        return FLOODED;
    }
    let (end, counter) = if seen == flows::OVER {
        (FlowEnd::Timeout, EdgeCounter::Expired)
    } else {
        (FlowEnd::Taken, EdgeCounter::Taken)
    };
    let is_ended = flows::nohop_edge_end(holder & u64::from(u32::MAX), end as u64);
    if is_ended != 0 {
        count(counter);
    }
    is_ended
}

/// Writes the record of a flow, with the source port that is tried at last. `how` is the number of the try, and
/// from bit 32 on whether the backend is on this host. Returns 1, or 0 where there is no source address or port.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_edge_prepare(record_idx: u64, backend_idx: u64, how: u64) -> u64 {
    let (idx, backend_idx) = (record_idx as u32, backend_idx as u32);
    let (Some(record), Some(backend), Some(scratch)) =
        (maps::record(idx), tables::backend(backend_idx), maps::scratch())
    else {
        return 0;
    };
    let (packet, source) = (&scratch.packet, &raw mut scratch.target.source);
    let (is_ipv6, is_local) = (packet.is_ipv6 != 0, how >> 32 != 0);
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
        match next_source(backend_idx, how as u32 & 15, is_ipv6, source) {
            0 => return 0,
            port => port,
        }
    };
    let mut flags = if is_ipv6 { FlowWord::IPV6 } else { 0 };
    let mut sent_us = 0;
    if is_local {
        flags |= FlowWord::LOCAL;
    }
    if packet.protocol == IPPROTO_TCP {
        flags |= outcomes::flags_of(backend, scratch.is_conclusive, is_local);
        if scratch.shows_client {
            flags |= FlowWord::SHOWS_CLIENT;
        }
        if flags & FlowWord::PENDING != 0 {
            sent_us = outcomes::now_us();
        }
    }
    record.clear();
    for is_back in [false, true] {
        if let Some(hop) = hops::hop(idx, is_back) {
            hop.forget();
        }
    }
    record.set_backend(backend_idx, generation);
    record.set_begun(packet.protocol, flags, maps::now_ms(), sent_us);
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
    record.begin();
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

/// The source address, and the port, of the nth try; 0 where there is none.
#[inline(always)]
fn next_source(backend_idx: u32, nth: u32, is_ipv6: bool, source: *mut Address) -> u16 {
    let n_sources = settings::n_sources(is_ipv6);
    if n_sources == 0 {
        return 0;
    }
    let Some(PortPlace { source: nth_source, port, .. }) =
        maps::next_port(backend_idx, n_sources, nth)
    else {
        return 0;
    };
    let Some(from) = settings::source(is_ipv6, nth_source) else { return 0 };
    match from {
        settings::Source::V4(address) => {
            // SAFETY: as above.
            unsafe {
                source.cast::<u64>().write_volatile(0);
                let mapped = u64::from(address) << 32 | 0xffff_0000u64.to_le();
                source.cast::<u64>().add(1).write_volatile(mapped);
            }
        }
        settings::Source::V6(address) => copy(address, source),
    }
    port
}

//! The flows: how one is found, followed and ended.

use lb_common::{
    Address, EdgeCounter, FlowEnd, FlowKey4, FlowKey6, FlowRef, FlowState, FlowWord, IPPROTO_TCP,
    Packet, TCP_RST, TCP_SYN, Target, acknowledges,
};

use crate::maps::{self, Scratch, count};
use crate::record::RecordPtr;
use crate::{outcomes, random, settings};

/// A flow and the side that a packet is of, as a number, because functions that the verifier follows once
/// return numbers: the record's index and one more, and bits. Zero for none.
#[derive(Clone, Copy)]
pub struct Found(pub u64);

impl Found {
    const BACK: u64 = 1 << 32;
    const LOCAL: u64 = 1 << 33;
    const OVER: u64 = 1 << 34;

    #[inline(always)]
    pub fn of(record: u32, is_back: bool, is_local: bool) -> Found {
        let back = if is_back { Found::BACK } else { 0 };
        let local = if is_local { Found::LOCAL } else { 0 };
        Found((u64::from(record) + 1) | back | local)
    }

    /// The same, of a flow that ends with this packet.
    #[inline(always)]
    pub fn over(self) -> Found {
        Found(self.0 | Found::OVER)
    }

    #[inline(always)]
    pub fn is_none(self) -> bool {
        self.0 == 0
    }

    #[inline(always)]
    pub fn is_over(self) -> bool {
        self.0 & Found::OVER != 0
    }

    /// Whether the packet is the backend's.
    #[inline(always)]
    pub fn is_back(self) -> bool {
        self.0 & Found::BACK != 0
    }

    /// Whether the backend is on this host.
    #[inline(always)]
    pub fn is_local(self) -> bool {
        self.0 & Found::LOCAL != 0
    }

    #[inline(always)]
    pub fn record(self) -> u32 {
        (self.0 as u32).wrapping_sub(1)
    }
}

/// The record of a packet's flow, and whether it is the backend's side.
#[inline(always)]
pub fn find(packet: &Packet) -> Option<(u32, bool)> {
    let found = if packet.is_ipv6 != 0 {
        maps::flow6(&FlowKey6::of_packet(packet))
    } else {
        maps::flow4(&key4(packet))
    };
    let FlowRef { record, is_back } = found?;
    Some((record, is_back != 0))
}

/// A packet's key.
#[inline(always)]
pub fn key4(packet: &Packet) -> FlowKey4 {
    let from = (packet.source.v4_word().to_ne_bytes(), packet.source_port);
    let to = (packet.destination.v4_word().to_ne_bytes(), packet.destination_port);
    FlowKey4::of(from, to, packet.protocol)
}

/// The key of a flow's packets, by its record.
#[inline(always)]
fn key4_of(record: RecordPtr, is_back: bool) -> FlowKey4 {
    let protocol = record.word().protocol;
    if is_back {
        let from = (record.backend().to_ne_bytes(), record.backend_port());
        FlowKey4::of(from, (record.source().to_ne_bytes(), record.source_port()), protocol)
    } else {
        let from = (record.client().to_ne_bytes(), record.client_port());
        FlowKey4::of(from, (record.vip().to_ne_bytes(), record.vip_port()), protocol)
    }
}

/// The same of IPv6.
#[inline(always)]
fn key6_of(record: RecordPtr, idx: u32, is_back: bool) -> Option<FlowKey6> {
    let addresses = maps::addresses6(idx)?;
    // SAFETY: an array's element stays; its record is claimed.
    let read = |address: *const Address| -> Address {
        // By words, as an array of octets would be copied one by one.
        zerocopy::transmute!(unsafe { address.cast::<[u64; 2]>().read_volatile() })
    };
    let protocol = record.word().protocol;
    // SAFETY: as above.
    let (from, to) = unsafe {
        if is_back {
            (&raw const (*addresses).backend, &raw const (*addresses).source)
        } else {
            (&raw const (*addresses).client, &raw const (*addresses).vip)
        }
    };
    let ports = if is_back {
        (record.backend_port(), record.source_port())
    } else {
        (record.client_port(), record.vip_port())
    };
    Some(FlowKey6::of((read(from), ports.0), (read(to), ports.1), protocol))
}

/// Whether a record is of a packet's flow: it may have become another one's since it was found.
#[inline(always)]
pub fn is_of(record: RecordPtr, idx: u32, packet: &Packet, is_back: bool) -> bool {
    let word = record.word();
    if word.client == 0 || word.protocol != packet.protocol {
        return false;
    }
    let ports = if is_back {
        [record.backend_port(), record.source_port()]
    } else {
        [record.client_port(), record.vip_port()]
    };
    if ports != [packet.source_port, packet.destination_port] {
        return false;
    }
    if packet.is_ipv6 != 0 {
        let Some(addresses) = maps::addresses6(idx) else { return false };
        // SAFETY: an array's element stays; what is half-written isn't equal.
        let (from, to) = unsafe {
            if is_back {
                (&raw const (*addresses).backend, &raw const (*addresses).source)
            } else {
                (&raw const (*addresses).client, &raw const (*addresses).vip)
            }
        };
        // SAFETY: as above.
        return unsafe { from.read_volatile() == packet.source }
            && unsafe { to.read_volatile() == packet.destination };
    }
    let (from, to) =
        if is_back { (record.backend(), record.source()) } else { (record.client(), record.vip()) };
    from == packet.source.v4_word() && to == packet.destination.v4_word()
}

/// Follows a flow by the packet that was read, and sets where it goes to. Returns 1, or 0 where there is no
/// such flow any more.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn nohop_edge_follow(found: u64) -> u64 {
    let found = Found(found);
    let (Some(record), Some(scratch)) = (maps::record(found.record()), maps::scratch()) else {
        return 0;
    };
    let (packet, idx, is_back) = (&scratch.packet, found.record(), found.is_back());
    let begun_ms = record.begun_ms();
    if packet.is_error == 0 {
        let now_ms = maps::now_ms();
        let idle_ms = idle_ms(record, now_ms);
        record.set_last_ms(now_ms);
        record.add_packet(packet.len);
        let (word, number) = (record.word(), acknowledged(scratch, is_back));
        let is_unconfirmed = word.is_unconfirmed();
        let is_pending = word.flags & FlowWord::PENDING != 0;
        let mut tcp_flags = packet.tcp_flags;
        if is_unconfirmed && !is_back && (is_pending || !acknowledges(number, record.upper())) {
            tcp_flags &= TCP_RST;
        }
        let shown = word.after(tcp_flags, is_back, idle_ms);
        if shown != if is_back { word.backend } else { word.client } {
            record.set_shown(is_back, shown);
        }
        if packet.protocol == IPPROTO_TCP && record.word().is_unsettled() {
            outcomes::nohop_edge_settle(idx.into());
        }
        let is_syn = is_back && packet.tcp_flags & TCP_SYN != 0;
        let word = record.word();
        if is_syn && word.is_unconfirmed() && word.flags & FlowWord::PENDING == 0 {
            record.set_upper(number);
        }
        // Another processor may have read the acknowledgement meanwhile.
        if (is_syn || is_unconfirmed) && !record.word().has_only_low_bytes() {
            record.set_upper(0);
        }
    }
    set_target(&mut scratch.target, record, found);
    // Another processor may have ended it since it was found, and begun another flow with its record.
    (record.begun_ms() == begun_ms && is_of(record, idx, packet, is_back)).into()
}

/// What the TCP segment that was read acknowledges; a backend's SYN, what is to acknowledge it.
#[inline(always)]
fn acknowledged(scratch: &Scratch, is_back: bool) -> u32 {
    const SEQUENCE: u32 = 4;
    const ACKNOWLEDGEMENT: u32 = 8;
    let Scratch { window, packet, .. } = scratch;
    if packet.protocol != IPPROTO_TCP {
        0
    } else if is_back {
        window.be32(packet.l4 + SEQUENCE).wrapping_add(1)
    } else {
        window.be32(packet.l4 + ACKNOWLEDGEMENT)
    }
}

/// For how long no packet of a flow came, in milliseconds.
#[inline(always)]
fn idle_ms(record: RecordPtr, now_ms: u32) -> u32 {
    let idle_ms = now_ms.wrapping_sub(record.last_ms());
    // Another processor's clock may be ahead.
    if idle_ms > i32::MAX as u32 { 0 } else { idle_ms }
}

#[inline(always)]
fn set_target(target: &mut Target, record: RecordPtr, found: Found) {
    if found.is_back() {
        (target.source_port, target.destination_port) = (record.vip_port(), record.client_port());
    } else {
        (target.source_port, target.destination_port) =
            (record.source_port(), record.backend_port());
    }
    if record.word().is_ipv6() {
        if let Some(addresses) = maps::addresses6(found.record()) {
            // SAFETY: an array's element stays, and it is written before a key leads to the record.
            unsafe {
                if found.is_back() {
                    target.source = (&raw const (*addresses).vip).read_volatile();
                    target.destination = (&raw const (*addresses).client).read_volatile();
                } else {
                    target.source = (&raw const (*addresses).source).read_volatile();
                    target.destination = (&raw const (*addresses).backend).read_volatile();
                }
            }
        }
        return;
    }
    let (source, destination) = if found.is_back() {
        (record.vip(), record.client())
    } else {
        (record.source(), record.backend())
    };
    (target.source, target.destination) =
        (Address::v4(source.to_ne_bytes()), Address::v4(destination.to_ne_bytes()));
}

/// Ends a flow, if no other processor does: removes its keys and frees its record. `end` is the number of a
/// [`FlowEnd`]. Returns 1 if it did.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn nohop_edge_end(record_idx: u64, end: u64) -> u64 {
    let idx = record_idx as u32;
    let Some(record) = maps::record(idx) else { return 0 };
    record.add_claims(1);
    // Its own, and this one.
    if record.claims() != 2 || record.is_none() {
        record.add_claims(-1);
        return 0;
    }
    nohop_edge_remove_key(record_idx, 0);
    nohop_edge_remove_key(record_idx, 1);
    outcomes::nohop_edge_ended(record_idx, end);
    record.clear();
    record.add_claims(-2);
    1
}

/// Inserts a key of a record's flow, the backend's or the client's. Returns 1, or 0 where it is another's.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn nohop_edge_insert_key(record_idx: u64, is_back: u64) -> u64 {
    let (idx, is_back) = (record_idx as u32, is_back != 0);
    let Some(record) = maps::record(idx) else { return 0 };
    let flow = FlowRef { record: idx, is_back: is_back.into() };
    let is_inserted = if record.word().is_ipv6() {
        key6_of(record, idx, is_back).is_some_and(|key| maps::insert6(&key, flow))
    } else {
        maps::insert4(&key4_of(record, is_back), flow)
    };
    is_inserted.into()
}

/// Removes one. Returns nothing of use.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn nohop_edge_remove_key(record_idx: u64, is_back: u64) -> u64 {
    let (idx, is_back) = (record_idx as u32, is_back != 0);
    let Some(record) = maps::record(idx) else { return 0 };
    if !record.word().is_ipv6() {
        maps::remove4(&key4_of(record, is_back));
    } else if let Some(key) = key6_of(record, idx, is_back) {
        maps::remove6(&key);
    }
    0
}

/// Claims a record: a free one, or one whose flow's time is over, among the next few; else one whose flow is as
/// good as over ([`SPENT`]). Where there is neither, and `may_take` says so, one of a flow that may matter still
/// ([`PENDING`]). Returns one more than its index; 0 for none, or [`ONLY_PENDING`] where such a one is all that
/// there was.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn nohop_edge_claim(now_ms: u64, may_take: u64) -> u64 {
    /// How many records are looked at, from where the last search ended: those that were taken longest ago.
    const N_LOOKED_AT: u64 = 64;
    /// How many of them in search of a better one than is found already.
    const N_FOR_FREE: u64 = 8;
    let Some(cursors) = maps::cursors() else { return 0 };
    let first = u64::from(within(cursors.record));
    // What a round finds is kept in memory, and the place is brought back to the first record where it is
    // looked at: the verifier would follow each round once for each case of the rounds before.
    (cursors.spent, cursors.pending) = (0, 0);
    let mut nth = 0;
    while nth < N_LOOKED_AT {
        let seen = nohop_edge_look_at(first + nth, now_ms);
        nth += 1;
        cursors.record = first + nth;
        if seen == CLAIMED {
            return u64::from(within(first + nth - 1)) + 1;
        }
        if seen == SPENT {
            cursors.spent = nth;
        }
        if seen == PENDING {
            cursors.pending = nth;
        }
        if nth >= N_FOR_FREE && cursors.spent != 0 {
            break;
        }
    }
    let mut place = cursors.spent;
    if place == 0 {
        place = cursors.pending;
        if place != 0 && may_take == 0 {
            // The next search finds it again.
            cursors.record = first;
            return ONLY_PENDING;
        }
    }
    if place == 0 {
        return 0;
    }
    let idx = within(first + place - 1);
    let Some(record) = maps::record(idx) else { return 0 };
    // Another processor may have ended that flow meanwhile, and have begun one of its own there.
    let seen = nohop_edge_look_at(first + place - 1, now_ms);
    if seen == CLAIMED {
        return u64::from(idx) + 1;
    }
    if seen == 0 {
        return 0;
    }
    if nohop_edge_end(idx.into(), FlowEnd::Taken as u64) != 0 && claim(record) {
        count(EdgeCounter::Taken);
        return u64::from(idx) + 1;
    }
    0
}

/// Has the next search begin anywhere: flows that other processors began lie side by side, so that where some
/// are in use those beside them are, too. Returns nothing of use.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn nohop_edge_jump() -> u64 {
    let n_records = settings::n_records();
    if let Some(cursors) = maps::cursors()
        && n_records != 0
    {
        cursors.record = u64::from(random::next() % n_records);
    }
    0
}

/// The index of a record, counted on from the last one to the first.
#[inline(always)]
fn within(place: u64) -> u32 {
    let n_records = settings::n_records();
    let place = place as u32;
    if place >= n_records { place.wrapping_sub(n_records) } else { place }
}

/// See [`nohop_edge_claim`].
pub const ONLY_PENDING: u64 = u64::MAX;

/// The record was claimed.
const CLAIMED: u64 = 1;
/// It is that of a connection which isn't established, or of UDP, for a while.
pub const PENDING: u64 = 2;
/// It is that of a connection which is closed, or of a datagram that wasn't answered, for a while.
const SPENT: u64 = 3;
/// It is that of a flow whose time is over.
pub const OVER: u64 = 4;

/// Claims a record if it is free or its flow's time is over. Returns [`CLAIMED`], [`PENDING`], [`SPENT`] or 0.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_edge_look_at(place: u64, now_ms: u64) -> u64 {
    let idx = within(place);
    let Some(record) = maps::record(idx) else { return 0 };
    if record.claims() != 0 {
        let seen = use_of(record, now_ms as u32);
        if seen != OVER {
            return seen;
        }
        if nohop_edge_end(idx.into(), FlowEnd::Timeout as u64) == 0 {
            return 0;
        }
        count(EdgeCounter::Expired);
    }
    if claim(record) { CLAIMED } else { 0 }
}

/// The flow that has the port which a record's flow is to get: the index of its record, and in the upper half
/// [`PENDING`], [`SPENT`] or [`OVER`]; 0 where it is in use, or there is none any more.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn nohop_edge_holder(record_idx: u64, now_ms: u64) -> u64 {
    let idx = record_idx as u32;
    let Some(record) = maps::record(idx) else { return 0 };
    let found = if record.word().is_ipv6() {
        key6_of(record, idx, true).and_then(|key| maps::flow6(&key))
    } else {
        maps::flow4(&key4_of(record, true))
    };
    let Some(FlowRef { record: holder_idx, .. }) = found else { return 0 };
    match maps::record(holder_idx) {
        Some(holder) if holder.claims() != 0 => {
            let seen = use_of(holder, now_ms as u32);
            if seen == 0 { 0 } else { seen << 32 | u64::from(holder_idx) }
        }
        _ => 0,
    }
}

/// Whether a flow still needs its record and its port. Returns [`PENDING`], [`SPENT`] or [`OVER`]; 0 where it does.
#[inline(always)]
fn use_of(record: RecordPtr, now_ms: u32) -> u64 {
    /// For how long after its last packet a flow keeps its record in any case, in milliseconds: one that is
    /// closed, for segments that come late or again; one that isn't answered; UDP.
    const CLOSED_MS: u32 = 2_000;
    const PENDING_MS: u32 = 1_000;
    const UDP_MS: u32 = 10_000;
    let (state, idle_ms) = (record.word().state(), idle_ms(record, now_ms));
    if idle_ms >= settings::timeout_ms(state) {
        return OVER;
    }
    match state {
        FlowState::Closed | FlowState::UdpUnanswered if idle_ms >= CLOSED_MS => SPENT,
        FlowState::SynSent | FlowState::SynReceived if idle_ms >= PENDING_MS => PENDING,
        FlowState::Udp if idle_ms >= UDP_MS => PENDING,
        _ => 0,
    }
}

/// Claims a record if it is free.
#[inline(always)]
fn claim(record: RecordPtr) -> bool {
    if record.claims() != 0 {
        return false;
    }
    record.add_claims(1);
    if record.claims() == 1 {
        return true;
    }
    // Two processors may both find the other one here.
    record.add_claims(-1);
    false
}

//! Flows one by one, while a client traces: when one begins, is refused or ends.
//!
//! What happens is noted where it does, and reported by [`report`] where the stack has room for it.

use aya_ebpf::btf_maps::RingBuf;
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::macros::btf_map;
use lb_common::{
    Address, EdgeCounter, FlowAddresses6, FlowEvent, FlowEventKind, FlowState, flow_cookie,
    is_sampled,
};

use crate::maps::{self, count};
use crate::record::RecordPtr;

/// It isn't pinned: each daemon has its own.
#[btf_map]
static TRACE: RingBuf<FlowEvent, 262_144> = RingBuf::new();

/// Notes something of the flow with this record, if flows are traced. While they aren't that is one load.
#[inline(always)]
fn note(kind: FlowEventKind, reason: u32, state: FlowState, record_idx: u32) {
    if maps::trace_until_ns() != 0
        && let Some(scratch) = maps::scratch()
    {
        let noted = kind as u32 | reason << 8 | (state as u32) << 16;
        (scratch.traced, scratch.traced_record) = (noted, record_idx);
    }
}

/// Notes that the flow with this record has begun.
#[inline(always)]
pub fn begun(record: RecordPtr, record_idx: u32) {
    let reason = maps::scratch().map_or(0, |scratch| scratch.choice);
    note(FlowEventKind::Begun, reason, record.word().state(), record_idx);
}

/// Notes that it is over in this state, for the reason with this number, see [`FlowEnd`](lb_common::FlowEnd). Its
/// record may be freed before that is reported, but no other flow gets it till then.
#[inline(always)]
pub fn ended(record_idx: u32, end: u64, state: FlowState) {
    note(FlowEventKind::Ended, end as u32, state, record_idx);
}

/// Counts why the packet that was read begins no flow, and notes that.
#[inline(always)]
pub fn refused(why: EdgeCounter) {
    count(why);
    note(FlowEventKind::Refused, why as u32, FlowState::None, 0);
}

/// Reports what was noted.
#[inline(always)]
pub fn report() {
    if maps::scratch().is_some_and(|scratch| scratch.traced != 0) {
        nohop_edge_trace();
    }
}

/// A global function: the verifier follows it once. The event is made in memory that no stack has room for. It
/// returns nothing of use.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_edge_trace() -> u64 {
    let Some(scratch) = maps::scratch() else { return 0 };
    let (noted, record_idx) = (scratch.traced, scratch.traced_record);
    scratch.traced = 0;
    // SAFETY: the helper has no preconditions.
    let at_ns = unsafe { bpf_ktime_get_ns() };
    if at_ns >= maps::trace_until_ns() {
        return 0;
    }
    let (packet, event) = (&scratch.packet, &mut scratch.event);
    event.at_ns = at_ns;
    let [kind, reason, state, _] = noted.to_le_bytes();
    (event.kind, event.reason, event.state) = (kind, reason, state);
    let is_ipv6 = if event.kind == FlowEventKind::Refused as u8 {
        (event.client, event.vip) = (packet.source, packet.destination);
        (event.client_port, event.vip_port) = (packet.source_port, packet.destination_port);
        (event.backend, event.backend_port) = (Address::default(), 0);
        (event.source, event.source_port) = (Address::default(), 0);
        (event.packets, event.bytes) = (1, packet.len.into());
        event.protocol = packet.protocol;
        packet.is_ipv6 != 0
    } else {
        let Some(record) = maps::record(record_idx) else { return 0 };
        if !fill(event, record, record_idx) {
            return 0;
        }
        record.word().is_ipv6()
    };
    event.cookie = flow_cookie(&event.client, event.client_port, event.vip_port);
    if !is_sampled(event.cookie, maps::trace_max_hash()) {
        return 0;
    }
    let service = maps::service_at(&event.vip, event.vip_port, event.protocol, is_ipv6);
    event.service = service.unwrap_or(u32::MAX);
    if TRACE.output(*event, 0).is_err() {
        maps::count_trace_lost();
    }
    0
}

/// Fills in what a flow's record has; false where that isn't possible.
#[inline(always)]
fn fill(event: &mut FlowEvent, record: RecordPtr, record_idx: u32) -> bool {
    let word = record.word();
    if word.is_ipv6() {
        let Some(addresses) = maps::addresses6(record_idx) else { return false };
        // SAFETY: an array's element stays, and its record is this flow's.
        let FlowAddresses6 { client, vip, backend, source } = unsafe { &*addresses };
        (event.client, event.vip) = (*client, *vip);
        (event.backend, event.source) = (*backend, *source);
    } else {
        let v4 = |address: u32| Address::v4(address.to_ne_bytes());
        (event.client, event.vip) = (v4(record.client()), v4(record.vip()));
        (event.backend, event.source) = (v4(record.backend()), v4(record.source()));
    }
    (event.client_port, event.vip_port) = (record.client_port(), record.vip_port());
    (event.backend_port, event.source_port) = (record.backend_port(), record.source_port());
    (event.packets, event.bytes) = (record.packets(), record.bytes());
    event.protocol = word.protocol;
    true
}

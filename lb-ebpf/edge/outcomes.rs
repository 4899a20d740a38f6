//! What connections show of backends, as the unit `outcomes` has it of those from this host: which are in
//! flight or pending, and what ejects.

use lb_common::{
    BackendEntry, BackendWords as _, EjectionWord, FlowRecord, FlowState, IPPROTO_TCP, Sign,
};

use crate::choice::Kernel;
use crate::maps::{self, RecordPtr};
use crate::tables::{self, BackendPtr};
use core::intrinsics::{AtomicOrdering, atomic_xadd};
use lb_common::Tables as _;

macro_rules! store {
    // SAFETY: an array's element stays, and this is an aligned word of it. Of two stores at once the last
    // one wins.
    ($backend:ident . $word:ident = $value:expr) => {{
        let (value, entry): (_, *mut BackendEntry) = ($value, $backend.0);
        unsafe { (&raw mut (*entry).outcomes.$word).write_volatile(value) }
    }};
}

/// The backend of a flow, if it is still that.
#[inline(always)]
fn backend_of(record: RecordPtr) -> Option<BackendPtr> {
    let backend = tables::backend(record.backend_idx())?;
    let generation = record.generation();
    (generation != 0 && backend.backend().generation == generation).then_some(backend)
}

#[inline(always)]
fn add(backend: BackendPtr, in_flight: i32, pending: i32) {
    // SAFETY: an array's element stays; these words of it are written by atomic addition only. The results
    // are unused, which makes this XADD: the verifier of 5.10 rejects a fetching addition.
    unsafe {
        let outcomes = &raw mut (*backend.0).outcomes;
        if in_flight != 0 {
            let word = (&raw mut (*outcomes).in_flight).cast();
            atomic_xadd::<u32, u32, { AtomicOrdering::Relaxed }>(word, in_flight.cast_unsigned());
        }
        if pending != 0 {
            let word = (&raw mut (*outcomes).pending).cast();
            atomic_xadd::<u32, u32, { AtomicOrdering::Relaxed }>(word, pending.cast_unsigned());
        }
    }
}

/// A TCP flow has begun with its SYN.
#[inline(always)]
pub fn begun(record: RecordPtr) {
    let Some(backend) = backend_of(record) else { return };
    let mut flags = record.flags() | FlowRecord::IN_FLIGHT | FlowRecord::PENDING;
    let ejection = backend.ejection();
    if ejection.is_claimed()
        && let Some(limits) = maps::limits()
    {
        let now_ns = Kernel.now_ns();
        backend.set_ejection(EjectionWord::of(ejection.at(now_ns).begin_trial(now_ns, &limits)));
        flags |= FlowRecord::TRIAL;
    }
    record.set_flags(flags);
    if backend.pending() <= 0 || backend.unanswered_since_us() == 0 {
        store!(backend.unanswered_since_us = now_us());
    }
    add(backend, 1, 1);
}

/// A TCP flow's state or flags change. Returns nothing of use.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn nohop_edge_change(record_idx: u64, how: u64) -> u64 {
    let Some(record) = maps::record(record_idx as u32) else { return 0 };
    let (state, next, is_back) = (how as u8, (how >> 8) as u8, how >> 24 & 1 != 0);
    let mut flags = (how >> 16) as u8;
    let backend = backend_of(record);
    let is_closed = next == FlowState::Closed as u8 && state != FlowState::Closed as u8;
    let mut sign = None;
    let (mut in_flight, mut pending) = (0, 0);
    if flags & FlowRecord::PENDING != 0 && next != FlowState::SynSent as u8 {
        flags &= !FlowRecord::PENDING;
        pending = -1;
        if let Some(backend) = backend
            && is_back
        {
            store!(backend.unanswered_since_us = 0);
        }
        sign = match (is_closed, is_back) {
            (false, _) => Some(Sign::Answered),
            (true, true) => Some(Sign::Refused),
            (true, false) => (flags & FlowRecord::TRIAL != 0).then_some(Sign::TrialAborted),
        };
    } else if is_closed {
        // A RST before the client's FIN, or the end in order.
        const FINS: u8 = FlowRecord::CLIENT_FIN | FlowRecord::BACKEND_FIN;
        sign = match flags & FINS {
            0 if is_back => Some(Sign::Reset),
            FINS => Some(Sign::Closed),
            _ => None,
        };
    }
    if is_closed && flags & FlowRecord::IN_FLIGHT != 0 {
        flags &= !FlowRecord::IN_FLIGHT;
        in_flight = -1;
    }
    record.set_flags(flags);
    record.set_state(next);
    if let Some(backend) = backend {
        add(backend, in_flight, pending);
    }
    if let Some(sign) = sign {
        if sign == Sign::Refused {
            count_failure(record, record_idx as u32);
        }
        defer(record_idx as u32, sign);
    }
    0
}

/// Has a sign applied by [`apply`]: not here, as the stacks of all that leads here together have 512 bytes.
#[inline(always)]
fn defer(record_idx: u32, sign: Sign) {
    if let Some(scratch) = maps::scratch() {
        (scratch.sign, scratch.sign_record) = (sign as u32 + 1, record_idx);
    }
}

/// Applies what a flow showed of its backend, if it did. Its record may be free by now, but no other flow's yet.
#[inline(always)]
pub fn apply() {
    if let Some(scratch) = maps::scratch()
        && scratch.sign != 0
    {
        nohop_edge_sign(scratch.sign_record.into(), u64::from(scratch.sign) - 1);
        scratch.sign = 0;
    }
}

/// A flow's record is about to be freed. Returns nothing of use.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn nohop_edge_ended(record_idx: u64) -> u64 {
    let Some(record) = maps::record(record_idx as u32) else { return 0 };
    let flags = record.flags();
    let is_pending = flags & FlowRecord::PENDING != 0;
    let in_flight = if flags & FlowRecord::IN_FLIGHT != 0 { -1 } else { 0 };
    if let Some(backend) = backend_of(record) {
        add(backend, in_flight, if is_pending { -1 } else { 0 });
    }
    if is_pending {
        // Its time is over, and the backend hasn't answered.
        count_failure(record, record_idx as u32);
        defer(record_idx as u32, Sign::Failed);
    }
    record.set_flags(flags & !(FlowRecord::PENDING | FlowRecord::IN_FLIGHT));
    0
}

/// The service that a flow's VIP leads to now.
#[inline(always)]
fn service_of(record: RecordPtr, record_idx: u32) -> Option<u32> {
    let is_ipv6 = record.flags() & FlowRecord::IPV6 != 0;
    let vip = match is_ipv6 {
        // SAFETY: an array's element stays, and it is written before a key leads to the record.
        true => unsafe { (&raw const (*maps::addresses6(record_idx)?).vip).read_volatile() },
        false => lb_common::Address::v4(record.vip().to_ne_bytes()),
    };
    maps::service_at(&vip, record.vip_port(), IPPROTO_TCP, is_ipv6)
}

#[inline(always)]
fn count_failure(record: RecordPtr, record_idx: u32) {
    if let Some(service) = service_of(record, record_idx) {
        maps::count_failure(service);
    }
}

/// Applies a sign to the ejection of a flow's backend. Returns nothing of use.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_edge_sign(record_idx: u64, sign: u64) -> u64 {
    let Some(record) = maps::record(record_idx as u32) else { return 0 };
    let (Some(backend), Some(limits)) = (backend_of(record), maps::limits()) else { return 0 };
    const REFUSED: u64 = Sign::Refused as u64;
    const FAILED: u64 = Sign::Failed as u64;
    const RESET: u64 = Sign::Reset as u64;
    const CLOSED: u64 = Sign::Closed as u64;
    const TRIAL_ABORTED: u64 = Sign::TrialAborted as u64;
    let sign = match sign {
        REFUSED => Sign::Refused,
        FAILED => Sign::Failed,
        RESET => Sign::Reset,
        CLOSED => Sign::Closed,
        TRIAL_ABORTED => Sign::TrialAborted,
        _ => Sign::Answered,
    };
    let before = backend.ejection();
    if !before.is_changed_by(sign) {
        return 0;
    }
    let (after, event) = before.after(sign, Kernel.now_ns(), &limits);
    backend.set_ejection(after);
    if let (Some(kind), Some(service)) = (event, service_of(record, record_idx as u32)) {
        maps::emit_ejection(kind, service, record.backend_idx(), record.generation());
    }
    0
}

/// The low 32 bits of CLOCK_MONOTONIC in microseconds; 1 for 0, which is no time.
#[inline(always)]
fn now_us() -> u32 {
    let now_us = (Kernel.now_ns() / 1_000) as u32;
    if now_us == 0 { 1 } else { now_us }
}

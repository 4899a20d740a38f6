//! What connections show of backends, as the unit `outcomes` has it of those from this host: which are in
//! flight or pending, and what ejects.

use lb_common::{
    Address, BackendEntry, BackendWords as _, EjectionWord, FlowEnd, FlowState, FlowWord,
    IPPROTO_TCP, Sign, peak_average_us,
};

use crate::choice::Kernel;
use crate::maps::{self, Scratch};
use crate::record::RecordPtr;
use crate::tables::{self, BackendPtr};
use crate::trace;
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
    backend(record.backend_idx(), record.generation())
}

/// A backend, if it is still the one of this generation.
#[inline(always)]
fn backend(backend_idx: u32, generation: u32) -> Option<BackendPtr> {
    let backend = tables::backend(backend_idx)?;
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

/// Whether a backend may still answer a SYN: it is in the table, and neither ejected nor silent.
#[inline(always)]
pub fn may_answer(backend_idx: u32, generation: u32) -> bool {
    maps::is_in_table(backend_idx, generation)
        && Kernel.state_of(backend_idx, maps::now_ns(), false).is_sound()
}

/// The flags of a TCP flow to a backend that is about to begin with its SYN. One that a sound backend may leave without
/// an answer, or refuse, isn't pending, so nothing follows from that, nor is it a trial; but that it is answered returns
/// a backend that is ejected. On this host a refusal shows something too, but no silence: the host itself may drop what
/// comes from a forged address.
#[inline(always)]
pub fn flags_of(backend: BackendPtr, is_conclusive: bool, is_local: bool) -> u8 {
    let ejection = backend.ejection();
    if !is_conclusive || is_local {
        let refusal = if is_conclusive { FlowWord::SHOWS_REFUSAL } else { 0 };
        let is_changed = ejection.is_changed_by(Sign::Answered);
        let answer = if is_changed { FlowWord::SHOWS_ANSWER } else { 0 };
        return FlowWord::IN_FLIGHT | refusal | answer;
    }
    let trial = if ejection.is_claimed() { FlowWord::TRIAL } else { 0 };
    FlowWord::IN_FLIGHT | FlowWord::PENDING | trial
}

/// A TCP flow has begun with its SYN.
#[inline(always)]
pub fn begun(record: RecordPtr) {
    let Some(backend) = backend_of(record) else { return };
    if record.word().flags & FlowWord::TRIAL != 0
        && let Some(limits) = maps::limits()
    {
        let (ejection, now_ns) = (backend.ejection(), maps::now_ns());
        backend.set_ejection(EjectionWord::of(ejection.at(now_ns).begin_trial(now_ns, &limits)));
    }
    if record.word().flags & FlowWord::PENDING == 0 {
        return add(backend, 1, 0);
    }
    if backend.pending() <= 0 || backend.unanswered_since_us() == 0 {
        store!(backend.unanswered_since_us = now_us());
    }
    add(backend, 1, 1);
}

/// Has what is counted of a backend's connections be what it is to be by the state of a TCP flow, and keeps what
/// that shows of the backend. Where another processor does so, or ends the flow, that is left to it, or to the
/// flow's next packet, or to its end. Returns nothing of use.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn nohop_edge_settle(record_idx: u64) -> u64 {
    let Some(record) = maps::record(record_idx as u32) else { return 0 };
    record.add_claims(1);
    // The flow's own, and this one.
    if record.claims() == 2 {
        settle(record, record_idx as u32);
    }
    record.add_claims(-1);
    0
}

#[inline(always)]
fn settle(record: RecordPtr, record_idx: u32) {
    let word = record.word();
    let (mut flags, backend) = (word.flags, backend_of(record));
    if word.client == 0 {
        return;
    }
    let (is_open, is_answered) = (word.is_open(), word.backend & FlowWord::FIRST != 0);
    let mut sign = None;
    let (mut in_flight, mut pending) = (0, 0);
    if flags & FlowWord::PENDING != 0 && (word.backend != 0 || !is_open) {
        flags &= !FlowWord::PENDING;
        pending = -1;
        if let Some(backend) = backend
            && word.backend != 0
        {
            store!(backend.unanswered_since_us = 0);
            // Of a SYN that was sent again it isn't known which one was answered (Karn's algorithm).
            if is_answered && record.packets() == 2 {
                let connect_us = now_us().wrapping_sub(record.upper());
                if connect_us <= i32::MAX as u32 {
                    store!(
                        backend.connect_us =
                            peak_average_us(backend.connect_us(), connect_us.max(1))
                    );
                }
            }
        }
        record.set_upper(0);
        sign = if is_answered {
            Some(Sign::Answered)
        } else if word.backend & FlowWord::RST != 0 {
            Some(Sign::Refused)
        } else {
            (flags & FlowWord::TRIAL != 0).then_some(Sign::TrialAborted)
        };
    } else if flags & FlowWord::SHOWS_ANSWER != 0 && is_answered {
        flags &= !FlowWord::SHOWS_ANSWER;
        sign = Some(Sign::Answered);
    } else if !is_open && flags & FlowWord::IN_FLIGHT != 0 {
        // A RST before any FIN, or the end in order.
        let (either, both) = (word.client | word.backend, word.client & word.backend);
        sign = if both & FlowWord::FIN != 0 {
            Some(Sign::Closed)
        } else {
            let is_reset = either & FlowWord::FIN == 0 && word.backend & FlowWord::RST != 0;
            let is_established = word.client & FlowWord::ACK != 0;
            // Of a SYN that was dropped the RST may be the answer to what came behind it.
            let is_refused = flags & FlowWord::SHOWS_REFUSAL != 0 && record.packets() == 2;
            match is_answered {
                // A server that is well resets what an acknowledgement of something else came for.
                true => (is_reset && is_established).then_some(Sign::Reset),
                false => (is_reset && is_refused).then_some(Sign::Refused),
            }
        };
    }
    if is_open != (flags & FlowWord::IN_FLIGHT != 0) {
        flags ^= FlowWord::IN_FLIGHT;
        in_flight = if is_open { 1 } else { -1 };
        if !is_open {
            trace::ended(record_idx, end_of(word) as u64, FlowState::Closed);
        }
    }
    record.set_flags(flags);
    if let Some(backend) = backend {
        add(backend, in_flight, pending);
    }
    if let Some(sign) = sign {
        if sign == Sign::Refused {
            count_failure(record, record_idx);
        }
        defer(record_idx, sign);
    }
}

/// Why a connection that is closed is.
#[inline(always)]
fn end_of(word: FlowWord) -> FlowEnd {
    if word.backend & FlowWord::RST != 0 {
        let is_answered = word.backend & FlowWord::FIRST != 0;
        if is_answered { FlowEnd::BackendReset } else { FlowEnd::Refused }
    } else if word.client & FlowWord::RST != 0 {
        FlowEnd::ClientReset
    } else {
        FlowEnd::Closed
    }
}

/// Has a sign applied by [`apply`]: not here, as the stacks of all that leads here together have 512 bytes.
#[inline(always)]
fn defer(record_idx: u32, sign: Sign) {
    let (Some(record), Some(scratch)) = (maps::record(record_idx), maps::scratch()) else { return };
    let shown = &mut scratch.shown;
    shown.sign = sign as u32 + 1;
    (shown.backend_idx, shown.generation) = (record.backend_idx(), record.generation());
    (shown.vip_port, shown.is_ipv6) = (record.vip_port(), record.word().is_ipv6());
    if let Some(vip) = vip_of(record, record_idx) {
        shown.vip = vip;
    }
}

/// Applies what a flow showed of its backend, if it did, and reports its end, if that is traced. Its record may be
/// another flow's by now: then what is reported is that one's, which is rare.
#[inline(always)]
pub fn apply() {
    trace::report();
    if let Some(scratch) = maps::scratch()
        && scratch.shown.sign != 0
    {
        nohop_edge_sign(u64::from(scratch.shown.sign) - 1);
        scratch.shown.sign = 0;
    }
}

/// A flow's record is about to be freed: for the reason with that number, see [`FlowEnd`]. Returns nothing of use.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn nohop_edge_ended(record_idx: u64, end: u64) -> u64 {
    let Some(record) = maps::record(record_idx as u32) else { return 0 };
    let word = record.word();
    let flags = word.flags;
    // The end of one that was closed is reported already.
    let state = word.state();
    if state as u8 != FlowState::Closed as u8 {
        trace::ended(record_idx as u32, end, state);
    }
    let is_pending = flags & FlowWord::PENDING != 0;
    let in_flight = if flags & FlowWord::IN_FLIGHT != 0 { -1 } else { 0 };
    if let Some(backend) = backend_of(record) {
        add(backend, in_flight, if is_pending { -1 } else { 0 });
    }
    if is_pending {
        record.set_upper(0);
        // Its time is over, and the backend hasn't answered.
        count_failure(record, record_idx as u32);
        defer(record_idx as u32, Sign::Failed);
    }
    record.set_flags(flags & !(FlowWord::PENDING | FlowWord::IN_FLIGHT));
    0
}

/// The address of a flow's VIP.
#[inline(always)]
fn vip_of(record: RecordPtr, record_idx: u32) -> Option<Address> {
    Some(match record.word().is_ipv6() {
        // SAFETY: an array's element stays, and it is written before a key leads to the record.
        true => unsafe { (&raw const (*maps::addresses6(record_idx)?).vip).read_volatile() },
        false => Address::v4(record.vip().to_ne_bytes()),
    })
}

/// The service that a flow's VIP leads to now.
#[inline(always)]
fn service_of(record: RecordPtr, record_idx: u32) -> Option<u32> {
    let vip = vip_of(record, record_idx)?;
    maps::service_at(&vip, record.vip_port(), IPPROTO_TCP, record.word().is_ipv6())
}

#[inline(always)]
fn count_failure(record: RecordPtr, record_idx: u32) {
    if let Some(service) = service_of(record, record_idx) {
        maps::count_failure(service);
    }
}

/// Applies a sign to the ejection of the backend that [`Shown`](maps::Shown) names. Returns nothing of use.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_edge_sign(sign: u64) -> u64 {
    let Some(Scratch { shown, .. }) = maps::scratch() else { return 0 };
    let (Some(backend), Some(limits)) =
        (backend(shown.backend_idx, shown.generation), maps::limits())
    else {
        return 0;
    };
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
    let (after, event) = before.after(sign, maps::now_ns(), &limits);
    backend.set_ejection(after);
    let service = || maps::service_at(&shown.vip, shown.vip_port, IPPROTO_TCP, shown.is_ipv6);
    if let Some(kind) = event
        && let Some(service) = service()
    {
        maps::emit_ejection(kind, service, shown.backend_idx, shown.generation);
    }
    0
}

/// The low 32 bits of [`maps::now_ns`] in microseconds; 1 for 0, which is no time.
#[inline(always)]
pub fn now_us() -> u32 {
    let now_us = (maps::now_ns() / 1_000) as u32;
    if now_us == 0 { 1 } else { now_us }
}

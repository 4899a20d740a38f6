//! The unit `names`: a program at the ingress of network interfaces that answers DNS queries about
//! routed names, so that they are answered while no daemon runs. An object of its own, so that a kernel
//! that refuses it refuses it alone.
#![no_std]
#![no_main]
// The target has no compare-and-exchange, so the atomic types lack the addition that it does have.
#![feature(core_intrinsics)]
#![allow(internal_features)]

mod clients;
mod headers;
mod maps;
mod reply;
mod skb;

use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use lb_common::{ListenKey, NAMES_HEARTBEAT_NS, NameAddresses, NameRecord, answer_to, read_query};

use crate::headers::{Headers, Receiver};
use crate::maps::{ControlPtr, DaemonState, Scratch};
use crate::skb::{Message, Skb};

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    // Never reached: nothing here panics, and the verifier rejects a program that could loop.
    loop {}
}

/// What is decided on a query, as a number, because functions that the verifier follows once return numbers.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Decision {
    /// It goes on as it came, to the daemon or another server.
    Pass = 0,
    /// The answer is in [`Scratch`](maps::Scratch).
    Answer = 1,
    /// The same, to the daemon's probe.
    AnswerProbe = 2,
    /// The answer is that the server failed.
    Fail = 3,
    /// The client sends too many.
    Drop = 4,
}

/// Attached to the ingress of interfaces by tcx, or by clsact before Linux 6.6. Other filters go on
/// with what it leaves.
///
/// Its parts are global functions, which the verifier follows once each, rather than for each way that leads
/// there. They take the context and numbers, as 5.10 wants it; the rest is in [`Scratch`](maps::Scratch), of
/// whose contents the verifier knows nothing.
#[classifier]
pub fn nohop_names(ctx: TcContext) -> i32 {
    let skb = Skb::of(&ctx);
    let listener = nohop_names_match(skb.0) as u32;
    // A broadcast has a unicast's IP address in a forged packet.
    if listener == 0
        || !skb.is_for_host()
        || listener == ListenKey::SHARED && headers::receiver(&skb) == Receiver::Own
    {
        return TC_ACT_UNSPEC;
    }
    let decision = nohop_names_decide(skb.0);
    if decision == Decision::Pass as u64 {
        return TC_ACT_UNSPEC;
    }
    if decision == Decision::Drop as u64 {
        maps::counters().count_limited();
        return TC_ACT_SHOT;
    }
    reply::send(&skb, decision)
}

/// Reads the headers of a packet. Returns how the daemon listens where it goes; 0 for any other packet.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_names_match(ctx: *mut __sk_buff) -> u64 {
    let Some(headers) = Headers::read(&Skb(ctx)) else { return 0 };
    let listener = maps::listener(&headers.destination, headers.port);
    let (Some(listener), Some(scratch)) = (listener, maps::scratch()) else { return 0 };
    scratch.headers = headers;
    listener.into()
}

/// A [`Decision`].
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_names_decide(ctx: *mut __sk_buff) -> u64 {
    let skb = Skb(ctx);
    let (Some(control), Some(scratch)) = (maps::control(), maps::scratch()) else {
        return Decision::Pass as u64;
    };
    decide(&skb, control, scratch) as u64
}

#[inline(always)]
fn decide(skb: &Skb, control: ControlPtr, scratch: &Scratch) -> Decision {
    let now_ns = now_ns();
    let DaemonState { heartbeat_ns, table_ns, max_age_ns } = maps::daemon();
    // One that starts leaves queries in its sockets, and one that stops doesn't read them any more.
    let is_alive = control.is_ready() && now_ns.saturating_sub(heartbeat_ns) < NAMES_HEARTBEAT_NS;
    // A daemon that stops takes its heartbeat back, not when its table was right.
    let last_ns = heartbeat_ns.max(table_ns);
    let are_kept = last_ns.saturating_sub(control.heartbeat_ns()) < NAMES_HEARTBEAT_NS;
    if !are_kept || control.is_off() {
        return Decision::Pass;
    }
    match clients::nohop_names_admit(skb.0, now_ns) {
        clients::ADMITTED => {}
        clients::LIMITED => return Decision::Drop,
        _ => return Decision::Pass,
    }
    // Zero for none; else one more than the index.
    let found = match nohop_names_read(skb.0) {
        0 => 0,
        _ => maps::record_index(&scratch.key).map_or(0, |record| u64::from(record) + 1),
    };
    let is_wrong =
        control.is_detached() || max_age_ns != 0 && now_ns.saturating_sub(table_ns) >= max_age_ns;
    let flags = if found == 0 { 0 } else { maps::record_flags(found as u32 - 1) };
    let (is_cold, is_probe) = (flags & NameRecord::COLD != 0, flags & NameRecord::PROBE != 0);
    if control.passes(is_alive, skb.is_loopback(), scratch.headers.is_ipv6) && !is_probe {
        return Decision::Pass;
    }
    let is_answered = found != 0 && (!is_wrong || is_probe) && nohop_names_answer(found - 1) != 0;
    // A query about a cold service is a demand for it, and the daemon explains what is wrong, as long as
    // one runs. Everything else passes to the socket that has the port. Without one it would be refused,
    // and resolvers go on more quickly after an error of the server.
    if (is_wrong || is_cold || !is_answered) && !is_probe {
        let is_daemons = is_alive || found == 0 || !is_answered && !is_wrong;
        if is_daemons && headers::receiver(skb) != Receiver::None {
            return Decision::Pass;
        }
    }
    if !is_answered {
        return match reply::is_query(skb, &scratch.headers) {
            true => Decision::Fail,
            false => Decision::Pass,
        };
    }
    if let Some(record) = maps::record(found as u32 - 1) {
        record.count(now_ns);
    }
    if is_probe { Decision::AnswerProbe } else { Decision::Answer }
}

/// Reads the query and its name. Returns 1, or 0 where it isn't about a name of the zone.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_names_read(ctx: *mut __sk_buff) -> u64 {
    let (Some(control), Some(scratch)) = (maps::control(), maps::scratch()) else { return 0 };
    let message = Message { skb: &Skb(ctx), offset: scratch.headers.message };
    let Some(query) = read_query(&message, scratch.headers.message_len, control, &mut scratch.key)
    else {
        return 0;
    };
    scratch.query = query;
    1
}

/// Makes the answer about the name of a record. Returns 1, or 0 where the daemon is to give it.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_names_answer(record: u64) -> u64 {
    let (Some(control), Some(scratch)) = (maps::control(), maps::scratch()) else { return 0 };
    let Some(record) = maps::record(record as u32) else { return 0 };
    let (vip, flags) = record.vip();
    let has_vip6 = flags & NameRecord::HAS_VIP6 != 0;
    let addresses = NameAddresses { vip, vip6: has_vip6.then(|| record.vip6()) };
    let Some(answer) = answer_to(&scratch.query, &addresses, control, &mut scratch.records) else {
        return 0;
    };
    scratch.answer = answer;
    1
}

#[inline(always)]
fn now_ns() -> u64 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_ktime_get_ns() }
}

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

use core::hint::black_box;

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use lb_common::{NAMES_HEARTBEAT_NS, NameAddresses, NameRecord, answer_to, read_query};

use crate::clients::Admission;
use crate::headers::Headers;
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

/// What is decided on a query.
enum Decision {
    /// It goes on as it came, to the daemon or another server.
    Pass,
    /// The answer is in [`Scratch`].
    Answer,
    /// The answer is that the server failed.
    Fail,
    /// The client sends too many.
    Drop,
}

/// Attached to the ingress of interfaces by tcx, or by clsact before Linux 6.6. Other filters go on
/// with what it leaves.
#[classifier]
pub fn nohop_names(ctx: TcContext) -> i32 {
    let skb = Skb::of(&ctx);
    let Some(headers) = Headers::read(&skb) else { return TC_ACT_UNSPEC };
    if !maps::is_listener(&headers.destination, headers.port) {
        return TC_ACT_UNSPEC;
    }
    let (Some(control), Some(scratch)) = (maps::control(), maps::scratch()) else {
        return TC_ACT_UNSPEC;
    };
    scratch.headers = headers;
    // As in memory that others may have changed, of which neither compiler nor verifier knows anything.
    let scratch = black_box(scratch);
    let is_failure = match decide(&skb, control, scratch) {
        Decision::Pass => return TC_ACT_UNSPEC,
        Decision::Answer => false,
        Decision::Fail => true,
        Decision::Drop => {
            maps::counters().count_limited();
            return TC_ACT_SHOT;
        }
    };
    reply::send(&skb, black_box(scratch), is_failure)
}

#[inline(always)]
fn decide(skb: &Skb, control: ControlPtr, scratch: &mut Scratch) -> Decision {
    let now_ns = now_ns();
    let DaemonState { heartbeat_ns, table_ns, max_age_ns } = maps::daemon();
    let is_alive = now_ns.saturating_sub(heartbeat_ns) < NAMES_HEARTBEAT_NS;
    // A daemon that stops takes its heartbeat back, not when its table was right.
    let last_ns = heartbeat_ns.max(table_ns);
    let are_kept = last_ns.saturating_sub(control.heartbeat_ns()) < NAMES_HEARTBEAT_NS;
    if !are_kept || !control.answers(is_alive) {
        return Decision::Pass;
    }
    match clients::admit(skb, &scratch.headers, control, now_ns) {
        Admission::Admitted => {}
        Admission::Refused => return Decision::Pass,
        Admission::Limited => return Decision::Drop,
    }
    let message = Message { skb, offset: scratch.headers.message };
    let len = scratch.headers.message_len;
    let query = read_query(&message, len, control, &mut scratch.key);
    let found = query.and_then(|query| Some((query, maps::record(&scratch.key)?)));
    let is_wrong =
        control.is_detached() || max_age_ns != 0 && now_ns.saturating_sub(table_ns) >= max_age_ns;
    let is_cold = found.is_some_and(|(_, record)| record.vip().1 & NameRecord::COLD != 0);
    let answer = match found {
        Some((query, record)) if !is_wrong => {
            let (vip, flags) = record.vip();
            let has_vip6 = flags & NameRecord::HAS_VIP6 != 0;
            let addresses = NameAddresses { vip, vip6: has_vip6.then(|| record.vip6()) };
            answer_to(&query, &addresses, control, &mut scratch.records)
        }
        _ => None,
    };
    // A query about a cold service is a demand for it, and the daemon explains what is wrong, as long as
    // one runs. Everything else passes to the socket that has the port. Without one it would be refused,
    // and resolvers go on more quickly after an error of the server.
    if is_wrong || is_cold || answer.is_none() {
        let is_daemons = is_alive || found.is_none() || answer.is_none() && !is_wrong;
        if is_daemons && scratch.headers.has_socket(skb) {
            return Decision::Pass;
        }
    }
    let (Some((query, record)), Some(answer)) = (found, answer) else {
        return if reply::is_query(skb, &scratch.headers) {
            Decision::Fail
        } else {
            Decision::Pass
        };
    };
    (scratch.query, scratch.answer) = (query, answer);
    record.count(now_ns);
    Decision::Answer
}

#[inline(always)]
fn now_ns() -> u64 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_ktime_get_ns() }
}

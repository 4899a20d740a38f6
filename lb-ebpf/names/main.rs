//! The unit `names`: a program at the ingress of network interfaces that answers DNS queries about
//! routed names, so that they are answered while no daemon runs. An object of its own, so that a kernel
//! that refuses it refuses it alone.
#![no_std]
#![no_main]
// The target has no compare-and-exchange, so the atomic types lack the addition that it does have.
#![feature(asm_experimental_arch, core_intrinsics)]
#![allow(internal_features)]

mod clients;
mod clock;
mod headers;
mod maps;
mod packet;
mod reply;
mod skb;

use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use lb_common::{
    ListenKey, NAMES_HEARTBEAT_NS, NameAddresses, NameRecord, answer, fail, read_query,
};

use crate::headers::{Headers, Receiver};
use crate::maps::{ControlPtr, DaemonState, Scratch};
use crate::packet::copied_len;
use crate::skb::Skb;

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
/// The usual way has one call of a function that the verifier follows once, and not for each way that leads
/// there; what is rare has one each. They take the context and numbers, as 5.10 wants it; the rest is in
/// [`Scratch`], of whose contents the verifier knows nothing.
#[classifier]
pub fn nohop_names(ctx: TcContext) -> i32 {
    let skb = Skb::of(&ctx);
    let Some(headers) = Headers::read(&skb) else { return TC_ACT_UNSPEC };
    let Some(listener) = maps::listener(&headers.destination, headers.port) else {
        return TC_ACT_UNSPEC;
    };
    let Some(scratch) = maps::scratch() else { return TC_ACT_UNSPEC };
    scratch.headers = headers;
    // A broadcast has a unicast's IP address in a forged packet.
    if !skb.is_for_host()
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
    reply::send(&skb, scratch, decision)
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
fn decide(skb: &Skb, control: ControlPtr, scratch: &mut Scratch) -> Decision {
    let now_ns = scratch.clock.now_ns();
    let Some(DaemonState { heartbeat_ns, table_ns, max_age_ns }) = maps::daemon() else {
        return Decision::Pass;
    };
    // A daemon that stops takes its heartbeat back, not when its table was right.
    let last_ns = heartbeat_ns.max(table_ns);
    let are_kept = last_ns < control.heartbeat_ns().saturating_add(NAMES_HEARTBEAT_NS);
    if !are_kept || control.is_off() {
        return Decision::Pass;
    }
    let Scratch { headers, packet, key, answer_len, .. } = scratch;
    match clients::admit(skb, headers, now_ns) {
        clients::ADMITTED => {}
        clients::LIMITED => return Decision::Drop,
        _ => return Decision::Pass,
    }
    *answer_len = headers.message_len();
    if !packet.load(skb, headers.is_ipv6, copied_len(*answer_len)) {
        return Decision::Pass;
    }
    let query = read_query(packet, *answer_len, control, key);
    let record = if query.is_some() { maps::record(key) } else { None };
    let (vip, flags) = record.map_or(([0; 4], 0), |record| record.vip());
    // One that starts leaves queries in its sockets, and one that stops doesn't read them any more.
    let is_alive = control.is_ready() && now_ns < heartbeat_ns.saturating_add(NAMES_HEARTBEAT_NS);
    let (is_cold, is_probe) = (flags & NameRecord::COLD != 0, flags & NameRecord::PROBE != 0);
    if control.passes(is_alive, skb.is_loopback(), headers.is_ipv6) && !is_probe {
        return Decision::Pass;
    }
    let is_wrong =
        control.is_detached() || max_age_ns != 0 && now_ns >= table_ns.saturating_add(max_age_ns);
    // A query about a cold service is a demand for it, and the daemon explains what is wrong, as long as
    // one runs. Everything else passes to the socket that has the port. Without one it would be refused,
    // and resolvers go on more quickly after an error of the server.
    let is_known = record.is_some() && query.is_some_and(|query| query.is_about_addresses());
    let is_answered = is_known && (!is_wrong || is_probe);
    if (!is_answered || is_cold) && !is_probe {
        let is_daemons = is_alive || record.is_none() || !is_known && !is_wrong;
        if is_daemons && headers::receiver(skb) != Receiver::None {
            return Decision::Pass;
        }
    }
    let (true, Some(query), Some(record)) = (is_answered, query, record) else {
        return if fail(packet) { Decision::Fail } else { Decision::Pass };
    };
    let has_vip6 = flags & NameRecord::HAS_VIP6 != 0;
    let addresses = NameAddresses { vip, vip6: has_vip6.then(|| record.vip6()) };
    *answer_len = answer(packet, &query, &addresses, control);
    record.count(now_ns);
    if is_probe { Decision::AnswerProbe } else { Decision::Answer }
}

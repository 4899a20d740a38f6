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
mod receiver;
mod reply;
mod skb;

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use lb_common::{ListenKey, NAMES_HEARTBEAT_NS, NameRecord, read_query};

use crate::headers::{Headers, UDP_LEN};
use crate::maps::{ControlPtr, DaemonState, RecordPtr, Scratch};
use crate::packet::Words;
use crate::receiver::{Receiver, receiver};
use crate::reply::nohop_names_fail;
use crate::skb::Skb;

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
    /// The client sends too many.
    Drop,
    /// The answer is that the server failed, unless it is the daemon's and a socket receives it: resolvers go
    /// on more quickly after an error of the server than after a refused port.
    Fail { is_daemons: bool },
    /// The answer to the query in [`Scratch`] is about the addresses of this record.
    Answer(RecordPtr),
}

/// Attached to the ingress of interfaces by tcx, or by clsact before Linux 6.6. Other filters go on
/// with what it leaves.
///
/// What is rare is done by functions that the verifier follows once, and not for each way that leads there.
/// They take the context and numbers, as 5.10 wants it; the rest is in [`Scratch`], of whose contents the
/// verifier knows nothing.
#[classifier]
pub fn nohop_names(ctx: TcContext) -> i32 {
    let skb = Skb::of(&ctx);
    let Some(headers) = Headers::read(&skb) else { return TC_ACT_UNSPEC };
    let Some(listener) = maps::listener(&headers.destination, headers.port) else {
        return TC_ACT_UNSPEC;
    };
    let (Some(scratch), Some(control)) = (maps::scratch(), maps::control()) else {
        return TC_ACT_UNSPEC;
    };
    scratch.headers = headers;
    maps::forget();
    // A broadcast has a unicast's IP address in a forged packet.
    if !skb.is_for_host() || listener == ListenKey::SHARED && receiver(&skb) == Receiver::Own {
        return TC_ACT_UNSPEC;
    }
    match decide(&skb, control, scratch) {
        Decision::Pass => TC_ACT_UNSPEC,
        Decision::Drop => {
            maps::counters().count_limited();
            TC_ACT_SHOT
        }
        Decision::Fail { is_daemons } => nohop_names_fail(skb.0, is_daemons.into()) as i32,
        Decision::Answer(record) => reply::send(&skb, scratch, record, control),
    }
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
    let Scratch { headers, key, query, .. } = scratch;
    match clients::admit(skb, headers, now_ns) {
        clients::ADMITTED => {}
        clients::LIMITED => return Decision::Drop,
        _ => return Decision::Pass,
    }
    if !skb.linearize() {
        return Decision::Pass;
    }
    let message = Words::of(skb, headers, UDP_LEN);
    let read = read_query(&message, headers.message_len(), control, key);
    let record = read.and_then(|read| {
        *query = read;
        maps::forget();
        maps::record(skb, key)
    });
    // One that starts leaves queries in its sockets, and one that stops doesn't read them any more.
    let is_alive = control.is_ready() && now_ns < heartbeat_ns.saturating_add(NAMES_HEARTBEAT_NS);
    let passes = control.passes(is_alive, skb.is_loopback(), headers.is_ipv6);
    let Some(record) = record else {
        return if passes { Decision::Pass } else { Decision::Fail { is_daemons: true } };
    };
    let flags = record.flags();
    let (is_cold, is_probe) = (flags & NameRecord::COLD != 0, flags & NameRecord::PROBE != 0);
    if passes && !is_probe {
        return Decision::Pass;
    }
    let is_wrong =
        control.is_detached() || max_age_ns != 0 && now_ns >= table_ns.saturating_add(max_age_ns);
    let is_known = query.is_about_addresses(!is_probe);
    // The daemon explains what is wrong, as long as one runs.
    if !is_known || is_wrong && !is_probe {
        let is_daemons = is_alive || !is_known && !is_wrong;
        return Decision::Fail { is_daemons };
    }
    // A query about a cold service is a demand for it.
    if is_cold && !is_probe && is_alive && receiver(skb) != Receiver::None {
        return Decision::Pass;
    }
    record.count(now_ns);
    if !is_probe {
        maps::counters().count_answered();
    }
    Decision::Answer(record)
}

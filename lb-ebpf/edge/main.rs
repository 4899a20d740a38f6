//! The unit `edge`: programs at network interfaces that send packets of outside clients for public VIPs
//! to backends, and the backends' back, by translation of both addresses. An object of its own, so that a
//! kernel that refuses it refuses it alone.
#![no_std]
#![no_main]
// The target has no compare-and-exchange, so the atomic types lack the addition that it does have.
#![feature(asm_experimental_arch, core_intrinsics)]
#![allow(internal_features)]

mod answer;
mod begin;
mod cache;
#[path = "../src/choice.rs"]
mod choice;
mod config;
mod fast;
mod fast_tc;
mod fib;
mod flows;
mod forward;
mod headers;
mod hops;
mod maps;
mod outcomes;
#[path = "../src/random.rs"]
mod random;
mod rate;
mod record;
mod reset;
mod settings;
mod skb;
mod syn;
#[path = "../src/tables.rs"]
mod tables;
mod trace;
mod xdp;

use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::generated::{bpf_ktime_get_ns, bpf_redirect};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use lb_common::{EdgeCounter, FlowState, NoFlow, is_first_syn, parse_ipv4, parse_ipv6};

use crate::flows::Found;
use crate::maps::count;
use crate::settings::Side;
use crate::skb::Skb;

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    // Never reached: nothing here panics, and the verifier rejects a program that could loop.
    loop {}
}

/// Attached to the ingress of interfaces by tcx, or by clsact before Linux 6.6. Other filters go on
/// with what it leaves.
///
/// Its parts are global functions, which the verifier follows once each. They take the context and
/// numbers, as 5.10 wants it; the rest is in [`Scratch`](maps::Scratch).
#[classifier]
pub fn nohop_edge(ctx: TcContext) -> i32 {
    let skb = Skb::of(&ctx);
    let side = skb.side();
    if side == Side::None {
        return TC_ACT_UNSPEC;
    }
    // Else it would leave with it.
    if skb.has_priority() && !skb.remove_tag() {
        return TC_ACT_UNSPEC;
    }
    let egress = fast_tc::nohop_edge_fast(skb.0);
    if egress != 0 {
        // SAFETY: the helper has no preconditions.
        return unsafe { bpf_redirect(egress as u32, 0) as i32 };
    }
    let read = nohop_edge_read(skb.0);
    if read != 0 {
        // The host's own packets too go to a source address, or to one between VIPs.
        let is_ipv6 = skb.family() == Some(true);
        let is_ours = side == Side::Vip && maps::nohop_edge_goes_to_vip(is_ipv6.into()) != 0;
        return if is_ours { refuse(read) } else { TC_ACT_UNSPEC };
    }
    let mut found = Found(nohop_edge_find());
    let is_syn = nohop_edge_is_syn() != 0;
    let mut is_again = is_syn;
    if found.is_none() || found.is_over() {
        is_again = false;
        // A packet to a source address may be the host's own, and an error may be about anything.
        if side == Side::Source {
            return TC_ACT_UNSPEC;
        }
        let begun = begin::begin(&skb, found);
        trace::report();
        match begun {
            begin::PASS => return TC_ACT_UNSPEC,
            begin::DROP => return TC_ACT_SHOT,
            begin::RESET => return reset::nohop_edge_reset(skb.0) as i32,
            begin::EXPIRED => return answer::nohop_edge_error(skb.0, 0) as i32,
            begun => found = Found(begun),
        }
    }
    if flows::nohop_edge_follow(found.0) == 0 {
        return TC_ACT_SHOT;
    }
    outcomes::apply();
    forward::send(&skb, found, is_syn, is_again)
}

/// Attached to the egress of the same interfaces: what a backend on this host sends to a client comes
/// from the VIP.
#[classifier]
pub fn nohop_edge_out(ctx: TcContext) -> i32 {
    let skb = Skb::of(&ctx);
    if !settings::has_local() || nohop_edge_read(skb.0) != 0 {
        return TC_ACT_UNSPEC;
    }
    let found = Found(nohop_edge_find());
    if found.is_none() || found.is_over() || !found.is_local() || !found.is_back() {
        return TC_ACT_UNSPEC;
    }
    if flows::nohop_edge_follow(found.0) == 0 {
        return TC_ACT_SHOT;
    }
    outcomes::apply();
    forward::send(&skb, found, false, false)
}

/// What becomes of a packet of no flow.
#[inline(always)]
fn refuse(why: u64) -> i32 {
    const FRAGMENT: u64 = NoFlow::Fragment as u64;
    const MARTIAN: u64 = NoFlow::Martian as u64;
    const BAD_HEADER: u64 = NoFlow::BadHeader as u64;
    match why {
        FRAGMENT => count(EdgeCounter::Fragment),
        MARTIAN => count(EdgeCounter::Martian),
        BAD_HEADER => count(EdgeCounter::BadHeader),
        // Pings, neighbour discovery and other protocols are the host's.
        _ => return TC_ACT_UNSPEC,
    }
    TC_ACT_SHOT
}

/// Reads the headers of a packet, and the clock once for all that follows. Returns 0, or the number of a [`NoFlow`].
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_edge_read(ctx: *mut __sk_buff) -> u64 {
    let (skb, Some(scratch)) = (Skb(ctx), maps::scratch()) else { return NoFlow::Other as u64 };
    // SAFETY: the helper has no preconditions.
    scratch.now_ns = unsafe { bpf_ktime_get_ns() };
    let Some(len) = skb.ip_len() else { return NoFlow::BadHeader as u64 };
    if !skb.load_window(&mut scratch.window, len) {
        return NoFlow::BadHeader as u64;
    }
    let parsed = match skb.family() {
        Some(false) => parse_ipv4(&scratch.window, len),
        Some(true) => parse_ipv6(&scratch.window, len),
        None => return NoFlow::Other as u64,
    };
    match parsed {
        Ok(packet) => scratch.packet = packet,
        Err(why) => return why as u64,
    }
    0
}

/// Whether the packet that was read is a client's SYN.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_edge_is_syn() -> u64 {
    maps::scratch().is_some_and(|scratch| is_first_syn(scratch.packet.tcp_flags)).into()
}

/// The flow of the packet that was read: a [`Found`].
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_edge_find() -> u64 {
    let Some(scratch) = maps::scratch() else { return 0 };
    let packet = &scratch.packet;
    let Some((record_idx, is_back)) = flows::find(packet) else { return 0 };
    let Some(record) = maps::record(record_idx) else { return 0 };
    if !flows::is_of(record, record_idx, packet, is_back) {
        return 0;
    }
    let word = record.word();
    let found = Found::of(record_idx, is_back, word.is_local());
    if is_back || packet.is_error != 0 {
        return found.0;
    }
    let is_over = match word.state() {
        // Datagrams go where there still is a backend.
        FlowState::Udp | FlowState::UdpUnanswered => {
            !maps::is_in_table(record.backend_idx(), record.generation())
        }
        // A client may use its port again.
        FlowState::Closed => is_first_syn(packet.tcp_flags),
        // A SYN that is sent again needn't wait for a backend that others avoid.
        FlowState::SynSent => {
            is_first_syn(packet.tcp_flags)
                && !outcomes::may_answer(record.backend_idx(), record.generation())
        }
        _ => false,
    };
    if is_over { found.over().0 } else { found.0 }
}

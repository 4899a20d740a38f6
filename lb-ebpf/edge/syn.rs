//! What the silence of a backend after a SYN, or its refusal, shows: of some SYNs nothing, as a backend drops or refuses
//! them that is well.

use aya_ebpf::bindings::__sk_buff;
use lb_common::{
    IPPROTO_TCP, MAX_SYN_OPTIONS, SynOption, SynOptions, WINDOW_LEN, checksum_offset,
    is_checksum_right, is_ip_checksum_right, is_plain_syn,
};

use crate::maps;
use crate::reset::is_partial;
use crate::skb::{IP, Skb};

/// Judges the packet that was read, which begins a flow: whether its checksums are right, as far as they can be
/// computed, and whether [`Scratch::is_conclusive`](maps::Scratch::is_conclusive). Returns 0 where one is wrong.
#[inline(always)]
pub fn judge(skb: &Skb) -> u64 {
    let sound = nohop_edge_is_sound(skb.0);
    if sound == CONCLUSIVE {
        walk();
    }
    sound
}

const WRONG: u64 = 0;
const RIGHT: u64 = 1;
/// As far as its options don't matter.
const CONCLUSIVE: u64 = 2;

#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_edge_is_sound(ctx: *mut __sk_buff) -> u64 {
    let Some(scratch) = maps::scratch() else { return WRONG };
    let (window, packet) = (&scratch.window, &scratch.packet);
    scratch.is_conclusive = false;
    if !is_ip_checksum_right(window, packet) {
        return WRONG;
    }
    if packet.protocol != IPPROTO_TCP || packet.len > WINDOW_LEN as u32 {
        return RIGHT;
    }
    if !is_checksum_right(window, packet) {
        // One that the network card is to complete.
        let at = IP + packet.l4 + checksum_offset(IPPROTO_TCP);
        if !is_partial(&Skb(ctx), at).unwrap_or(false) {
            return WRONG;
        }
    }
    scratch.options = SynOptions::of(window, packet.l4);
    if is_plain_syn(window, packet) { CONCLUSIVE } else { RIGHT }
}

/// Walks through the options of a SYN.
#[inline(always)]
fn walk() {
    const END: u64 = SynOption::End as u64;
    const IGNORABLE: u64 = SynOption::Ignorable as u64;
    let (mut nth, mut found) = (0, IGNORABLE);
    while nth < MAX_SYN_OPTIONS && found == IGNORABLE {
        found = nohop_edge_option();
        nth += 1;
    }
    if let Some(scratch) = maps::scratch() {
        scratch.is_conclusive = found == END;
    }
}

/// See [`SynOptions::step`].
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_edge_option() -> u64 {
    let step = |scratch: &mut maps::Scratch| scratch.options.step(&scratch.window) as u64;
    maps::scratch().map_or(SynOption::Refusable as u64, step)
}

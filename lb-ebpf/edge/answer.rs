//! What answers a packet, by the interface that it came by; and the ICMP errors of the edge's own.

use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT};
use aya_ebpf::helpers::generated::{bpf_redirect, bpf_skb_change_tail};
use lb_common::{Window, make_error};
use zerocopy::IntoBytes as _;

use crate::maps;
use crate::skb::{IP, Skb};

/// Makes the packet that was read, and isn't changed yet, an ICMP error about itself, and sends that back. `mtu` is
/// that of the way on; 0 where the hop limit is used up. One a millisecond on each processor. Returns a TC_ACT_*.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn nohop_edge_error(ctx: *mut __sk_buff, mtu: u64) -> u64 {
    let (Some(scratch), Some(cursors)) = (maps::scratch(), maps::cursors()) else {
        return TC_ACT_SHOT as u64;
    };
    let now_ms = u64::from(maps::now_ms());
    let is_too_long = usize::from(mtu != 0);
    // Nothing is sent about an error (RFC 1122, section 3.2.2).
    if cursors.error_ms[is_too_long] == now_ms || scratch.packet.is_error != 0 {
        return TC_ACT_SHOT as u64;
    }
    let len = make_error(&mut scratch.window, &scratch.packet, mtu as u32);
    if len == 0 {
        return TC_ACT_SHOT as u64;
    }
    cursors.error_ms[is_too_long] = now_ms;
    // The checksum of a batch, and of a packet from this host, is left to the network card, which would write it into
    // the error, and that would be dropped. veth has none; of others the sender hears when it repeats one packet alone.
    send_back(&Skb(ctx), &scratch.window, len).unwrap_or(TC_ACT_SHOT as u64)
}

/// Makes a packet the first bytes of the window, from its IP header on, and sends it to where it came from.
#[inline(always)]
pub fn send_back(skb: &Skb, window: &Window, len: u32) -> Option<u64> {
    // SAFETY: the helper takes the context; no pointer into the packet is used after it.
    let changed = unsafe { bpf_skb_change_tail(skb.0, IP + len, 0) };
    if changed != 0 || !skb.store_window(window, 0, len, 0) {
        return None;
    }
    let mut words = [0u32; 3];
    if !skb.load(0, words.as_mut_bytes()) {
        return None;
    }
    let [a, b, c] = words.map(u32::to_ne_bytes);
    let exchanged = [[b[2], b[3], c[0], c[1]], [c[2], c[3], a[0], a[1]], [a[2], a[3], b[0], b[1]]];
    if !skb.store(0, exchanged.map(u32::from_ne_bytes).as_bytes()) {
        return None;
    }
    // SAFETY: the helper has no preconditions.
    Some(unsafe { bpf_redirect(skb.ifindex(), 0) } as u64)
}

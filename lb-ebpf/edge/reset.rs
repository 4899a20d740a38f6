//! The RST that answers a packet of no flow, by the interface that it came by.

use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT};
use aya_ebpf::helpers::generated::bpf_l4_csum_replace;
use lb_common::{checksum_offset, make_reset};
use zerocopy::IntoBytes as _;

use crate::answer::send_back;
use crate::maps;
use crate::skb::{IP, Skb};

/// Makes the packet that was read a RST and sends it back. Returns a TC_ACT_*.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn nohop_edge_reset(ctx: *mut __sk_buff) -> u64 {
    send(&Skb(ctx)).unwrap_or(TC_ACT_SHOT as u64)
}

#[inline(always)]
fn send(skb: &Skb) -> Option<u64> {
    let scratch = maps::scratch()?;
    let (packet, window) = (&scratch.packet, &mut scratch.window);
    let checksum_at = packet.l4 + checksum_offset(packet.protocol);
    let is_partial = is_partial(skb, IP + checksum_at)?;
    let before = packet.l4;
    let reset = make_reset(window, packet);
    if is_partial {
        // The network card sums up from where the header was.
        if before + 20 != reset.len {
            return None;
        }
        window.set_word(checksum_at, reset.pseudo_sum);
    }
    send_back(skb, window, reset.len)
}

/// Whether a packet has only the pseudo-header's part of its checksum, which the network card completes: the
/// kernel's helper leaves that alone if anything else differs (`inet_proto_csum_replace_by_diff`).
#[inline(always)]
pub fn is_partial(skb: &Skb, at: u32) -> Option<bool> {
    let (mut before, mut after) = (0u16, 0u16);
    if !skb.load(at, before.as_mut_bytes()) {
        return None;
    }
    // SAFETY: the helper takes the context.
    let changed = unsafe { bpf_l4_csum_replace(skb.0, at, 0, 1, 0) };
    if changed != 0 || !skb.load(at, after.as_mut_bytes()) {
        return None;
    }
    Some(before == after)
}

//! Makes a query's packet that of its answer.
//!
//! Checksums (RFC 1624): the kernel's helpers know whether the packet has one already, or only the
//! pseudo-header's part of it, as those have that never leave the host (CHECKSUM_PARTIAL). So what they
//! are given is the difference.

use aya_ebpf::bindings::{
    __sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, TC_ACT_SHOT, TC_ACT_UNSPEC,
};
use aya_ebpf::helpers::generated::{
    bpf_csum_diff, bpf_l4_csum_replace, bpf_redirect, bpf_skb_change_tail,
};

use crate::Decision;
use crate::headers::UDP_LEN;
use crate::maps::{self, Scratch};
use crate::packet::{add, copied_len};
use crate::skb::{LOOPBACK, Skb};

/// Makes the packet its answer, or that of a server that failed, as was decided, and sends it on its way: on
/// `lo` it goes on up to the socket that asked, elsewhere back where it came from. Returns a TC_ACT_*.
#[inline(always)]
pub fn send(skb: &Skb, scratch: &mut Scratch, decision: u64) -> i32 {
    // Once: the compiler would keep the field's address, which the verifier forbids.
    let interface = skb.ifindex();
    let is_loopback = interface == LOOPBACK;
    if !is_loopback {
        scratch.packet.turn_ethernet(scratch.headers.is_ipv6);
    }
    // A packet that was changed in part is of no use.
    if write(skb, scratch).is_none() {
        maps::counters().count_broken();
        return TC_ACT_SHOT;
    }
    if decision == Decision::Fail as u64 {
        maps::counters().count_failed();
    } else if decision == Decision::Answer as u64 {
        maps::counters().count_answered();
    }
    if is_loopback {
        return TC_ACT_UNSPEC;
    }
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_redirect(interface, 0) as i32 }
}

/// Writes the answer that is in [`Scratch`].
#[inline(always)]
fn write(skb: &Skb, scratch: &mut Scratch) -> Option<()> {
    let Scratch { headers, packet, answer_len, .. } = scratch;
    let (is_ipv6, len) = (headers.is_ipv6, *answer_len);
    let udp_len = (UDP_LEN + len) as u16;
    packet.turn(is_ipv6, udp_len);

    let (before, after) = (headers.udp_len.to_be(), udp_len.to_be());
    let flags = u64::from(BPF_F_PSEUDO_HDR | BPF_F_MARK_MANGLED_0) | 2;
    let at = headers.udp() + 6;
    // SAFETY: the helper takes the context; no pointer into the packet is used after it.
    let replaced = unsafe { bpf_l4_csum_replace(skb.0, at, before.into(), after.into(), flags) };
    (replaced == 0).then_some(())?;
    // The pseudo-header's part grows with the length, and a checksum shrinks.
    let partial = add(add(packet.checksum(), !before), after);
    let checksum = headers.checksum(skb)?;
    if checksum != partial || before == after {
        (nohop_names_sum_up(skb.0) != 0).then_some(())?;
    }
    packet.set_checksum(headers.checksum(skb)?);

    if before != after {
        // SAFETY: as above.
        let changed = unsafe { bpf_skb_change_tail(skb.0, headers.udp() + UDP_LEN + len, 0) };
        (changed == 0).then_some(())?;
    }
    packet.store(skb, is_ipv6, copied_len(len)).then_some(())
}

/// Makes the checksum of a packet that has one already that of the answer in [`Scratch`]. Returns
/// whether it did.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_names_sum_up(ctx: *mut __sk_buff) -> u64 {
    maps::scratch().and_then(|scratch| sum_up(&Skb(ctx), scratch)).is_some().into()
}

#[inline(always)]
fn sum_up(skb: &Skb, scratch: &mut Scratch) -> Option<()> {
    let Scratch { headers, packet, before, answer_len, .. } = scratch;
    let (before_len, len) = (copied_len(headers.message_len()), copied_len(*answer_len));
    before.load(skb, headers.is_ipv6, before_len).then_some(())?;
    let ((before, before_len), (after, len)) =
        (before.sum_words(before_len), packet.sum_words(len));
    // SAFETY: both are as long as said.
    let sum = unsafe { bpf_csum_diff(before, before_len, after, len, 0) };
    let (at, flags) = (headers.udp() + 6, BPF_F_MARK_MANGLED_0.into());
    // SAFETY: the helper takes the context.
    let replaced = unsafe { bpf_l4_csum_replace(skb.0, at, 0, sum as u32 as u64, flags) };
    (replaced == 0).then_some(())
}

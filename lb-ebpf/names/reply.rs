//! Makes a query's packet that of its answer.
//!
//! Checksums (RFC 1624): a packet that never left the host has only the pseudo-header's sum
//! (CHECKSUM_PARTIAL), by which it is recognized where that isn't a whole one by chance. For others the
//! kernel's helper, which knows, is given the difference.

use aya_ebpf::bindings::{
    __sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, TC_ACT_SHOT, TC_ACT_UNSPEC,
};
use aya_ebpf::helpers::generated::{bpf_l4_csum_replace, bpf_redirect, bpf_skb_change_tail};
use lb_common::{DnsMessage, IPPROTO_UDP, answer, answer_len, fail, folded, is_query};

use crate::headers::{Headers, UDP_LEN};
use crate::maps::{self, ControlPtr, RecordPtr, Scratch};
use crate::packet::{Words, add, halves, turn};
use crate::receiver::{Receiver, receiver};
use crate::skb::{LOOPBACK, Skb};

/// Makes the packet its answer, about a name's addresses, and sends it on its way: on `lo` it goes on up to
/// the socket that asked, elsewhere back where it came from. Returns a TC_ACT_*.
#[inline(always)]
pub fn send(skb: &Skb, scratch: &mut Scratch, record: RecordPtr, control: ControlPtr) -> i32 {
    // Once: the compiler would keep the field's address, which the verifier forbids.
    let interface = skb.ifindex();
    let written = write(skb, scratch, record, control, interface == LOOPBACK);
    verdict(interface, written.is_some())
}

/// Makes the packet whose headers are in [`Scratch`] the answer that the server failed, likewise; not one that is
/// the daemon's where a socket receives it, and no response.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn nohop_names_fail(ctx: *mut __sk_buff, is_daemons: u64) -> u64 {
    let skb = Skb(ctx);
    let Some(scratch) = maps::scratch() else { return TC_ACT_UNSPEC as u64 };
    let headers = &scratch.headers;
    let is_passed = is_daemons != 0 && receiver(&skb) != Receiver::None;
    if is_passed || !is_query(&Words::of(&skb, headers, UDP_LEN)) {
        return TC_ACT_UNSPEC as u64;
    }
    let interface = skb.ifindex();
    let failed = write_failure(&skb, headers, interface == LOOPBACK);
    maps::counters().count_failed();
    verdict(interface, failed.is_some()) as u64
}

#[inline(always)]
fn write_failure(skb: &Skb, headers: &Headers, is_loopback: bool) -> Option<()> {
    turn(skb, headers.is_ipv6, headers.udp_len, None, is_loopback)?;
    let mut message = Words::of(skb, headers, UDP_LEN);
    let before = message.word(0) >> 16 & 0xffff;
    fail(&mut message);
    let after = message.word(0) >> 16 & 0xffff;
    let (at, flags) = (u32::from(headers.udp) + 6, u64::from(BPF_F_MARK_MANGLED_0) | 2);
    // SAFETY: the helper takes the context; no pointer into the packet is used after it.
    let replaced = unsafe { bpf_l4_csum_replace(skb.0, at, before, after, flags) };
    (replaced == 0).then_some(())
}

/// The verdict on a packet that is its answer, or should be.
#[inline(always)]
fn verdict(interface: u32, is_written: bool) -> i32 {
    if !is_written {
        // One that was changed in part is of no use.
        maps::counters().count_broken();
        return TC_ACT_SHOT;
    }
    if interface == LOOPBACK {
        return TC_ACT_UNSPEC;
    }
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_redirect(interface, 0) as i32 }
}

#[inline(always)]
fn write(
    skb: &Skb,
    scratch: &mut Scratch,
    record: RecordPtr,
    control: ControlPtr,
    is_loopback: bool,
) -> Option<()> {
    let Scratch { headers, query, answer_len: len, .. } = scratch;
    let datagram = Words::of(skb, headers, 0);
    // The last half of the header.
    let checksum = (datagram.word(0) >> 48) as u16;
    let (pseudo, sum) = (pseudo_sum(headers), datagram.sum());
    let is_partial = checksum == pseudo && add(pseudo, sum) != u16::MAX;
    let addresses = record.addresses();
    *len = UDP_LEN + answer_len(query, &addresses);
    maps::forget();

    let (before, after) = (headers.udp_len.to_be(), (*len as u16).to_be());
    if before != after {
        // SAFETY: the helper takes the context; no pointer into the packet is used after it.
        let changed = unsafe { bpf_skb_change_tail(skb.0, u32::from(headers.udp) + *len, 0) };
        (changed == 0).then_some(())?;
    }
    // It grows with the length, where a whole checksum shrinks.
    let changed = is_partial.then(|| add(add(checksum, !before), after));
    turn(skb, headers.is_ipv6, *len as u16, changed, is_loopback)?;
    answer(&mut Words::of(skb, headers, UDP_LEN), query, &addresses, control);
    if is_partial {
        return Some(());
    }
    (nohop_names_checksum(skb.0, sum.into()) != 0).then_some(())
}

/// The checksum of a packet that has only the pseudo-header's sum. Addresses of IPv4 in IPv6 have the sum
/// of those of IPv4.
#[inline(always)]
fn pseudo_sum(headers: &Headers) -> u16 {
    let ([a, b], [c, d]) = (headers.source.words(), headers.destination.words());
    let fixed = u64::from(u16::from(IPPROTO_UDP).to_be()) + u64::from(headers.udp_len.to_be());
    folded(halves(a) + halves(b) + halves(c) + halves(d) + fixed)
}

/// Makes the checksum that of the answer, which the packet is but for that; `before` is the sum of the query's
/// datagram. Returns whether it did.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_names_checksum(ctx: *mut __sk_buff, before: u64) -> u64 {
    let Some(scratch) = maps::scratch() else { return 0 };
    let headers = &scratch.headers;
    let difference =
        u64::from(Words::of(&Skb(ctx), headers, 0).sum()) + u64::from(!(before as u16));
    let (before, after) = (headers.udp_len.to_be(), (scratch.answer_len as u16).to_be());
    let (at, flags) = (u32::from(headers.udp) + 6, u64::from(BPF_F_MARK_MANGLED_0));
    let pseudo = flags | u64::from(BPF_F_PSEUDO_HDR) | 2;
    // SAFETY: the helper takes the context; no pointer into the packet is used after it.
    unsafe {
        let replaced = bpf_l4_csum_replace(ctx, at, before.into(), after.into(), pseudo) == 0
            && bpf_l4_csum_replace(ctx, at, 0, difference, flags) == 0;
        replaced.into()
    }
}

//! Makes a query's packet that of its answer.
//!
//! Checksums (RFC 1624): the kernel's helpers know whether the packet has one already, or only the
//! pseudo-header's part of it, as those have that never leave the host (CHECKSUM_PARTIAL). So what they
//! are given is the difference.

use aya_ebpf::bindings::{
    __sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, TC_ACT_SHOT, TC_ACT_UNSPEC,
};
use aya_ebpf::helpers::generated::{
    bpf_csum_diff, bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_redirect, bpf_skb_change_tail,
};
use lb_common::{DNS_HEADER_LEN, MAX_QUERY_TAIL, servfail_flags};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::Decision;
use crate::headers::{Headers, IP};
use crate::maps::{self, Scratch};
use crate::skb::Skb;

/// Makes the packet its answer, or that of a server that failed, as was decided, and sends it on its way: on
/// `lo` it goes on up to the socket that asked, elsewhere back where it came from. Returns a TC_ACT_*.
#[inline(always)]
pub fn send(skb: &Skb, decision: u64) -> i32 {
    let is_failure = decision == Decision::Fail as u64;
    let is_written = if is_failure { nohop_names_fail(skb.0) } else { nohop_names_write(skb.0) };
    // A packet that was changed in part is of no use.
    if is_written == 0 {
        maps::counters().count_broken();
        return TC_ACT_SHOT;
    }
    if is_failure {
        maps::counters().count_failed();
    } else if decision == Decision::Answer as u64 {
        maps::counters().count_answered();
    }
    if skb.is_loopback() { TC_ACT_UNSPEC } else { send_back(skb) }
}

/// Whether the message is a query: to answer a response could begin an endless exchange.
#[inline(always)]
pub fn is_query(skb: &Skb, headers: &Headers) -> bool {
    const QR: u32 = 0x80;
    let mut flags = 0u32;
    skb.load(headers.message + 2, flags.as_mut_bytes()) && flags.to_le() & QR == 0
}

/// Writes the answer that the server failed, which is the query with other flags. Returns whether it did.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_names_fail(ctx: *mut __sk_buff) -> u64 {
    let Some(scratch) = maps::scratch() else { return 0 };
    let (skb, headers) = (&Skb(ctx), &scratch.headers);
    let Some(before) = Changed::read(skb, headers) else { return 0 };
    let [_, _, high, low] = before.id_and_flags;
    let after = before.with_flags(servfail_flags([high, low]));
    let sum = difference(&before, &after, 0);
    if !after.store(skb, headers) {
        return 0;
    }
    nohop_names_finish(ctx, headers.udp_len.into(), sum.into())
}

/// The parts of a packet that change, but for what follows the question: the message's header and the
/// length in UDP's.
#[repr(C, align(8))]
#[derive(Clone, Copy, FromBytes, Immutable, IntoBytes)]
struct Changed {
    id_and_flags: [u8; 4],
    counts: [u8; 8],
    udp_len: [u8; 2],
    padding: [u8; 2],
}

impl Changed {
    #[inline(always)]
    fn read(skb: &Skb, headers: &Headers) -> Option<Changed> {
        // As a number: an array of octets would be filled by a function, byte by byte.
        let mut bytes = 0u128;
        if !skb.load(headers.message, bytes.as_mut_bytes().get_mut(..DNS_HEADER_LEN as usize)?) {
            return None;
        }
        let read: Changed = zerocopy::transmute!(bytes);
        Some(Changed { udp_len: headers.udp_len.to_be_bytes(), ..read })
    }

    #[inline(always)]
    fn with_flags(self, flags: [u8; 2]) -> Changed {
        let ([id_high, id_low, ..], [high, low]) = (self.id_and_flags, flags);
        Changed { id_and_flags: [id_high, id_low, high, low], ..self }
    }

    #[inline(always)]
    fn store(&self, skb: &Skb, headers: &Headers) -> bool {
        let header = self.as_bytes().get(..DNS_HEADER_LEN as usize);
        header.is_some_and(|header| skb.store(headers.message, header))
    }
}

#[inline(always)]
fn difference(before: &Changed, after: &Changed, seed: u32) -> u32 {
    const LEN: u32 = size_of::<Changed>() as u32;
    let (before, after) = (&raw const *before, &raw const *after);
    // SAFETY: both are as long as said.
    unsafe {
        bpf_csum_diff(before.cast_mut().cast(), LEN, after.cast_mut().cast(), LEN, seed) as u32
    }
}

/// Writes the answer that is in [`Scratch`]. Returns whether it did.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_names_write(ctx: *mut __sk_buff) -> u64 {
    maps::scratch().and_then(|scratch| write_answer(&Skb(ctx), scratch)).unwrap_or(0)
}

#[inline(always)]
fn write_answer(skb: &Skb, scratch: &mut Scratch) -> Option<u64> {
    let Scratch { headers, query, answer, query_tail: old, records: new, .. } = scratch;
    let tail = headers.message + query.question_end;
    old.clear();
    let old_len = query.tail_len as usize;
    if old_len != 0 {
        skb.load(tail, old.octets.get_mut(..old_len)?).then_some(())?;
    }
    let before = Changed::read(skb, headers)?;

    // SAFETY: both are as long as said.
    let mut sum = unsafe {
        let (old, new) = (&raw mut *old, &raw mut *new);
        bpf_csum_diff(old.cast(), MAX_QUERY_TAIL, new.cast(), MAX_QUERY_TAIL, 0) as u32
    };
    // Bytes at an odd place have the other half of a 16-bit word (RFC 1071, section 2, "byte order
    // independence").
    if query.question_end % 2 != 0 {
        sum = sum.rotate_left(8);
    }
    let message_len = query.question_end + answer.tail_len;
    let udp_len = (message_len + 8) as u16;
    let after = before.with_flags(answer.flags);
    let after = Changed { counts: answer.counts, udp_len: udp_len.to_be_bytes(), ..after };
    let sum = difference(&before, &after, sum);

    // SAFETY: the helper takes the context; no pointer into the packet is used after it.
    let changed = unsafe { bpf_skb_change_tail(skb.0, headers.message + message_len, 0) };
    let new_len = answer.tail_len as usize;
    let new = new.octets.get(..new_len).filter(|_| changed == 0 && new_len != 0)?;
    let is_written = skb.store(tail, new) && after.store(skb, headers);
    is_written.then(|| nohop_names_finish(skb.0, udp_len.into(), sum.into()))
}

/// Sends the packet back: exchanges its addresses and ports, which leaves the checksums as they are,
/// and makes lengths and checksums right. `sum` is the difference that the message makes. Returns whether it did.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_names_finish(ctx: *mut __sk_buff, udp_len: u64, sum: u64) -> u64 {
    let Some(scratch) = maps::scratch() else { return 0 };
    finish(&Skb(ctx), &scratch.headers, udp_len as u16, sum as u32).into()
}

#[inline(always)]
fn finish(skb: &Skb, headers: &Headers, udp_len: u16, sum: u32) -> bool {
    let change = i32::from(udp_len) - i32::from(headers.udp_len);
    let is_written = if headers.is_ipv6 {
        let addresses = [headers.destination.octets, headers.source.octets];
        skb.store(IP + 4, &udp_len.to_be_bytes()) && skb.store(IP + 8, addresses.as_bytes())
    } else {
        let [[_, _, _, destination], [_, _, _, source]]: [[[u8; 4]; 4]; 2] =
            zerocopy::transmute!([headers.destination.octets, headers.source.octets]);
        let before = headers.udp_len + 20;
        let after = (i32::from(before) + change) as u16;
        // SAFETY: the helper takes the context.
        let replaced = unsafe {
            bpf_l3_csum_replace(skb.0, IP + 10, before.to_be().into(), after.to_be().into(), 2)
        };
        replaced == 0
            && skb.store(IP + 2, &after.to_be_bytes())
            && skb.store(IP + 12, [destination, source].as_bytes())
    };
    let words = [headers.port.to_be(), headers.source_port.to_be(), udp_len.to_be()];
    if !is_written || !skb.store(headers.udp, words.as_bytes()) {
        return false;
    }
    let checksum = headers.udp + 6;
    let mangled = u64::from(BPF_F_MARK_MANGLED_0);
    let (before, after) = (headers.udp_len.to_be().into(), udp_len.to_be().into());
    // SAFETY: the helper takes the context.
    unsafe {
        let pseudo = u64::from(BPF_F_PSEUDO_HDR) | 2 | mangled;
        bpf_l4_csum_replace(skb.0, checksum, before, after, pseudo) == 0
            && bpf_l4_csum_replace(skb.0, checksum, 0, sum.into(), mangled) == 0
    }
}

/// Sends the packet back by the interface that it came by.
#[inline(always)]
fn send_back(skb: &Skb) -> i32 {
    let mut addresses = 0u128;
    let is_read =
        addresses.as_mut_bytes().get_mut(..12).is_some_and(|addresses| skb.load(0, addresses));
    let [a, b, c, d, e, f, source @ .., _, _, _, _] = addresses.to_ne_bytes();
    let exchanged = [source, [a, b, c, d, e, f]];
    if !is_read || !skb.store(0, exchanged.as_bytes()) {
        maps::counters().count_broken();
        return TC_ACT_SHOT;
    }
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_redirect(skb.ifindex(), 0) as i32 }
}

//! The way of a packet: the route, the translation, the interface that it leaves by.
//!
//! Checksums: the kernel's helpers know whether a packet has one already, or only the pseudo-header's part
//! of it, which the network card completes (CHECKSUM_PARTIAL). So they are given what differs.

use aya_ebpf::bindings::{
    __sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM, TC_ACT_SHOT,
    TC_ACT_UNSPEC, bpf_redir_neigh,
};
use aya_ebpf::helpers::generated::{
    bpf_l4_csum_replace, bpf_redirect, bpf_redirect_neigh, bpf_skb_change_tail,
};
use lb_common::{
    Address, CLIENT_OPTION_ROOM, Difference, EdgeCounter, FlowWord, IPPROTO_TCP, IPPROTO_UDP,
    MAX_OPTIONS, OptionWalk, Packet, UDP_HEADER, Window, append_client, checksum_offset, hop_limit,
    may_have_client, translate, translate_error,
};
use zerocopy::IntoBytes as _;

use crate::fib::{self, Fib, Question, Route};
use crate::flows::Found;
use crate::maps::{self, Scratch, count};
use crate::record::RecordPtr;
use crate::skb::{IP, Skb};
use crate::{answer, hops};

/// Looks up the route of a packet from one address to another. `len` is the packet's length, from the IP header on;
/// 0 for any.
#[inline(always)]
pub fn route(
    ctx: *mut __sk_buff,
    fib: &mut Fib,
    packet: &Packet,
    len: u32,
    from: &Address,
    to: &Address,
) -> Route {
    let skb = Skb(ctx);
    let [from, to]: [[u32; 4]; 2] = [zerocopy::transmute!(*from), zerocopy::transmute!(*to)];
    let (is_ipv6, protocol) = (packet.is_ipv6 != 0, packet.protocol);
    let question = Question { ifindex: skb.ifindex(), is_ipv6, protocol, len };
    fib::look_up(ctx.cast(), fib, question, from, to)
}

/// The length of a packet as it is on the wire, from the IP header on: the kernel doesn't compare those of a batch
/// with what a way takes.
#[inline(always)]
fn wire_len(skb: &Skb, window: &Window, packet: &Packet) -> u32 {
    let segment = skb.segment_size();
    if segment == 0 {
        return packet.len;
    }
    let header = match packet.protocol {
        IPPROTO_UDP => UDP_HEADER,
        _ => u32::from(window.octet(packet.l4 + 12) >> 4) * 4,
    };
    packet.l4 + header + segment
}

/// The packet stays on this host.
const STAYS: u64 = 0;
/// It leaves by a hop whose hardware address is known.
const LEAVES: u64 = 1;
/// It leaves by one whose hardware address isn't.
const UNRESOLVED: u64 = 2;
/// It can't go anywhere.
const DROPPED: u64 = 3;
/// Likewise, and an ICMP error reports that: with the MTU of the way in the bits above, or 0 for the hop limit.
const REPORTED: u64 = 4;

/// Sends the packet of a flow that was read on, to the target that was set. `is_again` for a SYN that is repeated: by
/// the kernel's own output, which finds out whether the hardware address still is right. Returns a TC_ACT_*.
///
/// One step after the other, not one within the other, as all their stacks together have 512 bytes.
#[inline(always)]
pub fn send(skb: &Skb, found: Found, is_syn: bool, is_again: bool) -> i32 {
    let mut way = if found.is_local() { STAYS } else { nohop_edge_route(skb.0, found.0) };
    if way == LEAVES && is_again {
        way = UNRESOLVED;
    }
    if way == DROPPED {
        return TC_ACT_SHOT;
    }
    if way as u8 == REPORTED as u8 {
        return answer::nohop_edge_error(skb.0, way >> 8) as i32;
    }
    let has_options = !is_syn || way == STAYS || nohop_edge_options(skb.0, found.0) != 0;
    if !has_options || nohop_edge_write(skb.0, (way != STAYS).into()) == 0 {
        count(EdgeCounter::Broken);
        return TC_ACT_SHOT;
    }
    if way == STAYS { TC_ACT_UNSPEC } else { nohop_edge_leave(skb.0, way) as i32 }
}

/// Finds the way of the packet that was read, which is of this flow, to the target that was set.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_edge_route(ctx: *mut __sk_buff, found: u64) -> u64 {
    let Some(scratch) = maps::scratch() else { return DROPPED };
    let Scratch { window, packet, target, fib, .. } = scratch;
    if hop_limit(window, packet.is_ipv6 != 0) <= 1 {
        count(EdgeCounter::HopLimit);
        return REPORTED;
    }
    let len = wire_len(&Skb(ctx), window, packet);
    match route(ctx, fib, packet, len, &target.source, &target.destination) {
        Route::Found => {
            let now_ms = maps::now_ms();
            if !hops::is_unverified(fib, now_ms) {
                return LEAVES;
            }
            // A proof's packet doesn't leave.
            if !maps::record(Found(found).record()).is_some_and(RecordPtr::is_proof) {
                hops::set_verified(fib, now_ms);
            }
            UNRESOLVED
        }
        Route::Unresolved => UNRESOLVED,
        Route::TooLong => {
            count(EdgeCounter::TooLong);
            // Who sends without "don't fragment" (IPv4) doesn't want to hear of it (RFC 1191).
            if packet.is_ipv6 == 0 && window.octet(6) & 0x40 == 0 {
                return DROPPED;
            }
            REPORTED | u64::from(fib::mtu(fib, len)) << 8
        }
        Route::Local | Route::None => {
            count(EdgeCounter::NoRoute);
            DROPPED
        }
    }
}

/// Has the packet leave by the way that was found. Returns a TC_ACT_*.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_edge_leave(ctx: *mut __sk_buff, way: u64) -> u64 {
    let (skb, Some(scratch)) = (Skb(ctx), maps::scratch()) else { return TC_ACT_SHOT as u64 };
    let fib = &mut scratch.fib;
    if way == UNRESOLVED {
        // To the next hop that was found: the kernel might find another one by other rules, or on several ways.
        let (egress, next_hop) = (fib::egress(fib), fib::next_hop(fib));
        let len = size_of::<bpf_redir_neigh>() as i32;
        // SAFETY: the helper takes a structure of that length.
        return unsafe { bpf_redirect_neigh(egress, next_hop, len, 0) } as u64;
    }
    let addresses = fib::ethernet(fib);
    if !skb.store(0, addresses.as_bytes()) {
        count(EdgeCounter::Broken);
        return TC_ACT_SHOT as u64;
    }
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_redirect(fib::egress(fib), 0) as u64 }
}

/// See [`may_have_client`].
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_edge_may_have_client() -> u64 {
    let may = |scratch: &mut Scratch| may_have_client(&scratch.window, scratch.packet.l4);
    maps::scratch().is_some_and(may).into()
}

/// See [`OptionWalk::step`].
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_edge_walk() -> u64 {
    maps::scratch().is_some_and(|scratch| scratch.walk.step(&mut scratch.window)).into()
}

/// Has a SYN bear the client's address by the edge's option alone, and only where the flow's service asks for that:
/// backends trust what comes from here. Returns whether it does.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_edge_options(ctx: *mut __sk_buff, found: u64) -> u64 {
    let (Some(scratch), Some(record)) = (maps::scratch(), maps::record(Found(found).record()))
    else {
        return 0;
    };
    let is_shown = record.word().flags & FlowWord::SHOWS_CLIENT != 0;
    if scratch.packet.is_ipv6 != 0
        || Found(found).is_back()
        || !is_shown && nohop_edge_may_have_client() == 0
    {
        return 1;
    }
    scratch.walk = OptionWalk::of(&scratch.window, scratch.packet.l4);
    let mut nth = 0;
    while nth < MAX_OPTIONS && nohop_edge_walk() != 0 {
        nth += 1;
    }
    let Some(Scratch { window, packet, walk, .. }) = maps::scratch() else { return 0 };
    let mut difference = Difference { addresses: 0, ports: walk.difference };
    let mut len = packet.len;
    if is_shown {
        match append_client(window, packet) {
            Some(appended) => {
                difference.addresses = appended.addresses;
                difference.ports += appended.ports;
                len += CLIENT_OPTION_ROOM;
                count(EdgeCounter::Shown);
            }
            None => count(EdgeCounter::NotShown),
        }
    }
    if difference.ports == 0 {
        return 1;
    }
    // SAFETY: the helper takes the context; no pointer into the packet is used after it.
    if len != packet.len && unsafe { bpf_skb_change_tail(ctx, IP + len, 0) } != 0 {
        return 0;
    }
    let checksum = IP + packet.l4 + checksum_offset(IPPROTO_TCP);
    let end = packet.l4 + u32::from(window.octet(packet.l4 + 12) >> 4) * 4;
    let (addresses, segment) = (u64::from(difference.addresses), u64::from(difference.ports));
    packet.len = len;
    let is_stored = Skb(ctx).store_window(window, 0, end, 0);
    // SAFETY: as above.
    let is_summed = unsafe {
        bpf_l4_csum_replace(ctx, checksum, 0, addresses, BPF_F_PSEUDO_HDR.into()) == 0
            && bpf_l4_csum_replace(ctx, checksum, 0, segment, 0) == 0
    };
    (is_stored && is_summed).into()
}

/// Writes the translated headers. Returns whether it did.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_edge_write(ctx: *mut __sk_buff, is_forwarded: u64) -> u64 {
    let (skb, Some(scratch)) = (Skb(ctx), maps::scratch()) else { return 0 };
    let is_forwarded = is_forwarded != 0;
    let is_error = scratch.packet.is_error != 0;
    count(if is_error { EdgeCounter::Errors } else { EdgeCounter::Forwarded });
    let Scratch { window, packet, target, .. } = scratch;
    if packet.is_error != 0 {
        let end = translate_error(window, packet, target, is_forwarded);
        return skb.store_window(window, 0, end, BPF_F_RECOMPUTE_CSUM.into()).into();
    }
    let difference = translate(window, packet, target, is_forwarded);
    let checksum = IP + packet.l4 + checksum_offset(packet.protocol);
    let mangled = if packet.protocol == IPPROTO_UDP { u64::from(BPF_F_MARK_MANGLED_0) } else { 0 };
    let pseudo = mangled | u64::from(BPF_F_PSEUDO_HDR);
    let (addresses, ports) = (u64::from(difference.addresses), u64::from(difference.ports));
    // SAFETY: the helper takes the context.
    let is_summed = unsafe {
        bpf_l4_csum_replace(ctx, checksum, 0, addresses, pseudo) == 0
            && bpf_l4_csum_replace(ctx, checksum, 0, ports, mangled) == 0
    };
    let (l4, is_ipv6) = (packet.l4, packet.is_ipv6 != 0);
    // What the network card summed up of IPv4 stays the same, as its header's checksum makes up for what
    // differs. In IPv6 that of the addresses is made up for by the checksum of TCP or UDP, which the helper
    // has taken off already.
    let is_stored = if is_ipv6 {
        skb.store_window(window, 7, 33, BPF_F_RECOMPUTE_CSUM.into())
    } else {
        skb.store_window(window, 8, 12, 0)
    };
    (is_summed && is_stored && skb.store_window(window, l4, 4, 0)).into()
}

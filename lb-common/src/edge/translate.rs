//! The translation of a packet: addresses, ports, hop limit, and checksums by what differs (RFC 1624).

use crate::edge::checksum::adjusted;
use crate::edge::packet::{Packet, Window, unknown};
use crate::{Address, IPPROTO_TCP, IPPROTO_UDP};

/// What a packet gets.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Target {
    /// Where it comes from.
    pub source: Address,
    /// Where it goes to.
    pub destination: Address,
    /// The port of the source.
    pub source_port: u16,
    /// The port of the destination.
    pub destination_port: u16,
    /// Zero.
    pub padding: u32,
}

/// By how much sums of 16-bit words in ones' complement differ, in the order of bytes of this machine, as
/// the kernel's helpers take it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// Of the addresses, which are in the pseudo-header of TCP and UDP.
    pub addresses: u32,
    /// Of the ports.
    pub ports: u32,
}

/// Replaces 16 bits, and adds by how much they differ.
#[inline(always)]
pub(super) fn replace(window: &mut Window, at: u32, word: u16, difference: &mut u32) {
    let before = window.word(at);
    *difference += u32::from(!before) + u32::from(word);
    window.set_word(at, word);
}

#[inline(always)]
fn replace_ipv4(window: &mut Window, at: u32, address: &Address, difference: &mut u32) {
    let [.., a, b, c, d] = address.octets;
    replace(window, at, u16::from_ne_bytes([a, b]), difference);
    replace(window, at + 2, u16::from_ne_bytes([c, d]), difference);
}

/// A function of its own in the kernel: its loop is unrolled, and the stack there is short.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn replace_ipv6(window: &mut Window, at: u32, address: &Address) -> u32 {
    let (mut difference, mut idx) = (0, 0);
    while idx < 8 {
        let word = [address.octets[idx * 2], address.octets[idx * 2 + 1]];
        replace(window, at + idx as u32 * 2, u16::from_ne_bytes(word), &mut difference);
        idx += 1;
    }
    difference
}

/// Replaces the addresses of an IP header. Returns by how much they differ; the checksum is right again.
#[inline(always)]
fn replace_addresses(
    window: &mut Window,
    at: u32,
    is_ipv6: bool,
    source: &Address,
    destination: &Address,
) -> u32 {
    let mut addresses = 0;
    if is_ipv6 {
        addresses += replace_ipv6(window, at + 8, source);
        addresses += replace_ipv6(window, at + 24, destination);
    } else {
        replace_ipv4(window, at + 12, source, &mut addresses);
        replace_ipv4(window, at + 16, destination, &mut addresses);
        let checksum = adjusted(window.word(at + 10), addresses);
        window.set_word(at + 10, checksum);
    }
    addresses
}

/// Takes one off the hop limit, which has to be above 0.
#[inline(always)]
fn take_hop(window: &mut Window, is_ipv6: bool) {
    if is_ipv6 {
        window.octets[7] = window.octets[7].wrapping_sub(1);
    } else {
        let mut difference = 0;
        let word = u16::from_ne_bytes([window.octets[8].wrapping_sub(1), window.octets[9]]);
        replace(window, 8, word, &mut difference);
        let checksum = adjusted(window.word(10), difference);
        window.set_word(10, checksum);
    }
}

/// The hop limit of a packet: with 1 or 0 it may not be forwarded.
#[inline(always)]
pub fn hop_limit(window: &Window, is_ipv6: bool) -> u8 {
    window.octets[if is_ipv6 { 7 } else { 8 }]
}

/// Translates the IP header and the ports of a packet of TCP or UDP. Its checksum is left as it was, as
/// the sender's network card may have to compute it still: see [`finish`]. It isn't forwarded, and keeps
/// its hop limit, where it goes to this host.
#[inline(always)]
pub fn translate(
    window: &mut Window,
    packet: &Packet,
    target: &Target,
    is_forwarded: bool,
) -> Difference {
    let is_ipv6 = packet.is_ipv6 != 0;
    if is_forwarded {
        take_hop(window, is_ipv6);
    }
    let addresses = replace_addresses(window, 0, is_ipv6, &target.source, &target.destination);
    let mut ports = 0;
    replace(window, packet.l4, target.source_port.to_be(), &mut ports);
    replace(window, packet.l4 + 2, target.destination_port.to_be(), &mut ports);
    Difference { addresses, ports }
}

/// Where the checksum is in a header of TCP or UDP.
#[inline(always)]
pub fn checksum_offset(protocol: u8) -> u32 {
    if protocol == IPPROTO_TCP { 16 } else { 6 }
}

/// Makes the checksum of a translated packet of TCP or UDP right, if it was. UDP's 0 is none.
#[inline(always)]
pub fn finish(window: &mut Window, packet: &Packet, difference: Difference) {
    let at = packet.l4 + checksum_offset(packet.protocol);
    let difference = difference.addresses + difference.ports;
    update(window, at, packet.protocol, difference);
}

#[inline(always)]
fn update(window: &mut Window, at: u32, protocol: u8, difference: u32) {
    let before = window.word(at);
    if protocol == IPPROTO_UDP && before == 0 {
        return;
    }
    let checksum = adjusted(before, difference);
    let is_none = protocol == IPPROTO_UDP && checksum == 0;
    window.set_word(at, if is_none { 0xffff } else { checksum });
}

/// Translates an ICMP error, and in it the packet that it is about, whose receiver is to find in it what
/// it sent. Returns how many bytes of the window may have changed.
#[inline(always)]
pub fn translate_error(
    window: &mut Window,
    packet: &Packet,
    target: &Target,
    is_forwarded: bool,
) -> u32 {
    let &Packet { inner, inner_l4, l4, protocol, len, .. } = packet;
    let is_ipv6 = packet.is_ipv6 != 0;
    if is_forwarded {
        take_hop(window, is_ipv6);
    }
    let outer = replace_addresses(window, 0, is_ipv6, &target.source, &target.destination);
    // ICMPv6 alone has a pseudo-header.
    let mut difference = if is_ipv6 { outer } else { 0 };
    // The inner one went the other way.
    let addresses = replace_addresses(window, inner, is_ipv6, &target.destination, &target.source);
    // IPv4's checksum makes up for its addresses.
    difference += if is_ipv6 { addresses } else { 0 };
    let mut ports = 0;
    replace(window, inner_l4, target.destination_port.to_be(), &mut ports);
    replace(window, inner_l4 + 2, target.source_port.to_be(), &mut ports);
    difference += ports;
    // TCP's is beyond what there has to be.
    let at = inner_l4 + checksum_offset(protocol);
    let mut end = inner_l4 + 4;
    if at + 2 <= len && at + 2 <= crate::WINDOW_LEN as u32 {
        let at = unknown(at);
        let before = window.word(at);
        update(window, at, protocol, addresses + ports);
        difference += u32::from(!before) + u32::from(window.word(at));
        end = at + 2;
    }
    let checksum = adjusted(window.word(l4 + 2), difference);
    window.set_word(l4 + 2, checksum);
    end
}

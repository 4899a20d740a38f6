//! The RST that answers a TCP segment of no flow (RFC 9293, section 3.5.2).

use crate::edge::packet::{
    IPV4_HEADER, IPV6_HEADER, Packet, TCP_ACK, TCP_FIN, TCP_HEADER, TCP_RST, TCP_SYN, WINDOW_LEN,
    Window,
};
use crate::edge::translate::fold;
use crate::{Address, IPPROTO_TCP};

/// The hop limit of packets that begin here.
const HOP_LIMIT: u8 = 64;

/// A RST, whose headers are in the window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reset {
    /// Its length, from the IP header on.
    pub len: u32,
    /// The sum of the pseudo-header, as it is where the network card is to complete the checksum.
    pub pseudo_sum: u16,
}

/// Makes the headers of a TCP segment those of the RST that answers it. It has no options.
#[inline(always)]
pub fn make_reset(window: &mut Window, packet: &Packet) -> Reset {
    let &Packet { source, destination, source_port, destination_port, tcp_flags, l4, .. } = packet;
    let is_ipv6 = packet.is_ipv6 != 0;
    let (sequence, acknowledged) = (window.be32(l4 + 4), window.be32(l4 + 8));
    let header_len = u32::from(window.octet(l4 + 12) >> 4) * 4;
    let data_len = packet.len.wrapping_sub(l4 + header_len)
        + u32::from(tcp_flags & TCP_SYN != 0)
        + u32::from(tcp_flags & TCP_FIN != 0);
    let (sequence, acknowledged, flags) = if tcp_flags & TCP_ACK != 0 {
        (acknowledged, 0, TCP_RST)
    } else {
        (0, sequence.wrapping_add(data_len), TCP_RST | TCP_ACK)
    };
    let mut set = |at: u32, number: u16| window.set_word(at, number.to_be());
    let ip_len = if is_ipv6 { IPV6_HEADER } else { IPV4_HEADER };
    if is_ipv6 {
        set(0, 0x6000);
        set(2, 0);
        set(4, TCP_HEADER as u16);
        set(6, u16::from(IPPROTO_TCP) << 8 | u16::from(HOP_LIMIT));
    } else {
        set(0, 0x4500);
        set(2, (IPV4_HEADER + TCP_HEADER) as u16);
        set(4, 0);
        set(6, 0x4000);
        set(8, u16::from(HOP_LIMIT) << 8 | u16::from(IPPROTO_TCP));
        set(10, 0);
    }
    set(ip_len, destination_port);
    set(ip_len + 2, source_port);
    set(ip_len + 4, (sequence >> 16) as u16);
    set(ip_len + 6, sequence as u16);
    set(ip_len + 8, (acknowledged >> 16) as u16);
    set(ip_len + 10, acknowledged as u16);
    set(ip_len + 12, 0x5000 | u16::from(flags));
    set(ip_len + 14, 0);
    set(ip_len + 16, 0);
    set(ip_len + 18, 0);
    let addresses = if is_ipv6 {
        set_address(window, 8, &destination, 0) + set_address(window, 24, &source, 0)
    } else {
        set_address(window, 12, &destination, 12) + set_address(window, 16, &source, 12)
    };
    if !is_ipv6 {
        let checksum = !fold(sum(window, 0, IPV4_HEADER));
        window.set_word(10, checksum);
    }
    let protocol = u32::from(u16::from(IPPROTO_TCP).to_be());
    let pseudo = addresses + protocol + u32::from((TCP_HEADER as u16).to_be());
    let checksum = !fold(pseudo + sum(window, ip_len, TCP_HEADER));
    window.set_word(ip_len + 16, checksum);
    Reset { len: ip_len + TCP_HEADER, pseudo_sum: fold(pseudo) }
}

/// Writes an address from its nth octet on, and returns the sum of its words. A function of its own in the
/// kernel: its loop is unrolled, and the stack there is short.
#[cfg_attr(target_arch = "bpf", inline(never))]
pub(super) fn set_address(window: &mut Window, at: u32, address: &Address, first: usize) -> u32 {
    let (mut sum, mut idx) = (0, first);
    while idx < 16 {
        // The mask spares the comparison.
        let octet = idx & 14;
        let word = u16::from_ne_bytes([address.octets[octet], address.octets[octet + 1]]);
        window.set_word(at + (idx - first) as u32, word);
        sum += u32::from(word);
        idx += 2;
    }
    sum
}

/// Whether the checksum of a TCP segment that is whole in the window is right (RFC 9293, section 3.1).
#[inline(always)]
pub fn is_checksum_right(window: &Window, packet: &Packet) -> bool {
    let &Packet { l4, len, .. } = packet;
    let segment_len = len.wrapping_sub(l4);
    let addresses = match packet.is_ipv6 {
        0 => sum(window, 12, 8),
        _ => sum(window, 8, 32),
    };
    let pseudo =
        u32::from(u16::from(IPPROTO_TCP).to_be()) + u32::from((segment_len as u16).to_be());
    let is_odd = segment_len & 1 != 0;
    let last = if is_odd { u16::from_ne_bytes([window.octet(len.wrapping_sub(1)), 0]) } else { 0 };
    let segment = sum(window, l4, segment_len & !1) + u32::from(last);
    fold(addresses + pseudo + segment) == 0xffff
}

/// The sum of words, likewise.
#[cfg_attr(target_arch = "bpf", inline(never))]
pub(super) fn sum(window: &Window, begin: u32, len: u32) -> u32 {
    let (mut sum, mut at) = (0, 0);
    while at < len && at < WINDOW_LEN as u32 {
        sum += u32::from(window.word(begin + at));
        at += 2;
    }
    sum
}

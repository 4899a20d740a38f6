//! The RST that answers a TCP segment of no flow (RFC 9293, section 3.5.2).

use crate::IPPROTO_TCP;
use crate::edge::checksum::{fold, sum};
use crate::edge::header::{ip_len, set_ip_header};
use crate::edge::packet::{Packet, TCP_ACK, TCP_FIN, TCP_HEADER, TCP_RST, TCP_SYN, Window};

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
    let ip_len = ip_len(is_ipv6);
    let ends = [&destination, &source];
    let addresses = set_ip_header(window, is_ipv6, ends, IPPROTO_TCP, TCP_HEADER);
    let mut set = |at: u32, number: u16| window.set_word(at, number.to_be());
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
    let protocol = u32::from(u16::from(IPPROTO_TCP).to_be());
    let pseudo = addresses + protocol + u32::from((TCP_HEADER as u16).to_be());
    let checksum = !fold(pseudo + sum(window, ip_len, TCP_HEADER));
    window.set_word(ip_len + 16, checksum);
    Reset { len: ip_len + TCP_HEADER, pseudo_sum: fold(pseudo) }
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

//! The ICMP error that an edge itself sends about a packet which it can't send on (RFC 792, 1191, 4443).

use core::hint::black_box;

use crate::edge::checksum::{fold, sum};
use crate::edge::header::{ip_len, set_ip_header};
use crate::edge::packet::{
    ICMP_HEADER, IPPROTO_ICMP, IPPROTO_ICMPV6, IPV4_HEADER, IPV6_HEADER, Packet, Window,
};

const _: () = assert!(QUOTED == ICMP_HEADER);
/// How much of the transport header an error has to quote (RFC 792): the ports, and TCP's sequence number.
const QUOTED: u32 = 8;

/// Makes the window, which has a packet as it came, an ICMP error about it: from where the packet was sent to, to
/// where it came from. `mtu` is that of the way on, or 0 where the packet's hop limit is used up. Returns the error's
/// length, from the IP header on; 0, and the window as it was, about a packet with options of IPv4 or extension
/// headers of IPv6: each length would be a case of its own to the kernel's verifier.
#[inline(always)]
pub fn make_error(window: &mut Window, packet: &Packet, mtu: u32) -> u32 {
    // Each with constants: the verifiers of 5.10 and 6.1 lose what they know of a number that is kept on the stack.
    match packet.is_ipv6 {
        0 => make::<false>(window, packet, mtu),
        _ => make::<true>(window, packet, mtu),
    }
}

#[inline(always)]
fn make<const IS_IPV6: bool>(window: &mut Window, packet: &Packet, mtu: u32) -> u32 {
    let &Packet { source, destination, l4, .. } = packet;
    let is_ipv6 = IS_IPV6;
    let ip_len = ip_len(is_ipv6);
    let begin = ip_len + ICMP_HEADER;
    let quoted = ip_len + QUOTED;
    if l4 != ip_len {
        return 0;
    }
    // The quoted part is as long as what comes before it.
    match is_ipv6 {
        true => quote::<{ IPV6_HEADER + QUOTED }>(window),
        false => quote::<{ IPV4_HEADER + QUOTED }>(window),
    }
    let (len, icmp_len) = (begin + quoted, ICMP_HEADER + quoted);
    let protocol = if is_ipv6 { IPPROTO_ICMPV6 } else { IPPROTO_ICMP };
    let ends = [&destination, &source];
    let addresses = set_ip_header(window, is_ipv6, ends, protocol, icmp_len);
    let kind: u16 = match (is_ipv6, mtu != 0) {
        // Destination unreachable: fragmentation needed.
        (false, true) => 0x0304,
        // Time exceeded in transit.
        (false, false) => 0x0b00,
        // Packet too big.
        (true, true) => 0x0200,
        (true, false) => 0x0300,
    };
    let mut set = |at: u32, number: u16| window.set_word(at, number.to_be());
    set(ip_len, kind);
    set(ip_len + 2, 0);
    set(ip_len + 4, (mtu >> 16) as u16);
    set(ip_len + 6, mtu as u16);
    // ICMP of IPv4 sums up no addresses.
    let pseudo = match is_ipv6 {
        true => {
            let protocol = u32::from(u16::from(protocol).to_be());
            addresses + protocol + u32::from((icmp_len as u16).to_be())
        }
        false => 0,
    };
    let checksum = !fold(pseudo + sum(window, ip_len, icmp_len));
    window.set_word(ip_len + 2, checksum);
    len
}

/// Copies the window's first `LEN` octets behind themselves. A function of its own in the kernel, as its loop is
/// unrolled.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn quote<const LEN: u32>(window: &mut Window) {
    let mut at = 0;
    while at < LEN {
        // One after the other: all at once would take the kernel's whole stack.
        let word = black_box(window.word(at));
        window.set_word(LEN + at, word);
        at += 2;
    }
}

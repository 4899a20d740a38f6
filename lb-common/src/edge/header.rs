//! The IP headers of packets that begin here.

use crate::Address;
use crate::edge::checksum::{fold, sum};
use crate::edge::packet::{IPV4_HEADER, IPV6_HEADER, Window};

/// The hop limit of packets that begin here.
const HOP_LIMIT: u8 = 64;

/// Writes the header of a packet with so many octets behind it. Returns the sum of its addresses.
#[inline(always)]
pub(super) fn set_ip_header(
    window: &mut Window,
    is_ipv6: bool,
    [from, to]: [&Address; 2],
    protocol: u8,
    len: u32,
) -> u32 {
    let mut set = |at: u32, number: u16| window.set_word(at, number.to_be());
    if is_ipv6 {
        set(0, 0x6000);
        set(2, 0);
        set(4, len as u16);
        set(6, u16::from(protocol) << 8 | u16::from(HOP_LIMIT));
        return set_address(window, 8, from, 0) + set_address(window, 24, to, 0);
    }
    set(0, 0x4500);
    set(2, (IPV4_HEADER + len) as u16);
    set(4, 0);
    set(6, 0x4000);
    set(8, u16::from(HOP_LIMIT) << 8 | u16::from(protocol));
    set(10, 0);
    let addresses = set_address(window, 12, from, 12) + set_address(window, 16, to, 12);
    let checksum = !fold(sum(window, 0, IPV4_HEADER));
    window.set_word(10, checksum);
    addresses
}

/// How long a header without options or extension headers is.
#[inline(always)]
pub(super) fn ip_len(is_ipv6: bool) -> u32 {
    if is_ipv6 { IPV6_HEADER } else { IPV4_HEADER }
}

/// Writes an address from its nth octet on, and returns the sum of its words. A function of its own in the
/// kernel: its loop is unrolled, and the stack there is short.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn set_address(window: &mut Window, at: u32, address: &Address, first: usize) -> u32 {
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

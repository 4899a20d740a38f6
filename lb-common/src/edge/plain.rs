//! The translation of plain packets, which are most: whole, IPv4 without options or IPv6 without extension
//! headers, TCP or UDP. Their headers lie at fixed places, so what is read and written are words, and the
//! sums are of words: a program needs no copy of the packet. [`translate`](super::translate()) and
//! [`finish`](super::finish) do the same to packets of any kind.

use crate::edge::checksum::folded;
use crate::{IPPROTO_TCP, IPPROTO_UDP};

/// The words of 32 bits with the addresses and ports of a plain IPv4 packet: they follow each other.
pub const N_ENDS4: usize = 3;
/// Those of IPv6.
pub const N_ENDS6: usize = 9;

/// By how much the sums of words differ.
#[inline(always)]
pub fn words_difference<const N: usize>(before: &[u32; N], after: &[u32; N]) -> u64 {
    let (mut sum, mut idx) = (0, 0);
    while idx < N {
        sum += u64::from(!before[idx]) + u64::from(after[idx]);
        idx += 1;
    }
    sum
}

/// The same of a packet's addresses alone, as IPv4's own checksum is of them.
#[inline(always)]
pub fn addresses_difference(before: &[u32; N_ENDS4], after: &[u32; N_ENDS4]) -> u64 {
    words_difference(&[before[0], before[1]], &[after[0], after[1]])
}

/// IPv4's word of hop limit and protocol, and its checksum, of a packet that is forwarded. The hop limit has
/// to be above 0. `addresses` is by how much its addresses differ.
#[inline(always)]
pub fn forwarded(hops_and_protocol: u16, checksum: u16, addresses: u64) -> (u16, u16) {
    let [hops, protocol] = hops_and_protocol.to_ne_bytes();
    let word = u16::from_ne_bytes([hops.wrapping_sub(1), protocol]);
    let difference = addresses + u64::from(!hops_and_protocol) + u64::from(word);
    (word, !folded(u64::from(folded(difference)) + u64::from(!checksum)))
}

/// The checksum of TCP or UDP after what it is about has come to differ by so much (RFC 1624, equation 3).
/// UDP's 0 is none.
#[inline(always)]
pub fn transport_checksum(protocol: u8, checksum: u16, difference: u64) -> u16 {
    if protocol == IPPROTO_UDP && checksum == 0 {
        return 0;
    }
    let checksum = !folded(u64::from(folded(difference)) + u64::from(!checksum));
    if protocol == IPPROTO_UDP && checksum == 0 { 0xffff } else { checksum }
}

/// Whether a checksum of TCP or UDP is the sum of the pseudo-header alone, as it is in packets whose rest a
/// network card is to sum up still (CHECKSUM_PARTIAL): those of this host and of virtual machines on it. A
/// program at XDP isn't told. Of the others one in 65,536 has that sum by chance.
#[inline(always)]
pub fn may_be_partial<const N: usize>(
    ends: &[u32; N],
    protocol: u8,
    transport_len: u32,
    checksum: u16,
) -> bool {
    let (mut sum, mut idx) = (0, 0);
    while idx < N - 1 {
        sum += u64::from(ends[idx]);
        idx += 1;
    }
    sum += u64::from(u16::from(protocol).to_be()) + u64::from((transport_len as u16).to_be());
    folded(sum) == checksum
}

/// Two ports of a packet as they lie in memory, each in this machine's order of bytes, as keys and records
/// have them; and back.
#[inline(always)]
pub fn swapped(ports: u32) -> u32 {
    (ports >> 8 & 0x00ff_00ff) | (ports & 0x00ff_00ff) << 8
}

/// What is to be right of a plain packet's headers. Anything else is for [`parse`](super::parse) to judge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlainHeader {
    /// How many bytes there are, from the IP header on.
    pub available: u32,
    /// How many there are by the IP header.
    pub len: u32,
    /// How long the IP header is.
    pub ip_len: u32,
    /// The hop limit.
    pub hops: u8,
}

impl PlainHeader {
    /// Whether the packet can be forwarded, with a header of TCP or UDP.
    #[inline(always)]
    pub fn is_plain(&self, protocol: u8) -> bool {
        let transport = if protocol == IPPROTO_TCP { 20 } else { 8 };
        self.len <= self.available && self.len >= self.ip_len + transport && self.hops > 1
    }

    /// Whether a TCP header is as long as it may be; the octet with its length.
    #[inline(always)]
    pub fn has_tcp(&self, data_offset: u8) -> bool {
        let len = u32::from(data_offset >> 4) * 4;
        len >= 20 && self.ip_len + len <= self.len
    }

    /// Whether UDP's length is as long as it may be.
    #[inline(always)]
    pub fn has_udp(&self, udp_len: u32) -> bool {
        udp_len >= 8 && self.ip_len + udp_len <= self.len
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;
    use crate::edge::reference::{Spec, packet};
    use crate::{Address, TCP_ACK, Target};

    fn word(packet: &[u8], at: usize) -> u16 {
        u16::from_ne_bytes(packet[at..at + 2].try_into().unwrap())
    }

    fn ends<const N: usize>(packet: &[u8], at: usize) -> [u32; N] {
        let word = |idx| packet[at + 4 * idx..][..4].try_into().unwrap();
        core::array::from_fn(|idx| u32::from_ne_bytes(word(idx)))
    }

    /// A packet with the addresses and ports of another one, by the words of both.
    fn translated<const N: usize>(before: &[u8], like: &[u8], protocol: u8) -> Vec<u8> {
        let mut packet = before.to_vec();
        let is_ipv6 = N == N_ENDS6;
        let (at, ip_len) = if is_ipv6 { (8, 40) } else { (12, 20) };
        let (old, new) = (ends::<N>(before, at), ends::<N>(like, at));
        let difference = words_difference(&old, &new);
        let sum_at = ip_len + if protocol == IPPROTO_TCP { 16 } else { 6 };
        let sum = transport_checksum(protocol, word(before, sum_at), difference);
        let partial = may_be_partial(&old, protocol, (before.len() - ip_len) as u32, sum);
        assert!(!partial, "{before:02x?}");
        packet[sum_at..sum_at + 2].copy_from_slice(&sum.to_ne_bytes());
        new.iter().enumerate().for_each(|(idx, word)| {
            packet[at + 4 * idx..][..4].copy_from_slice(&word.to_ne_bytes());
        });
        if is_ipv6 {
            packet[7] -= 1;
        } else {
            let addresses = addresses_difference(&ends(before, 12), &ends(like, 12));
            let (hops, sum) = forwarded(word(before, 8), word(before, 10), addresses);
            packet[8..10].copy_from_slice(&hops.to_ne_bytes());
            packet[10..12].copy_from_slice(&sum.to_ne_bytes());
        }
        packet
    }

    fn spec(is_ipv6: bool, protocol: u8, seed: u64, len: usize) -> Spec {
        // SplitMix64's increments: any numbers.
        let octets: [u8; 16] = core::array::from_fn(|idx| {
            (seed.wrapping_add(idx as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
        });
        let address = |nth: usize| match is_ipv6 {
            true => Address { octets: core::array::from_fn(|idx| octets[(idx + nth) % 16]) },
            false => Address::v4(core::array::from_fn(|idx| octets[idx + nth])),
        };
        let port = |idx: usize| u16::from_be_bytes([octets[idx], octets[idx + 1] | 1]);
        let target = Target {
            source: address(3),
            destination: address(9),
            source_port: port(0),
            destination_port: port(2),
            padding: 0,
        };
        Spec {
            target,
            is_ipv6,
            protocol,
            tcp_flags: TCP_ACK,
            numbers: [7, 9],
            hop_limit: 2,
            options: Vec::new(),
            tcp_options: Vec::new(),
            is_unchecked: false,
            payload: octets.iter().copied().cycle().take(len).collect(),
        }
    }

    #[test]
    fn plain_packets_are_translated_as_if_made_anew() {
        for seed in 0..2_000 {
            for (is_ipv6, protocol) in [
                (false, IPPROTO_TCP),
                (false, IPPROTO_UDP),
                (true, IPPROTO_TCP),
                (true, IPPROTO_UDP),
            ] {
                for is_unchecked in [false, protocol == IPPROTO_UDP && !is_ipv6] {
                    let len = seed as usize % 40;
                    let before = Spec { is_unchecked, ..spec(is_ipv6, protocol, seed, len) };
                    let target = spec(is_ipv6, protocol, !seed, 0).target;
                    let after = packet(&Spec { target, hop_limit: 1, ..before.clone() });
                    let before = packet(&before);
                    let found = match is_ipv6 {
                        true => translated::<N_ENDS6>(&before, &after, protocol),
                        false => translated::<N_ENDS4>(&before, &after, protocol),
                    };
                    assert_eq!(found, after, "{before:02x?}");
                }
            }
        }
    }

    #[test]
    fn checksums_that_a_network_card_is_to_complete() {
        for (is_ipv6, protocol) in [(false, IPPROTO_TCP), (false, IPPROTO_UDP), (true, IPPROTO_TCP)]
        {
            for seed in 0..1_000 {
                let spec = spec(is_ipv6, protocol, seed, 30);
                let packet = packet(&spec);
                let len = packet.len() - if is_ipv6 { 40 } else { 20 };
                let partial = reference_sum(&spec, len as u8);
                let is_partial = match is_ipv6 {
                    true => {
                        may_be_partial::<N_ENDS6>(&ends(&packet, 8), protocol, len as u32, partial)
                    }
                    false => {
                        may_be_partial::<N_ENDS4>(&ends(&packet, 12), protocol, len as u32, partial)
                    }
                };
                assert!(is_partial, "{packet:02x?}");
            }
        }
    }

    /// As the kernel has it there: the folded sum, which isn't inverted.
    fn reference_sum(spec: &Spec, len: u8) -> u16 {
        let tcp = super::super::reference::pseudo_sum(&spec.target, spec.is_ipv6, len);
        // That one is of TCP.
        let sum = u32::from(tcp) + u32::from(spec.protocol) + u32::from(!u16::from(IPPROTO_TCP));
        let sum = (sum & 0xffff) + (sum >> 16);
        (((sum & 0xffff) + (sum >> 16)) as u16).to_be()
    }

    #[test]
    fn ports_are_swapped_each_alone() {
        let ports = u32::from_ne_bytes([0x12, 0x34, 0x56, 0x78]);
        let [first, second] = [0x1234u16, 0x5678].map(u16::to_ne_bytes);
        assert_eq!(swapped(ports).to_ne_bytes(), [first[0], first[1], second[0], second[1]]);
        assert_eq!(swapped(swapped(ports)), ports);
    }
}

//! The headers of a packet.

use aya_ebpf::bindings::{
    BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LOOKUP_OUTPUT,
    bpf_fib_lookup as FibLookup,
};
use aya_ebpf::helpers::generated::bpf_fib_lookup;
use lb_common::{Address, DNS_HEADER_LEN, IPPROTO_UDP};

use crate::skb::{Skb, field};

const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
/// Where the IP header begins.
const IP: u32 = ETHERNET_LEN;
pub const ETHERNET_LEN: u32 = 14;
pub const IPV4_LEN: u32 = 20;
pub const IPV6_LEN: u32 = 40;
pub const UDP_LEN: u32 = 8;

/// Of a UDP packet without IP options, extension headers and fragments, of one datagram.
pub struct Headers {
    pub is_ipv6: bool,
    /// Where the UDP header begins, in bytes.
    pub udp: u8,
    pub source: Address,
    pub destination: Address,
    pub source_port: u16,
    pub port: u16,
    /// The UDP header's length field: its own and the message's length.
    pub udp_len: u16,
}

impl Headers {
    /// The headers; `None` for any other packet, which mostly is found by two or three words.
    #[inline(always)]
    pub fn read(skb: &Skb) -> Option<Headers> {
        match skb.protocol() {
            ETH_P_IP => Headers::read_ipv4(skb),
            ETH_P_IPV6 => Headers::read_ipv6(skb),
            _ => None,
        }
    }

    #[inline(always)]
    fn read_ipv4(skb: &Skb) -> Option<Headers> {
        // Version 4 and five words; "more fragments" and the offset.
        const PLAIN: u8 = 0x45;
        const FRAGMENT: u16 = 0x3fff;
        let (data, end) = skb.linear();
        if data + (IP + IPV4_LEN + UDP_LEN) as usize > end
            || field!(data, IP + 9, u8) != IPPROTO_UDP
        {
            return None;
        }
        let fragment = u16::from_be(field!(data, IP + 6, u16));
        if field!(data, IP, u8) != PLAIN || fragment & FRAGMENT != 0 {
            return None;
        }
        let len = u32::from(u16::from_be(field!(data, IP + 2, u16)));
        let headers = Headers {
            is_ipv6: false,
            udp: (IP + IPV4_LEN) as u8,
            source: Address::v4(field!(data, IP + 12, u32).to_ne_bytes()),
            destination: Address::v4(field!(data, IP + 16, u32).to_ne_bytes()),
            source_port: u16::from_be(field!(data, IP + IPV4_LEN, u16)),
            port: u16::from_be(field!(data, IP + IPV4_LEN + 2, u16)),
            udp_len: u16::from_be(field!(data, IP + IPV4_LEN + 4, u16)),
        };
        headers.fit(skb, len, IPV4_LEN)
    }

    #[inline(always)]
    fn read_ipv6(skb: &Skb) -> Option<Headers> {
        let (data, end) = skb.linear();
        if data + (IP + IPV6_LEN + UDP_LEN) as usize > end
            || field!(data, IP + 6, u8) != IPPROTO_UDP
        {
            return None;
        }
        let len = u32::from(u16::from_be(field!(data, IP + 4, u16)));
        let source = [field!(data, IP + 8, u64), field!(data, IP + 16, u64)];
        let destination = [field!(data, IP + 24, u64), field!(data, IP + 32, u64)];
        let headers = Headers {
            is_ipv6: true,
            udp: (IP + IPV6_LEN) as u8,
            source: Address { octets: zerocopy::transmute!(source) },
            destination: Address { octets: zerocopy::transmute!(destination) },
            source_port: u16::from_be(field!(data, IP + IPV6_LEN, u16)),
            port: u16::from_be(field!(data, IP + IPV6_LEN + 2, u16)),
            udp_len: u16::from_be(field!(data, IP + IPV6_LEN + 4, u16)),
        };
        headers.fit(skb, len + IPV6_LEN, IPV6_LEN)
    }

    /// The headers, if all lengths agree; `len` is that of the IP packet.
    #[inline(always)]
    fn fit(self, skb: &Skb, len: u32, ip_len: u32) -> Option<Headers> {
        let udp_len = u32::from(self.udp_len);
        let fits = len == ip_len + udp_len
            && skb.len() == IP + len
            && udp_len >= UDP_LEN + DNS_HEADER_LEN
            && !skb.is_batch();
        fits.then_some(self)
    }

    /// The length of the message.
    #[inline(always)]
    pub fn message_len(&self) -> u32 {
        u32::from(self.udp_len).wrapping_sub(UDP_LEN)
    }

    /// Whether the source would be reached by the interface that the packet came by: a source that
    /// isn't was forged, or its answer would take another way.
    #[inline(always)]
    pub fn is_reachable_by(&self, skb: &Skb) -> bool {
        const AF_INET: u8 = 2;
        const AF_INET6: u8 = 10;
        let [source, destination]: [[u32; 4]; 2] =
            [zerocopy::transmute!(self.source), zerocopy::transmute!(self.destination)];
        // struct bpf_fib_lookup: the family in the first byte, the interface, the addresses.
        let mut words = [0u32; 16];
        words[2] = skb.ifindex();
        if self.is_ipv6 {
            words[0] = u32::from_ne_bytes([AF_INET6, IPPROTO_UDP, 0, 0]);
            words[4..8].copy_from_slice(&destination);
            words[8..12].copy_from_slice(&source);
        } else {
            words[0] = u32::from_ne_bytes([AF_INET, IPPROTO_UDP, 0, 0]);
            (words[4], words[8]) = (destination[3], source[3]);
        }
        const { assert!(size_of::<FibLookup>() == 64) };
        // SAFETY: the helper takes the context, and a structure of that length.
        let found = unsafe {
            bpf_fib_lookup(skb.0.cast(), words.as_mut_ptr().cast(), 64, BPF_FIB_LOOKUP_OUTPUT)
        };
        let is_found = found == i64::from(BPF_FIB_LKUP_RET_SUCCESS)
            || found == i64::from(BPF_FIB_LKUP_RET_NO_NEIGH);
        is_found && words[2] == skb.ifindex()
    }
}

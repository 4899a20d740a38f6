//! An address of either family, as the maps have it.

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// 16 octets in network order; IPv4 as `::ffff:a.b.c.d` (RFC 4291, section 2.5.5.2).
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialOrd, Ord, FromBytes, Immutable, IntoBytes)]
pub struct Address {
    /// The octets.
    pub octets: [u8; 16],
}

impl Address {
    /// An IPv4 address.
    #[inline(always)]
    pub const fn v4(octets: [u8; 4]) -> Address {
        // As a number rather than an array of octets, which the kernel side would fill by a call.
        let mapped = 0xffff_0000_0000 | u32::from_be_bytes(octets) as u128;
        Address { octets: mapped.to_be_bytes() }
    }

    /// The IPv4 address that this is, if it is one.
    #[inline(always)]
    pub const fn to_v4(self) -> Option<[u8; 4]> {
        let [high, low] = self.words();
        let [a, b, c, d, e, f, g, h] = low.to_ne_bytes();
        let prefix = u32::from_ne_bytes([a, b, c, d]);
        if high == 0 && prefix == u32::from_ne_bytes([0, 0, 0xff, 0xff]) {
            Some([e, f, g, h])
        } else {
            None
        }
    }

    /// The octets of an IPv4 address as a word, in the order in which they lie in memory.
    #[inline(always)]
    pub const fn v4_word(self) -> u32 {
        let [_, low] = self.words();
        (low >> 32) as u32
    }

    /// The octets as two words, in the order in which they lie in memory.
    #[inline(always)]
    pub const fn words(self) -> [u64; 2] {
        zerocopy::transmute!(self.octets)
    }
}

// By words: a comparison of octets would be a call of memcmp, which the kernel side doesn't have.
impl PartialEq for Address {
    #[inline(always)]
    fn eq(&self, other: &Address) -> bool {
        self.words() == other.words()
    }
}

impl Eq for Address {}

impl core::hash::Hash for Address {
    fn hash<H: core::hash::Hasher>(&self, state: &mut H) {
        self.octets.hash(state);
    }
}

#[cfg(test)]
mod tests {
    use std::string::ToString;

    use super::*;

    #[test]
    fn ipv4_there_and_back() {
        let mapped = Address::v4([10, 0, 0, 7]);
        assert_eq!(core::net::Ipv6Addr::from(mapped.octets).to_string(), "::ffff:10.0.0.7");
        assert_eq!(mapped.to_v4(), Some([10, 0, 0, 7]));
        assert_eq!(mapped.v4_word().to_ne_bytes(), [10, 0, 0, 7]);
        let ipv6: core::net::Ipv6Addr = "fd00::ffff:a00:7".parse().unwrap();
        assert_eq!(Address { octets: ipv6.octets() }.to_v4(), None);
    }
}

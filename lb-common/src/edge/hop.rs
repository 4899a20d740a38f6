//! What the fast path of an edge keeps: next hops, interfaces, counts.

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// How the packets of one direction of a flow leave.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct Hop {
    /// When it was looked up, in jiffies; 0 for never. It is written last.
    pub looked_up: u64,
    /// The index of the interface by which they leave.
    pub egress: u32,
    /// That of the one by which they came.
    pub ingress: u32,
    /// The greatest length that the route has taken, from the IP header on.
    pub max_len: u32,
    /// The hardware addresses, as an Ethernet header begins with them.
    pub ethernet: [u32; 3],
}

/// The value of `EDGE_HOPS`, at the index of the flow's record: of the client's packets, and of the backend's.
pub type FlowHops = [Hop; 2];

/// For how many jiffies a next hop is used without being looked up again: 64 to 640 ms.
pub const HOP_JIFFIES: u64 = 64;

/// How many times `EDGE_NEIGHBOURS` has: of the last packet to a neighbour that left by the kernel's own output, by
/// the low 32 bits of CLOCK_MONOTONIC in milliseconds.
pub const N_NEIGHBOUR_TIMES: u32 = 4_096;

/// Where the time of a neighbour is, below [`N_NEIGHBOUR_TIMES`]: the one behind this interface with this hardware
/// address, of 48 bits in any order. Two neighbours may share a time.
#[inline(always)]
pub const fn neighbour_time(interface: u32, hardware_address: u64) -> u32 {
    // Multiplicative hashing (Knuth, The Art of Computer Programming, 6.4) with SplitMix64's increment: the upper
    // bits of the product depend on all of the word.
    let word = hardware_address << 16 | interface as u64 & 0xffff;
    (word.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - N_NEIGHBOUR_TIMES.ilog2())) as u32
}

/// How often one does, in milliseconds: as long as the kernel waits before it verifies a neighbour
/// (`net.ipv4.neigh.default.delay_first_probe_time`).
pub const NEIGHBOUR_MS: u32 = 5_000;

/// Whether the next packet to a neighbour is to leave that way.
#[inline(always)]
pub const fn is_unverified(last_ms: u32, now_ms: u32) -> bool {
    /// By how much the clock of one processor, or one that is read once a jiffy, may be behind another.
    const BEHIND_MS: u32 = 1_000;
    now_ms.wrapping_sub(last_ms).wrapping_add(BEHIND_MS) >= NEIGHBOUR_MS + BEHIND_MS
}

/// The value of `EDGE_INTERFACES`, at the remainder of the interface's index.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct EdgeInterface {
    /// Its hardware address: what is sent to others isn't for this host.
    pub mac: [u8; 6],
    /// [`EdgeInterface::SENDS_BACK`] and others.
    pub flags: u16,
    /// Its index; 0 where there is none.
    pub index: u32,
    /// Zero.
    pub padding: u32,
}

impl EdgeInterface {
    /// A program at XDP may send a packet back by it (XDP_TX).
    pub const SENDS_BACK: u16 = 1;
    /// A packet may be redirected to it from XDP, also one that came by it.
    pub const TAKES_REDIRECTED: u16 = 2;
    /// A program at XDP may redirect a packet that came by it.
    pub const REDIRECTS: u16 = 4;
}

/// How many entries `EDGE_INTERFACES` has.
pub const N_EDGE_INTERFACES: u32 = 1_024;

/// The value of `EDGE_PROCESSORS`, for each processor.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct EdgeProcessor {
    /// When the clock was read, in jiffies.
    pub jiffies: u64,
    /// What it showed: CLOCK_MONOTONIC in milliseconds.
    pub now_ms: u64,
    /// The packets that the fast path sent on, by [`FastPath`].
    pub forwarded: [u64; N_FAST_PATHS],
}

/// How many [`FastPath`] there are.
pub const N_FAST_PATHS: usize = 3;

/// By what a packet on the fast path left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum FastPath {
    /// From TC.
    Tc = 0,
    /// From XDP, back by the interface that it came by.
    XdpTx = 1,
    /// From XDP, redirected.
    XdpRedirect = 2,
}

const _: () = assert!(size_of::<FlowHops>() == 64 && size_of::<EdgeInterface>() == 16);

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;

    /// Those of one vendor or bridge differ in their last octets alone.
    #[test]
    fn neighbours_have_times_of_their_own() {
        let time = |address: [u8; 6], is_swapped: bool| {
            let [a, b, c, d, e, f] = address;
            let octets =
                if is_swapped { [f, e, d, c, b, a, 0, 0] } else { [a, b, c, d, e, f, 0, 0] };
            neighbour_time(3, u64::from_le_bytes(octets))
        };
        for is_swapped in [false, true] {
            let of_last = |last| time([0x02, 0x42, 0x0a, 7, 0, last], is_swapped);
            let mut times: Vec<_> = (0..=255).map(of_last).collect();
            assert!(times.iter().all(|time| *time < N_NEIGHBOUR_TIMES));
            times.sort_unstable();
            times.dedup();
            assert!(times.len() > 200, "{}", times.len());
        }
        assert_ne!(neighbour_time(3, 0), neighbour_time(4, 0));
    }

    #[test]
    fn neighbours_are_verified_now_and_then() {
        for (last_ms, now_ms, expected) in [
            (0, 10_000, true),
            (10_000, 10_000, false),
            (10_000, 14_999, false),
            (10_000, 15_000, true),
            // A clock that is behind; one that has wrapped.
            (10_000, 9_990, false),
            (u32::MAX - 1, 3, false),
            (u32::MAX - 1, 4_998, true),
            // Long ago.
            (0, 1 << 31, true),
            (0, u32::MAX - 2_000, true),
        ] {
            assert_eq!(is_unverified(last_ms, now_ms), expected, "{last_ms} {now_ms}");
        }
    }
}

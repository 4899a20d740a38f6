//! The cache in front of the hashes of flows: from a packet's addresses and ports to its flow's record by one
//! cache line, where a hash takes three of them and a call.
//!
//! A reader compares the record with the packet, so an entry may be wrong, and is never removed: one that leads to
//! another flow by now is as good as none.

use crate::edge::flow::FlowRef;

/// How many entries a line has: what a cache line holds.
pub const N_CACHED: usize = 8;

/// The value of `EDGE_CACHE`. Entries are words that programs on several processors read and write as a whole:
/// the upper half is the tag of [`CacheKey`], the lower one the index of the record, twice, and 1 more where it is the
/// backend's side. 0 for none.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheLine {
    /// The entries.
    pub entries: [u64; N_CACHED],
}

/// How many lines there are for so many flows: each flow has two entries, and half of them are of no open flow.
pub const fn n_cache_lines(n_flows: u32) -> u32 {
    let n_lines = n_flows.div_ceil(N_CACHED as u32 / 4);
    if n_lines == 0 { 1 } else { n_lines }
}

/// Where the entry of a packet's flow is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheKey {
    hash: u32,
    /// By which the entry is known within its line; not 0.
    tag: u32,
}

impl CacheKey {
    /// That of packets with these addresses and ports, as they lie in memory.
    ///
    /// It has no secret: who makes many flows meet in one line makes the packets of these flows, and others of that
    /// line, as slow as the hash.
    #[inline(always)]
    pub fn of<const N: usize>(ends: &[u32; N], protocol: u8) -> CacheKey {
        // Each word by a step of FxHash, the result by the last steps of SplitMix64 (Steele, Lea, Flood 2014).
        const STEP: u64 = 0x517c_c1b7_2722_0a95;
        let (mut hash, mut idx) = (u64::from(protocol), 0);
        while idx < N {
            hash = (hash.rotate_left(5) ^ u64::from(ends[idx])).wrapping_mul(STEP);
            idx += 1;
        }
        hash = (hash ^ hash >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        hash ^= hash >> 27;
        CacheKey { hash: (hash >> 32) as u32, tag: hash as u32 | 1 }
    }

    /// The line, of so many.
    #[inline(always)]
    pub fn line(self, n_lines: u32) -> u32 {
        ((u64::from(self.hash) * u64::from(n_lines)) >> 32) as u32
    }

    /// Whether an entry may be the packet's flow's.
    #[inline(always)]
    pub fn is_of(self, entry: u64) -> bool {
        (entry >> 32) as u32 == self.tag
    }

    /// The entry that leads to a flow.
    #[inline(always)]
    pub fn entry(self, flow: FlowRef) -> u64 {
        u64::from(self.tag) << 32 | u64::from(flow.record << 1 | flow.is_back)
    }
}

/// Where an entry leads to.
#[inline(always)]
pub fn cached_flow(entry: u64) -> FlowRef {
    let low = entry as u32;
    FlowRef { record: low >> 1, is_back: low & 1 }
}

const _: () = assert!(size_of::<CacheLine>() == 64);

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::vec::Vec;

    use super::*;
    use crate::IPPROTO_TCP;

    #[test]
    fn entries_lead_where_they_were_made_to() {
        for (record, is_back) in [(0, 0), (0, 1), (131_071, 1), ((1 << 31) - 1, 0)] {
            let (key, flow) = (CacheKey::of(&[1, 2, 3], IPPROTO_TCP), FlowRef { record, is_back });
            let entry = key.entry(flow);
            assert!(entry != 0 && key.is_of(entry));
            assert_eq!(cached_flow(entry), flow);
        }
    }

    #[test]
    fn no_entry_is_nobodys() {
        assert!(!CacheKey::of(&[0; 3], 0).is_of(0));
    }

    /// Clients' addresses and ports differ in few bits: lines are as full as random ones are.
    #[test]
    fn flows_are_spread_over_the_lines() {
        let n_lines = n_cache_lines(65_536);
        let keys: Vec<CacheKey> = (0..65_536u32)
            .map(|nth| {
                let client = u32::from_ne_bytes([198, 51, 100, (nth % 4) as u8]);
                let ports = (nth / 4 + 32_768).swap_bytes() >> 16 | 80u32.swap_bytes();
                CacheKey::of(&[client, 0x0a71_00cb, ports], IPPROTO_TCP)
            })
            .collect();
        let (mut lines, mut entries) = (BTreeMap::new(), BTreeMap::new());
        for key in keys {
            *lines.entry(key.line(n_lines)).or_insert(0u32) += 1;
            *entries.entry((key.line(n_lines), key.tag)).or_insert(0u32) += 1;
        }
        assert!(lines.keys().all(|line| *line < n_lines));
        // Of a mean of 2 by chance 0.02% are above 8 (Poisson).
        let n_full = lines.values().filter(|n| **n > N_CACHED as u32).count();
        assert!(n_full < 40, "{n_full}");
        assert!(entries.len() > 65_530, "{}", entries.len());
    }
}

//! The index of names: most of `NAMES` once more, found by loads instead of the kernel's hash of 64 bytes.
//!
//! It is an array of buckets of [`INDEX_WAYS`] words, each bucket within one cache line. A word has a part of a
//! name's hash, and where its record may be. Whether it is there, the record says by the whole hash
//! ([`NameRecord::check`]), and `NAME_LABELS` by the name itself. So a word that is outdated, or another name's with
//! the same part of the hash, misleads no reader: what isn't found here is looked up in `NAMES`, as is a name whose
//! bucket is full.

use super::NameKey;
use crate::{INDEX_WAYS, IndexBucket, N_INDEX_BUCKETS};

const BUCKET_BITS: u32 = N_INDEX_BUCKETS.trailing_zeros();

/// Where a name is in the index, if it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NameIndexKey {
    /// The bucket, below [`N_INDEX_BUCKETS`].
    pub bucket: u32,
    /// The upper half of its word.
    tag: u32,
}

impl NameIndexKey {
    /// That of a name with this [`NameKey::hash`].
    #[inline(always)]
    pub const fn of(hash: u64) -> NameIndexKey {
        NameIndexKey { bucket: (hash >> (64 - BUCKET_BITS)) as u32, tag: (hash >> 1) as u32 }
    }

    /// Its word, for this record.
    pub const fn word(self, record: u32) -> u64 {
        (self.tag as u64) << 32 | record.wrapping_add(1) as u64
    }

    /// The record that the bucket has for it, or any number, mostly `u32::MAX`. Without branches, because the
    /// verifier would follow all that comes after each.
    #[inline(always)]
    pub fn candidate(self, bucket: IndexBucket) -> u32 {
        let mut found = 0;
        let mut way = 0;
        while way < INDEX_WAYS {
            let word = bucket.words[way];
            let difference = word >> 32 ^ u64::from(self.tag);
            let is_same = difference.wrapping_sub(1) >> 63;
            found |= word as u32 & 0u32.wrapping_sub(is_same as u32);
            way += 1;
        }
        found.wrapping_sub(1)
    }
}

impl NameKey {
    /// A hash of the name, which is never 0: a sum of products (multilinear hashing), so that they are
    /// calculated side by side. The factors are the first numbers of SplitMix64 (Steele, Lea, Flood 2014),
    /// made odd.
    #[inline(always)]
    pub fn hash(&self) -> u64 {
        let [a, b, c, d, e, f, g, h] = self.words();
        let sum = (a.wrapping_mul(0xe220_a839_7b1d_cdaf))
            .wrapping_add(b.wrapping_mul(0x6e78_9e6a_a1b9_65f5))
            .wrapping_add(c.wrapping_mul(0x06c4_5d18_8009_454f))
            .wrapping_add(d.wrapping_mul(0xf88b_b8a8_724c_81ed))
            .wrapping_add(e.wrapping_mul(0x1b39_896a_51a8_749b))
            .wrapping_add(f.wrapping_mul(0x53cb_9f0c_747e_a2eb))
            .wrapping_add(g.wrapping_mul(0x2c82_9abe_1f45_32e1))
            .wrapping_add(h.wrapping_mul(0xc584_133a_c916_ab3d));
        (sum ^ sum >> 32).wrapping_mul(0x3ee5_7890_41c9_8ac3) | 1
    }

    /// Whether it is the name in these words.
    #[inline(always)]
    pub fn is(&self, other: [u64; 8]) -> bool {
        let words = self.words();
        let (mut difference, mut idx) = (0, 0);
        while idx < words.len() {
            difference |= words[idx] ^ other[idx];
            idx += 1;
        }
        difference == 0
    }

    #[inline(always)]
    fn words(&self) -> [u64; 8] {
        zerocopy::transmute!(*self)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::format;

    use super::*;

    /// A bucket leads to each of its records, and nowhere for others.
    #[test]
    fn a_bucket_leads_to_its_records() {
        let key = NameIndexKey { bucket: 1, tag: 7 };
        let other = |tag| NameIndexKey { bucket: 1, tag };
        let words = [other(0).word(5), key.word(0), 0, other(8).word(16_384)];
        let bucket = IndexBucket { words };
        assert_eq!(key.candidate(bucket), 0);
        assert_eq!(other(8).candidate(bucket), 16_384);
        assert_eq!(other(0).candidate(bucket), 5);
        assert_eq!(other(9).candidate(bucket), u32::MAX);
        assert_eq!(other(0).candidate(IndexBucket::default()), u32::MAX);
    }

    #[test]
    fn names_differ_from_all_others() {
        let key = |label: &[u8]| NameKey::of(label).unwrap();
        assert!(key(b"Web").is(key(b"web").words()) && key(b"Web").hash() == key(b"web").hash());
        let long = [b'a'; 63];
        for at in 0..63 {
            let mut other = long;
            other[at] = b'b';
            assert!(!key(&long).is(key(&other).words()) && key(&long).hash() != key(&other).hash());
        }
        assert!(!key(b"web").is(key(b"web1").words()));
    }

    /// How many names don't fit, and that no hash occurs twice: names as people give them.
    #[test]
    fn nearly_all_names_of_full_maps_fit() {
        let forms: [fn(u32) -> std::string::String; 4] = [
            |n| format!("svc-{n:05}"),
            |n| format!("a-service-with-a-longer-name-{n}"),
            |n| format!("{n:016}"),
            |n| format!("{:016x}", u64::from(n) << 24),
        ];
        for form in forms {
            let (mut buckets, mut hashes) = (HashMap::new(), HashMap::new());
            for n in 0..16_384 {
                let name = form(n);
                let hash = NameKey::of(name.as_bytes()).unwrap().hash();
                *buckets.entry(NameIndexKey::of(hash).bucket).or_insert(0usize) += 1;
                assert_eq!(hashes.insert(hash, name.clone()), None, "{name}");
            }
            let n_without: usize = buckets.values().map(|n| n.saturating_sub(INDEX_WAYS)).sum();
            assert!(n_without < 16_384 / 100, "{n_without} like {}", form(1));
        }
    }
}

//! The index of IPv4 frontends: most of `FRONTENDS` once more, found by one load instead of a hash.
//!
//! It is an array of buckets of [`INDEX_WAYS`] words, each bucket within one cache line. A frontend's bits
//! select its bucket, and those that the bucket doesn't imply are in the word, together with the service. So
//! the comparison is exact, and as an entry is one word, a reader finds all of it or nothing, whatever is
//! stored there meanwhile. What is in the index is in `FRONTENDS` with the same service. A frontend whose
//! bucket is full is in `FRONTENDS` alone.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::{Frontend, ServiceRef};

/// The number of buckets.
pub const N_INDEX_BUCKETS: u32 = 1 << BUCKET_BITS;
/// The number of frontends that a bucket has room for.
pub const INDEX_WAYS: usize = 4;

const BUCKET_BITS: u32 = 14;
const BUCKET_MASK: u32 = N_INDEX_BUCKETS - 1;
/// The width of a service's index plus one, which is in a word's low bits.
const SERVICE_BITS: u32 = 29;
const SERVICE_LIMIT: u64 = 1 << SERVICE_BITS;

// The address without the bits that the bucket implies, the port, and a bit for the protocol.
const _: () = assert!(32 - BUCKET_BITS + 16 + 1 + SERVICE_BITS == 64);

/// The value of `FRONTEND_INDEX`: half a cache line.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct IndexBucket {
    /// A frontend and its service each, or 0.
    pub words: [u64; INDEX_WAYS],
}

/// Where a frontend is in the index, if it is there, and what its word has of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexKey {
    /// The bucket, below [`N_INDEX_BUCKETS`].
    pub bucket: u32,
    /// What the bucket doesn't imply of the frontend, above [`SERVICE_BITS`] zeros.
    tag: u64,
}

impl IndexKey {
    /// That of a frontend of TCP or UDP, whose numbers differ in the lowest bit.
    #[inline(always)]
    pub fn of(frontend: &Frontend) -> IndexKey {
        let address = u32::from_be_bytes(frontend.address);
        let rest = u64::from(address >> BUCKET_BITS) << 17
            | u64::from(frontend.port) << 1
            | u64::from(frontend.protocol & 1);
        // Fibonacci hashing (Knuth, volume 3, 6.4). It depends on nothing but what is in the word, so two
        // frontends with the same word differ in the bucket.
        let mixed = rest.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - BUCKET_BITS);
        IndexKey { bucket: (address ^ mixed as u32) & BUCKET_MASK, tag: rest << SERVICE_BITS }
    }

    /// The service, if a word is this frontend's.
    #[inline(always)]
    pub fn service_of(self, word: u64) -> Option<u32> {
        let service = (word ^ self.tag).wrapping_sub(1);
        (service < SERVICE_LIMIT - 1).then_some(service as u32)
    }

    /// The word of this frontend. None for one that applies in the host's network namespace only, and for
    /// a service whose number is too large.
    pub fn word(self, target: ServiceRef) -> Option<u64> {
        let service = u64::from(target.service) + 1;
        let has_room = target.host_only == 0 && service < SERVICE_LIMIT;
        has_room.then_some(self.tag | service)
    }
}

/// The index into `SERVICES` that a VIP's service gets where that is free, as it mostly is. By it a program can
/// load from the entry while it looks for the service. Nothing else depends on it.
#[inline(always)]
pub const fn expected_service(vip: [u8; 4]) -> u32 {
    u32::from_be_bytes(vip) & BUCKET_MASK
}

/// The index, as the daemon changes it.
pub trait Index {
    /// A word of a bucket.
    fn load(&self, bucket: u32, way: usize) -> u64;
    /// Replaces it by one store.
    fn store(&mut self, bucket: u32, way: usize, word: u64);

    /// Inserts a frontend that is in `FRONTENDS` by now and isn't in the index, if there is room.
    fn insert(&mut self, frontend: &Frontend, target: ServiceRef) {
        let key = IndexKey::of(frontend);
        let free = (0..INDEX_WAYS).find(|&way| self.load(key.bucket, way) == 0);
        if let (Some(way), Some(word)) = (free, key.word(target)) {
            self.store(key.bucket, way, word);
        }
    }

    /// Removes a frontend, before it leaves `FRONTENDS` or leads to another service there.
    fn remove(&mut self, frontend: &Frontend) {
        let key = IndexKey::of(frontend);
        for way in 0..INDEX_WAYS {
            if key.service_of(self.load(key.bucket, way)).is_some() {
                self.store(key.bucket, way, 0);
            }
        }
    }
}

#[cfg(test)]
mod tests;

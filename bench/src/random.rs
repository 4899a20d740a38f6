//! Random numbers that a seed repeats: the order of contenders, and what statistics draw.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::OnceLock;

/// SplitMix64 (Steele, Lea, Flood 2014).
#[derive(Clone, Debug, Default)]
pub struct Random(u64);

impl Random {
    /// The sequence of a seed.
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`; 0 where `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        // The upper word of the product: a bias below n / 2^64.
        ((u128::from(self.next_u64()) * n as u128) >> 64) as usize
    }

    /// Puts a slice into a random order (Fisher and Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

static RUN_SEED: OnceLock<u64> = OnceLock::new();

/// The seed of this run, which every suite's order begins with; one that nobody chose, unless
/// [`choose_run_seed`] came before.
pub fn run_seed() -> u64 {
    *RUN_SEED.get_or_init(any_seed)
}

/// Chooses the seed of this run, once, before any suite.
pub fn choose_run_seed(seed: u64) {
    RUN_SEED.get_or_init(|| seed);
}

/// A seed that nobody chose, of few digits so that it can be typed again.
pub fn any_seed() -> u64 {
    // The standard library's hashers are seeded by the kernel.
    RandomState::new().build_hasher().finish() % 1_000_000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_repeats_its_sequence() {
        let first = |seed| Random::new(seed).next_u64();
        // The first number of the reference implementation for seed 0.
        assert_eq!(first(0), 0xe220_a839_7b1d_cdaf);
        assert_ne!(first(1), first(2));
    }

    #[test]
    fn every_order_comes_as_often() {
        let mut random = Random::new(7);
        let mut counts = std::collections::BTreeMap::new();
        for _ in 0..6_000 {
            let mut order = [1, 2, 3];
            random.shuffle(&mut order);
            *counts.entry(order).or_insert(0) += 1;
        }
        assert_eq!(counts.len(), 6, "{counts:?}");
        // Five standard deviations of a binomial count, 29 each.
        assert!(counts.values().all(|count| (855..=1145).contains(count)), "{counts:?}");
    }
}

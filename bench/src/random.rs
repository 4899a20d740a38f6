//! The seeds of random orders: with its seed, a run can be repeated in the same order.

use std::sync::OnceLock;

static RUN_SEED: OnceLock<u64> = OnceLock::new();

/// The seed of this run, which every suite's order begins with: a random one, unless [`choose_run_seed`]
/// was called before.
pub fn run_seed() -> u64 {
    *RUN_SEED.get_or_init(any_seed)
}

/// Chooses the seed of this run, once, before any suite.
pub fn choose_run_seed(seed: u64) {
    RUN_SEED.get_or_init(|| seed);
}

/// A random seed, of few digits so that it can be typed again.
pub fn any_seed() -> u64 {
    fastrand::u64(..1_000_000)
}

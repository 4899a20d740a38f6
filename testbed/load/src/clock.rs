//! The one clock of every subcommand.

use std::num::NonZeroU64;

use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds in a second.
pub const SECOND_NS: u64 = 1_000_000_000;

/// Nanoseconds in a millisecond.
pub const MILLISECOND_NS: u64 = 1_000_000;

/// CLOCK_MONOTONIC, in nanoseconds.
pub fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * SECOND_NS + now.tv_nsec as u64
}

/// Nanoseconds as seconds.
pub fn seconds(ns: u64) -> f64 {
    ns as f64 / SECOND_NS as f64
}

/// Takes away the 50 us by which the kernel may wake a thread too late to save power.
pub fn wake_precisely() {
    // Without it everything works, less precisely.
    let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1));
}

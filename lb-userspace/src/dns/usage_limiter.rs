//! Limits the reports of used services to one per service and minute.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// The number of entries; a bound on memory, not on services.
const N_PLACES: usize = 16_384;

/// The period between two reports of a service, in seconds.
const LASTS: u64 = 60;

/// The bits of an entry that hold the time.
const TIME_BITS: u32 = 24;

/// Each entry holds a fingerprint of a service's name and the minute of its last report. Services
/// that share an entry are reported more often, which does no harm.
#[derive(Debug)]
pub(super) struct UsageLimiter {
    places: Box<[AtomicU64]>,
    hasher: RandomState,
    start: Instant,
}

impl Default for UsageLimiter {
    fn default() -> UsageLimiter {
        let places = (0..N_PLACES).map(|_| AtomicU64::new(0)).collect();
        UsageLimiter { places, hasher: RandomState::new(), start: Instant::now() }
    }
}

impl UsageLimiter {
    /// Whether the service is to be reported now, which this records.
    pub(super) fn is_due(&self, name: &str) -> bool {
        self.is_due_after(name, self.start.elapsed().as_secs())
    }

    fn is_due_after(&self, name: &str, seconds: u64) -> bool {
        let hash = self.hasher.hash_one(name);
        let minute = (seconds / LASTS + 1) & ((1 << TIME_BITS) - 1); // 31 years; 0 is never
        let mark = hash >> TIME_BITS << TIME_BITS | minute;
        let place = &self.places[hash as usize % N_PLACES];
        // Read first: a place that is only read is shared between cores at no cost.
        place.load(Ordering::Relaxed) != mark && place.swap(mark, Ordering::Relaxed) != mark
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn once_a_minute() {
        let limiter = UsageLimiter::default();
        let rows = [("a", 0, true), ("a", 59, false), ("a", 60, true), ("a", 61, false)];
        for (name, seconds, expected) in rows {
            assert_eq!(limiter.is_due_after(name, seconds), expected, "{name} after {seconds} s");
        }
        let names: Vec<String> = (0..1000).map(|idx| format!("n{idx}")).collect();
        let n_due = names.iter().filter(|name| limiter.is_due_after(name, 200)).count();
        assert_eq!(n_due, 1000);
    }
}

//! How fast a watch may ask: after failures, and at all.

use std::time::{Duration, Instant};

const FIRST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(10);

/// The pause after a failure: exponential with full jitter, since a whole fleet fails at once.
///
/// From "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
#[derive(Clone, Copy, Debug, Default)]
pub struct Backoff {
    n_failures: u32,
}

impl Backoff {
    /// The next pause, given a random number in 0..1: at most 100 ms at first, at most 10 s ever.
    pub fn pause(&mut self, random: f64) -> Duration {
        let ceiling = FIRST.saturating_mul(1 << self.n_failures.min(16)).min(LONGEST);
        self.n_failures = self.n_failures.saturating_add(1);
        ceiling.mul_f64(random)
    }

    /// Starts over, after a success.
    pub fn reset(&mut self) {
        self.n_failures = 0;
    }
}

const BURST: u32 = 2;
const INTERVAL: Duration = Duration::from_millis(250);

/// A token bucket: two questions at once, then one every 250 ms.
///
/// Kept as the time at which the bucket is full again (the generic cell rate algorithm of
/// ATM Forum's Traffic Management 4.0).
#[derive(Clone, Copy, Debug)]
pub struct TokenBucket {
    full_at: Instant,
}

impl TokenBucket {
    /// A full bucket.
    pub fn new(now: Instant) -> Self {
        TokenBucket { full_at: now }
    }

    /// Takes a token, and says how long to wait until it may be spent.
    pub fn take(&mut self, now: Instant) -> Duration {
        let full_at = self.full_at.max(now);
        self.full_at = full_at + INTERVAL;
        (full_at - now).saturating_sub(INTERVAL * (BURST - 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_ten_seconds() {
        let mut backoff = Backoff::default();
        let pauses: Vec<u64> =
            (0..9).map(|_| backoff.pause(1.0).as_millis().try_into().unwrap()).collect();
        assert_eq!(pauses, [100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]);
        for _ in 0..100 {
            assert_eq!(backoff.pause(1.0), LONGEST);
        }
        assert_eq!(backoff.pause(0.0), Duration::ZERO);
        backoff.reset();
        assert_eq!(backoff.pause(0.5), Duration::from_millis(50));
    }

    #[test]
    fn two_at_once_then_one_every_quarter_second() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(start);
        // (asked at, may go on after), in milliseconds
        let table = [(0, 0), (0, 0), (0, 250), (250, 250), (900, 0), (900, 100), (5000, 0)];
        for (n, (asked_at, pause)) in table.into_iter().enumerate() {
            let got = bucket.take(start + Duration::from_millis(asked_at));
            assert_eq!(got, Duration::from_millis(pause), "step {n}");
        }
    }
}

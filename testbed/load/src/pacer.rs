//! When each request is due.

use crate::clock::SECOND_NS;

/// Requests due at a fixed rate from a common start. A due request that isn't taken waits, and keeps the
/// moment at which it was due: that is what corrects for coordinated omission.
#[derive(Clone, Debug)]
pub struct Schedule {
    start_ns: u64,
    rate: f64,
    n_total: u64,
    n_taken: u64,
}

impl Schedule {
    /// `rate` a second, for `seconds` from the start.
    pub fn new(start_ns: u64, rate: f64, seconds: f64) -> Schedule {
        Schedule { start_ns, rate, n_total: (rate * seconds).round() as u64, n_taken: 0 }
    }

    /// When the next one is due; `None` after the last.
    pub fn next_due_ns(&self) -> Option<u64> {
        let since_start_ns = self.n_taken as f64 * SECOND_NS as f64 / self.rate;
        (self.n_taken < self.n_total).then(|| self.start_ns + since_start_ns as u64)
    }

    /// Takes the next one if it is due, and returns when it was.
    pub fn take(&mut self, now_ns: u64) -> Option<u64> {
        let due_ns = self.next_due_ns().filter(|due_ns| *due_ns <= now_ns)?;
        self.n_taken += 1;
        Some(due_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take_all(schedule: &mut Schedule, now_ns: u64) -> Vec<u64> {
        std::iter::from_fn(|| schedule.take(now_ns)).collect()
    }

    #[test]
    fn nothing_is_taken_before_it_is_due() {
        let mut schedule = Schedule::new(100, 2.0, 1.5);
        assert_eq!(schedule.next_due_ns(), Some(100));
        assert_eq!(schedule.take(99), None);
        assert_eq!(schedule.take(100), Some(100));
        assert_eq!(schedule.take(SECOND_NS / 2 + 99), None);
        assert_eq!(take_all(&mut schedule, 9 * SECOND_NS), [SECOND_NS / 2 + 100, SECOND_NS + 100]);
        assert_eq!(schedule.next_due_ns(), None);
    }

    #[test]
    fn what_became_due_while_all_stood_still_keeps_its_moment() {
        let mut schedule = Schedule::new(0, 10.0, 1.0);
        assert_eq!(schedule.take(0), Some(0));
        // The only connection is busy with the first one until 0.55 s.
        let waited_ms: Vec<u64> = take_all(&mut schedule, 550_000_000)
            .iter()
            .map(|due_ns| (550_000_000 - due_ns) / 1_000_000)
            .collect();
        assert_eq!(waited_ms, [450, 350, 250, 150, 50]);
    }

    #[test]
    fn a_rate_that_divides_no_second_does_not_drift() {
        let mut schedule = Schedule::new(0, 3.0, 3600.0);
        let dues = take_all(&mut schedule, 3600 * SECOND_NS);
        assert_eq!(dues.len(), 10_800);
        assert_eq!(dues[10_797], 3599 * SECOND_NS);
    }
}

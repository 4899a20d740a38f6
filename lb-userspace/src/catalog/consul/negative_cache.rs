//! Names that aren't in the list: which are looked up, and which were, a moment ago, in vain.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a name that was looked up in vain isn't looked up again.
const REMEMBERED: Duration = Duration::from_secs(2);

/// The names that are remembered at most.
const MAX_NAMES: usize = 1024;

/// The lookups that may come at once, and the time in which one more is earned: 5 a second at most
/// from each node, however many names are made up.
const BURST: u32 = 10;
const INTERVAL: Duration = Duration::from_millis(200);

/// What is known of absent names, and how many more may be looked up.
#[derive(Debug)]
pub struct NegativeCache {
    seen: HashMap<Arc<str>, Instant>,
    /// When the bucket of lookups is full again.
    full_at: Instant,
}

/// What becomes of a name that isn't in the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LookupDecision {
    /// It is looked up.
    LookUp,
    /// It was, in vain.
    Absent,
    /// Too many are looked up already.
    TooMany,
}

impl NegativeCache {
    /// Nothing known, and a full bucket.
    pub fn new(now: Instant) -> Self {
        NegativeCache { seen: HashMap::new(), full_at: now }
    }

    /// Decides on a name.
    pub fn decide(&mut self, name: &str, now: Instant) -> LookupDecision {
        if self.seen.get(name).is_some_and(|at| now.saturating_duration_since(*at) < REMEMBERED) {
            return LookupDecision::Absent;
        }
        let full_at = self.full_at.max(now) + INTERVAL;
        if full_at - now > INTERVAL * BURST {
            return LookupDecision::TooMany;
        }
        self.full_at = full_at;
        LookupDecision::LookUp
    }

    /// Notes that there is no service of this name.
    pub fn note(&mut self, name: Arc<str>, now: Instant) {
        if self.seen.len() >= MAX_NAMES {
            self.seen.retain(|_, at| now.saturating_duration_since(*at) < REMEMBERED);
        }
        if self.seen.len() < MAX_NAMES {
            self.seen.insert(name, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_made_up_names_asks_little() {
        let start = Instant::now();
        let mut absent = NegativeCache::new(start);
        let mut n_looked_up = 0;
        for n in 0..10_000 {
            let now = start + Duration::from_millis(n);
            let name = format!("made-up-{n}");
            match absent.decide(&name, now) {
                LookupDecision::LookUp => n_looked_up += 1,
                LookupDecision::TooMany => {}
                LookupDecision::Absent => panic!("{name} was never asked for"),
            }
            absent.note(name.into(), now);
        }
        assert_eq!(n_looked_up, 10 + 10 * 5 - 1);
        assert_eq!(absent.seen.len(), MAX_NAMES);
    }

    #[test]
    fn an_absent_name_is_remembered_for_a_moment() {
        let start = Instant::now();
        let mut absent = NegativeCache::new(start);
        absent.note("gone".into(), start);
        for (after, expected) in
            [(0, LookupDecision::Absent), (1, LookupDecision::Absent), (2, LookupDecision::LookUp)]
        {
            let now = start + Duration::from_secs(after);
            assert_eq!(absent.decide("gone", now), expected, "after {after} s");
        }
    }
}

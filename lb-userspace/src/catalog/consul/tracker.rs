//! One watch: where it stands in Consul's history, and when it may ask again.

use std::time::{Duration, Instant};

use super::backoff::{Backoff, Bucket};
use super::index::{Ask, Cursor, Verdict};

/// The state of one watch, between its questions and while one is under way.
#[derive(Clone, Copy, Debug)]
pub struct Tracker {
    cursor: Cursor,
    bucket: Bucket,
    backoff: Backoff,
    due: Instant,
    is_asking: bool,
    answered_at: Option<Instant>,
}

impl Tracker {
    /// One that may ask at once.
    pub fn new(now: Instant) -> Self {
        Tracker {
            cursor: Cursor::default(),
            bucket: Bucket::new(now),
            backoff: Backoff::default(),
            due: now,
            is_asking: false,
            answered_at: None,
        }
    }

    /// How the next question is to be asked, or the one under way was.
    pub fn ask(&self) -> Ask {
        self.cursor.ask()
    }

    /// When the next question may be asked; `None` while one is under way.
    pub fn due(&self) -> Option<Instant> {
        (!self.is_asking).then_some(self.due)
    }

    /// When Consul last answered.
    pub fn answered_at(&self) -> Option<Instant> {
        self.answered_at
    }

    /// Notes that the question is asked.
    pub fn begin(&mut self, now: Instant) {
        self.is_asking = true;
        self.due = now;
    }

    /// Notes that the question was dropped before its answer.
    pub fn dropped(&mut self, now: Instant) {
        self.is_asking = false;
        self.due = now + self.bucket.take(now);
    }

    /// Takes note of a good answer. `random` is in 0..1.
    pub fn answered(&mut self, index: Option<u64>, now: Instant, random: f64) -> Verdict {
        self.dropped(now);
        self.answered_at = Some(now);
        let verdict = self.cursor.answered(index);
        match verdict {
            Verdict::Apply | Verdict::Unchanged => self.backoff.reset(),
            Verdict::Confirm => self.due = self.due.max(now + self.backoff.pause(random)),
        }
        verdict
    }

    /// Doesn't believe the answer that just came: it is asked for again `after` a while, of a leader
    /// that has made sure of being one.
    pub fn doubt(&mut self, now: Instant, after: Duration) {
        self.cursor.doubt();
        self.due = now + after;
    }

    /// Takes note of a failure. `random` is in 0..1.
    pub fn failed(&mut self, now: Instant, random: f64) {
        self.dropped(now);
        self.cursor.failed();
        self.due = self.due.max(now + self.backoff.pause(random));
    }

    /// Has the next question asked at once, whatever it was to wait for.
    pub fn hurry(&mut self, now: Instant) {
        self.due = self.due.min(now);
    }

    /// Lets the next question wait until then, at least.
    pub fn hold_until(&mut self, instant: Instant) {
        self.due = self.due.max(instant);
    }
}

//! One watch: where it stands in Consul's history, and when it may ask again.

use std::time::{Duration, Instant};

use super::backoff::{Backoff, TokenBucket};
use super::index::{Cursor, IndexCheck, IndexMove, ReadMode};

/// Between two questions that Consul doesn't hold back for news: its answers have no index, as behind
/// a proxy that drops the header, or come at once though nothing is new. Up to a fifth more.
const POLL: Duration = Duration::from_secs(5);

/// The state of one watch, between its questions and while one is under way.
#[derive(Clone, Copy, Debug)]
pub struct Poller {
    cursor: Cursor,
    bucket: TokenBucket,
    backoff: Backoff,
    due: Instant,
    /// When the question under way was asked, and for how long it may be held.
    asking: Option<(Instant, Duration)>,
    answered_at: Option<Instant>,
    /// Whether the answer under way was asked for with what doesn't count any more.
    is_outdated: bool,
    /// Whether the last answer isn't trusted, so that the next one is to come soon.
    is_withheld: bool,
}

impl Poller {
    /// One that may ask at once.
    pub fn new(now: Instant) -> Self {
        Poller {
            cursor: Cursor::default(),
            bucket: TokenBucket::new(now),
            backoff: Backoff::default(),
            due: now,
            asking: None,
            answered_at: None,
            is_outdated: false,
            is_withheld: false,
        }
    }

    /// How the next question is to be asked, or the one under way was.
    pub fn ask(&self) -> ReadMode {
        self.cursor.ask()
    }

    /// When the next question may be asked; `None` while one is under way.
    pub fn due(&self) -> Option<Instant> {
        self.asking.is_none().then_some(self.due)
    }

    /// When Consul last answered.
    pub fn answered_at(&self) -> Option<Instant> {
        self.answered_at
    }

    /// Notes that the question is asked, which Consul may hold for `wait`.
    pub fn begin(&mut self, now: Instant, wait: Duration) {
        self.asking = Some((now, wait));
        self.due = now;
    }

    /// Notes that the question was dropped before its answer.
    pub fn dropped(&mut self, now: Instant) {
        self.asking = None;
        self.is_outdated = false;
        self.due = now + self.bucket.take(now);
    }

    /// Takes note of a good answer. `random` is in 0..1.
    pub fn answered(&mut self, index: Option<u64>, now: Instant, random: f64) -> IndexCheck {
        let (is_outdated, asking, asked) = (self.is_outdated, self.asking, self.ask());
        self.dropped(now);
        self.answered_at = Some(now);
        let verdict = self.cursor.answered(index);
        match verdict {
            IndexCheck::Apply => {
                self.backoff.reset();
                let is_early =
                    asking.is_some_and(|(at, wait)| now.saturating_duration_since(at) < wait / 2);
                let blocks = self.ask() != ReadMode::Plain && !(is_early && self.ask() == asked);
                if !blocks {
                    self.due = self.due.max(now + POLL.mul_f64(1.0 + random / 5.0));
                }
            }
            IndexCheck::Confirm => self.due = self.due.max(now + self.backoff.pause(random)),
        }
        if is_outdated {
            self.cursor.restart();
            self.due = self.due.min(now + self.bucket.take(now));
        }
        verdict
    }

    /// Notes that the answer that just came is applied.
    pub fn applied(&mut self) {
        self.cursor.applied();
        self.is_withheld = false;
    }

    /// Notes that the answer that just came isn't applied, though it was confirmed.
    pub fn withhold(&mut self) {
        self.is_withheld = true;
    }

    /// Whether the last answer isn't trusted.
    pub fn is_withheld(&self) -> bool {
        self.is_withheld
    }

    /// How the index of the answer that just came stands to that of the one applied last.
    pub fn moved(&self) -> IndexMove {
        self.cursor.moved()
    }

    /// Has the next question asked at once, and answered at once, since Consul may answer another
    /// token otherwise. What is under way counts, but only until then.
    pub fn restart(&mut self, now: Instant) {
        self.is_outdated = self.asking.is_some();
        self.cursor.restart();
        self.hurry(now);
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
        self.cursor.restart();
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

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    /// When the next question is due after an answer with this index, in milliseconds, if the one
    /// before it had index 7 and this one took so long.
    fn due_after(index: Option<u64>, took: Duration) -> u128 {
        let start = Instant::now();
        let mut poller = Poller::new(start);
        poller.begin(start, Duration::ZERO);
        poller.answered(Some(7), start, 0.0);
        poller.applied();
        let asked = start + 10 * S;
        poller.begin(asked, 40 * S);
        let now = asked + took;
        assert_eq!(poller.answered(index, now, 0.0), IndexCheck::Apply);
        (poller.due().unwrap() - now).as_millis()
    }

    #[test]
    fn what_consul_does_not_hold_back_is_asked_for_every_five_seconds() {
        for (index, took, due) in [
            (Some(7), 40 * S, 0),
            (Some(8), S, 0),
            (Some(7), 20 * S, 0),
            (Some(7), 19 * S, 5000),
            (Some(7), S / 1000, 5000),
            (None, S / 1000, 5000),
            (None, 40 * S, 5000),
        ] {
            assert_eq!(due_after(index, took), due, "{index:?} after {took:?}");
        }
    }

    #[test]
    fn with_another_token_what_is_under_way_is_asked_again() {
        let start = Instant::now();
        let mut poller = Poller::new(start);
        // One that waits, one that is under way and is answered, one that is dropped.
        poller.answered(Some(7), start, 0.0);
        poller.hold_until(start + 60 * S);
        poller.restart(start);
        assert_eq!((poller.ask(), poller.due()), (ReadMode::Plain, Some(start)));
        for is_dropped in [false, true] {
            poller.begin(start + S, 40 * S);
            poller.restart(start + S);
            match is_dropped {
                true => poller.dropped(start + S),
                false => drop(poller.answered(Some(7), start + S, 0.0)),
            }
            assert_eq!(poller.ask(), ReadMode::Plain);
            assert!(poller.due().unwrap() <= start + 2 * S);
        }
    }
}

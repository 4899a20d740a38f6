//! One watch: its indexes, and how often it may send requests.

use std::time::{Duration, Instant};

use super::index::{IndexCheck, IndexMove, IndexTracker, ReadMode};

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// The pause after a failure: exponential with full jitter, since a whole fleet fails at once.
///
/// From "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
#[derive(Clone, Copy, Debug, Default)]
pub struct Backoff {
    n_failures: u32,
}

impl Backoff {
    /// The next pause, with a random number in 0..1: at most 100 ms at first, at most 10 s ever.
    pub fn pause(&mut self, random: f64) -> Duration {
        let ceiling = FIRST_PAUSE.saturating_mul(1 << self.n_failures.min(16)).min(LONGEST_PAUSE);
        self.n_failures = self.n_failures.saturating_add(1);
        ceiling.mul_f64(random)
    }

    /// Starts over, after a success.
    pub fn reset(&mut self) {
        self.n_failures = 0;
    }
}

const REQUEST_BURST: u32 = 2;
const REQUEST_INTERVAL: Duration = Duration::from_millis(250);

/// A token bucket: two requests at once, then one every 250 ms.
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

    /// Takes a token. Returns how long to wait until it may be spent.
    pub fn take(&mut self, now: Instant) -> Duration {
        let full_at = self.full_at.max(now);
        self.full_at = full_at + REQUEST_INTERVAL;
        (full_at - now).saturating_sub(REQUEST_INTERVAL * (REQUEST_BURST - 1))
    }
}

/// The pause between two reads that Consul doesn't hold: its answers have no index, as behind a proxy
/// that drops the header, or come at once without news. Up to a fifth more.
const POLL_INTERVAL: Duration = Duration::from_secs(5);

/// The state of one watch, while a request is under way and in between.
#[derive(Clone, Copy, Debug)]
pub struct Poller {
    tracker: IndexTracker,
    bucket: TokenBucket,
    backoff: Backoff,
    due: Instant,
    /// When the request under way was sent, and how long Consul may hold it.
    sent: Option<(Instant, Duration)>,
    answered_at: Option<Instant>,
    /// Whether the request under way was sent with an outdated token.
    is_outdated: bool,
    /// Whether the last answer was withheld, so that the next one has to come soon.
    is_withheld: bool,
}

impl Poller {
    /// A watch that may send its first request at once.
    pub fn new(now: Instant) -> Self {
        Poller {
            tracker: IndexTracker::default(),
            bucket: TokenBucket::new(now),
            backoff: Backoff::default(),
            due: now,
            sent: None,
            answered_at: None,
            is_outdated: false,
            is_withheld: false,
        }
    }

    /// As [`Poller::new`], after an earlier watch that applied an answer with this index; 0 for none.
    pub fn resumed(applied: u64, now: Instant) -> Self {
        let mut poller = Poller::new(now);
        poller.tracker.resume(applied);
        poller
    }

    /// The index of the last answer that was applied; 0 for none.
    pub fn applied_index(&self) -> u64 {
        self.tracker.applied_index()
    }

    /// The mode of the request under way, or else of the next one.
    pub fn mode(&self) -> ReadMode {
        self.tracker.mode()
    }

    /// When the next request may be sent; `None` while one is under way.
    pub fn due(&self) -> Option<Instant> {
        self.sent.is_none().then_some(self.due)
    }

    /// When Consul last answered.
    pub fn answered_at(&self) -> Option<Instant> {
        self.answered_at
    }

    /// Records that a request is sent, which Consul may hold for `wait`.
    pub fn begin(&mut self, now: Instant, wait: Duration) {
        self.sent = Some((now, wait));
        self.due = now;
    }

    /// Records that the request was aborted.
    pub fn aborted(&mut self, now: Instant) {
        self.sent = None;
        self.is_outdated = false;
        self.due = now + self.bucket.take(now);
    }

    /// Records an answer. `random` is in 0..1.
    pub fn answered(&mut self, index: Option<u64>, now: Instant, random: f64) -> IndexCheck {
        let (is_outdated, sent, mode) = (self.is_outdated, self.sent, self.mode());
        self.aborted(now);
        self.answered_at = Some(now);
        let check = self.tracker.answered(index);
        match check {
            IndexCheck::Apply => {
                self.backoff.reset();
                let is_early =
                    sent.is_some_and(|(at, wait)| now.saturating_duration_since(at) < wait / 2);
                let blocks = self.mode() != ReadMode::Plain && !(is_early && self.mode() == mode);
                if !blocks {
                    self.due = self.due.max(now + POLL_INTERVAL.mul_f64(1.0 + random / 5.0));
                }
            }
            IndexCheck::Confirm => self.due = self.due.max(now + self.backoff.pause(random)),
        }
        if is_outdated {
            self.tracker.restart();
            self.due = self.due.min(now + self.bucket.take(now));
        }
        check
    }

    /// Records that the last answer was applied.
    pub fn applied(&mut self) {
        self.tracker.applied();
        self.is_withheld = false;
    }

    /// Records that the last answer was confirmed, and is withheld all the same.
    pub fn withhold(&mut self) {
        self.is_withheld = true;
    }

    /// Whether the last answer was withheld.
    pub fn is_withheld(&self) -> bool {
        self.is_withheld
    }

    /// How the index of the last answer relates to that of the last one applied.
    pub fn moved(&self) -> IndexMove {
        self.tracker.moved()
    }

    /// Makes the next request due at once, and Consul answer it at once, since another token may read
    /// more, or less. The answer to the request under way is used until then.
    pub fn restart(&mut self, now: Instant) {
        self.is_outdated = self.sent.is_some();
        self.tracker.restart();
        self.hurry(now);
    }

    /// Has the last answer confirmed by a consistent read after a pause.
    pub fn confirm(&mut self, now: Instant, pause: Duration) {
        self.tracker.confirm();
        self.due = now + pause;
    }

    /// Records a failure. `random` is in 0..1.
    pub fn failed(&mut self, now: Instant, random: f64) {
        self.aborted(now);
        self.tracker.restart();
        self.due = self.due.max(now + self.backoff.pause(random));
    }

    /// Makes the next request due then, if it isn't before.
    pub fn hurry(&mut self, instant: Instant) {
        self.due = self.due.min(instant);
    }

    /// Delays the next request until then, at least.
    pub fn delay_until(&mut self, instant: Instant) {
        self.due = self.due.max(instant);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    /// When the next request is due after an answer with this index, in milliseconds, if the one
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
    fn reads_that_consul_does_not_hold_are_five_seconds_apart() {
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
    fn another_token_repeats_the_request_under_way() {
        let start = Instant::now();
        let mut poller = Poller::new(start);
        // One that waits, one that is under way and is answered, one that is aborted.
        poller.answered(Some(7), start, 0.0);
        poller.delay_until(start + 60 * S);
        poller.restart(start);
        assert_eq!((poller.mode(), poller.due()), (ReadMode::Plain, Some(start)));
        for is_aborted in [false, true] {
            poller.begin(start + S, 40 * S);
            poller.restart(start + S);
            match is_aborted {
                true => poller.aborted(start + S),
                false => drop(poller.answered(Some(7), start + S, 0.0)),
            }
            assert_eq!(poller.mode(), ReadMode::Plain);
            assert!(poller.due().unwrap() <= start + 2 * S);
        }
    }

    #[test]
    fn pauses_double_up_to_ten_seconds() {
        let mut backoff = Backoff::default();
        let pauses: Vec<u64> =
            (0..9).map(|_| backoff.pause(1.0).as_millis().try_into().unwrap()).collect();
        assert_eq!(pauses, [100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]);
        for _ in 0..100 {
            assert_eq!(backoff.pause(1.0), LONGEST_PAUSE);
        }
        assert_eq!(backoff.pause(0.0), Duration::ZERO);
        backoff.reset();
        assert_eq!(backoff.pause(0.5), Duration::from_millis(50));
    }

    #[test]
    fn two_at_once_then_one_every_quarter_second() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(start);
        // (taken at, may be spent after), in milliseconds
        let table = [(0, 0), (0, 0), (0, 250), (250, 250), (900, 0), (900, 100), (5000, 0)];
        for (n, (asked_at, pause)) in table.into_iter().enumerate() {
            let got = bucket.take(start + Duration::from_millis(asked_at));
            assert_eq!(got, Duration::from_millis(pause), "step {n}");
        }
    }
}

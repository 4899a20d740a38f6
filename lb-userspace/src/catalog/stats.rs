//! Statistics of a source, for `status` and for metrics.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// The counts since the daemon started, and the state of the watches now.
#[derive(Debug, Default)]
pub struct Stats {
    requests: Mutex<BTreeMap<String, u64>>,
    bytes: AtomicU64,
    shrinks_held: AtomicU64,
    watches: Mutex<Watches>,
}

/// The watches at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Watches {
    /// The services whose instances are followed.
    pub live: usize,
    /// The others.
    pub cold: usize,
    /// The open connections.
    pub connections: usize,
    /// The limit on connections.
    pub max_connections: usize,
    /// The time since the last answer for the live service that waits longest for its turn.
    pub oldest_age: Option<Duration>,
    /// The most requests that this node makes in an hour, calculated.
    pub budget_requests: u64,
    /// The most bytes that it reads in an hour, calculated from past responses.
    pub budget_bytes: u64,
}

impl Stats {
    /// Counts a response by its HTTP status, or by what came instead: `reset`, `timeout`, `unreachable`,
    /// `malformed`.
    pub fn count_request(&self, code: &str) {
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        match requests.get_mut(code) {
            Some(n) => *n += 1,
            None => drop(requests.insert(code.to_owned(), 1)),
        }
    }

    /// The answers so far, as [`Stats::count_request`] counts them.
    pub fn requests(&self) -> BTreeMap<String, u64> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Counts bytes of answers' bodies.
    pub fn count_bytes(&self, n: u64) {
        self.bytes.fetch_add(n, Ordering::Relaxed);
    }

    /// The bytes of answers' bodies so far.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Counts an answer that removes too many instances to be applied unconfirmed.
    pub fn count_shrink_held(&self) {
        self.shrinks_held.fetch_add(1, Ordering::Relaxed);
    }

    /// Such answers so far.
    pub fn shrinks_held(&self) -> u64 {
        self.shrinks_held.load(Ordering::Relaxed)
    }

    /// Sets the state of the watches.
    pub fn set_watches(&self, watches: Watches) {
        *self.watches.lock().unwrap_or_else(PoisonError::into_inner) = watches;
    }

    /// The state of the watches.
    pub fn watches(&self) -> Watches {
        self.watches.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

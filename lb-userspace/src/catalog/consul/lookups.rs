//! Lookups of names: those that wait for a result, and the limits on what Consul is asked. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::catalog::usage::{Lookup, LookupRequest};

/// The most lookups that wait; the result of one beyond that is unknown.
const MAX_WAITING: usize = 4096;

/// The most names that are queued for a request; the result of one beyond that is unknown.
const MAX_QUEUED: usize = 32;

/// How long an absent name isn't looked up again.
const ABSENT_TTL: Duration = Duration::from_secs(2);

/// The most absent names that are cached.
const MAX_ABSENT: usize = 1024;

/// The rate limit of lookups of names that aren't in the list: ten at once, then five a second,
/// however many names are made up.
const LOOKUP_BURST: u32 = 10;
const LOOKUP_INTERVAL: Duration = Duration::from_millis(200);

/// The lookups that wait for the result about one name.
pub type Replies = Vec<oneshot::Sender<Lookup>>;

/// The lookups under way, and the limits on them.
#[derive(Debug)]
pub struct Lookups {
    waiting: BTreeMap<Arc<str>, Replies>,
    /// The names that Consul is asked about, queued or under way.
    asked: BTreeSet<Arc<str>>,
    queue: VecDeque<Arc<str>>,
    absent: NegativeCache,
}

impl Lookups {
    /// No lookups yet.
    pub fn new(now: Instant) -> Self {
        let absent = NegativeCache::new(now);
        Lookups { waiting: BTreeMap::new(), asked: BTreeSet::new(), queue: VecDeque::new(), absent }
    }

    /// Clears the negative cache.
    pub fn restart(&mut self, now: Instant) {
        self.absent = NegativeCache::new(now);
    }

    /// Whether Consul is asked about this name.
    pub fn is_asked(&self, name: &str) -> bool {
        self.asked.contains(name)
    }

    /// Decides on a lookup of an unknown name.
    pub fn decide(&mut self, name: &str, now: Instant) -> LookupDecision {
        self.absent.decide(name, now)
    }

    /// Queues a request about a name, unless the queue is full: then the lookup is dropped.
    pub fn enqueue(&mut self, request: LookupRequest) {
        if self.queue.len() < MAX_QUEUED {
            self.queue.push_back(request.name.clone());
            self.asked.insert(request.name.clone());
            self.wait(request.name, request.reply);
        }
    }

    /// Whether a name is queued.
    pub fn is_queued(&self) -> bool {
        !self.queue.is_empty()
    }

    /// The next name to send a request about.
    pub fn dequeue(&mut self) -> Option<Arc<str>> {
        self.queue.pop_front()
    }

    /// Records Consul's answer about a name.
    pub fn answered(&mut self, name: &Arc<str>, is_absent: bool, now: Instant) {
        self.asked.remove(name);
        if is_absent {
            self.absent.insert(name.clone(), now);
        }
    }

    /// Adds a lookup that waits for the result about the name.
    pub fn wait(&mut self, name: Arc<str>, reply: Option<oneshot::Sender<Lookup>>) {
        let n_waiting: usize = self.waiting.values().map(Vec::len).sum();
        if let (Some(reply), true) = (reply, n_waiting < MAX_WAITING) {
            let waiting = self.waiting.entry(name).or_default();
            waiting.retain(|reply| !reply.is_closed());
            waiting.push(reply);
        }
    }

    /// Moves the lookups of one name to another one, under which the service is registered.
    pub fn rename(&mut self, name: &str, registered: &Arc<str>) {
        let waiting = self.take(name);
        self.waiting.entry(registered.clone()).or_default().extend(waiting);
    }

    /// Removes the lookups of a name.
    pub fn take(&mut self, name: &str) -> Replies {
        self.waiting.remove(name).unwrap_or_default()
    }

    /// Removes the lookups of all names that have a result.
    pub fn take_answered(
        &mut self,
        mut result: impl FnMut(&Arc<str>, bool) -> Option<Lookup>,
    ) -> Vec<(Replies, Lookup)> {
        let asked = &self.asked;
        let answered: Vec<_> = self
            .waiting
            .keys()
            .filter_map(|name| Some((name.clone(), result(name, asked.contains(name))?)))
            .collect();
        answered.into_iter().map(|(name, lookup)| (self.take(&name), lookup)).collect()
    }
}

/// The names that Consul lately answered to be absent, and the rate limit of lookups.
#[derive(Debug)]
pub struct NegativeCache {
    absent: HashMap<Arc<str>, Instant>,
    /// When the token bucket is full again.
    full_at: Instant,
}

/// What is done about a name that isn't in the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LookupDecision {
    /// It is looked up.
    LookUp,
    /// It is cached as absent.
    Absent,
    /// The rate limit is reached.
    TooMany,
}

impl NegativeCache {
    /// An empty cache, and a full bucket.
    pub fn new(now: Instant) -> Self {
        NegativeCache { absent: HashMap::new(), full_at: now }
    }

    /// Decides on a name.
    pub fn decide(&mut self, name: &str, now: Instant) -> LookupDecision {
        if self.absent.get(name).is_some_and(|at| now.saturating_duration_since(*at) < ABSENT_TTL) {
            return LookupDecision::Absent;
        }
        let full_at = self.full_at.max(now) + LOOKUP_INTERVAL;
        if full_at - now > LOOKUP_INTERVAL * LOOKUP_BURST {
            return LookupDecision::TooMany;
        }
        self.full_at = full_at;
        LookupDecision::LookUp
    }

    /// Records that no service has this name.
    pub fn insert(&mut self, name: Arc<str>, now: Instant) {
        if self.absent.len() >= MAX_ABSENT {
            self.absent.retain(|_, at| now.saturating_duration_since(*at) < ABSENT_TTL);
        }
        if self.absent.len() < MAX_ABSENT {
            self.absent.insert(name, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_made_up_names_sends_few_lookups() {
        let start = Instant::now();
        let mut cache = NegativeCache::new(start);
        let mut n_looked_up = 0;
        for n in 0..10_000 {
            let now = start + Duration::from_millis(n);
            let name = format!("made-up-{n}");
            match cache.decide(&name, now) {
                LookupDecision::LookUp => n_looked_up += 1,
                LookupDecision::TooMany => {}
                LookupDecision::Absent => panic!("{name} was never looked up"),
            }
            cache.insert(name.into(), now);
        }
        assert_eq!(n_looked_up, 10 + 10 * 5 - 1);
        assert_eq!(cache.absent.len(), MAX_ABSENT);
    }

    #[test]
    fn an_absent_name_is_cached_for_two_seconds() {
        let start = Instant::now();
        let mut cache = NegativeCache::new(start);
        cache.insert("gone".into(), start);
        for (after, expected) in
            [(0, LookupDecision::Absent), (1, LookupDecision::Absent), (2, LookupDecision::LookUp)]
        {
            let now = start + Duration::from_secs(after);
            assert_eq!(cache.decide("gone", now), expected, "after {after} s");
        }
    }
}

//! The lookups that wait for an answer. Pure: a reply is an effect of the machine.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::oneshot;

use super::negative_cache::{LookupDecision, NegativeCache};
use crate::catalog::usage::{Lookup, LookupRequest};

/// The most lookups that wait; one beyond that is unknown.
const MAX_WAITING: usize = 4096;

/// The lookups that wait for the answer about one name.
pub type Waiting = Vec<oneshot::Sender<Lookup>>;

/// The lookups under way, and the limits on them.
#[derive(Debug)]
pub struct Lookups {
    waiting: BTreeMap<Arc<str>, Waiting>,
    /// The names that Consul is asked about.
    asked: BTreeSet<Arc<str>>,
    absent: NegativeCache,
}

impl Lookups {
    /// None yet.
    pub fn new(now: Instant) -> Self {
        let absent = NegativeCache::new(now);
        Lookups { waiting: BTreeMap::new(), asked: BTreeSet::new(), absent }
    }

    /// Forgets what Consul answered so far.
    pub fn restart(&mut self, now: Instant) {
        self.absent = NegativeCache::new(now);
    }

    /// Whether Consul is asked about this name.
    pub fn is_asked(&self, name: &str) -> bool {
        self.asked.contains(name)
    }

    /// What becomes of a lookup of an unknown name.
    pub fn decide(&mut self, name: &str, now: Instant) -> LookupDecision {
        self.absent.decide(name, now)
    }

    /// Notes that Consul is asked about a name, for this request.
    pub fn ask(&mut self, request: LookupRequest) {
        self.asked.insert(request.name.clone());
        self.wait(request.name.clone(), request.reply);
    }

    /// Notes Consul's answer about a name.
    pub fn answered(&mut self, name: &Arc<str>, is_absent: bool, now: Instant) {
        self.asked.remove(name);
        if is_absent {
            self.absent.note(name.clone(), now);
        }
    }

    /// Lets a lookup wait for what becomes of the name.
    pub fn wait(&mut self, name: Arc<str>, reply: Option<oneshot::Sender<Lookup>>) {
        let n_waiting: usize = self.waiting.values().map(Vec::len).sum();
        if let (Some(reply), true) = (reply, n_waiting < MAX_WAITING) {
            let waiting = self.waiting.entry(name).or_default();
            waiting.retain(|reply| !reply.is_closed());
            waiting.push(reply);
        }
    }

    /// Lets the lookups of one name wait for another one, under which the service is registered.
    pub fn rename(&mut self, name: &str, registered: &Arc<str>) {
        let waiting = self.take(name);
        self.waiting.entry(registered.clone()).or_default().extend(waiting);
    }

    /// The lookups of a name, which wait no longer.
    pub fn take(&mut self, name: &str) -> Waiting {
        self.waiting.remove(name).unwrap_or_default()
    }

    /// The lookups of all names that have an answer.
    pub fn take_answered(
        &mut self,
        mut answer: impl FnMut(&Arc<str>, bool) -> Option<Lookup>,
    ) -> Vec<(Waiting, Lookup)> {
        let asked = &self.asked;
        let answered: Vec<_> = self
            .waiting
            .keys()
            .filter_map(|name| Some((name.clone(), answer(name, asked.contains(name))?)))
            .collect();
        answered.into_iter().map(|(name, lookup)| (self.take(&name), lookup)).collect()
    }
}

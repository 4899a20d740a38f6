//! Inspections of names that wait for Consul's answer, and their limits. Pure.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use tokio::sync::oneshot;

use crate::catalog::usage::InspectResult;

/// The most inspections that wait.
const MAX_WAITING: usize = 32;

/// The inspections under way and queued. One request answers all of the same name.
#[derive(Debug, Default)]
pub struct Inspections {
    waiting: BTreeMap<Arc<str>, Vec<oneshot::Sender<InspectResult>>>,
    queue: VecDeque<Arc<str>>,
}

impl Inspections {
    /// Adds one; returns its reply where there are too many.
    pub fn add(
        &mut self,
        name: Arc<str>,
        reply: oneshot::Sender<InspectResult>,
    ) -> Option<oneshot::Sender<InspectResult>> {
        if self.waiting.values().map(Vec::len).sum::<usize>() >= MAX_WAITING {
            return Some(reply);
        }
        let replies = self.waiting.entry(name.clone()).or_default();
        if replies.is_empty() {
            self.queue.push_back(name);
        }
        replies.push(reply);
        None
    }

    /// The next name to send a request about.
    pub fn dequeue(&mut self) -> Option<Arc<str>> {
        self.queue.pop_front()
    }

    /// Removes those that wait for this name.
    pub fn take(&mut self, name: &str) -> Vec<oneshot::Sender<InspectResult>> {
        self.waiting.remove(name).unwrap_or_default()
    }
}

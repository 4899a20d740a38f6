//! Tracks where responses came from, for `nohop dns query`.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Where an answer came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AnswerOrigin {
    /// From the kernel: this server hasn't seen the query.
    Kernel,
    /// From this server itself.
    Own,
    /// From this upstream.
    Upstream(SocketAddr),
    /// From nowhere: no upstream answered, for this reason.
    Nowhere(String),
}

/// Identifies a query: its id, name and type as on the wire.
type OriginKey = (u16, Box<[u8]>);

/// The queries whose origin is tracked.
#[derive(Clone, Debug, Default)]
pub(super) struct OriginTracker(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    /// Their number, so that all other queries cost one atomic read.
    n_watched: AtomicUsize,
    watched: Mutex<HashMap<OriginKey, AnswerOrigin>>,
}

/// A tracked query; dropping it ends the tracking.
#[derive(Debug)]
pub(super) struct TrackedQuery {
    origins: OriginTracker,
    key: OriginKey,
}

impl OriginTracker {
    /// Tracks the query with this id and question.
    pub(super) fn watch(&self, id: u16, question: &[u8]) -> TrackedQuery {
        let key = (id, question.to_ascii_lowercase().into());
        let mut watched = self.lock();
        watched.insert(OriginKey::clone(&key), AnswerOrigin::Kernel);
        self.0.n_watched.store(watched.len(), Ordering::Relaxed);
        drop(watched);
        TrackedQuery { origins: self.clone(), key }
    }

    /// Whether any query is tracked.
    pub(super) fn any(&self) -> bool {
        self.0.n_watched.load(Ordering::Relaxed) > 0
    }

    /// Notes where the response to a query came from, if it is tracked.
    pub(super) fn note(&self, id: u16, question: &[u8], origin: impl FnOnce() -> AnswerOrigin) {
        if !self.any() {
            return;
        }
        if let Some(known) = self.lock().get_mut(&(id, question.to_ascii_lowercase().into())) {
            *known = origin();
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<OriginKey, AnswerOrigin>> {
        self.0.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TrackedQuery {
    /// The origin, as far as it is known.
    pub(super) fn origin(&self) -> AnswerOrigin {
        self.origins.lock().get(&self.key).cloned().unwrap_or(AnswerOrigin::Kernel)
    }
}

impl Drop for TrackedQuery {
    fn drop(&mut self) {
        let mut watched = self.origins.lock();
        watched.remove(&self.key);
        self.origins.0.n_watched.store(watched.len(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_watched_question_has_its_origin_noted() {
        let origins = OriginTracker::default();
        let server = SocketAddr::from(([192, 0, 2, 1], 53));
        let note = |id: u16, question: &[u8]| {
            origins.note(id, question, || AnswerOrigin::Upstream(server));
        };
        note(7, b"\x03web\x00");
        let watched = origins.watch(7, b"\x03Web\x00");
        assert_eq!(watched.origin(), AnswerOrigin::Kernel);
        note(7, b"\x04web2\x00");
        note(8, b"\x03web\x00");
        assert_eq!(watched.origin(), AnswerOrigin::Kernel);
        note(7, b"\x03wEB\x00");
        assert_eq!(watched.origin(), AnswerOrigin::Upstream(server));
        drop(watched);
        assert!(origins.lock().is_empty() && !origins.any());
    }
}

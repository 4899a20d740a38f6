//! Where an answer came from, for the questions of `nohop dns query`.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Where an answer came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AnswerOrigin {
    /// From this server itself.
    Own,
    /// From another resolver, which is this one.
    Upstream(SocketAddr),
    /// It should have come from another resolver, and none gave one, for this reason.
    Nowhere(String),
}

/// What tells one question from another: its id, name and type, as they are in the message.
type OriginKey = (u16, Box<[u8]>);

/// The questions whose origin is watched.
#[derive(Clone, Debug, Default)]
pub(super) struct OriginTracker(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    /// The number of them, so that other questions cost one read.
    n_watched: AtomicUsize,
    watched: Mutex<HashMap<OriginKey, AnswerOrigin>>,
}

/// A question whose origin is watched, until this is dropped.
#[derive(Debug)]
pub(super) struct TrackedQuery {
    origins: OriginTracker,
    key: OriginKey,
}

impl OriginTracker {
    /// Watches the question with this id and these bytes on the wire.
    pub(super) fn watch(&self, id: u16, question: &[u8]) -> TrackedQuery {
        let key = (id, question.to_ascii_lowercase().into());
        let mut watched = self.lock();
        watched.insert(OriginKey::clone(&key), AnswerOrigin::Own);
        self.0.n_watched.store(watched.len(), Ordering::Relaxed);
        drop(watched);
        TrackedQuery { origins: self.clone(), key }
    }

    /// Whether any question is watched.
    pub(super) fn any(&self) -> bool {
        self.0.n_watched.load(Ordering::Relaxed) > 0
    }

    /// Notes where the answer to a question came from, where that is watched.
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
    /// What is known of it now.
    pub(super) fn origin(&self) -> AnswerOrigin {
        self.origins.lock().get(&self.key).cloned().unwrap_or(AnswerOrigin::Own)
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
        assert_eq!(watched.origin(), AnswerOrigin::Own);
        note(7, b"\x04web2\x00");
        note(8, b"\x03web\x00");
        assert_eq!(watched.origin(), AnswerOrigin::Own);
        note(7, b"\x03wEB\x00");
        assert_eq!(watched.origin(), AnswerOrigin::Upstream(server));
        drop(watched);
        assert!(origins.lock().is_empty() && !origins.any());
    }
}

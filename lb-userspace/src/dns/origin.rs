//! Where an answer came from, for the questions of `nohop dns query`.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Where an answer came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// From this server itself.
    Own,
    /// From another resolver, which is this one.
    Upstream(SocketAddr),
    /// It should have come from another resolver, and none gave one, for this reason.
    Nowhere(String),
}

/// What tells one question from another: its id, name and type, as they are in the message.
type Key = (u16, Box<[u8]>);

/// The questions whose origin is watched.
#[derive(Clone, Debug, Default)]
pub(super) struct Origins(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    /// The number of them, so that other questions cost one read.
    n_watched: AtomicUsize,
    watched: Mutex<HashMap<Key, Origin>>,
}

/// A question whose origin is watched, until this is dropped.
#[derive(Debug)]
pub(super) struct Watched {
    origins: Origins,
    key: Key,
}

impl Origins {
    /// Watches the question with this id and these bytes on the wire.
    pub(super) fn watch(&self, id: u16, question: &[u8]) -> Watched {
        let key = (id, question.to_ascii_lowercase().into());
        let mut watched = self.lock();
        watched.insert(Key::clone(&key), Origin::Own);
        self.0.n_watched.store(watched.len(), Ordering::Relaxed);
        drop(watched);
        Watched { origins: self.clone(), key }
    }

    /// Whether any question is watched.
    pub(super) fn any(&self) -> bool {
        self.0.n_watched.load(Ordering::Relaxed) > 0
    }

    /// Notes where the answer to a question came from, where that is watched.
    pub(super) fn note(&self, id: u16, question: &[u8], origin: impl FnOnce() -> Origin) {
        if !self.any() {
            return;
        }
        if let Some(known) = self.lock().get_mut(&(id, question.to_ascii_lowercase().into())) {
            *known = origin();
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Origin>> {
        self.0.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watched {
    /// What is known of it now.
    pub(super) fn origin(&self) -> Origin {
        self.origins.lock().get(&self.key).cloned().unwrap_or(Origin::Own)
    }
}

impl Drop for Watched {
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
        let origins = Origins::default();
        let server = SocketAddr::from(([192, 0, 2, 1], 53));
        let note = |id: u16, question: &[u8]| {
            origins.note(id, question, || Origin::Upstream(server));
        };
        note(7, b"\x03web\x00");
        let watched = origins.watch(7, b"\x03Web\x00");
        assert_eq!(watched.origin(), Origin::Own);
        note(7, b"\x04web2\x00");
        note(8, b"\x03web\x00");
        assert_eq!(watched.origin(), Origin::Own);
        note(7, b"\x03wEB\x00");
        assert_eq!(watched.origin(), Origin::Upstream(server));
        drop(watched);
        assert!(origins.lock().is_empty() && !origins.any());
    }
}

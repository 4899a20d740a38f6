//! The plane as the daemon's parts share it: one applies tables, others ask.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Indices, Plane, Pressure};
use crate::table::Table;

/// A plane, and the services that it doesn't have as the last table wants them.
#[derive(Debug)]
pub struct SharedPlane {
    plane: Mutex<Plane>,
    errors: Mutex<BTreeMap<Arc<str>, String>>,
}

impl SharedPlane {
    /// Shares `plane`.
    pub fn new(plane: Plane) -> SharedPlane {
        SharedPlane { plane: Mutex::new(plane), errors: Mutex::default() }
    }

    /// As [`Plane::apply`]; what couldn't be applied is logged once, and kept for those who ask.
    pub fn apply(&self, table: &Table) {
        let errors = lock(&self.plane).apply(table);
        let errors = errors.into_iter().map(|(name, error)| (name, error.to_string())).collect();
        let mut last = lock(&self.errors);
        if *last != errors {
            for (name, error) in &errors {
                tracing::error!("{name}: {error}; its former state serves");
            }
            *last = errors;
        }
    }

    /// The services that the kernel doesn't have as the table wants them, each with the reason.
    pub fn errors(&self) -> BTreeMap<Arc<str>, String> {
        lock(&self.errors).clone()
    }

    /// Why the kernel doesn't have this service as the table wants it; `None` if it does.
    pub fn error(&self, name: &str) -> Option<String> {
        lock(&self.errors).get(name).cloned()
    }

    /// As [`Plane::indices`].
    pub fn indices(&self, name: &str) -> Option<Indices> {
        lock(&self.plane).indices(name)
    }

    /// As [`Plane::pressure`].
    pub fn pressure(&self) -> [(&'static str, Pressure); 4] {
        lock(&self.plane).pressure()
    }

    /// As [`Plane::detach`].
    pub fn detach(&self) {
        lock(&self.plane).detach();
    }
}

/// A panic while it was locked leaves what is in it consistent: every step is.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

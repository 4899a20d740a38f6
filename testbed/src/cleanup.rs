//! Cleanup: when a guard is dropped, and when a signal ends the run.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Mutex, PoisonError, RwLock};
use std::thread;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

type Action = Box<dyn FnOnce() + Send>;

/// The pending cleanups, in the order of creation.
static PENDING: Mutex<BTreeMap<u64, Action>> = Mutex::new(BTreeMap::new());

/// Held for reading while an action runs, so that a signal waits for it; for writing from a signal
/// on, so that no thread ends the process before all is undone.
static RUNNING: RwLock<()> = RwLock::new(());

/// Runs an action once: when it is dropped, or when a signal ends the run.
///
/// Make it before the thing that it undoes, and let the action forgive that there is none: then no
/// signal falls between the two. An action must not drop another `Cleanup`.
pub struct Cleanup(u64);

impl Cleanup {
    /// Promises to run `action`.
    pub fn new(action: impl FnOnce() + Send + 'static) -> Cleanup {
        let mut pending = PENDING.lock().unwrap_or_else(PoisonError::into_inner);
        let id = pending.last_key_value().map_or(0, |(last, _)| last + 1);
        pending.insert(id, Box::new(action));
        Cleanup(id)
    }
}

impl Drop for Cleanup {
    fn drop(&mut self) {
        let _running = RUNNING.read().unwrap_or_else(PoisonError::into_inner);
        let action = PENDING.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.0);
        if let Some(action) = action {
            action();
        }
    }
}

/// From now on SIGINT, SIGTERM and SIGHUP cleanup everything, the last first, and end the process.
///
/// # Errors
/// When the handlers can't be installed.
pub fn on_signals() -> io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            let _running = RUNNING.write().unwrap_or_else(PoisonError::into_inner);
            let mut pending = PENDING.lock().unwrap_or_else(PoisonError::into_inner);
            while let Some((_, action)) = pending.pop_last() {
                action();
            }
            std::process::exit(128 + signal);
        }
    });
    Ok(())
}

//! What the next life begins with, as it is left and written.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tokio::task;

use super::Supervisor;
use crate::catalog::cache;

/// How often the times of answers and uses are written, where nothing else has changed.
const SAVE_TIMES: Duration = Duration::from_secs(60);

impl Supervisor {
    /// Whether there is more to leave than an earlier life left, and nothing is being written.
    pub(super) fn can_save(&self) -> bool {
        let is_saving = self.saving.as_ref().is_some_and(|saving| !saving.is_finished());
        self.model.has_names() && !is_saving
    }

    /// Leaves what the next life begins with, and has it written.
    pub(super) fn save(&mut self, now: Instant) {
        let leaving = std::mem::take(&mut self.leaving);
        if !leaving.is_empty() && self.model.has_names() {
            let former = self.saving.take();
            return self.write(now, former, leaving);
        }
        let since = now.saturating_duration_since(self.saved);
        let is_due = since >= SAVE_TIMES || self.is_unsaved && since >= self.timing().save;
        if is_due && self.can_save() {
            self.write(now, None, Vec::new());
        }
    }

    /// Has all of it written once a `former` write has ended, and tells those who wait for it.
    fn write(
        &mut self,
        now: Instant,
        former: Option<task::JoinHandle<()>>,
        waiting: Vec<oneshot::Sender<()>>,
    ) {
        (self.saved, self.is_unsaved) = (now, false);
        let mut memory = self.model.memory();
        memory.origin = self.settings.origin();
        memory.off = self.is_off;
        memory.names_at = self.names.answered_at();
        for (name, remembered) in &mut memory.services {
            remembered.used_at = self.schedule.used_at(name);
        }
        let memory = Arc::new(memory);
        self.output.remember(memory.clone());
        let Some(path) = self.settings.cache.clone() else { return };
        let write = move || {
            if let Err(error) = cache::write(&path, &memory) {
                tracing::error!("{error}; until it is fixed, a restart needs Consul");
            }
        };
        self.saving = Some(task::spawn(async move {
            if let Some(former) = former {
                let _ = former.await;
            }
            let _ = task::spawn_blocking(write).await;
            for waits in waiting {
                let _ = waits.send(());
            }
        }));
    }
}

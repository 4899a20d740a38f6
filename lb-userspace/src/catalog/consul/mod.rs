//! Consul as a source: one blocking query on the names, one on the switch `nohop/off`, and one on
//! each service that is live.
//!
//! All decisions are in [`machine`], which does no I/O; [`watcher`] has its clock and its tasks. An error
//! takes nothing out of the catalog.

mod address;
mod backoff;
mod client;
mod doubt;
#[cfg(any(fuzzing, test))]
pub mod fuzzing;
mod health;
mod hold_down;
mod index;
mod kill_switch;
mod lookups;
mod machine;
mod model;
mod names;
mod negative_cache;
mod poller;
mod query;
mod schedule;
mod settings;
#[cfg(test)]
mod test_server;
#[cfg(test)]
mod tests;
mod token;
mod watcher;

use super::cache;
use super::publisher::Publisher;
use super::snapshot::SavedCatalog;
use super::usage::UsageReceiver;
use watcher::Watcher;

pub use settings::Settings;
#[cfg(test)]
pub use settings::Timing;

/// What an earlier daemon left. A disk that doesn't answer is waited for no longer than Consul is: the
/// source's thread must not hang with it, which would end the daemon (see `supervise`).
async fn read_cache(settings: &Settings) -> Option<SavedCatalog> {
    let (path, max_age) = (settings.cache.clone()?, settings.catalog.max_age);
    let shown = path.display().to_string();
    let reading = tokio::task::spawn_blocking(move || cache::read(&path, max_age));
    match tokio::time::timeout(settings.timing.patience, reading).await {
        Ok(read) => read.ok().flatten(),
        Err(_) => {
            tracing::error!("can't read {shown}: the disk doesn't answer; starting without it");
            None
        }
    }
}

/// Follows Consul for ever.
pub async fn run(settings: Settings, output: Publisher, wishes: UsageReceiver) {
    let memory = match output.memory() {
        Some(memory) => Some((*memory).clone()),
        None => read_cache(&settings).await,
    };
    Watcher::new(settings, output, memory.unwrap_or_default()).run(wishes).await;
}

//! Consul as a source: a blocking query for the list of names, one for the kill switch `nohop/off`, and
//! one for each service that is live.
//!
//! All decisions are in [`machine`], which does no I/O, over the records in [`store`]; [`driver`] has the
//! clock and the tasks. An error removes nothing from the catalog.

mod address;
mod client;
mod driver;
#[cfg(any(fuzzing, test))]
pub mod fuzzing;
mod health;
mod hold_down;
mod index;
mod inspections;
mod kill_switch;
mod lookups;
mod machine;
mod node;
mod poller;
mod query;
mod service;
mod settings;
mod store;
mod suspicion;
#[cfg(test)]
mod test_server;
#[cfg(test)]
mod tests;
mod token;

use super::cache;
use super::publisher::Publisher;
use super::snapshot::SavedCatalog;
use super::usage::UsageReceiver;
use driver::Driver;

pub use settings::Settings;
#[cfg(test)]
pub use settings::Timing;

/// What an earlier daemon saved. A disk that doesn't answer is waited for no longer than Consul is: the
/// source's thread must not hang with it, which would end the daemon (see `supervisor`).
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

/// Follows Consul forever.
pub async fn run(settings: Settings, output: Publisher, commands: UsageReceiver) {
    let saved = match output.memory() {
        Some(saved) => Some((*saved).clone()),
        None => read_cache(&settings).await,
    };
    Driver::new(settings, output, saved.unwrap_or_default()).run(commands).await;
}

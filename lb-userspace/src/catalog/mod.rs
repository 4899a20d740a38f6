//! Discovery: turns what a source (Consul, or a file) reports into the table's input.
//!
//! An error is not emptiness: a failure, a timeout or a response that can't be parsed leaves the last
//! catalog in place and changes only [`Health`].

mod cache;
mod consul;
mod file;
#[cfg(any(fuzzing, test))]
pub(crate) mod fuzzing;
mod host;
mod published;
mod publisher;
pub mod resolve;
mod snapshot;
mod stats;
mod supervisor;
mod usage;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::config::{Config, SourceKind};
pub use crate::table::Catalog;
pub use published::{Health, Published};
pub use stats::{Stats, Watches};
pub use usage::{Lookup, UsageSender};
#[cfg(test)]
pub(crate) use usage::{LookupRequest, SourceCommand};

use publisher::Publisher;
use supervisor::{RestartPolicy, Source as Run, Staleness};

/// How long a source may take to save its state when it ends: a clean stop takes less than a second in
/// all.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(300);

/// A running source; dropping it ends the source's tasks.
///
/// The receivers, the usage sender and the statistics stay the same while the handle lives: the source
/// is restarted when it panics or hangs, and [`Handle::reconfigure`] replaces it by another. The last
/// catalog stays until the new source has a whole one; services in use stay in use.
#[derive(Debug)]
pub struct Handle {
    /// The last catalog; `None` before the first full sync. It changes only with the contents.
    pub catalog: watch::Receiver<Option<Published>>,
    /// The state of the source. It changes with every answer.
    pub health: watch::Receiver<Health>,
    /// Whether translation is switched off (Consul's key `nohop/off`).
    pub off: watch::Receiver<bool>,
    /// Reports uses of services.
    pub demand: UsageSender,
    /// The statistics of the source.
    pub stats: Arc<Stats>,
    /// Whether the source has hung so often that the daemon has to be restarted.
    pub gave_up: watch::Receiver<bool>,
    /// The task that keeps the source running.
    pub supervisor: SupervisorHandle,
    output: Publisher,
}

/// The task that keeps a source running; dropping it ends the source.
#[derive(Debug, Default)]
pub struct SupervisorHandle(JoinSet<()>);

impl SupervisorHandle {
    /// Waits until the source is no longer kept running, which only a defect or a source that was given
    /// up causes. The log has the reason.
    pub async fn join(&mut self) {
        self.0.join_next().await;
    }
}

/// Why a source can't start.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// The static catalog can't be used; all its errors are listed.
    #[error(transparent)]
    File(#[from] file::FileError),
}

/// Checks whether the configured source can be started.
///
/// # Errors
/// A static catalog that can't be read, or has errors. Consul need not be up yet.
pub fn check(config: &Config) -> Result<(), CatalogError> {
    match source(config) {
        SourceKind::Consul => Ok(()),
        SourceKind::File(path) => Ok(file::check(path)?),
    }
}

/// Checks whether the source can be started by a new daemon: for a static catalog that can't be used,
/// its last good copy in the state directory is enough.
///
/// # Errors
/// As [`check`], and there is no copy.
pub fn check_first(config: &Config) -> Result<(), CatalogError> {
    match source(config) {
        SourceKind::Consul => Ok(()),
        SourceKind::File(path) => Ok(file::check_first(path, &kept(config, path))?),
    }
}

fn kept(config: &Config, path: &Path) -> file::Kept {
    file::Kept::new(&config.state_dir, path)
}

/// Starts the configured source, on a thread of its own. The services `in_use`, in lower case, are live
/// from the start, so that no catalog lacks their instances.
///
/// # Errors
/// As [`check_first`].
pub fn spawn(config: &Config, in_use: Vec<Arc<str>>) -> Result<Handle, CatalogError> {
    let output = Publisher::new(source(config).name());
    if let SourceKind::File(path) = source(config) {
        file::load_first(path, &kept(config, path), &output)?;
    }
    let mut handle = Handle::of(output);
    handle.start(config, in_use, true);
    Ok(handle)
}

/// Starts the source as [`spawn`] does, but neither reads nor writes the state directory.
///
/// # Errors
/// As [`check`].
pub fn dry_run(config: &Config) -> Result<Handle, CatalogError> {
    let output = Publisher::new(source(config).name());
    if let SourceKind::File(path) = source(config) {
        file::load(path, &output)?;
    }
    let mut handle = Handle::of(output);
    handle.start(config, Vec::new(), false);
    Ok(handle)
}

impl Handle {
    /// Replaces the running source by the configured one, which has passed [`check`]. The services
    /// `in_use` are live from the start, as for [`spawn`].
    pub async fn reconfigure(&mut self, config: &Config, in_use: Vec<Arc<str>>) {
        self.flush().await;
        self.end().await;
        self.start(config, in_use, true);
    }

    /// Ends the running source, so that the next one finds its connections free and is the only one
    /// connected. A hung one is abandoned.
    async fn end(&mut self) {
        let former = self.demand.channel();
        self.supervisor.0.shutdown().await;
        if let Some(former) = former {
            let _ = tokio::time::timeout(SHUTDOWN_TIMEOUT, former.closed()).await;
        }
    }

    /// Ends the source after it has saved its state.
    pub async fn stop(self) {
        self.flush().await;
    }

    async fn flush(&self) {
        if tokio::time::timeout(SHUTDOWN_TIMEOUT, self.demand.flush()).await.is_err() {
            tracing::warn!(
                "discovery is too busy to write down what it knew: a moment of it is lost"
            );
        }
    }

    fn of(output: Publisher) -> Handle {
        let (catalog, health, off) = output.subscribe();
        let stats = output.stats().clone();
        let (demand, gave_up) = (UsageSender::new(stats.clone()), watch::channel(false).1);
        Handle {
            catalog,
            health,
            off,
            demand,
            stats,
            output,
            gave_up,
            supervisor: SupervisorHandle::default(),
        }
    }

    fn start(&mut self, config: &Config, in_use: Vec<Arc<str>>, is_cached: bool) {
        let name = source(config).name();
        match source(config) {
            SourceKind::Consul => {
                let settings = consul::Settings::of(config, in_use, is_cached);
                let source: Run = Arc::new(move |output, wishes| {
                    Box::pin(consul::run(settings.clone(), output, wishes))
                });
                self.run_source(name, source, Some((&config.catalog).into()));
            }
            SourceKind::File(path) => {
                let kept = is_cached.then(|| kept(config, path));
                let path = path.clone();
                let source: Run = Arc::new(move |output, wishes| {
                    wishes.decline();
                    Box::pin(file::run(path.clone(), kept.clone(), output))
                });
                self.run_source(name, source, None);
            }
        }
    }

    fn run_source(&mut self, name: &'static str, source: Run, staleness: Option<Staleness>) {
        let (gave_up, is_hopeless) = watch::channel(false);
        self.gave_up = is_hopeless;
        self.supervisor = SupervisorHandle::default();
        // From here on the former source isn't heard.
        let output = self.output.next_source(name, staleness.is_some());
        let demand = self.demand.clone();
        let limits = RestartPolicy::default();
        let supervising =
            supervisor::supervise(name, source, output, demand, staleness, limits, gave_up);
        self.supervisor.0.spawn(supervising);
    }
}

/// The source in use: the configuration has exactly one.
fn source(config: &Config) -> &SourceKind {
    config.catalog.sources.first().unwrap_or(&SourceKind::Consul)
}

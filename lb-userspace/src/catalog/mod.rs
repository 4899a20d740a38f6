//! Discovery: what a source (Consul, or a file) says, turned into the table's input.
//!
//! A source never publishes less than it knows: an error, a time-out or an answer that can't be
//! read leaves the last catalog in place and changes only what [`Health`] says of it.

mod cache;
mod consul;
mod file;
#[cfg(any(fuzzing, test))]
pub(crate) mod fuzzing;
mod host;
mod publisher;
pub mod resolve;
mod snapshot;
mod stats;
mod supervisor;
mod usage;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::config::{Config, SourceKind};
pub use crate::table::Catalog;
pub use stats::{Stats, Watches};
pub use usage::{Lookup, UsageSender};
#[cfg(test)]
pub(crate) use usage::{LookupRequest, SourceCommand};

use publisher::Publisher;
use supervisor::{RestartPolicy, Source as Run, Staleness};

/// How long a source may take to leave what the next one begins with: a clean stop takes less than a
/// second in all.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(300);

/// A catalog as it was published.
#[derive(Clone, Debug)]
pub struct Published {
    /// What the source knows.
    pub catalog: Catalog,
    /// When the news in it arrived here.
    pub news_at: Instant,
}

/// How a source fares, for `status` and for logs.
#[derive(Clone, Debug)]
pub struct Health {
    /// The source's name: `consul` or `file`.
    pub source: &'static str,
    /// What is wrong now, with the fix; `None` while all is well.
    pub problem: Option<String>,
    /// Whether the problem is that the source doesn't answer, so that the last catalog serves.
    pub is_failing: bool,
    /// What should be known and is no problem, a sentence each.
    pub facts: Vec<String>,
    /// When the source last answered, whether or not anything had changed. `None` before that.
    pub last_answer: Option<Instant>,
}

/// A running source; dropping it ends the source's tasks.
///
/// The receivers, the demand and the counts stay the same for as long as the handle lives, whatever
/// becomes of the source: it is started again when it panics or hangs, and
/// [`Handle::reconfigure`] puts another in its place. The last catalog stays until the new source
/// has a whole one of its own; what was in use stays in use.
#[derive(Debug)]
pub struct Handle {
    /// The last catalog; `None` before the first full sync. It wakes only for a change.
    pub catalog: watch::Receiver<Option<Published>>,
    /// How the source fares. It wakes at every answer.
    pub health: watch::Receiver<Health>,
    /// Whether the source says that nothing is to be translated (Consul's key `nohop/off`).
    pub off: watch::Receiver<bool>,
    /// Where to say that a service is used.
    pub demand: UsageSender,
    /// What the source counts.
    pub stats: Arc<Stats>,
    /// Whether the source has hung so often that only another process can help.
    pub gave_up: watch::Receiver<bool>,
    /// Who keeps the source running.
    pub supervisor: SupervisorHandle,
    output: Publisher,
}

/// The task that keeps a source running; dropping it ends the source.
#[derive(Debug, Default)]
pub struct SupervisorHandle(JoinSet<()>);

impl SupervisorHandle {
    /// Waits until the source is no longer kept running, which only a defect or a hopeless
    /// source brings about. What became of it is in the log.
    pub async fn join(&mut self) {
        self.0.join_next().await;
    }
}

/// Why a source can't start.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// The static catalog can't be used; every error in it is named.
    #[error(transparent)]
    File(#[from] file::FileError),
}

/// Sees whether the source that the configuration names can be started.
///
/// # Errors
/// A static catalog that can't be read, or that has errors in it. Consul may come later.
pub fn check(config: &Config) -> Result<(), CatalogError> {
    match source(config) {
        SourceKind::Consul => Ok(()),
        SourceKind::File(path) => Ok(file::check(path)?),
    }
}

/// Sees whether the source can be started by a daemon that starts: for a static catalog that can't be
/// used, its last good copy in the state directory is enough.
///
/// # Errors
/// As [`check`], where there is no copy either.
pub fn check_first(config: &Config) -> Result<(), CatalogError> {
    match source(config) {
        SourceKind::Consul => Ok(()),
        SourceKind::File(path) => Ok(file::check_first(path, &kept(config, path))?),
    }
}

fn kept(config: &Config, path: &Path) -> file::Kept {
    file::Kept::new(&config.state_dir, path)
}

/// Starts the source that the configuration names, on a thread of its own. The services `in_use`,
/// in lower case, are live from the start, so that no catalog is without their instances.
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

/// Starts the source as [`spawn`] does, but reads and leaves nothing in the state directory.
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
    /// Puts the source that the configuration names, which has passed [`check`], in the place of the
    /// one that runs. The services `in_use` are live from the start, as for [`spawn`].
    pub async fn reconfigure(&mut self, config: &Config, in_use: Vec<Arc<str>>) {
        self.flush().await;
        self.end().await;
        self.start(config, in_use, true);
    }

    /// Ends the source that runs, so that the next one finds its connections free and is the only
    /// one that listens. One that hangs is left behind.
    async fn end(&mut self) {
        let former = self.demand.channel();
        self.supervisor.0.shutdown().await;
        if let Some(former) = former {
            let _ = tokio::time::timeout(SHUTDOWN_TIMEOUT, former.closed()).await;
        }
    }

    /// Ends the source, which leaves first what the next daemon begins with.
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

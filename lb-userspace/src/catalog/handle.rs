//! One source of discovery, and what runs it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;

use super::published::{Health, Published};
use super::publisher::Publisher;
use super::stats::Stats;
use super::supervisor::{self, RestartPolicy, Source as Run, Staleness};
use super::usage::UsageSender;
use super::{consul, file};
use crate::config::{CatalogConfig, Config, ConsulConfig, SourceKind};

/// How long a source may take to save its state when it ends: a clean stop takes less than a second in
/// all.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(300);

/// A running source; dropping it ends the source's tasks.
///
/// The receivers, the usage sender and the statistics stay the same while the handle lives: the source
/// is restarted when it panics or hangs, and [`Handle::reconfigure`] restarts it with another
/// configuration. The last catalog stays until the new run has a whole one; services in use stay in use.
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
    /// The task that keeps the source running.
    pub supervisor: SupervisorHandle,
    output: Publisher,
    /// What the source runs with; `None` where it doesn't run.
    running: Option<RunConfig>,
}

/// The task that keeps a source running; dropping it ends the source.
#[derive(Debug, Default)]
pub struct SupervisorHandle(pub(super) JoinSet<()>);

impl SupervisorHandle {
    /// Waits until the source is no longer kept running. Cancel safe.
    pub async fn join(&mut self) -> SupervisorExit {
        match self.0.join_next().await {
            Some(Ok(())) => SupervisorExit::GaveUp,
            _ => SupervisorExit::Panicked,
        }
    }
}

/// Why a source is no longer kept running. The log has the reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SupervisorExit {
    /// It has hung so often that the daemon has to be restarted.
    GaveUp,
    /// Its supervisor has a defect.
    Panicked,
}

/// Why a source can't start.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// The static catalog can't be used; all its errors are listed.
    #[error(transparent)]
    File(#[from] file::FileError),
}

/// What a run of a source depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
enum RunConfig {
    Consul(Box<(CatalogConfig, ConsulConfig)>),
    File(PathBuf),
}

impl RunConfig {
    fn of(kind: &SourceKind, config: &Config) -> RunConfig {
        match kind {
            SourceKind::Consul => {
                // Other sources may come and go meanwhile.
                let catalog = CatalogConfig { sources: Vec::new(), ..config.catalog.clone() };
                RunConfig::Consul(Box::new((catalog, config.consul.clone())))
            }
            SourceKind::File(path) => RunConfig::File(path.clone()),
        }
    }
}

/// The last good copy of a static catalog.
pub(super) fn kept(config: &Config, path: &Path) -> file::Kept {
    file::Kept::new(&config.state_dir, path)
}

impl Handle {
    /// Starts a source for a new daemon, on a thread of its own. The services `in_use`, in lower case,
    /// are live from the start, so that no catalog lacks their instances. `demand` gets connected to a
    /// source that fetches services by demand.
    ///
    /// # Errors
    /// A static catalog that can't be used, and of which there is no good copy.
    pub fn spawn(
        kind: &SourceKind,
        config: &Config,
        demand: &UsageSender,
        in_use: Vec<Arc<str>>,
    ) -> Result<Handle, CatalogError> {
        let output = Publisher::new(kind.name());
        if let SourceKind::File(path) = kind {
            file::load_first(path, &kept(config, path), &output)?;
        }
        let mut handle = Handle::with_demand(kind, output, demand);
        handle.start(kind, config, in_use, true);
        Ok(handle)
    }

    /// Starts a source that a reload adds, as [`Handle::spawn`] does. Its catalog comes once it has one.
    pub fn add(
        kind: &SourceKind,
        config: &Config,
        demand: &UsageSender,
        in_use: Vec<Arc<str>>,
    ) -> Handle {
        let mut handle = Handle::with_demand(kind, Publisher::new(kind.name()), demand);
        handle.start(kind, config, in_use, true);
        handle
    }

    /// Starts a source as [`Handle::spawn`] does, but neither reads nor writes the state directory.
    ///
    /// # Errors
    /// A static catalog that can't be used.
    pub fn dry_run(kind: &SourceKind, config: &Config) -> Result<Handle, CatalogError> {
        let output = Publisher::new(kind.name());
        if let SourceKind::File(path) = kind {
            file::load(path, &output)?;
        }
        let mut handle = Handle::of(output);
        handle.start(kind, config, Vec::new(), false);
        Ok(handle)
    }

    /// Restarts the source, unless its part of the configuration is the same. The configuration has the
    /// source, and a static catalog can be used. The services `in_use` are live from the start, as for
    /// [`Handle::spawn`].
    pub async fn reconfigure(&mut self, config: &Config, in_use: Vec<Arc<str>>) {
        let name = self.name();
        let Some(kind) = config.catalog.sources.iter().find(|kind| kind.name() == name) else {
            return;
        };
        if self.running != Some(RunConfig::of(kind, config)) {
            self.end().await;
            self.start(kind, config, in_use, true);
        }
    }

    /// Ends the source after it has saved its state, so that the next run finds its connections free and
    /// is the only one connected. A hung one is abandoned. What it published stays.
    pub async fn end(&mut self) {
        self.flush().await;
        self.running = None;
        let former = self.demand.channel();
        self.supervisor.0.shutdown().await;
        if let Some(former) = former {
            let _ = tokio::time::timeout(SHUTDOWN_TIMEOUT, former.closed()).await;
        }
    }

    /// Has the source save its state.
    pub async fn flush(&self) {
        if tokio::time::timeout(SHUTDOWN_TIMEOUT, self.demand.flush()).await.is_err() {
            let name = self.name();
            tracing::warn!("the source {name} is too busy to save its state: the latest is lost");
        }
    }

    /// The name of the source.
    pub fn name(&self) -> &'static str {
        self.output.source()
    }

    /// The handle of a source that doesn't run yet.
    pub(super) fn of(output: Publisher) -> Handle {
        let (catalog, health, off) = output.subscribe();
        Handle {
            catalog,
            health,
            off,
            demand: UsageSender::default(),
            stats: output.stats().clone(),
            supervisor: SupervisorHandle::default(),
            output,
            running: None,
        }
    }

    fn with_demand(kind: &SourceKind, output: Publisher, demand: &UsageSender) -> Handle {
        let handle = Handle::of(output);
        match kind {
            SourceKind::Consul => Handle { demand: demand.clone(), ..handle },
            // It publishes all it has.
            SourceKind::File(_) => handle,
        }
    }

    fn start(
        &mut self,
        kind: &SourceKind,
        config: &Config,
        in_use: Vec<Arc<str>>,
        is_cached: bool,
    ) {
        match kind {
            SourceKind::Consul => {
                let settings = consul::Settings::of(config, in_use, is_cached);
                let run: Run = Arc::new(move |output, commands| {
                    Box::pin(consul::run(settings.clone(), output, commands))
                });
                self.run_source(run, Some((&config.catalog).into()));
            }
            SourceKind::File(path) => {
                let kept = is_cached.then(|| kept(config, path));
                let path = path.clone();
                let run: Run = Arc::new(move |output, commands| {
                    Box::pin(file::run(path.clone(), kept.clone(), output, commands))
                });
                self.run_source(run, None);
            }
        }
        self.running = Some(RunConfig::of(kind, config));
    }

    pub(super) fn run_source(&mut self, run: Run, staleness: Option<Staleness>) {
        self.supervisor = SupervisorHandle::default();
        // From here on the output of the former run is ignored.
        let output = self.output.next_configuration();
        let (demand, limits) = (self.demand.clone(), RestartPolicy::default());
        // A lookup is unknown, not absent, until the run listens.
        drop(demand.listen());
        self.supervisor.0.spawn(supervisor::supervise(run, output, demand, staleness, limits));
    }
}

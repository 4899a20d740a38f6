//! Discovery: what a source (Consul, or a file) says, turned into the table's input.
//!
//! A source never publishes less than it knows: an error, a time-out or an answer that can't be
//! read leaves the last catalog in place and changes only what [`Health`] says of it.

mod consul;
mod demand;
mod file;
#[cfg(any(fuzzing, test))]
pub(crate) mod fuzzing;
mod output;
pub mod resolve;
mod stats;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::config::{Config, Source};
use crate::table::Listing;
pub use demand::Demand;
pub use stats::{Stats, Watches};

use output::Output;

/// All that a source knows: the instances of each routed service, by the service's name.
///
/// A service whose instances are all unfit is there, with its instances; one that nobody tags any
/// more is not.
pub type Catalog = BTreeMap<Arc<str>, Listing>;

/// A catalog as it was published.
#[derive(Clone, Debug)]
pub struct Edition {
    /// What the source knows.
    pub catalog: Arc<Catalog>,
    /// When the news in it arrived here.
    pub heard_at: Instant,
}

/// How a source fares, for `status` and for logs.
#[derive(Clone, Debug)]
pub struct Health {
    /// The source's name: `consul` or `file`.
    pub source: &'static str,
    /// What is wrong now, with the mend; `None` while all is well.
    pub problem: Option<String>,
    /// Whether the problem is that the source doesn't answer, so that the last catalog serves.
    pub is_failing: bool,
    /// What should be known and is no problem, a sentence each.
    pub facts: Vec<String>,
    /// When the source last answered, whether or not anything had changed. `None` before that.
    pub last_answer: Option<Instant>,
}

/// A running source; dropping it ends the source's tasks.
#[derive(Debug)]
pub struct Handle {
    /// The last catalog; `None` before the first full sync. It wakes only for a change.
    pub catalog: watch::Receiver<Option<Edition>>,
    /// How the source fares. It wakes at every answer.
    pub health: watch::Receiver<Health>,
    /// Whether the source says that nothing is to be translated (Consul's key `nohop/off`).
    pub off: watch::Receiver<bool>,
    /// Where to say that a service is used.
    pub demand: Demand,
    /// What the source counts.
    pub stats: Arc<Stats>,
    _tasks: JoinSet<()>,
}

/// Why a source can't start.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// The static catalog can't be used; every error in it is named.
    #[error(transparent)]
    File(#[from] file::FileError),
}

/// Starts the source that the configuration names, on the current tokio runtime.
///
/// # Errors
/// A static catalog that can't be read, or that has errors in it. Consul may come later.
pub fn spawn(config: &Config) -> Result<Handle, CatalogError> {
    match &config.catalog.source {
        Source::Consul => {
            let (consul, rules) = (config.consul.clone(), config.catalog.clone());
            let output = Output::new("consul");
            Ok(Handle::keep(output, move |output| {
                consul::run(consul.clone(), rules.clone(), consul::Timing::default(), output)
            }))
        }
        Source::File(path) => {
            let (path, output) = (path.clone(), Output::new("file"));
            file::load(&path, &output)?;
            Ok(Handle::keep(output, move |output| file::run(path.clone(), output)))
        }
    }
}

/// How long a source that panicked stays down.
const RESTART: Duration = Duration::from_secs(1);

impl Handle {
    /// Keeps a source running: should it end, it is started again, and its last catalog stays.
    fn keep<F>(output: Output, source: impl Fn(Output) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (catalog, health, off) = output.subscribe();
        let stats = output.stats().clone();
        let demand = Demand::default();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            // A set, since it ends its tasks when it is dropped.
            let mut running = JoinSet::new();
            loop {
                running.spawn(source(output.clone()));
                if let Some(Err(panic)) = running.join_next().await {
                    tracing::error!("the source of the catalog panicked ({panic}); restarting it");
                }
                tokio::time::sleep(RESTART).await;
            }
        });
        Handle { catalog, health, off, demand, stats, _tasks: tasks }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_source_that_panics_is_started_again() {
        let n_starts = Arc::new(std::sync::atomic::AtomicU32::new(0));
        let mut handle = Handle::keep(Output::new("file"), move |output| {
            let n_starts = n_starts.clone();
            async move {
                if n_starts.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == 0 {
                    panic!("the first start fails");
                }
                output.publish(Catalog::new(), Instant::now());
            }
        });
        handle.catalog.wait_for(Option::is_some).await.unwrap();
    }
}

//! Where a source puts what it knows.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::watch::{Receiver, Sender};

use super::{Catalog, Health};

/// The sending side of what a `Handle` receives.
#[derive(Clone, Debug)]
pub struct Output {
    catalog: Arc<Sender<Option<Arc<Catalog>>>>,
    health: Arc<Sender<Health>>,
}

impl Output {
    /// The output of the source of this name, with nothing said yet.
    pub fn new(source: &'static str) -> Self {
        Output {
            catalog: Arc::new(Sender::new(None)),
            health: Arc::new(Sender::new(Health {
                source,
                problem: None,
                is_failing: false,
                last_answer: None,
            })),
        }
    }

    /// The receiving side.
    pub fn subscribe(&self) -> (Receiver<Option<Arc<Catalog>>>, Receiver<Health>) {
        (self.catalog.subscribe(), self.health.subscribe())
    }

    /// Publishes a catalog, unless it says what the last one says.
    pub fn publish(&self, catalog: Catalog) {
        self.catalog.send_if_modified(|last| {
            let is_news = last.as_deref() != Some(&catalog);
            if is_news {
                tracing::debug!(services = catalog.len(), "the catalog changed");
                *last = Some(Arc::new(catalog));
            }
            is_news
        });
    }

    /// The catalog published last.
    pub fn last(&self) -> Option<Arc<Catalog>> {
        self.catalog.borrow().clone()
    }

    /// Says that the source answered.
    pub fn answered(&self, now: Instant) {
        self.health.send_modify(|health| health.last_answer = Some(now));
    }

    /// Says what is wrong, or that nothing is, and whether the source doesn't answer; the log hears of the first problem and of its end.
    pub fn set_problem(&self, problem: Option<String>, is_failing: bool) {
        self.health.send_if_modified(|health| {
            if health.problem == problem && health.is_failing == is_failing {
                return false;
            }
            match (&health.problem, &problem) {
                (None, Some(problem)) => {
                    tracing::warn!(source = health.source, "{problem}");
                }
                (Some(_), None) => tracing::info!(source = health.source, "all is well again"),
                _ => {}
            }
            health.problem = problem;
            health.is_failing = is_failing;
            true
        });
    }
}

//! Where a source puts what it knows.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::watch::{Receiver, Sender};

use super::{Catalog, Edition, Health, Stats};

/// The sending side of what a `Handle` receives.
#[derive(Clone, Debug)]
pub struct Output {
    catalog: Arc<Sender<Option<Edition>>>,
    health: Arc<Sender<Health>>,
    off: Arc<Sender<bool>>,
    stats: Arc<Stats>,
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
                facts: Vec::new(),
                last_answer: None,
            })),
            off: Arc::new(Sender::new(false)),
            stats: Arc::default(),
        }
    }

    /// The receiving side.
    pub fn subscribe(&self) -> (Receiver<Option<Edition>>, Receiver<Health>, Receiver<bool>) {
        (self.catalog.subscribe(), self.health.subscribe(), self.off.subscribe())
    }

    /// What the source counts.
    pub fn stats(&self) -> &Arc<Stats> {
        &self.stats
    }

    /// Publishes a catalog whose news came at `heard_at`, unless it says what the last one says.
    pub fn publish(&self, catalog: Catalog, heard_at: Instant) {
        self.catalog.send_if_modified(|last| {
            let is_news = last.as_ref().is_none_or(|last| *last.catalog != catalog);
            if is_news {
                tracing::debug!(services = catalog.len(), "the catalog changed");
                *last = Some(Edition { catalog: Arc::new(catalog), heard_at });
            }
            is_news
        });
    }

    /// The catalog published last.
    pub fn last(&self) -> Option<Arc<Catalog>> {
        self.catalog.borrow().as_ref().map(|edition| edition.catalog.clone())
    }

    /// Says that the source answered.
    pub fn answered(&self, now: Instant) {
        self.health.send_modify(|health| health.last_answer = Some(now));
    }

    /// Says whether nothing is to be translated.
    pub fn set_off(&self, off: bool) {
        self.off.send_if_modified(|was| std::mem::replace(was, off) != off);
    }

    /// Says what should be known and is no problem; the log hears of what is new.
    pub fn set_facts(&self, facts: Vec<String>) {
        self.health.send_if_modified(|health| {
            for fact in facts.iter().filter(|fact| !health.facts.contains(fact)) {
                tracing::info!(source = health.source, "{fact}");
            }
            std::mem::replace(&mut health.facts, facts.clone()) != facts
        });
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

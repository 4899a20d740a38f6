//! What a source publishes: a catalog, and the source's state.

use std::time::{Duration, Instant};

use crate::table::Catalog;

/// A published catalog.
#[derive(Clone, Debug)]
pub struct Published {
    /// What the source reported.
    pub catalog: Catalog,
    /// When the news in it arrived.
    pub news_at: Instant,
}

/// The state of a source, for `status` and for logs.
#[derive(Clone, Debug)]
pub struct Health {
    /// The source's name: `consul` or `file`.
    pub source: &'static str,
    /// What is wrong now, with the fix; `None` while all is well.
    pub problem: Option<String>,
    /// Whether the source doesn't answer, so that the last catalog serves.
    pub is_failing: bool,
    /// Information that is no problem, a sentence each.
    pub facts: Vec<String>,
    /// When the source last answered, with news or without; `None` before that.
    pub last_answer: Option<Instant>,
    /// Whether it answered this daemon; an earlier one's answer is one, too, for its age.
    pub has_answered: bool,
}

impl Health {
    /// The age of what the source has reported; `None` before that. A file that can be read is as new as
    /// it gets.
    pub fn age(&self) -> Option<Duration> {
        let is_file = self.source == "file" && !self.is_failing;
        self.last_answer.map(|at| if is_file { Duration::ZERO } else { at.elapsed() })
    }
}

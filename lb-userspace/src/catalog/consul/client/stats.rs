//! Statistics of responses: how many of each kind, and whether ACLs filtered them.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use reqwest::StatusCode;

use super::error::QueryError;
use crate::catalog::publisher::Publisher;

/// The most filtered paths that are remembered; past that only their number is wrong.
const MAX_FILTERED: usize = 1000;

/// How long a path stays filtered that isn't requested any more, as that of a service that has
/// gone: several times the longest wait of a request.
const FILTERED_LASTS: Duration = Duration::from_secs(5 * 60);

/// Counts answers, and reports as a fact that Consul leaves something out of them. A narrow token
/// filters always, and legitimately: so it is a fact and no problem.
#[derive(Debug)]
pub struct ResponseStats {
    output: Publisher,
    /// The paths whose last answer was filtered, and when it came.
    filtered: Mutex<BTreeMap<String, Instant>>,
}

impl ResponseStats {
    /// Statistics for `output`.
    pub fn new(output: Publisher) -> Self {
        ResponseStats { output, filtered: Mutex::default() }
    }

    /// Counts the outcome of a request.
    pub fn count<T>(&self, answer: &Result<(StatusCode, T), QueryError>) {
        let code = match answer {
            Ok((code, _)) => Some(code.as_str()),
            Err(error) => error.code(),
        };
        if let Some(code) = code {
            self.output.stats().count_request(code);
        }
    }

    /// Counts the bytes of a body.
    pub fn count_bytes(&self, n: usize) {
        self.output.stats().count_bytes(n as u64);
    }

    /// Notes whether a path's answer was filtered.
    pub fn note(&self, path: &str, is_filtered: bool, now: Instant) {
        let mut filtered = self.filtered.lock().unwrap_or_else(PoisonError::into_inner);
        let before = filtered.len();
        filtered.retain(|_, at| now.saturating_duration_since(*at) < FILTERED_LASTS);
        let mut is_news = filtered.len() != before;
        if !is_filtered {
            is_news |= filtered.remove(path).is_some();
        } else if let Some(at) = filtered.get_mut(path) {
            *at = now;
        } else if filtered.len() < MAX_FILTERED {
            filtered.insert(path.to_owned(), now);
            is_news = true;
        }
        if is_news {
            self.output.set_notice("filtered", fact(&filtered));
        }
    }
}

fn fact(filtered: &BTreeMap<String, Instant>) -> Option<String> {
    let (path, _) = filtered.first_key_value()?;
    let others = match filtered.len() {
        1 => String::new(),
        n => format!(" and {} more", n - 1),
    };
    Some(format!(
        "Consul leaves out what the token may not read, from {path}{others}: where something is \
         missing, the token needs service:read and node:read for it"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filtered_path_expires_without_requests() {
        let output = Publisher::new("consul");
        let (_, health, _) = output.subscribe();
        let facts = || health.borrow().facts.join(" ");
        let (stats, start) = (ResponseStats::new(output), Instant::now());
        stats.note("/gone", true, start);
        stats.note("/here", true, start);
        assert!(facts().contains("from /gone and 1 more"), "{}", facts());
        stats.note("/here", true, start + FILTERED_LASTS / 2);
        stats.note("/other", false, start + FILTERED_LASTS);
        assert!(facts().contains("from /here: "), "{}", facts());
        stats.note("/other", false, start + FILTERED_LASTS * 2);
        assert_eq!(facts(), "");
    }
}

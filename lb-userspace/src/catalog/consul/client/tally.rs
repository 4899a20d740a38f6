//! What is heard beside the answers' bodies: how many of each kind, and whether they are whole.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use hyper::StatusCode;

use super::error::QueryError;
use crate::catalog::output::Output;

/// The most filtered paths that are remembered; past that only their number is wrong.
const MAX_FILTERED: usize = 1000;

/// Counts answers, and reports as a fact that Consul leaves something out of them. A narrow token
/// filters always, and legitimately: so it is a fact and no problem.
#[derive(Debug)]
pub struct Tally {
    output: Output,
    /// The paths whose last answer was filtered.
    filtered: Mutex<BTreeSet<String>>,
}

impl Tally {
    /// A tally that tells `output`.
    pub fn new(output: Output) -> Self {
        Tally { output, filtered: Mutex::default() }
    }

    /// Counts what came of a question.
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
    pub fn note(&self, path: &str, is_filtered: bool) {
        let mut filtered = self.filtered.lock().unwrap_or_else(PoisonError::into_inner);
        let is_news = match is_filtered {
            true => filtered.len() < MAX_FILTERED && filtered.insert(path.to_owned()),
            false => filtered.remove(path),
        };
        if is_news {
            self.output.set_fact("filtered", fact(&filtered));
        }
    }
}

fn fact(filtered: &BTreeSet<String>) -> Option<String> {
    let path = filtered.first()?;
    let others = match filtered.len() {
        1 => String::new(),
        n => format!(" and {} more", n - 1),
    };
    Some(format!(
        "Consul leaves out what the token may not read, from {path}{others}: where something is \
         missing, the token needs service:read and node:read for it"
    ))
}

//! What a client of `GET /v1/trace` wants, and why it may get nothing.

use super::query::{decode, encode};

/// The outcomes of a traced connection, by which a client may filter.
pub const OUTCOMES: [&str; 10] = [
    "established",
    "refused",
    "failed",
    "aborted",
    "sent",
    "unknown",
    "intercepted",
    "passed",
    "begun",
    "ended",
];

/// Which connections a client gets.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TraceFilter {
    /// Of this service alone.
    pub service: Option<String>,
    /// Not of these services.
    pub not: Vec<String>,
    /// With this outcome alone, one of [`OUTCOMES`].
    pub outcome: Option<String>,
    /// One of so many, at least 1.
    pub sample: u32,
}

impl Default for TraceFilter {
    fn default() -> TraceFilter {
        TraceFilter { service: None, not: Vec::new(), outcome: None, sample: 1 }
    }
}

impl TraceFilter {
    /// The greatest hash of the sockets that are wanted, see [`crate::datapath::is_sampled`].
    pub fn max_hash(&self) -> u32 {
        u32::MAX / self.sample.max(1)
    }

    /// The path of the request.
    pub fn path(&self) -> String {
        let mut path = format!("/v1/trace?sample={}", self.sample);
        let service = self.service.iter().map(|name| ("service", name));
        let not = self.not.iter().map(|name| ("not", name));
        let outcome = self.outcome.iter().map(|outcome| ("outcome", outcome));
        for (name, value) in service.chain(not).chain(outcome) {
            path += &format!("&{name}={}", encode(value));
        }
        path
    }

    /// Reads the query of a request; else the parameter that is wrong, its value and the fix.
    pub(super) fn parse(query: &str) -> Result<TraceFilter, (String, String, &'static str)> {
        let mut filter = TraceFilter::default();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let text = decode(value);
            let wrong = |fix| (name.to_owned(), text.clone(), fix);
            match name {
                "service" => filter.service = Some(text),
                "not" => filter.not.push(text),
                "outcome" if OUTCOMES.contains(&text.as_str()) => filter.outcome = Some(text),
                "outcome" => {
                    return Err(wrong(
                        "write established, refused, failed, aborted, sent, unknown, intercepted, passed, begun or ended",
                    ));
                }
                "sample" => match text.parse() {
                    Ok(sample) if sample > 0 => filter.sample = sample,
                    _ => return Err(wrong("write a number from 1 on")),
                },
                _ => return Err(wrong("the query may hold service, not, outcome and sample")),
            }
        }
        Ok(filter)
    }
}

/// Why connections aren't traced for a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TraceRefusal {
    /// By the configuration.
    #[error("admin.trace = false forbids it: set it to true and reload")]
    Forbidden,
    /// Others trace.
    #[error("eight clients trace already: end one of them")]
    TooMany,
    /// The programs' events can't be read.
    #[error("the programs' events can't be read: see the daemon's log")]
    Unavailable,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_is_a_query_and_back() {
        let filter = TraceFilter {
            service: Some("a b&c".into()),
            not: vec!["x".into(), "é".into()],
            outcome: Some("failed".into()),
            sample: 10,
        };
        for filter in [filter, TraceFilter::default()] {
            let path = filter.path();
            let query = path.strip_prefix("/v1/trace?").unwrap();
            assert_eq!(TraceFilter::parse(query), Ok(filter));
        }
        for query in ["outcome=lost", "sample=0", "sample=x", "after=1", "x"] {
            assert!(TraceFilter::parse(query).is_err(), "{query}");
        }
    }
}

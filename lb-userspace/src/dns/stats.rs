//! What the DNS server counts, for metrics.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use hickory_proto::op::ResponseCode;

use super::encode::Code;

/// What is counted, by the names that IANA's registry of DNS parameters has for response codes;
/// `other` for those that no resolver of today answers with, so that nobody can make labels without
/// end. The last two got no answer: what was no question, and what came from a client beyond its
/// rate.
const COUNTED: [&str; 11] = [
    "NOERROR",
    "FORMERR",
    "SERVFAIL",
    "NXDOMAIN",
    "NOTIMP",
    "REFUSED",
    "BADVERS",
    "YXDOMAIN",
    "other",
    "malformed",
    "limited",
];

/// The answers since the daemon started, forwarded ones included, and the messages that got none.
#[derive(Debug, Default)]
pub struct Stats {
    counts: [AtomicU64; COUNTED.len()],
}

impl Stats {
    /// Counts an answer by its response code, such as `NXDOMAIN`, or a message without one as
    /// `malformed` or `limited`.
    pub fn count(&self, what: &str) {
        let place = COUNTED.iter().position(|counted| *counted == what);
        // `other`
        let place = place.unwrap_or(COUNTED.len() - 3);
        self.counts[place].fetch_add(1, Ordering::Relaxed);
    }

    /// The counts that aren't 0, by what was counted.
    pub fn snapshot(&self) -> BTreeMap<String, u64> {
        COUNTED
            .iter()
            .zip(&self.counts)
            .map(|(name, count)| ((*name).to_owned(), count.load(Ordering::Relaxed)))
            .filter(|(_, count)| *count > 0)
            .collect()
    }

    /// Counts an answer of our own.
    pub(super) fn count_own(&self, code: Code) {
        self.count(match code {
            Code::NoError => "NOERROR",
            Code::FormErr => "FORMERR",
            Code::ServFail => "SERVFAIL",
            Code::NxDomain => "NXDOMAIN",
            Code::NotImp => "NOTIMP",
            Code::Refused => "REFUSED",
            Code::BadVers => "BADVERS",
        });
    }

    /// Counts an answer of another resolver.
    pub(super) fn count_forwarded(&self, code: ResponseCode) {
        self.count(match code {
            ResponseCode::NoError => "NOERROR",
            ResponseCode::FormErr => "FORMERR",
            ResponseCode::ServFail => "SERVFAIL",
            ResponseCode::NXDomain => "NXDOMAIN",
            ResponseCode::NotImp => "NOTIMP",
            ResponseCode::Refused => "REFUSED",
            ResponseCode::YXDomain => "YXDOMAIN",
            _ => "other",
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_label_is_bounded() {
        let stats = Stats::default();
        stats.count("NXDOMAIN");
        stats.count("NXDOMAIN");
        stats.count("limited");
        stats.count("whatever");
        stats.count_own(Code::BadVers);
        stats.count_forwarded(ResponseCode::Unknown(3000));
        let counted: Vec<_> = stats.snapshot().into_iter().collect();
        let expected = [("BADVERS", 1), ("NXDOMAIN", 2), ("limited", 1), ("other", 2)];
        assert_eq!(counted, expected.map(|(name, n)| (name.to_owned(), n)));
    }
}

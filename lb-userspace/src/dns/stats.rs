//! Counters of the DNS server, for metrics.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use hickory_proto::op::ResponseCode;

/// The labels of the counters: response codes by their names in IANA's registry of DNS parameters,
/// `other` for all further ones, so that the number of labels is bounded, and the [`Dropped`] messages.
const LABELS: [&str; 11] = [
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

/// Why a message got no response; each is the place of its label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dropped {
    /// It was no query.
    Malformed = 9,
    /// Its client exceeds `dns.client_rate`.
    RateLimited = 10,
}

/// The responses since the daemon started, forwarded ones included, and the messages without one.
#[derive(Debug, Default)]
pub struct DnsStats {
    counts: [AtomicU64; LABELS.len()],
}

impl DnsStats {
    /// The counters that aren't 0, by label.
    pub fn snapshot(&self) -> BTreeMap<String, u64> {
        LABELS
            .iter()
            .zip(&self.counts)
            .map(|(label, count)| ((*label).to_owned(), count.load(Ordering::Relaxed)))
            .filter(|(_, count)| *count > 0)
            .collect()
    }

    /// Counts a response, our own or another resolver's.
    pub(super) fn count(&self, code: ResponseCode) {
        let idx = match code {
            ResponseCode::NoError => 0,
            ResponseCode::FormErr => 1,
            ResponseCode::ServFail => 2,
            ResponseCode::NXDomain => 3,
            ResponseCode::NotImp => 4,
            ResponseCode::Refused => 5,
            ResponseCode::BADVERS => 6,
            ResponseCode::YXDomain => 7,
            _ => 8,
        };
        self.counts[idx].fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a message without a response.
    pub(super) fn count_dropped(&self, why: Dropped) {
        self.counts[why as usize].fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_label_is_bounded() {
        let stats = DnsStats::default();
        stats.count(ResponseCode::NXDomain);
        stats.count(ResponseCode::NXDomain);
        stats.count_dropped(Dropped::Malformed);
        stats.count_dropped(Dropped::RateLimited);
        stats.count(ResponseCode::BADVERS);
        stats.count(ResponseCode::Unknown(3000));
        let counted: Vec<_> = stats.snapshot().into_iter().collect();
        let expected =
            [("BADVERS", 1), ("NXDOMAIN", 2), ("limited", 1), ("malformed", 1), ("other", 1)];
        assert_eq!(counted, expected.map(|(name, n)| (name.to_owned(), n)));
    }
}

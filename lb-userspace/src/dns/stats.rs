//! What the DNS server counts, for metrics.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use hickory_proto::op::ResponseCode;

/// The answers since the daemon started, forwarded ones included. What can't be read at all is
/// answered by hickory, and not counted.
#[derive(Debug, Default)]
pub struct Stats {
    answers: Mutex<BTreeMap<String, u64>>,
}

impl Stats {
    /// Counts an answer by its response code, such as `NXDOMAIN`.
    pub fn count(&self, rcode: &str) {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        match answers.get_mut(rcode) {
            Some(n) => *n += 1,
            None => drop(answers.insert(rcode.to_owned(), 1)),
        }
    }

    /// The answers so far, by response code.
    pub fn snapshot(&self) -> BTreeMap<String, u64> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The name that IANA's registry of DNS parameters has for a response code; `other` for those that
/// no resolver of today answers with, so that nobody can make labels without end.
pub(super) fn rcode(code: ResponseCode) -> &'static str {
    match code {
        ResponseCode::NoError => "NOERROR",
        ResponseCode::FormErr => "FORMERR",
        ResponseCode::ServFail => "SERVFAIL",
        ResponseCode::NXDomain => "NXDOMAIN",
        ResponseCode::NotImp => "NOTIMP",
        ResponseCode::Refused => "REFUSED",
        ResponseCode::BADVERS => "BADVERS",
        _ => "other",
    }
}

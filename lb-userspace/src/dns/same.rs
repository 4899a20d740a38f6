//! How often the same question is under way: what goes in a circle comes by again and again.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::{Mutex, PoisonError};

use hickory_proto::op::Query;

/// From so many on there may be a circle, and it is looked for.
const N_SUSPICIOUS: usize = 8;

/// So many at one time are answered; those beyond are taken for one question in a circle. A job
/// that starts a hundred processes, each with the same lookup, stays below.
const N_MOST: usize = 128;

/// The questions under way, by the hash of name and type: names differ in length, and a collision
/// only makes two questions share a limit.
#[derive(Debug, Default)]
pub(super) struct Same {
    hasher: RandomState,
    n_of: Mutex<HashMap<u64, usize>>,
}

/// A question that is under way until this is dropped.
#[derive(Debug)]
pub(super) struct UnderWay<'a> {
    same: &'a Same,
    key: u64,
    /// Whether it comes so often that it might go in a circle.
    pub(super) is_suspicious: bool,
}

impl Same {
    /// Counts a question in; `None` where it is under way too often already.
    pub(super) fn enter(&self, question: &Query) -> Option<UnderWay<'_>> {
        let key = self.key(question);
        let mut n_of = self.n_of.lock().unwrap_or_else(PoisonError::into_inner);
        let n = n_of.entry(key).or_default();
        if *n >= N_MOST {
            return None;
        }
        *n += 1;
        Some(UnderWay { same: self, key, is_suspicious: *n >= N_SUSPICIOUS })
    }

    fn key(&self, question: &Query) -> u64 {
        let mut hasher = self.hasher.build_hasher();
        for byte in question.name.iter().flat_map(|label| label.iter().chain(b".")) {
            hasher.write_u8(byte.to_ascii_lowercase());
        }
        hasher.write_u16(question.query_type.into());
        hasher.finish()
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        let mut n_of = self.same.n_of.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(n) = n_of.get_mut(&self.key) {
            *n -= 1;
            if *n == 0 {
                n_of.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::rr::{Name, RecordType};

    #[test]
    fn the_same_question_is_limited_and_others_are_not() {
        let query = |name, kind| Query::query(Name::from_ascii(name).unwrap(), kind);
        let same = Same::default();
        let (lower, upper) =
            (query("a.example.", RecordType::A), query("A.Example.", RecordType::A));
        let mut under_way: Vec<_> = (0..N_MOST)
            .map(|idx| same.enter(if idx % 2 == 0 { &lower } else { &upper }).unwrap())
            .collect();
        let n_suspicious = under_way.iter().filter(|each| each.is_suspicious).count();
        assert_eq!(n_suspicious, N_MOST + 1 - N_SUSPICIOUS);
        assert!(same.enter(&lower).is_none());
        for other in [query("a.example.", RecordType::AAAA), query("aexample.", RecordType::A)] {
            assert!(same.enter(&other).is_some());
        }
        under_way.pop();
        assert!(same.enter(&upper).is_some());
        drop(under_way);
        assert!(same.n_of.lock().unwrap().is_empty());
    }
}

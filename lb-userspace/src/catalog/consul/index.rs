//! The indexes of blocking queries: which one the next read has, and whether an answer applies.
//!
//! The rules are those of Consul's documentation of blocking queries: an index that goes backwards
//! or below 1 starts over, and the body that came with it has to be confirmed.

/// The mode of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadMode {
    /// Without an index: Consul answers at once.
    Plain,
    /// Without an index, by a leader that has verified that it is one (`?consistent`).
    Consistent,
    /// A blocking query: once the state is newer than this index.
    Blocking(u64),
}

impl ReadMode {
    /// Whether Consul may hold the request.
    pub fn is_blocking(self) -> bool {
        matches!(self, ReadMode::Blocking(_))
    }
}

/// Whether an answer's index allows to use the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IndexCheck {
    /// Its body is used, whatever the index: Consul's indexes don't move with its ACLs, the bodies do
    /// (consul's issue 5651).
    Apply,
    /// It may be from the past: it has to be confirmed by another read.
    Confirm,
}

/// How an answer's index relates to that of the answer applied before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IndexMove {
    /// Higher, or none was applied before.
    Forward,
    /// The same: nothing has changed in Consul's state.
    None,
    /// Lower, or gone.
    Backward,
}

/// The indexes of one watch.
#[derive(Clone, Copy, Debug)]
pub struct IndexTracker {
    known: u64,
    mode: ReadMode,
    /// The index of the last answer; 0 where it had none.
    last: u64,
    /// The index of the last answer that was applied; 0 before that.
    applied: u64,
}

impl Default for IndexTracker {
    fn default() -> Self {
        IndexTracker { known: 0, mode: ReadMode::Plain, last: 0, applied: 0 }
    }
}

impl IndexTracker {
    /// The mode of the next read.
    pub fn mode(&self) -> ReadMode {
        self.mode
    }

    /// Records the X-Consul-Index of an answer. Without one, or with 0, Consul can't hold the next
    /// request: it is a plain read, whose pace the caller sets.
    pub fn answered(&mut self, index: Option<u64>) -> IndexCheck {
        self.last = index.unwrap_or(0);
        if self.mode != ReadMode::Consistent && index.is_some_and(|index| index < self.known) {
            self.confirm();
            return IndexCheck::Confirm;
        }
        self.known = self.last;
        self.mode = match self.last {
            0 => ReadMode::Plain,
            index => ReadMode::Blocking(index),
        };
        IndexCheck::Apply
    }

    /// Records that the last answer was applied.
    pub fn applied(&mut self) {
        self.applied = self.last;
    }

    /// The index of the last answer that was applied; 0 where there was none, or it had none.
    pub fn applied_index(&self) -> u64 {
        self.applied
    }

    /// Sets that index, as an earlier watch had it: the answers of this one are compared with it.
    pub fn resume(&mut self, applied: u64) {
        self.applied = applied;
    }

    /// How the index of the last answer relates to that of the last one applied. Consul's answers have an
    /// index, so one without it, after one that had it, is as one from the past.
    pub fn moved(&self) -> IndexMove {
        match (self.last, self.applied) {
            (_, 0) => IndexMove::Forward,
            (last, applied) if last < applied => IndexMove::Backward,
            (last, applied) if last == applied => IndexMove::None,
            _ => IndexMove::Forward,
        }
    }

    /// Has the last answer confirmed by a consistent read.
    pub fn confirm(&mut self) {
        (self.known, self.mode) = (0, ReadMode::Consistent);
    }

    /// Makes the next read one that Consul answers at once: after a failure, so that it shows whether
    /// Consul is back, and where another token may read more, or less.
    pub fn restart(&mut self) {
        if self.mode.is_blocking() {
            self.mode = ReadMode::Plain;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    enum TrackerStep {
        Answer(Option<u64>),
        QueryFailure,
    }
    use IndexCheck::*;
    use ReadMode::*;
    use TrackerStep::*;

    #[test]
    fn follows_the_rules_of_blocking_queries() {
        type Case = (&'static str, &'static [(TrackerStep, Option<IndexCheck>, ReadMode)]);
        let table: &[Case] = &[
            (
                "forwards",
                &[
                    (Answer(Some(7)), Some(Apply), Blocking(7)),
                    (Answer(Some(9)), Some(Apply), Blocking(9)),
                ],
            ),
            (
                "the wait ran out, and the body counts all the same",
                &[
                    (Answer(Some(7)), Some(Apply), Blocking(7)),
                    (Answer(Some(7)), Some(Apply), Blocking(7)),
                ],
            ),
            (
                "backwards is confirmed, and then applied",
                &[
                    (Answer(Some(7)), Some(Apply), Blocking(7)),
                    (Answer(Some(3)), Some(Confirm), Consistent),
                    (Answer(Some(3)), Some(Apply), Blocking(3)),
                ],
            ),
            (
                "below 1 is confirmed, and the next question doesn't block",
                &[
                    (Answer(Some(7)), Some(Apply), Blocking(7)),
                    (Answer(Some(0)), Some(Confirm), Consistent),
                    (Answer(Some(0)), Some(Apply), Plain),
                ],
            ),
            (
                "no index at all",
                &[
                    (Answer(None), Some(Apply), Plain),
                    (Answer(None), Some(Apply), Plain),
                    (Answer(Some(7)), Some(Apply), Blocking(7)),
                    (Answer(None), Some(Apply), Plain),
                ],
            ),
            (
                "a failure asks at once, and still knows the past when it sees it",
                &[
                    (Answer(Some(7)), Some(Apply), Blocking(7)),
                    (QueryFailure, None, Plain),
                    (QueryFailure, None, Plain),
                    (Answer(Some(3)), Some(Confirm), Consistent),
                ],
            ),
            (
                "a failure while confirming confirms again",
                &[
                    (Answer(Some(7)), Some(Apply), Blocking(7)),
                    (Answer(Some(3)), Some(Confirm), Consistent),
                    (QueryFailure, None, Consistent),
                    (Answer(Some(3)), Some(Apply), Blocking(3)),
                ],
            ),
            (
                "the same index after a failure is looked at again",
                &[
                    (Answer(Some(7)), Some(Apply), Blocking(7)),
                    (QueryFailure, None, Plain),
                    (Answer(Some(7)), Some(Apply), Blocking(7)),
                ],
            ),
        ];
        for (name, steps) in table {
            let mut tracker = IndexTracker::default();
            assert_eq!(tracker.mode(), Plain, "{name}");
            for (n, (step, verdict, ask)) in steps.iter().enumerate() {
                let got = match step {
                    Answer(index) => Some(tracker.answered(*index)),
                    QueryFailure => {
                        tracker.restart();
                        None
                    }
                };
                assert_eq!((got, tracker.mode()), (*verdict, *ask), "{name}, step {n}");
            }
        }
    }

    #[test]
    fn an_index_is_compared_with_the_last_applied_one_after_any_number_of_confirmations() {
        let mut tracker = IndexTracker::default();
        for (index, is_applied, moved) in [
            (Some(7), true, IndexMove::Forward),
            (Some(7), false, IndexMove::None),
            (Some(9), false, IndexMove::Forward),
            (Some(3), false, IndexMove::Backward),
            (Some(3), false, IndexMove::Backward),
            (None, false, IndexMove::Backward),
            (Some(0), false, IndexMove::Backward),
            (Some(9), true, IndexMove::Forward),
            (Some(9), true, IndexMove::None),
            (None, true, IndexMove::Backward),
            (None, true, IndexMove::Forward),
        ] {
            tracker.answered(index);
            assert_eq!(tracker.moved(), moved, "{index:?}");
            match is_applied {
                true => tracker.applied(),
                false => tracker.confirm(),
            }
        }
    }
}

//! Where a blocking query stands: which index it asks with, and whether an answer counts.
//!
//! The rules are those of Consul's documentation of blocking queries: an index that goes backwards
//! or below 1 starts over, and what came with it isn't believed until it has been confirmed.

/// How the next question is to be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadMode {
    /// Without an index: Consul answers at once.
    Plain,
    /// Without an index, and by a leader that has made sure of being one.
    Consistent,
    /// Once the state is newer than this index.
    Blocking(u64),
}

/// What an answer is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IndexCheck {
    /// It is whole and not from the past: its body counts, whatever its index. Consul's indexes don't
    /// move with its ACLs, the bodies do (consul's issue 5651).
    Apply,
    /// It may be from the past: ask again before believing it.
    Confirm,
}

/// How an answer's index stands to that of the answer applied before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IndexMove {
    /// Beyond it, or there is nothing to compare.
    Forward,
    /// It is the same: nothing has changed in Consul's state.
    None,
    /// Below it.
    Backward,
}

/// The place of one watch in Consul's history.
#[derive(Clone, Copy, Debug)]
pub struct Cursor {
    known: u64,
    ask: ReadMode,
    /// The index of the answer noted last; 0 where it had none.
    last: u64,
    /// The index of the answer applied last; 0 before that.
    applied: u64,
}

impl Default for Cursor {
    fn default() -> Self {
        Cursor { known: 0, ask: ReadMode::Plain, last: 0, applied: 0 }
    }
}

impl Cursor {
    /// How to ask next.
    pub fn ask(&self) -> ReadMode {
        self.ask
    }

    /// Takes note of a good answer and of its X-Consul-Index. Without one, or with 0, a question can't
    /// be held back for news: the next one doesn't ask for that, and is the caller's to pace.
    pub fn answered(&mut self, index: Option<u64>) -> IndexCheck {
        self.last = index.unwrap_or(0);
        if self.ask != ReadMode::Consistent && index.is_some_and(|index| index < self.known) {
            self.doubt();
            return IndexCheck::Confirm;
        }
        self.known = self.last;
        self.ask = match self.last {
            0 => ReadMode::Plain,
            index => ReadMode::Blocking(index),
        };
        IndexCheck::Apply
    }

    /// Notes that the answer noted last is applied.
    pub fn applied(&mut self) {
        self.applied = self.last;
    }

    /// How the index of the answer noted last stands to that of the one applied last.
    pub fn moved(&self) -> IndexMove {
        match (self.last, self.applied) {
            (0, _) | (_, 0) => IndexMove::Forward,
            (last, applied) if last < applied => IndexMove::Backward,
            (last, applied) if last == applied => IndexMove::None,
            _ => IndexMove::Forward,
        }
    }

    /// Doesn't believe the answer noted last: it is asked for again.
    pub fn doubt(&mut self) {
        (self.known, self.ask) = (0, ReadMode::Consistent);
    }

    /// Has the next question answered at once: after a failure, so that it shows whether Consul is
    /// back, and where another token may read more, or less.
    pub fn restart(&mut self) {
        if let ReadMode::Blocking(_) = self.ask {
            self.ask = ReadMode::Plain;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    enum Step {
        Answer(Option<u64>),
        QueryFailure,
    }
    use IndexCheck::*;
    use ReadMode::*;
    use Step::*;

    #[test]
    fn follows_the_rules_of_blocking_queries() {
        type Row = (&'static str, &'static [(Step, Option<IndexCheck>, ReadMode)]);
        let table: &[Row] = &[
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
                "backwards is confirmed, and then believed",
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
            let mut cursor = Cursor::default();
            assert_eq!(cursor.ask(), Plain, "{name}");
            for (n, (step, verdict, ask)) in steps.iter().enumerate() {
                let got = match step {
                    Answer(index) => Some(cursor.answered(*index)),
                    QueryFailure => {
                        cursor.restart();
                        None
                    }
                };
                assert_eq!((got, cursor.ask()), (*verdict, *ask), "{name}, step {n}");
            }
        }
    }

    #[test]
    fn an_index_is_compared_with_what_was_applied_however_often_it_was_doubted() {
        let mut cursor = Cursor::default();
        for (index, is_applied, moved) in [
            (Some(7), true, IndexMove::Forward),
            (Some(7), false, IndexMove::None),
            (Some(9), false, IndexMove::Forward),
            (Some(3), false, IndexMove::Backward),
            (Some(3), false, IndexMove::Backward),
            (None, false, IndexMove::Forward),
            (Some(9), true, IndexMove::Forward),
            (Some(9), true, IndexMove::None),
        ] {
            cursor.answered(index);
            assert_eq!(cursor.moved(), moved, "{index:?}");
            match is_applied {
                true => cursor.applied(),
                false => cursor.doubt(),
            }
        }
    }
}

//! Where a blocking query stands: which index it asks with, and whether an answer counts.
//!
//! The rules are those of Consul's documentation of blocking queries: an index that goes backwards
//! or below 1 starts over, and what came with it isn't believed until it has been confirmed.

/// How the next question is to be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Without an index: Consul answers at once.
    Now,
    /// Without an index, and by a leader that has made sure of being one.
    Consistently,
    /// Once the state is newer than this index.
    After(u64),
}

/// What an answer is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is news.
    Apply,
    /// It is what is known already.
    Unchanged,
    /// It may be from the past: ask again before believing it.
    Confirm,
}

/// The place of one watch in Consul's history.
#[derive(Clone, Copy, Debug)]
pub struct Cursor {
    known: u64,
    ask: Ask,
}

impl Default for Cursor {
    fn default() -> Self {
        Cursor { known: 0, ask: Ask::Now }
    }
}

impl Cursor {
    /// How to ask next.
    pub fn ask(&self) -> Ask {
        self.ask
    }

    /// Takes note of a good answer and of its X-Consul-Index.
    pub fn answered(&mut self, index: Option<u64>) -> Verdict {
        let index = index.unwrap_or(0);
        if self.ask != Ask::Consistently && self.known > 0 && index < self.known {
            self.doubt();
            return Verdict::Confirm;
        }
        let is_known = self.ask == Ask::After(index);
        // Index 0 would not block, so a server that sends it would be asked without pause.
        self.known = index.max(1);
        self.ask = Ask::After(self.known);
        if is_known { Verdict::Unchanged } else { Verdict::Apply }
    }

    /// Doesn't believe the answer noted last: it is asked for again.
    pub fn doubt(&mut self) {
        *self = Cursor { known: 0, ask: Ask::Consistently };
    }

    /// Takes note of a failure: the next question doesn't block, so that it shows at once whether
    /// Consul is back.
    pub fn failed(&mut self) {
        if let Ask::After(_) = self.ask {
            self.ask = Ask::Now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    enum Step {
        Answer(Option<u64>),
        Failure,
    }
    use Ask::*;
    use Step::*;
    use Verdict::*;

    #[test]
    fn follows_the_rules_of_blocking_queries() {
        type Row = (&'static str, &'static [(Step, Option<Verdict>, Ask)]);
        let table: &[Row] = &[
            (
                "forwards",
                &[
                    (Answer(Some(7)), Some(Apply), After(7)),
                    (Answer(Some(9)), Some(Apply), After(9)),
                ],
            ),
            (
                "the wait ran out",
                &[
                    (Answer(Some(7)), Some(Apply), After(7)),
                    (Answer(Some(7)), Some(Unchanged), After(7)),
                ],
            ),
            (
                "backwards is confirmed, and then believed",
                &[
                    (Answer(Some(7)), Some(Apply), After(7)),
                    (Answer(Some(3)), Some(Confirm), Consistently),
                    (Answer(Some(3)), Some(Apply), After(3)),
                ],
            ),
            (
                "below 1 is confirmed, and the next question blocks",
                &[
                    (Answer(Some(7)), Some(Apply), After(7)),
                    (Answer(Some(0)), Some(Confirm), Consistently),
                    (Answer(Some(0)), Some(Apply), After(1)),
                ],
            ),
            (
                "no index at all",
                &[
                    (Answer(None), Some(Apply), After(1)),
                    (Answer(None), Some(Confirm), Consistently),
                ],
            ),
            (
                "a failure asks at once, and still knows the past when it sees it",
                &[
                    (Answer(Some(7)), Some(Apply), After(7)),
                    (Failure, None, Now),
                    (Failure, None, Now),
                    (Answer(Some(3)), Some(Confirm), Consistently),
                ],
            ),
            (
                "a failure while confirming confirms again",
                &[
                    (Answer(Some(7)), Some(Apply), After(7)),
                    (Answer(Some(3)), Some(Confirm), Consistently),
                    (Failure, None, Consistently),
                    (Answer(Some(3)), Some(Apply), After(3)),
                ],
            ),
            (
                "the same index after a failure is looked at again",
                &[
                    (Answer(Some(7)), Some(Apply), After(7)),
                    (Failure, None, Now),
                    (Answer(Some(7)), Some(Apply), After(7)),
                ],
            ),
        ];
        for (name, steps) in table {
            let mut cursor = Cursor::default();
            assert_eq!(cursor.ask(), Now, "{name}");
            for (n, (step, verdict, ask)) in steps.iter().enumerate() {
                let got = match step {
                    Answer(index) => Some(cursor.answered(*index)),
                    Failure => {
                        cursor.failed();
                        None
                    }
                };
                assert_eq!((got, cursor.ask()), (*verdict, *ask), "{name}, step {n}");
            }
        }
    }
}

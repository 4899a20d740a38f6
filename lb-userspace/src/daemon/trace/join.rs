//! From the events of a connection to one record of it.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use crate::datapath::{Begun, TraceStep, Traced};

/// The connections that may wait for their outcome; the oldest gives way.
const MAX_PENDING: usize = 16_384;

/// How long one waits: longer than a SYN is sent again (127 s by default, tcp(7), tcp_syn_retries).
const MAX_WAIT: Duration = Duration::from_secs(150);

/// A connection with its outcome.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Joined {
    /// The socket, by its cookie.
    pub cookie: u64,
    /// When it began, in nanoseconds of CLOCK_MONOTONIC.
    pub at_ns: u64,
    /// What is known of it.
    pub begun: Begun,
    /// The outcome.
    pub outcome: Outcome,
}

/// The outcome of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is established, after so many microseconds where that is known.
    Established(Option<u32>),
    /// It was refused, by no backend.
    Refused,
    /// It failed, by this error where it is known.
    Failed(Option<i32>),
    /// The client gave up.
    Aborted,
    /// It was sent to a backend, and what follows isn't followed: it is UDP, or the kernel doesn't
    /// report outcomes.
    Sent,
    /// No outcome came.
    Unknown,
    /// It is a DNS query, and was sent to nohop.
    Intercepted,
    /// It is one that goes to the resolver that was asked.
    Passed,
}

/// The connections that wait for their outcome.
#[derive(Debug, Default)]
pub struct Joiner {
    pending: HashMap<u64, Half>,
    /// Every half that was added, the oldest first, also of those that were joined.
    order: VecDeque<(u64, u64)>,
}

/// One of a connection's two events: units report by buffers of their own, so either may come first.
#[derive(Debug)]
struct Half {
    at_ns: u64,
    step: TraceStep,
}

impl Joiner {
    /// Adds an event, and returns what is complete by it. Without `has_outcomes` no outcome is
    /// waited for.
    pub fn add(&mut self, event: Traced, has_outcomes: bool) -> Vec<Joined> {
        let Traced { cookie, at_ns, step } = event;
        let step = match step {
            TraceStep::Query(begun) => {
                let outcome = match begun.backend {
                    Some(_) => Outcome::Intercepted,
                    None => Outcome::Passed,
                };
                return vec![Joined { cookie, at_ns, begun: *begun, outcome }];
            }
            step => step,
        };
        let outcome = match &step {
            TraceStep::Begun(begun) if begun.backend.is_none() => Some(Outcome::Refused),
            TraceStep::Begun(begun) if !begun.is_tcp || !has_outcomes => Some(Outcome::Sent),
            _ => None,
        };
        // A socket that connects again has no outcome of its earlier attempt any more.
        let earlier = match (&step, self.pending.remove(&cookie)) {
            (TraceStep::Begun(_), Some(Half { at_ns, step: TraceStep::Begun(begun) })) => {
                Some(Joined { cookie, at_ns, begun: *begun, outcome: Outcome::Unknown })
            }
            (_, Some(half)) => {
                let joined = join(cookie, half, Half { at_ns, step });
                return joined.into_iter().collect();
            }
            (_, None) => None,
        };
        let mut complete: Vec<Joined> = earlier.into_iter().collect();
        match (step, outcome) {
            (TraceStep::Begun(begun), Some(outcome)) => {
                complete.push(Joined { cookie, at_ns, begun: *begun, outcome });
            }
            (step, _) => {
                self.pending.insert(cookie, Half { at_ns, step });
                self.order.push_back((cookie, at_ns));
                if self.order.len() > 4 * MAX_PENDING {
                    let pending = &self.pending;
                    let is_pending = |(cookie, at_ns): &(u64, u64)| {
                        pending.get(cookie).is_some_and(|half| half.at_ns == *at_ns)
                    };
                    self.order.retain(is_pending);
                }
                complete.extend(self.expire(at_ns));
            }
        }
        complete
    }

    /// What has waited too long, or is too much.
    pub fn expire(&mut self, now_ns: u64) -> Vec<Joined> {
        let mut expired = Vec::new();
        while let Some(&(cookie, at_ns)) = self.order.front() {
            let is_pending = self.pending.get(&cookie).is_some_and(|half| half.at_ns == at_ns);
            let is_due = now_ns.saturating_sub(at_ns) > MAX_WAIT.as_nanos() as u64;
            if is_pending && !is_due && self.pending.len() <= MAX_PENDING {
                break;
            }
            self.order.pop_front();
            if is_pending
                && let Some(Half { step: TraceStep::Begun(begun), .. }) =
                    self.pending.remove(&cookie)
            {
                expired.push(Joined { cookie, at_ns, begun: *begun, outcome: Outcome::Unknown });
            }
        }
        expired
    }
}

fn join(cookie: u64, one: Half, other: Half) -> Option<Joined> {
    let (begun, at_ns, step) = match (one.step, other.step) {
        (TraceStep::Begun(begun), step) => (begun, one.at_ns, step),
        (step, TraceStep::Begun(begun)) => (begun, other.at_ns, step),
        _ => return None,
    };
    let outcome = match step {
        TraceStep::Established { connect_us } => Outcome::Established(connect_us),
        TraceStep::Failed { error } => Outcome::Failed(error),
        TraceStep::Aborted => Outcome::Aborted,
        TraceStep::Begun(_) | TraceStep::Query(_) => Outcome::Unknown,
    };
    Some(Joined { cookie, at_ns, begun: *begun, outcome })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begun(is_tcp: bool, is_refused: bool) -> TraceStep {
        TraceStep::Begun(Box::new(Begun {
            pid: 7,
            comm: "curl".into(),
            cgroup_id: 1,
            service: Some("web".into()),
            frontend: "127.128.0.1:80".parse().unwrap(),
            is_tcp,
            backend: (!is_refused).then(|| "10.0.0.1:8080".parse().unwrap()),
            reason: "",
        }))
    }

    fn traced(cookie: u64, at_ns: u64, step: TraceStep) -> Traced {
        Traced { cookie, at_ns, step }
    }

    fn outcomes(joined: Vec<Joined>) -> Vec<(u64, Outcome)> {
        joined.into_iter().map(|joined| (joined.at_ns, joined.outcome)).collect()
    }

    #[test]
    fn an_outcome_completes_a_connection_whichever_comes_first() {
        let established = || TraceStep::Established { connect_us: Some(150) };
        let mut joiner = Joiner::default();
        let mut add = |cookie, at_ns, step| outcomes(joiner.add(traced(cookie, at_ns, step), true));
        assert_eq!(add(1, 10, begun(true, false)), []);
        assert_eq!(add(1, 20, established()), [(10, Outcome::Established(Some(150)))]);
        assert_eq!(add(2, 40, TraceStep::Failed { error: Some(111) }), []);
        assert_eq!(add(2, 30, begun(true, false)), [(30, Outcome::Failed(Some(111)))]);
        assert_eq!(add(3, 50, begun(true, true)), [(50, Outcome::Refused)]);
        assert_eq!(add(4, 60, begun(false, false)), [(60, Outcome::Sent)]);
        // A socket that connects again.
        assert_eq!(add(5, 70, begun(true, false)), []);
        assert_eq!(add(5, 80, begun(true, false)), [(70, Outcome::Unknown)]);
        assert_eq!(add(5, 90, TraceStep::Aborted), [(80, Outcome::Aborted)]);
        let sent = joiner.add(traced(6, 100, begun(true, false)), false);
        assert_eq!(outcomes(sent), [(100, Outcome::Sent)]);
        assert!(joiner.pending.is_empty());
    }

    #[test]
    fn what_waits_is_bounded() {
        let mut joiner = Joiner::default();
        for cookie in 0..MAX_PENDING as u64 {
            assert_eq!(joiner.add(traced(cookie, cookie, begun(true, false)), true), []);
        }
        let more = joiner.add(traced(1 << 40, 99_999, begun(true, false)), true);
        assert_eq!(outcomes(more), [(0, Outcome::Unknown)]);
        // An outcome alone is dropped with time, and all else is reported.
        let more = joiner.add(traced(1 << 41, 99_999, TraceStep::Aborted), true);
        assert_eq!(outcomes(more), [(1, Outcome::Unknown)]);
        let late = joiner.expire(MAX_WAIT.as_nanos() as u64 + 100_000);
        assert_eq!(late.len(), MAX_PENDING - 1);
        assert!(joiner.pending.is_empty() && joiner.order.is_empty());
    }
}

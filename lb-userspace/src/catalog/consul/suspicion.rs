//! The rules for answers that remove too much. Pure: time is an argument.
//!
//! Consul answers 200 with less, or nothing, where its ACLs can't be resolved, where a policy was
//! narrowed, and where its servers lost their state. A loss of more than half of what serves is confirmed
//! by a consistent read first. Once confirmed it is applied, unless there is a [`Reason`] to withhold it:
//! then what was known keeps serving, as in the self-preservation mode of Netflix's Eureka. Only what
//! *vanishes* from an answer is withheld: an instance that became critical is still listed, and out at
//! once.

use std::time::{Duration, Instant};

use super::index::IndexMove;

/// The time within which services that vanish count as one event. A watch sees new ACLs within 48 s,
/// when its wait is over.
pub const MASS_WINDOW: Duration = Duration::from_secs(60);

/// The least number that vanishes at once of which a job that was stopped isn't the cause.
const N_MASS: usize = 3;

/// What is known about an answer in addition to its body.
#[derive(Clone, Copy, Debug)]
pub struct Evidence {
    /// When it arrived.
    pub now: Instant,
    /// Whether it is the answer to a consistent read.
    pub is_consistent: bool,
    /// Whether Consul reports that ACLs filtered it.
    pub is_filtered: bool,
    /// How its index relates to that of the last answer that was applied.
    pub moved: IndexMove,
}

/// What is done with an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Assessment {
    /// It is applied.
    Apply,
    /// It is confirmed by a consistent read.
    Confirm,
    /// It removes nothing: what was known serves in addition to what it lists. Consul is asked again
    /// soon.
    Withhold,
}

/// Why a confirmed answer is suspicious.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// Consul reports that ACLs filtered it, which the last one that was applied wasn't.
    Filtered,
    /// It lists less while nothing has changed, or not even Consul's own service.
    Hidden,
    /// The index went backwards.
    Rewound,
    /// Much has vanished at once.
    Mass,
}

/// The suspicion against the answers about one service, or against the list of names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Suspicion {
    /// Its cause.
    pub reason: Reason,
    /// When it ends though nothing has changed; `None` for never.
    pub until: Option<Instant>,
}

impl Suspicion {
    /// Whether its end hasn't come; after that the next answer has to be confirmed.
    pub fn holds(&self, now: Instant) -> bool {
        self.until.is_none_or(|until| until > now)
    }
}

/// Whether the loss of serving instances is so large that it has to be confirmed.
///
/// Consul may answer with little or nothing during an election (consul-template's issue 1131).
pub fn is_shrink(n_before: usize, n_after: usize) -> bool {
    n_after.saturating_mul(2) < n_before
}

/// Whether so many of all are more than a job that was stopped.
pub fn is_mass(n_gone: usize, n_all: usize) -> bool {
    n_gone >= N_MASS && n_gone.saturating_mul(2) > n_all
}

/// The reason that the answer itself has.
pub fn own_reason(evidence: Evidence, was_filtered: bool) -> Option<Reason> {
    match evidence.moved {
        _ if evidence.is_filtered && !was_filtered => Some(Reason::Filtered),
        IndexMove::None => Some(Reason::Hidden),
        IndexMove::Backward => Some(Reason::Rewound),
        IndexMove::Forward => None,
    }
}

/// Assesses an answer that removes too much, with the present suspicion and a new reason for one. A
/// suspicion lasts for `distrust` where Consul doesn't report the reason itself.
pub fn assess(
    suspicion: &mut Option<Suspicion>,
    evidence: Evidence,
    reason: Option<Reason>,
    distrust: Duration,
) -> Assessment {
    // A reason that Consul itself reported applies for as long as Consul reports it.
    let is_over = |it: &Suspicion| it.reason == Reason::Filtered && !evidence.is_filtered;
    *suspicion = suspicion.filter(|suspicion| !is_over(suspicion));
    let is_due = suspicion.map(|suspicion| !suspicion.holds(evidence.now));
    match (is_due, reason) {
        (Some(false), _) => Assessment::Withhold,
        (Some(true) | None, _) if !evidence.is_consistent => Assessment::Confirm,
        (Some(true), _) | (None, None) => {
            *suspicion = None;
            Assessment::Apply
        }
        (None, Some(reason)) => {
            let until = (reason != Reason::Filtered).then(|| evidence.now + distrust);
            *suspicion = Some(Suspicion { reason, until });
            Assessment::Withhold
        }
    }
}

/// The problem to report: what Consul's answers lack, why they are suspicious, and the fix.
pub fn problem(lacking: &str, reason: Reason, distrust: Duration) -> String {
    let (why, then) = match reason {
        Reason::Filtered => (
            "it leaves out what the token may not read, as it didn't before",
            "What was known serves while that is so; give the token service:read and node:read, \
             or see why Consul can't resolve it; if it is meant to read less, stop the daemon, \
             remove catalog.json from its state directory and start it"
                .into(),
        ),
        Reason::Hidden => (
            "nothing has changed in its state, so the token seems to read less than before",
            format!(
                "What was known serves for {distrust:?} at most; give the token service:read and \
                 node:read, or see why Consul can't resolve it"
            ),
        ),
        Reason::Rewound => (
            "its index went backwards, so its servers seem to have lost their state",
            format!("What was known serves for {distrust:?} at most; look at Consul's servers"),
        ),
        Reason::Mass => (
            "they all went at once",
            format!(
                "If they were stopped on purpose, there is nothing to do: this ends by itself \
                 {distrust:?} after they went, and until then what was known serves; if not, \
                 look at Consul's servers"
            ),
        ),
    };
    format!("Consul's answers lack {lacking}: {why}. {then}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_of_more_than_half_is_a_shrink() {
        let table = [
            (0, 0, false),
            (0, 5, false),
            (1, 0, true),
            (1, 1, false),
            (2, 1, false),
            (3, 1, true),
            (4, 2, false),
            (100, 49, true),
        ];
        for (before, after, expected) in table {
            assert_eq!(is_shrink(before, after), expected, "{before} to {after}");
        }
    }

    #[test]
    fn a_suspicion_ends_with_its_time_except_where_consul_reports_the_reason() {
        const S: Duration = Duration::from_secs(1);
        const DISTRUST: Duration = Duration::from_secs(300);
        let start = Instant::now();
        for (is_filtered, moved, at_the_end) in [
            (true, IndexMove::Forward, Assessment::Withhold),
            (false, IndexMove::None, Assessment::Apply),
            (false, IndexMove::Backward, Assessment::Apply),
        ] {
            let mut suspicion = None;
            let mut assess = |after, is_consistent, is_filtered| {
                let evidence = Evidence { now: start + after, is_consistent, is_filtered, moved };
                super::assess(&mut suspicion, evidence, own_reason(evidence, false), DISTRUST)
            };
            assert_eq!(assess(Duration::ZERO, true, is_filtered), Assessment::Withhold);
            assert_eq!(assess(DISTRUST - S, false, is_filtered), Assessment::Withhold);
            let plain = if is_filtered { Assessment::Withhold } else { Assessment::Confirm };
            assert_eq!(assess(DISTRUST, false, is_filtered), plain);
            assert_eq!(assess(DISTRUST, true, is_filtered), at_the_end);
        }
        // Once Consul doesn't report the reason any more, the answer is as good as another.
        let mut suspicion = None;
        for (is_filtered, expected) in [(true, Assessment::Withhold), (false, Assessment::Apply)] {
            let (is_consistent, moved) = (true, IndexMove::Forward);
            let evidence = Evidence { now: start, is_consistent, is_filtered, moved };
            let reason = own_reason(evidence, false);
            assert_eq!(assess(&mut suspicion, evidence, reason, DISTRUST), expected);
            assert_eq!(suspicion.is_some(), is_filtered);
        }
    }
}

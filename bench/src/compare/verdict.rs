//! The verdict of a ratio with an interval.

use std::fmt;

use serde::Serialize;

use crate::report::Better;
use crate::stats::Interval;

/// An interval that has 1 in it and reaches further than this from it is undecided.
pub const TOO_WIDE: f64 = 0.03;

/// An interval that stays this near to 1 is no difference, though it may not have 1 in it: memory
/// is measured to a thousandth.
pub const NEGLIGIBLE: f64 = 0.005;

/// Of NEW compared with OLD.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The whole interval is on the better side of 1.
    Better,
    /// The interval has 1 in it, and is narrow; or it is as good as 1.
    NoWorse,
    /// The whole interval is on the worse side of 1.
    Worse,
    /// The interval has 1 in it and more than 3% on either side; or there are too few rounds.
    Undecided,
    /// OLD was measured, and NEW could not be.
    Failed,
    /// OLD could not be measured.
    NotMeasured,
}

impl Verdict {
    /// Of the interval of NEW over OLD; `None` of too few rounds.
    pub fn of(ratio: Option<Interval>, better: Better) -> Verdict {
        let Some(Interval { low, high, .. }) = ratio else { return Verdict::Undecided };
        if 1.0 - NEGLIGIBLE <= low && high <= 1.0 + NEGLIGIBLE {
            return Verdict::NoWorse;
        }
        let (is_lower, is_higher) = (high < 1.0, low > 1.0);
        match better {
            Better::Lower if is_lower => Verdict::Better,
            Better::Higher if is_higher => Verdict::Better,
            _ if is_lower || is_higher => Verdict::Worse,
            _ if low < 1.0 - TOO_WIDE || high > 1.0 + TOO_WIDE => Verdict::Undecided,
            _ => Verdict::NoWorse,
        }
    }

    /// Whether the run is to fail for it.
    pub fn fails(self) -> bool {
        matches!(self, Verdict::Worse | Verdict::Failed)
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Verdict::Better => "better",
            Verdict::NoWorse => "no worse",
            Verdict::Worse => "WORSE",
            Verdict::Undecided => "undecided",
            Verdict::Failed => "FAILED",
            Verdict::NotMeasured => "not measured",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts() {
        for (low, high, better, expected) in [
            (0.90, 0.99, Better::Lower, Verdict::Better),
            (0.90, 0.99, Better::Higher, Verdict::Worse),
            (1.01, 1.40, Better::Lower, Verdict::Worse),
            (1.01, 1.40, Better::Higher, Verdict::Better),
            (0.98, 1.02, Better::Lower, Verdict::NoWorse),
            (1.00, 1.03, Better::Lower, Verdict::NoWorse),
            (1.001, 1.004, Better::Lower, Verdict::NoWorse),
            (1.001, 1.006, Better::Lower, Verdict::Worse),
            (0.96, 1.01, Better::Lower, Verdict::Undecided),
            (0.99, 1.04, Better::Higher, Verdict::Undecided),
        ] {
            let ratio = Interval { median: f64::midpoint(low, high), low, high };
            assert_eq!(Verdict::of(Some(ratio), better), expected, "{low} to {high}, {better:?}");
        }
        assert_eq!(Verdict::of(None, Better::Lower), Verdict::Undecided);
    }
}

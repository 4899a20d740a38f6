//! What a person is shown of an ejection: read from the maps when it is looked at.

use std::fmt;
use std::time::Duration;

use lb_common::{Cause, Ejection, RESETS, Standing};

use super::kernel::Counters;
use super::pins::monotonic_ns;

/// Why, and for how much longer, new connections avoid a backend. Its text is a sentence's end:
/// "ejected for 2 s more: 1 refused connect".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ejected {
    /// `None` where the time is over, and the next connection decides.
    left: Option<Duration>,
    cause: Cause,
    /// Failures to connect in a row.
    n_failures: u8,
}

impl Ejected {
    /// `None` for a backend that isn't ejected.
    fn of(ejection: Ejection, now_ns: u64, limits: &lb_common::EjectionLimits) -> Option<Ejected> {
        let left = match ejection.standing(now_ns, limits) {
            Standing::Trial => None,
            Standing::Suspect | Standing::Refusing => {
                Some(Duration::from_nanos(ejection.until_ns.saturating_sub(now_ns)))
            }
            _ => return None,
        };
        let Ejection { cause, failures: n_failures, .. } = ejection;
        Some(Ejected { left, cause, n_failures })
    }
}

impl fmt::Display for Ejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.left {
            None => f.write_str("ejected until the next connection succeeds: ")?,
            Some(left) if left < Duration::from_secs(1) => {
                write!(f, "ejected for {} ms more: ", left.as_millis().max(1))?;
            }
            Some(left) => {
                let seconds = left.as_secs() + u64::from(left.subsec_nanos() > 0);
                write!(f, "ejected for {seconds} s more: ")?;
            }
        }
        match (self.cause, self.n_failures) {
            (Cause::Refused, ..=1) => f.write_str("1 refused connect"),
            (Cause::Refused, u8::MAX) => f.write_str("255 or more refused connects"),
            (Cause::Refused, n) => write!(f, "{n} refused connects"),
            (Cause::Failures, n) => write!(f, "{n} failed connects in a row"),
            (Cause::Silence, _) => f.write_str("connects get no answer"),
            (Cause::Resets, _) => write!(f, "it reset {RESETS} connections in a row"),
            (Cause::None, _) => Ok(()),
        }
    }
}

impl Counters {
    /// Whether a backend is ejected, by its index.
    pub fn ejected(&self, backend_idx: u32) -> Option<Ejected> {
        let now_ns = monotonic_ns();
        let ejection = self.outcomes(backend_idx).ejection.at(now_ns);
        Ejected::of(ejection, now_ns, &self.balance().limits())
    }
}

#[cfg(test)]
mod tests {
    use lb_common::{EjectionLimits, Sign};

    use super::*;

    #[test]
    fn the_text_has_the_reason_and_the_time_left() {
        use Sign::{Answered, Failed, Refused, Reset, Silence};
        const S: u64 = 1_000_000_000;
        let limits = EjectionLimits::default();
        // The signs, all at once, and what is shown so many milliseconds later.
        let rows: &[(&[Sign], u64, Option<&str>)] = &[
            (&[], 0, None),
            (&[Failed], 0, None),
            (&[Refused], 0, Some("ejected for 1 s more: 1 refused connect")),
            (&[Refused, Refused], 990, Some("ejected for 10 ms more: 2 refused connects")),
            (&[Refused; 300], 0, Some("ejected for 1 s more: 255 or more refused connects")),
            (
                &[Refused],
                1_000,
                Some("ejected until the next connection succeeds: 1 refused connect"),
            ),
            (&[Refused, Answered], 0, None),
            (&[Failed; 3], 1, Some("ejected for 999 ms more: 3 failed connects in a row")),
            (&[Silence], 0, Some("ejected for 1 s more: connects get no answer")),
            (&[Reset; 3], 1, Some("ejected for 99 ms more: it reset 3 connections in a row")),
            (&[Reset; 3], 100, None),
        ];
        for (signs, ms, expected) in rows {
            let ejection = signs
                .iter()
                .fold(Ejection::default(), |ejection, sign| ejection.after(*sign, S, &limits));
            let shown = Ejected::of(ejection, S + ms * 1_000_000, &limits);
            let shown = shown.map(|ejected| ejected.to_string());
            assert_eq!(shown.as_deref(), *expected, "{signs:?} {ms}");
        }
    }
}

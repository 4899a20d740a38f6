//! Ejections as they are in the maps: what a person is shown of one, read when it is looked at, and how
//! the daemon's probes end one.

use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use lb_common::{Cause, Ejection, EjectionLimits, EjectionWord, EventKind, RESETS, Sign, Standing};

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
    fn of(ejection: Ejection, now_ns: u64, limits: &EjectionLimits) -> Option<Ejected> {
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

/// A backend that is, or was, in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackendRef {
    /// Its index in `BACKENDS`.
    pub backend_idx: u32,
    /// Its generation: a backend that takes the index over has another.
    pub generation: u32,
    /// Its address.
    pub address: SocketAddr,
}

impl Counters {
    /// Whether a backend is ejected, by its index.
    pub fn ejected(&self, backend_idx: u32) -> Option<Ejected> {
        let now_ns = monotonic_ns();
        let ejection = self.outcomes(backend_idx).ejection.at(now_ns);
        Ejected::of(ejection, now_ns, &self.balance().limits())
    }

    /// The backend with this index; `None` where none is in the table.
    pub fn backend_ref(&self, backend_idx: u32) -> Option<BackendRef> {
        let generation = self.generation(backend_idx);
        let address = self.backend_address(backend_idx, generation)?;
        Some(BackendRef { backend_idx, generation, address })
    }

    /// Why a backend is ejected; `None` where it isn't, has left the table, or ejection is switched off by
    /// a longest time of zero.
    pub fn ejection_cause(&self, backend: &BackendRef) -> Option<Cause> {
        let limits = self.balance().limits();
        let is_same = self.generation(backend.backend_idx) == backend.generation;
        if !is_same || limits.max_ns == 0 {
            return None;
        }
        let now_ns = monotonic_ns();
        let ejection = self.outcomes(backend.backend_idx).ejection.at(now_ns);
        Ejected::of(ejection, now_ns, &limits).map(|ejected| ejected.cause)
    }

    /// Applies what a connection has shown of a backend that still has this generation. Returns what that changed.
    pub(super) fn apply_sign(
        &self,
        backend_idx: u32,
        generation: u32,
        sign: Sign,
    ) -> Option<EventKind> {
        let (word, limits) = (self.ejection_word(backend_idx)?, self.balance().limits());
        let mut event = None;
        let change = |former: u64| {
            let former: EjectionWord = zerocopy::transmute!(former);
            let (next, changed) = former.after(sign, monotonic_ns(), &limits);
            event = changed;
            (self.generation(backend_idx) == generation).then(|| zerocopy::transmute!(next))
        };
        word.try_update(Ordering::AcqRel, Ordering::Acquire, change).ok()?;
        event
    }

    /// Applies what the daemon's connect() has shown of an ejected backend, [`Sign::Probed`] or
    /// [`Sign::Refused`]. Returns what that changed; `None` for nothing, as where the backend isn't ejected
    /// any more or has left the table.
    pub fn apply_probe(&self, backend: &BackendRef, sign: Sign) -> Option<EventKind> {
        let word = self.ejection_word(backend.backend_idx)?;
        let is_same = || self.generation(backend.backend_idx) == backend.generation;
        apply_probe(word, sign, is_same, monotonic_ns(), &self.balance().limits())
    }
}

/// See [`Counters::apply_probe`]. Programs store the word at once, so it is exchanged against the one that
/// was read.
fn apply_probe(
    word: &AtomicU64,
    sign: Sign,
    is_same: impl Fn() -> bool,
    now_ns: u64,
    limits: &EjectionLimits,
) -> Option<EventKind> {
    let mut event = None;
    let change = |former: u64| {
        let former: EjectionWord = zerocopy::transmute!(former);
        let ejected = Ejected::of(former.at(now_ns), now_ns, limits)?;
        // A backend that resets connections accepts them first, so a probe that succeeds doesn't show that
        // it is over; one that is refused shows that it has died. Of any other ejection a refusal is no
        // news.
        if !is_same() || (ejected.cause == Cause::Resets) != (sign == Sign::Refused) {
            return None;
        }
        let (next, changed) = former.after(sign, now_ns, limits);
        event = changed;
        Some(zerocopy::transmute!(next))
    };
    word.try_update(Ordering::AcqRel, Ordering::Acquire, change).ok()?;
    event
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;

    #[test]
    fn a_probe_ends_an_ejection_that_is_still_the_same() {
        use EventKind::{Ejected, Returned};
        use Sign::{Answered, Failed, Probed, Refused, Reset, Silence};
        let limits = EjectionLimits::default();
        // The signs before, all at once; the probe's, so many milliseconds later; and what it changes.
        let rows: &[(&[Sign], u64, Sign, Option<EventKind>)] = &[
            (&[Refused; 5], 10, Probed, Some(Returned)),
            (&[Failed; 3], 10, Probed, Some(Returned)),
            (&[Silence], 10, Probed, Some(Returned)),
            // It awaits its trial.
            (&[Refused], 2_000, Probed, Some(Returned)),
            (&[Refused], 10, Refused, None),
            (&[Refused], 2_000, Refused, None),
            (&[Silence], 10, Refused, None),
            // It has returned meanwhile.
            (&[Refused, Answered], 10, Probed, None),
            (&[Failed], 10, Probed, None),
            (&[], 0, Probed, None),
            (&[Reset; 3], 10, Probed, None),
            (&[Reset; 3], 10, Refused, Some(Ejected)),
            (&[Reset; 3], 200, Refused, None),
        ];
        for (signs, ms, sign, expected) in rows {
            let before = signs
                .iter()
                .fold(EjectionWord::default(), |word, sign| word.after(*sign, S, &limits).0);
            let now_ns = S + ms * 1_000_000;
            let word = AtomicU64::new(zerocopy::transmute!(before));
            let load = || -> EjectionWord { zerocopy::transmute!(word.load(Ordering::Relaxed)) };
            // Another backend has its place.
            assert_eq!(apply_probe(&word, *sign, || false, now_ns, &limits), None);
            assert_eq!(load(), before, "{signs:?} {ms}");
            let event = apply_probe(&word, *sign, || true, now_ns, &limits);
            assert_eq!(event, *expected, "{signs:?} {ms}");
            let expected = match event {
                None => before,
                Some(_) => before.after(*sign, now_ns, &limits).0,
            };
            assert_eq!(load(), expected, "{signs:?} {ms}");
            if event == Some(Returned) {
                assert_eq!(apply_probe(&word, *sign, || true, now_ns, &limits), None);
            }
        }
    }

    /// The kernel's program ends the ejection while the probe's result is being applied.
    #[test]
    fn a_probe_overwrites_nothing_that_the_kernel_has_stored_meanwhile() {
        let limits = EjectionLimits::default();
        let (ejected, _) = EjectionWord::default().after(Sign::Refused, S, &limits);
        let (returned, _) = ejected.after(Sign::Answered, S + 1, &limits);
        let stored: u64 = zerocopy::transmute!(returned);
        let word = AtomicU64::new(zerocopy::transmute!(ejected));
        let kernel_stores = || {
            word.store(stored, Ordering::Relaxed);
            true
        };
        assert_eq!(apply_probe(&word, Sign::Probed, kernel_stores, S + 2, &limits), None);
        assert_eq!(word.load(Ordering::Relaxed), stored);
    }

    #[test]
    fn the_text_has_the_reason_and_the_time_left() {
        use Sign::{Answered, Failed, Refused, Reset, Silence};
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

//! Ejection: a backend is avoided after bad signs, longer each time, until one trial connection
//! succeeds. A pure state machine; what is said of a sign is what it is worth:
//!
//! - refused (a RST to a SYN): no socket listens. The first one ejects, unless the limits differ.
//! - silence: connections are pending, and none was answered for a multiple of the usual connect time.
//! - resets of established connections, in a row: a hint. It ejects for a tenth of the time, and needs
//!   no trial, as connect() doesn't show whether it is over.
//! - other failures, in a row.
//!
//! An ejection ends by itself, so a daemon isn't needed. One connection then is its trial. The connect
//! hook claims it, which keeps others away for the base time, as connect() may fail before its SYN. The
//! SYN ejects the backend again, for twice the time: if the trial succeeds, all is forgotten; whatever
//! else becomes of it, even if its end is never reported, the state is already right. A trial that shows
//! nothing, because no SYN was sent or its client gave up early, leaves the length of the ejection as it
//! was. The next one comes after the base time, not at once: a client that always gives up early, or has
//! no route, would lose each connection to it.

/// Resets of established connections in a row, without one that ended in order, that eject.
pub const RESETS: u8 = 3;
/// The limits of the time after which pending connections are silence, in microseconds.
pub const SILENCE_US: core::ops::RangeInclusive<u32> = 20_000..=1_000_000;
/// That time for a backend whose connect time isn't known.
pub const SILENCE_UNKNOWN_US: u32 = 200_000;

/// What ejects, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EjectionLimits {
    /// Refused connections in a row; 0 for never.
    pub refused: u8,
    /// Other failures in a row, refused ones included; 0 for never, nor for resets.
    pub failures: u8,
    /// Silence, in multiples of a backend's connect time; 0 for never.
    pub silence: u8,
    /// The time of a first ejection, in nanoseconds.
    pub base_ns: u64,
    /// The longest time of an ejection, in nanoseconds.
    pub max_ns: u64,
    /// The part of a group, in 1/256, beyond which the spare set is used as well.
    pub share: u16,
}

impl Default for EjectionLimits {
    fn default() -> EjectionLimits {
        EjectionLimits {
            refused: 1,
            failures: 3,
            silence: 20,
            base_ns: 1_000_000_000,
            max_ns: 300_000_000_000,
            share: 128,
        }
    }
}

/// Why a backend is ejected.
#[repr(u8)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cause {
    /// It isn't.
    #[default]
    None = 0,
    /// It refused.
    Refused = 1,
    /// It didn't answer.
    Silence = 2,
    /// It reset established connections.
    Resets = 3,
    /// Connections failed in other ways.
    Failures = 4,
}

impl Cause {
    /// The cause with this number; none where it is unknown.
    #[inline(always)]
    pub const fn from_number(number: u8) -> Cause {
        match number {
            1 => Cause::Refused,
            2 => Cause::Silence,
            3 => Cause::Resets,
            4 => Cause::Failures,
            _ => Cause::None,
        }
    }
}

/// What a connection, or a probe, showed of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sign {
    /// A SYN was answered by a RST.
    Refused,
    /// [`is_silent`].
    Silence,
    /// An established connection was reset by the backend.
    Reset,
    /// connect() failed in another way: it timed out, the backend was unreachable.
    Failed,
    /// A connection was established.
    Answered,
    /// An established connection ended in order.
    Closed,
    /// The daemon found it well.
    Probed,
    /// The client of a trial gave up before that could show anything.
    TrialAborted,
}

/// Whether a backend may be selected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It may.
    Eligible,
    /// It may, once: [`Ejection::claim_trial`].
    Trial,
    /// It is ejected, for silence, resets or failures: only where none is eligible.
    Suspect,
    /// It is ejected because it refuses: last of all.
    Refusing,
}

impl Standing {
    /// Whether a connection may select it before those that are ejected.
    #[inline(always)]
    pub fn is_eligible(self) -> bool {
        matches!(self, Standing::Eligible | Standing::Trial)
    }
}

/// The ejection of a backend. All zero for one of which nothing is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ejection {
    /// Until when it is ejected, in nanoseconds of CLOCK_MONOTONIC; the end of the last one where it
    /// isn't.
    pub until_ns: u64,
    /// Failures to connect in a row, refused ones included. It saturates.
    pub failures: u8,
    /// Resets in a row. It saturates.
    pub resets: u8,
    /// Ejections, and trials, in a row. It saturates.
    pub ejections: u8,
    /// Why it is ejected. Resets remain, once their time is over, until the next sign.
    pub cause: Cause,
    /// Whether a trial was claimed whose SYN is still to come.
    pub is_claimed: bool,
}

impl Ejection {
    /// The state after a sign.
    #[inline(always)]
    pub fn after(self, sign: Sign, now_ns: u64, limits: &EjectionLimits) -> Ejection {
        let mut next = self;
        next.end_resets(now_ns, limits);
        match sign {
            Sign::Answered => {
                next.failures = 0;
                if next.cause != Cause::Resets {
                    next.end(now_ns);
                }
            }
            Sign::Probed => {
                (next.failures, next.resets) = (0, 0);
                next.end(now_ns);
            }
            Sign::Closed => next.resets = 0,
            // Of connections that began before it was ejected. One that awaits its trial is still out.
            Sign::Silence if limits.silence == 0 || next.awaits_trial(now_ns, limits) => {}
            Sign::Silence => next.eject(Cause::Silence, now_ns, limits),
            Sign::TrialAborted if matches!(next.cause, Cause::None | Cause::Resets) => {}
            Sign::TrialAborted => {
                next.ejections = next.ejections.saturating_sub(1);
                next.until_ns = now_ns.saturating_add(limits.base_ns.min(limits.max_ns));
            }
            // Likewise.
            Sign::Reset if next.cause != Cause::None || limits.failures == 0 => {}
            Sign::Reset => {
                next.resets = self.resets.saturating_add(1);
                if next.resets >= RESETS {
                    next.resets = 0;
                    next.eject(Cause::Resets, now_ns, limits);
                }
            }
            Sign::Refused | Sign::Failed => {
                next.failures = self.failures.saturating_add(1);
                let is_over = |limit: u8| limit != 0 && next.failures >= limit;
                if sign == Sign::Refused && is_over(limits.refused) {
                    next.eject(Cause::Refused, now_ns, limits);
                } else if is_over(limits.failures) {
                    next.eject(Cause::Failures, now_ns, limits);
                }
            }
        }
        next
    }

    /// The state once a connection was chosen as the trial: others avoid the backend for the base time.
    #[inline(always)]
    pub fn claim_trial(self, now_ns: u64, limits: &EjectionLimits) -> Ejection {
        let until_ns = now_ns.saturating_add(limits.base_ns.min(limits.max_ns));
        Ejection { until_ns, is_claimed: true, ..self }
    }

    /// The state once the SYN of a claimed trial is sent: others avoid the backend for twice the time of
    /// the last ejection.
    #[inline(always)]
    pub fn begin_trial(self, now_ns: u64, limits: &EjectionLimits) -> Ejection {
        let mut next = self;
        if self.is_claimed {
            next.begin(self.cause, now_ns, limits);
        }
        next
    }

    #[inline(always)]
    fn awaits_trial(self, now_ns: u64, limits: &EjectionLimits) -> bool {
        self.standing(now_ns, limits) == Standing::Trial
    }

    /// Whether it may be selected, as far as it is ejected.
    #[inline(always)]
    pub fn standing(self, now_ns: u64, limits: &EjectionLimits) -> Standing {
        match (self.is_ejected(now_ns, limits), self.cause) {
            (_, Cause::None) | (false, Cause::Resets) => Standing::Eligible,
            (false, _) => Standing::Trial,
            (true, Cause::Refused) => Standing::Refusing,
            (true, _) => Standing::Suspect,
        }
    }

    /// Whether it is ejected now. An end that is further away than any ejection lasts is of a clock that
    /// went back.
    #[inline(always)]
    pub fn is_ejected(self, now_ns: u64, limits: &EjectionLimits) -> bool {
        let left = self.until_ns.saturating_sub(now_ns);
        self.cause != Cause::None && left != 0 && left <= limits.max_ns
    }

    /// Ejects it, unless it is ejected: connections that began before have no more to report, but that
    /// it refuses. An ejection for resets, a hint, is replaced: it isn't one more in the row.
    #[inline(always)]
    fn eject(&mut self, cause: Cause, now_ns: u64, limits: &EjectionLimits) {
        if self.cause != Cause::Resets && self.is_ejected(now_ns, limits) {
            if cause == Cause::Refused {
                self.cause = cause;
            }
            return;
        }
        // Since the last end it did well for as long as it had been ejected.
        let well_ns = now_ns.saturating_sub(self.until_ns);
        if self.cause == Cause::None && well_ns > duration_ns(self.ejections, cause, limits) {
            self.ejections = 0;
        }
        self.begin(cause, now_ns, limits);
    }

    #[inline(always)]
    fn begin(&mut self, cause: Cause, now_ns: u64, limits: &EjectionLimits) {
        // A hint isn't one of the row, so that a server which ends connections by resets isn't out for long.
        if cause != Cause::Resets {
            self.ejections = self.ejections.saturating_add(1);
        }
        (self.cause, self.is_claimed) = (cause, false);
        self.until_ns = now_ns.saturating_add(duration_ns(self.ejections, cause, limits));
    }

    /// An ejection for resets is over with its time, as no trial ends it. Its row isn't.
    #[inline(always)]
    fn end_resets(&mut self, now_ns: u64, limits: &EjectionLimits) {
        if self.cause == Cause::Resets && !self.is_ejected(now_ns, limits) {
            self.cause = Cause::None;
            self.until_ns = self.until_ns.min(now_ns);
        }
    }

    #[inline(always)]
    fn end(&mut self, now_ns: u64) {
        if self.cause != Cause::None {
            (self.cause, self.is_claimed) = (Cause::None, false);
            self.until_ns = now_ns;
        }
    }
}

/// How long the nth ejection in a row lasts: the base, doubled each time; for resets a tenth of the base.
#[inline(always)]
fn duration_ns(ejections: u8, cause: Cause, limits: &EjectionLimits) -> u64 {
    if cause == Cause::Resets {
        let tenth = limits.base_ns / 10;
        return if tenth < limits.max_ns { tenth } else { limits.max_ns };
    }
    let base_ns = limits.base_ns;
    let n_doublings = ejections.saturating_sub(1).min(16);
    // A base of more than 2^47 ns, 39 hours, is beyond the longest time without being doubled.
    let doubled = base_ns.min(1 << 47) << n_doublings;
    doubled.min(limits.max_ns)
}

/// The time after which pending connections to a backend are silence, in microseconds.
#[inline(always)]
pub fn silence_us(connect_us: u32, limits: &EjectionLimits) -> u32 {
    if connect_us == 0 {
        return SILENCE_UNKNOWN_US;
    }
    let multiple = connect_us.saturating_mul(u32::from(limits.silence));
    multiple.clamp(*SILENCE_US.start(), *SILENCE_US.end())
}

/// Whether a backend is silent: since then, by the low 32 bits of CLOCK_MONOTONIC in microseconds,
/// connections are pending and none was answered.
///
/// The clock of another processor may be ahead by a little: a time that is yet to come isn't long ago.
#[inline(always)]
pub fn is_silent(
    pending: i32,
    unanswered_since_us: u32,
    connect_us: u32,
    now_us: u32,
    limits: &EjectionLimits,
) -> bool {
    if pending <= 0 || unanswered_since_us == 0 || limits.silence == 0 {
        return false;
    }
    let waited_us = now_us.wrapping_sub(unanswered_since_us);
    waited_us <= i32::MAX as u32 && waited_us > silence_us(connect_us, limits)
}

#[cfg(test)]
mod tests;

//! The choice of a backend, in one order:
//!
//! 1. the eligible backends of the first group;
//! 2. where none is left, or more than a part of the group is ejected, those of the spare set as well:
//!    it takes what the ejected ones had, as far as that makes it no busier than the first group;
//! 3. where those have none either, backends that are ejected for silence, resets or failures;
//! 4. last, those that refuse. Drained ones never.
//!
//! The common path looks at one or two backends and finds them eligible. Once it meets one that isn't,
//! all slots of the range are counted: the part that is ejected is exact, and a backend that is
//! eligible is found wherever there is one. As such a backend is met in proportion to their number,
//! the count costs a connection as much on average as looking at each ejected backend once or twice.

use crate::{
    Algorithm, Ejection, EjectionLimits, Load, MAGLEV_ENTRIES_PER_SLOT, MAX_SERVICE_BACKENDS,
    N_GROUPS, RAMP_ONE, Slot, SlotRange, SlowStart, Standing, is_silent, key_hash, maglev_entry,
    maglev_entry_of, select, side, turn,
};

/// How often a backend is drawn before one that ramps up is taken as it is, and, once the range was
/// counted, before an eligible one is taken from the count.
const ATTEMPTS: u32 = 4;
/// One of so many choices by latency is of one random backend, so that a time that was measured long
/// ago and was bad is measured again. A power of two.
const LATENCY_EXPLORES: u32 = 32;

/// What the choice reads of a backend, each word as it is now.
pub trait BackendWords: Copy {
    /// Open connections from this node.
    fn in_flight(self) -> i32;
    /// Of these, the ones that aren't established.
    fn pending(self) -> i32;
    /// Since when connections are pending and none was answered, see [`is_silent`].
    fn unanswered_since_us(self) -> u32;
    /// The average time from connect() to established in microseconds; 0 where it isn't known.
    fn connect_us(self) -> u32;
    /// The average round-trip time in microseconds; 0 where it isn't known.
    fn srtt_us(self) -> u32;
    /// The weight, at least 1.
    fn weight(self) -> u16;
    /// When it was added beside others, by CLOCK_MONOTONIC; 0 where it doesn't ramp up.
    fn added_ns(self) -> u64;
    /// Its ejection.
    fn ejection(self) -> Ejection;
    /// Whether it gets no new connections.
    fn is_drained(self) -> bool;
}

/// The backends of a service that a connection can reach.
pub trait Candidates {
    /// See [`Candidates::words`].
    type Words: BackendWords;
    /// The slots of a group, of [`N_GROUPS`]. By Maglev its table follows them.
    fn range(&self, group: usize) -> SlotRange;
    /// A slot, by its index.
    fn slot(&self, slot: u32) -> Option<Slot>;
    /// A backend, by its index.
    fn words(&self, backend_idx: u32) -> Option<Self::Words>;
}

/// How a service's backends are chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// The algorithm.
    pub algorithm: Algorithm,
    /// How new backends ramp up; not by Maglev.
    pub slow_start: SlowStart,
    /// What ejects.
    pub limits: EjectionLimits,
}

/// A connection for which a backend is chosen.
#[derive(Clone, Copy, Debug)]
pub struct Connection<R> {
    /// The time, by CLOCK_MONOTONIC.
    pub now_ns: u64,
    /// The connections of the service before this one, for round-robin.
    pub n_before: u64,
    /// What Maglev hashes.
    pub key: u64,
    /// A backend that just failed this client, which is avoided if it can be; `u32::MAX` for none.
    pub avoid: u32,
    /// Returns numbers that are uniform over their whole range.
    pub random: R,
}

/// The backend that a connection goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Its index.
    pub backend_idx: u32,
    /// Its group.
    pub group: usize,
    /// How it stands. Of [`Standing::Trial`] the caller claims the trial.
    pub standing: Standing,
    /// A backend that was met and is silent: the caller applies [`Sign::Silence`](crate::Sign::Silence) to it, so that it is
    /// ejected; `u32::MAX` for none.
    pub silent: u32,
}

/// Why there is no backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoChoice {
    /// The groups are empty.
    Empty,
    /// All backends are drained.
    Drained,
    /// A range leads to a slot or a backend that isn't there.
    Inconsistent,
}

/// Chooses a backend.
///
/// # Errors
/// See [`NoChoice`].
#[inline(always)]
pub fn choose<C: Candidates>(
    candidates: &C,
    policy: &Policy,
    connection: &Connection<impl Fn() -> u32>,
) -> Result<Choice, NoChoice> {
    let chooser = Chooser { candidates, policy, connection };
    let mut group = 0;
    while group < N_GROUPS {
        let range = candidates.range(group);
        if range.n_slots != 0 {
            let drawn = chooser.draw(range, 0, true)?;
            return match drawn.found {
                Some(found) => Ok(found.choice(group, drawn.silent)),
                None => chooser.choose_in_order(group, range, drawn.silent),
            };
        }
        group += 1;
    }
    Err(NoChoice::Empty)
}

const NONE: u32 = u32::MAX;

struct Chooser<'a, C, R> {
    candidates: &'a C,
    policy: &'a Policy,
    connection: &'a Connection<R>,
}

/// A backend that was looked at.
#[derive(Clone, Copy)]
struct Seen<W> {
    backend_idx: u32,
    words: W,
    standing: Standing,
    /// Whether it is ejected, or will be for its silence, or awaits its trial.
    is_ejected: bool,
    is_silent: bool,
    ramp: u32,
}

impl<W: BackendWords> Seen<W> {
    #[inline(always)]
    fn choice(&self, group: usize, silent: u32) -> Choice {
        Choice { backend_idx: self.backend_idx, group, standing: self.standing, silent }
    }

    #[inline(always)]
    fn load(&self) -> Load {
        let (connect_us, srtt_us) = (self.words.connect_us(), self.words.srtt_us());
        Load {
            in_flight: self.words.in_flight(),
            weight: u32::from(self.words.weight()) * self.ramp,
            cost_us: if connect_us > srtt_us { connect_us } else { srtt_us },
        }
    }
}

/// What came of some attempts.
struct Drawn<W> {
    found: Option<Seen<W>>,
    silent: u32,
}

/// A range, counted.
struct Count {
    /// Backends that aren't drained.
    n: u32,
    /// Of these, those that may be selected, trials included.
    n_eligible: u32,
    /// Of these, those that are ejected, trials included.
    n_ejected: u32,
    eligible: Best,
    suspect: Best,
    refusing: Best,
}

impl Count {
    /// Whether a connection that came to an ejected backend of the first group goes to another one of
    /// that group, rather than to the spare set. `random` is uniform over its whole range.
    ///
    /// Those that come to an eligible backend stay: e of n. Of the others the spare set, which has s,
    /// takes what the ejected ones had, but no more than makes its backends as busy as the first
    /// group's: in all s of e + s. So of the others e (n - e - s) of (e + s) (n - e) stay.
    #[inline(always)]
    fn keeps(&self, spare: &Count, random: u32) -> bool {
        let (n, e, s) =
            (u64::from(self.n), u64::from(self.n_eligible), u64::from(spare.n_eligible));
        // Numbers up to 2^12, so products are below 2^58.
        u64::from(random) * ((e + s) * (n - e)) < (e * n.saturating_sub(e + s)) << 32
    }
}

/// The one of the largest number, of some that are numbered at random: each of them is as likely.
#[derive(Clone, Copy)]
struct Best {
    number: u32,
    backend_idx: u32,
}

impl Best {
    const NONE: Best = Best { number: 0, backend_idx: NONE };

    #[inline(always)]
    fn offer(&mut self, number: u32, backend_idx: u32) {
        if self.backend_idx == NONE || number > self.number {
            *self = Best { number, backend_idx };
        }
    }
}

impl<C: Candidates, R: Fn() -> u32> Chooser<'_, C, R> {
    /// Draws until an eligible backend is found, at most [`ATTEMPTS`] times; where `is_strict`, only
    /// until one comes first that isn't.
    #[inline(always)]
    fn draw(
        &self,
        range: SlotRange,
        first_attempt: u32,
        is_strict: bool,
    ) -> Result<Drawn<C::Words>, NoChoice> {
        let mut silent = NONE;
        let mut attempt = 0;
        while attempt < ATTEMPTS {
            let random = (self.connection.random)();
            let first = self.look(self.first(range, first_attempt + attempt, random)?)?;
            if first.is_silent {
                silent = first.backend_idx;
            }
            if is_strict && !first.standing.is_eligible() {
                break;
            }
            let mut second = first;
            let mut n_seconds = if self.compares(random) { 0 } else { ATTEMPTS };
            while n_seconds < ATTEMPTS {
                n_seconds += 1;
                let slot = |idx| self.slot(range, idx);
                let drawn = select((self.connection.random)(), range.n_slots, slot);
                second = self.look(drawn.ok_or(NoChoice::Inconsistent)?)?;
                if second.is_silent {
                    silent = second.backend_idx;
                }
                if second.standing.is_eligible() {
                    break;
                }
            }
            // A new backend is accepted as often as it has come up.
            let is_last = attempt + 1 == ATTEMPTS;
            let is_first = first.standing.is_eligible() && (is_last || self.accepts(&first));
            let is_second = second.backend_idx != first.backend_idx
                && second.standing.is_eligible()
                && (is_last || self.accepts(&second));
            let found = match (is_first, is_second) {
                (true, true) if self.is_better(&second, &first) => second,
                (true, _) => first,
                (false, true) => second,
                (false, false) => {
                    attempt += 1;
                    continue;
                }
            };
            return Ok(Drawn { found: Some(found), silent });
        }
        Ok(Drawn { found: None, silent })
    }

    /// Chooses in the order that the module describes, from a group and those after it.
    #[inline(always)]
    fn choose_in_order(
        &self,
        group: usize,
        range: SlotRange,
        silent: u32,
    ) -> Result<Choice, NoChoice> {
        let seed = match self.policy.algorithm {
            Algorithm::Maglev => key_hash(self.connection.key, u32::MAX),
            _ => (self.connection.random)(),
        };
        let first = self.count(range, seed)?;
        let mut chosen = (group, range, first.eligible);
        let (mut suspect, mut refusing) = ((group, first.suspect), (group, first.refusing));
        let mut n = first.n;
        let limit = u64::from(first.n) * u64::from(self.policy.limits.share);
        if first.n_eligible == 0 || u64::from(first.n_ejected) * 256 > limit {
            let mut spare_group = group + 1;
            while spare_group < N_GROUPS {
                let range = self.candidates.range(spare_group);
                let spare = self.count(range, seed)?;
                n += spare.n;
                if suspect.1.backend_idx == NONE {
                    suspect = (spare_group, spare.suspect);
                }
                if refusing.1.backend_idx == NONE {
                    refusing = (spare_group, spare.refusing);
                }
                if spare.n_eligible != 0 {
                    if !first.keeps(&spare, seed) {
                        chosen = (spare_group, range, spare.eligible);
                    }
                    break;
                }
                spare_group += 1;
            }
        }
        let (group, range, eligible) = chosen;
        if eligible.backend_idx != NONE {
            let drawn = self.draw(range, 1, false)?;
            let silent = if drawn.silent == NONE { silent } else { drawn.silent };
            let found = match drawn.found {
                Some(found) => found,
                None => self.look(eligible.backend_idx)?,
            };
            return Ok(found.choice(group, silent));
        }
        let (group, last) = if suspect.1.backend_idx == NONE { refusing } else { suspect };
        if last.backend_idx != NONE {
            return Ok(self.look(last.backend_idx)?.choice(group, silent));
        }
        Err(if n == 0 { NoChoice::Drained } else { NoChoice::Inconsistent })
    }

    /// Counts a range. A range has a slot for each backend.
    #[inline(always)]
    fn count(&self, range: SlotRange, seed: u32) -> Result<Count, NoChoice> {
        let mut count = Count {
            n: 0,
            n_eligible: 0,
            n_ejected: 0,
            eligible: Best::NONE,
            suspect: Best::NONE,
            refusing: Best::NONE,
        };
        let mut idx = 0;
        while idx < MAX_SERVICE_BACKENDS && idx < range.n_slots {
            let slot = self.slot(range, idx).ok_or(NoChoice::Inconsistent)?;
            let Seen { backend_idx, standing, is_ejected, .. } = self.look(slot.backend)?;
            idx += 1;
            if standing == Standing::Drained {
                continue;
            }
            count.n += 1;
            count.n_ejected += u32::from(is_ejected);
            let number = key_hash(u64::from(seed) << 32 | u64::from(backend_idx), 0);
            match standing {
                Standing::Eligible | Standing::Trial => {
                    count.n_eligible += 1;
                    count.eligible.offer(number, backend_idx);
                }
                Standing::Suspect => count.suspect.offer(number, backend_idx),
                Standing::Refusing => count.refusing.offer(number, backend_idx),
                Standing::Drained => {}
            }
        }
        Ok(count)
    }

    #[inline(always)]
    fn slot(&self, range: SlotRange, idx: u32) -> Option<Slot> {
        self.candidates.slot(range.first_slot.wrapping_add(idx))
    }

    /// The backend that an attempt comes to first.
    #[inline(always)]
    fn first(&self, range: SlotRange, attempt: u32, random: u32) -> Result<u32, NoChoice> {
        let n_slots = range.n_slots;
        let slot = |idx| self.slot(range, idx);
        let found = match self.policy.algorithm {
            Algorithm::Maglev => {
                let entry = maglev_entry(key_hash(self.connection.key, attempt), n_slots);
                let place = n_slots.wrapping_add(entry / MAGLEV_ENTRIES_PER_SLOT);
                slot(place).and_then(|four| {
                    let word: u64 = zerocopy::transmute!(four);
                    Some(slot(maglev_entry_of(word, entry))?.backend)
                })
            }
            // Whose turn it isn't comes at random, or the next one would have two turns.
            Algorithm::RoundRobin if attempt == 0 => turn(self.connection.n_before, n_slots)
                .and_then(|(slot_idx, coin)| side(slot_idx, coin, slot)),
            _ => select(random, n_slots, slot),
        };
        found.ok_or(NoChoice::Inconsistent)
    }

    /// Whether a second backend is drawn. The low bits of the number are none that chose the first.
    #[inline(always)]
    fn compares(&self, random: u32) -> bool {
        match self.policy.algorithm {
            Algorithm::Least => true,
            Algorithm::Latency => !random.is_multiple_of(LATENCY_EXPLORES),
            _ => false,
        }
    }

    #[inline(always)]
    fn is_better(&self, one: &Seen<C::Words>, other: &Seen<C::Words>) -> bool {
        match self.policy.algorithm {
            Algorithm::Latency => one.load().is_quicker(other.load()),
            _ => one.load().is_less(other.load()),
        }
    }

    #[inline(always)]
    fn accepts(&self, seen: &Seen<C::Words>) -> bool {
        seen.ramp >= RAMP_ONE || (self.connection.random)() % RAMP_ONE < seen.ramp
    }

    #[inline(always)]
    fn look(&self, backend_idx: u32) -> Result<Seen<C::Words>, NoChoice> {
        let words = self.candidates.words(backend_idx).ok_or(NoChoice::Inconsistent)?;
        let Policy { algorithm, slow_start, ref limits } = *self.policy;
        let now_ns = self.connection.now_ns;
        let ejected = words.ejection().standing(now_ns, limits);
        let is_silent = ejected == Standing::Eligible
            && words.pending() > 0
            && is_silent(
                words.pending(),
                words.unanswered_since_us(),
                words.connect_us(),
                (now_ns / 1_000) as u32,
                limits,
            );
        let standing = if words.is_drained() {
            Standing::Drained
        } else if is_silent {
            Standing::Suspect
        } else {
            match ejected {
                Standing::Eligible | Standing::Trial if backend_idx == self.connection.avoid => {
                    Standing::Suspect
                }
                standing => standing,
            }
        };
        // Not what this client alone avoids.
        let is_ejected = is_silent || ejected != Standing::Eligible;
        let ramp = match words.added_ns() {
            0 => RAMP_ONE,
            _ if slow_start.per_tick == 0 || algorithm == Algorithm::Maglev => RAMP_ONE,
            // Of another processor's clock: it was added just now.
            added_ns => slow_start.ramp(now_ns.saturating_sub(added_ns)),
        };
        Ok(Seen { backend_idx, words, standing, is_ejected, is_silent, ramp })
    }
}

#[cfg(test)]
mod tests;

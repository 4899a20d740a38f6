//! The choice of a backend, in one order:
//!
//! 1. the eligible backends of the first group;
//! 2. where none is left, or more than a part of the group is ejected, those of the spare set as well:
//!    it takes what the ejected ones had, as far as that makes it no busier than the first group;
//! 3. where those have none either, backends that are ejected for silence, resets or failures;
//! 4. last, those that refuse.
//!
//! The common path ([`choose`]) looks at one or two backends and finds them eligible. If the first
//! isn't, [`choose_in_order`] looks at the service's backends one after the other. As such a backend is
//! met in proportion to their number, that costs a connection as much on average as looking at each
//! ejected backend a few times. It looks at [`MAX_LOOKED_AT`] of a group at most, from a random one on,
//! because the verifier of the kernel follows each: so for a larger group the ejected part is that of a
//! sample, and an eligible backend is found if the sample has one.

use core::hint::black_box;

use crate::{
    Algorithm, Backend, BalanceSettings, Cause, EjectionWord, Load, MAGLEV_ENTRIES_PER_SLOT,
    N_GROUPS, RAMP_ONE, Slot, SlotRange, SlowStart, Standing, is_silent, key_hash, maglev_entry,
    maglev_entry_of, mix, select, side, turn,
};

/// How many backends of a group are looked at, once one was met that isn't eligible.
pub const MAX_LOOKED_AT: u32 = 32;
/// One of so many choices by latency is of one random backend, so that a time that was measured long
/// ago and was bad is measured again. A power of two.
const LATENCY_EXPLORES: u32 = 32;

/// No backend.
pub const NO_BACKEND: u32 = u32::MAX;

/// What the choice reads of a backend ([`BackendEntry`](crate::BackendEntry)), each word as it is now.
pub trait BackendWords: Copy {
    /// Where to connect to.
    fn backend(self) -> Backend;
    /// The weight, at least 1.
    fn weight(self) -> u16;
    /// See [`BackendOutcomes::in_flight`](crate::BackendOutcomes::in_flight).
    fn in_flight(self) -> i32;
    /// See [`BackendOutcomes::pending`](crate::BackendOutcomes::pending).
    fn pending(self) -> i32;
    /// See [`BackendOutcomes::ejection`](crate::BackendOutcomes::ejection).
    fn ejection(self) -> EjectionWord;
    /// See [`BackendOutcomes::unanswered_since_us`](crate::BackendOutcomes::unanswered_since_us).
    fn unanswered_since_us(self) -> u32;
    /// See [`BackendOutcomes::connect_us`](crate::BackendOutcomes::connect_us).
    fn connect_us(self) -> u32;
    /// See [`BackendOutcomes::srtt_us`](crate::BackendOutcomes::srtt_us).
    fn srtt_us(self) -> u32;
    /// See [`BackendOutcomes::added_ms`](crate::BackendOutcomes::added_ms).
    fn added_ms(self) -> u32;
}

/// An entry as a value, for the host.
#[cfg(not(target_arch = "bpf"))]
impl BackendWords for crate::BackendEntry {
    fn backend(self) -> Backend {
        self.backend
    }

    fn weight(self) -> u16 {
        self.backend.weight.max(1)
    }

    fn in_flight(self) -> i32 {
        self.outcomes.in_flight
    }

    fn pending(self) -> i32 {
        self.outcomes.pending
    }

    fn ejection(self) -> EjectionWord {
        self.outcomes.ejection
    }

    fn unanswered_since_us(self) -> u32 {
        self.outcomes.unanswered_since_us
    }

    fn connect_us(self) -> u32 {
        self.outcomes.connect_us
    }

    fn srtt_us(self) -> u32 {
        self.outcomes.srtt_us
    }

    fn added_ms(self) -> u32 {
        self.outcomes.added_ms
    }
}

/// The backends of a service that a connection can reach, and what the choice depends on. Each method is
/// called only where it decides.
pub trait Candidates {
    /// See [`Candidates::words`].
    type Words: BackendWords;
    /// The slots of a group, of [`N_GROUPS`]. By Maglev its table follows them.
    fn range(&self, group: usize) -> SlotRange;
    /// A slot, by its index.
    fn slot(&self, slot: u32) -> Option<Slot>;
    /// A backend, by its index.
    fn words(&self, backend_idx: u32) -> Option<Self::Words>;
    /// The algorithm.
    fn algorithm(&self) -> Algorithm;
    /// What ejects, and how new backends ramp up.
    fn settings(&self) -> BalanceSettings;
    /// The connections of the service before this one, for round-robin.
    fn n_before(&self) -> u64;
    /// What Maglev hashes of the connection.
    fn key(&self) -> u64;
    /// Whether it is by TCP. A backend's TCP port that refuses or resets shows nothing of its UDP port.
    fn is_tcp(&self) -> bool;
    /// The time, by CLOCK_MONOTONIC.
    fn now_ns(&self) -> u64;
    /// A number that is uniform over its whole range.
    fn random(&self) -> u32;
    /// [`state_at`] of a backend. It and the next are methods, so that the kernel's programs can make them functions of
    /// their own, each of which the verifier follows once.
    fn state_at(&self, backend_idx: u32, now_ns: u64, ramps: bool) -> State;
    /// [`sample`].
    fn sample(&self, scan: Scan) -> Sample;
    /// [`choose_in_order`].
    fn choose_in_order(&self, walk: Walk) -> PackedChoice;
}

/// Why a backend was chosen, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct ChoiceReason(pub u8);

impl ChoiceReason {
    /// It is the only one.
    pub const ONLY: ChoiceReason = ChoiceReason(0);
    /// At random, by weight.
    pub const RANDOM: ChoiceReason = ChoiceReason(1);
    /// It is its turn.
    pub const TURN: ChoiceReason = ChoiceReason(2);
    /// It is the better of two random ones.
    pub const BETTER: ChoiceReason = ChoiceReason(3);
    /// Maglev's table has it for the connection's key.
    pub const KEY: ChoiceReason = ChoiceReason(4);
    /// Another one was met first that is ejected, or still ramps up.
    pub const INSTEAD: ChoiceReason = ChoiceReason(5);
    /// Its ejection is over, and this connection decides whether another one follows.
    pub const TRIAL: ChoiceReason = ChoiceReason(6);
    /// It is of the spare set.
    pub const SPARE: ChoiceReason = ChoiceReason(7);
    /// It is ejected, and so are all others.
    pub const EJECTED: ChoiceReason = ChoiceReason(8);

    /// What a person reads.
    pub const fn name(self) -> &'static str {
        match self {
            ChoiceReason::ONLY => "the only backend",
            ChoiceReason::RANDOM => "at random",
            ChoiceReason::TURN => "in turn",
            ChoiceReason::BETTER => "the better of two",
            ChoiceReason::KEY => "by its key",
            ChoiceReason::INSTEAD => "instead of an ejected or new one",
            ChoiceReason::TRIAL => "the trial of an ejected one",
            ChoiceReason::SPARE => "of the spare set",
            ChoiceReason::EJECTED => "ejected, as all others are",
            _ => "unknown",
        }
    }

    #[inline(always)]
    const fn of(algorithm: Algorithm) -> ChoiceReason {
        match algorithm {
            Algorithm::Random => ChoiceReason::RANDOM,
            Algorithm::RoundRobin => ChoiceReason::TURN,
            Algorithm::Least | Algorithm::Latency => ChoiceReason::BETTER,
            Algorithm::Maglev => ChoiceReason::KEY,
        }
    }
}

/// The backend that a connection goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice<W> {
    /// Its index.
    pub backend_idx: u32,
    /// Its words.
    pub words: W,
    /// Why it was chosen. For [`ChoiceReason::TRIAL`] the caller claims the trial.
    pub reason: ChoiceReason,
    /// A backend that was met and is silent: the caller applies [`Sign::Silence`](crate::Sign::Silence)
    /// to it, so that it is ejected; [`NO_BACKEND`] for none.
    pub silent: u32,
}

/// A range leads to a slot or a backend that isn't there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inconsistent;

/// What [`choose_in_order`] is given of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Walk {
    /// A number that is uniform over its whole range. By Maglev it is the key's hash.
    pub seed: u32,
    /// Whether the spare set may be used although the first group has eligible backends: the connection
    /// came to an ejected one.
    pub may_leave: bool,
    /// Whether new backends ramp up.
    pub ramps: bool,
    /// 0, of which the verifier doesn't know that it is: what it knows it tells apart in each round.
    pub zero: u64,
}

/// What [`sample`] is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scan {
    /// A group's slots.
    pub range: SlotRange,
    /// The time, by CLOCK_MONOTONIC.
    pub now_ns: u64,
    /// See [`Walk::seed`].
    pub seed: u32,
    /// See [`Walk::ramps`].
    pub ramps: bool,
    /// See [`Walk::zero`].
    pub zero: u64,
}

/// What [`choose_in_order`] chose: a backend's index, and above it the number of the reason. One word,
/// because a BPF function returns no more.
pub type PackedChoice = u64;

/// The backend's index and the reason.
#[inline(always)]
pub fn unpack(packed: PackedChoice) -> (u32, ChoiceReason) {
    (packed as u32, ChoiceReason((packed >> 32) as u8))
}

impl Draw {
    const WALK: u64 = 1 << 63;
    const MAY_LEAVE: u64 = 1 << 62;
    const RAMPS: u64 = 1 << 61;

    /// What was found, as one word: a [`PackedChoice`], or a [`Walk`].
    #[inline(always)]
    pub fn pack(found: Drawn) -> u64 {
        match found {
            Drawn::Backend { backend_idx, reason } => {
                u64::from(reason.0) << 32 | u64::from(backend_idx)
            }
            Drawn::None(Walk { seed, may_leave, ramps, .. }) => {
                let may_leave = if may_leave { Draw::MAY_LEAVE } else { 0 };
                Draw::WALK | may_leave | if ramps { Draw::RAMPS } else { 0 } | u64::from(seed)
            }
        }
    }

    /// The walk that such a word asks for, if it does.
    #[inline(always)]
    pub fn walk(word: u64) -> Option<Walk> {
        let has = |bit| word & bit != 0;
        let (may_leave, ramps) = (has(Draw::MAY_LEAVE), has(Draw::RAMPS));
        has(Draw::WALK).then_some(Walk { seed: word as u32, may_leave, ramps, zero: 0 })
    }
}

/// Chooses a backend from a group's range, which is the first that has any, or as [`choose_in_order`]
/// does.
///
/// # Errors
/// See [`Inconsistent`].
#[inline(always)]
pub fn choose<C: Candidates>(
    candidates: &C,
    group: usize,
    range: SlotRange,
) -> Result<Choice<C::Words>, Inconsistent> {
    let Draw { found, silent } = draw(candidates, group, range)?;
    let (backend_idx, reason) = match found {
        Drawn::Backend { backend_idx, reason } => (backend_idx, reason),
        Drawn::None(walk) => unpack(candidates.choose_in_order(walk)),
    };
    let words = candidates.words(backend_idx).ok_or(Inconsistent)?;
    Ok(Choice { backend_idx, words, reason, silent })
}

/// What [`draw`] came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drawn {
    /// A backend to send the connection to.
    Backend {
        /// Its index.
        backend_idx: u32,
        /// See [`Choice::reason`].
        reason: ChoiceReason,
    },
    /// None that is to be had: what [`choose_in_order`] is to be given.
    None(Walk),
}

/// The result of [`draw`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draw {
    /// The backend.
    pub found: Drawn,
    /// See [`Choice::silent`].
    pub silent: u32,
}

/// The common part of a choice: looks at one or two backends of a range.
///
/// # Errors
/// See [`Inconsistent`].
#[inline(always)]
pub fn draw<C: Candidates>(
    candidates: &C,
    group: usize,
    range: SlotRange,
) -> Result<Draw, Inconsistent> {
    let algorithm = candidates.algorithm();
    let ramps = algorithm != Algorithm::Maglev;
    let random = candidates.random();
    let first = look(candidates, first(candidates, algorithm, range, random)?, ramps)?;
    let mut silent = if first.state.is_silent() { first.backend_idx } else { NO_BACKEND };
    let mut found = first;
    let mut is_found = is_accepted(candidates, &first);
    // The low bits of the number are none that chose the first.
    let compares = match algorithm {
        Algorithm::Least => true,
        Algorithm::Latency => !random.is_multiple_of(LATENCY_EXPLORES),
        _ => false,
    };
    if compares && range.n_slots > 1 && first.state.is_eligible() {
        let slot = |idx| slot(candidates, range, idx);
        let drawn = select(candidates.random(), range.n_slots, slot).ok_or(Inconsistent)?;
        if drawn != first.backend_idx {
            let second = look(candidates, drawn, ramps)?;
            if second.state.is_silent() {
                silent = drawn;
            }
            if is_accepted(candidates, &second) {
                let (one, other) =
                    (load(first.words, first.state), load(second.words, second.state));
                if !is_found || is_better(algorithm, other, one) {
                    found = second;
                }
                is_found = true;
            }
        }
    }
    if is_found {
        let reason = if found.state.awaits_trial() {
            ChoiceReason::TRIAL
        } else if group != 0 {
            ChoiceReason::SPARE
        } else if range.n_slots == 1 {
            ChoiceReason::ONLY
        } else {
            ChoiceReason::of(algorithm)
        };
        let found = Drawn::Backend { backend_idx: found.backend_idx, reason };
        return Ok(Draw { found, silent });
    }
    let seed = match algorithm {
        Algorithm::Maglev => key_hash(candidates.key(), 1),
        _ => candidates.random(),
    };
    let walk = Walk { seed, may_leave: !first.state.is_eligible(), ramps, zero: 0 };
    Ok(Draw { found: Drawn::None(walk), silent })
}

/// How a backend stands at a time, in one word, as a BPF function returns it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct State(pub u64);

impl State {
    /// There is no such backend.
    pub const NONE: State = State(0);
    /// It is eligible and nothing is pending, ejected or new. The weight isn't set.
    const PLAIN: State = State(State::ELIGIBLE | (RAMP_ONE as u64) << State::RAMP);

    // What a connection prefers has the larger number.
    const REFUSING: u64 = 1;
    const SUSPECT: u64 = 2;
    const ELIGIBLE: u64 = 3;
    const TIER: u64 = 3;
    const TRIAL: u64 = 1 << 2;
    const SILENT: u64 = 1 << 3;
    /// The lower of two bits that are counted: whether it is eligible; and, 16 bits higher, whether it is
    /// ejected, will be for its silence, or awaits its trial.
    const COUNTS: u32 = 4;
    const EJECTED: u64 = 1 << (State::COUNTS + 16);
    /// The lowest bit of the part of its weight that it has, of [`RAMP_ONE`].
    const RAMP: u32 = 5;
    /// The lowest bit of its weight times that part: below 2^26, at least 1.
    const WEIGHT: u32 = 32;

    #[inline(always)]
    const fn tier(self) -> u64 {
        self.0 & State::TIER
    }

    #[inline(always)]
    const fn is_eligible(self) -> bool {
        self.tier() == State::ELIGIBLE
    }

    #[inline(always)]
    const fn has(self, bit: u64) -> bool {
        self.0 & bit != 0
    }

    /// Whether a connection may claim its trial.
    #[inline(always)]
    pub const fn awaits_trial(self) -> bool {
        self.has(State::TRIAL)
    }

    /// Whether nothing is known against it: it is neither ejected nor silent.
    #[inline(always)]
    pub const fn is_sound(self) -> bool {
        self.is_eligible() && !self.has(State::TRIAL | State::SILENT)
    }

    /// Whether it is to be ejected for its silence.
    #[inline(always)]
    pub const fn is_silent(self) -> bool {
        self.has(State::SILENT)
    }

    #[inline(always)]
    const fn ramp(self) -> u32 {
        (self.0 >> State::RAMP) as u32 & (2 * RAMP_ONE - 1)
    }
}

/// A backend that was looked at.
#[derive(Clone, Copy)]
struct Seen<W> {
    backend_idx: u32,
    words: W,
    state: State,
}

/// Looks at a backend. One of which nothing is pending, ejected or new costs neither the time nor the
/// settings.
#[inline(always)]
fn look<C: Candidates>(
    candidates: &C,
    backend_idx: u32,
    ramps: bool,
) -> Result<Seen<C::Words>, Inconsistent> {
    let words = candidates.words(backend_idx).ok_or(Inconsistent)?;
    let ejection = words.ejection();
    let is_plain = if ejection.cause == 0 {
        words.pending() <= 0 && words.added_ms() == 0
    } else {
        !candidates.is_tcp() && ejection.is_of_port()
    };
    let state = match is_plain {
        true => State::PLAIN,
        false => candidates.state_at(backend_idx, candidates.now_ns(), ramps),
    };
    Ok(Seen { backend_idx, words, state })
}

/// Whether a backend is eligible, and isn't so new that this connection is better sent to another one.
#[inline(always)]
fn is_accepted<C: Candidates>(candidates: &C, seen: &Seen<C::Words>) -> bool {
    let ramp = seen.state.ramp();
    seen.state.is_eligible() && (ramp >= RAMP_ONE || candidates.random() % RAMP_ONE < ramp)
}

/// How a backend stands at a time.
#[inline(always)]
pub fn state_at(
    words: impl BackendWords,
    settings: &BalanceSettings,
    now_ns: u64,
    ramps: bool,
) -> State {
    let (now_ms, now_us) = ((now_ns / 1_000_000) as u32, (now_ns / 1_000) as u32);
    let standing = standing(words.ejection(), now_ms, settings.max_ms);
    let pending = words.pending();
    let is_silent = standing == Standing::Eligible && pending > 0 && {
        let (since_us, connect_us) = (words.unanswered_since_us(), words.connect_us());
        is_silent(pending, since_us, connect_us, now_us, &settings.limits())
    };
    let eligible = State::ELIGIBLE | 1 << State::COUNTS;
    let bits = if is_silent {
        State::SUSPECT | State::EJECTED | State::SILENT
    } else {
        match standing {
            Standing::Eligible => eligible,
            Standing::Trial => eligible | State::EJECTED | State::TRIAL,
            Standing::Suspect => State::SUSPECT | State::EJECTED,
            Standing::Refusing => State::REFUSING | State::EJECTED,
        }
    };
    let added_ms = words.added_ms();
    let ramp = if ramps && added_ms != 0 { ramp(added_ms, now_ms, settings) } else { RAMP_ONE };
    let weight = u32::from(words.weight()) * ramp;
    State(bits | u64::from(ramp) << State::RAMP | u64::from(weight) << State::WEIGHT)
}

/// How a backend stands as far as it is ejected: [`Ejection::standing`](crate::Ejection::standing) of a
/// word, without the whole time. An end that is further away than any ejection lasts is of a clock that
/// went back.
#[inline(always)]
fn standing(ejection: EjectionWord, now_ms: u32, max_ms: u32) -> Standing {
    let cause = ejection.cause();
    if cause == Cause::None {
        return Standing::Eligible;
    }
    let left_ms = ejection.until_ms.wrapping_sub(now_ms);
    // Ends are rounded up.
    if left_ms.wrapping_sub(1) <= max_ms {
        return if cause == Cause::Refused { Standing::Refusing } else { Standing::Suspect };
    }
    if cause == Cause::Resets { Standing::Eligible } else { Standing::Trial }
}

/// How much of its weight a new backend has.
#[inline(always)]
fn ramp(added_ms: u32, now_ms: u32, settings: &BalanceSettings) -> u32 {
    let age_ms = now_ms.wrapping_sub(added_ms);
    // Of another processor's clock: it was added just now. Further ahead it is long ago.
    let age_ms = if age_ms.wrapping_neg() < 1_000 { 0 } else { age_ms };
    let slow_start = SlowStart { per_tick: settings.slow_start_per_tick };
    slow_start.ramp(u64::from(age_ms) * 1_000_000)
}

#[inline(always)]
fn load(words: impl BackendWords, state: State) -> Load {
    let (connect_us, srtt_us) = (words.connect_us(), words.srtt_us());
    Load {
        in_flight: words.in_flight(),
        weight: u32::from(words.weight()) * state.ramp(),
        cost_us: if connect_us > srtt_us { connect_us } else { srtt_us },
    }
}

#[inline(always)]
fn is_better(algorithm: Algorithm, one: Load, other: Load) -> bool {
    if algorithm == Algorithm::Latency { one.is_quicker(other) } else { one.is_less(other) }
}

#[inline(always)]
fn slot<C: Candidates>(candidates: &C, range: SlotRange, idx: u32) -> Option<Slot> {
    candidates.slot(range.first_slot.wrapping_add(idx))
}

/// The backend that a connection comes to first.
#[inline(always)]
fn first<C: Candidates>(
    candidates: &C,
    algorithm: Algorithm,
    range: SlotRange,
    random: u32,
) -> Result<u32, Inconsistent> {
    let slot = |idx| slot(candidates, range, idx);
    let found = match algorithm {
        Algorithm::Maglev => by_key(candidates, candidates.key(), range),
        Algorithm::RoundRobin => turn(candidates.n_before(), range.n_slots)
            .and_then(|(slot_idx, coin)| side(slot_idx, coin, slot)),
        _ => select(random, range.n_slots, slot),
    };
    found.ok_or(Inconsistent)
}

/// The backend for a key, by Maglev's table. None for a number that is no slot of the range.
#[inline(always)]
fn by_key<C: Candidates>(candidates: &C, key: u64, range: SlotRange) -> Option<u32> {
    let entry = maglev_entry(key_hash(key, 0), range.n_slots);
    let place = range.n_slots.wrapping_add(entry / MAGLEV_ENTRIES_PER_SLOT);
    let word: u64 = zerocopy::transmute!(slot(candidates, range, place)?);
    let slot_idx = maglev_entry_of(word, entry);
    if slot_idx >= range.n_slots {
        return None;
    }
    Some(slot(candidates, range, slot_idx)?.backend)
}

/// A group's backends that were looked at, in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Sample(pub u64);

impl Sample {
    /// The lowest bit of a slot whose backend is of the best tier, at random by weight, counted from the
    /// range's first.
    const PLACE: u32 = 16;
    /// The lowest bit of how many may be selected, trials included, in proportion to the whole group.
    const ELIGIBLE: u32 = 32;
    /// The lowest bit of how many are ejected, trials included, likewise.
    const EJECTED: u32 = 48;

    /// The best tier in which there are some; 0 where a slot or a backend isn't there.
    #[inline(always)]
    const fn tier(self) -> u64 {
        self.0 & State::TIER
    }

    #[inline(always)]
    const fn has_eligible(self) -> bool {
        self.tier() == State::ELIGIBLE
    }

    #[inline(always)]
    const fn n_eligible(self) -> u64 {
        self.0 >> Sample::ELIGIBLE & 0xffff
    }

    #[inline(always)]
    const fn n_ejected(self) -> u64 {
        self.0 >> Sample::EJECTED & 0xffff
    }

    #[inline(always)]
    const fn place(self) -> u32 {
        (self.0 >> Sample::PLACE) as u16 as u32
    }
}

/// The choice where a slot or a backend isn't there.
pub const INCONSISTENT: PackedChoice = NO_BACKEND as u64;

/// Chooses a backend in the order that the module describes, where the one that was drawn isn't to be had.
#[inline(always)]
pub fn choose_in_order<C: Candidates>(candidates: &C, walk: Walk) -> PackedChoice {
    let Walk { seed, ramps, zero, .. } = walk;
    let now_ns = candidates.now_ns();
    let mut best = Sample(zero);
    let mut best_group = 0;
    let mut next_group = 0;
    while next_group < N_GROUPS {
        // The compiler would write the round three times over, on a stack that isn't there.
        let group = black_box(next_group);
        next_group = group + 1;
        let range = candidates.range(group);
        if range.n_slots != 0 {
            let found = candidates.sample(Scan { range, now_ns, seed, ramps, zero });
            if found.tier() == 0 {
                return INCONSISTENT;
            }
            if best.tier() == 0 {
                (best, best_group) = (found, group);
                let share = u64::from(candidates.settings().share);
                let is_over = found.n_ejected() * 256 > u64::from(range.n_slots) * share;
                if found.has_eligible() && !(walk.may_leave && is_over) {
                    break;
                }
            } else if found.has_eligible() {
                if !best.has_eligible() || !keeps(best, found, seed) {
                    (best, best_group) = (found, group);
                }
                break;
            } else if found.tier() > best.tier() {
                (best, best_group) = (found, group);
            }
        }
    }
    packed(candidates, walk, now_ns, best_group, best).unwrap_or(INCONSISTENT)
}

/// The choice from a group's sample.
#[inline(always)]
fn packed<C: Candidates>(
    candidates: &C,
    walk: Walk,
    now_ns: u64,
    group: usize,
    sample: Sample,
) -> Option<PackedChoice> {
    let range = candidates.range(group);
    let backend_idx = slot(candidates, range, sample.place())?.backend;
    let mut reason = ChoiceReason::EJECTED;
    if sample.has_eligible() {
        let is_trial = candidates.state_at(backend_idx, now_ns, walk.ramps).awaits_trial();
        reason = match group {
            _ if is_trial => ChoiceReason::TRIAL,
            0 => ChoiceReason::INSTEAD,
            _ => ChoiceReason::SPARE,
        };
    }
    Some(u64::from(reason.0) << 32 | u64::from(backend_idx))
}

/// Whether a connection that came to an ejected backend of the first group goes to another one of that
/// group, rather than to the spare set.
///
/// Those that come to an eligible backend stay: e of n. Of the others the spare set, which has s,
/// takes what the ejected ones had, but no more than makes its backends as busy as the first
/// group's: in all s of e + s. So of the others e (n - e - s) of (e + s) (n - e) stay.
#[inline(always)]
fn keeps(first: Sample, spare: Sample, seed: u32) -> bool {
    let (e, s) = (first.n_eligible(), spare.n_eligible());
    let n = e + first.n_ejected();
    // Other bits than those that picked a backend.
    let random = mix(u64::from(seed)) >> 32;
    // Numbers up to 2^16 in theory, 2^12 in practice, so products are below 2^58.
    random * ((e + s) * (n - e)) < (e * n.saturating_sub(e + s)) << 32
}

/// Looks at a group's backends. A range has a slot for each. Those of the best tier are sampled by weight
/// (a reservoir of one, twice; Chao 1982), so that no second pass is needed.
///
/// A round has no branch but for what isn't there, as the verifier of 5.10, which a call keeps from
/// pruning (`mark_all_scalars_precise`), follows each to the end.
#[inline(always)]
pub fn sample(
    scan: Scan,
    slot: impl Fn(u32) -> Option<Slot>,
    state_at: impl Fn(u32) -> State,
) -> Sample {
    let Scan { range: SlotRange { first_slot, n_slots }, seed, zero, .. } = scan;
    // 1 where one number is less than the other, both below 2^62. Opaque to the compiler, which would make
    // a branch of it; a factor and no mask, as the verifier follows each value of a mask on its own
    // (`maybe_fork_scalars`).
    let less = |one: u64, other: u64| black_box(one.wrapping_sub(other) >> 63);
    // From any on, so that a sample isn't always of the same ones where not all are looked at.
    let mut place = (u64::from(seed) * u64::from(n_slots)) >> 32;
    let (mut counts, mut tier, mut sum, mut picked) = (zero, zero, zero, zero);
    let mut n_looked_at = 0;
    while n_looked_at < MAX_LOOKED_AT && n_looked_at < n_slots {
        let Some(slot) = slot(first_slot.wrapping_add(place as u32)) else { return Sample(0) };
        let state = state_at(slot.backend);
        if state == State::NONE {
            return Sample(0);
        }
        // Both counts at once.
        counts += state.0 >> State::COUNTS & (1 | 1 << 16);
        // A better tier starts from zero, a worse one counts nothing.
        let own_tier = state.tier();
        let is_better = less(tier, own_tier);
        let weight = (state.0 >> State::WEIGHT) * (1 ^ less(own_tier, tier));
        tier = tier.wrapping_add(is_better * own_tier.wrapping_sub(tier));
        // Below 2^26 each, and 2^31 in all.
        sum = sum * (1 ^ is_better) + weight;
        let hash = mix(u64::from(seed) << 32 | u64::from(slot.backend)) >> 40;
        let is_picked = less(hash * sum, weight << 24);
        picked = picked.wrapping_add(is_picked * place.wrapping_sub(picked));
        n_looked_at += 1;
        place += 1;
        place *= less(place, n_slots.into());
    }
    // Of the whole group: as it is, where all were looked at. Zero of none.
    let whole = |n: u64| (n * u64::from(n_slots)).checked_div(n_looked_at.into()).unwrap_or(0);
    let counts =
        whole(counts & 0xffff) << Sample::ELIGIBLE | whole(counts >> 16) << Sample::EJECTED;
    Sample(tier | picked << Sample::PLACE | counts)
}

#[cfg(test)]
mod tests;

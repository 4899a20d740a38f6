use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::string::String;
use std::vec::Vec;

use proptest::prelude::*;

use super::*;
use crate::{BackendEntry, Ejection, EjectionLimits, Sign, alias_table, maglev_table};

const NOW: u64 = 1_000_000_000_000;

/// A service, as values.
#[derive(Clone, Debug)]
struct Fleet {
    ranges: [SlotRange; N_GROUPS],
    slots: Vec<Slot>,
    backends: Vec<BackendEntry>,
}

impl Fleet {
    /// A service with these groups of backends, numbered throughout.
    fn new(groups: &[&[BackendEntry]]) -> Fleet {
        let mut fleet = Fleet {
            ranges: [SlotRange::default(); N_GROUPS],
            slots: Vec::new(),
            backends: Vec::new(),
        };
        for (range, group) in fleet.ranges.iter_mut().zip(groups) {
            let numbered = || (fleet.backends.len() as u32..).zip(*group);
            let weights: Vec<_> = numbered().map(|(idx, words)| (idx, words.weight())).collect();
            let first_slot = fleet.slots.len() as u32;
            *range = SlotRange { first_slot, n_slots: weights.len() as u32 };
            fleet.slots.extend(alias_table(&weights));
            let keyed: Vec<_> =
                numbered().map(|(idx, one)| (u64::from(idx), one.weight())).collect();
            let words = maglev_table(&keyed).into_iter();
            fleet.slots.extend(words.map(|word| -> Slot { zerocopy::transmute!(word) }));
            fleet.backends.extend(*group);
        }
        fleet
    }

    /// What a connection gets.
    fn choose<'a>(
        &'a self,
        policy: &'a Policy,
        n_before: u64,
        random: &'a dyn Fn() -> u32,
    ) -> Result<Choice<BackendEntry>, Inconsistent> {
        let (group, range) = (0..).zip(self.ranges).find(|(_, range)| range.n_slots != 0).unwrap();
        choose(&Connection { fleet: self, policy, n_before, random }, group, range)
    }

    /// What so many connections get.
    fn choices(&self, policy: &Policy, n: u64) -> Vec<Result<Choice<BackendEntry>, Inconsistent>> {
        let random = generator(7);
        (0..n).map(|n| self.choose(policy, n, &random)).collect()
    }

    /// The share of each backend of so many connections.
    fn shares(&self, policy: &Policy, n: u64) -> Vec<f64> {
        let mut shares = std::vec![0.0; self.backends.len()];
        for choice in self.choices(policy, n) {
            shares[choice.unwrap().backend_idx as usize] += 1.0 / n as f64;
        }
        shares
    }
}

/// How the backends are chosen.
#[derive(Clone, Copy, Debug)]
struct Policy {
    algorithm: Algorithm,
    settings: BalanceSettings,
    is_tcp: bool,
}

/// A connection to a service.
struct Connection<'a> {
    fleet: &'a Fleet,
    policy: &'a Policy,
    n_before: u64,
    random: &'a dyn Fn() -> u32,
}

impl Candidates for Connection<'_> {
    type Words = BackendEntry;

    fn range(&self, group: usize) -> SlotRange {
        self.fleet.ranges[group]
    }

    fn slot(&self, slot: u32) -> Option<Slot> {
        self.fleet.slots.get(slot as usize).copied()
    }

    fn words(&self, backend_idx: u32) -> Option<BackendEntry> {
        self.fleet.backends.get(backend_idx as usize).copied()
    }

    fn algorithm(&self) -> Algorithm {
        self.policy.algorithm
    }

    fn settings(&self) -> BalanceSettings {
        self.policy.settings
    }

    fn n_before(&self) -> u64 {
        self.n_before
    }

    fn key(&self) -> u64 {
        self.n_before
    }

    fn is_tcp(&self) -> bool {
        self.policy.is_tcp
    }

    fn now_ns(&self) -> u64 {
        NOW
    }

    fn random(&self) -> u32 {
        (self.random)()
    }

    fn state_at(&self, backend_idx: u32, now_ns: u64, ramps: bool) -> State {
        let words = self.words(backend_idx);
        words.map_or(State::NONE, |words| state_at(words, &self.policy.settings, now_ns, ramps))
    }

    fn sample(&self, scan: Scan) -> Sample {
        sample(scan, |slot| self.slot(slot), |idx| self.state_at(idx, scan.now_ns, scan.ramps))
    }

    fn choose_in_order(&self, walk: Walk) -> PackedChoice {
        choose_in_order(self, walk)
    }
}

/// Numbers that are the same each time.
fn generator(seed: u64) -> impl Fn() -> u32 {
    let state = Cell::new(seed);
    move || {
        state.set(state.get() + 1);
        key_hash(state.get(), 0)
    }
}

fn policy(algorithm: Algorithm) -> Policy {
    let settings = BalanceSettings {
        refused: 1,
        failures: 3,
        silence: 20,
        share: 128,
        base_ms: 1_000,
        max_ms: 300_000,
        ..BalanceSettings::default()
    };
    Policy { algorithm, settings, is_tcp: true }
}

/// An eligible backend of a weight.
fn weighing(weight: u16) -> BackendEntry {
    let mut entry = standing('E');
    entry.backend.weight = weight;
    entry
}

/// A backend that stands as a letter says: Eligible, Trial, Suspect, siLent, Refusing; or that reset
/// connections (P), which is Past, or is over and it is silent (Q).
fn standing(letter: char) -> BackendEntry {
    let limits = EjectionLimits::default();
    let mut entry = BackendEntry::default();
    entry.backend.weight = 1;
    entry.outcomes.connect_us = 300;
    let after = |sign, ago_ns| Ejection::default().after(sign, NOW - ago_ns, &limits);
    let reset = |ago_ns| {
        let reset = |one: Ejection, _| one.after(Sign::Reset, NOW - ago_ns, &limits);
        (0..3).fold(Ejection::default(), reset)
    };
    let ejection = match letter {
        'E' | 'L' => Ejection::default(),
        'P' | 'Q' => reset(limits.base_ns / 10),
        'T' => after(Sign::Refused, limits.base_ns),
        'S' => after(Sign::Silence, 0),
        'R' => after(Sign::Refused, 0),
        _ => unreachable!("no such letter"),
    };
    entry.outcomes.ejection = EjectionWord::of(ejection);
    if matches!(letter, 'L' | 'Q') {
        entry.outcomes.pending = 1;
        entry.outcomes.unanswered_since_us = (NOW / 1_000) as u32 - 20_001;
    }
    entry
}

/// A service whose groups are written one after the other, such as "EER|E".
fn fleet(groups: &str) -> Fleet {
    let groups: Vec<Vec<BackendEntry>> =
        groups.split('|').map(|group| group.chars().map(standing).collect()).collect();
    Fleet::new(&groups.iter().map(Vec::as_slice).collect::<Vec<_>>())
}

#[test]
fn backends_are_chosen_in_one_order() {
    // The groups, and which of the backends connections go to.
    let rows = [
        ("EEE", "xxx"),
        // One of three is ejected: the others of the first group.
        ("EER|EE", "xx-|--"),
        ("EES|EE", "xx-|--"),
        ("EEL|EE", "xx-|--"),
        // Half is no more than half.
        ("EERR|E", "xx--|-"),
        // More than half: the spare set as well.
        ("ERR|EE", "x--|xx"),
        ("ELL|ER|E", "x--|x-|-"),
        // One whose resets are over is like any other.
        ("EPP|E", "xxx|-"),
        ("EPRR|E", "xx--|-"),
        ("EQQ|E", "x--|x"),
        // None left.
        ("RRR|EE|E", "---|xx|-"),
        ("RRR|RS|E", "---|--|x"),
        ("RRR||E", "---||x"),
        // A trial is eligible, but its backend isn't known to be well.
        ("ET", "xx"),
        ("TRR|E", "x--|x"),
        ("TRR", "x--"),
        // None in the spare set either: silent ones, of the first group before those of others.
        ("RSR|RS|R", "-x-|--|-"),
        ("RRR|RS|L", "---|-x|-"),
        ("LL|R", "xx|-"),
        // Refusing ones last.
        ("RRR|RR|R", "xxx|--|-"),
        ("R", "x"),
        // The first group that has any is the first.
        ("|EE|E", "|xx|-"),
        ("||RE", "||-x"),
    ];
    for (groups, expected) in rows {
        let fleet = fleet(groups);
        for algorithm in Algorithm::ALL {
            let chosen = fleet.choices(&policy(algorithm), 500);
            let chosen: BTreeSet<u32> =
                chosen.into_iter().map(|choice| choice.unwrap().backend_idx).collect();
            let mut idx = 0;
            let mark = |letter: char| {
                if letter == '|' {
                    return '|';
                }
                idx += 1;
                if chosen.contains(&(idx - 1)) { 'x' } else { '-' }
            };
            let marks: String = groups.chars().map(mark).collect();
            assert_eq!(marks, expected, "{groups} by {algorithm:?}");
        }
    }
}

#[test]
fn a_slot_or_a_backend_that_isnt_there_is_inconsistent() {
    let mut one = fleet("EE");
    one.backends.pop();
    one.ranges[0].first_slot = 1;
    // Found by looking at the others.
    let mut other = fleet("RE");
    other.backends.pop();
    for (fleet, random) in [(one, 0), (other, 0)] {
        for algorithm in [Algorithm::Random, Algorithm::RoundRobin, Algorithm::Least] {
            let choice = fleet.choose(&policy(algorithm), 0, &|| random);
            assert_eq!(choice, Err(Inconsistent), "{algorithm:?}");
        }
    }
}

#[test]
fn a_number_in_maglevs_table_that_is_no_slot_of_the_range_is_inconsistent() {
    let mut fleet = fleet("EE");
    for table in &mut fleet.slots[2..] {
        *table = zerocopy::transmute!(u64::from_ne_bytes([2, 0].repeat(4).try_into().unwrap()));
    }
    // A slot that isn't the range's, with a backend.
    let choice = fleet.choose(&policy(Algorithm::Maglev), 0, &|| 0);
    assert_eq!(choice, Err(Inconsistent));
}

#[test]
fn by_udp_a_tcp_port_that_refuses_is_as_good_as_any() {
    let shares = |letters, is_tcp| {
        fleet(letters).shares(&Policy { is_tcp, ..policy(Algorithm::Random) }, 2_000)[0]
    };
    assert_eq!(shares("RE", true), 0.0);
    assert!((shares("RE", false) - 0.5).abs() < 0.05);
    // Silence is of the host.
    assert_eq!((shares("SE", true), shares("SE", false)), (0.0, 0.0));
}

#[test]
fn the_only_eligible_backend_is_found_among_as_many_as_are_looked_at() {
    for (others, only) in [('R', 'E'), ('R', 'S'), ('S', 'T')] {
        let mut backends = std::vec![standing(others); MAX_LOOKED_AT as usize];
        backends[MAX_LOOKED_AT as usize - 1] = standing(only);
        let fleet = Fleet::new(&[&backends]);
        for algorithm in Algorithm::ALL {
            for choice in fleet.choices(&policy(algorithm), 5) {
                assert_eq!(
                    choice.unwrap().backend_idx,
                    MAX_LOOKED_AT - 1,
                    "{only} by {algorithm:?}"
                );
            }
        }
    }
}

#[test]
fn of_a_larger_group_a_sample_decides() {
    // One of twenty is eligible, and the group is far beyond the share.
    let n = 4_000;
    let letter = |idx| if idx % 20 == 3 { 'E' } else { 'R' };
    let backends: Vec<BackendEntry> = (0..n).map(|idx| standing(letter(idx))).collect();
    let spare = std::vec![standing('E'); n];
    for algorithm in Algorithm::ALL {
        let shares = Fleet::new(&[&backends, &spare]).shares(&policy(algorithm), 4_000);
        let first: f64 = shares[..n].iter().sum();
        // As many as were lost are there, so that those that are left keep what they had.
        assert!((first - 0.05).abs() < 0.015, "{first} by {algorithm:?}");
        let refusing = (0..n).filter(|idx| idx % 20 != 3).map(|idx| shares[idx]);
        assert_eq!(refusing.sum::<f64>(), 0.0, "{algorithm:?}");
        // Each eligible one has its part.
        let shares = Fleet::new(&[&backends]).shares(&policy(algorithm), 10_000);
        let most = shares.iter().copied().fold(0.0, f64::max);
        assert!(most < 4.0 / 200.0, "{most} by {algorithm:?}");
    }
}

#[test]
fn a_word_stands_as_its_ejection_does() {
    let limits = EjectionLimits::default();
    for sign in [Sign::Refused, Sign::Silence, Sign::Failed, Sign::Reset] {
        for n in 1..30 {
            for ago_ms in [0, 1, 99, 100, 101, 999, 1_000, 1_001, 300_000] {
                let ejection = (0..n).fold(Ejection::default(), |ejection, _| {
                    ejection.after(sign, NOW - ago_ms * 1_000_000, &limits)
                });
                let word = standing_of(EjectionWord::of(ejection));
                assert_eq!(word, ejection.standing(NOW, &limits), "{ejection:?}");
            }
        }
    }
    // A clock that went back.
    let until_ms = (NOW / 1_000_000) as u32 + 300_002;
    let ahead = EjectionWord { until_ms, cause: 1, ..EjectionWord::default() };
    assert_eq!(standing_of(ahead), Standing::Trial);
}

fn standing_of(word: EjectionWord) -> Standing {
    super::standing(word, (NOW / 1_000_000) as u32, 300_000)
}

/// How far the shares are from what is due, in the worst case, in percent of what is due.
fn worst_error(shares: &[f64], due: impl Iterator<Item = f64> + Clone) -> f64 {
    let sum: f64 = due.clone().sum();
    let errors = shares.iter().zip(due).map(|(share, due)| (share * sum / due - 1.0).abs() * 100.0);
    errors.fold(0.0, f64::max)
}

#[test]
fn shares_follow_weights() {
    // The algorithm, and the largest error of a share in percent over 100,000 connections. Chance alone
    // has a standard deviation of 2.3% for the smallest share.
    let rows = [
        (Algorithm::Random, 5.0),
        (Algorithm::RoundRobin, 0.2),
        (Algorithm::Least, 5.0),
        (Algorithm::Latency, 5.0),
        (Algorithm::Maglev, 5.0),
    ];
    let backends: Vec<BackendEntry> = (1..=10).map(weighing).collect();
    let fleet = Fleet::new(&[&backends]);
    let due = backends.iter().map(|words| f64::from(words.weight()));
    for (algorithm, percent) in rows {
        let shares = fleet.shares(&policy(algorithm), 100_000);
        let error = worst_error(&shares, due.clone());
        assert!(error <= percent, "{error}% by {algorithm:?}");
    }
}

#[test]
fn by_round_robin_each_backend_of_equal_weight_has_its_turn_once_a_round() {
    let fleet = fleet("EEEEEEE");
    let chosen: Vec<_> = fleet.choices(&policy(Algorithm::RoundRobin), 70).into_iter().collect();
    for round in chosen.chunks(7) {
        let distinct: BTreeSet<_> = round.iter().map(|one| one.unwrap().backend_idx).collect();
        assert_eq!(distinct.len(), 7);
    }
}

#[test]
fn the_share_of_an_ejected_backend_spreads_over_the_others_by_weight() {
    let mut backends: Vec<BackendEntry> = (1..=10).map(weighing).collect();
    backends[6].outcomes = standing('R').outcomes;
    let fleet = Fleet::new(&[&backends]);
    let is_in = |words: &BackendEntry| words.ejection().cause == 0;
    let due = backends.iter().filter(|words| is_in(words)).map(|words| f64::from(words.weight()));
    for algorithm in Algorithm::ALL {
        let mut shares = fleet.shares(&policy(algorithm), 100_000);
        assert_eq!(shares.remove(6), 0.0, "{algorithm:?}");
        let error = worst_error(&shares, due.clone());
        assert!(error <= 5.0, "{error}% by {algorithm:?}");
    }
}

#[test]
fn beyond_the_share_the_spare_set_takes_what_the_ejected_had_as_far_as_it_can() {
    // The groups, and the share of the first.
    let rows = [
        // As many as were lost: everyone is as busy as before.
        ("EERRRRRR|EEEEEE", 0.25),
        // More: those of the first group still are.
        ("EERRRRRR|EEEEEEEEEEEEEE", 0.25),
        // Fewer: all are equally busy.
        ("EERRRRRR|EE", 0.5),
        ("EEERRRR|E", 0.75),
    ];
    for (groups, due) in rows {
        let n = groups.find('|').unwrap();
        for algorithm in Algorithm::ALL {
            let shares = fleet(groups).shares(&policy(algorithm), 10_000);
            let first: f64 = shares[..n].iter().sum();
            assert!((first - due).abs() < 0.02, "{first} of {groups} by {algorithm:?}");
        }
    }
}

#[test]
fn the_busier_of_two_loses() {
    // Of two backends the first is twice as busy for its weight: it is chosen where both draws fall on
    // it, which is 1/4.
    let fleet = |change: fn(&mut BackendEntry)| {
        let mut changed = standing('E');
        change(&mut changed);
        Fleet::new(&[&[changed, standing('E')]])
    };
    let busy = fleet(|entry| entry.outcomes.in_flight = 1);
    let share = busy.shares(&policy(Algorithm::Least), 100_000)[0];
    assert!((share - 0.25).abs() < 0.005, "{share}");
    // By latency as well, but that one of 32 looks at one backend alone: 31/32/4 + 1/32/2.
    let far = fleet(|entry| entry.outcomes.connect_us = 900);
    let share = far.shares(&policy(Algorithm::Latency), 100_000)[0];
    assert!((share - 0.2578).abs() < 0.005, "{share}");
    // The same of a busy one that is near: its time doesn't outweigh its connection.
    let slow = fleet(|entry| {
        entry.outcomes.in_flight = 1;
        entry.outcomes.connect_us = 20;
    });
    let share = slow.shares(&policy(Algorithm::Latency), 100_000)[0];
    assert!((share - 0.2578).abs() < 0.005, "{share}");
    let share = busy.shares(&policy(Algorithm::Random), 100_000)[0];
    assert!((share - 0.5).abs() < 0.005, "{share}");
}

#[test]
fn a_new_backend_ramps_up_but_by_maglev() {
    let ramping = |algorithm| {
        let mut policy = policy(algorithm);
        policy.settings.slow_start_per_tick = SlowStart::of(10_000_000_000).per_tick;
        policy
    };
    // The age in seconds, and the share of one new backend of 11 relative to another's.
    for (age_s, due) in [(0u64, 0.1), (5, 0.5), (8, 0.8), (10, 1.0), (100, 1.0)] {
        let mut backends = std::vec![standing('E'); 11];
        backends[4].outcomes.added_ms = (NOW / 1_000_000) as u32 - age_s as u32 * 1_000;
        let fleet = Fleet::new(&[&backends]);
        for algorithm in Algorithm::ALL {
            let due = if algorithm == Algorithm::Maglev { 1.0 } else { due };
            let mut shares = fleet.shares(&ramping(algorithm), 50_000);
            let new = shares.remove(4);
            let ratio = new * 10.0 / shares.iter().sum::<f64>();
            assert!((ratio - due).abs() < 0.05, "{ratio} for {due} by {algorithm:?}");
        }
    }
    // Where all are new nothing has changed.
    let mut new = standing('E');
    new.outcomes.added_ms = (NOW / 1_000_000) as u32;
    let shares = Fleet::new(&[&[new; 4]]).shares(&ramping(Algorithm::Random), 100_000);
    assert!(shares.iter().all(|share| (share - 0.25).abs() < 0.01), "{shares:?}");
}

#[test]
fn a_silent_backend_is_reported_so_that_it_is_ejected() {
    for algorithm in Algorithm::ALL {
        let choices = fleet("EEEL").choices(&policy(algorithm), 100);
        assert!(choices.iter().any(|choice| choice.unwrap().silent == 3), "{algorithm:?}");
        assert!(choices.iter().all(|choice| [3, NO_BACKEND].contains(&choice.unwrap().silent)));
        // Likewise if it had reset connections long before.
        let choices = fleet("EEEQ").choices(&policy(algorithm), 100);
        assert!(choices.iter().any(|choice| choice.unwrap().silent == 3), "{algorithm:?}");
        // One that is ejected for it isn't reported again.
        let choices = fleet("EEES").choices(&policy(algorithm), 100);
        assert!(choices.iter().all(|choice| choice.unwrap().silent == NO_BACKEND));
    }
}

#[test]
fn a_paused_host_empties_no_service() {
    // All are silent at once, because the clock jumped while connections were pending.
    let fleet = fleet("LLLLL");
    for algorithm in Algorithm::ALL {
        let shares = fleet.shares(&policy(algorithm), 10_000);
        assert!(shares.iter().all(|share| (share - 0.2).abs() < 0.02), "{shares:?}");
    }
}

#[test]
fn a_key_keeps_its_backend_while_others_are_ejected_and_has_it_back() {
    let keys = |groups: &str| {
        let choices = fleet(groups).choices(&policy(Algorithm::Maglev), 2_000);
        choices.into_iter().map(|one| one.unwrap().backend_idx).collect::<Vec<_>>()
    };
    let (all, without) = (keys("EEEEEEEEEE"), keys("EEEREEEEEE"));
    let mut n_moved = BTreeMap::<u32, u32>::new();
    for (before, after) in all.iter().zip(&without) {
        if *before == 3 {
            *n_moved.entry(*after).or_default() += 1;
        } else {
            assert_eq!(before, after);
        }
    }
    assert_eq!(n_moved.len(), 9, "they spread over all others: {n_moved:?}");
    assert_eq!(without, keys("EEEREEEEEE"));
    // Which of them come back to it for a trial: all.
    assert_eq!(all, keys("EEETEEEEEE"));
}

proptest! {
    /// Whatever the service: the choice is of the best tier that there is.
    #[test]
    fn the_order_holds_for_any_service(
        groups in "[ETSLR]{0,9}\\|[ETSLR]{0,4}\\|[ETSLR]{0,4}",
        algorithm in 0u32..5,
        seed in any::<u32>(),
    ) {
        let fleet = fleet(&groups);
        let letters: Vec<char> = groups.chars().filter(|&letter| letter != '|').collect();
        if letters.is_empty() {
            return Ok(());
        }
        let own = groups.split('|').position(|group| !group.is_empty()).unwrap();
        let own_letters = groups.split('|').nth(own).unwrap();
        let n_before_own: usize = groups.split('|').take(own).map(str::len).sum();
        let (policy, random) = (policy(Algorithm::from_number(algorithm)), generator(seed.into()));
        for n in 0..8 {
            let choice = fleet.choose(&policy, n, &random).unwrap();
            let any = |wanted: &str| letters.iter().any(|&letter| wanted.contains(letter));
            let tier = letters[choice.backend_idx as usize];
            match tier {
                'E' | 'T' => {}
                'S' | 'L' => prop_assert!(!any("ET")),
                'R' => prop_assert!(!any("ETSL")),
                other => prop_assert!(false, "{} was chosen", other),
            }
            prop_assert_eq!(choice.reason == ChoiceReason::TRIAL, tier == 'T');
            prop_assert_eq!(choice.reason == ChoiceReason::EJECTED, !"ET".contains(tier));
            // Another group only where the first that has any is empty of eligible ones, or mostly is.
            let n_of = |wanted: &str| own_letters.chars().filter(|&one| wanted.contains(one)).count();
            let is_own = (choice.backend_idx as usize) < n_before_own + own_letters.len();
            if !is_own && "ET".contains(tier) {
                prop_assert!(n_of("TSLR") * 2 > n_of("ETSLR") || n_of("ET") == 0);
            }
        }
    }
}

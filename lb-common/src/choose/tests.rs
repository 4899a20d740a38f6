use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::string::String;
use std::vec::Vec;

use proptest::prelude::*;

use super::*;
use crate::{Cause, Sign, alias_table, maglev_table};

const NOW: u64 = 1_000_000_000_000;

/// A backend, as values.
#[derive(Clone, Copy, Debug, Default)]
struct Words {
    in_flight: i32,
    pending: i32,
    unanswered_since_us: u32,
    connect_us: u32,
    weight: u16,
    added_ns: u64,
    ejection: Ejection,
    is_drained: bool,
}

impl BackendWords for Words {
    fn in_flight(self) -> i32 {
        self.in_flight
    }

    fn pending(self) -> i32 {
        self.pending
    }

    fn unanswered_since_us(self) -> u32 {
        self.unanswered_since_us
    }

    fn connect_us(self) -> u32 {
        self.connect_us
    }

    fn srtt_us(self) -> u32 {
        0
    }

    fn weight(self) -> u16 {
        self.weight
    }

    fn added_ns(self) -> u64 {
        self.added_ns
    }

    fn ejection(self) -> Ejection {
        self.ejection
    }

    fn is_drained(self) -> bool {
        self.is_drained
    }
}

/// A service, as values.
#[derive(Clone, Debug)]
struct Fleet {
    ranges: [SlotRange; N_GROUPS],
    slots: Vec<Slot>,
    backends: Vec<Words>,
}

impl Fleet {
    /// A service with these groups of backends, numbered throughout.
    fn new(groups: &[&[Words]]) -> Fleet {
        let mut fleet = Fleet {
            ranges: [SlotRange::default(); N_GROUPS],
            slots: Vec::new(),
            backends: Vec::new(),
        };
        for (range, group) in fleet.ranges.iter_mut().zip(groups) {
            let numbered = || (fleet.backends.len() as u32..).zip(*group);
            let weights: Vec<_> = numbered().map(|(idx, words)| (idx, words.weight)).collect();
            let first_slot = fleet.slots.len() as u32;
            *range = SlotRange { first_slot, n_slots: weights.len() as u32 };
            fleet.slots.extend(alias_table(&weights));
            let keyed: Vec<_> = numbered().map(|(idx, one)| (u64::from(idx), one.weight)).collect();
            let words = maglev_table(&keyed).into_iter();
            fleet.slots.extend(words.map(|word| -> Slot { zerocopy::transmute!(word) }));
            fleet.backends.extend(*group);
        }
        fleet
    }

    /// What so many connections get.
    fn choices(&self, policy: &Policy, n: u64) -> Vec<Result<Choice, NoChoice>> {
        let random = generator(7);
        let choose = |n| choose(self, policy, &connection(n, &random));
        (0..n).map(choose).collect()
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

impl Candidates for Fleet {
    type Words = Words;

    fn range(&self, group: usize) -> SlotRange {
        self.ranges[group]
    }

    fn slot(&self, slot: u32) -> Option<Slot> {
        self.slots.get(slot as usize).copied()
    }

    fn words(&self, backend_idx: u32) -> Option<Words> {
        self.backends.get(backend_idx as usize).copied()
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

fn connection<R: Fn() -> u32>(n: u64, random: R) -> Connection<R> {
    Connection { now_ns: NOW, n_before: n, key: n, avoid: NONE, random }
}

fn policy(algorithm: Algorithm) -> Policy {
    Policy { algorithm, ..Policy::default() }
}

/// A backend that stands as a letter says: Eligible, Trial, Suspect, siLent, Refusing, Drained; or that
/// reset connections (P), which is Past, or is over and it is silent (Q).
fn standing(letter: char) -> Words {
    let limits = EjectionLimits::default();
    let eligible = Words { weight: 1, connect_us: 300, ..Words::default() };
    let after = |sign, ago_ns| Ejection::default().after(sign, NOW - ago_ns, &limits);
    let reset = |ago_ns| {
        let reset = |one: Ejection, _| one.after(Sign::Reset, NOW - ago_ns, &limits);
        (0..3).fold(Ejection::default(), reset)
    };
    match letter {
        'E' => eligible,
        'P' => Words { ejection: reset(limits.base_ns / 10), ..eligible },
        'Q' => Words { ejection: reset(limits.base_ns / 10), ..standing('L') },
        'T' => Words { ejection: after(Sign::Refused, limits.base_ns), ..eligible },
        'S' => Words { ejection: after(Sign::Silence, 0), ..eligible },
        'L' => Words { pending: 1, unanswered_since_us: (NOW / 1_000) as u32 - 20_001, ..eligible },
        'R' => Words { ejection: after(Sign::Refused, 0), ..eligible },
        'D' => Words { is_drained: true, ..eligible },
        _ => unreachable!("no such letter"),
    }
}

/// A service whose groups are written one after the other, such as "EER|E".
fn fleet(groups: &str) -> Fleet {
    let groups: Vec<Vec<Words>> =
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
        // Drained ones never; and they are no ejected ones.
        ("EDD|E", "x--|-"),
        ("EERDD|E", "xx---|-"),
        ("DDD|E", "---|x"),
        ("DR|D", "-x|-"),
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
fn without_a_backend_there_is_a_reason() {
    let inconsistent = || {
        let mut fleet = fleet("EE");
        fleet.backends.pop();
        fleet.ranges[0].first_slot = 1;
        fleet
    };
    let rows = [
        (fleet("||"), NoChoice::Empty),
        (fleet("DD|D"), NoChoice::Drained),
        (inconsistent(), NoChoice::Inconsistent),
    ];
    for (fleet, expected) in rows {
        for algorithm in [Algorithm::Random, Algorithm::RoundRobin, Algorithm::Least] {
            let choice = choose(&fleet, &policy(algorithm), &connection(0, || 0));
            assert_eq!(choice, Err(expected), "{algorithm:?}");
        }
    }
}

#[test]
fn the_only_eligible_backend_of_the_largest_service_is_always_found() {
    for (others, only) in [('R', 'E'), ('D', 'E'), ('R', 'S'), ('S', 'T')] {
        let mut backends = std::vec![standing(others); MAX_SERVICE_BACKENDS as usize];
        backends[3_777] = standing(only);
        let fleet = Fleet::new(&[&backends]);
        for algorithm in Algorithm::ALL {
            for choice in fleet.choices(&policy(algorithm), 5) {
                assert_eq!(choice.unwrap().backend_idx, 3_777, "{only} by {algorithm:?}");
            }
        }
    }
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
    let backends: Vec<Words> = (1..=10).map(|weight| Words { weight, ..standing('E') }).collect();
    let fleet = Fleet::new(&[&backends]);
    let due = backends.iter().map(|words| f64::from(words.weight));
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
    let mut backends: Vec<Words> =
        (1..=10).map(|weight| Words { weight, ..standing('E') }).collect();
    backends[6] = Words { weight: 7, ..standing('R') };
    let fleet = Fleet::new(&[&backends]);
    let is_in = |words: &Words| words.ejection.cause == Cause::None;
    let due = backends.iter().filter(|words| is_in(words)).map(|words| f64::from(words.weight));
    for algorithm in Algorithm::ALL {
        let mut shares = fleet.shares(&policy(algorithm), 100_000);
        assert_eq!(shares.remove(6), 0.0, "{algorithm:?}");
        let error = worst_error(&shares, due.clone());
        assert!(error <= 3.0, "{error}% by {algorithm:?}");
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
    let fleet = |words: Words| Fleet::new(&[&[words, standing('E')]]);
    let busy = fleet(Words { in_flight: 1, ..standing('E') });
    let share = busy.shares(&policy(Algorithm::Least), 100_000)[0];
    assert!((share - 0.25).abs() < 0.005, "{share}");
    // By latency as well, but that one of 32 looks at one backend alone: 31/32/4 + 1/32/2.
    let far = fleet(Words { connect_us: 900, ..standing('E') });
    let share = far.shares(&policy(Algorithm::Latency), 100_000)[0];
    assert!((share - 0.2578).abs() < 0.005, "{share}");
    let share = busy.shares(&policy(Algorithm::Random), 100_000)[0];
    assert!((share - 0.5).abs() < 0.005, "{share}");
}

#[test]
fn a_new_backend_ramps_up_but_by_maglev() {
    let slow_start = SlowStart::of(10_000_000_000);
    // The age in seconds, and the share of one new backend of 11 relative to another's.
    for (age_s, due) in [(0u64, 0.1), (5, 0.5), (8, 0.8), (10, 1.0), (100, 1.0)] {
        let mut backends = std::vec![standing('E'); 11];
        backends[4].added_ns = NOW - age_s * 1_000_000_000;
        let fleet = Fleet::new(&[&backends]);
        for algorithm in Algorithm::ALL {
            let due = if algorithm == Algorithm::Maglev { 1.0 } else { due };
            let mut shares = fleet.shares(&Policy { slow_start, ..policy(algorithm) }, 50_000);
            let new = shares.remove(4);
            let ratio = new * 10.0 / shares.iter().sum::<f64>();
            assert!((ratio - due).abs() < 0.05, "{ratio} for {due} by {algorithm:?}");
        }
    }
    // Where all are new nothing has changed.
    let backends = [Words { added_ns: NOW, ..standing('E') }; 4];
    let shares = Fleet::new(&[&backends])
        .shares(&Policy { slow_start, ..policy(Algorithm::Random) }, 100_000);
    assert!(shares.iter().all(|share| (share - 0.25).abs() < 0.01), "{shares:?}");
}

#[test]
fn a_silent_backend_is_reported_so_that_it_is_ejected() {
    for algorithm in Algorithm::ALL {
        let choices = fleet("EEEL").choices(&policy(algorithm), 100);
        assert!(choices.iter().any(|choice| choice.unwrap().silent == 3), "{algorithm:?}");
        assert!(choices.iter().all(|choice| [3, NONE].contains(&choice.unwrap().silent)));
        // Likewise if it had reset connections long before.
        let choices = fleet("EEEQ").choices(&policy(algorithm), 100);
        assert!(choices.iter().any(|choice| choice.unwrap().silent == 3), "{algorithm:?}");
        // One that is ejected for it isn't reported again.
        let choices = fleet("EEES").choices(&policy(algorithm), 100);
        assert!(choices.iter().all(|choice| choice.unwrap().silent == NONE));
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
fn a_backend_that_just_failed_this_client_is_avoided_where_it_can_be() {
    for algorithm in Algorithm::ALL {
        let choose = |groups: &str| {
            let random = generator(7);
            let fleet = fleet(groups);
            let chosen = (0..200).map(|n| {
                let connection = Connection { avoid: 0, ..connection(n, &random) };
                choose(&fleet, &policy(algorithm), &connection).unwrap().backend_idx
            });
            chosen.collect::<BTreeSet<u32>>()
        };
        assert_eq!(choose("EEE"), BTreeSet::from([1, 2]), "{algorithm:?}");
        assert_eq!(choose("ER"), BTreeSet::from([0]), "{algorithm:?}");
        assert_eq!(choose("E|E"), BTreeSet::from([1]), "{algorithm:?}");
        // It isn't ejected, so the spare set isn't used for it.
        assert_eq!(choose("EERR|E"), BTreeSet::from([1]), "{algorithm:?}");
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
        groups in "[ETSLRD]{0,9}\\|[ETSLRD]{0,4}\\|[ETSLRD]{0,4}",
        algorithm in 0u32..5,
        seed in any::<u32>(),
    ) {
        let fleet = fleet(&groups);
        let letters: Vec<char> = groups.chars().filter(|&letter| letter != '|').collect();
        let (policy, random) = (policy(Algorithm::from_number(algorithm)), generator(seed.into()));
        for n in 0..8 {
            let choice = choose(&fleet, &policy, &connection(n, &random));
            let any = |wanted: &str| letters.iter().any(|&letter| wanted.contains(letter));
            let tier = match choice {
                Err(NoChoice::Empty) => {
                    prop_assert!(letters.is_empty());
                    continue;
                }
                Err(reason) => {
                    prop_assert_eq!(reason, NoChoice::Drained);
                    prop_assert!(!any("ETSLR") && any("D"));
                    continue;
                }
                Ok(choice) => letters[choice.backend_idx as usize],
            };
            let choice = choice.unwrap();
            match tier {
                'E' | 'T' => {}
                'S' | 'L' => prop_assert!(!any("ET")),
                'R' => prop_assert!(!any("ETSL")),
                other => prop_assert!(false, "{} was chosen", other),
            }
            prop_assert_eq!(choice.standing == Standing::Trial, tier == 'T');
            // Another group only where the first that has any is empty of eligible ones, or mostly is.
            let own = groups.split('|').position(|group| !group.is_empty()).unwrap();
            let own_letters = groups.split('|').nth(own).unwrap();
            let n_of = |wanted: &str| own_letters.chars().filter(|&one| wanted.contains(one)).count();
            if choice.group != own && "ET".contains(tier) {
                prop_assert!(n_of("TSLR") * 2 > n_of("ETSLR") || n_of("ET") == 0);
            }
        }
    }
}

use std::vec;
use std::vec::Vec;

use proptest::prelude::*;

use super::*;

const MS: u64 = 1_000_000;
const S: u64 = 1_000 * MS;
const START: u64 = 1_000 * S;

const LIMITS: EjectionLimits = EjectionLimits {
    refused: 1,
    failures: 3,
    silence: 20,
    base_ns: S,
    max_ns: 300 * S,
    share: 128,
};

/// A step: what happens, so many milliseconds after the start.
enum Step {
    Sign(Sign),
    /// A trial is claimed.
    Claim,
    /// The same, and its SYN is sent.
    Trial,
}

/// The state after these steps, and how it stands at a time.
fn run(steps: &[(u64, Step)]) -> Ejection {
    steps.iter().fold(Ejection::default(), |ejection, (ms, step)| match step {
        Step::Sign(sign) => ejection.after(*sign, START + ms * MS, &LIMITS),
        Step::Claim => ejection.claim_trial(START + ms * MS, &LIMITS),
        Step::Trial => trial(ejection, START + ms * MS),
    })
}

fn trial(ejection: Ejection, now_ns: u64) -> Ejection {
    ejection.claim_trial(now_ns, &LIMITS).begin_trial(now_ns, &LIMITS)
}

#[track_caller]
fn check(steps: &[(u64, Step)], standings: &[(u64, Standing)]) {
    let ejection = run(steps);
    for &(ms, expected) in standings {
        let standing = ejection.standing(START + ms * MS, &LIMITS);
        assert_eq!(standing, expected, "after {ms} ms, of {ejection:?}");
    }
}

use Sign::{Answered, Closed, Failed, Probed, Refused, Reset, Silence, TrialAborted};
use Standing::{Eligible, Refusing, Suspect, Trial};
use Step::Sign as On;

#[test]
fn one_refusal_ejects_for_the_base_time() {
    check(&[], &[(0, Eligible)]);
    check(&[(5, On(Refused))], &[(5, Refusing), (1_004, Refusing), (1_005, Trial), (9_999, Trial)]);
}

#[test]
fn connections_begun_before_an_ejection_change_nothing() {
    let one = run(&[(5, On(Refused))]);
    let many = run(&[(5, On(Refused)), (6, On(Refused)), (7, On(Refused))]);
    assert_eq!((one.until_ns, one.ejections), (many.until_ns, many.ejections));
}

#[test]
fn trials_that_are_refused_double_the_time_up_to_the_longest() {
    let mut ejection = run(&[(0, On(Refused))]);
    let mut lasted = Vec::new();
    let mut now_ns = START;
    for _ in 0..300 {
        lasted.push((ejection.until_ns - now_ns) / S);
        now_ns = ejection.until_ns;
        assert_eq!(ejection.standing(now_ns, &LIMITS), Trial);
        ejection = trial(ejection, now_ns);
        assert_eq!(ejection.standing(now_ns, &LIMITS), Refusing, "one trial at a time");
        ejection = ejection.after(Refused, now_ns + MS, &LIMITS);
    }
    assert_eq!(lasted[..11], [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]);
    assert_eq!(lasted[299], 300);
}

#[test]
fn a_trial_that_is_answered_ends_the_ejection() {
    let steps = [(0, On(Refused)), (1_000, Step::Trial), (1_001, On(Answered))];
    check(&steps, &[(1_001, Eligible)]);
    // One whose end is never reported is followed by another.
    check(&[(0, On(Refused)), (1_000, Step::Trial)], &[(2_999, Refusing), (3_000, Trial)]);
}

#[test]
fn a_trial_that_shows_nothing_lengthens_no_ejection() {
    // The third ejection in a row, which lasts 4 s, ends after 7 s.
    let before =
        || [(0, On(Refused)), (1_000, Step::Trial), (3_000, Step::Trial), (3_001, On(Refused))];
    let with = |steps: Vec<(u64, Step)>| before().into_iter().chain(steps).collect::<Vec<_>>();
    assert_eq!(run(&before()).ejections, 3);
    // No SYN, or a client that gives up: the next trial comes after the base time, and is as the first.
    let rows: [&dyn Fn() -> Vec<(u64, Step)>; 2] =
        [&|| vec![(7_000, Step::Claim)], &|| vec![(6_990, Step::Trial), (7_000, On(TrialAborted))]];
    for steps in rows {
        check(&with(steps()), &[(7_999, Refusing), (8_000, Trial)]);
        assert_eq!(run(&with(steps())).ejections, 3);
        let again = steps().into_iter().chain([(8_000, Step::Trial), (8_001, On(Refused))]);
        check(&with(again.collect()), &[(15_999, Refusing), (16_000, Trial)]);
        let well = steps().into_iter().chain([(8_000, Step::Trial), (8_001, On(Answered))]);
        check(&with(well.collect()), &[(8_001, Eligible)]);
    }
    // A SYN without a claim is of a connection that had no other choice.
    let ejection = run(&before());
    assert_eq!(ejection.begin_trial(START + 3_500 * MS, &LIMITS), ejection);
    // It has returned meanwhile, or is ejected for resets.
    let returned = [(0, On(Refused)), (1_000, Step::Trial), (1_001, On(Answered))];
    assert_eq!(run(&returned).after(TrialAborted, START + 2 * S, &LIMITS), run(&returned));
}

#[test]
fn silence_of_earlier_connections_takes_no_trial_from_a_backend() {
    let steps = [(0, On(Silence)), (1_500, On(Silence))];
    check(&steps, &[(1_500, Trial), (9_999, Trial)]);
    assert_eq!(run(&steps), run(&steps[..1]));
}

#[test]
fn a_backend_that_flaps_is_ejected_for_longer() {
    // Well for less than the last ejection took: the next one lasts twice as long.
    let flapped = run(&[(0, On(Refused)), (1_000, On(Answered)), (1_500, On(Refused))]);
    assert_eq!((flapped.until_ns - START) / MS, 3_500);
    // Well for longer: as the first time.
    let again = run(&[(0, On(Refused)), (1_000, On(Answered)), (2_001, On(Refused))]);
    assert_eq!((again.until_ns - START) / MS, 3_001);
}

#[test]
fn silence_is_over_with_one_answer() {
    check(&[(0, On(Silence))], &[(1, Suspect), (1_000, Trial)]);
    check(&[(0, On(Silence)), (30, On(Answered))], &[(30, Eligible)]);
    // It turned out to be worse.
    check(&[(0, On(Silence)), (30, On(Refused))], &[(30, Refusing), (1_000, Trial)]);
}

#[test]
fn three_failures_in_a_row_eject() {
    check(&[(0, On(Failed)), (1, On(Failed))], &[(1, Eligible)]);
    check(&[(0, On(Failed)), (1, On(Failed)), (2, On(Failed))], &[(2, Suspect), (1_002, Trial)]);
    let interrupted = [(0, On(Failed)), (1, On(Failed)), (2, On(Answered)), (3, On(Failed))];
    check(&interrupted, &[(3, Eligible)]);
}

#[test]
fn three_resets_in_a_row_eject_for_a_moment_without_a_trial() {
    check(&[(0, On(Reset)), (1, On(Reset))], &[(1, Eligible)]);
    let three = || [(0, On(Reset)), (1, On(Reset)), (2, On(Reset))];
    check(&three(), &[(2, Suspect), (101, Suspect), (102, Eligible)]);
    // A server that ends some connections by a reset isn't broken.
    let orderly = [(0, On(Reset)), (1, On(Reset)), (2, On(Closed)), (3, On(Reset))];
    check(&orderly, &[(3, Eligible)]);
    // That it accepts is no sign that it is well; a probe is.
    let with = |step| three().into_iter().chain([(50, step)]).collect::<Vec<_>>();
    check(&with(On(Answered)), &[(50, Suspect)]);
    check(&with(On(Probed)), &[(50, Eligible)]);
    // A refusal is definite, whatever the hint was.
    check(&with(On(Refused)), &[(50, Refusing), (102, Refusing)]);
}

#[test]
fn resets_while_it_is_ejected_change_nothing() {
    // The resets, all at once, what happens 50 ms later, and until when it is ejected for it, in ms.
    let rows = [
        (3, None, 100),
        (36, None, 100),
        (300, None, 100),
        (301, None, 100),
        (300, Some(Reset), 100),
        // What is definite replaces them, and is the first in the row.
        (300, Some(Refused), 1_050),
        (300, Some(Silence), 1_050),
    ];
    for (n_resets, later, expected) in rows {
        let resets = (0..n_resets).map(|_| (0, On(Reset)));
        let ejection = run(&resets.chain(later.map(|sign| (50, On(sign)))).collect::<Vec<_>>());
        assert_eq!((ejection.until_ns - START) / MS, expected, "{n_resets}, {later:?}");
        let n_in_a_row = u8::from(ejection.cause != Cause::Resets);
        assert_eq!((ejection.ejections, ejection.resets), (n_in_a_row, 0), "{n_resets}, {later:?}");
    }
    // Nor do those of a backend that refuses.
    let mut restarted = run(&[(0, On(Refused))]);
    let refused = restarted;
    for _ in 0..300 {
        restarted = restarted.after(Reset, START + MS, &LIMITS);
    }
    assert_eq!(restarted, refused);
}

#[test]
fn resets_take_no_trial_from_a_backend() {
    let resets = (0..3).map(|n| (1_500 + n, On(Reset)));
    let steps: Vec<_> = [(0, On(Refused))].into_iter().chain(resets).collect();
    check(&steps, &[(1_502, Trial), (9_999, Trial)]);
    assert_eq!(run(&steps), run(&steps[..1]));
}

#[test]
fn resets_that_continue_eject_for_as_long() {
    let resets = (0..3).map(|n| (n, On(Reset))).chain((110..113).map(|n| (n, On(Reset))));
    let ejection = run(&resets.collect::<Vec<_>>());
    assert_eq!((ejection.until_ns - START) / MS, 212);
}

#[test]
fn an_ejection_for_resets_is_over_with_its_time() {
    let three = |ms| (ms..ms + 3).map(|ms| (ms, On(Reset)));
    // It was until 102 ms. The next sign, when, and the cause then.
    let rows = [
        (Answered, 101, Cause::Resets),
        (Answered, 102, Cause::None),
        (Closed, 101, Cause::Resets),
        (Closed, 102, Cause::None),
        (Failed, 102, Cause::None),
        (Reset, 102, Cause::None),
    ];
    for (sign, ms, expected) in rows {
        let ejection = run(&three(0).chain([(ms, On(sign))]).collect::<Vec<_>>());
        assert_eq!(ejection.cause, expected, "{sign:?} after {ms} ms");
        assert_eq!((ejection.until_ns - START) / MS, 102, "{sign:?} after {ms} ms");
    }
    // The row ends like any other, whether anything was reported between or not.
    for between in [&[][..], &[Answered], &[Closed], &[Answered, Closed]] {
        for (ms, expected) in [(150, 100), (3_600_000, 100)] {
            let between = between.iter().map(|&sign| (120, On(sign)));
            let steps = three(0).chain(between).chain(three(ms));
            let lasts_ns = run(&steps.collect::<Vec<_>>()).until_ns - (START + (ms + 2) * MS);
            assert_eq!(lasts_ns / MS, expected, "again after {ms} ms");
        }
    }
    // Three resets an hour, for a week.
    let hours = (0..168).flat_map(|hour| three(hour * 3_600_000));
    assert_eq!(run(&hours.collect::<Vec<_>>()).ejections, 0);
}

#[test]
fn limits_of_zero_never_eject() {
    let limits = EjectionLimits { refused: 0, failures: 0, silence: 0, ..LIMITS };
    let mut ejection = Ejection::default();
    for _ in 0..1_000 {
        for sign in [Refused, Failed, Silence, Reset] {
            ejection = ejection.after(sign, START, &limits);
            assert_eq!(ejection.standing(START, &limits), Eligible);
        }
    }
    // Refusals still are failures where only these eject.
    let limits = EjectionLimits { refused: 0, ..LIMITS };
    let ejection = (0..3).fold(Ejection::default(), |one, _| one.after(Refused, START, &limits));
    assert_eq!(ejection.cause, Cause::Failures);
}

#[test]
fn a_clock_that_jumps_neither_keeps_a_backend_out_nor_ejects_one() {
    let ejection = run(&[(0, On(Refused))]);
    // Forwards, by a year: its time is over.
    assert_eq!(ejection.standing(START + 31_536_000 * S, &LIMITS), Trial);
    // Backwards, by more than any ejection lasts: likewise.
    assert_eq!(ejection.standing(START - 400 * S, &LIMITS), Trial);
    // Backwards by less: it is ejected, for no longer than the longest time.
    assert_eq!(ejection.standing(START - 10 * S, &LIMITS), Refusing);
    let again = ejection.after(Refused, START - 400 * S, &LIMITS);
    assert!(again.until_ns <= START - 100 * S, "{again:?}");
    assert_eq!(ejection.after(Refused, u64::MAX, &LIMITS).until_ns, u64::MAX);
}

#[test]
fn silence_is_a_multiple_of_the_connect_time_within_limits() {
    let rows = [(0, 200_000), (1, 20_000), (300, 20_000), (5_000, 100_000), (u32::MAX, 1_000_000)];
    for (connect_us, expected) in rows {
        assert_eq!(silence_us(connect_us, &LIMITS), expected, "{connect_us}");
    }
    // Pending, since, now.
    let rows = [
        (1, 1_000, 21_000, false),
        (1, 1_000, 21_001, true),
        (0, 1_000, 99_000, false),
        (-1, 1_000, 99_000, false),
        (1, 0, 99_000, false),
        (1, 1_000, 900, false),
        (1, u32::MAX - 10, 19_000, false),
        (1, u32::MAX - 10, 21_000, true),
    ];
    for (pending, since, now, expected) in rows {
        assert_eq!(
            is_silent(pending, since, 300, now, &LIMITS),
            expected,
            "{pending} {since} {now}"
        );
    }
    let never = EjectionLimits { silence: 0, ..LIMITS };
    assert!(!is_silent(1, 1_000, 300, 99_000_000, &never));
}

#[test]
fn causes_have_numbers() {
    for number in 0..=4 {
        assert_eq!(Cause::from_number(number) as u8, number);
    }
    assert_eq!(Cause::from_number(5), Cause::None);
}

proptest! {
    /// Whatever happens: an ejection ends within the longest time, and an answer ends it at once.
    #[test]
    fn no_state_is_a_trap(
        steps in prop::collection::vec((0u64..400 * S, 0usize..10), 0..60),
    ) {
        let signs = [Refused, Silence, Reset, Failed, Answered, Closed, Probed, TrialAborted];
        let mut now_ns = START;
        let mut ejection = Ejection::default();
        for (later_ns, idx) in steps {
            now_ns += later_ns;
            let awaits_trial = ejection.standing(now_ns, &LIMITS) == Trial;
            ejection = match signs.get(idx) {
                Some(&sign) => ejection.after(sign, now_ns, &LIMITS),
                None if awaits_trial => {
                    let claimed = ejection.claim_trial(now_ns, &LIMITS);
                    if idx == 8 { claimed } else { claimed.begin_trial(now_ns, &LIMITS) }
                }
                None => ejection,
            };
            prop_assert!(ejection.standing(now_ns + LIMITS.max_ns, &LIMITS).is_eligible());
            if awaits_trial && !matches!(signs.get(idx), Some(Answered | Probed)) {
                let later = ejection.standing(now_ns + LIMITS.max_ns, &LIMITS);
                prop_assert_eq!(later, Trial, "it still needs one");
            }
            let probed = ejection.after(Probed, now_ns, &LIMITS);
            prop_assert_eq!(probed.standing(now_ns, &LIMITS), Eligible);
            let answered = ejection.after(Answered, now_ns, &LIMITS);
            if ejection.cause != Cause::Resets {
                prop_assert_eq!(answered.standing(now_ns, &LIMITS), Eligible);
            }
            let later = ejection.after(Answered, now_ns + LIMITS.max_ns, &LIMITS);
            prop_assert_eq!(later.cause, Cause::None);
            // Nothing but signs, and the time, changes how it stands.
            if ejection.standing(now_ns, &LIMITS) == Eligible {
                prop_assert_eq!(ejection.standing(now_ns + S, &LIMITS), Eligible);
            }
        }
    }
}

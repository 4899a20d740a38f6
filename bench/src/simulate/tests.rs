use std::time::Duration;

use lb_common::Algorithm;

use super::*;

const LASTS: Duration = Duration::from_secs(20);
const SEED: u64 = 3;

/// A small one: 10 clients, 5 backends.
fn scene(name: &str) -> Scene {
    all_scenes(10, 5, LASTS).into_iter().find(|scene| scene.name == name).unwrap()
}

fn nohop(algorithm: Algorithm) -> Policy {
    Policy::Nohop { algorithm, is_guarded: true }
}

const BARE: Policy = Policy::Nohop { algorithm: Algorithm::Least, is_guarded: false };

#[test]
fn the_same_seed_gives_the_same_figures() {
    let scene = scene("restart");
    for policy in Policy::all() {
        let figures = run(&scene, policy, SEED);
        assert_eq!(figures, run(&scene, policy, SEED), "{policy:?}");
        assert_ne!(figures, run(&scene, policy, SEED + 1), "{policy:?}");
    }
}

#[test]
fn every_policy_has_the_same_connections_and_none_is_lost() {
    for scene in all_scenes(10, 5, LASTS) {
        let n_connections = run(&scene, BARE, SEED).n_connections;
        // 5 backends with 2 workers, 50 ms a request, at 60%: 120 a second, for 18 s.
        assert!(n_connections.abs_diff(2_160) < 150, "{n_connections} of {}", scene.name);
        for policy in Policy::all() {
            let figures = run(&scene, policy, SEED);
            assert_eq!(figures.n_connections, n_connections);
            let can_fail = ["refuses", "silent", "restart"].contains(&scene.name);
            assert!(can_fail || figures.n_failed == 0, "{figures:?} of {}", scene.name);
        }
    }
}

#[test]
fn connections_are_closed_and_reset_after_their_answer() {
    // The balancers check the order. So far away, many resets come with the answer under way.
    for name in ["equal", "restart"] {
        let scene = Scene { rtt: |_| Duration::from_millis(200), ..scene(name) };
        for policy in Policy::all() {
            let figures = run(&scene, policy, SEED);
            assert_eq!(figures.n_failed > 0, name == "restart", "{figures:?} by {policy:?}");
        }
    }
}

#[test]
fn ejection_leaves_one_failure_and_the_trials_to_each_client() {
    // One, then trials after 1, 3, 7 and 15 s; and the connections under way at that moment.
    for (name, n_most) in [("refuses", 10 * 5), ("silent", 10 * 6)] {
        let scene = scene(name);
        for algorithm in Algorithm::ALL {
            let n_failed = run(&scene, nohop(algorithm), SEED).n_failed;
            assert!(n_failed <= n_most, "{n_failed} by {algorithm:?}");
        }
        let n_failed = run(&scene, Policy::EnvoyRoundRobin, SEED).n_failed;
        assert!(n_failed > 400, "a fifth fails without: {n_failed}");
    }
}

#[test]
fn open_connections_keep_load_from_a_slow_backend() {
    let share = |policy| run(&scene("slow"), policy, SEED).odd_share.unwrap();
    assert!(share(nohop(Algorithm::Random)) > 0.8);
    for policy in [BARE, nohop(Algorithm::Latency), Policy::EnvoyLeastRequest] {
        assert!(share(policy) < 0.3, "{} by {policy:?}", share(policy));
    }
}

#[test]
fn a_new_backend_ramps_up() {
    let share = |policy| run(&scene("new"), policy, SEED).odd_share.unwrap();
    assert!(share(nohop(Algorithm::RoundRobin)) < 0.4);
    assert!(share(Policy::EnvoyRoundRobin) > 0.8);
}

#[test]
fn a_table_has_a_row_for_each_policy() {
    let table = table(&scene("equal"), SEED);
    for policy in Policy::all() {
        assert_eq!(table.matches(&format!("| {} |", policy.name())).count(), 1);
    }
    assert_eq!([0, 999, 1_000, 1_234_005].map(thousands), ["0", "999", "1,000", "1,234,005"]);
}

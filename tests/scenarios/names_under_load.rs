//! Names through what happens to the daemon under Nomad, while a client looks a service up and connects
//! to it again and again, each time by one query: with the unit `names` none is lost, without it many.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lb_tests::fixture::full_or_quarter;
use testbed::consul::instance;
use testbed::load::{Load, Outcome};
use testbed::nohop::Nohop;

use crate::cluster::{Cluster, Nodes, unit};

/// Lookups and connections a second; [`RATE_VARIABLE`] has another number, for measurements.
const RATE: u32 = 1_000;
const RATE_VARIABLE: &str = "NOHOP_LOOKUPS_PER_SECOND";

/// How long no daemon runs when Nomad updates a system job: the old one is stopped, and the new one is
/// started after the next evaluation.
const UPDATE_GAP_S: u32 = 2;

/// How long Nomad waits by default before it restarts a task that crashed, 15 s and a jitter; in full, how
/// long an operator may take.
fn restart_gap_s() -> u32 {
    full_or_quarter(72) as u32
}

const N_KILLS: u32 = 20;

fn by_name(nodes: &Nodes) -> Result<Load> {
    let rate = match std::env::var(RATE_VARIABLE) {
        Ok(rate) => {
            rate.parse().with_context(|| format!("{RATE_VARIABLE} isn't a number: {rate}"))?
        }
        Err(_) => RATE,
    };
    Load::start_by_name(nodes.inside(), "helloworld.service", rate)
}

/// None of the requests failed.
fn none_is_lost(load: Load) -> Result<Outcome> {
    let outcome = finish(load)?;
    ensure!(outcome.errors.is_empty(), "{outcome:?}");
    Ok(outcome)
}

fn finish(load: Load) -> Result<Outcome> {
    let outcome = load.finish()?;
    eprintln!(
        "{} requests by name in {:.1} s, lost: {:?}; the slowest took {:?}, its lookup at most {:?}",
        outcome.n_requests,
        outcome.took.as_secs_f64(),
        outcome.errors,
        outcome.slowest,
        outcome.slowest_lookup
    );
    Ok(outcome)
}

fn wait_for_unit(nohop: &Nohop) -> Result<()> {
    nohop.wait_for_status(|status| unit(status, "names")["state"] == "attached").map(drop)
}

/// The daemon is stopped at this second of the load, and the next one starts later.
fn update(nohop: &mut Nohop, load: &Load, second: u32) -> Result<()> {
    load.wait_until_second(second)?;
    ensure!(nohop.terminate()?.success());
    load.wait_until_second(second + UPDATE_GAP_S)?;
    nohop.start_again()
}

/// The update of the job.
pub fn updated() -> Result<()> {
    let mut cluster = Cluster::new(2)?;
    wait_for_unit(&cluster.nohop)?;
    let load = by_name(&cluster.nodes)?;
    update(&mut cluster.nohop, &load, 1)?;
    let outcome = none_is_lost(load)?;
    ensure!(outcome.answers.len() == 2, "{outcome:?}");
    Ok(())
}

/// Without the unit, an update loses some: so the others would show it.
pub fn lost_without_the_unit() -> Result<()> {
    let mut cluster = Cluster::with_config(2, "dns.kernel = false\n")?;
    let load = by_name(&cluster.nodes)?;
    update(&mut cluster.nohop, &load, 1)?;
    let outcome = finish(load)?;
    let is_lookup = |error: &String| error.starts_with("lookup: ");
    ensure!(outcome.errors.keys().any(is_lookup), "none was lost: {outcome:?}");
    ensure!(outcome.answers.len() == 2, "{outcome:?}");
    Ok(())
}

/// A crash, and the restart by Nomad's default policy. In between a backend leaves, and another one comes:
/// the next daemon finds it.
pub fn crashed() -> Result<()> {
    let mut cluster = Cluster::new(2)?;
    wait_for_unit(&cluster.nohop)?;
    let load = by_name(&cluster.nodes)?;
    load.wait_until_second(1)?;
    cluster.nohop.kill()?;
    load.wait_until_second(2)?;
    let third = cluster.nodes.helloworld("helloworld-2")?;
    cluster.server.deregister("helloworld-0")?;
    cluster.server.register(&instance("helloworld", "helloworld-2", third.address))?;
    load.wait_until_second(1 + restart_gap_s())?;
    cluster.nohop.start_again()?;
    let third = third.address.to_string();
    cluster.nohop.wait_until_explained("helloworld", |known| known.to_string().contains(&third))?;
    let outcome = none_is_lost(load)?;
    let answers = ["hello from helloworld-0", "hello from helloworld-1", "hello from helloworld-2"];
    ensure!(outcome.answers.keys().eq(answers), "{outcome:?}");
    Ok(())
}

/// Killed at any moment of its life: while it starts, takes over, syncs, and serves.
pub fn killed_at_random() -> Result<()> {
    let mut cluster = Cluster::new(2)?;
    wait_for_unit(&cluster.nohop)?;
    let load = by_name(&cluster.nodes)?;
    load.wait_until_second(1)?;
    let mut random = fastrand::Rng::with_seed(20);
    for _ in 0..N_KILLS {
        cluster.nohop.kill()?;
        cluster.nohop.start_again_unwatched()?;
        // What is awaited is a moment, and not an event: any one is as good.
        std::thread::sleep(Duration::from_micros(random.u64(..600_000)));
    }
    cluster.nohop.kill()?;
    cluster.nohop.start_again()?;
    none_is_lost(load).map(drop)
}

/// Services that weren't used for long are answered by the daemon while one runs, and it asks Consul
/// then: also while the next one starts, none of their names is lost.
pub fn idle_services() -> Result<()> {
    const N: usize = 60;
    let mut cluster = Cluster::new(1)?;
    wait_for_unit(&cluster.nohop)?;
    let address = cluster.helloworlds[0].address;
    for idx in 0..N {
        let name = format!("idle-{idx}");
        cluster.server.register(&instance(&name, &name, address))?;
    }
    let last = format!("idle-{}", N - 1);
    let has_all = |services: &serde_json::Value| services.to_string().contains(&last);
    cluster.nohop.wait_until(has_all)?;
    cluster.nohop.wait_for_state("catalog.json", &last)?;
    cluster.nohop.kill()?;
    cluster.nohop.start_again_unwatched()?;
    let mut lost = Vec::new();
    for idx in 0..N {
        let answer = cluster.nodes.dig(&format!("idle-{idx}.service"))?;
        if !answer.contains("status: NOERROR") || !answer.contains("127.") {
            lost.push((idx, answer));
        }
    }
    ensure!(lost.is_empty(), "{} lost: {lost:?}", lost.len());
    Ok(())
}

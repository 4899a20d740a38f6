//! From a change in Consul to the maps: 500 services, 60 of them live, 20 changes a second in those.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::maps::{Maps, Watcher};
use crate::site::{Instance, Site, cpu_s, propagation};
use crate::{ms, print_figure, quantile};

const N_SERVICES: usize = 500;
const N_LIVE: usize = 60;
const PAUSE: Duration = Duration::from_millis(50);

/// A change that was made.
struct Change {
    service: String,
    sent: Instant,
    /// When Consul returned it.
    done: Instant,
}

pub fn measure(quick: bool) -> Result<()> {
    let n_changes = if quick { 200 } else { 600 };
    println!("{N_SERVICES} services, {N_LIVE} live, {n_changes} changes, 20 a second:");
    let site = Site::new()?;
    let instances: Vec<Instance> =
        (0..N_SERVICES).flat_map(|idx| [0, 1].map(|nth| instance(idx, nth, 8000))).collect();
    site.register(&instances)?;
    let nohop = site.nohop("catalog.watch = \"used\"\n")?;
    let live: Vec<String> = (0..N_LIVE).map(name).collect();
    site.use_names(live.iter().map(|name| &**name))?;
    nohop.wait_for_status(|status| status["sources"][0]["watches"]["live"] == N_LIVE)?;
    // Beyond the buckets of the watches, which the first answers emptied.
    thread::sleep(Duration::from_secs(1));

    let watcher = Watcher::start(Maps::open(&nohop)?, live)?;
    let (before, cpu) = (propagation(&nohop)?, cpu_s(&nohop)?);
    let (mut changes, start) = (Vec::new(), Instant::now());
    for nth in 0..n_changes {
        let due = start + PAUSE * nth as u32;
        thread::sleep(due.saturating_duration_since(Instant::now()));
        let port = 8001 + (nth / N_LIVE) as u16;
        let changed = instance(nth % N_LIVE, 0, port);
        let sent = Instant::now();
        site.change(&changed)?;
        changes.push(Change { service: changed.service, sent, done: Instant::now() });
    }
    let took = start.elapsed();
    thread::sleep(Duration::from_millis(500));
    let (after, cpu) = (propagation(&nohop)?, cpu_s(&nohop)? - cpu);
    let seen = watcher.stop()?;

    ensure!(seen.len() == changes.len(), "{} of {} changes", seen.len(), changes.len());
    let (mut from_sent, mut from_done, mut in_consul) = (Vec::new(), Vec::new(), Vec::new());
    for Change { service, sent, done } in changes {
        let arrived = seen.iter().find(|(name, at)| *name == service && *at >= sent);
        let (_, at) = arrived.expect("each change arrives");
        from_sent.push(ms(*at - sent));
        from_done.push(ms(at.saturating_duration_since(done)));
        in_consul.push(ms(done - sent));
    }
    for (what, times, goals) in [
        ("registration sent -> map", &from_sent, [Some(5.0), Some(25.0)]),
        ("registration answered -> map", &from_done, [Some(5.0), Some(25.0)]),
        ("of that Consul's own, sent -> answered", &in_consul, [None; 2]),
    ] {
        print_figure(&format!("{what}, median"), quantile(times, 0.5), "ms", goals[0]);
        print_figure(&format!("{what}, 99th percentile"), quantile(times, 0.99), "ms", goals[1]);
        print_figure(&format!("{what}, most"), quantile(times, 1.0), "ms", None);
    }
    let mean = (after.0 - before.0) / (after.1 - before.1);
    print_figure("the daemon's own part, answer received -> map, mean", mean, "ms", None);
    print_figure("the daemon's share of a core", 100.0 * cpu / took.as_secs_f64(), "%", None);
    Ok(())
}

fn name(idx: usize) -> String {
    format!("service-{idx}")
}

fn instance(idx: usize, nth: usize, port: u16) -> Instance {
    let service = name(idx);
    let id = format!("{service}-{nth}");
    Instance { service, id, address: format!("10.98.{}.{}", idx % 250, nth + 1), port }
}

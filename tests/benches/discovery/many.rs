//! Many services on one Consul: 5,000, of which few are in use, and 100,000 names.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use testbed::helloworld::Helloworld;
use testbed::nohop::Nohop;

use crate::site::{ADDRESS, Instance, Site, cpu_s, memory_mb, metrics};
use crate::{ms, print_figure, quantile};

const N_SERVICES: usize = 5_000;
const N_USED: usize = 20;
const N_NAMES: usize = 100_000;

pub fn five_thousand(quick: bool) -> Result<()> {
    println!("{N_SERVICES} services on one Consul with default limits:");
    let site = Site::new()?;
    let server = Helloworld::start(site.host.outside(), "cold", &format!("{ADDRESS}:0"))?;
    let port = server.address.port();
    site.register(&instances(N_SERVICES, port))?;
    let start = Instant::now();
    let nohop = site.nohop("")?;
    print_figure("started -> ready", start.elapsed().as_secs_f64(), "s", Some(5.0));

    let mut n_connections = site.n_connections()?;
    let mut connects = Vec::new();
    for idx in 0..N_USED {
        // Each name is cold at its first connection, and live at its second.
        connects.push([connect(&site, idx)?, connect(&site, idx)?]);
        n_connections = n_connections.max(site.n_connections()?);
    }
    let column = |nth: usize| connects.iter().map(|pair| pair[nth]).collect::<Vec<f64>>();
    let (cold, warm) = (column(0), column(1));
    let over: Vec<f64> = connects.iter().map(|[cold, warm]| cold - warm).collect();
    print_figure(
        "a cold service's first connection by name, median",
        quantile(&cold, 0.5),
        "ms",
        None,
    );
    print_figure("a warm one's, median", quantile(&warm, 0.5), "ms", None);
    print_figure("what cold costs more, median", quantile(&over, 0.5), "ms", Some(20.0));
    print_figure("what cold costs more, most", quantile(&over, 1.0), "ms", None);

    let (cpu, start) = (cpu_s(&nohop)?, Instant::now());
    let time = Duration::from_secs(if quick { 10 } else { 30 });
    while start.elapsed() < time {
        thread::sleep(Duration::from_secs(1));
        n_connections = n_connections.max(site.n_connections()?);
    }
    let share = 100.0 * (cpu_s(&nohop)? - cpu) / start.elapsed().as_secs_f64();
    print_figure("steady state, share of a core", share, "%", Some(1.0));
    print_figure("connections to the agent, most", n_connections as f64, "", Some(64.0));
    print_figure("resident memory", memory_mb(&nohop, "VmRSS")?, "MB", None);
    print_figure("refusals, resets and failures of Consul", n_bad_answers(&nohop)?, "", Some(0.0));
    Ok(())
}

pub fn a_hundred_thousand(_quick: bool) -> Result<()> {
    println!("{N_NAMES} services on one Consul, with room for 16,384:");
    let site = Site::new()?;
    site.register(&instances(N_NAMES, 8000))?;
    let start = Instant::now();
    let nohop = Nohop::start_unready(&site.host, &site.cgroup, "")?;
    let is_there =
        |status: &serde_json::Value| status["ready"] == true && status["services"] == N_NAMES;
    let status = nohop.wait_for_status(is_there)?;
    print_figure("started -> ready", start.elapsed().as_secs_f64(), "s", None);
    print_figure("processor time of the start", cpu_s(&nohop)?, "s", None);
    let (cpu, start) = (cpu_s(&nohop)?, Instant::now());
    thread::sleep(Duration::from_secs(10));
    let share = 100.0 * (cpu_s(&nohop)? - cpu) / start.elapsed().as_secs_f64();
    print_figure("steady state, share of a core", share, "%", None);
    print_figure("most ever resident", memory_mb(&nohop, "VmHWM")?, "MB", None);
    print_figure("refusals, resets and failures of Consul", n_bad_answers(&nohop)?, "", None);
    println!("  its problems: {}", status["problems"]);
    // One with enough connections continues.
    ensure!(connect(&site, 0).is_err(), "nothing listens there");
    Ok(())
}

/// The time of curl's connect by name, its question to DNS included, in ms.
fn connect(site: &Site, idx: usize) -> Result<f64> {
    let words = format!("-sS -o /dev/null -w %{{time_connect}} http://{}.service/", name(idx));
    let time = site.host.inside(&site.cgroup).run("curl", &words)?;
    Ok(ms(Duration::from_secs_f64(time.trim().parse().context(time.clone())?)))
}

fn n_bad_answers(nohop: &Nohop) -> Result<f64> {
    let answers = metrics(nohop, "nohop_source_requests_total")?;
    // The switch nohop/off isn't there: that is no failure.
    let is_good = |code: &str| ["\"200\"", "\"404\""].iter().any(|good| code.contains(good));
    Ok(answers.iter().filter(|(code, _)| !is_good(code)).fold(0.0, |sum, (_, n)| sum + n))
}

fn name(idx: usize) -> String {
    format!("service-{idx}")
}

fn instances(n: usize, port: u16) -> Vec<Instance> {
    let instance =
        |idx| Instance { service: name(idx), id: name(idx), address: ADDRESS.into(), port };
    (0..n).map(instance).collect()
}

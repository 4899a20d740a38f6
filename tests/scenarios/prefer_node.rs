//! `balance.prefer = "node"`: the instances of other nodes are the spare set. With the daemon and Consul
//! dead the kernel alone falls back to it, and returns.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::Value;
use testbed::TIMEOUT;
use testbed::consul::instance;
use testbed::helloworld::{Helloworld, connect_in_turn};
use testbed::nohop::service;

use crate::cluster::{CLIENT, Cluster};

/// The time of each ejection, thus from one trial to the next, less what clocks differ by.
const EJECTION: Duration = Duration::from_millis(990);

pub fn run() -> Result<()> {
    let config = "balance = { prefer = \"node\", eject = { base = \"1s\", max = \"1s\" } }\n";
    let mut cluster = Cluster::with_config(1, config)?;
    let place = cluster.nodes.client.outside();
    let here = Helloworld::start(place, "here", &format!("{CLIENT}:0"))?;
    let address = here.address;
    cluster.agent.register(&instance("helloworld", "here", address))?;
    let services = cluster.nohop.wait_until(|services| {
        let state = |id: &str| backend(services, id)["state"].clone();
        (state("here"), state("helloworld-0")) == ("healthy".into(), "spare".into())
    })?;
    let reason = backend(&services, "helloworld-0")["reason"].to_string();
    ensure!(reason.contains("on another node"), "{reason}");
    let vip = cluster.vip("helloworld")?;
    let nodes = &cluster.nodes;
    let connects = nodes.connect(vip, 100)?;
    ensure!(connects.all_answered(|answer| answer == "hello from here"), "{connects:?}");

    cluster.nohop.kill()?;
    cluster.agent.kill();
    cluster.server.kill();
    here.process.kill();
    let start = Instant::now();
    let connects = connect_in_turn(nodes.inside(), vip, 500)?;
    let most = 1 + start.elapsed().div_duration_f64(EJECTION) as u64;
    let errors = connects.errors.keys().map(String::as_str);
    ensure!(errors.eq(["ConnectionRefused"]), "{connects:?}");
    ensure!(connects.errors["ConnectionRefused"] <= most, "at most {most}: {connects:?}");
    ensure!(connects.answers.keys().eq(["hello from helloworld-0"]), "{connects:?}");

    let _here = Helloworld::start(nodes.client.outside(), "here", &address.to_string())?;
    let deadline = Instant::now() + TIMEOUT;
    while !nodes.connect(vip, 20)?.answers.contains_key("hello from here") {
        ensure!(Instant::now() < deadline, "the kernel doesn't return");
    }
    let connects = nodes.connect(vip, 100)?;
    ensure!(connects.all_answered(|answer| answer == "hello from here"), "{connects:?}");
    Ok(())
}

/// A backend of helloworld; null where there is none.
fn backend(services: &Value, id: &str) -> Value {
    let backends = service(services, "helloworld").and_then(|web| web["backends"].as_array());
    let mut backends = backends.into_iter().flatten();
    backends.find(|backend| backend["instance"] == id).cloned().unwrap_or_default()
}

//! `all_critical = "keep"`: while all backends are critical the last ones that were healthy keep
//! serving, except those in maintenance; then connections are refused. One that recovers ends it.

use anyhow::{Result, ensure};
use serde_json::Value;
use testbed::consul::program;
use testbed::nohop::{n_healthy, service};

use crate::cluster::Cluster;

fn config(keep_for: &str) -> String {
    format!("balance.all_critical = \"keep\"\nbalance.keep_for = \"{keep_for}\"\n")
}

pub fn run() -> Result<()> {
    let cluster = Cluster::with_config(3, &config("1h"))?;
    let (nohop, nodes, server) = (&cluster.nohop, &cluster.nodes, &cluster.server);
    let vip = cluster.vip("helloworld")?;

    for id in ["helloworld-0", "helloworld-1", "helloworld-2"] {
        server.fail(id)?;
    }
    nohop.wait_until(|services| kept(services).len() == 3)?;
    let connects = nodes.connect(vip, 100)?;
    ensure!(connects.errors.is_empty() && connects.answers.len() == 3, "{connects:?}");
    let explanation = nohop.explain("helloworld")?;
    let sentence = explanation["connect"].as_str().unwrap_or_default();
    ensure!(sentence.contains("kept: all instances are critical since "), "{explanation:#}");

    // An operator's word applies at once, and a deregistered instance is gone.
    let maint = "maint -enable -service=helloworld-1 -reason=upgrade";
    nodes.backend.outside().run(program()?, maint)?;
    server.deregister("helloworld-2")?;
    nohop.wait_until(|services| kept(services) == ["helloworld-0"])?;
    let connects = nodes.connect(vip, 50)?;
    ensure!(connects.all_answered(|answer| answer == "hello from helloworld-0"), "{connects:?}");

    // Another daemon keeps what the kernel serves.
    nohop.terminate()?;
    let mut cluster = cluster;
    cluster.nohop.start_again()?;
    let (nohop, nodes, server) = (&cluster.nohop, &cluster.nodes, &cluster.server);
    nohop.wait_until(|services| kept(services) == ["helloworld-0"])?;

    nohop.configure(&config("1s"))?;
    ensure!(nohop.cli("reload")?.status.success());
    nohop.wait_until(|services| kept(services).is_empty())?;
    let connects = nodes.connect(vip, 50)?;
    ensure!(connects.all_failed_with("ConnectionRefused"), "{connects:?}");

    server.pass("helloworld-0")?;
    nohop.wait_until(|services| n_healthy(services, "helloworld") == 1)?;
    let connects = nodes.connect(vip, 50)?;
    ensure!(connects.all_answered(|answer| answer == "hello from helloworld-0"), "{connects:?}");
    Ok(())
}

/// The instances that are kept.
fn kept(services: &Value) -> Vec<&str> {
    let backends = service(services, "helloworld").and_then(|it| it["backends"].as_array());
    let kept = backends.into_iter().flatten().filter(|backend| {
        backend["reason"].as_str().is_some_and(|reason| reason.contains("kept: all instances are"))
    });
    kept.filter_map(|backend| backend["instance"].as_str()).collect()
}

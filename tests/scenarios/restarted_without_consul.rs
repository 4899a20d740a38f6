//! The daemon is restarted while Consul is away: it is ready, names are answered, connections go where
//! they went, and the status has the age.

use anyhow::{Result, ensure};

use crate::cluster::Cluster;

pub fn run() -> Result<()> {
    let mut cluster = Cluster::new(2)?;
    let vip = cluster.vip("helloworld")?;

    // What it has just received is written while it stops.
    cluster.agent.kill();
    ensure!(cluster.nohop.terminate()?.success());
    cluster.nohop.start_again()?;
    let status = cluster.nohop.wait_for_status(|s| s["sources"][0]["state"] == "failing")?;
    ensure!(
        status["sources"][0]["age_seconds"].as_f64().is_some_and(|age| age > 0.0),
        "{status:#}"
    );
    let connects = cluster.nodes.connect(vip, 100)?;
    ensure!(connects.errors.is_empty() && connects.answers.len() == 2, "{connects:?}");
    ensure!(cluster.nodes.curl("helloworld")?.starts_with("hello from helloworld-"));

    cluster.agent.restart()?;
    cluster.nohop.wait_for_status(|status| status["sources"][0]["state"] == "live")?;
    let connects = cluster.nodes.connect(vip, 100)?;
    ensure!(connects.errors.is_empty() && connects.answers.len() == 2, "{connects:?}");
    Ok(())
}

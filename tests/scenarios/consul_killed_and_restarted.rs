//! Consul's agent dies, then the server: everything keeps working, while they are away and when
//! they come back. After that news arrive again.

use anyhow::{Result, ensure};
use testbed::consul::instance;

use crate::cluster::Cluster;

pub fn run() -> Result<()> {
    let mut cluster = Cluster::new(2)?;
    let vip = cluster.vip("helloworld")?;
    let before = cluster.nohop.services()?;

    cluster.agent.kill();
    let is_failing = |status: &serde_json::Value| status["sources"][0]["state"] == "failing";
    let status = cluster.nohop.wait_for_status(is_failing)?;
    ensure!(status["ready"] == true, "{status:#}");
    let connects = cluster.nodes.connect(vip, 100)?;
    ensure!(connects.errors.is_empty() && connects.answers.len() == 2, "{connects:?}");
    ensure!(cluster.nodes.curl("helloworld")?.starts_with("hello from helloworld-"));
    let meanwhile = cluster.nohop.services()?;
    ensure!(meanwhile[0]["generation"] == before[0]["generation"], "{meanwhile:#}");

    let is_live = |status: &serde_json::Value| status["sources"][0]["state"] == "live";
    let unchanged = |cluster: &Cluster, when: &str| {
        let after = cluster.nohop.services()?;
        ensure!(after[0]["generation"] == before[0]["generation"], "{when}: {after:#}");
        let connects = cluster.nodes.connect(vip, 100)?;
        ensure!(connects.errors.is_empty() && connects.answers.len() == 2, "{when}: {connects:?}");
        Ok(())
    };
    cluster.agent.restart()?;
    cluster.nohop.wait_for_status(is_live)?;
    unchanged(&cluster, "the agent is back")?;

    cluster.server.kill();
    cluster.nohop.wait_for_status(is_failing)?;
    unchanged(&cluster, "the server is away")?;
    cluster.server.restart()?;
    cluster.nohop.wait_for_status(is_live)?;

    // The server's agent owns the checks, which to it are critical until their next heartbeat.
    for check in ["helloworld-0", "helloworld-1"] {
        cluster.server.pass(check)?;
    }
    let newcomer = cluster.nodes.helloworld("newcomer")?;
    cluster.server.register(&instance("helloworld", "newcomer", newcomer.address))?;
    cluster.nohop.wait_for_backends("helloworld", 3)?;
    let connects = cluster.nodes.connect(vip, 100)?;
    ensure!(
        connects.errors.is_empty() && connects.answers.contains_key("hello from newcomer"),
        "{connects:?}"
    );
    Ok(())
}

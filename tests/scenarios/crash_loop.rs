//! A daemon that is killed again and again leaves its agent to others: Consul keeps the connection of
//! a question that it holds after the client is gone (consul#8524), and gives one address 200 of them
//! at most. So no question is held for longer than the daemon has run.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::consul::instance;

use crate::cluster::Cluster;

/// As many as are all followed (`catalog.watch = "auto"`).
const N_SERVICES: usize = 30;

/// As many as filled an agent by questions of a minute: 32 connections each.
const N_CRASHES: usize = 8;

/// How many connections nohop may have (`consul.max_connections`).
const MAX_CONNECTIONS: usize = 64;

pub fn run() -> Result<()> {
    let mut cluster = Cluster::new(1)?;
    for n in 1..N_SERVICES {
        let name = format!("helloworld-{n}");
        cluster.server.register(&instance(&name, &name, cluster.helloworlds[0].address))?;
    }
    let has_all = |services: &Value| services.as_array().is_some_and(|all| all.len() == N_SERVICES);
    cluster.nohop.wait_until(has_all)?;
    for _ in 0..N_CRASHES {
        cluster.nohop.kill()?;
        cluster.nohop.start_again()?;
        let is_live = |status: &Value| status["sources"][0]["state"] == "live";
        cluster.nohop.wait_for_status(is_live)?;
    }
    // As Nomad queries it.
    let leader = cluster.agent.get("/v1/status/leader").context("another client of the agent")?;
    ensure!(leader.as_str().is_some_and(|leader| !leader.is_empty()), "{leader}");
    let client = cluster.nodes.client.outside();
    let sockets = client.run("ss", "-Htn ( sport = :8500 )")?;
    let n_sockets = sockets.lines().count();
    ensure!(n_sockets <= 2 * MAX_CONNECTIONS, "{n_sockets} connections:\n{sockets}");
    Ok(())
}

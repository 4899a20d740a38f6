//! nohop's agent is another host's, and the loopback that its services are registered at is
//! that host's: what listens at the same port here is never reached.

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use testbed::consul::{Consul, instance};
use testbed::helloworld::Helloworld;

use crate::cluster::{BACKEND, Nodes, vip};

pub fn run() -> Result<()> {
    let nodes = Nodes::new()?;
    let everywhere = json!({ "client_addr": "0.0.0.0" });
    let servers = Consul::servers(&[(&nodes.backend, "backend", BACKEND)], &everywhere, None)?;
    let impostor = Helloworld::start(nodes.client.outside(), "impostor", "127.0.0.1:0")?;
    for (id, host) in [("v4", "127.0.0.1"), ("mapped", "::ffff:127.0.0.1"), ("v6", "::1")] {
        let mut record = instance("web", id, impostor.address);
        record["Address"] = json!(host);
        servers[0].register(&record)?;
    }
    let nohop = nodes.nohop(&format!("consul.address = \"http://{BACKEND}:8500\"\n"))?;
    let is_listed = |services: &Value| {
        let backends = services[0]["backends"].as_array();
        backends.is_some_and(|backends| backends.len() == 3)
    };
    let services = nohop.wait_until(is_listed)?;
    for backend in services[0]["backends"].as_array().into_iter().flatten() {
        let reason = backend["reason"].to_string();
        ensure!(backend["state"] == "unroutable", "{backend:#}");
        ensure!(reason.contains("loopback of node `backend`"), "{backend:#}");
    }
    let connects = nodes.connect(vip(&nohop, "web")?, 20)?;
    ensure!(connects.all_failed_with("ConnectionRefused"), "{connects:?}");
    // What the agent is, nohop asks it by itself.
    let is_told = |status: &Value| {
        let facts = status["sources"][0]["facts"].to_string();
        facts.contains(BACKEND) && facts.contains("isn't this host's")
    };
    nohop.wait_for_status(is_told).map(drop)
}

//! Without Consul at the start nohop isn't ready, and answers SERVFAIL rather than that a name
//! doesn't exist; once Consul runs, it becomes ready.

use anyhow::{Result, ensure};
use serde_json::Value;
use testbed::consul::{Consul, instance};
use testbed::nohop::Nohop;

use crate::cluster::{CLIENT, Nodes};

pub fn run() -> Result<()> {
    let nodes = Nodes::new()?;
    let nohop = Nohop::start_unready(&nodes.client, &nodes.cgroup, "")?;
    let named = |status: &Value| status["problems"].to_string().contains("127.0.0.1:8500");
    let status = nohop.wait_for_status(named)?;
    ensure!(
        status["ready"] == false && status["sources"][0]["state"] == "connecting",
        "{status:#}"
    );
    let answer = nodes.dig("helloworld.service")?;
    ensure!(answer.contains("status: SERVFAIL"), "{answer}");

    let consul = Consul::server(&nodes.client, "client", CLIENT)?;
    let helloworld = nodes.helloworld("helloworld")?;
    consul.register(&instance("helloworld", "helloworld", helloworld.address))?;
    nohop.wait_until_ready()?;
    nohop.wait_for_backends("helloworld", 1)?;
    ensure!(nodes.curl("helloworld")? == "hello from helloworld\n");
    Ok(())
}

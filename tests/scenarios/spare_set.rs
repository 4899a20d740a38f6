//! An instance in warning is a spare: it gets nothing while another passes, serves when none does, and
//! gets nothing again. Weight 0 takes no new connections, and a service declares its algorithm; one
//! that can't be read leaves the last one. All by a real Consul.

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use testbed::consul::instance;
use testbed::nohop::service;

use crate::cluster::Cluster;

pub fn run() -> Result<()> {
    let cluster = Cluster::with_config(2, "balance.algorithm = \"random\"\n")?;
    let vip = cluster.vip("helloworld")?;
    let check = |verb: &str, id: &str| {
        cluster.server.put(&format!("/v1/agent/check/{verb}/service:{id}"), &Value::Null)
    };
    let only = |id: &'static str| -> Result<()> {
        let connects = cluster.nodes.connect(vip, 100)?;
        ensure!(connects.errors.is_empty() && !connects.answers.is_empty(), "{connects:?}");
        let expected = format!("hello from {id}");
        ensure!(connects.all_answered(|answer| answer == expected), "not {id}: {connects:?}");
        Ok(())
    };

    check("warn", "helloworld-1")?;
    let services = wait_for_states(&cluster, ["healthy", "spare"])?;
    let reason = backend(&services, "helloworld-1")["reason"].to_string();
    ensure!(reason.contains("is warning"), "{reason}");
    only("helloworld-0")?;
    let text = String::from_utf8(cluster.nohop.cli("explain helloworld")?.stdout)?;
    for part in
        ["goes to its one healthy backend; where that isn't possible, to 1 spare", "spare  "]
    {
        ensure!(text.contains(part), "no {part:?} in:\n{text}");
    }

    cluster.server.fail("helloworld-0")?;
    cluster.nohop.wait_until(|services| backend(services, "helloworld-0").is_null())?;
    only("helloworld-1")?;
    cluster.server.pass("helloworld-0")?;
    wait_for_states(&cluster, ["healthy", "spare"])?;
    only("helloworld-0")?;

    let register = |id: usize, meta: Value| -> Result<()> {
        let name = format!("helloworld-{id}");
        let mut instance = instance("helloworld", &name, cluster.helloworlds[id].address);
        instance["Meta"] = meta;
        cluster.server.register(&instance)
    };
    register(1, json!({ "nohop-weight": "0" }))?;
    // Consul keeps the state of a check that is registered again.
    check("pass", "helloworld-1")?;
    let services = wait_for_states(&cluster, ["healthy", "draining"])?;
    ensure!(backend(&services, "helloworld-1")["weight"] == 0, "{services:#}");
    only("helloworld-0")?;

    let algorithm = |services: &Value| {
        service(services, "helloworld").map(|web| web["algorithm"].clone()).unwrap_or_default()
    };
    ensure!(algorithm(&services) == "random", "{services:#}");
    register(0, json!({ "nohop-algorithm": "maglev" }))?;
    register(1, json!({ "nohop-weight": "1" }))?;
    wait_for_states(&cluster, ["healthy", "healthy"])?;
    cluster.nohop.wait_until(|services| algorithm(services) == "maglev")?;
    let connects = cluster.nodes.connect(vip, 50)?;
    ensure!(connects.errors.is_empty() && !connects.answers.is_empty(), "{connects:?}");

    register(0, json!({ "nohop-algorithm": "fastest" }))?;
    let services = cluster.nohop.wait_until(|services| {
        let notes = service(services, "helloworld").map(|web| web["notes"].to_string());
        notes.is_some_and(|notes| notes.contains("`fastest` is no algorithm: write `random`"))
    })?;
    ensure!(algorithm(&services) == "maglev", "{services:#}");
    Ok(())
}

/// A backend of helloworld; null where there is none.
fn backend(services: &Value, id: &str) -> Value {
    let backends = service(services, "helloworld").and_then(|web| web["backends"].as_array());
    let mut backends = backends.into_iter().flatten();
    backends.find(|backend| backend["instance"] == id).cloned().unwrap_or_default()
}

fn wait_for_states(cluster: &Cluster, states: [&str; 2]) -> Result<Value> {
    cluster.nohop.wait_until(|services| {
        let state = |idx: usize| backend(services, &format!("helloworld-{idx}"))["state"].clone();
        [state(0), state(1)] == states.map(Value::from)
    })
}

//! What the operator chooses counts: an instance in warning serves with its weight for that, one
//! without the wanted Meta is out, and one whose address is a host name is reached at the resolved address.

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use testbed::consul::instance;
use testbed::helloworld::Helloworld;
use testbed::nohop::service;

use crate::cluster::Cluster;

const CONFIG: &str = "catalog.health = \"warning\"\ncatalog.meta = { stage = \"live\" }\n";

pub fn run() -> Result<()> {
    let cluster = Cluster::with_config(0, CONFIG)?;
    let [warned, test] = ["warned", "test"].map(|name| cluster.nodes.helloworld(name));
    let (warned, test) = (warned?, test?);
    let named = Helloworld::start(cluster.nodes.client.outside(), "named", "127.0.0.1:0")?;
    let with = |mut instance: Value, changes: Value| {
        for (key, value) in changes.as_object().into_iter().flatten() {
            instance[key] = value.clone();
        }
        instance
    };
    let live = json!({ "stage": "live" });
    cluster.server.register(&with(
        instance("web", "warned", warned.address),
        json!({
            "Meta": live,
            "Weights": { "Passing": 9, "Warning": 3 },
            "Check": { "TTL": "1h", "Status": "warning" },
        }),
    ))?;
    cluster.server.register(&with(
        instance("web", "test", test.address),
        json!({ "Meta": { "stage": "test" } }),
    ))?;
    // The agent of the node where nohop runs, so that the name is this host's loopback.
    cluster.agent.register(&with(
        instance("web", "named", named.address),
        json!({ "Meta": live, "Address": "localhost" }),
    ))?;

    let backend = |services: &Value, id: &str| {
        let backends = service(services, "web").map(|web| web["backends"].clone());
        let backends = backends.as_ref().and_then(Value::as_array);
        backends.and_then(|all| all.iter().find(|backend| backend["instance"] == id)).cloned()
    };
    let services = cluster.nohop.wait_until(|services| {
        let state = |id| backend(services, id).map(|backend| backend["state"].clone());
        state("warned") == Some("warning".into()) && state("named") == Some("healthy".into())
    })?;
    // Two agents register in no order.
    cluster.nohop.wait_until_explained("web", |web| web["excluded"][0]["instance"] == "test")?;
    let shown = |id| backend(&services, id).unwrap_or_default();
    ensure!(shown("warned")["weight"] == 3, "{services:#}");
    ensure!(shown("named")["address"] == format!("localhost:{}", named.address.port()));
    let text = String::from_utf8(cluster.nohop.cli("explain web")?.stdout)?;
    for part in ["is warning", "`localhost` is 127.0.0.1", "has `stage` = `test`, not `live`"] {
        ensure!(text.contains(part), "no {part:?} in:\n{text}");
    }
    let connects = cluster.nodes.connect(cluster.vip("web")?, 200)?;
    ensure!(
        connects.all_answered(|a| a == "hello from warned" || a == "hello from named"),
        "{connects:?}"
    );
    ensure!(connects.answers.len() == 2, "both serve: {connects:?}");
    Ok(())
}

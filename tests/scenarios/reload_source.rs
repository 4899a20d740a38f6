//! The daemon gets another agent and another tag by a reload while a client opens connections: none is
//! lost on the way, and what only the new source has is routed from then on.

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use testbed::consul::{Consul, instance};

use crate::cluster::{BACKEND, CLIENT, Cluster};
use crate::load::{RATE, under_load};

pub fn run() -> Result<()> {
    let cluster = Cluster::new(2)?;
    let vip = cluster.vip("helloworld")?;
    let tagged = |service: &str, n: usize, tags: &[&str]| -> Value {
        let id = format!("{service}-{n}");
        let mut instance = instance(service, &id, cluster.helloworlds[n].address);
        instance["Tags"] = json!(tags);
        instance
    };
    for n in 0..2 {
        cluster.server.register(&tagged("helloworld", n, &["routed", "blue"]))?;
    }
    cluster.server.register(&tagged("second", 0, &["blue"]))?;
    // An agent registers with the catalog after it has answered.
    for (service, n) in [("helloworld", 2), ("second", 1)] {
        let are_blue = |instances: &Value| {
            let instances = instances.as_array().into_iter().flatten();
            let tags = instances.map(|instance| instance["ServiceTags"].to_string());
            tags.filter(|tags| tags.contains("blue")).count() == n
        };
        cluster.server.wait_for(&format!("/v1/catalog/service/{service}"), are_blue)?;
    }

    // Another agent of the cluster, on the same host at other ports.
    let ports = json!({ "http": 8501, "serf_lan": 8311, "dns": -1 });
    let more = json!({ "ports": ports });
    let server = format!("{BACKEND}:8301");
    let servers = [server.as_str()];
    let _other =
        Consul::client_with(&cluster.nodes.client, "other", CLIENT, &servers, &more, None)?;

    under_load(&cluster.nodes, vip, RATE, |load| {
        load.wait_until_second(2)?;
        let config = "consul.address = \"http://127.0.0.1:8501\"\ncatalog.tag = \"blue\"\n";
        cluster.nohop.configure(config)?;
        let reload = cluster.nohop.cli("reload")?;
        ensure!(reload.status.success(), "{reload:?}");
        cluster.nohop.wait_for_backends("second", 1).map(drop)
    })?;
    ensure!(cluster.vip("helloworld")? == vip);
    ensure!(cluster.nodes.curl("second")? == "hello from helloworld-0\n");
    cluster.nohop.wait_for_status(|status| status["ready"] == true).map(drop)
}

//! Consul's invalid instances are left out, `nohop explain` has the reasons, and the valid one serves.

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use testbed::consul::instance;

use crate::cluster::Cluster;

pub fn run() -> Result<()> {
    let cluster = Cluster::new(1)?;
    let consul = &cluster.server;
    // The client node has a bridge as Docker makes it, and so has the backend node, by its records.
    for arguments in [
        "link add docker0 type bridge",
        "address add 172.17.0.1/16 dev docker0",
        "link set docker0 up",
    ] {
        cluster.nodes.client.ip(arguments)?;
    }
    // The id of an instance, what makes it bad, and a word of the reason.
    let bad = [
        ("no-port", json!({ "Port": 0 }), "port"),
        ("host-name", json!({ "Address": "backend.example" }), "looked up"),
        ("link-local", json!({ "Address": "fe80::1" }), "link-local"),
        ("link-local-4", json!({ "Address": "169.254.9.9" }), "link-local"),
        ("other-bridge", json!({ "Address": "172.17.0.1" }), "bridge `docker0`"),
        ("unspecified", json!({ "Address": "::ffff:0.0.0.0" }), "no host's address"),
        ("in-pool", json!({ "Address": "127.200.0.1" }), "pool"),
        ("other-loopback", json!({ "Address": "127.0.0.1" }), "loopback"),
        (
            "sidecar",
            json!({
                "Kind": "connect-proxy",
                "Proxy": { "DestinationServiceName": "helloworld" },
            }),
            "proxy",
        ),
    ];
    for (id, changes, _) in &bad {
        let mut instance = instance("helloworld", id, cluster.helloworlds[0].address);
        for (key, value) in changes.as_object().into_iter().flatten() {
            instance[key] = value.clone();
        }
        consul.register(&instance)?;
    }
    consul.register(&instance("no.label", "no.label", cluster.helloworlds[0].address))?;
    // The same endpoint once more, and once more under a name that DNS can't distinguish from it.
    let first = cluster.helloworlds[0].address;
    consul.register(&instance("helloworld", "again", first))?;
    consul.register(&instance("HelloWorld", "camel", first))?;
    let last = cluster.nodes.helloworld("last")?;
    consul.register(&instance("helloworld", "last", last.address))?;
    cluster.nohop.wait_for_backends("helloworld", 2)?;
    let named = |status: &Value| status["problems"].to_string().contains("no.label");
    cluster.nohop.wait_for_status(named)?;

    // What is registered first needn't arrive first.
    let known = |explained: &Value| -> Vec<Value> {
        let lists = [&explained["service"]["backends"], &explained["excluded"]];
        lists.into_iter().filter_map(Value::as_array).flatten().cloned().collect()
    };
    let has_all = |explained: &Value| {
        let known = known(explained);
        bad.iter().all(|(id, ..)| known.iter().any(|entry| entry["instance"] == *id))
            && explained.to_string().contains("`backend/camel`")
    };
    let explained = cluster.nohop.wait_until_explained("helloworld", has_all)?;
    let known = known(&explained);
    for (id, _, word) in &bad {
        let found = known.iter().find(|entry| entry["instance"] == *id);
        let reason = found.map(|entry| entry["reason"].to_string()).unwrap_or_default();
        ensure!(reason.to_lowercase().contains(word), "{id}: {reason:?} in {explained:#}");
        ensure!(found.is_some_and(|entry| entry["state"] != "healthy"), "{id}: {explained:#}");
    }
    for (name, expected) in [
        ("helloworld", "sidecar"),
        ("helloworld", "also registered as `backend/camel`, `backend/helloworld-0`"),
        ("HelloWorld", "`HelloWorld` and `helloworld` are one service"),
        ("no.label", "DNS name"),
    ] {
        let output = cluster.nohop.cli(&format!("explain {name}"))?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(text.contains(expected), "nohop explain {name}: {text}");
    }
    let connects = cluster.nodes.connect(cluster.vip("helloworld")?, 100)?;
    ensure!(connects.errors.is_empty() && connects.answers.len() == 2, "{connects:?}");
    Ok(())
}

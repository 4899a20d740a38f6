//! A service declares its ports in Consul's Meta, or by a tag: it is reachable at those and at no other, and
//! contradictions among its instances are decided by the majority and reported.

use std::net::SocketAddrV4;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use testbed::consul::instance;
use testbed::nohop::service;

use crate::cluster::Cluster;

pub fn run() -> Result<()> {
    let cluster = Cluster::new(1)?;
    let register = |id: &str, meta: Value| -> Result<()> {
        let mut instance = instance("db", id, cluster.helloworlds[0].address);
        instance["Meta"] = meta;
        cluster.server.register(&instance)
    };
    register("db-1", json!({ "nohop-ports": "81, 5432", "version": "3" }))?;
    cluster.nohop.wait_for_backends("db", 1)?;
    let vip = *cluster.vip("db")?.ip();
    for port in [81, 5432] {
        let connects = cluster.nodes.connect(SocketAddrV4::new(vip, port), 5)?;
        ensure!(
            connects.errors.is_empty() && !connects.answers.is_empty(),
            "port {port}: {connects:?}"
        );
    }
    let other_port = cluster.nodes.connect(SocketAddrV4::new(vip, 80), 5)?;
    ensure!(other_port.all_failed_with("ConnectionRefused"), "{other_port:?}");

    register("db-2", json!({ "nohop-ports": "82" }))?;
    register("db-3", json!({ "nohop-ports": "82", "nohop-protocol": "icmp" }))?;
    // All three register one endpoint, so it is one backend.
    let has_all = |services: &Value| {
        let notes = service(services, "db").map(|db| db["notes"].to_string());
        notes.is_some_and(|notes| notes.contains("`82` (2)") && notes.contains("db-3"))
    };
    let services = cluster.nohop.wait_until(has_all)?;
    let db = service(&services, "db").cloned().unwrap_or_default();
    ensure!(db["ports"] == json!([82]) && db["protocol"] == "tcp", "{db:#}");
    let explained = cluster.nohop.cli("explain db")?;
    let text = String::from_utf8_lossy(&explained.stdout);
    for part in ["port 82 by TCP", "`82` (2): `82` applies", "`icmp` is no protocol"] {
        ensure!(text.contains(part), "no {part:?} in:\n{text}");
    }
    let connects = cluster.nodes.connect(SocketAddrV4::new(vip, 82), 5)?;
    ensure!(connects.errors.is_empty(), "{connects:?}");

    // The same by a tag; one that can't be read is reported.
    let mut tagged = instance("db", "db-1", cluster.helloworlds[0].address);
    tagged["Tags"] = json!(["routed", "nohop.ports=82", "nohop.port=1"]);
    cluster.server.register(&tagged)?;
    let agree = |services: &Value| {
        let notes = service(services, "db").map(|db| db["notes"].to_string()).unwrap_or_default();
        notes.contains("the tag `nohop.port=1` is ignored") && !notes.contains("different ports")
    };
    cluster.nohop.wait_until(agree)?;
    Ok(())
}

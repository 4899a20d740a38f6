//! The daemon is told of another agent and another tag while a client opens connections: none is
//! lost on the way, and what only the new source has is routed from then on.

use anyhow::{Result, ensure};
use lb_tests::consul::instance;
use serde_json::{Value, json};

use crate::cluster::{Cluster, SOON};
use crate::load::{RATE, under_load};

const SECONDS: u32 = 6;

pub fn story() -> Result<()> {
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

    under_load(&cluster.nodes, vip, RATE, SECONDS, |load| {
        load.wait_until_second(2)?;
        // The same agent by another name counts as another.
        let config = "consul.address = \"http://localhost:8500\"\ncatalog.tag = \"blue\"\n";
        cluster.nohop.configure(config)?;
        let reload = cluster.nohop.cli("reload")?;
        ensure!(reload.status.success(), "{reload:?}");
        cluster.nohop.wait_for_backends("second", 1, SOON).map(drop)
    })?;
    ensure!(cluster.vip("helloworld")? == vip);
    ensure!(cluster.nodes.curl("second")? == "hello from helloworld-0\n");
    cluster.nohop.wait_for_status(SOON, |status| status["ready"] == true).map(drop)
}

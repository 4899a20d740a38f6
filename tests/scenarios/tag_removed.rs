//! A service that loses the tag `routed` disappears; its former VIP leads nowhere.

use anyhow::{Result, ensure};
use serde_json::json;
use testbed::consul::instance;
use testbed::nohop::service;

use crate::cluster::Cluster;

pub fn run() -> Result<()> {
    let cluster = Cluster::new(1)?;
    let vip = cluster.vip("helloworld")?;
    ensure!(cluster.nodes.curl("helloworld")? == "hello from helloworld-0\n");

    let mut untagged = instance("helloworld", "helloworld-0", cluster.helloworlds[0].address);
    untagged["Tags"] = json!(["other"]);
    cluster.server.register(&untagged)?;
    cluster.nohop.wait_until(|services| service(services, "helloworld").is_none())?;

    let answer = cluster.nodes.dig_unknown("helloworld.service")?;
    ensure!(answer.contains("status: NXDOMAIN"), "{answer}");
    let connects = cluster.nodes.connect(vip, 20)?;
    ensure!(connects.all_failed_with("ConnectionRefused"), "{connects:?}");
    Ok(())
}

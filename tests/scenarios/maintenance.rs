//! An operator puts an instance, and then a node, into maintenance with Consul's own command: the
//! instances leave, explain reports why, and they come back.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::consul::program;

use crate::cluster::Cluster;

pub fn run() -> Result<()> {
    let cluster = Cluster::new(3)?;
    let vip = cluster.vip("helloworld")?;
    let maint = |words: &str| -> Result<()> {
        let place = cluster.nodes.backend.outside();
        place.run(program()?, &format!("maint {words}")).map(drop)
    };
    let reasons = |explanation: &Value| -> Vec<String> {
        let out = explanation["excluded"].as_array().into_iter().flatten();
        out.map(|out| format!("{} {}", out["instance"], out["reason"]).replace('"', "")).collect()
    };

    maint("-enable -service=helloworld-1 -reason=upgrade")?;
    cluster.nohop.wait_for_backends("helloworld", 2)?;
    let explanation = cluster.nohop.explain("helloworld")?;
    ensure!(reasons(&explanation) == ["helloworld-1 service maintenance"], "{explanation:#}");
    let connects = cluster.nodes.connect(vip, 100)?;
    ensure!(connects.all_answered(|answer| answer != "hello from helloworld-1"), "{connects:?}");

    maint("-disable -service=helloworld-1")?;
    cluster.nohop.wait_for_backends("helloworld", 3)?;

    maint("-enable -reason=reboot")?;
    cluster.nohop.wait_for_backends("helloworld", 0)?;
    let explanation = cluster.nohop.explain("helloworld")?;
    let reasons = reasons(&explanation);
    let last = reasons.last().context("nothing is out")?;
    ensure!(reasons.len() == 3 && last.ends_with("node maintenance"), "{explanation:#}");
    let connects = cluster.nodes.connect(vip, 10)?;
    ensure!(connects.all_failed_with("ConnectionRefused"), "{connects:?}");

    maint("-disable")?;
    cluster.nohop.wait_for_backends("helloworld", 3)?;
    ensure!(cluster.nodes.connect(vip, 100)?.errors.is_empty());
    Ok(())
}

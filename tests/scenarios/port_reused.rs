//! While Consul is down, a port goes from an instance of one service to one of another, as Nomad's ports
//! do. Services that live elsewhere lose nothing, and when Consul is back no connection goes to the wrong one.
//! A daemon that starts meanwhile serves what it remembers, unless that is too old: then names
//! get SERVFAIL, and the kernel keeps using its maps.

use anyhow::{Result, ensure};
use serde_json::Value;
use testbed::consul::instance;
use testbed::helloworld::Helloworld;

use crate::ha_cluster::{HaCluster, Setup, is_failing, is_live};

pub fn run() -> Result<()> {
    let mut cluster = HaCluster::with(&Setup::default(), |_| Ok(()))?;
    cluster.serve("mail", 2)?;
    let mail = cluster.vip("mail")?;
    cluster.assert_no_failures(|cluster, load| {
        load.wait_until_second(1)?;
        cluster.agent.kill();
        cluster.nohop.wait_for_status(is_failing)?;

        // mail-1 ends, and its port goes to a new instance of helloworld.
        let last = cluster.helloworlds.pop();
        let address = last.as_ref().map(|helloworld| helloworld.address);
        drop(last);
        let address = address.unwrap_or(mail);
        cluster.backend_agent.deregister("mail-1")?;
        let place = cluster.nodes.backend.outside();
        let newcomer = Helloworld::start(place, "newcomer-1", &address.to_string())?;
        cluster.backend_agent.register(&instance("helloworld", "newcomer-1", newcomer.address))?;
        cluster.helloworlds.push(newcomer);

        // A daemon that starts now remembers what the last one has written.
        cluster.nohop.wait_for_state("catalog.json", "mail-1")?;
        cluster.nohop.kill()?;
        cluster.nohop.start_again()?;
        let services = cluster.nohop.services()?;
        ensure!(services.as_array().is_some_and(|services| services.len() == 2), "{services:#}");

        cluster.agent.restart()?;
        cluster.nohop.wait_for_status(is_live)?;
        cluster.nohop.wait_for_backends("helloworld", 3)?;
        cluster.nohop.wait_for_backends("mail", 1)?;
        let connects = cluster.nodes.connect(mail, 200)?;
        ensure!(connects.all_answered(|answer| answer == "hello from mail-0"), "{connects:?}");
        Ok(())
    })?;

    // Older than it may be, it doesn't serve.
    cluster.nohop.terminate()?;
    cluster.agent.kill();
    cluster.nohop.configure("catalog.max_age = \"1s\"\n")?;
    cluster.nohop.start_again_unready()?;
    let knows_nothing = |status: &Value| status["problems"].to_string().contains("no full answer");
    let status = cluster.nohop.wait_for_status(knows_nothing)?;
    ensure!(status["ready"] == false, "{status:#}");
    Ok(())
}

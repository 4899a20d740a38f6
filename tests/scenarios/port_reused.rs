//! While Consul is down, a port goes from an instance of one service to one of another, as Nomad's ports
//! do. Services that live elsewhere lose nothing, and when Consul is back no connection goes to the wrong one.
//! A daemon that starts meanwhile serves what it remembers, unless that is too old: then names
//! get SERVFAIL, and the kernel goes on by what it has.

use anyhow::{Result, ensure};
use lb_tests::consul::instance;
use lb_tests::helloworld::Helloworld;
use serde_json::Value;

use crate::ha_cluster::{Servers, Setup, is_failing, is_live};

pub fn story() -> Result<()> {
    let mut servers = Servers::with(&Setup::default(), |_| Ok(()))?;
    servers.serve("mail", 2)?;
    let mail = servers.vip("mail")?;
    servers.none_lost(|servers, load| {
        load.wait_until_second(1)?;
        servers.agent.kill();
        servers.nohop.wait_for_status(is_failing)?;

        // mail-1 ends, and its port goes to a new instance of helloworld.
        let last = servers.helloworlds.pop();
        let address = last.as_ref().map(|helloworld| helloworld.address);
        drop(last);
        let address = address.unwrap_or(mail);
        servers.backend_agent.deregister("mail-1")?;
        let place = servers.nodes.backend.outside();
        let newcomer = Helloworld::start(place, "newcomer-1", &address.to_string())?;
        servers.backend_agent.register(&instance("helloworld", "newcomer-1", newcomer.address))?;
        servers.helloworlds.push(newcomer);

        // A daemon that starts now remembers what the last one has written.
        servers.nohop.wait_for_state("catalog.json", "mail-1")?;
        servers.nohop.crash()?;
        servers.nohop.start_again()?;
        let services = servers.nohop.services()?;
        ensure!(services.as_array().is_some_and(|services| services.len() == 2), "{services:#}");

        servers.agent.restart()?;
        servers.nohop.wait_for_status(is_live)?;
        servers.nohop.wait_for_backends("helloworld", 3)?;
        servers.nohop.wait_for_backends("mail", 1)?;
        let connects = servers.nodes.connect(mail, 200)?;
        ensure!(connects.all_answered(|answer| answer == "hello from mail-0"), "{connects:?}");
        Ok(())
    })?;

    // Older than it may be, it doesn't serve.
    servers.nohop.end()?;
    servers.agent.kill();
    servers.nohop.configure("catalog.max_age = \"1s\"\n")?;
    servers.nohop.start_again_unready()?;
    let knows_nothing = |status: &Value| status["problems"].to_string().contains("no full answer");
    let status = servers.nohop.wait_for_status(knows_nothing)?;
    ensure!(status["ready"] == false, "{status:#}");
    Ok(())
}

//! The agent beside nohop is cut off from the servers, and is restarted again and again. No connection is
//! lost, and afterwards news arrive.

use anyhow::{Result, ensure};
use lb_tests::consul::instance;
use lb_tests::nohop::n_healthy;

use crate::ha_cluster::{Servers, is_live};

pub fn story() -> Result<()> {
    let mut servers = Servers::new()?;
    servers.none_lost(|servers, load| {
        load.wait_until_second(1)?;
        servers.plug("down")?;
        // The servers take its node for dead meanwhile. It takes the agent itself most of a minute to
        // find out, so nohop may or may not know. That the cable is out shows in what doesn't arrive.
        let unseen = servers.nodes.helloworld("newcomer-0")?;
        let registered = instance("helloworld", "newcomer-0", unseen.address);
        servers.backend_agent.register(&registered)?;
        load.wait_until_second(12)?;
        let status = servers.nohop.status()?;
        ensure!(status["ready"] == true, "{status:#}");
        let services = servers.nohop.services()?;
        ensure!(n_healthy(&services, "helloworld") == 2, "the agent isn't cut off: {services:#}");
        servers.plug("up")?;
        servers.nohop.wait_for_backends("helloworld", 3)?;
        servers.helloworlds.push(unseen);
        servers.news_arrive("newcomer-1")?;

        for _ in 0..2 {
            servers.agent.restart()?;
            servers.nohop.wait_for_status(is_live)?;
        }
        servers.news_arrive("newcomer-2")
    })
}

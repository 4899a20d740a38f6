//! nohop's agent is cut off from the cluster, and is restarted again and again. No connection is
//! lost, and afterwards news arrive.

use anyhow::{Result, ensure};
use testbed::consul::instance;
use testbed::nohop::n_healthy;

use crate::ha_cluster::{HaCluster, is_live};

pub fn run() -> Result<()> {
    let mut cluster = HaCluster::new()?;
    cluster.assert_no_failures(|cluster, load| {
        load.wait_until_second(1)?;
        cluster.set_link("down")?;
        // The cluster take its node for dead meanwhile. It takes the agent itself most of a minute to
        // find out, so nohop may or may not know. That the cable is out shows in what doesn't arrive.
        let unseen = cluster.nodes.helloworld("newcomer-0")?;
        let registered = instance("helloworld", "newcomer-0", unseen.address);
        cluster.backend_agent.register(&registered)?;
        load.wait_until_second(12)?;
        let status = cluster.nohop.status()?;
        ensure!(status["ready"] == true, "{status:#}");
        let services = cluster.nohop.services()?;
        ensure!(n_healthy(&services, "helloworld") == 2, "the agent isn't cut off: {services:#}");
        cluster.set_link("up")?;
        cluster.nohop.wait_for_backends("helloworld", 3)?;
        cluster.helloworlds.push(unseen);
        cluster.expect_update("newcomer-1")?;

        for _ in 0..2 {
            cluster.agent.restart()?;
            cluster.nohop.wait_for_status(is_live)?;
        }
        cluster.expect_update("newcomer-2")
    })
}

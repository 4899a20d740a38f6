//! Consul's leader dies, and the others elect another; then all cluster and agents die at once and come
//! back. No connection is lost, and afterwards news arrive.

use anyhow::Result;

use crate::ha_cluster::{HaCluster, is_failing, is_live};

pub fn run() -> Result<()> {
    let mut cluster = HaCluster::new()?;
    cluster.assert_no_failures(|cluster, load| {
        load.wait_until_second(1)?;
        let leader = cluster.leader()?;
        cluster.servers[leader].kill();
        cluster.expect_update("newcomer-1")?;
        cluster.servers[leader].restart()?;

        for consul in cluster.servers.iter_mut().chain([&mut cluster.agent]) {
            consul.kill();
        }
        cluster.nohop.wait_for_status(is_failing)?;
        for consul in cluster.servers.iter_mut().chain([&mut cluster.agent]) {
            consul.spawn()?;
        }
        for consul in cluster.servers.iter().chain([&cluster.agent]) {
            consul.wait_until_ready()?;
        }
        cluster.nohop.wait_for_status(is_live)?;
        cluster.expect_update("newcomer-2")
    })
}

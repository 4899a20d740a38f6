//! Consul's leader dies, and the others elect another; then all servers and agents die at once and come
//! back. No connection is lost, and afterwards news arrive.

use anyhow::Result;

use crate::ha_cluster::{Servers, is_failing, is_live};

pub fn story() -> Result<()> {
    let mut servers = Servers::new()?;
    servers.none_lost(|servers, load| {
        load.wait_until_second(1)?;
        let leader = servers.leader()?;
        servers.servers[leader].kill();
        servers.news_arrive("newcomer-1")?;
        servers.servers[leader].restart()?;

        for consul in servers.servers.iter_mut().chain([&mut servers.agent]) {
            consul.kill();
        }
        servers.nohop.wait_for_status(is_failing)?;
        for consul in servers.servers.iter_mut().chain([&mut servers.agent]) {
            consul.spawn()?;
        }
        for consul in servers.servers.iter().chain([&servers.agent]) {
            consul.wait_until_ready()?;
        }
        servers.nohop.wait_for_status(is_live)?;
        servers.news_arrive("newcomer-2")
    })
}

//! The agent beside nohop is cut off from the servers, and is restarted again and again. No dial is
//! lost, and afterwards news arrive.

use anyhow::{Result, ensure};

use crate::cluster::SOON;
use crate::servers::{Servers, is_live};

pub fn story() -> Result<()> {
    let mut servers = Servers::new()?;
    servers.none_lost(35, |servers, load| {
        load.wait_until_second(1)?;
        servers.plug("down")?;
        // The servers take its node for dead meanwhile. It takes the agent itself most of a minute to
        // find out, so nohop may or may not know.
        load.wait_until_second(12)?;
        let status = servers.nohop.status()?;
        ensure!(status["ready"] == true, "{status:#}");
        servers.plug("up")?;
        servers.news_arrive("newcomer-1")?;

        for _ in 0..2 {
            servers.agent.restart()?;
            servers.nohop.wait_for_status(SOON, is_live)?;
        }
        servers.news_arrive("newcomer-2")
    })
}

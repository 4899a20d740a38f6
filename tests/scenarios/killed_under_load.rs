//! The daemon is killed again and again while a client opens 2,000 connections a second, and
//! backends come and go in between: no connection fails, and each new daemon takes over.

use anyhow::{Result, ensure};

use crate::cluster::{Catalog, Nodes, vip};
use crate::load::{RATE, under_load};

/// The daemon is killed at each of these seconds of the load.
const KILLED_AT: [u32; 5] = [1, 3, 5, 7, 9];

pub fn run() -> Result<()> {
    let nodes = Nodes::new()?;
    let backends = ["0", "1", "2", "3"].map(|name| nodes.helloworld(name));
    let [zero, one, two, three] = backends;
    let (zero, one, two, three) = (zero?, one?, two?, three?);
    let all = [zero.address, one.address, two.address, three.address];
    let catalog = Catalog::new(&[("helloworld", &all)])?;
    let mut nohop = nodes.nohop(&catalog.config())?;
    let vip = vip(&nohop, "helloworld")?;

    under_load(&nodes, vip, RATE, |load| {
        for (round, second) in KILLED_AT.into_iter().enumerate() {
            load.wait_until_second(second)?;
            nohop.kill()?;
            // What the new daemon finds isn't what the killed one left.
            let present = &all[..2 + round % 3];
            catalog.set(&[("helloworld", present)])?;
            nohop.start_again()?;
            nohop.process.wait_for_line(&["took over what was attached"])?;
            nohop.wait_for_backends("helloworld", present.len())?;
            let status = nohop.status()?;
            ensure!(status["datapath"]["adopted"] == true, "{status:#}");
            ensure!(crate::cluster::vip(&nohop, "helloworld")? == vip);
            // And a change in the daemon's lifetime.
            catalog.set(&[("helloworld", &all[1..])])?;
            nohop.wait_for_backends("helloworld", 3)?;
        }
        Ok(())
    })?;
    Ok(())
}

//! The daemon is stopped and started again, as an upgrade does, while a client opens 2,000
//! connections a second: no connection fails, neither when the maps are taken over nor when larger
//! ones take their place.

use anyhow::{Result, ensure};

use crate::cluster::{Catalog, Nodes, vip};
use crate::load::{RATE, under_load};

pub fn run() -> Result<()> {
    let nodes = Nodes::new()?;
    let (one, two) = (nodes.helloworld("1")?, nodes.helloworld("2")?);
    let both = [one.address, two.address];
    let catalog = Catalog::new(&[("helloworld", &both)])?;
    let mut nohop = nodes.nohop(&catalog.config())?;
    let vip = vip(&nohop, "helloworld")?;

    under_load(&nodes, vip, RATE, |load| {
        for second in [1, 3, 5] {
            load.wait_until_second(second)?;
            ensure!(nohop.terminate()?.success());
            nohop.start_again()?;
            let status = nohop.status()?;
            ensure!(status["datapath"]["adopted"] == true, "{status:#}");
            let text = String::from_utf8(nohop.cli("status")?.stdout)?;
            ensure!(text.contains("taken over from an earlier daemon"), "{text}");
        }
        load.wait_until_second(7)?;
        ensure!(nohop.terminate()?.success());
        catalog.set(&[("helloworld", &both[..1])])?;
        nohop.configure(&(catalog.config() + "datapath.max_services = 32768\n"))?;
        nohop.start_again()?;
        nohop.wait_for_backends("helloworld", 1)?;
        let status = nohop.status()?;
        let maps = status["datapath"]["maps"].to_string();
        ensure!(status["datapath"]["adopted"] == false && maps.contains("32768"), "{status:#}");
        ensure!(crate::cluster::vip(&nohop, "helloworld")? == vip);
        Ok(())
    })?;
    Ok(())
}

//! Routed names are answered by the kernel: as the daemon answers them, and also while it is dead or
//! being replaced.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::cluster::{Catalog, Nodes, vip};

pub fn run() -> Result<()> {
    let nodes = Nodes::new()?;
    let one = nodes.helloworld("one")?;
    let catalog = Catalog::new(&[("helloworld", &[one.address]), ("gone", &[one.address])])?;
    let mut nohop = nodes.nohop(&catalog.config())?;
    let vip = vip(&nohop, "helloworld")?.ip().to_string();
    nohop.wait_for_status(|status| unit(status)["state"] == "attached")?;

    let dig = |query: &str| nodes.dig(query);
    ensure!(dig("+short helloworld.service")?.trim() == vip);

    nohop.kill()?;
    ensure!(nodes.curl("helloworld")? == "hello from one\n", "by name, without a daemon");
    ensure!(dig("+short HelloWorld.SERVICE")?.trim() == vip);
    let missing = dig("nothing.service")?;
    ensure!(missing.contains("status: SERVFAIL"), "{missing}");
    let elsewhere = dig("example.com")?;
    ensure!(elsewhere.contains("status: SERVFAIL"), "{elsewhere}");

    catalog.set(&[("helloworld", &[one.address])])?;
    nohop.start_again()?;
    let gone = dig("gone.service").context("a name that left while the daemon was dead")?;
    ensure!(gone.contains("status: NXDOMAIN"), "{gone}");
    ensure!(dig("+short helloworld.service")?.trim() == vip);

    ensure!(nohop.terminate()?.success());
    ensure!(nodes.curl("helloworld")? == "hello from one\n", "after an orderly stop");
    Ok(())
}

pub fn unit(status: &Value) -> Value {
    let units = status["datapath"]["units"].as_array().cloned().unwrap_or_default();
    units.into_iter().find(|unit| unit["name"] == "names").unwrap_or_default()
}

//! Routed names are answered by the kernel: as the daemon answers them, and also while it is dead or
//! being replaced.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use testbed::{TIMEOUT, cmd};

use crate::cluster::{Catalog, Nodes, unit, vip};

pub fn run() -> Result<()> {
    let nodes = Nodes::new()?;
    let one = nodes.helloworld("one")?;
    let catalog = Catalog::new(&[("helloworld", &[one.address]), ("gone", &[one.address])])?;
    let mut nohop = nodes.nohop(&catalog.config())?;
    let vip = vip(&nohop, "helloworld")?.ip().to_string();
    nohop.wait_for_status(|status| unit(status, "names")["state"] == "attached")?;

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

/// With `catalog.expired = "refuse"` neither names nor connections outlive `catalog.max_age`, until a daemon
/// is back.
pub fn too_old() -> Result<()> {
    let nodes = Nodes::new()?;
    let one = nodes.helloworld("one")?;
    let catalog = Catalog::new(&[("helloworld", &[one.address])])?;
    let config = "catalog.expired = \"refuse\"\ncatalog.max_age = \"1s\"\n";
    let mut nohop = nodes.nohop(&(catalog.config() + config))?;
    let vip = vip(&nohop, "helloworld")?;
    nohop.wait_for_status(|status| unit(status, "names")["state"] == "attached")?;
    let is_answered = || -> Result<bool> {
        Ok(nodes.dig("+short helloworld.service")?.trim() == vip.ip().to_string())
    };
    let fails =
        || -> Result<bool> { Ok(nodes.dig("helloworld.service")?.contains("status: SERVFAIL")) };
    let connects = || -> Result<bool> {
        Ok(nodes.connect(vip, 1)?.all_answered(|answer| answer == "hello from one"))
    };
    let is_refused =
        || -> Result<bool> { Ok(nodes.connect(vip, 1)?.all_failed_with("ConnectionRefused")) };
    ensure!(is_answered()? && connects()?);

    nohop.kill()?;
    wait_until("names to fail", fails)?;
    // For connections a daemon counts as alive longer.
    wait_until("connections to be refused", is_refused)?;
    ensure!(fails()?);

    nohop.start_again()?;
    wait_until("names to be answered", is_answered)?;
    ensure!(connects()?);
    Ok(())
}

/// Where the unit can't be loaded, because something else has the name of one of its maps, the daemon answers, and
/// `status` has the reason.
pub fn refused() -> Result<()> {
    let nodes = Nodes::new()?;
    let one = nodes.helloworld("one")?;
    let catalog = Catalog::new(&[("helloworld", &[one.address])])?;
    let mut nohop = nodes.nohop(&catalog.config())?;
    ensure!(nohop.terminate()?.success());
    let pin = nohop.pin("maps/NAMES")?;
    fs::remove_file(&pin).context("remove a pin")?;
    let kind = "type array key 4 value 4 entries 1 name foreign";
    cmd::words("bpftool", &format!("map create {} {kind}", pin.display()))?;

    nohop.start_again()?;
    let names = unit(&nohop.status()?, "names");
    let reason = names["reason"].to_string();
    ensure!(names["state"] == "failed" && reason.contains("maps/NAMES"), "{names:#}");
    ensure!(nodes.curl("helloworld")? == "hello from one\n");
    let origin = nohop.document("/v1/dns?name=helloworld.service&type=A")?["origin"].clone();
    ensure!(origin == "table", "{origin}");

    ensure!(nohop.terminate()?.success());
    fs::remove_file(&pin).context("remove a pin")?;
    nohop.start_again()?;
    nohop.wait_for_status(|status| unit(status, "names")["state"] == "attached")?;
    Ok(())
}

/// Waits until it is so: no event shows what a program in the kernel decides by the time.
fn wait_until(what: &str, is_so: impl Fn() -> Result<bool>) -> Result<()> {
    const PAUSE: Duration = Duration::from_millis(100);
    let deadline = Instant::now() + TIMEOUT;
    while !is_so()? {
        ensure!(Instant::now() < deadline, "waited for {what} for {TIMEOUT:?}");
        std::thread::sleep(PAUSE);
    }
    Ok(())
}

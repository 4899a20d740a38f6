//! The state directory is lost while the daemon is down: names keep their addresses, because the
//! kernel's maps know them. Only when those are gone, too, names may get others.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result, ensure};
use testbed::nohop::Nohop;

use crate::cluster::{Catalog, Nodes};

/// So small a pool, for so many names, that some don't get the address that is their first choice.
const SMALL: &str = "vip.pool = \"127.128.0.0/24\"\ndatapath.max_services = 200\n";
const N_SERVICES: usize = 150;

pub fn run() -> Result<()> {
    let nodes = Nodes::new()?;
    let helloworld = nodes.helloworld("helloworld")?;
    let names: Vec<String> = (0..N_SERVICES).map(|i| format!("helloworld-{i}")).collect();
    let backends = [helloworld.address];
    let services: Vec<_> = names.iter().map(|name| (name.as_str(), &backends[..])).collect();

    // The later half is there first: had all come at once, others would have had to give way.
    let catalog = Catalog::new(&services[N_SERVICES / 2..])?;
    let mut nohop = nodes.nohop(&(catalog.config() + SMALL))?;
    catalog.set(&services)?;
    nohop.wait_until(|list| list.as_array().is_some_and(|l| l.len() == N_SERVICES))?;
    let before = vips(&nohop)?;

    ensure!(nohop.terminate()?.success());
    fs::remove_dir_all(nohop.state_dir()).context("remove the state directory")?;
    nohop.start_again()?;
    ensure!(vips(&nohop)? == before, "names have other addresses");
    ensure!(nodes.curl("helloworld-3")? == "hello from helloworld\n");
    ensure!(nohop.state_dir().join("vips.json").exists(), "the addresses aren't written again");

    ensure!(nohop.terminate()?.success());
    fs::remove_dir_all(nohop.state_dir()).context("remove the state directory")?;
    let unload = nohop.cli(&format!("unload --bpffs {}", nohop.pins().display()))?;
    ensure!(unload.status.success(), "{unload:?}");
    nohop.start_again()?;
    ensure!(vips(&nohop)? != before, "this scenario shows nothing: it was all by first choice");
    Ok(())
}

fn vips(nohop: &Nohop) -> Result<BTreeMap<String, String>> {
    let services = nohop.services()?;
    let services = services.as_array().context("no list of services")?;
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    Ok(services.iter().map(|service| (text(&service["name"]), text(&service["vip"]))).collect())
}

//! Consul and a static catalog side by side: for one name the first source that has it. A name that
//! leaves one falls to the other and keeps its VIP; one that fails keeps what it had; a reload adds,
//! reorders and removes them while connections are opened.

use std::collections::BTreeSet;
use std::net::SocketAddrV4;

use anyhow::{Result, ensure};
use serde_json::Value;
use testbed::nohop::service;

use crate::cluster::{Catalog, Cluster};
use crate::load::{RATE, under_load};

pub fn run() -> Result<()> {
    let mut cluster = Cluster::new(2)?;
    let vip = cluster.vip("helloworld")?;
    let static_one = cluster.nodes.helloworld("static")?;
    let both = [("helloworld", &[static_one.address][..]), ("extra", &[static_one.address])];
    let catalog = Catalog::new(&both)?;
    let config = |sources: &str| {
        format!("catalog.sources = {sources}\ncatalog.file = {:?}\n", catalog.path())
    };
    let reload = |cluster: &Cluster, config: &str| -> Result<()> {
        cluster.nohop.configure(config)?;
        let reload = cluster.nohop.cli("reload")?;
        ensure!(reload.status.success(), "{reload:?}");
        Ok(())
    };
    let states = |status: &Value| -> Vec<String> {
        let sources = status["sources"].as_array().into_iter().flatten();
        sources.map(|source| format!("{} {}", source["name"], source["state"])).collect()
    };
    let live = |names: [&str; 2]| names.map(|name| format!("\"{name}\" \"live\"")).to_vec();
    // Whether a service has these backends.
    let is_at = |services: &Value, name: &str, addresses: &[SocketAddrV4]| {
        let backends = service(services, name).and_then(|service| service["backends"].as_array());
        let backends = backends.into_iter().flatten();
        let found: BTreeSet<_> = backends.map(|backend| backend["address"].to_string()).collect();
        found == addresses.iter().map(|address| format!("\"{address}\"")).collect()
    };
    let in_consul = [cluster.helloworlds[0].address, cluster.helloworlds[1].address];
    let in_file = [static_one.address];

    // Under load: the file joins, takes over by the order of the sources, and loses a name.
    under_load(&cluster.nodes, vip, RATE, |load| {
        load.wait_until_second(1)?;
        reload(&cluster, &config("[\"consul\", \"file\"]"))?;
        cluster.nohop.wait_for_backends("extra", 1)?;
        ensure!(is_at(&cluster.nohop.services()?, "helloworld", &in_consul));
        reload(&cluster, &config("[\"file\", \"consul\"]"))?;
        cluster.nohop.wait_until(|services| is_at(services, "helloworld", &in_file))?;
        catalog.set(&both[1..])?;
        cluster.nohop.wait_until(|services| is_at(services, "helloworld", &in_consul))?;
        catalog.set(&both)?;
        cluster.nohop.wait_until(|services| is_at(services, "helloworld", &in_file)).map(drop)
    })?;
    ensure!(cluster.vip("helloworld")? == vip);
    ensure!(cluster.nodes.curl("helloworld")? == "hello from static\n");
    let status = cluster.nohop.wait_for_status(|it| states(it) == live(["file", "consul"]))?;
    ensure!(status["ready"] == true, "{status:#}");

    // What each source has.
    let explained = cluster.nohop.explain("helloworld")?;
    ensure!(explained["source"] == "file" && explained["shadowed"][0] == "consul", "{explained:#}");
    let text = String::from_utf8(cluster.nohop.cli("explain helloworld")?.stdout)?;
    ensure!(text.contains("source: file, which shadows consul"), "{text}");
    let explained = cluster.nohop.explain("extra")?;
    ensure!(explained["source"] == "file" && explained["shadowed"] == serde_json::json!([]));
    let file = catalog.directory().join("nohop.toml");
    std::fs::write(&file, config("[\"file\", \"consul\"]"))?;
    let check = cluster.nohop.cli(&format!("check --json --config {}", file.display()))?;
    let check: Value = serde_json::from_slice(&check.stdout)?;
    for what in ["source file", "source consul"] {
        let mut checks = check["checks"].as_array().into_iter().flatten();
        ensure!(checks.any(|it| it["what"] == what), "{what}: {check:#}");
    }

    // Consul alone has this one, and keeps it while it is away. The file keeps changing.
    cluster.serve("second", 1)?;
    cluster.agent.kill();
    cluster.nohop.wait_for_status(|status| status["sources"][1]["state"] == "failing")?;
    ensure!(cluster.nodes.curl("second")? == "hello from second-0\n");
    catalog.set(&both[1..])?;
    cluster.nohop.wait_until(|services| is_at(services, "helloworld", &in_consul))?;
    ensure!(cluster.nodes.curl("helloworld")?.starts_with("hello from helloworld-"));
    // So does a daemon that starts meanwhile: Consul's copy counts.
    ensure!(cluster.nohop.terminate()?.success());
    cluster.nohop.start_again()?;
    ensure!(cluster.nodes.curl("second")? == "hello from second-0\n");
    ensure!(cluster.nodes.curl("extra")? == "hello from static\n");

    // A reload drops Consul, and what it alone had.
    let static_two = cluster.nodes.helloworld("static-two")?;
    let in_file = [static_one.address, static_two.address];
    catalog.set(&[("helloworld", &in_file), both[1]])?;
    cluster.nohop.wait_until(|services| is_at(services, "helloworld", &in_file))?;
    under_load(&cluster.nodes, vip, RATE, |load| {
        load.wait_until_second(1)?;
        reload(&cluster, &config("[\"file\"]"))?;
        let is_gone = |services: &Value| service(services, "second").is_none();
        cluster.nohop.wait_until(is_gone).map(drop)
    })?;
    ensure!(cluster.vip("helloworld")? == vip);
    let status = cluster.nohop.status()?;
    ensure!(states(&status) == ["\"file\" \"live\""], "{status:#}");

    // It comes back, first in the list.
    cluster.agent.restart()?;
    reload(&cluster, &config("[\"consul\", \"file\"]"))?;
    cluster.nohop.wait_until(|services| is_at(services, "helloworld", &in_consul))?;
    ensure!(cluster.vip("helloworld")? == vip);
    cluster.nohop.wait_for_backends("second", 1)?;
    ensure!(cluster.nodes.curl("second")? == "hello from second-0\n");
    Ok(())
}

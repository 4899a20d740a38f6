//! The way out: `--shadow`, a file, a key of Consul. Connects are only counted then and names get
//! SERVFAIL, within seconds and without a restart; and so it goes back.

use std::fs;
use std::net::SocketAddrV4;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use testbed::nohop::{Nohop, service};

use crate::cluster::{Catalog, Cluster, Nodes, vip};

pub fn run() -> Result<()> {
    let nodes = Nodes::new()?;
    let helloworld = nodes.helloworld("helloworld")?;
    let catalog = Catalog::new(&[("helloworld", &[helloworld.address])])?;
    let shadow = format!("shadow = true\n{}", catalog.config());
    let mut nohop = Nohop::start_unready(&nodes.client, &nodes.cgroup, &shadow)?;
    let status = nohop.wait_for_status(|status| status["services"] == 1)?;
    ensure!(status["datapath"]["mode"] == "shadow" && status["datapath"]["attached"] == true);
    ensure!(status["datapath"]["mode_reason"].to_string().contains("--shadow"), "{status:#}");
    let vip = vip(&nohop, "helloworld")?;
    nothing_is_translated(&nodes, &nohop, vip)?;
    ensure!(connects(&nohop)? == (0, 10));
    let text = String::from_utf8(nohop.cli("status")?.stdout)?;
    ensure!(
        text.contains("NOT READY") && text.contains("shadow: connections are only counted"),
        "{text}"
    );
    let text = String::from_utf8(nohop.cli("services")?.stdout)?;
    ensure!(text.contains("connects 0, refused 0, 10 only counted"), "{text}");
    ensure!(nohop.explain("helloworld")?["connect"].to_string().contains("SERVFAIL"));

    // Now in earnest.
    ensure!(nohop.terminate()?.success());
    nohop.configure(&catalog.config())?;
    nohop.start_again()?;
    everything_is_translated(&nodes, &nohop, vip)?;

    let off = nohop.state_dir().join("off");
    let seen = |mode: &str| -> Result<Value> {
        nohop.wait_for_status(|status| status["datapath"]["mode"] == mode)
    };
    fs::write(&off, "")?;
    let status = seen("shadow")?;
    ensure!(status["problems"].to_string().contains(&off.display().to_string()), "{status:#}");
    nothing_is_translated(&nodes, &nohop, vip)?;
    fs::remove_file(&off)?;
    seen("translate")?;
    everything_is_translated(&nodes, &nohop, vip)?;

    // It outlives the daemon, and the next one begins with it.
    fs::write(&off, "")?;
    seen("shadow")?;
    nohop.kill()?;
    ensure!(nodes.connect(vip, 10)?.all_failed_with("HostUnreachable"));
    nohop.start_again_unready()?;
    nohop.wait_for_status(|status| status["services"] == 1)?;
    nothing_is_translated(&nodes, &nohop, vip)?;
    fs::remove_file(&off)?;
    nohop.wait_until_ready()?;
    everything_is_translated(&nodes, &nohop, vip)
}

/// The same by Consul's key, on the node of a client agent.
pub fn by_key() -> Result<()> {
    let cluster = Cluster::new(1)?;
    let (nodes, vip) = (&cluster.nodes, cluster.vip("helloworld")?);
    everything_is_translated(nodes, &cluster.nohop, vip)?;
    cluster.server.put("/v1/kv/nohop/off", &json!("now"))?;
    let is_shadow = |status: &Value| status["datapath"]["mode"] == "shadow";
    let status = cluster.nohop.wait_for_status(is_shadow)?;
    ensure!(status["problems"].to_string().contains("nohop/off"), "{status:#}");
    nothing_is_translated(nodes, &cluster.nohop, vip)?;
    cluster.server.delete("/v1/kv/nohop/off")?;
    cluster.nohop.wait_until_ready()?;
    everything_is_translated(nodes, &cluster.nohop, vip)
}

fn everything_is_translated(nodes: &Nodes, nohop: &Nohop, vip: SocketAddrV4) -> Result<()> {
    let status = nohop.status()?;
    ensure!(status["datapath"]["mode"] == "translate" && status["ready"] == true, "{status:#}");
    ensure!(status["datapath"]["mode_reason"].is_null(), "{status:#}");
    let connects = nodes.connect(vip, 10)?;
    ensure!(connects.all_answered(|answer| answer.starts_with("hello from")), "{connects:?}");
    ensure!(nodes.curl("helloworld")?.starts_with("hello from"));
    Ok(())
}

/// Connections fail at the route, as without nohop; SERVFAIL sends the resolver to another server.
fn nothing_is_translated(nodes: &Nodes, nohop: &Nohop, vip: SocketAddrV4) -> Result<()> {
    let status = nohop.status()?;
    ensure!(status["datapath"]["mode"] == "shadow" && status["ready"] == false, "{status:#}");
    let (sent, counted) = connects(nohop)?;
    let failed = nodes.connect(vip, 10)?;
    ensure!(failed.all_failed_with("HostUnreachable"), "{failed:?}");
    ensure!(connects(nohop)? == (sent, counted + 10), "{:?}", connects(nohop)?);
    let answer = nodes.dig("helloworld.service")?;
    ensure!(answer.contains("status: SERVFAIL"), "{answer}");
    Ok(())
}

/// The connections of helloworld that were sent to a backend, and those that were only counted.
fn connects(nohop: &Nohop) -> Result<(u64, u64)> {
    let services = nohop.services()?;
    let count = |what: &str| service(&services, "helloworld").and_then(|it| it[what].as_u64());
    Ok((count("connects").unwrap_or(0), count("shadowed").unwrap_or(0)))
}

//! Somebody runs `nohop unload` under a running daemon: it sees that, names get SERVFAIL rather
//! than addresses that lead nowhere, and dials to a VIP go nowhere.

use anyhow::{Result, ensure};

use crate::cluster::{Catalog, Nodes, SOON, attached, vip};

pub fn story() -> Result<()> {
    let nodes = Nodes::new()?;
    let helloworld = nodes.helloworld("helloworld")?;
    let catalog = Catalog::new(&[("helloworld", &[helloworld.address])])?;
    let nohop = nodes.nohop(&catalog.config())?;
    let vip = vip(&nohop, "helloworld")?;

    let unload = format!("unload --cgroup {}", nodes.cgroup.path().display());
    let output = nohop.cli(&unload)?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success() && text.contains("detached 2 programs"), "{text}");
    ensure!(attached(&nodes.cgroup)?.is_empty());
    let status = nohop.wait_for_status(SOON, |status| status["plane"]["attached"] == false)?;
    ensure!(status["ready"] == false, "{status:#}");
    ensure!(status["problems"].to_string().contains("restart nohop"), "{status:#}");
    let answer = nodes.dig("helloworld.service")?;
    ensure!(answer.contains("status: SERVFAIL"), "{answer}");
    let dials = nodes.dial(vip, 10)?;
    ensure!(dials.errors.get("HostUnreachable") == Some(&10), "{dials:?}");

    let route = || nodes.client.ip("route show table local type unreachable");
    ensure!(route()?.contains("127.128.0.0/9"), "{}", route()?);
    let output = nohop.cli(&format!("{unload} --all"))?;
    ensure!(output.status.success(), "{output:?}");
    ensure!(route()?.is_empty(), "{}", route()?);
    ensure!(nohop.cli(&format!("{unload} --all --json"))?.status.success(), "again is no error");
    Ok(())
}

//! The cgroup disappears under a running daemon, and comes back: until the hooks are attached to it
//! again the daemon isn't ready and names get SERVFAIL, so that no client connects to a VIP without hooks.

use std::fs;

use anyhow::{Context, Result, ensure};
use lb_userspace::datapath::{UNITS, hooks};
use serde_json::Value;
use testbed::cmd;

use crate::cluster::{Catalog, Nodes, attached};

pub fn run() -> Result<()> {
    let nodes = Nodes::new()?;
    let helloworld = nodes.helloworld("helloworld")?;
    let catalog = Catalog::new(&[("helloworld", &[helloworld.address])])?;
    let nohop = nodes.nohop(&(catalog.config() + "dns.forward = []\n"))?;
    let outside = nodes.client.outside();
    let readyz = || {
        let socket = nohop.admin().trim_start_matches("unix:").to_owned();
        let code = "-s -o /dev/null -w %{http_code}";
        outside.run("curl", &format!("{code} --unix-socket {socket} http://nohop/readyz"))
    };
    let dig = || outside.run("dig", "+time=60 +tries=1 helloworld.service");

    // The daemon isn't in the cgroup that it serves: a child of it has connected from inside, and left
    // nothing behind.
    nohop.wait_for_status(|status| status["problems"] == serde_json::json!([]))?;
    let dump = format!("-j map dump pinned {}", nohop.pin("maps/PROBE")?.display());
    let probe: Value = serde_json::from_str(&cmd::words("bpftool", &dump)?)?;
    let seen = &probe[0]["formatted"]["value"];
    let prober = seen["tgid"].as_i64().with_context(|| format!("no process: {probe}"))?;
    let daemon = i64::from(nohop.process.pid().as_raw_nonzero().get());
    ensure!(prober > 0 && prober != daemon, "{probe}");
    ensure!(!nodes.cgroup.path().join("nohop-probe").exists());
    ensure!(readyz()? == "200" && dig()?.contains("status: NOERROR"));

    fs::remove_dir(nodes.cgroup.path()).context("remove the cgroup")?;
    let status = nohop.wait_for_status(|status| status["datapath"]["attached"] == false)?;
    ensure!(status["ready"] == false, "{status:#}");
    let cgroup = nodes.cgroup.path().display().to_string();
    ensure!(status["problems"].to_string().contains(&cgroup), "{status:#}");
    ensure!(readyz()? == "503", "{}", readyz()?);
    ensure!(dig()?.contains("status: SERVFAIL"), "{}", dig()?);
    let text = String::from_utf8(nohop.cli("status")?.stdout)?;
    for part in ["NOT READY", "NOT ATTACHED to", "can't open the cgroup"] {
        ensure!(text.contains(part), "no {part:?} in:\n{text}");
    }

    fs::create_dir(nodes.cgroup.path()).context("make the cgroup again")?;
    let status = nohop.wait_for_status(|status| status["ready"] == true)?;
    ensure!(status["problems"].to_string().contains("attached again"), "{status:#}");
    ensure!(readyz()? == "200" && dig()?.contains("status: NOERROR"));
    ensure!(
        attached(&nodes.cgroup)?.len() == hooks(UNITS).count(),
        "{:?}",
        attached(&nodes.cgroup)?
    );
    ensure!(nodes.curl("helloworld")? == "hello from helloworld\n");
    Ok(())
}

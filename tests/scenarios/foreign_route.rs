//! Another program's route lets VIPs reach this host where no hook runs: in the place of the
//! unreachable route it keeps nohop from starting, next to it it is a problem, and so
//! is a rule that comes before the table local's. All are named.

use anyhow::{Result, ensure};
use testbed::bpffs::Bpffs;
use testbed::cmd;

use crate::cluster::{Catalog, Nodes};

const POOL: &str = "127.128.0.0/9";

pub fn run() -> Result<()> {
    let nodes = Nodes::new()?;
    let helloworld = nodes.helloworld("helloworld")?;
    let catalog = Catalog::new(&[("helloworld", &[helloworld.address])])?;
    let outside = nodes.client.outside();
    let directory = catalog.directory();
    let bpffs = Bpffs::new()?;

    for kind in ["local", "throw"] {
        let route = format!("{kind} {POOL}");
        let device = if kind == "local" { " dev lo" } else { "" };
        nodes.client.ip(&format!("route add {route}{device} table local"))?;
        let mut command = outside.command("timeout");
        command
            .arg("120")
            .arg(cmd::built("nohop")?)
            .arg("run")
            .arg("--catalog")
            .arg(catalog.path());
        command.arg("--cgroup").arg(nodes.cgroup.path()).arg("--state-dir").arg(&directory);
        command.arg("--bpffs").arg(bpffs.path().join("nohop"));
        command.arg("--admin-listen").arg(format!("unix:{}/other.sock", directory.display()));
        let output = cmd::output(command)?;
        let text = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(1), "{kind}: {}\n{text}", output.status);
        let fix = format!("ip route del {route} table local");
        ensure!(text.contains("is in the place of") && text.contains(&fix), "{kind}: {text}");
        nodes.client.ip(&format!("route del {route} table local"))?;
    }

    let nohop = nodes.nohop(&catalog.config())?;
    let hole = "local 127.130.0.0/16";
    nodes.client.ip(&format!("route add {hole} dev lo table local"))?;
    let has_hole = |status: &serde_json::Value| status["problems"].to_string().contains(hole);
    let status = nohop.wait_for_status(has_hole)?;
    ensure!(status["ready"] == true, "{status:#}");
    let check = String::from_utf8_lossy(&nohop.cli("check")?.stdout).into_owned();
    ensure!(check.contains(&format!("ip route del {hole} table local")), "{check}");
    nodes.client.ip(&format!("route del {hole} table local"))?;
    nohop.wait_for_status(|status| !has_hole(status))?;

    // Rules that come before the table local's.
    for rule in [
        "rule add pref 100 lookup local",
        "rule del pref 0",
        "rule add pref 50 to 127.200.0.0/16 lookup 77",
        "route add local 127.200.0.0/16 dev lo table 77",
    ] {
        nodes.client.ip(rule)?;
    }
    let is_led =
        |status: &serde_json::Value| status["problems"].to_string().contains("127.200.0.0 has");
    nohop.wait_for_status(is_led)?;
    nodes.client.ip("rule add pref 0 lookup local")?;
    nohop.wait_for_status(|status| !is_led(status))?;
    Ok(())
}

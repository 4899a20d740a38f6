//! A hook of a running daemon is detached from outside: it is attached again, and reported. `nohop unload`
//! is refused while the daemon runs, and takes everything away once it has ended.

use anyhow::{Result, ensure};
use lb_userspace::datapath::{UNITS, hooks};
use testbed::cmd;

use crate::cluster::{Catalog, Nodes, attached, vip};

pub fn run() -> Result<()> {
    let nodes = Nodes::new()?;
    let helloworld = nodes.helloworld("helloworld")?;
    let catalog = Catalog::new(&[("helloworld", &[helloworld.address])])?;
    let nohop = nodes.nohop(&catalog.config())?;
    let vip = vip(&nohop, "helloworld")?;

    let link = nohop.pin("links/nohop_connect4")?;
    cmd::words("bpftool", &format!("link detach pinned {}", link.display()))?;
    let status = nohop.wait_for_status(|status| {
        status["problems"].to_string().contains("something detached nohop_connect4")
    })?;
    ensure!(status["problems"].to_string().contains("attached again"), "{status:#}");
    ensure!(status["ready"] == true, "{status:#}");
    ensure!(nodes.curl("helloworld")? == "hello from helloworld\n");

    let unload = format!("unload --bpffs {}", nohop.pins().display());
    let refused = nohop.cli(&unload)?;
    let text = String::from_utf8_lossy(&refused.stderr);
    let pid = nohop.process.pid().as_raw_nonzero();
    ensure!(!refused.status.success() && text.contains(&format!("process {pid}")), "{text}");
    ensure!(nohop.terminate()?.success());
    ensure!(nodes.connect(vip, 10)?.all_answered(|answer| answer == "hello from helloworld"));

    let output = nohop.cli(&unload)?;
    let text = String::from_utf8_lossy(&output.stdout);
    // And that of the unit `names`, on `lo`.
    let detached = format!("detached {} programs", hooks(UNITS).count() + 1);
    ensure!(output.status.success() && text.contains(&detached), "{output:?}");
    ensure!(attached(&nodes.cgroup)?.is_empty());
    ensure!(!nohop.pins().exists());
    let connects = nodes.connect(vip, 10)?;
    ensure!(connects.errors.get("HostUnreachable") == Some(&10), "{connects:?}");

    let route = || nodes.client.ip("route show table local type unreachable");
    ensure!(route()?.contains("127.128.0.0/9"), "{}", route()?);
    let output = nohop.cli(&format!("{unload} --all"))?;
    ensure!(output.status.success(), "{output:?}");
    ensure!(route()?.is_empty(), "{}", route()?);
    ensure!(nohop.cli(&format!("{unload} --all --json"))?.status.success(), "again is no error");
    Ok(())
}

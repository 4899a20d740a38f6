//! Log messages of the programs in the kernel are in the daemon's log, once a second at most; and the
//! inconsistency that they report is refused and counted, not sent elsewhere.

use anyhow::{Result, ensure};
use testbed::cmd;

use crate::cluster::{Catalog, Nodes, vip};

const MESSAGE: &str = "leads to a backend that isn't there";

pub fn run() -> Result<()> {
    let nodes = Nodes::new()?;
    let helloworld = nodes.helloworld("helloworld")?;
    let catalog = Catalog::new(&[("helloworld", &[helloworld.address])])?;
    let nohop = nodes.nohop(&catalog.config())?;
    let vip = vip(&nohop, "helloworld")?;
    ensure!(nodes.connect(vip, 100)?.all_answered(|answer| answer == "hello from helloworld"));
    ensure!(!nohop.process.tail().contains(MESSAGE), "an ordinary connection logs nothing");

    // The maps are written from outside: the only backend's entry is cleared.
    let backends = nohop.pin("maps/BACKENDS")?;
    let nothing = "0 ".repeat(64);
    let update = format!("map update pinned {} key 0 0 0 0 value {nothing}", backends.display());
    cmd::words("bpftool", update.trim())?;
    let connects = nodes.connect(vip, 100)?;
    ensure!(connects.all_failed_with("ConnectionRefused"), "{connects:?}");
    nohop.process.wait_for_line(&[MESSAGE])?;
    // Once a second: fewer than one for each connection, however long they have taken.
    let n_lines = nohop.process.n_lines_with(MESSAGE);
    ensure!(n_lines < 50, "{n_lines} lines");
    let status = nohop.status()?;
    ensure!(status["datapath"]["counters"]["inconsistent"] == 100, "{status:#}");
    Ok(())
}

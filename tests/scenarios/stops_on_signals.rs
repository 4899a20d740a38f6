//! SIGTERM and SIGINT stop the daemon. It leaves the hooks in place, or, by option,
//! nothing.

use anyhow::{Result, ensure};
use lb_userspace::datapath::{UNITS, hooks};
use rustix::process::Signal;

use crate::cluster::{Catalog, Nodes, attached};

pub fn run() -> Result<()> {
    let nodes = Nodes::new()?;
    let helloworld = nodes.helloworld("helloworld")?;
    let catalog = Catalog::new(&[("helloworld", &[helloworld.address])])?;
    for signal in [Signal::TERM, Signal::INT] {
        let nohop = nodes.nohop(&("on_exit = \"detach\"\n".to_owned() + &catalog.config()))?;
        ensure!(nodes.curl("helloworld")? == "hello from helloworld\n");
        let serving = attached(&nodes.cgroup)?;
        ensure!(serving.iter().any(|line| line.contains("connect4")), "{serving:?}");

        let exit_status = nohop.stop_with(signal)?;
        ensure!(exit_status.success(), "{signal:?}: {exit_status}");
        let left = attached(&nodes.cgroup)?;
        ensure!(left.is_empty(), "{signal:?} left {left:?}");
    }
    let nohop = nodes.nohop(&catalog.config())?;
    ensure!(nohop.terminate()?.success());
    ensure!(
        attached(&nodes.cgroup)?.len() == hooks(UNITS).count(),
        "{:?}",
        attached(&nodes.cgroup)?
    );
    Ok(())
}

//! The daemon needs no root: four capabilities will do, as the README says.

use anyhow::{Context, Result, ensure};
use testbed::bpffs::Bpffs;
use testbed::cmd;
use testbed::process::Process;

use crate::cluster::{Catalog, Nodes};

const CAPABILITIES: &str = "+bpf,+net_admin,+perfmon,+net_bind_service";

pub fn run() -> Result<()> {
    let nodes = Nodes::new()?;
    let helloworld = nodes.helloworld("helloworld")?;
    let catalog = Catalog::new(&[("helloworld", &[helloworld.address])])?;
    let directory = catalog.directory();

    let mut command = nodes.client.outside().command("setpriv");
    command.arg(format!("--bounding-set=-all,{CAPABILITIES}"));
    command.arg(format!("--inh-caps=-all,{CAPABILITIES}"));
    command.arg(cmd::built("nohop")?).arg("run").arg("--catalog").arg(catalog.path());
    let bpffs = Bpffs::new()?;
    command.arg("--bpffs").arg(bpffs.path().join("nohop"));
    command.arg("--state-dir").arg(&directory).arg("--cgroup").arg(nodes.cgroup.path());
    command.arg("--admin-listen").arg(format!("unix:{}/admin.sock", directory.display()));
    let nohop = Process::spawn("nohop", command)?;
    nohop.wait_for_line(&["helloworld"])?;

    ensure!(nodes.curl("helloworld")? == "hello from helloworld\n");
    let status = format!("/proc/{}/status", nohop.pid().as_raw_nonzero());
    let status = std::fs::read_to_string(&status).context("read the daemon's capabilities")?;
    ensure!(status.contains("CapEff:\t000000c000001400"), "{status}");
    Ok(())
}

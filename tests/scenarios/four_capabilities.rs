//! The daemon needs no root: four capabilities suffice, as the README has it.

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
    let admin = format!("unix:{}/admin.sock", directory.display());
    command.args(["--admin-listen", &admin]);
    let nohop = Process::spawn("nohop", command)?;
    // It logs this once all is set up; then it takes up its catalog.
    nohop.wait_for_line(&["answering *."])?;
    let mut ready = nodes.client.outside().command(cmd::built("nohop")?);
    ready.args(["status", "--wait-ready", "--timeout", "120", "--admin", &admin]);
    cmd::stdout(ready)?;

    ensure!(nodes.curl("helloworld")? == "hello from helloworld\n");
    let status = format!("/proc/{}/status", nohop.pid().as_raw_nonzero());
    let status = std::fs::read_to_string(&status).context("read the daemon's capabilities")?;
    ensure!(status.contains("CapEff:\t000000c000001400"), "{status}");
    Ok(())
}

//! The daemon needs no root: four capabilities suffice, as the README has it, but for a drain deadline:
//! `status` and `check` report that it can't be kept. Once it is up it keeps three of them, and its threads that
//! serve clients keep none.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

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

    let with_four = |arguments: &[&str]| -> Result<Command> {
        let mut command = nodes.client.outside().command("setpriv");
        command.arg(format!("--bounding-set=-all,{CAPABILITIES}"));
        command.arg(format!("--inh-caps=-all,{CAPABILITIES}"));
        command.arg(cmd::built("nohop")?).args(arguments);
        Ok(command)
    };
    let mut command = with_four(&["run", "--catalog"])?;
    command.arg(catalog.path());
    let bpffs = Bpffs::new()?;
    command.arg("--bpffs").arg(bpffs.path().join("nohop"));
    command.arg("--state-dir").arg(&directory).arg("--cgroup").arg(nodes.cgroup.path());
    let config_file = directory.join("nohop.toml");
    fs::write(&config_file, "balance.drain_deadline = \"1s\"\n")?;
    command.arg("--config").arg(&config_file);
    let admin = format!("unix:{}/admin.sock", directory.display());
    command.args(["--admin-listen", &admin]);
    let nohop = Process::spawn("nohop", command)?;
    // It logs this once all is set up; then it takes up its catalog.
    nohop.wait_for_line(&["answering *."])?;
    let mut ready = nodes.client.outside().command(cmd::built("nohop")?);
    ready.args(["status", "--wait-ready", "--timeout", "120", "--admin", &admin]);
    cmd::stdout(ready)?;

    ensure!(nodes.curl("helloworld")? == "hello from helloworld\n");
    check_threads(nohop.pid().as_raw_nonzero().get())?;

    let mut status = nodes.client.outside().command(cmd::built("nohop")?);
    status.args(["status", "--json", "--admin", &admin]);
    let status = cmd::stdout(status)?;
    let problem = "balance.drain_deadline: connections to backends that left stay open: ";
    ensure!(status.contains(problem), "{status}");
    let mut check = with_four(&["check", "--admin", &admin, "--config"])?;
    check.arg(&config_file);
    let check = cmd::output(check)?;
    let check = String::from_utf8_lossy(&check.stdout);
    ensure!(check.contains("or set no balance.drain_deadline"), "{check}");
    Ok(())
}

/// No thread has the capability that opens port 53, and those that serve clients have none.
fn check_threads(pid: i32) -> Result<()> {
    let mut names = BTreeSet::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let task = task?.path();
        // A thread may have ended.
        let Ok(status) = fs::read_to_string(task.join("status")) else { continue };
        let field = |key| status.lines().find_map(|line| Some(line.strip_prefix(key)?.trim()));
        let name = field("Name:").context("a thread has a name")?.to_owned();
        let expected = match name.as_str() {
            "dns" | "server" | "catalog" | "recorder" | "off-file" | "log" | "events"
            | "bpf-log" => "0000000000000000",
            _ => "000000c000001000",
        };
        let permitted = field("CapPrm:").context("a thread has capabilities")?;
        ensure!(permitted == expected, "thread {name} may use {permitted}");
        names.insert(name);
    }
    for name in ["dns", "server", "catalog", "nohop"] {
        ensure!(names.contains(name), "no thread {name} in {names:?}");
    }
    Ok(())
}

//! nohop in a container with a cgroup namespace of its own, as Docker makes them: it sees only its own
//! part of the hierarchy. It serves that part if configured to, and reports that; it doesn't
//! take it for the whole node.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use testbed::bpffs::Bpffs;
use testbed::cmd;
use testbed::helloworld::connect;
use testbed::nohop::Nohop;

use crate::cluster::{Catalog, Nodes, attached, vip};

/// Enters the cgroup $1, and then namespaces in which $2 shows cgroup2 from there on, as a container
/// runtime mounts it; then runs the rest.
const CONTAINED: &str = r#"echo 0 > "$1/cgroup.procs" && shift && exec unshare --cgroup --mount \
    --propagation private sh -c 'umount -l "$1" && mount -t cgroup2 none "$1" && shift && exec "$@"' \
    sh "$@""#;

/// The same, and the host's own mount stays: /proc/self/mountinfo shows that as `/..`.
const UNSHARED: &str = r#"echo 0 > "$1/cgroup.procs" && shift 2 && exec unshare --cgroup -- "$@""#;

pub fn run() -> Result<()> {
    let nodes = Nodes::new()?;
    let helloworld = nodes.helloworld("helloworld")?;
    let catalog = Catalog::new(&[("helloworld", &[helloworld.address])])?;
    let container = &nodes.cgroup;
    let root = container.path().parent().context("a cgroup below the root")?;
    for script in [CONTAINED, UNSHARED] {
        refused_by_default(&nodes, &catalog, script, root)?;
    }

    let excluded = container.path().join("a-job").join("1.envoy-web.scope");
    fs::create_dir_all(&excluded)?;
    let [own, root_text] = [container.path(), root].map(|path| path.display().to_string());
    let under = ["sh", "-c", CONTAINED, "sh", &own, &root_text];
    let config = "datapath.exclude_cgroups = [\"*/*.envoy-*.scope\", \"gone.slice\"]\n";
    let nohop = Nohop::start_under(&nodes.client, &under, root, &(catalog.config() + config))?;
    nohop.wait_until_ready()?;
    let status = nohop.status()?;
    let problems = status["problems"].to_string();
    for part in ["only processes in", "--cgroupns=host", "no cgroup matches 'gone.slice'"] {
        ensure!(problems.contains(part), "no {part:?} in {problems}");
    }
    ensure!(nodes.curl("helloworld")? == "hello from helloworld\n", "the container's own process");
    let address = vip(&nohop, "helloworld")?;
    let connects = connect(nodes.client.outside(), address, 5)?;
    ensure!(
        connects.all_failed_with("HostUnreachable"),
        "the node's other processes: {connects:?}"
    );
    // From inside the namespace a cgroup's depth is not what its path shows.
    let script = r#"echo 0 > "$1/cgroup.procs" && shift && exec "$@""#;
    let mut curl = nodes.client.outside().command("sh");
    curl.args(["-c", script, "sh"]).arg(&excluded);
    curl.args(["curl", "-sS", "--max-time", "60"]).arg(format!("http://{address}/"));
    let output = cmd::output(curl)?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success() && output.stdout.is_empty(), "excluded: {output:?}");
    ensure!(text.contains("No route") || text.contains("connect"), "excluded: {text}");
    let status = nohop.status()?;
    ensure!(status["datapath"]["counters"]["bypassed"] != 0, "{status:#}");
    Ok(())
}

/// Neither `run` nor `check` takes a part for the whole, and nothing gets attached.
fn refused_by_default(nodes: &Nodes, catalog: &Catalog, script: &str, root: &Path) -> Result<()> {
    let bpffs = Bpffs::new()?;
    let directory = catalog.directory();
    for words in ["run", "check"] {
        let mut command = nodes.client.outside().command("timeout");
        command.args(["120", "sh", "-c", script, "sh"]).arg(nodes.cgroup.path()).arg(root);
        command.arg(cmd::built("nohop")?).arg(words);
        command.arg("--catalog").arg(catalog.path()).arg("--state-dir").arg(&directory);
        command.arg("--bpffs").arg(bpffs.path().join("nohop"));
        command.arg(format!("--admin-listen=unix:{}/other.sock", directory.display()));
        let output = cmd::output(command)?;
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        ensure!(output.status.code() == Some(1), "{words}, {script}: {}\n{text}", output.status);
        for part in ["cgroup namespace", "--cgroupns=host", "cgroupns = \"host\"", "--cgroup"] {
            ensure!(text.contains(part), "{words}, {script}: no {part:?} in {text}");
        }
        ensure!(attached(&nodes.cgroup)?.is_empty(), "{words}, {script}: something is attached");
    }
    Ok(())
}

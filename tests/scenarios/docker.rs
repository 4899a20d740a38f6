//! A real Docker, and the image of the packages in it.

use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use testbed::cgroup::Cgroup;
use testbed::process::Process;
use testbed::{cmd, tempdir::TempDir};

use crate::cluster::Nodes;
use crate::nohop_in_docker;

/// Its programs, and what images' are linked with.
pub const PROGRAMS: &[&str] =
    &["containerd", "docker", "dockerd", "libdevmapper.so.1.02.1", "musl-gcc", "runc"];

/// The address of its bridge, of this host.
pub const BRIDGE: &str = "172.30.1.1";

/// A Docker of the test's own: in namespaces and a cgroup of its own, and with all that it writes in a
/// folder.
pub struct Docker {
    socket: String,
    _process: Process,
    // Removed with what runs in it.
    cgroup: Cgroup,
    directory: TempDir,
}

/// Hides /run, /var/lib, and what is written to /etc, which it has no options for. Mounts the cgroups as its daemon and
/// runc look for them, and runs it in one below the root of them.
const DOCKERD: &str = r#"
mount -t tmpfs none /run && mkdir /run/etc /run/work &&
mount -t overlay -o lowerdir=/etc,upperdir=/run/etc,workdir=/run/work none /etc &&
mount -t tmpfs none /var/lib && mount -t bpf none /sys/fs/bpf &&
mount -t cgroup2 none /sys/fs/cgroup && mkdir -p /sys/fs/cgroup/dockerd &&
echo $$ > /sys/fs/cgroup/dockerd/cgroup.procs && exec "$@"
"#;

impl Docker {
    pub fn start(nodes: &Nodes) -> Result<Docker> {
        let (directory, cgroup) = (TempDir::new("docker")?, Cgroup::new()?);
        let dockerd = cmd::installed("dockerd")?;
        let tools = dockerd.parent().context("a file has a directory")?.display().to_string();
        let dir = directory.path().display();
        let socket = format!("unix://{dir}/socket");
        // Not the host's.
        let config = directory.path().join("daemon.json");
        std::fs::write(&config, "{}").with_context(|| format!("write {}", config.display()))?;
        let options = format!(
            "--config-file {dir}/daemon.json --data-root {dir}/data --exec-root {dir}/exec --pidfile {dir}/pid --host {socket} \
             --exec-opt native.cgroupdriver=cgroupfs --storage-driver vfs --bip {BRIDGE}/24 \
             --iptables=false --ip6tables=false --ip-masq=false --userland-proxy=false"
        );
        let mut command = nodes.client.inside(&cgroup).command("unshare");
        command.args("--mount --cgroup --propagation private sh -c".split(' '));
        command.args([DOCKERD, "sh"]).arg(&dockerd).args(options.split_whitespace());
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{tools}:{path}")).env("LD_LIBRARY_PATH", tools);
        // The profile of AppArmor would take a program of its own.
        command.env("container", "test");
        let process = Process::spawn("dockerd", command)?;
        process.wait_for_line(&["API listen on"])?;
        Ok(Docker { socket, _process: process, cgroup, directory })
    }

    /// Where it serves its API, as `DOCKER_HOST` has it.
    pub fn socket(&self) -> &str {
        &self.socket
    }

    /// Removed with this.
    pub fn directory(&self) -> &TempDir {
        &self.directory
    }

    /// What it and its containers run in; they see it as the root.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// What `docker` with these words prints; it must succeed.
    pub fn run(&self, words: &str) -> Result<String> {
        cmd::stdout(self.command(words)?)
    }

    /// The outcome of `docker` with these words.
    pub fn output(&self, words: &str) -> Result<Output> {
        cmd::output(self.command(words)?)
    }

    fn command(&self, words: &str) -> Result<Command> {
        let mut docker = Command::new(cmd::installed("docker")?);
        docker.args(["--host", &self.socket]).args(words.split_whitespace());
        Ok(docker)
    }
}

/// Docker loads the image that NOHOP_IMAGE names, and runs it.
pub fn packaged_image() -> Result<()> {
    let image = std::env::var("NOHOP_IMAGE").context("NOHOP_IMAGE isn't set")?;
    let nodes = Nodes::new()?;
    let docker = Docker::start(&nodes)?;
    let loaded = docker.run(&format!("load --quiet --input {image}"))?;
    let name = loaded.trim().strip_prefix("Loaded image: ").context("it loads an image")?;
    let printed = docker.run(&format!("run --rm --network none {name} version"))?;
    let version = name.replace(':', " ");
    ensure!(printed.lines().next() == Some(&version), "{version:?} isn't in {printed:?}");
    nohop_in_docker::serves(&nodes, &docker, name, "/usr/bin/nohop")
}

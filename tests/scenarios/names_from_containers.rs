//! Names from containers, by a listen address of the bridge that they are at: one that the CNI plugins
//! make, as for Nomad's groups in bridge mode, and Docker's.

use std::fs;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use testbed::cgroup::Cgroup;
use testbed::net::Host;
use testbed::nohop::Nohop;
use testbed::process::Process;
use testbed::{cmd, tempdir::TempDir};

use crate::cluster::{Catalog, Nodes, unit, vip};
use crate::resolvers;

/// The bridges' addresses, of this host.
const CNI: &str = "172.30.0.1";
const DOCKER: &str = "172.30.1.1";

/// A daemon that listens there, too, and the service's VIP.
struct Fixture {
    nohop: Nohop,
    vip: String,
    _catalog: Catalog,
    _helloworld: testbed::helloworld::Helloworld,
}

impl Fixture {
    fn new(nodes: &Nodes, listen: &str) -> Result<Fixture> {
        let helloworld = nodes.helloworld("helloworld")?;
        let catalog = Catalog::new(&[("helloworld", &[helloworld.address])])?;
        let listen = format!("dns.listen = [\"127.0.0.1:53\", \"{listen}:53\"]\n");
        let nohop = nodes.nohop(&(catalog.config() + &listen))?;
        nohop.wait_for_status(|status| unit(status, "names")["state"] == "attached")?;
        let vip = vip(&nohop, "helloworld")?.ip().to_string();
        Ok(Fixture { nohop, vip, _catalog: catalog, _helloworld: helloworld })
    }
}

/// The bridge plugin connects a host, or disconnects it.
fn cni(nodes: &Nodes, container: &Host, command: &str, data: &TempDir) -> Result<()> {
    // The other plugins are with this one.
    let plugin = cmd::installed("host-local")?.canonicalize()?;
    let plugins = plugin.parent().context("a file has a directory")?;
    let config = format!(
        r#"{{"cniVersion": "0.4.0", "name": "test", "type": "bridge", "bridge": "cni0",
            "isGateway": true, "ipam": {{"type": "host-local", "subnet": "172.30.0.0/24",
            "dataDir": {:?}}}}}"#,
        data.path()
    );
    let file = data.path().join("config");
    fs::write(&file, config)?;
    let mut bridge = nodes.client.outside().command(plugins.join("bridge"));
    bridge.env("CNI_COMMAND", command).env("CNI_CONTAINERID", "container");
    bridge.env("CNI_NETNS", container.namespace()).env("CNI_IFNAME", "eth0");
    bridge.env("CNI_PATH", plugins).stdin(Stdio::from(fs::File::open(file)?));
    cmd::stdout(bridge).map(drop)
}

pub fn by_cni() -> Result<()> {
    let nodes = Nodes::new()?;
    let (container, data) = (Host::new("container")?, TempDir::new("cni")?);
    cni(&nodes, &container, "ADD", &data)?;
    container.set_resolv_conf(&format!("nameserver {CNI}\n"))?;
    let fixture = Fixture::new(&nodes, CNI)?;
    let dig = |words: &str| {
        let words = format!("+time=60 +tries=1 {words}");
        container.inside(&nodes.cgroup).run("dig", &words)
    };
    let finds_all = || -> Result<()> {
        ensure!(dig("+short helloworld.service")?.trim() == fixture.vip);
        ensure!(dig("+short HelloWorld.Service")?.trim() == fixture.vip);
        ensure!(dig("helloworld.service AAAA")?.contains("status: NOERROR"));
        Ok(())
    };
    finds_all()?;
    ensure!(dig("+short +tcp helloworld.service")?.trim() == fixture.vip);
    ensure!(dig("none.service")?.contains("status: NXDOMAIN"));
    // Another one takes its place, at another end of the bridge.
    cni(&nodes, &container, "DEL", &data)?;
    cni(&nodes, &container, "ADD", &data)?;
    finds_all()?;
    // Without forwarding the kernel leaves them to the daemon, which status reports.
    let forwarding = |value: &str| {
        nodes.inside().run("sysctl", &format!("-w net.ipv4.conf.cni0.forwarding={value}"))
    };
    let reason = |status: &serde_json::Value| unit(status, "names")["reason"].to_string();
    forwarding("0")?;
    let is_off = "/proc/sys/net/ipv4/conf/cni0/forwarding is 0";
    fixture.nohop.wait_for_status(|status| reason(status).contains(is_off))?;
    finds_all()?;
    forwarding("1")?;
    fixture.nohop.wait_for_status(|status| !reason(status).contains(is_off))?;
    fixture.nohop.kill()?;
    finds_all()?;
    ensure!(dig("none.service")?.contains("status: SERVFAIL"));
    Ok(())
}

/// A Docker of the test's own: in namespaces and a cgroup of its own, and with all that it writes in a
/// folder.
struct Docker {
    socket: String,
    _process: Process,
    // Removed with what runs in it.
    _cgroup: Cgroup,
    directory: TempDir,
}

/// Hides /run and what is written to /etc, which it has no options for. Mounts the cgroups as its daemon and
/// runc look for them, and runs it in one below the root of them.
const DOCKERD: &str = r#"
mount -t tmpfs none /run && mkdir /run/etc /run/work &&
mount -t overlay -o lowerdir=/etc,upperdir=/run/etc,workdir=/run/work none /etc &&
mount -t cgroup2 none /sys/fs/cgroup && mkdir -p /sys/fs/cgroup/dockerd &&
echo $$ > /sys/fs/cgroup/dockerd/cgroup.procs && exec "$@"
"#;

impl Docker {
    fn start(nodes: &Nodes) -> Result<Docker> {
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
             --exec-opt native.cgroupdriver=cgroupfs --storage-driver vfs --bip {DOCKER}/24 \
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
        Ok(Docker { socket, _process: process, _cgroup: cgroup, directory })
    }

    fn run(&self, words: &str) -> Result<String> {
        let mut docker = std::process::Command::new(cmd::installed("docker")?);
        docker.args(["--host", &self.socket]).args(words.split_whitespace());
        cmd::stdout(docker)
    }
}

pub fn by_docker() -> Result<()> {
    let nodes = Nodes::new()?;
    let docker = Docker::start(&nodes)?;
    let lookup = resolvers::build_musl(&docker.directory)?;
    let image = docker.directory.path().join("image.tar");
    let directory = docker.directory.path().display();
    cmd::words(
        "tar",
        &format!("--create --file {} --directory {directory} lookup", image.display()),
    )?;
    ensure!(lookup.is_file());
    docker.run(&format!("import {} lookup:1", image.display()))?;
    let fixture = Fixture::new(&nodes, DOCKER)?;
    let finds_it = || -> Result<()> {
        let words = format!("run --rm --dns {DOCKER} lookup:1 /lookup helloworld.service");
        let found = docker.run(&words)?;
        ensure!(found.trim() == fixture.vip, "{found:?}, not {}", fixture.vip);
        Ok(())
    };
    finds_it()?;
    fixture.nohop.kill()?;
    finds_it()
}

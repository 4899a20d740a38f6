//! Names from containers, by a listen address of the bridge that they are at: one that the CNI plugins
//! make, as for Nomad's groups in bridge mode, and Docker's.

use std::fs;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use testbed::net::Host;
use testbed::nohop::Nohop;
use testbed::{cmd, tempdir::TempDir};

use crate::cluster::{Catalog, Nodes, unit, vip};
use crate::docker::{self, Docker};
use crate::resolvers;

/// The address of the plugins' bridge, of this host.
const CNI: &str = "172.30.0.1";

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

pub fn by_docker() -> Result<()> {
    let nodes = Nodes::new()?;
    let docker = Docker::start(&nodes)?;
    let lookup = resolvers::build_musl(docker.directory())?;
    let image = docker.directory().path().join("image.tar");
    let directory = docker.directory().path().display();
    cmd::words(
        "tar",
        &format!("--create --file {} --directory {directory} lookup", image.display()),
    )?;
    ensure!(lookup.is_file());
    docker.run(&format!("import {} lookup:1", image.display()))?;
    let fixture = Fixture::new(&nodes, docker::BRIDGE)?;
    let finds_it = || -> Result<()> {
        let words =
            format!("run --rm --dns {} lookup:1 /lookup helloworld.service", docker::BRIDGE);
        let found = docker.run(&words)?;
        ensure!(found.trim() == fixture.vip, "{found:?}, not {}", fixture.vip);
        Ok(())
    };
    finds_it()?;
    fixture.nohop.kill()?;
    finds_it()
}

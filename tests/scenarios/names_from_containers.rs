//! Names from containers, by a listen address of the bridge that they are at: one that the CNI plugins
//! make, as for Nomad's groups in bridge mode, and Docker's. And what `nohop check` finds of both.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
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

/// The directory of the CNI plugins: the others are with this one.
fn cni_plugins() -> Result<PathBuf> {
    let plugin = cmd::installed("host-local")?.canonicalize()?;
    Ok(plugin.parent().context("a file has a directory")?.to_owned())
}

/// Writes the configuration of the network.
fn configure_cni(data: &TempDir, is_hairpin: bool) -> Result<()> {
    let config = format!(
        r#"{{"cniVersion": "0.4.0", "name": "test", "type": "bridge", "bridge": "cni0",
            "isGateway": true, "hairpinMode": {is_hairpin}, "ipam": {{"type": "host-local",
            "subnet": "172.30.0.0/24", "dataDir": {:?}}}}}"#,
        data.path()
    );
    Ok(fs::write(data.path().join("config"), config)?)
}

/// The bridge plugin connects a host, or disconnects it.
fn cni(nodes: &Nodes, container: &Host, command: &str, data: &TempDir) -> Result<()> {
    let plugins = cni_plugins()?;
    let file = data.path().join("config");
    let mut bridge = nodes.client.outside().command(plugins.join("bridge"));
    bridge.env("CNI_COMMAND", command).env("CNI_CONTAINERID", "container");
    bridge.env("CNI_NETNS", container.namespace()).env("CNI_IFNAME", "eth0");
    bridge.env("CNI_PATH", plugins).stdin(Stdio::from(fs::File::open(file)?));
    cmd::stdout(bridge).map(drop)
}

pub fn by_cni() -> Result<()> {
    let nodes = Nodes::new()?;
    let (container, data) = (Host::new("container")?, TempDir::new("cni")?);
    configure_cni(&data, false)?;
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
    let found = check_cni(&nodes, &fixture.nohop, &data)?;
    ensure!(found["CNI plugins"]["ok"] == true, "{found:#?}");
    let without = found["CNI network"]["detail"].to_string();
    ensure!(without.contains("the bridge cni0 without hairpin mode"), "{found:#?}");
    let of_bridge = found["bridges"]["detail"].to_string();
    ensure!(of_bridge.contains("cni0 (1 of its ports)"), "{found:#?}");
    // Another one takes its place, at another end of the bridge.
    cni(&nodes, &container, "DEL", &data)?;
    configure_cni(&data, true)?;
    cni(&nodes, &container, "ADD", &data)?;
    finds_all()?;
    let found = check_cni(&nodes, &fixture.nohop, &data)?;
    for what in ["CNI plugins", "CNI network", "bridges"] {
        ensure!(found[what]["ok"] == true, "{what}: {found:#?}");
    }
    // Without forwarding the kernel leaves them to the daemon, which status reports.
    let forwarding = |value: &str| {
        nodes.inside().run("sysctl", &format!("-w net.ipv4.conf.cni0.forwarding={value}"))
    };
    let reason = |status: &Value| unit(status, "names")["reason"].to_string();
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

/// What `nohop check` finds, by name.
fn check(mut command: Command) -> Result<BTreeMap<String, Value>> {
    command.args(["check", "--json"]);
    let output = cmd::output(command)?;
    let report: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    let checks = report["checks"].as_array().context("no checks")?;
    let what = |check: &Value| check["what"].as_str().map(str::to_owned);
    Ok(checks.iter().filter_map(|check| Some((what(check)?, check.clone()))).collect())
}

/// Shows the network's configuration and plugins where Nomad has them, and the interfaces of this network
/// namespace.
const AS_CLIENT: &str = r#"mount -t tmpfs none /opt && mkdir -p /opt/cni/bin /opt/cni/config &&
cp "$1" /opt/cni/config/test.conf && mount --bind "$2" /opt/cni/bin && mount -t sysfs none /sys &&
shift 2 && exec "$@""#;

/// The same on a client with this network.
fn check_cni(nodes: &Nodes, nohop: &Nohop, data: &TempDir) -> Result<BTreeMap<String, Value>> {
    let mut command = nodes.client.outside().command("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", AS_CLIENT, "sh"]);
    command.arg(data.path().join("config")).arg(cni_plugins()?).arg(cmd::built("nohop")?);
    command.env("NOHOP_ADMIN", nohop.admin());
    check(command)
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
    let mut command = fixture.nohop.command("")?;
    command.env("DOCKER_HOST", docker.socket());
    let found = check(command)?;
    let cgroups = found.get("Docker's cgroups").context("Docker isn't found")?;
    let expected = "v2, driver cgroupfs: containers are in docker/ID; each has a cgroup namespace";
    ensure!(cgroups["detail"].to_string().contains(expected), "{cgroups:#}");
    fixture.nohop.kill()?;
    finds_it()
}

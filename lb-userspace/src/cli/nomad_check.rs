//! The part of `nohop check` for hosts of containers, Nomad's clients above all: their networks (CNI),
//! bridges and resolver, and the cgroups that Docker puts containers into.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper::{Request, StatusCode};
use serde::Deserialize;
use serde_json::Value;
use tokio::net::UnixStream;

use super::dns::is_nomads;
use crate::admin::http;
use crate::{dns, interfaces};

/// What was looked at, and the finding, or the problem and its fix. Nothing of it is required.
pub type NomadFinding = (String, Result<String, (String, String)>);

/// Where Nomad looks for CNI plugins without `cni_path`, and where packages of distributions have them.
const PLUGINS: [&str; 3] = ["opt/cni/bin", "usr/lib/cni", "usr/libexec/cni"];

/// Where Nomad looks for the configuration of CNI networks without `cni_config_dir`, and where CNI's other
/// users do.
const NETWORKS: [&str; 2] = ["opt/cni/config", "etc/cni/net.d"];

/// The plugins of Nomad's own bridge (`nomadCNIConfigTemplate`, client/allocrunner/networking_bridge_linux.go).
const OF_NOMAD: [&str; 5] = ["bridge", "firewall", "host-local", "loopback", "portmap"];

/// Bridges of Nomad, and of CNI's plugin `bridge` where its configuration names none. Docker turns hairpin
/// mode on for its own where it needs it: as long as it has a docker-proxy, that takes such connections.
const BRIDGES: [&str; 2] = ["nomad", "cni"];

/// Where Docker's daemon listens without DOCKER_HOST.
const DOCKER: &str = "/run/docker.sock";

/// How long it may take for an answer.
const DOCKER_LIMIT: Duration = Duration::from_secs(2);

/// A host of containers.
pub struct ContainerHost {
    /// `/`
    pub root: PathBuf,
    /// Where clients of DNS reach nohop.
    pub dns: Vec<SocketAddr>,
    /// Whether queries come to nohop whatever resolver they are for.
    pub is_intercepted: bool,
}

/// Checks the networks of containers; nothing on a host without any.
pub fn networks(host: &ContainerHost) -> Vec<NomadFinding> {
    let ContainerHost { root, dns, is_intercepted } = host;
    let networks = cni_networks(root);
    let configured = networks.iter().filter_map(|network| network.found.as_ref().ok()).flatten();
    let configured: BTreeSet<&str> = configured.map(|bridge| &*bridge.name).collect();
    let bridges = bridges(&root.join("sys/class/net"), &configured);
    let is_client = is_nomads(root);
    let mut found = Vec::new();
    if let Some(plugins) = plugins(root, is_client, &networks) {
        found.push(("CNI plugins".to_owned(), plugins));
    }
    found.extend(networks.iter().map(CniNetwork::finding));
    if !bridges.is_empty() {
        found.push(("bridges".to_owned(), hairpin(&bridges)));
        let is_reached = *is_intercepted || dns.iter().any(|address| !address.ip().is_loopback());
        found.push(("names in containers".to_owned(), names(is_reached)));
    }
    if !is_intercepted && let Some(problem) = docker_servers(root, dns) {
        found.push(("names in Docker's containers".to_owned(), Err(problem)));
    }
    found
}

/// That Docker's configuration names other resolvers than nohop, which listens at `dns`, and those of this
/// host, which may forward the zone to it.
fn docker_servers(root: &Path, dns: &[SocketAddr]) -> Option<(String, String)> {
    let text = fs::read(root.join("etc/docker/daemon.json")).ok()?;
    let config: Value = serde_json::from_slice(&text).ok()?;
    let servers = config["dns"].as_array()?.iter().filter_map(Value::as_str);
    let is_other = |server: &&str| {
        let server = server.parse().map(|ip| SocketAddr::new(ip, 53));
        !server
            .is_ok_and(|server| interfaces::is_own(server.ip()) || dns::leads_to_own(server, dns))
    };
    let others: Vec<&str> = servers.filter(is_other).collect();
    let first = others.first()?;
    Some((
        format!(
            "/etc/docker/daemon.json has the DNS server {}, which containers ask instead of nohop",
            others.join(", ")
        ),
        format!(
            "put nohop's address in the place of {first}: nohop dns setup --docker; or set dns.intercept"
        ),
    ))
}

/// A network of a CNI configuration.
struct CniNetwork {
    file: PathBuf,
    /// The types of its plugins.
    plugins: BTreeSet<String>,
    /// Its bridges, or why the file is of no use.
    found: Result<Vec<CniBridge>, String>,
}

struct CniBridge {
    name: String,
    /// Whether a packet may leave by the port that it came in by: `hairpinMode`, or `promiscMode`, in
    /// which the bridge itself takes it.
    is_hairpin: bool,
}

fn cni_networks(root: &Path) -> Vec<CniNetwork> {
    let files = NETWORKS.iter().flat_map(|dir| fs::read_dir(root.join(dir)).into_iter().flatten());
    let files = files.flatten().map(|entry| entry.path());
    let is_network = |path: &PathBuf| {
        path.extension().is_some_and(|it| it == "conf" || it == "conflist" || it == "json")
    };
    let mut files: Vec<PathBuf> = files.filter(is_network).collect();
    files.sort();
    files.into_iter().map(CniNetwork::read).collect()
}

impl CniNetwork {
    fn read(file: PathBuf) -> CniNetwork {
        let text = fs::read(&file).map_err(|error| error.to_string());
        let parsed = text.and_then(|text| {
            serde_json::from_slice::<Value>(&text).map_err(|error| error.to_string())
        });
        let config = match parsed {
            Ok(config) => config,
            Err(error) => return CniNetwork { file, plugins: BTreeSet::new(), found: Err(error) },
        };
        // A list of plugins, or one plugin.
        let of_list = config["plugins"].as_array().map(Vec::as_slice);
        let all = of_list.unwrap_or(std::slice::from_ref(&config));
        let types = all.iter().flat_map(|plugin| [&plugin["type"], &plugin["ipam"]["type"]]);
        let plugins = types.filter_map(Value::as_str).map(str::to_owned).collect();
        let bridges = all.iter().filter(|plugin| plugin["type"] == "bridge");
        let bridge = |plugin: &Value| CniBridge {
            name: plugin["bridge"].as_str().unwrap_or("cni0").to_owned(),
            is_hairpin: plugin["hairpinMode"] == true || plugin["promiscMode"] == true,
        };
        CniNetwork { file, plugins, found: Ok(bridges.map(bridge).collect()) }
    }

    fn finding(&self) -> NomadFinding {
        let file = self.file.display();
        let found = match &self.found {
            Err(error) => {
                let fix = "correct the file: groups in this network don't start";
                Err((format!("{file}: {error}"), fix.to_owned()))
            }
            Ok(bridges) => match bridges.iter().find(|bridge| !bridge.is_hairpin) {
                Some(bridge) => Err((
                    format!(
                        "{file} has the bridge {} without hairpin mode: an allocation that connects to its \
                         own service, and gets itself, times out",
                        bridge.name
                    ),
                    format!("\"hairpinMode\": true in {file}, then start the allocations again"),
                )),
                None => Ok(file.to_string()),
            },
        };
        ("CNI network".to_owned(), found)
    }
}

/// The plugins that Nomad's own bridge and the configured networks need; `None` where that is none.
fn plugins(
    root: &Path,
    is_client: bool,
    networks: &[CniNetwork],
) -> Option<Result<String, (String, String)>> {
    let mut needed: BTreeSet<&str> =
        networks.iter().flat_map(|network| &network.plugins).map(|it| &**it).collect();
    needed.extend(OF_NOMAD.iter().filter(|_| is_client));
    if needed.is_empty() {
        return None;
    }
    let has = |dir: &str, plugin: &str| {
        let file = fs::metadata(root.join(dir).join(plugin));
        file.is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
    };
    let listed = |names: &[&str]| names.join(", ");
    let is_missing = |plugin: &&str| !PLUGINS.iter().any(|dir| has(dir, plugin));
    let missing: Vec<&str> = needed.iter().copied().filter(is_missing).collect();
    if !missing.is_empty() {
        return Some(Err((
            format!(
                "{} is in none of /{}: groups in such a network, and in bridge mode, don't start",
                listed(&missing),
                PLUGINS.join(", /")
            ),
            "install the CNI plugins (containernetworking-plugins); where they are elsewhere, cni_path in \
             the client block of Nomad's configuration has to name that"
                .to_owned(),
        )));
    }
    let of_nomad = PLUGINS[0];
    let elsewhere: Vec<&str> =
        needed.iter().copied().filter(|plugin| !has(of_nomad, plugin)).collect();
    Some(Ok(match elsewhere.is_empty() {
        true => format!("in /{of_nomad}"),
        false => format!(
            "{} not in /{of_nomad} but where a package has them: cni_path in the client block of Nomad's \
             configuration has to name that",
            listed(&elsewhere)
        ),
    }))
}

/// Ports of the bridges of containers, each with whether it has hairpin mode.
fn bridges(net: &Path, configured: &BTreeSet<&str>) -> BTreeMap<String, Vec<bool>> {
    let mut bridges = BTreeMap::new();
    for entry in fs::read_dir(net).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_ours = BRIDGES.iter().any(|prefix| name.starts_with(prefix));
        let Ok(ports) = fs::read_dir(entry.path().join("brif")) else { continue };
        if !is_ours && !configured.contains(&*name) {
            continue;
        }
        let mode = |port: fs::DirEntry| fs::read_to_string(port.path().join("hairpin_mode")).ok();
        let modes = ports.flatten().filter_map(mode).map(|mode| mode.trim() != "0");
        bridges.insert(name, modes.collect());
    }
    bridges
}

/// Whether all ports of the bridges send packets back to where they came from. An instance in bridge mode is
/// registered as HOST:PORT, which the host forwards to the instance's own address. Where the instance
/// connects to itself that way, the packet would have to leave the bridge by the port that it came in
/// by: the kernel drops it (`should_deliver`, net/bridge/br_forward.c), and connect() times out.
fn hairpin(bridges: &BTreeMap<String, Vec<bool>>) -> Result<String, (String, String)> {
    let without = bridges.iter().filter_map(|(name, modes)| {
        let n_ports = modes.iter().filter(|is_on| !**is_on).count();
        (n_ports > 0).then(|| format!("{name} ({n_ports} of its ports)"))
    });
    let without: Vec<String> = without.collect();
    if without.is_empty() {
        let names: Vec<&str> = bridges.keys().map(|name| &**name).collect();
        return Ok(format!("every port of {} has hairpin mode", names.join(", ")));
    }
    Err((
        format!(
            "the bridge {} has no hairpin mode: an allocation in bridge mode that connects to its own \
             service, and gets itself, times out",
            without.join(", ")
        ),
        "for Nomad's bridge: bridge_network_hairpin_mode = true in the client block of its \
         configuration, then start the allocations again; for another CNI network: \"hairpinMode\": true"
            .to_owned(),
    ))
}

/// Whether containers, whose loopback is their own, reach nohop's DNS.
fn names(is_reached: bool) -> Result<String, (String, String)> {
    match is_reached {
        true => Ok("nohop's DNS is reached from other networks than the host's".to_owned()),
        false => Err((
            "dns.listen has loopback addresses alone, and a container's loopback is its own"
                .to_owned(),
            "nohop dns setup --nomad prints a setup for host and containers; or set dns.intercept"
                .to_owned(),
        )),
    }
}

/// What Docker reports of itself (`GET /info` of its API).
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct DockerInfo {
    cgroup_driver: String,
    /// `1` or `2`
    cgroup_version: String,
    security_options: Vec<String>,
}

/// Checks the cgroups of Docker's containers; `None` where no Docker listens. `host` is DOCKER_HOST, and
/// `is_served` whether processes in a cgroup are, which is named from the hierarchy's root.
pub fn docker(
    host: Option<&str>,
    is_served: impl Fn(&str) -> bool,
) -> Option<Result<String, (String, String)>> {
    let socket = match host.filter(|host| !host.is_empty()) {
        None => Path::new(DOCKER),
        Some(host) => match host.strip_prefix("unix://") {
            Some(path) => Path::new(path),
            None => return Some(Ok(format!("not checked: DOCKER_HOST is {host}"))),
        },
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let asked = match runtime {
        Ok(runtime) => runtime.block_on(ask_docker(socket)),
        Err(error) => Err(error.to_string()),
    };
    match asked {
        Ok(None) => None,
        Ok(Some(info)) => Some(info.finding(is_served)),
        Err(error) => Some(Ok(format!("not checked: {}: {error}", socket.display()))),
    }
}

/// `None` where there is no such socket.
async fn ask_docker(socket: &Path) -> Result<Option<DockerInfo>, String> {
    let ask = async {
        let stream = match UnixStream::connect(socket).await {
            Ok(stream) => stream,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.to_string()),
        };
        let request = Request::builder().uri("/info");
        let answer = http::exchange(stream, request, "docker").await;
        let answer = answer.map_err(|error| error.to_string())?;
        if answer.status != StatusCode::OK {
            return Err(format!("it answered {}", answer.status));
        }
        serde_json::from_slice(&answer.body).map(Some).map_err(|error| error.to_string())
    };
    let late = |_| format!("no answer within {DOCKER_LIMIT:?}");
    tokio::time::timeout(DOCKER_LIMIT, ask).await.map_err(late).flatten()
}

impl DockerInfo {
    fn finding(&self, is_served: impl Fn(&str) -> bool) -> Result<String, (String, String)> {
        if self.cgroup_version == "1" {
            return Err((
                "Docker uses cgroup v1: its containers are served with the whole node, and \
                 datapath.exclude_cgroups, dns.intercept and nohop trace can't tell them apart"
                    .to_owned(),
                "boot with cgroup v2 alone (systemd.unified_cgroup_hierarchy=1)".to_owned(),
            ));
        }
        // The parent by default, and the names below it.
        let (parent, containers) = match &*self.cgroup_driver {
            "systemd" => ("system.slice", "system.slice/docker-ID.scope"),
            "cgroupfs" => ("docker", "docker/ID"),
            driver => {
                return Err((
                    format!(
                        "Docker's cgroup driver is `{driver}`: containers have no cgroups that nohop knows"
                    ),
                    "use the driver systemd or cgroupfs (exec-opts in daemon.json: \
                     native.cgroupdriver=systemd)"
                        .to_owned(),
                ));
            }
        };
        let driver = &self.cgroup_driver;
        if !is_served(parent) {
            return Err((
                format!(
                    "Docker (driver {driver}) has its containers in {containers}, outside of the cgroup that \
                     is served"
                ),
                "serve the whole node (no cgroup in the configuration), or give Docker a cgroup-parent \
                 below the one that is served"
                    .to_owned(),
            ));
        }
        let is_private = self.security_options.iter().any(|option| option == "name=cgroupns");
        let private = match is_private {
            true => {
                "; each has a cgroup namespace of its own, so nohop in a container needs --cgroupns=host \
                 (cgroupns = \"host\")"
            }
            false => "",
        };
        Ok(format!("v2, driver {driver}: containers are in {containers}{private}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The files of a host.
    struct Files(tempfile::TempDir);

    impl Files {
        fn new() -> Files {
            Files(tempfile::tempdir().unwrap())
        }

        fn write(&self, path: &str, text: &str) {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }

        fn port(&self, bridge: &str, port: &str, mode: &str) {
            self.write(&format!("sys/class/net/{bridge}/brif/{port}/hairpin_mode"), mode);
        }

        /// What is found, a line each.
        fn check(&self, dns: &str) -> String {
            let (root, dns) = (self.0.path().to_owned(), vec![dns.parse().unwrap()]);
            let found = networks(&ContainerHost { root, dns, is_intercepted: false });
            let line = |(what, found): NomadFinding| match found {
                Ok(detail) => format!("ok {what}: {detail}\n"),
                Err((detail, fix)) => format!("note {what}: {detail}; {fix}\n"),
            };
            found.into_iter().map(line).collect()
        }
    }

    const LOCAL: &str = "127.0.0.1:53";

    #[test]
    fn a_host_without_containers_has_nothing_to_check() {
        let host = Files::new();
        host.port("docker0", "veth2", "0");
        host.port("br0", "eth1", "0");
        host.write("sys/class/net/eth0/mtu", "1500");
        host.write("proc/1/comm", "systemd");
        assert_eq!(host.check(LOCAL), "");
    }

    #[test]
    fn a_client_needs_the_plugins_of_its_bridge() {
        let host = Files::new();
        host.write("proc/7/comm", "nomad\n");
        let found = host.check(LOCAL);
        assert!(found.starts_with("note CNI plugins: bridge, firewall, host-local"), "{found}");
        for plugin in OF_NOMAD {
            host.write(&format!("usr/lib/cni/{plugin}"), "");
        }
        let found = host.check(LOCAL);
        assert!(found.starts_with("ok CNI plugins: bridge, "), "{found}");
        assert!(found.contains("cni_path in the client block"), "{found}");
        for plugin in OF_NOMAD {
            host.write(&format!("opt/cni/bin/{plugin}"), "");
        }
        assert_eq!(host.check(LOCAL), "ok CNI plugins: in /opt/cni/bin\n");
        let bridge = host.0.path().join("opt/cni/bin/bridge");
        fs::set_permissions(&bridge, fs::Permissions::from_mode(0o644)).unwrap();
        fs::remove_dir_all(host.0.path().join("usr")).unwrap();
        assert!(host.check(LOCAL).starts_with("note CNI plugins: bridge is in none of"));
    }

    #[test]
    fn networks_of_cni_are_read() {
        let host = Files::new();
        let network = |name: &str, text: &str| host.write(&format!("opt/cni/config/{name}"), text);
        for plugin in ["bridge", "host-local", "macvlan", "dhcp"] {
            host.write(&format!("opt/cni/bin/{plugin}"), "");
        }
        let bridge = r#"{"name": "a", "plugins": [{"type": "bridge", "bridge": "br-a",
            "ipam": {"type": "host-local"}}]}"#;
        network("1.conflist", bridge);
        network("2.conf", r#"{"name": "b", "type": "macvlan", "ipam": {"type": "dhcp"}}"#);
        network("3.json", r#"{"name": "c", "type": "bridge", "hairpinMode": true}"#);
        network("4.conf", "{");
        network("README", "none");
        let found = host.check(LOCAL);
        let lines: Vec<&str> = found.lines().collect();
        let expected = [
            ("ok CNI plugins: in /opt/cni/bin", ""),
            ("note CNI network: ", "1.conflist has the bridge br-a without hairpin mode"),
            ("ok CNI network: ", "2.conf"),
            ("ok CNI network: ", "3.json"),
            ("note CNI network: ", "4.conf: EOF while parsing"),
        ];
        assert_eq!(lines.len(), expected.len(), "{found}");
        for (line, (start, part)) in lines.iter().zip(expected) {
            assert!(line.starts_with(start) && line.contains(part), "{line}");
        }
        // Its bridge has a name of its own.
        host.port("br-a", "veth1", "0");
        assert!(host.check(LOCAL).contains("the bridge br-a (1 of its ports)"));
    }

    #[test]
    fn bridges_without_hairpin_mode() {
        let host = Files::new();
        host.port("nomad", "veth1", "1\n");
        let all_on = host.check("169.254.53.53:53");
        assert!(all_on.contains("ok bridges: every port of nomad has hairpin mode\n"), "{all_on}");
        assert!(all_on.contains("ok names in containers"), "{all_on}");
        host.port("nomad", "veth4", "0\n");
        host.port("nomad", "veth5", "0\n");
        host.port("cni0", "veth6", "0\n");
        let found = host.check(LOCAL);
        assert!(found.contains("cni0 (1 of its ports), nomad (2 of its ports)"), "{found}");
        assert!(found.contains("bridge_network_hairpin_mode = true"), "{found}");
        assert!(found.contains("note names in containers: dns.listen has loopback"), "{found}");
    }

    #[test]
    fn dockers_own_dns_servers_are_compared() {
        let rows = [
            (r#"{"dns": ["192.0.2.1", "169.254.53.53"]}"#, "has the DNS server 192.0.2.1,"),
            (r#"{"dns": ["192.0.2.1", "nonsense"]}"#, "192.0.2.1, nonsense,"),
            (r#"{"dns": ["169.254.53.53"]}"#, ""),
            // systemd-resolved, say: each address of loopback is this host's.
            (r#"{"dns": ["127.0.0.53", "127.0.0.1"]}"#, ""),
            (r#"{"dns": []}"#, ""),
            (r#"{"dns": "192.0.2.1"}"#, ""),
            (r#"{"data-root": "/srv"}"#, ""),
            ("{", ""),
        ];
        for (text, expected) in rows {
            let host = Files::new();
            host.write("etc/docker/daemon.json", text);
            let found = host.check("169.254.53.53:53");
            assert!(
                found.contains(expected) && found.is_empty() == expected.is_empty(),
                "{text}: {found}"
            );
        }
    }

    #[test]
    fn what_docker_reports() {
        let info = |text: &str| serde_json::from_str::<DockerInfo>(text).unwrap();
        let systemd = r#"{"CgroupDriver": "systemd", "CgroupVersion": "2", "Other": 1,
            "SecurityOptions": ["name=apparmor", "name=cgroupns"]}"#;
        let cgroupfs = r#"{"CgroupDriver": "cgroupfs", "CgroupVersion": "2"}"#;
        let old = r#"{"CgroupDriver": "cgroupfs", "CgroupVersion": "1", "SecurityOptions": []}"#;
        let rootless = r#"{"CgroupDriver": "none", "CgroupVersion": "2"}"#;
        for (text, is_served, is_ok, part) in [
            (systemd, true, true, "system.slice/docker-ID.scope; each has a cgroup namespace"),
            (cgroupfs, true, true, "driver cgroupfs: containers are in docker/ID"),
            (cgroupfs, false, false, "outside of the cgroup that is served"),
            (old, true, false, "cgroup v1"),
            (rootless, true, false, "driver is `none`"),
        ] {
            let found = info(text).finding(|_| is_served);
            assert_eq!(found.is_ok(), is_ok, "{text}");
            let detail = found.unwrap_or_else(|(detail, _)| detail);
            assert!(detail.contains(part), "{detail}");
        }
    }

    #[test]
    fn only_a_docker_that_listens_is_asked() {
        let dir = tempfile::tempdir().unwrap();
        let host = format!("unix://{}/docker.sock", dir.path().display());
        assert_eq!(docker(Some(&host), |_| true), None);
        // One that doesn't answer.
        let _listener = std::os::unix::net::UnixListener::bind(dir.path().join("docker.sock"));
        let found = docker(Some(&host), |_| true).unwrap().unwrap();
        assert!(found.contains("no answer within 2s"), "{found}");
        let found = docker(Some("ssh://other"), |_| true).unwrap().unwrap();
        assert_eq!(found, "not checked: DOCKER_HOST is ssh://other");
    }
}

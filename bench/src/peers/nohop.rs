//! nohop itself, by a static catalog.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::cmd;
use testbed::nohop::Nohop;
use testbed::tempdir::TempDir;

use super::common::{Guard, Running, Services, frontend};
use super::template::render;
use crate::node::Node;

pub fn version() -> Result<String> {
    let mut command = std::process::Command::new(cmd::built("nohop")?);
    command.arg("--version");
    Ok(cmd::stdout(command)?.trim().to_owned())
}

pub fn start(node: &Node, services: &Services) -> Result<Running> {
    let Served { nohop, addresses, files } = serve(node, services, "")?;
    Ok(Running::new(addresses, vec![Guard::Nohop(Box::new(nohop)), Guard::Files(files)]))
}

/// A daemon that serves a static catalog.
pub struct Served {
    /// The daemon.
    pub nohop: Nohop,
    /// The VIPs of the services, in their order, with port 80.
    pub addresses: Vec<SocketAddrV4>,
    /// Where the catalog is: `nohop.toml`.
    pub files: TempDir,
}

/// Starts the daemon on a node, and waits until it serves. `more` is more of its configuration: TOML with
/// dotted keys, a line each.
///
/// # Errors
/// When it doesn't in time.
pub fn serve(node: &Node, services: &Services, more: &str) -> Result<Served> {
    let files = TempDir::new("catalog")?;
    let catalog = render("nohop.toml", services, files.path())?;
    let config = format!("catalog.sources = [\"file\"]\ncatalog.file = {catalog:?}\n{more}\n");
    let nohop = Nohop::start(node.client_host(), &node.client, &config)?;
    node.adopt_hop(&nohop.process)?;
    let listed = nohop.services()?;
    let vip = |service: &serde_json::Value| -> Option<(String, SocketAddrV4)> {
        let vip = service["vip"].as_str()?.parse().ok()?;
        Some((service["name"].as_str()?.to_owned(), SocketAddrV4::new(vip, 80)))
    };
    let vips: BTreeMap<_, _> = listed.as_array().into_iter().flatten().filter_map(vip).collect();
    let address = |name: &String| vips.get(name).copied().context("nohop lacks a service");
    let addresses = services.services.iter().map(|s| address(&s.name)).collect::<Result<_>>()?;
    Ok(Served { nohop, addresses, files })
}

/// What the names of modes with the program at the driver begin with in `nohop status`.
const XDP: &str = "xdp-native";

/// An edge by XDP.
pub fn start_on_edge_by_xdp(node: &Node, services: &Services) -> Result<Running> {
    start_on_edge(node, services, true, "")
}

/// An edge by TC: see [`start_edge`].
pub fn start_on_edge_by_tc(node: &Node, services: &Services) -> Result<Running> {
    start_edge(node, services, "")
}

/// An edge by TC: veth takes no XDP program where its peer's MTU is more than a page. `more` is more of its
/// configuration: TOML with dotted keys, a line each.
///
/// # Errors
/// When it doesn't serve in time.
pub fn start_edge(node: &Node, services: &Services, more: &str) -> Result<Running> {
    for (host, interfaces) in [
        (node.client_host(), &["eth0", "eth1"][..]),
        (node.hop_host(), &["eth0", "eth1", "eth2"]),
        (node.backend_host(), &["eth0"]),
    ] {
        for interface in interfaces {
            host.ip(&format!("link set {interface} mtu 9000"))?;
        }
    }
    start_on_edge(node, services, false, more)
}

/// The addresses that an edge's backends see: four, so that no contender runs out of ports.
pub fn edge_sources() -> Vec<Ipv4Addr> {
    (1..=4).map(|nth| Ipv4Addr::new(10, 99, 9, nth)).collect()
}

fn start_on_edge(node: &Node, services: &Services, is_xdp: bool, more: &str) -> Result<Running> {
    let sources: Vec<String> = edge_sources().iter().map(Ipv4Addr::to_string).collect();
    for source in &sources {
        node.hop_host().ip(&format!("addr add {source}/32 dev lo"))?;
    }
    let files = TempDir::new("catalog")?;
    let catalog = render("nohop.toml", services, files.path())?;
    let addresses: Vec<SocketAddrV4> = (0..services.services.len()).map(frontend).collect();
    let named = services.services.iter().zip(&addresses);
    let vips: Vec<String> =
        named.map(|(service, vip)| format!("{} = \"{vip}\"", service.name)).collect();
    let config = format!(
        "catalog.sources = [\"file\"]\ncatalog.file = {catalog:?}\nvip.public = [\"10.96.0.0/16\"]\n\
         edge.interfaces = [\"eth0\", \"eth1\", \"eth2\"]\nedge.source = {sources:?}\n\
         edge.vips = {{ {} }}\n{more}",
        vips.join(", ")
    );
    // Its cgroup is nobody's: what comes from other hosts is what is measured.
    let nohop = Nohop::start(node.hop_host(), &node.hop, &config)?;
    nohop.wait_for_status(|status| {
        edge_modes(status).iter().all(|mode| !mode.is_empty())
            && status["edge"]["announced"]
                .as_array()
                .is_some_and(|all| all.len() == addresses.len())
    })?;
    let status = nohop.status()?;
    let modes = edge_modes(&status);
    ensure!(
        modes.iter().all(|mode| mode.starts_with(XDP) == is_xdp),
        "its modes are {modes:?}: {}",
        status["edge"]["interfaces"]
    );
    node.adopt_hop(&nohop.process)?;
    Ok(Running::new(addresses, vec![Guard::Nohop(Box::new(nohop)), Guard::Files(files)]))
}

/// How the program of an edge is attached to each of its interfaces; empty where it isn't.
pub fn edge_modes(status: &Value) -> Vec<String> {
    let interfaces = status["edge"]["interfaces"].as_array().map_or(&[][..], Vec::as_slice);
    let mode = |interface: &Value| interface["mode"].as_str().unwrap_or_default().to_owned();
    interfaces.iter().map(mode).collect()
}

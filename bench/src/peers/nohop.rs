//! nohop itself, by a static catalog.

use std::collections::BTreeMap;
use std::net::SocketAddrV4;

use anyhow::{Context, Result};
use testbed::cmd;
use testbed::nohop::Nohop;
use testbed::tempdir::TempDir;

use super::common::{Guard, Running, Services};
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

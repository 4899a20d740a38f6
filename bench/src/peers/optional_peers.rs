//! Those whose binaries no distribution has: they take part where they are on PATH.

use anyhow::Result;
use testbed::process::Process;
use testbed::tempdir::TempDir;

use super::common::{Guard, Running, Services, add_frontends, await_frontends, find, first_line};
use super::template::render;
use crate::node::Node;

pub fn traefik_version() -> Result<String> {
    first_line("traefik", "version")
}

pub fn start_traefik(node: &Node, services: &Services) -> Result<Running> {
    let tempdir = TempDir::new("traefik")?;
    render("traefik-services.yml", services, tempdir.path())?;
    let config = render("traefik.yml", services, tempdir.path())?;
    add_frontends(node)?;
    let mut command = node.hop_place().command(find("traefik")?);
    command.arg(format!("--configFile={}", config.display()));
    let process = Process::spawn("traefik", command)?;
    let addresses = await_frontends(node, &process, services)?;
    Ok(Running::new(addresses, vec![Guard::Process(process), Guard::Files(tempdir)]))
}

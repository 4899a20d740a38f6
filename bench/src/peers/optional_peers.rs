//! Those whose binaries no distribution has: they take part where they are on PATH.

use anyhow::Result;
use lb_tests::process::Process;
use lb_tests::tempdir::Scratch;

use super::{
    Guard, Running, Services, add_frontends, await_bound, find, first_line, frontend, render,
};
use crate::node::Node;

pub fn traefik_version() -> Result<String> {
    first_line("traefik", "version")
}

pub fn start_traefik(node: &Node, services: &Services) -> Result<Running> {
    let scratch = Scratch::new("traefik")?;
    render("traefik-services.yml", services, frontend, scratch.path())?;
    let config = render("traefik.yml", services, frontend, scratch.path())?;
    let argument = format!("--configFile={}", config.display());
    start(node, "traefik", &[&argument], services, scratch)
}

fn start(
    node: &Node,
    program: &str,
    arguments: &[&str],
    services: &Services,
    scratch: Scratch,
) -> Result<Running> {
    add_frontends(node)?;
    let mut command = node.hop_place().command(find(program)?);
    command.args(arguments);
    let process = Process::spawn(program, command)?;
    let addresses: Vec<_> = (0..services.services.len()).map(frontend).collect();
    let last = addresses[addresses.len() - 1];
    await_bound(node.hop_place(), &process, services.protocol, last)?;
    Ok(Running::new(addresses, vec![Guard::Process(process), Guard::Files(scratch)]))
}

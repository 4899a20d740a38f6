//! nginx: as a balancer by its stream module, and as the backend of the HTTP suites.

use std::path::Path;

use anyhow::{Result, ensure};
use lb_tests::net::Place;
use lb_tests::process::Process;
use lb_tests::tempdir::Scratch;

use super::{
    Guard, Protocol, Running, Services, add_frontends, await_bound, find, first_line, frontend,
    render,
};
use crate::node::Node;

const STREAM: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";

pub fn version() -> Result<String> {
    ensure!(Path::new(STREAM).exists(), "nginx has no stream module ({STREAM})");
    first_line("nginx", "-v").map(|line| line.replace("nginx version: ", ""))
}

pub fn start(node: &Node, services: &Services) -> Result<Running> {
    let scratch = Scratch::new("nginx")?;
    add_frontends(node)?;
    let config = render("nginx-stream.conf", services, frontend, scratch.path())?;
    let process = spawn("nginx stream", node.hop_place(), &config, scratch.path())?;
    let addresses: Vec<_> = (0..services.services.len()).map(frontend).collect();
    let last = addresses[addresses.len() - 1];
    await_bound(node.hop_place(), &process, services.protocol, last)?;
    Ok(Running::new(addresses, vec![Guard::Process(process), Guard::Files(scratch)]))
}

/// Starts the backend of the HTTP suites: port 8080 of all addresses of the backends' host.
///
/// # Errors
/// When nginx isn't installed, or doesn't start.
pub fn start_backend(node: &Node) -> Result<(Process, Scratch)> {
    let scratch = Scratch::new("backend")?;
    let services = Services::one(Protocol::Http, vec![]);
    let config = render("backend.conf", &services, frontend, scratch.path())?;
    let process = spawn("backend", node.backend_place(), &config, scratch.path())?;
    await_bound(node.backend_place(), &process, Protocol::Http, Node::backend(0, 8080))?;
    Ok((process, scratch))
}

fn spawn(name: &str, place: Place<'_>, config: &Path, dir: &Path) -> Result<Process> {
    let mut command = place.command(find("nginx")?);
    // What it says before it has read the file goes to stderr, too.
    command.arg("-e").arg("stderr").arg("-p").arg(dir).arg("-c").arg(config);
    Process::spawn(name, command)
}

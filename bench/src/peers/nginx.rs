//! nginx: as a balancer by its stream module, and as the backend of the HTTP suites.

use std::path::Path;

use anyhow::{Result, ensure};
use testbed::net::ExecContext;
use testbed::process::Process;
use testbed::tempdir::TempDir;

use super::common::{
    Guard, Protocol, Running, Services, add_frontends, await_bound, await_frontends, find,
    first_line,
};
use super::template::render;
use crate::node::Node;

const STREAM: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";

pub fn version() -> Result<String> {
    ensure!(Path::new(STREAM).exists(), "nginx has no stream module ({STREAM})");
    first_line("nginx", "-v").map(|line| line.replace("nginx version: ", ""))
}

pub fn start(node: &Node, services: &Services) -> Result<Running> {
    let tempdir = TempDir::new("nginx")?;
    add_frontends(node)?;
    let config = render("nginx-stream.conf", services, tempdir.path())?;
    let process = spawn("nginx stream", node.hop_place(), &config, tempdir.path())?;
    let addresses = await_frontends(node, &process, services)?;
    Ok(Running::new(addresses, vec![Guard::Process(process), Guard::Files(tempdir)]))
}

/// Starts the backend of the HTTP suites: port 8080 of all addresses of the backends' host.
///
/// # Errors
/// When nginx isn't installed, or doesn't start.
pub fn start_backend(node: &Node) -> Result<(Process, TempDir)> {
    let tempdir = TempDir::new("backend")?;
    let services = Services::one(Protocol::Http, vec![]);
    let config = render("backend.conf", &services, tempdir.path())?;
    let process = spawn("backend", node.backend_place(), &config, tempdir.path())?;
    await_bound(node.backend_place(), &process, Protocol::Http, Node::backend(0, 8080))?;
    Ok((process, tempdir))
}

fn spawn(name: &str, place: ExecContext<'_>, config: &Path, dir: &Path) -> Result<Process> {
    let mut command = place.command(find("nginx")?);
    // Messages from before it has read the file go to stderr, too.
    command.arg("-e").arg("stderr").arg("-p").arg(dir).arg("-c").arg(config);
    Process::spawn(name, command)
}

//! HAProxy: a master with one worker process.

use std::net::SocketAddrV4;
use std::path::{Path, PathBuf};

use anyhow::Result;
use lb_tests::process::Process;
use lb_tests::tempdir::Scratch;

use super::{
    Guard, Running, Services, add_frontends, await_bound, find, first_line, frontend, render,
};
use crate::node::Node;

/// The socket beside the configuration that HAProxy with `-Ws` tells of its reloads, as it would
/// systemd, if somebody listens there.
pub const NOTIFY: &str = "notify.sock";

pub fn version() -> Result<String> {
    let line = first_line("haproxy", "-v")?;
    Ok(line.split(" - ").next().unwrap_or(&line).to_owned())
}

pub fn start(node: &Node, services: &Services, file: &str) -> Result<Running> {
    let Served { haproxy, addresses, files } = serve(node, services, file, "-W")?;
    Ok(Running::new(addresses, vec![Guard::Process(haproxy.process), Guard::Files(files)]))
}

/// A HAProxy that serves.
pub struct Served {
    /// Its master.
    pub haproxy: Haproxy,
    /// Where it listens for the services, in their order.
    pub addresses: Vec<SocketAddrV4>,
    /// Where its configuration is, and `haproxy.sock`, the Runtime API.
    pub files: Scratch,
}

/// Starts it on a node with a configuration of `bench/peers`, and waits until it serves; `mode` is `-W`,
/// or `-Ws` for one that tells [`NOTIFY`] of its reloads.
///
/// # Errors
/// When it doesn't in time.
pub fn serve(node: &Node, services: &Services, file: &str, mode: &str) -> Result<Served> {
    let files = Scratch::new("haproxy")?;
    let config = render(file, services, frontend, files.path())?;
    let haproxy = Haproxy::start(node, &config, mode)?;
    let addresses: Vec<_> = (0..services.services.len()).map(frontend).collect();
    // It binds all of them before it serves any.
    await_bound(
        node.hop_place(),
        &haproxy.process,
        services.protocol,
        addresses[addresses.len() - 1],
    )?;
    Ok(Served { haproxy, addresses, files })
}

/// A master process, which reloads at SIGUSR2.
pub struct Haproxy {
    /// The master.
    pub process: Process,
}

impl Haproxy {
    /// Starts it in the place of what stands between; the configuration says the rest, `mode` is as for
    /// [`serve`].
    ///
    /// # Errors
    /// When it isn't installed.
    pub fn start(node: &Node, config: &Path, mode: &str) -> Result<Haproxy> {
        add_frontends(node)?;
        let program: PathBuf = find("haproxy")?;
        let mut command = node.hop_place().command(program);
        command.args([mode, "-f"]).arg(config).env("NOTIFY_SOCKET", config.with_file_name(NOTIFY));
        Ok(Haproxy { process: Process::spawn("haproxy", command)? })
    }
}

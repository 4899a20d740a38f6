//! HAProxy: a master with one worker process.

use std::net::SocketAddrV4;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use testbed::process::Process;
use testbed::tempdir::TempDir;

use super::common::{Guard, Running, Services, add_frontends, await_frontends, find, first_line};
use super::template::render;
use crate::node::Node;

/// The socket beside the configuration to which HAProxy with `-Ws` reports its state, as it would to
/// systemd (sd_notify), where one listens.
const NOTIFY: &str = "notify.sock";

/// How long HAProxy may take to report.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where HAProxy reports its state.
pub struct Notify(UnixDatagram);

impl Notify {
    /// Listens beside the configuration in `dir`.
    ///
    /// # Errors
    /// When it can't.
    pub fn bind(dir: &Path) -> Result<Notify> {
        let socket = UnixDatagram::bind(dir.join(NOTIFY)).context("listen to HAProxy")?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(Notify(socket))
    }

    /// Waits for each of these states in turn, such as `READY=1`.
    ///
    /// # Errors
    /// When one isn't reported in time.
    pub fn wait_for(&self, states: &[&str]) -> Result<()> {
        let mut text = [0; 4096];
        for state in states {
            loop {
                let received = self.0.recv(&mut text);
                let n_bytes = received.with_context(|| format!("HAProxy reports no {state}"))?;
                if String::from_utf8_lossy(&text[..n_bytes]).lines().any(|line| line == *state) {
                    break;
                }
            }
        }
        Ok(())
    }
}

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
    pub files: TempDir,
}

/// Starts it on a node with a configuration of `bench/peers`, and waits until it serves; `mode` is `-W`,
/// or `-Ws` for one that reports its reloads to [`Notify`].
///
/// # Errors
/// When it doesn't in time.
pub fn serve(node: &Node, services: &Services, file: &str, mode: &str) -> Result<Served> {
    let files = TempDir::new("haproxy")?;
    let config = render(file, services, files.path())?;
    let haproxy = Haproxy::start(node, &config, mode)?;
    let addresses = await_frontends(node, &haproxy.process, services)?;
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

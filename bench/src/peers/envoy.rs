//! Envoy: one hop without TLS, and the two hops of a mesh with certificates on both sides.

use std::fs;
use std::net::SocketAddrV4;
use std::path::Path;

use anyhow::{Context, Result};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use testbed::cmd;
use testbed::net::ExecContext;
use testbed::process::Process;
use testbed::tempdir::TempDir;

use super::common::{
    Guard, Protocol, Running, Services, add_frontends, await_bound, await_frontends,
};
use super::template::{self, render};
use crate::node::Node;

/// The file beside its configuration from which [`serve_eds`] has Envoy learn its endpoints. It reads it
/// again when another one is renamed over it.
pub const ENDPOINTS: &str = "envoy-endpoints.yaml";

pub fn version() -> Result<String> {
    let mut command = std::process::Command::new(cmd::installed("envoy")?);
    command.arg("--version");
    let text = cmd::stdout(command)?;
    // `envoy  version: COMMIT/1.40.0/Clean/RELEASE/BoringSSL`
    let version = text
        .split("version:")
        .nth(1)
        .and_then(|build| build.split('/').nth(1))
        .context("envoy reports no version")?;
    Ok(format!("Envoy {version}"))
}

pub fn start(node: &Node, services: &Services) -> Result<Running> {
    let Served { process, addresses, files } = serve(node, services, TempDir::new("envoy")?)?;
    Ok(Running::new(addresses, vec![Guard::Process(process), Guard::Files(files)]))
}

/// An Envoy that serves as one hop.
pub struct Served {
    /// It.
    pub process: Process,
    /// Where it listens for the services, in their order.
    pub addresses: Vec<SocketAddrV4>,
    /// Where its configuration is.
    pub files: TempDir,
}

/// Starts it on a node with the endpoints in [`ENDPOINTS`], which are these services' backends at first,
/// and waits until it serves; `eds` is one of the services' settings.
///
/// # Errors
/// When it doesn't in time.
pub fn serve_eds(node: &Node, services: &Services) -> Result<Served> {
    let files = TempDir::new("envoy")?;
    render(ENDPOINTS, services, files.path())?;
    serve(node, services, files)
}

fn serve(node: &Node, services: &Services, files: TempDir) -> Result<Served> {
    add_frontends(node)?;
    let config = render("envoy.yaml", services, files.path())?;
    let process = spawn("envoy", node.hop_place(), &config)?;
    let addresses = await_frontends(node, &process, services)?;
    Ok(Served { process, addresses, files })
}

/// Both sidecars count as what stands between, wherever they run.
pub fn start_mesh(node: &Node, services: &Services) -> Result<Running> {
    let files = TempDir::new("envoy")?;
    add_frontends(node)?;
    write_certificates(files.path())?;
    let config = render("envoy-server.yaml", services, files.path())?;
    let server = spawn("envoy server", node.backend_host().inside(&node.hop), &config)?;
    let backends = services.services.iter().flat_map(|service| &service.backends);
    let last = *backends.last().context("services without backends")?;
    let public = SocketAddrV4::new(*last.ip(), template::mesh_port(last));
    await_bound(node.backend_host().inside(&node.hop), &server, Protocol::Tcp, public)?;
    let config = render("envoy-client.yaml", services, files.path())?;
    let client = spawn("envoy client", node.hop_place(), &config)?;
    let addresses = await_frontends(node, &client, services)?;
    let guards = vec![Guard::Process(client), Guard::Process(server), Guard::Files(files)];
    Ok(Running::new(addresses, guards))
}

fn spawn(name: &str, place: ExecContext<'_>, config: &Path) -> Result<Process> {
    let mut command = place.command(cmd::installed("envoy")?);
    command.arg("-c").arg(config).args(["--log-level", "error", "--disable-hot-restart"]);
    let n_cpus = std::thread::available_parallelism().map_or(1, usize::from);
    command.args(["--concurrency", &n_cpus.to_string()]);
    Process::spawn(name, command)
}

/// A CA, and a certificate of its for each side: `ca.pem`, `client.pem`, `server.pem` and their keys.
fn write_certificates(dir: &Path) -> Result<()> {
    let mut ca = CertificateParams::new(vec![])?;
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    // BoringSSL takes a certificate for self-signed whose issuer has the same name as itself.
    ca.distinguished_name.push(DnType::CommonName, "nohop bench CA");
    let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate()?)?;
    let write = |name: &str, pem: String| {
        fs::write(dir.join(name), pem).with_context(|| format!("write {name}"))
    };
    write("ca.pem", ca.pem())?;
    for (side, name) in [("client", "client.mesh"), ("server", "web.mesh")] {
        let key = KeyPair::generate()?;
        let certificate = CertificateParams::new(vec![name.into()])?.signed_by(&key, &ca)?;
        write(&format!("{side}.pem"), certificate.pem())?;
        write(&format!("{side}.key"), key.serialize_pem())?;
    }
    Ok(())
}

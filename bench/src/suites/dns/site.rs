//! The servers, each at work on a node of its own.

use std::any::Any;
use std::fmt::Write as _;
use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use testbed::cmd;
use testbed::consul::Consul;
use testbed::net::{ExecContext, Host};
use testbed::process::Process;
use testbed::tempdir::TempDir;

use super::dnsperf;
use crate::node::{self, Layout, Node};
use crate::peers::{self, NOHOP, Protocol, Service, Services, frontend};
use crate::pin;

/// nohop whose kernel side answers nothing: what the daemon alone does.
pub const DAEMON: &str = "nohop, daemon alone";
/// The base of all ratios: as fast as it can be made.
pub const DNSMASQ: &str = "dnsmasq";
pub const UNBOUND: &str = "Unbound";
/// Consul's own server.
pub const CONSUL: &str = "Consul DNS";

/// Where nohop and dnsmasq forward to: dnsmasq.conf has it, too.
pub const UPSTREAM: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 5300);
/// The answer there, for every name.
pub const UPSTREAM_ANSWER: &str = "192.0.2.7";

/// How often, and how many times at most, a server is queried until it answers.
const LOOK: Duration = Duration::from_millis(20);
const N_LOOKS: u32 = 500;

/// The operations that Consul takes in one transaction.
const MAX_OPERATIONS: usize = 64;
/// The node of Consul's catalog that bears the services. It isn't the agent's own, whose services the
/// agent would put right.
const CONSUL_NODE: &str = "elsewhere";

/// A server at work. Dropped in this order.
pub struct Site {
    /// The server's name.
    pub name: &'static str,
    /// Where it is asked.
    pub address: SocketAddrV4,
    questions: PathBuf,
    _server: Box<dyn Any>,
    _upstream: Option<Process>,
    files: TempDir,
    node: Node,
}

impl Site {
    /// Starts a server with so many names in its zone, alone on a processor, and waits until it answers.
    ///
    /// # Errors
    /// When it doesn't in time; when there is no such server.
    pub fn start(name: &'static str, n_names: usize) -> Result<Site> {
        let (node, files) = (Node::new(Layout::OneHost)?, TempDir::new("dns")?);
        let start = match name {
            NOHOP => start_nohop,
            DAEMON => start_daemon,
            DNSMASQ => start_dnsmasq,
            UNBOUND => start_unbound,
            CONSUL => start_consul,
            _ => bail!("no server is called {name}"),
        };
        let upstream = if name == CONSUL {
            None
        } else {
            Some(pin::on(pin::CLIENT, || start_upstream(&node))?)
        };
        let server = pin::on(pin::SERVER, || start(&node, &files, n_names))
            .with_context(|| format!("start {name}"))?;
        let (domain, port) =
            if name == CONSUL { ("service.consul", 8600) } else { ("service", 53) };
        let questions = write_questions((0..n_names).map(service_name), files.path(), domain)?;
        let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
        let site =
            Site { name, address, questions, _server: server, _upstream: upstream, files, node };
        let last = service_name(n_names - 1);
        await_answer(site.node.hop_place(), address, &format!("{last}.{domain}"), "")?;
        if name != CONSUL {
            await_answer(site.node.hop_place(), address, "n0.example", UPSTREAM_ANSWER)?;
        }
        Ok(site)
    }

    /// A question for each name in its zone.
    pub fn questions(&self) -> &Path {
        &self.questions
    }

    /// Questions for so many other names.
    ///
    /// # Errors
    /// When they can't be written.
    pub fn questions_of_others(&self, n_names: usize) -> Result<PathBuf> {
        write_questions((0..n_names).map(service_name), self.files.path(), "example")
    }

    /// The host that queries come from.
    pub fn client_host(&self) -> &Host {
        self.node.client_host()
    }

    /// Where queries come from, and the address.
    pub fn at(&self) -> dnsperf::At<'_> {
        (self.node.client_place(), self.address)
    }
}

pub fn nohop_version() -> Result<String> {
    let nohop = peers::PEERS.iter().find(|peer| peer.name == NOHOP);
    nohop.context("nohop is not among the peers").and_then(|nohop| (nohop.version)())
}

pub fn dnsmasq_version() -> Result<String> {
    let text = cmd::words("dnsmasq", "--version")?;
    let line = text.lines().next().unwrap_or_default();
    Ok(line.split("  ").next().unwrap_or(line).to_owned())
}

pub fn unbound_version() -> Result<String> {
    let text = cmd::words("unbound", "-V")?;
    Ok(text.lines().next().unwrap_or_default().replace("Version ", "Unbound "))
}

fn start_nohop(node: &Node, _files: &TempDir, n_names: usize) -> Result<Box<dyn Any>> {
    start_nohop_with(node, n_names, "")
}

fn start_daemon(node: &Node, _files: &TempDir, n_names: usize) -> Result<Box<dyn Any>> {
    start_nohop_with(node, n_names, "dns.kernel = false")
}

fn start_nohop_with(node: &Node, n_names: usize, setting: &str) -> Result<Box<dyn Any>> {
    let backends = vec![Node::backend(0, 8080)];
    let service = |idx| Service { name: service_name(idx), backends: backends.clone() };
    let services = (0..n_names).map(service).collect();
    let services = Services { protocol: Protocol::Tcp, services, settings: String::new() };
    let more = format!("dns.forward = [\"{UPSTREAM}\"]\n{setting}");
    let nohop = peers::serve_nohop(node, &services, &more)?;
    Ok(Box::new(nohop))
}

fn start_dnsmasq(node: &Node, files: &TempDir, n_names: usize) -> Result<Box<dyn Any>> {
    let mut hosts = String::new();
    for idx in 0..n_names {
        writeln!(hosts, "{} {}.service", frontend(idx).ip(), service_name(idx))?;
    }
    fs::write(files.path().join("dnsmasq.hosts"), hosts).context("write dnsmasq's names")?;
    let none = Services { protocol: Protocol::Tcp, services: vec![], settings: String::new() };
    let config = peers::render("dnsmasq.conf", &none, files.path())?;
    let mut command = node.hop_place().command("dnsmasq");
    command.arg("--keep-in-foreground").arg(format!("--conf-file={}", config.display()));
    Ok(Box::new(Process::spawn("dnsmasq", command)?))
}

fn start_unbound(node: &Node, files: &TempDir, n_names: usize) -> Result<Box<dyn Any>> {
    let mut names = String::new();
    for idx in 0..n_names {
        let (name, address) = (service_name(idx), *frontend(idx).ip());
        writeln!(names, "    local-data: \"{name}.service. 30 A {address}\"")?;
    }
    fs::write(files.path().join("unbound.names"), names).context("write Unbound's names")?;
    let none = Services { protocol: Protocol::Tcp, services: vec![], settings: String::new() };
    let config = peers::render("unbound.conf", &none, files.path())?;
    let mut command = node.hop_place().command("unbound");
    command.args(["-d", "-p", "-c"]).arg(config);
    Ok(Box::new(Process::spawn("unbound", command)?))
}

/// The resolver that others forward to. Its answers may not be kept: TTL 0.
///
/// # Errors
/// When it can't be started.
pub fn start_upstream(node: &Node) -> Result<Process> {
    let mut command = node.backend_place().command("dnsmasq");
    command.args(["--keep-in-foreground", "--conf-file=/dev/null", "--pid-file="]);
    command.args(["--user=root", "--no-resolv", "--no-hosts", "--bind-interfaces"]);
    command.arg(format!("--listen-address={}", UPSTREAM.ip()));
    command.arg(format!("--port={}", UPSTREAM.port()));
    command.arg(format!("--address=/example/{UPSTREAM_ANSWER}"));
    Process::spawn("upstream dnsmasq", command)
}

fn start_consul(node: &Node, _files: &TempDir, n_names: usize) -> Result<Box<dyn Any>> {
    let address = node::CLIENT.to_string();
    // At this level it doesn't log queries.
    let more = json!({ "log_level": "info", "ports": { "dns": 8600 } });
    let mut servers = Consul::servers(&[(node.client_host(), "server", &address)], &more, None)?;
    let consul = servers.pop().context("no server")?;
    let bearer = json!({ "Node": CONSUL_NODE, "Address": Node::backend(0, 1).ip() });
    consul.put("/v1/catalog/register", &bearer)?;
    let operations: Vec<Value> = (0..n_names).map(registration).collect();
    for some in operations.chunks(MAX_OPERATIONS) {
        consul.put("/v1/txn", &json!(some))?;
    }
    Ok(Box::new(consul))
}

fn registration(idx: usize) -> Value {
    let (name, backend) = (service_name(idx), Node::backend(0, 8080));
    json!({
        "Service": {
            "Verb": "set",
            "Node": CONSUL_NODE,
            "Service": {
                "Service": name, "ID": name, "Address": backend.ip(), "Port": backend.port(),
            },
        },
    })
}

fn service_name(idx: usize) -> String {
    format!("n{idx}")
}

/// Writes the questions for these names below a domain, as dnsperf reads them.
///
/// # Errors
/// When they can't be written.
pub fn write_questions(
    names: impl Iterator<Item = String>,
    dir: &Path,
    domain: &str,
) -> Result<PathBuf> {
    let path = dir.join(format!("{domain}.questions"));
    let mut text = String::new();
    for name in names {
        writeln!(text, "{name}.{domain} A")?;
    }
    fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
    Ok(path)
}

/// Queries a name until there is an address, which is to be this one unless it is empty.
///
/// # Errors
/// When there is none in time.
pub fn await_answer(
    place: ExecContext<'_>,
    at: SocketAddrV4,
    name: &str,
    expected: &str,
) -> Result<()> {
    let mut text = String::new();
    for _ in 0..N_LOOKS {
        let mut dig = place.command("dig");
        let (server, port) = (format!("@{}", at.ip()), at.port().to_string());
        dig.args(["+time=1", "+tries=1", "+short", &server, "-p", &port, name, "A"]);
        text = String::from_utf8_lossy(&cmd::output(dig)?.stdout).trim().to_owned();
        if text.parse::<Ipv4Addr>().is_ok() {
            ensure!(expected.is_empty() || text == expected, "{name} is {text} at {at}");
            return Ok(());
        }
        thread::sleep(LOOK);
    }
    bail!("{at} has no address of {name}: {text}")
}

//! Those who are compared, each started on a node with a configuration that its own experts would
//! accept: the files in `bench/peers`.

mod envoy;
mod haproxy;
mod nft_ipvs;
mod nginx;
mod nohop;
mod optional_peers;
mod template;

use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use testbed::cmd;
use testbed::net::ExecContext;
use testbed::process::Process;
use testbed::tempdir::TempDir;

use crate::node::Node;
use crate::report::Contender;

pub use envoy::{
    ENDPOINTS as ENVOY_ENDPOINTS, Served as ServedByEnvoy, serve_eds as serve_envoy_eds,
};
pub use haproxy::{
    Haproxy, Notify as HaproxyNotify, Served as ServedByHaproxy, serve as serve_haproxy,
};
pub use nft_ipvs::{Conntrack, route_frontends};
pub use nginx::start_backend;
pub use nohop::{Served, serve as serve_nohop, serve_with as serve_nohop_with};
pub use template::{render, rendered};

/// What is spoken with a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP, whatever goes over it.
    Tcp,
    /// HTTP/1.1, which a proxy may understand.
    Http,
    /// Datagrams.
    Udp,
}

/// A service to be balanced.
#[derive(Clone, Debug)]
pub struct Service {
    /// Its name, of letters, digits and hyphens.
    pub name: String,
    /// Its backends, one at least.
    pub backends: Vec<SocketAddrV4>,
}

/// What the services are: many or one, of one protocol.
#[derive(Clone, Debug)]
pub struct Services {
    /// What they speak.
    pub protocol: Protocol,
    /// Them.
    pub services: Vec<Service>,
    /// Whether the balancer is to check the backends by itself, where it can.
    pub are_checked: bool,
}

impl Services {
    /// One service, `web`, without checks.
    pub fn one(protocol: Protocol, backends: Vec<SocketAddrV4>) -> Services {
        let services = vec![Service { name: "web".into(), backends }];
        Services { protocol, services, are_checked: false }
    }
}

/// A balancer at work; when this is dropped it ends.
pub struct Running {
    /// Where a client connects to each service, in their order. Of one service that is connected to directly,
    /// the backends.
    pub addresses: Vec<SocketAddrV4>,
    /// What is kept as long as it runs.
    guards: Vec<Guard>,
}

/// Something that ends or is removed when it is dropped, in this order.
pub enum Guard {
    /// A process.
    Process(Process),
    /// The daemon.
    Nohop(Box<testbed::nohop::Nohop>),
    /// Files.
    Files(TempDir),
}

/// One who is compared.
#[derive(Clone, Copy)]
pub struct Peer {
    /// As in all figures.
    pub name: &'static str,
    /// Its configuration in the repository; empty where it has none.
    pub config: &'static str,
    /// What it can serve.
    pub protocols: &'static [Protocol],
    /// Its version, or why it can't take part on this machine.
    pub version: fn() -> Result<String>,
    start: fn(&Node, &Services) -> Result<Running>,
}

/// How often, and how many times at most, it is looked whether a server listens.
const LOOK: Duration = Duration::from_millis(10);
const N_LOOKS: u32 = 6_000;

/// Nobody in between: the client connects to the first backend.
pub const DIRECT: &str = "direct";
/// This project.
pub const NOHOP: &str = "nohop";
/// HAProxy, which passes bytes on.
pub const HAPROXY_TCP: &str = "HAProxy tcp";
/// HAProxy, which understands HTTP.
pub const HAPROXY_HTTP: &str = "HAProxy http";
/// Envoy, as one hop.
pub const ENVOY: &str = "Envoy";
/// nginx's stream module.
pub const NGINX: &str = "nginx stream";
/// Destination NAT by nftables.
pub const NFTABLES: &str = "nftables";

/// All that can be compared, in the order in which rounds go through them.
pub const PEERS: [Peer; 10] = [
    Peer {
        name: DIRECT,
        config: "",
        protocols: &[Protocol::Tcp, Protocol::Http, Protocol::Udp],
        version: || Ok(String::new()),
        start: |_, services| {
            let addresses = match &services.services[..] {
                [only] => only.backends.clone(),
                many => many.iter().map(|service| service.backends[0]).collect(),
            };
            Ok(Running::new(addresses, vec![]))
        },
    },
    Peer {
        name: NOHOP,
        config: "bench/peers/nohop.toml",
        protocols: &[Protocol::Tcp, Protocol::Http, Protocol::Udp],
        version: nohop::version,
        start: nohop::start,
    },
    Peer {
        name: HAPROXY_TCP,
        config: "bench/peers/haproxy-tcp.cfg",
        protocols: &[Protocol::Tcp, Protocol::Http],
        version: haproxy::version,
        start: |node, services| haproxy::start(node, services, "haproxy-tcp.cfg"),
    },
    Peer {
        name: HAPROXY_HTTP,
        config: "bench/peers/haproxy-http.cfg",
        protocols: &[Protocol::Http],
        version: haproxy::version,
        start: |node, services| haproxy::start(node, services, "haproxy-http.cfg"),
    },
    Peer {
        name: NGINX,
        config: "bench/peers/nginx-stream.conf",
        protocols: &[Protocol::Tcp, Protocol::Http, Protocol::Udp],
        version: nginx::version,
        start: nginx::start,
    },
    Peer {
        name: ENVOY,
        config: "bench/peers/envoy.yaml",
        protocols: &[Protocol::Tcp, Protocol::Http, Protocol::Udp],
        version: envoy::version,
        start: envoy::start,
    },
    Peer {
        name: "Envoy mesh, mTLS",
        config: "bench/peers/envoy-client.yaml",
        protocols: &[Protocol::Tcp, Protocol::Http],
        version: envoy::version,
        start: envoy::start_mesh,
    },
    Peer {
        name: NFTABLES,
        config: "bench/peers/nftables.nft",
        protocols: &[Protocol::Tcp, Protocol::Http, Protocol::Udp],
        version: nft_ipvs::nftables_version,
        start: nft_ipvs::start_nftables,
    },
    Peer {
        name: "IPVS",
        config: "bench/peers/ipvs.rules",
        protocols: &[Protocol::Tcp, Protocol::Http, Protocol::Udp],
        version: nft_ipvs::ipvs_version,
        start: nft_ipvs::start_ipvs,
    },
    Peer {
        name: "Traefik tcp",
        config: "bench/peers/traefik.yml",
        protocols: &[Protocol::Tcp, Protocol::Http, Protocol::Udp],
        version: optional_peers::traefik_version,
        start: optional_peers::start_traefik,
    },
];

impl Peer {
    /// Starts it on a node, and waits until it serves.
    ///
    /// # Errors
    /// When it can't; the message has its last words.
    pub fn start(&self, node: &Node, services: &Services) -> Result<Running> {
        (self.start)(node, services).with_context(|| format!("start {}", self.name))
    }

    /// Itself, as a report lists it.
    pub fn contender(&self) -> Contender {
        Contender::new(self.name, (self.version)(), self.config)
    }
}

/// Those who can serve this protocol, and the contenders' list, which says why others can't.
pub fn able(protocol: Protocol) -> (Vec<Peer>, Vec<Contender>) {
    let mut able = Vec::new();
    let mut contenders = Vec::new();
    for peer in PEERS {
        let mut contender = peer.contender();
        if contender.absent.is_none() && !peer.protocols.contains(&protocol) {
            contender.absent = Some("doesn't do what this suite measures".into());
        }
        if contender.absent.is_none() {
            able.push(peer);
        }
        contenders.push(contender);
    }
    (able, contenders)
}

impl Running {
    /// What is kept as long as it runs: of nohop the daemon first.
    pub fn guards(&self) -> &[Guard] {
        &self.guards
    }

    /// Where to connect to the only service for the `nth` time: who connects to directly goes through the backends,
    /// so that it finds as many addresses, and so as many free ports, as the balancers do.
    pub fn address(&self, nth: usize) -> SocketAddrV4 {
        self.addresses[nth % self.addresses.len()]
    }

    /// With the addresses of the services, and what is kept as long as it runs.
    pub fn new(addresses: Vec<SocketAddrV4>, guards: Vec<Guard>) -> Running {
        Running { addresses, guards }
    }
}

/// The workers or threads of those who make load and of those who answer: half of the processors each.
/// What stands between has its own default, a thread a processor, as nohop's daemon has.
pub fn n_workers() -> usize {
    (thread::available_parallelism().map_or(1, usize::from) / 2).max(1)
}

/// Where a proxy listens for a service: an address of its own, port 80.
pub fn frontend(idx: usize) -> SocketAddrV4 {
    let [c, d] = ((idx + 256) as u16).to_be_bytes();
    SocketAddrV4::new(Ipv4Addr::new(10, 96, c, d), 80)
}

/// Makes the addresses of [`frontend`] local to the client's host, once.
fn add_frontends(node: &Node) -> Result<()> {
    let there = node.client_host().ip("addr show dev lo")?;
    if there.contains(" 10.96.0.1/16 ") {
        return Ok(());
    }
    node.client_host().ip("addr add 10.96.0.1/16 dev lo").map(drop)
}

/// Waits until a process has bound an address, which nobody tells by an event.
///
/// # Errors
/// When it ends before, or takes longer than a minute.
fn await_bound(
    place: ExecContext<'_>,
    process: &Process,
    protocol: Protocol,
    at: SocketAddrV4,
) -> Result<()> {
    let kind = if protocol == Protocol::Udp { "-Hlun" } else { "-Hltn" };
    let (at, any) = (at.to_string(), format!("0.0.0.0:{}", at.port()));
    for _ in 0..N_LOOKS {
        let bound = place
            .run("ss", &format!("{kind} sport = :{}", at.rsplit(':').next().unwrap_or_default()))?;
        if bound.split_whitespace().any(|word| word == at || word == any) {
            return Ok(());
        }
        if process.ends_within(LOOK)? {
            bail!("it ended\n{}", process.tail());
        }
    }
    bail!("it doesn't listen at {at}\n{}", process.tail())
}

/// Waits until a proxy has bound the last of its frontends, which it binds in their order. Returns them.
///
/// # Errors
/// As [`await_bound`]; without services.
fn await_frontends(
    node: &Node,
    process: &Process,
    services: &Services,
) -> Result<Vec<SocketAddrV4>> {
    let addresses: Vec<_> = (0..services.services.len()).map(frontend).collect();
    let last = *addresses.last().context("no services")?;
    await_bound(node.hop_place(), process, services.protocol, last)?;
    Ok(addresses)
}

/// The first line that a program writes when asked for its version.
fn first_line(program: &str, argument: &str) -> Result<String> {
    let path = find(program)?;
    let mut command = std::process::Command::new(path);
    command.arg(argument);
    let output = cmd::output(command)?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    let Some(line) = said.lines().find(|line| !line.trim().is_empty()) else {
        bail!("`{program} {argument}` says nothing");
    };
    Ok(line.trim().to_owned())
}

/// A program on PATH, or in the folders of the system's own tools.
///
/// # Errors
/// When it isn't there.
pub fn find(program: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    let found = std::env::split_paths(&path)
        .chain(system)
        .map(|dir| dir.join(program))
        .find(|path| path.is_file());
    found.with_context(|| format!("{program} is not on PATH"))
}

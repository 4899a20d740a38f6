//! Shared by the peers: services, what runs, and the wait until it listens.

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

/// A service's protocol.
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
    /// Their protocol.
    pub protocol: Protocol,
    /// Them.
    pub services: Vec<Service>,
    /// What else its file in `bench/peers` is asked for, such as `check+leastconn`.
    pub settings: String,
}

impl Services {
    /// One service, `web`.
    pub fn one(protocol: Protocol, backends: Vec<SocketAddrV4>) -> Services {
        let services = vec![Service { name: "web".into(), backends }];
        Services { protocol, services, settings: String::new() }
    }
}

/// A balancer at work; when this is dropped it ends.
pub struct Running {
    /// Where a client connects to each service, in their order. Of one service that is connected to directly,
    /// the backends.
    pub addresses: Vec<SocketAddrV4>,
    /// Dropped when it ends.
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

/// How often, and how many times at most, it is looked whether a server listens.
const LOOK: Duration = Duration::from_millis(10);
const N_LOOKS: u32 = 6_000;

impl Running {
    /// Dropped when it ends: of nohop the daemon first.
    pub fn guards(&self) -> &[Guard] {
        &self.guards
    }

    /// The daemon, where this is nohop.
    pub fn nohop(&mut self) -> Option<&mut testbed::nohop::Nohop> {
        self.guards.iter_mut().find_map(|guard| match guard {
            Guard::Nohop(nohop) => Some(&mut **nohop),
            _ => None,
        })
    }

    /// Where to connect to the only service for the `nth` time: who connects to directly goes through the backends,
    /// so that it finds as many addresses, and so as many free ports, as the balancers do.
    pub fn address(&self, nth: usize) -> SocketAddrV4 {
        self.addresses[nth % self.addresses.len()]
    }

    /// With the addresses of the services, and the guards.
    pub fn new(addresses: Vec<SocketAddrV4>, guards: Vec<Guard>) -> Running {
        Running { addresses, guards }
    }
}

/// The workers or threads of those who make load and of those who answer: half of the processors each.
/// What stands between has its own default, a thread a processor, as nohop's daemon has.
pub fn n_workers() -> usize {
    (thread::available_parallelism().map_or(1, usize::from) / 2).max(1)
}

/// The service's address at a proxy: its own address, port 80.
pub fn frontend(idx: usize) -> SocketAddrV4 {
    let [c, d] = ((idx + 256) as u16).to_be_bytes();
    SocketAddrV4::new(Ipv4Addr::new(10, 96, c, d), 80)
}

/// Makes the addresses of [`frontend`] local to where what stands between runs, once.
pub(super) fn add_frontends(node: &Node) -> Result<()> {
    let there = node.hop_host().ip("addr show dev lo")?;
    if there.contains(" 10.96.0.1/16 ") {
        return Ok(());
    }
    node.hop_host().ip("addr add 10.96.0.1/16 dev lo").map(drop)
}

/// Waits until a process has bound an address, for which there is no event.
///
/// # Errors
/// When it ends before, or takes longer than a minute.
pub(super) fn await_bound(
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
pub(super) fn await_frontends(
    node: &Node,
    process: &Process,
    services: &Services,
) -> Result<Vec<SocketAddrV4>> {
    let addresses: Vec<_> = (0..services.services.len()).map(frontend).collect();
    let last = *addresses.last().context("no services")?;
    await_bound(node.hop_place(), process, services.protocol, last)?;
    Ok(addresses)
}

/// The first line of a program's version.
pub(super) fn first_line(program: &str, argument: &str) -> Result<String> {
    let path = find(program)?;
    let mut command = std::process::Command::new(path);
    command.arg(argument);
    let output = cmd::output(command)?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    let Some(line) = text.lines().find(|line| !line.trim().is_empty()) else {
        bail!("`{program} {argument}` prints nothing");
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

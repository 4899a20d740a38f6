//! A contender at work: a node of its own, with a Consul of its own and instances.

use std::io::{self, Read, Write};
use std::net::SocketAddrV4;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fs, thread};

use anyhow::{Context, Result, bail};
use serde_json::json;
use testbed::consul::{self, Consul};
use testbed::http::ask;
use testbed::nohop::Nohop;
use testbed::process::Process;
use testbed::tempdir::TempDir;

use super::backends::{Batch, Instance, SERVICE};
use super::haproxy_sync::RELOAD_CONFIG;
use crate::generators;
use crate::node::Node;
use crate::peers::{
    Guard, Protocol, ServedByEnvoy, ServedByHaproxy, Services, frontend, route_frontends,
    serve_envoy_eds, serve_haproxy,
};

/// How long a change may take until connections show it.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// How a contender learns of changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// nohop, by its own blocking queries.
    Nohop,
    /// HAProxy, which asks Consul's DNS.
    Srv,
    /// HAProxy in tcp mode, which a follower reloads.
    Reload,
    /// HAProxy, whose slots a follower fills.
    Runtime(Protocol),
    /// Envoy, which reads a file of endpoints that a follower writes.
    Eds(Protocol),
    /// nftables, whose rules a follower replaces.
    Nftables,
}

/// How a contender is set up.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// How it learns of changes.
    pub kind: Kind,
    /// nohop's configuration; of others, what their file of `bench/peers` is asked for, joined by `+`.
    pub settings: &'static str,
    /// Whether Consul checks the instances, by TCP each second; else all are healthy.
    pub are_checked: bool,
    /// How long an instance works on a request, in milliseconds.
    pub work_ms: u32,
}

impl Setup {
    /// As it comes.
    pub const fn of(kind: Kind) -> Setup {
        Setup { kind, settings: "", are_checked: false, work_ms: 0 }
    }
}

/// A contender on its node. Dropped in this order.
pub struct Site {
    /// Its name.
    pub name: &'static str,
    /// Where its clients connect the service.
    pub address: SocketAddrV4,
    /// The instances that are registered.
    pub batch: Batch,
    setup: Setup,
    /// Those that came later.
    joined: Vec<Batch>,
    n_started: usize,
    running: Vec<Guard>,
    _consul: Consul,
    /// Holds Consul's unix socket, for requests from outside the node's network.
    tempdir: TempDir,
    /// Where it works.
    pub node: Node,
}

impl Site {
    /// Starts it with one instance, and waits until that is served.
    ///
    /// # Errors
    /// When something doesn't start, or isn't served in time.
    pub fn start(name: &'static str, setup: Setup, node: Node) -> Result<Site> {
        let tempdir = TempDir::new("change")?;
        let http = format!("127.0.0.1 unix://{}", socket(&tempdir).display());
        let more = json!({ "addresses": { "http": http }, "log_level": "info" });
        let consul = Consul::dev_with(node.client_host(), more)?;
        let batch = Batch::start(&node, 0, 1, setup.work_ms)?;
        batch.instances.iter().try_for_each(|instance| register(&tempdir, setup, instance))?;
        let (address, running) = setup.start(&node)?;
        let site = Site {
            name,
            address,
            batch,
            setup,
            joined: Vec::new(),
            n_started: 1,
            running,
            _consul: consul,
            tempdir,
            node,
        };
        let probe = Probe::start(&site)?;
        site.batch.instances.iter().try_for_each(|instance| probe.await_first(instance))?;
        Ok(site)
    }

    /// Starts instances, not yet registered. Names and addresses are never used again.
    pub fn start_more(&mut self, n: usize) -> Result<Batch> {
        let first = self.n_started;
        self.n_started += n;
        Batch::start(&self.node, first, n, self.setup.work_ms)
    }

    /// Starts another instance, and registers it.
    pub fn join(&mut self) -> Result<()> {
        let batch = self.start_more(1)?;
        batch.instances.iter().try_for_each(|instance| self.register(instance))?;
        self.joined.push(batch);
        Ok(())
    }

    /// Registers an instance with the agent.
    pub fn register(&self, instance: &Instance) -> Result<()> {
        register(&self.tempdir, self.setup, instance)
    }

    /// Has the check of an instance fail, where Consul doesn't find that out by itself.
    pub fn fail(&self, name: &str) -> Result<()> {
        if self.setup.are_checked {
            return Ok(());
        }
        let path = format!("/v1/agent/check/fail/service:{name}");
        ask(&socket(&self.tempdir), "PUT", &path, "").map(drop)
    }

    /// The daemon, where this is nohop.
    pub fn nohop(&mut self) -> Option<&mut Nohop> {
        self.running.iter_mut().find_map(|guard| match guard {
            Guard::Nohop(nohop) => Some(&mut **nohop),
            Guard::Process(_) | Guard::Files(_) => None,
        })
    }

    /// Removes an instance from the agent; it keeps running.
    pub fn deregister(&self, name: &str) -> Result<()> {
        let path = format!("/v1/agent/service/deregister/{name}");
        ask(&socket(&self.tempdir), "PUT", &path, "").map(drop)
    }

    /// Replaces all instances by `n` new ones, and waits until connections reach all of these and none else.
    pub fn replace(&mut self, n: usize) -> Result<()> {
        let batch = self.start_more(n)?;
        batch.instances.iter().try_for_each(|instance| self.register(instance))?;
        let joined = std::mem::take(&mut self.joined);
        let old = self.batch.instances.iter().chain(joined.iter().flat_map(|b| &b.instances));
        // One that is gone already answers with an error.
        old.clone().for_each(|instance| drop(self.deregister(&instance.name)));
        let probe = Probe::start(self)?;
        batch.instances.iter().try_for_each(|instance| probe.await_first(instance))?;
        let mut old = old.filter(|instance| probe.has_answered(instance));
        old.try_for_each(|instance| probe.await_silence(instance))?;
        self.batch = batch;
        Ok(())
    }
}

fn socket(tempdir: &TempDir) -> PathBuf {
    tempdir.path().join("consul.sock")
}

fn register(tempdir: &TempDir, setup: Setup, instance: &Instance) -> Result<()> {
    let Instance { name, address, .. } = instance;
    let mut instance = consul::instance(SERVICE, name, *address);
    if setup.are_checked {
        instance["Check"] = json!({
            "TCP": address.to_string(), "Interval": "1s", "Timeout": "1s", "Status": "passing",
        });
    }
    let path = "/v1/agent/service/register";
    ask(&socket(tempdir), "PUT", path, &instance.to_string()).map(drop)
}

impl Setup {
    /// Starts the contender: where it is connected to, and what is kept as long as it runs.
    fn start(self, node: &Node) -> Result<(SocketAddrV4, Vec<Guard>)> {
        match self.kind {
            Kind::Nohop => start_nohop(node, self.settings),
            Kind::Srv => start_haproxy(node, "haproxy-srv.cfg", Protocol::Tcp, self),
            Kind::Reload => start_haproxy(node, RELOAD_CONFIG, Protocol::Tcp, self),
            Kind::Runtime(protocol) => start_haproxy(node, "haproxy-runtime.cfg", protocol, self),
            Kind::Eds(protocol) => start_envoy(node, self.services(protocol)),
            Kind::Nftables => start_nftables(node),
        }
    }

    fn services(self, protocol: Protocol) -> Services {
        Services { settings: self.settings.into(), ..Services::one(protocol, vec![]) }
    }
}

/// The daemon as it comes, but for where it keeps its things, and for these lines of its configuration.
fn start_nohop(node: &Node, config: &str) -> Result<(SocketAddrV4, Vec<Guard>)> {
    let nohop = Nohop::start(node.client_host(), &node.client, config)?;
    node.adopt_hop(&nohop.process)?;
    let services = nohop.wait_for_backends(SERVICE, 1)?;
    let vip = testbed::nohop::service(&services, SERVICE).and_then(|s| s["vip"].as_str());
    let vip = vip.context("nohop has no VIP for the service")?.parse()?;
    Ok((SocketAddrV4::new(vip, 80), vec![Guard::Nohop(Box::new(nohop))]))
}

fn start_haproxy(
    node: &Node,
    file: &str,
    protocol: Protocol,
    setup: Setup,
) -> Result<(SocketAddrV4, Vec<Guard>)> {
    let mode = if setup.kind == Kind::Reload { "-Ws" } else { "-W" };
    let services = setup.services(protocol);
    let ServedByHaproxy { haproxy, addresses, files } = serve_haproxy(node, &services, file, mode)?;
    let api = files.path().join("haproxy.sock");
    await_worker(&api)?;
    let mut guards = Vec::new();
    match setup.kind {
        Kind::Reload => {
            let master = haproxy.process.pid().as_raw_nonzero().to_string();
            let settings = setup.settings.as_ref();
            let arguments = ["reload".as_ref(), files.path(), master.as_ref(), settings];
            guards.push(follow(node, &arguments)?);
        }
        Kind::Runtime(_) => guards.push(follow(node, &["runtime".as_ref(), &api])?),
        Kind::Nohop | Kind::Srv | Kind::Eds(_) | Kind::Nftables => {}
    }
    guards.extend([Guard::Process(haproxy.process), Guard::Files(files)]);
    Ok((addresses[0], guards))
}

fn start_nftables(node: &Node) -> Result<(SocketAddrV4, Vec<Guard>)> {
    let files = TempDir::new("nftables")?;
    route_frontends(node)?;
    let follower = follow(node, &["nft".as_ref(), files.path()])?;
    Ok((frontend(0), vec![follower, Guard::Files(files)]))
}

fn start_envoy(node: &Node, services: Services) -> Result<(SocketAddrV4, Vec<Guard>)> {
    let ServedByEnvoy { process, addresses, files } = serve_envoy_eds(node, &services)?;
    let follower = follow(node, &["eds".as_ref(), files.path()])?;
    Ok((addresses[0], vec![follower, Guard::Process(process), Guard::Files(files)]))
}

/// Starts a follower beside what it drives.
fn follow(node: &Node, arguments: &[&Path]) -> Result<Guard> {
    let mut command = node.hop_place().command(std::env::current_exe()?);
    command.arg("follow").args(arguments);
    Ok(Guard::Process(Process::spawn("follower", command)?))
}

/// Waits until HAProxy's worker answers: from then on its master knows the signal to reload.
fn await_worker(api: &Path) -> Result<()> {
    let ask = || -> io::Result<usize> {
        let mut stream = UnixStream::connect(api)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        writeln!(stream, "show info")?;
        stream.read_to_end(&mut Vec::new())
    };
    // There is no event for a worker that serves its socket.
    for _ in 0..500 {
        if ask().is_ok_and(|n_bytes| n_bytes > 0) {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(10));
    }
    bail!("HAProxy's Runtime API doesn't answer")
}

/// Connects without end, and prints who answers.
pub struct Probe {
    process: Process,
    files: TempDir,
}

impl Probe {
    /// Connects the site's service every 0.5 ms.
    pub fn start(site: &Site) -> Result<Probe> {
        let files = TempDir::new("probe")?;
        let mut command = site.node.client_place().command(generators::load_program()?);
        command.args(["probe", &site.address.to_string(), "--interval-us", "500", "--log"]);
        command.arg(files.path().join("log"));
        let process = Process::spawn("nohop-load probe", command)?;
        process.wait_for_line(&["probing"])?;
        Ok(Probe { process, files })
    }

    /// Waits until it has answered.
    pub fn await_first(&self, instance: &Instance) -> Result<()> {
        self.await_line("first", instance)
    }

    /// Whether it has answered.
    fn has_answered(&self, instance: &Instance) -> bool {
        self.process.n_lines_with(&format!("first {}", instance.answer())) > 0
    }

    /// Waits until it hasn't answered any more for 300 ms.
    pub fn await_silence(&self, instance: &Instance) -> Result<()> {
        self.await_line("silent", instance)
    }

    fn await_line(&self, what: &str, instance: &Instance) -> Result<()> {
        let line = format!("{what} {}", instance.answer());
        self.process.wait_for_line_within(PATIENCE, &[&line]).map(drop)
    }

    /// Ends it, and returns what it noted of each connection.
    pub fn stop(self) -> Result<String> {
        // Its notes are in the file after 50 ms at most.
        thread::sleep(Duration::from_millis(60));
        self.process.kill();
        let log = self.files.path().join("log");
        fs::read_to_string(&log).with_context(|| format!("read {}", log.display()))
    }
}

//! Twenty services take turns at eight connections to a real agent, which is killed and comes back,
//! and then the configuration names another source on it. The sockets are counted from outside, all
//! the while: there are never more than `consul.max_connections`.

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Pid;
use serde_json::json;
use testbed::consul::{Consul, instance};
use testbed::nohop::{Nohop, n_healthy};

use crate::cluster::{CLIENT, Nodes};
use crate::ha_cluster::{is_failing, is_live};

const MAX_CONNECTIONS: usize = 8;
const N_SERVICES: usize = 20;

/// The agent's second address, where only nohop asks it: `127.0.0.2:8500` in `/proc/net/tcp`.
const AGENT: &str = "0200007F:2134";

pub fn run() -> Result<()> {
    let nodes = Nodes::new()?;
    let more = json!({ "client_addr": "127.0.0.1 127.0.0.2" });
    let mut agents = Consul::servers(&[(&nodes.client, "client", CLIENT)], &more, None)?;
    let agent = agents.first_mut().context("an agent")?;
    for n in 0..N_SERVICES {
        register(agent, n, 1)?;
    }
    let config = format!(
        "consul.address = \"http://127.0.0.2:8500\"\nconsul.max_connections = {MAX_CONNECTIONS}\n\
         catalog.watch = \"all\"\n"
    );
    let nohop = nodes.nohop(&config)?;
    let watch = Watch::start(nohop.process.pid());
    all_have(&nohop, 1)?;
    changes_arrive(&nohop, agent, 2)?;

    agent.kill();
    nohop.wait_for_status(is_failing)?;
    agent.restart()?;
    nohop.wait_for_status(is_live)?;
    // Their checks are critical until the next heartbeat.
    for service in 0..N_SERVICES {
        for n in 1..=2 {
            agent.pass(&format!("service-{service}-{n}"))?;
        }
    }
    changes_arrive(&nohop, agent, 3)?;

    nohop.configure(&(config + "consul.datacenter = \"dc1\"\n"))?;
    let reloaded = nohop.cli("reload")?;
    ensure!(reloaded.status.success(), "{reloaded:?}");
    changes_arrive(&nohop, agent, 4)?;

    let most = watch.finish()?;
    eprintln!("{most} connections at once, of {MAX_CONNECTIONS} allowed");
    ensure!(most <= MAX_CONNECTIONS, "{most} connections at once");
    // All but those that are kept for what can't wait.
    ensure!(most >= MAX_CONNECTIONS / 2, "no more than {most} connections were counted");
    Ok(())
}

/// Registers the `n`th instance of a service.
fn register(agent: &Consul, service: usize, n: u16) -> Result<()> {
    let address: SocketAddr = format!("10.99.0.2:{n}").parse()?;
    let name = format!("service-{service}");
    agent.register(&instance(&name, &format!("{name}-{n}"), address))
}

/// Adds an instance to each service, the `n`th.
fn changes_arrive(nohop: &Nohop, agent: &Consul, n: u16) -> Result<()> {
    for service in 0..N_SERVICES {
        register(agent, service, n)?;
    }
    all_have(nohop, n.into())
}

fn all_have(nohop: &Nohop, n: usize) -> Result<()> {
    let have = |services: &serde_json::Value| {
        (0..N_SERVICES).all(|idx| n_healthy(services, &format!("service-{idx}")) == n)
    };
    nohop.wait_until(have).map(drop)
}

/// Counts a process's connections to the agent, again and again.
struct Watch {
    ends: Arc<AtomicBool>,
    thread: JoinHandle<Result<usize>>,
}

impl Watch {
    fn start(pid: Pid) -> Watch {
        let ends = Arc::new(AtomicBool::new(false));
        let table = format!("/proc/{}/net/tcp", pid.as_raw_nonzero());
        let is_over = ends.clone();
        let thread = thread::spawn(move || {
            let (mut most, mut before) = (0, BTreeSet::new());
            while !is_over.load(Ordering::Relaxed) {
                // The kernel goes through its sockets one after another, and meanwhile one may close
                // and another open. Those of two readings were all there between the two.
                let table = fs::read_to_string(&table).with_context(|| table.clone())?;
                let now: BTreeSet<_> =
                    table.lines().filter_map(established).map(String::from).collect();
                most = most.max(now.intersection(&before).count());
                before = now;
                thread::sleep(Duration::from_millis(1));
            }
            Ok(most)
        });
        Watch { ends, thread }
    }

    /// The most that there were at once.
    fn finish(self) -> Result<usize> {
        self.ends.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow::anyhow!("the watch panicked"))?
    }
}

/// The address at this end of a line of `/proc/net/tcp` that is a connection to the agent in the state
/// TCP_ESTABLISHED.
fn established(line: &str) -> Option<&str> {
    let mut words = line.split_whitespace().skip(1);
    let local = words.next()?;
    words.take(2).eq([AGENT, "01"]).then_some(local)
}

//! The cluster for scenarios of Consul's failures: three servers, a node with backends and a node with
//! nohop, on a switch. Connections to backends use a separate link, so that Consul's network can fail
//! alone.

use std::net::SocketAddrV4;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use testbed::consul::{Consul, instance};
use testbed::helloworld::Helloworld;
use testbed::load::Load;
use testbed::net::Host;
use testbed::nohop::{Nohop, is_healthy};

use crate::cluster::{Nodes, vip};
use crate::load::under_load;

const SERVERS: [(&str, &str); 3] = [("s1", "10.98.0.1"), ("s2", "10.98.0.2"), ("s3", "10.98.0.3")];
const CLIENT: &str = "10.98.0.11";
const BACKEND: &str = "10.98.0.12";

/// The connections a second during a scenario.
const RATE: u32 = 500;

/// The nodes with Consul's cluster on them, and nohop.
pub struct HaCluster {
    pub nohop: Nohop,
    pub helloworlds: Vec<Helloworld>,
    /// The agent of the node with nohop.
    pub agent: Consul,
    /// The agent of the node with the backends.
    pub backend_agent: Consul,
    pub servers: Vec<Consul>,
    /// The switch port of nohop's agent.
    agent_port: String,
    switch: Arc<Host>,
    pub nodes: Arc<Nodes>,
    _hosts: Vec<Arc<Host>>,
}

/// Options of the cluster.
#[derive(Clone, Default)]
pub struct Setup {
    /// Additional configuration of every agent.
    pub consul: Value,
    /// Additional configuration of nohop's agent.
    pub agent: Value,
    /// The token of the tests.
    pub token: Option<String>,
    /// Additional configuration of nohop.
    pub nohop: String,
}

impl HaCluster {
    /// Starts it all, with two backends of the service helloworld.
    pub fn new() -> Result<HaCluster> {
        HaCluster::with(&Setup::default(), |_| Ok(()))
    }

    /// The same, with options; `prepare` is called when Consul runs, and before nohop does.
    pub fn with(setup: &Setup, prepare: impl FnOnce(&Consul) -> Result<()>) -> Result<HaCluster> {
        let nodes = Nodes::new()?;
        let switch = Host::new("switch")?;
        switch.make_bridge()?;
        let token = setup.token.as_deref();
        let mut hosts = Vec::new();
        for (name, address) in SERVERS {
            let host = Host::new(name)?;
            switch.attach(&host, &format!("{address}/24"))?;
            hosts.push(host);
        }
        let agent_port = switch.attach(&nodes.client, &format!("{CLIENT}/24"))?;
        switch.attach(&nodes.backend, &format!("{BACKEND}/24"))?;
        let placed: Vec<_> = hosts
            .iter()
            .zip(SERVERS)
            .map(|(host, (name, address))| (host, name, address))
            .collect();
        // A server that comes back knows of every node before it can lead: a leader removes nodes from the
        // catalog, and their instances, that it doesn't know of (`reconcileReaped` in Consul).
        let addresses = SERVERS.map(|(_, address)| address);
        let mut config = setup.consul.clone();
        config["retry_join"] = json!([&addresses[..], &[CLIENT, BACKEND]].concat());
        let servers = Consul::servers(&placed, &config, token)?;
        let client = |host, node, address, more: &Value| {
            let mut config = setup.consul.clone();
            for (key, value) in more.as_object().into_iter().flatten() {
                config[key] = value.clone();
            }
            Consul::client_with(host, node, address, &addresses, &config, token)
        };
        let agent = client(&nodes.client, "client", CLIENT, &setup.agent)?;
        let backend_agent = client(&nodes.backend, "backend", BACKEND, &json!({}))?;
        prepare(&servers[0])?;
        let nohop = nodes.nohop(&setup.nohop)?;
        let mut servers = HaCluster {
            nohop,
            helloworlds: Vec::new(),
            agent,
            backend_agent,
            servers,
            agent_port,
            switch,
            nodes: Arc::new(nodes),
            _hosts: hosts,
        };
        servers.serve("helloworld", 2)?;
        Ok(servers)
    }

    /// Starts and registers more backends of a service, until nohop has them.
    pub fn serve(&mut self, service: &str, n: usize) -> Result<()> {
        for idx in 0..n {
            let id = format!("{service}-{idx}");
            let helloworld = self.nodes.helloworld(&id)?;
            self.backend_agent.register(&instance(service, &id, helloworld.address))?;
            self.helloworlds.push(helloworld);
        }
        self.nohop.wait_for_backends(service, n).map(drop)
    }

    /// The index, in `servers`, of the leader.
    pub fn leader(&self) -> Result<usize> {
        let position = |leader: &Value| {
            let address = leader.as_str()?.split(':').next()?;
            SERVERS.iter().position(|(_, server)| *server == address)
        };
        let is_known = |leader: &Value| position(leader).is_some();
        let leader = self.servers[0].wait_for("/v1/status/leader", is_known)?;
        position(&leader).context("a server that leads")
    }

    /// Disconnects nohop's agent from the switch, or connects it again.
    pub fn set_link(&self, state: &str) -> Result<()> {
        self.switch.ip(&format!("link set {} {state}", self.agent_port)).map(drop)
    }

    /// Waits until news arrive: a backend `id` of helloworld comes, is connected to, and goes.
    ///
    /// By its id: how many others there are may change meanwhile, where Consul has just come back.
    pub fn expect_update(&mut self, id: &str) -> Result<()> {
        let newcomer = self.nodes.helloworld(id)?;
        self.backend_agent.register(&instance("helloworld", id, newcomer.address))?;
        self.nohop.wait_until(|services| is_healthy(services, "helloworld", id))?;
        self.backend_agent.deregister(id)?;
        self.nohop.wait_until(|services| !is_healthy(services, "helloworld", id))?;
        // A client that chose it a moment ago may still connect to it.
        self.helloworlds.push(newcomer);
        Ok(())
    }

    /// Where a service is connected to.
    pub fn vip(&self, name: &str) -> Result<SocketAddrV4> {
        vip(&self.nohop, name)
    }

    /// Runs `scenario` while connections to helloworld are opened: none may be lost, and none may reach
    /// another service.
    pub fn assert_no_failures(
        &mut self,
        scenario: impl FnOnce(&mut HaCluster, &Load) -> Result<()>,
    ) -> Result<()> {
        let vip = self.vip("helloworld")?;
        let nodes = Arc::clone(&self.nodes);
        let outcome = under_load(&nodes, vip, RATE, |load| scenario(self, load))?;
        let from_others: Vec<_> = outcome.answers.keys().filter(|a| !is_ours(a)).collect();
        ensure!(from_others.is_empty(), "{from_others:?} of {outcome:?}");
        Ok(())
    }
}

fn is_ours(answer: &str) -> bool {
    answer.starts_with("hello from helloworld-") || answer.starts_with("hello from newcomer")
}

/// Whether a status reports that Consul doesn't answer.
pub fn is_failing(status: &Value) -> bool {
    status["sources"][0]["state"] == "failing"
}

/// Whether a status reports that Consul answers.
pub fn is_live(status: &Value) -> bool {
    status["sources"][0]["state"] == "live"
}

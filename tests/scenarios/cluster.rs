//! What the scenarios are played on: a client node and a backend node, joined by a cable.

use std::fs;
use std::net::{SocketAddrV4, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::Value;
use testbed::TIMEOUT;
use testbed::cgroup::Cgroup;
use testbed::cmd;
use testbed::consul::{Consul, instance};
use testbed::helloworld::{Connects, Helloworld, connect};
use testbed::net::{ExecContext, Host};
use testbed::nohop::{Nohop, service};
use testbed::tempdir::TempDir;

use crate::server::Server;

/// The address of the client node, and of the backend node.
pub const CLIENT: &str = "10.99.0.1";
pub const BACKEND: &str = "10.99.0.2";

/// Two nodes, and the cgroup that nohop serves on the client node.
pub struct Nodes {
    pub cgroup: Cgroup,
    pub client: Arc<Host>,
    pub backend: Arc<Host>,
}

impl Nodes {
    pub fn new() -> Result<Nodes> {
        let (client, backend) = (Host::new("client")?, Host::new("backend")?);
        client.connect_veth(&backend, [&format!("{CLIENT}/24"), &format!("{BACKEND}/24")])?;
        Ok(Nodes { cgroup: Cgroup::new()?, client, backend })
    }

    /// Starts nohop on the client node.
    pub fn nohop(&self, config: &str) -> Result<Nohop> {
        Nohop::start(&self.client, &self.cgroup, config)
    }

    /// Starts a backend on the backend node.
    pub fn helloworld(&self, name: &str) -> Result<Helloworld> {
        Helloworld::start(self.backend.outside(), name, &format!("{BACKEND}:0"))
    }

    /// Starts a server of this process on the backend node; port 0 stands for any.
    pub fn server(&self, id: &'static str, port: u16) -> Result<Server> {
        let address = SocketAddrV4::new(BACKEND.parse()?, port);
        let listener = self.backend.enter(|| Ok(TcpListener::bind(address)?))?;
        Server::start(id, listener)
    }

    /// The client node, where nohop serves.
    pub fn inside(&self) -> ExecContext<'_> {
        self.client.inside(&self.cgroup)
    }

    /// What `dig` with these words prints on the client node.
    pub fn dig(&self, words: &str) -> Result<String> {
        self.inside().run("dig", &format!("+time=60 +tries=1 {words}"))
    }

    /// The same for a name that isn't known: Consul is asked for it, and where that takes longer than a
    /// resolver waits the answer is SERVFAIL. Then it is asked again.
    pub fn dig_unknown(&self, words: &str) -> Result<String> {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let answer = self.dig(words)?;
            if !answer.contains("status: SERVFAIL") || Instant::now() > deadline {
                return Ok(answer);
            }
        }
    }

    /// What an unmodified curl gets from `http://NAME.service/`.
    pub fn curl(&self, name: &str) -> Result<String> {
        self.inside().run("curl", &format!("-sS --max-time 60 http://{name}.service/"))
    }

    /// Connects from where nohop serves.
    pub fn connect(&self, address: SocketAddrV4, n_times: u32) -> Result<Connects> {
        connect(self.inside(), address, n_times)
    }
}

/// Two nodes with a Consul server on the backend node, a Consul client and nohop on the other.
pub struct Cluster {
    pub nohop: Nohop,
    pub helloworlds: Vec<Helloworld>,
    pub agent: Consul,
    pub server: Consul,
    pub nodes: Nodes,
}

impl Cluster {
    /// Starts it with `n` backends of the service helloworld: helloworld-0, helloworld-1 and so on.
    pub fn new(n: usize) -> Result<Cluster> {
        Cluster::with_config(n, "")
    }

    /// The same, with more of a configuration for nohop.
    pub fn with_config(n: usize, config: &str) -> Result<Cluster> {
        let nodes = Nodes::new()?;
        let on_backend = (&nodes.backend, "backend", BACKEND);
        let on_client = (&nodes.client, "client", CLIENT);
        let (server, agent) = Consul::server_and_client(on_backend, on_client)?;
        let nohop = nodes.nohop(config)?;
        let mut cluster = Cluster { nohop, helloworlds: Vec::new(), agent, server, nodes };
        cluster.serve("helloworld", n)?;
        Ok(cluster)
    }

    /// Starts and registers backends SERVICE-0, SERVICE-1 and so on, until nohop has `n` of them.
    pub fn serve(&mut self, service: &str, n: usize) -> Result<()> {
        for i in 0..n {
            let id = format!("{service}-{i}");
            let helloworld = self.nodes.helloworld(&id)?;
            self.server.register(&instance(service, &id, helloworld.address))?;
            self.helloworlds.push(helloworld);
        }
        self.nohop.wait_for_backends(service, n).map(drop)
    }

    /// Where a service is connected to.
    pub fn vip(&self, name: &str) -> Result<SocketAddrV4> {
        vip(&self.nohop, name)
    }
}

/// Where a service is connected to on the node of this daemon, at port 80.
pub fn vip(nohop: &Nohop, name: &str) -> Result<SocketAddrV4> {
    let services = nohop.services()?;
    let vip = service(&services, name).and_then(|service| service["vip"].as_str()?.parse().ok());
    Ok(SocketAddrV4::new(vip.with_context(|| format!("no VIP of {name} in {services:#}"))?, 80))
}

/// A static catalog.
pub struct Catalog(TempDir);

impl Catalog {
    /// Makes one with these services, each with the addresses of its backends.
    pub fn new(services: &[(&str, &[SocketAddrV4])]) -> Result<Catalog> {
        let catalog = Catalog(TempDir::new("catalog")?);
        catalog.set(services)?;
        Ok(catalog)
    }

    /// What makes nohop read it.
    pub fn config(&self) -> String {
        format!("catalog.sources = [\"file\"]\ncatalog.file = {:?}\n", self.path())
    }

    /// Replaces the services.
    pub fn set(&self, services: &[(&str, &[SocketAddrV4])]) -> Result<()> {
        let mut text = String::new();
        for (name, backends) in services {
            text += &format!("[[service]]\nname = {name:?}\n");
            for address in *backends {
                text += &format!("[[service.backend]]\naddress = \"{address}\"\n");
            }
        }
        self.write(&text)
    }

    /// Replaces the text.
    pub fn write(&self, text: &str) -> Result<()> {
        fs::write(self.path(), text).context("write the static catalog")
    }

    /// The file.
    pub fn path(&self) -> PathBuf {
        self.directory().join("catalog.toml")
    }

    /// The directory it is in, which is its own.
    pub fn directory(&self) -> PathBuf {
        self.0.path().to_path_buf()
    }
}

/// A unit in `status`; null where there is none of this name.
pub fn unit(status: &Value, name: &str) -> Value {
    let units = status["datapath"]["units"].as_array().cloned().unwrap_or_default();
    units.into_iter().find(|unit| unit["name"] == name).unwrap_or_default()
}

/// The programs attached to a cgroup, by `bpftool`.
pub fn attached(cgroup: &Cgroup) -> Result<Vec<String>> {
    let shown = cmd::words("bpftool", &format!("cgroup show {}", cgroup.path().display()))?;
    Ok(shown.lines().skip(1).map(String::from).collect())
}

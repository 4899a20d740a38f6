//! A contender's own node, so that none pays for another one's needs (such as connection tracking,
//! which costs all connections of a network namespace once one rule uses it).

use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::Pid;
use testbed::cgroup::Cgroup;
use testbed::net::{ExecContext, Host};
use testbed::process::Process;

use crate::{napi, pin};

/// Where the backends are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// On the client's own host: all on loopback.
    OneHost,
    /// On another host, at the other end of a cable (veth).
    TwoHosts,
    /// On another host, with one between, which forwards: an edge, with what stands between on it, which has a
    /// processor for itself. Clients and backends share another one.
    Edge,
}

impl Layout {
    /// As conditions of figures begin.
    pub fn name(self) -> &'static str {
        match self {
            Layout::OneHost => "one host",
            Layout::TwoHosts => "two hosts",
            Layout::Edge => "an edge with one processor",
        }
    }
}

/// The client's address, from which it connects to.
pub const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 97, 0, 1);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 97, 0, 2);

/// The addresses of an edge and of the backends' host, on the cable between them.
const INSIDE: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 99, 0, 1), Ipv4Addr::new(10, 99, 0, 2)];

/// The network of a second cable between client and edge, by which a flood comes.
const FLOOD: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 95, 0, 2), Ipv4Addr::new(10, 95, 0, 1)];

/// All of this is local to where the backends are: as many addresses as anybody needs.
const BACKENDS: [u8; 2] = [10, 98];

/// The settings of each node: no contender runs out of ports, of room for connections that wait to be
/// accepted, or of memory for datagrams.
const SETTINGS: [(&str, &str); 7] = [
    ("net/ipv4/ip_local_port_range", "10240 65535"),
    ("net/ipv4/tcp_tw_reuse", "1"),
    ("net/ipv4/tcp_max_tw_buckets", "1048576"),
    ("net/core/somaxconn", "65535"),
    ("net/ipv4/tcp_max_syn_backlog", "65535"),
    ("net/ipv4/tcp_syncookies", "0"),
    // Addresses are not to be connected to away from by a path's former losses.
    ("net/ipv4/tcp_no_metrics_save", "1"),
];

/// A client's host, the host of its backends, and a cgroup for each part, which measures its processor
/// time.
pub struct Node {
    /// The client's programs.
    pub client: Cgroup,
    /// The proxy, if there is one.
    pub hop: Cgroup,
    /// Those who answer.
    pub backend: Cgroup,
    layout: Layout,
    client_host: Arc<Host>,
    hop_host: Arc<Host>,
    backend_host: Arc<Host>,
    /// The threads that receive for the client, for what stands between, and for the backends; none where they
    /// receive in whoever's time the packets come.
    receivers: [Vec<Pid>; 3],
}

/// The processor time that each part of a node has had so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuTimes {
    /// Of the programs that connection.
    pub client: Duration,
    /// Of what stands between.
    pub hop: Duration,
    /// Of the backends.
    pub backend: Duration,
}

impl Node {
    /// Makes one.
    ///
    /// # Errors
    /// Without root rights, or when a namespace, an address or a cgroup can't be made.
    pub fn new(layout: Layout) -> Result<Node> {
        let client_host = Host::new("client")?;
        let [hop_host, backend_host] = match layout {
            Layout::OneHost => {
                client_host.ip(&format!("addr add {CLIENT}/32 dev lo"))?;
                [Arc::clone(&client_host), Arc::clone(&client_host)]
            }
            Layout::TwoHosts => {
                let backend_host = Host::new("backends")?;
                let ends = [format!("{CLIENT}/24"), format!("{SERVER}/24")];
                client_host.connect_veth(&backend_host, [&ends[0], &ends[1]])?;
                let [a, b] = BACKENDS;
                client_host.ip(&format!("route add {a}.{b}.0.0/16 via {SERVER} src {CLIENT}"))?;
                [Arc::clone(&client_host), backend_host]
            }
            Layout::Edge => {
                let [edge, backend_host] = [Host::new("edge")?, Host::new("backends")?];
                connect_edge(&client_host, &edge, &backend_host)?;
                [edge, backend_host]
            }
        };
        let [a, b] = BACKENDS;
        // An address of lo makes its whole network local.
        backend_host.ip(&format!("addr add {a}.{b}.0.1/16 dev lo"))?;
        let mut node = Node {
            client: Cgroup::new()?,
            hop: Cgroup::new()?,
            backend: Cgroup::new()?,
            layout,
            client_host,
            hop_host,
            backend_host,
            receivers: Default::default(),
        };
        set_all(node.client_place())?;
        if layout != Layout::OneHost {
            set_all(node.backend_place())?;
        }
        if layout == Layout::Edge {
            set_all(node.hop_place())?;
            node.receivers = [
                napi::receive_in_threads(&node.client_host, &["eth0", "eth1"], true)?,
                napi::receive_in_threads(&node.hop_host, &["eth0", "eth1"], true)?,
                napi::receive_in_threads(&node.backend_host, &["eth0"], true)?,
            ];
            // Interfaces take turns in a real edge, however much comes by one of them: so a flood isn't urgent.
            let flooded = napi::receive_in_threads(&node.hop_host, &["eth2"], false)?;
            node.receivers[1].extend(flooded);
            let cores = [pin::CLIENT, pin::SERVER, pin::CLIENT];
            for (threads, core) in node.receivers.iter().zip(cores) {
                pin::move_to(core, threads)?;
            }
        }
        Ok(node)
    }

    /// Whether an edge forwards between client and backends, even where nothing stands between.
    pub fn is_edge(&self) -> bool {
        self.layout == Layout::Edge
    }

    /// The client's host, for setting up its network.
    pub fn client_host(&self) -> &Arc<Host> {
        &self.client_host
    }

    /// The host of what stands between: the client's, unless there is an edge.
    pub fn hop_host(&self) -> &Arc<Host> {
        &self.hop_host
    }

    /// The host of the backends: the same one, where all is on one.
    pub fn backend_host(&self) -> &Arc<Host> {
        &self.backend_host
    }

    /// Where a client runs.
    pub fn client_place(&self) -> ExecContext<'_> {
        self.client_host.inside(&self.client)
    }

    /// Where what stands between runs: on the client's host, or on the edge.
    pub fn hop_place(&self) -> ExecContext<'_> {
        self.hop_host.inside(&self.hop)
    }

    /// Where a backend runs.
    pub fn backend_place(&self) -> ExecContext<'_> {
        self.backend_host.inside(&self.backend)
    }

    /// The address of the backends' host with this number, below 65,000.
    pub fn backend(idx: usize, port: u16) -> SocketAddrV4 {
        let [a, b] = BACKENDS;
        let [c, d] = ((idx + 256) as u16).to_be_bytes();
        SocketAddrV4::new(Ipv4Addr::new(a, b, c, d), port)
    }

    /// Counts a process that was started elsewhere, such as the daemon, as the proxy.
    ///
    /// # Errors
    /// When it is gone.
    pub fn adopt_hop(&self, process: &Process) -> Result<()> {
        let pid: Pid = process.pid();
        let file = self.hop.path().join("cgroup.procs");
        fs::write(file, pid.as_raw_nonzero().to_string()).context("put a process into a cgroup")
    }

    /// The processor time of the parts so far.
    ///
    /// # Errors
    /// When the kernel doesn't report it.
    pub fn cpu_times(&self) -> Result<CpuTimes> {
        let [client, hop, backend] = [&self.client, &self.hop, &self.backend].map(cpu_time);
        let [client_rx, hop_rx, backend_rx] =
            self.receivers.each_ref().map(|threads| napi::cpu_time(threads));
        Ok(CpuTimes {
            client: client? + client_rx?,
            hop: hop? + hop_rx?,
            backend: backend? + backend_rx?,
        })
    }

    /// Has all that `act` starts run on one processor, where the layout has one for each side.
    ///
    /// # Errors
    /// When `act` fails, or there is no such processor.
    pub fn pinned<T>(&self, core: usize, act: impl FnOnce() -> Result<T>) -> Result<T> {
        if self.is_edge() { pin::on(core, act) } else { act() }
    }

    /// Has an edge's backends receive in the time of who sends to them, and so without waiting for a thread's
    /// turn.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn receive_at_once(&mut self) -> Result<()> {
        self.receivers[2].clear();
        napi::receive_at_once(&self.backend_host, "eth0")
    }
}

/// Joins a client, an edge and its backends' host by cables, with the offloads of network cards that veth has
/// and XDP can live with: receive offload on both ends of each cable, none of checksums where packets come from.
fn connect_edge(client: &Host, edge: &Host, backends: &Host) -> Result<()> {
    let [inside, backend] = INSIDE.map(|address| format!("{address}/24"));
    let [flood, flooded] = FLOOD.map(|address| format!("{address}/24"));
    client.connect_veth(edge, [&format!("{CLIENT}/24"), &format!("{SERVER}/24")])?;
    edge.connect_veth(backends, [&inside, &backend])?;
    client.connect_veth(edge, [&flood, &flooded])?;
    client.ip(&format!("route add default via {SERVER} src {CLIENT}"))?;
    backends.ip(&format!("route add default via {}", INSIDE[0]))?;
    let [a, b] = BACKENDS;
    edge.ip(&format!("route add {a}.{b}.0.0/16 via {}", INSIDE[1]))?;
    for (host, interface) in [(client, "eth0"), (client, "eth1"), (backends, "eth0")] {
        host.outside().run("ethtool", &format!("-K {interface} tx off"))?;
    }
    // /proc/sys/net shows the reading thread's namespace.
    edge.enter(|| fs::write("/proc/sys/net/ipv4/ip_forward", "1").context("let the edge forward"))
}

impl CpuTimes {
    /// The processor time since then.
    pub fn since(self, before: CpuTimes) -> CpuTimes {
        CpuTimes {
            client: self.client.saturating_sub(before.client),
            hop: self.hop.saturating_sub(before.hop),
            backend: self.backend.saturating_sub(before.backend),
        }
    }

    /// In sum.
    pub fn all(self) -> Duration {
        self.client + self.hop + self.backend
    }
}

/// The processor time of all processes that are or were in a cgroup. The kernel counts it for every
/// cgroup, whether the cpu controller is there or not.
fn cpu_time(cgroup: &Cgroup) -> Result<Duration> {
    let file = cgroup.path().join("cpu.stat");
    let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
    let usage = text.lines().find_map(|line| line.strip_prefix("usage_usec "));
    let usage = usage.with_context(|| format!("{} has no usage_usec", file.display()))?;
    Ok(Duration::from_micros(usage.trim().parse().context("usage_usec")?))
}

/// Applies [`SETTINGS`]: /proc/sys/net shows the reading process's namespace.
fn set_all(place: ExecContext<'_>) -> Result<()> {
    let script: Vec<String> =
        SETTINGS.iter().map(|(key, value)| format!("echo '{value}' > /proc/sys/{key}")).collect();
    let mut sh = place.command("sh");
    sh.args(["-ec", &script.join("\n")]);
    testbed::cmd::stdout(sh).map(drop).context("set up a node's network")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backends_have_addresses_of_their_own() {
        assert_eq!(Node::backend(0, 8080).to_string(), "10.98.1.0:8080");
        assert_eq!(Node::backend(60_000, 1).to_string(), "10.98.235.96:1");
    }
}

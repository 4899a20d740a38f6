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

/// Where the backends are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// On the client's own host: all on loopback.
    OneHost,
    /// On another host, at the other end of a cable (veth).
    TwoHosts,
}

impl Layout {
    /// As conditions of figures begin.
    pub fn name(self) -> &'static str {
        match self {
            Layout::OneHost => "one host",
            Layout::TwoHosts => "two hosts",
        }
    }
}

/// The client's address, from which it connects to.
pub const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 97, 0, 1);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 97, 0, 2);

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
    client_host: Arc<Host>,
    backend_host: Arc<Host>,
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
        let backend_host = match layout {
            Layout::OneHost => {
                client_host.ip(&format!("addr add {CLIENT}/32 dev lo"))?;
                Arc::clone(&client_host)
            }
            Layout::TwoHosts => {
                let backend_host = Host::new("backends")?;
                let ends = [format!("{CLIENT}/24"), format!("{SERVER}/24")];
                client_host.connect_veth(&backend_host, [&ends[0], &ends[1]])?;
                let [a, b] = BACKENDS;
                client_host.ip(&format!("route add {a}.{b}.0.0/16 via {SERVER} src {CLIENT}"))?;
                backend_host
            }
        };
        let [a, b] = BACKENDS;
        // An address of lo makes its whole network local.
        backend_host.ip(&format!("addr add {a}.{b}.0.1/16 dev lo"))?;
        let node = Node {
            client: Cgroup::new()?,
            hop: Cgroup::new()?,
            backend: Cgroup::new()?,
            client_host,
            backend_host,
        };
        set_all(node.client_place())?;
        if layout == Layout::TwoHosts {
            set_all(node.backend_place())?;
        }
        Ok(node)
    }

    /// The client's host, for setting up its network.
    pub fn client_host(&self) -> &Arc<Host> {
        &self.client_host
    }

    /// The host of the backends: the same one, where all is on one.
    pub fn backend_host(&self) -> &Arc<Host> {
        &self.backend_host
    }

    /// Where a client runs.
    pub fn client_place(&self) -> ExecContext<'_> {
        self.client_host.inside(&self.client)
    }

    /// Where what stands between runs: on the client's host.
    pub fn hop_place(&self) -> ExecContext<'_> {
        self.client_host.inside(&self.hop)
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
        Ok(CpuTimes { client: client?, hop: hop?, backend: backend? })
    }
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

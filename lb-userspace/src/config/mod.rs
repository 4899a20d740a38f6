//! The configuration: its keys, their defaults, and what they may be.

mod address;
pub mod cgroup;
mod document;
mod problem;
mod read;
mod relations;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

pub use problem::{ConfigErrors, Place, Problem};
pub use read::Overrides;

/// Where the configuration is read from when `--config` doesn't say.
pub const DEFAULT_PATH: &str = "/etc/nohop/nohop.toml";

/// Everything that an operator can choose, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The cgroup v2 directory whose processes are served; `None` means the root of the hierarchy,
    /// wherever it is mounted.
    pub cgroup: Option<PathBuf>,
    /// Where maps and links are pinned, on a bpf file system.
    pub bpffs: PathBuf,
    /// Where what must outlive the daemon is kept.
    pub state_dir: PathBuf,
    /// What becomes of the kernel side when the daemon ends.
    pub on_exit: OnExit,
    /// Whether dials are only counted, and none is translated.
    pub shadow: bool,
    /// `[catalog]`
    pub catalog: CatalogConfig,
    /// `[consul]`
    pub consul: ConsulConfig,
    /// `[vip]`
    pub vip: VipConfig,
    /// `[dns]`
    pub dns: DnsConfig,
    /// `[plane]`
    pub plane: PlaneConfig,
    /// `[admin]`
    pub admin: AdminConfig,
}

/// What becomes of the kernel side when the daemon ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnExit {
    /// It goes on translating, by the last table.
    Keep,
    /// It is detached.
    Detach,
}

/// Where services come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CatalogConfig {
    /// Which source.
    pub source: Source,
    /// The tag that an instance needs to be routed.
    pub tag: String,
    /// Which services' instances are followed.
    pub watch: WatchPolicy,
    /// The age of the catalog, since the source last answered, from which on it alarms.
    pub max_age: Duration,
    /// What becomes of a catalog that is older.
    pub expired: Expired,
}

/// Which services' instances are followed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WatchPolicy {
    /// All, while they are at most half of `consul.max_connections`; else those that are used.
    #[default]
    Auto,
    /// Those that this node uses.
    Used,
    /// All.
    All,
}

/// What becomes of a catalog that is older than `catalog.max_age`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Expired {
    /// It goes on serving.
    #[default]
    Serve,
    /// Dials are refused.
    Refuse,
}

/// A source of discovery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The Consul agent.
    Consul,
    /// A static catalog in this file.
    File(PathBuf),
}

/// How to reach the Consul agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConsulConfig {
    /// The agent's HTTP address, `host:port`.
    pub address: String,
    /// The token, if any.
    pub token: Option<Token>,
    /// The datacenter; empty means the agent's own.
    pub datacenter: String,
    /// The most connections to the agent at any time; at least 4: one for the list of names, one for
    /// the switch `nohop/off`, one for what can't wait, and one for the services that are live.
    pub max_connections: usize,
}

/// Where the ACL token comes from.
#[derive(Clone, PartialEq, Eq)]
pub enum Token {
    /// The token itself, from CONSUL_HTTP_TOKEN.
    Literal(String),
    /// The file that holds it.
    File(PathBuf),
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Token::Literal(_) => f.write_str("Literal(..)"),
            Token::File(path) => f.debug_tuple("File").field(path).finish(),
        }
    }
}

/// The addresses that services get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VipConfig {
    /// The pool that VIPs come from, within 127.0.0.0/8.
    pub pool: Ipv4Net,
    /// The pool that IPv6 VIPs come from, within fd00::/8; `None` where services have none.
    pub pool6: Option<Ipv6Net>,
    /// The ports of every service that doesn't name its own; not empty, no duplicates.
    pub ports: Vec<u16>,
    /// Further addresses, each for one service, that count in the host's network namespace only.
    pub pins: BTreeMap<String, SocketAddrV4>,
}

impl VipConfig {
    /// The pools: the IPv4 one, and the IPv6 one where there is one.
    pub fn pools(&self) -> impl Iterator<Item = IpNet> {
        std::iter::once(IpNet::V4(self.pool)).chain(self.pool6.map(IpNet::V6))
    }
}

/// The DNS server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DnsConfig {
    /// The addresses to listen on, UDP and TCP.
    pub listen: Vec<SocketAddr>,
    /// The zone that is ours, without dots at the ends, in lower case.
    pub domain: String,
    /// How long an answer may be kept, in seconds.
    pub ttl: u32,
    /// Where all other names go.
    pub forward: Forward,
    /// Where names below certain domains go instead.
    pub routes: BTreeMap<String, SocketAddr>,
}

/// The upstreams for names that aren't ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Forward {
    /// The nameservers of /etc/resolv.conf, but for ourselves.
    ResolvConf,
    /// These, in order.
    Servers(Vec<SocketAddr>),
}

/// The kernel side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlaneConfig {
    /// The number of services that the maps have room for.
    pub max_services: u32,
    /// The number of backends, over all services, that the maps have room for.
    pub max_backends: u32,
    /// The cgroups whose processes are left alone: below the mount when absolute, else below the
    /// root of the hierarchy.
    pub exclude_cgroups: Vec<PathBuf>,
}

/// The admin interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdminConfig {
    /// Where it listens.
    pub listen: Vec<AdminAddress>,
}

/// An address of the admin interface, written `unix:PATH` or `ADDR:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AdminAddress {
    /// A unix socket.
    Unix(PathBuf),
    /// A TCP socket.
    Tcp(SocketAddr),
}

impl Default for Config {
    fn default() -> Self {
        Config {
            cgroup: None,
            bpffs: "/sys/fs/bpf/nohop".into(),
            state_dir: "/var/lib/nohop".into(),
            on_exit: OnExit::Keep,
            shadow: false,
            catalog: CatalogConfig {
                source: Source::Consul,
                tag: "routed".into(),
                watch: WatchPolicy::Auto,
                max_age: Duration::from_secs(60 * 60),
                expired: Expired::Serve,
            },
            consul: ConsulConfig {
                address: "127.0.0.1:8500".into(),
                token: None,
                datacenter: String::new(),
                max_connections: 64,
            },
            vip: VipConfig {
                pool: Ipv4Net::new_assert(Ipv4Addr::new(127, 128, 0, 0), 9),
                pool6: None,
                ports: vec![80],
                pins: BTreeMap::new(),
            },
            dns: DnsConfig {
                listen: vec![SocketAddr::from(([127, 0, 0, 1], 53))],
                domain: "service".into(),
                ttl: 30,
                forward: Forward::ResolvConf,
                routes: BTreeMap::from([(
                    "consul".into(),
                    SocketAddr::from(([127, 0, 0, 1], 8600)),
                )]),
            },
            plane: PlaneConfig {
                max_services: 16_384,
                max_backends: 131_072,
                exclude_cgroups: Vec::new(),
            },
            admin: AdminConfig { listen: vec![AdminAddress::Unix("/run/nohop/admin.sock".into())] },
        }
    }
}

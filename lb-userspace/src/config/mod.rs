//! The configuration: its keys, their defaults, and what they may be.

mod address;
pub mod cgroup;
pub mod consul;
mod diagnostic;
pub mod diff;
mod parse;
#[cfg(test)]
mod tests;
mod toml_value;
mod validate;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

pub use consul::{BasicAuth, ConsulAddress, ConsulConfig, TlsConfig, Token};
pub use diagnostic::{ConfigErrors, Place, Problem};
pub use parse::Overrides;

/// Where the configuration is read from when `--config` doesn't say.
pub const DEFAULT_PATH: &str = "/etc/nohop/nohop.toml";

/// The number of cgroups that can be excluded at once.
pub const MAX_EXCLUDED_CGROUPS: usize = 16;

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
    /// Whether connections are only counted, and none is translated.
    pub shadow: bool,
    /// `[catalog]`
    pub catalog: CatalogConfig,
    /// `[consul]`
    pub consul: ConsulConfig,
    /// `[vip]`
    pub vip: VipConfig,
    /// `[dns]`
    pub dns: DnsConfig,
    /// `[datapath]`
    pub datapath: DatapathConfig,
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
    /// What an instance's Meta has to say as well, key by key, to be routed.
    pub meta: BTreeMap<String, String>,
    /// How well an instance has to be to be routed.
    pub health: HealthPolicy,
    /// Which of its addresses an instance is connected to at.
    pub address: AddressChoice,
    /// Which services' instances are followed.
    pub watch: WatchPolicy,
    /// The age of the catalog, since the source last answered, from which on it alarms.
    pub max_age: Duration,
    /// What becomes of a catalog that is older.
    pub expired: Expired,
}

/// How well an instance has to be to be routed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HealthPolicy {
    /// All its checks pass.
    #[default]
    Passing,
    /// None is critical; one that is in warning serves with the weight that it has for that.
    Warning,
}

/// Which of its addresses an instance is connected to at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AddressChoice {
    /// Its own.
    #[default]
    Lan,
    /// The one for other datacenters, where it has one, else its own.
    Wan,
    /// The IPv4 address of its own.
    LanIpv4,
    /// The IPv6 address of its own.
    LanIpv6,
    /// The IPv4 address for other datacenters.
    WanIpv4,
    /// The IPv6 address for other datacenters.
    WanIpv6,
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
    /// Connects are refused.
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
    /// What becomes of a name of the zone that no routed service has.
    pub unrouted: Unrouted,
    /// Who is answered, beside the host itself.
    pub allow: Vec<Allowed>,
    /// The queries a second that one address of another host or container may send; 0 for any
    /// number.
    pub client_rate: u32,
}

/// What becomes of a name of the zone that no routed service has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unrouted {
    /// There is no such name.
    #[default]
    Nxdomain,
    /// It is forwarded as other names are.
    Forward,
}

/// Clients of the DNS server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allowed {
    /// Those on networks that one of this host's interfaces is in.
    Local,
    /// Those of this network.
    Network(IpNet),
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
pub struct DatapathConfig {
    /// The number of services that the maps have room for.
    pub max_services: u32,
    /// The number of backends, over all services, that the maps have room for.
    pub max_backends: u32,
    /// The cgroups whose processes are left alone: below the mount when absolute, else below the
    /// root of the hierarchy. In a segment `*` stands for any characters and `?` for one.
    pub exclude_cgroups: Vec<PathBuf>,
}

/// The admin interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdminConfig {
    /// Where it listens.
    pub listen: Vec<AdminAddress>,
    /// The names under which a TCP address may be asked, beside localhost and addresses.
    pub hosts: Vec<String>,
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
                meta: BTreeMap::new(),
                health: HealthPolicy::Passing,
                address: AddressChoice::Lan,
                watch: WatchPolicy::Auto,
                max_age: Duration::from_secs(60 * 60),
                expired: Expired::Serve,
            },
            consul: ConsulConfig::default(),
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
                unrouted: Unrouted::Nxdomain,
                allow: vec![Allowed::Local],
                client_rate: 10_000,
            },
            datapath: DatapathConfig {
                max_services: 16_384,
                max_backends: 131_072,
                exclude_cgroups: Vec::new(),
            },
            admin: AdminConfig {
                listen: vec![AdminAddress::Unix("/run/nohop/admin.sock".into())],
                hosts: Vec::new(),
            },
        }
    }
}

//! The configuration: its keys, their defaults, and what they may be.

mod address;
mod balance;
mod builder;
pub mod cgroup;
pub mod consul;
mod diagnostic;
mod edge;
pub mod keys;
mod listen;
pub mod migrate;
mod parse;
pub mod template;
#[cfg(test)]
mod tests;
mod text;
mod toml_value;
mod validate;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize, Serializer};

pub use balance::{
    AffinityKey, AllCritical, BalanceAlgorithm, BalanceConfig, EjectConfig, Preference, Share,
};
pub use builder::{Flag, FlagValue};
pub use consul::{BasicAuth, ConsulAddress, ConsulConfig, TlsConfig, Token};
pub use diagnostic::{ConfigErrors, Location, Problem};
pub use edge::FlowTimeouts;
pub use listen::{is_v6_only, tcp_addresses};
pub use parse::{ConfigReader, LoadedConfig};

/// The configuration file without `--config`.
pub const DEFAULT_PATH: &str = "/etc/nohop/nohop.toml";

/// The number of networks that public VIPs may come from: a connection to anything else is compared to each.
pub const MAX_PUBLIC_NETWORKS: usize = 4;

/// The most ports that a service may list: each is an entry of the kernel's maps.
pub const MAX_PORTS: usize = 64;

/// The number of cgroups that can be excluded at once.
pub const MAX_EXCLUDED_CGROUPS: usize = 1_024;

/// All settings, checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Config {
    /// The cgroup v2 directory whose processes are served; `None` means the root of the hierarchy,
    /// wherever it is mounted.
    #[serde(serialize_with = "write_cgroup")]
    pub cgroup: Option<PathBuf>,
    /// Where maps and links are pinned, on a bpf file system.
    pub bpffs: PathBuf,
    /// The directory of what outlives the daemon.
    pub state_dir: PathBuf,
    /// What happens to the datapath when the daemon ends.
    pub on_exit: OnExit,
    /// Whether connections are only counted, and none is redirected.
    pub shadow: bool,
    /// `[catalog]`
    pub catalog: CatalogConfig,
    /// `[balance]`
    pub balance: BalanceConfig,
    /// `[consul]`
    pub consul: ConsulConfig,
    /// `[vip]`
    pub vip: VipConfig,
    /// `[edge]`
    pub edge: EdgeConfig,
    /// `[dns]`
    pub dns: DnsConfig,
    /// `[datapath]`
    pub datapath: DatapathConfig,
    /// `[admin]`
    pub admin: AdminConfig,
}

/// What happens to the datapath when the daemon ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnExit {
    /// It keeps redirecting, by the last table.
    Keep,
    /// It is detached.
    Detach,
}

/// Where services come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CatalogConfig {
    /// The sources; for one name the first that has it. At least one, each once.
    #[serde(flatten, serialize_with = "write_sources")]
    pub sources: Vec<SourceKind>,
    /// The tag that an instance needs to be routed.
    pub tag: String,
    /// The Meta that an instance needs to be routed as well.
    pub meta: BTreeMap<String, String>,
    /// The health that an instance needs to be routed.
    pub health: HealthPolicy,
    /// Which address of an instance is used.
    pub address: AddressChoice,
    /// Which services' instances are watched.
    pub watch: WatchPolicy,
    /// The age of a service's last answer from which on it is a problem in `status`.
    #[serde(serialize_with = "text::write_duration")]
    pub max_age: Duration,
    /// What happens to a catalog that is older.
    pub expired: Expired,
}

/// The health that an instance needs to be routed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HealthPolicy {
    /// All its checks pass.
    #[default]
    Passing,
    /// None is critical; one that is in warning serves with the weight that it has for that.
    Warning,
}

/// Which address of an instance is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
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

/// Which services' instances are watched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WatchPolicy {
    /// All, while they are at most half of `consul.max_connections`; else those that are used.
    #[default]
    Auto,
    /// Those that this node uses.
    Used,
    /// All.
    All,
}

/// What happens to a catalog that is older than `catalog.max_age`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Expired {
    /// It stays in use.
    #[default]
    Serve,
    /// Connections are refused.
    Refuse,
}

/// A source of discovery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceKind {
    /// The Consul agent.
    Consul,
    /// A static catalog in this file.
    File(PathBuf),
}

impl SourceKind {
    /// The source's name in the configuration, in `status` and in metrics.
    pub fn name(&self) -> &'static str {
        match self {
            SourceKind::Consul => "consul",
            SourceKind::File(_) => "file",
        }
    }
}

/// The addresses that services get.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VipConfig {
    /// The pool that VIPs come from, within 127.0.0.0/8.
    pub pool: Ipv4Net,
    /// The pool that IPv6 VIPs come from, within fd00::/8; `None` where services have none.
    pub pool6: Option<Ipv6Net>,
    /// The ports of every service that doesn't name its own: at most [`MAX_PORTS`], not empty, no duplicates.
    pub ports: Vec<u16>,
    /// Further addresses, each for one service, that apply in the host's network namespace only.
    pub pins: BTreeMap<String, SocketAddrV4>,
    /// The networks that public VIPs may come from: at most [`MAX_PUBLIC_NETWORKS`], which don't overlap.
    pub public: Vec<IpNet>,
}

impl VipConfig {
    /// The pools: the IPv4 one, and the IPv6 one where there is one.
    pub fn pools(&self) -> impl Iterator<Item = IpNet> {
        std::iter::once(IpNet::V4(self.pool)).chain(self.pool6.map(IpNet::V6))
    }
}

/// The edge: what takes packets of clients outside for public VIPs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EdgeConfig {
    /// The interfaces where packets of clients and of backends arrive; empty where this node is no edge.
    pub interfaces: Vec<String>,
    /// The addresses of this edge that backends see.
    pub source: Vec<IpAddr>,
    /// Public VIPs by service, beside those that services declare themselves; within [`VipConfig::public`].
    pub vips: BTreeMap<String, SocketAddr>,
    /// The services whose instances are shown clients' addresses.
    pub client_address: Vec<String>,
    /// How many flows there is room for.
    pub max_flows: u32,
    /// After how long without a packet flows end.
    pub timeouts: FlowTimeouts,
}

impl Default for EdgeConfig {
    fn default() -> EdgeConfig {
        EdgeConfig {
            interfaces: Vec::new(),
            source: Vec::new(),
            vips: BTreeMap::new(),
            client_address: Vec::new(),
            max_flows: 131_072,
            timeouts: FlowTimeouts::default(),
        }
    }
}

impl EdgeConfig {
    /// Whether this node is an edge.
    pub fn is_on(&self) -> bool {
        !self.interfaces.is_empty()
    }
}

/// The DNS server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DnsConfig {
    /// The addresses to listen on, UDP and TCP.
    pub listen: Vec<SocketAddr>,
    /// The addresses to serve DNS over TLS on; none by default.
    pub listen_tls: Vec<SocketAddr>,
    /// The certificate of `listen_tls` (PEM), and after it those that signed it.
    pub tls_cert_file: Option<PathBuf>,
    /// Its private key (PEM).
    pub tls_key_file: Option<PathBuf>,
    /// The zone that nohop answers itself, without dots at the ends, in lower case.
    pub domain: String,
    /// The TTL of the zone's records, in seconds.
    pub ttl: u32,
    /// Where all other names go.
    pub forward: Forward,
    /// Where names below certain domains go instead.
    pub routes: BTreeMap<String, SocketAddr>,
    /// The answer to a name of the zone that no routed service has.
    pub unrouted: Unrouted,
    /// The clients that are answered in addition to the host itself.
    pub allow: Vec<Allowed>,
    /// The queries a second that one address of another host or container may send; 0 for any
    /// number.
    pub client_rate: u32,
    /// Whether the kernel answers routed names.
    pub kernel: bool,
    /// When it does.
    pub kernel_mode: KernelMode,
    /// Whose queries to other resolvers are sent to nohop.
    pub intercept: Intercepted,
    /// Whether each response of the daemon is logged, and how often the kernel answered.
    pub log: bool,
}

/// Whose DNS queries to other resolvers are sent to nohop.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Intercepted {
    /// Those of Nomad's tasks and Docker's containers, or of none.
    Tasks(bool),
    /// Those of processes in these cgroups, or below: paths, whose segments may have `*` and `?`.
    Cgroups(Vec<PathBuf>),
}

impl Intercepted {
    /// Whether those of any process are.
    pub fn is_on(&self) -> bool {
        *self != Intercepted::Tasks(false)
    }
}

/// When the kernel answers routed names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KernelMode {
    /// Always.
    #[default]
    Always,
    /// While the daemon doesn't run.
    Standby,
}

/// The answer to a name of the zone that no routed service has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unrouted {
    /// There is no such name.
    #[default]
    Nxdomain,
    /// It is forwarded as other names are.
    Forward,
}

/// Clients of the DNS server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Allowed {
    /// Those on networks that one of this host's interfaces is in.
    Local,
    /// Those of this network.
    #[serde(untagged)]
    Network(IpNet),
}

/// The upstreams of names outside the zone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum Forward {
    /// The nameservers of /etc/resolv.conf, without this server itself.
    #[serde(rename = "resolv.conf")]
    ResolvConf,
    /// These, in order; without any, nothing is forwarded.
    #[serde(untagged)]
    Servers(Vec<SocketAddr>),
}

/// The datapath.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DatapathConfig {
    /// The number of services that the maps have room for.
    pub max_services: u32,
    /// The number of backends, over all services, that the maps have room for.
    pub max_backends: u32,
    /// The cgroups whose processes are bypassed: below the mount when absolute, else below the
    /// root of the hierarchy. In a segment `*` stands for any characters and `?` for one.
    pub exclude_cgroups: Vec<PathBuf>,
    /// The addresses of edges whose word is taken for the client's address.
    pub client_address_from: Vec<Ipv4Addr>,
}

/// The admin interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AdminConfig {
    /// Where it listens.
    pub listen: Vec<AdminAddress>,
    /// The names and addresses under which a TCP address may be addressed, in addition to itself,
    /// localhost and the machine's name.
    pub hosts: Vec<String>,
    /// Whose clients may trace connections.
    pub trace: TraceAccess,
    /// Whether each request is logged.
    pub access_log: bool,
}

/// Whose clients may trace connections, and list an edge's flows over TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TraceAccess {
    /// No client (`false`).
    Off,
    /// Those of unix sockets (`true`).
    Unix,
    /// Those of TCP addresses as well (`"tcp"`).
    Tcp,
}

impl Serialize for TraceAccess {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            TraceAccess::Off => serializer.serialize_bool(false),
            TraceAccess::Unix => serializer.serialize_bool(true),
            TraceAccess::Tcp => serializer.serialize_str("tcp"),
        }
    }
}

/// An address of the admin interface, written `unix:PATH` or `ADDR:PORT`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum AdminAddress {
    /// A unix socket.
    Unix(PathBuf),
    /// A TCP socket.
    Tcp(SocketAddr),
}

fn write_cgroup<S: Serializer>(cgroup: &Option<PathBuf>, to: S) -> Result<S::Ok, S::Error> {
    cgroup.as_deref().unwrap_or(Path::new("auto")).serialize(to)
}

/// Writes the keys `sources` and `file`.
fn write_sources<S: Serializer>(sources: &[SourceKind], to: S) -> Result<S::Ok, S::Error> {
    #[derive(Default, Serialize)]
    struct Keys<'a> {
        sources: Vec<&'static str>,
        file: Option<&'a Path>,
    }
    let mut keys = Keys::default();
    for source in sources {
        keys.sources.push(source.name());
        if let SourceKind::File(path) = source {
            keys.file = Some(path);
        }
    }
    keys.serialize(to)
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
                sources: vec![SourceKind::Consul],
                tag: "routed".into(),
                meta: BTreeMap::new(),
                health: HealthPolicy::Passing,
                address: AddressChoice::Lan,
                watch: WatchPolicy::Auto,
                max_age: Duration::from_secs(60 * 60),
                expired: Expired::Serve,
            },
            balance: BalanceConfig::default(),
            consul: ConsulConfig::default(),
            vip: VipConfig {
                pool: Ipv4Net::new_assert(Ipv4Addr::new(127, 128, 0, 0), 9),
                pool6: None,
                ports: vec![80],
                pins: BTreeMap::new(),
                public: Vec::new(),
            },
            edge: EdgeConfig::default(),
            dns: DnsConfig {
                listen: vec![SocketAddr::from(([127, 0, 0, 1], 53))],
                listen_tls: Vec::new(),
                tls_cert_file: None,
                tls_key_file: None,
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
                kernel: true,
                kernel_mode: KernelMode::Always,
                intercept: Intercepted::Tasks(false),
                log: false,
            },
            datapath: DatapathConfig {
                max_services: 16_384,
                max_backends: 131_072,
                exclude_cgroups: Vec::new(),
                client_address_from: Vec::new(),
            },
            admin: AdminConfig {
                listen: vec![AdminAddress::Unix("/run/nohop/admin.sock".into())],
                hosts: Vec::new(),
                trace: TraceAccess::Unix,
                access_log: false,
            },
        }
    }
}

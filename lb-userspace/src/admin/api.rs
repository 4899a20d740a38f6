//! The JSON documents of the admin interface, as the server writes and the command line reads them.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4};

use serde::{Deserialize, Serialize};

use crate::config::BalanceAlgorithm;
use crate::table::{BackendState, Excluded, Ports, Protocols, Watch};

/// `GET /v1/status`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Whether names are answered and connections translated: the datapath is attached, the catalog synced.
    pub ready: bool,
    /// Why it isn't ready, or what else is wrong, each with the fix.
    pub problems: Vec<String>,
    /// The daemon's version.
    pub version: String,
    /// The daemon's process id.
    pub pid: u32,
    /// The generation of the table in force.
    pub generation: u64,
    /// The revision of this document, for `?after=`: it grows with every change except those of ages and
    /// counts, also from one daemon to the next.
    #[serde(default)]
    pub revision: u64,
    /// The sources of the catalog.
    pub sources: Vec<SourceStatus>,
    /// The number of services.
    pub services: usize,
    /// The number of healthy backends, over all services.
    pub backends: usize,
    /// The number of drains by hand.
    #[serde(default)]
    pub drains: usize,
    /// The DNS server.
    pub dns: DnsStatus,
    /// How `vip.pool` is used.
    #[serde(default)]
    pub pool: PoolStatus,
    /// The kernel side.
    pub datapath: DatapathStatus,
    /// What this node does as an edge; `null` where it is none.
    #[serde(default)]
    pub edge: Option<EdgeDocument>,
}

/// A source of the catalog, within [`Status`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SourceStatus {
    /// `consul` or `file`.
    pub name: String,
    /// `connecting` before the source has answered this daemon, also while a saved catalog serves, then
    /// `live`, or `failing` while the source doesn't answer and the last table stays in use.
    pub state: String,
    /// Seconds since the source last answered; `null` before that.
    pub age_seconds: Option<f64>,
    /// Information that is no problem, such as that Consul filters its responses by ACLs.
    #[serde(default)]
    pub facts: Vec<String>,
    /// The problem, with the fix.
    #[serde(default)]
    pub problem: Option<String>,
    /// The watches, if the source doesn't watch everything at once.
    #[serde(default)]
    pub watches: Option<WatchStatus>,
}

/// A source's watches and their load, within [`SourceStatus`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WatchStatus {
    /// The services whose instances are watched.
    pub live: usize,
    /// The others.
    pub cold: usize,
    /// The connections that are open.
    pub connections: usize,
    /// The connections that there may be.
    pub max_connections: usize,
    /// Seconds since the live service that waits longest for its turn was answered.
    pub oldest_age_seconds: Option<f64>,
    /// The most requests that this node makes in an hour, calculated.
    pub requests_per_hour: u64,
    /// The most bytes that it reads in an hour, calculated.
    pub bytes_per_hour: u64,
}

/// The edge, within [`Status`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EdgeDocument {
    /// Its interfaces, in the order of the configuration.
    pub interfaces: Vec<EdgeInterfaceDocument>,
    /// `passed` where a packet of the daemon's own was translated by the attached programs, and the answer to it; why it
    /// wasn't; `null` where that isn't known.
    pub proof: Option<String>,
    /// The flows through it.
    pub flows: u64,
    /// The flows that it has room for.
    pub capacity: u64,
    /// The public VIPs that are announced.
    pub announced: Vec<IpAddr>,
    /// Why none is, or why some aren't; `null` while all are.
    pub withdrawn: Option<String>,
    /// The services whose servers are sent the addresses of clients.
    #[serde(default)]
    pub client_address: Vec<String>,
    /// What was decided on packets, by name, since the unit's maps were made.
    #[serde(default)]
    pub packets: BTreeMap<String, u64>,
}

/// An interface of the edge, within [`EdgeDocument`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EdgeInterfaceDocument {
    /// Its name.
    pub name: String,
    /// How the program is attached, such as `tcx` or `xdp-native+tcx`; `null` where it isn't.
    pub mode: Option<String>,
    /// Why it isn't, or not in a better way.
    pub message: Option<String>,
}

/// `GET /v1/flows`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FlowsDocument {
    /// How many flows there are.
    pub total: u64,
    /// Those that were asked for.
    pub flows: Vec<FlowDocument>,
}

/// A flow through the edge, within [`FlowsDocument`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FlowDocument {
    /// The service; `null` where the table doesn't have it any more.
    pub service: Option<String>,
    /// The client.
    pub client: SocketAddr,
    /// What it sends to.
    pub vip: SocketAddr,
    /// Where its packets go.
    pub backend: SocketAddr,
    /// What the backend sees.
    pub source: SocketAddr,
    /// `tcp` or `udp`.
    pub protocol: String,
    /// `syn-sent`, `syn-received`, `established`, `half-closed`, `closed` or `udp`.
    pub state: String,
    /// The packets of both directions.
    pub packets: u64,
    /// Their bytes, from the IP header on.
    pub bytes: u64,
    /// Seconds since the first packet.
    pub age_seconds: f64,
    /// Seconds since the last one.
    pub idle_seconds: f64,
}

/// How `vip.pool` is used, within [`Status`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolStatus {
    /// The addresses of services.
    pub used: usize,
    /// Those that a service lost less than a day ago.
    pub quarantined: usize,
    /// All usable addresses of the pool.
    pub size: usize,
}

/// The DNS server, within [`Status`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DnsStatus {
    /// The addresses it listens on, UDP and TCP.
    pub listen: Vec<SocketAddr>,
    /// The addresses on which it serves DNS over TLS.
    #[serde(default)]
    pub listen_tls: Vec<SocketAddr>,
    /// The zone that it answers itself.
    pub domain: String,
    /// The resolvers that other names are forwarded to, those of the longest domain first.
    #[serde(default)]
    pub upstreams: Vec<UpstreamStatus>,
}

/// A resolver that names are forwarded to, within [`DnsStatus`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UpstreamStatus {
    /// The resolver's address.
    pub address: SocketAddr,
    /// Over UDP: `up`, `suspect` while a probe decides, or `out`: then it is tried last until it answers.
    pub state: String,
    /// The same over TCP, which is used for answers that are too long for UDP.
    #[serde(default)]
    pub tcp_state: String,
    /// Queries that were sent to it, since the start.
    pub sent: u64,
    /// Those of them whose answers are still waited for.
    #[serde(default)]
    pub in_flight: u64,
    /// Queries by result: `answered`, `refused` (SERVFAIL, REFUSED and other errors),
    /// `timeout`, `unreachable`. One whose question another resolver answered first may end up as none of them.
    pub results: BTreeMap<String, u64>,
    /// The mean time of its answers, in milliseconds; `null` before the first.
    pub mean_ms: Option<f64>,
}

/// `GET /v1/dns?name=NAME&type=TYPE`: what the DNS server answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DnsLookup {
    /// Name, class and type.
    pub question: String,
    /// `NOERROR`, `NXDOMAIN`, `SERVFAIL` and so on.
    pub code: String,
    /// The records of each section: name, TTL in seconds, class, type, data.
    pub answers: Vec<String>,
    /// Records of the zone's authority, with the time of negative caching.
    pub authorities: Vec<String>,
    /// Those that go along.
    pub additionals: Vec<String>,
    /// Where the answer came from, where that is known.
    #[serde(default)]
    pub origin: Option<Origin>,
    /// The resolver it came from, where it was forwarded.
    #[serde(default)]
    pub upstream: Option<String>,
    /// Why no resolver answered, where none did, or why this server's own answer is SERVFAIL.
    #[serde(default)]
    pub reason: Option<String>,
}

/// Where an answer came from, within [`DnsLookup`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// From the kernel, by what it has of the table: the server hasn't seen the query.
    Kernel,
    /// From the server itself, by its table.
    Table,
    /// From another resolver.
    Upstream,
    /// Another resolver should have answered, and none did.
    Nowhere,
}

/// The kernel side, within [`Status`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DatapathStatus {
    /// Whether every hook is attached to the cgroup.
    pub attached: bool,
    /// Whether the maps, with the table in them, were taken over from an earlier daemon.
    #[serde(default)]
    pub adopted: bool,
    /// The cgroup whose processes are served.
    pub cgroup: String,
    /// `translate`, or `shadow` while connections are only counted and names get SERVFAIL.
    #[serde(default)]
    pub mode: String,
    /// Why connections are only counted; `null` while they are translated.
    #[serde(default)]
    pub mode_reason: Option<String>,
    /// The units that the kernel side is made of, in the order in which they are attached.
    #[serde(default)]
    pub units: Vec<UnitStatus>,
    /// Optional features that this kernel lacks.
    #[serde(default)]
    pub limits: Vec<String>,
    /// How full the maps are.
    pub maps: Vec<MapStatus>,
    /// The number of services that the kernel doesn't have as the table wants them.
    #[serde(default)]
    pub refused_services: usize,
    /// Events that belong to no service, by name, since the start.
    pub counters: BTreeMap<String, u64>,
    /// The edges whose clients' addresses servers of this node are shown.
    #[serde(default)]
    pub client_address_from: Vec<Ipv4Addr>,
}

/// Programs, maps and attachments that load, fail and upgrade together, within [`DatapathStatus`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnitStatus {
    /// The unit's name.
    pub name: String,
    /// `attached`; `waiting` for its target, the first table, or the replacement of an earlier daemon's
    /// programs; `off` by configuration, shadow mode or an obstacle; `failed`.
    pub state: String,
    /// Why it isn't attached, or where it doesn't work; `null` while all is well.
    pub reason: Option<String>,
}

/// One map, within [`DatapathStatus`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapStatus {
    /// The map's name, as `bpftool map` shows it.
    pub name: String,
    /// Entries in use.
    pub entries: u64,
    /// Entries it has room for.
    pub capacity: u64,
}

/// One element of `GET /v1/services`, and the greater part of [`Explanation`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServiceStatus {
    /// The name.
    pub name: String,
    /// Its address on this node.
    pub vip: Ipv4Addr,
    /// Its IPv6 address on this node, where there is one.
    #[serde(default)]
    pub vip6: Option<Ipv6Addr>,
    /// One more address, in the host's network namespace only.
    #[serde(default)]
    pub pin: Option<SocketAddrV4>,
    /// Its public addresses, which edges serve to clients outside.
    #[serde(default)]
    pub public: Vec<SocketAddr>,
    /// The ports it is connected to at: a list of numbers, or `"any"`.
    pub ports: Ports,
    /// `tcp`, `udp` or `both`.
    pub protocol: Protocols,
    /// How a backend is chosen: `random`, `round-robin`, `least`, `latency` or `maglev`.
    pub algorithm: BalanceAlgorithm,
    /// The generation of the table that changed it last.
    pub generation: u64,
    /// Whether the source follows its instances: `live` or `cold`.
    pub watch: Watch,
    /// Contradictions among its instances' declarations.
    #[serde(default)]
    pub notes: Vec<String>,
    /// Why the kernel doesn't have this state of it, when it doesn't; then its former state serves.
    #[serde(default)]
    pub error: Option<String>,
    /// Connects that were sent to a backend, since the start; connect() by UDP sockets not among them.
    pub connects: u64,
    /// Connects that were refused because there was no backend for them, since the start.
    pub refused: u64,
    /// Connects by TCP that were sent to a backend and failed: it refused them, didn't answer or
    /// couldn't be reached. One that the client gave up is none.
    #[serde(default)]
    pub failed: u64,
    /// SYNs of its TCP connects that were sent again, since the daemon's start, counted when a connect ends.
    #[serde(default)]
    pub syn_retransmits: u64,
    /// The TCP connections to its backends that are open or being established; null while the unit
    /// `outcomes` isn't attached.
    #[serde(default)]
    pub in_flight: Option<u64>,
    /// Connects that were refused because their sockets' address family can reach none of the backends.
    #[serde(default)]
    pub refused_family: u64,
    /// Connects that passed untouched because connections were only counted, since the start.
    #[serde(default)]
    pub shadowed: u64,
    /// connect() of UDP sockets to a backend, since the daemon's start: by applications, and by address
    /// lookups, which send nothing.
    #[serde(default)]
    pub udp_connects: u64,
    /// The same that were refused.
    #[serde(default)]
    pub udp_connects_refused: u64,
    /// The instances that connections may reach, and those that can't be reached from here.
    pub backends: Vec<BackendStatus>,
}

/// A service in brief, within the event `services` of `GET /v1/stream`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceSummary {
    /// As [`ServiceStatus::name`].
    pub name: String,
    /// As [`ServiceStatus::vip`].
    pub vip: Ipv4Addr,
    /// As [`ServiceStatus::ports`].
    pub ports: Ports,
    /// As [`ServiceStatus::protocol`].
    pub protocol: Protocols,
    /// As [`ServiceStatus::algorithm`].
    pub algorithm: BalanceAlgorithm,
    /// `healthy`; `degraded` where an instance gets no connections that should, or the kernel lacks the
    /// service's present state; `down` where no instance gets any; `cold` where its instances aren't
    /// followed.
    pub condition: Condition,
    /// The instances that connections may reach.
    pub reached: usize,
    /// All instances, those that are out included.
    pub instances: usize,
    /// As [`ServiceStatus::connects`].
    pub connects: u64,
    /// As [`ServiceStatus::refused`].
    pub refused: u64,
    /// As [`ServiceStatus::failed`].
    pub failed: u64,
    /// As [`ServiceStatus::in_flight`].
    pub in_flight: Option<u64>,
}

/// The condition of a service, within [`ServiceSummary`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Condition {
    /// Every instance that should get connections does.
    Healthy,
    /// Some don't.
    Degraded,
    /// None does.
    Down,
    /// Its instances aren't followed.
    Cold,
}

/// One element of `GET /v1/config`: a key of the configuration in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettingStatus {
    /// The key, such as `dns.ttl`.
    pub key: String,
    /// The value; secrets aren't shown.
    pub value: serde_json::Value,
    /// The value without a configuration.
    pub default: serde_json::Value,
    /// What the key is for.
    pub text: String,
    /// Why a new value needs a restart of the daemon; `null` where a reload is enough.
    pub restart: Option<String>,
}

/// A backend, within [`ServiceStatus`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendStatus {
    /// Address and port.
    pub address: String,
    /// The node it runs on.
    pub node: String,
    /// The id that the source has for the instance, unique within its node.
    pub instance: String,
    /// The name under which people know it: of an instance of Nomad's its allocation and group or task, of others
    /// the id.
    #[serde(default)]
    pub instance_name: String,
    /// Its share of new connections, relative to the other weights.
    pub weight: u16,
    /// Its state.
    pub state: BackendState,
    /// Why, where that isn't plain.
    pub reason: Option<String>,
    /// What it is drained by, the argument of `nohop undrain`; `null` where no drain covers it.
    #[serde(default)]
    pub drained_by: Option<String>,
    /// Connects that it was chosen for, since it came.
    pub connects: u64,
    /// The TCP connections to it that are open or being established; null while the unit `outcomes`
    /// isn't attached.
    #[serde(default)]
    pub in_flight: Option<u64>,
    /// Connects by TCP that it refused or didn't answer, or that didn't reach it, since it came.
    #[serde(default)]
    pub failures: u64,
    /// The time from a connection's SYN to the answer in microseconds, a moving average; null before
    /// the first.
    #[serde(default)]
    pub connect_us: Option<u32>,
    /// The round-trip time of its connections when they ended in microseconds, a moving average; null
    /// before the first.
    #[serde(default)]
    pub rtt_us: Option<u32>,
}

impl ServiceStatus {
    /// The same without what grows as connections come and go, its backends' included.
    pub fn without_counts(&self) -> ServiceStatus {
        ServiceStatus {
            connects: 0,
            refused: 0,
            failed: 0,
            syn_retransmits: 0,
            in_flight: None,
            refused_family: 0,
            shadowed: 0,
            udp_connects: 0,
            udp_connects_refused: 0,
            backends: self.backends.iter().map(BackendStatus::without_counts).collect(),
            ..self.clone()
        }
    }
}

impl BackendStatus {
    fn without_counts(&self) -> BackendStatus {
        BackendStatus {
            connects: 0,
            in_flight: None,
            failures: 0,
            connect_us: None,
            rtt_us: None,
            ..self.clone()
        }
    }
}

/// One element of `GET /v1/drain`: what is drained by hand.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainStatus {
    /// `node`, `address`, `instance`, `allocation` or `edge`.
    pub kind: String,
    /// Its name among those; `kind:name` is the argument that undrains it. Empty for `edge`, which is the whole
    /// argument.
    pub name: String,
    /// Since when, by RFC 3339.
    pub since: String,
    /// The services with backends that it covers.
    pub services: Vec<String>,
    /// The number of those backends.
    pub backends: u64,
    /// Their connections that are open from this node; `null` while the unit `outcomes` isn't attached.
    pub in_flight: Option<u64>,
}

/// `POST /v1/drain?target=TARGET` and `POST /v1/undrain?target=TARGET`
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainChange {
    /// Whether the target is drained, or isn't, as requested.
    pub ok: bool,
    /// Why nothing was changed.
    pub problem: Option<String>,
    /// Whether it was otherwise before.
    pub changed: bool,
    /// Whether it is drained now.
    pub drained: bool,
    /// As [`DrainStatus::kind`]; `null` where nothing is named.
    pub kind: Option<String>,
    /// As [`DrainStatus::name`]; `null` where nothing is named.
    pub name: Option<String>,
    /// Since when it is drained, or was until now.
    pub since: Option<String>,
    /// The number of services with backends that it covers.
    pub services: u64,
    /// The number of those backends.
    pub backends: u64,
    /// What the operator should see, such as a service that has no backend left.
    pub warnings: Vec<String>,
}

/// `GET /v1/services/NAME`: everything that is known of a name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Explanation {
    /// The requested name.
    pub name: String,
    /// The result of a connection, a sentence.
    pub connect: String,
    /// The source that the service comes from: the first that has the name.
    #[serde(default)]
    pub source: Option<String>,
    /// Further sources that have the name; their services are ignored.
    #[serde(default)]
    pub shadowed: Vec<String>,
    /// The service, where the name is one.
    pub service: Option<ServiceStatus>,
    /// The instances that are out.
    pub excluded: Vec<Excluded>,
    /// All instances of the name, or those at the address that was named, each with its checks.
    #[serde(default)]
    pub instances: Vec<InstanceStatus>,
    /// What else is to be known, a sentence each: what the source has of a name without the tag, or why
    /// it couldn't be asked.
    #[serde(default)]
    pub notes: Vec<String>,
}

impl Explanation {
    /// Whether it is of something that nohop routes to.
    pub fn is_routed(&self) -> bool {
        self.service.is_some() || self.instances.iter().any(|instance| instance.state != OUT)
    }
}

/// The state of an instance that is out.
pub const OUT: &str = "out";

/// An instance, in or out, within [`Explanation`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceStatus {
    /// Its service.
    pub service: String,
    /// The address as the source gave it, with the port.
    pub address: String,
    /// The node it runs on.
    pub node: String,
    /// The id that the source has for the instance, unique within its node.
    pub instance: String,
    /// As [`BackendStatus::instance_name`].
    #[serde(default)]
    pub instance_name: String,
    /// The state of its backend, or `out`.
    pub state: String,
    /// Why, where that isn't plain.
    pub reason: Option<String>,
    /// Its checks and its node's, where the source has some and was asked.
    #[serde(default)]
    pub checks: Vec<CheckStatus>,
}

/// A check, within [`InstanceStatus`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckStatus {
    /// The name.
    pub name: String,
    /// `passing`, `warning` or `critical`.
    pub status: String,
    /// The first line of its output, at most 200 characters, with control characters escaped.
    pub output: String,
}

/// `POST /v1/reload`: what became of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reload {
    /// Whether the configuration is in force; otherwise nothing changed.
    pub ok: bool,
    /// The problems of the configuration, each with its place and the fix.
    pub problems: Vec<String>,
    /// The keys that differ from the present or the former configuration.
    pub changes: Vec<ChangedKey>,
}

/// `GET /v1/log`, and `POST /v1/log?filter=FILTER`: what is logged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogStatus {
    /// Whether the filter is the one that was asked for.
    pub ok: bool,
    /// Why it isn't, with the fix.
    pub problem: Option<String>,
    /// The filter in use: a level, or MODULE=LEVEL, separated by commas.
    pub filter: String,
}

/// A key of the configuration, within [`Reload`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangedKey {
    /// The key.
    pub key: String,
    /// The former value, as the file would have it; secrets aren't shown.
    pub from: String,
    /// The new one.
    pub to: String,
    /// Why it can't change without a restart of the daemon; one such key prevents the whole reload.
    #[serde(default)]
    pub restart: Option<String>,
}

/// A line of `GET /v1/trace`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TraceLine {
    /// Connections that this client lost, or the kernel.
    Lost {
        /// Their number, since the last line of this kind.
        lost: u64,
    },
    /// A connection with its outcome.
    Connection(Box<TraceRecord>),
    /// Something that happened to a flow through this edge.
    Flow(Box<FlowTraceRecord>),
}

/// Something that happened to a flow through this edge, within [`TraceLine`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FlowTraceRecord {
    /// When it happened, in seconds of the Unix epoch.
    pub time: f64,
    /// The client's address and port.
    pub client: String,
    /// What it sends to: a public VIP and a port.
    pub vip: String,
    /// The service; `null` where no service has this address and port.
    pub service: Option<String>,
    /// `tcp` or `udp`.
    pub protocol: String,
    /// Where its packets go; `null` where it is refused.
    pub backend: Option<String>,
    /// The address and port of this edge from which they do; `null` where it is refused.
    pub source: Option<String>,
    /// `begun`, `refused` or `ended`.
    pub outcome: String,
    /// Why that backend was chosen, why it is refused, or why it is over.
    pub reason: String,
    /// Its state, as in `flows`; `null` where it is refused.
    pub state: Option<String>,
    /// The packets of both directions until then.
    pub packets: u64,
    /// Their bytes, from the IP header on.
    pub bytes: u64,
}

/// A connection to a VIP, within [`TraceLine`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TraceRecord {
    /// When it began, in seconds of the Unix epoch.
    pub time: f64,
    /// The name of the process.
    pub comm: String,
    /// Its id, as the kernel sees it.
    pub pid: u32,
    /// The directory of its cgroup, where that is still there.
    pub cgroup: Option<String>,
    /// The name under which people know it: the allocation and its task, the container, or that directory.
    #[serde(default)]
    pub client_name: Option<String>,
    /// The allocation of Nomad's in the cgroup's path.
    pub allocation: Option<String>,
    /// The task of that allocation.
    pub task: Option<String>,
    /// The service; `null` where no service has this address and port.
    pub service: Option<String>,
    /// What the application connects to: a VIP and a port.
    pub frontend: String,
    /// `tcp` or `udp`.
    pub protocol: String,
    /// The backend that was chosen; `null` where the connection is refused.
    pub backend: Option<String>,
    /// The id that the source has for its instance; `null` where the table doesn't have it any more.
    #[serde(default)]
    pub instance: Option<String>,
    /// As [`BackendStatus::instance_name`].
    #[serde(default)]
    pub instance_name: Option<String>,
    /// The reason of the choice, or of the refusal.
    pub reason: Option<String>,
    /// One of [`OUTCOMES`](crate::admin::OUTCOMES).
    pub outcome: String,
    /// The error of one that failed, such as `ECONNREFUSED`.
    pub error: Option<String>,
    /// The time until it was established, in microseconds.
    pub connect_us: Option<u32>,
}

#[cfg(test)]
impl ServiceStatus {
    /// Some service without backends, for tests.
    pub fn example() -> ServiceStatus {
        ServiceStatus {
            name: "web".into(),
            vip: [127, 128, 0, 1].into(),
            vip6: None,
            notes: Vec::new(),
            pin: None,
            public: Vec::new(),
            ports: Ports::only([80]),
            protocol: Protocols::Tcp,
            algorithm: BalanceAlgorithm::Random,
            generation: 1,
            watch: Watch::Live,
            error: None,
            connects: 0,
            refused: 0,
            failed: 0,
            syn_retransmits: 0,
            in_flight: None,
            refused_family: 0,
            shadowed: 0,
            udp_connects: 0,
            udp_connects_refused: 0,
            backends: Vec::new(),
        }
    }
}

#[cfg(test)]
impl ServiceSummary {
    /// Some service, for tests.
    pub fn example() -> ServiceSummary {
        ServiceSummary {
            name: "web".into(),
            vip: [127, 128, 0, 1].into(),
            ports: Ports::only([80]),
            protocol: Protocols::Tcp,
            algorithm: BalanceAlgorithm::Least,
            condition: Condition::Healthy,
            reached: 1,
            instances: 1,
            connects: 0,
            refused: 0,
            failed: 0,
            in_flight: Some(0),
        }
    }
}

//! Every key of the configuration, once: its name, how its value is read, whether a running daemon
//! takes a new value, and what it is for. Defaults are those of [`Config::default`].

use serde_json::Value as Json;

use super::builder::{ConfigBuilder, SourceName};
use super::toml_value::{Parsed, TomlValue};
use super::{Config, MAX_PORTS, Token, address, balance, consul, edge, text};

/// A key of the configuration.
pub struct Key {
    /// Its name, such as `dns.ttl`.
    pub name: &'static str,
    /// Why a new value needs a restart of the daemon; `None` where a reload is enough.
    pub restart: Option<&'static str>,
    /// Its meaning, in one line.
    pub text: &'static str,
    /// Reads a value into the configuration.
    pub(super) read: ReadKey,
}

pub(super) type ReadKey = fn(&mut ConfigBuilder, &TomlValue) -> Parsed<()>;

impl Key {
    /// The key of this name.
    pub fn find(name: &str) -> Option<&'static Key> {
        KEYS.iter().find(|key| key.name == name)
    }

    /// The section that it is in, if any.
    pub fn section(&self) -> Option<&'static str> {
        self.name.split_once('.').map(|(section, _)| section)
    }
}

/// Rows of [`KEYS`]: whether a reload applies a new value (`live`) or why a restart does, the name, the
/// field, how the value is read, and what the key is for.
macro_rules! keys {
    (@restart) => { None };
    (@restart $why:expr) => { Some($why) };
    ($($change:ident $(($why:expr))? $name:literal $($field:ident).+: $read:expr; $text:literal)+) => {
        &[$(Key {
            name: $name,
            restart: keys!(@restart $($why)?),
            text: $text,
            read: |builder, value| {
                let read: fn(&TomlValue) -> Parsed<_> = $read;
                builder.$($field).+ = read(value)?;
                Ok(())
            },
        }),+]
    };
}

const LISTENS: &str = "sockets are opened at the start";
const MAPS: &str = "maps are created at the start";
const PROGRAMS: &str = "it is a constant of the programs in the kernel";

/// Every key, in the order of the documentation.
pub const KEYS: &[Key] = keys! {
    restart("the programs are attached there at the start")
    "cgroup" config.cgroup: |value| value.text(text::cgroup_or_auto);
        "cgroup v2 directory whose processes are served; \"auto\": the root of the hierarchy"
    restart("maps and links are pinned there at the start")
    "bpffs" config.bpffs: |value| value.text(text::absolute);
        "directory of the pinned maps and links, on a BPF file system"
    restart("the VIPs are read there at the start")
    "state_dir" config.state_dir: |value| value.text(text::absolute);
        "directory of what outlives the daemon: VIPs and the last catalog"
    live "on_exit" config.on_exit: |value| value.text(text::word);
        "\"keep\": the kernel keeps redirecting when the daemon ends; \"detach\": it stops"
    live "shadow" config.shadow: |value| value.flag();
        "count connections to VIPs, and redirect none (dry run)"
    live "catalog.sources" source_names: |value| value.list(|name| name.text(source_name));
        "sources of services: \"consul\", \"file\" or both; for one name the first that has it"
    live "catalog.file" catalog_file: |value| value.text(text::path_or_none);
        "static catalog, for the source \"file\""
    live "catalog.tag" config.catalog.tag: |value| value.text(text::not_empty);
        "tag of the instances that are routed"
    live "catalog.meta" config.catalog.meta: |value| value.table(text::not_empty, |each| each.text(text::any));
        "Meta that an instance must have as well: { stage = \"live\" }"
    live "catalog.health" config.catalog.health: |value| value.text(text::word);
        "\"passing\": all checks pass, and instances in warning are spares; \"warning\": none is critical"
    live "catalog.address" config.catalog.address: |value| value.text(text::word);
        "address of an instance that is used: \"lan\", \"wan\", or either with _ipv4 or _ipv6"
    live "catalog.watch" config.catalog.watch: |value| value.text(text::word);
        "services that are watched: \"used\" by this node, \"all\", or \"auto\": all, up to half of consul.max_connections, then \"used\""
    live "catalog.max_age" config.catalog.max_age: |value| value.text(text::duration);
        "age of a service's last answer from which on it is a problem in status"
    live "catalog.expired" config.catalog.expired: |value| value.text(text::word);
        "connections to services that are older: \"serve\" or \"refuse\""
    live "balance.algorithm" config.balance.algorithm: |value| value.text(text::word);
        "of services that name none: \"random\", \"round-robin\", \"least\", \"latency\" or \"maglev\""
    live "balance.key" config.balance.key: |value| value.text(text::word);
        "what maglev hashes: the client's \"cgroup\", \"netns\", or the socket's \"source\" address"
    live "balance.slow_start" config.balance.slow_start: |value| value.text(balance::slow_start);
        "time in which a new backend comes to its full share, up to 1h; empty: at once; not with maglev"
    live "balance.prefer" config.balance.prefer: |value| value.text(text::word);
        "backends that come first, while the others are the spare set: of this \"node\" or \"datacenter\"; \"none\": all are equal"
    live "balance.eject" config.balance.eject: balance::eject;
        "what ejects a backend: refused connections and failures in a row, silence in multiples of its connect time (0: never); the first and the longest time, up to 1h; beyond that share of ejected ones the spare set is used, too"
    live "balance.all_critical" config.balance.all_critical: |value| value.text(text::word);
        "a service without an instance that may serve: \"refuse\" its connections, or \"keep\" the last ones for keep_for"
    live "balance.keep_for" config.balance.keep_for: |value| value.text(text::duration);
        "how long all_critical = \"keep\" keeps them"
    live "balance.drain_deadline" config.balance.drain_deadline: |value| value.text(balance::drain_deadline);
        "how long connections to a backend that leaves may stay open; empty: as long as they like"
    live "consul.address" config.consul.address: |value| value.text(address::consul);
        "Consul agent: http://HOST:PORT, https://HOST:PORT or unix:///PATH"
    live "consul.token_file" config.consul.token: |value| Ok(value.text(text::path_or_none)?.map(Token::File));
        "file with the ACL token, re-read for every request"
    live "consul.datacenter" config.consul.datacenter: |value| value.text(|it| consul::name(it, "datacenter"));
        "datacenter; empty: the agent's"
    live "consul.namespace" config.consul.namespace: |value| value.text(|it| consul::name(it, "namespace"));
        "namespace (Consul Enterprise); empty: the token's"
    live "consul.partition" config.consul.partition: |value| value.text(|it| consul::name(it, "partition"));
        "admin partition (Consul Enterprise); empty: the agent's"
    live "consul.ca_file" config.consul.tls.ca_file: |value| value.text(text::path_or_none);
        "trusted CAs (PEM); without ca_file and ca_path the system's"
    live "consul.ca_path" config.consul.tls.ca_path: |value| value.text(text::path_or_none);
        "directory of trusted CAs (PEM)"
    live "consul.cert_file" config.consul.tls.cert_file: |value| value.text(text::path_or_none);
        "client certificate (PEM); needs key_file"
    live "consul.key_file" config.consul.tls.key_file: |value| value.text(text::path_or_none);
        "private key of the client certificate (PEM)"
    live "consul.tls_server_name" config.consul.tls.server_name: |value| value.text(consul::server_name);
        "expected name in the agent's certificate, if not the host of address"
    live "consul.verify" config.consul.tls.verify: |value| value.flag();
        "verify the agent's certificate"
    live "consul.max_connections" config.consul.max_connections: |value| value.integer(4..=65_536);
        "connections to the agent, 4 at least; with more watched services, watches are time-sliced"
    restart(PROGRAMS) "vip.pool" config.vip.pool: |value| value.text(address::pool);
        "network of the VIPs, within 127.0.0.0/8, larger than datapath.max_services"
    restart(PROGRAMS) "vip.pool6" config.vip.pool6: |value| value.text(address::pool6_or_none);
        "network of the IPv6 VIPs, within fd00::/8, /64 to /120; empty: none"
    live "vip.ports" config.vip.ports: ports;
        "default ports of a service"
    restart("the network around the pins is a constant of the programs")
    "vip.pins" config.vip.pins: |value| value.table(address::service_name, |pin| pin.text(address::pin));
        "one more address for a service, in the host's network namespace only: { helloworld = \"127.0.0.1:80\" }"
    restart(PROGRAMS) "vip.public" config.vip.public: edge::public_networks;
        "networks that public VIPs may come from, by `nohop-public` of a service or by edge.vips; at most four"
    restart("the programs are attached there at the start")
    "edge.interfaces" config.edge.interfaces: |value| value.list_or_none(|it| it.text(edge::interface));
        "interfaces where packets of clients and of backends arrive; with one or more this node is an edge"
    restart("the edge's programs have them from the start")
    "edge.source" config.edge.source: edge::sources;
        "addresses of this edge that backends see, four at most of each family"
    live "edge.vips" config.edge.vips: |value| value.table(address::service_name, |vip| vip.text(edge::public_vip));
        "public VIPs, beside those that services declare: { web = \"203.0.113.10:80\" }"
    restart("the edge's frontends have it from the start")
    "edge.client_address" config.edge.client_address: |value| value.list_or_none(|it| it.text(address::service_name));
        "services whose instances are shown clients' addresses, by TCP and IPv4, where their nodes have datapath.client_address_from"
    restart("open flows are in maps of that size")
    "edge.max_flows" config.edge.max_flows: |value| value.integer(1_024..=16_777_216);
        "flows that this edge has room for, at some 320 bytes each, and 590 with IPv6"
    restart("the edge's programs have them from the start")
    "edge.timeouts" config.edge.timeouts: edge::timeouts;
        "after how long without a packet flows end, up to 7d: established, half_closed, closed, udp"
    restart(LISTENS) "dns.listen" config.dns.listen: |value| value.list(|it| it.text(address::listen_address));
        "addresses of the DNS server, UDP and TCP"
    restart(LISTENS) "dns.listen_tls" config.dns.listen_tls: |value| value.list_or_none(|it| it.text(address::listen_address));
        "addresses for DNS over TLS; needs tls_cert_file and tls_key_file"
    restart(LISTENS) "dns.tls_cert_file" config.dns.tls_cert_file: |value| value.text(text::path_or_none);
        "certificate (PEM) of DNS over TLS, and those that signed it; read again when it changes"
    restart(LISTENS) "dns.tls_key_file" config.dns.tls_key_file: |value| value.text(text::path_or_none);
        "its private key (PEM); read again when it changes"
    restart("applications cache answers of the former zone")
    "dns.domain" config.dns.domain: |value| value.text(address::domain);
        "zone of the services"
    live "dns.ttl" config.dns.ttl: |value| value.integer(0..=86_400);
        "TTL of the zone's records, in seconds"
    live "dns.forward" config.dns.forward: address::forward;
        "resolvers of all other names, in order; \"resolv.conf\": those of /etc/resolv.conf; none: other names are REFUSED"
    live "dns.routes" config.dns.routes: |value| value.table(address::domain, |it| it.text(address::nameserver));
        "resolvers of names below certain domains"
    live "dns.unrouted" config.dns.unrouted: |value| value.text(text::word);
        "names of the zone without a service: \"nxdomain\" or \"forward\""
    live "dns.allow" config.dns.allow: |value| value.list_or_none(|it| it.text(address::allowed));
        "clients besides this host: networks, or \"local\": the networks of its interfaces"
    live "dns.client_rate" config.dns.client_rate: |value| value.integer(0..=10_000_000);
        "queries a second of one client that isn't on loopback; 0: unlimited"
    live "dns.kernel" config.dns.kernel: |value| value.flag();
        "answer names of routed services in the kernel, also while the daemon doesn't run"
    live "dns.kernel_mode" config.dns.kernel_mode: |value| value.text(text::word);
        "when the kernel answers: \"always\" or \"standby\", only while the daemon doesn't run"
    live "dns.intercept" config.dns.intercept: text::intercept;
        "send DNS queries to nohop, whatever resolver they are for: true: of Nomad's tasks and Docker's containers; or cgroups: paths, * and ? allowed"
    live "dns.log" config.dns.log: |value| value.flag();
        "log each response of the daemon, and once a minute how often the kernel answered each name"
    restart(MAPS) "datapath.max_services" config.datapath.max_services: |value| value.integer(1..=1_000_000);
        "services that the maps have room for"
    restart(MAPS) "datapath.max_backends" config.datapath.max_backends: |value| value.integer(1..=8_000_000);
        "backends that the maps have room for"
    restart("the programs are loaded for a number of them")
    "datapath.exclude_cgroups" config.datapath.exclude_cgroups: text::cgroups;
        "cgroups that are bypassed, with all below them: paths, * and ? allowed"
    restart(PROGRAMS) "datapath.client_address_from" config.datapath.client_address_from: edge::client_sources;
        "IPv4 addresses of edges (their edge.source) that are trusted with the addresses of clients, which accept() and getpeername() then show; eight at most"
    restart(LISTENS) "admin.listen" config.admin.listen: |value| value.list(|it| it.text(str::parse));
        "addresses of the admin interface: unix:PATH, or ADDR:PORT to read only"
    live "admin.hosts" config.admin.hosts: |value| value.list_or_none(|it| it.text(address::host));
        "names under which a TCP address of admin.listen may be addressed; required where it is a wildcard or public"
    live "admin.trace" config.admin.trace: text::trace;
        "allow nohop trace, which shows connections with their processes: true: on unix sockets; or \"tcp\": over TCP, too"
    live "admin.access_log" config.admin.access_log: |value| value.flag();
        "log each request"
};

/// Former names of keys, and the present ones.
pub(super) const RENAMED: &[(&str, &str)] = &[
    ("plane.max_services", "datapath.max_services"),
    ("plane.max_backends", "datapath.max_backends"),
    ("plane.exclude_cgroups", "datapath.exclude_cgroups"),
    ("plane", "datapath"),
    ("catalog.source", "catalog.sources"),
];

/// Keys of later versions.
pub const PLANNED: &[&str] = &[
    "catalog.datacenters",
    "nomad.address",
    "nomad.namespaces",
    "nomad.token_file",
    "nomad.region",
    "identity.on",
    "identity.docker",
    "intentions.mode",
    "intentions.direct",
    "dns.cache",
];

/// The ports of services that name none.
fn ports(value: &TomlValue) -> Parsed<Vec<u16>> {
    let ports = value.list(|port| port.integer(1..=65_535))?;
    if ports.len() > MAX_PORTS {
        return value.fault(format!(
            "has {} ports, and {MAX_PORTS} is the most; write those of most services, and have the \
             others name their own",
            ports.len()
        ));
    }
    Ok(ports)
}

fn source_name(name: &str) -> Result<SourceName, String> {
    match name {
        "nomad" => Err("the source \"nomad\" is planned, not in this version; remove it".into()),
        name => text::word(name),
    }
}

/// Whether a section is one of former or later versions.
pub(super) fn is_other_section(name: &str) -> bool {
    let names = RENAMED.iter().map(|(old, _)| *old).chain(PLANNED.iter().copied());
    let mut sections = names.filter_map(|name| name.split_once('.')).map(|(section, _)| section);
    !KEYS.iter().any(|key| key.section() == Some(name)) && sections.any(|section| section == name)
}

/// The problem of a key, or a section, that this version doesn't have.
pub(super) fn unknown(name: &str) -> String {
    if let Some((_, new)) = RENAMED.iter().find(|(old, _)| *old == name) {
        let list = if *new == "catalog.sources" { ", a list: [\"consul\"]" } else { "" };
        return format!("is called {new} now{list}; rename it");
    }
    let section = name.split_once('.').map_or(name, |(section, _)| section);
    if let Some((_, new)) = RENAMED.iter().find(|(old, _)| *old == section) {
        return format!("unknown key; [{section}] is called [{new}] now");
    }
    if PLANNED.contains(&name) || is_other_section(section) {
        return "is planned, not in this version; remove it".into();
    }
    format!("unknown key; {}", suggestion(name))
}

/// The known key that is nearest to an unknown one.
fn suggestion(unknown: &str) -> String {
    let leaf = |key: &str| key.rsplit('.').next().map(str::to_owned);
    let is_longer = |key: &str| key.strip_prefix(unknown).is_some_and(|rest| rest.starts_with('_'));
    let distance = |key: &str| match levenshtein(unknown, key) {
        // The right key in the wrong section, or a word of it.
        far if far > 2 && (leaf(unknown) == leaf(key) || is_longer(key)) => 2,
        far => far,
    };
    let known = KEYS.iter().flat_map(|key| [Some(key.name), key.section()]).flatten();
    match known.map(|key| (distance(key), key)).min() {
        Some((0..=2, key)) => format!("did you mean {key}? else remove it"),
        _ => "remove it".into(),
    }
}

/// The number of letters to add, drop or change to get from one word to the other.
fn levenshtein(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (from_idx, from_char) in from.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = from_idx + 1;
        for (to_idx, to_char) in to.iter().enumerate() {
            let changed = diagonal + usize::from(from_char != *to_char);
            diagonal = row[to_idx + 1];
            row[to_idx + 1] = changed.min(row[to_idx] + 1).min(diagonal + 1);
        }
    }
    row[to.len()]
}

/// A key whose value differs between two configurations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyChange {
    /// The key, such as `dns.ttl`.
    pub key: &'static str,
    /// The value in use, as TOML; of a secret only that there is one.
    pub from: String,
    /// The new value.
    pub to: String,
    /// Why it needs a restart of the daemon; `None` where it doesn't.
    pub restart: Option<&'static str>,
}

/// Every key whose value differs.
pub fn changes(running: &Config, wanted: &Config) -> Vec<KeyChange> {
    let (from, to) = (values(running), values(wanted));
    let mut changes = Vec::new();
    for ((key, from), (_, to)) in from.iter().zip(&to) {
        let is_secret = key.name == "consul.token_file";
        let is_other_secret = is_secret && running.consul.token != wanted.consul.token;
        if from != to || is_other_secret {
            let to = if from == to { "another token".into() } else { toml(to) };
            changes.push(KeyChange { key: key.name, from: toml(from), to, restart: key.restart });
        }
    }
    changes
}

/// Every key with its value; of a secret only that there is one.
pub fn values(config: &Config) -> Vec<(&'static Key, Json)> {
    // Keys are strings, and paths are UTF-8, since all are read from text. An empty document instead
    // would mean that nothing ever changes.
    let document = serde_json::to_value(config).expect("a configuration can be written as JSON");
    let value = |key: &Key| match document.pointer(&format!("/{}", key.name.replace('.', "/"))) {
        None | Some(Json::Null) => "".into(),
        Some(value) => value.clone(),
    };
    KEYS.iter().map(|key| (key, value(key))).collect()
}

/// A value as TOML has it, in one line.
pub fn toml(value: &Json) -> String {
    match value {
        Json::Array(values) => {
            format!("[{}]", values.iter().map(toml).collect::<Vec<_>>().join(", "))
        }
        Json::Object(entries) if entries.is_empty() => "{}".into(),
        Json::Object(entries) => {
            let is_bare = |key: &str| {
                key.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
            };
            let entry = |(key, value): (&String, &Json)| match is_bare(key) {
                true => format!("{key} = {}", toml(value)),
                false => format!("{} = {}", Json::from(key.as_str()), toml(value)),
            };
            format!("{{ {} }}", entries.iter().map(entry).collect::<Vec<_>>().join(", "))
        }
        // Escapes of JSON's strings are TOML's, too.
        value => value.to_string(),
    }
}

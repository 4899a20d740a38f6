//! `GET /metrics`: the daemon's counters, by the names that dashboards and alerts rely on.
//!
//! There are no series for single backends, and none for services that this node doesn't watch and has
//! never connected to: 5,000 nodes that name 5,000 services each would be 25 million series.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::process_stats::ProcessStats;
use super::reload::ReloadReadings;
use crate::admin::prometheus::{Exposition, Histogram, MetricType};
use crate::catalog::Watches;
use crate::datapath::{EdgeStatus, Pressure, ServiceCounters};
use crate::dns;
use crate::table::vips::PoolUse;

/// The ends of the buckets of `nohop_propagation_seconds`; 5 and 25 ms are goals.
pub(super) const PROPAGATION_BUCKETS: [f64; 14] =
    [0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// The results of connections from edges, each with its name among the events.
const CLIENT_ADDRESSES: [(&str, &str); 3] =
    [("shown", "client_shown"), ("no_option", "client_no_option"), ("no_syn", "client_no_syn")];

/// All values, read at one moment.
#[derive(Debug)]
pub struct Readings {
    pub(super) is_ready: bool,
    /// By precedence.
    pub(super) sources: Vec<SourceReadings>,
    /// Each with whether it is attached.
    pub(super) units: Vec<(&'static str, bool)>,
    pub(super) is_shadow: bool,
    /// Lines of the log that were dropped.
    pub(super) log_dropped: u64,
    pub(super) generation: u64,
    /// Lookups and uses that discovery was too busy to receive.
    pub(super) n_demand_dropped: u64,
    /// The time from the source's news to the maps that connections read, in seconds.
    pub(super) propagation: Histogram,
    /// Each with its counters and its connections in flight.
    pub(super) services: Vec<(Arc<str>, ServiceCounters, u64)>,
    /// Whether the latter are counted.
    pub(super) counts_in_flight: bool,
    /// Backends that are ejected now.
    pub(super) n_ejected: usize,
    /// Ejections that the daemon's probes ended.
    pub(super) n_returned: u64,
    /// Drains by hand, by what is drained.
    pub(super) drains: Vec<(&'static str, usize)>,
    pub(super) reloads: ReloadReadings,
    /// `None` where /proc can't be read.
    pub(super) process: Option<ProcessStats>,
    /// The global counters, by name.
    pub(super) events: BTreeMap<&'static str, u64>,
    pub(super) maps: Vec<(&'static str, Pressure)>,
    pub(super) dns_answers: BTreeMap<String, u64>,
    /// Decisions of the unit `intercept`, by name; none while it is off.
    pub(super) intercepted: Vec<(&'static str, u64)>,
    /// `None` where this node is no edge.
    pub(super) edge: Option<EdgeReadings>,
    pub(super) dns_upstreams: Vec<dns::UpstreamStats>,
    pub(super) pool: PoolUse,
}

/// What is read of the edge.
#[derive(Debug)]
pub struct EdgeReadings {
    pub(super) status: EdgeStatus,
    /// Whether its public VIPs are announced.
    pub(super) announces: bool,
    /// Decisions on packets, by name.
    pub(super) counts: Vec<(&'static str, u64)>,
}

/// What is read of one source.
#[derive(Debug)]
pub struct SourceReadings {
    pub(super) name: &'static str,
    pub(super) has_problem: bool,
    /// The time since the source last answered, in seconds.
    pub(super) age: Option<f64>,
    /// Responses by status.
    pub(super) requests: BTreeMap<String, u64>,
    pub(super) received_bytes: u64,
    /// Responses that removed so much that they were confirmed first.
    pub(super) n_shrinks_held: u64,
    pub(super) watches: Watches,
}

/// Writes the readings down.
pub fn exposition(readings: &Readings) -> String {
    let mut text = Exposition::default();
    daemon(&mut text, readings);
    discovery(&mut text, readings);
    connects(&mut text, readings);
    room(&mut text, readings);
    let help = "Answers to DNS questions, forwarded ones included, by response code.";
    let mut family = text.family("nohop_dns_queries_total", MetricType::Counter, help);
    for (rcode, n) in &readings.dns_answers {
        family.sample(&[("rcode", rcode)], n);
    }
    let help =
        "Connections and datagrams to port 53 that dns.intercept concerns, by what was decided.";
    let mut family = text.family("nohop_dns_intercept_total", MetricType::Counter, help);
    for (result, n) in &readings.intercepted {
        family.sample(&[("result", result)], n);
    }
    edge(&mut text, readings.edge.as_ref());
    upstreams(&mut text, readings);
    if let Some(stats) = &readings.process {
        process(&mut text, stats);
    }
    text.finish()
}

/// Families without a sample where this node is no edge.
fn edge(text: &mut Exposition, edge: Option<&EdgeReadings>) {
    let help =
        "How the edge's program is attached to an interface; always 1, absent where it isn't.";
    let mut family = text.family("nohop_edge_interface_attached", MetricType::Gauge, help);
    for interface in edge.iter().flat_map(|edge| &edge.status.interfaces) {
        if let Some(mode) = interface.mode {
            family.sample(&[("interface", &interface.name), ("mode", mode.name())], 1);
        }
    }
    let help = "Whether the edge's public VIPs are announced (1), or not (0).";
    let mut family = text.family("nohop_edge_announced", MetricType::Gauge, help);
    if let Some(edge) = edge {
        family.sample(&[], u8::from(edge.announces));
    }
    let help = "Flows through the edge.";
    let mut family = text.family("nohop_edge_flows", MetricType::Gauge, help);
    if let Some(edge) = edge {
        family.sample(&[], edge.status.n_flows);
    }
    let help = "Flows that the edge has room for.";
    let mut family = text.family("nohop_edge_flows_capacity", MetricType::Gauge, help);
    if let Some(edge) = edge {
        family.sample(&[], edge.status.max_flows);
    }
    let help = "Packets that concern the edge, by what was decided.";
    let mut family = text.family("nohop_edge_packets_total", MetricType::Counter, help);
    for (result, n) in edge.iter().flat_map(|edge| &edge.counts) {
        family.sample(&[("result", result)], n);
    }
}

fn upstreams(text: &mut Exposition, readings: &Readings) {
    let named: Vec<(String, &dns::UpstreamStats)> = readings
        .dns_upstreams
        .iter()
        .map(|upstream| (upstream.address.to_string(), upstream))
        .collect();
    let is_up = |state: dns::UpstreamState| u8::from(state != dns::UpstreamState::Out);
    let help =
        "Whether a resolver that names are forwarded to answers (1) by UDP, or is asked last (0).";
    let mut family = text.family("nohop_dns_upstream_up", MetricType::Gauge, help);
    for (address, upstream) in &named {
        family.sample(&[("upstream", address)], is_up(upstream.state));
    }
    let help = "The same by TCP, which clients' questions by TCP and long answers take.";
    let mut family = text.family("nohop_dns_upstream_tcp_up", MetricType::Gauge, help);
    for (address, upstream) in &named {
        family.sample(&[("upstream", address)], is_up(upstream.tcp_state));
    }
    let help = "Queries to a resolver whose answers are waited for.";
    let mut family = text.family("nohop_dns_upstream_in_flight", MetricType::Gauge, help);
    for (address, upstream) in &named {
        family.sample(&[("upstream", address)], upstream.in_flight);
    }
    let help = "Queries to a resolver by result: answered, refused (SERVFAIL, REFUSED and other \
                errors), timeout, unreachable.";
    let mut family = text.family("nohop_dns_upstream_queries_total", MetricType::Counter, help);
    for (address, upstream) in &named {
        for (result, n) in upstream.results {
            family.sample(&[("upstream", address), ("result", result)], n);
        }
    }
    let help = "The time that a resolver's answers took.";
    let histograms = named.iter().map(|(address, upstream)| {
        let ends = dns::BUCKETS_US.iter().map(|us| *us as f64 / 1e6);
        let buckets = ends.zip(upstream.buckets).collect();
        let above = upstream.buckets.last().copied().unwrap_or_default();
        (address.as_str(), Histogram { buckets, above, sum: upstream.seconds })
    });
    let name = "nohop_dns_upstream_seconds";
    text.histograms(name, help, "upstream", &histograms.collect::<Vec<_>>());
}

/// By the names of Prometheus' client libraries.
fn process(text: &mut Exposition, stats: &ProcessStats) {
    use MetricType::{Counter, Gauge};
    let help = "Total user and system CPU time spent in seconds.";
    text.single("process_cpu_seconds_total", Counter, help, stats.cpu_seconds);
    let help = "Start time of the process since unix epoch in seconds.";
    text.single("process_start_time_seconds", Gauge, help, stats.start_seconds);
    let help = "Resident memory size in bytes.";
    text.single("process_resident_memory_bytes", Gauge, help, stats.resident_bytes);
    let help = "Virtual memory size in bytes.";
    text.single("process_virtual_memory_bytes", Gauge, help, stats.virtual_bytes);
    let help = "Number of OS threads in the process.";
    text.single("process_threads", Gauge, help, stats.n_threads);
    let help = "Number of open file descriptors.";
    text.single("process_open_fds", Gauge, help, stats.open_fds);
    let help = "Maximum number of open file descriptors.";
    let mut family = text.family("process_max_fds", Gauge, help);
    if let Some(max) = stats.max_fds {
        family.sample(&[], max);
    }
}

fn daemon(text: &mut Exposition, readings: &Readings) {
    let help = "The daemon's version; always 1.";
    let version = [("version", env!("CARGO_PKG_VERSION"))];
    text.family("nohop_build_info", MetricType::Gauge, help).sample(&version, 1);
    let help = "Whether names are answered and connections translated (1), or not (0).";
    text.single("nohop_ready", MetricType::Gauge, help, u8::from(readings.is_ready));
    let help = "Whether every hook of a unit is attached and seen to run (1), or not (0).";
    let mut family = text.family("nohop_datapath_attached", MetricType::Gauge, help);
    for (unit, is_attached) in &readings.units {
        family.sample(&[("unit", unit)], u8::from(*is_attached));
    }
    let help = "What becomes of connections: of translate and shadow (connections are only counted) one is 1.";
    let mut family = text.family("nohop_mode", MetricType::Gauge, help);
    family.sample(&[("mode", "translate")], u8::from(!readings.is_shadow));
    family.sample(&[("mode", "shadow")], u8::from(readings.is_shadow));
    let help = "Lines of the log that were dropped because stderr isn't read fast enough.";
    text.single("nohop_log_dropped_total", MetricType::Counter, help, readings.log_dropped);
    let help = "Reloads of the configuration: applied, or refused, which changes nothing.";
    let mut family = text.family("nohop_reloads_total", MetricType::Counter, help);
    family.sample(&[("result", "applied")], readings.reloads.applied);
    family.sample(&[("result", "refused")], readings.reloads.refused);
    let help = "Whether the last reload was applied (1; also before the first), or refused (0).";
    let is_applied = u8::from(!readings.reloads.is_last_refused);
    text.single("nohop_last_reload_successful", MetricType::Gauge, help, is_applied);
    let help = "Drains by hand (nohop drain), by what is drained.";
    let mut family = text.family("nohop_drains", MetricType::Gauge, help);
    for (kind, n) in &readings.drains {
        family.sample(&[("kind", kind)], n);
    }
    let help = "The generation of the table in force; 0 before the first.";
    text.single("nohop_generation", MetricType::Gauge, help, readings.generation);
    let help = "The time from the news of a change to the maps that connections read.";
    text.histogram("nohop_propagation_seconds", help, &readings.propagation);
}

/// A family with one value of each source.
type SourceFamily = (&'static str, MetricType, fn(&SourceReadings) -> u64, &'static str);

const SOURCE_FAMILIES: [SourceFamily; 6] = [
    (
        "nohop_source_problem",
        MetricType::Gauge,
        |source| source.has_problem.into(),
        "Whether something is wrong with the source (1): see nohop status.",
    ),
    (
        "nohop_source_received_bytes_total",
        MetricType::Counter,
        |source| source.received_bytes,
        "Bytes of the bodies of the source's responses.",
    ),
    (
        "nohop_source_suspicious_total",
        MetricType::Counter,
        |source| source.n_shrinks_held,
        "Responses that removed so many instances that they were confirmed before they applied.",
    ),
    (
        "nohop_source_connections",
        MetricType::Gauge,
        |source| source.watches.connections as u64,
        "Open connections to the source.",
    ),
    (
        "nohop_source_max_requests_per_hour",
        MetricType::Gauge,
        |source| source.watches.budget_requests,
        "Requests to the source in an hour while nothing changes, calculated.",
    ),
    (
        "nohop_source_max_bytes_per_hour",
        MetricType::Gauge,
        |source| source.watches.budget_bytes,
        "Bytes of the source's responses in an hour while nothing changes, calculated.",
    ),
];

fn discovery(text: &mut Exposition, readings: &Readings) {
    let sources = &readings.sources;
    let help = "The time since the source last answered; absent before that.";
    let mut family = text.family("nohop_catalog_age_seconds", MetricType::Gauge, help);
    for source in sources {
        if let Some(age) = source.age {
            family.sample(&[("source", source.name)], age);
        }
    }
    let help = "Requests to the source by HTTP status, or by what came instead of a response.";
    let mut family = text.family("nohop_source_requests_total", MetricType::Counter, help);
    for source in sources {
        for (code, n) in &source.requests {
            family.sample(&[("source", source.name), ("code", code)], n);
        }
    }
    for (name, metric_type, value, help) in SOURCE_FAMILIES {
        let mut family = text.family(name, metric_type, help);
        for source in sources {
            family.sample(&[("source", source.name)], value(source));
        }
    }
    let help = "Lookups and uses of services that discovery was too busy to receive.";
    text.single("nohop_demand_dropped_total", MetricType::Counter, help, readings.n_demand_dropped);
    let help = "Services whose instances are watched (live), and the others (cold).";
    let mut family = text.family("nohop_watches", MetricType::Gauge, help);
    let n_watches = |n: fn(&Watches) -> usize| -> usize {
        sources.iter().map(|source| n(&source.watches)).sum()
    };
    family.sample(&[("state", "live")], n_watches(|watches| watches.live));
    family.sample(&[("state", "cold")], n_watches(|watches| watches.cold));
    let help = "The time since the live service that waits longest for its turn was answered.";
    let mut family = text.family("nohop_watch_oldest_age_seconds", MetricType::Gauge, help);
    if let Some(age) = sources.iter().filter_map(|source| source.watches.oldest_age).max() {
        family.sample(&[], age.as_secs_f64());
    }
}

fn connects(text: &mut Exposition, readings: &Readings) {
    let help = "Connects that were sent to a backend: connects by TCP, and choices for datagrams.";
    let mut family = text.family("nohop_connects_total", MetricType::Counter, help);
    for (name, counters, _) in &readings.services {
        family.sample(&[("service", name)], counters.connects);
    }
    let help = "Connects that were refused: no_backend (none is healthy), family (the socket's \
                address family reaches none), no_frontend (no service has the address and port).";
    let mut family = text.family("nohop_connects_refused_total", MetricType::Counter, help);
    let no_frontend = [("service", ""), ("reason", "no_frontend")];
    let event = |name| readings.events.get(name).copied().unwrap_or_default();
    family.sample(&no_frontend, event("refused_no_frontend"));
    for (name, counters, _) in &readings.services {
        let because = |reason| [("service", &**name), ("reason", reason)];
        family.sample(&because("no_backend"), counters.refused);
        family.sample(&because("family"), counters.refused_family);
    }
    let help = "Connects by TCP that a backend refused, didn't answer, or that didn't reach it.";
    let mut family = text.family("nohop_connects_failed_total", MetricType::Counter, help);
    for (name, counters, _) in &readings.services {
        family.sample(&[("service", name)], counters.failed);
    }
    let help = "SYNs to a service's backends that were sent again, of services that have some.";
    let mut family = text.family("nohop_syn_retransmits_total", MetricType::Counter, help);
    for (name, ServiceCounters { syn_retransmits, .. }, _) in &readings.services {
        if *syn_retransmits > 0 {
            family.sample(&[("service", name)], *syn_retransmits);
        }
    }
    let help = "Ejections of a service's backends: how often this node's kernel stopped using one.";
    let mut family = text.family("nohop_ejections_total", MetricType::Counter, help);
    for (name, counters, _) in &readings.services {
        family.sample(&[("service", name)], counters.ejections);
    }
    let help = "Backends that are ejected now.";
    text.single("nohop_ejected_backends", MetricType::Gauge, help, readings.n_ejected);
    let help = "Ejections that ended because a probe of the daemon's connected to the backend.";
    text.family("nohop_probed_returns_total", MetricType::Counter, help)
        .sample(&[], readings.n_returned);
    if readings.counts_in_flight {
        let help = "TCP connections to a service's backends that are open or being established.";
        let mut family = text.family("nohop_in_flight", MetricType::Gauge, help);
        for (name, _, in_flight) in &readings.services {
            family.sample(&[("service", name)], *in_flight);
        }
    }
    let help = "connect() by UDP sockets that led to a backend, of services that have some. Whoever \
                looks up a name makes some, and sends nothing.";
    let mut family = text.family("nohop_udp_connects_total", MetricType::Counter, help);
    for (name, ServiceCounters { udp_connects, .. }, _) in &readings.services {
        if udp_connects.connects > 0 {
            family.sample(&[("service", name)], udp_connects.connects);
        }
    }
    let help = "The same that were refused, by the reasons of nohop_connects_refused_total.";
    let mut family = text.family("nohop_udp_connects_refused_total", MetricType::Counter, help);
    family.sample(&no_frontend, event("udp_no_frontend"));
    for (name, ServiceCounters { udp_connects, .. }, _) in &readings.services {
        let reasons = [("no_backend", udp_connects.no_backend), ("family", udp_connects.family)];
        for (reason, n) in reasons.into_iter().filter(|(_, n)| *n > 0) {
            family.sample(&[("service", &**name), ("reason", reason)], n);
        }
    }
    let help =
        "What the programs in the kernel count for no service in particular, as in nohop status.";
    let mut family = text.family("nohop_datapath_events_total", MetricType::Counter, help);
    let is_client = |event: &str| CLIENT_ADDRESSES.iter().any(|(_, name)| *name == event);
    for (event, n) in readings.events.iter().filter(|(event, _)| !is_client(event)) {
        family.sample(&[("event", event)], n);
    }
    let help = "Connections from datapath.client_address_from that servers of this node accepted: the \
                client is shown, or the edge, because the SYN had no such option, or wasn't kept.";
    let mut family = text.family("nohop_client_addresses_total", MetricType::Counter, help);
    for (result, name) in CLIENT_ADDRESSES {
        family.sample(&[("result", result)], event(name));
    }
}

fn room(text: &mut Exposition, readings: &Readings) {
    let help = "Entries of a map that are in use.";
    let mut family = text.family("nohop_map_entries", MetricType::Gauge, help);
    for (map, pressure) in &readings.maps {
        family.sample(&[("map", map)], pressure.used);
    }
    let help = "Entries that a map has room for.";
    let mut family = text.family("nohop_map_capacity", MetricType::Gauge, help);
    for (map, pressure) in &readings.maps {
        family.sample(&[("map", map)], pressure.capacity);
    }
    let pool = &readings.pool;
    let help =
        "Addresses of vip.pool: used, quarantined for a day after a name gave them up, free.";
    let mut family = text.family("nohop_vip_pool_addresses", MetricType::Gauge, help);
    family.sample(&[("state", "used")], pool.used);
    family.sample(&[("state", "quarantined")], pool.quarantined);
    family.sample(&[("state", "free")], pool.free());
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::time::Duration;

    use super::*;
    use crate::admin::prometheus::strict;
    use crate::datapath::{EdgeInterface, EdgeMode};

    fn readings(n_services: u32) -> Readings {
        let name = |idx| (Arc::from(format!("web-{idx}")), ServiceCounters::default(), 3);
        let mut propagation = Histogram::new(&PROPAGATION_BUCKETS);
        propagation.observe(0.003);
        Readings {
            is_ready: true,
            sources: vec![
                SourceReadings {
                    name: "consul",
                    has_problem: true,
                    age: Some(1.5),
                    requests: BTreeMap::from([("200".into(), 9), ("reset".into(), 1)]),
                    received_bytes: 1 << 40,
                    n_shrinks_held: 2,
                    watches: Watches {
                        live: 3,
                        cold: 4,
                        connections: 5,
                        oldest_age: Some(Duration::from_millis(250)),
                        budget_requests: 420,
                        ..Watches::default()
                    },
                },
                SourceReadings {
                    name: "file",
                    has_problem: false,
                    age: Some(0.0),
                    requests: BTreeMap::new(),
                    received_bytes: 0,
                    n_shrinks_held: 0,
                    watches: Watches::default(),
                },
            ],
            units: vec![("connect", false)],
            is_shadow: true,
            log_dropped: 8,
            generation: 7,
            n_demand_dropped: 3,
            propagation,
            services: (0..n_services).map(name).collect(),
            counts_in_flight: true,
            n_ejected: 2,
            n_returned: 8,
            drains: vec![("node", 3), ("edge", 1)],
            reloads: ReloadReadings { applied: 4, refused: 1, is_last_refused: true },
            process: Some(ProcessStats {
                cpu_seconds: 1.25,
                start_seconds: 1.7e9,
                resident_bytes: 4096,
                max_fds: Some(1024),
                ..ProcessStats::default()
            }),
            events: [
                ("refused_no_frontend", 5),
                ("udp_no_frontend", 6),
                ("flows_full", 7),
                ("client_no_syn", 8),
            ]
            .into(),
            maps: vec![("SLOTS", Pressure { used: 10, capacity: 40 })],
            dns_answers: BTreeMap::from([("NXDOMAIN".into(), 6)]),
            intercepted: vec![("intercepted", 3), ("no_daemon", 1)],
            edge: Some(EdgeReadings {
                status: EdgeStatus {
                    sources: Vec::new(),
                    client_address: Vec::new(),
                    interfaces: vec![
                        EdgeInterface {
                            name: "eth0".into(),
                            mode: Some(EdgeMode::XdpAndTcx),
                            message: None,
                        },
                        EdgeInterface { name: "eth1".into(), mode: None, message: None },
                    ],
                    n_flows: 4,
                    max_flows: 16,
                    problems: Vec::new(),
                    forwards: [true; 2],
                    proofs: [Some(Ok(())), None],
                },
                announces: true,
                counts: vec![("forwarded", 9)],
            }),
            dns_upstreams: vec![dns::UpstreamStats {
                address: "192.0.2.1:53".parse().unwrap(),
                state: dns::UpstreamState::Out,
                tcp_state: dns::UpstreamState::Up,
                sent: 12,
                in_flight: 2,
                results: [("answered", 3), ("refused", 1), ("timeout", 2), ("unreachable", 4)],
                buckets: [0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
                seconds: 2.5,
            }],
            pool: PoolUse { used: 1, quarantined: 2, size: 10 },
        }
    }

    #[test]
    fn every_metric_has_its_name_and_value() {
        let samples = strict::read(&exposition(&readings(1))).unwrap();
        let table = [
            ("nohop_ready", 1.0),
            (r#"nohop_datapath_attached{unit="connect"}"#, 0.0),
            (r#"nohop_mode{mode="translate"}"#, 0.0),
            (r#"nohop_mode{mode="shadow"}"#, 1.0),
            ("nohop_log_dropped_total", 8.0),
            ("nohop_generation", 7.0),
            (r#"nohop_source_problem{source="consul"}"#, 1.0),
            (r#"nohop_source_problem{source="file"}"#, 0.0),
            (r#"nohop_catalog_age_seconds{source="file"}"#, 0.0),
            (r#"nohop_catalog_age_seconds{source="consul"}"#, 1.5),
            (r#"nohop_source_requests_total{source="consul",code="200"}"#, 9.0),
            (r#"nohop_source_requests_total{source="consul",code="reset"}"#, 1.0),
            (r#"nohop_source_received_bytes_total{source="consul"}"#, 1_099_511_627_776.0),
            (r#"nohop_source_suspicious_total{source="consul"}"#, 2.0),
            ("nohop_demand_dropped_total", 3.0),
            (r#"nohop_watches{state="live"}"#, 3.0),
            (r#"nohop_watches{state="cold"}"#, 4.0),
            (r#"nohop_source_connections{source="consul"}"#, 5.0),
            (r#"nohop_source_max_requests_per_hour{source="consul"}"#, 420.0),
            (r#"nohop_source_max_bytes_per_hour{source="consul"}"#, 0.0),
            ("nohop_watch_oldest_age_seconds", 0.25),
            (r#"nohop_propagation_seconds_bucket{le="0.002"}"#, 0.0),
            (r#"nohop_propagation_seconds_bucket{le="0.005"}"#, 1.0),
            (r#"nohop_propagation_seconds_bucket{le="+Inf"}"#, 1.0),
            (r#"nohop_connects_total{service="web-0"}"#, 0.0),
            (r#"nohop_connects_failed_total{service="web-0"}"#, 0.0),
            (r#"nohop_ejections_total{service="web-0"}"#, 0.0),
            ("nohop_ejected_backends", 2.0),
            ("nohop_probed_returns_total", 8.0),
            (r#"nohop_drains{kind="node"}"#, 3.0),
            (r#"nohop_drains{kind="edge"}"#, 1.0),
            (r#"nohop_reloads_total{result="refused"}"#, 1.0),
            ("nohop_last_reload_successful", 0.0),
            ("process_cpu_seconds_total", 1.25),
            ("process_start_time_seconds", 1.7e9),
            ("process_max_fds", 1024.0),
            (r#"nohop_dns_upstream_in_flight{upstream="192.0.2.1:53"}"#, 2.0),
            (r#"nohop_in_flight{service="web-0"}"#, 3.0),
            (r#"nohop_connects_refused_total{service="",reason="no_frontend"}"#, 5.0),
            (r#"nohop_connects_refused_total{service="web-0",reason="no_backend"}"#, 0.0),
            (r#"nohop_connects_refused_total{service="web-0",reason="family"}"#, 0.0),
            (r#"nohop_udp_connects_refused_total{service="",reason="no_frontend"}"#, 6.0),
            (r#"nohop_datapath_events_total{event="flows_full"}"#, 7.0),
            (r#"nohop_client_addresses_total{result="shown"}"#, 0.0),
            (r#"nohop_client_addresses_total{result="no_syn"}"#, 8.0),
            (r#"nohop_map_entries{map="SLOTS"}"#, 10.0),
            (r#"nohop_map_capacity{map="SLOTS"}"#, 40.0),
            (r#"nohop_vip_pool_addresses{state="free"}"#, 7.0),
            (r#"nohop_dns_queries_total{rcode="NXDOMAIN"}"#, 6.0),
            (r#"nohop_dns_intercept_total{result="intercepted"}"#, 3.0),
            (r#"nohop_edge_interface_attached{interface="eth0",mode="xdp-native+tcx"}"#, 1.0),
            ("nohop_edge_announced", 1.0),
            ("nohop_edge_flows", 4.0),
            ("nohop_edge_flows_capacity", 16.0),
            (r#"nohop_edge_packets_total{result="forwarded"}"#, 9.0),
            (r#"nohop_dns_upstream_up{upstream="192.0.2.1:53"}"#, 0.0),
            (r#"nohop_dns_upstream_tcp_up{upstream="192.0.2.1:53"}"#, 1.0),
            (r#"nohop_dns_upstream_queries_total{upstream="192.0.2.1:53",result="timeout"}"#, 2.0),
            (r#"nohop_dns_upstream_seconds_bucket{upstream="192.0.2.1:53",le="0.0005"}"#, 3.0),
            (r#"nohop_dns_upstream_seconds_count{upstream="192.0.2.1:53"}"#, 4.0),
            (r#"nohop_dns_upstream_seconds_sum{upstream="192.0.2.1:53"}"#, 2.5),
        ];
        for (sample, expected) in table {
            assert_eq!(samples.get(sample), Some(&expected), "{sample}");
        }
    }

    #[test]
    fn each_service_has_six_samples_and_no_more() {
        let n_others = strict::read(&exposition(&readings(0))).unwrap().len();
        let n_all = strict::read(&exposition(&readings(10_000))).unwrap().len();
        assert_eq!(n_all, n_others + 6 * 10_000);
    }

    #[test]
    fn every_metric_is_on_the_dashboard_or_has_an_alert() {
        let text = exposition(&readings(1));
        let names =
            text.lines().filter_map(|line| line.strip_prefix("# TYPE nohop_")?.split(' ').next());
        let shown = [
            include_str!("../../../contrib/prometheus/nohop.rules.yml"),
            include_str!("../../../contrib/grafana/nohop.json"),
        ];
        let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let words: BTreeSet<&str> = shown
            .iter()
            .flat_map(|text| text.split(|c| !is_part(c)))
            .filter_map(|word| word.strip_prefix("nohop_"))
            .collect();
        let is_shown = |name: &&str| {
            ["", "_bucket"].iter().any(|suffix| words.contains(&*format!("{name}{suffix}")))
        };
        let hidden: Vec<&str> = names.filter(|name| !is_shown(name)).collect();
        assert!(hidden.is_empty(), "{hidden:?}");
    }

    #[test]
    fn what_the_rules_ask_for_is_told() {
        let rules = include_str!("../../../contrib/prometheus/nohop.rules.yml");
        let text = exposition(&readings(1));
        let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let expressions = rules.lines().filter_map(|line| line.trim().strip_prefix("expr: "));
        let mut n_names = 0;
        for expression in expressions.clone() {
            let words = expression.split(|c| !is_part(c));
            let is_metric =
                |word: &&str| word.starts_with("nohop_") || word.starts_with("process_");
            for name in words.filter(is_metric) {
                assert!(text.contains(&format!("# TYPE {name} ")), "{name} in {expression}");
                n_names += 1;
            }
        }
        let n_alerts = rules.matches("- alert: ").count();
        assert_eq!(n_alerts, expressions.count());
        assert!(n_names >= n_alerts);
    }
}

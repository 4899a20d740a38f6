//! The admin interface's view of a running daemon.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::Record;
use hyper::body::Bytes;
use tokio::sync::{mpsc, oneshot, watch};

use super::condition;
use super::drains::{self, Change, DrainRequest, DrainsView};
use super::edge::{self, Announcement};
use super::edge_notes;
use super::explain::{self, ConnectContext, ExplainTarget};
use super::metrics::{EdgeReadings, Readings, SourceReadings, exposition};
use super::process_stats::ProcessStats;
use super::recorder::Recorder;
use super::reload::{self, ReloadCounts, Request};
use super::trace::Tracer;
use crate::admin::prometheus::Histogram;
use crate::admin::{At, TraceFilter, TraceRefusal, View, WaitingListener, api};
use crate::catalog::{InspectError, InspectResult, SourceView, UsageSender, Watches};
use crate::config::keys::{Key, values};
use crate::config::{Config, Unrouted};
use crate::counted::counted;
use crate::datapath::{
    BackendIndices, COUNTERS, Counters, EdgeStatus, Indices, Mode, NamesCounters, SharedDatapath,
    UnitState,
};
use crate::dns::{self, DebugClient};
use crate::logging;
use crate::table::vips::PoolUse;
use crate::table::{
    BackendState, DRAIN_KINDS, Drain, DrainTarget, Drains, Excluded, Service, SharedWaits, Table,
    Watch, check_name, display_name, with_display_names,
};

/// The longest wait for what a source has of a name.
const INSPECT_LIMIT: Duration = Duration::from_secs(2);

/// The most services of one address that a source is asked about.
const N_INSPECTED: usize = 4;

/// The source that isn't asked by name.
const FILE: &str = "file";

/// The running daemon, as far as the admin interface needs it.
pub struct DaemonView {
    pub(super) dns: api::DnsStatus,
    pub(super) debug_client: DebugClient,
    pub(super) dns_stats: Arc<dns::DnsStats>,
    pub(super) scope: PathBuf,
    pub(super) datapath: Arc<SharedDatapath>,
    pub(super) counters: Counters,
    pub(super) table: watch::Receiver<Arc<Table>>,
    pub(super) waits: SharedWaits,
    pub(super) sources: watch::Receiver<Arc<[SourceView]>>,
    pub(super) demand: UsageSender,
    pub(super) tag: watch::Receiver<String>,
    pub(super) pool: watch::Receiver<PoolUse>,
    pub(super) recorder: Arc<Recorder>,
    pub(super) propagation: Arc<Mutex<Histogram>>,
    pub(super) at: watch::Receiver<At>,
    pub(super) reloads: mpsc::Sender<Request>,
    pub(super) drains: DrainsView,
    pub(super) deadline_problem: watch::Receiver<Option<String>>,
    /// That others may change what is in the state directory, since the start.
    pub(super) exposed: Option<String>,
    /// Addresses of the admin interface that can't be had yet.
    pub(super) waiting: Vec<Arc<WaitingListener>>,
    pub(super) public_routes: watch::Receiver<edge::PublicRoutes>,
    pub(super) edge_vips: watch::Receiver<BTreeMap<String, SocketAddr>>,
    /// Ejections that probes ended.
    pub(super) n_returned: Arc<AtomicU64>,
    pub(super) reload_counts: Arc<ReloadCounts>,
    pub(super) drain_requests: mpsc::Sender<DrainRequest>,
    pub(super) tracer: Arc<Tracer>,
    pub(super) config: watch::Receiver<Config>,
}

impl View for DaemonView {
    fn status(&self) -> api::Status {
        // First, since later reads may be newer: then the client requests once more.
        let revision = self.at.borrow().revision;
        let table = self.table.borrow().clone();
        let hooks = self.datapath.hooks();
        let sources = self.sources.borrow().clone();
        let sources_status: Vec<_> = sources.iter().map(source_status).collect();
        let mut problems: Vec<String> =
            sources_status.iter().filter_map(|source| source.problem.clone()).collect();
        problems.extend(unreported(&sources, table.is_synced()));
        problems.extend(hooks.problems);
        problems.extend(self.debug_client.problems());
        problems.extend(self.recorder.problem());
        problems.extend(self.drains.problems());
        let exposed = self.exposed.as_ref();
        problems.extend(
            exposed.map(|it| format!("{it}; then restart nohop, which looks at its start")),
        );
        problems.extend(self.waiting.iter().filter_map(|listener| listener.problem()));
        problems.extend(self.deadline_problem.borrow().clone());
        let routes = self.public_routes.borrow().clone();
        problems.extend(routes.problem.clone());
        let edge = self.datapath.edge_status();
        problems.extend(edge::names_of_none(&self.edge_vips.borrow(), edge.as_ref(), &table));
        problems.extend(edge.iter().flat_map(|edge| edge.problems.clone()));
        problems.extend(edge.iter().filter_map(|edge| edge::vips_without_source(edge, &table)));
        problems.extend(dropped(logging::n_dropped()));
        let errors = self.datapath.errors();
        problems.extend(refused(&errors));
        let n_rejected = table.rejected.len();
        if n_rejected > 0 {
            let names: Vec<&str> = table.rejected.keys().take(3).map(|name| &**name).collect();
            let names = names.join(", ");
            let n_names = counted(n_rejected, "name");
            problems.push(format!("{n_names} can't be had ({names}): see nohop explain"));
        }
        let pool = *self.pool.borrow();
        let units = self.datapath.unit_status().into_iter().map(|unit| api::UnitStatus {
            name: unit.name.to_owned(),
            state: unit.state.name().to_owned(),
            reason: unit.reason,
        });
        let maps = self.datapath.pressure().into_iter().map(|(name, pressure)| api::MapStatus {
            name: name.to_owned(),
            entries: pressure.used.into(),
            capacity: pressure.capacity.into(),
        });
        let counters = COUNTERS
            .iter()
            .map(|&(name, counter)| (name.to_owned(), self.counters.event(counter)))
            .collect::<BTreeMap<_, _>>();
        let (mode, mode_reason) = match self.datapath.mode() {
            Mode::Translate => ("translate", None),
            Mode::Shadow { why } => ("shadow", Some(why)),
        };
        api::Status {
            ready: table.is_synced() && hooks.translate,
            problems,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            generation: table.generation,
            revision,
            sources: sources_status,
            services: table.services.len(),
            backends: table.n_healthy,
            drains: self.drains.drains().len(),
            dns: api::DnsStatus {
                upstreams: self.debug_client.upstreams().iter().map(upstream_status).collect(),
                ..self.dns.clone()
            },
            pool: api::PoolStatus {
                // That of the last tick is up to a second behind the table.
                used: if table.is_synced() { table.services.len() } else { pool.used },
                quarantined: pool.quarantined,
                size: pool.size,
            },
            datapath: api::DatapathStatus {
                attached: hooks.attached,
                adopted: self.datapath.is_adopted(),
                cgroup: self.scope.display().to_string(),
                mode: mode.to_owned(),
                mode_reason,
                units: units.collect(),
                limits: self.datapath.limits(),
                maps: maps.collect(),
                refused_services: errors.len(),
                counters,
                client_address_from: self.config.borrow().datapath.client_address_from.clone(),
            },
            edge: edge.map(|edge| {
                let announcement = self.announcement(&edge);
                edge::document(&edge, &announcement, &routes, self.datapath.edge_counts())
            }),
        }
    }

    fn services(&self) -> Vec<api::ServiceStatus> {
        let table = self.table.borrow().clone();
        table.services.values().map(|service| self.service(service)).collect()
    }

    fn summaries(&self) -> Vec<api::ServiceSummary> {
        let table = self.table.borrow().clone();
        let (counts, errors) = (self.datapath.counts_in_flight(), self.datapath.errors());
        let indices = self.datapath.service_indices().into_iter();
        let indices: HashMap<_, _> =
            indices.map(|(name, service, backends)| (name, (service, backends))).collect();
        let summary = |service: &Arc<Service>| {
            let (stats, backends) = match indices.get(&service.name) {
                Some((idx, backends)) => (self.counters.service(*idx), &backends[..]),
                None => Default::default(),
            };
            let in_flight =
                backends.iter().map(|&(_, idx)| u64::from(self.counters.in_flight(idx)));
            let n_ejected = self.n_ejected(service, backends);
            let (condition, reached) =
                condition::of(service, n_ejected, errors.contains_key(&service.name));
            api::ServiceSummary {
                name: service.name.to_string(),
                vip: service.vip,
                ports: service.ports.clone(),
                protocol: service.protocols,
                algorithm: service.algorithm,
                condition,
                reached,
                instances: service.backends.len() + service.excluded.len(),
                connects: stats.connects,
                refused: stats.refused,
                failed: stats.failed,
                in_flight: counts.then(|| in_flight.sum()),
            }
        };
        table.services.values().map(summary).collect()
    }

    fn settings(&self) -> Vec<api::SettingStatus> {
        let defaults = values(&Config::default()).into_iter().map(|(_, value)| value);
        let settings = values(&self.config.borrow()).into_iter().zip(defaults);
        let setting = |((key, value), default): ((&Key, _), _)| api::SettingStatus {
            key: key.name.to_owned(),
            value,
            default,
            text: key.text.to_owned(),
            restart: key.restart.map(str::to_owned),
        };
        settings.map(setting).collect()
    }

    async fn explain(&self, what: &str, may_ask: bool) -> api::Explanation {
        let table = self.table.borrow().clone();
        let subject = ExplainTarget::parse(what, &self.dns.domain);
        let (ip, port) = match &subject {
            ExplainTarget::Name(name, port) => {
                return self.explain_name_at(name, *port, &table, may_ask).await;
            }
            ExplainTarget::Address(ip, port) => (*ip, *port),
        };
        if let [service, others @ ..] = &explain::by_vip(&table, ip, port)[..] {
            let mut explanation = self.explain_name(&service.name, &table, may_ask).await;
            let other_port = port.and_then(|port| {
                let connected = SocketAddr::new(ip, port);
                explain::other_port(service, connected, &connected.to_string())
            });
            explanation.connect = other_port.unwrap_or(explanation.connect);
            explanation.notes.extend(others.iter().map(|other| explain::also_at(ip, other)));
            return explanation;
        }
        let mut instances = Vec::new();
        let mut notes = BTreeSet::new();
        for (nth, service) in explain::by_instance(&table, &subject).into_iter().enumerate() {
            let explanation =
                self.explain_name(&service.name, &table, may_ask && nth < N_INSPECTED).await;
            let backends = explanation.service.into_iter().flat_map(|service| service.backends);
            let resolved = service.backends.iter().zip(backends);
            // A host's name is found by the address that it stands for.
            let resolved: BTreeSet<String> = resolved
                .filter(|(backend, _)| {
                    backend.address.is_some_and(|address| subject.is_at(&address.to_string()))
                })
                .map(|(_, shown)| shown.address)
                .collect();
            let is_at = |it: &api::InstanceStatus| {
                subject.is_at(&it.address) || resolved.contains(&it.address)
            };
            instances.extend(explanation.instances.into_iter().filter(is_at));
            notes.extend(explanation.notes);
        }
        api::Explanation {
            name: what.to_owned(),
            connect: explain::direct(what, &instances),
            source: None,
            shadowed: Vec::new(),
            service: None,
            excluded: Vec::new(),
            instances,
            notes: notes.into_iter().collect(),
        }
    }

    async fn look_up(&self, name: &str, kind: &str) -> Result<api::DnsLookup, String> {
        match self.debug_client.look_up(name, kind).await {
            Ok((answer, origin)) => {
                let is_own_failure = origin == dns::AnswerOrigin::Own
                    && answer.metadata.response_code == ResponseCode::ServFail;
                let mut lookup = lookup_document(&answer, Some(origin));
                if is_own_failure {
                    let table = self.table.borrow().clone();
                    let why = self.unready(&table).or_else(|| self.unreliable());
                    let late = "discovery hasn't answered about the name within 250 ms: ask again";
                    lookup.reason = Some(why.unwrap_or_else(|| late.to_owned()));
                }
                Ok(lookup)
            }
            Err(error) => Err(error.to_string()),
        }
    }

    fn logs_access(&self) -> bool {
        self.config.borrow().admin.access_log
    }

    fn metrics(&self) -> String {
        let table = self.table.borrow().clone();
        let hooks = self.datapath.hooks();
        let units = self.datapath.unit_status().into_iter();
        // One that is switched off isn't detached.
        let units = units.filter(|unit| unit.is_required || unit.state != UnitState::Off);
        let units = units.map(|unit| {
            let is_attached = match unit.is_required {
                true => hooks.attached,
                false => unit.state == UnitState::Attached,
            };
            (unit.name, is_attached)
        });
        let is_live = |name: &Arc<str>| {
            table.services.get(name).is_some_and(|service| service.watch == Watch::Live)
        };
        let indices = self.datapath.service_indices();
        let n_ejected = |(name, _, backends): &(Arc<str>, u32, BackendIndices)| {
            table.services.get(name).map_or(0, |service| self.n_ejected(service, backends))
        };
        let n_ejected = indices.iter().map(n_ejected).sum();
        let services = indices.into_iter();
        let services = services.map(|(name, service_idx, backends)| {
            let counters = self.counters.service(service_idx);
            let in_flight =
                backends.iter().map(|&(_, idx)| u64::from(self.counters.in_flight(idx)));
            (name, counters, in_flight.sum())
        });
        let services = services
            .filter(|(name, counters, _)| *counters != Default::default() || is_live(name))
            .collect();
        let events: BTreeMap<&str, u64> =
            COUNTERS.iter().map(|&(name, counter)| (name, self.counters.event(counter))).collect();
        let propagation = self.propagation.lock().unwrap_or_else(PoisonError::into_inner).clone();
        exposition(&Readings {
            is_ready: table.is_synced() && hooks.translate,
            units: units.collect(),
            is_shadow: self.datapath.mode() != Mode::Translate,
            log_dropped: logging::n_dropped(),
            generation: table.generation,
            sources: self.sources.borrow().iter().map(source_readings).collect(),
            n_demand_dropped: self.demand.n_dropped(),
            propagation,
            services,
            counts_in_flight: self.datapath.counts_in_flight(),
            n_ejected,
            n_returned: self.n_returned.load(Ordering::Relaxed),
            drains: drains_by_kind(&self.drains.drains()),
            reloads: self.reload_counts.read(),
            process: ProcessStats::read(),
            events,
            maps: self.datapath.pressure(),
            dns_answers: self.dns_answers(),
            intercepted: self.datapath.intercept_counts(),
            edge: self.datapath.edge_status().map(|edge| EdgeReadings {
                announces: self.edge_readiness(&edge).is_none()
                    && self.public_routes.borrow().problem.is_none(),
                status: edge,
                counts: self.datapath.edge_counts(),
            }),
            dns_upstreams: self.debug_client.upstreams(),
            pool: *self.pool.borrow(),
        })
    }

    fn trace(&self, filter: TraceFilter) -> Result<mpsc::Receiver<Bytes>, TraceRefusal> {
        self.tracer.subscribe(filter)
    }

    fn at(&self) -> watch::Receiver<At> {
        self.at.clone()
    }

    async fn reload(&self) -> api::Reload {
        let (answer, answered) = oneshot::channel();
        let stopping = || reload::refuse(["the daemon is stopping"]);
        if self.reloads.send(answer).await.is_err() {
            return stopping();
        }
        answered.await.unwrap_or_else(|_| stopping())
    }

    fn edge_obstacle(&self) -> Option<String> {
        match self.datapath.edge_status() {
            None => Some("this node is no edge".to_owned()),
            Some(edge) => self.edge_readiness(&edge),
        }
    }

    fn flows(&self, by_bytes: bool, limit: usize) -> Option<api::FlowsDocument> {
        self.datapath.edge_status()?;
        Some(edge::flows(self.datapath.edge_flows(), by_bytes, limit))
    }

    fn drains(&self) -> Vec<api::DrainStatus> {
        let table = self.table.borrow().clone();
        let counts = self.datapath.counts_in_flight();
        let status = |(target, drain): (&DrainTarget, &Drain)| {
            let (mut services, mut n_backends, mut in_flight) = (Vec::new(), 0, 0);
            for service in table.services.values() {
                let covered = service
                    .backends
                    .iter()
                    .filter(|backend| target.covers(&backend.node, &backend.id, backend.address));
                let covered: Vec<_> = covered.collect();
                if covered.is_empty() {
                    continue;
                }
                services.push(service.name.to_string());
                n_backends += covered.len() as u64;
                let indices = self.datapath.indices(&service.name).map(|indices| indices.backends);
                let indices = indices.unwrap_or_default();
                let of_it = covered.iter().filter_map(|backend| indices.get(&backend.address?));
                in_flight += of_it.map(|&idx| u64::from(self.counters.in_flight(idx))).sum::<u64>();
            }
            api::DrainStatus {
                kind: target.kind().to_owned(),
                name: target.name(),
                since: drain.since_text(),
                services,
                backends: n_backends,
                in_flight: counts.then_some(in_flight),
            }
        };
        self.drains.drains().iter().map(status).collect()
    }

    async fn drain(&self, is_drain: bool, target: &str) -> api::DrainChange {
        let change = if is_drain { Change::Drain } else { Change::Undrain };
        let (answer, answered) = oneshot::channel();
        let stopping = || drains::refuse("the daemon is stopping");
        let request = DrainRequest { change, text: target.to_owned(), answer };
        if self.drain_requests.send(request).await.is_err() {
            return stopping();
        }
        answered.await.unwrap_or_else(|_| stopping())
    }
}

/// The document of an answer, and of where it came from.
pub fn lookup_document(answer: &Message, origin: Option<dns::AnswerOrigin>) -> api::DnsLookup {
    let show = |records: &[Record]| records.iter().map(ToString::to_string).collect();
    let (origin, upstream, reason) = match origin {
        None => (None, None, None),
        Some(dns::AnswerOrigin::Kernel) => (Some(api::Origin::Kernel), None, None),
        Some(dns::AnswerOrigin::Own) => (Some(api::Origin::Table), None, None),
        Some(dns::AnswerOrigin::Upstream(server)) => {
            (Some(api::Origin::Upstream), Some(server.to_string()), None)
        }
        Some(dns::AnswerOrigin::Nowhere(reason)) => {
            (Some(api::Origin::Nowhere), None, Some(reason))
        }
    };
    api::DnsLookup {
        question: answer.queries.first().map(ToString::to_string).unwrap_or_default(),
        code: format!("{:?}", answer.metadata.response_code).to_uppercase(),
        answers: show(&answer.answers),
        authorities: show(&answer.authorities),
        additionals: show(&answer.additionals),
        origin,
        upstream,
        reason,
    }
}

fn upstream_status(upstream: &dns::UpstreamStats) -> api::UpstreamStatus {
    let n_answers: u64 = upstream.buckets.iter().sum();
    api::UpstreamStatus {
        address: upstream.address,
        state: upstream.state.word().to_owned(),
        tcp_state: upstream.tcp_state.word().to_owned(),
        sent: upstream.sent,
        in_flight: upstream.in_flight,
        results: upstream.results.iter().map(|(result, n)| ((*result).to_owned(), *n)).collect(),
        mean_ms: (n_answers > 0).then(|| upstream.seconds * 1e3 / n_answers as f64),
    }
}

/// That a source hasn't reported since it was added, and what that means.
fn unreported(sources: &[SourceView], is_synced: bool) -> Option<String> {
    let names = sources.iter().filter(|source| !source.has_reported()).map(SourceView::name);
    let names = names.collect::<Vec<_>>().join(" and ");
    let what = match (is_synced, names.is_empty()) {
        (true, true) => return None,
        (true, false) => "what was served before stays, and its services join later",
        (false, _) => "names get SERVFAIL",
    };
    // A table is a moment behind the sources.
    let names = if names.is_empty() { "discovery" } else { &names };
    Some(format!("no full answer from {names} yet: {what}"))
}

fn source_status(source: &SourceView) -> api::SourceStatus {
    let (health, watches) = (source.health.borrow().clone(), source.stats.watches());
    let state = match (source.has_reported(), health.is_failing) {
        (false, _) => "connecting",
        (true, true) => "failing",
        // What an earlier daemon saved serves.
        (true, false) if !health.has_answered => "connecting",
        (true, false) => "live",
    };
    api::SourceStatus {
        name: health.source.to_owned(),
        state: state.to_owned(),
        age_seconds: health.last_answer.map(|at| at.elapsed().as_secs_f64()),
        facts: health.facts,
        problem: health.problem,
        watches: (watches != Watches::default()).then(|| watch_status(&watches)),
    }
}

fn source_readings(source: &SourceView) -> SourceReadings {
    let (health, stats) = (source.health.borrow().clone(), &source.stats);
    SourceReadings {
        name: health.source,
        has_problem: health.problem.is_some(),
        age: health.age().map(|age| age.as_secs_f64()),
        requests: stats.requests(),
        received_bytes: stats.bytes(),
        n_shrinks_held: stats.shrinks_held(),
        watches: stats.watches(),
    }
}

fn watch_status(watches: &Watches) -> api::WatchStatus {
    api::WatchStatus {
        live: watches.live,
        cold: watches.cold,
        connections: watches.connections,
        max_connections: watches.max_connections,
        oldest_age_seconds: watches.oldest_age.map(|age| age.as_secs_f64()),
        requests_per_hour: watches.budget_requests,
        bytes_per_hour: watches.budget_bytes,
    }
}

/// How many there are of each kind, also where that is none.
fn drains_by_kind(drains: &Drains) -> Vec<(&'static str, usize)> {
    let count = |kind| drains.iter().filter(|(target, _)| target.kind() == kind).count();
    DRAIN_KINDS.into_iter().map(|kind| (kind, count(kind))).collect()
}

/// That lines of the log were lost.
fn dropped(n_dropped: u64) -> Option<String> {
    let lines = counted(n_dropped, "line");
    let what = "of the log since the start: stderr isn't read fast enough, see the journal's or the \
                pipe's reader";
    (n_dropped > 0).then(|| format!("dropped {lines} {what}"))
}

/// The services that the kernel doesn't have as the table wants them: one problem for each, or one
/// for all where they are many.
fn refused(errors: &BTreeMap<Arc<str>, String>) -> Vec<String> {
    const N_NAMED: usize = 3;
    let Some(last) = errors.values().next_back().filter(|_| errors.len() > N_NAMED) else {
        return errors.iter().map(|(name, error)| format!("{name}: {error}")).collect();
    };
    let names: Vec<&str> = errors.keys().take(N_NAMED).map(|name| &**name).collect();
    vec![format!(
        "{} services aren't in the kernel as they should be ({}, …): {last}",
        errors.len(),
        names.join(", ")
    )]
}

impl DaemonView {
    /// Whether clients outside are to come to this edge.
    fn announcement(&self, edge: &EdgeStatus) -> Announcement {
        let mode = self.datapath.mode();
        Announcement::of(&self.table.borrow(), edge, &self.drains.drains(), &mode)
    }

    /// Why this edge isn't to have traffic; `None` where it is.
    fn edge_readiness(&self, edge: &EdgeStatus) -> Option<String> {
        let announcement = self.announcement(edge);
        announcement.unready(&self.public_routes.borrow()).map(str::to_owned)
    }

    /// The answers to DNS queries by response code, the kernel's included.
    fn dns_answers(&self) -> BTreeMap<String, u64> {
        let mut answers = self.dns_stats.snapshot();
        let NamesCounters { answered, failed, limited, broken, .. } =
            self.datapath.names_counters();
        let by_kernel =
            [("NOERROR", answered), ("SERVFAIL", failed), ("limited", limited), ("broken", broken)];
        for (label, n) in by_kernel {
            if n > 0 {
                *answers.entry(label.to_owned()).or_default() += n;
            }
        }
        answers
    }

    fn n_ejected(&self, service: &Service, backends: &[(SocketAddr, u32)]) -> usize {
        condition::n_ejected(service, backends, |idx| self.counters.ejected(idx).is_some())
    }

    fn service(&self, service: &Service) -> api::ServiceStatus {
        // A service that the kernel never had has no counters.
        let indices = self.datapath.indices(&service.name);
        let (stats, backends) = match indices {
            Some(Indices { service, backends }) => (self.counters.service(service), backends),
            None => Default::default(),
        };
        let counts = self.datapath.counts_in_flight();
        let in_flight = |idx: &u32| u64::from(self.counters.in_flight(*idx));
        let all_in_flight = counts.then(|| backends.values().map(in_flight).sum());
        let (contacts, kept) = {
            let (waits, now) = (self.waits.lock(), Instant::now());
            let kept = waits.keeps.status(&service.name, now);
            (waits.contacts.status(&service.name, now), kept)
        };
        let drains = self.drains.drains();
        let named = |texts: &[String]| -> Vec<String> {
            texts.iter().map(|text| with_display_names(text, &service.name)).collect()
        };
        let backends = service.backends.iter().map(|backend| {
            let backend_idx = backend.address.and_then(|address| backends.get(&address));
            let contact = backend.address.and_then(|address| contacts.get(&address));
            let contact = contact.map(|contact| contact.reason(backend.state.is_reached()));
            let ejected = backend_idx.and_then(|&idx| self.counters.ejected(idx));
            let ejected = ejected.filter(|_| backend.state.is_reached());
            let state = ejected.map_or(backend.state, |_| BackendState::Ejected);
            let ejected = ejected.map(|ejected| ejected.to_string());
            let kept = kept.clone().filter(|_| backend.state.is_reached());
            let reasons = [ejected, backend.reason.clone(), contact, kept].into_iter().flatten();
            let reason = reasons.reduce(|all, reason| all + "; " + &reason);
            let drained_by = (state == BackendState::Draining)
                .then(|| drains.find(&backend.node, &backend.id, backend.address))
                .flatten();
            api::BackendStatus {
                address: backend.shown_address.clone(),
                node: backend.node.clone(),
                instance: backend.id.clone(),
                instance_name: display_name(&backend.id, &service.name),
                weight: backend.weight,
                state,
                reason: reason.map(|reason| with_display_names(&reason, &service.name)),
                drained_by: drained_by.map(|(target, _)| target.to_string()),
                connects: backend_idx.map_or(0, |&idx| self.counters.backend_connects(idx)),
                in_flight: counts.then(|| backend_idx.map_or(0, in_flight)),
                failures: backend_idx.map_or(0, |&idx| self.counters.backend_failures(idx)),
                connect_us: backend_idx.and_then(|&idx| self.counters.connect_us(idx)),
                rtt_us: backend_idx.and_then(|&idx| self.counters.rtt_us(idx)),
            }
        });
        api::ServiceStatus {
            name: service.name.to_string(),
            vip: service.vip,
            vip6: service.vip6,
            pin: service.pin,
            public: service.public.clone(),
            ports: service.ports.clone(),
            protocol: service.protocols,
            algorithm: service.algorithm,
            generation: service.generation,
            watch: service.watch,
            notes: named(&service.notes),
            error: self.datapath.error(&service.name),
            connects: stats.connects,
            refused: stats.refused,
            failed: stats.failed,
            syn_retransmits: stats.syn_retransmits,
            in_flight: all_in_flight,
            refused_family: stats.refused_family,
            shadowed: stats.shadowed,
            udp_connects: stats.udp_connects.connects,
            udp_connects_refused: stats.udp_connects.no_backend + stats.udp_connects.family,
            backends: backends.collect(),
        }
    }

    /// Explains a name, and what a connection to a port of it gets.
    async fn explain_name_at(
        &self,
        name: &str,
        port: Option<u16>,
        table: &Table,
        may_ask: bool,
    ) -> api::Explanation {
        let Some((service, port)) = table.services.get(name).zip(port) else {
            // A source may have a name with a colon in it, which can't be had.
            let whole = port.map(|port| format!("{name}:{port}"));
            let is_rejected =
                |whole: &String| table.rejected.keys().any(|name| name.to_lowercase() == *whole);
            let whole = whole.filter(is_rejected);
            return self.explain_name(whole.as_deref().unwrap_or(name), table, may_ask).await;
        };
        let mut explanation = self.explain_name(name, table, may_ask).await;
        let shown = format!("{name}.{}:{port}", self.dns.domain);
        let connected = SocketAddr::new(service.vip.into(), port);
        let other_port = explain::other_port(service, connected, &shown);
        explanation.connect = other_port.unwrap_or(explanation.connect);
        explanation
    }

    /// The explanation of a name in lower case, without the domain.
    async fn explain_name(&self, name: &str, table: &Table, may_ask: bool) -> api::Explanation {
        let sources = self.sources.borrow().clone();
        let mut sources = sources.iter().filter(|source| source.has(name)).map(SourceView::name);
        let source = sources.next().map(str::to_owned);
        let is_of_file = source.as_deref() == Some(FILE);
        let inspected = match may_ask && !is_of_file {
            true => self.inspect(name).await,
            false => None,
        };
        let tag = self.tag.borrow().clone();
        // The datapath's lock may be held for a moment.
        tokio::task::block_in_place(|| {
            let service = table.services.get(name);
            let excluded = service.into_iter().flat_map(|service| &service.excluded);
            let excluded = excluded.map(|out| Excluded {
                reason: with_display_names(&out.reason, name),
                ..out.clone()
            });
            let excluded: Vec<_> = excluded.collect();
            let status = service.map(|service| self.service(service));
            let backends = status.as_ref().map(|status| &status.backends[..]).unwrap_or_default();
            let inspection = inspected.as_ref().and_then(|result| result.as_deref().ok());
            let is_routed = service.is_some();
            let is_cold = service.is_some_and(|service| service.watch == Watch::Cold);
            let mut notes = explain::notes(name, &tag, service.map(|it| &**it), inspected.as_ref());
            if !is_routed {
                notes.extend(explain::similar(name, table.services.keys().map(|name| &**name)));
            }
            notes.extend(self.kernel_names_problem().filter(|_| is_routed));
            notes.extend(service.into_iter().flat_map(|service| self.edge_notes(service)));
            api::Explanation {
                name: name.to_owned(),
                connect: self.connect(name, table, backends, inspected.as_ref()),
                source,
                shadowed: sources.map(str::to_owned).collect(),
                instances: explain::instances(name, is_cold, backends, &excluded, inspection),
                notes,
                service: status,
                excluded,
            }
        })
    }

    /// What an edge does for a service, and what its servers see of clients.
    fn edge_notes(&self, service: &Service) -> Vec<String> {
        if service.public.is_empty() {
            return Vec::new();
        }
        let config = self.config.borrow();
        let notes = edge_notes::clients_on_node(service, &config.datapath.client_address_from);
        let mut notes: Vec<String> = notes.into_iter().collect();
        if let Some(edge) = self.datapath.edge_status() {
            notes.extend(edge_notes::clients_from_edge(service, &edge));
            notes.extend(edge_notes::without_route(service, edge_notes::has_no_route));
        }
        notes
    }

    /// Why the kernel doesn't answer names that it should.
    fn kernel_names_problem(&self) -> Option<String> {
        let units = self.datapath.unit_status();
        let names = units.into_iter().find(|unit| unit.name == "names")?;
        let is_wanted = matches!(names.state, UnitState::Attached | UnitState::Failed);
        names.reason.filter(|_| is_wanted).map(|reason| format!("names in the kernel: {reason}"))
    }

    /// What the source has of a name; `None` where no source is asked by name.
    async fn inspect(&self, name: &str) -> Option<InspectResult> {
        let inspection = tokio::time::timeout(INSPECT_LIMIT, self.demand.inspect(name)).await;
        let late = InspectError::Failed(format!("no answer within {INSPECT_LIMIT:?}").into());
        inspection.unwrap_or(Some(Err(late)))
    }

    /// Why all names of the zone get SERVFAIL, if they do.
    fn unready(&self, table: &Table) -> Option<String> {
        if !table.is_synced() {
            return Some("discovery has not answered in full yet".to_owned());
        }
        if !self.datapath.hooks().attached {
            return Some(format!("the hooks aren't attached to {}", self.scope.display()));
        }
        match self.datapath.mode() {
            Mode::Shadow { why } => {
                Some(format!("connections are only counted, none is translated: {why}"))
            }
            Mode::Translate => None,
        }
    }

    /// Why names that the table lacks may exist, where a source that is asked by name has a problem.
    fn unreliable(&self) -> Option<String> {
        let sources = self.sources.borrow();
        let mut asked = sources.iter().filter(|source| source.name() != FILE);
        let failing =
            asked.find(|source| !source.has_reported() || source.health.borrow().is_failing)?;
        let unreported = format!("{} hasn't answered in full yet", failing.name());
        Some(failing.health.borrow().problem.clone().unwrap_or(unreported))
    }

    /// Why it isn't known whether there is a service of this name, which the table lacks; `None` where
    /// there is none.
    fn unknown(&self, inspected: Option<&InspectResult>) -> Option<String> {
        if !self.demand.is_connected() {
            return None;
        }
        let failed = inspected.and_then(|result| result.as_ref().err());
        self.unreliable().or_else(|| failed.map(ToString::to_string))
    }

    /// The result of a connection, a sentence.
    fn connect(
        &self,
        name: &str,
        table: &Table,
        backends: &[api::BackendStatus],
        inspected: Option<&InspectResult>,
    ) -> String {
        let fqdn = format!("{name}.{}", self.dns.domain);
        if let Some(why) = self.unready(table) {
            return format!("{fqdn} gets SERVFAIL: {why}");
        }
        let hooks = self.datapath.hooks();
        let rejected = table.rejected.iter().find(|(given, _)| given.to_lowercase() == name);
        let Some(service) = table.services.get(name) else {
            let unrouted = self.debug_client.unrouted();
            let may_exist = rejected.is_none() && check_name(name).is_ok();
            if let Some(why) = self.unknown(inspected).filter(|_| may_exist) {
                return explain::unknown(&fqdn, unrouted == Unrouted::Forward, &why);
            }
            let answer = match unrouted {
                Unrouted::Nxdomain => "doesn't exist",
                Unrouted::Forward => "is forwarded to other resolvers (dns.unrouted)",
            };
            return match rejected {
                Some((_, reason)) => format!("{fqdn} {answer}: {reason}"),
                None => format!(
                    "{fqdn} {answer}: no service of that name has the tag `{}`",
                    *self.tag.borrow()
                ),
            };
        };
        if let Some(waiting) = hooks.waiting {
            let target = explain::target(&fqdn, service);
            return format!(
                "{target} goes by the table that an earlier daemon knew last: {waiting}"
            );
        }
        if let Some(error) = self.datapath.error(name) {
            let served = match self.datapath.indices(name) {
                Some(_) => "goes by the service's former state",
                None => "is refused with ECONNREFUSED",
            };
            return format!("{} {served}: {error}", explain::target(&fqdn, service));
        }
        let context = ConnectContext {
            n_ejected: explain::n_ejected(backends),
            kept: self.waits.lock().keeps.status(name, Instant::now()),
            inspection: inspected.and_then(|result| result.as_deref().ok()),
        };
        let mut sentence = explain::sentence(&fqdn, service, &context);
        if let Some((given, reason)) = rejected {
            sentence += &format!("; `{given}` is left out: {reason}");
        }
        sentence
    }
}

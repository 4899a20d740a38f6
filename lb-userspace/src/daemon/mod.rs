//! `nohop run`: the daemon. It starts the parts, leads each catalog through the stages, and stops the
//! parts again.
//!
//! The stages: sources -> merge (`catalog`) -> build -> apply -> record -> publish ([`pipeline`]). The
//! loop that brings changes to the kernel waits for no disk, log, resolver or client: each of these has a
//! thread or a task of its own.

mod condition;
mod deadline;
mod drains;
mod edge;
mod edge_notes;
mod ejected;
mod explain;
mod holdback;
mod intercept;
mod metrics;
mod names;
mod network;
mod notify;
mod pipeline;
mod prober;
mod process_stats;
mod recorder;
pub mod reload;
mod revision;
mod shadow_mode;
mod timers;
mod trace;
pub mod view;

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use aya_log::EbpfLogger;
use rustix::event::{PollFd, PollFlags};
use tokio::runtime::Handle;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::{Id, JoinHandle, JoinSet};

use crate::admin::{TcpAccess, View as _, api};
use crate::catalog::resolve::Resolver;
use crate::catalog::{Published, SourceEvent, Sources, SupervisorExit, UsageSender};
use crate::config::{
    AllCritical, CatalogConfig, Config, ConfigErrors, Expired, OnExit, Problem, TraceAccess,
    VipConfig, cgroup,
};
use crate::datapath::{
    Datapath, Mode, Options, Report, Reports, SharedDatapath, announce_start, route,
};
use crate::table::first_contact::Probe;
use crate::table::vips::PoolUse;
use crate::table::{Builder, DrainError, SharedWaits};
use crate::{admin, capabilities, catalog, dns};
use drains::{DrainBook, DrainRequest, Obstacles};
use network::HostNetwork;
use notify::Notify;
use pipeline::Pipeline;
use prober::BackendProber;
use recorder::Recorder;
use reload::{ReloadCounts, Request};
use shadow_mode::{OffFile, ShadowSwitch};
use timers::{sleep_until, ticks};
use trace::Tracer;
use view::DaemonView;

/// How often the attachment is looked at, and what failed is tried again.
const TICK: Duration = Duration::from_secs(1);

/// How often a connection of our own proves that the hooks run.
const VERIFY_TICK: Duration = Duration::from_secs(5);

/// How often the unreachable route is checked and put back.
const ROUTE_TICK: Duration = Duration::from_secs(10);

/// How often the source gets the services that were connected to.
const USAGE_TICK: Duration = Duration::from_secs(60);

/// How often names that couldn't have an address are tried again: addresses come free a day after
/// they were given up.
const RETRY_TICK: Duration = Duration::from_secs(60 * 60);

/// How long a stop waits for the VIPs and the drains to be recorded.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(200);

/// The reloads that may wait for their turn, and as many drains.
const MAX_REQUESTS: usize = 8;

/// Runs the daemon until SIGTERM or SIGINT; `read` reads its configuration again.
///
/// # Errors
/// When a part can't start; then nothing is left attached.
pub fn run(config: Config, read: reload::Read) -> anyhow::Result<()> {
    let start = |name: &str, reduce: fn()| {
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        runtime.worker_threads(2).enable_all().thread_name(name).on_thread_start(reduce);
        runtime.build().context("can't start the runtime")
    };
    let runtime = start("nohop", capabilities::for_datapath)?;
    // Clients of DNS and of the admin interface are served without capabilities.
    let servers = start("server", capabilities::none)?;
    let result = runtime.block_on(daemon(config, read, servers.handle().clone()));
    // Blocking work in progress, such as a lookup, must not delay the exit.
    servers.shutdown_timeout(Duration::from_millis(100));
    runtime.shutdown_timeout(Duration::from_millis(200));
    result
}

async fn daemon(config: Config, read: reload::Read, servers: Handle) -> anyhow::Result<()> {
    let mut signals = Signals::new().context("can't listen for signals")?;
    let mut daemon = Daemon::start(config, read, servers).await?;
    capabilities::for_datapath();
    let outcome = daemon.serve(&mut signals).await;
    daemon.stop().await;
    outcome
}

/// The result of reading a configuration for a reload.
type Wanted = Result<Config, ConfigErrors>;

/// The parts, in the order of the stages.
struct Daemon {
    config: Config,
    sources: Sources,
    resolver: Resolver,
    pipeline: Pipeline,
    waits: SharedWaits,
    prober: BackendProber,
    datapath: Arc<SharedDatapath>,
    dns: dns::DnsServer,
    /// The runtime that serves clients, whose threads have no capabilities.
    servers: Handle,
    shadow: ShadowSwitch,
    off_file: OffFile,
    notify: Notify,
    read: reload::Read,
    reloads: mpsc::Receiver<Request>,
    reload_counts: Arc<ReloadCounts>,
    /// The configuration that is being read, and the client that waits for the outcome.
    reading: Option<(JoinHandle<Wanted>, Option<Request>)>,
    drains: DrainBook,
    drain_deadline: watch::Sender<Option<Duration>>,
    drain_requests: mpsc::Receiver<DrainRequest>,
    /// What requests name is being searched for.
    finding: JoinSet<(DrainRequest, Result<drains::FoundTarget, DrainError>)>,
    tag: watch::Sender<String>,
    edge_vips: watch::Sender<BTreeMap<String, SocketAddr>>,
    pool: watch::Sender<PoolUse>,
    attached: watch::Sender<bool>,
    tcp_access: watch::Sender<TcpAccess>,
    /// The configuration, for those who look at it.
    shown_config: watch::Sender<Config>,
    tracer: Arc<Tracer>,
    /// The addresses of the DNS server.
    dns_listen: Vec<SocketAddr>,
    /// This host's interfaces; `None` until they are read.
    network: watch::Receiver<Option<HostNetwork>>,
    /// The tasks in addition to the loop.
    tasks: Tasks,
    /// The cgroup whose processes are served.
    scope: PathBuf,
}

impl Daemon {
    /// Starts the parts.
    async fn start(config: Config, read: reload::Read, servers: Handle) -> anyhow::Result<Daemon> {
        let scope = scope(&config)?;
        catalog::check_first(&config)?;
        // Exclusive resources come first, so that a second daemon disturbs nothing.
        let admin_listeners = admin::bind(&config.admin.listen)?;
        announce_start(&config.bpffs);
        let dns_sockets = dns::bind(&config.dns).await?;
        let dns_addresses = dns_sockets.addresses().to_vec();
        let listen_tls = dns_sockets.tls_addresses().to_vec();

        let vips = recorder::load(&config.state_dir, (&config.vip).into());
        let exposed = recorder::exposure(&config.state_dir);
        let (mut vips, drains, exposed) =
            tokio::join!(vips, DrainBook::open(&config.state_dir), exposed);
        let drains = drains.context("can't start a thread")?;
        let recorder = Recorder::start(&config.state_dir).context("can't start a thread")?;
        for pool in config.vip.pools() {
            route::add_unreachable(pool).await?;
        }
        let off_file = OffFile::watch(&config).await.context("can't start a thread")?;
        let mut shadow = ShadowSwitch::new(&config, off_file.is_there());
        let is_shadow = shadow.mode(false) != Mode::Translate;
        // Nothing after this fails except for lack of threads or file descriptors: then what is attached
        // stays, as after a crash.
        let map_creator = Some("/proc/self/exe".into());
        let options = Options { is_shadow, map_creator, ..Options::of(&config, &scope) };
        let mut datapath = Datapath::start(&options)?;
        if datapath.is_shadow() && !is_shadow {
            shadow.inherit();
        }
        // A state directory that was lost takes no address from a name that the kernel knows.
        for (name, addresses) in datapath.names() {
            vips.claim(&name, &addresses);
        }
        let served = datapath.served();
        // The first table must not take away what the kernel serves before the source has answered.
        let sources = Sources::spawn(&config, datapath.in_use())?;
        let how = if datapath.is_adopted() { "took over what was attached" } else { "attached" };
        tracing::info!(cgroup = %scope.display(), pool = %config.vip.pool, "{how}");
        // Before the events are read, those of its programs among them.
        datapath.configure_edge(edge::options(&config));
        let (changes_out, changes) = mpsc::channel(ejected::MAX_CHANGES);
        forward_from_kernel(&mut datapath, sources.demand(), changes_out);
        let trace_events = datapath.take_trace_events();
        let trace_events = trace_events
            .inspect_err(|error| tracing::warn!("connections can't be traced: {error}"))
            .ok();

        let counters = datapath.counters();
        let datapath = Arc::new(SharedDatapath::new(datapath));
        tokio::task::block_in_place(|| datapath.probe_hooks());
        datapath.set_mode(shadow.mode(sources.is_off()));
        let (attached_out, attached) = watch::channel(datapath.hooks().translate);
        let (reloads_out, reloads) = mpsc::channel(MAX_REQUESTS);
        let reload_counts = Arc::<ReloadCounts>::default();
        let (drain_requests_out, drain_requests) = mpsc::channel(MAX_REQUESTS);
        let (edge_vips_out, edge_vips) = watch::channel(config.edge.vips.clone());
        let (tag_out, tag) = watch::channel(config.catalog.tag.clone());
        let (pool_out, pool) = watch::channel(vips.pool_use(SystemTime::now()));
        let mut pipeline = Pipeline::new(Builder::new(&config.vip, vips), recorder);
        pipeline.builder().set_balance(&config.balance);
        pipeline.builder().set_keep(kept_for(&config));
        pipeline.builder().set_edge_vips(config.edge.vips.clone());
        let waits = pipeline.builder().waits().clone();
        waits.lock().contacts.set_served(served);
        let table = pipeline.published();
        let demand = sources.demand().clone();
        let (dns, vip) = (&config.dns, &config.vip);
        let dns = {
            let _guard = servers.enter();
            dns::DnsServer::start(dns_sockets, dns, vip, table.clone(), attached, demand)?
        };
        let tracer = Tracer::start(
            trace_events,
            datapath.clone(),
            counters.clone(),
            pipeline.published(),
            scope.clone(),
            config.admin.trace != TraceAccess::Off,
        );
        let tracer = Arc::new(tracer.context("can't start a thread")?);
        let (problem, deadline_problem) = watch::channel(None);
        let (routes_out, public_routes) = watch::channel(edge::PublicRoutes::default());
        let n_returned = Arc::new(AtomicU64::new(0));
        let ejections_changed = Arc::<tokio::sync::Notify>::default();
        let ejected = ejected::FollowedEjections {
            changes,
            datapath: datapath.clone(),
            counters: counters.clone(),
            n_returned: n_returned.clone(),
            changed: ejections_changed.clone(),
        };
        let (config_out, shown_config) = watch::channel(config.clone());
        let view = Arc::new(DaemonView {
            debug_client: dns.debug_client(),
            dns: api::DnsStatus {
                listen: dns_addresses.clone(),
                listen_tls,
                domain: config.dns.domain.clone(),
                upstreams: Vec::new(),
            },
            dns_stats: dns.stats(),
            scope: scope.clone(),
            datapath: datapath.clone(),
            counters,
            table,
            waits,
            sources: sources.views(),
            demand: sources.demand().clone(),
            tag,
            pool,
            recorder: pipeline.recorder().clone(),
            propagation: pipeline.propagation().clone(),
            at: pipeline.at().subscribe(),
            reloads: reloads_out,
            reload_counts: Arc::clone(&reload_counts),
            drains: drains.view(),
            drain_requests: drain_requests_out,
            tracer: tracer.clone(),
            deadline_problem,
            exposed,
            waiting: admin::waiting(&admin_listeners),
            public_routes,
            edge_vips,
            n_returned,
            config: shown_config,
        });
        for address in admin::exposed(&config.admin.listen) {
            tracing::warn!(
                "admin.listen: who can reach {address} can read what `nohop status` and `nohop \
                 services` show; a firewall, or an address of 127.0.0.0/8, keeps others out"
            );
        }
        let (access_out, access) = watch::channel(tcp_access(&config));
        let mut tasks = Tasks::default();
        let at = pipeline.at().clone();
        let shown = view.clone();
        let revision =
            revision::follow(move || shown.status(), sources.views(), ejections_changed, at);
        tasks.spawn("the revision of the status", revision);
        let serve = admin::serve(admin_listeners, access, view, Handle::current());
        tasks.spawn_on("the admin interface", serve, &servers);
        let routes = keep_unreachable(config.vip.clone(), datapath.clone());
        tasks.spawn("the unreachable routes", routes);
        for address in &dns_addresses {
            tracing::info!("answering *.{} on {address}", config.dns.domain);
        }
        let (deadline_out, deadline) = watch::channel(config.balance.drain_deadline);
        let followed = deadline::Followed {
            table: pipeline.published(),
            drains: drains.subscribe(),
            deadline,
            datapath: datapath.clone(),
            problem,
        };
        tasks.spawn("the deadlines of drains", deadline::follow(followed));
        let followed = edge::FollowedEdge {
            table: pipeline.published(),
            drains: drains.subscribe(),
            datapath: datapath.clone(),
            routes: routes_out,
        };
        tasks.spawn("the routes of public VIPs", edge::follow(followed));
        tasks.spawn("the probes of ejected backends", ejected::follow(ejected));
        let (network_out, network) = watch::channel(None);
        tasks.spawn("this host's interfaces", network::follow(network_out));
        tasks.spawn("the probe of the unit names", names::probe(datapath.clone()));
        let resolver = Resolver::start(&config.dns.domain).await;
        pipeline.builder().set_hosts(resolver.hosts());
        pipeline.builder().set_drains(drains.drains());
        Ok(Daemon {
            config,
            sources,
            resolver,
            waits: pipeline.builder().waits().clone(),
            prober: BackendProber::default(),
            pipeline,
            datapath,
            dns,
            servers,
            shadow,
            off_file,
            notify: Notify::of_environment(),
            read,
            reloads,
            reload_counts,
            reading: None,
            drains,
            drain_deadline: deadline_out,
            drain_requests,
            finding: JoinSet::new(),
            tag: tag_out,
            edge_vips: edge_vips_out,
            pool: pool_out,
            attached: attached_out,
            tcp_access: access_out,
            shown_config: config_out,
            tracer,
            dns_listen: dns_addresses,
            network,
            tasks,
            scope,
        })
    }

    /// Passes each catalog through the stages, and checks the kernel side, until a signal ends it.
    async fn serve(&mut self, signals: &mut Signals) -> anyhow::Result<()> {
        let mut tick = ticks(TICK, Duration::ZERO);
        let mut verify_tick = ticks(VERIFY_TICK, VERIFY_TICK);
        let mut usage_tick = ticks(USAGE_TICK, USAGE_TICK);
        let mut retry_tick = ticks(RETRY_TICK, RETRY_TICK);
        let search_ended = self.datapath.search_ended();
        let mut listener_failed = std::pin::pin!(self.dns.listener_failed());
        loop {
            let waits_until = self.waits.lock().next_wake();
            tokio::select! {
                _ = signals.term.recv() => return Ok(()),
                _ = signals.interrupt.recv() => return Ok(()),
                event = self.sources.changed() => match event {
                    SourceEvent::Catalog => {
                        if let Some(news) = self.sources.merge().cloned() {
                            self.update(&news);
                        }
                    }
                    SourceEvent::Off => self.update_mode(),
                    SourceEvent::Ended(SupervisorExit::GaveUp) => anyhow::bail!(
                        "discovery hung again and again, so another process has to try"
                    ),
                    SourceEvent::Ended(SupervisorExit::Panicked) => {
                        anyhow::bail!("the supervisor of discovery has ended: see the log")
                    }
                },
                hosts = self.resolver.changed() => {
                    let hosts = hosts.context("the resolver of instances' names has ended: see the log")?;
                    self.pipeline.builder().set_hosts(hosts);
                    self.reapply();
                }
                (probe, result) = self.prober.ended() => self.end_waits(Some((probe, result))),
                () = sleep_until(waits_until) => self.end_waits(None),
                Some(request) = self.reloads.recv(), if self.reading.is_none() => {
                    self.read_again(Some(request));
                }
                Some(request) = self.drain_requests.recv(), if self.finding.len() < MAX_REQUESTS => {
                    self.find(request);
                }
                Some(Ok((request, found))) = self.finding.join_next() => self.drain(request, found),
                read = self.drains.read() => {
                    self.drains.adopt(read);
                    self.pipeline.builder().set_drains(self.drains.drains());
                    self.reapply();
                }
                _ = signals.hangup.recv(), if self.reading.is_none() => self.read_again(None),
                (wanted, request) = read(&mut self.reading) => {
                    let reload = self.reload(wanted).await;
                    self.notify.reloaded();
                    if let Some(request) = request {
                        // The client may have gone.
                        let _ = request.send(reload);
                    }
                }
                () = self.pipeline.publish_held() => {
                    self.announce_table();
                }
                Ok(()) = self.network.changed() => {
                    tokio::task::block_in_place(|| {
                        self.configure_names();
                        // A container may have got its interface.
                        self.configure_intercept();
                    });
                }
                () = search_ended.notified() => {
                    tokio::task::block_in_place(|| self.datapath.take_search());
                }
                () = self.off_file.changed() => {
                    self.shadow.see_file(self.off_file.is_there());
                    self.update_mode();
                }
                () = &mut listener_failed => anyhow::bail!(
                    "a part of the DNS server has panicked (see the log above; please report it), \
                     so another process has to try"
                ),
                name = self.tasks.ended() => anyhow::bail!(
                    "the task for {name} has ended (see the log above; please report it), so another \
                     process has to try"
                ),
                _ = tick.tick() => tokio::task::block_in_place(|| self.tick()),
                _ = verify_tick.tick() => {
                    let datapath = self.datapath.clone();
                    tokio::task::spawn_blocking(move || datapath.probe_hooks());
                }
                _ = usage_tick.tick() => self.report_usage(),
                _ = retry_tick.tick() => {
                    self.pipeline.builder().forget_vips(SystemTime::now());
                    if !self.pipeline.latest().rejected.is_empty() {
                        self.reapply();
                    }
                }
            }
        }
    }

    /// Leads a catalog through the stages.
    fn update(&mut self, news: &Published) {
        // The sources know by now whether connections are to be translated.
        self.shadow.source_answered();
        self.update_mode();
        let datapath = &self.datapath;
        let hostnames = tokio::task::block_in_place(|| {
            self.pipeline.update(news, |table| datapath.apply(table))
        });
        if let Some(hostnames) = hostnames {
            self.resolver.want(hostnames);
        }
        self.announce_table();
        self.begin_waits();
    }

    /// Begins what the builder has found to begin: connections to instances that aren't proven are tried.
    fn begin_waits(&mut self) {
        let now = std::time::Instant::now();
        let mut waits = self.waits.lock();
        for service in waits.keeps.begin(now) {
            tracing::warn!("{service}: all instances are critical: the last ones keep serving");
        }
        for probe in waits.contacts.begin_due(now) {
            self.prober.begin(probe);
        }
    }

    /// Takes over what probes resulted in, and what is over.
    fn end_waits(&mut self, mut ended: Option<(Probe, Result<(), String>)>) {
        let now = std::time::Instant::now();
        let mut changed = Vec::new();
        {
            let mut waits = self.waits.lock();
            // Instances that are proven together are published together.
            while let Some((probe, result)) = ended {
                changed.extend(waits.contacts.end_probe(probe, result, now));
                ended = self.prober.try_ended();
            }
            for (service, line) in waits.contacts.expire(now) {
                tracing::warn!("{service}: {line}");
                changed.push(service);
            }
            for service in waits.keeps.expire(now) {
                tracing::warn!(
                    "{service}: all instances are still critical: it refuses connections"
                );
                changed.push(service);
            }
        }
        if !changed.is_empty() {
            self.pipeline.builder().revisit(changed);
            self.reapply();
        }
        self.begin_waits();
    }

    /// Leads the last catalog through once more, since something besides it has changed just now.
    fn reapply(&mut self) {
        if let Some(last) = self.sources.merged().cloned() {
            self.update(&Published { news_at: std::time::Instant::now(), ..last });
        }
    }

    /// Has what a client names searched for.
    fn find(&mut self, request: DrainRequest) {
        let is_synced = self.pipeline.latest().is_synced();
        let (drains, catalog) = (self.drains.drains(), self.pipeline.builder().drain_catalog());
        let is_edge = self.config.edge.is_on();
        self.finding.spawn_blocking(move || {
            let DrainRequest { change, text, .. } = &request;
            let found = match drains::find_edge(text, &drains, is_edge) {
                Some(target) => Ok(drains::FoundTarget {
                    target,
                    covered: Default::default(),
                    searched: catalog,
                }),
                None => drains::find(*change, text, &drains, catalog, is_synced),
            };
            (request, found)
        });
    }

    /// Drains what a client names, or undrains it: the kernel has it first, then the disk, then the
    /// client the answer.
    fn drain(&mut self, request: DrainRequest, found: Result<drains::FoundTarget, DrainError>) {
        let DrainRequest { change, answer, .. } = request;
        let changed = found.and_then(|drains::FoundTarget { target, covered, searched }| {
            let changed = self.drains.change(change, target)?;
            if changed.is_changed {
                let drains = self.drains.drains();
                self.pipeline.builder().change_drains(drains, covered, &searched);
                self.reapply();
            }
            Ok(changed)
        });
        let (drains, table) = (self.drains.drains(), self.pipeline.latest().clone());
        let datapath = self.datapath.clone();
        let result = move || {
            let result = match changed {
                Ok(changed) => {
                    let obstacles = Obstacles::of(&datapath);
                    drains::result(change, &changed, &drains, &table, &obstacles)
                }
                Err(error) => drains::refuse(error),
            };
            drains::log(change, &result);
            result
        };
        self.drains.answer(result, answer);
    }

    /// Has the configuration read again, and the static catalog that it names where that is news,
    /// while the daemon goes on: files may take their time.
    fn read_again(&mut self, request: Option<Request>) {
        self.notify.reloading();
        let (read, running) = (self.read.clone(), self.config.catalog.clone());
        let reading = tokio::task::spawn_blocking(move || {
            let wanted = read()?;
            if wanted.catalog != running {
                catalog::check(&wanted).map_err(|error| problem(error.to_string()))?;
            }
            Ok(wanted)
        });
        self.reading = Some((reading, request));
    }

    /// Takes over what differs in the configuration that was read: all of it, or nothing.
    async fn reload(&mut self, wanted: Wanted) -> api::Reload {
        let reload = self.try_reload(wanted).await.unwrap_or_else(|refused| refused);
        reload::log(&reload);
        self.reload_counts.count(reload.ok);
        reload
    }

    async fn try_reload(&mut self, wanted: Wanted) -> Result<api::Reload, api::Reload> {
        let (config, reload) = reload::plan(&self.config, wanted)?;
        let last = std::mem::replace(&mut self.config, config);
        if (&last.catalog, &last.consul) != (&self.config.catalog, &self.config.consul) {
            self.sources.reconfigure(&self.config, self.datapath.in_use()).await;
            self.tag.send_replace(self.config.catalog.tag.clone());
        }
        self.tcp_access.send_replace(tcp_access(&self.config));
        self.shown_config.send_replace(self.config.clone());
        self.tracer.allow(self.config.admin.trace != TraceAccess::Off);
        self.drain_deadline.send_replace(self.config.balance.drain_deadline);
        if last.dns != self.config.dns {
            {
                let _guard = self.servers.enter();
                self.dns.reconfigure(&self.config.dns);
            }
            self.configure_names();
            self.configure_intercept();
        }
        self.shadow.configure(self.config.shadow);
        self.update_mode();
        if (&last.vip.ports, &last.balance) != (&self.config.vip.ports, &self.config.balance) {
            self.pipeline.builder().set_keep(kept_for(&self.config));
            self.pipeline.builder().set_ports(&self.config.vip.ports);
            self.pipeline.builder().set_balance(&self.config.balance);
            self.datapath.configure_balance(&self.config.balance);
            self.reapply();
        }
        if last.edge.vips != self.config.edge.vips {
            self.edge_vips.send_replace(self.config.edge.vips.clone());
            self.pipeline.builder().set_edge_vips(self.config.edge.vips.clone());
            self.reapply();
        }
        Ok(reload)
    }

    /// Sets the mode by all its reasons; DNS follows.
    fn update_mode(&mut self) {
        self.datapath.set_mode(self.shadow.mode(self.sources.is_off()));
        self.datapath.set_names_detached(!self.datapath.hooks().attached);
        self.attached.send_if_modified(|was| {
            let translate = self.datapath.hooks().translate;
            std::mem::replace(was, translate) != translate
        });
    }

    /// Reports to discovery which services were connected to lately, also by an address that an
    /// application has remembered for days.
    fn report_usage(&self) {
        let (datapath, demand) = (self.datapath.clone(), self.sources.demand().clone());
        // It may log a thousand lines.
        tokio::task::spawn_blocking(move || {
            datapath.active_since_last().iter().for_each(|name| demand.used(name));
        });
    }

    /// Has the kernel leave to the DNS server what only that answers, once it has a table. Returns whether it
    /// has.
    fn announce_table(&self) -> bool {
        let is_synced = self.pipeline.published().borrow().is_synced();
        self.datapath.set_names_ready(is_synced);
        is_synced
    }

    /// Sets how the kernel answers names, once this host's interfaces are known.
    fn configure_names(&mut self) {
        if let Some(network) = &*self.network.borrow_and_update() {
            let settings = names::settings(&self.config.dns, &self.dns_listen, network);
            self.datapath.configure_names(settings);
        }
    }

    /// Checks what may change at any time, and retries failures.
    fn tick(&mut self) {
        let views = self.sources.views();
        let age = table_age(views.borrow().iter().map(|source| source.health.borrow().age()));
        let is_ready = self.announce_table();
        self.datapath.heartbeat(age);
        let &CatalogConfig { expired, max_age, .. } = &self.config.catalog;
        self.datapath.set_max_age((expired == Expired::Refuse).then_some(max_age));
        self.configure_names();
        self.configure_intercept();
        if !self.datapath.check_hooks() {
            self.attached.send_replace(false);
        }
        self.update_mode();
        self.notify.alive(*self.attached.borrow() && is_ready);
        self.pool.send_replace(self.pipeline.builder().vips().pool_use(SystemTime::now()));
        self.pipeline.record();
        if self.datapath.is_behind() {
            self.datapath.apply(self.pipeline.latest());
        }
    }

    /// Follows the processes whose DNS queries are intercepted.
    fn configure_intercept(&self) {
        let (upstreams, has_default) = self.dns.debug_client().upstream_addresses();
        let settings =
            intercept::settings(&self.config.dns, &self.dns_listen, upstreams, has_default);
        self.datapath.configure_intercept(settings);
    }

    /// Takes the parts down, and the kernel side where the configuration wants that.
    async fn stop(mut self) {
        self.notify.stopping();
        // Which logs what the kernel answered, where queries are logged.
        tokio::task::block_in_place(|| self.datapath.active_since_last());
        // Before the DNS server stops reading, so that nothing is sent to it any more that it would leave unread.
        self.datapath.set_names_ready(false);
        self.datapath.stop_interception();
        let vips = tokio::time::timeout(FLUSH_TIMEOUT, self.pipeline.flush());
        let drains = tokio::time::timeout(FLUSH_TIMEOUT, self.drains.flush());
        // Clients get what is answered meanwhile.
        let (vips, drains, ..) = tokio::join!(vips, drains, self.sources.stop(), self.dns.stop());
        self.tasks.running.abort_all();
        let vips = match vips {
            Ok(flushed) => flushed.map_err(|_| "their recorder has ended".to_owned()),
            Err(_) => Err(self.pipeline.recorder().failure()),
        };
        let drains = match drains {
            Ok(flushed) => flushed.map_err(str::to_owned),
            Err(_) => Err(self.drains.failure()),
        };
        for (what, flushed) in [("VIPs", vips), ("drains", drains)] {
            if let Err(problem) = flushed {
                tracing::warn!("stopping before the {what} are recorded: {problem}");
            }
        }
        // The view may be alive in a request that is being answered, so the datapath is taken apart
        // in place.
        let scope = self.scope.display();
        match self.config.on_exit {
            OnExit::Keep => {
                tracing::info!("stopping: {scope} stays served");
                self.datapath.leave();
            }
            OnExit::Detach => {
                tracing::info!("stopping: detaching from {scope}");
                if self.config.edge.is_on() {
                    edge::withdraw().await;
                }
                self.datapath.detach();
            }
        }
    }
}

/// The age of the table: that of the oldest source. Unknown while one hasn't answered, as what the kernel
/// has of it may be an earlier daemon's.
fn table_age(mut ages: impl Iterator<Item = Option<Duration>>) -> Option<Duration> {
    let first = ages.next()?;
    ages.fold(first, |oldest, age| Some(oldest?.max(age?)))
}

/// What clients of the admin interface may do over TCP.
fn tcp_access(config: &Config) -> TcpAccess {
    let may_trace = config.admin.trace == TraceAccess::Tcp;
    TcpAccess { hosts: config.admin.hosts.clone(), may_trace }
}

/// How long services are kept whose instances are all critical; `None` for not at all.
fn kept_for(config: &Config) -> Option<Duration> {
    match config.balance.all_critical {
        AllCritical::Keep => Some(config.balance.keep_for),
        AllCritical::Refuse => None,
    }
}

/// Tasks that run as long as the daemon.
#[derive(Default)]
struct Tasks {
    running: JoinSet<()>,
    names: HashMap<Id, &'static str>,
}

impl Tasks {
    fn spawn(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.spawn_on(name, task, &Handle::current());
    }

    /// Spawns it on another runtime.
    fn spawn_on(
        &mut self,
        name: &'static str,
        task: impl Future<Output = ()> + Send + 'static,
        runtime: &Handle,
    ) {
        self.names.insert(self.running.spawn_on(task, runtime).id(), name);
    }

    /// Waits until one ends, which only a defect causes. Returns its name.
    async fn ended(&mut self) -> &'static str {
        let id = match self.running.join_next_with_id().await {
            Some(Ok((id, ()))) => id,
            Some(Err(error)) => error.id(),
            None => return std::future::pending().await,
        };
        self.names.get(&id).copied().unwrap_or_default()
    }
}

/// Puts the unreachable routes back, should something have flushed them, for as long as the daemon
/// lives.
async fn keep_unreachable(vip: VipConfig, datapath: Arc<SharedDatapath>) {
    let mut ticks = ticks(ROUTE_TICK, Duration::ZERO);
    loop {
        ticks.tick().await;
        let mut problems = Vec::new();
        for pool in vip.pools() {
            match route::add_unreachable(pool).await {
                Ok(true) => tracing::warn!("the route that keeps {pool} unreachable was gone"),
                Ok(false) => {}
                // That is one of the holes.
                Err(route::RouteError::Taken { .. }) => {}
                Err(error) => problems.push(error.to_string()),
            }
            match route::holes(pool).await {
                Ok(holes) => problems.extend(holes),
                Err(error) => problems.push(error.to_string()),
            }
        }
        datapath.set_route_problems(problems);
    }
}

/// The configuration, once it was read, and who wants to know what becomes of it; never, while none
/// is being read.
async fn read(
    reading: &mut Option<(JoinHandle<Wanted>, Option<Request>)>,
) -> (Wanted, Option<Request>) {
    let Some((task, _)) = reading else { return std::future::pending().await };
    let wanted = task
        .await
        .unwrap_or_else(|error| Err(problem(format!("reading the configuration failed: {error}"))));
    let request = reading.take().and_then(|(_, request)| request);
    (wanted, request)
}

fn problem(what: String) -> ConfigErrors {
    ConfigErrors(vec![Problem { location: None, key: None, what }])
}

/// Starts the threads that forward the programs' log and events.
fn forward_from_kernel(
    datapath: &mut Datapath,
    usage: &UsageSender,
    changes: mpsc::Sender<ejected::EjectionChange>,
) {
    let start = |name: &str, forward: Box<dyn FnOnce() + Send>| {
        let thread = std::thread::Builder::new().name(name.to_owned());
        let work = move || {
            capabilities::none();
            forward();
        };
        if let Err(error) = thread.spawn(work) {
            tracing::warn!("can't start the thread {name}: {error}");
        }
    };
    if let Some(log) = datapath.take_logger() {
        start("bpf-log", Box::new(|| forward_log(log)));
    }
    match datapath.take_reports() {
        Ok(events) => {
            let usage = usage.clone();
            start("events", Box::new(move || forward_events(events, &usage, &changes)));
        }
        Err(error) => tracing::warn!("the programs' reports can't be read: {error}"),
    }
}

/// Forwards what the programs in the kernel log, for as long as the daemon lives.
fn forward_log(mut log: EbpfLogger<&'static dyn log::Log>) {
    loop {
        let mut readable = [PollFd::new(&log, PollFlags::IN)];
        match rustix::event::poll(&mut readable, None) {
            Ok(_) => log.flush(),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return tracing::warn!("the programs' log can't be read: {error}"),
        }
    }
}

/// Reports to the source each connection to a service that it doesn't follow, and logs ejections and has
/// them probed, for as long as the daemon lives.
fn forward_events(
    mut events: Reports,
    usage: &UsageSender,
    changes: &mpsc::Sender<ejected::EjectionChange>,
) {
    loop {
        while let Some(report) = events.next_report() {
            match report {
                Report::Connected(name) => {
                    tracing::debug!("{name} is cold, and was connected to");
                    usage.used(&name);
                }
                Report::Ejection { service, backend, ejected } => {
                    let address = backend.address;
                    match ejected {
                        Some(ejected) => tracing::warn!("{service}: {address} is {ejected}"),
                        None => tracing::info!("{service}: {address} gets connections again"),
                    }
                    // A scan finds one that there is no room for.
                    let _ = changes.try_send(ejected::EjectionChange { service, backend });
                }
            }
        }
        let descriptors = events.descriptors();
        let mut readable: Vec<_> =
            descriptors.map(|ring| PollFd::from_borrowed_fd(ring, PollFlags::IN)).collect();
        match rustix::event::poll(&mut readable, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return tracing::warn!("the programs' reports can't be read: {error}"),
        }
    }
}

/// The cgroup whose processes are served.
fn scope(config: &Config) -> anyhow::Result<PathBuf> {
    let scope = match &config.cgroup {
        Some(scope) => scope.clone(),
        None => cgroup::default_scope()?,
    };
    // Before anything else is touched.
    cgroup::inspect(&scope)?;
    cgroup::check_exclusions(&config.datapath.exclude_cgroups)?;
    Ok(scope)
}

struct Signals {
    term: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Signals> {
        Ok(Signals {
            term: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_that_panics_is_named() {
        let mut tasks = Tasks::default();
        tasks.spawn("one that goes on", std::future::pending());
        tasks.spawn("one with a defect", async { panic!("a defect") });
        assert_eq!(tasks.ended().await, "one with a defect");
    }

    #[test]
    fn a_tables_age_is_known_once_each_source_has_answered() {
        let age = |seconds: &[Option<u64>]| {
            table_age(seconds.iter().map(|age| age.map(Duration::from_secs)))
        };
        assert_eq!(age(&[Some(0), Some(9), Some(3)]), Some(Duration::from_secs(9)));
        for unknown in
            [&[][..], &[None], &[None, Some(1)], &[Some(1), None], &[Some(1), None, Some(2)]]
        {
            assert_eq!(age(unknown), None, "{unknown:?}");
        }
    }
}

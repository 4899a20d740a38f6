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
mod kernel_reports;
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
mod start;
mod state_lock;
mod tasks;
mod timers;
mod trace;
mod unreachable;
pub mod view;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::runtime::Handle;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};

use crate::admin::{TcpAccess, api};
use crate::catalog::resolve::Resolver;
use crate::catalog::{Published, SourceEvent, Sources, SupervisorExit};
use crate::config::{
    AllCritical, CatalogConfig, Config, ConfigErrors, Expired, OnExit, Problem, TraceAccess,
};
use crate::datapath::SharedDatapath;
use crate::table::first_contact::Probe;
use crate::table::vips::PoolUse;
use crate::table::{DrainError, SharedWaits};
use crate::{capabilities, catalog, dns};
use drains::{DrainBook, DrainRequest, Obstacles};
use network::HostNetwork;
use notify::Notify;
use pipeline::Pipeline;
use prober::BackendProber;
use reload::{ReloadCounts, Request};
use shadow_mode::{OffFile, ShadowSwitch};
use state_lock::StateLock;
use tasks::Tasks;
use timers::{sleep_until, ticks};
use trace::Tracer;

/// How often the attachment is looked at, and what failed is tried again.
const TICK: Duration = Duration::from_secs(1);

/// How often a connection of our own proves that the hooks run.
const VERIFY_TICK: Duration = Duration::from_secs(5);

/// How often the source gets the services that were connected to.
const USAGE_TICK: Duration = Duration::from_secs(60);

/// How often names that couldn't have an address are tried again: addresses come free a day after
/// they were given up.
const RETRY_TICK: Duration = Duration::from_secs(60 * 60);

/// How long a stop waits for the VIPs and the drains to be recorded, and for the tasks to end.
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
    raise_file_limit();
    let runtime = start("nohop", capabilities::for_datapath)?;
    // Clients of DNS and of the admin interface are served without capabilities.
    let servers = start("server", capabilities::none)?;
    let result = runtime.block_on(daemon(config, read, servers.handle().clone()));
    // Blocking work in progress, such as a lookup, must not delay the exit.
    servers.shutdown_timeout(Duration::from_millis(100));
    runtime.shutdown_timeout(Duration::from_millis(200));
    result
}

/// Allows as many open files as the unit does, as far as the hard limit does: shells and container engines often start
/// a process with 1,024, which the connections of two listeners can use up.
fn raise_file_limit() {
    const WANTED: u64 = 65_536;
    let limit = getrlimit(Resource::Nofile);
    let wanted = limit.maximum.map_or(WANTED, |most| most.min(WANTED));
    if limit.current.is_some_and(|current| current < wanted) {
        let raised = Rlimit { current: Some(wanted), ..limit };
        if let Err(error) = setrlimit(Resource::Nofile, raised) {
            tracing::debug!("the limit of open files stays: {error}");
        }
    }
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
    state_lock: StateLock,
}

impl Daemon {
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
        // One that announces must not do so after the withdrawal below.
        let _ = tokio::time::timeout(FLUSH_TIMEOUT, self.tasks.stop()).await;
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
        self.state_lock.unlock();
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

//! `nohop run`: the daemon. It brings the parts up, leads each catalog to the kernel and then to the
//! readers, and takes the parts down again.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::Context;
use aya_log::EbpfLogger;
use rustix::event::{PollFd, PollFlags};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::{Instant, Interval, MissedTickBehavior};

use super::holdback::Holdback;
use super::metrics::PROPAGATION_BUCKETS;
use super::notify::Notify;
use super::reload::{self, Request};
use super::revision;
use super::shadow_mode::{OffFile, WayOut};
use super::view::DaemonView;
use crate::admin::prometheus::Histogram;
use crate::admin::{At, api};
use crate::catalog::resolve::Resolver;
use crate::catalog::{Published, UsageSender};
use crate::config::{Config, ConfigErrors, OnExit, Problem, cgroup};
use crate::datapath::{Datapath, Mode, Options, Reports, SharedDatapath, route};
use crate::ordmap::Diff;
use crate::table::book::{Book, Written};
use crate::table::vips::{PoolUse, Pools, Vips};
use crate::table::{Builder, Table};
use crate::{admin, catalog, dns};

/// How often the attachment is looked at, and what failed is tried again.
const TICK: Duration = Duration::from_secs(1);

/// How often a connection of our own proves that the hooks run.
const PROOF_TICK: Duration = Duration::from_secs(5);

/// How often the unreachable route is put back, should somebody have flushed it.
const ROUTE_TICK: Duration = Duration::from_secs(10);

/// How often the source is told which services were connected to.
const USAGE_TICK: Duration = Duration::from_secs(60);

/// How often names that couldn't have an address are tried again: addresses come free a day after
/// they were given up.
const REJECTED_TICK: Duration = Duration::from_secs(60 * 60);

/// How long the start waits for the book of VIPs to be read.
const BOOK_PATIENCE: Duration = Duration::from_secs(2);

/// How long a stop waits for the book of VIPs to be written.
const LAST_WRITE: Duration = Duration::from_millis(200);

/// The reloads that may wait for their turn.
const MAX_RELOADS: usize = 8;

/// The services that the log names when one table changes that many at most; a first table may
/// change all of them.
const MAX_NAMED: usize = 100;

/// Runs the daemon until SIGTERM or SIGINT; `read` reads its configuration again.
///
/// # Errors
/// When a part can't start; then nothing is left attached.
pub fn run(config: Config, read: reload::Read) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("can't start the runtime")?;
    let result = runtime.block_on(daemon(config, read));
    // Blocking work that is under way, such as a lookup, must not hold the exit up.
    runtime.shutdown_timeout(Duration::from_millis(200));
    result
}

async fn daemon(config: Config, read: reload::Read) -> anyhow::Result<()> {
    let mut signals = Signals::new().context("can't listen for signals")?;
    let mut daemon = Daemon::start(config, read).await?;
    let outcome = daemon.serve(&mut signals).await;
    daemon.stop().await;
    outcome
}

/// What was read for a reload.
type Wanted = Result<Config, ConfigErrors>;

/// The parts, and what leads from one to the next.
struct Daemon {
    config: Config,
    read: reload::Read,
    reloads: mpsc::Receiver<Request>,
    scope: PathBuf,
    source: catalog::Handle,
    resolver: Resolver,
    tag: watch::Sender<String>,
    builder: Builder,
    book: Arc<Mutex<Book>>,
    written: watch::Receiver<Written>,
    /// The last table that was built; DNS may lack it for a moment.
    latest: Arc<Table>,
    holdback: Holdback,
    pool: watch::Sender<PoolUse>,
    propagation: Arc<Mutex<Histogram>>,
    datapath: Arc<SharedDatapath>,
    way_out: WayOut,
    off_file: OffFile,
    /// The configuration that is being read, and who wants to know what becomes of it.
    reading: Option<(JoinHandle<Wanted>, Option<Request>)>,
    table: watch::Sender<Arc<Table>>,
    attached: watch::Sender<bool>,
    at: Arc<watch::Sender<At>>,
    hosts: watch::Sender<Vec<String>>,
    dns: dns::DnsServer,
    admin: AbortHandle,
    revision: AbortHandle,
    notify: Notify,
}

impl Daemon {
    /// Brings the parts up.
    async fn start(config: Config, read: reload::Read) -> anyhow::Result<Daemon> {
        let scope = scope(&config)?;
        catalog::check_first(&config)?;
        // What another daemon may hold comes first, so that a second one disturbs nothing.
        let admin_listeners = admin::bind(&config.admin.listen)?;
        let dns_sockets = dns::bind(&config.dns).await?;
        let dns_addresses = dns_sockets.addresses().to_vec();

        let vips_path = config.state_dir.join("vips.json");
        let mut vips = read_book(&vips_path, (&config.vip).into()).await;
        let book = Book::start(&vips_path).context("can't start a thread")?;
        for pool in config.vip.pools() {
            route::add_unreachable(pool).await?;
        }
        let off_file = OffFile::watch(&config).await.context("can't start a thread")?;
        let mut way_out = WayOut::new(&config, off_file.is_there());
        let is_shadow = way_out.mode(false) != Mode::Translate;
        // Nothing after this fails, but for want of threads or file descriptors: then what is attached
        // stays, as after a crash.
        let map_creator = Some("/proc/self/exe".into());
        let options = Options { is_shadow, map_creator, ..Options::of(&config, &scope) };
        let mut datapath = Datapath::start(&options)?;
        if datapath.is_shadow() && !is_shadow {
            way_out.inherit();
        }
        // A state directory that was lost takes no address from a name that the kernel knows.
        for (name, addresses) in datapath.names() {
            vips.claim(&name, &addresses);
        }
        // The first table must not take away what the kernel serves, for want of having asked.
        let mut source = catalog::spawn(&config, datapath.in_use())?;
        let how = if datapath.is_adopted() { "took over what was attached" } else { "attached" };
        tracing::info!(cgroup = %scope.display(), pool = %config.vip.pool, "{how}");
        if let Some(voice) = datapath.take_voice() {
            std::thread::spawn(|| listen(voice));
        }
        match datapath.take_reports() {
            Ok(reports) => {
                let demand = source.demand.clone();
                drop(std::thread::spawn(move || heed(reports, &demand)));
            }
            Err(error) => tracing::warn!("the programs' reports can't be read: {error}"),
        }

        let (table_out, table) = watch::channel(Arc::new(Table::default()));
        let (attached_out, attached) = watch::channel(true);
        let (at_out, at) = watch::channel(At::start());
        let counters = datapath.counters();
        let datapath = Arc::new(SharedDatapath::new(datapath));
        tokio::task::block_in_place(|| datapath.prove());
        datapath.set_mode(way_out.mode(*source.off.borrow()));
        attached_out.send_replace(datapath.hooks().translate);
        let (reloads_out, reloads) = mpsc::channel(MAX_RELOADS);
        let (tag_out, tag) = watch::channel(config.catalog.tag.clone());
        let (pool_out, pool) = watch::channel(vips.pool_use(SystemTime::now()));
        let written = book.written();
        let book = Arc::new(Mutex::new(book));
        let propagation = Arc::new(Mutex::new(Histogram::new(&PROPAGATION_BUCKETS)));
        let demand = source.demand.clone();
        let (dns, vip) = (&config.dns, &config.vip);
        let dns = dns::DnsServer::start(dns_sockets, dns, vip, table.clone(), attached, demand)?;
        let view = DaemonView {
            debug_client: dns.debug_client(),
            dns: api::DnsStatus {
                listen: dns_addresses.clone(),
                domain: config.dns.domain.clone(),
                upstreams: Vec::new(),
            },
            dns_stats: dns.stats(),
            scope: scope.clone(),
            datapath: datapath.clone(),
            counters,
            table,
            health: source.health.clone(),
            stats: source.stats.clone(),
            tag,
            pool,
            book: book.clone(),
            propagation: propagation.clone(),
            at,
            reloads: reloads_out,
        };
        for address in admin::exposed(&config.admin.listen) {
            tracing::warn!(
                "admin.listen: who can reach {address} can read what `nohop status` and `nohop \
                 services` show; a firewall, or an address of 127.0.0.0/8, keeps others out"
            );
        }
        let (view, at) = (Arc::new(view), Arc::new(at_out));
        let revision = tokio::spawn(revision::follow(view.clone(), at.clone())).abort_handle();
        let (hosts_out, hosts) = watch::channel(config.admin.hosts.clone());
        let admin = tokio::spawn(admin::serve(admin_listeners, hosts, view)).abort_handle();
        for address in dns_addresses {
            tracing::info!("answering *.{} on {address}", config.dns.domain);
        }
        let mut builder = Builder::new(&config.vip, vips);
        let resolver = Resolver::start(&config.dns.domain).await;
        builder.set_hosts(resolver.hosts());
        // A static catalog is there before anybody could have waited for it.
        source.catalog.mark_changed();
        Ok(Daemon {
            config,
            read,
            reloads,
            scope,
            source,
            resolver,
            tag: tag_out,
            builder,
            book,
            written,
            latest: Arc::default(),
            holdback: Holdback::default(),
            pool: pool_out,
            propagation,
            datapath,
            way_out,
            off_file,
            reading: None,
            table: table_out,
            attached: attached_out,
            at,
            hosts: hosts_out,
            dns,
            admin,
            revision,
            notify: Notify::of_environment(),
        })
    }

    /// Leads each catalog to the kernel and then to the readers, and looks after the kernel side,
    /// until it is told to stop.
    async fn serve(&mut self, signals: &mut Signals) -> anyhow::Result<()> {
        let mut tick = ticks(TICK, Duration::ZERO);
        let mut proof_tick = ticks(PROOF_TICK, PROOF_TICK);
        let mut route_tick = ticks(ROUTE_TICK, Duration::ZERO);
        let mut usage_tick = ticks(USAGE_TICK, USAGE_TICK);
        let mut rejected_tick = ticks(REJECTED_TICK, REJECTED_TICK);
        let mut deaf = std::pin::pin!(self.dns.listener_failed());
        loop {
            tokio::select! {
                _ = signals.term.recv() => return Ok(()),
                _ = signals.interrupt.recv() => return Ok(()),
                changed = self.source.catalog.changed() => {
                    changed.context("discovery has ended, which it never should")?;
                    let edition = self.source.catalog.borrow_and_update().clone();
                    if let Some(edition) = edition {
                        tokio::task::block_in_place(|| self.take(&edition));
                    }
                }
                hosts = self.resolver.changed() => {
                    let hosts = hosts.context("nobody looks names up any more: see the log")?;
                    self.builder.set_hosts(hosts);
                    tokio::task::block_in_place(|| self.take_again());
                }
                Some(request) = self.reloads.recv(), if self.reading.is_none() => {
                    self.read_again(Some(request));
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
                Ok(()) = self.written.changed() => {
                    let edition = self.written.borrow_and_update().edition;
                    let table = self.holdback.acknowledge(edition);
                    self.publish(table);
                }
                () = until(self.holdback.due()) => {
                    let table = self.holdback.expire(std::time::Instant::now());
                    self.publish(table);
                }
                () = self.off_file.changed() => {
                    self.way_out.see_file(self.off_file.is_there());
                    self.decide_mode();
                }
                Ok(()) = self.source.off.changed() => self.decide_mode(),
                Ok(()) = self.source.gave_up.changed() => {
                    anyhow::bail!("discovery hung again and again, so another process has to try")
                }
                () = self.source.supervisor.join() => {
                    anyhow::bail!("nobody looks after discovery any more: see the log")
                }
                () = &mut deaf => anyhow::bail!(
                    "a part of the DNS server has panicked (see the log above; please report it), \
                     so another process has to try"
                ),
                _ = tick.tick() => tokio::task::block_in_place(|| self.look_after()),
                _ = proof_tick.tick() => {
                    let datapath = self.datapath.clone();
                    tokio::task::spawn_blocking(move || datapath.prove());
                }
                _ = route_tick.tick() => self.keep_unreachable().await,
                _ = usage_tick.tick() => self.tell_usage(),
                _ = rejected_tick.tick() => {
                    self.builder.forget_vips(SystemTime::now());
                    if !self.table.borrow().rejected.is_empty() {
                        tokio::task::block_in_place(|| self.take_again());
                    }
                }
            }
        }
    }

    /// Leads a catalog to the kernel, and then to the readers: the kernel knows a name before DNS
    /// answers it, and so does the file of the book of VIPs, as far as its disk is fast enough (see
    /// [`Holdback`]). Nothing here waits for a disk.
    fn take(&mut self, edition: &Published) {
        // It has said by now whether anything is to be translated.
        self.way_out.hear();
        self.decide_mode();
        let last = self.latest.clone();
        let Some(next) = self.builder.next(&last, &edition.catalog, SystemTime::now()) else {
            return;
        };
        if let Some(hostnames) = next.hostnames {
            self.resolver.want(hostnames);
        }
        self.datapath.apply(&next.table);
        let took = edition.news_at.elapsed().as_secs_f64();
        lock(&self.propagation).observe(took);
        if next.vips_given {
            self.keep_book();
        }
        log_change(&last, &next.table);
        self.latest = next.table.clone();
        let (given, written) = (self.builder.vips().given(), self.written.borrow().edition);
        let now = std::time::Instant::now();
        let table = self.holdback.offer(next.table, given, written, now);
        self.publish(table);
    }

    /// Has DNS and the admin interface go by a table.
    fn publish(&self, table: Option<Arc<Table>>) {
        if let Some(table) = table {
            let generation = table.generation;
            self.table.send_replace(table);
            self.at.send_modify(|at| *at = At { generation, revision: at.revision + 1 });
        }
    }

    /// Leads the last catalog through once more, since something beside it has changed just now.
    fn take_again(&mut self) {
        let edition = self.source.catalog.borrow().clone();
        if let Some(edition) = edition {
            self.take(&Published { news_at: std::time::Instant::now(), ..edition });
        }
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
        reload
    }

    async fn try_reload(&mut self, wanted: Wanted) -> Result<api::Reload, api::Reload> {
        let (config, reload) = reload::plan(&self.config, wanted)?;
        let last = std::mem::replace(&mut self.config, config);
        if (&last.catalog, &last.consul) != (&self.config.catalog, &self.config.consul) {
            self.source.reconfigure(&self.config, self.datapath.in_use()).await;
            self.tag.send_replace(self.config.catalog.tag.clone());
        }
        self.hosts.send_replace(self.config.admin.hosts.clone());
        if last.dns != self.config.dns {
            self.dns.reconfigure(&self.config.dns);
        }
        self.way_out.configure(self.config.shadow);
        self.decide_mode();
        if last.vip.ports != self.config.vip.ports {
            self.builder.set_ports(&self.config.vip.ports);
            tokio::task::block_in_place(|| self.take_again());
        }
        Ok(reload)
    }

    /// Has connections translated or only counted, by all that can say so; DNS follows.
    fn decide_mode(&mut self) {
        let is_source_off = *self.source.off.borrow_and_update();
        self.datapath.set_mode(self.way_out.mode(is_source_off));
        self.attached.send_if_modified(|was| {
            let translate = self.datapath.hooks().translate;
            std::mem::replace(was, translate) != translate
        });
    }

    /// Tells the source which services were connected to lately, also by an address that an application
    /// has remembered for days.
    fn tell_usage(&self) {
        for name in self.datapath.active_since_last() {
            self.source.demand.used(&name);
        }
    }

    /// Sees to what has to be seen to all the time, and tries again what failed.
    fn look_after(&mut self) {
        let age = self.source.health.borrow().last_answer.map(|at| at.elapsed());
        self.datapath.beat(age);
        if !self.datapath.look_after() {
            self.attached.send_replace(false);
        }
        self.decide_mode();
        self.notify.alive(self.attached_and_synced());
        self.pool.send_replace(self.builder.vips().pool_use(SystemTime::now()));
        self.keep_book();
        if self.datapath.is_behind() {
            self.datapath.apply(&self.latest);
        }
    }

    /// Whether names are answered, for systemd.
    fn attached_and_synced(&self) -> bool {
        *self.attached.borrow() && self.table.borrow().is_synced()
    }

    /// Puts the unreachable routes back, should somebody have flushed them.
    async fn keep_unreachable(&self) {
        let mut problems = Vec::new();
        for pool in self.config.vip.pools() {
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
        self.datapath.set_route_problems(problems);
    }

    /// Has the book of VIPs written where its file lacks something.
    fn keep_book(&self) {
        let vips = self.builder.vips();
        let mut book = lock(&self.book);
        if book.lacks(vips.edition()) {
            book.submit(vips.page());
        }
    }

    /// Takes the parts down, and the kernel side where the configuration wants that.
    async fn stop(mut self) {
        self.notify.stopping();
        self.admin.abort();
        self.revision.abort();
        self.keep_book();
        let edition = self.builder.vips().edition();
        let is_written = self.written.wait_for(|written| written.edition >= edition);
        let written = tokio::time::timeout(LAST_WRITE, is_written);
        let (written, ..) = tokio::join!(written, self.source.stop(), self.dns.stop());
        if written.is_err() {
            tracing::warn!("stopping before the book of VIPs is written: its disk doesn't answer");
        }
        // The view may be alive in a request that is being answered, so the datapath is taken apart
        // in place.
        let scope = self.scope.display();
        match self.config.on_exit {
            OnExit::Keep => {
                tracing::info!("stopping: {scope} goes on being served");
                self.datapath.keep();
            }
            OnExit::Detach => {
                tracing::info!("stopping: detaching from {scope}");
                self.datapath.detach();
            }
        }
    }
}

/// The book that an earlier run wrote. Where it can't be read, or the disk doesn't answer, the daemon
/// starts all the same: the kernel's maps know the addresses that are in use, and names that need one
/// find most again by their hash.
async fn read_book(path: &Path, pools: Pools) -> Vips {
    let file = path.to_owned();
    let reading = tokio::task::spawn_blocking(move || Vips::read(&file, pools));
    let problem = match tokio::time::timeout(BOOK_PATIENCE, reading).await {
        Ok(Ok(Ok(vips))) => return vips,
        Ok(Ok(Err(error))) => error.to_string(),
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("can't read {}: the disk doesn't answer", path.display()),
    };
    tracing::error!("{problem}; names that the kernel doesn't know may get other addresses");
    Vips::unwritten(pools)
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

/// Waits until a moment; for ever without one.
async fn until(moment: Option<std::time::Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment.into()).await,
        None => std::future::pending().await,
    }
}

/// A panic while it was locked leaves what is in it consistent.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ticks from `after` on; one that comes late delays those that follow.
fn ticks(period: Duration, after: Duration) -> Interval {
    let mut ticks = tokio::time::interval_at(Instant::now() + after, period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

/// Passes on to the log what the programs in the kernel have to say, for as long as the daemon lives.
fn listen(mut voice: EbpfLogger<&'static dyn log::Log>) {
    loop {
        let mut readable = [PollFd::new(&voice, PollFlags::IN)];
        match rustix::event::poll(&mut readable, None) {
            Ok(_) => voice.flush(),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return tracing::warn!("the programs' log can't be read: {error}"),
        }
    }
}

/// Tells the source of each connection of a service that it doesn't follow, for as long as the daemon
/// lives.
fn heed(mut reports: Reports, demand: &UsageSender) {
    loop {
        while let Some(name) = reports.next_name() {
            tracing::debug!("{name} is cold, and was connected to");
            demand.used(&name);
        }
        match rustix::event::poll(&mut [PollFd::new(&reports, PollFlags::IN)], None) {
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

fn log_change(last: &Table, next: &Table) {
    let Diff { changed, gone } = last.services.diff(&next.services);
    let is_much = changed.len() + gone.len() > MAX_NAMED;
    if is_much {
        let (n_changed, n_gone) = (changed.len(), gone.len());
        tracing::info!(n_changed, n_gone, "{} services; debug names them", next.services.len());
    }
    for (name, service) in changed {
        let (n_backends, n_unfit) = (service.healthy().count(), service.excluded.len());
        if is_much {
            tracing::debug!(vip = %service.vip, n_backends, n_unfit, "{name}");
        } else {
            tracing::info!(vip = %service.vip, n_backends, n_unfit, "{name}");
        }
        let before = last.services.get(name);
        for note in &service.notes {
            if !before.is_some_and(|before| before.notes.contains(note)) {
                tracing::warn!("{name}: {note}");
            }
        }
    }
    for (name, _) in gone {
        if is_much {
            tracing::debug!("{name} is gone");
        } else {
            tracing::info!("{name} is gone");
        }
    }
    let rejected = last.rejected.diff(&next.rejected).changed;
    for (name, reason) in rejected.iter().take(MAX_NAMED) {
        tracing::warn!("{name}: {reason}");
    }
    if rejected.len() > MAX_NAMED {
        let n_more = rejected.len() - MAX_NAMED;
        tracing::warn!("{n_more} more names can't be had: `nohop explain NAME` says why");
    }
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

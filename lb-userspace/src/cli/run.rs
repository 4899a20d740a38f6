//! `nohop run`: the daemon. It brings the parts up, leads each catalog to the kernel and then to the
//! readers, and takes the parts down again.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use aya_log::EbpfLogger;
use rustix::event::{PollFd, PollFlags};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::{Instant, Interval, MissedTickBehavior};

use super::view::DaemonView;
use crate::catalog::Edition;
use crate::config::{Config, OnExit, cgroup};
use crate::plane::{Options, Plane, SharedPlane, route};
use crate::table::{Builder, Table, vips::Vips};
use crate::{admin, catalog, dns};

/// How often the attachment is looked at, and what failed is tried again.
const TICK: Duration = Duration::from_secs(1);

/// How often a dial of our own proves that the hooks run.
const PROOF_TICK: Duration = Duration::from_secs(5);

/// How often the unreachable route is put back, should somebody have flushed it.
const ROUTE_TICK: Duration = Duration::from_secs(10);

/// Runs the daemon until SIGTERM or SIGINT.
///
/// # Errors
/// When a part can't start; then nothing is left attached.
pub fn run(config: Config) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("can't start the runtime")?;
    let result = runtime.block_on(daemon(config));
    // Blocking work that is under way, such as a lookup, must not hold the exit up.
    runtime.shutdown_timeout(Duration::from_millis(200));
    result
}

async fn daemon(config: Config) -> anyhow::Result<()> {
    let mut stop = StopSignals::new().context("can't listen for signals")?;
    let mut daemon = Daemon::start(config).await?;
    let outcome = daemon.serve(&mut stop).await;
    daemon.stop().await;
    outcome
}

/// The parts, and what leads from one to the next.
struct Daemon {
    config: Config,
    scope: PathBuf,
    source: catalog::Handle,
    builder: Builder,
    vips_path: PathBuf,
    /// Whether the book of VIPs has to be written again.
    vips_unwritten: bool,
    plane: Arc<SharedPlane>,
    table: watch::Sender<Arc<Table>>,
    attached: watch::Sender<bool>,
    generation: watch::Sender<u64>,
    dns: dns::Server,
    admin: AbortHandle,
}

impl Daemon {
    /// Brings the parts up.
    async fn start(config: Config) -> anyhow::Result<Daemon> {
        let scope = scope(&config)?;
        catalog::check(&config)?;
        // What another daemon may hold comes first, so that a second one disturbs nothing.
        let admin_listeners = admin::bind(&config.admin.listen)?;
        let dns_sockets = dns::bind(&config.dns).await?;
        let dns_addresses = dns_sockets.addresses().to_vec();

        let vips_path = config.state_dir.join("vips.json");
        let mut vips = Vips::read(&vips_path, (&config.vip).into())?;
        vips.write(&vips_path)?;
        for pool in config.vip.pools() {
            route::add_unreachable(pool).await?;
        }
        // Nothing after this fails.
        let mut plane = Plane::start(&Options::of(&config, &scope))?;
        // A state directory that was lost takes no address from a name that the kernel knows.
        let mut in_use = Vec::new();
        for (name, addresses) in plane.names() {
            vips.claim(&name, &addresses);
            if plane.indices(&name).is_some_and(|indices| !indices.backends.is_empty()) {
                in_use.push(name);
            }
        }
        // The first table must not take away what the kernel serves, for want of having asked.
        let mut source = catalog::spawn(&config, in_use)?;
        let how = if plane.is_adopted() { "took over what was attached" } else { "attached" };
        tracing::info!(cgroup = %scope.display(), pool = %config.vip.pool, "{how}");
        if let Some(voice) = plane.take_voice() {
            std::thread::spawn(|| listen(voice));
        }

        let (table_out, table) = watch::channel(Arc::new(Table::default()));
        let (attached_out, attached) = watch::channel(true);
        let (generation_out, generation) = watch::channel(0);
        let counters = plane.counters();
        let plane = Arc::new(SharedPlane::new(plane));
        tokio::task::block_in_place(|| plane.prove());
        attached_out.send_replace(plane.hooks().attached);
        let view = DaemonView {
            dns: admin::api::DnsStatus {
                listen: dns_addresses.clone(),
                domain: config.dns.domain.clone(),
            },
            tag: config.catalog.tag.clone(),
            scope: scope.clone(),
            plane: plane.clone(),
            counters,
            table: table.clone(),
            health: source.health.clone(),
            generation,
        };
        let demand = source.demand.clone();
        let dns = dns::Server::start(dns_sockets, &config.dns, table, attached, demand);
        let admin = tokio::spawn(admin::serve(admin_listeners, Arc::new(view))).abort_handle();
        for address in dns_addresses {
            tracing::info!("answering *.{} on {address}", config.dns.domain);
        }
        let builder = Builder::new(&config.vip, vips);
        // A static catalog is there before anybody could have waited for it.
        source.catalog.mark_changed();
        Ok(Daemon {
            config,
            scope,
            source,
            builder,
            vips_path,
            vips_unwritten: true,
            plane,
            table: table_out,
            attached: attached_out,
            generation: generation_out,
            dns,
            admin,
        })
    }

    /// Leads each catalog to the kernel and then to the readers, and looks after the kernel side,
    /// until it is told to stop.
    async fn serve(&mut self, stop: &mut StopSignals) -> anyhow::Result<()> {
        let mut tick = ticks(TICK, Duration::ZERO);
        let mut proof_tick = ticks(PROOF_TICK, PROOF_TICK);
        let mut route_tick = ticks(ROUTE_TICK, Duration::ZERO);
        loop {
            tokio::select! {
                () = stop.recv() => return Ok(()),
                changed = self.source.catalog.changed() => {
                    changed.context("discovery has ended, which it never should")?;
                    let edition = self.source.catalog.borrow_and_update().clone();
                    if let Some(edition) = edition {
                        tokio::task::block_in_place(|| self.take(&edition));
                    }
                }
                Ok(()) = self.source.hopeless.changed() => {
                    anyhow::bail!("discovery hung again and again, so another process has to try")
                }
                _ = tick.tick() => tokio::task::block_in_place(|| self.look_after()),
                _ = proof_tick.tick() => {
                    let plane = self.plane.clone();
                    tokio::task::spawn_blocking(move || plane.prove());
                }
                _ = route_tick.tick() => self.keep_unreachable().await,
            }
        }
    }

    /// Leads a catalog to the kernel and then to the readers: the kernel knows a name before DNS
    /// tells it to anybody.
    fn take(&mut self, edition: &Edition) {
        let last = self.table.borrow().clone();
        let Some(next) = self.builder.next(&last, &edition.catalog, SystemTime::now()) else {
            return;
        };
        if next.vips_changed {
            self.write_vips();
        }
        self.plane.apply(&next.table);
        log_change(&last, &next.table);
        let generation = next.table.generation;
        self.table.send_replace(next.table);
        self.generation.send_replace(generation);
    }

    /// Sees to what has to be seen to all the time, and tries again what failed.
    fn look_after(&mut self) {
        let age = self.source.health.borrow().last_answer.map(|at| at.elapsed());
        self.plane.beat(age);
        if !self.plane.look_after() {
            self.attached.send_replace(false);
        }
        self.attached.send_if_modified(|was| {
            let attached = self.plane.hooks().attached;
            std::mem::replace(was, attached) != attached
        });
        if self.vips_unwritten {
            self.write_vips();
        }
        if self.plane.is_behind() {
            let last = self.table.borrow().clone();
            self.plane.apply(&last);
        }
    }

    /// Puts the unreachable routes back, should somebody have flushed them.
    async fn keep_unreachable(&self) {
        for pool in self.config.vip.pools() {
            match route::add_unreachable(pool).await {
                Ok(true) => tracing::warn!("the route that keeps {pool} unreachable was gone"),
                Ok(false) => {}
                Err(error) => tracing::error!("{error}"),
            }
        }
    }

    /// Writes the book of VIPs.
    fn write_vips(&mut self) {
        let written = self.builder.vips().write(&self.vips_path);
        if let Err(error) = &written {
            tracing::error!("{error}; until it is mended, a restart may change addresses");
        }
        self.vips_unwritten = written.is_err();
    }

    /// Takes the parts down, and the kernel side where the configuration wants that.
    async fn stop(self) {
        self.admin.abort();
        drop(self.source);
        self.dns.stop().await;
        // The view may be alive in a request that is being answered, so the plane is taken apart
        // in place.
        let scope = self.scope.display();
        match self.config.on_exit {
            OnExit::Keep => {
                tracing::info!("stopping: {scope} goes on being served");
                self.plane.keep();
            }
            OnExit::Detach => {
                tracing::info!("stopping: detaching from {scope}");
                self.plane.detach();
            }
        }
    }
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

/// The cgroup whose processes are served.
fn scope(config: &Config) -> anyhow::Result<PathBuf> {
    match &config.cgroup {
        Some(scope) => Ok(scope.clone()),
        None => cgroup::find_cgroup2_root().context(
            "no cgroup v2 hierarchy is mounted: mount one with `mount -t cgroup2 none \
             /sys/fs/cgroup/unified`, or name a directory of one with --cgroup",
        ),
    }
}

fn log_change(last: &Table, next: &Table) {
    for (name, service) in &next.services {
        let before = last.services.get(name);
        if !before.is_some_and(|before| Arc::ptr_eq(before, service)) {
            let (n_backends, n_unfit) = (service.healthy().count(), service.excluded.len());
            tracing::info!(vip = %service.vip, n_backends, n_unfit, "{name}");
        }
        for note in &service.notes {
            if !before.is_some_and(|before| before.notes.contains(note)) {
                tracing::warn!("{name}: {note}");
            }
        }
    }
    for name in last.services.keys().filter(|name| !next.services.contains_key(*name)) {
        tracing::info!("{name} is gone");
    }
    for (name, reason) in &next.rejected {
        if last.rejected.get(name) != Some(reason) {
            tracing::warn!("{name}: {reason}");
        }
    }
}

struct StopSignals {
    term: Signal,
    interrupt: Signal,
}

impl StopSignals {
    fn new() -> std::io::Result<StopSignals> {
        Ok(StopSignals {
            term: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn recv(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

//! `nohop run`: the daemon. It brings the parts up, leads each catalog to the kernel and then to the
//! readers, and takes the parts down again.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use aya_log::EbpfLogger;
use rustix::event::{PollFd, PollFlags};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::time::Instant;

use super::view::DaemonView;
use crate::catalog::Catalog;
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
    let scope = scope(&config)?;
    let mut source = catalog::spawn(&config)?;
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
    for (name, addresses) in plane.names() {
        vips.claim(&name, &addresses);
    }
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
    let dns_server = dns::Server::start(dns_sockets, &config.dns, table, attached);
    let admin_server = tokio::spawn(admin::serve(admin_listeners, Arc::new(view)));
    for address in dns_addresses {
        tracing::info!("answering *.{} on {address}", config.dns.domain);
    }

    let mut builder = Builder::new(&config.vip, vips);
    // A static catalog is there before anybody could have waited for it.
    source.catalog.mark_changed();
    let mut vips_unwritten = true;
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut proof_tick = tokio::time::interval_at(Instant::now() + PROOF_TICK, PROOF_TICK);
    proof_tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut route_tick = tokio::time::interval(ROUTE_TICK);
    route_tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let outcome = loop {
        let catalog: Option<Arc<Catalog>> = tokio::select! {
            () = stop.recv() => break Ok(()),
            changed = source.catalog.changed() => {
                if let Err(error) = changed {
                    break Err(error).context("discovery has ended, which it never should");
                }
                source.catalog.borrow_and_update().clone()
            }
            _ = tick.tick() => {
                let age = source.health.borrow().last_answer.map(|at| at.elapsed());
                tokio::task::block_in_place(|| {
                    plane.beat(age);
                    if !plane.look_after() {
                        attached_out.send_replace(false);
                    }
                });
                attached_out.send_if_modified(|was| {
                    let attached = plane.hooks().attached;
                    std::mem::replace(was, attached) != attached
                });
                if vips_unwritten {
                    vips_unwritten = tokio::task::block_in_place(|| !write(&builder, &vips_path));
                }
                if plane.is_behind() {
                    let last = table_out.borrow().clone();
                    tokio::task::block_in_place(|| plane.apply(&last));
                }
                None
            }
            _ = proof_tick.tick() => {
                let plane = plane.clone();
                tokio::task::spawn_blocking(move || plane.prove());
                None
            }
            _ = route_tick.tick() => {
                for pool in config.vip.pools() {
                    match route::add_unreachable(pool).await {
                        Ok(true) => tracing::warn!("the route that keeps {pool} unreachable was gone"),
                        Ok(false) => {}
                        Err(error) => tracing::error!("{error}"),
                    }
                }
                None
            }
        };
        let Some(catalog) = catalog else { continue };
        let last = table_out.borrow().clone();
        let Some(next) = builder.next(&last, &catalog, SystemTime::now()) else { continue };
        tokio::task::block_in_place(|| {
            if next.vips_changed {
                vips_unwritten = !write(&builder, &vips_path);
            }
            plane.apply(&next.table);
        });
        log_change(&last, &next.table);
        // The kernel knows a name before DNS tells it to anybody.
        let generation = next.table.generation;
        table_out.send_replace(next.table);
        generation_out.send_replace(generation);
    };

    admin_server.abort();
    drop(source);
    dns_server.stop().await;
    // The view may be alive in a request that is being answered, so the plane is taken apart in
    // place.
    match config.on_exit {
        OnExit::Keep => {
            tracing::info!("stopping: {} goes on being served", scope.display());
            plane.keep();
        }
        OnExit::Detach => {
            tracing::info!("stopping: detaching from {}", scope.display());
            plane.detach();
        }
    }
    outcome
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

/// Writes the book of VIPs; returns whether that worked.
fn write(builder: &Builder, path: &Path) -> bool {
    let written = builder.vips().write(path);
    if let Err(error) = &written {
        tracing::error!("{error}; until it is mended, a restart may change addresses");
    }
    written.is_ok()
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

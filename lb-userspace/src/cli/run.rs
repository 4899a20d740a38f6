//! `nohop run`: the daemon. It brings the parts up, leads each catalog to the kernel and then to the
//! readers, and takes the parts down again.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use super::view::DaemonView;
use crate::catalog::Catalog;
use crate::config::{Config, cgroup};
use crate::plane::{Plane, SharedPlane, netns_cookie, route};
use crate::table::{Builder, Table, vips::Vips};
use crate::{admin, catalog, dns};

/// How often the attachment is looked at, and what failed is tried again.
const TICK: Duration = Duration::from_secs(1);

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
    let vips = Vips::read(&vips_path, (&config.vip).into())?;
    vips.write(&vips_path)?;
    let host_netns = netns_cookie().unwrap_or_else(|error| {
        tracing::warn!(
            "this kernel doesn't tell the network namespace's cookie ({error}): pins and backends \
             on this host's loopback don't count; they need kernel 5.14"
        );
        0
    });
    let mut plane = Plane::load(&config.plane, &config.vip, host_netns)?;
    route::add_unreachable(config.vip.pool).await?;
    plane.attach(&scope)?;
    let attachment = plane.attachment();
    tracing::info!(cgroup = %scope.display(), pool = %config.vip.pool, "attached");

    let (table_out, table) = watch::channel(Arc::new(Table::default()));
    let (attached_out, attached) = watch::channel(attachment.holds());
    let (generation_out, generation) = watch::channel(0);
    let counters = plane.counters();
    let plane = Arc::new(SharedPlane::new(plane));
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
        attached: attached.clone(),
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
    let mut vips_unwritten = false;
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut route_tick = tokio::time::interval(ROUTE_TICK);
    route_tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let catalog: Option<Arc<Catalog>> = tokio::select! {
            () = stop.recv() => break,
            changed = source.catalog.changed() => {
                changed.context("discovery has ended, which it never should")?;
                source.catalog.borrow_and_update().clone()
            }
            _ = tick.tick() => {
                let holds = attachment.holds();
                if attached_out.send_if_modified(|was| std::mem::replace(was, holds) != holds) {
                    tracing::warn!(attached = holds, "the attachment to {} changed", scope.display());
                }
                if vips_unwritten {
                    vips_unwritten = tokio::task::block_in_place(|| !write(&builder, &vips_path));
                }
                if !plane.errors().is_empty() {
                    let last = table_out.borrow().clone();
                    tokio::task::block_in_place(|| plane.apply(&last));
                }
                None
            }
            _ = route_tick.tick() => {
                match route::add_unreachable(config.vip.pool).await {
                    Ok(true) => tracing::warn!("the route that keeps VIPs unreachable was gone"),
                    Ok(false) => {}
                    Err(error) => tracing::error!("{error}"),
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
    }

    tracing::info!("stopping: detaching from {}", scope.display());
    admin_server.abort();
    drop(source);
    dns_server.stop().await;
    // The view may be alive in a request that is being answered, so the plane is taken apart in
    // place.
    plane.detach();
    Ok(())
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

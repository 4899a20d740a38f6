//! `nohop unload`: removes the kernel side of any daemon.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::process::write;
use crate::config::Config;
use crate::counted::counted;
use crate::datapath::route::Route;
use crate::datapath::{self, public_routes, route};

/// Removes the routes of public VIPs, detaches the pinned programs and removes the pins; with `all`, removes the
/// unreachable route too.
///
/// # Errors
/// When a daemon still runs on the pins, or the kernel refuses.
pub fn unload(config: &Config, all: bool, as_json: bool) -> anyhow::Result<()> {
    let bpffs = &config.bpffs;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // Routers have to know before the programs are gone.
    let mut withdrawn = None;
    let withdraw = || runtime.block_on(public_routes::announce(&BTreeSet::new()));
    let n_detached = datapath::unload_after(bpffs, || withdrawn.insert(withdraw()).is_ok())?;
    let (_, withdrawn) = withdrawn.transpose()?.unwrap_or_default();
    let (mut removed, mut left) = (Vec::new(), Vec::new());
    if all {
        let pools: Vec<IpNet> = config.vip.pools().collect();
        for &pool in &pools {
            if runtime.block_on(route::remove_unreachable(pool))? {
                removed.push(pool);
            }
        }
        left = runtime.block_on(route::former(&pools))?;
    }
    let report = UnloadReport {
        detached: n_detached,
        bpffs: bpffs.clone(),
        route_removed: !removed.is_empty(),
        routes_left: left.iter().map(Route::removal).collect(),
        withdrawn,
    };
    write(as_json, &report, |report| text(report, config, &removed, all))
}

/// The result of `nohop unload`.
#[derive(Debug, Serialize, Deserialize)]
struct UnloadReport {
    /// How many programs were detached.
    detached: usize,
    /// The directory of the pins.
    bpffs: PathBuf,
    /// The unreachable route was removed.
    route_removed: bool,
    /// The commands that remove unreachable routes of other pools, as of an earlier `vip.pool`.
    routes_left: Vec<String>,
    /// The public VIPs whose routes were removed.
    withdrawn: Vec<IpAddr>,
}

fn text(report: &UnloadReport, config: &Config, removed: &[IpNet], all: bool) -> String {
    let UnloadReport { detached, bpffs, withdrawn, routes_left, .. } = report;
    let bpffs = bpffs.display();
    let mut lines = vec![match *detached {
        0 => format!("nothing of nohop's was pinned in {bpffs}"),
        n => format!("detached {} and removed the pins in {bpffs}", counted(n, "program")),
    }];
    let withdrawn = withdrawn.iter();
    lines.extend(
        withdrawn.map(|it| format!("removed the route `unreachable {it}` of a public VIP")),
    );
    for pool in config.vip.pools() {
        if removed.contains(&pool) {
            lines.push(format!("removed the route `unreachable {pool} table local`"));
        } else if !all {
            lines.push(format!(
                "the route `unreachable {pool} table local` stays: --all removes it"
            ));
        }
    }
    lines.extend(routes_left.iter().map(|removal| {
        format!("another pool's route stays, as of an earlier vip.pool; to remove it: {removal}")
    }));
    lines.join("\n") + "\n"
}

//! `nohop unload`: removes the kernel side of any daemon.

use std::collections::BTreeSet;

use serde_json::json;

use crate::config::Config;
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
    let mut removed = Vec::new();
    if all {
        for pool in config.vip.pools() {
            if runtime.block_on(route::remove_unreachable(pool))? {
                removed.push(pool);
            }
        }
    }
    if as_json {
        println!(
            "{}",
            json!({
                "detached": n_detached,
                "bpffs": bpffs,
                "route_removed": !removed.is_empty(),
                "withdrawn": withdrawn,
            })
        );
        return Ok(());
    }
    match n_detached {
        0 => println!("nothing of nohop's was pinned in {}", bpffs.display()),
        n => println!("detached {n} programs and removed the pins in {}", bpffs.display()),
    }
    for address in withdrawn {
        println!("removed the route `unreachable {address}` of a public VIP");
    }
    for pool in config.vip.pools() {
        if removed.contains(&pool) {
            println!("removed the route `unreachable {pool} table local`");
        } else if !all {
            println!("the route `unreachable {pool} table local` stays: --all removes it");
        }
    }
    Ok(())
}

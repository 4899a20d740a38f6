//! `nohop unload`: removes the kernel side of any daemon.

use serde_json::json;

use crate::config::Config;
use crate::datapath::{self, route};

/// Detaches the pinned programs and removes the pins; with `all`, removes the unreachable route too.
///
/// # Errors
/// When a daemon still runs on the pins, or the kernel refuses.
pub fn unload(config: &Config, all: bool, as_json: bool) -> anyhow::Result<()> {
    let bpffs = &config.bpffs;
    let n_detached = datapath::unload(bpffs)?;
    let mut removed = Vec::new();
    if all {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        for pool in config.vip.pools() {
            if runtime.block_on(route::remove_unreachable(pool))? {
                removed.push(pool);
            }
        }
    }
    if as_json {
        println!(
            "{}",
            json!({ "detached": n_detached, "bpffs": bpffs, "route_removed": !removed.is_empty() })
        );
        return Ok(());
    }
    match n_detached {
        0 => println!("nothing of nohop's was pinned in {}", bpffs.display()),
        n => println!("detached {n} programs and removed the pins in {}", bpffs.display()),
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

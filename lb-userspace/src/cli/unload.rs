//! `nohop unload`: takes the kernel side away, whoever put it there.

use anyhow::Context;
use serde_json::json;

use crate::config::{Config, cgroup};
use crate::plane::{self, route};

/// Detaches the programs from the configured cgroup; with `all`, removes the unreachable route too.
///
/// # Errors
/// When the kernel refuses.
pub fn unload(config: &Config, all: bool, as_json: bool) -> anyhow::Result<()> {
    let scope = match &config.cgroup {
        Some(scope) => scope.clone(),
        None => cgroup::find_cgroup2_root().context("no cgroup v2 hierarchy is mounted")?,
    };
    let n_detached = plane::unload(&scope)?;
    let pool = config.vip.pool;
    if all {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(route::remove_unreachable(pool))?;
    }
    if as_json {
        println!("{}", json!({ "detached": n_detached, "cgroup": scope, "route_removed": all }));
        return Ok(());
    }
    match n_detached {
        0 => println!("nothing of nohop's was attached to {}", scope.display()),
        n => println!("detached {n} programs from {}", scope.display()),
    }
    if all {
        println!("removed the route `unreachable {pool} table local`");
    } else {
        println!("the route `unreachable {pool} table local` stays: --all removes it");
    }
    Ok(())
}

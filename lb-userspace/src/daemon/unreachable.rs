//! The routes that keep the pools of VIPs unreachable.

use std::sync::Arc;
use std::time::Duration;

use super::timers::ticks;
use crate::config::VipConfig;
use crate::datapath::{SharedDatapath, route};

/// How often the routes are checked and put back.
const ROUTE_TICK: Duration = Duration::from_secs(10);

/// Puts the unreachable routes back, should something have flushed them, for as long as the daemon
/// lives.
pub async fn keep(vip: VipConfig, datapath: Arc<SharedDatapath>) {
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

//! Times at which the tasks of the daemon wake up.

use std::time::Duration;

use tokio::time::{Instant, Interval, MissedTickBehavior};

/// Waits until that moment; for ever without one.
pub async fn sleep_until(at: Option<std::time::Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

/// Ticks from `after` on; one that comes late delays those that follow.
pub fn ticks(period: Duration, after: Duration) -> Interval {
    let mut ticks = tokio::time::interval_at(Instant::now() + after, period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

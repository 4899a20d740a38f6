//! Which resolvers failed a moment ago: those are asked last.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a resolver that didn't answer stands behind the others. Long enough that a dead one
/// costs one lookup in thousands its patience, short enough that a restarted one is soon back in
/// its place.
const DEMOTION: Duration = Duration::from_secs(30);

/// The resolvers that failed, and when.
#[derive(Debug, Default)]
pub(super) struct Health {
    failed: Mutex<HashMap<SocketAddr, Instant>>,
}

impl Health {
    /// Notes that `server` gave no answer.
    pub(super) fn failed(&self, server: SocketAddr, now: Instant) {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        // Also what keeps those from piling up that a resolv.conf named once.
        failed.retain(|_, at| now.saturating_duration_since(*at) < DEMOTION);
        failed.insert(server, now);
    }

    /// Notes that `server` answered.
    pub(super) fn answered(&self, server: SocketAddr) {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        failed.remove(&server);
    }

    /// Puts those that failed within the last 30 s behind the others, and leaves the order as it
    /// is otherwise.
    pub(super) fn order(&self, servers: &mut [SocketAddr], now: Instant) {
        let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        if !failed.is_empty() {
            servers.sort_by_key(|server| {
                failed.get(server).is_some_and(|at| now.saturating_duration_since(*at) < DEMOTION)
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_failed_is_asked_last_for_a_while() {
        let [a, b, c] = [1, 2, 3].map(|last| SocketAddr::from(([192, 0, 2, last], 53)));
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let health = Health::default();
        let order = |seconds| {
            let mut servers = [a, b, c];
            health.order(&mut servers, at(seconds));
            servers
        };
        assert_eq!(order(0), [a, b, c]);
        health.failed(a, at(0));
        assert_eq!(order(1), [b, c, a]);
        health.failed(b, at(10));
        assert_eq!(order(11), [c, a, b]);
        health.failed(c, at(12));
        assert_eq!(order(13), [a, b, c], "all failed: the order is the configured one");
        health.answered(c);
        assert_eq!(order(14), [c, a, b]);
        assert_eq!(order(31), [a, c, b]);
        assert_eq!(order(40), [a, b, c]);
    }
}

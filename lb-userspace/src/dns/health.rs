//! Which resolvers give no answers: those are asked last.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use hickory_proto::rr::Name;

use super::sockets::Transport;

/// How long a resolver that doesn't answer stands behind the others. Long enough that a dead one
/// costs one lookup in thousands its patience, short enough that a restarted one is soon back in
/// its place.
const DEMOTION: Duration = Duration::from_secs(30);

/// The names that have to fail, with no answer in between: a name or two that a good resolver can't
/// resolve in time are their own servers' fault.
const N_FAILURES: usize = 3;

/// The resolvers that failed, each by what carried the question: there are some that speak no TCP.
#[derive(Debug, Default)]
pub(super) struct Health {
    failures: Mutex<HashMap<(SocketAddr, Transport), Failures>>,
}

/// What failed since the last answer.
#[derive(Debug)]
struct Failures {
    /// `N_FAILURES` at most.
    names: HashSet<Name>,
    last: Instant,
}

impl Failures {
    fn demote(&self, now: Instant) -> bool {
        self.names.len() >= N_FAILURES && self.is_recent(now)
    }

    fn is_recent(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.last) < DEMOTION
    }
}

impl Health {
    /// Notes that `server` gave no answer about `name`.
    pub(super) fn failed(
        &self,
        server: SocketAddr,
        transport: Transport,
        name: &Name,
        now: Instant,
    ) {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        // Also what keeps those from piling up that a resolv.conf named once.
        failures.retain(|_, failures| failures.is_recent(now));
        let new = || Failures { names: HashSet::new(), last: now };
        let failures = failures.entry((server, transport)).or_insert_with(new);
        failures.last = now;
        if failures.names.len() < N_FAILURES {
            failures.names.insert(name.to_lowercase());
        }
    }

    /// Notes that `server` answered.
    pub(super) fn answered(&self, server: SocketAddr, transport: Transport) {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        failures.remove(&(server, transport));
    }

    /// Puts those that didn't answer within the last 30 s behind the others, and leaves the order as
    /// it is otherwise.
    pub(super) fn order(&self, servers: &mut [SocketAddr], transport: Transport, now: Instant) {
        let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        if !failures.is_empty() {
            servers.sort_by_key(|server| {
                failures.get(&(*server, transport)).is_some_and(|failures| failures.demote(now))
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        Name::from_ascii(text).unwrap()
    }

    #[test]
    fn who_fails_is_asked_last_for_a_while() {
        let [a, b, c] = [1, 2, 3].map(|last| SocketAddr::from(([192, 0, 2, last], 53)));
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let health = Health::default();
        let order = |transport, seconds| {
            let mut servers = [a, b, c];
            health.order(&mut servers, transport, at(seconds));
            servers
        };
        let fail = |server, seconds| {
            for text in ["x.", "y.", "z."] {
                health.failed(server, Transport::Udp, &name(text), at(seconds));
            }
        };
        assert_eq!(order(Transport::Udp, 0), [a, b, c]);
        fail(a, 0);
        assert_eq!(order(Transport::Udp, 1), [b, c, a]);
        assert_eq!(order(Transport::Tcp, 1), [a, b, c]);
        fail(b, 10);
        assert_eq!(order(Transport::Udp, 11), [c, a, b]);
        fail(c, 12);
        let all = "all failed: the order is the configured one";
        assert_eq!(order(Transport::Udp, 13), [a, b, c], "{all}");
        health.answered(c, Transport::Udp);
        assert_eq!(order(Transport::Udp, 14), [c, a, b]);
        assert_eq!(order(Transport::Udp, 31), [a, c, b]);
        assert_eq!(order(Transport::Udp, 40), [a, b, c]);
    }

    #[test]
    fn slow_names_are_no_dead_resolver() {
        let [a, b] = [1, 2].map(|last| SocketAddr::from(([192, 0, 2, last], 53)));
        let now = Instant::now();
        // Names that fail, and an answer to another as `ok`.
        let rows = [
            (&["slow.", "slow.", "SLOW.", "slow."][..], [a, b]),
            (&["slow.", "slower.", "ok", "slow.", "slower."], [a, b]),
            (&["slow.", "slower.", "slowest."], [b, a]),
            (&["slow.", "slower.", "slowest.", "ok"], [a, b]),
        ];
        for (events, expected) in rows {
            let health = Health::default();
            for event in events {
                match *event {
                    "ok" => health.answered(a, Transport::Udp),
                    slow => health.failed(a, Transport::Udp, &name(slow), now),
                }
            }
            let mut servers = [a, b];
            health.order(&mut servers, Transport::Udp, now);
            assert_eq!(servers, expected, "{events:?}");
        }
    }
}

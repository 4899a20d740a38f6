//! Whether an upstream leads back to ourselves, through however many resolvers.
//!
//! No address tells: a local dnsmasq that forwards everything to us may be our own upstream. So each
//! upstream is sent a question for a name that nobody can guess. Where that question arrives at our
//! own server, the upstream goes in a circle, and is left out until a later question doesn't come
//! back. dnsmasq's `--dns-loop-detect` works the same way.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hickory_proto::op::Query;
use hickory_proto::rr::{Name, RecordType};
use tokio::sync::watch;
use tracing::{info, warn};

use super::resolv_conf::is_stub;

/// The label below which the probes' names are: whoever reads a resolver's log sees whose they are.
const LABEL: &str = "nohop-loop";

/// The domain of probes for names that have no route of their own. Resolvers answer some private
/// domains themselves (`invalid`, `test` and `local` of RFC 6761 in unbound and systemd-resolved);
/// this one, which ICANN set aside for private use in 2024, they forward like any other.
const PRIVATE: &str = "internal";

/// The probes that are remembered, so that one that comes late still counts.
const MAX_PROBES: usize = 1024;

/// An upstream, for the names of one domain: it may treat other domains in another way.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Way {
    /// The domain of a route, or the zone where some of its names are forwarded; empty for all names
    /// without one.
    pub(super) domain: Arc<str>,
    /// The upstream.
    pub(super) server: SocketAddr,
}

/// What the probes have found.
#[derive(Debug, Default)]
pub(super) struct Loops {
    state: Mutex<State>,
    /// Told of each way that is found to lead back here.
    found: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct State {
    /// The probes that may still come by, each under the first label of its name.
    probes: HashMap<u128, Probe>,
    /// The ways whose probes came back.
    circular: HashSet<Way>,
}

#[derive(Debug)]
struct Probe {
    way: Way,
    came_back: bool,
}

impl Loops {
    /// The question to send on a way.
    pub(super) fn probe(&self, way: &Way) -> Option<Query> {
        let token = random();
        let domain = if way.domain.is_empty() { PRIVATE } else { &way.domain };
        let name = Name::from_ascii(format!("{token:032x}.{LABEL}.{domain}.")).ok()?;
        let mut state = self.lock();
        if state.probes.len() >= MAX_PROBES {
            state.probes.clear();
        }
        state.probes.insert(token, Probe { way: way.clone(), came_back: false });
        Some(Query::query(name, RecordType::A))
    }

    /// Whether a name that we are asked for is that of a probe: then its way leads back here.
    pub(super) fn is_probe(&self, name: &Name) -> bool {
        let mut labels = name.iter();
        let Some(token) = labels.next().and_then(token) else { return false };
        if !labels.next().is_some_and(is_label) {
            return false;
        }
        let mut state = self.lock();
        let Some(probe) = state.probes.get_mut(&token) else { return false };
        probe.came_back = true;
        let way = probe.way.clone();
        let is_new = state.circular.insert(way.clone());
        drop(state);
        if is_new {
            warn!("{}", problem(&way));
            self.found.send_replace(());
        }
        true
    }

    /// Notes that a probe was answered; where it didn't come by here, its way is a good one. (One
    /// without an answer may still come by.)
    pub(super) fn answered(&self, probe: &Query) {
        let Some(token) = probe.name.iter().next().and_then(token) else { return };
        let mut state = self.lock();
        let Some(Probe { way, came_back }) = state.probes.remove(&token) else { return };
        if !came_back && state.circular.remove(&way) {
            info!("{} no longer leads back to this server: it is asked again", way.server);
        }
    }

    /// Forgets the ways that there no longer are.
    pub(super) fn keep(&self, ways: &[Way]) {
        self.lock().circular.retain(|way| ways.contains(way));
    }

    /// Whether the upstream leads back here.
    pub(super) fn is_circular(&self, way: &Way) -> bool {
        let state = self.lock();
        !state.circular.is_empty() && state.circular.contains(way)
    }

    /// Waits until the upstream is found to lead back here.
    pub(super) async fn leads_back(&self, way: &Way) {
        let mut found = self.found.subscribe();
        // The sender lives as long as this.
        let _ = found.wait_for(|()| self.is_circular(way)).await;
    }

    /// What is wrong, with the mend. That systemd-resolved leads back here is as it should be,
    /// where there are others of `ways` behind it.
    pub(super) fn problems(&self, ways: &[Way]) -> Vec<String> {
        let state = self.lock();
        let has_other = |way: &Way| {
            let others = ways.iter().filter(|other| other.domain == way.domain);
            others.into_iter().any(|other| !state.circular.contains(other))
        };
        let is_problem = |way: &&Way| !(is_stub(&way.server) && has_other(way));
        let mut problems: Vec<_> = state.circular.iter().filter(is_problem).map(problem).collect();
        problems.sort();
        problems
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether this label marks the names of probes, as the second one.
pub(super) fn is_label(label: &[u8]) -> bool {
    label.eq_ignore_ascii_case(LABEL.as_bytes())
}

fn problem(way: &Way) -> String {
    let Way { domain, server } = way;
    let (names, key) = match domain.is_empty() {
        true => ("names outside the zone".to_owned(), "dns.forward"),
        false => (format!("names below {domain}"), "dns.routes"),
    };
    format!(
        "the resolver {server} sends {names} back to this server, so it is not asked: give it \
         upstreams of its own, or name another in {key}"
    )
}

fn token(label: &[u8]) -> Option<u128> {
    let text = std::str::from_utf8(label).ok().filter(|text| text.len() == 32)?;
    u128::from_str_radix(text, 16).ok()
}

/// A number that nobody can guess: std keys its hashers from the system's random source, and
/// SipHash gives the keys away to nobody who sees its results.
fn random() -> u128 {
    let half = |idx: u8| u128::from(RandomState::new().hash_one(idx));
    half(0) << 64 | half(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn way(domain: &str, last: u8) -> Way {
        Way { domain: domain.into(), server: SocketAddr::from(([192, 0, 2, last], 53)) }
    }

    #[test]
    fn a_probe_that_comes_back_marks_its_way_alone() {
        let loops = Loops::default();
        let (a, b, consul) = (way("", 1), way("", 2), way("consul", 1));
        let probe = loops.probe(&a).unwrap();
        assert!(probe.name.to_string().ends_with(".nohop-loop.internal."), "{probe}");
        assert!(loops.probe(&consul).unwrap().name.to_string().ends_with(".nohop-loop.consul."));

        let shouted = Name::from_ascii(probe.name.to_string().to_uppercase()).unwrap();
        assert!(loops.is_probe(&shouted), "some resolvers change a name's case");
        assert!(loops.is_circular(&a) && !loops.is_circular(&b) && !loops.is_circular(&consul));
        assert_eq!(
            loops.problems(&[a.clone(), b.clone()]),
            [
                "the resolver 192.0.2.1:53 sends names outside the zone back to this server, so it is \
              not asked: give it upstreams of its own, or name another in dns.forward"
            ]
        );

        loops.answered(&probe);
        assert!(loops.is_circular(&a));
        let probe = loops.probe(&a).unwrap();
        loops.answered(&probe);
        assert!(!loops.is_circular(&a) && !loops.is_probe(&probe.name));
    }

    #[test]
    fn systemd_resolved_may_lead_back_where_others_stand_behind_it() {
        let loops = Loops::default();
        let stub = Way { domain: "".into(), server: SocketAddr::from(([127, 0, 0, 53], 53)) };
        let probe = loops.probe(&stub).unwrap();
        assert!(loops.is_probe(&probe.name));
        assert_eq!(loops.problems(std::slice::from_ref(&stub)).len(), 1);
        assert_eq!(loops.problems(&[stub.clone(), way("consul", 1)]).len(), 1);
        assert_eq!(loops.problems(&[stub.clone(), way("", 1)]).len(), 0);
    }

    #[test]
    fn names_that_are_no_probes() {
        let loops = Loops::default();
        let probe = loops.probe(&way("", 1)).unwrap();
        let token = probe.name.to_string()[..32].to_owned();
        let other = "0".repeat(32);
        for name in [
            "example.com.",
            "nohop-loop.internal.",
            &format!("{token}.example.com."),
            &format!("{other}.nohop-loop.internal."),
            &format!("{}.nohop-loop.internal.", &token[1..]),
            ".",
        ] {
            assert!(!loops.is_probe(&Name::from_ascii(name).unwrap()), "{name}");
        }
        assert!(loops.problems(&[]).is_empty());
    }

    #[test]
    fn what_is_remembered_is_bounded_and_follows_the_configuration() {
        let loops = Loops::default();
        for _ in 0..3 * MAX_PROBES {
            loops.probe(&way("", 1)).unwrap();
        }
        assert!(loops.lock().probes.len() <= MAX_PROBES);
        let probe = loops.probe(&way("", 1)).unwrap();
        assert!(loops.is_probe(&probe.name));
        loops.keep(&[way("", 1), way("", 2)]);
        assert!(loops.is_circular(&way("", 1)));
        loops.keep(&[way("", 2)]);
        assert!(!loops.is_circular(&way("", 1)));
    }
}

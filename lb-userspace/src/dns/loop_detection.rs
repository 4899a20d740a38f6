//! Detects forwarding loops: upstreams that lead back to this server, through any number of
//! resolvers.
//!
//! Addresses don't show them: a local dnsmasq that forwards everything to us may be our own
//! upstream. So each upstream is sent a query for an unguessable name. If that query arrives at our
//! own server, the upstream loops, and is skipped until a later query doesn't come back. dnsmasq's
//! `--dns-loop-detect` works the same way.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tracing::{info, warn};

use super::domain::Domain;
use super::message::WireName;
use super::random::Random;
use super::resolv_conf::is_stub;

/// The label below which the names of probes are, so that a resolver's log shows their origin.
const LABEL: &str = "nohop-loop";

/// The domain of probes for names that have no route of their own. Resolvers answer some private
/// domains themselves (`invalid`, `test` and `local` of RFC 6761 in unbound and systemd-resolved);
/// this one, which ICANN set aside for private use in 2024, they forward like any other.
const PRIVATE: &str = "internal";

/// The pending probes, so that one that arrives late is still recognized.
const MAX_PROBES: usize = 1024;

/// The period between two probes of a path.
pub(super) const PERIOD: Duration = Duration::from_secs(60);

/// The same for a suspicious path that no response has proven good.
const SUSPICION_PERIOD: Duration = Duration::from_secs(5);

/// Type A, class IN.
const A_IN: [u8; 4] = [0, 1, 0, 1];

/// An upstream for the names of one domain: it may treat other domains differently.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct UpstreamPath {
    /// The domain of a route, or the zone where some of its names are forwarded; empty for all names
    /// without one.
    pub(super) domain: Arc<str>,
    /// The upstream.
    pub(super) server: SocketAddr,
}

/// The results of the probes.
#[derive(Debug, Default)]
pub(super) struct LoopDetector {
    state: Mutex<LoopState>,
    /// Whether any path loops, so that the check costs no lock otherwise.
    any: AtomicBool,
    /// Notified of each path that is found to loop.
    found: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct LoopState {
    /// The pending probes by the first label of their names.
    probes: HashMap<u128, PendingProbe>,
    /// The paths whose probes came back.
    looping: HashSet<UpstreamPath>,
    /// When each path was probed last.
    probed: HashMap<UpstreamPath, ProbeRecord>,
}

#[derive(Clone, Copy, Debug)]
struct ProbeRecord {
    at: Instant,
    /// Whether it was answered without arriving here.
    is_good: bool,
}

/// A query that shows whether an upstream leads back here.
#[derive(Clone, Debug)]
pub(super) struct ProbeQuery {
    token: u128,
    /// Name, type and class, on the wire.
    pub(super) wire: Vec<u8>,
}

impl ProbeQuery {
    /// A query for an unguessable name below `domain`.
    fn new(token: u128, domain: &str) -> ProbeQuery {
        let name = Domain::new(&format!("{token:032x}.{LABEL}.{domain}"));
        let mut wire = name.wire().to_vec();
        wire.extend(A_IN);
        ProbeQuery { token, wire }
    }

    /// A query that only shows whether a resolver answers at all.
    pub(super) fn sign_of_life() -> ProbeQuery {
        ProbeQuery::new(Random::new().u128(), PRIVATE)
    }
}

#[derive(Debug)]
struct PendingProbe {
    path: UpstreamPath,
    came_back: bool,
}

impl LoopDetector {
    /// The query to send on a path at `now`; `None` if its name would be too long.
    pub(super) fn probe(&self, path: &UpstreamPath, now: Instant) -> Option<ProbeQuery> {
        let token = Random::new().u128();
        let domain = if path.domain.is_empty() { PRIVATE } else { &path.domain };
        let question = ProbeQuery::new(token, domain);
        let mut state = self.lock();
        state.probed.insert(path.clone(), ProbeRecord { at: now, is_good: false });
        WireName::read(&question.wire)?;
        if state.probes.len() >= MAX_PROBES {
            state.probes.clear();
        }
        state.probes.insert(token, PendingProbe { path: path.clone(), came_back: false });
        Some(question)
    }

    /// Whether a path is to be probed at `now`: once a minute, and sooner if it is suspicious and
    /// no response within that minute has proven it good.
    pub(super) fn is_due(&self, path: &UpstreamPath, is_suspicious: bool, now: Instant) -> bool {
        let state = self.lock();
        let Some(probed) = state.probed.get(path) else { return true };
        let age = now.saturating_duration_since(probed.at);
        age >= PERIOD || is_suspicious && !probed.is_good && age >= SUSPICION_PERIOD
    }

    /// Whether a client's query is for the name of a probe; then its path is marked as looping.
    pub(super) fn is_probe(&self, name: &WireName<'_>) -> bool {
        if !name.label(1).is_some_and(is_probe_label) {
            return false;
        }
        let Some(token) = name.label(0).and_then(token) else { return false };
        let mut state = self.lock();
        let Some(probe) = state.probes.get_mut(&token) else { return false };
        probe.came_back = true;
        let path = probe.path.clone();
        if let Some(probed) = state.probed.get_mut(&path) {
            probed.is_good = false;
        }
        let is_new = state.looping.insert(path.clone());
        self.any.store(true, Ordering::Release);
        drop(state);
        if is_new {
            warn!("{}", problem(&path));
            self.found.send_replace(());
        }
        true
    }

    /// Notes that a probe was answered. If it didn't arrive here, its path is good. (One without a
    /// response may still arrive.)
    pub(super) fn answered(&self, probe: &ProbeQuery) {
        let mut state = self.lock();
        let Some(PendingProbe { path, came_back }) = state.probes.remove(&probe.token) else {
            return;
        };
        if came_back {
            return;
        }
        if let Some(probed) = state.probed.get_mut(&path) {
            probed.is_good = true;
        }
        if state.looping.remove(&path) {
            info!("{} no longer leads back to this server: it is asked again", path.server);
        }
        self.any.store(!state.looping.is_empty(), Ordering::Release);
    }

    /// Drops the paths that aren't in `paths`.
    pub(super) fn retain_paths(&self, paths: &[UpstreamPath]) {
        let mut state = self.lock();
        state.looping.retain(|path| paths.contains(path));
        state.probed.retain(|path, _| paths.contains(path));
        self.any.store(!state.looping.is_empty(), Ordering::Release);
    }

    /// Whether any path leads back here.
    pub(super) fn any(&self) -> bool {
        self.any.load(Ordering::Acquire)
    }

    /// Notified of each path that is found to loop.
    pub(super) fn found(&self) -> watch::Receiver<()> {
        self.found.subscribe()
    }

    /// Whether the upstream leads back here.
    pub(super) fn is_looping(&self, path: &UpstreamPath) -> bool {
        self.any() && self.lock().looping.contains(path)
    }

    /// Waits until the upstream is found to lead back here.
    pub(super) async fn wait_looping(&self, path: &UpstreamPath) {
        let mut found = self.found.subscribe();
        // The sender lives as long as this.
        let _ = found.wait_for(|()| self.is_looping(path)).await;
    }

    /// The problems, each with its fix. That systemd-resolved loops is by design, if others of
    /// `paths` are its upstreams.
    pub(super) fn problems(&self, paths: &[UpstreamPath]) -> Vec<String> {
        let state = self.lock();
        let has_other = |path: &UpstreamPath| {
            let others = paths.iter().filter(|other| other.domain == path.domain);
            others.into_iter().any(|other| !state.looping.contains(other))
        };
        let is_problem = |path: &&UpstreamPath| !(is_stub(&path.server) && has_other(path));
        let mut problems: Vec<_> = state.looping.iter().filter(is_problem).map(problem).collect();
        problems.sort();
        problems
    }

    fn lock(&self) -> MutexGuard<'_, LoopState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether this label marks the names of probes, as the second one.
pub(super) fn is_probe_label(label: &[u8]) -> bool {
    label.eq_ignore_ascii_case(LABEL.as_bytes())
}

fn problem(path: &UpstreamPath) -> String {
    let UpstreamPath { domain, server } = path;
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
    let text = std::str::from_utf8(label)
        .ok()
        .filter(|text| text.len() == 32 && !text.starts_with('+'))?;
    u128::from_str_radix(text, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The probe's name, as a client might ask for it.
    fn is_probe(loops: &LoopDetector, wire: &[u8]) -> bool {
        loops.is_probe(&WireName::read(wire).unwrap())
    }

    fn text(question: &ProbeQuery) -> String {
        String::from_utf8_lossy(&question.wire).into_owned()
    }

    fn probe(loops: &LoopDetector, path: &UpstreamPath) -> ProbeQuery {
        loops.probe(path, Instant::now()).unwrap()
    }

    fn path(domain: &str, last: u8) -> UpstreamPath {
        UpstreamPath { domain: domain.into(), server: SocketAddr::from(([192, 0, 2, last], 53)) }
    }

    #[test]
    fn a_probe_that_comes_back_marks_its_path_only() {
        let loops = LoopDetector::default();
        let (a, b, consul) = (path("", 1), path("", 2), path("consul", 1));
        let asked = probe(&loops, &a);
        let name = |domain: &str| format!("\nnohop-loop{domain}\0\0\u{1}\0\u{1}");
        assert!(text(&asked).ends_with(&name("\u{8}internal")), "{asked:?}");
        assert!(text(&probe(&loops, &consul)).ends_with(&name("\u{6}consul")));

        let shouted = asked.wire.to_ascii_uppercase();
        assert!(is_probe(&loops, &shouted), "some resolvers change a name's case");
        assert!(loops.any());
        assert!(loops.is_looping(&a) && !loops.is_looping(&b) && !loops.is_looping(&consul));
        assert_eq!(
            loops.problems(&[a.clone(), b.clone()]),
            [
                "the resolver 192.0.2.1:53 sends names outside the zone back to this server, so it is \
              not asked: give it upstreams of its own, or name another in dns.forward"
            ]
        );

        loops.answered(&asked);
        assert!(loops.is_looping(&a));
        let asked = probe(&loops, &a);
        loops.answered(&asked);
        assert!(!loops.is_looping(&a) && !is_probe(&loops, &asked.wire) && !loops.any());
    }

    #[test]
    fn systemd_resolved_may_loop_if_it_has_other_upstreams() {
        let loops = LoopDetector::default();
        let stub =
            UpstreamPath { domain: "".into(), server: SocketAddr::from(([127, 0, 0, 53], 53)) };
        assert!(is_probe(&loops, &probe(&loops, &stub).wire));
        assert_eq!(loops.problems(std::slice::from_ref(&stub)).len(), 1);
        assert_eq!(loops.problems(&[stub.clone(), path("consul", 1)]).len(), 1);
        assert_eq!(loops.problems(&[stub.clone(), path("", 1)]).len(), 0);
    }

    #[test]
    fn names_that_are_not_probes() {
        let loops = LoopDetector::default();
        let token = text(&probe(&loops, &path("", 1)))[1..33].to_owned();
        let other = "0".repeat(32);
        for (first, second, third) in [
            ("example", "com", ""),
            ("nohop-loop", "internal", ""),
            (&token, "example", "com"),
            (&other, "nohop-loop", "internal"),
            (&token[1..], "nohop-loop", "internal"),
            (&format!("+{}", &token[1..]), "nohop-loop", "internal"),
            ("", "", ""),
        ] {
            let mut wire = Vec::new();
            for label in [first, second, third].into_iter().filter(|label| !label.is_empty()) {
                wire.push(label.len() as u8);
                wire.extend(label.bytes());
            }
            wire.push(0);
            assert!(!is_probe(&loops, &wire), "{first}.{second}.{third}");
        }
        assert!(loops.problems(&[]).is_empty());
    }

    #[test]
    fn probes_are_bounded_and_follow_the_configuration() {
        let loops = LoopDetector::default();
        for _ in 0..3 * MAX_PROBES {
            probe(&loops, &path("", 1));
        }
        assert!(loops.lock().probes.len() <= MAX_PROBES);
        assert!(is_probe(&loops, &probe(&loops, &path("", 1)).wire));
        loops.retain_paths(&[path("", 1), path("", 2)]);
        assert!(loops.is_looping(&path("", 1)));
        loops.retain_paths(&[path("", 2)]);
        assert!(!loops.is_looping(&path("", 1)));
    }

    #[test]
    fn a_good_path_is_not_probed_for_a_minute() {
        let (loops, start) = (LoopDetector::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let path = path("", 1);
        let due = |seconds| [false, true].map(|suspect| loops.is_due(&path, suspect, at(seconds)));
        assert_eq!(due(0), [true, true]);
        let asked = loops.probe(&path, at(0)).unwrap();
        assert_eq!([due(4), due(5), due(60)], [[false, false], [false, true], [true, true]]);
        loops.answered(&asked);
        assert_eq!([due(59), due(60)], [[false, false], [true, true]]);
        // One that came by here is none, whatever its answer was.
        let asked = loops.probe(&path, at(60)).unwrap();
        assert!(is_probe(&loops, &asked.wire));
        loops.answered(&asked);
        assert_eq!(due(66), [false, true]);
    }
}

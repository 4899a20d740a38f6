//! Whether an upstream leads back to ourselves, through however many resolvers.
//!
//! No address tells: a local dnsmasq that forwards everything to us may be our own upstream. So each
//! upstream is sent a question for a name that nobody can guess. Where that question arrives at our
//! own server, the upstream goes in a circle, and is left out until a later question doesn't come
//! back. dnsmasq's `--dns-loop-detect` works the same way.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tracing::{info, warn};

use super::message::WireName;
use super::random::Random;
use super::resolv_conf::is_stub;

/// The label below which the probes' names are: whoever reads a resolver's log sees whose they are.
const LABEL: &str = "nohop-loop";

/// The domain of probes for names that have no route of their own. Resolvers answer some private
/// domains themselves (`invalid`, `test` and `local` of RFC 6761 in unbound and systemd-resolved);
/// this one, which ICANN set aside for private use in 2024, they forward like any other.
const PRIVATE: &str = "internal";

/// The probes that are remembered, so that one that comes late still counts.
const MAX_PROBES: usize = 1024;

/// How long a way that was probed isn't probed again.
pub(super) const PERIOD: Duration = Duration::from_secs(60);

/// The same for one that is suspicious and wasn't found to be a good one.
const SUSPICION_PERIOD: Duration = Duration::from_secs(5);

/// Type A, class IN.
const A_IN: [u8; 4] = [0, 1, 0, 1];

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
    /// Whether there are circular ways at all, so that others cost no lock.
    any: AtomicBool,
    /// Told of each way that is found to lead back here.
    found: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct State {
    /// The probes that may still come by, each under the first label of its name.
    probes: HashMap<u128, Probe>,
    /// The ways whose probes came back.
    circular: HashSet<Way>,
    /// When each way was probed last.
    probed: HashMap<Way, Probed>,
}

#[derive(Clone, Copy, Debug)]
struct Probed {
    at: Instant,
    /// Whether an answer came that didn't come by here.
    is_good: bool,
}

/// A question that shows whether an upstream leads back here.
#[derive(Clone, Debug)]
pub(super) struct Question {
    token: u128,
    /// Name, type and class, on the wire.
    pub(super) wire: Vec<u8>,
}

impl Question {
    /// One for a name below `domain` that nobody can guess.
    fn new(token: u128, domain: &str) -> Question {
        let mut wire = Vec::new();
        let label = format!("{token:032x}");
        let labels = [&*label, LABEL].into_iter().chain(domain.split('.'));
        for label in labels.filter(|label| !label.is_empty()) {
            wire.push(label.len() as u8); // the configuration has checked it
            wire.extend(label.bytes());
        }
        wire.push(0);
        wire.extend(A_IN);
        Question { token, wire }
    }

    /// One that no circle is found by, for a resolver that is to show that it answers at all.
    pub(super) fn sign_of_life() -> Question {
        Question::new(Random::new().u128(), PRIVATE)
    }
}

#[derive(Debug)]
struct Probe {
    way: Way,
    came_back: bool,
}

impl Loops {
    /// The question to send on a way at `now`; `None` where its name would be too long.
    pub(super) fn probe(&self, way: &Way, now: Instant) -> Option<Question> {
        let token = Random::new().u128();
        let domain = if way.domain.is_empty() { PRIVATE } else { &way.domain };
        let question = Question::new(token, domain);
        let mut state = self.lock();
        state.probed.insert(way.clone(), Probed { at: now, is_good: false });
        WireName::read(&question.wire)?;
        if state.probes.len() >= MAX_PROBES {
            state.probes.clear();
        }
        state.probes.insert(token, Probe { way: way.clone(), came_back: false });
        Some(question)
    }

    /// Whether a way is to be probed at `now`: once a minute, and sooner where it looks suspicious
    /// and no answer has shown within that minute that it is a good one.
    pub(super) fn is_due(&self, way: &Way, is_suspicious: bool, now: Instant) -> bool {
        let state = self.lock();
        let Some(probed) = state.probed.get(way) else { return true };
        let age = now.saturating_duration_since(probed.at);
        age >= PERIOD || is_suspicious && !probed.is_good && age >= SUSPICION_PERIOD
    }

    /// Whether a name that we are asked for is that of a probe: then its way leads back here.
    pub(super) fn is_probe(&self, name: &WireName<'_>) -> bool {
        if !name.label(1).is_some_and(is_label) {
            return false;
        }
        let Some(token) = name.label(0).and_then(token) else { return false };
        let mut state = self.lock();
        let Some(probe) = state.probes.get_mut(&token) else { return false };
        probe.came_back = true;
        let way = probe.way.clone();
        if let Some(probed) = state.probed.get_mut(&way) {
            probed.is_good = false;
        }
        let is_new = state.circular.insert(way.clone());
        self.any.store(true, Ordering::Release);
        drop(state);
        if is_new {
            warn!("{}", problem(&way));
            self.found.send_replace(());
        }
        true
    }

    /// Notes that a probe was answered; where it didn't come by here, its way is a good one. (One
    /// without an answer may still come by.)
    pub(super) fn answered(&self, probe: &Question) {
        let mut state = self.lock();
        let Some(Probe { way, came_back }) = state.probes.remove(&probe.token) else { return };
        if came_back {
            return;
        }
        if let Some(probed) = state.probed.get_mut(&way) {
            probed.is_good = true;
        }
        if state.circular.remove(&way) {
            info!("{} no longer leads back to this server: it is asked again", way.server);
        }
        self.any.store(!state.circular.is_empty(), Ordering::Release);
    }

    /// Forgets the ways that there no longer are.
    pub(super) fn keep(&self, ways: &[Way]) {
        let mut state = self.lock();
        state.circular.retain(|way| ways.contains(way));
        state.probed.retain(|way, _| ways.contains(way));
        self.any.store(!state.circular.is_empty(), Ordering::Release);
    }

    /// Whether any way leads back here.
    pub(super) fn any(&self) -> bool {
        self.any.load(Ordering::Acquire)
    }

    /// Told of each way that is found to lead back here.
    pub(super) fn found(&self) -> watch::Receiver<()> {
        self.found.subscribe()
    }

    /// Whether the upstream leads back here.
    pub(super) fn is_circular(&self, way: &Way) -> bool {
        self.any() && self.lock().circular.contains(way)
    }

    /// Waits until the upstream is found to lead back here.
    pub(super) async fn leads_back(&self, way: &Way) {
        let mut found = self.found.subscribe();
        // The sender lives as long as this.
        let _ = found.wait_for(|()| self.is_circular(way)).await;
    }

    /// What is wrong, with the fix. That systemd-resolved leads back here is as it should be,
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
    let text = std::str::from_utf8(label)
        .ok()
        .filter(|text| text.len() == 32 && !text.starts_with('+'))?;
    u128::from_str_radix(text, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The probe's name, as a client might ask for it.
    fn is_probe(loops: &Loops, wire: &[u8]) -> bool {
        loops.is_probe(&WireName::read(wire).unwrap())
    }

    fn text(question: &Question) -> String {
        String::from_utf8_lossy(&question.wire).into_owned()
    }

    fn probe(loops: &Loops, way: &Way) -> Question {
        loops.probe(way, Instant::now()).unwrap()
    }

    fn way(domain: &str, last: u8) -> Way {
        Way { domain: domain.into(), server: SocketAddr::from(([192, 0, 2, last], 53)) }
    }

    #[test]
    fn a_probe_that_comes_back_marks_its_way_alone() {
        let loops = Loops::default();
        let (a, b, consul) = (way("", 1), way("", 2), way("consul", 1));
        let asked = probe(&loops, &a);
        let name = |domain: &str| format!("\nnohop-loop{domain}\0\0\u{1}\0\u{1}");
        assert!(text(&asked).ends_with(&name("\u{8}internal")), "{asked:?}");
        assert!(text(&probe(&loops, &consul)).ends_with(&name("\u{6}consul")));

        let shouted = asked.wire.to_ascii_uppercase();
        assert!(is_probe(&loops, &shouted), "some resolvers change a name's case");
        assert!(loops.any());
        assert!(loops.is_circular(&a) && !loops.is_circular(&b) && !loops.is_circular(&consul));
        assert_eq!(
            loops.problems(&[a.clone(), b.clone()]),
            [
                "the resolver 192.0.2.1:53 sends names outside the zone back to this server, so it is \
              not asked: give it upstreams of its own, or name another in dns.forward"
            ]
        );

        loops.answered(&asked);
        assert!(loops.is_circular(&a));
        let asked = probe(&loops, &a);
        loops.answered(&asked);
        assert!(!loops.is_circular(&a) && !is_probe(&loops, &asked.wire) && !loops.any());
    }

    #[test]
    fn systemd_resolved_may_lead_back_where_others_stand_behind_it() {
        let loops = Loops::default();
        let stub = Way { domain: "".into(), server: SocketAddr::from(([127, 0, 0, 53], 53)) };
        assert!(is_probe(&loops, &probe(&loops, &stub).wire));
        assert_eq!(loops.problems(std::slice::from_ref(&stub)).len(), 1);
        assert_eq!(loops.problems(&[stub.clone(), way("consul", 1)]).len(), 1);
        assert_eq!(loops.problems(&[stub.clone(), way("", 1)]).len(), 0);
    }

    #[test]
    fn names_that_are_no_probes() {
        let loops = Loops::default();
        let token = text(&probe(&loops, &way("", 1)))[1..33].to_owned();
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
    fn what_is_remembered_is_bounded_and_follows_the_configuration() {
        let loops = Loops::default();
        for _ in 0..3 * MAX_PROBES {
            probe(&loops, &way("", 1));
        }
        assert!(loops.lock().probes.len() <= MAX_PROBES);
        assert!(is_probe(&loops, &probe(&loops, &way("", 1)).wire));
        loops.keep(&[way("", 1), way("", 2)]);
        assert!(loops.is_circular(&way("", 1)));
        loops.keep(&[way("", 2)]);
        assert!(!loops.is_circular(&way("", 1)));
    }

    #[test]
    fn a_way_that_was_proven_is_left_in_peace_for_a_minute() {
        let (loops, start) = (Loops::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let way = way("", 1);
        let due = |seconds| [false, true].map(|suspect| loops.is_due(&way, suspect, at(seconds)));
        assert_eq!(due(0), [true, true]);
        let asked = loops.probe(&way, at(0)).unwrap();
        assert_eq!([due(4), due(5), due(60)], [[false, false], [false, true], [true, true]]);
        loops.answered(&asked);
        assert_eq!([due(59), due(60)], [[false, false], [true, true]]);
        // One that came by here is none, whatever its answer was.
        let asked = loops.probe(&way, at(60)).unwrap();
        assert!(is_probe(&loops, &asked.wire));
        loops.answered(&asked);
        assert_eq!(due(66), [false, true]);
    }
}

//! Answers that take away too much although they were confirmed: what speaks against them, and for how
//! long they aren't applied. Pure: time comes as an argument.
//!
//! Consul answers 200 with less, or nothing, where its ACLs can't be resolved, where a policy was
//! narrowed, and where its servers lost their state. A confirmed answer that loses more than half of
//! what serves is applied unless one of the [`Reason`]s holds. Only what *vanishes* from an answer is
//! meant: an instance that became critical is still listed, and out at once.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::index::IndexMove;
use crate::table::Instance;

/// So long after one another services count as having vanished at once. Watches whose wait is over
/// see new ACLs within 48 s.
const WINDOW: Duration = Duration::from_secs(60);

/// So many that vanish at once, and more than half of all, aren't a job that was stopped.
const N_MASS: usize = 3;

/// What speaks of an answer beside its body.
#[derive(Clone, Copy, Debug)]
pub struct Evidence {
    /// When it came.
    pub now: Instant,
    /// Whether a leader gave it that has made sure of being one.
    pub is_sure: bool,
    /// Whether Consul said that it left something out for the token's sake.
    pub is_filtered: bool,
    /// How its index stands to that of the last answer that was applied.
    pub moved: IndexMove,
}

/// What is done with an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Assessment {
    /// It is applied.
    Apply,
    /// It is asked for again, of a leader that has made sure of being one.
    Confirm,
    /// It takes nothing away: what was known before serves beside what it lists. It is asked for
    /// again soon.
    Withhold,
}

/// What speaks against an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// Consul says that it leaves something out for the token's sake, which it didn't before.
    Filtered,
    /// Less is there while nothing has changed, or not even Consul's own name is listed any more.
    Hidden,
    /// The index went backwards.
    Rewound,
    /// Much has vanished at once.
    Mass,
}

/// One doubt.
#[derive(Clone, Copy, Debug)]
struct Doubt {
    reason: Reason,
    /// When it ends, though nothing has changed; `None` for never.
    until: Option<Instant>,
}

impl Doubt {
    /// Whether its end hasn't come; after that it is for the next answer to confirm.
    fn holds(&self, now: Instant) -> bool {
        self.until.is_none_or(|until| until > now)
    }
}

/// All doubts there are.
#[derive(Clone, Debug)]
pub struct Doubts {
    /// How long what Consul doesn't speak of itself is doubted.
    distrust: Duration,
    names: Option<Doubt>,
    services: BTreeMap<Arc<str>, Doubt>,
    /// What vanished lately, and was applied.
    lost: BTreeMap<Arc<str>, (Instant, Arc<[Instance]>)>,
    /// What vanished by an answer that is to be confirmed.
    suspects: BTreeMap<Arc<str>, Instant>,
    /// Whether much has just been found to have vanished at once.
    is_mass_new: bool,
}

impl Doubts {
    /// No doubts, which will last for `distrust` where Consul doesn't give the reason itself.
    pub fn new(distrust: Duration) -> Self {
        Doubts {
            distrust,
            names: None,
            services: BTreeMap::new(),
            lost: BTreeMap::new(),
            suspects: BTreeMap::new(),
            is_mass_new: false,
        }
    }

    /// Whether anything is doubted, so that a "no" of Consul isn't one either.
    pub fn any(&self, now: Instant) -> bool {
        let mut all = self.names.iter().chain(self.services.values());
        all.any(|doubt| doubt.holds(now))
    }

    /// Whether the service of this name is doubted.
    pub fn has(&self, name: &str, now: Instant) -> bool {
        self.services.get(name).is_some_and(|doubt| doubt.holds(now))
    }

    /// Notes that the list of names, or the service of this name, is whole again, gone, or asked for
    /// no more.
    pub fn settle(&mut self, name: Option<&str>) {
        match name {
            None => self.names = None,
            Some(name) => {
                self.services.remove(name);
                self.lost.remove(name);
                self.suspects.remove(name);
            }
        }
    }

    /// Weighs a list of names in which some have vanished. `is_hidden` says whether Consul's own
    /// service is no longer in it, `was_filtered` whether the last list was, too; `is_mass` whether
    /// much has vanished at once.
    pub fn weigh_names(
        &mut self,
        signs: Evidence,
        was_filtered: bool,
        is_hidden: bool,
        is_mass: bool,
    ) -> Assessment {
        let sign = by_itself(signs, was_filtered)
            .or(is_hidden.then_some(Reason::Hidden))
            .or(is_mass.then_some(Reason::Mass));
        weigh(&mut self.names, signs, sign, self.distrust)
    }

    /// Weighs an answer in which most of a service has vanished. `serves` says whether anything that
    /// it lists serves, `serving` are the names of all services that have instances which serve.
    pub fn weigh_service(
        &mut self,
        name: &Arc<str>,
        signs: Evidence,
        was_filtered: bool,
        serves: bool,
        serving: impl Iterator<Item = Arc<str>>,
    ) -> Assessment {
        let now = signs.now;
        if serves {
            self.suspects.remove(name);
        } else {
            self.suspects.insert(name.clone(), now);
        }
        let is_recent = |at: &Instant| now.saturating_duration_since(*at) <= WINDOW;
        self.suspects.retain(|_, at| is_recent(at));
        self.lost.retain(|_, (at, _)| is_recent(at));
        // A job that runs again has new instances, and what it had is dead. Only where Consul's state
        // can't have changed that way is what the answer lists not all that there is.
        let counts =
            |reason| !serves || reason == Reason::Filtered || signs.moved != IndexMove::Forward;
        let sign = by_itself(signs, was_filtered)
            // Of what Consul itself says of the list it would say the same of the service.
            .or(self.names.map(|doubt| doubt.reason).filter(|reason| *reason != Reason::Filtered))
            .or_else(|| self.is_mass(serving).then_some(Reason::Mass))
            .filter(|reason| counts(*reason));
        let before = self.services.get(name).copied().filter(|doubt| counts(doubt.reason));
        let mut doubt = before;
        let weight = weigh(&mut doubt, signs, sign, self.distrust);
        let is_mass = doubt.is_some_and(|doubt| doubt.reason == Reason::Mass);
        self.is_mass_new |= is_mass && before.is_none();
        match doubt {
            Some(doubt) => drop(self.services.insert(name.clone(), doubt)),
            None => drop(self.services.remove(name)),
        }
        weight
    }

    fn is_mass(&self, serving: impl Iterator<Item = Arc<str>>) -> bool {
        let gone: BTreeSet<&Arc<str>> = self.lost.keys().chain(self.suspects.keys()).collect();
        let n_others = serving.filter(|name| !gone.contains(name)).count();
        is_mass(gone.len(), gone.len() + n_others)
    }

    /// Notes that a service has lost most of its instances by an answer that was applied.
    pub fn lost(&mut self, name: &Arc<str>, instances: Arc<[Instance]>, now: Instant) {
        self.suspects.remove(name);
        self.lost.insert(name.clone(), (now, instances));
    }

    /// Takes back what was lost just before so much else that it is doubted as a whole. It is doubted
    /// from here on, too.
    pub fn take_back(&mut self, now: Instant) -> Vec<(Arc<str>, Arc<[Instance]>)> {
        if !std::mem::take(&mut self.is_mass_new) {
            return Vec::new();
        }
        let until = Some(now + self.distrust);
        let lost = std::mem::take(&mut self.lost);
        let back = lost.into_iter().map(|(name, (_, instances))| {
            self.services.insert(name.clone(), Doubt { reason: Reason::Mass, until });
            (name, instances)
        });
        back.collect()
    }

    /// What is doubted and why, with the fix; `None` where nothing is.
    pub fn problem(&self, now: Instant) -> Option<String> {
        let services = self.services.iter().filter(|(_, doubt)| doubt.holds(now));
        let first = services.clone().min_by_key(|(_, doubt)| doubt.reason);
        let names = self.names.filter(|doubt| doubt.holds(now));
        let doubt = names.or(first.map(|(_, doubt)| *doubt))?;
        let what = match (first, services.count()) {
            (None, _) => "names that it listed before".into(),
            (Some((name, _)), 1) => format!("instances of `{name}`"),
            (Some((name, _)), n) => format!("instances of `{name}` and {} more services", n - 1),
        };
        let distrust = self.distrust;
        let (why, then) = match doubt.reason {
            Reason::Filtered => (
                "it leaves out what the token may not read, as it didn't before",
                "What was known serves while that is so; give the token service:read and node:read, \
                 or see why Consul can't resolve it; if it is meant to read less, stop the daemon, \
                 remove catalog.json from its state directory and start it"
                    .into(),
            ),
            Reason::Hidden => (
                "nothing has changed in its state, so the token seems to read less than before",
                format!(
                    "What was known serves for {distrust:?} at most; give the token service:read and \
                     node:read, or see why Consul can't resolve it"
                ),
            ),
            Reason::Rewound => (
                "its index went backwards, so its servers seem to have lost their state",
                format!(
                    "What was known serves for {distrust:?} at most; look at Consul's servers"
                ),
            ),
            Reason::Mass => (
                "they all went at once",
                format!(
                    "If they were stopped on purpose, there is nothing to do: this ends by itself \
                     {distrust:?} after they went, and until then what was known serves; if not, \
                     look at Consul's servers"
                ),
            ),
        };
        Some(format!("Consul's answers lack {what}: {why}. {then}"))
    }
}

/// Whether so many of so many are more than a job that was stopped.
pub fn is_mass(n_gone: usize, n_all: usize) -> bool {
    n_gone >= N_MASS && n_gone.saturating_mul(2) > n_all
}

/// What an answer says against itself.
fn by_itself(signs: Evidence, was_filtered: bool) -> Option<Reason> {
    match signs.moved {
        _ if signs.is_filtered && !was_filtered => Some(Reason::Filtered),
        IndexMove::None => Some(Reason::Hidden),
        IndexMove::Backward => Some(Reason::Rewound),
        IndexMove::Forward => None,
    }
}

fn weigh(
    doubt: &mut Option<Doubt>,
    signs: Evidence,
    sign: Option<Reason>,
    distrust: Duration,
) -> Assessment {
    // What Consul itself gave for a reason holds for as long as it does so.
    let is_over = |doubt: &Doubt| doubt.reason == Reason::Filtered && !signs.is_filtered;
    *doubt = doubt.filter(|doubt| !is_over(doubt));
    let is_due = doubt.map(|doubt| !doubt.holds(signs.now));
    match (is_due, sign) {
        (Some(false), _) => Assessment::Withhold,
        (Some(true) | None, _) if !signs.is_sure => Assessment::Confirm,
        (Some(true), _) | (None, None) => {
            *doubt = None;
            Assessment::Apply
        }
        (None, Some(reason)) => {
            let until = (reason != Reason::Filtered).then(|| signs.now + distrust);
            *doubt = Some(Doubt { reason, until });
            Assessment::Withhold
        }
    }
}

#[cfg(test)]
mod tests {
    use Assessment::*;

    use super::*;

    const S: Duration = Duration::from_secs(1);
    const DISTRUST: Duration = Duration::from_secs(300);

    fn signs(now: Instant, is_sure: bool, is_filtered: bool, moved: IndexMove) -> Evidence {
        Evidence { now, is_sure, is_filtered, moved }
    }

    fn names(list: &[&str]) -> impl Iterator<Item = Arc<str>> {
        list.iter().map(|name| Arc::from(*name)).collect::<Vec<_>>().into_iter()
    }

    #[test]
    fn what_vanishes_is_applied_once_confirmed_unless_something_speaks_against_it() {
        let start = Instant::now();
        // (filtered, filtered before, the index, Consul's own name is gone, much at once: list, service)
        let table = [
            (false, false, IndexMove::Forward, false, false, Apply, Apply),
            (true, true, IndexMove::Forward, false, false, Apply, Apply),
            (true, false, IndexMove::Forward, false, false, Withhold, Withhold),
            (false, false, IndexMove::None, false, false, Withhold, Withhold),
            (true, true, IndexMove::None, false, false, Withhold, Withhold),
            (false, false, IndexMove::Backward, false, false, Withhold, Withhold),
            (false, false, IndexMove::Forward, true, false, Withhold, Apply),
            (false, false, IndexMove::Forward, false, true, Withhold, Withhold),
        ];
        for (is_filtered, was_filtered, moved, is_hidden, is_mass, of_list, of_service) in table {
            let what = format!("{is_filtered} {was_filtered} {moved:?} {is_hidden} {is_mass}");
            for (is_sure, of_list, of_service) in
                [(false, Confirm, Confirm), (true, of_list, of_service)]
            {
                let signs = signs(start, is_sure, is_filtered, moved);
                let mut doubts = Doubts::new(DISTRUST);
                let got = doubts.weigh_names(signs, was_filtered, is_hidden, is_mass);
                assert_eq!(got, of_list, "the list: {what}");
                let mut doubts = Doubts::new(DISTRUST);
                let others: &[&str] = if is_mass { &["b", "c"] } else { &[] };
                for other in others {
                    doubts.suspects.insert((*other).into(), start);
                }
                let got =
                    doubts.weigh_service(&"a".into(), signs, was_filtered, false, names(&["a"]));
                assert_eq!(got, of_service, "the service: {what}");
            }
        }
    }

    #[test]
    fn a_doubt_ends_by_itself_except_where_consul_gives_the_reason() {
        let start = Instant::now();
        for (is_filtered, moved, at_the_end) in [
            (true, IndexMove::Forward, Withhold),
            (false, IndexMove::None, Apply),
            (false, IndexMove::Backward, Apply),
        ] {
            let mut doubts = Doubts::new(DISTRUST);
            let mut weigh = |after, is_sure, is_filtered| {
                let signs = signs(start + after, is_sure, is_filtered, moved);
                doubts.weigh_names(signs, false, false, false)
            };
            assert_eq!(weigh(Duration::ZERO, true, is_filtered), Withhold);
            assert_eq!(weigh(DISTRUST - S, false, is_filtered), Withhold);
            let unsure = if is_filtered { Withhold } else { Confirm };
            assert_eq!(weigh(DISTRUST, false, is_filtered), unsure);
            assert_eq!(weigh(DISTRUST, true, is_filtered), at_the_end);
        }
        // Once Consul doesn't give the reason any more, the answer is as good as another.
        let mut doubts = Doubts::new(DISTRUST);
        for (is_filtered, expected) in [(true, Withhold), (false, Apply)] {
            let signs = signs(start, true, is_filtered, IndexMove::Forward);
            assert_eq!(doubts.weigh_names(signs, false, false, false), expected);
            assert_eq!(doubts.problem(start).is_some(), is_filtered);
        }
    }

    #[test]
    fn a_list_that_is_doubted_casts_doubt_on_what_vanishes_from_a_service() {
        let now = Instant::now();
        for (is_filtered, moved, of_service) in
            [(false, IndexMove::Backward, Withhold), (true, IndexMove::Forward, Apply)]
        {
            let mut doubts = Doubts::new(DISTRUST);
            doubts.weigh_names(signs(now, true, is_filtered, moved), false, false, false);
            let signs = signs(now, true, false, IndexMove::Forward);
            let got = doubts.weigh_service(&"a".into(), signs, false, false, names(&["a"]));
            assert_eq!(got, of_service, "{is_filtered} {moved:?}");
        }
    }

    #[test]
    fn many_that_vanish_within_a_minute_are_taken_back() {
        let start = Instant::now();
        // (how many serve, after how many seconds each of them vanishes, how many are taken back)
        let table: [(usize, &[u64], usize); 6] = [
            (3, &[0, 20, 40], 2),
            (3, &[0, 30, 61], 0),
            (2, &[0, 0], 0),
            (6, &[0, 0, 0], 0),
            (5, &[0, 0, 0], 2),
            (9, &[0, 10, 20, 30, 40], 4),
        ];
        for (n_serving, after, expected) in table {
            let mut doubts = Doubts::new(DISTRUST);
            let all: Vec<Arc<str>> = (0..n_serving).map(|n| format!("s{n}").into()).collect();
            let mut back = Vec::new();
            for (n, after) in after.iter().enumerate() {
                let now = start + Duration::from_secs(*after);
                let serving = all[n..].iter().cloned();
                let signs = signs(now, true, false, IndexMove::Forward);
                match doubts.weigh_service(&all[n], signs, false, false, serving) {
                    Apply => doubts.lost(&all[n], Arc::default(), now),
                    _ => back.extend(doubts.take_back(now)),
                }
            }
            assert_eq!(back.len(), expected, "{after:?} of {n_serving}");
            let (last, what) = (start + 61 * S, format!("{after:?} of {n_serving}"));
            assert_eq!(doubts.any(last), expected > 0, "{what}");
            assert!(!doubts.any(last + DISTRUST) && doubts.problem(last + DISTRUST).is_none());
        }
    }
}

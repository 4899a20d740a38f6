//! Where a source puts what it knows.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch::{Receiver, Sender};

use super::memory::Memory;
use super::{Catalog, Edition, Health, Stats, Watches};
use crate::config::Expired;
use crate::table::{Diff, Listing, Standing, diff};

/// The sending side of what a `Handle` receives, as one life of a source has it: once the source
/// has been started again, what its former life says counts no more.
#[derive(Clone, Debug)]
pub struct Output {
    shared: Arc<Shared>,
    life: u64,
}

#[derive(Debug)]
struct Shared {
    catalog: Sender<Option<Edition>>,
    health: Sender<Health>,
    off: Sender<bool>,
    stats: Arc<Stats>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The life that counts.
    life: u64,
    /// The catalog as the source said it, before its age is held against it.
    said: Option<Edition>,
    /// Whether the catalog is too old to serve.
    is_refused: bool,
    problems: Problems,
    facts: BTreeMap<&'static str, String>,
    memory: Option<Arc<Memory>>,
}

/// What is wrong, by who found out.
#[derive(Debug, Default)]
struct Problems {
    source: Option<String>,
    life: Option<String>,
    age: Option<String>,
}

impl Output {
    /// The output of the source of this name, with nothing said yet.
    pub fn new(source: &'static str) -> Self {
        let shared = Shared {
            catalog: Sender::new(None),
            health: Sender::new(Health {
                source,
                problem: None,
                is_failing: false,
                facts: Vec::new(),
                last_answer: None,
            }),
            off: Sender::new(false),
            stats: Arc::default(),
            state: Mutex::default(),
        };
        Output { shared: Arc::new(shared), life: 0 }
    }

    /// The same for the next life of a source, perhaps another one. Nothing that a former life
    /// says arrives from here on; what it said stays.
    pub fn next_life(&self, source: &'static str) -> Output {
        let mut state = self.state();
        state.life += 1;
        // It finds out for itself.
        state.facts.clear();
        self.shared.health.send_if_modified(|health| {
            health.facts.clear();
            std::mem::replace(&mut health.source, source) != source
        });
        Output { shared: self.shared.clone(), life: state.life }
    }

    /// The same for another source, which starts with a clean slate: of the former one only the
    /// catalog, and the word on whether to translate, hold until it has its own.
    pub fn next_source(&self, source: &'static str) -> Output {
        {
            let mut state = self.state();
            state.problems.life = None;
            self.tell(&state.problems, None);
            self.shared.stats.set_watches(Watches::default());
        }
        self.next_life(source)
    }

    /// The receiving side.
    pub fn subscribe(&self) -> (Receiver<Option<Edition>>, Receiver<Health>, Receiver<bool>) {
        let Shared { catalog, health, off, .. } = &*self.shared;
        (catalog.subscribe(), health.subscribe(), off.subscribe())
    }

    /// What the source counts.
    pub fn stats(&self) -> &Arc<Stats> {
        &self.shared.stats
    }

    /// Publishes a catalog whose news came at `heard_at`, unless it says what the last one says.
    pub fn publish(&self, catalog: Catalog, heard_at: Instant) {
        let Some(mut state) = self.living() else { return };
        let is_same = |last: &Edition| {
            let Diff { changed, gone } = diff(&last.catalog, &catalog, |one, other| one == other);
            changed.is_empty() && gone.is_empty()
        };
        if state.said.as_ref().is_some_and(is_same) {
            return;
        }
        tracing::debug!(services = catalog.len(), "the catalog changed");
        state.said = Some(Edition { catalog: Arc::new(catalog), heard_at });
        self.send(&state);
    }

    /// The catalog published last, as the source said it.
    pub fn last(&self) -> Option<Arc<Catalog>> {
        self.state().said.as_ref().map(|edition| edition.catalog.clone())
    }

    /// Says that the source answered.
    pub fn answered(&self, now: Instant) {
        let Some(mut state) = self.living() else { return };
        self.shared.health.send_modify(|health| health.last_answer = Some(now));
        state.problems.age = None;
        self.refuse(&mut state, false);
    }

    /// Says when the source answered an earlier daemon, whose catalog serves.
    pub fn answered_earlier(&self, at: Instant) {
        if self.living().is_some() {
            self.shared.health.send_modify(|health| {
                health.last_answer.get_or_insert(at);
            });
        }
    }

    /// Says whether nothing is to be translated.
    pub fn set_off(&self, off: bool) {
        if self.living().is_some() {
            self.shared.off.send_if_modified(|was| std::mem::replace(was, off) != off);
        }
    }

    /// Says what should be known of `subject` and is no problem, or that there is nothing to know;
    /// the log hears of what is new.
    pub fn set_fact(&self, subject: &'static str, fact: Option<String>) {
        let Some(mut state) = self.living() else { return };
        match fact {
            Some(fact) => state.facts.insert(subject, fact),
            None => state.facts.remove(subject),
        };
        let facts: Vec<String> = state.facts.values().cloned().collect();
        self.shared.health.send_if_modified(|health| {
            for fact in facts.iter().filter(|fact| !health.facts.contains(fact)) {
                tracing::info!(source = health.source, "{fact}");
            }
            std::mem::replace(&mut health.facts, facts.clone()) != facts
        });
    }

    /// Says what is wrong, or that nothing is, and whether the source doesn't answer; the log hears
    /// of the first problem and of its end.
    pub fn set_problem(&self, problem: Option<String>, is_failing: bool) {
        let Some(mut state) = self.living() else { return };
        state.problems.source = problem;
        self.tell(&state.problems, Some(is_failing));
    }

    /// Says what is wrong with the source's life rather than with what it hears.
    pub fn set_life_problem(&self, problem: Option<String>) {
        let mut state = self.state();
        state.problems.life = problem;
        self.tell(&state.problems, None);
    }

    /// Holds the catalog's age against it: past `max_age` that is a problem, and dials are refused
    /// where `expired` wants that.
    pub fn look_at_age(&self, now: Instant, max_age: Duration, expired: Expired) {
        let mut state = self.state();
        let last_answer = self.shared.health.borrow().last_answer;
        let is_old = last_answer.is_some_and(|at| now.saturating_duration_since(at) > max_age);
        state.problems.age = is_old.then(|| {
            let what = match expired {
                Expired::Serve => "its last catalog goes on serving",
                Expired::Refuse => "dials are refused",
            };
            format!(
                "Consul last answered longer ago than catalog.max_age ({max_age:?}): {what}, as \
                 catalog.expired says"
            )
        });
        self.refuse(&mut state, is_old && expired == Expired::Refuse);
        self.tell(&state.problems, None);
    }

    /// Keeps what the source's next life begins with.
    pub fn remember(&self, memory: Arc<Memory>) {
        if let Some(mut state) = self.living() {
            state.memory = Some(memory);
        }
    }

    /// What an earlier life of the source left.
    pub fn memory(&self) -> Option<Arc<Memory>> {
        self.state().memory.clone()
    }

    fn refuse(&self, state: &mut State, is_refused: bool) {
        if std::mem::replace(&mut state.is_refused, is_refused) != is_refused {
            self.send(state);
        }
    }

    fn send(&self, state: &State) {
        let edition = state.said.clone().map(|edition| match state.is_refused {
            false => edition,
            true => Edition { catalog: Arc::new(refused(&edition.catalog)), ..edition },
        });
        self.shared.catalog.send_replace(edition);
    }

    fn tell(&self, problems: &Problems, is_failing: Option<bool>) {
        let Problems { source, life, age } = problems;
        let all: Vec<&str> = [life, age, source].into_iter().flatten().map(|p| &**p).collect();
        let problem = (!all.is_empty()).then(|| all.join("; "));
        self.shared.health.send_if_modified(|health| {
            let is_failing = is_failing.unwrap_or(health.is_failing);
            if health.problem == problem && health.is_failing == is_failing {
                return false;
            }
            match (&health.problem, &problem) {
                (None, Some(problem)) => {
                    tracing::warn!(source = health.source, "{problem}");
                }
                (Some(_), None) => tracing::info!(source = health.source, "all is well again"),
                _ => {}
            }
            health.problem = problem;
            health.is_failing = is_failing;
            true
        });
    }

    /// The state, for a life that counts.
    fn living(&self) -> Option<MutexGuard<'_, State>> {
        Some(self.state()).filter(|state| state.life == self.life)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The catalog with every instance out.
fn refused(catalog: &Catalog) -> Catalog {
    const WHY: &str = "Consul hasn't answered for longer than catalog.max_age, and \
                       catalog.expired is `refuse`";
    let refuse = |listing: &Listing| {
        let mut instances = listing.instances.to_vec();
        for instance in &mut instances {
            if !matches!(instance.standing, Standing::Out(_)) {
                instance.standing = Standing::Out(WHY.into());
            }
        }
        Listing { instances: instances.into(), watch: listing.watch }
    };
    catalog.iter().map(|(name, listing)| (name.clone(), refuse(listing))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::{Home, Instance, Says, Watch};

    fn catalog() -> Catalog {
        let instance = Instance {
            node: "n1".into(),
            id: "1".into(),
            address: "10.0.0.1".into(),
            port: 80,
            weight: 1,
            local: false,
            home: Home::default(),
            standing: Standing::Serving,
            says: Says::default(),
        };
        let listing = Listing { instances: [instance].into(), watch: Watch::Live };
        [("web".into(), listing)].into()
    }

    #[test]
    fn what_is_too_old_alarms_and_is_refused_until_the_source_answers() {
        let start = Instant::now();
        let max_age = Duration::from_secs(60);
        for (expired, serves_when_old) in [(Expired::Serve, true), (Expired::Refuse, false)] {
            let output = Output::new("consul");
            let (published, health, _) = output.subscribe();
            let serves = || {
                let edition = published.borrow().clone().unwrap();
                edition.catalog["web"].instances[0].standing == Standing::Serving
            };
            output.publish(catalog(), start);
            output.answered(start);
            output.look_at_age(start + max_age, max_age, expired);
            assert_eq!((serves(), health.borrow().problem.clone()), (true, None));

            output.look_at_age(start + max_age * 2, max_age, expired);
            assert_eq!(serves(), serves_when_old);
            assert!(health.borrow().problem.as_ref().unwrap().contains("catalog.max_age (60s)"));
            output.publish(catalog(), start);
            assert_eq!(serves(), serves_when_old);

            output.answered(start + max_age * 2);
            output.set_problem(None, false);
            assert_eq!((serves(), health.borrow().problem.clone()), (true, None));
        }
    }

    #[test]
    fn facts_stand_beside_each_other_until_another_life_finds_its_own() {
        let output = Output::new("consul");
        let (_, health, _) = output.subscribe();
        let facts = || health.borrow().facts.clone();
        output.set_fact("names", Some("few".into()));
        output.set_fact("off", Some("denied".into()));
        assert_eq!(facts(), ["few", "denied"]);
        output.set_fact("names", None);
        assert_eq!(facts(), ["denied"]);
        let second = output.next_life("file");
        output.set_fact("off", Some("late".into()));
        second.set_fact("names", None);
        assert!(facts().is_empty());
    }

    #[test]
    fn another_source_is_not_blamed_for_the_former_one() {
        let first = Output::new("consul");
        let (_, health, _) = first.subscribe();
        first.set_life_problem(Some("it hung".into()));
        first.stats().set_watches(Watches { live: 7, ..Watches::default() });
        let second = first.next_life("consul");
        assert_eq!(health.borrow().problem.as_deref(), Some("it hung"));
        second.next_source("file");
        assert_eq!(health.borrow().problem, None);
        assert_eq!(first.stats().watches(), Watches::default());
    }

    #[test]
    fn a_former_life_says_nothing_any_more() {
        let first = Output::new("consul");
        let (published, health, off) = first.subscribe();
        let second = first.next_life("consul");
        first.publish(catalog(), Instant::now());
        first.answered(Instant::now());
        first.set_off(true);
        first.set_problem(Some("it is late".into()), true);
        let health = health.borrow().clone();
        assert_eq!((health.problem, health.last_answer, *off.borrow()), (None, None, false));
        assert!(published.borrow().is_none());
        second.publish(catalog(), Instant::now());
        assert!(published.borrow().is_some());
    }
}

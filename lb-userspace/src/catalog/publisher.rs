//! Publishes what one source reports.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch::{Receiver, Sender};

use super::published::{Health, Published};
use super::snapshot::SavedCatalog;
use super::stats::{Stats, Watches};
use crate::boot::suspended;
use crate::config::Expired;
use crate::counted::counted;
use crate::ordmap::Diff;
use crate::table::Catalog;
use crate::table::{HealthStatus, InstanceGroup, ServiceId, ServiceRecord, Watch};

/// The sender half of a `Handle`, for one run of its source. Once another run has started, writes of this
/// one are ignored.
#[derive(Clone, Debug)]
pub struct Publisher {
    shared: Arc<Shared>,
    epoch: u64,
}

#[derive(Debug)]
struct Shared {
    catalog: Sender<Option<Published>>,
    health: Sender<Health>,
    off: Sender<bool>,
    stats: Arc<Stats>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The current run.
    epoch: u64,
    /// The catalog as the source reported it, before staleness is applied.
    reported: Option<Published>,
    /// When the source last answered for each service of the catalog, if it did.
    answered: BTreeMap<Arc<str>, Instant>,
    /// The services whose instances are too old to serve.
    refused: BTreeSet<Arc<str>>,
    /// The total time in suspension, when last checked.
    suspended: Duration,
    problems: Problems,
    facts: BTreeMap<&'static str, String>,
    memory: Option<Arc<SavedCatalog>>,
}

/// The present problems, by the part that found them.
#[derive(Debug, Default)]
struct Problems {
    source: Option<String>,
    supervisor: Option<String>,
    age: Option<String>,
}

impl Publisher {
    /// A publisher for the source of this name, without a catalog yet.
    pub fn new(source: &'static str) -> Self {
        let shared = Shared {
            catalog: Sender::new(None),
            health: Sender::new(Health {
                source,
                problem: None,
                is_failing: false,
                facts: Vec::new(),
                last_answer: None,
                has_answered: false,
            }),
            off: Sender::new(false),
            stats: Arc::default(),
            state: Mutex::new(State { suspended: suspended(), ..State::default() }),
        };
        Publisher { shared: Arc::new(shared), epoch: 0 }
    }

    /// A publisher for the next run of the source. What was published stays; later writes of earlier
    /// runs are ignored.
    pub fn new_epoch(&self) -> Publisher {
        let mut state = self.state();
        state.epoch += 1;
        // It finds out for itself.
        state.facts.clear();
        self.shared.health.send_modify(|health| health.facts.clear());
        Publisher { shared: self.shared.clone(), epoch: state.epoch }
    }

    /// A publisher for the source with another configuration, which starts with a clean slate: only the
    /// catalog, with its age, and the state of the kill switch apply until the new run has its own.
    pub fn next_configuration(&self) -> Publisher {
        {
            let mut state = self.state();
            state.problems.supervisor = None;
            self.report(&state.problems, None);
            self.shared.stats.set_watches(Watches::default());
        }
        self.new_epoch()
    }

    /// The name of the source.
    pub fn source(&self) -> &'static str {
        self.shared.health.borrow().source
    }

    /// The receiver half.
    pub fn subscribe(&self) -> (Receiver<Option<Published>>, Receiver<Health>, Receiver<bool>) {
        let Shared { catalog, health, off, .. } = &*self.shared;
        (catalog.subscribe(), health.subscribe(), off.subscribe())
    }

    /// The statistics of the source.
    pub fn stats(&self) -> &Arc<Stats> {
        &self.shared.stats
    }

    /// Publishes a catalog whose news arrived at `news_at`, unless it equals the last one. It may be a new
    /// map: what is equal is shared with the last one, so that later comparisons cost what differs.
    pub fn publish(&self, catalog: Catalog, news_at: Instant) {
        let catalog = match self.last() {
            Some(last) => catalog.sharing(&last),
            None => catalog,
        };
        self.publish_aged(Some(catalog), news_at, Vec::new());
    }

    /// As [`Publisher::publish`], if there is a catalog, which should share with the last one what is
    /// equal. `answered` lists the services that the source answered for, and when; their answers are in
    /// this catalog or the last one, which ends their staleness.
    pub fn publish_aged(
        &self,
        catalog: Option<Catalog>,
        news_at: Instant,
        answered: Vec<(Arc<str>, Instant)>,
    ) {
        let Some(mut state) = self.current() else { return };
        let n_refused = state.refused.len();
        let last = state.reported.as_ref().map(|published| published.catalog.clone());
        let known = catalog.as_ref().or(last.as_ref());
        for (name, at) in answered {
            state.refused.remove(&name);
            if known.is_none_or(|known| known.contains_key(&ServiceId::new(name.clone()))) {
                state.answered.insert(name, at);
            }
        }
        let mut has_changed = state.refused.len() != n_refused;
        if let Some(catalog) = catalog {
            let is_first = last.is_none();
            let last = last.unwrap_or_default();
            let Diff { changed, gone } = last.diff(&catalog);
            if is_first || !(changed.is_empty() && gone.is_empty()) {
                tracing::debug!(services = catalog.len(), "the catalog changed");
                for (id, _) in gone {
                    state.answered.remove(&id.name);
                    state.refused.remove(&id.name);
                }
                state.reported = Some(Published { catalog, news_at });
                has_changed = true;
            }
        }
        if has_changed {
            self.send(&state);
        }
    }

    /// The catalog published last, as the source reported it.
    pub fn last(&self) -> Option<Catalog> {
        self.state().reported.as_ref().map(|published| published.catalog.clone())
    }

    /// Reports that the source answered about the catalog; [`Publisher::publish_aged`] has for which
    /// services.
    pub fn mark_success(&self, now: Instant) {
        if self.current().is_some() {
            self.shared.health.send_modify(|health| {
                (health.last_answer, health.has_answered) = (Some(now), true);
            });
        }
    }

    /// Reports when the source answered an earlier daemon, whose catalog serves.
    pub fn mark_earlier_success(&self, at: Instant) {
        if self.current().is_some() {
            self.shared.health.send_modify(|health| {
                health.last_answer.get_or_insert(at);
            });
        }
    }

    /// Reports whether translation is switched off.
    pub fn set_off(&self, off: bool) {
        if self.current().is_some() {
            self.shared.off.send_if_modified(|was| std::mem::replace(was, off) != off);
        }
    }

    /// Sets or removes the notice about `subject`: information that is no problem. A new one is
    /// logged.
    pub fn set_notice(&self, subject: &'static str, fact: Option<String>) {
        let Some(mut state) = self.current() else { return };
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

    /// Sets what is wrong, if anything, and whether the source doesn't answer. The first problem and
    /// its end are logged.
    pub fn set_problem(&self, problem: Option<String>, is_failing: bool) {
        let Some(mut state) = self.current() else { return };
        state.problems.source = problem;
        self.report(&state.problems, Some(is_failing));
    }

    /// Sets what is wrong with the run of the source, rather than with its answers.
    pub fn set_supervisor_problem(&self, problem: Option<String>) {
        let mut state = self.state();
        state.problems.supervisor = problem;
        self.report(&state.problems, None);
    }

    /// Applies staleness to each service: an age above `max_age` is a problem where the service is
    /// watched, and with `expired` its connections are refused. Only answers about the service count.
    /// The clock of an [`Instant`] stands still while the machine is suspended; `suspended` is the total
    /// time in suspension.
    pub fn check_age(
        &self,
        now: Instant,
        suspended: Duration,
        max_age: Duration,
        expired: Expired,
    ) {
        let mut state = self.state();
        let asleep = suspended.saturating_sub(state.suspended);
        // The two clocks aren't read at the same moment.
        if asleep > Duration::from_secs(1) {
            state.suspended = suspended;
            let earlier = |at: &mut Instant| *at = at.checked_sub(asleep).unwrap_or(*at);
            state.answered.values_mut().for_each(earlier);
            self.shared.health.send_modify(|health| {
                health.last_answer.iter_mut().for_each(earlier);
            });
        }
        let is_old = |at: Instant| now.saturating_duration_since(at) > max_age;
        let source_is_old = self.shared.health.borrow().last_answer.is_some_and(is_old);
        let old = state.answered.iter().filter(|(_, at)| is_old(**at));
        let old: BTreeSet<Arc<str>> = old.map(|(name, _)| name.clone()).collect();
        let catalog = state.reported.as_ref().map(|published| &published.catalog);
        let watch = |name: &Arc<str>| {
            catalog?.get(&ServiceId::new(name.clone())).map(|record| record.watch)
        };
        let mut live = old.iter().filter(|name| watch(name) == Some(Watch::Live));
        let what = match (source_is_old, live.next(), live.count()) {
            (true, ..) => Some(String::new()),
            (false, Some(name), 0) => Some(format!(" for `{name}`")),
            (false, Some(name), n) => {
                Some(format!(" for `{name}` and {}", counted(n, "more service")))
            }
            (false, None, _) => None,
        };
        state.problems.age = what.map(|what| {
            let then = match expired {
                Expired::Serve => "what was known last goes on serving",
                Expired::Refuse => "connects are refused",
            };
            format!(
                "Consul last answered{what} longer ago than catalog.max_age ({max_age:?}): {then}, \
                 as catalog.expired says"
            )
        });
        let refused = if expired == Expired::Refuse { old } else { BTreeSet::new() };
        if std::mem::replace(&mut state.refused, refused.clone()) != refused {
            self.send(&state);
        }
        self.report(&state.problems, None);
    }

    /// Keeps the state that the next run of the source begins with.
    pub fn remember(&self, memory: Arc<SavedCatalog>) {
        if let Some(mut state) = self.current() {
            state.memory = Some(memory);
        }
    }

    /// The state that an earlier run of the source left.
    pub fn memory(&self) -> Option<Arc<SavedCatalog>> {
        self.state().memory.clone()
    }

    fn send(&self, state: &State) {
        let published = state.reported.clone().map(|published| match state.refused.is_empty() {
            true => published,
            false => {
                let catalog = refused(&published.catalog, &state.refused);
                Published { catalog, ..published }
            }
        });
        self.shared.catalog.send_replace(published);
    }

    fn report(&self, problems: &Problems, is_failing: Option<bool>) {
        let Problems { source, supervisor, age } = problems;
        let all: Vec<&str> =
            [supervisor, age, source].into_iter().flatten().map(|p| &**p).collect();
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

    /// The state, for the current run only.
    fn current(&self) -> Option<MutexGuard<'_, State>> {
        Some(self.state()).filter(|state| state.epoch == self.epoch)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The catalog with every instance of these services out.
fn refused(catalog: &Catalog, names: &BTreeSet<Arc<str>>) -> Catalog {
    const WHY: &str = "Consul hasn't answered for the service for longer than catalog.max_age, and \
                       catalog.expired is `refuse`";
    let mut catalog = catalog.clone();
    for name in names {
        let id = ServiceId::new(name.clone());
        let Some(record) = catalog.get(&id) else { continue };
        let refused = |group: &InstanceGroup| {
            let mut instances = group.instances.to_vec();
            for instance in instances.iter_mut().filter(|instance| instance.health.serves()) {
                instance.health = HealthStatus::Out(WHY.into());
            }
            InstanceGroup { instances: instances.into(), ..group.clone() }
        };
        let groups = record.groups.iter().map(refused).collect();
        let record = ServiceRecord { groups, watch: record.watch };
        catalog.insert(id, record);
    }
    catalog
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::{Instance, NodeIdentity, ServiceMeta};

    fn catalog() -> Catalog {
        let instance = Instance {
            node: "n1".into(),
            id: "1".into(),
            address: "10.0.0.1".into(),
            port: 80,
            weight: 1,
            local: false,
            node_identity: NodeIdentity::default(),
            node_address: None,
            is_checked: true,
            is_critical: false,
            created: 0,
            may_be_local: false,
            health: HealthStatus::Serving,
            meta: ServiceMeta::default(),
        };
        let record = ServiceRecord::new([instance].into(), Watch::Live);
        [(ServiceId::new("web"), record)].into_iter().collect()
    }

    /// `web`, `db` and a `cold` one, each of an instance that serves.
    fn three() -> Catalog {
        let record = catalog()["web"].clone();
        let cold = ServiceRecord { watch: Watch::Cold, ..record.clone() };
        let all = [("web", record.clone()), ("db", record), ("cold", cold)];
        all.into_iter().map(|(name, record)| (ServiceId::new(name), record)).collect()
    }

    fn all(at: Instant) -> Vec<(Arc<str>, Instant)> {
        ["web", "db", "cold"].map(|name| (Arc::from(name), at)).into()
    }

    #[test]
    fn what_is_too_old_is_a_problem_and_refused_until_the_source_answers_for_it() {
        const SECOND: Duration = Duration::from_secs(1);
        let start = Instant::now();
        let (max_age, base) = (60 * SECOND, suspended());
        for expired in [Expired::Serve, Expired::Refuse] {
            let output = Publisher::new("consul");
            let (published, health, _) = output.subscribe();
            let serving = || {
                let published = published.borrow().clone().unwrap();
                let serves = |record: &ServiceRecord| {
                    record.instances().any(|instance| instance.health.serves())
                };
                let serving = published.catalog.iter().filter(|(_, record)| serves(record));
                serving.map(|(id, _)| id.name.to_string()).collect::<Vec<_>>().join(" ")
            };
            let look = |after: Duration, suspended: Duration| {
                output.check_age(start + after, base + suspended, max_age, expired);
                health.borrow().problem.clone().unwrap_or_default()
            };
            let if_refused = |refused: &str| match expired {
                Expired::Serve => "cold db web".to_owned(),
                Expired::Refuse => refused.to_owned(),
            };
            output.publish_aged(Some(three()), start, all(start));
            output.mark_success(start);
            assert_eq!(
                (look(max_age, Duration::ZERO), serving()),
                ("".into(), "cold db web".into())
            );

            // One answers all the time, which makes no other one younger.
            output.publish_aged(None, start, vec![("db".into(), start + max_age)]);
            output.mark_success(start + max_age);
            let problem = look(max_age + SECOND, Duration::ZERO);
            assert!(
                problem.contains("for `web` longer ago than catalog.max_age (60s)"),
                "{problem}"
            );
            assert_eq!(serving(), if_refused("db"));
            output.mark_success(start + max_age + SECOND);
            assert_eq!(serving(), if_refused("db"), "what is asked beside says nothing of it");

            // Its own answer does, together with what it said.
            let at = start + max_age + SECOND;
            output.publish_aged(Some(three()), at, vec![("web".into(), at)]);
            assert_eq!(serving(), if_refused("db web"));
            assert_eq!(look(max_age + SECOND, Duration::ZERO), "");

            // Nothing answers; or the machine slept.
            let problem = look(2 * max_age + 2 * SECOND, Duration::ZERO);
            assert!(problem.contains("answered longer ago"), "{problem}");
            assert_eq!(serving(), if_refused(""));
            let later = start + 3 * max_age;
            output.publish_aged(None, later, all(later));
            output.mark_success(later);
            assert_eq!(look(3 * max_age, Duration::ZERO), "");
            assert_eq!(serving(), "cold db web");
            assert_ne!(look(3 * max_age, 2 * max_age), "");
            assert_eq!(serving(), if_refused(""));
        }
    }

    #[test]
    fn what_is_equal_is_shared_with_the_last_catalog() {
        let output = Publisher::new("consul");
        let groups = || output.last().unwrap()["web"].groups.clone();
        output.publish(catalog(), Instant::now());
        let before = groups();
        output.publish(three(), Instant::now());
        assert!(Arc::ptr_eq(&before, &groups()));
    }

    #[test]
    fn notices_stay_until_another_run_finds_its_own() {
        let output = Publisher::new("consul");
        let (_, health, _) = output.subscribe();
        let facts = || health.borrow().facts.clone();
        output.set_notice("names", Some("few".into()));
        output.set_notice("off", Some("denied".into()));
        assert_eq!(facts(), ["few", "denied"]);
        output.set_notice("names", None);
        assert_eq!(facts(), ["denied"]);
        let second = output.new_epoch();
        output.set_notice("off", Some("late".into()));
        second.set_notice("names", None);
        assert!(facts().is_empty());
    }

    #[test]
    fn another_configuration_is_not_blamed_for_the_former_one() {
        let first = Publisher::new("consul");
        let (_, health, _) = first.subscribe();
        first.set_supervisor_problem(Some("it hung".into()));
        first.stats().set_watches(Watches { live: 7, ..Watches::default() });
        let second = first.new_epoch();
        assert_eq!(health.borrow().problem.as_deref(), Some("it hung"));
        second.next_configuration();
        assert_eq!(health.borrow().problem, None);
        assert_eq!(first.stats().watches(), Watches::default());
    }

    #[test]
    fn writes_of_an_earlier_run_are_ignored() {
        let first = Publisher::new("consul");
        let (published, health, off) = first.subscribe();
        let second = first.new_epoch();
        first.publish(catalog(), Instant::now());
        first.mark_success(Instant::now());
        first.set_off(true);
        first.set_problem(Some("it is late".into()), true);
        let health = health.borrow().clone();
        assert_eq!((health.problem, health.last_answer, *off.borrow()), (None, None, false));
        assert!(published.borrow().is_none());
        second.publish(catalog(), Instant::now());
        assert!(published.borrow().is_some());
    }

    #[test]
    fn what_an_earlier_daemon_got_is_no_answer_to_this_one() {
        let output = Publisher::new("consul");
        let (_, health, _) = output.subscribe();
        let now = Instant::now();
        output.mark_earlier_success(now);
        let of = |health: &Health| (health.last_answer, health.has_answered);
        assert_eq!(of(&health.borrow()), (Some(now), false));
        output.mark_success(now);
        assert_eq!(of(&health.borrow()), (Some(now), true));
    }
}

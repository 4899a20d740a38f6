//! The machine on a made-up clock, against a made-up Consul.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::catalog::consul::hold_down::InstanceKey;
use crate::config::{CatalogConfig, Config, ConsulConfig, WatchPolicy};
use crate::table::{HealthStatus, Instance, NodeIdentity, ServiceId, ServiceMeta, Watch};

const S: Duration = Duration::from_secs(1);

fn settings(watch: WatchPolicy, max_connections: usize) -> Settings {
    Settings {
        consul: ConsulConfig { max_connections, ..ConsulConfig::default() },
        catalog: Arc::new(CatalogConfig { watch, ..Config::default().catalog }),
        in_use: Vec::new(),
        cache: None,
        timing: Timing::default(),
    }
}

fn instance(id: u8) -> Instance {
    Instance {
        node: "n1".into(),
        id: id.to_string(),
        address: "10.0.0.1".into(),
        port: 1000 + i64::from(id),
        weight: 1,
        local: false,
        node_identity: NodeIdentity::default(),
        node_address: None,
        may_be_local: false,
        health: HealthStatus::Serving,
        meta: ServiceMeta::default(),
    }
}

/// A machine, its clock, and a Consul that answers when the test has it answer.
struct Rig {
    machine: Machine,
    now: Instant,
    /// The names of Consul, each with so many instances.
    services: BTreeMap<Arc<str>, u8>,
    index: u64,
    /// The requests, each with the moment at which it was sent.
    under_way: Vec<(RequestId, Query, QueryOptions, Instant)>,
    catalog: Option<Catalog>,
    is_off: bool,
    problem: Option<String>,
    saved: Option<Arc<SavedCatalog>>,
    n_confirmed: usize,
}

impl Rig {
    fn new(settings: Settings, saved: SavedCatalog, services: &[(&str, u8)]) -> Rig {
        let now = Instant::now();
        let mut rig = Rig {
            machine: Machine::new(settings, saved, fastrand::Rng::with_seed(7), now),
            now,
            services: services.iter().map(|(name, n)| (Arc::from(*name), *n)).collect(),
            index: 10,
            under_way: Vec::new(),
            catalog: None,
            is_off: false,
            problem: None,
            saved: None,
            n_confirmed: 0,
        };
        rig.settle();
        rig
    }

    fn settle(&mut self) {
        // An abort is an event, which may have effects of its own.
        loop {
            let mut aborted = Vec::new();
            for effect in self.machine.settle(self.now) {
                match effect {
                    Effect::Ask(id, query, options) => {
                        self.under_way.push((id, query, options, self.now));
                    }
                    Effect::Abort(id) => aborted.push(id),
                    Effect::Publish(Some(catalog), ..) => self.catalog = Some(catalog),
                    Effect::SetOff(is_off) => self.is_off = is_off,
                    Effect::SetProblem(problem, _) => self.problem = problem,
                    Effect::CountShrinkHeld => self.n_confirmed += 1,
                    Effect::Reply(waiting, lookup) => {
                        for reply in waiting {
                            let _ = reply.send(lookup);
                        }
                    }
                    Effect::Save(saved, _) => {
                        self.saved = Some(saved);
                        self.machine.handle(Event::Saved, self.now);
                    }
                    _ => {}
                }
            }
            for id in &aborted {
                self.under_way.retain(|(other, ..)| other != id);
                self.machine.handle(Event::Ended(*id, None), self.now);
            }
            if aborted.is_empty() {
                return;
            }
        }
    }

    fn event(&mut self, event: Event) {
        self.machine.handle(event, self.now);
        self.settle();
    }

    /// What Consul would answer now.
    fn answer(&self, query: &Query) -> Response {
        match query {
            Query::Names => Response::Names(List {
                tagged: self.services.keys().cloned().collect(),
                others: BTreeSet::new(),
            }),
            Query::Switch => Response::Switch(false),
            Query::Agent => Response::Agent(Node::Named("n1".into())),
            Query::Service(name) => Response::Service(ServiceAnswer {
                instances: Some(
                    (0..self.services.get(name).copied().unwrap_or(0)).map(instance).collect(),
                ),
                unchecked: Vec::<InstanceKey>::new(),
            }),
            Query::Lookup(name) => {
                let is_there = self.services.contains_key(name);
                Response::Lookup(is_there.then(|| name.clone()))
            }
        }
    }

    /// Ends the request at this place, with this answer or a failure.
    fn end(&mut self, idx: usize, index: Option<u64>, response: Option<Response>) {
        let (id, ..) = self.under_way.remove(idx);
        let result = match response {
            Some(response) => {
                Ok(Answer { index, response, n_bytes: 100, is_filtered: false, news_at: self.now })
            }
            None => Err(QueryFailure { problem: "it failed".into(), is_denied: false }),
        };
        self.event(Event::Ended(id, Some(result)));
    }

    /// Ends the request at this place as Consul would.
    fn end_well(&mut self, idx: usize) {
        let response = self.answer(&self.under_way[idx].1);
        self.end(idx, Some(self.index), Some(response));
    }

    /// Lets time pass, settling whenever the machine wants to.
    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while self.machine.next_wake() <= end {
            // A wake that doesn't move would be a busy loop in the daemon.
            let wake = self.machine.next_wake().max(self.now);
            assert!(wake > self.now || self.machine.next_wake() < self.now, "it spins");
            self.now = wake;
            self.settle();
        }
        self.now = end;
        self.settle();
    }

    /// Answers for so long as Consul does: at once, but a long poll without news when its wait is
    /// over. Watches that share connections get their turns by that end alone.
    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            let is_answered = |(_, _, options, sent): &(_, _, QueryOptions, Instant)| {
                options.ask != ReadMode::Blocking(self.index) || self.now >= *sent + options.wait
            };
            match self.under_way.iter().position(is_answered) {
                Some(idx) => self.end_well(idx),
                None => self.pass(Duration::from_millis(100)),
            }
        }
    }

    fn n_instances(&self, name: &str) -> Option<usize> {
        Some(self.catalog.as_ref()?.get(&ServiceId::new(name))?.instances().count())
    }

    fn look_up(&mut self, name: &str) -> oneshot::Receiver<Lookup> {
        let (reply, receiver) = oneshot::channel();
        let request = LookupRequest { name: name.into(), reply: Some(reply) };
        self.event(Event::Command(SourceCommand::Lookup(request)));
        receiver
    }
}

#[test]
fn follows_names_and_instances_and_confirms_a_loss() {
    let mut rig = Rig::new(settings(WatchPolicy::All, 8), SavedCatalog::default(), &[("web", 2)]);
    rig.run(S);
    assert_eq!((rig.n_instances("web"), rig.problem.clone()), (Some(2), None));
    rig.index += 1;
    rig.services.insert("web".into(), 0);
    rig.run(2 * S);
    assert_eq!((rig.n_instances("web"), rig.n_confirmed), (Some(0), 1));
    rig.index += 1;
    rig.services.insert("db".into(), 1);
    rig.run(15 * S);
    assert_eq!((rig.n_instances("web"), rig.n_instances("db")), (Some(0), Some(1)));
}

#[test]
fn a_lookup_is_answered_by_what_consul_answers() {
    let mut rig = Rig::new(settings(WatchPolicy::Used, 8), SavedCatalog::default(), &[("web", 2)]);
    rig.run(S);
    assert_eq!(rig.n_instances("web"), Some(0), "it is cold");
    rig.services.insert("new".into(), 1);
    // (name, what is answered)
    for (name, expected) in
        [("web", Lookup::Exists), ("new", Lookup::Exists), ("made-up", Lookup::Absent)]
    {
        let mut reply = rig.look_up(name);
        assert!(reply.try_recv().is_err(), "{name} before Consul has answered");
        rig.run(S);
        assert_eq!(reply.try_recv(), Ok(expected), "{name}");
    }
    assert_eq!((rig.n_instances("web"), rig.n_instances("new")), (Some(2), Some(1)));
}

#[test]
fn what_is_used_no_more_goes_cold_and_what_was_saved_serves_the_next_run() {
    let services = [("web", 2), ("db", 1)];
    let mut rig = Rig::new(settings(WatchPolicy::Used, 8), SavedCatalog::default(), &services);
    rig.run(S);
    drop(rig.look_up("web"));
    rig.run(10 * S);
    assert_eq!(rig.n_instances("web"), Some(2));
    let (done, _) = oneshot::channel();
    rig.event(Event::Command(SourceCommand::Flush(done)));
    let saved = (**rig.saved.as_ref().unwrap()).clone();
    let watch = |rig: &Rig| rig.catalog.as_ref().unwrap()["web"].watch;
    assert_eq!(watch(&rig), Watch::Live);
    rig.run(31 * 60 * S);
    assert_eq!(watch(&rig), Watch::Cold);

    // Consul is silent: what was saved serves once its time is over.
    let mut next = Rig::new(settings(WatchPolicy::Used, 8), saved, &services);
    assert_eq!(next.n_instances("web"), None, "Consul is asked first");
    next.pass(3 * S);
    assert_eq!(next.n_instances("web"), Some(2));
}

#[test]
fn another_token_has_everything_asked_again() {
    let mut rig = Rig::new(settings(WatchPolicy::All, 8), SavedCatalog::default(), &[("web", 2)]);
    rig.run(20 * S);
    let blocking = |rig: &Rig| {
        let asked = rig.under_way.iter();
        asked.filter(|(_, _, how, _)| matches!(how.ask, ReadMode::Blocking(_))).count()
    };
    assert!(blocking(&rig) > 0);
    rig.event(Event::TokenChanged);
    rig.pass(S);
    assert_eq!(blocking(&rig), 0);
    let asked: Vec<&Query> = rig.under_way.iter().map(|(_, query, ..)| query).collect();
    for query in [Query::Names, Query::Switch, Query::Agent, Query::Service("web".into())] {
        assert!(asked.contains(&&query), "{query:?} in {asked:?}");
    }
}

#[test]
fn a_service_that_a_server_behind_knows_nothing_of_gets_its_turn() {
    let names: Vec<String> = (0..16).map(|n| format!("s{n}")).collect();
    let services: Vec<(&str, u8)> = names.iter().map(|name| (&**name, 3)).collect();
    let mut rig = Rig::new(settings(WatchPolicy::Used, 7), SavedCatalog::default(), &services);
    rig.run(S);
    for name in names.iter().filter(|name| *name != "s5") {
        drop(rig.look_up(name));
    }
    rig.run(60 * S);
    let n_held = rig.under_way.iter().filter(|(_, query, options, _)| {
        matches!(query, Query::Service(_)) && options.ask == ReadMode::Blocking(rig.index)
    });
    assert_eq!(n_held.count(), 4, "all shared connections are held");
    // There is nothing yet that the answer would take away, so it needs no confirmation.
    drop(rig.look_up("s5"));
    let is_meant = |query: &Query| *query == Query::Service("s5".into());
    let idx = rig.under_way.iter().position(|(_, query, ..)| is_meant(query)).unwrap();
    let nothing = ServiceAnswer { instances: Some(Vec::new()), unchecked: Vec::new() };
    rig.end(idx, Some(1), Some(Response::Service(nothing)));
    assert_eq!(rig.n_instances("s5"), Some(0));
    // A round of 16 services on 4 connections.
    rig.run(4 * Timing::default().turn + S);
    assert_eq!(rig.n_instances("s5"), Some(3));
}

/// What happens next in a random run.
#[derive(Clone, Debug)]
enum Step {
    /// A request ends as Consul would answer it.
    Answer(prop::sample::Index),
    /// A request fails.
    Fail(prop::sample::Index),
    /// A server that is behind, as in an election, answers with nothing and an older index, or none.
    Reset(prop::sample::Index),
    /// An answer without an index.
    WithoutIndex(prop::sample::Index),
    /// Time passes, in milliseconds.
    Pass(u16),
    /// A service is looked up.
    LookUp(u8),
    TokenChanged,
    Suspended(u16),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => any::<prop::sample::Index>().prop_map(Step::Answer),
        3 => any::<prop::sample::Index>().prop_map(Step::Fail),
        2 => any::<prop::sample::Index>().prop_map(Step::Reset),
        1 => any::<prop::sample::Index>().prop_map(Step::WithoutIndex),
        4 => (0..3000_u16).prop_map(Step::Pass),
        2 => (0..30_u8).prop_map(Step::LookUp),
        1 => Just(Step::TokenChanged),
        1 => (2..100_u16).prop_map(Step::Suspended),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever answers, failures, resets of the index, tokens and lookups come in whatever order:
    /// nothing is published that lacks an instance, as none ever went; never more requests are under
    /// way than connections; each watch is asked again; and in the end all are followed.
    #[test]
    fn no_failure_takes_anything_away_and_all_is_asked_again(
        n_services in 1..20_u8,
        max_connections in 4..12_usize,
        is_all: bool,
        steps in prop::collection::vec(step(), 200),
    ) {
        let watch = if is_all { WatchPolicy::All } else { WatchPolicy::Used };
        let names: Vec<String> = (0..n_services).map(|n| format!("s{n}")).collect();
        let services: Vec<(&str, u8)> = names.iter().map(|name| (&**name, 3)).collect();
        let mut rig = Rig::new(settings(watch, max_connections), SavedCatalog::default(), &services);
        rig.run(3 * S);
        let mut known: BTreeSet<String> = BTreeSet::new();
        let mut keeps_all = |rig: &Rig| {
            for (id, record) in rig.catalog.iter().flat_map(|catalog| catalog.iter()) {
                let (name, n) = (&id.name, record.instances().count());
                prop_assert!(n == 3 || n == 0 && !known.contains(&**name), "{name} has {n}");
                if n == 3 {
                    known.insert(name.to_string());
                }
            }
            let catalog = rig.catalog.as_ref();
            let is_lost = |name: &&String| {
                catalog.is_none_or(|all| all.get(&ServiceId::new(name.as_str())).is_none())
            };
            let lost = known.iter().find(is_lost);
            prop_assert_eq!(lost, None);
            Ok::<(), TestCaseError>(())
        };
        for step in steps {
            let n = rig.under_way.len();
            match step {
                Step::Answer(idx) if n > 0 => rig.end_well(idx.index(n)),
                Step::Fail(idx) if n > 0 => rig.end(idx.index(n), None, None),
                Step::Reset(idx) if n > 0 => {
                    let idx = idx.index(n);
                    let response = match &rig.under_way[idx].1 {
                        // Such a one doesn't answer these.
                        query if rig.under_way[idx].2.ask == ReadMode::Consistent => rig.answer(query),
                        Query::Names => Response::Names(List::default()),
                        Query::Service(_) => Response::Service(ServiceAnswer {
                            instances: Some(Vec::new()),
                            unchecked: Vec::new(),
                        }),
                        query => rig.answer(query),
                    };
                    let index = if rig.index.is_multiple_of(2) { Some(1) } else { None };
                    rig.index += 1;
                    rig.end(idx, index, Some(response));
                }
                Step::WithoutIndex(idx) if n > 0 => {
                    let idx = idx.index(n);
                    let response = rig.answer(&rig.under_way[idx].1);
                    rig.end(idx, None, Some(response));
                }
                Step::Pass(ms) => rig.pass(Duration::from_millis(ms.into())),
                Step::LookUp(n) => drop(rig.look_up(&format!("s{n}"))),
                Step::TokenChanged => rig.event(Event::TokenChanged),
                Step::Suspended(s) => rig.event(Event::Suspended(S * s.into())),
                _ => {}
            }
            prop_assert!(rig.under_way.len() <= max_connections, "{:?}", rig.under_way);
            for query in [Query::Names, Query::Switch] {
                let n = rig.under_way.iter().filter(|(_, other, ..)| *other == query).count();
                prop_assert!(n <= 1, "{n} of {query:?}");
            }
            keeps_all(&rig)?;
        }
        // Consul is well again: everything is followed. A watch that was answered with an old index, or
        // with nothing before anything was known, waits for a turn, of which a round takes 38 s at most
        // (19 services on one connection).
        rig.index = 1000;
        for n in 0..n_services {
            drop(rig.look_up(&format!("s{n}")));
        }
        for _ in 0..120 {
            rig.run(S);
            keeps_all(&rig)?;
        }
        for name in &names {
            prop_assert_eq!(rig.n_instances(name), Some(3), "{}: {:?}", name, rig.problem);
        }
    }
}

//! The machine on a made-up clock, against a made-up Consul.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::catalog::consul::hold_down::InstanceKey;
use crate::catalog::inspection::{InspectedInstance, Inspection};
use crate::config::{CatalogConfig, Config, ConsulConfig, WatchPolicy};
use crate::table::{Instance, ServiceId, Watch};

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
    Instance { id: id.to_string(), port: 1000 + i64::from(id), ..Instance::fixture() }
}

/// A machine, its clock, and a Consul that answers at the test's command.
struct MachineRig {
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

impl MachineRig {
    fn new(settings: Settings, saved: SavedCatalog, services: &[(&str, u8)]) -> MachineRig {
        let now = Instant::now();
        let mut rig = MachineRig {
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
                    Effect::Send(id, query, options) => {
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
                    Effect::ReplyInspection(waiting, result) => {
                        for reply in waiting {
                            let _ = reply.send(result.clone());
                        }
                    }
                    Effect::Save(saved, _) => {
                        self.saved = Some(saved);
                        self.machine.handle(MachineEvent::Saved, self.now);
                    }
                    _ => {}
                }
            }
            for id in &aborted {
                self.under_way.retain(|(other, ..)| other != id);
                self.machine.handle(MachineEvent::Ended(*id, None), self.now);
            }
            if aborted.is_empty() {
                return;
            }
        }
    }

    fn event(&mut self, event: MachineEvent) {
        self.machine.handle(event, self.now);
        self.settle();
        self.machine.store.check();
    }

    /// Consul's present answer.
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
            Query::Inspect(name) => {
                let n = self.services.get(name).copied().unwrap_or(0);
                let instances = (0..n).map(|_| InspectedInstance::default()).collect();
                Response::Inspection(Inspection { instances, ..Inspection::default() })
            }
        }
    }

    fn inspect(&mut self, name: &str) -> oneshot::Receiver<InspectResult> {
        let (reply, inspected) = oneshot::channel();
        let request = InspectRequest { name: name.into(), reply };
        self.event(MachineEvent::Command(SourceCommand::Inspect(request)));
        inspected
    }

    /// Ends the request of this index with this answer or a failure.
    fn end(&mut self, idx: usize, index: Option<u64>, response: Option<Response>) {
        let (id, ..) = self.under_way.remove(idx);
        let result = match response {
            Some(response) => {
                Ok(Answer { index, response, n_bytes: 100, is_filtered: false, news_at: self.now })
            }
            None => Err(QueryFailure { problem: "it failed".into(), is_denied: false }),
        };
        self.event(MachineEvent::Ended(id, Some(result)));
    }

    /// Ends the request of this index with Consul's present answer.
    fn end_well(&mut self, idx: usize) {
        let response = self.answer(&self.under_way[idx].1);
        self.end(idx, Some(self.index), Some(response));
    }

    /// Lets time pass, and settles when the machine is due.
    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while self.machine.next_wake() <= end {
            // A wake that doesn't advance would be a busy loop in the daemon.
            let wake = self.machine.next_wake().max(self.now);
            assert!(wake > self.now || self.machine.next_wake() < self.now, "it spins");
            self.now = wake;
            self.settle();
        }
        self.now = end;
        self.settle();
    }

    /// Answers for so long as Consul does: at once, but a blocking query without news when its wait is
    /// over. Watches that share connections get their turns by that alone.
    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            let is_answered = |(_, _, options, sent): &(_, _, QueryOptions, Instant)| {
                options.mode != ReadMode::Blocking(self.index) || self.now >= *sent + options.wait
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
        self.event(MachineEvent::Command(SourceCommand::Lookup(request)));
        receiver
    }
}

#[test]
fn follows_names_and_instances_and_confirms_a_loss() {
    let mut rig =
        MachineRig::new(settings(WatchPolicy::All, 8), SavedCatalog::default(), &[("web", 2)]);
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

/// Where few services are live, only the list shows that their loss is one of many: it isn't waited for.
#[test]
fn a_lost_service_has_the_list_read() {
    let names: Vec<String> = (0..60).map(|n| format!("s{n}")).collect();
    let mut services: Vec<(&str, u8)> = names.iter().map(|name| (&**name, 1)).collect();
    services.extend([("web", 1), ("other", 1)]);
    let mut rig =
        MachineRig::new(settings(WatchPolicy::Auto, 8), SavedCatalog::default(), &services);
    rig.run(S);
    let _found = rig.look_up("web");
    rig.run(6 * S);
    assert_eq!((rig.n_instances("web"), rig.n_instances("s1")), (Some(1), Some(0)));
    rig.index += 1;
    rig.services.retain(|name, _| &**name == "other");
    rig.run(S);
    assert_eq!(rig.n_instances("web"), Some(1), "{:?}", rig.problem);
}

#[test]
fn a_lookup_gets_the_result_that_consul_answers() {
    let mut rig =
        MachineRig::new(settings(WatchPolicy::Used, 8), SavedCatalog::default(), &[("web", 2)]);
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
fn a_use_of_a_name_that_another_source_has_takes_nothing_from_lookups() {
    let mut rig =
        MachineRig::new(settings(WatchPolicy::Used, 8), SavedCatalog::default(), &[("web", 2)]);
    rig.run(S);
    for n in 0..100 {
        let request = LookupRequest { name: format!("file-{n}").into(), reply: None };
        rig.event(MachineEvent::Command(SourceCommand::Lookup(request)));
    }
    assert!(!rig.under_way.iter().any(|(_, query, ..)| matches!(query, Query::Lookup(_))));
    let mut reply = rig.look_up("made-up");
    rig.run(S);
    assert_eq!(reply.try_recv(), Ok(Lookup::Absent), "the rate limit is untouched");
}

#[test]
fn an_idle_service_goes_cold_and_the_saved_catalog_serves_the_next_run() {
    let services = [("web", 2), ("db", 1)];
    let mut rig =
        MachineRig::new(settings(WatchPolicy::Used, 8), SavedCatalog::default(), &services);
    rig.run(S);
    drop(rig.look_up("web"));
    rig.run(10 * S);
    assert_eq!(rig.n_instances("web"), Some(2));
    let (done, _) = oneshot::channel();
    rig.event(MachineEvent::Command(SourceCommand::Flush(done)));
    let saved = (**rig.saved.as_ref().unwrap()).clone();
    let watch = |rig: &MachineRig| rig.catalog.as_ref().unwrap()["web"].watch;
    assert_eq!(watch(&rig), Watch::Live);
    rig.run(31 * 60 * S);
    assert_eq!(watch(&rig), Watch::Cold);

    // Consul doesn't answer: the saved catalog serves after a while.
    let mut next = MachineRig::new(settings(WatchPolicy::Used, 8), saved, &services);
    assert_eq!(next.n_instances("web"), None, "Consul is asked first");
    next.pass(3 * S);
    assert_eq!(next.n_instances("web"), Some(2));
}

#[test]
fn another_token_makes_all_be_read_again() {
    let mut rig =
        MachineRig::new(settings(WatchPolicy::All, 8), SavedCatalog::default(), &[("web", 2)]);
    rig.run(20 * S);
    let blocking = |rig: &MachineRig| {
        let asked = rig.under_way.iter();
        asked.filter(|(_, _, how, _)| matches!(how.mode, ReadMode::Blocking(_))).count()
    };
    assert!(blocking(&rig) > 0);
    rig.event(MachineEvent::TokenChanged);
    rig.pass(S);
    assert_eq!(blocking(&rig), 0);
    let asked: Vec<&Query> = rig.under_way.iter().map(|(_, query, ..)| query).collect();
    for query in [Query::Names, Query::Switch, Query::Agent, Query::Service("web".into())] {
        assert!(asked.contains(&&query), "{query:?} in {asked:?}");
    }
}

#[test]
fn a_service_that_a_stale_server_lacks_gets_its_turn() {
    let names: Vec<String> = (0..16).map(|n| format!("s{n}")).collect();
    let services: Vec<(&str, u8)> = names.iter().map(|name| (&**name, 3)).collect();
    let mut rig =
        MachineRig::new(settings(WatchPolicy::Used, 7), SavedCatalog::default(), &services);
    rig.run(S);
    for name in names.iter().filter(|name| *name != "s5") {
        drop(rig.look_up(name));
    }
    rig.run(60 * S);
    let n_held = rig.under_way.iter().filter(|(_, query, options, _)| {
        matches!(query, Query::Service(_)) && options.mode == ReadMode::Blocking(rig.index)
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

#[test]
fn the_live_services_follow_policy_number_and_use() {
    use WatchPolicy::*;
    let names: Vec<String> = (0..100).map(|n| format!("s{n:04}")).collect();
    // (policy, names, the seconds ago at which s0000 was used, how many are live)
    let table = [
        (All, 100, None, 100),
        (Auto, 5, None, 5),
        (Auto, 6, None, 0),
        (Auto, 6, Some(0), 1),
        (Auto, 6, Some(1799), 1),
        (Auto, 6, Some(1800), 0),
        (Used, 1, None, 0),
        (Used, 1, Some(0), 1),
    ];
    for (policy, n_names, used_ago, n_live) in table {
        let services: Vec<_> = names[..n_names].iter().map(|name| (&**name, 1)).collect();
        let mut rig = MachineRig::new(settings(policy, 10), SavedCatalog::default(), &services);
        rig.run(S);
        if let Some(ago) = used_ago {
            drop(rig.look_up("s0000"));
            rig.pass(ago * S);
        }
        assert_eq!(rig.machine.store.n_live(), n_live, "{policy:?} {n_names} {used_ago:?}");
    }
}

#[test]
fn a_cold_service_gets_a_connection_while_all_others_are_held() {
    let names: Vec<String> = (0..5).map(|n| format!("s{n}")).collect();
    let services: Vec<_> = names.iter().map(|name| (&**name, 1)).collect();
    let mut settings = settings(WatchPolicy::Used, 5);
    // No query gives way within this test.
    settings.timing.turn = settings.timing.wait;
    let mut rig = MachineRig::new(settings, SavedCatalog::default(), &services);
    rig.run(S);
    for name in ["s0", "s1"] {
        drop(rig.look_up(name));
        rig.run(S);
    }
    let find = |rig: &MachineRig, query: &Query| {
        rig.under_way.iter().position(|(_, other, ..)| other == query)
    };
    let of = |name: &str| Query::Service(name.into());
    for name in ["s0", "s1"] {
        let idx = find(&rig, &of(name)).unwrap();
        assert!(rig.under_way[idx].2.mode.is_blocking(), "{name}");
    }
    drop(rig.look_up("s2"));
    assert!(rig.machine.is_short());
    let idx = find(&rig, &of("s2")).unwrap();
    assert_eq!(rig.under_way[idx].2.mode, ReadMode::Plain);
    let made_up = Query::Lookup("made-up".into());
    let reply = rig.look_up("made-up");
    assert_eq!(find(&rig, &made_up), None, "the last connection is in use");
    rig.end_well(idx);
    assert!(find(&rig, &made_up).is_some());
    drop(reply);
}

#[test]
fn runs_that_end_soon_leave_hardly_more_requests_than_one_of_them_sends() {
    let settings = settings(WatchPolicy::All, 64);
    let rig = MachineRig::new(settings, SavedCatalog::default(), &[]);
    let start = rig.now;
    for (lasted, wait) in [(0, 1), (1, 1), (2, 2), (44, 44), (45, 45), (1_000_000, 45)] {
        assert_eq!(rig.machine.wait(false, start + lasted * S), wait * S, "after {lasted} s");
        assert_eq!(rig.machine.wait(true, start + lasted * S), wait.min(10) * S, "withheld");
    }
    // However long each run of a loop lasts, from one request a connection at its very end: Consul
    // adds up to 1/16.
    for lasted in 1..300 {
        let held = rig.machine.wait(false, start + lasted * S).mul_f64(17.0 / 16.0);
        let n_former = held.as_secs_f64() / f64::from(lasted);
        assert!(n_former < 2.0, "{n_former} former runs, each of {lasted} s");
    }
}

#[test]
fn a_name_is_inspected_once_for_all_that_ask_and_changes_nothing() {
    let settings = settings(WatchPolicy::Used, 64);
    let mut rig = MachineRig::new(settings, SavedCatalog::default(), &[("web", 3)]);
    rig.run(3 * S);
    let (before, n_before) = (rig.catalog.clone(), rig.under_way.len());
    let mut waiting: Vec<_> = (0..33).map(|_| rig.inspect("web")).collect();
    assert_eq!(rig.under_way.len(), n_before + 1);
    assert_eq!(waiting.pop().unwrap().try_recv(), Ok(Err(InspectError::Busy)), "one too many");
    rig.end_well(n_before);
    for mut inspected in waiting {
        let inspection = inspected.try_recv().unwrap().unwrap();
        assert_eq!(inspection.instances.len(), 3);
    }
    let mut inspected = rig.inspect("other");
    rig.end(n_before, None, None);
    assert_eq!(inspected.try_recv(), Ok(Err(InspectError::Failed("it failed".into()))));
    assert_eq!((rig.catalog, rig.problem), (before, None));
}

/// The next event of a random run.
#[derive(Clone, Debug)]
enum RandomEvent {
    /// Consul answers a request.
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
    /// A person inspects a name.
    Inspect(u8),
    TokenChanged,
    Suspended(u16),
}

fn random_event() -> impl Strategy<Value = RandomEvent> {
    prop_oneof![
        6 => any::<prop::sample::Index>().prop_map(RandomEvent::Answer),
        3 => any::<prop::sample::Index>().prop_map(RandomEvent::Fail),
        2 => any::<prop::sample::Index>().prop_map(RandomEvent::Reset),
        1 => any::<prop::sample::Index>().prop_map(RandomEvent::WithoutIndex),
        4 => (0..3000_u16).prop_map(RandomEvent::Pass),
        2 => (0..30_u8).prop_map(RandomEvent::LookUp),
        1 => (0..30_u8).prop_map(RandomEvent::Inspect),
        1 => Just(RandomEvent::TokenChanged),
        1 => (2..100_u16).prop_map(RandomEvent::Suspended),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// With answers, failures, resets of the index, tokens and lookups in any order, no catalog lacks an
    /// instance, as none ever went; no more requests are under way than connections; each watch sends
    /// another request; and in the end all services are followed.
    #[test]
    fn no_failure_removes_anything_and_all_is_read_again(
        n_services in 1..20_u8,
        max_connections in 4..12_usize,
        is_all: bool,
        steps in prop::collection::vec(random_event(), 200),
    ) {
        let watch = if is_all { WatchPolicy::All } else { WatchPolicy::Used };
        let names: Vec<String> = (0..n_services).map(|n| format!("s{n}")).collect();
        let services: Vec<(&str, u8)> = names.iter().map(|name| (&**name, 3)).collect();
        let mut rig = MachineRig::new(settings(watch, max_connections), SavedCatalog::default(), &services);
        rig.run(3 * S);
        let mut known: BTreeSet<String> = BTreeSet::new();
        let mut keeps_all = |rig: &MachineRig| {
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
                RandomEvent::Answer(idx) if n > 0 => rig.end_well(idx.index(n)),
                RandomEvent::Fail(idx) if n > 0 => rig.end(idx.index(n), None, None),
                RandomEvent::Reset(idx) if n > 0 => {
                    let idx = idx.index(n);
                    let response = match &rig.under_way[idx].1 {
                        // A stale server doesn't answer these.
                        query if rig.under_way[idx].2.mode == ReadMode::Consistent => rig.answer(query),
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
                RandomEvent::WithoutIndex(idx) if n > 0 => {
                    let idx = idx.index(n);
                    let response = rig.answer(&rig.under_way[idx].1);
                    rig.end(idx, None, Some(response));
                }
                RandomEvent::Pass(ms) => rig.pass(Duration::from_millis(ms.into())),
                RandomEvent::LookUp(n) => drop(rig.look_up(&format!("s{n}"))),
                RandomEvent::Inspect(n) => drop(rig.inspect(&format!("s{n}"))),
                RandomEvent::TokenChanged => rig.event(MachineEvent::TokenChanged),
                RandomEvent::Suspended(s) => rig.event(MachineEvent::Suspended(S * s.into())),
                _ => {}
            }
            prop_assert!(rig.under_way.len() <= max_connections, "{:?}", rig.under_way);
            for query in [Query::Names, Query::Switch] {
                let n = rig.under_way.iter().filter(|(_, other, ..)| *other == query).count();
                prop_assert!(n <= 1, "{n} of {query:?}");
            }
            keeps_all(&rig)?;
        }
        // Consul has recovered: everything is followed. A watch that was answered with an old index, or
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

    /// With answers, failures and confirmations in any order, no more requests are under way than
    /// connections, and of services that take turns each is answered once before any is answered twice.
    #[test]
    fn turns_are_fair_and_within_the_limit(
        n_names in 1..40_u8,
        max_connections in 4..12_usize,
        picks in prop::collection::vec((any::<prop::sample::Index>(), 0..4_u8), 300),
    ) {
        let names: Vec<String> = (0..n_names).map(|n| format!("s{n}")).collect();
        let services: Vec<_> = names.iter().map(|name| (&**name, 1)).collect();
        let settings = settings(WatchPolicy::All, max_connections);
        let mut rig = MachineRig::new(settings, SavedCatalog::default(), &services);
        for query in [Query::Names, Query::Switch, Query::Agent] {
            let idx = rig.under_way.iter().position(|(_, other, ..)| *other == query);
            rig.end_well(idx.unwrap());
        }
        for (pick, what) in picks {
            let all = rig.under_way.iter().enumerate();
            let of_services = all.filter(|(_, (_, query, ..))| matches!(query, Query::Service(_)));
            let of_services: Vec<usize> = of_services.map(|(idx, _)| idx).collect();
            let asked: BTreeSet<String> =
                of_services.iter().map(|idx| format!("{:?}", rig.under_way[*idx].1)).collect();
            prop_assert_eq!(asked.len(), of_services.len(), "each is asked about once");
            prop_assert!(rig.under_way.len() <= max_connections, "{:?}", rig.under_way);
            // The oldest ends first, unless something fails.
            let idx = match what {
                _ if of_services.is_empty() => None,
                0 => Some(of_services[pick.index(of_services.len())]),
                _ => of_services.first().copied(),
            };
            match (what, idx) {
                (_, None) => {}
                (0, Some(idx)) => rig.end(idx, None, None),
                (1, Some(idx)) => {
                    let response = rig.answer(&rig.under_way[idx].1);
                    rig.end(idx, Some(1), Some(response));
                }
                (_, Some(idx)) => rig.end_well(idx),
            }
            rig.pass(S);
        }
        // Turns come round: no service waits for much longer than a round, and the pauses after
        // failures, take.
        let round = u32::from(n_names + 1) * S;
        let oldest = rig.machine.store.oldest_age(rig.now).unwrap();
        prop_assert!(oldest <= 3 * round + 60 * S, "{:?} of {:?}", oldest, round);
    }
}

//! The store, by what it publishes after what it was given.

use super::super::index::{IndexMove, ReadMode};
use super::super::query::{List, ServiceAnswer, n_serving};
use super::super::service::IDLE_TIMEOUT;
use super::super::suspicion::{Assessment, Evidence};
use super::derived::QueryQueue;
use super::list::MAX_LINGERING;
use super::problems::AGENT_DENIED;
use super::*;
use crate::catalog::host::Own;
use crate::catalog::publisher::Publisher;
use crate::catalog::snapshot::Agent;
use crate::table::{HealthStatus, NodeIdentity, ServiceId, ServiceRecord, Watch};

const DISTRUST: Duration = Duration::from_secs(300);
const S: Duration = Duration::from_secs(1);

fn names(list: &[&str]) -> BTreeSet<Arc<str>> {
    list.iter().map(|name| Arc::from(*name)).collect()
}

fn instance(node: &str, id: &str) -> Instance {
    Instance {
        node: node.into(),
        id: id.into(),
        address: "127.0.0.1".into(),
        ..Instance::fixture()
    }
}

fn answer(instances: Vec<Instance>) -> ServiceAnswer {
    ServiceAnswer { instances: Some(instances), unchecked: Vec::new() }
}

fn evidence(now: Instant, is_consistent: bool, moved: IndexMove) -> Evidence {
    Evidence { now, is_consistent, is_filtered: false, moved }
}

/// A store that knows the state of the kill switch.
fn new_store() -> ServiceStore {
    let mut store = ServiceStore::new(BTreeSet::new(), DISTRUST);
    store.set_has_switch();
    store
}

impl ServiceStore {
    /// These are all names; another one has lost its tag.
    fn set_names(&mut self, list: &[&str]) {
        let tagged = names(list);
        let others = self.by_name.keys().filter(|name| !tagged.contains(*name)).cloned().collect();
        self.apply_list(List { tagged, others }, Instant::now(), Instant::now());
    }

    /// All of these names are live.
    fn with_names(&mut self, list: &[&str]) {
        self.set_names(list);
        list.iter().for_each(|name| self.set_live(name, true));
    }

    fn set_live(&mut self, name: &str, is_live: bool) {
        match is_live {
            true => self.start(&name.into(), Instant::now()),
            false => self.stop(&name.into()),
        }
    }

    fn set(&mut self, name: &str, instances: Vec<Instance>) {
        self.apply(&name.into(), answer(instances), Instant::now());
    }

    fn set_service_problem(&mut self, name: &str, problem: &str) {
        self.edit_live(&name.into(), |live| live.problem = Some(problem.into()));
    }

    /// Whether the answer has to be confirmed.
    fn is_shrink(&mut self, name: &str, answer: &ServiceAnswer) -> bool {
        let evidence = evidence(Instant::now(), false, IndexMove::Forward);
        self.assess(&name.into(), answer, evidence) == Assessment::Confirm
    }

    /// Whether a list of these names has to be confirmed.
    fn is_loss(&mut self, list: &[&str]) -> bool {
        let list = List { tagged: names(list), ..List::default() };
        let evidence = evidence(Instant::now(), false, IndexMove::Forward);
        self.assess_list(&list, false, evidence) == Assessment::Confirm
    }

    fn empty_name(&mut self, name: &str, now: Instant) -> bool {
        self.edit(&name.into(), |service, node| service.empty(node, now)) == Some(true)
    }

    /// Checks what is derived against the records.
    pub fn check(&self) {
        let mut expected = Index::default();
        for (name, service) in &self.by_name {
            expected.replace(name, &Keys::default(), &Keys::of(name, service, self.follows_all));
        }
        let names = |queue: &QueryQueue| {
            let later = queue.later.iter().map(|(_, name)| name.clone());
            later.chain(queue.ready.iter().map(|(_, name)| name.clone())).collect::<BTreeSet<_>>()
        };
        let Index { totals, deadlines, ages, failing, suspicious, vanished, shifting, .. } =
            &self.index;
        assert_eq!(*totals, expected.totals);
        assert_eq!((deadlines, ages), (&expected.deadlines, &expected.ages));
        assert_eq!(names(&self.index.plain), names(&expected.plain));
        assert_eq!(names(&self.index.blocking), names(&expected.blocking));
        assert_eq!([failing, suspicious], [&expected.failing, &expected.suspicious]);
        assert_eq!([vanished, shifting], [&expected.vanished, &expected.shifting]);
        let n_variants: usize = self.case_variants.values().map(BTreeSet::len).sum();
        let has_upper = |name: &&Arc<str>| name.bytes().any(|octet| octet.is_ascii_uppercase());
        assert_eq!(n_variants, self.by_name.keys().filter(has_upper).count());
        if self.is_synced && self.dirty.is_empty() {
            let shown = self.by_name.iter().filter_map(|(name, service)| {
                let id = ServiceId::new(name.clone());
                let was_published =
                    self.published.as_ref().is_some_and(|all| all.contains_key(&id));
                let (instances, watch) = service.published(was_published, &self.nothing)?;
                Some((id, ServiceRecord::new(instances.clone(), watch)))
            });
            assert_eq!(self.published, Some(shown.collect()));
        }
    }
}

fn synced(services: &[&str]) -> (ServiceStore, Catalog) {
    let mut store = new_store();
    store.set_node(Node::Named("n1".into()));
    store.with_names(services);
    for name in services {
        store.set(name, vec![instance("n1", "1")]);
    }
    let catalog = store.publish().unwrap();
    (store, catalog)
}

#[test]
fn nothing_is_published_before_all_that_is_live_has_answered() {
    let mut store = ServiceStore::new(BTreeSet::new(), DISTRUST);
    store.with_names(&["a", "b"]);
    store.set_names(&["a", "b", "cold"]);
    assert!(store.publish().is_none());
    store.set("a", vec![instance("n1", "1")]);
    store.apply(&"b".into(), ServiceAnswer::default(), Instant::now());
    assert!(store.publish().is_none(), "the node's name is missing");
    store.set_node(Node::Named("n1".into()));
    assert!(store.publish().is_none(), "the kill switch is missing");
    store.set_has_switch();
    let catalog = store.publish().unwrap();
    assert_eq!(catalog.len(), 2, "b is a proxy's name");
    assert!(catalog["a"].groups[0].instances[0].local);
    assert_eq!(catalog["a"].watch, Watch::Live);
    assert_eq!(
        (catalog["cold"].groups[0].instances.len(), catalog["cold"].watch),
        (0, Watch::Cold)
    );
    assert!(store.publish().is_none());
}

#[test]
fn an_empty_list_of_names_is_a_catalog() {
    let mut store = new_store();
    store.set_node(Node::Denied(Own::default()));
    store.set_names(&[]);
    assert_eq!(store.publish(), Some(Catalog::new()));
}

#[test]
fn stragglers_are_named_and_join_later() {
    let now = Instant::now();
    let mut store = new_store();
    store.stop_waiting(false);
    assert!(store.publish().is_none(), "without names there is nothing to publish");
    store.with_names(&["a", "b"]);
    store.set("a", Vec::new());
    store.stop_waiting(false);
    assert_eq!(store.publish().unwrap().len(), 1);
    assert!(store.problem(now).unwrap().starts_with("service `b`: Consul hasn't said"));
    store.edit_live(&"b".into(), |live| live.problem = None);
    store.set("b", Vec::new());
    assert_eq!(store.publish().unwrap().len(), 2);
    assert_eq!(store.problem(now), None);
}

#[test]
fn the_catalog_lacks_no_service_that_the_kernel_serves_before_its_answer() {
    let now = Instant::now();
    let mut store = ServiceStore::new(names(&["weba", "gone"]), DISTRUST);
    store.set_has_switch();
    store.set_node(Node::Named("n1".into()));
    assert!(store.is_loss(&["WebA"]), "gone is missing");
    assert!(!store.is_loss(&["WebA", "gone", "new"]));
    store.with_names(&["WebA", "new"]);
    store.set("new", vec![instance("n1", "1")]);
    store.stop_waiting(false);
    assert!(store.publish().is_none());
    assert!(store.problem(now).unwrap().starts_with("service `WebA`"));
    assert!(store.is_shrink("WebA", &answer(Vec::new())), "it had some");
    assert!(!store.is_shrink("new", &answer(vec![instance("n1", "1")])));
    store.set("WebA", vec![instance("n1", "1")]);
    assert_eq!(store.publish().unwrap().len(), 2);

    let mut store = ServiceStore::new(names(&["weba"]), DISTRUST);
    store.with_names(&["WebA"]);
    store.stop_waiting(true);
    assert!(store.publish().is_some(), "there is an end to it");
}

#[test]
fn a_list_without_a_name_that_serves_is_a_loss() {
    let (mut store, _) = synced(&["a", "b", "c"]);
    store.set("b", Vec::new());
    for (list, is_loss) in
        [(&["a", "b", "c"][..], false), (&["a", "c"], false), (&["a", "b"], true), (&[], true)]
    {
        assert_eq!(store.is_loss(list), is_loss, "{list:?}");
    }
}

#[test]
fn unchanged_services_are_shared_and_an_unchanged_catalog_is_not_published() {
    let (mut store, first) = synced(&["a", "b"]);
    store.set_names(&["a", "b"]);
    store.set_node(Node::Named("n1".into()));
    store.set("a", vec![instance("n1", "1")]);
    assert!(store.publish().is_none());

    store.set("a", vec![instance("n2", "1"), instance("n1", "2")]);
    let second = store.publish().unwrap();
    assert!(Arc::ptr_eq(&first["b"].groups[0].instances, &second["b"].groups[0].instances));
    assert!(!Arc::ptr_eq(&first["a"].groups[0].instances, &second["a"].groups[0].instances));
    let order: Vec<_> =
        second["a"].groups[0].instances.iter().map(|i| (&*i.node, &*i.id, i.local)).collect();
    assert_eq!(order, [("n1", "2", true), ("n2", "1", false)]);
}

#[test]
fn a_name_that_goes_removes_its_service() {
    let now = Instant::now();
    let (mut store, _) = synced(&["a", "b"]);
    store.set_names(&["b"]);
    assert!(store.publish().unwrap().keys().eq(&[ServiceId::new("b")]));
    store.set("a", vec![instance("n1", "1")]);
    store.set_service_problem("a", "late");
    assert!(store.publish().is_none());
    assert_eq!(store.problem(now), None);
}

#[test]
fn a_service_that_goes_cold_keeps_its_instances_until_they_are_old() {
    let (mut store, first) = synced(&["a", "b"]);
    let (now, max_age) = (Instant::now(), Duration::from_secs(60));
    store.set_live("a", false);
    let second = store.publish().unwrap();
    assert_eq!((second["a"].watch, second["b"].watch), (Watch::Cold, Watch::Live));
    assert!(Arc::ptr_eq(&first["a"].groups[0].instances, &second["a"].groups[0].instances));
    assert_eq!(store.exists("a"), None);

    store.discard_old(now + max_age / 2, max_age);
    assert!(store.publish().is_none());
    store.discard_old(now + max_age * 2, max_age);
    let third = store.publish().unwrap();
    assert_eq!(
        (third["a"].groups[0].instances.len(), third["b"].groups[0].instances.len()),
        (0, 1)
    );

    store.set_live("a", true);
    assert!(store.publish().is_none(), "nothing is known of it yet");
    store.set("a", vec![instance("n1", "1")]);
    assert_eq!((store.publish().unwrap()["a"].watch, store.exists("a")), (Watch::Live, Some(true)));
}

#[test]
fn a_cold_service_ages_while_the_machine_is_suspended() {
    let (mut store, _) = synced(&["a"]);
    let (now, max_age) = (Instant::now(), Duration::from_secs(60));
    store.set_live("a", false);
    store.suspended(max_age / 2);
    store.discard_old(now, max_age);
    assert_eq!(store.publish().unwrap()["a"].groups[0].instances.len(), 1);
    store.suspended(max_age);
    store.discard_old(now, max_age);
    assert!(store.publish().unwrap()["a"].groups[0].instances.is_empty());
}

#[test]
fn a_saved_catalog_serves_until_the_answers_come() {
    let (store, first) = synced(&["a", "b"]);
    let mut next = new_store();
    next.restore(&store.saved(), Instant::now());
    assert!(next.publish().is_none(), "Consul is asked first");
    next.serve_saved();
    let served = next.publish().unwrap();
    assert_eq!(served["a"].groups[0].instances, first["a"].groups[0].instances);
    assert_eq!(served["a"].watch, Watch::Cold);
    assert!(next.is_shrink("a", &answer(Vec::new())));
    next.with_names(&["a"]);
    next.set("a", vec![instance("n1", "1")]);
    assert_eq!(next.publish().unwrap()["a"].watch, Watch::Live);
}

#[test]
fn an_instance_without_its_checks_serves_after_the_hold_down() {
    let (mut store, _) = synced(&["a"]);
    let now = Instant::now();
    let instances = vec![instance("n1", "1"), instance("n1", "2")];
    let both =
        ServiceAnswer { instances: Some(instances), unchecked: vec![("n1".into(), "2".into())] };
    store.apply(&"a".into(), both, now);
    assert_eq!(n_serving(&store.publish().unwrap()["a"].groups[0].instances), 1);
    let at = store.next_deadline().unwrap();
    store.expire(at);
    assert_eq!(n_serving(&store.publish().unwrap()["a"].groups[0].instances), 2);
    assert_eq!(store.next_deadline(), None);
}

#[test]
fn the_end_of_a_hold_down_is_no_answer_of_consul() {
    let (mut store, _) = synced(&["a"]);
    let now = Instant::now();
    let instances = vec![instance("n1", "1"), instance("n1", "2")];
    let both =
        ServiceAnswer { instances: Some(instances), unchecked: vec![("n1".into(), "2".into())] };
    store.apply(&"a".into(), both, now);
    // It went cold, and is used again, but Consul hasn't answered since.
    store.set_live("a", false);
    store.set_live("a", true);
    store.expire(store.next_deadline().unwrap());
    let catalog = store.publish().unwrap();
    assert_eq!((catalog["a"].watch, store.exists("a")), (Watch::Cold, None));
    assert_eq!(n_serving(&catalog["a"].groups[0].instances), 2);
}

#[test]
fn a_critical_instance_is_out_at_once_even_in_a_suspicious_answer() {
    let (mut store, _) = synced(&["a", "b", "c", "d"]);
    let now = Instant::now();
    let mut critical = instance("n1", "1");
    critical.health = HealthStatus::Out("critical".into());
    for name in ["a", "b", "c", "d"] {
        for (is_consistent, expected) in [(false, Assessment::Confirm), (true, Assessment::Apply)] {
            let evidence = evidence(now, is_consistent, IndexMove::Backward);
            let got = store.assess(&name.into(), &answer(vec![critical.clone()]), evidence);
            assert_eq!(got, expected, "{name}");
        }
    }
    assert_eq!(store.problem(now), None);
}

#[test]
fn services_that_all_vanish_within_a_minute_come_back_for_five_minutes() {
    let (mut store, first) = synced(&["a", "b", "c"]);
    let start = Instant::now();
    let gone = |store: &mut ServiceStore, name: &str, now: Instant, is_consistent: bool| {
        let name: Arc<str> = name.into();
        let assessment = store.assess(
            &name,
            &answer(Vec::new()),
            evidence(now, is_consistent, IndexMove::Forward),
        );
        if assessment == Assessment::Apply {
            store.apply(&name, answer(Vec::new()), now);
        }
        assessment
    };
    let second = Duration::from_secs(1);
    assert_eq!(gone(&mut store, "a", start, true), Assessment::Apply);
    assert_eq!(gone(&mut store, "b", start + 20 * second, true), Assessment::Apply);
    let catalog = store.publish().unwrap();
    let serving =
        |catalog: &Catalog| catalog.values().filter(|l| !l.groups[0].instances.is_empty()).count();
    assert_eq!(serving(&catalog), 1);
    assert_eq!(gone(&mut store, "c", start + 40 * second, true), Assessment::Withhold);
    let catalog = store.publish().unwrap();
    assert_eq!(serving(&catalog), 3);
    assert_eq!(catalog["a"].groups[0].instances, first["a"].groups[0].instances);
    let problem = store.problem(start + 40 * second).unwrap();
    assert!(
        problem.contains(
            "`a` and 2 more services: they all went at once. If they were stopped on purpose, there \
             is nothing to do: this ends by itself 300s after"
        ),
        "{problem}"
    );
    assert!(store.is_failing(start + 40 * second));
    // One that is whole again is no longer suspicious; the loss of the others is applied in the end.
    let whole = answer(vec![instance("n1", "7")]);
    let evidence = evidence(start + 50 * second, false, IndexMove::Forward);
    assert_eq!(store.assess(&"b".into(), &whole, evidence), Assessment::Apply);
    let end = start + 40 * second + DISTRUST;
    for name in ["a", "c"] {
        assert_eq!(gone(&mut store, name, end - second, true), Assessment::Withhold);
        assert_eq!(gone(&mut store, name, end, false), Assessment::Confirm);
        assert_eq!(gone(&mut store, name, end, true), Assessment::Apply);
    }
    assert_eq!(store.problem(end), None);
}

/// Instances of these ids, each at a port of its own, of which those from 100 on are critical.
fn instances(ids: impl IntoIterator<Item = i64>) -> ServiceAnswer {
    let one = |id: i64| {
        let mut one = Instance { port: 1000 + id, ..instance("n1", &id.to_string()) };
        if id >= 100 {
            one.health = HealthStatus::Out("critical".into());
        }
        one
    };
    answer(ids.into_iter().map(one).collect())
}

/// Handles the answer to a consistent read as the machine does.
fn handle(
    store: &mut ServiceStore,
    name: &str,
    answer: &ServiceAnswer,
    evidence: Evidence,
) -> Assessment {
    let name: Arc<str> = name.into();
    let assessment = store.assess(&name, answer, evidence);
    match assessment {
        Assessment::Apply => store.apply(&name, answer.clone(), evidence.now),
        Assessment::Withhold => store.withhold(&name, answer.clone(), evidence.now),
        Assessment::Confirm => panic!("it was confirmed"),
    }
    assessment
}

/// The ports of those that serve.
fn serving_ports(store: &ServiceStore, name: &str) -> Vec<i64> {
    let instances = store.by_name[name].contents.instances();
    let serving = instances.iter().filter(|instance| instance.health.serves());
    let mut ports: Vec<i64> = serving.map(|instance| instance.port).collect();
    ports.sort_unstable();
    ports
}

#[test]
fn a_job_that_runs_again_replaces_its_withheld_instances() {
    let (mut store, _) = synced(&["a", "b", "c"]);
    let now = Instant::now();
    let evidence = evidence(now, true, IndexMove::Forward);
    for name in ["a", "b", "c"] {
        handle(&mut store, name, &instances(0..10), evidence);
    }
    for (name, expected) in
        [("a", Assessment::Apply), ("b", Assessment::Apply), ("c", Assessment::Withhold)]
    {
        assert_eq!(handle(&mut store, name, &instances([]), evidence), expected, "{name}");
    }
    for name in ["a", "b", "c"] {
        assert_eq!(serving_ports(&store, name), (1000..1010).collect::<Vec<_>>());
        // New instances that aren't healthy yet replace only what had their port.
        let mut critical = instances([100, 101]);
        critical.instances.as_mut().unwrap()[0].port = 1000;
        assert_eq!(handle(&mut store, name, &critical, evidence), Assessment::Withhold, "{name}");
        assert_eq!(serving_ports(&store, name), (1001..1010).collect::<Vec<_>>());
        // Healthy ones replace all.
        assert_eq!(
            handle(&mut store, name, &instances(20..24), evidence),
            Assessment::Apply,
            "{name}"
        );
        assert_eq!(serving_ports(&store, name), (1020..1024).collect::<Vec<_>>());
    }
    assert_eq!(store.problem(now), None);
}

#[test]
fn a_cold_service_has_no_suspicion_and_is_not_restored() {
    let (mut store, _) = synced(&["a", "b", "c", "d", "e"]);
    let now = Instant::now();
    let sure = evidence(now, true, IndexMove::Forward);
    let filtered = Evidence { is_filtered: true, ..sure };
    assert_eq!(handle(&mut store, "a", &instances([]), filtered), Assessment::Withhold);
    assert!(store.has_suspicions(now) && store.is_failing(now));
    store.set_live("a", false);
    assert!(!store.has_suspicions(now) && !store.is_failing(now));

    // One that went cold after it was gone, one that was cold when the list lost it, and one that is
    // live.
    assert_eq!(handle(&mut store, "b", &instances([]), sure), Assessment::Apply);
    store.set_live("b", false);
    for (name, is_live) in [("c", false), ("d", true)] {
        store.set_live(name, is_live);
        assert!(store.empty_name(name, now));
    }
    store.set_live("a", true);
    assert_eq!(handle(&mut store, "a", &instances([]), sure), Assessment::Apply);
    assert_eq!(handle(&mut store, "e", &instances([]), sure), Assessment::Withhold);
    let n_known = ["a", "b", "c", "d", "e"].map(|name| serving_ports(&store, name).len());
    assert_eq!(n_known, [1, 0, 0, 1, 1]);
    // A restored service isn't one that is registered again.
    assert!(store.is_suspicious("d", now) && !store.by_name["d"].is_back());
    assert_eq!(handle(&mut store, "d", &instances([1]), sure), Assessment::Apply);
    assert!(!store.is_suspicious("d", now) && store.by_name["d"].is_back());

    // Without another answer, the time is over.
    let end = now + DISTRUST;
    assert!(store.has_suspicions(end - Duration::from_secs(1)));
    assert!(!store.has_suspicions(end) && !store.is_suspicious("a", end) && !store.is_failing(end));
}

#[test]
fn withheld_instances_serve_in_addition_to_listed_ones() {
    let now = Instant::now();
    let filtered = Evidence { is_filtered: true, ..evidence(now, true, IndexMove::Forward) };
    for evidence in
        [filtered, evidence(now, true, IndexMove::None), evidence(now, true, IndexMove::Backward)]
    {
        let (mut store, _) = synced(&["a"]);
        let sure = Evidence { is_filtered: false, moved: IndexMove::Forward, ..evidence };
        handle(&mut store, "a", &instances(0..10), sure);
        // One is still listed, one is new, and another one became critical.
        let mut some = instances([0, 1, 20]);
        some.instances.as_mut().unwrap()[1].health = HealthStatus::Out("critical".into());
        assert_eq!(handle(&mut store, "a", &some, evidence), Assessment::Withhold, "{evidence:?}");
        let expected: Vec<i64> = [1000].into_iter().chain(1002..1010).chain([1020]).collect();
        assert_eq!(serving_ports(&store, "a"), expected, "{evidence:?}");
        // The new one isn't one of the missing ones.
        assert_eq!(handle(&mut store, "a", &instances([0, 1]), evidence), Assessment::Withhold);
        assert_eq!(serving_ports(&store, "a"), (1000..1010).collect::<Vec<_>>(), "{evidence:?}");
        assert_eq!(handle(&mut store, "a", &instances(20..26), evidence), Assessment::Apply);
        assert_eq!(serving_ports(&store, "a"), (1020..1026).collect::<Vec<_>>(), "{evidence:?}");
        assert_eq!(store.problem(now), None);
    }
}

#[test]
fn another_node_name_changes_which_instances_are_local() {
    let (mut store, _) = synced(&["a"]);
    store.set_node(Node::Named("n2".into()));
    assert!(!store.publish().unwrap()["a"].groups[0].instances[0].local);
}

#[test]
fn a_known_node_stays_known() {
    let now = Instant::now();
    let mut store = new_store();
    store.with_names(&["a"]);
    store.set_node(Node::Denied(Own::default()));
    store.set("a", vec![instance("n1", "1")]);
    assert!(!store.publish().unwrap()["a"].groups[0].instances[0].local);
    assert_eq!(store.problem(now).unwrap(), AGENT_DENIED);
    store.set_node(Node::Named("n1".into()));
    assert!(store.publish().unwrap()["a"].groups[0].instances[0].local);
    store.set_node(Node::Denied(Own::default()));
    assert!(store.publish().is_none(), "an error removes nothing");
    assert_eq!((store.problem(now), store.is_failing(now)), (None, false));
}

#[test]
fn equal_problems_are_reported_once_and_three_at_most() {
    let now = Instant::now();
    let (mut store, _) = synced(&["a", "b", "c", "d", "e"]);
    for name in ["a", "b"] {
        store.set_service_problem(name, "down");
    }
    assert_eq!(store.problem(now).unwrap(), "service `a`: down");
    store.set_problem(Subject::Names, Some("down".into()));
    assert_eq!(store.problem(now).unwrap(), "down");
    for name in ["c", "d", "e"] {
        store.set_service_problem(name, &format!("bad {name}"));
    }
    let expected = "down; service `c`: bad c; service `d`: bad d; and 1 more";
    assert_eq!(store.problem(now).unwrap(), expected);
}

#[test]
fn no_instance_that_the_kernel_serves_is_held_down_at_a_restart() {
    let checked = || {
        let instances = vec![instance("n1", "checked"), instance("n1", "unchecked")];
        let unchecked = vec![("n1".to_owned(), "unchecked".to_owned())];
        ServiceAnswer { instances: Some(instances), unchecked }
    };
    // (what the kernel serves, which of both instances serve at first)
    for (in_use, expected) in [(&["web"][..], 2), (&[], 1)] {
        let mut store = ServiceStore::new(names(in_use), DISTRUST);
        store.set_has_switch();
        store.set_node(Node::Named("n1".into()));
        store.with_names(&["Web"]);
        let now = Instant::now();
        store.apply(&"Web".into(), checked(), now);
        let catalog = store.publish().unwrap();
        assert_eq!(n_serving(&catalog["Web"].groups[0].instances), expected, "{in_use:?}");
        store.apply(&"Web".into(), checked(), now);
        assert_eq!(store.next_deadline().is_none(), expected == 2);
    }
}

#[test]
fn only_the_agents_own_node_is_this_one() {
    let here = NodeIdentity::new("9d75", "dc1", "");
    let agent = || Agent { name: "n1".into(), node_identity: here };
    for (node, record, node_identity, expected) in [
        (Node::Named(agent()), "n1", here, true),
        (Node::Named(agent()), "n1", NodeIdentity::default(), true),
        (Node::Named(agent()), "n2", here, false),
        (Node::Named(agent()), "n1", NodeIdentity::new("9d75", "dc2", ""), false),
        (Node::Named(agent()), "n1", NodeIdentity::new("aaaa", "dc1", ""), false),
        (Node::Named(agent()), "n1", NodeIdentity::new("9d75", "dc1", "team"), false),
        (Node::Elsewhere { why: "it isn't here".into(), may_be_here: None }, "n1", here, false),
        (Node::Denied(Own::default()), "n1", here, false),
        (Node::Unknown, "n1", here, false),
    ] {
        let mut store = new_store();
        store.set_node(node.clone());
        store.with_names(&["a"]);
        let record = Instance { node_identity, ..instance(record, "1") };
        store.set("a", vec![record.clone()]);
        store.serve_saved();
        let catalog = store.publish().unwrap();
        assert_eq!(catalog["a"].groups[0].instances[0].local, expected, "{node:?} {record:?}");
        // The node is known after the record.
        let mut store = new_store();
        store.with_names(&["a"]);
        store.set("a", vec![record.clone()]);
        store.set_node(node.clone());
        store.serve_saved();
        let catalog = store.publish().unwrap();
        assert_eq!(catalog["a"].groups[0].instances[0].local, expected, "{node:?} {record:?}");
    }
}

#[test]
fn a_token_without_agent_read_identifies_the_node_by_its_address() {
    let now = Instant::now();
    let own = || Own::of(&["10.0.0.1", "fd00::1", "172.17.0.1"], &["172.17.0.0/16"]);
    // (the node's address, the instance's, whether it is this node's, whether it is unroutable for lack of permission)
    for (node, address, is_local, needs_agent) in [
        (Some("10.0.0.1"), "172.17.0.5", true, false),
        (Some("10.0.0.1"), "127.0.0.1", true, false),
        (Some("fd00::1"), "127.0.0.1", true, false),
        (Some("10.0.0.2"), "127.0.0.1", false, true),
        (Some("10.0.0.2"), "172.17.0.5", false, true),
        (Some("10.0.0.2"), "10.0.0.2", false, false),
        // A container with its own agent: the table can route to it.
        (Some("172.17.0.2"), "172.17.0.5", false, false),
        (None, "127.0.0.1", false, true),
        (None, "10.0.0.1", false, false),
        // Every node has the loopback address.
        (Some("127.0.0.1"), "127.0.0.1", false, true),
    ] {
        let mut store = new_store();
        store.with_names(&["a"]);
        let node_address = node.map(|node| node.parse().unwrap());
        let address = address.to_owned();
        let record = Instance { node_address, address, ..instance("n1", "1") };
        store.set("a", vec![record.clone()]);
        store.set_node(Node::Denied(Own::default()));
        store.set_node(Node::Denied(own()));
        let catalog = store.publish().unwrap();
        assert_eq!(catalog["a"].groups[0].instances[0].local, is_local, "{record:?}");
        let problem = store.problem(now);
        assert_eq!(problem.as_deref(), needs_agent.then_some(AGENT_DENIED), "{record:?}");
        // The next daemon, while Consul doesn't answer.
        let mut next = ServiceStore::new(BTreeSet::new(), DISTRUST);
        let mut saved = store.saved();
        saved.services.values_mut().for_each(|web| web.answered_at = Some(Instant::now()));
        next.restore(&saved, Instant::now());
        next.serve_saved();
        assert_eq!(
            next.publish().unwrap()["a"].groups[0].instances[0].local,
            is_local,
            "{record:?}"
        );
    }
}

#[test]
fn an_agent_behind_nat_makes_only_loopback_instances_unroutable() {
    let elsewhere = |may_be_here| Node::Elsewhere { why: "NAT".into(), may_be_here };
    for (node, record, expected) in [
        (elsewhere(Some("n1".into())), "n1", true),
        (elsewhere(Some("n1".into())), "n2", false),
        (elsewhere(None), "n1", false),
    ] {
        let mut store = new_store();
        store.with_names(&["a"]);
        store.set("a", vec![instance(record, "1")]);
        store.set_node(node.clone());
        let catalog = store.publish().unwrap();
        let got = &catalog["a"].groups[0].instances[0];
        assert_eq!((got.local, got.may_be_local), (false, expected), "{node:?} {record}");
        store.set_node(Node::Named("n2".into()));
        let catalog = store.publish().unwrap_or(catalog);
        assert!(!catalog["a"].groups[0].instances[0].may_be_local);
    }
}

/// A store with so many live services, which have answered, and what it has published.
fn many(n: usize) -> (ServiceStore, Catalog, Vec<Arc<str>>) {
    let all: Vec<Arc<str>> = (0..n).map(|n| format!("s{n:05}").into()).collect();
    let mut store = new_store();
    store.set_node(Node::Named("n1".into()));
    store.add_listed(all.iter().cloned());
    store.rebalance(true, Instant::now());
    for name in &all {
        store.apply(name, answer(vec![instance("n1", "1")]), Instant::now());
    }
    let catalog = store.publish().unwrap();
    (store, catalog, all)
}

#[test]
fn one_change_among_ten_thousand_touches_one_record_and_one_leaf() {
    let (mut store, first, all) = many(10_000);
    let publisher = Publisher::new("consul");
    publisher.publish_aged(Some(first.clone()), Instant::now(), Vec::new());
    assert_eq!(publisher.last().unwrap().n_leaves_not_in(&first), 0);
    let mut last = first.clone();
    for (n, name) in all.iter().step_by(999).enumerate() {
        // An answer without news, and one with news.
        store.apply(name, answer(vec![instance("n1", "1")]), Instant::now());
        assert!(store.publish().is_none());
        store.apply(name, answer(vec![instance("n1", &format!("new-{n}"))]), Instant::now());
        assert_eq!(store.dirty.len(), 1, "{name}");
        let next = store.publish().unwrap();
        assert_eq!(next.n_leaves_not_in(&last), 1, "{name}");
        // What the publisher keeps is what the store made, so the next difference is as small.
        publisher.publish_aged(Some(next.clone()), Instant::now(), Vec::new());
        assert_eq!(publisher.last().unwrap().n_leaves_not_in(&next), 0, "{name}");
        last = next;
    }
    let is_shared = |name: &Arc<str>| {
        Arc::ptr_eq(&first[&**name].groups[0].instances, &last[&**name].groups[0].instances)
    };
    assert_eq!(all.iter().filter(|name| !is_shared(name)).count(), 11);
    store.check();
}

fn shown(store: &ServiceStore) -> String {
    let shown = store.by_name.iter().map(|(name, service)| match service.presence {
        Presence::Listed => name.to_string(),
        Presence::Found => format!("{name}?"),
        Presence::Lingering { .. } => format!("({name})"),
    });
    shown.collect::<Vec<_>>().join(" ")
}

#[test]
fn a_name_that_vanishes_lingers_and_one_that_lost_its_tag_goes() {
    let now = Instant::now();
    let end = now + 300 * S;
    // (tagged, others, what is known then)
    let table: &[(&[&str], &[&str], &str)] = &[
        (&["a", "b", "proxy"], &[], "a b found? proxy"),
        (&["a"], &["b"], "a found?"),
        (&["a", "b"], &[], "a b found?"),
        (&["b"], &[], "(a) b found?"),
        (&["b", "found"], &[], "(a) b found"),
        (&["b"], &["a"], "b (found)"),
        (&["a", "found"], &[], "a (b) found"),
    ];
    let mut store = new_store();
    store.add_found(&"found".into());
    for (tagged, others, expected) in table {
        store.apply_list(List { tagged: names(tagged), others: names(others) }, end, now);
        store.apply(&"proxy".into(), ServiceAnswer::default(), now);
        assert_eq!(shown(&store), *expected, "after {tagged:?} {others:?}");
        store.check();
    }
    assert_eq!(store.next_deadline(), Some(end));
    store.expire(end - S);
    assert_eq!(shown(&store), "a (b) found");
    store.expire(end);
    assert_eq!(shown(&store), "a found");
    store.check();
}

#[test]
fn a_list_without_a_watched_service_leaves_it_to_its_own_answer() {
    type Change = fn(&mut ServiceStore);
    let now = Instant::now();
    // (what is done to `a` before the list lacks it, what is known then, how many serve)
    let table: [(Change, &str, usize); 4] = [
        (|_| {}, "a? b", 1),
        (|store| store.set_service_problem("a", "it fails"), "a? b", 1),
        (|store| store.set_live("a", false), "(a) b", 0),
        (|store| store.set("a", Vec::new()), "(a) b", 0),
    ];
    for (change, expected, n_expected) in table {
        let (mut store, _) = synced(&["a", "b"]);
        change(&mut store);
        store.apply_list(List { tagged: names(&["b"]), ..List::default() }, now + S, now);
        assert_eq!((&*shown(&store), serving_ports(&store, "a").len()), (expected, n_expected));
        store.check();
    }
}

#[test]
fn a_restored_service_that_serves_is_left_to_its_own_answer() {
    let now = Instant::now();
    let saved = synced(&["a", "b"]).0.saved();
    let without_a = || List { tagged: names(&["b"]), ..List::default() };
    // The saved catalog serves before the first list is there.
    let mut store = ServiceStore::new(names(&["a", "b"]), DISTRUST);
    store.restore(&saved, now);
    store.serve_saved();
    store.apply_list(without_a(), now + S, now);
    assert_eq!((&*shown(&store), serving_ports(&store, "a").len()), ("a? b", 1));

    // All of its answers were withheld.
    let mut store = new_store();
    store.restore(&saved, now);
    store.with_names(&["a", "b"]);
    let filtered = Evidence { is_filtered: true, ..evidence(now, true, IndexMove::Forward) };
    assert_eq!(handle(&mut store, "a", &instances([]), filtered), Assessment::Withhold);
    store.apply_list(without_a(), now + S, now);
    assert_eq!((&*shown(&store), serving_ports(&store, "a").len()), ("a? b", 1));
    store.check();
}

#[test]
fn a_suspicion_ends_with_what_it_kept() {
    let now = Instant::now();
    let (mut store, _) = synced(&["a", "b"]);
    let filtered = Evidence { is_filtered: true, ..evidence(now, true, IndexMove::Forward) };
    assert_eq!(handle(&mut store, "a", &instances([]), filtered), Assessment::Withhold);
    store.empty(&"a".into(), now + S, now);
    assert!(store.has_suspicions(now));
    assert_eq!(handle(&mut store, "a", &instances([]), filtered), Assessment::Apply);
    assert!(!store.has_suspicions(now) && !store.is_failing(now));
    store.expire(now + S);
    assert_eq!(shown(&store), "b");
    store.check();
}

#[test]
fn a_name_in_another_case_replaces_the_former_one_once_it_is_answered() {
    let now = Instant::now();
    let (mut store, _) = synced(&["Web", "b"]);
    let renamed = || List { tagged: names(&["b", "web"]), ..List::default() };
    store.apply_list(renamed(), now + S, now);
    store.set_live("web", true);
    store.apply_list(renamed(), now + S, now);
    assert_eq!((&*shown(&store), serving_ports(&store, "Web").len()), ("Web? b web", 1));
    // Consul answers about either name with the instances of both.
    for name in ["Web", "web"] {
        store.set(name, vec![instance("n1", "1")]);
    }
    store.apply_list(renamed(), now + S, now);
    assert_eq!(shown(&store), "b web");
    store.check();
}

#[test]
fn the_service_of_a_name_that_left_the_list_is_read_at_once() {
    let now = Instant::now();
    let (mut store, _) = synced(&["a", "b"]);
    for name in ["a", "b"] {
        store.edit_live(&name.into(), |live| live.poller.answered(Some(7), now, 0.0));
    }
    assert_eq!(store.next_query(false, now + 60 * S), None, "they wait for their turns");
    store.apply_list(List { tagged: names(&["b"]), ..List::default() }, now + S, now);
    assert_eq!(store.next_query(false, now), Some(("a".into(), ReadMode::Plain)));
    store.check();
}

#[test]
fn a_restored_name_that_the_list_lacked_is_no_loss_of_the_list() {
    let now = Instant::now();
    let end = now + 300 * S;
    let (mut store, _) = synced(&["a", "b", "c"]);
    store.empty(&"b".into(), end, now);
    let list = || List { tagged: names(&["a"]), ..List::default() };
    store.apply_list(list(), end, now);
    assert_eq!(shown(&store), "a (b) c?");
    for (is_live, expected) in [(true, "a c?"), (false, "a")] {
        let mut next = new_store();
        next.restore(&store.saved(), end);
        assert_eq!(shown(&next), "a (b) (c)");
        let same = evidence(now, true, IndexMove::None);
        assert_eq!(next.assess_list(&list(), false, same), Assessment::Apply);
        next.apply_list(list(), end, now);
        next.set_live("c", is_live);
        next.expire(end);
        assert_eq!(shown(&next), expected);
        next.check();
    }
}

#[test]
fn a_watch_that_begins_again_compares_with_the_last_index_that_was_applied() {
    let now = Instant::now();
    let (mut store, _) = synced(&["a", "b", "c", "d"]);
    let a: Arc<str> = "a".into();
    let answered = |store: &mut ServiceStore, index| {
        store.edit_live(&a, |live| live.poller.answered(Some(index), now, 0.0));
    };
    answered(&mut store, 7);
    store.set("a", vec![instance("n1", "1")]);
    // After it was cold, and in another run whose first list lacks it.
    store.set_live("a", false);
    let mut next = ServiceStore::new(names(&["a", "b", "c", "d"]), DISTRUST);
    next.restore(&store.saved(), now);
    next.apply_list(List { tagged: names(&["b", "c", "d"]), ..List::default() }, now, now);
    assert_eq!(shown(&next), "a? b c d");
    for mut store in [store, next] {
        store.set_live("a", true);
        for (index, expected) in
            [(7, IndexMove::None), (3, IndexMove::Backward), (9, IndexMove::Forward)]
        {
            answered(&mut store, index);
            assert_eq!(store.edit_live(&a, |live| live.poller.moved()), Some(expected));
        }
    }
}

#[test]
fn what_acls_hide_of_one_service_they_hide_of_those_that_change_meanwhile() {
    use Assessment::*;
    let start = Instant::now();
    let at = |after: u32, moved| evidence(start + after * S, true, moved);
    let all = ["a", "b", "c", "d", "e", "f", "g", "h", "i"];
    let (mut store, _) = synced(&all);
    let none = instances([]);
    store.edit_live(&"b".into(), |live| live.poller.answered(Some(7), start, 0.0));
    assert_eq!(handle(&mut store, "a", &none, at(0, IndexMove::Forward)), Apply);
    assert_eq!(handle(&mut store, "b", &none, at(30, IndexMove::Forward)), Apply);
    assert_eq!(store.saved().services["b"].index, 7);
    assert_eq!(handle(&mut store, "b", &none, at(31, IndexMove::Forward)), Apply);
    // More than a minute after `a`.
    assert_eq!(handle(&mut store, "c", &none, at(70, IndexMove::None)), Withhold);
    assert_eq!(handle(&mut store, "d", &none, at(100, IndexMove::Forward)), Withhold);
    let serving = ["a", "b", "c", "d"].map(|name| serving_ports(&store, name).len());
    assert_eq!(serving, [0, 1, 1, 1]);
    assert_eq!(store.saved().services["b"].index, 0, "it isn't that of what came back");
    // All at the same time, however many follow.
    let end = start + 70 * S + DISTRUST;
    assert!(store.is_suspicious("d", end - S) && !store.has_suspicions(end));
    assert_eq!(handle(&mut store, "e", &none, at(400, IndexMove::Forward)), Apply);
    store.check();
}

#[test]
fn the_names_that_linger_have_a_bound() {
    let (mut store, _, all) = many(MAX_LINGERING + 10);
    let now = Instant::now();
    for name in &all {
        store.empty(name, now + S, now);
    }
    assert_eq!(store.n_names(), MAX_LINGERING);
    assert_eq!(all.len() - store.n_live(), 10);
    store.check();
}

#[test]
fn names_that_differ_in_case_are_one_service() {
    let now = Instant::now();
    let mut store = new_store();
    // Before the list is read, too.
    store.record_use(&"other".into(), now);
    store.add_listed(["WEB", "Web", "web", "db", "Other"].map(Arc::from));
    assert_eq!(store.of("web"), ["web", "WEB", "Web"].map(Arc::from));
    assert_eq!(store.of("other"), ["Other"].map(Arc::from));
    store.record_use(&"web".into(), now);
    store.rebalance(false, now);
    assert_eq!(store.live(), ["Other", "WEB", "Web", "web"].map(Arc::from));
    // A new one is used as the others are.
    store.add_found(&"wEb".into());
    store.rebalance(false, now);
    assert_eq!(store.n_live(), 5);
    store.set_names(&["web", "db", "Other"]);
    store.remove(&"wEb".into());
    assert_eq!(store.of("web"), ["web"].map(Arc::from));
    store.check();
}

#[test]
fn names_that_dns_cannot_have_are_listed_and_not_followed() {
    let now = Instant::now();
    let mut store = new_store();
    store.add_listed(["web", "..", "a/b", "esc\u{1b}[31m"].map(Arc::from));
    store.record_use(&"a/b".into(), now);
    store.rebalance(true, now);
    assert_eq!(store.live(), ["web"].map(Arc::from));
    assert_eq!((store.exists("web"), store.exists("..")), (None, Some(false)));
    store.check();
    store.set_node(Node::Named("n".into()));
    store.set("web", vec![instance("n", "web")]);
    let catalog = store.publish().unwrap();
    assert!(catalog.get(&ServiceId::new("..")).is_some(), "it isn't explained");
}

#[test]
fn too_many_names_for_all_make_no_service_cold_at_once() {
    let start = Instant::now();
    let mut store = new_store();
    store.add_listed((0..5).map(|n| format!("s{n}").into()));
    store.rebalance(true, start);
    for follows_all in [false, true, false] {
        assert!(!store.rebalance(follows_all, start), "{follows_all}");
        assert_eq!(store.n_live(), 5);
        store.check();
    }
    store.expire(start + IDLE_TIMEOUT - S);
    store.rebalance(false, start + IDLE_TIMEOUT - S);
    assert_eq!(store.n_live(), 5);
    store.expire(start + IDLE_TIMEOUT);
    assert!(store.rebalance(false, start + IDLE_TIMEOUT));
    assert_eq!(store.n_live(), 0);
    store.check();
}

#[test]
fn a_name_that_goes_or_goes_cold_ends_its_request() {
    let (mut store, _) = synced(&["a", "b", "c"]);
    for (id, name) in [(1, "a"), (2, "b"), (3, "c")] {
        store.edit_live(&name.into(), |live| live.request = Some(id));
    }
    store.set_names(&["b", "c"]);
    store.set_live("b", false);
    assert_eq!((store.take_ended(), store.n_live()), (vec![1, 2], 1));
    assert!(store.take_ended().is_empty());
}

#[test]
fn the_age_of_a_service_without_an_answer_is_that_of_its_watch() {
    let start = Instant::now();
    let mut store = new_store();
    assert_eq!(store.oldest_age(start), None);
    store.add_listed(["a".into()]);
    store.rebalance(true, start + 3600 * S);
    assert_eq!(store.oldest_age(start + 3607 * S), Some(7 * S));
}

#[test]
fn a_confirmed_loss_is_applied_unless_there_is_a_reason_to_withhold_it() {
    use Assessment::*;
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
        for (is_consistent, of_list, of_service) in
            [(false, Confirm, Confirm), (true, of_list, of_service)]
        {
            let all: &[&str] = if is_mass { &["a", "b", "c"] } else { &["a"] };
            let evidence = Evidence { now: start, is_consistent, is_filtered, moved };
            let (mut store, _) = synced(all);
            store.is_list_filtered = was_filtered;
            let got = store.assess_list(&List::default(), is_hidden, evidence);
            assert_eq!(got, of_list, "the list: {what}");
            let (mut store, _) = synced(all);
            store.edit(&"a".into(), |service, _| service.is_filtered = was_filtered);
            for other in &all[1..] {
                store.edit_live(&(*other).into(), |live| live.suspect_at = Some(start));
            }
            let got = store.assess(&"a".into(), &answer(Vec::new()), evidence);
            assert_eq!(got, of_service, "the service: {what}");
            store.check();
        }
    }
}

#[test]
fn a_suspicious_list_makes_the_loss_of_a_service_suspicious() {
    let now = Instant::now();
    for (is_filtered, moved, of_service) in [
        (false, IndexMove::Backward, Assessment::Withhold),
        (true, IndexMove::Forward, Assessment::Apply),
    ] {
        let (mut store, _) = synced(&["a"]);
        let of_list = Evidence { is_filtered, ..evidence(now, true, moved) };
        assert_eq!(store.assess_list(&List::default(), false, of_list), Assessment::Withhold);
        assert!(store.has_suspicions(now));
        let evidence = evidence(now, true, IndexMove::Forward);
        let got = store.assess(&"a".into(), &answer(Vec::new()), evidence);
        assert_eq!(got, of_service, "{is_filtered} {moved:?}");
    }
}

#[test]
fn a_suspicious_list_restores_the_few_services_that_are_live() {
    let start = Instant::now();
    // (after how many seconds the list loses all, whether filtered, whether the service is restored)
    for (after, is_filtered, is_restored) in
        [(20, false, true), (60, false, true), (61, false, false), (20, true, false)]
    {
        let (mut store, _) = synced(&["web", "s1", "s2", "s3", "s4"]);
        for cold in ["s1", "s2", "s3", "s4"] {
            store.set_live(cold, false);
        }
        let vanished = evidence(start, true, IndexMove::Forward);
        assert_eq!(handle(&mut store, "web", &instances([]), vanished), Assessment::Apply);
        let now = start + after * S;
        let of_list = Evidence { is_filtered, ..evidence(now, true, IndexMove::Forward) };
        assert_eq!(store.assess_list(&List::default(), false, of_list), Assessment::Withhold);
        store.check();
        let what = format!("{after} s, filtered: {is_filtered}");
        assert_eq!(store.by_name["web"].n_serving() > 0, is_restored, "{what}");
        if is_restored {
            let again = evidence(now, true, IndexMove::Forward);
            let got = handle(&mut store, "web", &instances([]), again);
            assert_eq!(got, Assessment::Withhold, "{what}");
            let end = evidence(now + DISTRUST, true, IndexMove::Forward);
            store.assess_list(&List::default(), false, end);
            assert_eq!(handle(&mut store, "web", &instances([]), end), Assessment::Apply);
        }
    }
}

#[test]
fn services_that_vanish_within_a_minute_are_restored() {
    let start = Instant::now();
    // (how many serve, after how many seconds each of them vanishes, how many are restored)
    let table: [(usize, &[u64], usize); 6] = [
        (3, &[0, 20, 40], 2),
        (3, &[0, 30, 61], 0),
        (2, &[0, 0], 0),
        (6, &[0, 0, 0], 0),
        (5, &[0, 0, 0], 2),
        (9, &[0, 10, 20, 30, 40], 4),
    ];
    for (n_serving, after, expected) in table {
        let (mut store, _, all) = many(n_serving);
        let mut applied = Vec::new();
        for (name, after) in all.iter().zip(after) {
            let evidence = evidence(start + *after as u32 * S, true, IndexMove::Forward);
            if handle(&mut store, name, &instances([]), evidence) == Assessment::Apply {
                applied.push(name);
            }
            store.check();
        }
        let restored = applied.iter().filter(|name| store.by_name[**name].n_serving() > 0);
        assert_eq!(restored.count(), expected, "{after:?} of {n_serving}");
        let (last, what) = (start + 61 * S, format!("{after:?} of {n_serving}"));
        assert_eq!(store.has_suspicions(last), expected > 0, "{what}");
        assert!(!store.has_suspicions(last + DISTRUST) && store.problem(last + DISTRUST).is_none());
    }
}

//! The model, by what it publishes after what it was told.

use super::super::index::IndexMove;
use super::*;
use crate::table::HealthStatus;
use crate::table::{NodeIdentity, ServiceMeta};

const DISTRUST: Duration = Duration::from_secs(300);

fn names(list: &[&str]) -> BTreeSet<Arc<str>> {
    list.iter().map(|name| Arc::from(*name)).collect()
}

fn instance(node: &str, id: &str) -> Instance {
    Instance {
        node: node.into(),
        id: id.into(),
        address: "127.0.0.1".into(),
        port: 80,
        weight: 1,
        local: false,
        node_identity: NodeIdentity::default(),
        node_address: None,
        may_be_local: false,
        health: HealthStatus::Serving,
        meta: ServiceMeta::default(),
    }
}

fn heard(instances: Vec<Instance>) -> ServiceAnswer {
    ServiceAnswer { instances: Some(instances), unchecked: Vec::new() }
}

/// One that knows what the switch says.
fn hearing() -> Model {
    let mut model = Model::new(BTreeSet::new(), DISTRUST);
    model.hear_switch();
    model
}

/// All of these names are live.
fn with_names(model: &mut Model, list: &[&str]) {
    model.set_names(&names(list));
    list.iter().for_each(|name| model.set_live(name, true));
}

fn set(model: &mut Model, name: &str, instances: Vec<Instance>) {
    model.set_service(&name.into(), heard(instances), Instant::now());
}

fn synced(services: &[&str]) -> (Model, Catalog) {
    let mut model = hearing();
    model.set_node(Node::Named("n1".into()));
    with_names(&mut model, services);
    for name in services {
        set(&mut model, name, vec![instance("n1", "1")]);
    }
    let catalog = model.take().unwrap();
    (model, catalog)
}

#[test]
fn nothing_is_published_before_all_that_is_live_has_answered() {
    let mut model = Model::new(BTreeSet::new(), DISTRUST);
    with_names(&mut model, &["a", "b"]);
    model.set_names(&names(&["a", "b", "cold"]));
    assert!(model.take().is_none());
    set(&mut model, "a", vec![instance("n1", "1")]);
    model.set_service(&"b".into(), ServiceAnswer::default(), Instant::now());
    assert!(model.take().is_none(), "the node's name is missing");
    model.set_node(Node::Named("n1".into()));
    assert!(model.take().is_none(), "the switch hasn't said whether to translate");
    model.hear_switch();
    let catalog = model.take().unwrap();
    assert_eq!(catalog.len(), 2, "b is a proxy's name");
    assert!(catalog["a"].groups[0].instances[0].local);
    assert_eq!(catalog["a"].watch, Watch::Live);
    assert_eq!(
        (catalog["cold"].groups[0].instances.len(), catalog["cold"].watch),
        (0, Watch::Cold)
    );
    assert!(model.take().is_none());
}

#[test]
fn an_empty_list_of_names_is_a_catalog() {
    let mut model = hearing();
    model.set_node(Node::Denied(Own::default()));
    model.set_names(&names(&[]));
    assert_eq!(model.take(), Some(Catalog::new()));
}

#[test]
fn stragglers_are_named_and_join_later() {
    let mut model = hearing();
    model.stop_waiting(false);
    assert!(model.take().is_none(), "without names there is nothing to publish");
    with_names(&mut model, &["a", "b"]);
    set(&mut model, "a", Vec::new());
    model.stop_waiting(false);
    assert_eq!(model.take().unwrap().len(), 1);
    assert!(model.problem().unwrap().starts_with("service `b`: Consul hasn't said"));
    model.set_problem(Subject::Service("b".into()), None);
    set(&mut model, "b", Vec::new());
    assert_eq!(model.take().unwrap().len(), 2);
    assert_eq!(model.problem(), None);
}

#[test]
fn what_the_kernel_serves_is_not_left_out_for_want_of_an_answer() {
    let mut model = Model::new(names(&["weba", "gone"]), DISTRUST);
    model.hear_switch();
    model.set_node(Node::Named("n1".into()));
    assert!(model.would_lose(&names(&["WebA"])), "gone is missing");
    assert!(!model.would_lose(&names(&["WebA", "gone", "new"])));
    with_names(&mut model, &["WebA", "new"]);
    set(&mut model, "new", vec![instance("n1", "1")]);
    model.stop_waiting(false);
    assert!(model.take().is_none());
    assert!(model.problem().unwrap().starts_with("service `WebA`"));
    assert!(model.is_shrink("WebA", &heard(Vec::new())), "it had some");
    assert!(!model.is_shrink("new", &heard(vec![instance("n1", "1")])));
    set(&mut model, "WebA", vec![instance("n1", "1")]);
    assert_eq!(model.take().unwrap().len(), 2);

    let mut model = Model::new(names(&["weba"]), DISTRUST);
    with_names(&mut model, &["WebA"]);
    model.stop_waiting(true);
    assert!(model.take().is_some(), "there is an end to it");
}

#[test]
fn a_list_without_a_name_that_serves_is_a_loss() {
    let (mut model, _) = synced(&["a", "b", "c"]);
    set(&mut model, "b", Vec::new());
    for (list, is_loss) in
        [(&["a", "b", "c"][..], false), (&["a", "c"], false), (&["a", "b"], true), (&[], true)]
    {
        assert_eq!(model.would_lose(&names(list)), is_loss, "{list:?}");
    }
}

#[test]
fn what_did_not_change_is_shared_or_not_published_at_all() {
    let (mut model, first) = synced(&["a", "b"]);
    model.set_names(&names(&["a", "b"]));
    model.set_node(Node::Named("n1".into()));
    set(&mut model, "a", vec![instance("n1", "1")]);
    assert!(model.take().is_none());

    set(&mut model, "a", vec![instance("n2", "1"), instance("n1", "2")]);
    let second = model.take().unwrap();
    assert!(Arc::ptr_eq(&first["b"].groups[0].instances, &second["b"].groups[0].instances));
    assert!(!Arc::ptr_eq(&first["a"].groups[0].instances, &second["a"].groups[0].instances));
    let order: Vec<_> =
        second["a"].groups[0].instances.iter().map(|i| (&*i.node, &*i.id, i.local)).collect();
    assert_eq!(order, [("n1", "2", true), ("n2", "1", false)]);
}

#[test]
fn a_name_that_goes_takes_its_service_along() {
    let (mut model, _) = synced(&["a", "b"]);
    model.set_names(&names(&["b"]));
    assert!(model.take().unwrap().keys().eq(&[ServiceId::new("b")]));
    set(&mut model, "a", vec![instance("n1", "1")]);
    model.set_problem(Subject::Service("a".into()), Some("late".into()));
    assert!(model.take().is_none());
    assert_eq!(model.problem(), None);
}

#[test]
fn a_service_that_goes_cold_keeps_its_instances_until_they_are_old() {
    let (mut model, first) = synced(&["a", "b"]);
    let (now, max_age) = (Instant::now(), Duration::from_secs(60));
    model.set_live("a", false);
    let second = model.take().unwrap();
    assert_eq!((second["a"].watch, second["b"].watch), (Watch::Cold, Watch::Live));
    assert!(Arc::ptr_eq(&first["a"].groups[0].instances, &second["a"].groups[0].instances));
    assert_eq!(model.exists("a"), None);

    model.forget(now + max_age / 2, max_age);
    assert!(model.take().is_none());
    model.forget(now + max_age * 2, max_age);
    let third = model.take().unwrap();
    assert_eq!(
        (third["a"].groups[0].instances.len(), third["b"].groups[0].instances.len()),
        (0, 1)
    );

    model.set_live("a", true);
    assert!(model.take().is_none(), "nothing is known of it yet");
    set(&mut model, "a", vec![instance("n1", "1")]);
    assert_eq!((model.take().unwrap()["a"].watch, model.exists("a")), (Watch::Live, Some(true)));
}

#[test]
fn a_cold_service_ages_while_the_machine_is_suspended() {
    let (mut model, _) = synced(&["a"]);
    let (now, max_age) = (Instant::now(), Duration::from_secs(60));
    model.set_live("a", false);
    model.slept(max_age / 2);
    model.forget(now, max_age);
    assert_eq!(model.take().unwrap()["a"].groups[0].instances.len(), 1);
    model.slept(max_age);
    model.forget(now, max_age);
    assert!(model.take().unwrap()["a"].groups[0].instances.is_empty());
}

#[test]
fn memory_serves_until_the_answers_come() {
    let (model, first) = synced(&["a", "b"]);
    let mut next = hearing();
    next.seed(&model.memory());
    assert!(next.take().is_none(), "Consul has the first word");
    next.serve_memory();
    let served = next.take().unwrap();
    assert_eq!(served["a"].groups[0].instances, first["a"].groups[0].instances);
    assert_eq!(served["a"].watch, Watch::Cold);
    assert!(next.is_shrink("a", &heard(Vec::new())));
    with_names(&mut next, &["a"]);
    set(&mut next, "a", vec![instance("n1", "1")]);
    assert_eq!(next.take().unwrap()["a"].watch, Watch::Live);
}

#[test]
fn an_instance_without_its_checks_serves_after_a_moment() {
    let (mut model, _) = synced(&["a"]);
    let now = Instant::now();
    let both = vec![instance("n1", "1"), instance("n1", "2")];
    let heard = ServiceAnswer { instances: Some(both), unchecked: vec![("n1".into(), "2".into())] };
    model.set_service(&"a".into(), heard, now);
    assert_eq!(n_serving(&model.take().unwrap()["a"].groups[0].instances), 1);
    let at = model.next_release().unwrap();
    model.release(at);
    assert_eq!(n_serving(&model.take().unwrap()["a"].groups[0].instances), 2);
    assert_eq!(model.next_release(), None);
}

#[test]
fn what_is_released_is_no_answer_of_consul() {
    let (mut model, _) = synced(&["a"]);
    let now = Instant::now();
    let both = vec![instance("n1", "1"), instance("n1", "2")];
    let heard = ServiceAnswer { instances: Some(both), unchecked: vec![("n1".into(), "2".into())] };
    model.set_service(&"a".into(), heard, now);
    // It went cold, and is used again, but hasn't been answered for since.
    model.set_live("a", false);
    model.set_live("a", true);
    model.release(model.next_release().unwrap());
    let catalog = model.take().unwrap();
    assert_eq!((catalog["a"].watch, model.exists("a")), (Watch::Cold, None));
    assert_eq!(n_serving(&catalog["a"].groups[0].instances), 2);
}

fn signs(now: Instant, is_sure: bool, moved: IndexMove) -> Evidence {
    Evidence { now, is_sure, is_filtered: false, moved }
}

#[test]
fn what_turns_critical_is_out_at_once_whatever_speaks_against_it() {
    let (mut model, _) = synced(&["a", "b", "c", "d"]);
    let now = Instant::now();
    let mut critical = instance("n1", "1");
    critical.health = HealthStatus::Out("critical".into());
    for name in ["a", "b", "c", "d"] {
        for (is_sure, expected) in [(false, Assessment::Confirm), (true, Assessment::Apply)] {
            let signs = signs(now, is_sure, IndexMove::Backward);
            let got = model.weigh(&name.into(), &heard(vec![critical.clone()]), signs);
            assert_eq!(got, expected, "{name}");
        }
    }
    assert_eq!(model.problem(), None);
}

#[test]
fn all_that_goes_within_a_minute_comes_back_and_goes_after_five() {
    let (mut model, first) = synced(&["a", "b", "c"]);
    let start = Instant::now();
    let gone = |model: &mut Model, name: &str, now: Instant, is_sure: bool| {
        let name: Arc<str> = name.into();
        let weight =
            model.weigh(&name, &heard(Vec::new()), signs(now, is_sure, IndexMove::Forward));
        if weight == Assessment::Apply {
            model.set_service(&name, heard(Vec::new()), now);
        }
        weight
    };
    let second = Duration::from_secs(1);
    assert_eq!(gone(&mut model, "a", start, true), Assessment::Apply);
    assert_eq!(gone(&mut model, "b", start + 20 * second, true), Assessment::Apply);
    let catalog = model.take().unwrap();
    let serving =
        |catalog: &Catalog| catalog.values().filter(|l| !l.groups[0].instances.is_empty()).count();
    assert_eq!(serving(&catalog), 1);
    assert_eq!(gone(&mut model, "c", start + 40 * second, true), Assessment::Withhold);
    let catalog = model.take().unwrap();
    assert_eq!(serving(&catalog), 3);
    assert_eq!(catalog["a"].groups[0].instances, first["a"].groups[0].instances);
    let problem = model.problem().unwrap();
    assert!(
        problem.contains(
            "`a` and 2 more services: they all went at once. If they were stopped on purpose, there \
             is nothing to do: this ends by itself 300s after"
        ),
        "{problem}"
    );
    assert!(model.is_failing());
    // One that is whole again is out of it; of the others it is true after all.
    let whole = heard(vec![instance("n1", "7")]);
    let signs = signs(start + 50 * second, false, IndexMove::Forward);
    assert_eq!(model.weigh(&"b".into(), &whole, signs), Assessment::Apply);
    let end = start + 40 * second + DISTRUST;
    for name in ["a", "c"] {
        assert_eq!(gone(&mut model, name, end - second, true), Assessment::Withhold);
        assert_eq!(gone(&mut model, name, end, false), Assessment::Confirm);
        assert_eq!(gone(&mut model, name, end, true), Assessment::Apply);
    }
    assert_eq!(model.problem(), None);
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
    heard(ids.into_iter().map(one).collect())
}

/// As the source does with an answer of a leader that is sure.
fn answer(model: &mut Model, name: &str, heard: &ServiceAnswer, signs: Evidence) -> Assessment {
    let name: Arc<str> = name.into();
    let weight = model.weigh(&name, heard, signs);
    match weight {
        Assessment::Apply => model.set_service(&name, heard.clone(), signs.now),
        Assessment::Withhold => model.withhold(&name, heard.clone(), signs.now),
        Assessment::Confirm => panic!("it was sure"),
    }
    weight
}

/// The ports of those that serve.
fn serving_ports(model: &Model, name: &str) -> Vec<i64> {
    let Known::Service { instances, .. } = &model.services[name].known else { return Vec::new() };
    let serving = instances.iter().filter(|instance| instance.health.serves());
    let mut ports: Vec<i64> = serving.map(|instance| instance.port).collect();
    ports.sort_unstable();
    ports
}

#[test]
fn jobs_that_run_again_serve_where_they_are_now() {
    let (mut model, _) = synced(&["a", "b", "c"]);
    let now = Instant::now();
    let signs = signs(now, true, IndexMove::Forward);
    for name in ["a", "b", "c"] {
        answer(&mut model, name, &instances(0..10), signs);
    }
    for (name, expected) in
        [("a", Assessment::Apply), ("b", Assessment::Apply), ("c", Assessment::Withhold)]
    {
        assert_eq!(answer(&mut model, name, &instances([]), signs), expected, "{name}");
    }
    for name in ["a", "b", "c"] {
        assert_eq!(serving_ports(&model, name), (1000..1010).collect::<Vec<_>>());
        // New ones that aren't healthy yet leave it at that; what has their port is gone.
        let mut critical = instances([100, 101]);
        critical.instances.as_mut().unwrap()[0].port = 1000;
        assert_eq!(answer(&mut model, name, &critical, signs), Assessment::Withhold, "{name}");
        assert_eq!(serving_ports(&model, name), (1001..1010).collect::<Vec<_>>());
        // Those that are take over.
        assert_eq!(
            answer(&mut model, name, &instances(20..24), signs),
            Assessment::Apply,
            "{name}"
        );
        assert_eq!(serving_ports(&model, name), (1020..1024).collect::<Vec<_>>());
    }
    assert_eq!(model.problem(), None);
}

#[test]
fn what_is_asked_for_no_more_is_not_doubted_nor_taken_back() {
    let (mut model, _) = synced(&["a", "b", "c", "d", "e"]);
    let now = Instant::now();
    let sure = signs(now, true, IndexMove::Forward);
    let filtered = Evidence { is_filtered: true, ..sure };
    assert_eq!(answer(&mut model, "a", &instances([]), filtered), Assessment::Withhold);
    assert!(model.has_doubts(now) && model.is_failing());
    model.set_live("a", false);
    model.report_doubts(now);
    assert!(!model.has_doubts(now) && !model.is_failing());

    // One that went cold after it was gone, one that was cold when the list lost it, and one that is
    // live.
    assert_eq!(answer(&mut model, "b", &instances([]), sure), Assessment::Apply);
    model.set_live("b", false);
    for (name, is_live) in [("c", false), ("d", true)] {
        model.set_live(name, is_live);
        assert!(model.empty(&name.into(), now));
    }
    model.set_live("a", true);
    assert_eq!(answer(&mut model, "a", &instances([]), sure), Assessment::Apply);
    assert_eq!(answer(&mut model, "e", &instances([]), sure), Assessment::Withhold);
    let n_known = ["a", "b", "c", "d", "e"].map(|name| serving_ports(&model, name).len());
    assert_eq!(n_known, [1, 0, 0, 1, 1]);
    // What was taken back isn't registered again for that.
    assert!(model.is_doubted("d", now) && !model.is_back("d"));
    assert_eq!(answer(&mut model, "d", &instances([1]), sure), Assessment::Apply);
    assert!(!model.is_doubted("d", now) && model.is_back("d"));

    // Consul says no more, and the time is over.
    let end = now + DISTRUST;
    assert!(model.has_doubts(end - Duration::from_secs(1)));
    model.report_doubts(end);
    assert!(!model.has_doubts(end) && !model.is_doubted("a", end) && !model.is_failing());
}

#[test]
fn what_is_left_out_serves_beside_what_is_listed() {
    let now = Instant::now();
    let filtered = Evidence { is_filtered: true, ..signs(now, true, IndexMove::Forward) };
    for signs in
        [filtered, signs(now, true, IndexMove::None), signs(now, true, IndexMove::Backward)]
    {
        let (mut model, _) = synced(&["a"]);
        let sure = Evidence { is_filtered: false, moved: IndexMove::Forward, ..signs };
        answer(&mut model, "a", &instances(0..10), sure);
        // One is listed yet, one is new, and another one turned critical.
        let mut some = instances([0, 1, 20]);
        some.instances.as_mut().unwrap()[1].health = HealthStatus::Out("critical".into());
        assert_eq!(answer(&mut model, "a", &some, signs), Assessment::Withhold, "{signs:?}");
        let expected: Vec<i64> = [1000].into_iter().chain(1002..1010).chain([1020]).collect();
        assert_eq!(serving_ports(&model, "a"), expected, "{signs:?}");
        // What was new is no more part of what is missing.
        assert_eq!(answer(&mut model, "a", &instances([0, 1]), signs), Assessment::Withhold);
        assert_eq!(serving_ports(&model, "a"), (1000..1010).collect::<Vec<_>>(), "{signs:?}");
        assert_eq!(answer(&mut model, "a", &instances(20..26), signs), Assessment::Apply);
        assert_eq!(serving_ports(&model, "a"), (1020..1026).collect::<Vec<_>>(), "{signs:?}");
        assert_eq!(model.problem(), None);
    }
}

#[test]
fn a_new_node_name_moves_what_is_local() {
    let (mut model, _) = synced(&["a"]);
    model.set_node(Node::Named("n2".into()));
    assert!(!model.take().unwrap()["a"].groups[0].instances[0].local);
}

#[test]
fn a_node_that_is_known_stays_known() {
    let mut model = hearing();
    with_names(&mut model, &["a"]);
    model.set_node(Node::Denied(Own::default()));
    set(&mut model, "a", vec![instance("n1", "1")]);
    assert!(!model.take().unwrap()["a"].groups[0].instances[0].local);
    assert_eq!(model.problem().unwrap(), AGENT_DENIED);
    model.set_node(Node::Named("n1".into()));
    assert!(model.take().unwrap()["a"].groups[0].instances[0].local);
    model.set_node(Node::Denied(Own::default()));
    assert!(model.take().is_none(), "an error takes nothing away");
    assert_eq!((model.problem(), model.is_failing()), (None, false));
}

#[test]
fn complaints_are_told_once_and_the_first_three() {
    let (mut model, _) = synced(&["a", "b", "c", "d", "e"]);
    for name in ["a", "b"] {
        model.set_problem(Subject::Service(name.into()), Some("down".into()));
    }
    assert_eq!(model.problem().unwrap(), "service `a`: down");
    model.set_problem(Subject::Names, Some("down".into()));
    assert_eq!(model.problem().unwrap(), "down");
    for name in ["c", "d", "e"] {
        model.set_problem(Subject::Service(name.into()), Some(format!("bad {name}")));
    }
    let expected = "down; service `c`: bad c; service `d`: bad d; and 1 more";
    assert_eq!(model.problem().unwrap(), expected);
}

#[test]
fn what_the_kernel_serves_already_is_not_held_back_at_a_restart() {
    let checked = || {
        let instances = vec![instance("n1", "checked"), instance("n1", "unchecked")];
        let unchecked = vec![("n1".to_owned(), "unchecked".to_owned())];
        ServiceAnswer { instances: Some(instances), unchecked }
    };
    // (what the kernel serves, which of both instances serve at first)
    for (in_use, expected) in [(&["web"][..], 2), (&[], 1)] {
        let mut model = Model::new(names(in_use), DISTRUST);
        model.hear_switch();
        model.set_node(Node::Named("n1".into()));
        with_names(&mut model, &["Web"]);
        let now = Instant::now();
        model.set_service(&"Web".into(), checked(), now);
        let catalog = model.take().unwrap();
        assert_eq!(n_serving(&catalog["Web"].groups[0].instances), expected, "{in_use:?}");
        model.set_service(&"Web".into(), checked(), now);
        assert_eq!(model.next_release().is_none(), expected == 2);
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
        let mut model = hearing();
        model.set_node(node.clone());
        with_names(&mut model, &["a"]);
        let record = Instance { node_identity, ..instance(record, "1") };
        set(&mut model, "a", vec![record.clone()]);
        model.serve_memory();
        let catalog = model.take().unwrap();
        assert_eq!(catalog["a"].groups[0].instances[0].local, expected, "{node:?} {record:?}");
        // And where the node is known after the record.
        let mut model = hearing();
        with_names(&mut model, &["a"]);
        set(&mut model, "a", vec![record.clone()]);
        model.set_node(node.clone());
        model.serve_memory();
        let catalog = model.take().unwrap();
        assert_eq!(catalog["a"].groups[0].instances[0].local, expected, "{node:?} {record:?}");
    }
}

#[test]
fn without_the_right_to_ask_the_nodes_address_says_which_it_is() {
    let own = || Own::of(&["10.0.0.1", "fd00::1", "172.17.0.1"], &["172.17.0.0/16"]);
    // (the node's address, the instance's, whether it is this node's, whether that needs a right)
    for (node, address, is_local, needs_agent) in [
        (Some("10.0.0.1"), "172.17.0.5", true, false),
        (Some("10.0.0.1"), "127.0.0.1", true, false),
        (Some("fd00::1"), "127.0.0.1", true, false),
        (Some("10.0.0.2"), "127.0.0.1", false, true),
        (Some("10.0.0.2"), "172.17.0.5", false, true),
        (Some("10.0.0.2"), "10.0.0.2", false, false),
        // A container with an agent of its own: the table reaches it.
        (Some("172.17.0.2"), "172.17.0.5", false, false),
        (None, "127.0.0.1", false, true),
        (None, "10.0.0.1", false, false),
        // The loopback is every node's.
        (Some("127.0.0.1"), "127.0.0.1", false, true),
    ] {
        let mut model = hearing();
        with_names(&mut model, &["a"]);
        let node_address = node.map(|node| node.parse().unwrap());
        let address = address.to_owned();
        let record = Instance { node_address, address, ..instance("n1", "1") };
        set(&mut model, "a", vec![record.clone()]);
        model.set_node(Node::Denied(Own::default()));
        model.set_node(Node::Denied(own()));
        let catalog = model.take().unwrap();
        assert_eq!(catalog["a"].groups[0].instances[0].local, is_local, "{record:?}");
        let problem = model.problem();
        assert_eq!(problem.as_deref(), needs_agent.then_some(AGENT_DENIED), "{record:?}");
        // And in the next daemon, while Consul is silent.
        let mut next = Model::new(BTreeSet::new(), DISTRUST);
        let mut memory = model.memory();
        memory.services.values_mut().for_each(|web| web.answered_at = Some(Instant::now()));
        next.seed(&memory);
        next.serve_memory();
        assert_eq!(next.take().unwrap()["a"].groups[0].instances[0].local, is_local, "{record:?}");
    }
}

#[test]
fn an_agent_behind_nat_takes_only_the_loopback_from_its_node() {
    let elsewhere = |may_be_here| Node::Elsewhere { why: "NAT".into(), may_be_here };
    for (node, record, expected) in [
        (elsewhere(Some("n1".into())), "n1", true),
        (elsewhere(Some("n1".into())), "n2", false),
        (elsewhere(None), "n1", false),
    ] {
        let mut model = hearing();
        with_names(&mut model, &["a"]);
        set(&mut model, "a", vec![instance(record, "1")]);
        model.set_node(node.clone());
        let catalog = model.take().unwrap();
        let got = &catalog["a"].groups[0].instances[0];
        assert_eq!((got.local, got.may_be_local), (false, expected), "{node:?} {record}");
        model.set_node(Node::Named("n2".into()));
        let catalog = model.take().unwrap_or(catalog);
        assert!(!catalog["a"].groups[0].instances[0].may_be_local);
    }
}

#[test]
fn a_release_is_no_answer_of_consul() {
    let (mut model, _) = synced(&["a"]);
    let now = Instant::now();
    let instances = vec![instance("n1", "1"), instance("n1", "2")];
    let unchecked = vec![("n1".to_owned(), "2".to_owned())];
    model.set_service(&"a".into(), ServiceAnswer { instances: Some(instances), unchecked }, now);
    let until = model.next_release().expect("the newcomer is held back");
    // It was used by nobody for a while, and Consul hasn't answered since.
    model.set_live("a", false);
    model.set_live("a", true);
    model.release(until);
    let catalog = model.take().unwrap();
    assert_eq!(
        (n_serving(&catalog["a"].groups[0].instances), catalog["a"].watch),
        (2, Watch::Cold)
    );
    assert_eq!(model.exists("a"), None);
}

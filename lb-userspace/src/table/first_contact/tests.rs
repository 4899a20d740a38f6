use proptest::prelude::*;

use super::*;

const S: Duration = Duration::from_secs(1);

/// An instance's id and address, and whether a check vouches for it.
type Given = (&'static str, u16, bool);

fn backend((id, port, _): Given) -> Backend {
    let address = SocketAddr::from(([10, 0, 0, 1], port));
    Backend { node: "n1".into(), id: id.into(), ..Backend::example(address) }
}

/// A service `web` with its tables one after the other, as the builder makes them.
struct World {
    contacts: Contacts,
    last: Option<Service>,
    now: Instant,
}

impl World {
    fn new() -> World {
        World { contacts: Contacts::default(), last: None, now: Instant::now() }
    }

    /// The next table; returns which instances serve.
    fn build(&mut self, instances: &[Given]) -> String {
        let mut backends: Vec<Backend> = instances.iter().copied().map(backend).collect();
        let unchecked = instances.iter().filter(|(.., is_checked)| !is_checked);
        let unchecked = unchecked.filter_map(|given| backend(*given).address).collect();
        self.contacts.judge(&"web".into(), &mut backends, &unchecked, self.last.as_ref());
        let serving = backends.iter().filter(|backend| backend.state.is_reached());
        let serving = serving.map(|backend| &*backend.id).collect::<Vec<_>>().join(" ");
        self.last = Some(Service::example(backends));
        serving
    }

    /// The ports that are probed now.
    fn begin(&mut self) -> Vec<Probe> {
        self.contacts.begin_due(self.now)
    }

    fn fail(&mut self, probe: Probe) -> Option<Arc<str>> {
        self.contacts.end_probe(probe, Err("connection refused".into()), self.now)
    }

    fn succeed(&mut self, probe: Probe) -> Option<Arc<str>> {
        self.contacts.end_probe(probe, Ok(()), self.now)
    }

    fn reasons(&self) -> Vec<String> {
        let status = self.contacts.status("web", self.now);
        status.values().map(|status| status.reason(false)).collect()
    }
}

fn ports(probes: &[Probe]) -> Vec<u16> {
    probes.iter().map(|probe| probe.address.port()).collect()
}

const A: Given = ("a", 1, true);
const B: Given = ("b", 2, false);
const C: Given = ("c", 3, false);

#[test]
fn one_that_others_serve_beside_waits_for_a_connection() {
    let mut world = World::new();
    assert_eq!(world.build(&[A, B]), "a");
    let [probe] = world.begin()[..] else { panic!("one probe") };
    assert_eq!(world.begin(), [], "it is under way");
    assert_eq!(world.fail(probe), None);
    assert_eq!(
        world.reasons(),
        ["no connection to it has succeeded yet (tried once: connection refused); it serves in \
          10 s at the latest"]
    );
    assert_eq!(world.contacts.next_wake(), Some(world.now + RETRY));
    world.now += RETRY;
    let [probe] = world.begin()[..] else { panic!("it is tried again") };
    // Another event builds the service meanwhile.
    assert_eq!(world.build(&[A, B]), "a");
    assert_eq!(world.succeed(probe).as_deref(), Some("web"));
    assert_eq!(world.build(&[A, B]), "a b");
    assert_eq!(world.build(&[A, B]), "a b", "it stays proven");
    assert_eq!((world.begin(), world.reasons()), (vec![], vec![]));
}

#[test]
fn it_serves_after_ten_seconds_with_the_reason() {
    let mut world = World::new();
    world.build(&[A, B]);
    let mut n_tries = 0;
    while world.contacts.expire(world.now).is_empty() {
        for probe in world.begin() {
            n_tries += 1;
            assert_eq!(world.fail(probe), None);
        }
        assert_eq!(world.build(&[A, B]), "a");
        world.now = world.contacts.next_wake().unwrap();
    }
    assert_eq!(n_tries, 10);
    assert_eq!(world.build(&[A, B]), "a b");
    assert_eq!(
        world.reasons(),
        [
            "no connection to it succeeded within 10s (tried 10 times: connection refused); it serves \
          all the same"
        ]
    );
    world.now += MAX_WAIT;
    assert_eq!(world.begin(), []);
    assert_eq!(world.build(&[A, B]), "a b");
    // It goes, and comes again.
    assert_eq!(world.build(&[A]), "a");
    assert_eq!(world.build(&[A, B]), "a");
}

#[test]
fn without_others_all_serve_at_once_and_the_first_proven_one_takes_over() {
    let mut world = World::new();
    assert_eq!(world.build(&[B]), "b", "it is the only one");
    assert_eq!(world.build(&[B, C]), "b c", "neither is proven");
    let probes = world.begin();
    assert_eq!(ports(&probes), [2, 3]);
    world.fail(probes[0]);
    let reason = &world.contacts.status("web", world.now)[&probes[0].address];
    assert!(reason.reason(true).ends_with("it serves, since no other instance does"));
    assert!(world.succeed(probes[1]).is_some());
    assert_eq!(world.build(&[B, C]), "c", "it listens, and the other doesn't yet");
    assert_eq!(world.build(&[B]), "b", "it is alone again");
}

#[test]
fn another_instance_at_the_address_is_a_new_one() {
    let mut world = World::new();
    world.build(&[A, B]);
    let probes = world.begin();
    world.succeed(probes[0]);
    assert_eq!(world.build(&[A, B]), "a b");
    let other = ("d", 2, false);
    assert_eq!(world.build(&[A, other]), "a");
    let probes = world.begin();
    // The job's next instance has the port before the probe ends.
    let another = ("e", 2, false);
    assert_eq!(world.build(&[A, another]), "a");
    assert_eq!(world.succeed(probes[0]), None);
    assert_eq!(world.build(&[A, another]), "a");
}

#[test]
fn a_check_vouches_for_it() {
    let mut world = World::new();
    world.build(&[A, B]);
    assert_eq!(world.build(&[A, ("b", 2, true)]), "a b");
    assert_eq!(world.begin(), []);
    assert_eq!(world.build(&[A, B]), "a b", "what serves isn't held back for a check that goes");
}

#[test]
fn what_the_kernel_serves_is_proven() {
    let mut world = World::new();
    let of = |given: Given| backend(given).address.unwrap();
    world.contacts.set_served([("web".into(), BTreeSet::from([of(A), of(B)]))]);
    assert_eq!(world.build(&[]), "");
    assert_eq!(world.build(&[A, B, C]), "a b");
    assert_eq!(ports(&world.begin()), [3]);
    // That holds for what was there then.
    world.contacts.forget_served("web");
    assert_eq!(world.build(&[A]), "a");
    assert_eq!(world.build(&[A, B]), "a");
    world.contacts.forget("web");
    assert_eq!(world.contacts.next_wake().map(|_| world.begin()), Some(vec![]));
}

#[test]
fn the_number_of_probes_is_bounded() {
    let mut world = World::new();
    let many: Vec<Given> = (0..200).map(|nth| ("x", 1000 + nth, false)).collect();
    world.build(&[&[A], &many[..]].concat());
    let first = world.begin();
    assert_eq!(first.len(), MAX_PROBES);
    assert_eq!(world.contacts.next_wake(), Some(world.now + MAX_WAIT));
    world.succeed(first[0]);
    world.fail(first[1]);
    assert_eq!(ports(&world.begin()), [1064, 1065]);
    // What goes frees its probe's place once that has ended.
    world.build(&[A]);
    for probe in &first[2..] {
        assert_eq!(world.fail(*probe), None);
    }
    assert_eq!(world.contacts.places.len(), 0);
}

/// However many instances don't answer, a new one is tried at once.
#[test]
fn a_first_probe_waits_for_no_retry() {
    let mut world = World::new();
    let many: Vec<Given> = (0..1_000).map(|nth| ("x", 1000 + nth, false)).collect();
    let many = [&[A], &many[..]].concat();
    world.build(&many);
    // None answers: each probe ends with its second.
    for _ in 0..20 {
        let probes = world.begin();
        world.now += S / 4;
        probes.into_iter().for_each(|probe| drop(world.fail(probe)));
    }
    let retries = world.begin();
    assert_eq!(retries.len(), MAX_RETRIES);
    assert_eq!(world.contacts.next_wake(), world.contacts.ends.first().map(|(at, _)| *at));
    world.build(&[&many[..], &[B]].concat());
    assert_eq!(ports(&world.begin()), [2]);
    world.fail(retries[0]);
    assert_eq!(world.begin().len(), 1, "the next retry");
}

#[derive(Clone, Debug)]
enum Step {
    /// These of the instances are registered, the first so many of them with a check.
    Build(Vec<u8>, u8),
    Pass(u8),
    Begin,
    /// The nth probe under way ends.
    End(u8, bool),
}

fn step() -> impl Strategy<Value = Step> {
    let ids = prop::collection::btree_set(0..6_u8, 0..6);
    prop_oneof![
        (ids, 0..3_u8)
            .prop_map(|(ids, n_checked)| Step::Build(ids.into_iter().collect(), n_checked)),
        (1..40_u8).prop_map(Step::Pass),
        Just(Step::Begin),
        (any::<u8>(), any::<bool>()).prop_map(|(nth, is_ok)| Step::End(nth, is_ok)),
    ]
}

proptest! {
    /// In any order of registrations, probes and time: a service with instances serves, an instance that
    /// served beside others and stays registered keeps serving, and none waits for more than its time.
    #[test]
    fn in_any_order(steps in prop::collection::vec(step(), 1..60)) {
        const IDS: [&str; 6] = ["0", "1", "2", "3", "4", "5"];
        let mut world = World::new();
        let mut under_way: Vec<Probe> = Vec::new();
        let mut since: BTreeMap<&str, Instant> = BTreeMap::new();
        let mut present: Vec<Given> = Vec::new();
        for step in steps {
            match step {
                Step::Build(ids, n_checked) => {
                    let given = |id: u8| (IDS[usize::from(id)], 1 + u16::from(id), id < n_checked);
                    present = ids.into_iter().map(given).collect();
                }
                Step::Pass(tenths) => world.now += S / 10 * u32::from(tenths),
                Step::Begin => under_way.extend(world.begin()),
                Step::End(nth, is_ok) if !under_way.is_empty() => {
                    let probe = under_way.swap_remove(usize::from(nth) % under_way.len());
                    let result = if is_ok { Ok(()) } else { Err("refused".to_owned()) };
                    world.contacts.end_probe(probe, result, world.now);
                }
                Step::End(..) => {}
            }
            world.contacts.expire(world.now);
            let proven_before: Vec<String> = world.last.iter().flat_map(Service::healthy)
                .filter(|it| !world.contacts.by_service.get("web")
                    .is_some_and(|contacts| it.address.is_some_and(|at| contacts.get(&at)
                        .is_some_and(|contact| contact.state == ContactState::Unproven))))
                .map(|it| it.id.clone()).collect();
            let serving = world.build(&present);
            under_way.extend(world.begin());
            prop_assert!(under_way.len() <= MAX_PROBES);
            prop_assert_eq!(serving.is_empty(), present.is_empty());
            let serves = |id: &str| serving.split(' ').any(|it| it == id);
            since.retain(|id, _| present.iter().any(|given| given.0 == *id));
            for (id, _, is_checked) in &present {
                prop_assert!(!is_checked || serves(id), "{id} has a check");
                prop_assert!(!proven_before.iter().any(|it| it == id) || serves(id), "{id} was proven");
                let first = *since.entry(id).or_insert(world.now);
                let is_over = world.now.saturating_duration_since(first) >= MAX_WAIT;
                prop_assert!(!is_over || serves(id), "{id} waits for ever");
            }
            let n_contacts = world.contacts.by_service.values().map(BTreeMap::len).sum::<usize>();
            prop_assert_eq!(world.contacts.places.len(), n_contacts);
        }
    }
}

use proptest::prelude::*;

use super::*;
use crate::config::Config;
use crate::table::{Bridge, HealthStatus, Host, ServiceMeta};

fn catalog(text: &[(&str, &[&str])]) -> Catalog {
    let instance = |address: &&str| Instance {
        id: (*address).into(),
        address: (*address).into(),
        port: 8080,
        ..Instance::fixture()
    };
    let record = |addresses: &&[&str]| record(addresses.iter().map(instance).collect());
    text.iter().map(|(name, addresses)| (id(name), record(addresses))).collect()
}

fn id(name: &str) -> ServiceId {
    ServiceId::new(name)
}

fn record(instances: Vec<Instance>) -> ServiceRecord {
    ServiceRecord::new(instances.into(), Watch::Live)
}

/// The instances of a service, to be changed.
fn instances(catalog: &Catalog, name: &str) -> Vec<Instance> {
    catalog[name].instances().cloned().collect()
}

fn builder() -> Builder {
    let vip = Config::default().vip;
    let vips = Vips::new((&vip).into());
    Builder::new(&vip, vips)
}

const NOW: SystemTime = SystemTime::UNIX_EPOCH;

#[test]
fn an_empty_catalog_makes_a_first_table_and_then_nothing() {
    let mut builder = builder();
    let first = builder.next(&Table::default(), &Catalog::new(), NOW).unwrap();
    assert!(first.table.is_synced() && !first.vips_given);
    assert!(builder.next(&first.table, &Catalog::new(), NOW).is_none());
}

#[test]
fn the_last_instances_that_served_are_kept_while_all_are_critical() {
    let mut builder = builder();
    builder.set_keep(Some(Duration::from_secs(60)));
    let mut catalog = catalog(&[("web", &["10.0.0.1", "10.0.0.2", "10.0.0.3"])]);
    let mut known = instances(&catalog, "web");
    let critical = |instance: &mut Instance| {
        instance.is_critical = true;
        instance.health = HealthStatus::Out("check `web` is critical".into());
    };
    critical(&mut known[2]);
    catalog.insert(id("web"), record(known.clone()));
    let first = builder.next(&Table::default(), &catalog, NOW).unwrap().table;
    known.iter_mut().for_each(critical);
    known[1].is_critical = false;
    known[1].health = HealthStatus::Out("service maintenance".into());
    catalog.insert(id("web"), record(known));
    let second = builder.next(&first, &catalog, NOW).unwrap().table;
    let [kept] = &second.services["web"].backends[..] else { panic!("{second:?}") };
    assert_eq!((&*kept.id, kept.state), ("10.0.0.1", BackendState::Warning));
    assert_eq!(kept.reason.as_deref(), Some("check `web` is critical"));
    let start = Instant::now();
    builder.waits().lock().keeps.begin(start);
    assert_eq!(builder.next(&second, &catalog, NOW).map(|next| next.table), None);
    let over = builder.waits().lock().keeps.expire(start + Duration::from_secs(60));
    builder.revisit(over);
    let third = builder.next(&second, &catalog, NOW).unwrap().table;
    assert_eq!(
        (third.services["web"].backends.len(), third.services["web"].excluded.len()),
        (0, 3)
    );

    // What the kernel serves is kept after a restart.
    let mut builder = self::builder();
    builder.set_keep(Some(Duration::from_secs(60)));
    let address = "10.0.0.1:8080".parse().unwrap();
    builder.waits().lock().contacts.set_served([("web".into(), [address].into())]);
    let first = builder.next(&Table::default(), &catalog, NOW).unwrap().table;
    assert_eq!(first.services["web"].healthy().count(), 1);
    // Once: what was served before the first table is of no use after it.
    builder.waits().lock().keeps.begin(start);
    let over = builder.waits().lock().keeps.expire(start + Duration::from_secs(60));
    builder.revisit(over);
    let second = builder.next(&first, &catalog, NOW).unwrap().table;
    assert_eq!(second.services["web"].healthy().count(), 0);
    builder.revisit([Arc::from("web")]);
    assert!(builder.next(&second, &catalog, NOW).is_none());
}

#[test]
fn what_was_served_before_the_first_table_concerns_that_table_alone() {
    let mut builder = builder();
    let address: SocketAddr = "10.0.0.1:8080".parse().unwrap();
    let names = ["critical", "gone", "cold"];
    let served = names.map(|name| (name.into(), [address].into()));
    builder.waits().lock().contacts.set_served(served);
    let mut catalog = catalog(&[("critical", &["10.0.0.1"]), ("cold", &[])]);
    let mut critical = instances(&catalog, "critical");
    critical[0].health = HealthStatus::Out("check `web` is critical".into());
    catalog.insert(id("critical"), record(critical));
    catalog.insert(id("cold"), ServiceRecord::new([].into(), Watch::Cold));
    builder.next(&Table::default(), &catalog, NOW).unwrap();
    let is_served = |name: &&str| builder.waits().lock().contacts.is_served(name, address);
    assert_eq!(names.into_iter().filter(is_served).collect::<Vec<_>>(), ["cold"]);
}

/// One registration of an endpoint is kept, and another one too, or is drained by hand.
#[test]
fn an_endpoint_that_several_register_is_kept_once_and_not_while_one_is_drained() {
    let mut builder = builder();
    builder.set_keep(Some(Duration::from_secs(60)));
    let mut catalog = catalog(&[("web", &["10.0.0.1", "10.0.0.1", "10.0.0.2", "10.0.0.3"])]);
    let mut known = instances(&catalog, "web");
    for (nth, instance) in known.iter_mut().enumerate() {
        instance.node = format!("n{nth}");
    }
    catalog.insert(id("web"), record(known.clone()));
    let first = builder.next(&Table::default(), &catalog, NOW).unwrap().table;
    for instance in &mut known[..3] {
        instance.is_critical = true;
        instance.health = HealthStatus::Out("check `web` is critical".into());
    }
    let draining = |instance: &mut Instance| instance.weight = 0;
    draining(&mut known[3]);
    // The endpoint of one that is kept, with no weight of its own.
    known[3].address = "10.0.0.2".into();
    catalog.insert(id("web"), record(known.clone()));
    let second = builder.next(&first, &catalog, NOW).unwrap().table;
    let shown = |table: &Table| -> Vec<String> {
        let backends = table.services["web"].backends.iter();
        let shown = backends
            .map(|it| format!("{} {} x{} {:?}", it.shown_address, it.node, it.weight, it.state));
        shown.collect()
    };
    let kept = ["10.0.0.2:8080 n3 x1 Warning", "10.0.0.1:8080 n0 x1 Warning"];
    assert_eq!(shown(&second), kept);
    assert!(second.services["web"].excluded.is_empty());

    let node = |name: &str| DrainTarget::Node(name.into());
    let drains = [(node("n1"), Drain { since: 0, boottime_ms: 0 })];
    builder.set_drains(Arc::new(drains.into_iter().collect()));
    let third = builder.next(&second, &catalog, NOW).unwrap().table;
    assert_eq!(shown(&third), ["10.0.0.2:8080 n3 x1 Warning"]);
    let out: Vec<_> = third.services["web"].excluded.iter().map(|it| &*it.node).collect();
    assert_eq!(out, ["n0", "n1"]);
}

#[test]
fn what_did_not_change_is_shared() {
    let mut builder = builder();
    let mut catalog = catalog(&[("a", &["10.0.0.1"]), ("b", &["10.0.0.2"])]);
    let first = builder.next(&Table::default(), &catalog, NOW).unwrap();
    assert!(first.vips_given);
    catalog.insert(id("b"), self::catalog(&[("b", &["10.0.0.3"])])["b"].clone());
    let second = builder.next(&first.table, &catalog, NOW).unwrap();
    assert!(!second.vips_given);
    assert!(Arc::ptr_eq(&first.table.services["a"], &second.table.services["a"]));
    assert_eq!(second.table.services["b"].generation, 2);
    assert_eq!(second.table.services["b"].vip, first.table.services["b"].vip);
    // The same content in a new object is no change either.
    catalog.insert(id("b"), self::catalog(&[("b", &["10.0.0.3"])])["b"].clone());
    assert!(builder.next(&second.table, &catalog, NOW).is_none());
}

#[test]
fn an_algorithm_that_cannot_be_read_leaves_the_last_one() {
    use BalanceAlgorithm::*;
    let mut builder = builder();
    let mut table: Arc<Table> = Arc::default();
    let mut next = |builder: &mut Builder, declared: Option<&str>| {
        let mut with = catalog(&[("a", &["10.0.0.1"])]);
        let mut some = instances(&with, "a");
        some[0].meta.algorithm = declared.map(str::to_owned);
        with.insert(id("a"), record(some));
        if let Some(next) = builder.next(&table, &with, NOW) {
            table = next.table;
        }
        let service = &table.services["a"];
        (service.algorithm, service.notes.len())
    };
    assert_eq!(next(&mut builder, Some("quick")), (Least, 2), "none before");
    assert_eq!(next(&mut builder, Some("maglev")), (Maglev, 0));
    assert_eq!(next(&mut builder, Some("quick")), (Maglev, 2));
    // A service that declares none follows the configuration.
    let random = BalanceConfig { algorithm: Random, ..BalanceConfig::default() };
    builder.set_balance(&random);
    assert_eq!(next(&mut builder, Some("quick")), (Maglev, 2));
    assert_eq!(next(&mut builder, None), (Random, 0));
    assert_eq!(next(&mut builder, Some("quick")), (Random, 2));
}

#[test]
fn a_weight_that_cannot_be_read_leaves_the_last_one() {
    let mut builder = builder();
    let mut table: Arc<Table> = Arc::default();
    for (declared, expected) in [("7", 7), ("x", 7), ("-1", 7), ("0", 0), ("8", 8)] {
        let mut with = catalog(&[("a", &["10.0.0.1", "10.0.0.2"])]);
        let mut some = instances(&with, "a");
        some[0].meta.weight = Some(declared.into());
        with.insert(id("a"), record(some));
        table = builder.next(&table, &with, NOW).unwrap().table;
        let weights: Vec<_> = table.services["a"].backends.iter().map(|it| it.weight).collect();
        assert_eq!(weights, [expected, 1], "{declared}");
    }
}

#[test]
fn preferred_backends_come_before_the_others() {
    use Preference::*;
    let warns = || HealthStatus::Spare("w".into());
    // The preference; of each instance whether it is of this node, its datacenter, its health; and
    // the states with their groups.
    type Given<'a> = (bool, Option<&'a str>, HealthStatus);
    let serves = HealthStatus::Serving;
    let rows: [(Preference, [Given; 3], [&str; 3]); 7] = [
        (
            None,
            [
                (true, Option::None, serves.clone()),
                (false, Some("dc2"), serves.clone()),
                (true, Option::None, warns()),
            ],
            ["Healthy 0", "Healthy 0", "Spare 1"],
        ),
        (
            Node,
            [
                (true, Option::None, serves.clone()),
                (false, Option::None, serves.clone()),
                (true, Option::None, warns()),
            ],
            ["Healthy 0", "Spare 1", "Spare 2"],
        ),
        (
            Datacenter,
            [
                (true, Option::None, serves.clone()),
                (false, Option::None, serves.clone()),
                (false, Some("dc2"), serves.clone()),
            ],
            ["Healthy 0", "Healthy 0", "Spare 1"],
        ),
        // None that is preferred serves at first.
        (
            Node,
            [
                (false, Option::None, serves.clone()),
                (false, Option::None, serves.clone()),
                (true, Option::None, warns()),
            ],
            ["Healthy 0", "Healthy 0", "Spare 1"],
        ),
        (
            Datacenter,
            [
                (false, Some("dc2"), serves.clone()),
                (false, Some("dc2"), warns()),
                (false, Option::None, warns()),
            ],
            ["Healthy 0", "Spare 1", "Spare 1"],
        ),
        (
            Node,
            [
                (true, Option::None, HealthStatus::Warning("w".into())),
                (false, Option::None, serves.clone()),
                (false, Option::None, HealthStatus::Warning("w".into())),
            ],
            ["Warning 0", "Spare 1", "Spare 1"],
        ),
        (
            Node,
            [
                (true, Option::None, HealthStatus::Out("o".into())),
                (false, Option::None, serves.clone()),
                (false, Option::None, serves),
            ],
            ["Healthy 0", "Healthy 0", ""],
        ),
    ];
    for (prefer, given, expected) in rows {
        let mut builder = builder();
        builder.set_balance(&BalanceConfig { prefer, ..BalanceConfig::default() });
        let mut with = catalog(&[("a", &["10.0.0.1", "10.0.0.2", "10.0.0.3"])]);
        let groups = instances(&with, "a").into_iter().zip(given);
        let groups = groups.map(|(instance, (local, origin, health))| InstanceGroup {
            origin: origin.map(Into::into),
            instances: [Instance { local, health, ..instance }].into(),
        });
        let groups: Vec<_> = groups.collect();
        with.insert(id("a"), ServiceRecord { groups: groups.into(), watch: Watch::Live });
        let table = builder.next(&Table::default(), &with, NOW).unwrap().table;
        let shown = |it: &Backend| format!("{:?} {}", it.state, it.group);
        let mut states: Vec<_> = table.services["a"].backends.iter().map(shown).collect();
        states.resize(3, String::new());
        assert_eq!(states, expected, "{prefer:?}");
    }
}

#[test]
fn a_service_that_goes_and_comes_has_its_address_again() {
    let mut builder = builder();
    let with = catalog(&[("a", &["10.0.0.1"])]);
    let first = builder.next(&Table::default(), &with, NOW).unwrap();
    let second = builder.next(&first.table, &Catalog::new(), NOW).unwrap();
    assert!(second.table.services.is_empty() && !second.vips_given);
    let third = builder.next(&second.table, &with, NOW).unwrap();
    assert!(!third.vips_given, "the book has it still");
    assert_eq!(third.table.services["a"].vip, first.table.services["a"].vip);
}

#[test]
fn names_that_cannot_be_had_are_rejected_with_the_reason() {
    let mut builder = builder();
    // The Kelvin sign has `k` for its lower case, and is no `k` to DNS.
    let with = catalog(&[
        ("a.b", &["10.0.0.3"]),
        ("A.b", &["10.0.0.4"]),
        ("k", &["10.0.0.1"]),
        ("\u{212a}", &["10.0.0.2"]),
    ]);
    let table = builder.next(&Table::default(), &with, NOW).unwrap().table;
    assert_eq!(table.services.keys().map(|name| &**name).collect::<Vec<_>>(), ["k"]);
    assert_eq!(table.services["k"].backends.len(), 1);
    for name in ["a.b", "A.b", "\u{212a}"] {
        assert!(table.rejected[name].contains("DNS"), "{:?}", table.rejected);
    }
    let without = catalog(&[("k", &["10.0.0.1"]), ("A.b", &["10.0.0.4"])]);
    let table = builder.next(&table, &without, NOW).unwrap().table;
    assert_eq!(table.rejected.keys().map(|name| &**name).collect::<Vec<_>>(), ["A.b"]);
}

/// The addresses of a service's backends.
fn addresses(service: &Service) -> Vec<String> {
    let addresses = service.backends.iter().filter_map(|backend| backend.address);
    addresses.map(|address| address.ip().to_string()).collect()
}

#[test]
fn names_that_differ_in_case_are_one_service_that_is_live_where_one_is() {
    let mut builder = builder();
    let mut both = catalog(&[
        ("Web", &["10.0.0.1", "10.0.0.3"]),
        ("WEB", &[]),
        ("web", &["10.0.0.2", "10.0.0.3"]),
    ]);
    // A live record overrides a cold one of the same instance.
    let mut known = instances(&both, "Web");
    known[1].health = HealthStatus::Out("it was critical".into());
    both.insert(id("Web"), ServiceRecord::new(known.into(), Watch::Cold));
    let table = builder.next(&Table::default(), &both, NOW).unwrap().table;
    assert!(table.rejected.is_empty(), "{:?}", table.rejected);
    let service = &table.services["web"];
    assert_eq!(addresses(service), ["10.0.0.1", "10.0.0.2", "10.0.0.3"]);
    assert_eq!((service.watch, service.excluded.len()), (Watch::Live, 0));
    let note = "`WEB` and `Web` and `web` are one service, since DNS doesn't tell them apart";
    assert_eq!(service.notes, [note]);

    both.remove(&id("web"));
    let table = builder.next(&table, &both, NOW).unwrap().table;
    let service = &table.services["web"];
    assert_eq!((addresses(service), service.excluded.len()), (vec!["10.0.0.1".into()], 1));
    both.remove(&id("Web"));
    both.remove(&id("WEB"));
    let table = builder.next(&table, &both, NOW).unwrap().table;
    assert!(table.services.is_empty() && table.rejected.is_empty());
}

#[test]
fn a_change_builds_its_own_service_whatever_names_there_are() {
    let mut builder = builder();
    let names: Vec<String> = (0..100).map(|nth| format!("s{nth}")).collect();
    let odd = ["Foo.Bar", "foo.bar", "Web", "web", "Camel"];
    let all = names.iter().map(|name| &**name).chain(odd);
    let all: Vec<(&str, &[&str])> = all.map(|name| (name, &["10.0.0.1"] as &[&str])).collect();
    let mut catalog = catalog(&all);
    let mut last = builder.next(&Table::default(), &catalog, NOW).unwrap().table;
    assert_eq!(last.rejected.len(), 2);
    for changed in ["s7", "Camel", "web", "Foo.Bar"] {
        let other = self::catalog(&[(changed, &["10.0.0.2"])]);
        catalog.insert(id(changed), other[changed].clone());
        let next = builder.next(&last, &catalog, NOW);
        assert_eq!(builder.n_built, 1, "{changed}");
        last = next.map_or(last, |next| next.table);
    }
}

#[test]
fn a_name_without_an_address_has_one_once_another_gave_one_up() {
    let vip = VipConfig { pool: "127.128.0.0/30".parse().unwrap(), ..Config::default().vip };
    let mut builder = Builder::new(&vip, Vips::new((&vip).into()));
    let all = catalog(&[("a", &[]), ("b", &[]), ("c", &[]), ("D", &[])]);
    let first = builder.next(&Table::default(), &all, NOW).unwrap().table;
    assert_eq!((first.services.len(), first.rejected.len()), (2, 2));
    assert!(first.rejected["D"].contains("127.128.0.0/30"), "{:?}", first.rejected);
    let without = catalog(&[("b", &[]), ("c", &[]), ("D", &[])]);
    let day = Duration::from_secs(24 * 60 * 60);
    let second = builder.next(&first, &without, NOW).unwrap().table;
    assert_eq!(second.rejected.len(), 2, "it is in quarantine for a day");
    let third = builder.next(&second, &without, NOW + day).unwrap().table;
    assert_eq!((third.services.len(), third.rejected.len()), (2, 1));
}

#[test]
fn one_endpoint_that_several_register_is_one_backend() {
    let mut builder = builder();
    let catalog = catalog(&[("db", &["10.0.0.9", "10.0.0.10", "::ffff:10.0.0.9"])]);
    let first = builder.next(&Table::default(), &catalog, NOW).unwrap().table;
    let backends = &first.services["db"].backends;
    assert_eq!(addresses(&first.services["db"]), ["10.0.0.9", "10.0.0.10"]);
    assert_eq!(backends[0].reason.as_deref(), Some("also registered as `n1/::ffff:10.0.0.9`"));
    assert_eq!(backends[1].reason, None);
    // Either can go: the endpoint stays.
    for gone in [0, 2] {
        let mut fewer = instances(&catalog, "db");
        fewer.remove(gone);
        let fewer = [(id("db"), record(fewer))].into_iter().collect();
        let mut builder = self::builder();
        let table = builder.next(&Table::default(), &fewer, NOW).unwrap().table;
        assert!(addresses(&table.services["db"]).contains(&"10.0.0.9".to_owned()));
    }
    builder.next(&first, &Catalog::new(), NOW).unwrap();
}

#[test]
fn a_bridge_of_this_host_takes_others_instances_out() {
    let mut builder = builder();
    let both = catalog(&[("a", &["172.17.0.5", "10.0.0.1"]), ("b", &["10.0.0.2"])]);
    let first = builder.next(&Table::default(), &both, NOW).unwrap().table;
    assert_eq!(addresses(&first.services["a"]), ["172.17.0.5", "10.0.0.1"]);
    let bridge = Bridge { name: "docker0".into(), network: "172.17.0.0/16".parse().unwrap() };
    builder.set_hosts(Arc::new(Hosts { bridges: vec![bridge], ..Hosts::default() }));
    let second = builder.next(&first, &both, NOW).unwrap().table;
    assert_eq!(addresses(&second.services["a"]), ["10.0.0.1"]);
    assert!(Arc::ptr_eq(&first.services["b"], &second.services["b"]));
}

#[test]
fn a_service_is_connected_as_its_instances_say() {
    let mut builder = builder();
    let mut catalog = catalog(&[("a", &["10.0.0.1"])]);
    let first = builder.next(&Table::default(), &catalog, NOW).unwrap().table;
    let service = &first.services["a"];
    assert_eq!((&service.ports, service.protocols), (&Ports::only([80]), Protocols::Tcp));

    let mut instance = instances(&catalog, "a").remove(0);
    instance.meta = ServiceMeta {
        ports: Some("any".into()),
        protocol: Some("icmp".into()),
        ..ServiceMeta::default()
    };
    catalog.insert(id("a"), record(vec![instance]));
    let second = builder.next(&first, &catalog, NOW).unwrap().table;
    let service = &second.services["a"];
    assert_eq!((&service.ports, service.protocols), (&Ports::Any, Protocols::Tcp));
    assert!(service.notes[0].contains("`icmp` is no protocol"), "{:?}", service.notes);
}

proptest! {
    /// Whatever the catalogs, a builder that has seen others builds what a new one builds.
    #[test]
    fn a_table_does_not_depend_on_the_tables_before(
        catalogs in prop::collection::vec(
            prop::collection::btree_map(
                prop::sample::select(vec!["a", "b", "B", "c.d", "C.d", "e", "E", "f"]),
                prop::sample::select(vec!["10.0.0.1", "10.0.0.2", "nowhere"]),
                0..7,
            ),
            1..6,
        )
    ) {
        let mut builder = builder();
        let mut last = Arc::new(Table::default());
        for entries in catalogs {
            let all: Vec<_> = entries.iter().map(|(name, address)| (*name, [*address])).collect();
            let all: Vec<_> = all.iter().map(|(name, address)| (*name, &address[..])).collect();
            let catalog = catalog(&all);
            if let Some(next) = builder.next(&last, &catalog, NOW) {
                last = next.table;
            }
            let fresh = self::builder().next(&Table::default(), &catalog, NOW).unwrap().table;
            prop_assert_eq!(&last.rejected, &fresh.rejected);
            prop_assert!(last.services.keys().eq(fresh.services.keys()));
            let counts = last.services.values().map(|service| service.healthy().count());
            prop_assert_eq!(last.n_healthy, counts.sum::<usize>());
            for (name, service) in last.services.iter() {
                prop_assert_eq!(&service.backends, &fresh.services[&**name].backends);
                prop_assert_eq!(&service.excluded, &fresh.services[&**name].excluded);
            }
        }
    }
}

/// A record whose instance declares these public addresses, and was registered at this index.
fn public_record(public: &str, created: u64, watch: Watch) -> ServiceRecord {
    let meta = ServiceMeta { public: Some(public.into()), ..ServiceMeta::default() };
    ServiceRecord::new([Instance { meta, created, ..Instance::fixture() }].into(), watch)
}

fn shown_public(table: &Table, name: &str) -> (String, Vec<String>) {
    let service = &table.services[name];
    let public: Vec<String> = service.public.iter().map(SocketAddr::to_string).collect();
    (public.join(" "), service.notes.clone())
}

#[test]
fn a_public_address_is_of_the_oldest_service_that_declares_it() {
    let public = vec!["203.0.113.0/24".parse().unwrap(), "2001:db8::/64".parse().unwrap()];
    let vip = VipConfig { public, ..Config::default().vip };
    let mut builder = Builder::new(&vip, Vips::new((&vip).into()));
    let mut catalog = Catalog::new();
    let (first, both) = ("203.0.113.1:80", "203.0.113.1:80,[2001:db8::1]:80");
    let mut last = Arc::new(Table::default());
    let mut next = |builder: &mut Builder, catalog: &Catalog| {
        last = builder.next(&last, catalog, NOW).unwrap().table;
        last.clone()
    };
    catalog.insert(id("b"), public_record(both, 9, Watch::Live));
    let table = next(&mut builder, &catalog);
    assert_eq!(shown_public(&table, "b"), ("203.0.113.1:80 [2001:db8::1]:80".into(), vec![]));

    // The older one takes over; the other one keeps what it alone declares.
    catalog.insert(id("c"), public_record(first, 8, Watch::Live));
    let table = next(&mut builder, &catalog);
    assert_eq!(shown_public(&table, "c"), (first.into(), vec![]));
    let note = |holder: &str, why: &str| {
        format!(
            "its public address {first} is ignored: `{holder}` has it, {why}; give one of the two \
             another"
        )
    };
    let older = note("c", "whose registration is older");
    assert_eq!(shown_public(&table, "b"), ("[2001:db8::1]:80".into(), vec![older]));
    assert_eq!(builder.n_built, 1);
    catalog.insert(id("d"), public_record(first, 8, Watch::Live));
    let table = next(&mut builder, &catalog);
    let equal = note("c", "equally old, whose name comes first");
    assert_eq!(shown_public(&table, "d"), ("".into(), vec![equal]));
    catalog.remove(&id("d"));

    // What isn't followed keeps its claim, and connections to it pass.
    catalog.insert(id("c"), public_record(first, 8, Watch::Cold));
    let table = next(&mut builder, &catalog);
    assert_eq!(shown_public(&table, "c").0, "");
    assert_eq!(shown_public(&table, "b").0, "[2001:db8::1]:80");

    // The configuration overrides both.
    builder.set_edge_vips([("b".to_owned(), first.parse().unwrap())].into());
    catalog.insert(id("c"), public_record(first, 8, Watch::Live));
    let table = next(&mut builder, &catalog);
    assert_eq!(shown_public(&table, "b").0, "203.0.113.1:80 [2001:db8::1]:80");
    assert_eq!(shown_public(&table, "c"), ("".into(), vec![note("b", "by edge.vips")]));

    builder.set_edge_vips(BTreeMap::new());
    let table = next(&mut builder, &catalog);
    assert_eq!(shown_public(&table, "c").0, first);
    catalog.remove(&id("c"));
    let table = next(&mut builder, &catalog);
    assert_eq!(shown_public(&table, "b"), ("203.0.113.1:80 [2001:db8::1]:80".into(), vec![]));
}

#[test]
fn an_address_outside_of_the_public_networks_is_ignored() {
    let check = |public: &[&str], expected: &str, why: &str| {
        let public = public.iter().map(|network| network.parse().unwrap()).collect();
        let vip = VipConfig { public, ..Config::default().vip };
        let mut builder = Builder::new(&vip, Vips::new((&vip).into()));
        let record = public_record("203.0.113.1:80,10.0.0.1:22", 0, Watch::Live);
        let catalog = [(id("web"), record)].into_iter().collect();
        let table = builder.next(&Table::default(), &catalog, NOW).unwrap().table;
        let (shown, notes) = shown_public(&table, "web");
        let ignored = format!("its public address 10.0.0.1:22 is ignored: {why}");
        assert_eq!((&*shown, &notes[0]), (expected, &ignored));
    };
    check(&[], "", "vip.public of this node's configuration is empty");
    check(
        &["203.0.113.0/24", "198.51.100.0/24"],
        "203.0.113.1:80",
        "it lies in no network of vip.public (203.0.113.0/24, 198.51.100.0/24)",
    );
}

#[test]
fn other_ports_go_to_the_services_that_name_none() {
    let mut builder = builder();
    let mut catalog = catalog(&[("a", &["10.0.0.1"]), ("b", &["10.0.0.2"])]);
    let mut instance = instances(&catalog, "b").remove(0);
    instance.meta = ServiceMeta { ports: Some("5432".into()), ..ServiceMeta::default() };
    catalog.insert(id("b"), record(vec![instance]));
    let first = builder.next(&Table::default(), &catalog, NOW).unwrap().table;
    builder.set_ports(&[80, 8080]);
    let second = builder.next(&first, &catalog, NOW).unwrap().table;
    assert_eq!(second.services["a"].ports, Ports::only([80, 8080]));
    assert!(Arc::ptr_eq(&first.services["b"], &second.services["b"]));
}

#[test]
fn where_the_ipv6_pool_is_short_a_service_has_its_ipv4_address_and_a_note() {
    let vip = VipConfig { pool6: Some("fd00::/127".parse().unwrap()), ..Config::default().vip };
    let mut builder = Builder::new(&vip, Vips::new((&vip).into()));
    let next = builder.next(&Table::default(), &catalog(&[("a", &[])]), NOW).unwrap();
    let service = &next.table.services["a"];
    assert_eq!(service.vip6, None);
    assert!(service.notes[0].contains("vip.pool6"), "{:?}", service.notes);
}

#[test]
fn names_are_asked_for_and_what_they_stand_for_moves_their_service_alone() {
    let mut builder = builder();
    let both = catalog(&[("a", &["db.example", "10.0.0.1"]), ("b", &["10.0.0.2"])]);
    let first = builder.next(&Table::default(), &both, NOW).unwrap().table;
    assert_eq!(builder.take_hostnames(), Some(["db.example".to_owned()].into()));
    assert_eq!(first.services["a"].healthy().count(), 1);
    assert!(builder.next(&first, &both, NOW).is_none());

    let hosts = |address: &str| {
        let host = Host::At { address: address.parse().unwrap(), is_one_of_many: false };
        let names = [("db.example".to_owned(), host)].into();
        Arc::new(Hosts { names, ..Hosts::default() })
    };
    builder.set_hosts(hosts("10.0.0.9"));
    let second = builder.next(&first, &both, NOW).unwrap().table;
    assert_eq!(builder.take_hostnames(), None, "they are the same names");
    assert_eq!(addresses(&second.services["a"]), ["10.0.0.9", "10.0.0.1"]);
    assert!(Arc::ptr_eq(&first.services["b"], &second.services["b"]));
    builder.set_hosts(hosts("10.0.0.9"));
    assert!(builder.next(&second, &both, NOW).is_none());

    let without = catalog(&[("b", &["10.0.0.2"])]);
    assert!(builder.next(&second, &without, NOW).is_some());
    assert_eq!(builder.take_hostnames(), Some(BTreeSet::new()));
}

#[test]
fn unfit_instances_stay_visible() {
    let mut builder = builder();
    let table = builder
        .next(&Table::default(), &catalog(&[("a", &["10.0.0.1", "nowhere"])]), NOW)
        .unwrap()
        .table;
    let states: Vec<_> = table.services["a"].backends.iter().map(|b| b.state).collect();
    assert_eq!(states, [BackendState::Healthy, BackendState::Unroutable]);
}

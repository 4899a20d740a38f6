//! From a catalog to the next table.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddrV4;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::endpoints::Endpoints;
use super::merge::{Heard, hear};
use super::validate::{Verdict, check_name, judge};
use super::vips::{PoolExhausted, Pools, Vips};
use super::{Diff, Hosts, Instance, Listing, Ports, Protocols, Service, Table, Watch, diff};
use crate::config::VipConfig;

/// Builds tables, each from a catalog and what the last one had.
#[derive(Debug)]
pub struct Builder {
    pools: Pools,
    ports: Ports,
    pins: BTreeMap<String, SocketAddrV4>,
    vips: Vips,
    /// What the last table was built from, by the name that the catalog has.
    sources: BTreeMap<Arc<str>, Listing>,
    /// The names of the catalog with upper case in them, by the name in lower case.
    variants: BTreeMap<Arc<str>, BTreeSet<Arc<str>>>,
    /// What names that stand for addresses stand for.
    hosts: Arc<Hosts>,
    /// The names that each service's instances have for addresses, where they have some.
    hostnames: BTreeMap<Arc<str>, Vec<String>>,
    /// The services to be built again whatever the catalog has, by name in lower case.
    revisit: BTreeSet<Arc<str>>,
    /// The names in lower case for which the pool has no address.
    exhausted: BTreeSet<Arc<str>>,
    /// When these are tried again, should nothing give up an address until then.
    retry_at: SystemTime,
    /// The services that the last call of `next` built.
    #[cfg(test)]
    n_built: usize,
}

/// How often a name for which the pool had no address is tried again while other services change.
const RETRY: Duration = Duration::from_secs(60);

/// The next table, where it differs from the last one.
#[derive(Debug)]
pub struct Next {
    /// The table.
    pub table: Arc<Table>,
    /// Whether a name got an address, so that the book of VIPs has to be written before anybody is
    /// told of it.
    pub vips_given: bool,
}

impl Builder {
    /// A builder that gives addresses by `vips`.
    pub fn new(config: &VipConfig, vips: Vips) -> Builder {
        Builder {
            pools: config.into(),
            ports: Ports::only(config.ports.iter().copied()),
            pins: config.pins.iter().map(|(name, pin)| (name.to_lowercase(), *pin)).collect(),
            vips,
            sources: BTreeMap::new(),
            variants: BTreeMap::new(),
            hosts: Arc::default(),
            hostnames: BTreeMap::new(),
            revisit: BTreeSet::new(),
            exhausted: BTreeSet::new(),
            retry_at: SystemTime::UNIX_EPOCH,
            #[cfg(test)]
            n_built: 0,
        }
    }

    /// The names that instances of the last table have for addresses.
    pub fn hostnames(&self) -> BTreeSet<String> {
        self.hostnames.values().flatten().cloned().collect()
    }

    /// Takes in what these names stand for, and this host's bridges; it counts from the next table
    /// on.
    pub fn set_hosts(&mut self, hosts: Arc<Hosts>) {
        let former = std::mem::replace(&mut self.hosts, hosts);
        if former.bridges != self.hosts.bridges {
            return self.revisit_all();
        }
        let differs = |name: &String| former.names.get(name) != self.hosts.names.get(name);
        let with_news = self.hostnames.iter().filter(|(_, names)| names.iter().any(differs));
        self.revisit.extend(with_news.map(|(service, _)| service.clone()));
    }

    /// Gives other ports to the services that name none, from the next table on.
    pub fn set_ports(&mut self, ports: &[u16]) {
        self.ports = Ports::only(ports.iter().copied());
        self.revisit_all();
    }

    fn revisit_all(&mut self) {
        self.revisit.extend(self.sources.keys().map(folded));
    }

    /// As [`Vips::forget`].
    pub fn forget_vips(&mut self, now: SystemTime) {
        self.vips.forget(now);
    }

    /// The book of VIPs.
    pub fn vips(&self) -> &Vips {
        &self.vips
    }

    /// The table after `last`, which this builder made. Services whose instances are the same object
    /// as before are shared with it. `None` when nothing differs.
    ///
    /// Only what changed is built, whatever else the catalog has: a change costs a walk over both
    /// catalogs, and the services that it is about.
    pub fn next(
        &mut self,
        last: &Table,
        catalog: &BTreeMap<Arc<str>, Listing>,
        now: SystemTime,
    ) -> Option<Next> {
        let given_before = self.vips.given();
        let Diff { changed, gone } = diff(&self.sources, catalog, is_same_source);
        let changed: Vec<_> =
            changed.into_iter().map(|(given, listing)| (given.clone(), listing.clone())).collect();
        let gone: Vec<Arc<str>> = gone.into_iter().cloned().collect();

        let mut touched = std::mem::take(&mut self.revisit);
        if !self.exhausted.is_empty() && (!gone.is_empty() || now >= self.retry_at) {
            touched.append(&mut self.exhausted);
            self.retry_at = now + RETRY;
        }
        let mut table = Table {
            generation: last.generation + 1,
            services: last.services.clone(),
            rejected: last.rejected.clone(),
        };
        let mut differs = !last.is_synced();
        for (given, listing) in changed {
            let name = folded(&given);
            if name != given {
                self.variants.entry(name.clone()).or_default().insert(given.clone());
            }
            self.sources.insert(given, listing);
            touched.insert(name);
        }
        for given in gone {
            let name = folded(&given);
            if let Some(variants) = self.variants.get_mut(&name) {
                variants.remove(&given);
                if variants.is_empty() {
                    self.variants.remove(&name);
                }
            }
            self.sources.remove(&given);
            differs |= table.rejected.remove(&given).is_some();
            touched.insert(name);
        }
        #[cfg(test)]
        {
            self.n_built = touched.len();
        }
        for name in touched {
            differs |= self.build(&mut table, &name, last, now);
        }
        if !last.is_synced() {
            // What an earlier daemon had and this catalog hasn't.
            let names: Vec<_> = self.vips.in_use().cloned().collect();
            for name in names.iter().filter(|name| !table.services.contains_key(*name)) {
                self.vips.release(name, now);
            }
        }
        let vips_given = self.vips.given() != given_before;
        differs.then(|| Next { table: Arc::new(table), vips_given })
    }

    /// Builds the service of a name in lower case from all names of the catalog that DNS can't tell
    /// from it, and returns whether anything differs.
    fn build(&mut self, table: &mut Table, name: &Arc<str>, last: &Table, now: SystemTime) -> bool {
        let mut differs = false;
        let variants = self.variants.get(name).into_iter().flatten();
        let givens = variants.chain(self.sources.get_key_value(name).map(|(given, _)| given));
        let mut same = Vec::new();
        for given in givens.cloned() {
            match check_name(&given) {
                Ok(()) => same.push(given),
                Err(reason) => differs |= reject(table, &given, reason),
            }
        }
        let Some(first) = same.first() else {
            return self.forget(table, name, now) || differs;
        };
        let former = last.services.get(name);
        match self.service(name, &same, former, table.generation, now) {
            Ok(service) => {
                for given in &same {
                    differs |= table.rejected.remove(given).is_some();
                }
                if !former.is_some_and(|former| Arc::ptr_eq(former, &service)) {
                    table.services.insert(name.clone(), service);
                    differs = true;
                }
            }
            Err(exhausted) => {
                differs |= self.forget(table, name, now);
                differs |= reject(table, first, exhausted.to_string());
                self.exhausted.insert(name.clone());
            }
        }
        differs
    }

    /// Takes a name in lower case out, and returns whether it was a service.
    fn forget(&mut self, table: &mut Table, name: &Arc<str>, now: SystemTime) -> bool {
        self.hostnames.remove(name);
        self.vips.release(name, now);
        table.services.remove(name).is_some()
    }

    /// What the catalog has under these names, which are one service's: all instances, each once.
    fn listing(&self, names: &[Arc<str>]) -> Listing {
        let mut listings: Vec<&Listing> =
            names.iter().filter_map(|name| self.sources.get(name)).collect();
        if let [listing] = listings[..] {
            return listing.clone();
        }
        // What the source follows overrides what it knew of the same instance some time ago.
        listings.sort_by_key(|listing| listing.watch == Watch::Live);
        let watch = listings.last().map(|listing| listing.watch).unwrap_or_default();
        let instances = listings.iter().flat_map(|listing| listing.instances.iter());
        let by_key = instances.map(|instance| ((&instance.node, &instance.id), instance));
        let by_key: BTreeMap<_, _> = by_key.collect();
        Listing { instances: by_key.into_values().cloned().collect(), watch }
    }

    fn service(
        &mut self,
        name: &Arc<str>,
        givens: &[Arc<str>],
        former: Option<&Arc<Service>>,
        generation: u64,
        now: SystemTime,
    ) -> Result<Arc<Service>, PoolExhausted> {
        let vip = self.vips.assign(name, now)?;
        let Listing { instances, watch } = &self.listing(givens);
        let Heard { ports, protocols, mut notes } = hear(instances);
        if let [_, _, ..] = givens {
            let shown: Vec<_> = givens.iter().map(|given| format!("`{given}`")).collect();
            notes.push(format!(
                "{} are one service, since DNS doesn't tell them apart",
                shown.join(" and ")
            ));
        }
        if let (Some(pool6), None) = (self.pools.v6, vip.v6) {
            notes.push(format!(
                "it has no IPv6 address, since {pool6} has none left: set a larger vip.pool6"
            ));
        }
        let mut service = Service {
            name: name.clone(),
            vip: vip.v4,
            vip6: vip.v6,
            ports: ports.unwrap_or_else(|| self.ports.clone()),
            protocols: protocols.unwrap_or(Protocols::Tcp),
            pin: self.pins.get(&**name).copied(),
            backends: Vec::new(),
            excluded: Vec::new(),
            notes,
            watch: *watch,
            generation,
        };
        let mut endpoints = Endpoints::default();
        for instance in instances.iter() {
            match judge(instance, &self.pools, &self.hosts) {
                Verdict::In(backend) => endpoints.add(backend),
                Verdict::Out(excluded) => service.excluded.push(excluded),
            }
        }
        service.backends = endpoints.backends();
        let hostnames = instances.iter().filter(|instance| instance.standing.serves());
        let hostnames: Vec<String> = hostnames.filter_map(Instance::hostname).collect();
        match hostnames.is_empty() {
            true => drop(self.hostnames.remove(name)),
            false => drop(self.hostnames.insert(name.clone(), hostnames)),
        }
        match former {
            Some(former) if former.is_same(&service) => Ok(former.clone()),
            _ => Ok(Arc::new(service)),
        }
    }
}

/// The name as DNS has it, which doesn't see the case of letters.
fn folded(given: &Arc<str>) -> Arc<str> {
    match given.bytes().any(|octet| octet.is_ascii_uppercase()) {
        true => given.to_ascii_lowercase().into(),
        false => given.clone(),
    }
}

/// Notes why a name can't be had, and returns whether that is news.
fn reject(table: &mut Table, given: &Arc<str>, reason: String) -> bool {
    let former = table.rejected.insert(given.clone(), reason);
    former.as_ref() != table.rejected.get(given)
}

/// Whether both are the same object: sources share what didn't change.
fn is_same_source(one: &Listing, other: &Listing) -> bool {
    Arc::ptr_eq(&one.instances, &other.instances) && one.watch == other.watch
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::Config;
    use crate::table::{Bridge, Home, Host, Says, Standing, State};

    fn catalog(text: &[(&str, &[&str])]) -> BTreeMap<Arc<str>, Listing> {
        let instance = |address: &&str| Instance {
            node: "n1".into(),
            id: (*address).into(),
            address: (*address).into(),
            port: 8080,
            weight: 1,
            local: false,
            home: Home::default(),
            node_address: None,
            may_be_local: false,
            standing: Standing::Serving,
            says: Says::default(),
        };
        let listing = |addresses: &&[&str]| Listing {
            instances: addresses.iter().map(instance).collect(),
            watch: Watch::Live,
        };
        text.iter().map(|(name, addresses)| (Arc::from(*name), listing(addresses))).collect()
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
        let first = builder.next(&Table::default(), &BTreeMap::new(), NOW).unwrap();
        assert!(first.table.is_synced() && !first.vips_given);
        assert!(builder.next(&first.table, &BTreeMap::new(), NOW).is_none());
    }

    #[test]
    fn what_did_not_change_is_shared() {
        let mut builder = builder();
        let mut catalog = catalog(&[("a", &["10.0.0.1"]), ("b", &["10.0.0.2"])]);
        let first = builder.next(&Table::default(), &catalog, NOW).unwrap();
        assert!(first.vips_given);
        catalog.extend(self::catalog(&[("b", &["10.0.0.3"])]));
        let second = builder.next(&first.table, &catalog, NOW).unwrap();
        assert!(!second.vips_given);
        assert!(Arc::ptr_eq(&first.table.services["a"], &second.table.services["a"]));
        assert_eq!(second.table.services["b"].generation, 2);
        assert_eq!(second.table.services["b"].vip, first.table.services["b"].vip);
        // The same content in a new object is no change either.
        catalog.extend(self::catalog(&[("b", &["10.0.0.3"])]));
        assert!(builder.next(&second.table, &catalog, NOW).is_none());
    }

    #[test]
    fn a_service_that_goes_and_comes_has_its_address_again() {
        let mut builder = builder();
        let with = catalog(&[("a", &["10.0.0.1"])]);
        let first = builder.next(&Table::default(), &with, NOW).unwrap();
        let second = builder.next(&first.table, &BTreeMap::new(), NOW).unwrap();
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
        both.get_mut("Web").unwrap().watch = Watch::Cold;
        // What is followed overrides what was known of the same instance.
        let mut known = both["Web"].instances.to_vec();
        known[1].standing = Standing::Out("it was critical".into());
        both.get_mut("Web").unwrap().instances = known.into();
        let table = builder.next(&Table::default(), &both, NOW).unwrap().table;
        assert!(table.rejected.is_empty(), "{:?}", table.rejected);
        let service = &table.services["web"];
        assert_eq!(addresses(service), ["10.0.0.1", "10.0.0.2", "10.0.0.3"]);
        assert_eq!((service.watch, service.excluded.len()), (Watch::Live, 0));
        let note = "`WEB` and `Web` and `web` are one service, since DNS doesn't tell them apart";
        assert_eq!(service.notes, [note]);

        both.remove("web");
        let table = builder.next(&table, &both, NOW).unwrap().table;
        let service = &table.services["web"];
        assert_eq!((addresses(service), service.excluded.len()), (vec!["10.0.0.1".into()], 1));
        both.remove("Web");
        both.remove("WEB");
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
            catalog.extend(self::catalog(&[(changed, &["10.0.0.2"])]));
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
        assert_eq!(second.rejected.len(), 2, "it rests for a day");
        let third = builder.next(&second, &without, NOW + day).unwrap().table;
        assert_eq!((third.services.len(), third.rejected.len()), (2, 1));
    }

    #[test]
    fn one_endpoint_that_several_register_is_one_backend() {
        let mut builder = builder();
        let mut catalog = catalog(&[("db", &["10.0.0.9", "10.0.0.10", "::ffff:10.0.0.9"])]);
        let first = builder.next(&Table::default(), &catalog, NOW).unwrap().table;
        let backends = &first.services["db"].backends;
        assert_eq!(addresses(&first.services["db"]), ["10.0.0.9", "10.0.0.10"]);
        assert_eq!(backends[0].reason.as_deref(), Some("also registered as `n1/::ffff:10.0.0.9`"));
        assert_eq!(backends[1].reason, None);
        // Either can go: the endpoint stays.
        for gone in [0, 2] {
            let mut instances = catalog["db"].instances.to_vec();
            instances.remove(gone);
            let listing = Listing { instances: instances.into(), watch: Watch::Live };
            let fewer = BTreeMap::from([("db".into(), listing)]);
            let mut builder = self::builder();
            let table = builder.next(&Table::default(), &fewer, NOW).unwrap().table;
            assert!(addresses(&table.services["db"]).contains(&"10.0.0.9".to_owned()));
        }
        catalog.clear();
        builder.next(&first, &catalog, NOW).unwrap();
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

        let mut instance = catalog["a"].instances[0].clone();
        instance.says = Says { ports: Some("any".into()), protocol: Some("icmp".into()) };
        let listing = Listing { instances: [instance].into(), watch: Watch::Live };
        catalog.insert("a".into(), listing);
        let second = builder.next(&first, &catalog, NOW).unwrap().table;
        let service = &second.services["a"];
        assert_eq!((&service.ports, service.protocols), (&Ports::Any, Protocols::Tcp));
        assert!(service.notes[0].contains("`icmp` is no protocol"), "{:?}", service.notes);
    }

    proptest! {
        /// Whatever the catalogs, a builder that patches says what one says that begins anew.
        #[test]
        fn a_patched_table_is_the_rebuilt_one(
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
            let mut shared = BTreeMap::<Arc<str>, Listing>::new();
            for entries in catalogs {
                let fresh = |(name, address): (&str, &str)| catalog(&[(name, &[address])]);
                let all: BTreeMap<_, _> = entries.into_iter().flat_map(fresh).collect();
                // As sources do it: what didn't change is the same object.
                shared = all
                    .into_iter()
                    .map(|(name, listing)| match shared.get(&name) {
                        Some(known) if *known == listing => (name, known.clone()),
                        _ => (name, listing),
                    })
                    .collect();
                if let Some(next) = builder.next(&last, &shared, NOW) {
                    last = next.table;
                }
                let anew = self::builder().next(&Table::default(), &shared, NOW).unwrap().table;
                prop_assert_eq!(&last.rejected, &anew.rejected);
                prop_assert!(last.services.keys().eq(anew.services.keys()));
                for (name, service) in &last.services {
                    prop_assert_eq!(&service.backends, &anew.services[name].backends);
                    prop_assert_eq!(&service.excluded, &anew.services[name].excluded);
                }
            }
        }
    }

    #[test]
    fn other_ports_go_to_the_services_that_name_none() {
        let mut builder = builder();
        let mut catalog = catalog(&[("a", &["10.0.0.1"]), ("b", &["10.0.0.2"])]);
        let mut instance = catalog["b"].instances[0].clone();
        instance.says = Says { ports: Some("5432".into()), protocol: None };
        let listing = Listing { instances: [instance].into(), watch: Watch::Live };
        catalog.insert("b".into(), listing);
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
        assert_eq!(builder.hostnames(), ["db.example".to_owned()].into());
        assert_eq!(first.services["a"].healthy().count(), 1);
        assert!(builder.next(&first, &both, NOW).is_none());

        let hosts = |address: &str| {
            let host = Host::At { address: address.parse().unwrap(), is_one_of_many: false };
            let names = [("db.example".to_owned(), host)].into();
            Arc::new(Hosts { names, ..Hosts::default() })
        };
        builder.set_hosts(hosts("10.0.0.9"));
        let second = builder.next(&first, &both, NOW).unwrap().table;
        assert_eq!(addresses(&second.services["a"]), ["10.0.0.9", "10.0.0.1"]);
        assert!(Arc::ptr_eq(&first.services["b"], &second.services["b"]));
        builder.set_hosts(hosts("10.0.0.9"));
        assert!(builder.next(&second, &both, NOW).is_none());

        let without = catalog(&[("b", &["10.0.0.2"])]);
        builder.next(&second, &without, NOW).unwrap();
        assert!(builder.hostnames().is_empty());
    }

    #[test]
    fn unfit_instances_stay_visible() {
        let mut builder = builder();
        let table = builder
            .next(&Table::default(), &catalog(&[("a", &["10.0.0.1", "nowhere"])]), NOW)
            .unwrap()
            .table;
        let states: Vec<_> = table.services["a"].backends.iter().map(|b| b.state).collect();
        assert_eq!(states, [State::Healthy, State::Unroutable]);
    }
}

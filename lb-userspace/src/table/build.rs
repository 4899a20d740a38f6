//! From a catalog to the next table.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddrV4;
use std::sync::Arc;
use std::time::SystemTime;

use super::judge::{Verdict, check_name, judge};
use super::says::{Heard, hear};
use super::vips::{Pools, Vips};
use super::{Diff, Hosts, Instance, Listing, Ports, Protocols, Service, Table, diff};
use crate::config::VipConfig;

/// Builds tables, each from a catalog and what the last one had.
#[derive(Debug)]
pub struct Builder {
    pools: Pools,
    ports: Ports,
    pins: BTreeMap<String, SocketAddrV4>,
    vips: Vips,
    /// What each service of the last table was built from, by the name that the catalog has.
    sources: BTreeMap<Arc<str>, Listing>,
    /// What names that stand for addresses stand for.
    hosts: Arc<Hosts>,
    /// The names that each service's instances have for addresses, where they have some.
    hostnames: BTreeMap<Arc<str>, Vec<String>>,
}

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
            hosts: Arc::default(),
            hostnames: BTreeMap::new(),
        }
    }

    /// The names that instances of the last table have for addresses.
    pub fn hostnames(&self) -> BTreeSet<String> {
        self.hostnames.values().flatten().cloned().collect()
    }

    /// Takes in what these names stand for; it counts from the next table on.
    pub fn set_hosts(&mut self, hosts: Arc<Hosts>) {
        if hosts != self.hosts {
            self.hosts = hosts;
            // Who has such names is judged anew.
            let by_name = |given: &Arc<str>| self.hostnames.contains_key(&*given.to_lowercase());
            self.sources.retain(|given, _| !by_name(given));
        }
    }

    /// Gives other ports to the services that name none, from the next table on.
    pub fn set_ports(&mut self, ports: &[u16]) {
        self.ports = Ports::only(ports.iter().copied());
        self.sources.clear();
    }

    /// As [`Vips::forget`].
    pub fn forget_vips(&mut self, now: SystemTime) {
        self.vips.forget(now);
    }

    /// The book of VIPs.
    pub fn vips(&self) -> &Vips {
        &self.vips
    }

    /// The table after `last`. Services whose instances are the same object as before are shared
    /// with it. `None` when nothing differs.
    pub fn next(
        &mut self,
        last: &Table,
        catalog: &BTreeMap<Arc<str>, Listing>,
        now: SystemTime,
    ) -> Option<Next> {
        let given_before = self.vips.given();
        let (table, differs) = match self.patch(last, catalog, now) {
            Some(patched) => patched,
            None => {
                let table = self.rebuild(last, catalog, now);
                let Diff { changed, gone } = diff(&last.services, &table.services, Arc::ptr_eq);
                let differs = !changed.is_empty() || !gone.is_empty();
                (table, differs)
            }
        };
        let vips_given = self.vips.given() != given_before;
        let is_same = last.is_synced() && table.rejected == last.rejected && !differs;
        (!is_same).then(|| Next { table: Arc::new(table), vips_given })
    }

    /// The next table from the last one and what changed, which costs little where that is little,
    /// and whether its services differ from the last one's. `None` where names that differ only in case may have to be settled among all.
    fn patch(
        &mut self,
        last: &Table,
        catalog: &BTreeMap<Arc<str>, Listing>,
        now: SystemTime,
    ) -> Option<(Table, bool)> {
        // What couldn't be had may be had now; it has no source, so it counts as changed.
        let Diff { changed, gone } = diff(&self.sources, catalog, is_same_source);
        let is_plain = |name: &Arc<str>| !name.chars().any(char::is_uppercase);
        let is_settled = |name: &Arc<str>| {
            is_plain(name) && (self.sources.contains_key(name) || !last.services.contains_key(name))
        };
        let is_settled = changed.iter().all(|(name, _)| is_settled(name))
            && gone.iter().all(|name| is_plain(name));
        if !last.is_synced() || !is_settled {
            return None;
        }

        let gone: Vec<Arc<str>> = gone.into_iter().cloned().collect();
        let services = last.services.clone();
        let mut table = Table { generation: last.generation + 1, services, ..Table::default() };
        let mut differs = false;
        for (name, listing) in changed {
            let former = last.services.get(name);
            match self.service(name, name, listing, former, table.generation, now) {
                Ok(service) => {
                    differs |= !former.is_some_and(|former| Arc::ptr_eq(former, &service));
                    self.admit(&mut table, name, name.clone(), listing, service);
                }
                Err(reason) => {
                    differs |= self.forget(&mut table, name, now);
                    table.rejected.insert(name.clone(), reason);
                }
            }
        }
        for name in gone {
            differs |= self.forget(&mut table, &name, now);
        }
        Some((table, differs))
    }

    /// Takes a name out, and returns whether it was a service.
    fn forget(&mut self, table: &mut Table, name: &Arc<str>, now: SystemTime) -> bool {
        self.sources.remove(name);
        self.hostnames.remove(name);
        self.vips.release(name, now);
        table.services.remove(name).is_some()
    }

    /// The next table from the catalog as a whole.
    fn rebuild(
        &mut self,
        last: &Table,
        catalog: &BTreeMap<Arc<str>, Listing>,
        now: SystemTime,
    ) -> Table {
        let mut table = Table { generation: last.generation + 1, ..Table::default() };
        let names_before: Vec<Arc<str>> = self.vips.in_use().cloned().collect();
        let sources = std::mem::take(&mut self.sources);
        for (given_name, listing) in catalog {
            let name: Arc<str> = given_name.to_lowercase().into();
            let former = last.services.get(&name);
            let is_known = sources.get(given_name).is_some_and(|s| is_same_source(s, listing));
            let service = if table.services.contains_key(&name) {
                Err(format!(
                    "`{given_name}` differs from another service only in case, which DNS doesn't \
                     see: rename one"
                ))
            } else if let (true, Some(former)) = (is_known, former) {
                Ok(former.clone())
            } else {
                self.service(&name, given_name, listing, former, table.generation, now)
            };
            match service {
                Ok(service) => self.admit(&mut table, given_name, name, listing, service),
                Err(reason) => drop(table.rejected.insert(given_name.clone(), reason)),
            }
        }
        self.hostnames.retain(|name, _| table.services.contains_key(name));
        for name in &names_before {
            if !table.services.contains_key(name) {
                self.vips.release(name, now);
            }
        }
        table
    }

    fn admit(
        &mut self,
        table: &mut Table,
        given_name: &Arc<str>,
        name: Arc<str>,
        listing: &Listing,
        service: Arc<Service>,
    ) {
        self.sources.insert(given_name.clone(), listing.clone());
        table.services.insert(name, service);
    }

    fn service(
        &mut self,
        name: &Arc<str>,
        given_name: &str,
        listing: &Listing,
        former: Option<&Arc<Service>>,
        generation: u64,
        now: SystemTime,
    ) -> Result<Arc<Service>, String> {
        check_name(given_name)?;
        let Listing { instances, watch } = listing;
        let vip = self.vips.assign(name, now).map_err(|exhausted| exhausted.to_string())?;
        let Heard { ports, protocols, mut notes } = hear(instances);
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
        for instance in instances.iter() {
            match judge(instance, &self.pools, &self.hosts) {
                Verdict::In(backend) => service.backends.push(backend),
                Verdict::Out(excluded) => service.excluded.push(excluded),
            }
        }
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

/// Whether both are the same object: sources share what didn't change.
fn is_same_source(one: &Listing, other: &Listing) -> bool {
    Arc::ptr_eq(&one.instances, &other.instances) && one.watch == other.watch
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::Config;
    use crate::table::{Host, Says, Standing, State, Watch};

    fn catalog(text: &[(&str, &[&str])]) -> BTreeMap<Arc<str>, Listing> {
        let instance = |address: &&str| Instance {
            node: "n1".into(),
            id: (*address).into(),
            address: (*address).into(),
            port: 8080,
            weight: 1,
            local: false,
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
        let catalog =
            catalog(&[("Web", &["10.0.0.1"]), ("web", &["10.0.0.2"]), ("a.b", &["10.0.0.3"])]);
        let table = builder.next(&Table::default(), &catalog, NOW).unwrap().table;
        assert_eq!(table.services.keys().map(|name| &**name).collect::<Vec<_>>(), ["web"]);
        assert!(table.rejected["web"].contains("only in case"));
        assert!(table.rejected["a.b"].contains("DNS"));
    }

    #[test]
    fn a_service_is_dialled_as_its_instances_say() {
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
                    prop::sample::select(vec!["a", "b", "B", "c.d", "e", "E", "f"]),
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
            let host = Host::At { address: address.parse().unwrap(), n_addresses: 1 };
            Arc::new(Hosts([("db.example".to_owned(), host)].into()))
        };
        builder.set_hosts(hosts("10.0.0.9"));
        let second = builder.next(&first, &both, NOW).unwrap().table;
        let addresses: Vec<_> = second.services["a"].healthy().filter_map(|b| b.address).collect();
        assert_eq!(addresses, ["10.0.0.9:8080", "10.0.0.1:8080"].map(|a| a.parse().unwrap()));
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

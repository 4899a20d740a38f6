//! From a catalog to the next table.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddrV4;
use std::sync::Arc;
use std::time::SystemTime;

use super::judge::{Verdict, check_name, judge};
use super::says::{Heard, hear};
use super::vips::{Pools, Vips};
use super::{Hosts, Instance, Listing, Ports, Protocols, Service, Table};
use crate::config::VipConfig;

/// Builds tables, each from a catalog and what the last one had.
#[derive(Debug)]
pub struct Builder {
    pools: Pools,
    ports: Ports,
    pins: BTreeMap<String, SocketAddrV4>,
    vips: Vips,
    /// What each service of the last table was built from.
    sources: BTreeMap<Arc<str>, Listing>,
    /// What names stand for, and whether that is new since the last table.
    hosts: Arc<Hosts>,
    has_new_hosts: bool,
    /// The names that each service's instances have for addresses, where they have some.
    hostnames: BTreeMap<Arc<str>, Vec<String>>,
}

/// The next table, where it differs from the last one.
#[derive(Debug)]
pub struct Next {
    /// The table.
    pub table: Arc<Table>,
    /// Whether the book of VIPs changed, and has to be written before the table is used.
    pub vips_changed: bool,
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
            has_new_hosts: false,
            hostnames: BTreeMap::new(),
        }
    }

    /// The names that instances of the last table have for addresses.
    pub fn hostnames(&self) -> BTreeSet<String> {
        self.hostnames.values().flatten().cloned().collect()
    }

    /// Takes in what these names stand for; it counts from the next table on.
    pub fn set_hosts(&mut self, hosts: Arc<Hosts>) {
        self.has_new_hosts |= hosts != self.hosts;
        self.hosts = hosts;
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
        let generation = last.generation + 1;
        let mut table = Table { generation, ..Table::default() };
        let mut sources = BTreeMap::new();
        let edition_before = self.vips.edition();
        let names_before: Vec<Arc<str>> = self.vips.in_use().cloned().collect();
        for (given_name, listing) in catalog {
            let name: Arc<str> = given_name.to_lowercase().into();
            match self.service(&name, given_name, listing, last, &table, now) {
                Ok(service) => {
                    sources.insert(name.clone(), listing.clone());
                    table.services.insert(name, service);
                }
                Err(reason) => {
                    table.rejected.insert(given_name.clone(), reason);
                }
            }
        }
        self.sources = sources;
        self.has_new_hosts = false;
        self.hostnames.retain(|name, _| table.services.contains_key(name));
        for name in &names_before {
            if !table.services.contains_key(name) {
                self.vips.release(name, now);
            }
        }
        let vips_changed = self.vips.edition() != edition_before;
        let same = last.is_synced()
            && table.rejected == last.rejected
            && table.services.len() == last.services.len()
            && table.services.iter().all(|(name, service)| {
                last.services.get(name).is_some_and(|l| Arc::ptr_eq(l, service))
            });
        (!same).then(|| Next { table: Arc::new(table), vips_changed })
    }

    fn service(
        &mut self,
        name: &Arc<str>,
        given_name: &str,
        listing: &Listing,
        last: &Table,
        table: &Table,
        now: SystemTime,
    ) -> Result<Arc<Service>, String> {
        check_name(given_name)?;
        if table.services.contains_key(name) {
            return Err(format!(
                "`{given_name}` differs from another service only in case, which DNS doesn't see: \
                 rename one"
            ));
        }
        let former = last.services.get(name);
        let Listing { instances, watch } = listing;
        let unchanged = self.sources.get(name).is_some_and(|source| {
            Arc::ptr_eq(&source.instances, instances) && source.watch == *watch
        });
        let has_moved = self.has_new_hosts && self.hostnames.contains_key(name);
        if let (true, false, Some(former)) = (unchanged, has_moved, former) {
            return Ok(former.clone());
        }
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
            generation: last.generation + 1,
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

#[cfg(test)]
mod tests {
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
        assert!(first.table.is_synced() && !first.vips_changed);
        assert!(builder.next(&first.table, &BTreeMap::new(), NOW).is_none());
    }

    #[test]
    fn what_did_not_change_is_shared() {
        let mut builder = builder();
        let mut catalog = catalog(&[("a", &["10.0.0.1"]), ("b", &["10.0.0.2"])]);
        let first = builder.next(&Table::default(), &catalog, NOW).unwrap();
        assert!(first.vips_changed);
        catalog.extend(self::catalog(&[("b", &["10.0.0.3"])]));
        let second = builder.next(&first.table, &catalog, NOW).unwrap();
        assert!(!second.vips_changed);
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
        assert!(second.table.services.is_empty() && second.vips_changed);
        let third = builder.next(&second.table, &with, NOW).unwrap();
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

//! From a catalog to the next table.

use std::collections::BTreeMap;
use std::net::SocketAddrV4;
use std::sync::Arc;
use std::time::SystemTime;

use super::judge::{Verdict, check_name, judge};
use super::says::{Heard, hear};
use super::vips::{Pools, Vips};
use super::{Listing, Ports, Protocols, Service, Table};
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
        }
    }

    /// Gives other ports to the services that name none, from the next table on.
    pub fn set_ports(&mut self, ports: &[u16]) {
        self.ports = Ports::only(ports.iter().copied());
        self.sources.clear();
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
        let given_before = self.vips.given();
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
        for name in &names_before {
            if !table.services.contains_key(name) {
                self.vips.release(name, now);
            }
        }
        let vips_given = self.vips.given() != given_before;
        let same = last.is_synced()
            && table.rejected == last.rejected
            && table.services.len() == last.services.len()
            && table.services.iter().all(|(name, service)| {
                last.services.get(name).is_some_and(|l| Arc::ptr_eq(l, service))
            });
        (!same).then(|| Next { table: Arc::new(table), vips_given })
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
        if let (true, Some(former)) = (unchanged, former) {
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
            match judge(instance, &self.pools) {
                Verdict::In(backend) => service.backends.push(backend),
                Verdict::Out(excluded) => service.excluded.push(excluded),
            }
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
    use crate::table::{Instance, Says, Standing, State, Watch};

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

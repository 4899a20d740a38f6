//! Merges what several sources report: for one name the first source that has it.
//!
//! Names are compared as DNS compares them, without the case of letters. A merger keeps the catalogs
//! that it saw last and asks for their differences: a change of one source costs what it changes.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::table::{Catalog, CatalogIndex};

/// Merges catalogs, each time by what differs from the last time.
#[derive(Debug, Default)]
pub struct Merger {
    /// The sources, in order of precedence.
    sources: Vec<&'static str>,
    /// Their catalogs, where there are several.
    inputs: Vec<CatalogIndex>,
    merged: CatalogIndex,
}

impl Merger {
    /// Merges the catalogs of these sources, which are in order of precedence. Each source is there
    /// once.
    pub fn merge(&mut self, catalogs: Vec<(&'static str, Catalog)>) -> &Catalog {
        let (sources, catalogs): (Vec<_>, Vec<_>) = catalogs.into_iter().unzip();
        if let [only] = &catalogs[..] {
            self.inputs.clear();
            self.merged = CatalogIndex::without_names(only.clone());
        } else if self.sources == sources {
            let mut touched = BTreeSet::new();
            for (input, catalog) in self.inputs.iter_mut().zip(catalogs) {
                let (changed, gone) = input.replace(catalog);
                touched.extend(changed.iter().chain(&gone).map(|id| id.folded_name()));
            }
            touched.iter().for_each(|name| self.choose(name));
        } else {
            self.inputs = catalogs.into_iter().map(CatalogIndex::from).collect();
            self.merged = CatalogIndex::from(self.merged.catalog().clone());
            let all = self.inputs.iter().chain([&self.merged]);
            let ids = all.flat_map(|index| index.catalog().keys());
            let names: BTreeSet<Arc<str>> = ids.map(|id| id.folded_name()).collect();
            names.iter().for_each(|name| self.choose(name));
        }
        self.sources = sources;
        self.merged.catalog()
    }

    /// Gives a name in lower case what the first source has that has it.
    fn choose(&mut self, name: &Arc<str>) {
        let has_it = |input: &&CatalogIndex| !input.ids(name).is_empty();
        let first = self.inputs.iter().find(has_it);
        let ids = first.map(|input| input.ids(name)).unwrap_or_default();
        for id in self.merged.ids(name).iter().filter(|id| !ids.contains(id)) {
            self.merged.remove(id);
        }
        let catalog = first.map(CatalogIndex::catalog);
        for id in ids {
            let record = catalog.and_then(|catalog| catalog.get(&id));
            if let Some(record) = record.filter(|&it| self.merged.catalog().get(&id) != Some(it)) {
                self.merged.insert(id, record.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::table::{
        HealthStatus, Instance, NodeIdentity, ServiceId, ServiceMeta, ServiceRecord, Watch,
    };

    /// A record that is distinguished by its port.
    fn record(port: i64) -> ServiceRecord {
        let instance = Instance {
            node: "n".into(),
            id: "i".into(),
            address: "10.0.0.1".into(),
            port,
            weight: 1,
            local: false,
            node_identity: NodeIdentity::default(),
            node_address: None,
            is_checked: true,
            is_critical: false,
            created: 0,
            may_be_local: false,
            health: HealthStatus::Serving,
            meta: ServiceMeta::default(),
        };
        ServiceRecord::new([instance].into(), Watch::Live)
    }

    fn catalog(services: &[(&str, i64)]) -> Catalog {
        services.iter().map(|(name, port)| (ServiceId::new(*name), record(*port))).collect()
    }

    fn ports(catalog: &Catalog) -> Vec<(&str, i64)> {
        let port = |record: &ServiceRecord| record.instances().next().map(|it| it.port);
        catalog.iter().map(|(id, record)| (&*id.name, port(record).unwrap_or_default())).collect()
    }

    #[test]
    fn the_first_source_that_has_a_name_has_it_alone() {
        let mut merger = Merger::default();
        let (consul, file) = (catalog(&[("Web", 1), ("db", 2)]), catalog(&[("web", 3), ("x", 4)]));
        let both = [("consul", consul.clone()), ("file", file.clone())];
        assert_eq!(ports(merger.merge(both.to_vec())), [("Web", 1), ("db", 2), ("x", 4)]);
        // What leaves the first one falls to the second.
        let less = [("consul", catalog(&[("db", 2)])), ("file", file.clone())];
        assert_eq!(ports(merger.merge(less.to_vec())), [("db", 2), ("web", 3), ("x", 4)]);
        assert_eq!(ports(merger.merge(both.to_vec())), [("Web", 1), ("db", 2), ("x", 4)]);
        // The other order; one source alone; both again.
        let turned = [("file", file.clone()), ("consul", consul.clone())];
        assert_eq!(ports(merger.merge(turned.to_vec())), [("db", 2), ("web", 3), ("x", 4)]);
        assert_eq!(ports(merger.merge(vec![("file", file)])), [("web", 3), ("x", 4)]);
        assert_eq!(ports(merger.merge(turned.to_vec())), [("db", 2), ("web", 3), ("x", 4)]);
        assert_eq!(ports(merger.merge(vec![("consul", consul)])), [("Web", 1), ("db", 2)]);
    }

    /// A service without instances is one: connections to it are refused, and go nowhere else.
    #[test]
    fn a_service_without_instances_shadows_others() {
        let mut merger = Merger::default();
        let empty = ServiceRecord::new([].into(), Watch::Live);
        let first: Catalog = [(ServiceId::new("web"), empty)].into();
        let merged = merger.merge(vec![("consul", first), ("file", catalog(&[("web", 1)]))]);
        assert_eq!(merged["web"].instances().count(), 0);
    }

    #[test]
    fn a_change_of_one_source_costs_what_it_changes() {
        let names: Vec<String> = (0..10_000).map(|n| format!("s{n:05}")).collect();
        let many = |port| -> Catalog {
            names.iter().map(|name| (ServiceId::new(name.as_str()), record(port))).collect()
        };
        let (consul, mut file) = (many(1), many(2));
        consul.iter().take(5_000).for_each(|(id, _)| drop(file.remove(id)));
        file.insert(ServiceId::new("t"), record(3));
        let mut merger = Merger::default();
        let first = merger.merge(vec![("consul", consul.clone()), ("file", file.clone())]).clone();
        assert_eq!(first.len(), 10_001);

        // What is shadowed changes nothing, and all is shared.
        file.insert(ServiceId::new("s06000"), record(4));
        let second = merger.merge(vec![("consul", consul.clone()), ("file", file.clone())]).clone();
        assert_eq!(second.n_unshared_leaves(&first), 0);
        // What isn't shadowed costs the leaf that it is in.
        file.insert(ServiceId::new("t"), record(5));
        let third = merger.merge(vec![("consul", consul.clone()), ("file", file)]).clone();
        assert_eq!(third.n_unshared_leaves(&second), 1);
        assert!(Arc::ptr_eq(&third["s00001"].groups, &consul["s00001"].groups));
        let diff = second.diff(&third);
        assert_eq!(diff.changed.len() + diff.gone.len(), 1);
        // A source alone is taken as it is.
        assert_eq!(merger.merge(vec![("consul", consul.clone())]).n_unshared_leaves(&consul), 0);
    }

    /// The same without differences: each service whose name no source before has.
    fn naive(catalogs: &[(&'static str, Catalog)]) -> Catalog {
        let has = |catalog: &Catalog, name: &str| {
            catalog.keys().any(|id| id.name.eq_ignore_ascii_case(name))
        };
        let mut merged = Catalog::new();
        for (nth, (_, catalog)) in catalogs.iter().enumerate() {
            let is_first =
                |id: &ServiceId| !catalogs[..nth].iter().any(|(_, before)| has(before, &id.name));
            let entries = catalog.iter().filter(|(id, _)| is_first(id));
            merged.extend(entries.map(|(id, record)| (id.clone(), record.clone())));
        }
        merged
    }

    /// A change of one source: a name, in one of two spellings, and its port or that it goes.
    type Change = (usize, u8, bool, Option<i64>);

    proptest! {
        #[test]
        fn it_merges_as_the_naive_way_does(
            steps in prop::collection::vec(
                (
                    prop::collection::vec((0..3_usize, 0..8_u8, any::<bool>(), prop::option::of(1..4_i64)), 0..6),
                    prop::sample::subsequence(vec![0, 1, 2], 1..=3),
                    any::<bool>(),
                ),
                1..12,
            ),
        ) {
            let mut sources = [("a", Catalog::new()), ("b", Catalog::new()), ("c", Catalog::new())];
            let mut merger = Merger::default();
            for (changes, mut listed, is_turned) in steps {
                for (source, name, is_upper, port) in changes as Vec<Change> {
                    let prefix = if is_upper { 'S' } else { 's' };
                    let id = ServiceId::new(format!("{prefix}{name}"));
                    match port {
                        Some(port) => drop(sources[source].1.insert(id, record(port))),
                        None => drop(sources[source].1.remove(&id)),
                    }
                }
                if is_turned {
                    listed.reverse();
                }
                let inputs: Vec<_> = listed.iter().map(|&idx: &usize| sources[idx].clone()).collect();
                let expected = naive(&inputs);
                prop_assert_eq!(merger.merge(inputs), &expected);
            }
        }
    }
}

//! A catalog by the names that DNS has for its services.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::{Catalog, ServiceId, ServiceRecord};
use crate::ordmap::Diff;

/// A catalog whose services are found by name in lower case: DNS ignores the case of letters (RFC 4343),
/// so several services may have one name.
#[derive(Debug, Default)]
pub struct CatalogIndex {
    catalog: Catalog,
    /// The services whose names are not in lower case, or have several labels, by name.
    variants: BTreeMap<Arc<str>, BTreeSet<ServiceId>>,
}

impl CatalogIndex {
    /// A catalog that is not searched by name.
    pub fn without_names(catalog: Catalog) -> CatalogIndex {
        CatalogIndex { catalog, variants: BTreeMap::new() }
    }

    /// The catalog.
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// Puts another catalog in this one's place. Returns the services that are new or have changed, and
    /// those that have gone: as many steps as these are.
    pub fn replace(&mut self, newer: Catalog) -> (Vec<ServiceId>, Vec<ServiceId>) {
        let ids = |entries: Vec<(&ServiceId, &ServiceRecord)>| -> Vec<ServiceId> {
            entries.into_iter().map(|(id, _)| id.clone()).collect()
        };
        let Diff { changed, gone } = self.catalog.diff(&newer);
        let (changed, gone) = (ids(changed), ids(gone));
        self.catalog = newer;
        gone.iter().for_each(|id| self.forget(id));
        changed.iter().for_each(|id| self.note(id));
        (changed, gone)
    }

    /// Sets the record of a service.
    pub fn insert(&mut self, id: ServiceId, record: ServiceRecord) {
        self.note(&id);
        self.catalog.insert(id, record);
    }

    /// Removes a service.
    pub fn remove(&mut self, id: &ServiceId) {
        self.forget(id);
        self.catalog.remove(id);
    }

    /// The services of a name in lower case, in no order.
    pub fn ids(&self, name: &Arc<str>) -> Vec<ServiceId> {
        let plain = ServiceId::new(name.clone());
        let plain = self.catalog.contains_key(&plain).then_some(plain);
        self.variants.get(name).into_iter().flatten().cloned().chain(plain).collect()
    }

    fn note(&mut self, id: &ServiceId) {
        let name = id.folded_name();
        if name != id.name {
            self.variants.entry(name).or_default().insert(id.clone());
        }
    }

    fn forget(&mut self, id: &ServiceId) {
        let name = id.folded_name();
        if let Some(variants) = self.variants.get_mut(&name) {
            variants.remove(id);
            if variants.is_empty() {
                self.variants.remove(&name);
            }
        }
    }
}

impl From<Catalog> for CatalogIndex {
    fn from(catalog: Catalog) -> CatalogIndex {
        let mut index = CatalogIndex::default();
        index.replace(catalog);
        index
    }
}

//! When the first catalog is complete, and what changes in the next ones.

use super::super::node::Node;
use super::super::service::Contents;
use super::ServiceStore;
use super::derived::can_be_had;
use crate::table::{Catalog, ServiceId, ServiceRecord};

impl ServiceStore {
    /// Whether a catalog was published.
    pub fn is_synced(&self) -> bool {
        self.is_synced
    }

    /// Whether the service exists, by what Consul has answered since it is live. `None` before that.
    pub fn exists(&self, name: &str) -> Option<bool> {
        let service = self.by_name.get(name).filter(|_| can_be_had(name));
        let Some(service) = service else { return Some(false) };
        let is_followed = service.live.as_ref().is_some_and(|live| live.is_followed);
        is_followed.then_some(matches!(service.contents, Contents::Service { .. }))
    }

    /// Stops waiting for live services without an answer, so that the others can be published; for those
    /// that only the kernel serves with `also_in_use`.
    pub fn stop_waiting(&mut self, also_in_use: bool) {
        let mut lacks_in_use = false;
        for name in self.live() {
            let is_pending = self.edit(&name, |service, _| {
                let live = service.live.as_mut().filter(|live| !live.is_followed)?;
                live.problem.get_or_insert_with(|| {
                    "Consul hasn't said its instances; it joins when it does".into()
                });
                Some(matches!(service.contents, Contents::Pending))
            });
            lacks_in_use |= is_pending.flatten() == Some(true) && self.is_in_use(&name);
        }
        self.is_synced |= self.has_names && (also_in_use || !lacks_in_use);
    }

    /// Publishes what an earlier run saved, since Consul doesn't answer.
    pub fn serve_saved(&mut self) {
        self.is_synced = true;
    }

    /// The catalog, if it is complete, and differs from the one that was published last. Only the records
    /// that changed are looked at, and all others are shared with it.
    pub fn publish(&mut self) -> Option<Catalog> {
        let has_all = self.has_names && *self.node != Node::Unknown && self.has_switch;
        self.is_synced |= has_all && self.index.totals.n_pending == 0;
        if !self.is_synced {
            return None;
        }
        let mut has_changed = self.published.is_none();
        let catalog = self.published.get_or_insert_default();
        for name in std::mem::take(&mut self.dirty) {
            let id = ServiceId::new(name);
            let last = catalog.get(&id);
            let service = self.by_name.get(&id.name);
            match service.and_then(|it| it.published(last.is_some(), &self.nothing)) {
                Some((instances, watch)) => {
                    let is_same = last.is_some_and(|last| {
                        last.watch == watch
                            && last.groups.iter().all(|it| it.instances == *instances)
                    });
                    if !is_same {
                        catalog.insert(id, ServiceRecord::new(instances.clone(), watch));
                        has_changed = true;
                    }
                }
                None => has_changed |= catalog.remove(&id).is_some(),
            }
        }
        has_changed.then(|| catalog.clone())
    }
}

//! The names in the kernel's map, which follow the table.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use lb_common::{NameKey, NameRecord, NameRef};

use super::super::ids::Ids;
use crate::ordmap::{Diff, OrdMap};
use crate::table::{Service, Table, Watch};

/// The services of a table.
type Services = OrdMap<Arc<str>, Arc<Service>>;

/// The operations on the unit's maps. It is implemented by the kernel's maps and, in tests, by ones that
/// check what a reader may see.
pub trait NameMaps {
    /// Makes a name lead to a record.
    ///
    /// # Errors
    /// When the kernel refuses, such as E2BIG for a full map.
    fn insert(&mut self, key: NameKey, target: NameRef) -> io::Result<()>;

    /// Has a name found faster that leads to this record already: an earlier daemon inserted it.
    fn index(&mut self, key: &NameKey, record: u32);

    /// Makes a name lead nowhere that led to this record; one that is absent is no error.
    ///
    /// # Errors
    /// When the kernel refuses; then nothing has changed.
    fn remove(&mut self, key: &NameKey, record: u32) -> io::Result<()>;

    /// Writes a record that no reader knows yet, and resets its counters.
    fn write(&mut self, record: u32, value: &NameRecord);

    /// Sets the flags of a record, by one store.
    fn set_flags(&mut self, record: u32, flags: u32);

    /// Waits until every program that was running has ended.
    fn synchronize_rcu(&mut self);

    /// All names, each with its record.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn all(&self) -> io::Result<Vec<(NameKey, NameRef)>>;

    /// A record.
    fn record(&self, record: u32) -> NameRecord;
}

/// A name as the maps have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct MappedName {
    record: u32,
    addresses: (Ipv4Addr, Ipv6Addr),
    flags: u32,
}

/// Updates the maps to each table.
#[derive(Debug)]
pub struct NameTable<M> {
    maps: M,
    /// The services of the table that was applied last.
    seen: Services,
    /// Names to be applied again: the kernel refused them, or an earlier daemon's may differ.
    pending: BTreeSet<Arc<str>>,
    /// Whether a table was applied: what an earlier daemon left isn't to be removed before.
    is_applied: bool,
    mapped: HashMap<Arc<str>, MappedName>,
    records: Ids,
    /// Records that were given up, and that a program may still read.
    quarantine: Vec<u32>,
    /// Whether names were removed: the kernel reuses a hash map's elements at once.
    has_removed: bool,
}

impl<M: NameMaps> NameTable<M> {
    /// Takes over what the maps have, which have room for so many names.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn adopt(mut maps: M, capacity: u32) -> io::Result<NameTable<M>> {
        let (mut mapped, mut has_removed) = (HashMap::new(), false);
        for (key, NameRef { record, .. }) in maps.all()? {
            // The probe's, which isn't a service's.
            if record == capacity {
                continue;
            }
            let NameRecord { vip, flags, vip6, .. } = maps.record(record);
            // The records are others than those that the name was written with.
            if vip == [0; 4] || record >= capacity {
                maps.remove(&key, record)?;
                has_removed = true;
                continue;
            }
            maps.index(&key, record);
            let name = label(&key);
            mapped.insert(name, MappedName { record, addresses: (vip.into(), vip6.into()), flags });
        }
        let used: BTreeSet<u32> = mapped.values().map(|name| name.record).collect();
        let records = Ids::with_used(capacity, |record| used.contains(&record));
        Ok(NameTable {
            maps,
            seen: OrdMap::new(),
            pending: mapped.keys().cloned().collect(),
            is_applied: false,
            mapped,
            records,
            quarantine: Vec::new(),
            has_removed,
        })
    }

    /// Updates the maps to `table`. Returns why some names aren't there: the daemon answers those, and
    /// [`NameTable::retry`] tries them again.
    pub fn apply(&mut self, table: &Table) -> Option<String> {
        let Diff { changed, gone } = self.seen.diff(&table.services);
        self.pending.extend(changed.iter().map(|(name, _)| Arc::clone(name)));
        self.pending.extend(gone.iter().map(|(name, _)| Arc::clone(name)));
        self.seen = table.services.clone();
        self.is_applied = true;
        self.retry()
    }

    /// Whether names are to be tried again.
    pub fn is_behind(&self) -> bool {
        self.is_applied && !self.pending.is_empty()
    }

    /// Tries names again that failed. Returns what [`NameTable::apply`] does.
    pub fn retry(&mut self) -> Option<String> {
        let services = self.seen.clone();
        let (present, gone): (Vec<_>, Vec<_>) = std::mem::take(&mut self.pending)
            .into_iter()
            .partition(|name| services.contains_key(name));
        let (moved, present): (Vec<_>, Vec<_>) =
            present.into_iter().partition(|name| self.has_moved(name, &services));
        // Removals come after insertions, which would wait for the end of readers.
        let full = self.try_each(present, &services);
        let mut failed = self.try_each(gone, &services);
        for name in &moved {
            if let Err(error) = self.remove(name) {
                failed.insert(name.clone(), error);
            }
        }
        // By one wait for all. There may be room now for what had none.
        let again = moved.into_iter().chain(full.into_keys());
        let again = again.filter(|name| !failed.contains_key(name)).collect();
        failed.extend(self.try_each(again, &services));
        let reason = failed.iter().next().map(|(name, error)| format!("{name}: {error}"));
        self.pending = failed.into_keys().collect();
        reason
    }

    /// Updates these names; returns those that failed, each with the error.
    fn try_each(
        &mut self,
        names: Vec<Arc<str>>,
        services: &Services,
    ) -> BTreeMap<Arc<str>, io::Error> {
        let mut failed = BTreeMap::new();
        for name in names {
            let updated = match services.get(&name) {
                Some(service) => self.upsert(&name, service),
                None => self.remove(&name),
            };
            if let Err(error) = updated {
                failed.insert(name, error);
            }
        }
        failed
    }

    /// Frees what was given up, a grace period later.
    pub fn recycle(&mut self) {
        if self.has_removed {
            self.maps.synchronize_rcu();
            self.has_removed = false;
            self.quarantine.drain(..).for_each(|record| self.records.free(record));
        }
    }

    /// The names in the maps, each with its record.
    pub fn records(&self) -> impl Iterator<Item = (&Arc<str>, u32)> {
        self.mapped.iter().map(|(name, mapped)| (name, mapped.record))
    }

    /// Whether a name that is in the maps has other addresses now.
    fn has_moved(&self, name: &Arc<str>, services: &Services) -> bool {
        let (Some(mapped), Some(service)) = (self.mapped.get(name), services.get(name)) else {
            return false;
        };
        mapped.addresses != answered(service).0
    }

    fn upsert(&mut self, name: &Arc<str>, service: &Service) -> io::Result<()> {
        let Some(key) = NameKey::of(name.as_bytes()) else { return Ok(()) };
        let (addresses, flags) = answered(service);
        if let Some(mapped) = self.mapped.get_mut(name) {
            if mapped.flags != flags {
                self.maps.set_flags(mapped.record, flags);
                mapped.flags = flags;
            }
            return Ok(());
        }
        self.recycle();
        let full = || io::Error::other("the map NAMES is full: raise datapath.max_services");
        let record = self.records.take().ok_or_else(full)?;
        let (vip, vip6) = addresses;
        let (vip, vip6) = (vip.octets(), vip6.octets());
        self.maps.write(record, &NameRecord { vip, flags, vip6, ..NameRecord::default() });
        if let Err(error) = self.maps.insert(key, NameRef { record, padding: 0 }) {
            self.records.free(record);
            return Err(error);
        }
        self.mapped.insert(name.clone(), MappedName { record, addresses, flags });
        Ok(())
    }

    fn remove(&mut self, name: &Arc<str>) -> io::Result<()> {
        let (Some(key), Some(mapped)) = (NameKey::of(name.as_bytes()), self.mapped.get(name))
        else {
            return Ok(());
        };
        self.maps.remove(&key, mapped.record)?;
        self.quarantine.push(mapped.record);
        self.has_removed = true;
        self.mapped.remove(name);
        Ok(())
    }

    /// The maps.
    pub fn maps(&self) -> &M {
        &self.maps
    }
}

/// How a service's name is answered: the addresses, unspecified where there is none, and the flags of
/// [`NameRecord`].
pub fn answered(service: &Service) -> ((Ipv4Addr, Ipv6Addr), u32) {
    let cold = if service.watch == Watch::Live { 0 } else { NameRecord::COLD };
    let has_vip6 = if service.answered_vip6().is_some() { NameRecord::HAS_VIP6 } else { 0 };
    let vip6 = service.vip6.unwrap_or(Ipv6Addr::UNSPECIFIED);
    ((service.vip, vip6), cold | has_vip6)
}

/// The label of a key.
pub fn label(key: &NameKey) -> Arc<str> {
    let [len, label @ ..] = &key.octets;
    let label = label.get(..usize::from(*len)).unwrap_or_default();
    String::from_utf8_lossy(label).into()
}

#[cfg(test)]
mod tests;

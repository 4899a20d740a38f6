//! Takes over maps that an earlier daemon filled: their contents become the reconciler's state.
//!
//! An earlier daemon may have ended at any point, so there may be entries that nothing refers to, not
//! yet published or not yet cleared. Those are cleared now. Reachable entries are always consistent;
//! if they aren't, another program wrote to the maps, and they aren't taken over.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use lb_common::{Algorithm, Backend, MAX_SERVICE_BACKENDS, ServiceRef, SlotRange, maglev_slots};

use super::slots::is_of_table;
use super::{Applied, Reconciler, next, publish};
use crate::datapath::buddy::Block;
use crate::datapath::ids::Ids;
use crate::datapath::map_specs::Sizes;
use crate::datapath::maps::{FrontendKey, Maps, ServiceRanges};

/// Why maps can't be taken over.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// The kernel refused to show them.
    #[error("can't read the pinned maps: {0}")]
    Read(#[from] io::Error),
    /// They don't hold what an earlier daemon can have left.
    #[error("the pinned maps are inconsistent: {what}")]
    Inconsistent {
        /// The problem.
        what: String,
    },
}

fn inconsistent(what: String) -> AdoptError {
    AdoptError::Inconsistent { what }
}

impl<M: Maps> Reconciler<M> {
    /// A reconciler for maps that an earlier daemon filled. Its first table is compared with what
    /// they hold: what stays keeps its indices, the rest is pruned.
    ///
    /// # Errors
    /// When the maps can't be read, or hold what no daemon can have left there.
    pub fn adopt(maps: M, sizes: &Sizes, first_generation: u32) -> Result<Self, AdoptError> {
        let mut this = Reconciler::new(maps, sizes, first_generation);
        let mut by_service: BTreeMap<u32, BTreeMap<FrontendKey, ServiceRef>> = BTreeMap::new();
        for (frontend, target) in this.maps.frontends()? {
            this.room(&frontend).used += 1;
            by_service.entry(target.service).or_default().insert(frontend, target);
        }
        let mut used_backends = HashSet::new();
        for (&service_idx, frontends) in &by_service {
            if service_idx >= sizes.services {
                return Err(inconsistent(format!("there is no service {service_idx}")));
            }
            let (name, mut applied) = this.adopt_service(service_idx, sizes)?;
            for (&frontend, &target) in frontends {
                this.maps.adopt_frontend(frontend, target);
                applied.insert_frontend(frontend, target);
            }
            for &backend_idx in applied.backends.values() {
                if !used_backends.insert(backend_idx) {
                    return Err(inconsistent(format!("a backend of {name} isn't its own")));
                }
            }
            this.owners.extend(frontends.keys().map(|&frontend| (frontend, name.clone())));
            if this.applied.insert(name.clone(), applied).is_some() {
                return Err(inconsistent(format!("two services have the name {name}")));
            }
        }
        this.pending = this.applied.keys().cloned().collect();
        this.services = Ids::with_used(sizes.services, |idx| by_service.contains_key(&idx));
        this.backends = Ids::with_used(sizes.backends, |idx| used_backends.contains(&idx));
        this.clear_leftovers(sizes, &by_service, &used_backends);
        this.renew_suspended(&used_backends);
        Ok(this)
    }

    /// Sets the generation of each backend in use that has none: the earlier daemon ended while it removed
    /// UDP frontends of the backend's service. Which ones isn't known any more, so all sockets that cached
    /// the former generation are disconnected.
    fn renew_suspended(&mut self, used_backends: &HashSet<u32>) {
        for &backend_idx in used_backends {
            let backend = self.maps.backend(backend_idx);
            if backend.generation == 0 {
                self.maps.renew_backend(backend_idx, self.next_generation);
                self.next_generation = next(self.next_generation);
                self.removed_udp.entry(("".into(), socket_address(&backend))).or_default();
            }
        }
    }

    fn adopt_service(
        &mut self,
        service_idx: u32,
        sizes: &Sizes,
    ) -> Result<(Arc<str>, Applied), AdoptError> {
        let octets = self.maps.name(service_idx).octets;
        let name = octets.split(|&octet| octet == 0).next().unwrap_or_default();
        let name = std::str::from_utf8(name).unwrap_or_default();
        if name.is_empty() {
            return Err(inconsistent(format!("service {service_idx} has no name")));
        }
        let ranges = self.maps.service(service_idx);
        let regions: HashSet<SlotRange> = ranges.all().into_iter().collect();
        let algorithm = Algorithm::from_number(self.maps.flags(service_idx).algorithm);
        let mut applied = Applied::new(service_idx, algorithm);
        for region in regions.into_iter().filter(|region| region.n_slots > 0) {
            // With another algorithm there may be a table, too, which nothing reads.
            let has_table = applied.algorithm == Algorithm::Maglev && region != ranges.unselected;
            let wrong = || inconsistent(format!("the slots of {name} aren't its own"));
            if region.n_slots > MAX_SERVICE_BACKENDS {
                return Err(wrong());
            }
            let n_table = if has_table { maglev_slots(region.n_slots) } else { 0 };
            let n_slots = region.n_slots + n_table;
            let end = region.first_slot.checked_add(n_slots).filter(|&end| end <= sizes.slots);
            let end = end.ok_or_else(wrong)?;
            let blocks = Block::of(region.first_slot, n_slots).ok_or_else(wrong)?;
            if !blocks.iter().all(|&block| self.regions.claim(block)) {
                return Err(wrong());
            }
            applied.blocks.extend(blocks);
            let mut table = (end - n_table..end).map(|slot_idx| self.maps.slot(slot_idx));
            if !table.all(|slot| is_of_table(slot, region.n_slots)) {
                return Err(wrong());
            }
            for slot_idx in region.first_slot..region.first_slot + region.n_slots {
                let slot = self.maps.slot(slot_idx);
                if slot.backend >= sizes.backends || u32::from(slot.alias) >= region.n_slots {
                    return Err(wrong());
                }
                let backend = self.maps.backend(slot.backend);
                let address = socket_address(&backend);
                // No table has a multicast address.
                if address.port() == 0 || address.ip().is_multicast() {
                    return Err(inconsistent(format!("a backend of {name} isn't there")));
                }
                applied.backends.insert(address, slot.backend);
                let added_ms = self.maps.added_ms(slot.backend);
                if added_ms != 0 {
                    self.young.insert(slot.backend, added_ms);
                }
            }
        }
        Ok((name.into(), applied))
    }

    /// Clears unreferenced entries.
    fn clear_leftovers(
        &mut self,
        sizes: &Sizes,
        by_service: &BTreeMap<u32, BTreeMap<FrontendKey, ServiceRef>>,
        used_backends: &HashSet<u32>,
    ) {
        for service_idx in (0..sizes.services).filter(|idx| !by_service.contains_key(idx)) {
            publish(&mut self.maps, service_idx, &ServiceRanges::default());
        }
        for backend_idx in (0..sizes.backends).filter(|idx| !used_backends.contains(idx)) {
            let backend = self.maps.backend(backend_idx);
            if backend.generation != 0 {
                self.maps.retire_backend(backend_idx);
            }
            if backend.port != 0 {
                // Its service isn't known any more. The earlier daemon may have ended before it
                // disconnected the sockets.
                self.removed_udp.entry(("".into(), socket_address(&backend))).or_default();
            }
        }
        // A program may still read an entry that was just found free.
        self.maps.synchronize_rcu();
    }
}

fn socket_address(backend: &Backend) -> SocketAddr {
    let ip = match backend.address.to_v4() {
        Some(octets) => IpAddr::V4(Ipv4Addr::from(octets)),
        None => IpAddr::V6(Ipv6Addr::from(backend.address.octets)),
    };
    SocketAddr::new(ip, backend.port)
}

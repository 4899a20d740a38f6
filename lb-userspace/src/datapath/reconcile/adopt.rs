//! Takes over maps that an earlier daemon filled: their contents become the reconciler's state.
//!
//! An earlier daemon may have ended at any point, so there may be entries that nothing refers to, not
//! yet published or not yet cleared. Those are cleared now. Reachable entries are always consistent;
//! if they aren't, another program wrote to the maps, and they aren't taken over.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use lb_common::{Backend, Group, ServiceRef, SlotRange};

use super::{Applied, Reconciler, next};
use crate::datapath::buddy::Block;
use crate::datapath::ids::Ids;
use crate::datapath::map_specs::Sizes;
use crate::datapath::maps::{FrontendKey, Groups, Maps};

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
        let regions: HashSet<SlotRange> =
            self.maps.service(service_idx).into_iter().flat_map(Group::ranges).collect();
        let mut applied = Applied::new(service_idx);
        for region in regions.into_iter().filter(|region| region.n_slots > 0) {
            let block = Block::of(region.first_slot, region.n_slots);
            let end = region.first_slot.checked_add(region.n_slots);
            let is_inside = end.is_some_and(|end| end <= sizes.slots);
            let block = block.filter(|&block| is_inside && self.regions.claim(block));
            let wrong = || inconsistent(format!("the slots of {name} aren't its own"));
            applied.blocks.push(block.ok_or_else(wrong)?);
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
            if self.maps.service(service_idx) != Groups::default() {
                self.maps.publish(service_idx, Groups::default());
            }
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

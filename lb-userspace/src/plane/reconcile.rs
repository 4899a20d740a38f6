//! The reconciler: brings the maps from what they hold to what a table wants.
//!
//! A service's new backends and slots are written where no reader looks, then one store shows them.
//! What that leaves behind (slots, entries, indices) rests in [`Reconciler::resting`] until every
//! program that may have found it has ended; only then is it written again. That wait is put off
//! until something needs the room, so that an ordinary change never waits.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::Arc;

use lb_common::{Backend, Frontend, IPPROTO_TCP, MAX_SERVICE_BACKENDS, Region, Target};

use super::alias;
use super::ids::Ids;
use super::maps::Maps;
use super::regions::{Block, Regions};
use crate::table::{Ports, Service, State, Table};

/// Why the kernel doesn't have a service's present state. Its former state serves on.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// One service is larger than a region can be.
    #[error("it has {n_backends} healthy backends; a service can have {MAX_SERVICE_BACKENDS}")]
    TooManyBackends {
        /// The number of healthy backends.
        n_backends: usize,
    },
    /// A map has no room.
    #[error("{map} is full ({capacity} entries): raise {key} in the configuration and restart")]
    Full {
        /// The map.
        map: &'static str,
        /// The number of entries it has room for.
        capacity: u32,
        /// The key of the configuration that sets its size.
        key: &'static str,
    },
    /// The kernel refused a change.
    #[error("the kernel refused frontend {address}: {source}")]
    Frontend {
        /// The frontend.
        address: SocketAddrV4,
        /// What it said.
        source: io::Error,
    },
}

/// What the maps hold of one service.
#[derive(Debug)]
struct Held {
    /// The state of it that was applied last; `None` while its first is not complete.
    applied: Option<Arc<Service>>,
    service_idx: u32,
    backends: HashMap<SocketAddrV4, u32>,
    frontends: BTreeMap<Frontend, Target>,
    blocks: Vec<Block>,
}

/// What was given up and may still be read.
#[derive(Debug, Default)]
struct Resting {
    services: Vec<u32>,
    backends: Vec<u32>,
    blocks: Vec<Block>,
    /// Whether elements of `FRONTENDS` were deleted: the kernel recycles them at once.
    frontends: bool,
}

/// How many entries a map has in use, and room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pressure {
    /// Entries in use, those that rest included.
    pub used: u32,
    /// Entries it has room for.
    pub capacity: u32,
}

/// The indices that the kernel knows a service and its backends by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Indices {
    /// The index into `SERVICES` and `SERVICE_STATS`.
    pub service: u32,
    /// The indices into `BACKENDS` and `BACKEND_DIALS`.
    pub backends: HashMap<SocketAddr, u32>,
}

/// Keeps the maps in step with the table.
#[derive(Debug)]
pub struct Reconciler<M> {
    maps: M,
    held: BTreeMap<Arc<str>, Held>,
    resting: Resting,
    services: Ids,
    backends: Ids,
    regions: Regions,
    n_frontends: u32,
    max_frontends: u32,
}

impl<M: Maps> Reconciler<M> {
    /// Starts from empty maps of these sizes, in entries.
    pub fn new(maps: M, sizes: &super::Sizes) -> Self {
        Reconciler {
            maps,
            held: BTreeMap::new(),
            resting: Resting::default(),
            services: Ids::new(sizes.services),
            backends: Ids::new(sizes.backends),
            regions: Regions::new(sizes.slots),
            n_frontends: 0,
            max_frontends: sizes.frontends,
        }
    }

    /// Brings the maps to `table`. Returns the services that couldn't be brought there, each with
    /// the reason; the next call tries them again.
    ///
    /// Additions and changes come before removals, so that a service that is renamed or moved is
    /// never missing under both names.
    pub fn apply(&mut self, table: &Table) -> BTreeMap<Arc<str>, ApplyError> {
        let mut errors = BTreeMap::new();
        for (name, service) in &table.services {
            let applied = self.held.get(name).and_then(|held| held.applied.as_ref());
            if applied.is_some_and(|applied| Arc::ptr_eq(applied, service)) {
                continue;
            }
            if let Err(error) = self.put(service) {
                errors.insert(name.clone(), error);
            }
        }
        let gone: Vec<Arc<str>> =
            self.held.keys().filter(|name| !table.services.contains_key(*name)).cloned().collect();
        for name in gone {
            if let Err(error) = self.remove(&name) {
                errors.insert(name, error);
            }
        }
        errors
    }

    /// The indices of a service that is in the maps.
    pub fn indices(&self, name: &str) -> Option<Indices> {
        let held = self.held.get(name)?;
        let backends = held.backends.iter().map(|(&address, &idx)| (address.into(), idx)).collect();
        Some(Indices { service: held.service_idx, backends })
    }

    /// How full each map is.
    pub fn pressure(&self) -> [(&'static str, Pressure); 4] {
        let ids = |ids: &Ids| Pressure { used: ids.used(), capacity: ids.capacity() };
        let frontends = Pressure { used: self.n_frontends, capacity: self.max_frontends };
        let slots = Pressure { used: self.regions.used(), capacity: self.regions.capacity() };
        [
            ("FRONTENDS", frontends),
            ("SERVICES", ids(&self.services)),
            ("SLOTS", slots),
            ("BACKENDS", ids(&self.backends)),
        ]
    }

    /// Adds or changes one service.
    fn put(&mut self, service: &Arc<Service>) -> Result<(), ApplyError> {
        let healthy: Vec<_> = service
            .backends
            .iter()
            .filter(|backend| backend.state == State::Healthy)
            .filter_map(|backend| match backend.address? {
                SocketAddr::V4(address) => Some((address, backend.weight, backend.host_only)),
                SocketAddr::V6(_) => None,
            })
            .collect();
        if healthy.len() > MAX_SERVICE_BACKENDS as usize {
            return Err(ApplyError::TooManyBackends { n_backends: healthy.len() });
        }
        let n_elsewhere = healthy.iter().filter(|&&(.., host_only)| !host_only).count();
        // Both kinds of dial share a region unless some backends are for the host alone.
        let shared = n_elsewhere == healthy.len();
        let wanted: [usize; 2] = [healthy.len(), if shared { 0 } else { n_elsewhere }];

        let n_fresh = {
            let held = self.held.get(&service.name);
            let known = |address: &SocketAddrV4| {
                held.is_some_and(|held| held.backends.contains_key(address))
            };
            let mut fresh: Vec<SocketAddrV4> = healthy
                .iter()
                .map(|(address, ..)| *address)
                .filter(|address| !known(address))
                .collect();
            fresh.sort_unstable();
            fresh.dedup();
            fresh.len() as u32
        };
        // All that can be short is taken before anything is written, so that a failure leaves the
        // former state whole.
        if self.backends.available() < n_fresh {
            self.recycle();
        }
        if self.backends.available() < n_fresh {
            return Err(full("BACKENDS", self.backends.capacity(), "plane.max_backends"));
        }
        let service_idx = match self.held.get(&service.name) {
            Some(held) => held.service_idx,
            None => self.new_service()?,
        };
        let blocks = match self.take_blocks(wanted) {
            Ok(blocks) => blocks,
            Err(error) => {
                if !self.held.contains_key(&service.name) {
                    self.services.give_back(service_idx);
                }
                return Err(error);
            }
        };

        let held = self.held.entry(service.name.clone()).or_insert_with(|| {
            self.maps.reset_service(service_idx);
            Held {
                applied: None,
                service_idx,
                backends: HashMap::new(),
                frontends: BTreeMap::new(),
                blocks: Vec::new(),
            }
        });
        for &(address, ..) in &healthy {
            if !held.backends.contains_key(&address)
                && let Some(backend_idx) = self.backends.take()
            {
                self.maps.write_backend(backend_idx, backend_entry(address));
                held.backends.insert(address, backend_idx);
            }
        }
        let mut regions = [Region::default(); 2];
        let mut unused = blocks.iter();
        for (region, host) in regions.iter_mut().zip([true, false]) {
            let choices: Vec<(u32, u16)> = healthy
                .iter()
                .filter(|&&(.., host_only)| host || !host_only)
                .map(|(address, weight, _)| (held.backends[address], *weight))
                .collect();
            if choices.is_empty() || (!host && shared) {
                continue;
            }
            if let Some(block) = unused.next() {
                self.maps.write_slots(block.first_slot, &alias::table(&choices));
                *region = Region { first_slot: block.first_slot, n_slots: choices.len() as u32 };
            }
        }
        let [host, elsewhere] = regions;
        let elsewhere = if shared { host } else { elsewhere };
        self.maps.publish(service_idx, lb_common::Service { host, elsewhere });

        self.resting.blocks.extend(std::mem::replace(&mut held.blocks, blocks));
        let stay: HashSet<SocketAddrV4> = healthy.iter().map(|(address, ..)| *address).collect();
        let gone = held.backends.extract_if(|address, _| !stay.contains(address));
        self.resting.backends.extend(gone.map(|(_, backend_idx)| backend_idx));

        self.put_frontends(service, service_idx)?;
        if let Some(held) = self.held.get_mut(&service.name) {
            held.applied = Some(service.clone());
        }
        Ok(())
    }

    fn put_frontends(&mut self, service: &Service, service_idx: u32) -> Result<(), ApplyError> {
        let wanted = frontends(service, service_idx);
        let Some(held) = self.held.get(&service.name) else { return Ok(()) };
        let stale: Vec<_> =
            held.frontends.keys().filter(|key| !wanted.contains_key(key)).copied().collect();
        let fresh: Vec<_> = wanted
            .into_iter()
            .filter(|(frontend, _)| !held.frontends.contains_key(frontend))
            .collect();
        if !fresh.is_empty() && self.resting.frontends {
            self.recycle();
        }
        if self.n_frontends + fresh.len() as u32 > self.max_frontends {
            return Err(full("FRONTENDS", self.max_frontends, "plane.max_services"));
        }
        for (frontend, target) in fresh {
            self.maps
                .insert_frontend(frontend, target)
                .map_err(|source| ApplyError::Frontend { address: shown(&frontend), source })?;
            if let Some(held) = self.held.get_mut(&service.name) {
                held.frontends.insert(frontend, target);
                self.n_frontends += 1;
            }
        }
        self.remove_frontends(&service.name, &stale)
    }

    fn remove_frontends(&mut self, name: &str, stale: &[Frontend]) -> Result<(), ApplyError> {
        let Some(held) = self.held.get_mut(name) else { return Ok(()) };
        for frontend in stale {
            self.maps
                .remove_frontend(frontend)
                .map_err(|source| ApplyError::Frontend { address: shown(frontend), source })?;
            self.resting.frontends = true;
            held.frontends.remove(frontend);
            self.n_frontends -= 1;
        }
        Ok(())
    }

    fn remove(&mut self, name: &str) -> Result<(), ApplyError> {
        let Some(held) = self.held.get(name) else { return Ok(()) };
        let (service_idx, frontends) =
            (held.service_idx, held.frontends.keys().copied().collect::<Vec<_>>());
        self.maps.publish(service_idx, lb_common::Service::default());
        self.remove_frontends(name, &frontends)?;
        if let Some(held) = self.held.remove(name) {
            self.resting.services.push(held.service_idx);
            self.resting.backends.extend(held.backends.into_values());
            self.resting.blocks.extend(held.blocks);
        }
        Ok(())
    }

    fn new_service(&mut self) -> Result<u32, ApplyError> {
        if self.services.available() == 0 {
            self.recycle();
        }
        self.services
            .take()
            .ok_or_else(|| full("SERVICES", self.services.capacity(), "plane.max_services"))
    }

    /// Takes a block for each number of slots that isn't 0: all of them, or none.
    fn take_blocks(&mut self, wanted: [usize; 2]) -> Result<Vec<Block>, ApplyError> {
        let mut blocks = Vec::new();
        for n_slots in wanted.into_iter().filter(|&n_slots| n_slots > 0) {
            let n_slots = n_slots as u32;
            let block = self.regions.take(n_slots).or_else(|| {
                self.recycle();
                self.regions.take(n_slots)
            });
            match block {
                Some(block) => blocks.push(block),
                None => {
                    blocks.into_iter().for_each(|block| self.regions.give_back(block));
                    return Err(full("SLOTS", self.regions.capacity(), "plane.max_backends"));
                }
            }
        }
        Ok(blocks)
    }

    /// Waits for the readers, then frees all that rests.
    fn recycle(&mut self) {
        self.maps.wait_for_readers();
        let Resting { services, backends, blocks, frontends: _ } =
            std::mem::take(&mut self.resting);
        services.into_iter().for_each(|service_idx| self.services.give_back(service_idx));
        backends.into_iter().for_each(|backend_idx| self.backends.give_back(backend_idx));
        blocks.into_iter().for_each(|block| self.regions.give_back(block));
    }
}

fn full(map: &'static str, capacity: u32, key: &'static str) -> ApplyError {
    ApplyError::Full { map, capacity, key }
}

fn frontends(service: &Service, service_idx: u32) -> BTreeMap<Frontend, Target> {
    let target = |host_only| Target { service: service_idx, host_only };
    let ports: &[u16] = match &service.ports {
        Ports::Only(ports) if service.protocols.tcp() => ports,
        Ports::Only(_) | Ports::Any => &[],
    };
    let ports = ports.iter().map(|&port| (key(service.vip, port), target(0)));
    ports.chain(service.pin.map(|pin| (key(*pin.ip(), pin.port()), target(1)))).collect()
}

fn key(address: Ipv4Addr, port: u16) -> Frontend {
    Frontend { address: address.octets(), port, protocol: IPPROTO_TCP, padding: 0 }
}

fn shown(frontend: &Frontend) -> SocketAddrV4 {
    SocketAddrV4::new(frontend.address.into(), frontend.port)
}

fn backend_entry(address: SocketAddrV4) -> Backend {
    Backend { address: address.ip().octets(), port: address.port(), padding: 0 }
}

#[cfg(test)]
#[path = "reconcile_tests.rs"]
mod tests;

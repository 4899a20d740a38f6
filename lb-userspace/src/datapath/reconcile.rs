//! The reconciler: brings the maps from what they hold to what a table wants.
//!
//! A service's new backends and slots are written where no reader looks, then one store shows them.
//! What that leaves behind (slots, entries, indices) rests in [`Reconciler::resting`] until every
//! program that may have found it has ended; only then is it written again. That wait is put off
//! until something needs the room, so that an ordinary change never waits.

pub mod adopt;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use lb_common::{
    ANY_PORT, Address, Backend, Group, IPPROTO_TCP, IPPROTO_UDP, MAX_SERVICE_BACKENDS, N_GROUPS,
    ServiceName, ServiceRef, SlotRange, alias_table,
};

use super::buddy::{Block, SlotAllocator};
use super::ids::Ids;
use super::map_specs::Sizes;
use super::maps::{FrontendKey, Groups, Maps};
use crate::ordmap::{Diff, OrdMap};
use crate::table::{Ports, Service, Table, Watch};

/// Why the kernel doesn't have a service's present state.
///
/// Where room is lacking nothing has changed, and the service's former state keeps serving. Where
/// the kernel refused a frontend the service's present backends serve, at the frontends that it has
/// so far; [`Reconciler::apply`] does the rest when it is called again.
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
    #[error("the kernel refused frontend {address}: {source}; it is tried again every second")]
    Frontend {
        /// The frontend.
        address: SocketAddr,
        /// What it said.
        source: io::Error,
    },
}

impl ApplyError {
    /// Whether the same table may be applied later. A map that is full stays so until another table
    /// gives something up, and is tried again then.
    pub fn may_pass(&self) -> bool {
        matches!(self, ApplyError::Frontend { .. })
    }

    /// Whether the service is in the maps as it was before.
    pub fn keeps_former(&self) -> bool {
        !self.may_pass()
    }
}

/// What the maps hold of one service.
#[derive(Debug)]
struct Held {
    /// Whether its source followed it in the state that was applied last; `None` while its first isn't
    /// complete.
    watch: Option<Watch>,
    service_idx: u32,
    backends: HashMap<SocketAddr, u32>,
    frontends: BTreeMap<FrontendKey, ServiceRef>,
    blocks: Vec<Block>,
    /// The UDP frontends by which sockets may have come to its backends: those that it has, and those
    /// it had until their sockets were seen to.
    udp: BTreeSet<FrontendKey>,
    /// The UDP frontends that it gives up. While there are any, its backends have no generation, so
    /// that each datagram goes by the maps alone and no socket remembers where.
    given_up: Vec<FrontendKey>,
}

impl Held {
    fn new(service_idx: u32) -> Held {
        Held {
            watch: None,
            service_idx,
            backends: HashMap::new(),
            frontends: BTreeMap::new(),
            blocks: Vec::new(),
            udp: BTreeSet::new(),
            given_up: Vec::new(),
        }
    }

    fn insert_frontend(&mut self, frontend: FrontendKey, target: ServiceRef) {
        if frontend.protocol == IPPROTO_UDP {
            self.udp.insert(frontend);
        }
        self.frontends.insert(frontend, target);
    }
}

/// What connected UDP sockets may still be connected to, though a new connection would not be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LeftUdp {
    /// Backends that left a service which isn't known any more.
    pub backends: HashSet<SocketAddr>,
    /// Frontends, each with a backend that it led to and leads to no more: the backend left the
    /// service, or the service gave the frontend up. Port 0 stands for all ports.
    pub frontends: HashSet<(SocketAddr, SocketAddr)>,
}

impl LeftUdp {
    /// Whether nothing left.
    pub fn is_empty(&self) -> bool {
        self.backends.is_empty() && self.frontends.is_empty()
    }
}

/// Services that have backends in some maps, each with its frontends there.
pub type Served = HashMap<Arc<str>, HashSet<FrontendKey>>;

/// What was given up and may still be read.
#[derive(Debug, Default)]
struct Resting {
    services: Vec<u32>,
    backends: Vec<u32>,
    blocks: Vec<Block>,
    /// Whether elements of a hash were deleted: the kernel recycles them at once.
    frontends: bool,
}

impl Resting {
    fn is_empty(&self) -> bool {
        let Resting { services, backends, blocks, frontends } = self;
        services.is_empty() && backends.is_empty() && blocks.is_empty() && !frontends
    }
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
    /// The indices into `BACKENDS`.
    pub backends: HashMap<SocketAddr, u32>,
}

/// A healthy backend, as the maps need it.
#[derive(Clone, Copy, Debug)]
struct Healthy {
    address: SocketAddr,
    weight: u16,
    host_only: bool,
    /// The group that it is in, of [`N_GROUPS`].
    group: usize,
}

/// Keeps the maps in step with the table.
#[derive(Debug)]
pub struct Reconciler<M> {
    maps: M,
    /// The services of the table that was applied last.
    seen: OrdMap<Arc<str>, Arc<Service>>,
    /// Those of which the maps may hold something else: what failed, or an earlier daemon left.
    behind: BTreeSet<Arc<str>>,
    held: BTreeMap<Arc<str>, Held>,
    /// Whose each frontend is.
    owners: HashMap<FrontendKey, Arc<str>>,
    /// Frontends that services have no more, while a table is applied.
    stale: Vec<(Arc<str>, Vec<FrontendKey>)>,
    resting: Resting,
    services: Ids,
    backends: Ids,
    regions: SlotAllocator,
    frontends: Room,
    frontends6: Room,
    next_generation: u32,
    /// Backends that left a service which is connected to by UDP, each with the service and the frontends
    /// that led there; the service has no name where it isn't known any more.
    left_udp: HashMap<(Arc<str>, SocketAddr), BTreeSet<FrontendKey>>,
    /// The services that former maps serve, in the place of which these are to be used, each with its
    /// frontends there: they come first where room is short.
    served: Served,
    /// Services with frontends in [`Held::given_up`].
    suspended: BTreeSet<Arc<str>>,
    /// UDP frontends that a service gave up, each with a backend that it kept.
    given_up_udp: HashSet<(SocketAddr, SocketAddr)>,
}

/// How full a hash is.
#[derive(Clone, Copy, Debug)]
struct Room {
    map: &'static str,
    used: u32,
    capacity: u32,
}

impl<M: Maps> Reconciler<M> {
    /// A reconciler for empty maps. The generations of backends begin at `first_generation`: a
    /// random number, because sockets may remember those of other maps of this boot.
    pub fn new(maps: M, sizes: &Sizes, first_generation: u32) -> Reconciler<M> {
        let room = |map, capacity| Room { map, used: 0, capacity };
        Reconciler {
            maps,
            seen: OrdMap::new(),
            behind: BTreeSet::new(),
            held: BTreeMap::new(),
            owners: HashMap::new(),
            stale: Vec::new(),
            resting: Resting::default(),
            services: Ids::new(sizes.services),
            backends: Ids::new(sizes.backends),
            regions: SlotAllocator::new(sizes.slots),
            frontends: room("FRONTENDS", sizes.frontends),
            frontends6: room("FRONTENDS6", sizes.frontends6),
            next_generation: first_generation.max(1),
            left_udp: HashMap::new(),
            served: Served::new(),
            suspended: BTreeSet::new(),
            given_up_udp: HashSet::new(),
        }
    }

    /// The maps.
    pub fn maps_mut(&mut self) -> &mut M {
        &mut self.maps
    }

    /// Brings the maps to `table`. Returns the services that couldn't be brought there, each with
    /// the reason; the next call tries them again.
    ///
    /// Additions and changes come before removals, so that a service that is renamed or moved is
    /// never missing under both names.
    pub fn apply(&mut self, table: &Table) -> BTreeMap<Arc<str>, ApplyError> {
        let mut errors = BTreeMap::new();
        let Diff { changed, gone } = self.seen.diff(&table.services);
        // Should this stop half-way, the next call begins with all of these.
        self.behind.extend(changed.iter().map(|(name, _)| Arc::clone(name)));
        self.behind.extend(gone.iter().map(|(name, _)| Arc::clone(name)));
        self.seen = table.services.clone();
        let (mut changed, mut gone) = (Vec::new(), Vec::new());
        for name in &self.behind {
            match table.services.get(name) {
                Some(service) => changed.push(service),
                None => gone.push(name.clone()),
            }
        }
        if !self.served.is_empty() {
            changed.sort_by_key(|service| !self.served.contains_key(&service.name));
        }
        // Before the first `put`, which may give one of those frontends to another service.
        for service in &changed {
            self.suspend_flows(service);
        }
        for service in changed {
            if let Err(error) = self.put(service) {
                errors.insert(service.name.clone(), error);
            }
        }
        self.remove_stale(&mut errors);
        for name in gone {
            if let Err(error) = self.remove(&name) {
                errors.insert(name, error);
            }
        }
        if !self.resting.is_empty() {
            self.retry_what_lacked_room(table, &mut errors);
        }
        self.resume_flows(&errors);
        self.behind = errors.keys().cloned().collect();
        errors
    }

    /// Where a service is about to give up a UDP frontend, takes the generation from its backends:
    /// a socket that remembers one of them has its next datagram chosen anew, by whatever the
    /// frontend leads to then.
    fn suspend_flows(&mut self, service: &Service) {
        let Some(held) = self.held.get_mut(&service.name) else { return };
        let wanted = frontends(service, 0);
        let is_given_up = |frontend: &&FrontendKey| {
            frontend.protocol == IPPROTO_UDP && !wanted.contains_key(frontend)
        };
        let given_up: Vec<_> = held.frontends.keys().filter(is_given_up).copied().collect();
        let is_suspended = !held.given_up.is_empty();
        // What couldn't be removed and is wanted again isn't given up any more.
        held.given_up.retain(|frontend| !wanted.contains_key(frontend));
        if given_up.is_empty() {
            return;
        }
        if !is_suspended {
            held.backends.values().for_each(|&idx| self.maps.retire_backend(idx));
        }
        let new = given_up.into_iter().filter(|frontend| !held.given_up.contains(frontend));
        held.given_up.extend(new.collect::<Vec<_>>());
        self.suspended.insert(service.name.clone());
    }

    /// Gives generations to the backends of services whose UDP frontends are gone by now: once no
    /// program is left that found one of them before.
    fn resume_flows(&mut self, errors: &BTreeMap<Arc<str>, ApplyError>) {
        let is_unchanged = |name: &Arc<str>| errors.get(name).is_some_and(ApplyError::keeps_former);
        let (mut resumed, mut must_wait) = (Vec::new(), false);
        for name in &self.suspended {
            let Some(held) = self.held.get(name) else {
                resumed.push(name.clone());
                continue;
            };
            let n_left =
                held.given_up.iter().filter(|key| held.frontends.contains_key(key)).count();
            if n_left == 0 || is_unchanged(name) {
                must_wait |= n_left < held.given_up.len();
                resumed.push(name.clone());
            }
        }
        if must_wait {
            // What rests may be freed by the same wait.
            self.resting.frontends = true;
            self.recycle();
        }
        for name in resumed {
            self.suspended.remove(&name);
            let Some(held) = self.held.get_mut(&name) else { continue };
            for &backend_idx in held.backends.values() {
                self.maps.renew_backend(backend_idx, self.next_generation);
                self.next_generation = next(self.next_generation);
            }
            let frontends = &held.frontends;
            for frontend in held.given_up.drain(..).filter(|key| !frontends.contains_key(key)) {
                held.udp.remove(&frontend);
                let backends = held.backends.keys();
                self.given_up_udp.extend(backends.map(|&backend| (shown(&frontend), backend)));
            }
        }
    }

    /// Removes the frontends that services have no more: after all insertions, of which each would
    /// wait for the readers of what was deleted before.
    fn remove_stale(&mut self, errors: &mut BTreeMap<Arc<str>, ApplyError>) {
        for (name, stale) in std::mem::take(&mut self.stale) {
            let is_own = |key: &FrontendKey| self.owners.get(key) == Some(&name);
            let stale: Vec<FrontendKey> = stale.into_iter().filter(is_own).collect();
            if let Err(error) = self.remove_frontends(&name, &stale) {
                // The next table tries again.
                errors.insert(name, error);
            }
        }
    }

    /// What other services gave up may be the room that these lacked.
    fn retry_what_lacked_room(
        &mut self,
        table: &Table,
        errors: &mut BTreeMap<Arc<str>, ApplyError>,
    ) {
        let lacked_room = |error: &ApplyError| matches!(error, ApplyError::Full { .. });
        let retried: Vec<&Arc<Service>> = errors
            .iter()
            .filter(|(_, error)| lacked_room(error))
            .filter_map(|(name, _)| table.services.get(name))
            .collect();
        for service in retried {
            match self.put(service) {
                Ok(()) => drop(errors.remove(&service.name)),
                Err(error) => drop(errors.insert(service.name.clone(), error)),
            }
        }
        self.remove_stale(errors);
    }

    /// What, since the last call, left a service which is connected to by UDP, and has not come back to
    /// it.
    pub fn take_left_udp(&mut self) -> LeftUdp {
        let is_back = |name: &Arc<str>, address: &SocketAddr| {
            self.held.get(name).is_some_and(|held| held.backends.contains_key(address))
        };
        let mut left_udp = LeftUdp { frontends: self.given_up_udp.clone(), ..LeftUdp::default() };
        for ((name, backend), frontends) in &self.left_udp {
            if name.is_empty() {
                left_udp.backends.insert(*backend);
            } else if !is_back(name, backend) {
                let frontends = frontends.iter().map(|frontend| (shown(frontend), *backend));
                left_udp.frontends.extend(frontends);
            }
        }
        self.given_up_udp.clear();
        self.left_udp.clear();
        left_udp
    }

    /// The indices of a service that is in the maps.
    pub fn indices(&self, name: &str) -> Option<Indices> {
        let held = self.held.get(name)?;
        Some(Indices { service: held.service_idx, backends: held.backends.clone() })
    }

    /// The index of each service that is in the maps.
    pub fn service_indices(&self) -> impl Iterator<Item = (&Arc<str>, u32)> {
        self.held.iter().map(|(name, held)| (name, held.service_idx))
    }

    /// The services that the maps hold, each with the addresses of its frontends.
    pub fn names(&self) -> impl Iterator<Item = (&Arc<str>, impl Iterator<Item = IpAddr>)> {
        self.held.iter().map(|(name, held)| {
            let vips = held.frontends.iter().filter(|(_, target)| target.host_only == 0);
            (name, vips.map(|(frontend, _)| frontend.address))
        })
    }

    /// The services that the maps hold, each with its index.
    pub fn services(&self) -> impl Iterator<Item = (&Arc<str>, u32)> {
        self.held.iter().map(|(name, held)| (name, held.service_idx))
    }

    /// The services that have backends in the maps, each with its frontends.
    pub fn served(&self) -> Served {
        let serving = self.held.iter().filter(|(_, held)| !held.backends.is_empty());
        let frontends = |held: &Held| held.frontends.keys().copied().collect();
        serving.map(|(name, held)| (name.clone(), frontends(held))).collect()
    }

    /// Puts these services before others, until [`Reconciler::forget_served`]: former maps, which
    /// these are to replace, serve them.
    pub fn prefer_served(&mut self, served: Served) {
        self.served = served;
    }

    /// Those of the services in `errors` that the former maps serve and these wouldn't: `table` wants a
    /// frontend which leads to the service there, and to nothing here. What these hold of a service
    /// may be behind the table all the same.
    pub fn unserved<'a>(
        &self,
        table: &Table,
        errors: &'a BTreeMap<Arc<str>, ApplyError>,
    ) -> BTreeMap<&'a Arc<str>, &'a ApplyError> {
        let is_unserved = |name: &Arc<str>| {
            let (Some(served), Some(service)) = (self.served.get(name), table.services.get(name))
            else {
                return false;
            };
            let held = self.held.get(name);
            let is_here = |frontend| held.is_some_and(|held| held.frontends.contains_key(frontend));
            frontends(service, 0).keys().any(|key| served.contains(key) && !is_here(key))
        };
        errors.iter().filter(|(name, _)| is_unserved(name)).collect()
    }

    /// Forgets which services former maps served: these are used now.
    pub fn forget_served(&mut self) {
        self.served.clear();
    }

    /// How many entries of each map are in use.
    pub fn in_use(&self) -> Sizes {
        Sizes {
            services: self.services.used(),
            frontends: self.frontends.used,
            frontends6: self.frontends6.used,
            slots: self.regions.used(),
            backends: self.backends.used(),
        }
    }

    /// How full each map is.
    pub fn pressure(&self) -> Vec<(&'static str, Pressure)> {
        let ids = |ids: &Ids| Pressure { used: ids.used(), capacity: ids.capacity() };
        let hash = |room: &Room| (room.map, Pressure { used: room.used, capacity: room.capacity });
        let slots = Pressure { used: self.regions.used(), capacity: self.regions.capacity() };
        vec![
            hash(&self.frontends),
            hash(&self.frontends6),
            ("SERVICES", ids(&self.services)),
            ("SLOTS", slots),
            ("BACKENDS", ids(&self.backends)),
        ]
    }

    /// Adds or changes one service.
    fn put(&mut self, service: &Service) -> Result<(), ApplyError> {
        // A catalog may have many times the services that there is room for.
        let has_none_left = self.services.available() == 0 && self.resting.services.is_empty();
        if has_none_left && !self.held.contains_key(&service.name) {
            return Err(self.no_service_left());
        }
        let healthy: Vec<Healthy> = service
            .healthy()
            .filter_map(|backend| {
                let &crate::table::Backend { weight, host_only, .. } = backend;
                // A service has one group so far.
                Some(Healthy { address: backend.address?, weight, host_only, group: 0 })
            })
            .collect();
        if healthy.len() > MAX_SERVICE_BACKENDS as usize {
            return Err(ApplyError::TooManyBackends { n_backends: healthy.len() });
        }
        let choices = Choices::of(&healthy);

        // All that can be short is taken before anything is written, so that a failure leaves the
        // former state whole.
        let n_fresh = self.count_fresh(&service.name, &healthy);
        if self.backends.available() < n_fresh {
            self.recycle();
        }
        if self.backends.available() < n_fresh {
            return Err(full("BACKENDS", self.backends.capacity(), "datapath.max_backends"));
        }
        self.check_room_for_frontends(service)?;
        let service_idx = match self.held.get(&service.name) {
            Some(held) => held.service_idx,
            None => self.new_service()?,
        };
        let blocks = match self.take_blocks(&choices) {
            Ok(blocks) => blocks,
            Err(error) => {
                if !self.held.contains_key(&service.name) {
                    self.services.give_back(service_idx);
                }
                return Err(error);
            }
        };

        let held = self.held.entry(service.name.clone()).or_insert_with(|| {
            self.maps.set_name(service_idx, name_entry(&service.name));
            Held::new(service_idx)
        });
        let former_watch = held.watch.take();
        for &Healthy { address, .. } in &healthy {
            if !held.backends.contains_key(&address)
                && let Some(backend_idx) = self.backends.take()
            {
                let is_suspended = !held.given_up.is_empty();
                let generation = if is_suspended { 0 } else { self.next_generation };
                let backend = backend_entry(address, generation);
                self.next_generation = next(self.next_generation);
                self.maps.write_backend(backend_idx, backend);
                held.backends.insert(address, backend_idx);
            }
        }
        let mut regions = Vec::new();
        for (block, members) in blocks.iter().zip(&choices.distinct) {
            let weights: Vec<(u32, u16)> = members
                .iter()
                .map(|&member| &healthy[member])
                .map(|backend| (held.backends[&backend.address], backend.weight))
                .collect();
            self.maps.write_slots(block.first_slot, &alias_table(&weights));
            let n_slots = members.len() as u32;
            regions.push(SlotRange { first_slot: block.first_slot, n_slots });
        }
        self.maps.publish(service_idx, choices.groups(&regions));
        // A service that stays cold was asked for already: one report is enough.
        if former_watch != Some(service.watch) {
            self.maps.request_event(service_idx, service.watch == Watch::Cold);
        }

        self.resting.blocks.extend(std::mem::replace(&mut held.blocks, blocks));
        let stay: HashSet<SocketAddr> = healthy.iter().map(|backend| backend.address).collect();
        for (address, backend_idx) in held.backends.extract_if(|address, _| !stay.contains(address))
        {
            self.maps.retire_backend(backend_idx);
            self.resting.backends.push(backend_idx);
            if !held.udp.is_empty() {
                let left = self.left_udp.entry((service.name.clone(), address)).or_default();
                left.extend(&held.udp);
            }
        }

        self.put_frontends(service, service_idx)?;
        if let Some(held) = self.held.get_mut(&service.name) {
            held.watch = Some(service.watch);
        }
        Ok(())
    }

    /// The number of backends that have no entry yet.
    fn count_fresh(&self, name: &str, healthy: &[Healthy]) -> u32 {
        let held = self.held.get(name);
        let fresh: HashSet<SocketAddr> = healthy
            .iter()
            .map(|backend| backend.address)
            .filter(|address| !held.is_some_and(|held| held.backends.contains_key(address)))
            .collect();
        fresh.len() as u32
    }

    fn room(&mut self, frontend: &FrontendKey) -> &mut Room {
        if frontend.address.is_ipv4() { &mut self.frontends } else { &mut self.frontends6 }
    }

    fn check_room_for_frontends(&mut self, service: &Service) -> Result<(), ApplyError> {
        let fresh: Vec<FrontendKey> = frontends(service, 0)
            .into_keys()
            .filter(|frontend| !self.owners.contains_key(frontend))
            .collect();
        for room in [self.frontends, self.frontends6] {
            let is_ipv4 = room.map == self.frontends.map;
            let n_fresh = fresh.iter().filter(|fresh| fresh.address.is_ipv4() == is_ipv4).count();
            if room.used + n_fresh as u32 > room.capacity {
                return Err(full(room.map, room.capacity, "datapath.max_services"));
            }
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
        for (frontend, target) in fresh {
            self.maps
                .insert_frontend(frontend, target)
                .map_err(|source| ApplyError::Frontend { address: shown(&frontend), source })?;
            if let Some(held) = self.held.get_mut(&service.name) {
                held.insert_frontend(frontend, target);
            }
            match self.owners.insert(frontend, service.name.clone()) {
                None => self.room(&frontend).used += 1,
                // It moved here, such as a pin that the configuration gives to another service now.
                Some(former) => {
                    self.resting.frontends = true;
                    if let Some(former) = self.held.get_mut(&former) {
                        former.frontends.remove(&frontend);
                    }
                }
            }
        }
        if !stale.is_empty() {
            self.stale.push((service.name.clone(), stale));
        }
        Ok(())
    }

    fn remove_frontends(&mut self, name: &str, stale: &[FrontendKey]) -> Result<(), ApplyError> {
        for frontend in stale {
            self.maps
                .remove_frontend(frontend)
                .map_err(|source| ApplyError::Frontend { address: shown(frontend), source })?;
            self.resting.frontends = true;
            self.room(frontend).used -= 1;
            self.owners.remove(frontend);
            if let Some(held) = self.held.get_mut(name) {
                held.frontends.remove(frontend);
            }
        }
        Ok(())
    }

    fn remove(&mut self, name: &str) -> Result<(), ApplyError> {
        let Some(held) = self.held.get_mut(name) else { return Ok(()) };
        held.watch = None;
        self.maps.publish(held.service_idx, Groups::default());
        let name = Arc::<str>::from(name);
        for (address, backend_idx) in held.backends.drain() {
            self.maps.retire_backend(backend_idx);
            self.resting.backends.push(backend_idx);
            if !held.udp.is_empty() {
                self.left_udp.entry((name.clone(), address)).or_default().extend(&held.udp);
            }
        }
        self.resting.blocks.append(&mut held.blocks);
        let frontends: Vec<FrontendKey> = held.frontends.keys().copied().collect();
        self.remove_frontends(&name, &frontends)?;
        if let Some(held) = self.held.remove(&name) {
            self.resting.services.push(held.service_idx);
        }
        Ok(())
    }

    fn new_service(&mut self) -> Result<u32, ApplyError> {
        if self.services.available() == 0 {
            self.recycle();
        }
        self.services.take().ok_or_else(|| self.no_service_left())
    }

    fn no_service_left(&self) -> ApplyError {
        full("SERVICES", self.services.capacity(), "datapath.max_services")
    }

    /// Takes a block for each distinct choice: all of them, or none.
    fn take_blocks(&mut self, choices: &Choices) -> Result<Vec<Block>, ApplyError> {
        let mut blocks = Vec::new();
        for members in &choices.distinct {
            let n_slots = members.len() as u32;
            let block = self.regions.take(n_slots).or_else(|| {
                self.recycle();
                self.regions.take(n_slots)
            });
            match block {
                Some(block) => blocks.push(block),
                None => {
                    blocks.into_iter().for_each(|block| self.regions.give_back(block));
                    return Err(full("SLOTS", self.regions.capacity(), "datapath.max_backends"));
                }
            }
        }
        Ok(blocks)
    }

    /// Frees all that rests, once no reader is left that may have found it.
    pub fn recycle(&mut self) {
        if self.resting.is_empty() {
            return;
        }
        self.maps.synchronize_rcu();
        let Resting { services, backends, blocks, frontends: _ } =
            std::mem::take(&mut self.resting);
        services.into_iter().for_each(|service_idx| self.services.give_back(service_idx));
        backends.into_iter().for_each(|backend_idx| self.backends.give_back(backend_idx));
        blocks.into_iter().for_each(|block| self.regions.give_back(block));
    }
}

/// What each kind of connection chooses from, as positions in the list of healthy backends. Kinds that
/// choose from the same ones share them.
struct Choices {
    distinct: Vec<Vec<usize>>,
    /// For each range of each group, in the order of [`Group::ranges`], which of `distinct` it is.
    which: [[Option<usize>; Group::N_RANGES]; N_GROUPS],
}

impl Choices {
    fn of(healthy: &[Healthy]) -> Choices {
        let mut choices = Choices { distinct: Vec::new(), which: Default::default() };
        let scopes = [true, false];
        let reaches: [fn(&Healthy) -> bool; 3] =
            [|backend| backend.address.is_ipv4(), |backend| backend.address.is_ipv6(), |_| true];
        let kinds: Vec<_> = scopes
            .iter()
            .flat_map(|host| reaches.iter().map(move |reach| (*host, reach)))
            .collect();
        for (group, ranges) in choices.which.iter_mut().enumerate() {
            for (which, &(from_host, reaches)) in ranges.iter_mut().zip(&kinds) {
                let is_member = |backend: &Healthy| {
                    backend.group == group && (from_host || !backend.host_only) && reaches(backend)
                };
                let members = (0..).zip(healthy).filter(|(_, backend)| is_member(backend));
                let members: Vec<usize> = members.map(|(position, _)| position).collect();
                if members.is_empty() {
                    continue;
                }
                let same = choices.distinct.iter().position(|other| *other == members);
                *which = same.or_else(|| {
                    choices.distinct.push(members);
                    Some(choices.distinct.len() - 1)
                });
            }
        }
        choices
    }

    /// The service's groups, where `ranges` are those of `distinct`.
    fn groups(&self, ranges: &[SlotRange]) -> Groups {
        let range = |which: Option<usize>| which.map(|which| ranges[which]).unwrap_or_default();
        self.which.map(|which| Group::of(which.map(range)))
    }
}

fn full(map: &'static str, capacity: u32, key: &'static str) -> ApplyError {
    ApplyError::Full { map, capacity, key }
}

fn frontends(service: &Service, service_idx: u32) -> BTreeMap<FrontendKey, ServiceRef> {
    let protocols = [
        service.protocols.tcp().then_some(IPPROTO_TCP),
        service.protocols.udp().then_some(IPPROTO_UDP),
    ];
    let ports: &[u16] = match &service.ports {
        Ports::Any => &[ANY_PORT],
        Ports::Only(ports) => ports,
    };
    let vips = std::iter::once(IpAddr::V4(service.vip)).chain(service.vip6.map(IpAddr::V6));
    let at_vips = vips.flat_map(|vip| ports.iter().map(move |&port| (vip, port, 0)));
    let at_pin = service.pin.map(|pin| (IpAddr::V4(*pin.ip()), pin.port(), 1));
    at_vips
        .chain(at_pin)
        .flat_map(|(address, port, host_only)| {
            protocols.into_iter().flatten().map(move |protocol| {
                let frontend = FrontendKey { address, port, protocol };
                (frontend, ServiceRef { service: service_idx, host_only })
            })
        })
        .collect()
}

/// The generation after this one. 0 is none.
fn next(generation: u32) -> u32 {
    generation.checked_add(1).unwrap_or(1)
}

fn shown(frontend: &FrontendKey) -> SocketAddr {
    SocketAddr::new(frontend.address, frontend.port)
}

fn backend_entry(address: SocketAddr, generation: u32) -> Backend {
    let octets = match address.ip() {
        IpAddr::V4(ip) => Address::v4(ip.octets()),
        IpAddr::V6(ip) => Address { octets: ip.octets() },
    };
    Backend { address: octets, port: address.port(), padding: 0, generation }
}

/// A name has 63 octets at most, so that one zero at least ends it.
fn name_entry(name: &str) -> ServiceName {
    let mut octets = [0; 64];
    for (to, from) in octets.iter_mut().zip(name.bytes().take(63)) {
        *to = from;
    }
    ServiceName { octets }
}

#[cfg(test)]
#[path = "reconcile_tests.rs"]
mod tests;

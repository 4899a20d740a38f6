//! The reconciler: updates the maps to a table.
//!
//! A service's new backends and slots are written where no program reads, then one store publishes
//! them. Replaced slots, entries and indices stay in [`Reconciler::quarantine`] for an RCU grace
//! period, that is until every program that may have read them has ended; only then are they reused.
//! The wait is deferred until they are needed, so an ordinary change never waits.

pub mod adopt;
mod slots;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use lb_common::{
    ANY_PORT, Address, Algorithm, Backend, Group, IPPROTO_TCP, IPPROTO_UDP, MAX_SERVICE_BACKENDS,
    ServiceFlags, ServiceName, ServiceRef, expected_service,
};

use super::buddy::{Block, SlotAllocator};
use super::ids::Ids;
use super::map_specs::Sizes;
use super::maps::{FrontendKey, Maps, ServiceRanges};
use crate::config::BalanceAlgorithm;
use crate::ordmap::{Diff, OrdMap};
use crate::table::{Ports, Service, Table, Watch};
use slots::{Member, SlotTables};

/// Why the kernel doesn't have a service's present state.
///
/// If a map is full, nothing has changed, and the service's former state keeps serving. If the
/// kernel refused a frontend, the service's present backends serve at the frontends inserted so far,
/// and the next [`Reconciler::apply`] inserts the others.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    /// One service is larger than a region can be.
    #[error("it has {n_backends} backends; a service can have {MAX_SERVICE_BACKENDS}")]
    TooManyBackends {
        /// The number of backends.
        n_backends: usize,
    },
    /// A map is full.
    #[error("{map} is full ({capacity} entries): raise {key} in the configuration and restart")]
    Full {
        /// The map.
        map: &'static str,
        /// Its number of entries.
        capacity: u32,
        /// The key of the configuration that sets its size.
        key: &'static str,
    },
    /// The kernel refused a change.
    #[error("the kernel refused frontend {address}: {source}; it is tried again every second")]
    Frontend {
        /// The frontend.
        address: SocketAddr,
        /// The kernel's error.
        source: io::Error,
    },
}

impl ReconcileError {
    /// Whether applying the same table again may succeed. A full map stays full until another table
    /// removes something.
    pub fn is_transient(&self) -> bool {
        matches!(self, ReconcileError::Frontend { .. })
    }

    /// Whether the maps still have the service's former state.
    pub fn keeps_former(&self) -> bool {
        !self.is_transient()
    }
}

/// One service as the maps have it.
#[derive(Debug)]
struct Applied {
    /// The `watch` of the state that was applied last; `None` until a state is applied completely.
    watch: Option<Watch>,
    service_idx: u32,
    /// The algorithm that readers find.
    algorithm: Algorithm,
    backends: HashMap<SocketAddr, u32>,
    frontends: BTreeMap<FrontendKey, ServiceRef>,
    blocks: Vec<Block>,
    /// The UDP frontends through which sockets may be connected to its backends: its present ones, and
    /// removed ones until their sockets are disconnected.
    udp: BTreeSet<FrontendKey>,
    /// The UDP frontends about to be removed. While there are any, its backends have no generation, so
    /// each datagram is translated by the maps alone, and no socket caches a backend.
    given_up: Vec<FrontendKey>,
}

impl Applied {
    fn new(service_idx: u32, algorithm: Algorithm) -> Applied {
        Applied {
            watch: None,
            service_idx,
            algorithm,
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

/// Where connected UDP sockets may still be connected to, and new connections aren't.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RemovedUdp {
    /// Backends of a service that isn't known any more.
    pub backends: HashSet<SocketAddr>,
    /// Former pairs of frontend and backend: the backend left the service, or the service lost the
    /// frontend. Port 0 stands for all ports, except those in `kept`.
    pub frontends: HashSet<(SocketAddr, SocketAddr)>,
    /// Pairs with a port that a service has that had any port.
    pub kept: HashSet<(SocketAddr, SocketAddr)>,
}

impl RemovedUdp {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.backends.is_empty() && self.frontends.is_empty()
    }
}

/// Services that have backends in some maps, each with its frontends there.
pub type Served = HashMap<Arc<str>, HashSet<FrontendKey>>;

/// Unused entries that a program may still read.
#[derive(Debug, Default)]
struct Quarantine {
    services: Vec<u32>,
    backends: Vec<u32>,
    blocks: Vec<Block>,
    /// Whether frontends were deleted: the kernel reuses a hash map's elements at once.
    frontends: bool,
}

impl Quarantine {
    fn is_empty(&self) -> bool {
        let Quarantine { services, backends, blocks, frontends } = self;
        services.is_empty() && backends.is_empty() && blocks.is_empty() && !frontends
    }
}

/// How full a map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pressure {
    /// Entries in use, including those in quarantine.
    pub used: u32,
    /// Its number of entries.
    pub capacity: u32,
}

/// The indices of a service and its backends in the kernel's maps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Indices {
    /// The index into `SERVICES` and `SERVICE_STATS`.
    pub service: u32,
    /// The indices into `BACKENDS`.
    pub backends: HashMap<SocketAddr, u32>,
}

/// Backends, each with its index into `BACKENDS`.
pub type BackendIndices = Vec<(SocketAddr, u32)>;

/// Updates the maps to each table.
#[derive(Debug)]
pub struct Reconciler<M> {
    maps: M,
    /// The services of the table that was applied last.
    seen: OrdMap<Arc<str>, Arc<Service>>,
    /// Services to be applied again: they failed, or an earlier daemon's maps may differ.
    pending: BTreeSet<Arc<str>>,
    applied: BTreeMap<Arc<str>, Applied>,
    /// The service of each frontend.
    owners: HashMap<FrontendKey, Arc<str>>,
    /// Former frontends of services, while a table is applied.
    stale: Vec<(Arc<str>, Vec<FrontendKey>)>,
    quarantine: Quarantine,
    services: Ids,
    backends: Ids,
    regions: SlotAllocator,
    frontends: Room,
    frontends6: Room,
    next_generation: u32,
    /// Backends that left a service with UDP frontends, each with the service and those frontends; the
    /// service's name is empty if it isn't known any more.
    removed_udp: HashMap<(Arc<str>, SocketAddr), BTreeSet<FrontendKey>>,
    /// The services that the maps to be replaced serve, each with its frontends there: they come first
    /// if these maps are too small.
    served: Served,
    /// Services with frontends in [`Applied::given_up`].
    suspended: BTreeSet<Arc<str>>,
    /// Former UDP frontends of services, each with a backend that the service kept.
    given_up_udp: HashSet<(FrontendKey, SocketAddr)>,
    /// UDP frontends of services that had any port, each with a backend.
    kept_udp: HashSet<(SocketAddr, SocketAddr)>,
    /// The time in which a backend that is added beside established ones ramps up.
    slow_start: Option<Duration>,
    /// Backends that were added less than [`Reconciler::slow_start`] ago, each with when. The others are
    /// established. Those that ramp up have the same time in the maps.
    young: HashMap<u32, u32>,
    /// Services whose slots have Maglev tables by now, and whose readers don't use them yet.
    entering_maglev: BTreeSet<Arc<str>>,
    /// Whether backends got new generations since [`Reconciler::take_renewed`].
    has_renewed: bool,
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
            pending: BTreeSet::new(),
            applied: BTreeMap::new(),
            owners: HashMap::new(),
            stale: Vec::new(),
            quarantine: Quarantine::default(),
            services: Ids::new(sizes.services),
            backends: Ids::new(sizes.backends),
            regions: SlotAllocator::new(sizes.slots),
            frontends: room("FRONTENDS", sizes.frontends),
            frontends6: room("FRONTENDS6", sizes.frontends6),
            next_generation: first_generation.max(1),
            removed_udp: HashMap::new(),
            served: Served::new(),
            suspended: BTreeSet::new(),
            given_up_udp: HashSet::new(),
            kept_udp: HashSet::new(),
            slow_start: None,
            young: HashMap::new(),
            entering_maglev: BTreeSet::new(),
            has_renewed: false,
        }
    }

    /// The maps.
    pub fn maps_mut(&mut self) -> &mut M {
        &mut self.maps
    }

    /// Sets the time in which backends ramp up that are added from now on.
    pub fn set_slow_start(&mut self, slow_start: Option<Duration>) {
        self.slow_start = slow_start;
    }

    /// Updates the maps to `table`. Returns the services that failed, each with the reason; the next
    /// call retries them. `now_ms` is the low 32 bits of CLOCK_MONOTONIC in milliseconds.
    ///
    /// Additions and changes come before removals, so that a service that is renamed or moved is
    /// never missing under both names.
    pub fn apply(&mut self, table: &Table, now_ms: u32) -> BTreeMap<Arc<str>, ReconcileError> {
        let mut errors = BTreeMap::new();
        let Diff { changed, gone } = self.seen.diff(&table.services);
        // If this is interrupted, the next call begins with all of these.
        self.pending.extend(changed.iter().map(|(name, _)| Arc::clone(name)));
        self.pending.extend(gone.iter().map(|(name, _)| Arc::clone(name)));
        self.seen = table.services.clone();
        let (mut changed, mut gone) = (Vec::new(), Vec::new());
        for name in &self.pending {
            match table.services.get(name) {
                Some(service) => changed.push(service),
                None => gone.push(name.clone()),
            }
        }
        if !self.served.is_empty() {
            changed.sort_by_key(|service| !self.served.contains_key(&service.name));
        }
        // Before the first `upsert`, which may move one of those frontends to another service.
        for service in &changed {
            self.suspend_flows(service);
        }
        self.leave_maglev(&changed);
        for service in changed {
            if let Err(error) = self.upsert(service, now_ms) {
                errors.insert(service.name.clone(), error);
            }
        }
        self.remove_stale(&mut errors);
        for name in gone {
            if let Err(error) = self.remove(&name) {
                errors.insert(name, error);
            }
        }
        if !self.quarantine.is_empty() {
            self.retry_full(table, &mut errors, now_ms);
        }
        self.enter_maglev();
        self.resume_flows(&errors);
        self.pending = errors.keys().cloned().collect();
        errors
    }

    /// If a service is about to lose a UDP frontend, clears its backends' generations: a socket that
    /// cached one of them has its next datagram translated again, by the frontend's entry then.
    fn suspend_flows(&mut self, service: &Service) {
        let Some(applied) = self.applied.get_mut(&service.name) else { return };
        let wanted = frontends(service, 0);
        let is_given_up = |frontend: &&FrontendKey| {
            frontend.protocol == IPPROTO_UDP && !wanted.contains_key(frontend)
        };
        let given_up: Vec<_> = applied.frontends.keys().filter(is_given_up).copied().collect();
        let is_suspended = !applied.given_up.is_empty();
        // A frontend that couldn't be removed and is wanted again stays.
        applied.given_up.retain(|frontend| !wanted.contains_key(frontend));
        if given_up.is_empty() {
            return;
        }
        if !is_suspended {
            applied.backends.values().for_each(|&idx| self.maps.retire_backend(idx));
        }
        let new = given_up.into_iter().filter(|frontend| !applied.given_up.contains(frontend));
        applied.given_up.extend(new.collect::<Vec<_>>());
        self.suspended.insert(service.name.clone());
    }

    /// Has readers use no Maglev tables any more where a service is about to have none: before its slots
    /// change, and a grace period later, because a reader may know the algorithm already.
    fn leave_maglev(&mut self, changed: &[&Arc<Service>]) {
        let mut must_wait = false;
        for service in changed {
            let algorithm = number(service.algorithm);
            let Some(applied) = self.applied.get_mut(&service.name) else { continue };
            if applied.algorithm == Algorithm::Maglev && algorithm != Algorithm::Maglev {
                self.maps.set_flags(applied.service_idx, flags(service, algorithm));
                applied.algorithm = algorithm;
                must_wait = true;
            }
        }
        if must_wait {
            self.wait_for_readers();
        }
    }

    /// Has readers use the Maglev tables of services that have some now: a grace period later, because a
    /// reader may know the former slots already.
    fn enter_maglev(&mut self) {
        let entering = std::mem::take(&mut self.entering_maglev);
        if entering.is_empty() {
            return;
        }
        self.wait_for_readers();
        for name in entering {
            let service = self.seen.get(&name);
            if let (Some(applied), Some(service)) = (self.applied.get_mut(&name), service) {
                self.maps.set_flags(applied.service_idx, flags(service, Algorithm::Maglev));
                applied.algorithm = Algorithm::Maglev;
            }
        }
    }

    /// Ends the ramps that are over. `now_ms` is as in [`Reconciler::apply`].
    pub fn end_ramps(&mut self, now_ms: u32) {
        let slow_start_ms = self.slow_start.map_or(0, |slow_start| slow_start.as_millis());
        // A time that is yet to come is of another boot's clock, or 49 days old.
        let is_over = |added_ms: u32| {
            let age_ms = now_ms.wrapping_sub(added_ms).cast_signed();
            u128::try_from(age_ms).is_ok_and(|age_ms| age_ms >= slow_start_ms) || age_ms < 0
        };
        for (backend_idx, _) in self.young.extract_if(|_, added_ms| is_over(*added_ms)) {
            end_ramp(&mut self.maps, backend_idx);
        }
    }

    /// Sets the generations of backends again once the service's former UDP frontends are removed and
    /// a grace period is over.
    fn resume_flows(&mut self, errors: &BTreeMap<Arc<str>, ReconcileError>) {
        let is_unchanged =
            |name: &Arc<str>| errors.get(name).is_some_and(ReconcileError::keeps_former);
        let (mut resumed, mut must_wait) = (Vec::new(), false);
        for name in &self.suspended {
            let Some(applied) = self.applied.get(name) else {
                resumed.push(name.clone());
                continue;
            };
            let n_left =
                applied.given_up.iter().filter(|key| applied.frontends.contains_key(key)).count();
            if n_left == 0 || is_unchanged(name) {
                must_wait |= n_left < applied.given_up.len();
                resumed.push(name.clone());
            }
        }
        if must_wait {
            // The same wait frees the quarantine.
            self.quarantine.frontends = true;
            self.recycle();
        }
        for name in resumed {
            self.suspended.remove(&name);
            let Some(applied) = self.applied.get_mut(&name) else { continue };
            for &backend_idx in applied.backends.values() {
                self.maps.renew_backend(backend_idx, self.next_generation);
                self.next_generation = next(self.next_generation);
                self.has_renewed = true;
            }
            let frontends = &applied.frontends;
            for frontend in applied.given_up.drain(..).filter(|key| !frontends.contains_key(key)) {
                applied.udp.remove(&frontend);
                let backends = applied.backends.keys();
                self.given_up_udp.extend(backends.map(|&backend| (frontend, backend)));
                let is_part = |key: &&FrontendKey| {
                    frontend.port == ANY_PORT
                        && (key.address, key.protocol) == (frontend.address, frontend.protocol)
                };
                for key in frontends.keys().filter(is_part) {
                    let backends = applied.backends.keys();
                    self.kept_udp.extend(backends.map(|&backend| (shown(key), backend)));
                }
            }
        }
    }

    /// Removes former frontends: after all insertions, because an insertion after a deletion waits for
    /// a grace period.
    fn remove_stale(&mut self, errors: &mut BTreeMap<Arc<str>, ReconcileError>) {
        for (name, stale) in std::mem::take(&mut self.stale) {
            let is_own = |key: &FrontendKey| self.owners.get(key) == Some(&name);
            let stale: Vec<FrontendKey> = stale.into_iter().filter(is_own).collect();
            if let Err(error) = self.remove_frontends(&name, &stale) {
                // The next table retries it.
                errors.insert(name, error);
            }
        }
    }

    /// Retries the services that found a map full: other services may have freed entries.
    fn retry_full(
        &mut self,
        table: &Table,
        errors: &mut BTreeMap<Arc<str>, ReconcileError>,
        now_ms: u32,
    ) {
        let retried: Vec<&Arc<Service>> = errors
            .iter()
            .filter(|(_, error)| matches!(error, ReconcileError::Full { .. }))
            .filter_map(|(name, _)| table.services.get(name))
            .collect();
        for service in retried {
            match self.upsert(service, now_ms) {
                Ok(()) => drop(errors.remove(&service.name)),
                Err(error) => drop(errors.insert(service.name.clone(), error)),
            }
        }
        self.remove_stale(errors);
    }

    /// Whether backends in the table got new generations since the last call: their open connections
    /// have to be counted.
    pub fn take_renewed(&mut self) -> bool {
        std::mem::take(&mut self.has_renewed)
    }

    /// Takes the UDP frontends and backends that were removed since the last call, unless such a frontend
    /// leads to the backend all the same.
    pub fn take_removed_udp(&mut self) -> RemovedUdp {
        let given_up = std::mem::take(&mut self.given_up_udp);
        let kept = std::mem::take(&mut self.kept_udp);
        let mut removed_udp = RemovedUdp { kept, ..RemovedUdp::default() };
        let mut pairs: Vec<(FrontendKey, SocketAddr)> = given_up.into_iter().collect();
        for ((name, backend), frontends) in std::mem::take(&mut self.removed_udp) {
            if name.is_empty() {
                removed_udp.backends.insert(backend);
            }
            pairs.extend(frontends.into_iter().map(|frontend| (frontend, backend)));
        }
        pairs.retain(|(frontend, backend)| !self.leads_to(*frontend, backend));
        removed_udp.frontends.extend(pairs.iter().map(|(key, backend)| (shown(key), *backend)));
        removed_udp
    }

    /// Whether connections to a frontend may get the backend: as those to its port, or else to any port.
    fn leads_to(&self, frontend: FrontendKey, backend: &SocketAddr) -> bool {
        let any_port = FrontendKey { port: ANY_PORT, ..frontend };
        let owner = self.owners.get(&frontend).or_else(|| self.owners.get(&any_port));
        let applied = owner.and_then(|name| self.applied.get(name));
        applied.is_some_and(|applied| applied.backends.contains_key(backend))
    }

    /// The indices of a service in the maps.
    pub fn indices(&self, name: &str) -> Option<Indices> {
        let applied = self.applied.get(name)?;
        Some(Indices { service: applied.service_idx, backends: applied.backends.clone() })
    }

    /// The index of each service that is in the maps, and its backends with theirs.
    pub fn all_indices(
        &self,
    ) -> impl Iterator<Item = (&Arc<str>, u32, impl Iterator<Item = (SocketAddr, u32)>)> {
        self.applied.iter().map(|(name, applied)| {
            let backends = applied.backends.iter().map(|(address, idx)| (*address, *idx));
            (name, applied.service_idx, backends)
        })
    }

    /// The services in the maps, each with the addresses of its frontends.
    pub fn names(&self) -> impl Iterator<Item = (&Arc<str>, impl Iterator<Item = IpAddr>)> {
        self.applied.iter().map(|(name, applied)| {
            let vips = applied.frontends.iter().filter(|(_, target)| target.host_only == 0);
            (name, vips.map(|(frontend, _)| frontend.address))
        })
    }

    /// The services in the maps, each with its index.
    pub fn service_indices(&self) -> impl Iterator<Item = (&Arc<str>, u32)> {
        self.applied.iter().map(|(name, applied)| (name, applied.service_idx))
    }

    /// The services that have backends in the maps, each with its frontends.
    pub fn served(&self) -> Served {
        let serving = self.applied.iter().filter(|(_, applied)| !applied.backends.is_empty());
        let frontends = |applied: &Applied| applied.frontends.keys().copied().collect();
        serving.map(|(name, applied)| (name.clone(), frontends(applied))).collect()
    }

    /// Applies these services before others until [`Reconciler::clear_served`]: the maps to be replaced
    /// serve them.
    pub fn prefer_served(&mut self, served: Served) {
        self.served = served;
    }

    /// The services in `errors` that the former maps serve and these wouldn't: `table` wants a frontend
    /// that is in those maps and not in these. These may still have an outdated state of a service.
    pub fn unserved<'a>(
        &self,
        table: &Table,
        errors: &'a BTreeMap<Arc<str>, ReconcileError>,
    ) -> BTreeMap<&'a Arc<str>, &'a ReconcileError> {
        let is_unserved = |name: &Arc<str>| {
            let (Some(served), Some(service)) = (self.served.get(name), table.services.get(name))
            else {
                return false;
            };
            let applied = self.applied.get(name);
            let is_here =
                |frontend| applied.is_some_and(|applied| applied.frontends.contains_key(frontend));
            frontends(service, 0).keys().any(|key| served.contains(key) && !is_here(key))
        };
        errors.iter().filter(|(name, _)| is_unserved(name)).collect()
    }

    /// Ends [`Reconciler::prefer_served`]: these maps are in use now.
    pub fn clear_served(&mut self) {
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
    fn upsert(&mut self, service: &Service, now_ms: u32) -> Result<(), ReconcileError> {
        // A catalog may have many times more services than the maps.
        let has_none_left = self.services.available() == 0 && self.quarantine.services.is_empty();
        if has_none_left && !self.applied.contains_key(&service.name) {
            return Err(self.services_full());
        }
        let members = Member::of(service);
        if members.len() > MAX_SERVICE_BACKENDS as usize {
            return Err(ReconcileError::TooManyBackends { n_backends: members.len() });
        }
        let algorithm = number(service.algorithm);
        let slot_tables = SlotTables::of(&members, algorithm == Algorithm::Maglev);

        // All entries are allocated before anything is written, so a failure leaves the former state
        // whole.
        let n_new = self.count_new_backends(&service.name, &members);
        if self.backends.available() < n_new {
            self.recycle();
        }
        if self.backends.available() < n_new {
            return Err(full("BACKENDS", self.backends.capacity(), "datapath.max_backends"));
        }
        self.check_room_for_frontends(service)?;
        let service_idx = match self.applied.get(&service.name) {
            Some(applied) => applied.service_idx,
            None => self.allocate_service(service)?,
        };
        let regions = match self.take_regions(&slot_tables) {
            Ok(regions) => regions,
            Err(error) => {
                if !self.applied.contains_key(&service.name) {
                    self.services.free(service_idx);
                }
                return Err(error);
            }
        };

        let applied = self.applied.entry(service.name.clone()).or_insert_with(|| {
            self.maps.set_name(service_idx, name_entry(&service.name));
            Applied::new(service_idx, algorithm)
        });
        let former_watch = applied.watch.take();
        let is_established = |member: &&Member| {
            let backend_idx = applied.backends.get(&member.address);
            backend_idx.is_some_and(|backend_idx| !self.young.contains_key(backend_idx))
        };
        // Connections choose within a group: where all of it are young, each of them has its share.
        let established: HashSet<usize> =
            members.iter().filter(is_established).filter_map(|member| member.group).collect();
        let is_ramped = self.slow_start.is_some() && algorithm != Algorithm::Maglev;
        for &Member { address, weight, group, .. } in &members {
            let is_beside = group.is_some_and(|group| established.contains(&group));
            if let Some(&backend_idx) = applied.backends.get(&address) {
                if self.maps.backend(backend_idx).weight != weight {
                    self.maps.set_weight(backend_idx, weight);
                }
                if !is_beside {
                    end_ramp(&mut self.maps, backend_idx);
                }
            } else if let Some(backend_idx) = self.backends.take() {
                let is_suspended = !applied.given_up.is_empty();
                let generation = if is_suspended { 0 } else { self.next_generation };
                let backend = backend_entry(address, weight, generation);
                self.next_generation = next(self.next_generation);
                let now_ms = now_ms.max(1);
                let added_ms = if is_ramped && is_beside { now_ms } else { 0 };
                self.maps.write_backend(backend_idx, backend, added_ms);
                applied.backends.insert(address, backend_idx);
                if self.slow_start.is_some() {
                    self.young.insert(backend_idx, now_ms);
                }
            }
        }
        let mut first_slots = Vec::new();
        for (blocks, slot_table) in regions.iter().zip(&slot_tables.distinct) {
            let first_slot = blocks.first().map(|block| block.first_slot).unwrap_or_default();
            let slots = slot_table.slots(&members, |address| applied.backends[&address]);
            self.maps.write_slots(first_slot, &slots);
            first_slots.push(first_slot);
        }
        // Also where it has no slots: a reader may still know those that it had before.
        let is_entering = algorithm == Algorithm::Maglev && applied.algorithm != algorithm;
        if is_entering {
            self.entering_maglev.insert(service.name.clone());
        }
        publish(&mut self.maps, service_idx, &slot_tables.ranges(&first_slots));
        // A service that stays cold has been reported already: one event is enough.
        let is_other = applied.algorithm != algorithm || former_watch != Some(service.watch);
        if is_other && !is_entering {
            self.maps.set_flags(service_idx, flags(service, algorithm));
            applied.algorithm = algorithm;
        }

        let blocks = regions.into_iter().flatten().collect();
        self.quarantine.blocks.extend(std::mem::replace(&mut applied.blocks, blocks));
        let stay: HashSet<SocketAddr> = members.iter().map(|member| member.address).collect();
        for (address, backend_idx) in
            applied.backends.extract_if(|address, _| !stay.contains(address))
        {
            self.maps.retire_backend(backend_idx);
            self.young.remove(&backend_idx);
            self.quarantine.backends.push(backend_idx);
            if !applied.udp.is_empty() {
                let left = self.removed_udp.entry((service.name.clone(), address)).or_default();
                left.extend(&applied.udp);
            }
        }

        self.upsert_frontends(service, service_idx)?;
        if let Some(applied) = self.applied.get_mut(&service.name) {
            applied.watch = Some(service.watch);
        }
        Ok(())
    }

    /// The number of backends that have no entry yet.
    fn count_new_backends(&self, name: &str, members: &[Member]) -> u32 {
        let applied = self.applied.get(name);
        let fresh: HashSet<SocketAddr> = members
            .iter()
            .map(|member| member.address)
            .filter(|address| {
                !applied.is_some_and(|applied| applied.backends.contains_key(address))
            })
            .collect();
        fresh.len() as u32
    }

    fn room(&mut self, frontend: &FrontendKey) -> &mut Room {
        if frontend.address.is_ipv4() { &mut self.frontends } else { &mut self.frontends6 }
    }

    fn check_room_for_frontends(&mut self, service: &Service) -> Result<(), ReconcileError> {
        let fresh: Vec<FrontendKey> = frontends(service, 0)
            .into_keys()
            .filter(|frontend| !self.owners.contains_key(frontend))
            .collect();
        for room in [self.frontends, self.frontends6] {
            let is_ipv4 = room.map == self.frontends.map;
            let n_new = fresh.iter().filter(|fresh| fresh.address.is_ipv4() == is_ipv4).count();
            if room.used + n_new as u32 > room.capacity {
                return Err(full(room.map, room.capacity, "datapath.max_services"));
            }
        }
        Ok(())
    }

    fn upsert_frontends(
        &mut self,
        service: &Service,
        service_idx: u32,
    ) -> Result<(), ReconcileError> {
        let wanted = frontends(service, service_idx);
        let Some(applied) = self.applied.get(&service.name) else { return Ok(()) };
        let stale: Vec<_> =
            applied.frontends.keys().filter(|key| !wanted.contains_key(key)).copied().collect();
        let fresh: Vec<_> = wanted
            .into_iter()
            .filter(|(frontend, _)| !applied.frontends.contains_key(frontend))
            .collect();
        if !fresh.is_empty() && self.quarantine.frontends {
            self.recycle();
        }
        for (frontend, target) in fresh {
            self.maps
                .insert_frontend(frontend, target)
                .map_err(|source| ReconcileError::Frontend { address: shown(&frontend), source })?;
            if let Some(applied) = self.applied.get_mut(&service.name) {
                applied.insert_frontend(frontend, target);
            }
            match self.owners.insert(frontend, service.name.clone()) {
                None => self.room(&frontend).used += 1,
                // It moved here, such as a pin that the configuration assigns to another service now.
                Some(former) => {
                    self.quarantine.frontends = true;
                    if let Some(former) = self.applied.get_mut(&former) {
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

    fn remove_frontends(
        &mut self,
        name: &str,
        stale: &[FrontendKey],
    ) -> Result<(), ReconcileError> {
        for frontend in stale {
            self.maps
                .remove_frontend(frontend)
                .map_err(|source| ReconcileError::Frontend { address: shown(frontend), source })?;
            self.quarantine.frontends = true;
            self.room(frontend).used -= 1;
            self.owners.remove(frontend);
            if let Some(applied) = self.applied.get_mut(name) {
                applied.frontends.remove(frontend);
            }
        }
        Ok(())
    }

    fn remove(&mut self, name: &str) -> Result<(), ReconcileError> {
        let Some(applied) = self.applied.get_mut(name) else { return Ok(()) };
        applied.watch = None;
        publish(&mut self.maps, applied.service_idx, &ServiceRanges::default());
        let name = Arc::<str>::from(name);
        for (address, backend_idx) in applied.backends.drain() {
            self.maps.retire_backend(backend_idx);
            self.young.remove(&backend_idx);
            self.quarantine.backends.push(backend_idx);
            if !applied.udp.is_empty() {
                self.removed_udp.entry((name.clone(), address)).or_default().extend(&applied.udp);
            }
        }
        self.quarantine.blocks.append(&mut applied.blocks);
        let frontends: Vec<FrontendKey> = applied.frontends.keys().copied().collect();
        self.remove_frontends(&name, &frontends)?;
        if let Some(applied) = self.applied.remove(&name) {
            self.quarantine.services.push(applied.service_idx);
        }
        Ok(())
    }

    fn allocate_service(&mut self, service: &Service) -> Result<u32, ReconcileError> {
        if self.services.available() == 0 {
            self.recycle();
        }
        let wanted = expected_service(service.vip.octets());
        self.services.take_at(wanted).ok_or_else(|| self.services_full())
    }

    fn services_full(&self) -> ReconcileError {
        full("SERVICES", self.services.capacity(), "datapath.max_services")
    }

    /// Allocates the blocks of each distinct slot table: all of them, or none.
    fn take_regions(
        &mut self,
        slot_tables: &SlotTables,
    ) -> Result<Vec<Vec<Block>>, ReconcileError> {
        let mut regions: Vec<Vec<Block>> = Vec::new();
        for slot_table in &slot_tables.distinct {
            let n_slots = slot_table.n_slots();
            let blocks = self.regions.take(n_slots).or_else(|| {
                self.recycle();
                self.regions.take(n_slots)
            });
            match blocks {
                Some(blocks) => regions.push(blocks),
                None => {
                    regions.into_iter().flatten().for_each(|block| self.regions.free(block));
                    return Err(full("SLOTS", self.regions.capacity(), "datapath.max_backends"));
                }
            }
        }
        Ok(regions)
    }

    /// Frees the quarantine after a grace period.
    pub fn recycle(&mut self) {
        if !self.quarantine.is_empty() {
            self.wait_for_readers();
        }
    }

    /// Waits for a grace period, which frees the quarantine.
    fn wait_for_readers(&mut self) {
        self.maps.synchronize_rcu();
        let Quarantine { services, backends, blocks, frontends: _ } =
            std::mem::take(&mut self.quarantine);
        services.into_iter().for_each(|service_idx| self.services.free(service_idx));
        backends.into_iter().for_each(|backend_idx| self.backends.free(backend_idx));
        blocks.into_iter().for_each(|block| self.regions.free(block));
    }
}

/// Ends the ramp of a backend, if it has one.
fn end_ramp(maps: &mut impl Maps, backend_idx: u32) {
    if maps.added_ms(backend_idx) != 0 {
        maps.end_ramp(backend_idx);
    }
}

/// Lets readers see a service's new ranges, one after the other.
///
/// A connection looks at the groups in order, so later ones are stored first, and what becomes empty
/// comes last: whichever of them a reader has looked at already, it finds the service's backends, former
/// or present ones. Only where backends move to an earlier group that was empty could it have passed
/// there before and find nothing where they were: then the emptying waits for such readers.
fn publish(maps: &mut impl Maps, service_idx: u32, ranges: &ServiceRanges) {
    let (former, present) = (maps.service(service_idx).all(), ranges.all());
    let is_empty = |nth: usize| present[nth].n_slots == 0;
    let changed = (0..ServiceRanges::N).rev().filter(|&nth| former[nth] != present[nth]);
    let (emptied, filled): (Vec<usize>, Vec<usize>) = changed.partition(|&nth| is_empty(nth));
    filled.into_iter().for_each(|nth| maps.store_range(service_idx, nth, present[nth]));
    // The positions of one kind of connection's ranges, in the order in which it looks at them.
    let n_grouped = ServiceRanges::N - 1;
    let moves_ahead = (0..Group::N_RANGES).any(|kind| {
        let mut nths = (kind..n_grouped).step_by(Group::N_RANGES);
        let first_former = nths.clone().find(|&nth| former[nth].n_slots != 0);
        let last_present = nths.rfind(|&nth| !is_empty(nth));
        first_former.zip(last_present).is_some_and(|(former, present)| present < former)
    });
    if moves_ahead {
        maps.synchronize_rcu();
    }
    emptied.into_iter().for_each(|nth| maps.store_range(service_idx, nth, present[nth]));
}

fn number(algorithm: BalanceAlgorithm) -> Algorithm {
    match algorithm {
        BalanceAlgorithm::Random => Algorithm::Random,
        BalanceAlgorithm::RoundRobin => Algorithm::RoundRobin,
        BalanceAlgorithm::Least => Algorithm::Least,
        BalanceAlgorithm::Latency => Algorithm::Latency,
        BalanceAlgorithm::Maglev => Algorithm::Maglev,
    }
}

fn flags(service: &Service, algorithm: Algorithm) -> ServiceFlags {
    let report_next = (service.watch == Watch::Cold).into();
    ServiceFlags { report_next, algorithm: algorithm as u32 }
}

fn full(map: &'static str, capacity: u32, key: &'static str) -> ReconcileError {
    ReconcileError::Full { map, capacity, key }
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
    let at_public = service.public.iter().map(|public| (public.ip(), public.port(), 0));
    at_vips
        .chain(at_pin)
        .chain(at_public)
        .flat_map(|(address, port, host_only)| {
            protocols.into_iter().flatten().map(move |protocol| {
                let frontend = FrontendKey { address, port, protocol };
                (frontend, ServiceRef { service: service_idx, host_only })
            })
        })
        .collect()
}

/// The next generation; 0 is none.
fn next(generation: u32) -> u32 {
    generation.checked_add(1).unwrap_or(1)
}

fn shown(frontend: &FrontendKey) -> SocketAddr {
    SocketAddr::new(frontend.address, frontend.port)
}

fn backend_entry(address: SocketAddr, weight: u16, generation: u32) -> Backend {
    let octets = match address.ip() {
        IpAddr::V4(ip) => Address::v4(ip.octets()),
        IpAddr::V6(ip) => Address { octets: ip.octets() },
    };
    Backend { address: octets, port: address.port(), weight, generation }
}

/// A name has at most 63 octets, so at least one zero ends it.
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

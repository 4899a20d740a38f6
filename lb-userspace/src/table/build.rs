//! From a catalog to the next table.

use std::cell::LazyCell;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{SocketAddr, SocketAddrV4};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use ipnet::IpNet;

use super::endpoints::Endpoints;
use super::first_contact::Contacts;
use super::index::CatalogIndex;
use super::keep::Keeps;
use super::merge::{MergedMeta, merge_meta};
use super::public::{ClaimRank, PublicClaims};
use super::validate::{Validation, check_name, validate};
use super::vips::{PoolExhausted, Pools, Vips};
use super::{
    Backend, BackendState, Catalog, Drain, DrainCatalog, DrainTarget, Drains, HealthStatus, Hosts,
    Instance, InstanceGroup, Ports, Protocols, PublicAddresses, Service, ServiceId, ServiceRecord,
    Table, Watch,
};
use crate::config::{BalanceAlgorithm, BalanceConfig, Preference, VipConfig};
use crate::ordmap::Diff;

/// Builds tables, each from a catalog and what the last one had.
#[derive(Debug)]
pub struct Builder {
    pools: Pools,
    ports: Ports,
    pins: BTreeMap<String, SocketAddrV4>,
    /// The networks that public addresses may come from.
    public: Vec<IpNet>,
    /// The public addresses that the configuration gives to services, by name in lower case.
    edge_vips: BTreeMap<String, SocketAddr>,
    claims: PublicClaims,
    balance: BalanceConfig,
    /// The algorithm that each service declared last in a way that could be read.
    algorithms: BTreeMap<Arc<str>, BalanceAlgorithm>,
    vips: Vips,
    /// The catalog that the last table was built from.
    seen: CatalogIndex,
    /// The results of resolving host names.
    hosts: Arc<Hosts>,
    /// What an operator has drained.
    drains: Arc<Drains>,
    /// The names that each service's instances have for addresses, where they have some.
    hostnames: BTreeMap<Arc<str>, Vec<String>>,
    /// Whether they changed since the last call of `take_hostnames`.
    has_new_hostnames: bool,
    /// The services to be built again whatever the catalog has, by name in lower case.
    revisit: BTreeSet<Arc<str>>,
    /// The names in lower case for which the pool has no address.
    exhausted: BTreeSet<Arc<str>>,
    waits: SharedWaits,
    /// When these are retried, unless an address becomes free before.
    retry_at: SystemTime,
    /// The services that the last call of `next` built.
    #[cfg(test)]
    n_built: usize,
}

/// What depends on time, for the builder, for what drives it, and for readers.
#[derive(Clone, Debug, Default)]
pub struct SharedWaits(Arc<Mutex<Waits>>);

/// What depends on time. The builder begins it, without a clock; the caller has the clock, and builds the
/// services again for which something has ended.
#[derive(Debug, Default)]
pub struct Waits {
    /// The instances that aren't proven.
    pub contacts: Contacts,
    /// The services that are kept though all their instances are critical.
    pub keeps: Keeps,
}

impl Waits {
    /// When something ends next, if no probe does before.
    pub fn next_wake(&self) -> Option<Instant> {
        self.contacts.next_wake().into_iter().chain(self.keeps.next_wake()).min()
    }
}

impl SharedWaits {
    /// Locks them; they are never locked for long. A panic while they are leaves them consistent, because
    /// every step does.
    pub fn lock(&self) -> MutexGuard<'_, Waits> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How often a name for which the pool had no address is tried again while other services change.
const RETRY: Duration = Duration::from_secs(60);

/// The next table, where it differs from the last one.
#[derive(Debug)]
pub struct NextTable {
    /// The table.
    pub table: Arc<Table>,
    /// Whether a name got an address: the VIPs have to be recorded before the table is published.
    pub vips_given: bool,
}

impl Builder {
    /// A builder that gives addresses by `vips`.
    pub fn new(config: &VipConfig, vips: Vips) -> Builder {
        Builder {
            pools: config.into(),
            ports: Ports::only(config.ports.iter().copied()),
            pins: config.pins.iter().map(|(name, pin)| (name.to_lowercase(), *pin)).collect(),
            public: config.public.clone(),
            edge_vips: BTreeMap::new(),
            claims: PublicClaims::default(),
            balance: BalanceConfig::default(),
            algorithms: BTreeMap::new(),
            vips,
            seen: CatalogIndex::default(),
            hosts: Arc::default(),
            drains: Arc::default(),
            hostnames: BTreeMap::new(),
            has_new_hostnames: false,
            revisit: BTreeSet::new(),
            exhausted: BTreeSet::new(),
            waits: SharedWaits::default(),
            retry_at: SystemTime::UNIX_EPOCH,
            #[cfg(test)]
            n_built: 0,
        }
    }

    /// Sets what these names stand for, and this host's bridges, from the next table on.
    pub fn set_hosts(&mut self, hosts: Arc<Hosts>) {
        let former = std::mem::replace(&mut self.hosts, hosts);
        if former.bridges != self.hosts.bridges {
            return self.revisit_all();
        }
        let differs = |name: &String| former.names.get(name) != self.hosts.names.get(name);
        let with_news = self.hostnames.iter().filter(|(_, names)| names.iter().any(differs));
        self.revisit.extend(with_news.map(|(service, _)| service.clone()));
    }

    /// Gives other ports to the services that name none, from the next table on.
    pub fn set_ports(&mut self, ports: &[u16]) {
        self.ports = Ports::only(ports.iter().copied());
        self.revisit_all();
    }

    /// Gives services public addresses, by name in lower case, from the next table on.
    pub fn set_edge_vips(&mut self, vips: BTreeMap<String, SocketAddr>) {
        let former = std::mem::replace(&mut self.edge_vips, vips);
        let names = former.keys().chain(self.edge_vips.keys());
        self.revisit.extend(names.map(|name| Arc::from(&**name)));
    }

    /// Has these services, by name in lower case, built again by the next table.
    pub fn revisit(&mut self, services: impl IntoIterator<Item = Arc<str>>) {
        self.revisit.extend(services);
    }

    /// What depends on time.
    pub fn waits(&self) -> &SharedWaits {
        &self.waits
    }

    /// Sets how long the last instances that served keep serving where all are critical, from the next
    /// table on; `None` for not at all.
    pub fn set_keep(&mut self, limit: Option<Duration>) {
        let mut waits = self.waits.lock();
        self.revisit.extend(waits.keeps.services().cloned());
        waits.keeps.set_limit(limit);
    }

    /// Sets what is drained, from the next table on, which builds every service.
    pub fn set_drains(&mut self, drains: Arc<Drains>) {
        self.drains = drains;
        self.revisit_all();
    }

    /// Sets what is drained, from the next table on, where that differs for one target only: `covered` are
    /// the services, by name in lower case, of which it covers an instance in `searched`. Nothing else is
    /// built again but what has changed since then.
    pub fn change_drains(
        &mut self,
        drains: Arc<Drains>,
        covered: BTreeSet<Arc<str>>,
        searched: &DrainCatalog,
    ) {
        self.drains = drains;
        self.revisit.extend(covered);
        let Diff { changed, .. } = searched.catalog.diff(self.seen.catalog());
        self.revisit.extend(changed.into_iter().map(|(id, _)| id.folded_name()));
        if !Arc::ptr_eq(&searched.hosts, &self.hosts) {
            self.revisit.extend(self.hostnames.keys().cloned());
        }
    }

    /// What can be drained, as of the last table.
    pub fn drain_catalog(&self) -> DrainCatalog {
        DrainCatalog { catalog: self.seen.catalog().clone(), hosts: self.hosts.clone() }
    }

    /// Sets how backends are chosen, from the next table on.
    pub fn set_balance(&mut self, balance: &BalanceConfig) {
        self.balance = balance.clone();
        self.revisit_all();
    }

    fn revisit_all(&mut self) {
        self.revisit.extend(self.seen.catalog().keys().map(ServiceId::folded_name));
    }

    /// As [`Vips::expire`].
    pub fn forget_vips(&mut self, now: SystemTime) {
        self.vips.expire(now);
    }

    /// The VIPs.
    pub fn vips(&self) -> &Vips {
        &self.vips
    }

    /// The table after `last`, which this builder made; `None` when nothing differs. What didn't change
    /// is shared with `last`: the cost of a change doesn't depend on the size of the catalog.
    pub fn next(&mut self, last: &Table, catalog: &Catalog, now: SystemTime) -> Option<NextTable> {
        let assigned_before = self.vips.assigned();
        let (changed, gone) = self.seen.replace(catalog.clone());
        let mut touched = std::mem::take(&mut self.revisit);
        if !self.exhausted.is_empty() && (!gone.is_empty() || now >= self.retry_at) {
            touched.append(&mut self.exhausted);
            self.retry_at = now + RETRY;
        }
        let mut table = Table { generation: last.generation + 1, ..last.clone() };
        let mut differs = !last.is_synced();
        for id in &gone {
            differs |= table.rejected.remove(&id.dns_name()).is_some();
        }
        touched.extend(changed.iter().chain(&gone).map(ServiceId::folded_name));
        #[cfg(test)]
        {
            self.n_built = touched.len();
        }
        for name in touched {
            differs |= self.build(&mut table, &name, last, now);
        }
        // Those that got or lost a public address by what the others declare. To build one again changes
        // no claim.
        for name in std::mem::take(&mut self.revisit) {
            differs |= self.build(&mut table, &name, last, now);
        }
        if !last.is_synced() {
            // Names of an earlier daemon that aren't in this catalog.
            let names: Vec<_> = self.vips.in_use().cloned().collect();
            for name in names.iter().filter(|name| !table.services.contains_key(*name)) {
                self.vips.release(name, now);
            }
            let mut waits = self.waits.lock();
            waits.contacts.retain_served(|name| table.services.contains_key(name));
        }
        let vips_given = self.vips.assigned() != assigned_before;
        differs.then(|| NextTable { table: Arc::new(table), vips_given })
    }

    /// The names that instances have for addresses, where they have changed since the last call; they
    /// can also when the table doesn't.
    pub fn take_hostnames(&mut self) -> Option<BTreeSet<String>> {
        std::mem::take(&mut self.has_new_hostnames)
            .then(|| self.hostnames.values().flatten().cloned().collect())
    }

    /// Builds the service of a name in lower case from all services of the catalog that DNS can't tell
    /// apart, and returns whether anything differs.
    fn build(&mut self, table: &mut Table, name: &Arc<str>, last: &Table, now: SystemTime) -> bool {
        let mut differs = false;
        let mut valid: Vec<ServiceId> = Vec::new();
        for id in self.seen.ids(name) {
            match check_name(&id.name) {
                Ok(()) => valid.push(id),
                Err(reason) => differs |= reject(table, &id, reason),
            }
        }
        let Some(first) = valid.first() else {
            return self.forget(table, name, now) || differs;
        };
        let former = last.services.get(name);
        match self.service(name, &valid, former, table.generation, now) {
            Ok(service) => {
                for id in &valid {
                    differs |= table.rejected.remove(&id.dns_name()).is_some();
                }
                if !former.is_some_and(|former| Arc::ptr_eq(former, &service)) {
                    table.insert(name.clone(), service);
                    differs = true;
                }
            }
            Err(exhausted) => {
                differs |= self.forget(table, name, now);
                differs |= reject(table, first, exhausted.to_string());
                self.exhausted.insert(name.clone());
            }
        }
        differs
    }

    /// Takes a name in lower case out, and returns whether it was a service.
    fn forget(&mut self, table: &mut Table, name: &Arc<str>, now: SystemTime) -> bool {
        self.has_new_hostnames |= self.hostnames.remove(name).is_some();
        let mut waits = self.waits.lock();
        waits.contacts.forget(name);
        waits.keeps.forget(name);
        drop(waits);
        self.algorithms.remove(name);
        self.revisit.extend(self.claims.set(name, BTreeMap::new()));
        self.vips.release(name, now);
        table.remove(name)
    }

    /// The catalog's instances of these names, which are one service, each once.
    fn record(&self, ids: &[ServiceId]) -> ServiceRecord {
        let mut records: Vec<&ServiceRecord> =
            ids.iter().filter_map(|id| self.seen.catalog().get(id)).collect();
        if let [record] = records[..] {
            return record.clone();
        }
        // A live record overrides a cold one of the same instance.
        records.sort_by_key(|record| record.watch == Watch::Live);
        let watch = records.last().map(|record| record.watch).unwrap_or_default();
        let instances = records.iter().flat_map(|record| record.instances());
        let by_key = instances.map(|instance| ((&instance.node, &instance.id), instance));
        let by_key: BTreeMap<_, _> = by_key.collect();
        ServiceRecord::new(by_key.into_values().cloned().collect(), watch)
    }

    fn service(
        &mut self,
        name: &Arc<str>,
        ids: &[ServiceId],
        former: Option<&Arc<Service>>,
        generation: u64,
        now: SystemTime,
    ) -> Result<Arc<Service>, PoolExhausted> {
        let vip = self.vips.assign(name, now)?;
        let record = self.record(ids);
        let MergedMeta { ports, protocols, algorithm, public, has_bad_algorithm, mut notes } =
            merge_meta(record.instances());
        let public = self.public(name, &record, public, &mut notes);
        match algorithm {
            Some(algorithm) => drop(self.algorithms.insert(name.clone(), algorithm)),
            None if has_bad_algorithm => {}
            None => drop(self.algorithms.remove(name)),
        }
        let algorithm = self.algorithms.get(name).copied().unwrap_or(self.balance.algorithm);
        if has_bad_algorithm {
            notes.push(format!("its backends are chosen by `{algorithm}`, as before"));
        }
        if let [_, _, ..] = ids {
            let shown: Vec<_> = ids.iter().map(|id| format!("`{}`", id.dns_name())).collect();
            notes.push(format!(
                "{} are one service, since DNS doesn't tell them apart",
                shown.join(" and ")
            ));
        }
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
            algorithm,
            pin: self.pins.get(&**name).copied(),
            public,
            backends: Vec::new(),
            excluded: Vec::new(),
            notes,
            watch: record.watch,
            generation,
        };
        let mut endpoints = Endpoints::default();
        let (mut checked, mut unchecked) = (Vec::new(), HashSet::<SocketAddr>::new());
        let kept_weights = kept_weights(&record, former);
        for instance in record.instances() {
            let kept = kept_weights.get(&(&*instance.node, &*instance.id)).copied();
            match validate(instance, &self.pools, &self.hosts, kept) {
                Validation::In(backend) => {
                    match instance.is_checked {
                        true => checked.extend(backend.address),
                        false => unchecked.extend(backend.address),
                    }
                    endpoints.add(backend);
                }
                Validation::Out(excluded) => service.excluded.push(excluded),
            }
        }
        let drained = self.drained(&record);
        service.backends = drain(endpoints.clone().backends(), &drained);
        for address in checked {
            unchecked.remove(&address);
        }
        // A connect() by UDP proves nothing.
        if !service.protocols.tcp() {
            unchecked.clear();
        }
        {
            let Waits { contacts, keeps } = &mut *self.waits.lock();
            // Only used where an instance is critical. A backend has the identity of one of its endpoint's
            // registrations.
            let served_endpoints = LazyCell::new(|| {
                let former = former.into_iter().flat_map(|former| former.healthy());
                let former: HashSet<_> = former.map(Backend::identity).collect();
                let endpoint = |Instance { node, id, .. }: &Instance, endpoint| {
                    former.contains(&(Some(endpoint), node, id)).then_some(endpoint)
                };
                let endpoints = record
                    .instances()
                    .filter_map(|instance| endpoint(instance, self.hosts.endpoint(instance)?));
                endpoints.collect::<HashSet<_>>()
            });
            let served_before = |backend: &Backend| {
                backend.address.is_some_and(|address| {
                    served_endpoints.contains(&address) || contacts.is_served(name, address)
                })
            };
            // By the instance's record, as if it were in warning.
            let critical = record.instances().filter(|instance| instance.is_critical);
            let as_warning = critical.filter_map(|instance| {
                let HealthStatus::Out(reason) = &instance.health else { return None };
                let health = HealthStatus::Warning(reason.clone());
                let instance = Instance { health, ..instance.clone() };
                let is_drained = |address| drained.contains_key(&address);
                match validate(&instance, &self.pools, &self.hosts, None) {
                    Validation::In(backend) => {
                        Some(backend).filter(|backend| !backend.address.is_some_and(is_drained))
                    }
                    Validation::Out(_) => None,
                }
            });
            let kept = keeps.judge(&mut service, as_warning, served_before);
            if !kept.is_empty() {
                kept.into_iter().for_each(|backend| endpoints.add(backend));
                service.backends = drain(endpoints.backends(), &drained);
            }
            let former = former.map(|former| &**former);
            contacts.judge(name, &mut service.backends, &unchecked, former);
            // A cold service's instances may come later, and a host's name may be resolved later.
            let is_complete = service.backends.iter().all(|backend| backend.address.is_some());
            if service.watch == Watch::Live && is_complete {
                contacts.forget_served(name);
            }
        }
        self.prefer(&mut service.backends, &record);
        let hostnames = record.instances().filter(|instance| instance.health.serves());
        let hostnames: Vec<String> = hostnames.filter_map(Instance::hostname).collect();
        let former_names = self.hostnames.get(name).map_or(&[][..], |names| &names[..]);
        if *former_names != *hostnames {
            self.has_new_hostnames = true;
            match hostnames.is_empty() {
                true => drop(self.hostnames.remove(name)),
                false => drop(self.hostnames.insert(name.clone(), hostnames)),
            }
        }
        match former {
            Some(former) if former.is_same(&service) => Ok(former.clone()),
            _ => Ok(Arc::new(service)),
        }
    }

    /// The public addresses that a service has of those that it declares, and that the configuration gives
    /// it.
    fn public(
        &mut self,
        name: &Arc<str>,
        record: &ServiceRecord,
        declared: Option<PublicAddresses>,
        notes: &mut Vec<String>,
    ) -> Vec<SocketAddr> {
        let declaring = record.instances().filter(|instance| instance.meta.public.is_some());
        let rank = ClaimRank::Declared(declaring.map(|it| it.created).min().unwrap_or(0));
        let declared = declared.map(PublicAddresses::into_addresses).unwrap_or_default();
        let is_public = |address: &SocketAddr| {
            self.public.iter().any(|network| network.contains(&address.ip()))
        };
        let (within, outside): (Vec<_>, Vec<_>) = declared.into_iter().partition(is_public);
        if !outside.is_empty() {
            let networks: Vec<_> = self.public.iter().map(IpNet::to_string).collect();
            let why = match networks.is_empty() {
                true => "vip.public of this node's configuration is empty".to_owned(),
                false => format!("it lies in no network of vip.public ({})", networks.join(", ")),
            };
            let ignored = |address| format!("its public address {address} is ignored: {why}");
            notes.extend(outside.into_iter().map(ignored));
        }
        let mut claims: BTreeMap<SocketAddr, ClaimRank> =
            within.into_iter().map(|address| (address, rank)).collect();
        let configured = self.edge_vips.get(&**name);
        claims.extend(configured.map(|address| (*address, ClaimRank::Configured)));
        let addresses: Vec<SocketAddr> = claims.keys().copied().collect();
        self.revisit.extend(self.claims.set(name, claims));
        let mut held = Vec::new();
        for address in addresses {
            match self.claims.holder(address) {
                Some((other, holder)) if holder != name => {
                    let why = match other {
                        ClaimRank::Configured => "by edge.vips",
                        // As those of a file.
                        _ if *other == rank => "equally old, whose name comes first",
                        ClaimRank::Declared(_) => "whose registration is older",
                    };
                    notes.push(format!(
                        "its public address {address} is ignored: `{holder}` has it, {why}; give one of \
                         the two another"
                    ));
                }
                // Connections of this node would be refused, while an edge has backends for them.
                _ if record.watch == Watch::Cold => {}
                _ => held.push(address),
            }
        }
        held
    }

    /// Makes spare backends of those that aren't preferred, where one that is serves. Those that are spare
    /// already come after them.
    fn prefer(&self, backends: &mut [Backend], record: &ServiceRecord) {
        let is_preferred = |group: &InstanceGroup, instance: &Instance| match self.balance.prefer {
            Preference::None => true,
            Preference::Node => instance.local,
            // What a source asks about by itself is of its own datacenter.
            Preference::Datacenter => group.origin.is_none(),
        };
        let why = match self.balance.prefer {
            Preference::None => return,
            Preference::Node => "on another node, and balance.prefer is \"node\"",
            Preference::Datacenter => "in another datacenter, and balance.prefer is \"datacenter\"",
        };
        let instances = record.groups.iter().flat_map(|group| {
            group.instances.iter().filter(|instance| is_preferred(group, instance))
        });
        let preferred: HashSet<SocketAddr> =
            instances.filter_map(|instance| self.hosts.endpoint(instance)).collect();
        let is_preferred =
            |backend: &Backend| backend.address.is_some_and(|address| preferred.contains(&address));
        let is_first = |backend: &Backend| backend.state.is_reached() && backend.group == 0;
        if !backends.iter().any(|backend| is_first(backend) && is_preferred(backend)) {
            return;
        }
        for backend in backends {
            if is_first(backend) && !is_preferred(backend) {
                (backend.state, backend.group) = (BackendState::Spare, 1);
                let reason = backend.reason.take().map(|reason| reason + "; ").unwrap_or_default();
                backend.reason = Some(reason + why);
            } else if backend.state == BackendState::Spare {
                backend.group = 2;
            }
        }
    }

    /// The endpoints of which a registration is drained by hand, each with the first such one.
    fn drained<'a>(&'a self, record: &'a ServiceRecord) -> HashMap<SocketAddr, Drained<'a>> {
        let mut drained = HashMap::new();
        if self.drains.is_empty() {
            return drained;
        }
        for instance in record.instances() {
            let endpoint = self.hosts.endpoint(instance);
            let found = self.drains.find(&instance.node, &instance.id, endpoint);
            if let (Some(endpoint), Some((target, drain))) = (endpoint, found) {
                drained.entry(endpoint).or_insert(Drained { instance, target, drain });
            }
        }
        drained
    }
}

/// A registration that is drained by hand.
struct Drained<'a> {
    instance: &'a Instance,
    target: &'a DrainTarget,
    drain: &'a Drain,
}

/// Has the backends that are drained get no new connections: an endpoint is drained if any of its
/// registrations is, which it shows then.
fn drain(mut backends: Vec<Backend>, drained: &HashMap<SocketAddr, Drained<'_>>) -> Vec<Backend> {
    for backend in &mut backends {
        let address = backend.address.filter(|_| backend.state != BackendState::Draining);
        let drained = address.and_then(|address| drained.get(&address));
        let Some(Drained { instance, target, drain }) = drained else { continue };
        backend.state = BackendState::Draining;
        let since = drain.since_text();
        backend.reason = Some(format!("drained by hand since {since}, as {target}"));
        (backend.node, backend.id) = (instance.node.clone(), instance.id.clone());
    }
    backends
}

/// The weights that instances have had so far, where one of them declares a weight that can't be read.
fn kept_weights<'a>(
    record: &ServiceRecord,
    former: Option<&'a Arc<Service>>,
) -> HashMap<(&'a str, &'a str), u16> {
    let is_bad = |instance: &Instance| matches!(instance.meta.weight(), Some(Err(_)));
    if !record.instances().any(is_bad) {
        return HashMap::new();
    }
    let backends = former.into_iter().flat_map(|former| &former.backends);
    backends.map(|backend| ((&*backend.node, &*backend.id), backend.weight)).collect()
}

/// Notes why a name can't be had, and returns whether that is new.
fn reject(table: &mut Table, id: &ServiceId, reason: String) -> bool {
    let reason: Arc<str> = reason.into();
    table.rejected.insert(id.dns_name(), reason.clone()) != Some(reason)
}

#[cfg(test)]
mod tests;

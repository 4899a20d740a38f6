//! First contact: an instance that no check vouches for gets no traffic until a connection to it has
//! succeeded, while others of its service serve.
//!
//! Nomad registers a service before its tasks listen, and Consul calls an instance without a check
//! passing. This is the state machine without I/O: the caller has the clock, runs the probes, and builds
//! a service again when its contacts have changed. It is a part of the table, since only a table knows
//! where a backend is: its address resolved and validated, its protocols, and which others serve.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Backend, BackendState, Service};

/// How long an instance waits at most; then it serves all the same, and the kernel's ejection judges it.
pub const MAX_WAIT: Duration = Duration::from_secs(10);

/// Between the end of an unsuccessful probe and the next one.
pub const RETRY: Duration = Duration::from_secs(1);

/// The most probes at once.
pub const MAX_PROBES: usize = 64;

/// The most of them that aren't an instance's first: however many instances don't answer, a new one is
/// tried at once.
const MAX_RETRIES: usize = 48;

/// A connection to be tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Where to.
    pub address: SocketAddr,
    contact: ContactId,
    is_retry: bool,
}

/// Identifies a contact; none is used twice.
type ContactId = u64;

/// All instances that aren't proven.
#[derive(Debug, Default)]
pub struct Contacts {
    by_service: BTreeMap<Arc<str>, BTreeMap<SocketAddr, Contact>>,
    /// Where each contact is.
    places: HashMap<ContactId, (Arc<str>, SocketAddr)>,
    last_id: ContactId,
    /// The contacts that the clock hasn't met yet.
    new: VecDeque<ContactId>,
    /// Those that haven't been tried.
    untried: VecDeque<ContactId>,
    /// When the others are tried again.
    retries: BTreeSet<(Instant, ContactId)>,
    /// When their waits are over.
    ends: BTreeSet<(Instant, ContactId)>,
    n_probes: usize,
    n_retries: usize,
    /// The backends that the kernel serves since before the first table: they are proven.
    served: BTreeMap<Arc<str>, BTreeSet<SocketAddr>>,
}

/// An instance that isn't proven.
#[derive(Debug)]
struct Contact {
    id: ContactId,
    node: String,
    instance: String,
    /// When its wait ends; `None` before the clock has met it.
    end: Option<Instant>,
    n_tries: u32,
    last_error: Option<String>,
    state: ContactState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ContactState {
    /// No connection has succeeded.
    Unproven,
    /// One has; the service has to be built again.
    Proven,
    /// None has, and the wait is over.
    Overdue,
}

/// What is known of an instance that isn't proven.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContactStatus {
    /// The connections that were tried.
    pub n_tries: u32,
    /// How the last one failed.
    pub last_error: Option<String>,
    /// The remaining time of its wait; `None` once it is over.
    pub left: Option<Duration>,
}

impl Contacts {
    /// Records the backends that the kernel serves before the first table.
    pub fn set_served(
        &mut self,
        served: impl IntoIterator<Item = (Arc<str>, BTreeSet<SocketAddr>)>,
    ) {
        self.served = served.into_iter().collect();
    }

    /// Whether the kernel serves this backend since before the first table.
    pub fn is_served(&self, service: &str, address: SocketAddr) -> bool {
        self.served.get(service).is_some_and(|served| served.contains(&address))
    }

    /// Sets the unproven ones of a service's backends to [`BackendState::Unproven`], unless no other
    /// serves: to refuse connections is worse than an instance that may not listen yet. `unchecked` has
    /// the addresses that nothing vouches for, and `former` is the service in the last table, whose
    /// backends are proven, except those that have a contact.
    pub fn judge(
        &mut self,
        service: &Arc<str>,
        backends: &mut [Backend],
        unchecked: &HashSet<SocketAddr>,
        former: Option<&Service>,
    ) {
        let mut known = self.by_service.remove(service).unwrap_or_default();
        let mut contacts = BTreeMap::new();
        let (mut unproven, mut n_proven) = (Vec::new(), 0);
        // A service may have 65,536 instances, so each is looked up, never searched for.
        let served_before: HashSet<_> = match unchecked.is_empty() {
            true => HashSet::new(),
            false => former.into_iter().flat_map(Service::healthy).map(Backend::identity).collect(),
        };
        let served_in_kernel = self.served.get(service);
        for (idx, backend) in backends.iter().enumerate() {
            let Some(address) = backend.address.filter(|_| backend.state.is_reached()) else {
                continue;
            };
            if !unchecked.contains(&address) {
                n_proven += 1;
                continue;
            }
            let is_same = |it: &Contact| (&it.node, &it.instance) == (&backend.node, &backend.id);
            let contact = match known.remove(&address) {
                Some(contact) if is_same(&contact) => Some(contact),
                // Another instance has the address now.
                Some(contact) => {
                    self.places.remove(&contact.id);
                    None
                }
                None if served_before.contains(&backend.identity())
                    || served_in_kernel.is_some_and(|served| served.contains(&address)) =>
                {
                    n_proven += 1;
                    continue;
                }
                None => None,
            };
            let contact = contact.unwrap_or_else(|| {
                self.last_id += 1;
                self.new.push_back(self.last_id);
                self.places.insert(self.last_id, (service.clone(), address));
                Contact::new(self.last_id, backend)
            });
            match contact.state {
                ContactState::Unproven => unproven.push(idx),
                ContactState::Overdue => n_proven += 1,
                ContactState::Proven => {
                    n_proven += 1;
                    self.places.remove(&contact.id);
                    continue;
                }
            }
            contacts.insert(address, contact);
        }
        for contact in known.values() {
            self.places.remove(&contact.id);
        }
        if n_proven > 0 {
            for idx in unproven {
                backends[idx].state = BackendState::Unproven;
            }
        }
        if !contacts.is_empty() {
            self.by_service.insert(service.clone(), contacts);
        }
    }

    /// Drops the backends of a service that the kernel serves since before the first table.
    pub fn forget_served(&mut self, service: &str) {
        self.served.remove(service);
    }

    /// Drops those of the services that the first table doesn't have.
    pub fn retain_served(&mut self, mut is_routed: impl FnMut(&Arc<str>) -> bool) {
        self.served.retain(|service, _| is_routed(service));
    }

    /// Drops what is known of a service.
    pub fn forget(&mut self, service: &str) {
        self.served.remove(service);
        for contact in self.by_service.remove(service).unwrap_or_default().into_values() {
            self.places.remove(&contact.id);
        }
    }

    /// The probes to begin now.
    pub fn begin_due(&mut self, now: Instant) -> Vec<Probe> {
        for id in std::mem::take(&mut self.new) {
            if let Some(contact) = self.contact(id) {
                contact.end = Some(now + MAX_WAIT);
                self.ends.insert((now + MAX_WAIT, id));
                self.untried.push_back(id);
            }
        }
        let mut probes = Vec::new();
        while self.n_probes < MAX_PROBES
            && let Some(id) = self.untried.pop_front()
        {
            probes.extend(self.probe(id, false));
        }
        while let Some(at) = self.next_retry()
            && at <= now
            && let Some((_, id)) = self.retries.pop_first()
        {
            probes.extend(self.probe(id, true));
        }
        probes
    }

    /// The probe of a contact that still needs one.
    fn probe(&mut self, id: ContactId, is_retry: bool) -> Option<Probe> {
        self.contact(id).filter(|contact| contact.state == ContactState::Unproven)?;
        let (_, address) = self.places.get(&id)?;
        self.n_probes += 1;
        self.n_retries += usize::from(is_retry);
        Some(Probe { address: *address, contact: id, is_retry })
    }

    /// When the next retry is due; `None` while none may begin.
    fn next_retry(&self) -> Option<Instant> {
        let is_free = self.n_probes < MAX_PROBES && self.n_retries < MAX_RETRIES;
        self.retries.first().filter(|_| is_free).map(|(at, _)| *at)
    }

    /// Records the result of a probe, and returns the service to build again, if any. The wait of one
    /// that fails goes on; what it connected to may have gone meanwhile.
    pub fn end_probe(
        &mut self,
        probe: Probe,
        result: Result<(), String>,
        now: Instant,
    ) -> Option<Arc<str>> {
        self.n_probes = self.n_probes.saturating_sub(1);
        self.n_retries = self.n_retries.saturating_sub(probe.is_retry.into());
        let contact = self.contact(probe.contact)?;
        contact.n_tries += 1;
        match result {
            Ok(()) => {
                contact.state = ContactState::Proven;
                self.places.get(&probe.contact).map(|(service, _)| service.clone())
            }
            Err(error) => {
                contact.last_error = Some(error);
                if contact.state == ContactState::Unproven {
                    self.retries.insert((now + RETRY, probe.contact));
                }
                None
            }
        }
    }

    /// Ends the waits that are over, and returns the services to build again, each with what is to be
    /// logged.
    pub fn expire(&mut self, now: Instant) -> Vec<(Arc<str>, String)> {
        let mut expired = Vec::new();
        while let Some(&(at, id)) = self.ends.first()
            && at <= now
        {
            self.ends.pop_first();
            let Some((service, address)) = self.places.get(&id).cloned() else { continue };
            let Some(contact) = self.contact(id) else { continue };
            if contact.state == ContactState::Unproven {
                contact.state = ContactState::Overdue;
                let Contact { node, instance, .. } = &*contact;
                let line =
                    format!("{node}/{instance} ({address}): {}", contact.status(now).reason(true));
                expired.push((service, line));
            }
        }
        expired
    }

    /// When to call [`Contacts::begin_due`] and [`Contacts::expire`] next, if no probe ends before.
    pub fn next_wake(&self) -> Option<Instant> {
        self.next_retry().into_iter().chain(self.ends.first().map(|(at, _)| *at)).min()
    }

    /// What is known of a service's instances that aren't proven, by address.
    pub fn status(&self, service: &str, now: Instant) -> BTreeMap<SocketAddr, ContactStatus> {
        let contacts = self.by_service.get(service).into_iter().flatten();
        contacts.map(|(address, contact)| (*address, contact.status(now))).collect()
    }

    fn contact(&mut self, id: ContactId) -> Option<&mut Contact> {
        let (service, address) = self.places.get(&id)?;
        self.by_service.get_mut(service)?.get_mut(address)
    }
}

impl Contact {
    fn new(id: ContactId, backend: &Backend) -> Contact {
        Contact {
            id,
            node: backend.node.clone(),
            instance: backend.id.clone(),
            end: None,
            n_tries: 0,
            last_error: None,
            state: ContactState::Unproven,
        }
    }

    fn status(&self, now: Instant) -> ContactStatus {
        let left = match (self.state, self.end) {
            (ContactState::Overdue, _) => None,
            (_, Some(end)) => Some(end.saturating_duration_since(now)),
            (_, None) => Some(MAX_WAIT),
        };
        ContactStatus { n_tries: self.n_tries, last_error: self.last_error.clone(), left }
    }
}

impl ContactStatus {
    /// A clause for `explain`; `serves` is whether the instance gets connections.
    pub fn reason(&self, serves: bool) -> String {
        let tried = match (self.n_tries, &self.last_error) {
            (0, _) | (_, None) => String::new(),
            (1, Some(error)) => format!(" (tried once: {error})"),
            (n, Some(error)) => format!(" (tried {n} times: {error})"),
        };
        match (self.left, serves) {
            (Some(left), false) => {
                let seconds = left.as_secs_f64().ceil();
                format!(
                    "no connection to it has succeeded yet{tried}; it serves in {seconds} s at the latest"
                )
            }
            (Some(_), true) => format!(
                "no connection to it has succeeded yet{tried}; it serves, since no other instance does"
            ),
            (None, _) => format!(
                "no connection to it succeeded within {MAX_WAIT:?}{tried}; it serves all the same"
            ),
        }
    }
}

#[cfg(test)]
mod tests;

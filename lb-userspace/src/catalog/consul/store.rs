//! The records of all names. Pure: it neither sends nor publishes, and time is an argument.
//!
//! Records change only through [`ServiceStore::edit`], which keeps the totals and queues of the [`Index`]
//! and the names to publish again, so that neither an answer about a service nor a publication walks all
//! records.
//!
//! What the rules are is in the files of `store/`: a list of names in `list`, an answer in `answer`, what is
//! suspicious of them in `suspicion`, whose request is next in `live`, the catalog in `publication`, what
//! `status` reports in `problems`.

mod answer;
mod derived;
mod list;
mod live;
mod problems;
mod publication;
mod suspicion;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::node::Node;
use super::query::RequestId;
use super::service::{Contents, Live, Presence, ServiceState};
use super::suspicion::Suspicion;
use crate::catalog::snapshot::SavedCatalog;
use crate::table::{Catalog, Instance};
use derived::{Index, Keys};

/// The most names whose use is recorded before the list of names is there; many times what a node uses.
const MAX_EARLY_USES: usize = 65_536;

/// How much longer a name lingers whose loss is suspicious, before it is judged again.
const SUSPECT_LINGER: Duration = Duration::from_secs(10);

/// All names, and the state of what applies to all of them.
#[derive(Debug)]
pub struct ServiceStore {
    by_name: BTreeMap<Arc<str>, ServiceState>,
    /// The names with upper case in them, by their lower case: DNS regards all of them, and the one in
    /// lower case, as one service.
    case_variants: BTreeMap<String, BTreeSet<Arc<str>>>,
    index: Index,
    /// The names whose records changed since the catalog was last published.
    dirty: BTreeSet<Arc<str>>,
    /// The catalog that was published last.
    published: Option<Catalog>,
    /// The requests of services that are no longer live.
    ended: Vec<RequestId>,
    node: Arc<Node>,
    /// Whether the list of names was read.
    has_names: bool,
    /// Whether the kill switch was read, or may not be read.
    has_switch: bool,
    /// Whether the catalog no longer waits for answers.
    is_synced: bool,
    /// Whether all services are live, used or not.
    follows_all: bool,
    /// The names in lower case that the kernel serves since before this run: the first catalog must not
    /// remove them for lack of an answer.
    in_use: BTreeSet<Arc<str>>,
    /// The uses before the list of names was read.
    early_uses: BTreeMap<Arc<str>, Instant>,
    /// How long a suspicion lasts whose reason Consul doesn't report.
    distrust: Duration,
    list_suspicion: Option<Suspicion>,
    /// Whether ACLs filtered the list of names that was applied last.
    is_list_filtered: bool,
    problems: BTreeMap<Subject, String>,
    nothing: Arc<[Instance]>,
}

/// The subject of a problem that isn't one service's, the most telling first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// The list of names.
    Names,
    /// The agent's node.
    Agent,
    /// The kill switch.
    Switch,
    /// The number of connections.
    Connections,
}

impl ServiceStore {
    /// A store without names. The kernel serves those `in_use`, in lower case; a suspicion lasts for
    /// `distrust`.
    pub fn new(in_use: BTreeSet<Arc<str>>, distrust: Duration) -> Self {
        ServiceStore {
            by_name: BTreeMap::new(),
            case_variants: BTreeMap::new(),
            index: Index::default(),
            dirty: BTreeSet::new(),
            published: None,
            ended: Vec::new(),
            node: Arc::default(),
            has_names: false,
            has_switch: false,
            is_synced: false,
            follows_all: false,
            in_use,
            early_uses: BTreeMap::new(),
            distrust,
            list_suspicion: None,
            is_list_filtered: false,
            problems: BTreeMap::new(),
            nothing: Arc::default(),
        }
    }

    /// Adds what an earlier run saved. None of it counts as an answer. Names that the list didn't have
    /// linger until then.
    pub fn restore(&mut self, saved: &SavedCatalog, until: Instant) {
        if let (Node::Unknown, Some(agent)) = (&*self.node, &saved.agent) {
            self.node = Arc::new(Node::Named(agent.clone()));
        }
        for (name, service) in &saved.services {
            self.insert(name.clone(), ServiceState::restored(service, until, &self.node));
        }
        self.is_list_filtered = saved.names_filtered;
    }

    /// What the next run restores.
    pub fn saved(&self) -> SavedCatalog {
        let services = self.by_name.iter().map(|(name, service)| (name.clone(), service.saved()));
        let agent = match &*self.node {
            Node::Named(agent) => Some(agent.clone()),
            Node::Unknown | Node::Denied(_) | Node::Elsewhere { .. } => None,
        };
        SavedCatalog {
            agent,
            services: services.collect(),
            names_filtered: self.is_list_filtered,
            ..SavedCatalog::default()
        }
    }

    /// Changes the record of a name, and all that is derived from it. Returns `None` where the name is
    /// unknown.
    pub fn edit<T>(
        &mut self,
        name: &Arc<str>,
        change: impl FnOnce(&mut ServiceState, &Node) -> T,
    ) -> Option<T> {
        let service = self.by_name.get_mut(name)?;
        let before = Keys::of(name, service, self.follows_all);
        let result = change(service, &self.node);
        self.index.replace(name, &before, &Keys::of(name, service, self.follows_all));
        self.dirty.insert(name.clone());
        Some(result)
    }

    /// As [`ServiceStore::edit`], for the watch of a live service.
    pub fn edit_live<T>(
        &mut self,
        name: &Arc<str>,
        edit: impl FnOnce(&mut Live) -> T,
    ) -> Option<T> {
        self.edit(name, |service, _| service.live.as_deref_mut().map(edit)).flatten()
    }

    /// Adds a name, which is used as those are that DNS regards as the same.
    fn insert(&mut self, name: Arc<str>, mut service: ServiceState) {
        let folded = name.to_ascii_lowercase();
        if folded != *name {
            self.case_variants.entry(folded.clone()).or_default().insert(name.clone());
        }
        let used_at = |name: &Arc<str>| self.by_name.get(name)?.used_at;
        service.used_at = self.of(&folded).iter().filter_map(used_at).max();
        self.index.replace(&name, &Keys::default(), &Keys::of(&name, &service, self.follows_all));
        self.dirty.insert(name.clone());
        self.by_name.insert(name, service);
    }

    fn remove(&mut self, name: &Arc<str>) {
        let Some(service) = self.by_name.remove(name) else { return };
        self.index.replace(name, &Keys::of(name, &service, self.follows_all), &Keys::default());
        self.dirty.insert(name.clone());
        self.ended.extend(service.live.and_then(|live| live.request));
        let folded = name.to_ascii_lowercase();
        if let Some(variants) = self.case_variants.get_mut(&folded) {
            variants.remove(name);
            if variants.is_empty() {
                self.case_variants.remove(&folded);
            }
        }
    }

    fn set_presence(&mut self, name: &Arc<str>, presence: Presence) {
        match self.presence(name) {
            Some(present) if present == presence => {}
            Some(_) => drop(self.edit(name, |service, _| service.presence = presence)),
            None => self.insert(name.clone(), ServiceState::new(presence)),
        }
    }

    /// The live services.
    fn live(&self) -> Vec<Arc<str>> {
        self.index.ages.iter().map(|(_, name)| name.clone()).collect()
    }

    /// Whether the list of names was read.
    pub fn has_names(&self) -> bool {
        self.has_names
    }

    /// The number of names.
    pub fn n_names(&self) -> usize {
        self.by_name.len()
    }

    /// Why the name is known, if it is.
    pub fn presence(&self, name: &str) -> Option<Presence> {
        self.by_name.get(name).map(|service| service.presence)
    }

    /// Whether a service has instances that serve.
    pub fn is_serving(&self, name: &str) -> bool {
        self.by_name.get(name).is_some_and(|service| service.n_serving() > 0)
    }

    /// The names that DNS regards as this one, which is in lower case.
    pub fn of(&self, folded: &str) -> Vec<Arc<str>> {
        let name = self.by_name.get_key_value(folded).map(|(name, _)| name);
        let variants = self.case_variants.get(folded).into_iter().flatten();
        name.into_iter().chain(variants).cloned().collect()
    }

    /// Records that this node used the names that DNS regards as this one. Before the list of names is
    /// read, that applies to names that are still unknown.
    pub fn record_use(&mut self, name: &Arc<str>, at: Instant) {
        if !self.has_names {
            if self.early_uses.len() < MAX_EARLY_USES || self.early_uses.contains_key(name) {
                let last = self.early_uses.entry(name.clone()).or_insert(at);
                *last = at.max(*last);
            }
            return;
        }
        for name in self.of(&name.to_ascii_lowercase()) {
            self.edit(&name, |service, _| service.used_at = service.used_at.max(Some(at)));
        }
    }

    /// Ends what ends with time: hold-downs, uses, and names that linger. One of those that is registered
    /// again and not listed yet is as one that a lookup found.
    pub fn expire(&mut self, now: Instant) {
        while let Some((at, name)) = self.index.deadlines.first()
            && *at <= now
        {
            let name = name.clone();
            let is_in_use = self.is_in_use(&name);
            let is_suspicious = self.is_suspicious(&name, now);
            let is_over = self.edit(&name, |service, node| {
                service.release(node, is_in_use, now);
                let is_idle = service.is_idle(now);
                service.used_at = service.used_at.filter(|_| !is_idle);
                match service.presence {
                    Presence::Lingering { until } if until > now => {}
                    Presence::Lingering { .. } if is_suspicious => {
                        service.presence = Presence::Lingering { until: now + SUSPECT_LINGER };
                    }
                    // Only its watch would know of its end.
                    Presence::Lingering { .. } if service.is_back() && service.live.is_some() => {
                        service.presence = Presence::Found;
                    }
                    Presence::Lingering { .. } => return true,
                    Presence::Listed | Presence::Found => {}
                }
                false
            });
            if is_over == Some(true) {
                self.remove(&name);
            }
        }
    }

    /// The next moment at which something ends with time.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.index.deadlines.first().map(|(at, _)| *at)
    }

    /// The number of instances that serve as far as is known: one, where only the kernel has any.
    fn n_served(&self, name: &str, service: &ServiceState) -> usize {
        match service.contents {
            Contents::Service { .. } => service.n_serving(),
            Contents::Pending => usize::from(self.is_in_use(name)),
            Contents::NoService => 0,
        }
    }

    /// Whether the kernel serves the name since before this run, and its answer is waited for.
    fn is_in_use(&self, name: &str) -> bool {
        !self.is_synced && self.is_kernels(name)
    }

    /// Whether the kernel served the name when this run began.
    fn is_kernels(&self, name: &str) -> bool {
        self.in_use.contains(name) || self.in_use.contains(&*name.to_lowercase())
    }

    /// Sets the node that this host is.
    pub fn set_node(&mut self, node: Node) {
        // A known node stays: a token that may no longer read it changes no node's name.
        let is_known = matches!((&*self.node, &node), (Node::Named(_), Node::Denied(_)));
        if *self.node == node || is_known {
            return;
        }
        self.node = Arc::new(node);
        for name in self.by_name.keys().cloned().collect::<Vec<_>>() {
            self.edit(&name, |service, node| {
                if let Contents::Service { instances, .. } = &service.contents {
                    service.contents.set(instances.to_vec(), node);
                }
            });
        }
    }

    /// Whether the kill switch was read, or may not be read.
    pub fn has_switch(&self) -> bool {
        self.has_switch
    }

    /// Records that the kill switch was read, or may not be read.
    pub fn set_has_switch(&mut self) {
        self.has_switch = true;
    }

    /// Records that the machine was suspended, for which the clock of an [`Instant`] stands still: what
    /// was answered before is older by as much.
    pub fn suspended(&mut self, duration: Duration) {
        for at in self.by_name.values_mut().filter_map(|service| service.answered_at.as_mut()) {
            *at = at.checked_sub(duration).unwrap_or(*at);
        }
    }

    /// Removes the instances of cold services that are older than `max_age`: another service may have
    /// their ports by now. The age is that at the last answer about anything: while Consul doesn't answer,
    /// `catalog.expired` decides about the catalog as a whole.
    pub fn discard_old(&mut self, last_answer: Instant, max_age: Duration) {
        let is_old = |service: &ServiceState| {
            let age = service.answered_at.map(|at| last_answer.saturating_duration_since(at));
            let is_known = matches!(service.contents, Contents::Service { .. });
            service.live.is_none() && is_known && age.is_some_and(|age| age > max_age)
        };
        let old = self.by_name.iter().filter(|(_, service)| is_old(service));
        for name in old.map(|(name, _)| name.clone()).collect::<Vec<_>>() {
            self.edit(&name, |service, _| service.contents = Contents::Pending);
        }
    }
}

#[cfg(test)]
mod tests;

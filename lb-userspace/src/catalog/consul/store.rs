//! The records of all names, and what follows from them: which services are live, whose request is next,
//! which answers are suspicious, and the catalog. Pure: it neither sends nor publishes, and time is an
//! argument.
//!
//! Records change only through [`ServiceStore::edit`], which keeps the totals and queues of the [`Index`]
//! and the names to publish again, so that neither an answer about a service nor a publication walks all
//! records.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::index::{IndexMove, ReadMode};
use super::node::Node;
use super::query::{List, RequestId, ServiceAnswer};
use super::service::{Contents, Live, Presence, ServiceState};
use super::suspicion::{self, Assessment, Evidence, Reason, Suspicion, is_mass, is_shrink};
use crate::catalog::snapshot::SavedCatalog;
use crate::dns_name::service_name_problem;
use crate::table::{Catalog, Instance, ServiceId, ServiceRecord};

/// The most names that linger.
const MAX_LINGERING: usize = 1024;

/// The most names whose use is recorded before the list of names is there; many times what a node uses.
const MAX_EARLY_USES: usize = 65_536;

/// How much longer a name lingers whose loss is suspicious, before it is judged again.
const SUSPECT_LINGER: Duration = Duration::from_secs(10);

const AGENT_DENIED: &str = "instances on a loopback address, or in the network of a bridge of this \
                            host, are unroutable, since the Consul token may not read which node \
                            this is: it needs agent:read as well";

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

/// What is derived from all records.
#[derive(Debug, Default)]
struct Index {
    totals: Totals,
    /// The names by [`ServiceState::deadline`].
    deadlines: BTreeSet<(Instant, Arc<str>)>,
    /// The live services by their last answer, or by when they became live.
    ages: BTreeSet<(Instant, Arc<str>)>,
    /// The live services whose next request Consul may hold, and the others.
    blocking: QueryQueue,
    plain: QueryQueue,
    /// The services with a problem.
    failing: BTreeSet<Arc<str>>,
    /// The services with a suspicion.
    suspicious: BTreeSet<Arc<str>>,
    /// The services that vanished lately.
    vanished: BTreeSet<Arc<str>>,
    /// The services to become live, or cold.
    shifting: BTreeSet<Arc<str>>,
}

/// Numbers of records.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Totals {
    n_live: usize,
    /// The live services without an answer.
    n_pending: usize,
    n_serving: usize,
    n_lingering: usize,
    n_needs_agent: usize,
    /// The live services with an answer of known size, and the sum of the sizes.
    n_sized: usize,
    n_bytes: usize,
}

/// Live services without a request under way.
#[derive(Debug, Default)]
struct QueryQueue {
    /// By when their request is due.
    later: BTreeSet<(Instant, Arc<str>)>,
    /// Those that are due, by their last answer.
    ready: BTreeSet<(Option<Instant>, Arc<str>)>,
}

/// What the [`Index`] has of one record.
#[derive(Debug, Default, PartialEq)]
struct Keys {
    totals: Totals,
    deadline: Option<Instant>,
    /// When the next request is due, if none is under way.
    due: Option<(ReadMode, Instant)>,
    answered_at: Option<Instant>,
    age: Option<Instant>,
    is_failing: bool,
    is_suspicious: bool,
    has_vanished: bool,
    is_shifting: bool,
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

    // Records.

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

    // Names.

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

    /// Adds names of the list.
    pub fn add_listed(&mut self, names: impl IntoIterator<Item = Arc<str>>) {
        for name in names {
            self.set_presence(&name, Presence::Listed);
        }
        if !std::mem::replace(&mut self.has_names, true) {
            for (name, at) in std::mem::take(&mut self.early_uses) {
                self.record_use(&name, at);
            }
        }
    }

    /// Adds a name that a lookup found, unless the list has it.
    pub fn add_found(&mut self, name: &Arc<str>) {
        if self.presence(name) != Some(Presence::Listed) {
            self.set_presence(name, Presence::Found);
        }
    }

    /// Applies a list of names: it adds names, and removes those that the list had before. A name that
    /// vanished lingers without instances until then; one that only lost the tag goes at once. Of a
    /// service that is watched its own answer decides: the list's index moves with every service, so it
    /// can't show whether the service was deregistered or the token reads less than before.
    pub fn apply_list(&mut self, list: List, until: Instant, now: Instant) {
        let is_gone = |name: &Arc<str>, service: &ServiceState| match service.presence {
            Presence::Listed => !list.tagged.contains(name),
            Presence::Lingering { .. } => list.others.contains(name),
            Presence::Found => self.is_renamed(name, &list),
        };
        let gone = self.by_name.iter().filter(|(name, service)| is_gone(name, service));
        for name in gone.map(|(name, _)| name.clone()).collect::<Vec<_>>() {
            if list.others.contains(&name) || self.is_renamed(&name, &list) {
                self.remove(&name);
            } else if self.is_watched(&name) {
                self.set_presence(&name, Presence::Found);
                // A request that Consul holds is answered; where there are few connections, the next one
                // would wait for its turn.
                self.edit_live(&name, |live| {
                    if live.poller.due().is_some() {
                        live.poller.restart(now);
                    }
                });
            } else {
                self.empty(&name, until, now);
            }
        }
        self.add_listed(list.tagged);
    }

    /// Whether the service serves, and is live, or will be after the first list. An error of its own
    /// requests removes nothing.
    fn is_watched(&self, name: &str) -> bool {
        let is_watched = |service: &ServiceState| {
            let is_live = service.live.is_some() || !self.has_names && self.is_kernels(name);
            is_live && service.n_serving() > 0
        };
        self.by_name.get(name).is_some_and(is_watched)
    }

    /// Whether the list has the name in another case of letters, and Consul has answered about that one:
    /// it answers about either with the instances of both, so this one's answer would never be empty.
    fn is_renamed(&self, name: &Arc<str>, list: &List) -> bool {
        let is_followed = |other: &Arc<str>| {
            let live = self.by_name.get(other).and_then(|service| service.live.as_ref());
            live.is_some_and(|live| live.is_followed)
        };
        let variants = self.of(&name.to_ascii_lowercase());
        variants.iter().any(|it| it != name && list.tagged.contains(it) && is_followed(it))
    }

    /// Removes the instances of a name. It lingers until then, where it is a service's and there is room
    /// for it; otherwise it goes.
    pub fn empty(&mut self, name: &Arc<str>, until: Instant, now: Instant) {
        let has_room = self.index.totals.n_lingering < MAX_LINGERING;
        match has_room && self.edit(name, |service, node| service.empty(node, now)) == Some(true) {
            true => self.set_presence(name, Presence::Lingering { until }),
            false => self.remove(name),
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

    // Live services.

    /// The number of live services.
    pub fn n_live(&self) -> usize {
        self.index.totals.n_live
    }

    /// Makes live what is to be live, and cold what isn't: all services, or those in use. When there
    /// become too many for all, the live ones count as just used, so that a number that wavers around the
    /// limit changes nothing. Returns whether any changed.
    pub fn rebalance(&mut self, follows_all: bool, now: Instant) -> bool {
        if self.follows_all != follows_all {
            for (name, service) in &mut self.by_name {
                let before = Keys::of(name, service, self.follows_all);
                if !follows_all && service.live.is_some() {
                    service.used_at.get_or_insert(now);
                }
                self.index.replace(name, &before, &Keys::of(name, service, follows_all));
            }
            self.follows_all = follows_all;
        }
        let shifting = self.index.shifting.clone();
        for name in &shifting {
            match self.by_name.get(name) {
                Some(service) if service.live.is_none() => self.start(name, now),
                // The list doesn't have it, so only its watch would know of its end.
                Some(service) if service.presence == Presence::Found => self.remove(name),
                _ => self.stop(name),
            }
        }
        !shifting.is_empty()
    }

    fn start(&mut self, name: &Arc<str>, now: Instant) {
        self.edit(name, |service, _| {
            service.live = Some(Box::new(Live::new(service.index, now)));
        });
    }

    fn stop(&mut self, name: &Arc<str>) {
        let live = self.edit(name, |service, _| service.live.take()).flatten();
        self.ended.extend(live.and_then(|live| live.request));
    }

    /// The requests of services that became cold, or whose names went.
    pub fn take_ended(&mut self) -> Vec<RequestId> {
        std::mem::take(&mut self.ended)
    }

    /// Has the instances of all live services read again, since another token may read more, or less.
    pub fn restart(&mut self, now: Instant) {
        for name in self.live() {
            self.edit_live(&name, |live| live.poller.restart(now));
        }
    }

    /// The next service to send a request about: first one whose request Consul doesn't hold, then the
    /// one that was answered longest ago. `can_block` is whether there is a connection for a blocking
    /// query.
    pub fn next_query(&mut self, can_block: bool, now: Instant) -> Option<(Arc<str>, ReadMode)> {
        let Index { blocking, plain, .. } = &mut self.index;
        for queue in [plain, blocking].into_iter().take(1 + usize::from(can_block)) {
            while let Some((at, _)) = queue.later.first()
                && *at <= now
                && let Some((_, name)) = queue.later.pop_first()
            {
                let live = self.by_name.get(&name).and_then(|service| service.live.as_ref());
                queue.ready.insert((live.and_then(|live| live.poller.answered_at()), name));
            }
            if let Some((_, name)) = queue.ready.first()
                && let Some(live) = self.by_name.get(name).and_then(|it| it.live.as_ref())
            {
                return Some((name.clone(), live.poller.mode()));
            }
        }
        None
    }

    /// When the next request is due.
    pub fn next_due(&self, can_block: bool) -> Option<Instant> {
        let blocking = self.index.blocking.later.first().filter(|_| can_block);
        let due = self.index.plain.later.first().into_iter().chain(blocking);
        due.map(|(at, _)| *at).min()
    }

    /// The time since the last answer about the live service that waits longest. One that was never
    /// answered waits since it became live.
    pub fn oldest_age(&self, now: Instant) -> Option<Duration> {
        let (oldest, _) = self.index.ages.first()?;
        Some(now.saturating_duration_since(*oldest))
    }

    /// The mean size of the last answers about live services.
    pub fn mean_size(&self) -> f64 {
        let Totals { n_sized, n_bytes, .. } = self.index.totals;
        n_bytes as f64 / n_sized.max(1) as f64
    }

    // Answers.

    /// Applies an answer about a live service. An unknown name is ignored.
    pub fn apply(&mut self, name: &Arc<str>, answer: ServiceAnswer, now: Instant) {
        let is_in_use = self.is_in_use(name);
        self.edit(name, |service, node| {
            if let Some(live) = &mut service.live {
                live.poller.applied();
                service.index = live.poller.applied_index();
            }
            service.apply(answer, node, is_in_use, now);
        });
    }

    /// Withholds an answer about a live service.
    pub fn withhold(&mut self, name: &Arc<str>, answer: ServiceAnswer, now: Instant) {
        let is_in_use = self.is_in_use(name);
        self.edit(name, |service, node| service.withhold(answer, node, is_in_use, now));
    }

    /// Assesses an answer about a service by what is known.
    pub fn assess(
        &mut self,
        name: &Arc<str>,
        answer: &ServiceAnswer,
        evidence: Evidence,
    ) -> Assessment {
        let Some(service) = self.by_name.get(name) else { return Assessment::Apply };
        let assessment = if service.vanishes(answer) {
            self.assess_vanishing(name, answer, evidence)
        } else {
            let is_shrink = is_shrink(self.n_served(name, service), answer.n_serving());
            // An answer as empty as what is known removes nothing that could be withheld, but is no sign
            // that the service is whole: what it lost may come back.
            let is_empty = answer.instances.as_ref().is_some_and(Vec::is_empty);
            self.edit_live(name, |live| match is_empty {
                true => live.suspicion = None,
                false => live.clear_suspicion(),
            });
            match is_shrink && !evidence.is_consistent {
                true => Assessment::Confirm,
                false => Assessment::Apply,
            }
        };
        if assessment == Assessment::Apply {
            self.edit(name, |service, _| service.is_filtered = evidence.is_filtered);
        }
        assessment
    }

    fn assess_vanishing(
        &mut self,
        name: &Arc<str>,
        answer: &ServiceAnswer,
        evidence: Evidence,
    ) -> Assessment {
        let (now, serves) = (evidence.now, answer.n_serving() > 0);
        self.edit_live(name, |live| live.suspect_at = (!serves).then_some(now));
        // Only records that change: many services may vanish at once.
        let live = |name: &Arc<str>| self.by_name.get(name)?.live.as_deref();
        let is_outdated = |name: &&Arc<str>| live(name).is_some_and(|live| live.is_outdated(now));
        let outdated: Vec<_> = self.index.vanished.iter().filter(is_outdated).cloned().collect();
        for other in outdated {
            self.edit_live(&other, |live| live.discard_vanished(now));
        }
        let Some(service) = self.by_name.get(name) else { return Assessment::Apply };
        // A job that runs again has new instances, and its former ones are dead. Only an answer from a
        // state that can't have changed that way lacks some of what is there.
        let applies = |reason: Reason| {
            !serves || reason == Reason::Filtered || evidence.moved != IndexMove::Forward
        };
        let own = suspicion::own_reason(evidence, service.is_filtered);
        // What ACLs hide of one service they hide of others, whose index moved for another reason.
        let hidden = self.hidden_until(now);
        // What Consul itself reports of the list it would report of the service as well.
        let of_list = self.list_suspicion.map(|suspicion| suspicion.reason);
        let reason = own
            .or(of_list.filter(|reason| *reason != Reason::Filtered))
            .or_else(|| self.is_mass().then_some(Reason::Mass))
            .or(hidden.map(|_| Reason::Hidden))
            .filter(|reason| applies(*reason));
        let before = service.live.as_ref().and_then(|live| live.suspicion);
        let before = before.filter(|suspicion| applies(suspicion.reason));
        let mut suspicion = before;
        let assessment = suspicion::assess(&mut suspicion, evidence, reason, self.distrust);
        if let (None, Some(new), Some(until)) = (before, &mut suspicion, hidden)
            && own.is_none()
            && new.reason == Reason::Hidden
        {
            // Else a suspicion that spreads from one to the next would never end.
            new.until = Some(until);
        }
        self.edit_live(name, |live| live.suspicion = suspicion);
        if let (None, Some(new)) = (before, suspicion)
            && matches!(new.reason, Reason::Mass | Reason::Hidden)
        {
            self.take_back(new);
        }
        assessment
    }

    /// Until when the token seems to read less than before of some service.
    fn hidden_until(&self, now: Instant) -> Option<Instant> {
        let suspicions =
            self.index.suspicious.iter().filter_map(|name| self.suspicion_of(name, now));
        suspicions.filter(|it| it.reason == Reason::Hidden).filter_map(|it| it.until).max()
    }

    /// Whether many services vanished lately, and more than half of those that served.
    fn is_mass(&self) -> bool {
        let vanished = &self.index.vanished;
        let serves =
            |name: &&Arc<str>| self.by_name.get(*name).is_some_and(|it| it.n_serving() > 0);
        let n_others = self.index.totals.n_serving - vanished.iter().filter(serves).count();
        is_mass(vanished.len(), vanished.len() + n_others)
    }

    /// Restores what was lost just before so much else vanished, or was hidden. Its loss is suspicious from
    /// now on.
    fn take_back(&mut self, suspicion: Suspicion) {
        for name in self.index.vanished.clone() {
            self.edit(&name, |service, node| {
                let live = service.live.as_mut()?;
                let (_, instances) = live.lost.take()?;
                live.suspicion = Some(suspicion);
                service.contents.set(instances.to_vec(), node);
                // That of the answer that removed them isn't theirs.
                service.index = 0;
                Some(())
            });
        }
    }

    /// Assesses a list of names by what is known. `is_hidden` is whether it lacks Consul's own service,
    /// which it had before.
    pub fn assess_list(&mut self, list: &List, is_hidden: bool, evidence: Evidence) -> Assessment {
        let (mut n_listed, mut n_kept, mut n_gone, mut n_lost) = (0, 0, 0, 0);
        let mut is_loss = self.lacks_used(list);
        // A name that a lookup found, or that lingers, stays until its own answer.
        let listed = self.by_name.iter().filter(|(_, it)| it.presence == Presence::Listed);
        for (name, service) in listed {
            n_listed += 1;
            if list.tagged.contains(name) {
                n_kept += 1;
                continue;
            }
            is_loss |= self.n_served(name, service) > 0;
            if !list.others.contains(name) {
                n_gone += 1;
                n_lost += usize::from(service.n_serving() > 0);
            }
        }
        is_loss |= is_shrink(n_listed, n_kept);
        let vanishes = n_lost > 0 || is_shrink(n_listed, n_listed - n_gone);
        let assessment = if is_loss && vanishes {
            let n_serving = self.index.totals.n_serving;
            let is_mass = is_mass(n_gone, n_listed) || is_mass(n_lost, n_serving);
            let reason = suspicion::own_reason(evidence, self.is_list_filtered)
                .or(is_hidden.then_some(Reason::Hidden))
                .or(is_mass.then_some(Reason::Mass));
            suspicion::assess(&mut self.list_suspicion, evidence, reason, self.distrust)
        } else {
            self.list_suspicion = None;
            match is_loss && !evidence.is_consistent {
                true => Assessment::Confirm,
                false => Assessment::Apply,
            }
        };
        if assessment == Assessment::Apply {
            self.is_list_filtered = evidence.is_filtered;
        }
        assessment
    }

    /// Whether the first list of names lacks a name that the kernel serves.
    fn lacks_used(&self, list: &List) -> bool {
        if self.has_names || self.in_use.is_empty() {
            return false;
        }
        let folded: BTreeSet<String> = list.tagged.iter().map(|name| name.to_lowercase()).collect();
        self.in_use.iter().any(|name| !folded.contains(&**name))
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

    /// Whether answers are suspicious, so that an absent name may exist.
    pub fn has_suspicions(&self, now: Instant) -> bool {
        self.list_suspicion.is_some_and(|suspicion| suspicion.holds(now))
            || self.index.suspicious.iter().any(|name| self.is_suspicious(name, now))
    }

    /// Whether the loss of this service is suspicious.
    pub fn is_suspicious(&self, name: &str, now: Instant) -> bool {
        self.suspicion_of(name, now).is_some()
    }

    fn suspicion_of(&self, name: &str, now: Instant) -> Option<Suspicion> {
        self.by_name.get(name)?.live.as_ref()?.suspicion.filter(|it| it.holds(now))
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

    // The catalog.

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

    // Problems.

    /// Sets or removes the problem of a subject.
    pub fn set_problem(&mut self, subject: Subject, problem: Option<String>) {
        match problem {
            Some(problem) => self.problems.insert(subject, problem),
            None => self.problems.remove(&subject),
        };
    }

    /// Whether Consul doesn't answer, or its answers are suspicious; not a problem of one service.
    pub fn is_failing(&self, now: Instant) -> bool {
        // Not the names alone: the switch is always asked about, the names only every ten seconds.
        let subjects = [Subject::Names, Subject::Agent, Subject::Switch];
        subjects.iter().any(|subject| self.problems.contains_key(subject))
            || self.has_suspicions(now)
    }

    /// Whether Consul can't be asked about what isn't watched: only the names show that, since a problem
    /// with the switch, or the agent's node, need not be one with services.
    pub fn is_cut_off(&self) -> bool {
        self.problems.contains_key(&Subject::Names)
    }

    /// All problems in one line, equal ones once, and at most three.
    pub fn problem(&self, now: Instant) -> Option<String> {
        let general = |subject| self.problems.get(&subject).map(|problem| (&**problem, None));
        let suspicion = self.suspicion_problem(now);
        let first = [Subject::Names, Subject::Agent, Subject::Switch].map(general);
        let then = [suspicion.as_deref().map(|it| (it, None)), general(Subject::Connections)];
        let of_services = self.index.failing.iter().filter_map(|name| {
            let live = self.by_name.get(name)?.live.as_ref()?;
            Some((live.problem.as_deref()?, Some(name)))
        });
        let mut shown: Vec<(&str, Option<&Arc<str>>)> = Vec::new();
        let mut n_more = 0;
        for (problem, name) in first.into_iter().chain(then).flatten().chain(of_services) {
            match shown.len() {
                _ if shown.iter().any(|(other, _)| *other == problem) => {}
                0..3 => shown.push((problem, name)),
                _ => n_more += 1,
            }
        }
        if self.index.totals.n_needs_agent > 0 {
            shown.push((AGENT_DENIED, None));
        }
        let line = |(problem, name): (&str, Option<&Arc<str>>)| match name {
            Some(name) => format!("service `{name}`: {problem}"),
            None => problem.into(),
        };
        let mut lines: Vec<String> = shown.into_iter().map(line).collect();
        if n_more > 0 {
            lines.push(format!("and {n_more} more"));
        }
        (!lines.is_empty()).then(|| lines.join("; "))
    }

    fn suspicion_problem(&self, now: Instant) -> Option<String> {
        let services = self.index.suspicious.iter();
        let services =
            services.filter_map(|name| Some((name, self.suspicion_of(name, now)?.reason)));
        let first = services.clone().min_by_key(|(_, reason)| *reason);
        let of_list = self.list_suspicion.filter(|suspicion| suspicion.holds(now));
        let reason = of_list.map(|it| it.reason).or(first.map(|(_, reason)| reason))?;
        let lacking = match (first, services.count()) {
            (None, _) => "names that it listed before".into(),
            (Some((name, _)), 1) => format!("instances of `{name}`"),
            (Some((name, _)), n) => format!("instances of `{name}` and {} more services", n - 1),
        };
        Some(suspicion::problem(&lacking, reason, self.distrust))
    }
}

impl Index {
    fn replace(&mut self, name: &Arc<str>, from: &Keys, to: &Keys) {
        if from == to {
            return;
        }
        self.totals.replace(from.totals, to.totals);
        let at = |at: Instant| (at, name.clone());
        replace(&mut self.deadlines, from.deadline.map(at), to.deadline.map(at));
        replace(&mut self.ages, from.age.map(at), to.age.map(at));
        for (queue, is_blocking) in [(&mut self.plain, false), (&mut self.blocking, true)] {
            let due = |keys: &Keys| keys.due.filter(|(mode, _)| mode.is_blocking() == is_blocking);
            if let Some((_, due)) = due(from) {
                queue.later.remove(&at(due));
                queue.ready.remove(&(from.answered_at, name.clone()));
            }
            queue.later.extend(due(to).map(|(_, due)| at(due)));
        }
        for (set, was, is) in [
            (&mut self.failing, from.is_failing, to.is_failing),
            (&mut self.suspicious, from.is_suspicious, to.is_suspicious),
            (&mut self.vanished, from.has_vanished, to.has_vanished),
            (&mut self.shifting, from.is_shifting, to.is_shifting),
        ] {
            replace(set, was.then(|| name.clone()), is.then(|| name.clone()));
        }
    }
}

fn replace<T: Ord>(set: &mut BTreeSet<T>, from: Option<T>, to: Option<T>) {
    if let Some(from) = from {
        set.remove(&from);
    }
    set.extend(to);
}

impl Totals {
    fn replace(&mut self, mut from: Totals, mut to: Totals) {
        for ((total, from), to) in self.all().into_iter().zip(from.all()).zip(to.all()) {
            *total = *total + *to - *from;
        }
    }

    fn all(&mut self) -> [&mut usize; 7] {
        let Totals { n_live, n_pending, n_serving, n_lingering, n_needs_agent, n_sized, n_bytes } =
            self;
        [n_live, n_pending, n_serving, n_lingering, n_needs_agent, n_sized, n_bytes]
    }
}

/// Whether the name can be one of DNS. Others are listed, but not followed: they can't be looked up, and Consul
/// itself fails for some of them (`..`, control characters), which would be a problem of the source.
fn can_be_had(name: &str) -> bool {
    service_name_problem(name).is_none()
}

impl Keys {
    fn of(name: &str, service: &ServiceState, follows_all: bool) -> Keys {
        let live = service.live.as_deref();
        let has = |is_it: fn(&Live) -> bool| live.is_some_and(is_it);
        let is_lingering = matches!(service.presence, Presence::Lingering { .. });
        let needs_agent = matches!(service.contents, Contents::Service { needs_agent: true, .. });
        let n_bytes = live.and_then(|live| live.n_bytes);
        let answered_at = live.and_then(|live| live.poller.answered_at());
        Keys {
            totals: Totals {
                n_live: live.is_some().into(),
                n_pending: has(|live| !live.is_followed).into(),
                n_serving: service.contents.instances().iter().any(|it| it.health.serves()).into(),
                n_lingering: is_lingering.into(),
                n_needs_agent: needs_agent.into(),
                n_sized: n_bytes.is_some().into(),
                n_bytes: n_bytes.unwrap_or(0),
            },
            deadline: service.deadline(),
            due: live.and_then(|live| Some((live.poller.mode(), live.poller.due()?))),
            answered_at,
            age: live.map(|live| answered_at.unwrap_or(live.since)),
            is_failing: has(|live| live.problem.is_some()),
            is_suspicious: has(|live| live.suspicion.is_some()),
            has_vanished: has(Live::has_vanished),
            is_shifting: live.is_some()
                != (can_be_had(name) && (follows_all || service.used_at.is_some())),
        }
    }
}

#[cfg(test)]
mod tests;

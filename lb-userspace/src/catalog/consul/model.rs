//! What is known of Consul's services, and what of it is ready to be published.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::doubt::{Assessment, Doubts, Evidence, is_mass};
use super::hold_down::{HoldDown, InstanceKey};
use super::schedule::is_shrink;
use crate::catalog::host::Own;
use crate::catalog::snapshot::{Agent, SavedCatalog, SavedService};
use crate::table::Catalog;
use crate::table::{Instance, ServiceId, ServiceRecord, Watch};

/// The state that watches bring together. Pure: it neither asks nor publishes.
#[derive(Debug)]
pub struct Model {
    node: Node,
    has_names: bool,
    /// Whether the switch was read, or may not be read.
    has_switch: bool,
    /// What the kernel serves, in lower case: the first catalog isn't to take it away for want of
    /// an answer.
    in_use: BTreeSet<Arc<str>>,
    services: BTreeMap<Arc<str>, Entry>,
    /// What was said of services some of whose instances are held back, and until when.
    held_back: BTreeMap<Arc<str>, (Instant, ServiceAnswer)>,
    /// What takes too much away to be believed.
    doubts: Doubts,
    /// Whether the list of names that was applied last left something out for the token's sake.
    is_list_filtered: bool,
    problems: BTreeMap<Subject, String>,
    nothing: Arc<[Instance]>,
    /// Whether the catalog has changed since it was taken.
    is_dirty: bool,
    /// Whether a catalog has been taken.
    is_synced: bool,
}

/// What Consul says of one service.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ServiceAnswer {
    /// Its instances; `None` where the name is no routed service's.
    pub instances: Option<Vec<Instance>>,
    /// Those that have no check of their own, where others have one.
    pub unchecked: Vec<InstanceKey>,
}

impl ServiceAnswer {
    /// How many of them serve.
    pub fn n_serving(&self) -> usize {
        self.instances.as_deref().map_or(0, n_serving)
    }
}

fn n_serving(instances: &[Instance]) -> usize {
    instances.iter().filter(|instance| instance.health.serves()).count()
}

/// Which node this is: that of the agent that is asked, where it is this host's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Node {
    /// Not answered yet.
    #[default]
    Unknown,
    /// This one.
    Named(Agent),
    /// None that is known: the agent isn't this host's.
    Elsewhere {
        /// By what that is seen.
        why: String,
        /// The agent's node, where it may be this one all the same: behind NAT.
        may_be_here: Option<Agent>,
    },
    /// The token may not know it: it is the node whose own address this host has.
    Denied(Own),
}

impl Node {
    /// What an operator should know of it.
    pub fn notice(&self) -> Option<String> {
        let Node::Elsewhere { why, may_be_here } = self else { return None };
        let fix = match may_be_here {
            Some(_) => {
                ", or, where it is, give it an advertise_addr that this host has (that of NAT is for \
                 advertise_addr_wan)"
            }
            None => "",
        };
        Some(format!(
            "Consul's agent isn't this host's ({why}): instances on loopback addresses are \
             unroutable; ask the agent of this host{fix}"
        ))
    }

    /// Says of each instance whether it runs on this node.
    fn mark_local(&self, instances: &mut [Instance]) {
        for instance in instances {
            instance.local = match self {
                // What an earlier life of the source found stands until the agent has answered.
                Node::Unknown => instance.local,
                Node::Named(agent) => agent.has(instance),
                Node::Elsewhere { .. } => false,
                Node::Denied(own) => instance.node_address.is_some_and(|node| own.has(node)),
            };
            instance.may_be_local = match self {
                Node::Unknown => instance.may_be_local,
                Node::Elsewhere { may_be_here: Some(agent), .. } => agent.has(instance),
                Node::Named(_) | Node::Elsewhere { .. } | Node::Denied(_) => false,
            };
        }
    }

    /// Whether one of the instances can't be reached, and might be if the token could read which
    /// node this is.
    fn is_missed(&self, instances: &[Instance]) -> bool {
        let Node::Denied(own) = self else { return false };
        instances.iter().filter(|instance| !instance.local).any(|instance| {
            instance.ip().is_some_and(|address| {
                address.is_loopback() || own.is_on_bridge(address, instance.node_address)
            })
        })
    }
}

/// One name.
#[derive(Debug, Default)]
struct Entry {
    known: Known,
    is_live: bool,
    /// Whether Consul has answered since it is live.
    is_followed: bool,
    answered_at: Option<Instant>,
    /// The bytes of the last answer.
    n_bytes: Option<usize>,
    /// Whether the answer that was applied last left something out for the token's sake.
    is_filtered: bool,
    /// Whether it has been in a catalog that was taken.
    is_shown: bool,
    /// Whether the list of names took its instances, and no answer has been applied since.
    is_emptied: bool,
    /// What an answer that is withheld was to take away from: it serves beside what that lists.
    before: Option<Arc<[Instance]>>,
    held: HoldDown,
}

#[derive(Debug, Default)]
enum Known {
    /// Nothing.
    #[default]
    Pending,
    /// All who bear this name are proxies and the like.
    NoService,
    /// These instances.
    Service { instances: Arc<[Instance]>, needs_agent: bool },
}

/// What a problem is about, the most telling first.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// The list of names.
    Names,
    /// The agent's own name.
    Agent,
    /// The switch `nohop/off`.
    Switch,
    /// Answers that aren't applied, since they take too much away.
    Doubt,
    /// The number of connections.
    Connections,
    /// One service.
    Service(Arc<str>),
}

const AGENT_DENIED: &str = "instances on a loopback address, or in the network of a bridge of this \
                            host, are unroutable, since the Consul token may not read which node \
                            this is: it needs agent:read as well";

impl Model {
    /// One that is told which services, in lower case, the kernel serves, and for how long what takes
    /// too much away is doubted.
    pub fn new(in_use: BTreeSet<Arc<str>>, distrust: Duration) -> Self {
        Model {
            node: Node::default(),
            has_names: false,
            has_switch: false,
            in_use,
            services: BTreeMap::new(),
            held_back: BTreeMap::new(),
            doubts: Doubts::new(distrust),
            is_list_filtered: false,
            problems: BTreeMap::new(),
            nothing: Arc::default(),
            is_dirty: false,
            is_synced: false,
        }
    }

    /// Begins with what an earlier life of the source left; nothing of it counts as an answer.
    pub fn seed(&mut self, memory: &SavedCatalog) {
        if let (Node::Unknown, Some(agent)) = (&self.node, &memory.agent) {
            self.node = Node::Named(agent.clone());
        }
        for (name, remembered) in &memory.services {
            let mut entry = Entry {
                answered_at: remembered.answered_at,
                is_filtered: remembered.filtered,
                ..Entry::default()
            };
            if remembered.answered_at.is_some() {
                entry.known.learn(remembered.instances.to_vec(), &self.node);
            }
            self.services.insert(name.clone(), entry);
        }
        self.is_list_filtered = memory.names_filtered;
        self.is_dirty = true;
    }

    /// What another life of the source may begin with.
    pub fn memory(&self) -> SavedCatalog {
        let services = self.services.iter().map(|(name, entry)| {
            let (instances, answered_at) = match &entry.known {
                Known::Service { instances, .. } => (instances.clone(), entry.answered_at),
                Known::Pending | Known::NoService => (self.nothing.clone(), None),
            };
            let filtered = entry.is_filtered;
            (name.clone(), SavedService { instances, answered_at, used_at: None, filtered })
        });
        let agent = match &self.node {
            Node::Named(agent) => Some(agent.clone()),
            Node::Unknown | Node::Denied(_) | Node::Elsewhere { .. } => None,
        };
        let names_filtered = self.is_list_filtered;
        SavedCatalog {
            agent,
            services: services.collect(),
            names_filtered,
            ..SavedCatalog::default()
        }
    }

    /// Takes the list of the names that have the tag.
    pub fn set_names(&mut self, names: &BTreeSet<Arc<str>>) {
        let (problems, held_back) = (&mut self.problems, &mut self.held_back);
        let doubts = &mut self.doubts;
        let n_before = self.services.len();
        self.services.retain(|name, _| {
            let stays = names.contains(name);
            if !stays {
                problems.remove(&Subject::Service(name.clone()));
                held_back.remove(name);
                doubts.settle(Some(name));
            }
            stays
        });
        let n_kept = self.services.len();
        for name in names {
            self.services.entry(name.clone()).or_default();
        }
        let n_now = self.services.len();
        self.is_dirty |= !self.has_names || n_kept != n_before || n_now != n_kept;
        self.has_names = true;
    }

    /// Says whether the service is live, so that its answers come.
    pub fn set_live(&mut self, name: &str, is_live: bool) {
        let Some(entry) = self.services.get_mut(name) else { return };
        if std::mem::replace(&mut entry.is_live, is_live) == is_live {
            return;
        }
        self.is_dirty |= std::mem::take(&mut entry.is_followed);
        if !is_live {
            // Nothing is asked any more that could end a doubt.
            entry.before = None;
            self.doubts.settle(Some(name));
            self.problems.remove(&Subject::Service(name.into()));
        }
    }

    /// Whether what was heard is a loss too large to be believed unconfirmed.
    pub fn is_shrink(&self, name: &str, heard: &ServiceAnswer) -> bool {
        let n_before = self.services.get(name).map_or(0, |entry| self.n_served(name, entry));
        is_shrink(n_before, heard.n_serving())
    }

    /// Weighs what was heard of a service against what is known of it.
    pub fn weigh(&mut self, name: &Arc<str>, heard: &ServiceAnswer, signs: Evidence) -> Assessment {
        let entry = self.services.get(name);
        let (vanishes, was_filtered) =
            entry.map_or((false, false), |entry| (entry.vanishes(heard), entry.is_filtered));
        let weight = match (vanishes, self.is_shrink(name, heard) && !signs.is_sure) {
            (true, _) => {
                let serving = self.services.iter().filter(|(_, entry)| entry.n_serving() > 0);
                let serving: Vec<Arc<str>> = serving.map(|(name, _)| name.clone()).collect();
                let serving = serving.into_iter();
                let serves = heard.n_serving() > 0;
                self.doubts.weigh_service(name, signs, was_filtered, serves, serving)
            }
            (false, is_unsure) => {
                self.doubts.settle(Some(name));
                if is_unsure { Assessment::Confirm } else { Assessment::Apply }
            }
        };
        for (name, instances) in self.doubts.take_back(signs.now) {
            if let Some(entry) = self.services.get_mut(&name) {
                self.is_dirty |= entry.known.learn(instances.to_vec(), &self.node);
            }
        }
        if let (Assessment::Apply, Some(entry)) = (weight, self.services.get_mut(name)) {
            entry.is_filtered = signs.is_filtered;
        }
        self.report_doubts(signs.now);
        weight
    }

    /// Weighs a list of names, which is `is_loss`: of the names `listed` before those in `there` are
    /// there yet, with the tag or without. `is_hidden` says that Consul's own service has vanished.
    pub fn weigh_names(
        &mut self,
        listed: &BTreeSet<Arc<str>>,
        there: &dyn Fn(&Arc<str>) -> bool,
        is_loss: bool,
        is_hidden: bool,
        signs: Evidence,
    ) -> Assessment {
        let gone: Vec<&Arc<str>> = listed.iter().filter(|name| !there(name)).collect();
        let n_serving = self.services.values().filter(|entry| entry.n_serving() > 0).count();
        let serves = |name: &&&Arc<str>| {
            self.services.get(**name).is_some_and(|entry| entry.n_serving() > 0)
        };
        let n_lost = gone.iter().filter(serves).count();
        let vanishes = n_lost > 0 || is_shrink(listed.len(), listed.len() - gone.len());
        let weight = match (is_loss && vanishes, is_loss && !signs.is_sure) {
            (true, _) => {
                let is_mass = is_mass(gone.len(), listed.len()) || is_mass(n_lost, n_serving);
                self.doubts.weigh_names(signs, self.is_list_filtered, is_hidden, is_mass)
            }
            (false, is_unsure) => {
                self.doubts.settle(None);
                if is_unsure { Assessment::Confirm } else { Assessment::Apply }
            }
        };
        if weight == Assessment::Apply {
            self.is_list_filtered = signs.is_filtered;
        }
        self.report_doubts(signs.now);
        weight
    }

    /// Whether Consul's answers are doubted, so that a "no" of it isn't one.
    pub fn has_doubts(&self, now: Instant) -> bool {
        self.doubts.any(now)
    }

    /// Whether it is doubted that this service is gone.
    pub fn is_doubted(&self, name: &str, now: Instant) -> bool {
        self.doubts.has(name, now)
    }

    /// Reports what is doubted as a problem, and no more what isn't.
    pub fn report_doubts(&mut self, now: Instant) {
        match self.doubts.problem(now) {
            Some(problem) => drop(self.problems.insert(Subject::Doubt, problem)),
            None => drop(self.problems.remove(&Subject::Doubt)),
        }
    }

    /// Takes the instances of a name that has gone from the list, and is kept for a while. Returns
    /// whether it is kept: only a service is.
    pub fn empty(&mut self, name: &Arc<str>, now: Instant) -> bool {
        let Some(entry) = self.services.get_mut(name) else { return false };
        self.held_back.remove(name);
        entry.before = None;
        entry.is_emptied = true;
        if let Known::Service { instances, .. } = &entry.known
            && entry.is_live
            && entry.n_serving() > 0
        {
            self.doubts.lost(name, instances.clone(), now);
        }
        self.is_dirty |= match entry.known {
            Known::Service { .. } => entry.known.learn(Vec::new(), &self.node),
            Known::Pending | Known::NoService => false,
        };
        !matches!(entry.known, Known::NoService)
    }

    /// Whether Consul has named an instance of a service since the list of names took it away.
    pub fn is_back(&self, name: &str) -> bool {
        let Some(entry) = self.services.get(name).filter(|entry| !entry.is_emptied) else {
            return false;
        };
        matches!(&entry.known, Known::Service { instances, .. } if !instances.is_empty())
    }

    /// Whether a list of names lacks one that serves, so that it isn't to be believed unconfirmed.
    pub fn would_lose(&self, names: &BTreeSet<Arc<str>>) -> bool {
        let mut known = self.services.iter().filter(|(name, _)| !names.contains(*name));
        if known.any(|(name, entry)| self.n_served(name, entry) > 0) {
            return true;
        }
        if self.has_names || self.in_use.is_empty() {
            return false;
        }
        let folded: BTreeSet<String> = names.iter().map(|name| name.to_lowercase()).collect();
        self.in_use.iter().any(|name| !folded.contains(&**name))
    }

    /// The instances that serve as far as is known: one, where only the kernel knows any.
    fn n_served(&self, name: &str, entry: &Entry) -> usize {
        match &entry.known {
            Known::Service { .. } => entry.n_serving(),
            Known::Pending => usize::from(self.is_in_use(name)),
            Known::NoService => 0,
        }
    }

    /// Whether the kernel serves this service, by what an earlier source said.
    fn is_in_use(&self, name: &str) -> bool {
        !self.is_synced
            && (self.in_use.contains(name) || self.in_use.contains(&*name.to_lowercase()))
    }

    /// Whether the switch was read, or may not be read.
    pub fn has_switch(&self) -> bool {
        self.has_switch
    }

    /// Notes that the switch was read, or may not be read.
    pub fn hear_switch(&mut self) {
        self.has_switch = true;
    }

    /// Takes what Consul says of a live service. A name that has gone meanwhile is ignored.
    pub fn set_service(&mut self, name: &Arc<str>, heard: ServiceAnswer, now: Instant) {
        let Some(entry) = self.services.get_mut(name) else { return };
        entry.answered_at = Some(now);
        self.is_dirty |= !std::mem::replace(&mut entry.is_followed, entry.is_live);
        if entry.vanishes(&heard)
            && heard.n_serving() == 0
            && let Known::Service { instances, .. } = &entry.known
        {
            self.doubts.lost(name, instances.clone(), now);
        }
        (entry.before, entry.is_emptied) = (None, false);
        self.judge(name, heard, now);
    }

    /// Takes what an answer lists that is withheld, and nothing away. Who has the name, or the address
    /// and port, of one that is listed is the one that is listed.
    pub fn withhold(&mut self, name: &Arc<str>, heard: ServiceAnswer, now: Instant) {
        let Some(entry) = self.services.get_mut(name) else { return };
        let (Some(mut all), Known::Service { instances, .. }) = (heard.instances, &entry.known)
        else {
            return;
        };
        let before = entry.before.get_or_insert_with(|| instances.clone());
        let missing: Vec<Instance> = {
            let listed: BTreeSet<_> = all.iter().map(|one| (&one.node, &one.id)).collect();
            let taken: BTreeSet<_> = all.iter().map(|one| (&one.address, one.port)).collect();
            let missing = before.iter().filter(|one| {
                !listed.contains(&(&one.node, &one.id))
                    && !taken.contains(&(&one.address, one.port))
            });
            missing.cloned().collect()
        };
        all.extend(missing);
        self.judge(name, ServiceAnswer { instances: Some(all), ..heard }, now);
    }

    /// Takes in what was heard, with those held back whose time has not come.
    fn judge(&mut self, name: &Arc<str>, heard: ServiceAnswer, now: Instant) {
        let is_in_use = self.is_in_use(name);
        let Some(entry) = self.services.get_mut(name) else { return };
        let is_inherited = is_in_use && matches!(entry.known, Known::Pending);
        self.held_back.remove(name);
        let ServiceAnswer { instances: Some(instances), unchecked } = &heard else {
            self.is_dirty |= !matches!(entry.known, Known::NoService);
            entry.known = Known::NoService;
            return;
        };
        let mut judged = instances.clone();
        self.node.mark_local(&mut judged);
        let known = match &entry.known {
            Known::Service { instances, .. } => instances.clone(),
            Known::Pending | Known::NoService => self.nothing.clone(),
        };
        // What the kernel serves already came before this daemon.
        let again_at = match is_inherited {
            true => None,
            false => entry.held.judge(&mut judged, unchecked, &known, now),
        };
        self.is_dirty |= entry.known.learn(judged, &self.node);
        if let Some(again_at) = again_at {
            self.held_back.insert(name.clone(), (again_at, heard));
        }
    }

    /// When instances that are held back are to be judged anew.
    pub fn next_release(&self) -> Option<Instant> {
        self.held_back.values().map(|(until, _)| *until).min()
    }

    /// Judges those anew whose time has come.
    pub fn release(&mut self, now: Instant) {
        let due = self.held_back.iter().filter(|(_, (until, _))| *until <= now);
        let due: Vec<_> = due.map(|(name, (_, heard))| (name.clone(), heard.clone())).collect();
        for (name, heard) in due {
            // Consul has answered nothing new.
            self.judge(&name, heard, now);
        }
    }

    /// Notes that the machine was suspended for so long, for which the clock of an [`Instant`] stands
    /// still: what was answered before is older by as much.
    pub fn slept(&mut self, asleep: Duration) {
        for at in self.services.values_mut().filter_map(|entry| entry.answered_at.as_mut()) {
            *at = at.checked_sub(asleep).unwrap_or(*at);
        }
    }

    /// Forgets the instances of cold services that Consul told more than `max_age` before it last
    /// answered anything: another service may have their ports by now. While Consul is silent no
    /// more is forgotten: what becomes of a catalog as a whole is `catalog.expired`'s affair.
    pub fn forget(&mut self, last_answer: Instant, max_age: Duration) {
        for entry in self.services.values_mut().filter(|entry| !entry.is_live) {
            let is_old = entry
                .answered_at
                .is_some_and(|at| last_answer.saturating_duration_since(at) > max_age);
            if is_old && matches!(entry.known, Known::Service { .. }) {
                entry.known = Known::Pending;
                self.is_dirty = true;
            }
        }
    }

    /// Takes the agent's word on which node it is.
    pub fn set_node(&mut self, node: Node) {
        // A name that is known stays: a token that may no more read it changes no node's name.
        if self.node == node || matches!((&self.node, &node), (Node::Named(_), Node::Denied(_))) {
            return;
        }
        self.node = node;
        for entry in self.services.values_mut() {
            if let Known::Service { instances, .. } = &entry.known {
                let instances = instances.to_vec();
                self.is_dirty |= entry.known.learn(instances, &self.node);
            }
        }
    }

    /// Whether the list of names has come.
    pub fn has_names(&self) -> bool {
        self.has_names
    }

    /// Whether a catalog has been taken.
    pub fn is_synced(&self) -> bool {
        self.is_synced
    }

    /// Whether there is such a service, by what Consul said since it is live. `None` while it has
    /// said nothing.
    pub fn exists(&self, name: &str) -> Option<bool> {
        match self.services.get(name) {
            None => Some(false),
            Some(entry) if !entry.is_followed => None,
            Some(entry) => Some(matches!(entry.known, Known::Service { .. })),
        }
    }

    /// Notes the bytes of an answer about a service.
    pub fn set_size(&mut self, name: &str, n_bytes: usize) {
        if let Some(entry) = self.services.get_mut(name) {
            entry.n_bytes = Some(n_bytes);
        }
    }

    /// The bytes of an answer about a live service, in the mean of their last ones.
    pub fn mean_size(&self) -> f64 {
        let live = self.services.values().filter(|entry| entry.is_live);
        let (n, n_bytes) = live
            .filter_map(|entry| entry.n_bytes)
            .fold((0_u32, 0), |(n, sum), n_bytes| (n + 1, sum + n_bytes));
        n_bytes as f64 / f64::from(n.max(1))
    }

    /// Gives up waiting for live services that haven't answered, so that the others can be published;
    /// for those that only the kernel knows, where they are to be given up as well.
    pub fn stop_waiting(&mut self, also_in_use: bool) {
        for (name, entry) in &self.services {
            if entry.is_live && !entry.is_followed {
                self.problems.entry(Subject::Service(name.clone())).or_insert_with(|| {
                    "Consul hasn't said its instances; it joins when it does".into()
                });
            }
        }
        self.is_synced |= self.has_names && (also_in_use || !self.lacks_in_use());
    }

    /// Whether a catalog now would take away what the kernel serves.
    fn lacks_in_use(&self) -> bool {
        let mut pending = self.services.iter().filter(|(_, entry)| {
            matches!(entry.known, Known::Pending) && entry.is_live && !entry.is_followed
        });
        pending.any(|(name, _)| self.is_in_use(name))
    }

    /// Has what an earlier life of the source left published, since Consul doesn't answer.
    pub fn serve_memory(&mut self) {
        self.is_synced = true;
    }

    /// The catalog, if it is ready and differs from the last one taken.
    pub fn take(&mut self) -> Option<Catalog> {
        let is_ready = self.is_synced || self.is_complete();
        if !(is_ready && self.is_dirty) {
            return None;
        }
        self.is_dirty = false;
        self.is_synced = true;
        let known = self.services.iter_mut().filter_map(|(name, entry)| {
            let watch = if entry.is_followed { Watch::Live } else { Watch::Cold };
            let instances = match &entry.known {
                Known::Service { instances, .. } => instances.clone(),
                // A new name that is live at once joins when its answer comes.
                Known::Pending if entry.is_live && !entry.is_shown => return None,
                Known::Pending => self.nothing.clone(),
                Known::NoService => return None,
            };
            entry.is_shown = true;
            Some((ServiceId::new(name.clone()), ServiceRecord::new(instances, watch)))
        });
        Some(known.collect())
    }

    /// Whether everything that is waited for has been answered once.
    fn is_complete(&self) -> bool {
        self.has_names
            && self.node != Node::Unknown
            && self.has_switch
            && self.services.values().all(|entry| entry.is_followed || !entry.is_live)
    }

    /// Notes what is wrong, or no more wrong, with one part. Of a service that has gone it notes
    /// nothing.
    pub fn set_problem(&mut self, subject: Subject, problem: Option<String>) {
        if let Subject::Service(name) = &subject
            && !self.services.contains_key(name)
        {
            return;
        }
        match problem {
            Some(problem) => self.problems.insert(subject, problem),
            None => self.problems.remove(&subject),
        };
    }

    /// Whether Consul doesn't answer, rather than that something is wrong with an answer.
    pub fn is_failing(&self) -> bool {
        // The switch, since it is always asked for, and the names only every ten seconds.
        [Subject::Names, Subject::Agent, Subject::Switch, Subject::Doubt]
            .iter()
            .any(|subject| self.problems.contains_key(subject))
    }

    /// Whether what Consul isn't asked for all the time can't be asked for: the names alone say so,
    /// since what is wrong with the switch, or the agent's name, need not be wrong with services.
    pub fn is_cut_off(&self) -> bool {
        self.problems.contains_key(&Subject::Names)
    }

    /// All that is wrong, each complaint once, in one line; at most three.
    pub fn problem(&self) -> Option<String> {
        let mut complaints: Vec<(&str, Option<&str>)> = Vec::new();
        let mut n_more = 0;
        for (subject, problem) in &self.problems {
            let name = match subject {
                Subject::Service(name) => Some(name.as_ref()),
                Subject::Names
                | Subject::Agent
                | Subject::Switch
                | Subject::Doubt
                | Subject::Connections => None,
            };
            if complaints.iter().any(|(said, _)| said == problem) {
                continue;
            }
            match complaints.len() {
                0..3 => complaints.push((problem, name)),
                _ => n_more += 1,
            }
        }
        if self.needs_agent() {
            complaints.push((AGENT_DENIED, None));
        }
        let mut lines: Vec<String> = complaints
            .into_iter()
            .map(|(problem, name)| match name {
                Some(name) => format!("service `{name}`: {problem}"),
                None => problem.into(),
            })
            .collect();
        if n_more > 0 {
            lines.push(format!("and {n_more} more"));
        }
        (!lines.is_empty()).then(|| lines.join("; "))
    }

    fn needs_agent(&self) -> bool {
        self.services
            .values()
            .any(|entry| matches!(entry.known, Known::Service { needs_agent: true, .. }))
    }
}

impl Entry {
    fn n_serving(&self) -> usize {
        match &self.known {
            Known::Service { instances, .. } => n_serving(instances),
            Known::Pending | Known::NoService => 0,
        }
    }

    /// Whether most of what serves, or served before an answer was withheld, isn't even listed by this
    /// answer.
    fn vanishes(&self, heard: &ServiceAnswer) -> bool {
        let listed = heard.instances.as_ref().map(Vec::len);
        let n_before = self.before.as_deref().map_or_else(|| self.n_serving(), n_serving);
        listed.is_some_and(|n_listed| is_shrink(n_before, n_listed))
    }
}

impl Known {
    /// Takes the instances in, and says whether that changed anything; if not, the list stays the
    /// same allocation.
    fn learn(&mut self, mut instances: Vec<Instance>, node: &Node) -> bool {
        node.mark_local(&mut instances);
        instances.sort();
        let is_missed = node.is_missed(&instances);
        if let Known::Service { instances: last, needs_agent } = self
            && **last == *instances
        {
            *needs_agent = is_missed;
            return false;
        }
        *self = Known::Service { instances: instances.into(), needs_agent: is_missed };
        true
    }
}

#[cfg(test)]
#[path = "model_tests.rs"]
mod tests;

//! The record of one name: all that is known about it. Pure: time is an argument.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::hold_down::HoldDown;
use super::node::Node;
use super::poller::Poller;
use super::query::{RequestId, ServiceAnswer, n_serving};
use super::suspicion::{MASS_WINDOW, Suspicion, is_shrink};
use crate::catalog::snapshot::SavedService;
use crate::table::{Instance, Watch};

/// How long a service stays live after its last use.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(30 * 60);

/// One name.
#[derive(Debug)]
pub struct ServiceState {
    /// Why the name is known.
    pub presence: Presence,
    /// When this node last used it; `None` after [`IDLE_TIMEOUT`].
    pub used_at: Option<Instant>,
    /// Its instances.
    pub contents: Contents,
    /// When Consul last answered about it.
    pub answered_at: Option<Instant>,
    /// Whether ACLs filtered the answer that was applied last.
    pub is_filtered: bool,
    /// The index of the answer that was applied last; 0 for none. It outlives the watch.
    pub index: u64,
    /// Whether its instances were removed because the list lacks the name, and no answer has been applied
    /// since.
    is_emptied: bool,
    hold_down: HoldDown,
    /// The answer some of whose instances are held down, and until when.
    held_down: Option<Box<(Instant, ServiceAnswer)>>,
    /// The watch, while the service is live.
    pub live: Option<Box<Live>>,
}

/// Why a name is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// The list of names has it.
    Listed,
    /// A lookup found it; the list doesn't have it yet.
    Found,
    /// The list lost it: it stays known without instances until this moment.
    Lingering {
        /// When it ends.
        until: Instant,
    },
}

/// The instances of a name.
#[derive(Clone, Debug, Default)]
pub enum Contents {
    /// Consul hasn't answered.
    #[default]
    Pending,
    /// The name isn't a routed service's: all its instances are proxies and the like.
    NoService,
    /// A routed service's.
    Service {
        /// In order.
        instances: Arc<[Instance]>,
        /// Whether one is unroutable for lack of permission to read the agent's node.
        needs_agent: bool,
    },
}

/// The watch of a live service.
#[derive(Debug)]
pub struct Live {
    /// Its requests.
    pub poller: Poller,
    /// The request under way.
    pub request: Option<RequestId>,
    /// Since when it is live.
    pub since: Instant,
    /// Whether an answer has been applied since.
    pub is_followed: bool,
    /// The size of the last answer.
    pub n_bytes: Option<usize>,
    /// What is wrong with the watch.
    pub problem: Option<String>,
    /// The suspicion against its answers.
    pub suspicion: Option<Suspicion>,
    /// When an answer without a serving instance arrived that isn't confirmed.
    pub suspect_at: Option<Instant>,
    /// The instances that an applied answer removed, and when.
    pub lost: Option<(Instant, Arc<[Instance]>)>,
    /// The instances from which a withheld answer would have removed some.
    pub before: Option<Arc<[Instance]>>,
}

impl Contents {
    /// The instances; none where they aren't known.
    pub fn instances(&self) -> &[Instance] {
        match self {
            Contents::Service { instances, .. } => instances,
            Contents::Pending | Contents::NoService => &[],
        }
    }

    /// Sets the instances. Equal ones stay the same allocation.
    pub fn set(&mut self, mut instances: Vec<Instance>, node: &Node) {
        node.mark_local(&mut instances);
        instances.sort();
        let is_needed = node.is_needed(&instances);
        match self {
            Contents::Service { instances: last, needs_agent } if **last == *instances => {
                *needs_agent = is_needed;
            }
            _ => {
                *self = Contents::Service { instances: instances.into(), needs_agent: is_needed };
            }
        }
    }
}

impl Live {
    /// A watch that begins now, after one that applied an answer with this index; 0 for none.
    pub fn new(index: u64, now: Instant) -> Live {
        Live {
            poller: Poller::resumed(index, now),
            request: None,
            since: now,
            is_followed: false,
            n_bytes: None,
            problem: None,
            suspicion: None,
            suspect_at: None,
            lost: None,
            before: None,
        }
    }

    /// Whether the service vanished lately, confirmed or not.
    pub fn has_vanished(&self) -> bool {
        self.suspect_at.is_some() || self.lost.is_some()
    }

    /// Whether [`Live::discard_vanished`] changes anything.
    pub fn is_outdated(&self, now: Instant) -> bool {
        let lost_at = self.lost.as_ref().map(|(at, _)| *at);
        self.suspect_at.into_iter().chain(lost_at).any(|at| !is_recent(at, now))
    }

    /// Discards what vanished more than [`MASS_WINDOW`] ago.
    pub fn discard_vanished(&mut self, now: Instant) {
        self.suspect_at = self.suspect_at.filter(|at| is_recent(*at, now));
        self.lost.take_if(|(at, _)| !is_recent(*at, now));
    }

    /// Records that the service is whole.
    pub fn clear_suspicion(&mut self) {
        (self.suspicion, self.suspect_at, self.lost) = (None, None, None);
    }

    fn lose(&mut self, instances: Arc<[Instance]>, now: Instant) {
        (self.suspect_at, self.lost) = (None, Some((now, instances)));
    }
}

fn is_recent(vanished_at: Instant, now: Instant) -> bool {
    now.saturating_duration_since(vanished_at) <= MASS_WINDOW
}

impl ServiceState {
    /// A name about which nothing is known yet.
    pub fn new(presence: Presence) -> ServiceState {
        ServiceState {
            presence,
            used_at: None,
            contents: Contents::Pending,
            answered_at: None,
            is_filtered: false,
            index: 0,
            is_emptied: false,
            hold_down: HoldDown::default(),
            held_down: None,
            live: None,
        }
    }

    /// The name as an earlier run saved it. One that the list didn't have lingers until then.
    pub fn restored(saved: &SavedService, until: Instant, node: &Node) -> ServiceState {
        let mut service = ServiceState::new(match saved.unlisted {
            true => Presence::Lingering { until },
            false => Presence::Listed,
        });
        (service.answered_at, service.is_filtered) = (saved.answered_at, saved.filtered);
        service.index = saved.index;
        if saved.answered_at.is_some() {
            service.contents.set(saved.instances.to_vec(), node);
        }
        service
    }

    /// What the next run restores.
    pub fn saved(&self) -> SavedService {
        let (instances, answered_at) = match &self.contents {
            Contents::Service { instances, .. } => (instances.clone(), self.answered_at),
            Contents::Pending | Contents::NoService => (Arc::default(), None),
        };
        SavedService {
            instances,
            answered_at,
            used_at: self.used_at,
            filtered: self.is_filtered,
            unlisted: self.presence != Presence::Listed,
            index: self.index,
        }
    }

    /// The number of instances that serve.
    pub fn n_serving(&self) -> usize {
        n_serving(self.contents.instances())
    }

    /// Whether most of what serves, or served before an answer was withheld, isn't even listed by this
    /// answer.
    pub fn vanishes(&self, answer: &ServiceAnswer) -> bool {
        let before = self.live.as_ref().and_then(|live| live.before.as_deref());
        let n_before = before.map_or_else(|| self.n_serving(), n_serving);
        let listed = answer.instances.as_ref().map(Vec::len);
        listed.is_some_and(|n_listed| is_shrink(n_before, n_listed))
    }

    /// Applies an answer. `is_in_use` is whether the kernel serves the name since before this run.
    pub fn apply(&mut self, answer: ServiceAnswer, node: &Node, is_in_use: bool, now: Instant) {
        let is_lost = self.vanishes(&answer) && answer.n_serving() == 0;
        if let Some(live) = &mut self.live {
            (live.is_followed, live.before) = (true, None);
            if let (Contents::Service { instances, .. }, true) = (&self.contents, is_lost) {
                live.lose(instances.clone(), now);
            }
        }
        (self.answered_at, self.is_emptied) = (Some(now), false);
        self.set(answer, node, is_in_use, now);
    }

    /// Adds what a withheld answer lists, and removes nothing. A listed instance replaces one of the same
    /// name, and one of the same address and port.
    pub fn withhold(&mut self, answer: ServiceAnswer, node: &Node, is_in_use: bool, now: Instant) {
        let (Some(mut all), Contents::Service { instances, .. }, Some(live)) =
            (answer.instances, &self.contents, &mut self.live)
        else {
            return;
        };
        let before = live.before.get_or_insert_with(|| instances.clone());
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
        self.set(ServiceAnswer { instances: Some(all), ..answer }, node, is_in_use, now);
    }

    /// Sets the contents to an answer without the instances that are held down.
    fn set(&mut self, answer: ServiceAnswer, node: &Node, is_in_use: bool, now: Instant) {
        self.held_down = None;
        let Some(instances) = &answer.instances else {
            self.contents = Contents::NoService;
            return;
        };
        let mut instances = instances.clone();
        node.mark_local(&mut instances);
        // What the kernel serves already came before this run.
        let release_at = match is_in_use && matches!(self.contents, Contents::Pending) {
            true => None,
            false => {
                let known = self.contents.instances();
                self.hold_down.judge(&mut instances, &answer.unchecked, known, now)
            }
        };
        self.contents.set(instances, node);
        self.held_down = release_at.map(|at| Box::new((at, answer)));
    }

    /// Releases the instances whose hold-down is over. That is no answer of Consul.
    pub fn release(&mut self, node: &Node, is_in_use: bool, now: Instant) {
        if let Some(held_down) = self.held_down.take_if(|held_down| held_down.0 <= now) {
            let (_, answer) = *held_down;
            self.set(answer, node, is_in_use, now);
        }
    }

    /// Removes the instances of a name that has vanished from the list. Returns whether the name
    /// lingers: only a service's does.
    pub fn empty(&mut self, node: &Node, now: Instant) -> bool {
        (self.held_down, self.is_emptied) = (None, true);
        let serves = self.n_serving() > 0;
        if let Some(live) = &mut self.live {
            live.before = None;
            if let (Contents::Service { instances, .. }, true) = (&self.contents, serves) {
                live.lose(instances.clone(), now);
            }
        }
        if let Contents::Service { .. } = self.contents {
            self.contents.set(Vec::new(), node);
        }
        !matches!(self.contents, Contents::NoService)
    }

    /// Whether Consul has listed an instance since the list of names lost the service.
    pub fn is_back(&self) -> bool {
        !self.is_emptied && !self.contents.instances().is_empty()
    }

    /// The next moment at which a hold-down, the lingering or the use ends.
    pub fn deadline(&self) -> Option<Instant> {
        let release = self.held_down.as_ref().map(|held_down| held_down.0);
        let end = match self.presence {
            Presence::Lingering { until } => Some(until),
            Presence::Listed | Presence::Found => None,
        };
        let idle = self.used_at.map(|at| at + IDLE_TIMEOUT);
        [release, end, idle].into_iter().flatten().min()
    }

    /// Whether the last use was longer than [`IDLE_TIMEOUT`] ago.
    pub fn is_idle(&self, now: Instant) -> bool {
        self.used_at.is_some_and(|at| now >= at + IDLE_TIMEOUT)
    }

    /// The instances as the catalog lists them, and whether they are followed; `None` where the catalog
    /// lacks the name. `nothing` stands for unknown instances.
    pub fn published<'a>(
        &'a self,
        was_published: bool,
        nothing: &'a Arc<[Instance]>,
    ) -> Option<(&'a Arc<[Instance]>, Watch)> {
        let is_followed = self.live.as_ref().is_some_and(|live| live.is_followed);
        let watch = if is_followed { Watch::Live } else { Watch::Cold };
        match &self.contents {
            Contents::Service { instances, .. } => Some((instances, watch)),
            // A new name that is live at once joins when its answer comes.
            Contents::Pending if self.live.is_some() && !was_published => None,
            Contents::Pending => Some((nothing, watch)),
            Contents::NoService => None,
        }
    }
}

//! What is derived from all records: totals, and queues of what is due. A change of one record costs what it
//! changes.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use super::super::index::ReadMode;
use super::super::service::{Contents, Live, Presence, ServiceState};
use crate::dns_name::service_name_problem;

/// What is derived from all records.
#[derive(Debug, Default)]
pub struct Index {
    pub totals: Totals,
    /// The names by [`ServiceState::deadline`].
    pub deadlines: BTreeSet<(Instant, Arc<str>)>,
    /// The live services by their last answer, or by when they became live.
    pub ages: BTreeSet<(Instant, Arc<str>)>,
    /// The live services whose next request Consul may hold, and the others.
    pub blocking: QueryQueue,
    pub plain: QueryQueue,
    /// The services with a problem.
    pub failing: BTreeSet<Arc<str>>,
    /// The services with a suspicion.
    pub suspicious: BTreeSet<Arc<str>>,
    /// The services that vanished lately.
    pub vanished: BTreeSet<Arc<str>>,
    /// The services to become live, or cold.
    pub shifting: BTreeSet<Arc<str>>,
}

/// Numbers of records.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Totals {
    pub n_live: usize,
    /// The live services without an answer.
    pub n_pending: usize,
    pub n_serving: usize,
    pub n_lingering: usize,
    pub n_needs_agent: usize,
    /// The live services with an answer of known size, and the sum of the sizes.
    pub n_sized: usize,
    pub n_bytes: usize,
}

/// Live services without a request under way.
#[derive(Debug, Default)]
pub struct QueryQueue {
    /// By when their request is due.
    pub later: BTreeSet<(Instant, Arc<str>)>,
    /// Those that are due, by their last answer.
    pub ready: BTreeSet<(Option<Instant>, Arc<str>)>,
}

/// What the [`Index`] has of one record.
#[derive(Debug, Default, PartialEq)]
pub struct Keys {
    pub totals: Totals,
    pub deadline: Option<Instant>,
    /// When the next request is due, if none is under way.
    pub due: Option<(ReadMode, Instant)>,
    pub answered_at: Option<Instant>,
    pub age: Option<Instant>,
    pub is_failing: bool,
    pub is_suspicious: bool,
    pub has_vanished: bool,
    pub is_shifting: bool,
}

impl Index {
    pub fn replace(&mut self, name: &Arc<str>, from: &Keys, to: &Keys) {
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
pub fn can_be_had(name: &str) -> bool {
    service_name_problem(name).is_none()
}

impl Keys {
    pub fn of(name: &str, service: &ServiceState, follows_all: bool) -> Keys {
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

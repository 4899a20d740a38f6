//! When what vanishes from a service is suspicious, and what follows from that for others.

use std::sync::Arc;
use std::time::Instant;

use super::super::index::IndexMove;
use super::super::query::ServiceAnswer;
use super::super::suspicion::{self, Assessment, Evidence, Reason, Suspicion, is_mass};
use super::ServiceStore;
use crate::counted::counted;

impl ServiceStore {
    pub(super) fn assess_vanishing(
        &mut self,
        name: &Arc<str>,
        answer: &ServiceAnswer,
        evidence: Evidence,
    ) -> Assessment {
        let (now, serves) = (evidence.now, answer.n_serving() > 0);
        self.edit_live(name, |live| live.suspect_at = (!serves).then_some(now));
        self.discard_vanished(now);
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

    /// Discards what vanished more than the window of a mass loss ago.
    pub(super) fn discard_vanished(&mut self, now: Instant) {
        // Only records that change: many services may vanish at once.
        let live = |name: &Arc<str>| self.by_name.get(name)?.live.as_deref();
        let is_outdated = |name: &&Arc<str>| live(name).is_some_and(|live| live.is_outdated(now));
        let outdated: Vec<_> = self.index.vanished.iter().filter(is_outdated).cloned().collect();
        for other in outdated {
            self.edit_live(&other, |live| live.discard_vanished(now));
        }
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
    pub(super) fn take_back(&mut self, suspicion: Suspicion) {
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

    /// Whether answers are suspicious, so that an absent name may exist.
    pub fn has_suspicions(&self, now: Instant) -> bool {
        self.list_suspicion.is_some_and(|suspicion| suspicion.holds(now))
            || self.index.suspicious.iter().any(|name| self.is_suspicious(name, now))
    }

    /// Whether the loss of this service is suspicious.
    pub fn is_suspicious(&self, name: &str, now: Instant) -> bool {
        self.suspicion_of(name, now).is_some()
    }

    pub(super) fn suspicion_of(&self, name: &str, now: Instant) -> Option<Suspicion> {
        self.by_name.get(name)?.live.as_ref()?.suspicion.filter(|it| it.holds(now))
    }

    pub(super) fn suspicion_problem(&self, now: Instant) -> Option<String> {
        let services = self.index.suspicious.iter();
        let services =
            services.filter_map(|name| Some((name, self.suspicion_of(name, now)?.reason)));
        let first = services.clone().min_by_key(|(_, reason)| *reason);
        let of_list = self.list_suspicion.filter(|suspicion| suspicion.holds(now));
        let reason = of_list.map(|it| it.reason).or(first.map(|(_, reason)| reason))?;
        let lacking = match (first, services.count()) {
            (None, _) => "names that it listed before".into(),
            (Some((name, _)), 1) => format!("instances of `{name}`"),
            (Some((name, _)), n) => {
                format!("instances of `{name}` and {}", counted(n - 1, "more service"))
            }
        };
        Some(suspicion::problem(&lacking, reason, self.distrust))
    }
}

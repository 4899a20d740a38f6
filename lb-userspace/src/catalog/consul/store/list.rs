//! What a list of names changes, and when it is suspicious.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use super::super::query::List;
use super::super::service::{Presence, ServiceState};
use super::super::suspicion::{self, Assessment, Evidence, Reason, is_mass, is_shrink};
use super::ServiceStore;

/// The most names that linger.
pub(super) const MAX_LINGERING: usize = 1024;

impl ServiceStore {
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
            let before = self.list_suspicion;
            let assessment =
                suspicion::assess(&mut self.list_suspicion, evidence, reason, self.distrust);
            // Where few services are live, only the list shows that their loss was one of many.
            if let Some(new) = self.list_suspicion.filter(|new| Some(*new) != before)
                && new.reason != Reason::Filtered
            {
                self.discard_vanished(evidence.now);
                self.take_back(new);
            }
            assessment
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
}

//! An answer about a live service: whether it applies, and what it changes.

use std::sync::Arc;
use std::time::Instant;

use super::super::query::ServiceAnswer;
use super::super::suspicion::{Assessment, Evidence, is_shrink};
use super::ServiceStore;

impl ServiceStore {
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
}

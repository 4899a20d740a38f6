//! Live services: which they are, and whose request is next.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::index::ReadMode;
use super::super::query::RequestId;
use super::super::service::{Live, Presence};
use super::ServiceStore;
use super::derived::{Index, Keys, Totals};

impl ServiceStore {
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

    pub(super) fn start(&mut self, name: &Arc<str>, now: Instant) {
        self.edit(name, |service, _| {
            service.live = Some(Box::new(Live::new(service.index, now)));
        });
    }

    pub(super) fn stop(&mut self, name: &Arc<str>) {
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
}

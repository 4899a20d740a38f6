//! `all_critical = "keep"`: where all instances of a service turn critical at once, the last ones that
//! served keep serving for a while. Checks that all fail at once are more often wrong than right
//! (traefik's issue 6856; Envoy's panic threshold).
//!
//! As in [`super::first_contact`], the caller has the clock.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Backend, Service};

/// The services that are kept.
#[derive(Debug, Default)]
pub struct Keeps {
    /// How long; `None` for not at all.
    limit: Option<Duration>,
    by_service: BTreeMap<Arc<str>, Keep>,
    /// Those that the clock hasn't met yet.
    new: BTreeSet<Arc<str>>,
    /// The others, by when they began.
    begun: BTreeSet<(Instant, Arc<str>)>,
}

/// A service that is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Keep {
    /// The clock hasn't met it yet.
    New,
    /// Since then.
    Since(Instant),
    /// Its time is over; the service has to be built again.
    Over,
}

impl Keeps {
    /// Sets how long a service is kept, also one that is; `None` for not at all.
    pub fn set_limit(&mut self, limit: Option<Duration>) {
        self.limit = limit;
    }

    /// The services that are kept.
    pub fn services(&self) -> impl Iterator<Item = &Arc<str>> {
        self.by_service.keys()
    }

    /// Keeps those `critical` backends of a service that served before, where none serves. They move
    /// from its excluded instances to its backends.
    pub fn judge(&mut self, service: &mut Service, critical: impl Iterator<Item = Backend>) {
        let name = service.name.clone();
        if self.limit.is_none() || service.healthy().next().is_some() {
            return self.end(&name);
        }
        let kept: Vec<Backend> = critical.filter(|backend| backend.state.is_reached()).collect();
        let is_over = self.by_service.get(&name) == Some(&Keep::Over);
        if kept.is_empty() || is_over {
            return self.end(&name);
        }
        let ids: BTreeSet<_> = kept.iter().map(|kept| (&*kept.node, &*kept.id)).collect();
        service.excluded.retain(|it| !ids.contains(&(&*it.node, &*it.id)));
        service.backends.extend(kept);
        if !self.by_service.contains_key(&name) {
            self.new.insert(name.clone());
            self.by_service.insert(name, Keep::New);
        }
    }

    /// Ends the keeping of a service, if it is kept.
    pub fn end(&mut self, service: &str) {
        match self.by_service.remove_entry(service) {
            Some((name, Keep::Since(since))) => drop(self.begun.remove(&(since, name))),
            Some((name, Keep::New)) => drop(self.new.remove(&name)),
            Some((_, Keep::Over)) | None => {}
        }
    }

    /// Begins the time of those that are new, and returns them.
    pub fn begin(&mut self, now: Instant) -> Vec<Arc<str>> {
        let new: Vec<_> = std::mem::take(&mut self.new).into_iter().collect();
        for name in &new {
            self.by_service.insert(name.clone(), Keep::Since(now));
            self.begun.insert((now, name.clone()));
        }
        new
    }

    /// Ends what is over, and returns the services to build again.
    pub fn expire(&mut self, now: Instant) -> Vec<Arc<str>> {
        let mut expired = Vec::new();
        while let Some((since, _)) = self.begun.first()
            && self.limit.is_none_or(|limit| *since + limit <= now)
            && let Some((_, name)) = self.begun.pop_first()
        {
            self.by_service.insert(name.clone(), Keep::Over);
            expired.push(name);
        }
        expired
    }

    /// When to call [`Keeps::expire`] next.
    pub fn next_wake(&self) -> Option<Instant> {
        Some(self.begun.first()?.0 + self.limit.unwrap_or_default())
    }

    /// How a service is kept, a clause; `None` where it isn't.
    pub fn status(&self, service: &str, now: Instant) -> Option<String> {
        let limit = self.limit?;
        let since = match self.by_service.get(service)? {
            Keep::New => now,
            Keep::Since(since) => *since,
            Keep::Over => return None,
        };
        let since = now.saturating_duration_since(since);
        let (left, since) = (limit.saturating_sub(since).as_secs_f64().ceil(), since.as_secs());
        Some(format!("kept: all instances are critical since {since} s; for {left} s more"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::{BackendState, Excluded, Ports, Protocols, Watch};

    const LIMIT: Duration = Duration::from_secs(60);

    fn backend(id: &str, state: BackendState) -> Backend {
        Backend {
            address: Some(([10, 0, 0, 1], 80).into()),
            shown_address: "10.0.0.1:80".into(),
            node: "n1".into(),
            id: id.into(),
            weight: 1,
            state,
            reason: None,
            host_only: false,
        }
    }

    /// What serves of a service with this instance that serves, these that are critical and served, and
    /// `other`, which didn't; and what is out.
    fn judge(keeps: &mut Keeps, serving: &[&str], critical: &[&str]) -> (String, String) {
        let excluded = critical.iter().chain(&["other"]).map(|id| Excluded {
            address: "10.0.0.1:80".into(),
            node: "n1".into(),
            id: (*id).into(),
            reason: "check `web` is critical".into(),
        });
        let mut service = Service {
            name: "web".into(),
            vip: [127, 128, 0, 1].into(),
            vip6: None,
            ports: Ports::only([80]),
            protocols: Protocols::Tcp,
            pin: None,
            backends: serving.iter().map(|id| backend(id, BackendState::Healthy)).collect(),
            excluded: excluded.collect(),
            notes: Vec::new(),
            watch: Watch::Live,
            generation: 1,
        };
        keeps.judge(&mut service, critical.iter().map(|id| backend(id, BackendState::Warning)));
        let ids = service.healthy().map(|backend| &*backend.id).collect::<Vec<_>>().join(" ");
        let out = service.excluded.iter().map(|out| &*out.id).collect::<Vec<_>>().join(" ");
        (ids, out)
    }

    fn pair(serving: &str, out: &str) -> (String, String) {
        (serving.into(), out.into())
    }

    #[test]
    fn the_last_healthy_instances_serve_for_a_while() {
        let start = Instant::now();
        let mut keeps = Keeps::default();
        assert_eq!(judge(&mut keeps, &[], &["a", "b"]), pair("", "a b other"), "by default");
        keeps.set_limit(Some(LIMIT));
        assert_eq!(judge(&mut keeps, &["a"], &["b"]), pair("a", "b other"));
        assert_eq!(judge(&mut keeps, &[], &["a", "b"]), pair("a b", "other"));
        assert_eq!((keeps.begin(start), keeps.begin(start)), (vec!["web".into()], vec![]));
        // One is deregistered, or in maintenance.
        assert_eq!(judge(&mut keeps, &[], &["b"]), pair("b", "other"));
        let at = start + Duration::from_secs(12);
        let status = "kept: all instances are critical since 12 s; for 48 s more";
        assert_eq!(keeps.status("web", at).as_deref(), Some(status));
        assert_eq!(keeps.next_wake(), Some(start + LIMIT));
        assert_eq!(keeps.expire(start + LIMIT - Duration::from_millis(1)), []);
        assert_eq!(keeps.expire(start + LIMIT), ["web".into()]);
        assert_eq!(judge(&mut keeps, &[], &["b"]), pair("", "b other"));
        assert_eq!((keeps.status("web", at), keeps.next_wake()), (None, None));
    }

    #[test]
    fn one_that_recovers_ends_it() {
        let start = Instant::now();
        let mut keeps = Keeps::default();
        keeps.set_limit(Some(LIMIT));
        for _ in 0..2 {
            assert_eq!(judge(&mut keeps, &[], &["a", "b"]), pair("a b", "other"));
            keeps.begin(start);
            assert_eq!(judge(&mut keeps, &["b"], &["a"]), pair("b", "a other"));
            assert_eq!(keeps.next_wake(), None);
        }
        assert_eq!(judge(&mut keeps, &[], &["b"]), pair("b", "other"));
        keeps.end("web");
        assert_eq!(keeps.begin(start), [] as [Arc<str>; 0]);
    }

    #[test]
    fn another_limit_holds_for_what_is_kept() {
        let start = Instant::now();
        let mut keeps = Keeps::default();
        keeps.set_limit(Some(LIMIT));
        judge(&mut keeps, &[], &["a"]);
        keeps.begin(start);
        keeps.set_limit(Some(LIMIT / 2));
        assert_eq!(keeps.next_wake(), Some(start + LIMIT / 2));
        keeps.set_limit(None);
        assert_eq!(keeps.services().collect::<Vec<_>>(), [&Arc::from("web")]);
        assert_eq!(judge(&mut keeps, &[], &["a"]), pair("", "a other"));
    }
}

//! `all_critical = "keep"`: where all instances of a service turn critical at once, the last ones that
//! served keep serving for a while. Checks that all fail at once are more often wrong than right
//! (traefik's issue 6856; Envoy's panic threshold).
//!
//! "At once" is within [`WINDOW`]: each check has its own interval and phase, so they fail one after the
//! other, and only the last one would be left. As in [`super::first_contact`], the caller has the clock.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Backend, Service};

/// An instance that turned critical longer before the last one isn't kept. Checks usually have an interval
/// of 10 s, and a timeout of as long.
pub const WINDOW: Duration = Duration::from_secs(30);

/// The node and the id of an instance.
type InstanceKey = (String, String);

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
    /// The instances that turned critical lately, of services that others serve, and when; `None` before
    /// the clock has met them.
    critical: BTreeMap<Arc<str>, BTreeMap<InstanceKey, Option<Instant>>>,
    new_critical: Vec<(Arc<str>, InstanceKey)>,
    /// In the order of time.
    since: VecDeque<(Instant, Arc<str>, InstanceKey)>,
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

    /// Keeps those `critical` backends of a service that served lately, where none serves: takes them out
    /// of its excluded instances and returns them, for its backends. `served_before` is whether a backend
    /// served in the last table.
    pub fn judge(
        &mut self,
        service: &mut Service,
        critical: impl Iterator<Item = Backend>,
        served_before: impl Fn(&Backend) -> bool,
    ) -> Vec<Backend> {
        let name = service.name.clone();
        let known = self.critical.remove(&name).unwrap_or_default();
        if self.limit.is_none() {
            self.end(&name);
            return Vec::new();
        }
        let (mut lately, mut since) = (Vec::new(), BTreeMap::new());
        for backend in critical.filter(|backend| backend.state.is_reached()) {
            let key = (backend.node.clone(), backend.id.clone());
            let at = match known.get(&key) {
                Some(at) => *at,
                None if served_before(&backend) => {
                    self.new_critical.push((name.clone(), key.clone()));
                    None
                }
                None => continue,
            };
            since.insert(key, at);
            lately.push(backend);
        }
        if service.healthy().next().is_some() {
            if !since.is_empty() {
                self.critical.insert(name.clone(), since);
            }
            self.end(&name);
            return Vec::new();
        }
        if lately.is_empty() || self.by_service.get(&name) == Some(&Keep::Over) {
            self.end(&name);
            return Vec::new();
        }
        service.excluded.retain(|it| !since.contains_key(&(it.node.clone(), it.id.clone())));
        if !self.by_service.contains_key(&name) {
            self.new.insert(name.clone());
            self.by_service.insert(name, Keep::New);
        }
        lately
    }

    /// Ends the keeping of a service, if it is kept.
    pub fn end(&mut self, service: &str) {
        match self.by_service.remove_entry(service) {
            Some((name, Keep::Since(since))) => drop(self.begun.remove(&(since, name))),
            Some((name, Keep::New)) => drop(self.new.remove(&name)),
            Some((_, Keep::Over)) | None => {}
        }
    }

    /// Drops what is known of a service.
    pub fn forget(&mut self, service: &str) {
        self.critical.remove(service);
        self.end(service);
    }

    /// Begins the time of those that are new, and returns the services that are kept from now on.
    pub fn begin(&mut self, now: Instant) -> Vec<Arc<str>> {
        for (name, key) in std::mem::take(&mut self.new_critical) {
            let at = self.critical.get_mut(&name).and_then(|since| since.get_mut(&key));
            if let Some(at) = at.filter(|at| at.is_none()) {
                *at = Some(now);
                self.since.push_back((now, name, key));
            }
        }
        let new: Vec<_> = std::mem::take(&mut self.new).into_iter().collect();
        for name in &new {
            self.by_service.insert(name.clone(), Keep::Since(now));
            self.begun.insert((now, name.clone()));
        }
        new
    }

    /// Ends what is over, and returns the services to build again.
    pub fn expire(&mut self, now: Instant) -> Vec<Arc<str>> {
        while let Some((at, ..)) = self.since.front()
            && *at + WINDOW <= now
            && let Some((at, name, key)) = self.since.pop_front()
        {
            let Some(since) = self.critical.get_mut(&name) else { continue };
            if since.get(&key) == Some(&Some(at)) {
                since.remove(&key);
            }
            if since.is_empty() {
                self.critical.remove(&name);
            }
        }
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
        let over = self.begun.first().map(|(at, _)| *at + self.limit.unwrap_or_default());
        over.into_iter().chain(self.since.front().map(|(at, ..)| *at + WINDOW)).min()
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
    use crate::table::{BackendState, Excluded};

    const LIMIT: Duration = Duration::from_secs(60);

    fn backend(id: &str, state: BackendState) -> Backend {
        let example = Backend::example(([10, 0, 0, 1], 80).into());
        Backend { node: "n1".into(), id: id.into(), state, ..example }
    }

    /// What serves of a service with these instances that serve, these that are critical, and `other`,
    /// which never served; and what is out. Those that are critical served in the last table.
    fn judge(keeps: &mut Keeps, serving: &[&str], critical: &[&str]) -> (String, String) {
        judge_after(keeps, critical, serving, critical)
    }

    /// The same, where `before` served in the last table.
    fn judge_after(
        keeps: &mut Keeps,
        before: &[&str],
        serving: &[&str],
        critical: &[&str],
    ) -> (String, String) {
        let excluded = critical.iter().chain(&["other"]).map(|id| Excluded {
            address: "10.0.0.1:80".into(),
            node: "n1".into(),
            id: (*id).into(),
            reason: "check `web` is critical".into(),
        });
        let backends = serving.iter().map(|id| backend(id, BackendState::Healthy)).collect();
        let mut service = Service { excluded: excluded.collect(), ..Service::example(backends) };
        let warning = critical.iter().map(|id| backend(id, BackendState::Warning));
        let kept = keeps.judge(&mut service, warning, |it| before.contains(&&*it.id));
        service.backends.extend(kept);
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
    fn what_turned_critical_shortly_before_is_kept_as_well() {
        let start = Instant::now();
        let mut keeps = Keeps::default();
        keeps.set_limit(Some(LIMIT));
        let all = ["a", "b", "c"];
        assert_eq!(judge_after(&mut keeps, &all, &["b", "c"], &["a"]), pair("b c", "a other"));
        assert_eq!(keeps.begin(start), [] as [Arc<str>; 0]);
        let later = start + WINDOW - Duration::from_secs(1);
        assert_eq!(
            judge_after(&mut keeps, &["b", "c"], &["c"], &["a", "b"]),
            pair("c", "a b other")
        );
        keeps.begin(later);
        assert_eq!(keeps.next_wake(), Some(start + WINDOW));
        for (now, kept) in
            [(later, pair("a b c", "other")), (start + WINDOW, pair("b c", "a other"))]
        {
            assert_eq!(keeps.expire(now), [] as [Arc<str>; 0]);
            let mut keeps =
                Keeps { limit: keeps.limit, critical: keeps.critical.clone(), ..Keeps::default() };
            assert_eq!(judge_after(&mut keeps, &["c"], &[], &all), kept);
        }
        keeps.forget("web");
        assert_eq!(keeps.expire(later + WINDOW), [] as [Arc<str>; 0]);
        assert_eq!((keeps.next_wake(), keeps.critical.len()), (None, 0));
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

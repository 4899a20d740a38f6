//! All configured sources, and the catalog that they have together.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{join_all, select_all};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use super::handle::{CatalogError, Handle, SupervisorExit};
use super::merge::Merger;
use super::published::{Health, Published};
use super::stats::Stats;
use super::usage::UsageSender;
use crate::config::Config;
use crate::table::{Catalog, ServiceId};

/// How long the first catalog waits for all sources where the kernel serves nothing yet, as after a boot.
const MAX_WAIT: Duration = Duration::from_secs(60);

/// The sources side by side; dropping them ends their tasks.
///
/// For one name the first source that has it applies. The first catalog is held back until each source
/// has reported, itself or by its copy on disk: what a source would add isn't known before, and a catalog
/// without it takes services out of the kernel. Where the kernel serves none, it waits no longer than
/// [`MAX_WAIT`]. Once there was one, a source that a reload adds holds nothing back.
#[derive(Debug)]
pub struct Sources {
    /// In order of precedence; at least one.
    listed: Vec<Handle>,
    /// What a reload removed while a source that it left or added had not reported yet: ended, but what
    /// it reported last serves until then.
    former: Vec<Handle>,
    merger: Merger,
    merged: Option<Published>,
    /// Until when the first catalog waits for all sources; `None`: as long as it takes, or no longer.
    waits_until: Option<Instant>,
    has_waited: bool,
    /// Whether the list has changed since the last merge.
    is_due: bool,
    demand: UsageSender,
    views: watch::Sender<Arc<[SourceView]>>,
}

/// What has happened to the sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceEvent {
    /// There may be another catalog: see [`Sources::merge`].
    Catalog,
    /// A source has switched translation off or on: see [`Sources::is_off`].
    Off,
    /// A source is no longer kept running.
    Ended(SupervisorExit),
}

impl Sources {
    /// Starts the configured sources. The services `in_use`, in lower case, are live from the start, so
    /// that no catalog lacks their instances.
    ///
    /// # Errors
    /// A static catalog that can't be used, and of which there is no good copy.
    pub fn spawn(config: &Config, in_use: Vec<Arc<str>>) -> Result<Sources, CatalogError> {
        let demand = UsageSender::default();
        let waits_until = in_use.is_empty().then(|| Instant::now() + MAX_WAIT);
        let start = |kind| Handle::spawn(kind, config, &demand, in_use.clone());
        let listed = config.catalog.sources.iter().map(start).collect::<Result<_, _>>()?;
        Ok(Sources { waits_until, ..Sources::of(listed, demand) })
    }

    fn of(listed: Vec<Handle>, demand: UsageSender) -> Sources {
        let sources = Sources {
            listed,
            former: Vec::new(),
            merger: Merger::default(),
            merged: None,
            waits_until: None,
            has_waited: false,
            is_due: true,
            demand,
            views: watch::Sender::new(Arc::default()),
        };
        sources.send_views();
        sources
    }

    /// Reports uses of services to the source that fetches by demand, where there is one.
    pub fn demand(&self) -> &UsageSender {
        &self.demand
    }

    /// The sources for readers, in order of precedence, as they change.
    pub fn views(&self) -> watch::Receiver<Arc<[SourceView]>> {
        self.views.subscribe()
    }

    /// The last merged catalog.
    pub fn merged(&self) -> Option<&Published> {
        self.merged.as_ref()
    }

    /// Whether a source has switched translation off.
    pub fn is_off(&self) -> bool {
        self.listed.iter().chain(&self.former).any(|handle| *handle.off.borrow())
    }

    /// Waits until something happens. Cancel safe.
    pub async fn changed(&mut self) -> SourceEvent {
        if self.is_due {
            return SourceEvent::Catalog;
        }
        // The senders live as long as the handles.
        let each = self.listed.iter_mut().map(|handle| {
            Box::pin(async {
                tokio::select! {
                    _ = handle.catalog.changed() => SourceEvent::Catalog,
                    _ = handle.off.changed() => SourceEvent::Off,
                    exit = handle.supervisor.join() => SourceEvent::Ended(exit),
                }
            })
        });
        let waits_until = self.waits_until.filter(|_| self.merged.is_none());
        let wait = async {
            match waits_until {
                Some(until) => sleep_until(until).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            (event, ..) = select_all(each) => event,
            () = wait => {
                (self.waits_until, self.has_waited) = (None, true);
                SourceEvent::Catalog
            }
        }
    }

    /// Merges what the sources have reported; `None` while the first catalog is held back.
    pub fn merge(&mut self) -> Option<&Published> {
        self.is_due = false;
        let mut is_complete = true;
        let mut reported = Vec::new();
        for handle in &mut self.listed {
            let published = handle.catalog.borrow_and_update().clone();
            match published {
                Some(published) => reported.push((handle.name(), published)),
                None => is_complete = false,
            }
        }
        if is_complete {
            self.former.clear();
        } else if self.merged.is_none() && !self.has_waited {
            return None;
        }
        let former = self
            .former
            .iter()
            .filter_map(|handle| Some((handle.name(), handle.catalog.borrow().clone()?)));
        reported.extend(former);
        let news_at = reported.iter().map(|(_, published)| published.news_at).max()?;
        let catalogs = reported.into_iter().map(|(name, published)| (name, published.catalog));
        let catalog = self.merger.merge(catalogs.collect()).clone();
        self.merged = Some(Published { catalog, news_at });
        self.merged.as_ref()
    }

    /// Adds, removes, restarts and reorders sources as a configuration has them that has passed
    /// [`super::check`]. A source whose part of it is the same keeps running.
    pub async fn reconfigure(&mut self, config: &Config, in_use: Vec<Arc<str>>) {
        let mut handles: Vec<Handle> = self.listed.drain(..).chain(self.former.drain(..)).collect();
        for kind in &config.catalog.sources {
            let known = handles.iter().position(|handle| handle.name() == kind.name());
            let handle = match known.map(|idx| handles.remove(idx)) {
                Some(mut handle) => {
                    handle.reconfigure(config, in_use.clone()).await;
                    handle
                }
                None => Handle::add(kind, config, &self.demand, in_use.clone()),
            };
            self.listed.push(handle);
        }
        join_all(handles.iter_mut().map(Handle::end)).await;
        handles.iter().for_each(|handle| handle.demand.disconnect());
        self.former = handles;
        self.is_due = true;
        self.send_views();
    }

    /// Ends the sources after they have saved their state.
    pub async fn stop(self) {
        join_all(self.listed.iter().map(Handle::flush)).await;
    }

    fn send_views(&self) {
        let view = |handle: &Handle| SourceView {
            health: handle.health.clone(),
            stats: handle.stats.clone(),
            catalog: handle.catalog.clone(),
        };
        self.views.send_replace(self.listed.iter().map(view).collect());
    }
}

/// A source for readers, such as `status`, metrics and `explain`.
#[derive(Clone, Debug)]
pub struct SourceView {
    /// The state of the source.
    pub health: watch::Receiver<Health>,
    /// Its statistics.
    pub stats: Arc<Stats>,
    catalog: watch::Receiver<Option<Published>>,
}

impl SourceView {
    /// The source's name.
    pub fn name(&self) -> &'static str {
        self.health.borrow().source
    }

    /// Whether it has reported a catalog since it was added.
    pub fn has_reported(&self) -> bool {
        self.catalog.borrow().is_some()
    }

    /// Whether it has a service of this name in lower case.
    pub fn has(&self, name: &str) -> bool {
        let has_it = |catalog: &Catalog| {
            catalog.contains_key(&ServiceId::new(name))
                || catalog.keys().any(|id| *id.folded_name() == *name)
        };
        self.catalog.borrow().as_ref().is_some_and(|published| has_it(&published.catalog))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;
    use std::time::Instant;

    use futures_util::FutureExt as _;

    use super::*;
    use crate::catalog::Lookup;
    use crate::catalog::publisher::Publisher;
    use crate::config::{ConsulAddress, SourceKind};
    use crate::table::{ServiceRecord, Watch};

    const LIMIT: Duration = Duration::from_secs(10);

    fn catalog(names: &[&str]) -> Catalog {
        let record = ServiceRecord::new([].into(), Watch::Live);
        names.iter().map(|name| (ServiceId::new(*name), record.clone())).collect()
    }

    fn publish(output: &Publisher, names: &[&str]) {
        output.publish(catalog(names), Instant::now());
    }

    fn names(published: Option<&Published>) -> Option<Vec<&str>> {
        Some(published?.catalog.keys().map(|id| &*id.name).collect())
    }

    #[tokio::test]
    async fn the_first_catalog_waits_for_each_source_and_a_later_one_for_none() {
        let (consul, file) = (Publisher::new("consul"), Publisher::new("file"));
        let listed = [&consul, &file].map(|output| Handle::of(output.clone()));
        let mut sources = Sources::of(listed.into(), UsageSender::default());
        assert_eq!(sources.changed().await, SourceEvent::Catalog);
        assert_eq!(names(sources.merge()), None);
        publish(&file, &["a", "web"]);
        assert_eq!(names(sources.merge()), None, "what Consul has isn't known");
        publish(&consul, &["Web"]);
        assert_eq!(names(sources.merge()), Some(vec!["Web", "a"]));
        let views = sources.views().borrow().clone();
        let having = |name: &str| -> Vec<_> {
            views.iter().filter(|source| source.has(name)).map(SourceView::name).collect()
        };
        assert_eq!((having("web"), having("a")), (vec!["consul", "file"], vec!["file"]));

        // A source that fails keeps what it had.
        consul.set_problem(Some("it is down".into()), true);
        publish(&file, &["b"]);
        assert_eq!(names(sources.merge()), Some(vec!["Web", "b"]));
    }

    #[tokio::test]
    async fn each_source_can_switch_translation_off() {
        let (consul, file) = (Publisher::new("consul"), Publisher::new("file"));
        let listed = [&file, &consul].map(|output| Handle::of(output.clone()));
        let mut sources = Sources::of(listed.into(), UsageSender::default());
        sources.merge();
        consul.set_off(true);
        assert!(sources.is_off());
        file.set_off(false);
        assert!(sources.is_off());
        consul.set_off(false);
        assert!(!sources.is_off());
    }

    /// A configuration with these sources: files, and a Consul that nothing answers for.
    fn config(dir: &Path, sources: &[&str]) -> Config {
        let mut config = Config { state_dir: dir.join("state"), ..Config::default() };
        // Port 1 of loopback: nothing listens there.
        config.consul.address = ConsulAddress::Http("127.0.0.1:1".into());
        let kind = |name: &&str| match *name {
            "consul" => SourceKind::Consul,
            file => SourceKind::File(dir.join(file)),
        };
        config.catalog.sources = sources.iter().map(kind).collect();
        config
    }

    fn write(dir: &Path, file: &str, names: &[&str]) {
        let services: String =
            names.iter().map(|name| format!("[[service]]\nname = \"{name}\"\n")).collect();
        fs::write(dir.join(file), services).unwrap();
    }

    /// Merges until the merged catalog has these services.
    async fn shows(sources: &mut Sources, expected: &[&str]) {
        let seen = async {
            loop {
                assert_ne!(sources.changed().await, SourceEvent::Ended(SupervisorExit::Panicked));
                if names(sources.merge()).as_deref() == Some(expected) {
                    return;
                }
            }
        };
        let is_seen = tokio::time::timeout(LIMIT, seen).await.is_ok();
        assert!(is_seen, "expected {expected:?}, last was {:?}", names(sources.merged()));
    }

    #[tokio::test]
    async fn a_reload_adds_removes_and_reorders_sources() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        write(dir, "one", &["a"]);
        write(dir, "two", &["b"]);
        let mut sources = Sources::spawn(&config(dir, &["one"]), Vec::new()).unwrap();
        shows(&mut sources, &["a"]).await;
        assert!(!sources.demand().is_connected());

        // A source that doesn't answer holds nothing back, and what it may have is unknown.
        for order in [["consul", "one"], ["one", "consul"]] {
            sources.reconfigure(&config(dir, &order), Vec::new()).await;
            shows(&mut sources, &["a"]).await;
            assert_eq!(sources.demand().look_up("web").await, Lookup::Unknown);
            let views = sources.views().borrow().clone();
            let reported: Vec<_> = views.iter().map(SourceView::has_reported).collect();
            assert_eq!(reported, order.map(|name| name != "consul"));
        }
        write(dir, "one", &["a", "c"]);
        shows(&mut sources, &["a", "c"]).await;

        // What the removed one had serves until the others have reported.
        sources.reconfigure(&config(dir, &["consul"]), Vec::new()).await;
        shows(&mut sources, &["a", "c"]).await;
        assert_eq!(sources.views().borrow().len(), 1);
        sources.reconfigure(&config(dir, &["two"]), Vec::new()).await;
        shows(&mut sources, &["b"]).await;
        assert_eq!(sources.demand().look_up("web").await, Lookup::Absent);
        sources.stop().await;
    }

    #[tokio::test]
    async fn a_source_that_never_reports_holds_others_back_for_a_while_where_nothing_is_served() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "one", &["a"]);
        let config = config(dir.path(), &["consul", "one"]);
        let sources = Sources::spawn(&config, Vec::new()).unwrap();
        assert!(sources.waits_until.is_some());
        drop(sources);

        let mut sources = Sources::spawn(&config, vec!["web".into()]).unwrap();
        assert_eq!(sources.waits_until, None, "the kernel serves something");
        assert_eq!(names(sources.merge()), None);
        assert_eq!(sources.changed().now_or_never(), None);
        sources.waits_until = Some(super::Instant::now());
        shows(&mut sources, &["a"]).await;
        assert_eq!(sources.demand().look_up("web").await, Lookup::Unknown);
    }

    #[tokio::test]
    async fn a_source_whose_configuration_is_the_same_keeps_running() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        write(dir, "one", &["a"]);
        let mut sources = Sources::spawn(&config(dir, &["consul", "one"]), Vec::new()).unwrap();
        let mut health = sources.views().borrow()[0].health.clone();
        let fails = health.wait_for(|health| health.is_failing);
        tokio::time::timeout(LIMIT, fails).await.expect("it runs").unwrap();
        let former = sources.demand().channel().unwrap();
        sources.reconfigure(&config(dir, &["one", "consul"]), Vec::new()).await;
        assert!(!former.is_closed());
        let mut other = config(dir, &["one", "consul"]);
        other.catalog.tag = "blue".into();
        sources.reconfigure(&other, Vec::new()).await;
        tokio::time::timeout(LIMIT, former.closed()).await.expect("it was restarted");
    }
}

//! Drains by hand: what is drained, and the file that keeps it across restarts.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use tokio::sync::{oneshot, watch};

use super::recorder::{FIRST_PAUSE, Recorded, Recorder, Snapshot};
use crate::admin::api;
use crate::table::{Builder, Drain, DrainError, DrainTarget, Drains, Table, resolve_drained};
use crate::{boot, durable};

/// The file's name, within the state directory.
const FILE_NAME: &str = "drains.json";

/// The version of its format.
const VERSION: u32 = 1;

/// How long the start waits for the file to be read.
const READ_TIMEOUT: Duration = Duration::from_secs(2);

/// How long the answer to a change waits for the disk.
const RECORD_TIMEOUT: Duration = Duration::from_secs(2);

/// A change that a client wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// No new connections.
    Drain,
    /// New connections again.
    Undrain,
}

/// A client's request.
#[derive(Debug)]
pub struct DrainRequest {
    /// The change.
    pub change: Change,
    /// What it concerns, as it was written.
    pub text: String,
    /// The result is sent here.
    pub answer: oneshot::Sender<api::DrainChange>,
}

/// What is drained, and its file.
#[derive(Debug)]
pub struct DrainBook {
    drains: watch::Sender<Arc<Drains>>,
    boot: String,
    version: u64,
    recorder: Arc<Recorder<DrainSnapshot>>,
    /// What was wrong with the file at the start.
    problem: Option<String>,
}

/// What the admin interface shows of it.
#[derive(Debug)]
pub struct DrainsView {
    drains: watch::Receiver<Arc<Drains>>,
    recorder: Arc<Recorder<DrainSnapshot>>,
    problem: Option<String>,
}

impl DrainsView {
    /// What is drained.
    pub fn drains(&self) -> Arc<Drains> {
        self.drains.borrow().clone()
    }

    /// What is wrong with the file.
    pub fn problems(&self) -> impl Iterator<Item = String> {
        self.problem.clone().into_iter().chain(self.recorder.problem())
    }
}

/// The file's contents.
#[derive(Debug, Serialize, Deserialize)]
struct File {
    version: u32,
    /// The boot that the times are of.
    boot: String,
    drains: Vec<Entry>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    target: DrainTarget,
    #[serde(flatten)]
    drain: Drain,
}

/// What is drained, to be written.
#[derive(Debug)]
pub(super) struct DrainSnapshot {
    version: u64,
    boot: String,
    drains: Arc<Drains>,
}

impl Snapshot for DrainSnapshot {
    const RISK: &'static str = "a restart loses what was drained or undrained meanwhile";

    fn version(&self) -> u64 {
        self.version
    }

    fn to_json(&self) -> Vec<u8> {
        let entry = |(target, drain): (&DrainTarget, &Drain)| Entry {
            target: target.clone(),
            drain: drain.clone(),
        };
        let drains = self.drains.iter().map(entry).collect();
        let file = File { version: VERSION, boot: self.boot.clone(), drains };
        // Names and numbers are always JSON.
        serde_json::to_vec(&file).unwrap_or_default()
    }
}

/// Why the file can't be used.
#[derive(Debug, thiserror::Error)]
enum FileError {
    #[error("can't read it: {0}")]
    Read(#[source] io::Error),
    #[error("the disk doesn't answer")]
    TimedOut,
    #[error("it isn't understood: {0}")]
    Parse(#[source] serde_json::Error),
    #[error("it is of version {0}, and this is version {VERSION}: a later nohop wrote it")]
    Version(u32),
}

/// The version alone, which every format has.
#[derive(Deserialize)]
struct Head {
    version: u32,
}

fn parse(text: &[u8]) -> Result<File, FileError> {
    let Head { version } = serde_json::from_slice(text).map_err(FileError::Parse)?;
    match version {
        VERSION => serde_json::from_slice(text).map_err(FileError::Parse),
        version => Err(FileError::Version(version)),
    }
}

/// The file that an earlier daemon left; `None` where there is none.
fn read(path: &Path) -> Result<Option<File>, FileError> {
    match std::fs::read(path) {
        Ok(text) => parse(&text).map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(FileError::Read(error)),
    }
}

/// Moves a file to a name next to it that is free, and returns that.
fn set_aside(path: &Path) -> io::Result<PathBuf> {
    let mut nth = 1;
    loop {
        let aside = path.with_extension(format!("unread-{nth}"));
        if !aside.try_exists()? {
            std::fs::rename(path, &aside)?;
            return Ok(aside);
        }
        nth += 1;
    }
}

impl DrainBook {
    /// What an earlier daemon had drained, by the file in `state_dir`. A file that can't be used is set
    /// aside, which is a problem in the status for as long as this daemon runs.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub async fn open(state_dir: &Path) -> io::Result<DrainBook> {
        let path = state_dir.join(FILE_NAME);
        // Without it each boot looks like another one: only deadlines begin again.
        let boot = boot::id().unwrap_or_default();
        let file = path.clone();
        let reading = tokio::task::spawn_blocking(move || read(&file));
        let found = match tokio::time::timeout(READ_TIMEOUT, reading).await {
            Ok(read) => read.unwrap_or_else(|error| Err(FileError::Read(io::Error::other(error)))),
            Err(_) => Err(FileError::TimedOut),
        };
        let (mut is_unread, mut problem) = (false, None);
        if let Err(error) = &found {
            let file = path.clone();
            let moved = tokio::task::spawn_blocking(move || set_aside(&file));
            let moved = tokio::time::timeout(READ_TIMEOUT, moved).await;
            is_unread = !matches!(moved, Ok(Ok(Ok(_))));
            let aside = match moved {
                Ok(Ok(Ok(aside))) => format!("it is set aside as {}", aside.display()),
                Ok(Ok(Err(error))) => format!("it can't be set aside yet ({error})"),
                _ => "it isn't set aside yet, since the disk doesn't answer".to_owned(),
            };
            let what = format!(
                "{}: {error}; {aside}; the drains in it don't apply: drain again what has to be",
                path.display()
            );
            tracing::error!("{what}");
            problem = Some(what);
        }
        let file = path.clone();
        let write = move |snapshot: &DrainSnapshot| {
            // What wasn't understood is never overwritten.
            if is_unread && file.try_exists()? {
                set_aside(&file)?;
            }
            is_unread = false;
            durable::replace(&file, &[&snapshot.to_json()])
        };
        let recorder = Arc::new(Recorder::start_with(path, FIRST_PAUSE, write)?);
        let drains = watch::Sender::new(Arc::default());
        let mut book = DrainBook { drains, boot, version: 0, recorder, problem };
        if let Ok(Some(file)) = found {
            book.adopt(file);
        }
        Ok(book)
    }

    fn adopt(&mut self, file: File) {
        let is_this_boot = file.boot == self.boot && !self.boot.is_empty();
        let now = boottime_ms();
        let drains = file.drains.into_iter().map(|Entry { target, drain }| {
            // No connection outlives a boot, so the deadline may begin again.
            let boottime_ms = if is_this_boot { drain.boottime_ms.min(now) } else { now };
            (target, Drain { boottime_ms, ..drain })
        });
        let drains: Drains = drains.collect();
        if !drains.is_empty() {
            tracing::info!("{} drains of an earlier run apply: see `nohop drain`", drains.len());
        }
        self.drains.send_replace(Arc::new(drains));
        if !is_this_boot {
            self.record();
        }
    }

    /// What is drained.
    pub fn drains(&self) -> Arc<Drains> {
        self.drains.borrow().clone()
    }

    /// What is drained, as it changes.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Drains>> {
        self.drains.subscribe()
    }

    /// For the admin interface.
    pub fn view(&self) -> DrainsView {
        DrainsView {
            drains: self.drains.subscribe(),
            recorder: self.recorder.clone(),
            problem: self.problem.clone(),
        }
    }

    /// Has what is drained written.
    fn record(&mut self) {
        self.version += 1;
        let (version, boot, drains) = (self.version, self.boot.clone(), self.drains());
        self.recorder.offer(version, || DrainSnapshot { version, boot, drains });
    }

    /// Makes a change. On an error nothing is changed.
    ///
    /// # Errors
    /// When what is named is unknown or ambiguous.
    pub fn change(
        &mut self,
        change: Change,
        text: &str,
        builder: &Builder,
        is_synced: bool,
    ) -> Result<Changed, DrainError> {
        let drained = resolve_drained(text, &self.drains());
        let target = match (change, drained) {
            (Change::Undrain, Err(error)) => return Err(error),
            (Change::Undrain, Ok(Some(target))) => target,
            (Change::Drain, drained) => match (builder.find_drain(text), drained) {
                // It has gone since it was drained.
                (Err(DrainError::Unknown { .. }), Ok(Some(target))) => target,
                (Err(DrainError::Unknown { .. }), _) if !is_synced => {
                    return Err(DrainError::NotSynced(text.to_owned()));
                }
                (found, _) => found?,
            },
            (Change::Undrain, Ok(None)) if !is_synced => {
                return Err(DrainError::NotSynced(text.to_owned()));
            }
            (Change::Undrain, Ok(None)) => builder.find_drain(text)?,
        };
        let mut drains = Drains::clone(&self.drains.borrow());
        let former = drains.get(&target).cloned();
        let is_changed = match change {
            Change::Drain => {
                let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
                let since = since.unwrap_or_default().as_secs();
                drains.add(target.clone(), Drain { since, boottime_ms: boottime_ms() })?
            }
            Change::Undrain => drains.remove(&target),
        };
        let drain = drains.get(&target).cloned().or(former);
        if is_changed {
            self.drains.send_replace(Arc::new(drains));
            self.record();
        }
        Ok(Changed { target, drain, is_changed })
    }

    /// Sends the result of a change once it is on disk, or that it isn't yet. Returns at once.
    pub fn answer(&self, mut result: api::DrainChange, client: oneshot::Sender<api::DrainChange>) {
        let (version, mut recorded) = (self.version, self.recorder.recorded());
        let is_over = move |now: &Recorded| now.version >= version || now.failure.is_some();
        let recorder = self.recorder.clone();
        tokio::spawn(async move {
            let waited = tokio::time::timeout(RECORD_TIMEOUT, recorded.wait_for(is_over)).await;
            let is_recorded = matches!(&waited, Ok(Ok(now)) if now.version >= version);
            drop(waited);
            if result.changed && !is_recorded {
                let problem = recorder.problem();
                result.warnings.push(problem.unwrap_or_else(|| {
                    "it applies, and isn't on disk yet: until it is, a restart loses it".to_owned()
                }));
            }
            // The client may have gone.
            let _ = client.send(result);
        });
    }
}

fn boottime_ms() -> u64 {
    u64::try_from(boot::time().as_millis()).unwrap_or(u64::MAX)
}

/// What a change concerned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changed {
    /// What it is.
    pub target: DrainTarget,
    /// Since when it is drained, or was until now.
    pub drain: Option<Drain>,
    /// Whether it was otherwise before.
    pub is_changed: bool,
}

/// The result of a change, in the table that follows it.
pub fn result(
    change: Change,
    changed: &Changed,
    drains: &Drains,
    table: &Table,
) -> api::DrainChange {
    let Changed { target, drain, is_changed } = changed;
    let mut warnings = Vec::new();
    let (mut n_backends, mut n_services) = (0, 0);
    for service in table.services.values() {
        let covered = service
            .backends
            .iter()
            .filter(|backend| target.covers(&backend.node, &backend.id, backend.address));
        let covered: Vec<_> = covered.collect();
        if covered.is_empty() {
            continue;
        }
        (n_services, n_backends) = (n_services + 1, n_backends + covered.len() as u64);
        match change {
            Change::Drain if service.healthy().next().is_none() => warnings.push(format!(
                "{} has no backend left here: connections to it are refused",
                service.name
            )),
            Change::Drain => {}
            Change::Undrain => warnings.extend(covered.iter().filter_map(|backend| {
                let (by, _) = drains.find(&backend.node, &backend.id, backend.address)?;
                Some(format!(
                    "{} of {} is still drained, by {by}",
                    backend.shown_address, service.name
                ))
            })),
        }
    }
    api::DrainChange {
        ok: true,
        problem: None,
        changed: *is_changed,
        drained: drains.get(target).is_some(),
        kind: Some(target.kind().to_owned()),
        name: Some(target.name()),
        since: drain.as_ref().map(Drain::since_text),
        services: n_services,
        backends: n_backends,
        warnings,
    }
}

/// The result where nothing was changed.
pub fn refuse(problem: impl fmt::Display) -> api::DrainChange {
    api::DrainChange { problem: Some(problem.to_string()), ..api::DrainChange::default() }
}

/// Logs a change.
pub fn log(change: Change, result: &api::DrainChange) {
    let (kind, name) = (result.kind.as_deref().unwrap_or(""), result.name.as_deref().unwrap_or(""));
    let (n_backends, n_services) = (result.backends, result.services);
    match (&result.problem, change) {
        (Some(problem), _) => tracing::warn!("nothing is drained or undrained: {problem}"),
        (None, _) if !result.changed => {}
        (None, Change::Drain) => {
            tracing::info!(n_backends, n_services, "{kind} {name} is drained by hand");
        }
        (None, Change::Undrain) => {
            tracing::info!(n_backends, n_services, "{kind} {name} isn't drained any more");
        }
    }
    result.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::table::vips::Vips;
    use crate::table::{
        BackendState, Catalog, HealthStatus, Instance, NodeIdentity, ServiceId, ServiceMeta,
        ServiceRecord, Watch,
    };

    fn instance(node: &str, id: &str, address: &str) -> Instance {
        Instance {
            node: node.into(),
            id: id.into(),
            address: address.into(),
            port: 80,
            weight: 1,
            local: false,
            node_identity: NodeIdentity::default(),
            node_address: None,
            may_be_local: false,
            health: HealthStatus::Serving,
            is_checked: true,
            is_critical: false,
            meta: ServiceMeta::default(),
        }
    }

    /// Services on three nodes, and the table of them.
    struct Fleet {
        builder: Builder,
        catalog: Catalog,
        table: Arc<Table>,
    }

    impl Fleet {
        fn new(drains: Arc<Drains>) -> Fleet {
            let vip = Config::default().vip;
            let mut builder = Builder::new(&vip, Vips::new((&vip).into()));
            builder.set_drains(drains);
            let record = |instances: &[Instance]| ServiceRecord::new(instances.into(), Watch::Live);
            let web = [instance("n1", "web-1", "10.0.0.1"), instance("n2", "web-2", "10.0.0.2")];
            // One endpoint that two nodes register.
            let db = [instance("n1", "db", "10.0.0.9"), instance("n3", "db", "10.0.0.9")];
            let catalog = [("web", record(&web)), ("db", record(&db))];
            let catalog: Catalog =
                catalog.map(|(name, record)| (ServiceId::new(name), record)).into_iter().collect();
            let table = builder.next(&Table::default(), &catalog, SystemTime::UNIX_EPOCH);
            Fleet { builder, catalog, table: table.unwrap().table }
        }

        /// Applies a change, as the daemon does.
        fn change(
            &mut self,
            book: &mut DrainBook,
            change: Change,
            text: &str,
        ) -> Result<api::DrainChange, String> {
            let changed = book.change(change, text, &self.builder, self.table.is_synced());
            let changed = changed.map_err(|error| error.to_string())?;
            self.builder.set_drains(book.drains());
            let next = self.builder.next(&self.table, &self.catalog, SystemTime::UNIX_EPOCH);
            assert!(next.is_none() || changed.is_changed, "{text}");
            self.table = next.map_or(self.table.clone(), |next| next.table);
            Ok(result(change, &changed, &book.drains(), &self.table))
        }

        /// The backends that are drained.
        fn drained(&self) -> Vec<String> {
            let backends = self.table.services.values().flat_map(|service| &service.backends);
            let drained = backends.filter(|backend| backend.state == BackendState::Draining);
            drained.map(|backend| format!("{}/{}", backend.node, backend.id)).collect()
        }
    }

    async fn recorded(book: &DrainBook) {
        let version = book.version;
        let mut recorded = book.recorder.recorded();
        recorded.wait_for(|now| now.version >= version).await.unwrap();
    }

    fn names(directory: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(directory).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[tokio::test]
    async fn what_is_drained_gets_nothing_and_what_is_unknown_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut book = DrainBook::open(dir.path()).await.unwrap();
        let mut fleet = Fleet::new(book.drains());
        let unknown = fleet.change(&mut book, Change::Drain, "n4").unwrap_err();
        let expected =
            "4 instances on 3 nodes are known; the closest names are `node:n1`, `node:n2`";
        assert!(unknown.contains(expected), "{unknown}");
        assert!(fleet.change(&mut book, Change::Undrain, "n4").is_err());
        assert!(fleet.change(&mut book, Change::Drain, "edge").is_err());
        assert_eq!((fleet.drained().len(), book.version), (0, 0));

        let drained = fleet.change(&mut book, Change::Drain, "web-1").unwrap();
        assert_eq!((drained.changed, drained.drained, drained.backends), (true, true, 1));
        assert_eq!((&drained.warnings[..], fleet.drained()), (&[][..], vec!["n1/web-1".into()]));
        let reason = fleet.table.services["web"].backends[0].reason.clone().unwrap();
        let since = drained.since.unwrap();
        assert_eq!(reason, format!("drained by hand since {since}, as instance:n1/web-1"));
        let again = fleet.change(&mut book, Change::Drain, "n1/web-1").unwrap();
        assert_eq!((again.changed, again.drained), (false, true));

        // A node, with the endpoint that another registers as well.
        let node = fleet.change(&mut book, Change::Drain, "n3").unwrap();
        let warning = "db has no backend left here: connections to it are refused";
        assert_eq!((node.services, &node.warnings[..]), (1, &[warning.to_owned()][..]));
        assert_eq!(fleet.drained(), ["n3/db", "n1/web-1"]);

        // What two drains cover stays drained.
        fleet.change(&mut book, Change::Drain, "10.0.0.1").unwrap();
        let undrained = fleet.change(&mut book, Change::Undrain, "web-1").unwrap();
        let warning = "10.0.0.1:80 of web is still drained, by address:10.0.0.1";
        assert_eq!((undrained.drained, &undrained.warnings[..]), (false, &[warning.into()][..]));
        fleet.change(&mut book, Change::Undrain, "10.0.0.1").unwrap();
        assert_eq!(fleet.drained(), ["n3/db"]);
        let not_drained = fleet.change(&mut book, Change::Undrain, "web-1").unwrap();
        assert_eq!((not_drained.ok, not_drained.changed), (true, false));
    }

    #[tokio::test]
    async fn drains_outlive_the_daemon_and_what_they_cover() {
        let dir = tempfile::tempdir().unwrap();
        let mut book = DrainBook::open(dir.path()).await.unwrap();
        let mut fleet = Fleet::new(book.drains());
        fleet.change(&mut book, Change::Drain, "n1").unwrap();
        fleet.change(&mut book, Change::Drain, "10.0.0.2:80").unwrap();
        recorded(&book).await;

        let mut next = DrainBook::open(dir.path()).await.unwrap();
        assert_eq!(next.drains(), book.drains());
        assert_eq!((next.version, next.view().problems().count()), (0, 0));
        let first = Fleet::new(next.drains());
        assert_eq!(first.drained(), ["n1/db", "n1/web-1", "n2/web-2"], "in the first table");

        // Before the first catalog nothing can be found but what is drained.
        let vip = Config::default().vip;
        let empty = Builder::new(&vip, Vips::new((&vip).into()));
        let early = next.change(Change::Drain, "n2", &empty, false).unwrap_err();
        assert!(matches!(early, DrainError::NotSynced(_)), "{early}");
        let early = next.change(Change::Undrain, "n2", &empty, false).unwrap_err();
        assert!(matches!(early, DrainError::NotSynced(_)), "{early}");
        assert!(!next.change(Change::Drain, "n1", &empty, false).unwrap().is_changed);
        assert!(next.change(Change::Undrain, "n1", &empty, true).unwrap().is_changed);
        recorded(&next).await;
        assert_eq!(DrainBook::open(dir.path()).await.unwrap().drains().len(), 1);
    }

    #[tokio::test]
    async fn times_of_another_boot_begin_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        let text = br#"{"version":1,"boot":"another","drains":[
            {"target":{"node":"n1"},"since":1795948200,"boottime_ms":18446744073709551615}]}"#;
        std::fs::write(&path, text).unwrap();
        let before = boottime_ms();
        let book = DrainBook::open(dir.path()).await.unwrap();
        let drains = book.drains();
        let (target, drain) = drains.iter().next().unwrap();
        assert_eq!((target.to_string(), drain.since), ("node:n1".into(), 1_795_948_200));
        assert!((before..=boottime_ms()).contains(&drain.boottime_ms), "{drain:?}");
        recorded(&book).await;
        let written = std::fs::read_to_string(&path).unwrap();
        assert!(written.contains(&boot::id().unwrap()), "{written}");
    }

    #[tokio::test]
    async fn a_file_that_is_not_understood_is_set_aside_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        for (text, problem) in [
            ("{\"version\":1,", "it isn't understood: EOF"),
            ("", "it isn't understood: EOF"),
            ("{\"version\":1,\"boot\":\"b\",\"drains\":[{\"target\":{\"rack\":\"r\"}}]}", "`rack`"),
            ("{\"version\":2,\"racks\":[]}", "it is of version 2, and this is version 1"),
        ] {
            std::fs::write(&path, text).unwrap();
            let book = DrainBook::open(dir.path()).await.unwrap();
            let problems: Vec<_> = book.view().problems().collect();
            assert!(problems.len() == 1 && problems[0].contains(problem), "{problems:?}");
            assert!(book.drains().is_empty() && !path.exists());
        }
        let aside: Vec<_> = (1..=4).map(|nth| format!("drains.unread-{nth}")).collect();
        assert_eq!(names(dir.path()), aside);
        let last = std::fs::read_to_string(dir.path().join("drains.unread-4")).unwrap();
        assert_eq!(last, "{\"version\":2,\"racks\":[]}");
    }

    #[tokio::test]
    async fn a_change_that_the_disk_does_not_take_applies_and_is_reported() {
        let dir = tempfile::tempdir().unwrap();
        let state_dir = dir.path().join("state");
        let mut book = DrainBook::open(&state_dir).await.unwrap();
        // A file in the directory's place.
        std::fs::write(&state_dir, "").unwrap();
        let mut fleet = Fleet::new(book.drains());
        let result = fleet.change(&mut book, Change::Drain, "n1").unwrap();
        let (answer, answered) = oneshot::channel();
        book.answer(result, answer);
        let answered = answered.await.unwrap();
        assert!(answered.ok && answered.changed);
        assert_eq!(answered.warnings.len(), 2, "{answered:?}");
        assert!(answered.warnings[1].contains("a restart loses what"), "{answered:?}");
    }
}

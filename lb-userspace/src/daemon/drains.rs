//! Drains by hand: what is drained, and the file that keeps it across restarts.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use tokio::sync::{oneshot, watch};

use super::recorder::{FIRST_PAUSE, Recorded, Recorder, Snapshot};
use crate::admin::api;
use crate::datapath::{Mode, SharedDatapath};
use crate::table::{
    Drain, DrainCatalog, DrainError, DrainTarget, Drains, EDGE, Table, resolve_drained,
};
use crate::{boot, durable};

/// The file's name, within the state directory.
const FILE_NAME: &str = "drains.json";

/// The version of its format.
const VERSION: u32 = 1;

/// How long the start waits for the file to be read.
const READ_TIMEOUT: Duration = Duration::from_secs(2);

/// How long the answer to a change waits for the disk.
const RECORD_TIMEOUT: Duration = Duration::from_secs(2);

/// The pause before the file is read again, where that failed.
const READ_PAUSE: Duration = Duration::from_secs(1);

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

/// What a request names. To find it takes a while among many instances, so the loop that carries changes to
/// the kernel has it searched for by a thread.
#[derive(Debug)]
pub struct FoundTarget {
    /// What is to be drained, or undrained.
    pub target: DrainTarget,
    /// The services of which it covers an instance, by name in lower case.
    pub covered: BTreeSet<Arc<str>>,
    /// Where it was searched for.
    pub searched: DrainCatalog,
}

/// Searches for what a request names, first among what is drained.
///
/// # Errors
/// When what is named is unknown or ambiguous.
pub fn find(
    change: Change,
    text: &str,
    drains: &Drains,
    searched: DrainCatalog,
    is_synced: bool,
) -> Result<FoundTarget, DrainError> {
    let drained = resolve_drained(text, drains);
    let target = match (change, drained) {
        (Change::Undrain, Err(error)) => return Err(error),
        (Change::Undrain, Ok(Some(target))) => target,
        (Change::Drain, drained) => match (searched.find(text), drained) {
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
        (Change::Undrain, Ok(None)) => searched.find(text)?,
    };
    let covered = searched.covered_by(&target);
    Ok(FoundTarget { target, covered, searched })
}

/// The edge, where a request names that. `is_edge` is whether this node is one; once drained it can be
/// undrained, whatever the configuration is now.
pub fn find_edge(text: &str, drains: &Drains, is_edge: bool) -> Option<DrainTarget> {
    let exists = is_edge || drains.get(&DrainTarget::Edge).is_some();
    (text == EDGE && exists).then_some(DrainTarget::Edge)
}

/// What is drained, and its file.
#[derive(Debug)]
pub struct DrainBook {
    drains: watch::Sender<Arc<Drains>>,
    boot: String,
    version: u64,
    recorder: Arc<Recorder<DrainSnapshot>>,
    /// While the file is still being read.
    reading: Option<Reading>,
    /// What is wrong with the file.
    problem: watch::Sender<Option<String>>,
}

/// The file of an earlier daemon is being read.
#[derive(Debug)]
struct Reading {
    result: oneshot::Receiver<ReadResult>,
    /// What was undrained meanwhile: the file may have it.
    undrained: BTreeSet<DrainTarget>,
}

/// What became of the file.
#[derive(Debug, Default)]
pub struct ReadResult {
    /// What it has; `None` where there is none, or where it is set aside.
    file: Option<File>,
    /// What was wrong with it.
    problem: Option<String>,
}

/// What the admin interface shows of it.
#[derive(Debug)]
pub struct DrainsView {
    drains: watch::Receiver<Arc<Drains>>,
    recorder: Arc<Recorder<DrainSnapshot>>,
    problem: watch::Receiver<Option<String>>,
}

impl DrainsView {
    /// What is drained.
    pub fn drains(&self) -> Arc<Drains> {
        self.drains.borrow().clone()
    }

    /// What is wrong with the file.
    pub fn problems(&self) -> impl Iterator<Item = String> {
        let problem = self.problem.borrow().clone();
        problem.into_iter().chain(self.recorder.problem())
    }
}

/// The file's contents.
#[derive(Debug, Serialize, Deserialize)]
struct File {
    version: u32,
    /// The boot that the times are of.
    boot: String,
    drains: Vec<Entry>,
    /// That of [`DrainTarget::Edge`]. Versions before it ignore a field that they don't know, and reject a whole file
    /// with a target that they don't.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    edge: Option<Drain>,
}

impl File {
    fn of(boot: String, drains: &Drains) -> File {
        let edge = drains.get(&DrainTarget::Edge).cloned();
        let others = drains.iter().filter(|(target, _)| **target != DrainTarget::Edge);
        let entry = |(target, drain): (&DrainTarget, &Drain)| Entry {
            target: target.clone(),
            drain: drain.clone(),
        };
        File { version: VERSION, boot, drains: others.map(entry).collect(), edge }
    }

    fn into_entries(self) -> impl Iterator<Item = Entry> {
        let edge = self.edge.map(|drain| Entry { target: DrainTarget::Edge, drain });
        self.drains.into_iter().chain(edge)
    }
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
        let file = File::of(self.boot.clone(), &self.drains);
        // Names and numbers are always JSON.
        serde_json::to_vec(&file).unwrap_or_default()
    }
}

/// Why the file can't be used.
#[derive(Debug, thiserror::Error)]
enum FileError {
    #[error("can't read it: {0}")]
    Read(#[source] io::Error),
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

/// Reads the file, again and again until that succeeds, as a disk may not answer for a while. One that isn't
/// understood is set aside; `is_unread` is whether that failed.
fn read_until_done(
    path: &Path,
    is_unread: &AtomicBool,
    result: oneshot::Sender<ReadResult>,
    problem: &watch::Sender<Option<String>>,
) {
    let error = loop {
        match read(path) {
            Ok(file) => {
                let _ = result.send(ReadResult { file, problem: None });
                return;
            }
            Err(FileError::Read(_)) if result.is_closed() => return,
            Err(FileError::Read(error)) => {
                report_unread(path, &error.to_string(), problem);
                std::thread::sleep(READ_PAUSE);
            }
            Err(error) => break error,
        }
    };
    let aside = match set_aside(path) {
        Ok(aside) => format!("it is set aside as {}", aside.display()),
        Err(error) => {
            is_unread.store(true, Ordering::Relaxed);
            format!("it can't be set aside yet ({error})")
        }
    };
    let what = format!(
        "{}: {error}; {aside}; the drains in it don't apply: drain again what has to be",
        path.display()
    );
    tracing::error!("{what}");
    let _ = result.send(ReadResult { file: None, problem: Some(what) });
}

/// Shows that the file isn't read yet, and logs it once.
fn report_unread(path: &Path, why: &str, problem: &watch::Sender<Option<String>>) {
    let what = format!(
        "{} isn't read yet ({why}): the drains in it don't apply until it is, and a restart loses what is \
         drained or undrained meanwhile; move it away to do without it",
        path.display()
    );
    problem.send_if_modified(|last| {
        let is_new = last.as_ref() != Some(&what);
        if is_new {
            tracing::error!("{what}");
            *last = Some(what);
        }
        is_new
    });
}

impl DrainBook {
    /// What an earlier daemon had drained, by the file in `state_dir`. A file that isn't understood is set
    /// aside, which is a problem in the status for as long as this daemon runs. One that isn't read within
    /// 2 s is waited for by [`DrainBook::read`], and nothing is written before.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub async fn open(state_dir: &Path) -> io::Result<DrainBook> {
        DrainBook::open_within(state_dir, READ_TIMEOUT).await
    }

    async fn open_within(state_dir: &Path, limit: Duration) -> io::Result<DrainBook> {
        let path = state_dir.join(FILE_NAME);
        // Without it each boot looks like another one: only deadlines begin again.
        let boot = boot::id().unwrap_or_default();
        let is_unread = Arc::new(AtomicBool::new(false));
        let (file, is_aside_due) = (path.clone(), is_unread.clone());
        let write = move |snapshot: &DrainSnapshot| {
            // What wasn't understood is never overwritten.
            if is_aside_due.load(Ordering::Relaxed) && file.try_exists()? {
                set_aside(&file)?;
            }
            is_aside_due.store(false, Ordering::Relaxed);
            durable::replace(&file, &[&snapshot.to_json()])
        };
        let recorder = Arc::new(Recorder::start_with(path.clone(), FIRST_PAUSE, write)?);
        let (problem, drains) =
            (watch::Sender::new(None), watch::Sender::new(Arc::new(Drains::incomplete())));
        let (result_out, result) = oneshot::channel();
        let thread = std::thread::Builder::new().name("drains".into());
        let (file, problem_out) = (path.clone(), problem.clone());
        thread.spawn(move || read_until_done(&file, &is_unread, result_out, &problem_out))?;
        let reading = Some(Reading { result, undrained: BTreeSet::new() });
        let mut book = DrainBook { drains, boot, version: 0, recorder, reading, problem };
        match tokio::time::timeout(limit, book.read()).await {
            Ok(result) => book.adopt(result),
            Err(_) if book.problem.borrow().is_some() => {}
            Err(_) => report_unread(&path, "the disk doesn't answer", &book.problem),
        }
        Ok(book)
    }

    /// Waits until the file is read; for ever, once it is. Cancel safe.
    pub async fn read(&mut self) -> ReadResult {
        let Some(Reading { result, .. }) = &mut self.reading else {
            return std::future::pending().await;
        };
        // Its thread neither ends before nor panics.
        result.await.unwrap_or_default()
    }

    /// Adds what the file has, except what was undrained since the start.
    pub fn adopt(&mut self, ReadResult { file, problem }: ReadResult) {
        let undrained = self.reading.take().map(|reading| reading.undrained).unwrap_or_default();
        self.problem.send_replace(problem);
        let is_changed = self.version > 0;
        let is_other =
            file.as_ref().is_some_and(|file| file.boot != self.boot || self.boot.is_empty());
        let now = boottime_ms();
        let mut drains = Drains::clone(&self.drains());
        let n_before = drains.len();
        drains.complete();
        for Entry { target, drain } in file.into_iter().flat_map(File::into_entries) {
            // No connection outlives a boot, so the deadline may begin again.
            let boottime_ms = if is_other { now } else { drain.boottime_ms.min(now) };
            if !undrained.contains(&target) {
                drains.restore(target, Drain { boottime_ms, ..drain });
            }
        }
        let n = drains.len() - n_before;
        if n > 0 {
            tracing::info!("{n} drains of an earlier run apply: see `nohop drain`");
        }
        self.drains.send_replace(Arc::new(drains));
        if is_changed || is_other {
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
            problem: self.problem.subscribe(),
        }
    }

    /// Has what is drained written, once the file of an earlier daemon is read.
    fn record(&mut self) {
        self.version += 1;
        if self.reading.is_none() {
            let (version, boot, drains) = (self.version, self.boot.clone(), self.drains());
            self.recorder.offer(version, || DrainSnapshot { version, boot, drains });
        }
    }

    /// Makes a change. On an error nothing is changed.
    ///
    /// # Errors
    /// When there are too many drains.
    pub fn change(&mut self, change: Change, target: DrainTarget) -> Result<Changed, DrainError> {
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
        if let Some(Reading { undrained, .. }) = &mut self.reading {
            match change {
                Change::Drain => drop(undrained.remove(&target)),
                Change::Undrain => drop(undrained.insert(target.clone())),
            }
        }
        let drain = drains.get(&target).cloned().or(former);
        if is_changed {
            self.drains.send_replace(Arc::new(drains));
        }
        // The file may have what was undrained.
        if is_changed || self.reading.is_some() {
            self.record();
        }
        Ok(Changed { target, drain, is_changed })
    }

    /// Sends a result to the client, once what is drained is on disk or with the warning that it isn't
    /// yet. Returns at once; `result` is called on a thread.
    pub fn answer(
        &self,
        result: impl FnOnce() -> api::DrainChange + Send + 'static,
        client: oneshot::Sender<api::DrainChange>,
    ) {
        let (version, mut recorded) = (self.version, self.recorder.recorded());
        let unread = self.reading.as_ref().and_then(|_| self.problem.borrow().clone());
        let is_over = move |now: &Recorded| now.version >= version || now.failure.is_some();
        let recorder = self.recorder.clone();
        tokio::spawn(async move {
            let Ok(mut result) = tokio::task::spawn_blocking(result).await else { return };
            if let Some(unread) = unread {
                result.warnings.push(unread);
            } else if result.ok {
                let waited = tokio::time::timeout(RECORD_TIMEOUT, recorded.wait_for(is_over)).await;
                let is_recorded = matches!(&waited, Ok(Ok(now)) if now.version >= version);
                drop(waited);
                if !is_recorded {
                    let problem = recorder.problem();
                    result.warnings.push(problem.unwrap_or_else(|| {
                        "it applies, and isn't on disk yet: until it is, a restart loses it"
                            .to_owned()
                    }));
                }
            }
            // The client may have gone.
            let _ = client.send(result);
        });
    }

    /// Waits until what is drained is on disk.
    ///
    /// # Errors
    /// Why it never will be.
    pub async fn flush(&self) -> Result<(), &'static str> {
        let version = self.version;
        if self.reading.is_some() && version > 0 {
            return Err("the file of an earlier run isn't read yet");
        }
        let mut recorded = self.recorder.recorded();
        let waited = recorded.wait_for(|now| now.version >= version).await;
        waited.map(drop).map_err(|_| "their recorder has ended")
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

/// Why a change of the table has no effect on connections yet.
#[derive(Debug, Default)]
pub struct Obstacles {
    /// For all services, a sentence each.
    pub general: Vec<String>,
    /// The services that the kernel doesn't have as the table has them, with the reason.
    pub errors: BTreeMap<Arc<str>, String>,
}

impl Obstacles {
    /// Those that there are now.
    pub fn of(datapath: &SharedDatapath) -> Obstacles {
        let hooks = datapath.hooks();
        let mut general = Vec::new();
        if let Mode::Shadow { why } = datapath.mode() {
            general.push(format!(
                "connections are only counted, so it has no effect until they are translated: {why}"
            ));
        }
        match &hooks.waiting {
            Some(waiting) => general.push(format!("it has no effect yet: {waiting}")),
            None if !hooks.attached => general.push(
                "it has no effect yet: the hooks aren't attached, see `nohop status`".to_owned(),
            ),
            None => {}
        }
        Obstacles { general, errors: datapath.errors() }
    }
}

/// The result of a change, in the table that follows it.
pub fn result(
    change: Change,
    changed: &Changed,
    drains: &Drains,
    table: &Table,
    obstacles: &Obstacles,
) -> api::DrainChange {
    let Changed { target, drain, is_changed } = changed;
    // The programs of an edge are others than those of connections.
    let mut warnings = match target {
        DrainTarget::Edge => Vec::new(),
        _ => obstacles.general.clone(),
    };
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
        if let Some(error) = obstacles.errors.get(&service.name) {
            warnings.push(format!("{} keeps its former backends for now: {error}", service.name));
        }
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
    use crate::table::{BackendState, Builder, Catalog, Instance, ServiceId, ServiceRecord, Watch};

    fn instance(node: &str, id: &str, address: &str) -> Instance {
        Instance {
            node: node.into(),
            id: id.into(),
            address: address.into(),
            ..Instance::fixture()
        }
    }

    /// Services on three nodes, and the table of them.
    struct Fleet {
        builder: Builder,
        catalog: Catalog,
        table: Arc<Table>,
        obstacles: Obstacles,
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
            let table = table.unwrap().table;
            Fleet { builder, catalog, table, obstacles: Obstacles::default() }
        }

        /// Applies a change, as the daemon does.
        fn change(
            &mut self,
            book: &mut DrainBook,
            change: Change,
            text: &str,
        ) -> Result<api::DrainChange, String> {
            let searched = self.builder.drain_catalog();
            let found = find(change, text, &book.drains(), searched, self.table.is_synced());
            let FoundTarget { target, covered, searched } =
                found.map_err(|error| error.to_string())?;
            let changed = book.change(change, target).unwrap();
            self.builder.change_drains(book.drains(), covered, &searched);
            let next = self.builder.next(&self.table, &self.catalog, SystemTime::UNIX_EPOCH);
            assert!(next.is_none() || changed.is_changed, "{text}");
            self.table = next.map_or(self.table.clone(), |next| next.table);
            Ok(result(change, &changed, &book.drains(), &self.table, &self.obstacles))
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
        assert_eq!(find_edge("edge", &book.drains(), false), None);
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
        let empty = Builder::new(&vip, Vips::new((&vip).into())).drain_catalog();
        let drains = next.drains();
        let found = |change, text, is_synced| find(change, text, &drains, empty.clone(), is_synced);
        for change in [Change::Drain, Change::Undrain] {
            let early = found(change, "n2", false).unwrap_err();
            assert!(matches!(early, DrainError::NotSynced(_)), "{early}");
        }
        let n1 = found(Change::Drain, "n1", false).unwrap().target;
        assert!(!next.change(Change::Drain, n1).unwrap().is_changed);
        let n1 = found(Change::Undrain, "n1", true).unwrap().target;
        assert!(next.change(Change::Undrain, n1).unwrap().is_changed);
        recorded(&next).await;
        assert_eq!(DrainBook::open(dir.path()).await.unwrap().drains().len(), 1);
    }

    #[tokio::test]
    async fn a_drained_edge_is_drained_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let mut book = DrainBook::open(dir.path()).await.unwrap();
        let edge = find_edge("edge", &book.drains(), true).unwrap();
        let changed = book.change(Change::Drain, edge).unwrap();
        let fleet = Fleet::new(book.drains());
        assert!(fleet.drained().is_empty(), "no backend is");
        let drains = book.drains();
        let result = result(Change::Drain, &changed, &drains, &fleet.table, &fleet.obstacles);
        assert_eq!((result.kind.as_deref(), result.drained), (Some("edge"), true));
        recorded(&book).await;
        // A version that knows no edge reads the file, but for that.
        let text = std::fs::read_to_string(dir.path().join(FILE_NAME)).unwrap();
        assert!(text.contains("\"drains\":[],\"edge\":{\"since\":"), "{text}");
        let mut next = DrainBook::open(dir.path()).await.unwrap();
        // Also where it is no edge any more.
        let edge = find_edge("edge", &next.drains(), false).unwrap();
        assert!(next.change(Change::Undrain, edge).unwrap().is_changed);
        assert!(next.drains().is_empty());
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
        // Also what is drained already isn't on disk.
        for is_changed in [true, false] {
            let result = fleet.change(&mut book, Change::Drain, "n1").unwrap();
            let answered = answer(&book, result).await;
            assert!(answered.ok && answered.changed == is_changed);
            assert_eq!(answered.warnings.len(), 2, "{answered:?}");
            assert!(answered.warnings[1].contains("a restart loses what"), "{answered:?}");
        }
    }

    async fn answer(book: &DrainBook, result: api::DrainChange) -> api::DrainChange {
        let (answer, answered) = oneshot::channel();
        book.answer(move || result, answer);
        answered.await.unwrap()
    }

    #[tokio::test]
    async fn a_stop_waits_for_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let mut book = DrainBook::open(dir.path()).await.unwrap();
        let mut fleet = Fleet::new(book.drains());
        book.flush().await.unwrap();
        fleet.change(&mut book, Change::Drain, "n1").unwrap();
        book.flush().await.unwrap();
        let written = std::fs::read_to_string(dir.path().join(FILE_NAME)).unwrap();
        assert!(written.contains("{\"node\":\"n1\"}"), "{written}");
    }

    /// Nothing is lost: neither what the file has, nor what was changed before it was read.
    #[tokio::test]
    async fn a_file_that_is_read_late_applies_then_and_is_not_overwritten_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        // To read a FIFO takes as long as a disk that doesn't answer: until another writes to it.
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        let mut book = DrainBook::open_within(dir.path(), Duration::ZERO).await.unwrap();
        assert!(book.drains().is_incomplete());
        let view = book.view();
        let problem = view.problems().collect::<Vec<_>>().join("\n");
        assert!(problem.contains("drains.json isn't read yet (the disk doesn't"), "{problem}");
        book.flush().await.unwrap();

        let mut fleet = Fleet::new(book.drains());
        let drained = fleet.change(&mut book, Change::Drain, "n1").unwrap();
        let drained = answer(&book, drained).await;
        assert_eq!((drained.changed, &drained.warnings[1..]), (true, &[problem.clone()][..]));
        let undrained = fleet.change(&mut book, Change::Undrain, "n3").unwrap();
        assert_eq!((undrained.changed, undrained.drained), (false, false));
        assert_eq!(answer(&book, undrained).await.warnings, [problem]);
        // It may be drained in the file, by a name that the catalog doesn't have.
        assert_eq!(answer(&book, refuse("unknown")).await.warnings.len(), 1);
        assert!(book.flush().await.is_err());
        assert!(!path.is_file(), "it is overwritten");

        let entry = |node: &str, at: u64| {
            let target = DrainTarget::Node(node.into());
            Entry { target, drain: Drain { since: 7, boottime_ms: at } }
        };
        let drains = vec![entry("n1", 1), entry("n2", 2), entry("n3", 3)];
        let file = File { version: VERSION, boot: book.boot.clone(), drains, edge: None };
        let text = serde_json::to_vec(&file).unwrap();
        let (to, read) = (path.clone(), book.read());
        let (_, read) = tokio::join!(
            tokio::task::spawn_blocking(move || std::fs::write(to, text).unwrap()),
            read
        );
        book.adopt(read);
        let now = book.drains();
        let shown: Vec<_> =
            now.iter().map(|(target, drain)| (target.name(), drain.boottime_ms)).collect();
        assert_eq!(shown, [("n1".into(), 1), ("n2".into(), 2)]);
        assert!(!now.is_incomplete());
        assert_eq!(view.problems().count(), 0);
        book.flush().await.unwrap();
        assert_eq!(DrainBook::open(dir.path()).await.unwrap().drains(), now);
    }

    #[tokio::test]
    async fn a_file_that_cannot_be_read_stays_until_it_can() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE_NAME);
        std::fs::create_dir(&path).unwrap();
        let mut book = DrainBook::open_within(dir.path(), Duration::ZERO).await.unwrap();
        // The thread reports the reason.
        let mut problem = book.problem.subscribe();
        let has = |why| move |it: &Option<String>| it.as_ref().is_some_and(|it| it.contains(why));
        problem.wait_for(has("drains.json isn't read yet (Is a directory")).await.unwrap();
        std::fs::remove_dir(&path).unwrap();
        let read = book.read().await;
        book.adopt(read);
        assert_eq!(book.view().problems().count(), 0);
    }

    #[tokio::test]
    async fn a_change_without_effect_is_reported() {
        let dir = tempfile::tempdir().unwrap();
        let mut book = DrainBook::open(dir.path()).await.unwrap();
        let mut fleet = Fleet::new(book.drains());
        let errors = [("web".into(), "a map is full".into()), ("api".into(), "x".into())];
        fleet.obstacles =
            Obstacles { general: vec!["it has no effect yet".into()], errors: errors.into() };
        let result = fleet.change(&mut book, Change::Drain, "n2").unwrap();
        let expected =
            ["it has no effect yet", "web keeps its former backends for now: a map is full"];
        assert_eq!(result.warnings, expected);
    }

    /// The catalog may change while what is drained is searched for.
    #[tokio::test]
    async fn what_registers_during_the_search_is_drained() {
        let dir = tempfile::tempdir().unwrap();
        let mut book = DrainBook::open(dir.path()).await.unwrap();
        let mut fleet = Fleet::new(book.drains());
        let searched = fleet.builder.drain_catalog();
        let found = find(Change::Drain, "n2", &book.drains(), searched, true).unwrap();
        let late = [instance("n2", "late", "10.0.0.3")];
        let record = ServiceRecord::new(late.into(), Watch::Live);
        fleet.catalog.insert(ServiceId::new("late"), record);
        let next = fleet.builder.next(&fleet.table, &fleet.catalog, SystemTime::UNIX_EPOCH);
        fleet.table = next.unwrap().table;
        book.change(Change::Drain, found.target).unwrap();
        fleet.builder.change_drains(book.drains(), found.covered, &found.searched);
        let next = fleet.builder.next(&fleet.table, &fleet.catalog, SystemTime::UNIX_EPOCH);
        let next = next.unwrap().table;
        // No other service is built.
        assert!(Arc::ptr_eq(&next.services["db"], &fleet.table.services["db"]));
        fleet.table = next;
        assert_eq!(fleet.drained(), ["n2/late", "n2/web-2"]);
    }
}

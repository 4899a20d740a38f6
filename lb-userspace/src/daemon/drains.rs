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
use crate::capabilities;
use crate::counted::counted;
use crate::datapath::{Mode, SharedDatapath};
use crate::table::{
    Backend, BackendState, Drain, DrainCatalog, DrainError, DrainTarget, Drains, EDGE, Service,
    Table, Watch, resolve_drained,
};
use crate::{boot, durable, regular_file};

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
    match regular_file::read(path) {
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
        thread.spawn(move || {
            capabilities::for_files();
            read_until_done(&file, &is_unread, result_out, &problem_out);
        })?;
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
            tracing::info!(
                n_drains = n,
                "drains of an earlier run are restored: see `nohop drain`"
            );
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

    /// Why what is drained isn't on disk.
    pub fn failure(&self) -> String {
        self.recorder.failure()
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
    // The other drains that keep what is undrained.
    let (mut holders, mut n_held) = (BTreeSet::new(), 0);
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
            Change::Drain if lost_all(service, &covered) => warnings.push(format!(
                "{} has no backend left here: connections to it are refused",
                service.name
            )),
            Change::Drain => {}
            Change::Undrain => warnings.extend(covered.iter().filter_map(|backend| {
                let (by, _) = drains.find(&backend.node, &backend.id, backend.address)?;
                holders.insert(by);
                n_held += 1;
                Some(format!(
                    "{} of {} is still drained, by {by}",
                    backend.shown_address, service.name
                ))
            })),
        }
    }
    let n_cold = table.services.values().filter(|it| it.watch == Watch::Cold).count();
    if change == Change::Drain && *target != DrainTarget::Edge && n_backends == 0 && n_cold > 0 {
        let cold = counted(n_cold, "service");
        let are = if n_cold == 1 { "is" } else { "are" };
        warnings.push(format!(
            "it covers no instance that is known here; {cold} {are} cold, and what it covers of them \
             is drained once it is fetched"
        ));
    }
    // Who undrains it wants it to get connections. Of a node or an address some instances may be drained on purpose.
    let is_held = n_held == n_backends && n_held != 0 && !matches!(target, DrainTarget::Node(_));
    let problem = (!is_changed && is_held).then(|| {
        let holders: Vec<String> =
            holders.iter().map(|by| format!("`nohop undrain {by}`")).collect();
        format!("{target} is drained by another drain, which {} ends", holders.join(" and "))
    });
    api::DrainChange {
        ok: problem.is_none(),
        problem,
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

/// Whether a drain that covers these backends took the last ones of a service. One of weight 0 had no
/// connections before either.
fn lost_all(service: &Service, covered: &[&Backend]) -> bool {
    let was_reached =
        |backend: &&Backend| backend.state == BackendState::Draining && backend.weight > 0;
    service.healthy().next().is_none() && covered.iter().any(was_reached)
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
mod tests;

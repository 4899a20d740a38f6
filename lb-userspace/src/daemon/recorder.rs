//! The recorder of VIPs, and of drains: a thread of its own writes them to the state directory and
//! acknowledges what is on disk. A disk may be full or stall for minutes; nothing waits for it here.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::table::vips::{Pools, VipSnapshot, Vips};
use crate::{capabilities, durable, regular_file};

/// The file's name, within the state directory.
const FILE_NAME: &str = "vips.json";

/// How long the start waits for the file to be read.
const READ_TIMEOUT: Duration = Duration::from_secs(2);

/// The pause after a failed write; it doubles with each further one, up to [`MAX_PAUSE`].
pub(super) const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// The longest pause, so that a disk that has room again is noticed within it.
const MAX_PAUSE: Duration = Duration::from_secs(30);

/// A write that has taken this long is a problem.
const STALLED: Duration = Duration::from_secs(5);

const DISK_HANGS: &str = "the disk doesn't answer";

/// The contents of a file: complete, so that a later version replaces those before.
pub trait Snapshot: Send + 'static {
    /// What is at risk while it can't be written, as a part of a sentence.
    const RISK: &'static str;

    /// A number that grows with every change.
    fn version(&self) -> u64;

    /// The file's contents.
    fn to_json(&self) -> Vec<u8>;
}

impl Snapshot for VipSnapshot {
    const RISK: &'static str = "a reboot may change the addresses that names got meanwhile";

    fn version(&self) -> u64 {
        self.version
    }

    fn to_json(&self) -> Vec<u8> {
        VipSnapshot::to_json(self)
    }
}

/// The version on disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recorded {
    /// The last version that is on disk, as [`Snapshot::version`].
    pub version: u64,
    /// Why the last write failed; `None` after one that succeeded, and before the first.
    pub failure: Option<String>,
}

/// The recorder. Dropping it ends the thread, once the write that is under way has ended.
#[derive(Debug)]
pub struct Recorder<S = VipSnapshot> {
    path: PathBuf,
    inbox: Arc<Inbox<S>>,
    recorded: watch::Receiver<Recorded>,
}

/// The thread's pending work: the latest snapshot alone, since each is complete.
#[derive(Debug)]
struct Inbox<S> {
    content: Mutex<Content<S>>,
    changed: Condvar,
}

#[derive(Debug)]
struct Content<S> {
    snapshot: Option<S>,
    /// The last version that was submitted.
    submitted: u64,
    is_closed: bool,
    /// Since when the thread is in a write.
    writing_since: Option<Instant>,
}

impl Recorder {
    /// A recorder in `state_dir`, whose file has version 0: what [`load`] read.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn start(state_dir: &Path) -> io::Result<Recorder> {
        let path = state_dir.join(FILE_NAME);
        let target = path.clone();
        let write = move |snapshot: &VipSnapshot| durable::replace(&target, &[&snapshot.to_json()]);
        Recorder::start_with(path, FIRST_PAUSE, write)
    }

    /// Has the VIPs written where a version is new, unless a later one comes before the disk is free.
    /// It returns at once.
    pub fn submit(&self, vips: &Vips) {
        self.offer(vips.version(), || vips.snapshot());
    }
}

impl<S: Snapshot> Recorder<S> {
    /// A recorder of a file, which has version 0, with what writes a snapshot.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub(super) fn start_with(
        path: PathBuf,
        first_pause: Duration,
        write: impl FnMut(&S) -> io::Result<()> + Send + 'static,
    ) -> io::Result<Recorder<S>> {
        let content =
            Content { snapshot: None, submitted: 0, is_closed: false, writing_since: None };
        let inbox = Arc::new(Inbox { content: Mutex::new(content), changed: Condvar::new() });
        let (out, recorded) = watch::channel(Recorded::default());
        let thread = std::thread::Builder::new().name("recorder".into());
        let (of_thread, shown) = (inbox.clone(), path.display().to_string());
        thread.spawn(move || {
            capabilities::for_files();
            work(&of_thread, &shown, first_pause, write, &out);
        })?;
        Ok(Recorder { path, inbox, recorded })
    }

    /// Has a version written where it is new, unless a later one comes before the disk is free. It
    /// returns at once.
    pub fn offer(&self, version: u64, snapshot: impl FnOnce() -> S) {
        let mut content = self.inbox.lock();
        if content.submitted < version {
            content.submitted = version;
            content.snapshot = Some(snapshot());
            self.inbox.changed.notify_all();
        }
    }

    /// The version on disk, as it changes.
    pub fn recorded(&self) -> watch::Receiver<Recorded> {
        self.recorded.clone()
    }

    /// Why the last write didn't succeed, or isn't done.
    pub fn failure(&self) -> String {
        let failure = self.recorded.borrow().failure.clone();
        failure.unwrap_or_else(|| DISK_HANGS.to_owned())
    }

    /// The problem of the file: the last write failed, one takes too long, or the thread has ended.
    pub fn problem(&self) -> Option<String> {
        if self.recorded.has_changed().is_err() {
            return Some(format!(
                "can't write {}: its thread has ended (see the log; please report it); restart the \
                 daemon, since {}",
                self.path.display(),
                S::RISK
            ));
        }
        let stalled_for = self.inbox.lock().writing_since.map(|since| since.elapsed());
        let what = match stalled_for.filter(|&time| time >= STALLED) {
            Some(_) => format!("can't write {}: {DISK_HANGS}", self.path.display()),
            None => self.recorded.borrow().failure.clone()?,
        };
        Some(format!(
            "{what}; services are served all the same, but until it can be written, {}",
            S::RISK
        ))
    }
}

impl<S> Drop for Recorder<S> {
    fn drop(&mut self) {
        self.inbox.lock().is_closed = true;
        self.inbox.changed.notify_all();
    }
}

impl<S> Inbox<S> {
    fn lock(&self) -> MutexGuard<'_, Content<S>> {
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next snapshot to write; `None` once there is none left and the recorder is gone.
    fn take(&self) -> Option<S> {
        let waits = |content: &mut Content<S>| content.snapshot.is_none() && !content.is_closed;
        let waited = self.changed.wait_while(self.lock(), waits);
        let mut content = waited.unwrap_or_else(PoisonError::into_inner);
        content.writing_since = content.snapshot.is_some().then(Instant::now);
        content.snapshot.take()
    }

    /// Puts a snapshot back that couldn't be written, unless a later one has come, and waits for
    /// `pause`. Returns whether the recorder is still there.
    fn put_back(&self, snapshot: S, pause: Duration) -> bool {
        let mut content = self.lock();
        content.snapshot.get_or_insert(snapshot);
        content.writing_since = None;
        let waits = |content: &mut Content<S>| !content.is_closed;
        let waited = self.changed.wait_timeout_while(content, pause, waits);
        !waited.unwrap_or_else(PoisonError::into_inner).0.is_closed
    }
}

fn work<S: Snapshot>(
    inbox: &Inbox<S>,
    path: &str,
    first_pause: Duration,
    mut write: impl FnMut(&S) -> io::Result<()>,
    out: &watch::Sender<Recorded>,
) {
    let mut pause = first_pause;
    while let Some(snapshot) = inbox.take() {
        let Err(error) = write(&snapshot) else {
            inbox.lock().writing_since = None;
            pause = first_pause;
            if out.borrow().failure.is_some() {
                tracing::info!("{path} is written again");
            }
            out.send_replace(Recorded { version: snapshot.version(), failure: None });
            continue;
        };
        let failure = Some(format!("can't write {path}: {error}"));
        out.send_if_modified(|recorded| {
            let is_new = recorded.failure != failure;
            if is_new {
                let risk = S::RISK;
                tracing::error!("can't write {path}: {error}; until it can be written, {risk}");
                recorded.failure.clone_from(&failure);
            }
            is_new
        });
        if !inbox.put_back(snapshot, pause) {
            return;
        }
        pause = (pause * 2).min(MAX_PAUSE);
    }
}

/// Why others could change what is in the state directory; `None` where they can't, or the disk doesn't
/// answer.
pub async fn exposure(state_dir: &Path) -> Option<String> {
    let state_dir = state_dir.to_owned();
    let looking = tokio::task::spawn_blocking(move || {
        durable::exposure(&state_dir, durable::ProcessOwner::own())
    });
    let found = tokio::time::timeout(READ_TIMEOUT, looking).await;
    let problem = found.ok()?.ok()?;
    problem.inspect(|problem| tracing::warn!("{problem}"))
}

/// The VIPs that an earlier run recorded in `state_dir`. Where they can't be read, or the disk doesn't
/// answer, the daemon starts all the same: the kernel's maps know the addresses that are in use, and
/// names that need one find most again by their hash.
pub async fn load(state_dir: &Path, pools: Pools) -> Vips {
    let path = state_dir.join(FILE_NAME);
    let file = path.clone();
    let reading = tokio::task::spawn_blocking(move || read(&file, pools));
    let problem = match tokio::time::timeout(READ_TIMEOUT, reading).await {
        Ok(Ok(Ok(vips))) => return vips,
        Ok(Ok(Err(error))) => error.to_string(),
        Ok(Err(error)) => error.to_string(),
        Err(_) => DISK_HANGS.to_owned(),
    };
    let path = path.display();
    tracing::error!(
        "can't read {path}: {problem}; names unknown to the kernel may get other addresses"
    );
    Vips::unrecorded(pools)
}

/// Reads the file. A missing one is fine; one that can't be parsed is set aside under another name.
/// The version is 0 where the file has everything, else 1.
fn read(path: &Path, pools: Pools) -> io::Result<Vips> {
    let text = match regular_file::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(Vips::unrecorded(pools));
        }
        text => text?,
    };
    Ok(Vips::parse(&text, pools).unwrap_or_else(|problem| {
        let aside = path.with_extension("corrupt");
        let what = match std::fs::rename(path, &aside) {
            Ok(()) => format!("set aside as {}", aside.display()),
            Err(error) => format!("it can't be set aside either ({error})"),
        };
        let path = path.display();
        tracing::warn!("{path} can't be parsed ({problem}): {what}; VIPs are allocated again");
        Vips::unrecorded(pools)
    }))
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::mpsc;
    use std::time::SystemTime;

    use super::*;

    type Outcome = Result<(), &'static str>;

    /// A disk that reports each write, and waits for its outcome.
    pub struct Disk {
        pub writes: mpsc::Receiver<u64>,
        pub outcomes: mpsc::Sender<Outcome>,
    }

    /// A recorder on such a disk.
    pub fn recorder() -> (Recorder, Disk) {
        let (writes_out, writes) = mpsc::channel();
        let (outcomes, outcomes_in) = mpsc::channel::<Outcome>();
        let write = move |snapshot: &VipSnapshot| {
            // The test may be over.
            let _ = writes_out.send(snapshot.version);
            outcomes_in.recv().unwrap_or(Err("the test has ended")).map_err(io::Error::other)
        };
        let pause = Duration::from_millis(1);
        let recorder = Recorder::start_with("/vips.json".into(), pause, write).unwrap();
        (recorder, Disk { writes, outcomes })
    }

    fn pools() -> Pools {
        Pools { v4: "127.128.0.0/9".parse().unwrap(), v6: None }
    }

    /// Assigns one more address, which makes a version.
    fn assign(vips: &mut Vips) -> u64 {
        let name = format!("s{}", vips.version());
        vips.assign(&name.as_str().into(), SystemTime::UNIX_EPOCH).unwrap();
        vips.version()
    }

    #[tokio::test]
    async fn a_stalled_disk_delays_no_caller_and_the_latest_snapshot_wins() {
        let ((recorder, disk), mut vips) = (recorder(), Vips::new(pools()));
        assign(&mut vips);
        recorder.submit(&vips);
        assert_eq!(disk.writes.recv().unwrap(), 1);
        // The disk is in the middle of version 1. All of this returns at once.
        while assign(&mut vips) < 99 {
            recorder.submit(&vips);
        }
        recorder.submit(&vips);
        let mut recorded = recorder.recorded();
        assert_eq!(recorded.borrow_and_update().version, 0);
        disk.outcomes.send(Ok(())).unwrap();
        disk.outcomes.send(Ok(())).unwrap();
        assert_eq!(disk.writes.recv().unwrap(), 99, "those in between aren't worth a write");
        recorded.wait_for(|recorded| recorded.version == 99).await.unwrap();
        assert_eq!(recorder.problem(), None);
    }

    #[tokio::test]
    async fn a_failed_write_is_a_problem_until_the_latest_snapshot_is_written() {
        let ((recorder, disk), mut vips) = (recorder(), Vips::new(pools()));
        let mut recorded = recorder.recorded();
        assign(&mut vips);
        recorder.submit(&vips);
        assert_eq!(disk.writes.recv().unwrap(), 1);
        disk.outcomes.send(Err("no space")).unwrap();
        recorded.wait_for(|recorded| recorded.failure.is_some()).await.unwrap();
        let problem = recorder.problem().unwrap();
        assert!(problem.starts_with("can't write /vips.json: no space; "), "{problem}");
        // It is tried again by itself.
        assert_eq!(disk.writes.recv().unwrap(), 1);
        assign(&mut vips);
        recorder.submit(&vips);
        disk.outcomes.send(Err("no space")).unwrap();
        assert_eq!(disk.writes.recv().unwrap(), 2, "it has what version 1 has");
        disk.outcomes.send(Ok(())).unwrap();
        let now = recorded.wait_for(|recorded| recorded.version == 2).await.unwrap().clone();
        assert_eq!(now, Recorded { version: 2, failure: None });
        assert_eq!(recorder.problem(), None);
    }

    #[test]
    fn a_write_that_takes_long_is_a_problem() {
        let ((recorder, disk), mut vips) = (recorder(), Vips::new(pools()));
        assign(&mut vips);
        recorder.submit(&vips);
        disk.writes.recv().unwrap();
        assert_eq!(recorder.problem(), None);
        recorder.inbox.lock().writing_since = Instant::now().checked_sub(STALLED);
        assert!(recorder.problem().unwrap().contains("can't write /vips.json: the disk"));
    }

    /// The sample was written by the version before the recorder.
    #[tokio::test]
    async fn a_file_of_an_earlier_version_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let sample = include_bytes!("samples/vips.json");
        std::fs::write(directory.path().join(FILE_NAME), sample).unwrap();
        let mut vips = load(directory.path(), pools()).await;
        assert_eq!(vips.snapshot().to_json(), sample);
        for (name, vip) in [("web", [127, 252, 110, 32]), ("db", [127, 244, 73, 204])] {
            let assigned = vips.assign(&name.into(), SystemTime::UNIX_EPOCH).unwrap();
            assert_eq!(assigned.v4.octets(), vip, "{name}");
        }
        assert_eq!(vips.version(), 0, "nothing has to be recorded");
    }

    #[tokio::test]
    async fn the_file_has_what_was_submitted_and_a_corrupt_one_is_set_aside() {
        let directory = tempfile::tempdir().unwrap();
        let state_dir = directory.path().join("state");
        let mut vips = load(&state_dir, pools()).await;
        assert_eq!(vips.version(), 1, "nothing is recorded");
        let version = assign(&mut vips);
        let recorder = Recorder::start(&state_dir).unwrap();
        recorder.submit(&vips);
        recorder.recorded().wait_for(|recorded| recorded.version == version).await.unwrap();
        let read = load(&state_dir, pools()).await;
        assert_eq!(read.snapshot().to_json(), vips.snapshot().to_json());
        assert_eq!(read.version(), 0, "the file has everything");

        std::fs::write(state_dir.join(FILE_NAME), "{\"web\":").unwrap();
        let read = load(&state_dir, pools()).await;
        assert_eq!((read.in_use().count(), read.version()), (0, 1));
        assert!(state_dir.join("vips.corrupt").exists());
    }
}

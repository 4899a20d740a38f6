//! Cgroups: the scopes that nohop serves in a test.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Once;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process};

use crate::TIMEOUT;
use crate::cleanup::Cleanup;
use crate::tempdir;

/// A directory of its own below the cgroup v2 mount.
pub struct Cgroup {
    path: PathBuf,
    _cleanup: Cleanup,
}

impl Cgroup {
    /// Makes an empty cgroup.
    ///
    /// # Errors
    /// Without cgroup v2, or without the right to make a directory there.
    pub fn new() -> Result<Cgroup> {
        let root = root()?;
        sweep(&root);
        Cgroup::make(root.join(tempdir::name("cgroup")))
    }

    /// Makes an empty cgroup below this one, which removes it with itself if it is still there.
    ///
    /// # Errors
    /// Without the right to make a directory there.
    pub fn child(&self, name: &str) -> Result<Cgroup> {
        Cgroup::make(self.path.join(name))
    }

    fn make(path: PathBuf) -> Result<Cgroup> {
        let cleanup = Cleanup::new({
            let path = path.clone();
            move || remove(&path)
        });
        fs::create_dir(&path).with_context(|| format!("make the cgroup {}", path.display()))?;
        Ok(Cgroup { path, _cleanup: cleanup })
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Where the cgroup v2 hierarchy is mounted.
fn root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").context("read /proc/mounts")?;
    let mut mounts = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let found = mounts.find(|fields| fields.get(2) == Some(&"cgroup2"));
    let fields =
        found.context("cgroup v2 isn't mounted: `mount -t cgroup2 none /sys/fs/cgroup`")?;
    Ok(PathBuf::from(fields[1]))
}

/// Removes the cgroups that killed runs left behind, once in this process.
fn sweep(root: &Path) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| tempdir::sweep(root, |name| remove(&root.join(name))));
}

/// Removes a cgroup with the processes in it, if it exists.
fn remove(path: &Path) {
    if !path.exists() {
        return;
    }
    // Such as the one that nohop connections from, if it was killed at that moment.
    let below = fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    below.filter(|entry| entry.is_dir()).for_each(|cgroup| remove(&cgroup));
    if let Err(error) = empty(path).and_then(|()| Ok(fs::remove_dir(path)?)) {
        eprintln!("the cgroup {} stays: {error:#}", path.display());
    }
}

/// Kills the processes of a cgroup, and waits until they have left it.
fn empty(path: &Path) -> Result<()> {
    let events = path.join("cgroup.events");
    let events_file = File::open(&events)?;
    while fs::read_to_string(&events)?.contains("populated 1") {
        let pids = fs::read_to_string(path.join("cgroup.procs"))?;
        for pid in pids.lines().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)) {
            let _ = kill_process(pid, Signal::KILL);
        }
        let mut fds = [PollFd::new(&events_file, PollFlags::PRI)];
        let n_ready = poll(&mut fds, Some(&Timespec::try_from(TIMEOUT)?))?;
        anyhow::ensure!(n_ready > 0, "a killed process doesn't leave");
    }
    Ok(())
}

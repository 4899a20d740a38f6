//! Pins of an earlier daemon in another directory than today's: `bpffs` was changed, and its hooks serve the same
//! cgroup still.
//!
//! Both sets of programs run on each connection, the earlier one's first, with a table that isn't updated. So it
//! serves until this daemon has a table of its own, and is then detached.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::links::{end_all, find_attached};
use super::pins::{PinError, Pins};
use crate::causes;

/// How many directories of BPF file systems are looked at.
const MAX_DIRECTORIES: usize = 1_024;

/// The pins, each directory's locked.
#[derive(Debug, Default)]
pub struct FormerPins(Vec<Pins>);

impl FormerPins {
    /// Finds those with hooks of `scope` in other directories than `bpffs`, as far as this mount namespace has them.
    ///
    /// # Errors
    /// When the daemon that made them still runs.
    pub fn open(scope: &Path, bpffs: &Path) -> Result<FormerPins, PinError> {
        // One file system may be mounted in several places.
        let id = |dir: &Path| fs::metadata(dir).ok().map(|found| (found.dev(), found.ino()));
        let mut seen = BTreeSet::from([id(bpffs)]);
        let mut is_former =
            |dir: &PathBuf| seen.insert(id(dir)) && !find_attached(dir, scope).is_empty();
        let found: Vec<PathBuf> = directories().into_iter().filter(|dir| is_former(dir)).collect();
        let opened = found.into_iter().map(|dir| {
            let pins = Pins::open_existing(&dir)?;
            if pins.is_some() {
                tracing::warn!(
                    "{} has pins of an earlier daemon that served this cgroup: they serve until there is a table, \
                     and are removed then",
                    dir.display()
                );
            }
            Ok(pins)
        });
        opened.filter_map(Result::transpose).collect::<Result<_, _>>().map(FormerPins)
    }

    /// Detaches and removes them.
    pub fn end(&mut self) {
        self.0.retain(|pins| match end_all(pins) {
            Ok(_) => {
                tracing::info!("removed the earlier daemon's pins in {}", pins.dir().display());
                false
            }
            Err(error) => {
                let why = causes::with_root(&error);
                tracing::error!("the pins in {} can't be removed: {why}", pins.dir().display());
                true
            }
        });
    }

    /// Whether there are none left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The directories of BPF file systems that may hold pins of ours: this user's, two levels deep at most.
fn directories() -> BTreeSet<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let own = rustix::process::geteuid().as_raw();
    let is_own = |dir: &Path| {
        fs::symlink_metadata(dir).is_ok_and(|found| found.is_dir() && found.uid() == own)
    };
    let inside = |dir: &PathBuf| {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).filter(|path| is_own(path)).collect::<Vec<_>>()
    };
    let mut found = BTreeSet::new();
    let mut level: Vec<PathBuf> = mount_points(&mounts).filter(|dir| is_own(dir)).collect();
    for _ in 0..3 {
        let room = MAX_DIRECTORIES.saturating_sub(found.len());
        level.truncate(room);
        let next = level.iter().flat_map(inside).collect();
        found.extend(std::mem::replace(&mut level, next));
    }
    found
}

/// Where BPF file systems are mounted, by the text of /proc/self/mountinfo:
/// `31 24 0:28 / /sys/fs/bpf rw,nosuid shared:9 - bpf bpf rw,mode=700`.
fn mount_points(mounts: &str) -> impl Iterator<Item = PathBuf> {
    mounts.lines().filter_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        let path = mount.split(' ').nth(4)?;
        // Blanks are written as octal numbers.
        (kind.starts_with("bpf ") && !path.contains('\\')).then(|| PathBuf::from(path))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounted_bpf_file_systems() {
        let mounts = "31 24 0:28 / /sys/fs/bpf rw,nosuid shared:9 - bpf bpf rw,mode=700\n\
                      22 1 0:20 / /proc rw - proc proc rw\n\
                      40 1 0:33 / /tmp/a\\040b rw - bpf bpf rw\n\
                      41 1 0:34 / /run/pins rw - bpf none rw\n41 1";
        let found: Vec<_> = mount_points(mounts).collect();
        assert_eq!(found, [PathBuf::from("/sys/fs/bpf"), PathBuf::from("/run/pins")]);
    }
}

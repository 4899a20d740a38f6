//! Directories for files, and the names by which what a killed run left behind is known.

use std::fs;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};
use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};

use crate::cleanup::Cleanup;

/// A directory of its own among the system's temporary files.
pub struct TempDir {
    path: PathBuf,
    _cleanup: Cleanup,
}

impl TempDir {
    /// Makes an empty one; `role` is for the reader of a listing.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn new(role: &str) -> Result<TempDir> {
        static ONCE: Once = Once::new();
        ONCE.call_once(|| {
            sweep(&std::env::temp_dir(), |name| drop(fs::remove_dir_all(dir(name))));
        });
        let path = dir(&name(role));
        let cleanup = Cleanup::new({
            let path = path.clone();
            move || drop(fs::remove_dir_all(path))
        });
        fs::create_dir(&path).with_context(|| format!("make {}", path.display()))?;
        Ok(TempDir { path, _cleanup: cleanup })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn dir(name: &str) -> PathBuf {
    std::env::temp_dir().join(name)
}

/// A name that no other run and nothing else of this run has.
pub fn name(role: &str) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("nohop-{}-{count}-{role}", process::id())
}

/// Removes what runs that are over left in `dir`, without having undone everything.
pub(crate) fn sweep(dir: &Path, remove: impl Fn(&str)) {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| is_leftover(name)).for_each(|name| remove(&name));
}

/// Whether `name` was given by a run that is over.
fn is_leftover(name: &str) -> bool {
    let pid = name.strip_prefix("nohop-").and_then(|rest| rest.split('-').next()?.parse().ok());
    pid.and_then(Pid::from_raw).is_some_and(|pid| test_kill_process(pid) == Err(Errno::SRCH))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_over() {
        assert!(is_leftover("nohop-99999999-3-client"));
        for name in [name("client").as_str(), "nohop-kernel-99999999", "nohop", "99999999"] {
            assert!(!is_leftover(name), "{name}");
        }
    }
}

//! The network namespaces of this host, and going there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::procfs;

/// A network namespace that some thread is in.
#[derive(Debug)]
pub struct Namespace {
    /// What `readlink /proc/self/ns/net` shows. Unique while the namespace exists.
    pub inode: u64,
    /// The `ns/net` of each thread in it: any will do, and any may vanish.
    links: Vec<PathBuf>,
}

/// The network namespaces of all threads in this process's /proc.
///
/// Threads and not only processes, because a runtime's threads may sit in namespaces that its first
/// one isn't in, and because the first one may have ended.
///
/// # Errors
/// When /proc can't be read. Threads that end meanwhile are no error.
pub fn all() -> io::Result<Vec<Namespace>> {
    Ok(of_threads(procfs::all()?.map(|pid| pid.as_raw_nonzero().to_string())))
}

/// The network namespaces of these processes' threads.
pub fn of(pids: &BTreeSet<u32>) -> Vec<Namespace> {
    of_threads(pids.iter().map(u32::to_string))
}

fn of_threads(processes: impl Iterator<Item = String>) -> Vec<Namespace> {
    let mut links_by_inode = BTreeMap::<u64, Vec<PathBuf>>::new();
    for process in processes {
        let Ok(threads) = fs::read_dir(format!("/proc/{process}/task")) else { continue };
        for thread in threads.flatten() {
            let link = thread.path().join("ns/net");
            if let Ok(metadata) = fs::metadata(&link) {
                links_by_inode.entry(metadata.ino()).or_default().push(link);
            }
        }
    }
    links_by_inode.into_iter().map(|(inode, links)| Namespace { inode, links }).collect()
}

/// The inode of the calling thread's namespace.
///
/// # Errors
/// When /proc can't be read.
pub fn own() -> io::Result<u64> {
    Ok(fs::metadata("/proc/thread-self/ns/net")?.ino())
}

/// Whether the calling thread may look at the namespaces of other users' processes (`ptrace_may_access`), once it
/// has raised its capabilities.
pub fn may_look() -> bool {
    const CAP_SYS_PTRACE: u32 = 19;
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let permitted = status.lines().find_map(|line| line.strip_prefix("CapPrm:"));
    let permitted = permitted.and_then(|set| u64::from_str_radix(set.trim(), 16).ok());
    permitted.is_some_and(|set| set >> CAP_SYS_PTRACE & 1 == 1)
}

impl Namespace {
    /// The id of a process that has a thread in it; empty where there is none.
    pub fn pid(&self) -> &str {
        let link = self.links.first().and_then(|link| link.to_str());
        link.and_then(|link| link.split('/').nth(2)).unwrap_or_default()
    }

    /// Moves the calling thread there. Returns false when no thread is in the namespace any more.
    ///
    /// # Errors
    /// EPERM without CAP_SYS_ADMIN.
    pub fn enter(&self) -> io::Result<bool> {
        for link in &self.links {
            let Ok(file) = File::open(link) else { continue };
            // The thread may have moved on, or its number may be another's by now.
            if file.metadata()?.ino() == self.inode {
                move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))?;
                return Ok(true);
            }
        }
        Ok(false)
    }
}

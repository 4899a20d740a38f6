//! Locks on files by flock(2), which end with the process, and who holds them.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;

/// How long a daemon that has ended may still hold the lock: a child that it was about to start has
/// a copy of the descriptor until it runs its own program.
const RELEASING: Duration = Duration::from_millis(300);

/// Locks a file for this process alone. Returns whether the lock was free.
///
/// # Errors
/// When the file system has no locks.
pub fn try_lock(file: &File) -> io::Result<bool> {
    let deadline = Instant::now() + RELEASING;
    loop {
        match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(false),
            result => return Ok(result.map(|()| true)?),
        }
    }
}

/// A process that has locked something.
#[derive(Clone, Debug)]
pub struct LockHolder {
    /// Its id.
    pub pid: u32,
    /// The name of its program.
    pub command: String,
    /// Its user.
    pub uid: u32,
}

/// The processes that have locked a file, as far as this one sees them.
pub fn holders(file: &File) -> Vec<LockHolder> {
    let Ok(metadata) = file.metadata() else { return Vec::new() };
    let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
    let holder = |pid: u32| {
        let uid = fs::metadata(format!("/proc/{pid}")).ok()?.uid();
        let command = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        Some(LockHolder { pid, command: command.trim_end().to_owned(), uid })
    };
    lockers(&locks, metadata.dev(), metadata.ino()).into_iter().filter_map(holder).collect()
}

/// The processes that have locked a file by flock(), by the text of /proc/locks: `1: FLOCK  ADVISORY
/// WRITE 1234 00:2b:5678 0 EOF`.
fn lockers(locks: &str, dev: u64, inode: u64) -> Vec<u32> {
    let (major, minor) = (rustix::fs::major(dev), rustix::fs::minor(dev));
    let file = format!("{major:02x}:{minor:02x}:{inode}");
    let locker = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        match fields[..] {
            [_, "FLOCK", _, _, pid, of, ..] if of == file => pid.parse().ok(),
            _ => None,
        }
    };
    locks.lines().filter_map(locker).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_locked_it() {
        let locks = "1: FLOCK  ADVISORY  WRITE 1234 00:2b:5678 0 EOF\n\
                     1: -> FLOCK  ADVISORY  WRITE 99 00:2b:5678 0 EOF\n\
                     2: POSIX  ADVISORY  WRITE 77 00:2b:5678 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 5 00:2b:56789 0 EOF\n\n4:";
        assert_eq!(lockers(locks, rustix::fs::makedev(0, 0x2b), 5678), [1234]);
        assert_eq!(lockers("", rustix::fs::makedev(0, 0x2b), 5678), [0u32; 0]);
    }
}

//! Borrowing sockets from the processes that have them.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::io::Errno;
use rustix::net::sockopt::socket_cookie;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use super::error::DiagError;

/// The numbers of the processes in this process's /proc.
///
/// # Errors
/// When /proc can't be read.
pub fn all() -> io::Result<impl Iterator<Item = Pid>> {
    let numbers = |entry: io::Result<fs::DirEntry>| entry.ok()?.file_name().to_str()?.parse().ok();
    Ok(fs::read_dir("/proc")?.filter_map(numbers).filter_map(Pid::from_raw))
}

/// Duplicates a descriptor of each socket in `inodes` that a process has, and hands it to `take`
/// with the socket's cookie. Returns the kernel's error if it refused one. Kernel 5.6 and later.
///
/// Processes and descriptors that vanish meanwhile are no error, and neither is a socket that isn't
/// found, or another one in its place.
///
/// # Errors
/// When /proc can't be read.
pub fn borrow_sockets(
    mut inodes: BTreeSet<u64>,
    mut take: impl FnMut(u64, OwnedFd),
) -> Result<Option<io::Error>, DiagError> {
    let mut refused = None;
    for pid in all().map_err(DiagError::Processes)? {
        if inodes.is_empty() {
            break;
        }
        let directory = format!("/proc/{}/fd", pid.as_raw_nonzero());
        // Opened once the process is known to have one of the sockets.
        let mut process = None;
        let descriptors = match fs::read_dir(directory) {
            Ok(descriptors) => descriptors,
            Err(error) => {
                note_refusal(error, &mut refused);
                continue;
            }
        };
        for descriptor in descriptors.flatten() {
            let Some(inode) = socket_inode(&descriptor.path()) else { continue };
            let number = descriptor.file_name().to_str().and_then(|name| name.parse().ok());
            let (true, Some(number)) = (inodes.contains(&inode), number) else { continue };
            match duplicate(pid, &mut process, number) {
                Ok((cookie, descriptor)) => {
                    inodes.remove(&inode);
                    take(cookie, descriptor);
                }
                Err(error) => note_refusal(error.into(), &mut refused),
            }
        }
    }
    Ok(refused)
}

/// The inode of the socket of a link in /proc/[pid]/fd.
fn socket_inode(link: &Path) -> Option<u64> {
    let target = fs::read_link(link).ok()?;
    target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

fn duplicate(
    pid: Pid,
    process: &mut Option<OwnedFd>,
    number: i32,
) -> Result<(u64, OwnedFd), Errno> {
    let process = match process {
        Some(process) => process,
        None => process.insert(pidfd_open(pid, PidfdFlags::empty())?),
    };
    let descriptor = pidfd_getfd(process.as_fd(), number, PidfdGetfdFlags::empty())?;
    Ok((socket_cookie(&descriptor)?, descriptor))
}

/// Keeps an error unless it means that a process or descriptor vanished.
fn note_refusal(error: io::Error, refused: &mut Option<io::Error>) {
    let vanished = [libc::ENOENT, libc::ESRCH, libc::EBADF, libc::ENOTSOCK];
    if !error.raw_os_error().is_some_and(|errno| vanished.contains(&errno)) {
        *refused = Some(error);
    }
}

//! Why the pins can't be used.

use std::io;
use std::path::{Path, PathBuf};

/// The conventional mount point of a BPF file system, which is mounted if there is none.
pub const CONVENTIONAL_MOUNT: &str = "/sys/fs/bpf";

/// Why the pins can't be used.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// The directory isn't on a BPF file system.
    #[error(
        "{dir} isn't on a BPF file system: mount one with `mount -t bpf -o mode=0700 bpf \
         {CONVENTIONAL_MOUNT}`, or name a directory of one with --bpffs"
    )]
    NoBpffs {
        /// The directory.
        dir: PathBuf,
    },
    /// It couldn't be mounted.
    #[error(
        "can't mount a BPF file system at {CONVENTIONAL_MOUNT}: {source}; it needs CAP_SYS_ADMIN"
    )]
    Mount {
        /// The kernel's error.
        source: io::Error,
    },
    /// Another daemon has the lock.
    #[error("{}", taken(.dir, .pid))]
    Taken {
        /// The directory.
        dir: PathBuf,
        /// The other daemon's process id, where its maps have it.
        pid: Option<u64>,
    },
    /// A process that isn't the daemon of these pins has locked the directory.
    #[error(
        "process {pid} ({command}, of uid {uid}) has locked {dir}: if it is another nohop, stop it \
         or name another directory with --bpffs; else end it"
    )]
    Locked {
        /// The directory.
        dir: PathBuf,
        /// The process.
        pid: u32,
        /// Its name.
        command: String,
        /// Its user.
        uid: u32,
    },
    /// Others could take the pins.
    #[error("{path} {why}, so others could take the pins; {fix}")]
    Unsafe {
        /// The directory.
        path: PathBuf,
        /// The problem.
        why: String,
        /// The fix.
        fix: String,
    },
    /// A directory of another program has a name of ours.
    #[error(
        "{dir} has no pins of nohop's in it: it belongs to another program; name another directory \
         with --bpffs, or remove it"
    )]
    ForeignDirectory {
        /// The directory.
        dir: PathBuf,
    },
    /// Something else is pinned under a name of ours.
    #[error(
        "{path} is {found}, not {expected}: it belongs to another program; name another directory \
         with --bpffs, or remove it"
    )]
    Foreign {
        /// The pin.
        path: PathBuf,
        /// Its present value.
        found: String,
        /// The value needed.
        expected: String,
    },
    /// A file operation failed.
    #[error("can't {action} {path}: {source}{}", fix(.source))]
    Io {
        /// The operation.
        action: &'static str,
        /// Its path.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
}

fn taken(dir: &Path, pid: &Option<u64>) -> String {
    let dir = dir.display();
    match pid {
        Some(pid) => format!(
            "another nohop, process {pid}, holds the pins in {dir}: stop it first, or name another \
             directory with --bpffs"
        ),
        None => format!("another nohop holds the pins in {dir}: stop it first"),
    }
}

/// Makes an error of a file operation.
pub fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PinError {
    let path = path.to_path_buf();
    move |source| PinError::Io { action, path, source }
}

/// What to do about an error of a file operation, where that is known.
fn fix(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::ReadOnlyFilesystem => {
            "; the BPF file system is mounted read-only: mount -o remount,rw it, or name a directory of \
             another with --bpffs"
        }
        _ => "",
    }
}

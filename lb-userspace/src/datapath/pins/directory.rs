//! Whether the directory of the pins is safe from other users.
//!
//! A user who can write to it can remove the hooks, and one who can open it can lock it. So it is
//! closed to others, and no directory above it may be another user's to rename.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::bpffs::is_bpffs;
use super::error::{PinError, io_error};
use super::layouts::has_links;

/// Creates a directory with mode 0700, and its parents, where they don't exist.
///
/// # Errors
/// When the file system refuses.
pub fn make_private(dir: &Path) -> Result<(), PinError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io_error("make", dir))
}

/// A directory's owner and permissions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Access {
    is_directory: bool,
    uid: u32,
    mode: u32,
}

impl Access {
    fn of(path: &Path) -> io::Result<Access> {
        let metadata = fs::symlink_metadata(path)?;
        Ok(Access { is_directory: metadata.is_dir(), uid: metadata.uid(), mode: metadata.mode() })
    }

    fn is_foreign(self, own: u32) -> bool {
        ![0, own].contains(&self.uid)
    }

    /// The problem of a directory above the pins, if there is one.
    fn wrong_above(self, own: u32) -> Option<String> {
        const STICKY: u32 = 0o1000;
        if !self.is_directory {
            return Some("is a symbolic link".to_owned());
        }
        if self.is_foreign(own) {
            return Some(format!("is another user's (uid {})", self.uid));
        }
        let is_open = self.mode & 0o022 != 0 && self.mode & STICKY == 0;
        is_open.then(|| format!("may be written to by others (mode {:o})", self.mode & 0o7777))
    }

    /// The problem of the directory of the pins, if there is one.
    fn wrong(self, own: u32) -> Option<Wrong> {
        if !self.is_directory {
            return Some(Wrong::NoDirectory);
        }
        if self.is_foreign(own) {
            return Some(Wrong::Foreign);
        }
        (self.mode & 0o077 != 0).then_some(Wrong::Open)
    }
}

/// A problem of the directory of the pins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wrong {
    NoDirectory,
    Foreign,
    Open,
}

/// How safe the pins would be in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Safety {
    /// No other user gets there.
    Safe,
    /// Other users can create directories in the file system's root, so also this one first.
    OpenMount(PathBuf),
}

/// Checks whether pins are safe in `dir`, and changes nothing.
///
/// # Errors
/// When they wouldn't be, and the daemon wouldn't start.
pub fn look(dir: &Path) -> Result<Safety, PinError> {
    let root = check_above(dir)?;
    let own = rustix::process::geteuid().as_raw();
    if !dir.exists() {
        check_writable(&root)?;
    }
    if let Ok(access) = Access::of(dir) {
        match access.wrong(own) {
            None => {}
            // The daemon closes it, or moves it aside.
            Some(Wrong::Open) if dir != root => {}
            Some(wrong) => return Err(unsafe_error(dir, wrong, access)),
        }
    }
    let is_open = Access::of(&root).is_ok_and(|access| access.mode & 0o022 != 0);
    Ok(if is_open { Safety::OpenMount(root) } else { Safety::Safe })
}

/// Checks the directories above `dir` that are there, up to the root of the file system, which it
/// returns.
fn check_above(dir: &Path) -> Result<PathBuf, PinError> {
    let own = rustix::process::geteuid().as_raw();
    let mut root = dir.to_owned();
    for above in dir.ancestors().skip(1).filter(|above| above.exists()) {
        if !is_bpffs(above) {
            break;
        }
        root = above.to_owned();
        let access = Access::of(above).map_err(io_error("read", above))?;
        if let Some(why) = access.wrong_above(own) {
            let fix = match access.is_directory {
                true => format!("chown root {0} && chmod go-w {0}", above.display()),
                false => "name the directory that it leads to with --bpffs".to_owned(),
            };
            return Err(PinError::Unsafe { path: above.into(), why, fix });
        }
    }
    Ok(root)
}

/// Checks whether something can be pinned in a file system, by its root.
fn check_writable(root: &Path) -> Result<(), PinError> {
    use rustix::fs::{StatVfsMountFlags, statvfs};
    match statvfs(root) {
        Ok(found) if found.f_flag.contains(StatVfsMountFlags::RDONLY) => {
            Err(io_error("make a directory in", root)(io::ErrorKind::ReadOnlyFilesystem.into()))
        }
        _ => Ok(()),
    }
}

fn unsafe_error(dir: &Path, wrong: Wrong, access: Access) -> PinError {
    let (path, shown) = (dir.to_owned(), dir.display());
    let (why, fix) = match wrong {
        Wrong::NoDirectory => (
            "is no directory".to_owned(),
            format!("remove it: rm {shown}, or name another with --bpffs"),
        ),
        Wrong::Foreign => (
            format!("is another user's (uid {})", access.uid),
            format!(
                "remove it, or make it root's: chown -R root {shown}; see also its mount's mode"
            ),
        ),
        Wrong::Open => (
            format!("is open to others (mode {:o})", access.mode & 0o7777),
            format!("close it: chmod 700 {shown}, or name a directory below it with --bpffs"),
        ),
    };
    PinError::Unsafe { path, why, fix }
}

/// Creates a directory where it doesn't exist, and closes it to other users.
///
/// # Errors
/// When it can't be closed to them.
pub fn make_safe(dir: &Path) -> Result<(), PinError> {
    let root = check_above(dir)?;
    let own = rustix::process::geteuid().as_raw();
    make_private(dir.parent().unwrap_or(dir))?;
    // Another user may be quick to make it again.
    for _ in 0..3 {
        match fs::DirBuilder::new().mode(0o700).create(dir) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(io_error("make", dir)(error)),
        }
        let access = match Access::of(dir) {
            // Another user may take it away again, too.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            access => access.map_err(io_error("read", dir))?,
        };
        match access.wrong(own) {
            None => return Ok(()),
            Some(Wrong::Open) if dir != root => {
                let closed = fs::set_permissions(dir, fs::Permissions::from_mode(0o700));
                return closed.map_err(|_| unsafe_error(dir, Wrong::Open, access));
            }
            // Without a link in it, it is no daemon's of another user, and only in the way.
            Some(wrong) if access.is_foreign(own) && !(access.is_directory && has_links(dir)) => {
                let place = free_name(dir, &format!("-of-uid-{}", access.uid));
                fs::rename(dir, &place).map_err(|_| unsafe_error(dir, wrong, access))?;
                tracing::warn!(
                    "{}, which uid {} made, was in the way: it is {} now; close the file system to \
                     others: chmod 700 {}",
                    dir.display(),
                    access.uid,
                    place.display(),
                    root.display()
                );
            }
            Some(wrong) => return Err(unsafe_error(dir, wrong, access)),
        }
    }
    let access = Access::of(dir).map_err(io_error("read", dir))?;
    Err(unsafe_error(dir, Wrong::Foreign, access))
}

/// A path that doesn't exist: `dir`'s with `suffix` and a number.
pub fn free_name(dir: &Path, suffix: &str) -> PathBuf {
    let name = |n: u32| {
        let mut name = dir.as_os_str().to_owned();
        name.push(format!("{suffix}-{n}"));
        PathBuf::from(name)
    };
    // A user who creates them all can't guess the last one.
    let mut names = (1..1000).map(name);
    let free = names.find(|name| fs::symlink_metadata(name).is_err());
    free.unwrap_or_else(|| name(fastrand::u32(1000..)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_a_directory() {
        let directory = |uid, mode: u32| Access { is_directory: true, uid, mode: 0o040_000 | mode };
        let rows = [
            (directory(0, 0o700), None, false),
            (directory(7, 0o700), None, false),
            (directory(0, 0o755), Some(Wrong::Open), false),
            (directory(0, 0o710), Some(Wrong::Open), false),
            (directory(0, 0o1777), Some(Wrong::Open), false),
            (directory(0, 0o777), Some(Wrong::Open), true),
            (directory(0, 0o770), Some(Wrong::Open), true),
            (directory(8, 0o700), Some(Wrong::Foreign), true),
            // A symbolic link has mode 0777.
            (Access { is_directory: false, ..directory(0, 0o777) }, Some(Wrong::NoDirectory), true),
            (Access { is_directory: false, ..directory(0, 0o700) }, Some(Wrong::NoDirectory), true),
        ];
        for (access, expected, is_wrong_above) in rows {
            assert_eq!(access.wrong(7), expected, "{access:?}");
            assert_eq!(access.wrong_above(7).is_some(), is_wrong_above, "{access:?}");
        }
    }
}

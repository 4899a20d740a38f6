//! Files that must survive a crash and a power cut, replaced as a whole.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Replaces the file at `path`, mode 0600, and makes the directory where it is missing: a reader, and
/// the next boot, find the former contents or the new ones, never a part. The new ones are the `parts`
/// in a row.
///
/// The contents are written to `.NAME.tmp` next to it first. The name is always the same, so a process that
/// dies in between leaves one file, which the next call replaces. A link of that name is removed, and
/// never written to: in a directory of others it may lead to any file.
///
/// # Errors
/// When any step fails, or another call for this path is still under way, as on a disk that stalls.
/// The former file is then still there, unless it is the last step, the sync of the directory, that
/// failed.
pub fn replace(path: &Path, parts: &[&[u8]]) -> io::Result<()> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let _turn = Turn::take(path)?;
    make_directory(directory)?;
    let temporary = temporary(path);
    let written = write(&temporary, parts).and_then(|()| fs::rename(&temporary, path));
    if let Err(error) = written {
        // On a full disk the part that was written is in the way of the next try.
        let _ = fs::remove_file(&temporary);
        return Err(error);
    }
    // A rename is durable once its directory is (fsync(2)).
    File::open(directory)?.sync_all()
}

/// The user and the group of a process, by their ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessOwner {
    /// The user's.
    pub uid: u32,
    /// The group's.
    pub gid: u32,
}

impl ProcessOwner {
    /// That of this process.
    pub fn own() -> ProcessOwner {
        let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
        ProcessOwner { uid: uid.as_raw(), gid: gid.as_raw() }
    }

    /// That of a process, if it is there.
    pub fn of(pid: u32) -> Option<ProcessOwner> {
        let found = fs::metadata(format!("/proc/{pid}")).ok()?;
        Some(ProcessOwner { uid: found.uid(), gid: found.gid() })
    }
}

/// Why others than root and the daemon, which has these ids, could change what is in a directory, which is
/// trusted, and the fix; `None` where they can't. It may not exist yet: then the directories above it decide.
pub fn exposure(directory: &Path, daemon: ProcessOwner) -> Option<String> {
    const STICKY: u32 = 0o1000;
    let ProcessOwner { uid: own, gid: group } = daemon;
    let resolved = fs::canonicalize(directory);
    let directory = resolved.as_deref().unwrap_or(directory);
    directory.ancestors().find_map(|path| {
        let found = fs::metadata(path).ok()?;
        let mode = found.mode() & 0o7777;
        let is_groups = mode & 0o020 != 0 && ![0, group].contains(&found.gid());
        // Above, names of ours can't be taken where only their owners may rename them.
        let is_open =
            (is_groups || mode & 0o002 != 0) && (path == directory || mode & STICKY == 0);
        let path = path.display();
        if ![0, own].contains(&found.uid()) {
            let uid = found.uid();
            return Some(format!(
                "{path} is another user's (uid {uid}), who could change where services lead; make it \
                 root's: chown root {path}"
            ));
        }
        is_open.then(|| {
            format!(
                "others may write to {path} (mode {mode:o}), and could change where services lead; \
                 close it: chmod go-w {path}"
            )
        })
    })
}

/// Makes a directory where it is missing. What has its name and is none is named: mkdir(2) reports only that
/// something is there.
pub fn make_directory(path: &Path) -> io::Result<()> {
    // Whatever the umask is.
    let made = DirBuilder::new().recursive(true).mode(0o755).create(path);
    made.map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => {
            io::Error::other(format!("{} isn't a directory", path.display()))
        }
        _ => error,
    })
}

/// The paths that are being written.
static UNDER_WAY: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// The right to write a path, for as long as this lives.
struct Turn<'a>(&'a Path);

impl Turn<'_> {
    fn take(path: &Path) -> io::Result<Turn<'_>> {
        let mut under_way = under_way();
        if under_way.iter().any(|other| other == path) {
            return Err(io::Error::other("an earlier write of it is still under way"));
        }
        under_way.push(path.to_owned());
        Ok(Turn(path))
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        under_way().retain(|path| path != self.0);
    }
}

fn under_way() -> MutexGuard<'static, Vec<PathBuf>> {
    UNDER_WAY.lock().unwrap_or_else(PoisonError::into_inner)
}

fn write(path: &Path, parts: &[&[u8]]) -> io::Result<()> {
    let mut file = match open_own(path) {
        // Removing it needs no rights in what it leads to.
        Err(_) if fs::symlink_metadata(path).is_ok() => {
            fs::remove_file(path)?;
            open_own(path)?
        }
        file => file?,
    };
    file.set_len(0)?;
    // Of a file that was left behind.
    file.set_permissions(Permissions::from_mode(0o600))?;
    parts.iter().try_for_each(|part| file.write_all(part))?;
    file.sync_all()
}

/// Opens a file, or makes it, unless it has other names or another owner: then it isn't one of ours.
fn open_own(path: &Path) -> io::Result<File> {
    let flags = libc::O_NOFOLLOW;
    let mut options = OpenOptions::new();
    let file = options.write(true).create(true).mode(0o600).custom_flags(flags).open(path)?;
    let found = file.metadata()?;
    let is_own = found.uid() == rustix::process::geteuid().as_raw() && found.nlink() == 1;
    if is_own { Ok(file) } else { Err(io::Error::other("it is another's file")) }
}

fn temporary(path: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".tmp");
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{chown, symlink};

    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_file_is_replaced_whole_and_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/state.json");
        replace(&path, &[b"first, ", b"and longer"]).unwrap();
        // The file of a process that was killed in between.
        fs::write(dir.path().join("a/b/.state.json.tmp"), "a part of something long").unwrap();
        replace(&path, &[b"second"]).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(names(path.parent().unwrap()), ["state.json"]);
    }

    #[test]
    fn a_failed_write_leaves_the_former_file_and_no_part() {
        // A rename onto a directory fails, as the last step of a write.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        fs::create_dir(&path).unwrap();
        replace(&path, &[b"new"]).unwrap_err();
        assert_eq!(names(dir.path()), ["state.json"]);
        // A parent that is a file.
        let below = dir.path().join("file/state.json");
        fs::write(dir.path().join("file"), "").unwrap();
        replace(&below, &[b"new"]).unwrap_err();
    }

    #[test]
    fn a_link_in_the_place_of_the_first_file_leads_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let (path, theirs) = (dir.path().join("state.json"), dir.path().join("theirs"));
        fs::write(&theirs, "precious").unwrap();
        let links: [fn(&Path, &Path) -> io::Result<()>; 2] =
            [|to, at| symlink(to, at), |to, at| fs::hard_link(to, at)];
        for link in links {
            link(&theirs, &temporary(&path)).unwrap();
            replace(&path, &[b"ours"]).unwrap();
            assert_eq!(fs::read(&theirs).unwrap(), b"precious");
            assert!(fs::symlink_metadata(&path).unwrap().is_file());
            assert_eq!(fs::read(&path).unwrap(), b"ours");
        }
    }

    #[test]
    fn what_is_no_directory_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let error = replace(&file.join("state.json"), &[b"new"]).unwrap_err().to_string();
        assert!(error.contains("file isn't a directory"), "{error}");
    }

    #[test]
    fn a_directory_that_others_can_change_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let above = dir.path().join("above");
        let state = above.join("state");
        fs::create_dir_all(&state).unwrap();
        let set = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode));
        for (above_mode, mode, expected) in [
            (0o755, 0o755, None),
            (0o755, 0o700, None),
            (0o1777, 0o700, None),
            (0o755, 0o777, Some("state (mode 777)")),
            (0o755, 0o1777, Some("state (mode 1777)")),
            (0o777, 0o700, Some("above (mode 777)")),
        ] {
            set(&above, above_mode).unwrap();
            set(&state, mode).unwrap();
            let link = dir.path().join("link");
            let _ = fs::remove_file(&link);
            symlink(&state, &link).unwrap();
            for path in [&state, &link] {
                let found = exposure(path, ProcessOwner::own());
                let part = expected.unwrap_or_default();
                let is_right = match &found {
                    Some(found) => expected.is_some() && found.contains(part),
                    None => expected.is_none(),
                };
                assert!(is_right, "{above_mode:o} {mode:o}: {found:?}");
            }
        }
        // Its own group may write to it, another not.
        set(&above, 0o755).unwrap();
        set(&state, 0o770).unwrap();
        for (gid, is_open) in [(rustix::process::getegid().as_raw(), false), (65534, true)] {
            // Only root may give it away.
            if chown(&state, None, Some(gid)).is_ok() {
                assert_eq!(exposure(&state, ProcessOwner::own()).is_some(), is_open, "{gid}");
            }
        }
        // What is the daemon's own is closed to others.
        let daemon = ProcessOwner { uid: 65533, gid: 65533 };
        if chown(&state, Some(daemon.uid), Some(daemon.gid)).is_ok() {
            assert_eq!(exposure(&state, daemon), None);
            assert!(exposure(&state, ProcessOwner::own()).unwrap().contains("uid 65533"));
        }
        // One that isn't there yet.
        set(&above, 0o777).unwrap();
        assert!(
            exposure(&above.join("new/state"), ProcessOwner::own()).unwrap().contains("chmod go-w")
        );
    }

    #[test]
    fn two_writes_of_one_path_do_not_mix() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        let turn = Turn::take(&path).unwrap();
        assert!(replace(&path, &[b"second"]).unwrap_err().to_string().contains("under way"));
        replace(&dir.path().join("other.json"), &[b"other"]).unwrap();
        drop(turn);
        replace(&path, &[b"second"]).unwrap();
    }
}

//! Files that must survive a crash and a power cut, replaced as a whole.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Replaces the file at `path`, mode 0600, and makes the directory where it is missing: a reader, and
/// the next boot, find the former contents or the new ones, never a part. The new ones are the `parts`
/// in a row.
///
/// The contents are written to `.NAME.tmp` next to it first. The name is always the same, so a process that
/// dies in between leaves one file, which the next call replaces.
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
    fs::create_dir_all(directory)?;
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
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    // Of a file that was left behind.
    file.set_permissions(Permissions::from_mode(0o600))?;
    parts.iter().try_for_each(|part| file.write_all(part))?;
    file.sync_all()
}

fn temporary(path: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".tmp");
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
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

//! From the id of a cgroup to its directory, and to the allocation of Nomad's that it is of.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{DirEntryExt, MetadataExt};
use std::path::{Path, PathBuf};

/// The cgroups that are looked at below the served one.
const MAX_CGROUPS: usize = 65_536;

/// The directories of cgroups by their ids, which are their inodes.
#[derive(Debug)]
pub struct CgroupPaths {
    scope: PathBuf,
    known: HashMap<u64, PathBuf>,
}

impl CgroupPaths {
    /// Of the cgroup at `scope` and those below it.
    pub fn new(scope: PathBuf) -> CgroupPaths {
        CgroupPaths { scope, known: HashMap::new() }
    }

    /// Looks at all cgroups again.
    pub fn read(&mut self) {
        self.known.clear();
        if let Ok(metadata) = fs::metadata(&self.scope) {
            self.known.insert(metadata.ino(), self.scope.clone());
        }
        let mut directories = vec![self.scope.clone()];
        while let Some(directory) = directories.pop()
            && self.known.len() < MAX_CGROUPS
        {
            // One that has gone meanwhile has nothing below it.
            for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    self.known.insert(entry.ino(), entry.path());
                    directories.push(entry.path());
                }
            }
        }
    }

    /// The directory of a cgroup, as it was when all were looked at.
    pub fn find(&self, id: u64) -> Option<&Path> {
        self.known.get(&id).map(PathBuf::as_path)
    }
}

/// The allocation and the task in the path of a cgroup that Nomad made: `ALLOCATION.TASK.scope`, the
/// allocation a UUID.
pub fn allocation(path: &Path) -> Option<(&str, &str)> {
    path.iter().find_map(|part| {
        let (uuid, task) = part.to_str()?.strip_suffix(".scope")?.split_once('.')?;
        let is_uuid = uuid.len() == 36
            && uuid.bytes().enumerate().all(|(at, octet)| match at {
                8 | 13 | 18 | 23 => octet == b'-',
                _ => octet.is_ascii_hexdigit(),
            });
        (is_uuid && !task.is_empty()).then_some((uuid, task))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroups_are_found_by_inode() {
        let dir = tempfile::tempdir().unwrap();
        let below = dir.path().join("a/b");
        fs::create_dir_all(&below).unwrap();
        let mut paths = CgroupPaths::new(dir.path().to_owned());
        paths.read();
        let id = |path: &Path| fs::metadata(path).unwrap().ino();
        for path in [dir.path(), &below] {
            assert_eq!(paths.find(id(path)), Some(path));
        }
        assert_eq!(paths.find(0), None);
    }

    #[test]
    fn allocations_are_in_the_path_of_their_cgroup() {
        const UUID: &str = "39e25890-23fb-7513-b98f-97a5310046ad";
        let of = |path: &str| {
            let found = allocation(Path::new(path)).map(|(uuid, task)| [uuid, task].join(" "));
            found.unwrap_or_default()
        };
        let path = format!("/sys/fs/cgroup/nomad.slice/share.slice/{UUID}.web.scope");
        assert_eq!(of(&path), format!("{UUID} web"));
        assert_eq!(of(&format!("{path}/below")), format!("{UUID} web"));
        assert_eq!(of(&format!("/nomad.slice/{UUID}.web.v2.scope")), format!("{UUID} web.v2"));
        for path in ["/", "/docker-39e2.scope", "/x.y.scope", &format!("/{UUID}.scope")] {
            assert_eq!(of(path), "", "{path}");
        }
    }
}

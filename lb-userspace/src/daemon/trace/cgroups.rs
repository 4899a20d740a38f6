//! From the id of a cgroup to its directory, and to the allocation of Nomad's that it is of.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::unix::fs::{DirEntryExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::table::{is_uuid, short_allocation};

/// The cgroups that are known at a time.
const MAX_KNOWN: usize = 16_384;

/// The cgroups that a walk looks at below the served one.
const MAX_CGROUPS: usize = 65_536;

/// Those of them that one step looks at: a few tens of milliseconds, for which the kernel keeps events.
const STEP: usize = 1_024;

/// The directories of cgroups by their ids, which are their inodes. Each id is looked for once: at its
/// process, and if that has ended by a walk below the served cgroup.
#[derive(Debug)]
pub struct CgroupPaths {
    scope: PathBuf,
    /// `None` for one that has gone before it was found.
    known: HashMap<u64, Option<PathBuf>>,
    walk: Option<Walk>,
    /// What the next walk looks for.
    next: HashSet<u64>,
}

#[derive(Debug)]
struct Walk {
    wanted: HashSet<u64>,
    /// The directories that are still to be read.
    directories: Vec<PathBuf>,
    n_read: usize,
}

impl CgroupPaths {
    /// Of the cgroup at `scope` and those below it.
    pub fn new(scope: PathBuf) -> CgroupPaths {
        CgroupPaths { scope, known: HashMap::new(), walk: None, next: HashSet::new() }
    }

    /// Looks for cgroups, each with a process that is or was in it. The work of one call is bounded: while
    /// [`CgroupPaths::is_walking`] another one goes on.
    pub fn look_for(&mut self, seen: impl Iterator<Item = (u64, u32)>) {
        for (id, pid) in seen {
            let is_wanted = |walk: &Walk| walk.wanted.contains(&id);
            if self.known.contains_key(&id) || self.walk.as_ref().is_some_and(is_wanted) {
                continue;
            }
            match self.of_process(pid, id) {
                Some(path) => self.learn(id, Some(path)),
                None => drop(self.next.insert(id)),
            }
        }
        self.step(STEP);
    }

    /// Whether some are still looked for.
    pub fn is_walking(&self) -> bool {
        self.walk.is_some()
    }

    /// The directory of a cgroup, where it was found.
    pub fn find(&self, id: u64) -> Option<&Path> {
        self.known.get(&id)?.as_deref()
    }

    fn learn(&mut self, id: u64, path: Option<PathBuf>) {
        if self.known.len() >= MAX_KNOWN {
            self.known.clear();
        }
        self.known.insert(id, path);
    }

    /// The directory of a process's cgroup, if it is the one with this id. The process may have ended, or
    /// its number may mean another one here. The path begins at a directory above, or at the served one
    /// (cgroup_namespaces(7)).
    fn of_process(&self, pid: u32, id: u64) -> Option<PathBuf> {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
        let paths = self.scope.ancestors().map(|above| above.join(path));
        let mut below = paths.filter(|path| path.starts_with(&self.scope));
        below.find(|path| fs::metadata(path).is_ok_and(|metadata| metadata.ino() == id))
    }

    /// Reads so many more directories, for a walk that may begin here.
    fn step(&mut self, max: usize) {
        if self.walk.is_none() && !self.next.is_empty() {
            let mut wanted = std::mem::take(&mut self.next);
            let scope = fs::metadata(&self.scope).map(|metadata| metadata.ino());
            if let Some(id) = scope.ok().filter(|id| wanted.remove(id)) {
                self.learn(id, Some(self.scope.clone()));
            }
            let directories = vec![self.scope.clone()];
            self.walk = Some(Walk { wanted, directories, n_read: 0 });
        }
        let Some(mut walk) = self.walk.take() else { return };
        for _ in 0..max {
            if walk.wanted.is_empty() || walk.n_read >= MAX_CGROUPS {
                break;
            }
            let Some(directory) = walk.directories.pop() else { break };
            walk.n_read += 1;
            // One that has gone meanwhile has nothing below it.
            for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
                if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    continue;
                }
                let id = entry.ino();
                if walk.wanted.remove(&id) || self.known.len() < MAX_KNOWN {
                    self.learn(id, Some(entry.path()));
                }
                walk.directories.push(entry.path());
            }
        }
        let is_over = walk.directories.is_empty() || walk.n_read >= MAX_CGROUPS;
        if walk.wanted.is_empty() || is_over {
            walk.wanted.into_iter().for_each(|id| self.learn(id, None));
        } else {
            self.walk = Some(walk);
        }
    }
}

/// The allocation and the task in the path of a cgroup that Nomad made: `ALLOCATION.TASK.scope`, the
/// allocation a UUID.
pub fn allocation(path: &Path) -> Option<(&str, &str)> {
    path.iter().find_map(|part| {
        let (uuid, task) = part.to_str()?.strip_suffix(".scope")?.split_once('.')?;
        (is_uuid(uuid) && !task.is_empty()).then_some((uuid, task))
    })
}

/// The name under which people know the processes of a cgroup: its allocation and task, its container, or
/// its path.
pub fn client_name(path: &Path) -> String {
    if let Some((uuid, task)) = allocation(path) {
        return format!("alloc {} {task}", short_allocation(uuid));
    }
    let path = path.display().to_string();
    match short_container(&path) {
        Some(container) => format!("container {container}"),
        None => path,
    }
}

/// The length of a container's id, in hexadecimal digits.
const CONTAINER: usize = 64;

/// The id of the container in the path of its cgroup, as `docker ps` shows it (12 digits). The cgroup
/// drivers of Docker and Podman name it `docker-ID.scope`, `docker/ID` and `libpod-ID.scope`.
fn short_container(cgroup: &str) -> Option<&str> {
    cgroup.split('/').rev().find_map(|part| {
        let part = part.strip_suffix(".scope").unwrap_or(part);
        let id = part.rsplit('-').next()?;
        let is_id = id.len() == CONTAINER && id.bytes().all(|octet| octet.is_ascii_hexdigit());
        id.get(..12).filter(|_| is_id)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(path: &Path) -> u64 {
        fs::metadata(path).unwrap().ino()
    }

    /// The process has ended.
    fn seen(ids: &[u64]) -> impl Iterator<Item = (u64, u32)> {
        ids.iter().map(|id| (*id, 0))
    }

    #[test]
    fn cgroups_are_found_by_inode_and_looked_for_once() {
        let dir = tempfile::tempdir().unwrap();
        let below = dir.path().join("a/b");
        fs::create_dir_all(&below).unwrap();
        let mut paths = CgroupPaths::new(dir.path().to_owned());
        let gone = u64::MAX;
        paths.look_for(seen(&[id(dir.path()), id(&below), gone]));
        assert!(!paths.is_walking());
        for path in [dir.path(), &below] {
            assert_eq!(paths.find(id(path)), Some(path));
        }
        assert_eq!(paths.find(gone), None);
        // Neither is looked for again.
        let (below, moved) = (id(&below), dir.path().join("c"));
        fs::rename(dir.path().join("a"), &moved).unwrap();
        paths.look_for(seen(&[below, gone]));
        assert_eq!(paths.known.get(&gone), Some(&None));
        assert_eq!(paths.find(below), Some(&*dir.path().join("a/b")));
    }

    #[test]
    fn a_step_reads_a_bounded_number_of_directories() {
        let dir = tempfile::tempdir().unwrap();
        let last = dir.path().join("1/2/3/4");
        fs::create_dir_all(&last).unwrap();
        let mut paths = CgroupPaths::new(dir.path().to_owned());
        paths.next.insert(id(&last));
        let n_steps = (0..).take_while(|_| {
            paths.step(1);
            paths.is_walking()
        });
        assert_eq!(n_steps.count(), 3);
        assert_eq!(paths.find(id(&last)), Some(&*last));
    }

    #[test]
    fn what_is_known_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let mut paths = CgroupPaths::new(dir.path().to_owned());
        let ids: Vec<u64> = (0..3 * MAX_KNOWN as u64).map(|nth| u64::MAX - nth).collect();
        paths.look_for(seen(&ids));
        assert!(!paths.is_walking() && paths.known.len() <= MAX_KNOWN);
    }

    /// As in a cgroup namespace, of a process that lives.
    #[test]
    fn a_process_shows_its_cgroup() {
        let text = fs::read_to_string("/proc/self/cgroup").unwrap();
        let Some(path) = text.lines().find_map(|line| line.strip_prefix("0::/")) else { return };
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join(path);
        fs::create_dir_all(&own).unwrap();
        for scope in [dir.path(), &own] {
            let mut paths = CgroupPaths::new(scope.to_owned());
            paths.look_for([(id(&own), std::process::id())].into_iter());
            assert!(paths.next.is_empty() && !paths.is_walking());
            assert_eq!(paths.find(id(&own)), Some(&*own.components().collect::<PathBuf>()));
        }
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

    #[test]
    fn containers_are_in_the_path_of_their_cgroup() {
        let id = "0123456789abcdef".repeat(4);
        for path in [
            format!("/sys/fs/cgroup/system.slice/docker-{id}.scope"),
            format!("/sys/fs/cgroup/docker/{id}"),
            format!("/sys/fs/cgroup/docker/{id}/below"),
            format!("/sys/fs/cgroup/machine.slice/libpod-{id}.scope/container"),
        ] {
            assert_eq!(short_container(&path), Some("0123456789ab"), "{path}");
        }
        for path in ["", "/", "/sys/fs/cgroup/system.slice/docker-0123.scope", &id[1..]] {
            assert_eq!(short_container(path), None, "{path}");
        }
    }

    #[test]
    fn a_cgroup_is_shown_by_what_people_know() {
        const UUID: &str = "39e25890-23fb-7513-b98f-97a5310046ad";
        let container = "0123456789abcdef".repeat(4);
        for (path, expected) in [
            (format!("/sys/fs/cgroup/nomad.slice/{UUID}.server.scope"), "alloc 39e25890 server"),
            (
                format!("/sys/fs/cgroup/system.slice/docker-{container}.scope"),
                "container 0123456789ab",
            ),
            (
                "/sys/fs/cgroup/system.slice/cron.service".to_owned(),
                "/sys/fs/cgroup/system.slice/cron.service",
            ),
        ] {
            assert_eq!(client_name(Path::new(&path)), expected);
        }
    }
}

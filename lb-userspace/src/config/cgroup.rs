//! Where the cgroup v2 hierarchy is, and which part of it this process sees.
//!
//! A mount of cgroup2 needn't show the whole hierarchy. In a cgroup namespace (cgroup_namespaces(7))
//! a mount begins at the namespace's own cgroup, and bind mounts begin anywhere. Programs that are
//! attached there never see the node's other processes.

use std::ffi::OsString;
use std::io;
use std::os::linux::fs::MetadataExt;
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

/// The magic number of a cgroup v2 file system; linux/magic.h calls it CGROUP2_SUPER_MAGIC.
const CGROUP2_SUPER_MAGIC: u64 = 0x6367_7270;
/// The same of cgroup v1: CGROUP_SUPER_MAGIC.
const CGROUP_SUPER_MAGIC: u64 = 0x0027_e0eb;
/// The inode of the hierarchy's root. kernfs numbers its nodes from 1 (`__kernfs_new_node`, 5.5 and
/// later), and the root is its first.
const ROOT_INODE: u64 = 1;
/// The inode of the initial cgroup namespace: PROC_CGROUP_INIT_INO of linux/proc_ns.h.
const INITIAL_NAMESPACE: u64 = 0xEFFF_FFFB;
/// Where the hierarchy is by convention, the likeliest first.
const CONVENTIONAL: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];

/// Why a cgroup can't be served. A message has the problem and, after a semicolon, the fix.
#[derive(Debug, thiserror::Error)]
pub enum ScopeError {
    /// There is no hierarchy.
    #[error(
        "no cgroup v2 hierarchy is mounted; mount one with `mount -t cgroup2 none \
         /sys/fs/cgroup/unified`, or name a directory of one with --cgroup"
    )]
    NoHierarchy,
    /// The root isn't visible.
    #[error(
        "{} shows only a part of the cgroup v2 hierarchy, because this process is in a cgroup \
         namespace of its own, and the node's other processes wouldn't be served; start it in the \
         host's (docker run --cgroupns=host, in Nomad's docker driver cgroupns = \"host\"), or name \
         the part that is meant with --cgroup", .mount.display()
    )]
    Namespaced {
        /// A mount that is visible.
        mount: PathBuf,
    },
    /// The root is visible from inside a cgroup namespace, by a mount from outside.
    #[error(
        "this process is in a cgroup namespace of its own, and {} shows the whole cgroup v2 hierarchy \
         all the same; start it in the host's (docker run --cgroupns=host, in Nomad's docker driver \
         cgroupns = \"host\"), or name what is to be served: --cgroup {} for the whole node",
        .mount.display(), .mount.display()
    )]
    FromOutside {
        /// The mount.
        mount: PathBuf,
    },
    /// Only parts of the hierarchy are mounted.
    #[error(
        "{} shows only a part of the cgroup v2 hierarchy (it is a bind mount of {}), and the node's other \
         processes wouldn't be served; mount it whole (mount -t cgroup2 none \
         /sys/fs/cgroup/unified), or name the part that is meant with --cgroup", .mount.display(), .root
    )]
    Part {
        /// A mount that is visible.
        mount: PathBuf,
        /// The cgroup that it begins at.
        root: String,
    },
    /// The directory can't be looked at.
    #[error("can't open the cgroup {}: {source}; name a cgroup v2 directory with --cgroup", .scope.display())]
    Missing {
        /// The directory.
        scope: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// The directory belongs to something else.
    #[error("{} is {found}, and no cgroup v2 directory; {fix}", .scope.display())]
    NotCgroup2 {
        /// The directory.
        scope: PathBuf,
        /// Its kind.
        found: &'static str,
        /// The cgroup to name instead.
        fix: String,
    },
    /// Processes can't be moved there, so that nothing can be proved.
    #[error(
        "the cgroup {} is {kind} (cgroup.type), which holds threads and not whole processes; name the \
         domain above it with --cgroup", .scope.display()
    )]
    Threaded {
        /// The directory.
        scope: PathBuf,
        /// Its cgroup.type.
        kind: String,
    },
    /// Cgroups can't be excluded.
    #[error(
        "datapath.exclude_cgroups can't be honoured: from inside a cgroup namespace it isn't known how \
         deep in the hierarchy a cgroup is; start nohop with --cgroupns=host, or with the host's \
         processes visible (--pid=host)"
    )]
    Depth,
}

/// A mount of cgroup2.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Where it is mounted.
    pub point: PathBuf,
    /// The cgroup that it begins at, as seen from this process's cgroup namespace: `/` is the
    /// namespace's root, and `/..` is above it.
    pub root: PathBuf,
}

/// The mounts of cgroup2, those that are likeliest meant first.
pub fn mounts() -> Vec<Mount> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    visible(parse(&text), mount_id)
}

/// Those that their path leads to: another one may be mounted over it, of cgroup2 too.
fn visible(mounts: Vec<(u64, Mount)>, id_at: impl Fn(&Path) -> Option<u64>) -> Vec<Mount> {
    let mounts = mounts.into_iter().filter(|(id, mount)| id_at(&mount.point) == Some(*id));
    mounts.map(|(_, mount)| mount).collect()
}

/// The id of the mount that a path leads to, which /proc/self/mountinfo has too.
fn mount_id(path: &Path) -> Option<u64> {
    use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
    // Minimum kernel: 5.8.
    statx(CWD, path, AtFlags::empty(), StatxFlags::MNT_ID).ok().map(|found| found.stx_mnt_id)
}

/// The mounts of cgroup2 with their ids, by the text of /proc/self/mountinfo
/// (proc_pid_mountinfo(5)), those that are likeliest meant first.
fn parse(mountinfo: &str) -> Vec<(u64, Mount)> {
    let mount = |line: &str| {
        let (mount, fs) = line.split_once(" - ")?;
        (fs.split(' ').next()? == "cgroup2").then_some(())?;
        let id = mount.split(' ').next()?.parse().ok()?;
        let mut fields = mount.split(' ').skip(3).map(|field| unescape(field.as_bytes()));
        let root = PathBuf::from(OsString::from_vec(fields.next()?));
        let point = PathBuf::from(OsString::from_vec(fields.next()?));
        Some((id, Mount { point, root }))
    };
    let mut mounts: Vec<(u64, Mount)> = mountinfo.lines().filter_map(mount).collect();
    let rank = |(_, mount): &(u64, Mount)| {
        let place = CONVENTIONAL.iter().position(|place| mount.point == Path::new(place));
        (mount.root != Path::new("/"), place.unwrap_or(CONVENTIONAL.len()))
    };
    mounts.sort_by_key(rank);
    mounts
}

/// The root of the cgroup v2 hierarchy, as far as this process sees it; `None` where none is mounted.
pub fn find_cgroup2_root() -> Option<PathBuf> {
    mounts().into_iter().next().map(|mount| mount.point)
}

/// Whether this process is in the host's cgroup namespace.
pub fn is_namespace_initial() -> bool {
    // A kernel without cgroup namespaces has only that.
    std::fs::metadata("/proc/self/ns/cgroup").map_or(true, |ns| ns.st_ino() == INITIAL_NAMESPACE)
}

/// Whether a mount begins at the hierarchy's root, as seen from wherever.
fn is_at_root(mount: &Mount) -> bool {
    std::fs::metadata(&mount.point).is_ok_and(|dir| dir.st_ino() == ROOT_INODE)
}

/// The cgroup that is served by default: the root of the whole hierarchy.
///
/// # Errors
/// When that isn't visible, or only by a mount from outside this process's cgroup namespace: then the
/// wrong processes might be served.
pub fn default_scope() -> Result<PathBuf, ScopeError> {
    whole(mounts(), is_at_root, is_namespace_initial())
}

fn whole(
    mounts: Vec<Mount>,
    is_at_root: impl Fn(&Mount) -> bool,
    is_initial: bool,
) -> Result<PathBuf, ScopeError> {
    let is_whole =
        |mount: &&Mount| mount.root == Path::new("/") && (is_initial || is_at_root(mount));
    if let Some(whole) = mounts.iter().find(is_whole) {
        return Ok(whole.point.clone());
    }
    let from_outside = mounts.iter().find(|mount| !is_initial && is_at_root(mount)).cloned();
    match from_outside.or_else(|| mounts.into_iter().next()) {
        None => Err(ScopeError::NoHierarchy),
        Some(mount) if !is_initial && is_at_root(&mount) => {
            Err(ScopeError::FromOutside { mount: mount.point })
        }
        Some(Mount { point, .. }) if !is_initial => Err(ScopeError::Namespaced { mount: point }),
        Some(Mount { point, root }) => {
            Err(ScopeError::Part { mount: point, root: root.display().to_string() })
        }
    }
}

/// Looks whether a cgroup can be served. Returns what an operator should know of whose processes
/// these are: nothing where that is plain.
///
/// # Errors
/// When it is no cgroup v2 directory, or one that processes can't enter.
pub fn inspect(scope: &Path) -> Result<Option<String>, ScopeError> {
    let missing = |source| ScopeError::Missing { scope: scope.into(), source };
    let magic = rustix::fs::statfs(scope).map_err(|errno| missing(errno.into()))?.f_type;
    let magic = u64::try_from(magic).unwrap_or_default();
    let metadata = std::fs::metadata(scope).map_err(missing)?;
    let inode = metadata.st_ino();
    if magic != CGROUP2_SUPER_MAGIC || !metadata.is_dir() {
        let found = match magic {
            _ if !metadata.is_dir() => "a file",
            CGROUP_SUPER_MAGIC => "a cgroup v1 directory",
            _ => "a directory of another file system",
        };
        let fix = match find_cgroup2_root() {
            Some(root) => format!("name one with --cgroup, below {}", root.display()),
            None => "mount one: mount -t cgroup2 none /sys/fs/cgroup/unified".to_owned(),
        };
        return Err(ScopeError::NotCgroup2 { scope: scope.into(), found, fix });
    }
    // The root has no such file. A `domain threaded` cgroup holds processes.
    let kind = std::fs::read_to_string(scope.join("cgroup.type")).unwrap_or_default();
    if let kind @ ("threaded" | "domain invalid") = kind.trim() {
        return Err(ScopeError::Threaded { scope: scope.into(), kind: kind.to_owned() });
    }
    let is_narrow = inode != ROOT_INODE && !is_namespace_initial();
    Ok(is_narrow.then(|| {
        format!(
            "only processes in {} and in cgroups below it are served: this process is in a cgroup \
             namespace of its own and sees only a part of the hierarchy; to serve the whole node, start \
             it with --cgroupns=host (in Nomad's docker driver cgroupns = \"host\")",
            scope.display()
        )
    }))
}

/// Whether a directory belongs to a cgroup v2 hierarchy.
///
/// # Errors
/// When the directory can't be looked at, for one because it isn't there.
pub fn is_cgroup2(dir: &Path) -> io::Result<bool> {
    let magic = rustix::fs::statfs(dir)?.f_type;
    Ok(u64::try_from(magic).is_ok_and(|magic| magic == CGROUP2_SUPER_MAGIC))
}

/// Checks whether cgroups can be excluded.
///
/// # Errors
/// When it isn't known how deep in the hierarchy they are.
pub fn check_exclusions(patterns: &[PathBuf]) -> Result<(), ScopeError> {
    let is_known = || mounts().first().is_none_or(|mount| depth(mount).is_some());
    if patterns.is_empty() || is_known() { Ok(()) } else { Err(ScopeError::Depth) }
}

/// How many levels below the hierarchy's root a mount begins; `None` when that can't be known.
pub fn depth(mount: &Mount) -> Option<usize> {
    let namespace = || match is_namespace_initial() {
        true => Some(0),
        false => namespace_depth(
            &std::fs::read_to_string("/proc/2/stat").ok()?,
            &std::fs::read_to_string("/proc/2/cgroup").ok()?,
        ),
    };
    depth_by(mount, is_at_root(mount), namespace)
}

fn depth_by(
    mount: &Mount,
    is_at_root: bool,
    namespace: impl FnOnce() -> Option<usize>,
) -> Option<usize> {
    // Whatever it is called in this namespace.
    if is_at_root {
        return Some(0);
    }
    let below = |depth: usize, part: Component<'_>| match part {
        Component::Normal(_) => Some(depth + 1),
        Component::ParentDir => depth.checked_sub(1),
        _ => Some(depth),
    };
    mount.root.components().try_fold(namespace()?, below)
}

/// How many levels below the root this process's cgroup namespace begins: the levels from here up to
/// kthreadd, which can't leave the root, by /proc. In a PID namespace the second process may be any.
fn namespace_depth(stat: &str, cgroup: &str) -> Option<usize> {
    stat.starts_with("2 (kthreadd) ").then_some(())?;
    let path = Path::new(cgroup.lines().find_map(|line| line.strip_prefix("0::"))?);
    let parts = path.components().filter(|part| *part != Component::RootDir);
    parts.map(|part| (part == Component::ParentDir).then_some(1)).sum()
}

/// The kernel writes blanks and backslashes of a path as `\040` and the like.
fn unescape(mut text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    while let [first, rest @ ..] = text {
        let code = rest.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if *first == b'\\' => {
                plain.push(byte);
                text = &rest[3..];
            }
            _ => {
                plain.push(*first);
                text = rest;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_of_cgroup2_the_likeliest_first() {
        let line = |root: &str, point: &str, fs: &str| {
            format!("41 31 0:38 {root} {point} rw,relatime shared:9 - {fs} none rw,nsdelegate\n")
        };
        let table = [
            (vec![("/", "/sys/fs/cgroup", "cgroup2")], vec!["/sys/fs/cgroup"]),
            (
                vec![("/", "/sys/fs/cgroup", "tmpfs"), ("/", "/sys/fs/cgroup/unified", "cgroup2")],
                vec!["/sys/fs/cgroup/unified"],
            ),
            // A second mount, a bind mount of a part, and one from outside a cgroup namespace.
            (
                vec![
                    ("/", "/a", "cgroup2"),
                    ("/x.slice", "/sys/fs/cgroup", "cgroup2"),
                    ("/../..", "/b", "cgroup2"),
                    ("/", "/sys/fs/cgroup/unified", "cgroup2"),
                ],
                vec!["/sys/fs/cgroup/unified", "/a", "/sys/fs/cgroup", "/b"],
            ),
            (vec![("/", r"/mnt/a\040b\134c", "cgroup2")], vec![r"/mnt/a b\c"]),
            (vec![("/", "/a", "cgroup")], vec![]),
        ];
        for (lines, expected) in table {
            let text: String = lines.iter().map(|(root, at, fs)| line(root, at, fs)).collect();
            let points: Vec<PathBuf> =
                parse(&text).into_iter().map(|(_, mount)| mount.point).collect();
            assert_eq!(points, expected.iter().map(PathBuf::from).collect::<Vec<_>>(), "{text}");
        }
        assert_eq!(parse("no line\n41 31 0:38 - cgroup2\n"), []);
    }

    /// A part of the hierarchy, or another file system, may be mounted over all of it.
    #[test]
    fn a_mount_that_is_mounted_over_is_none() {
        let text = "41 31 0:38 / /cg rw - cgroup2 none rw\n\
                    99 41 0:38 /x.slice /cg rw - cgroup2 none rw\n\
                    42 31 0:38 / /b rw - cgroup2 none rw\n\
                    43 31 0:38 / /c rw - cgroup2 none rw\n";
        let id_at = |path: &Path| match path.to_str() {
            Some("/cg") => Some(99),
            Some("/b") => Some(42),
            Some("/c") => Some(7),
            _ => None,
        };
        let mount = |root: &str, point: &str| Mount { point: point.into(), root: root.into() };
        assert_eq!(visible(parse(text), id_at), [mount("/", "/b"), mount("/x.slice", "/cg")]);
        // As the kernel numbers them.
        let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let id = text.lines().rfind(|line| line.split(' ').nth(4) == Some("/proc"));
        let id = id.and_then(|line| line.split(' ').next()?.parse().ok());
        assert_eq!(mount_id(Path::new("/proc/self/status")), id);
    }

    #[test]
    fn a_namespaces_depth() {
        let kthreadd = "2 (kthreadd) S 0 0 0";
        let table = [
            (kthreadd, "0::/\n", Some(0)),
            (kthreadd, "4:memory:/x\n0::/..\n", Some(1)),
            (kthreadd, "0::/../../..\n", Some(3)),
            (kthreadd, "0::/../a\n", None),
            (kthreadd, "4:memory:/\n", None),
            ("2 (sh) S 0 0 0", "0::/..\n", None),
        ];
        for (stat, cgroup, expected) in table {
            assert_eq!(namespace_depth(stat, cgroup), expected, "{stat} {cgroup}");
        }
    }

    #[test]
    fn the_whole_is_found_or_what_hides_it() {
        let mount = |root: &str| Mount { point: "/a".into(), root: root.into() };
        let rows = [
            (mount("/"), true, true, "/a"),
            (mount("/"), true, false, "/a"),
            (mount("/"), false, false, "/a shows only a part"),
            (mount("/x"), false, false, "cgroup namespace of its own, and the node's"),
            (mount("/x"), false, true, "it is a bind mount of /x"),
            (mount("/.."), true, false, "shows the whole cgroup v2 hierarchy all the same; start"),
            (mount("/../.."), true, false, "--cgroup /a"),
        ];
        for (mount, is_at_root, is_initial, expected) in rows {
            let found = whole(vec![mount.clone()], |_| is_at_root, is_initial);
            let found = found.map_or_else(|error| error.to_string(), |at| at.display().to_string());
            assert!(found.contains(expected), "{mount:?} {is_at_root} {is_initial}: {found}");
        }
    }

    #[test]
    fn a_mounts_depth() {
        let mount = |root: &str| Mount { point: "/a".into(), root: root.into() };
        let rows = [
            ("/..", true, None, Some(0)),
            ("/..", true, Some(4), Some(0)),
            ("/../x", false, Some(2), Some(2)),
            ("/x/y", false, Some(0), Some(2)),
            ("/..", false, Some(0), None),
            ("/", false, None, None),
        ];
        for (root, is_at_root, namespace, expected) in rows {
            assert_eq!(depth_by(&mount(root), is_at_root, || namespace), expected, "{root}");
        }
    }

    #[test]
    fn what_is_no_cgroup_is_refused_by_its_name() {
        assert!(!is_cgroup2(Path::new("/proc")).unwrap());
        assert!(is_cgroup2(Path::new("/nowhere/at/all")).is_err());
        for (scope, expected) in [
            ("/proc", "another file system"),
            ("/proc/self/status", "is a file"),
            ("/nowhere/at/all", "with --cgroup"),
        ] {
            let error = inspect(Path::new(scope)).unwrap_err().to_string();
            assert!(error.contains(scope) && error.contains(expected), "{error}");
        }
    }
}

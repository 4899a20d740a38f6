//! The pins: where the maps and links live in the BPF file system, so that they outlive the daemon.
//!
//! `DIR/vN/maps` and `DIR/vN/links` belong to layout N; `DIR/sockets` has the sockets' storage,
//! whose format never changes. A lock on DIR keeps a second daemon away. What is there is compared
//! before it is used: a name alone says nothing.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::mem::offset_of;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use aya::maps::MapData;
use lb_common::Daemon;
use rustix::fs::FlockOperation;

use super::bpf::{CgroupLink, Pinned};

/// The magic number of a BPF file system; linux/magic.h calls it BPF_FS_MAGIC.
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;
/// Where a BPF file system is by convention, and is mounted if there is none.
const CONVENTIONAL_MOUNT: &str = "/sys/fs/bpf";

/// How long a daemon that has ended may still have the lock: a child that it was about to start has
/// a copy of the descriptor until it runs its own program.
const RELEASING: Duration = Duration::from_millis(300);

/// Why the pins can't be used.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// The directory isn't on a BPF file system.
    #[error(
        "{dir} isn't on a BPF file system: mount one with `mount -t bpf bpf {CONVENTIONAL_MOUNT}`, \
         or name a directory of one with --bpffs"
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
        /// What the kernel said.
        source: io::Error,
    },
    /// Another daemon has the lock.
    #[error("{}", taken(.dir, .pid))]
    Taken {
        /// The directory.
        dir: PathBuf,
        /// The other daemon's process id, where it says so.
        pid: Option<u64>,
    },
    /// Something else is pinned under a name of ours.
    #[error(
        "{path} is {found}, not {expected}: it belongs to another program; name another directory \
         with --bpffs, or remove it"
    )]
    Foreign {
        /// The pin.
        path: PathBuf,
        /// What it is.
        found: String,
        /// What it would have to be.
        expected: String,
    },
    /// The file system refused.
    #[error("can't {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// What it said.
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

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PinError {
    let path = path.to_path_buf();
    move |source| PinError::Io { action, path, source }
}

/// What a pinned map has to be.
#[derive(Clone, Copy, Debug)]
pub struct MapShape {
    /// Its name, in the object and of the pin.
    pub name: &'static str,
    /// The kernel's number of its type; from linux/bpf.h.
    pub map_type: u32,
    /// In bytes.
    pub key_size: u32,
    /// In bytes.
    pub value_size: u32,
    /// The number of entries.
    pub max_entries: u32,
    /// BPF_F_*.
    pub flags: u32,
}

/// How a pin compares with what it has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fit {
    Absent,
    Same,
    /// The same kind of map with another number of entries.
    OtherSize,
}

/// The pins in one directory, locked for as long as this lives.
#[derive(Debug)]
pub struct Pins {
    dir: PathBuf,
    layout: u16,
    lock: File,
}

impl Pins {
    /// Opens `dir`, for a daemon whose maps have this layout. Makes the directory if need be, and
    /// mounts a BPF file system in its conventional place.
    ///
    /// # Errors
    /// When there is no BPF file system, or another daemon has the directory.
    pub fn open(dir: &Path, layout: u16) -> Result<Pins, PinError> {
        ensure_bpffs(dir)?;
        Ok(Pins { dir: dir.into(), layout, lock: lock(dir)? })
    }

    /// As [`Pins::open`], for taking things away; `None` where there is nothing.
    ///
    /// # Errors
    /// When another daemon has the directory.
    pub fn open_existing(dir: &Path) -> Result<Option<Pins>, PinError> {
        if !dir.is_dir() || !is_bpffs(dir) {
            return Ok(None);
        }
        Pins::open(dir, 0).map(Some)
    }

    /// Where the socket storages are pinned.
    pub fn sockets(&self) -> PathBuf {
        self.dir.join("sockets")
    }

    /// Where this layout's maps are pinned.
    pub fn maps(&self) -> PathBuf {
        self.dir.join(format!("v{}/maps", self.layout))
    }

    fn links(&self) -> PathBuf {
        self.dir.join(format!("v{}/links", self.layout))
    }

    /// Where a link of this layout is pinned.
    pub fn link(&self, name: &str) -> PathBuf {
        self.links().join(name)
    }

    /// Makes the directories.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn make_directories(&self) -> Result<(), PinError> {
        [self.sockets(), self.maps(), self.links()]
            .iter()
            .try_for_each(|dir| fs::create_dir_all(dir).map_err(io_error("make", dir)))
    }

    /// Sees to it that the directories are there, and that the lock is on the one that is.
    ///
    /// # Errors
    /// When the file system refuses, or another daemon has a directory that took the place of ours.
    pub fn mend(&mut self) -> Result<(), PinError> {
        let number = |metadata: io::Result<fs::Metadata>| metadata.map(|found| found.ino()).ok();
        if number(fs::metadata(&self.dir)) != number(self.lock.metadata()) {
            self.lock = lock(&self.dir)?;
        }
        self.make_directories()
    }

    /// Whether anything of ours is there.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn is_empty(&self) -> Result<bool, PinError> {
        Ok(self.layouts()?.is_empty() && !self.sockets().exists())
    }

    /// Whether each of these maps is pinned in `dir` and as it has to be. Some may be missing, or
    /// have another size: then they have to be made anew.
    ///
    /// # Errors
    /// When something else has one of the names.
    pub fn are_there(&self, dir: &Path, shapes: &[MapShape]) -> Result<bool, PinError> {
        let mut all = true;
        for shape in shapes {
            all &= compare(&dir.join(shape.name), shape)? == Fit::Same;
        }
        Ok(all)
    }

    /// Takes away the pins of this layout's maps. Programs that use them keep them.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn forget_maps(&self) -> Result<(), PinError> {
        remove_tree(&self.maps())?;
        fs::create_dir_all(self.maps()).map_err(io_error("make", &self.maps()))
    }

    /// Every link that is pinned under any layout: this one's first.
    ///
    /// # Errors
    /// When something that isn't a link lies where links are.
    pub fn all_links(&self) -> Result<Vec<PinnedLink>, PinError> {
        let own = self.links();
        let mut directories: Vec<PathBuf> =
            self.layouts()?.into_iter().map(|layout| layout.join("links")).collect();
        directories.sort_by_key(|dir| *dir != own);
        let mut links = Vec::new();
        for dir in directories {
            for path in entries(&dir)? {
                match CgroupLink::pinned(&path).map_err(io_error("open", &path))? {
                    None => {}
                    Some(Pinned::Link(link)) => {
                        let name = path.file_name().unwrap_or_default().to_owned();
                        links.push(PinnedLink { name, path, link });
                    }
                    Some(Pinned::Other(found)) => {
                        let expected = "a cgroup link".to_owned();
                        let found = format!("a BPF object of {found}");
                        return Err(PinError::Foreign { path, found, expected });
                    }
                }
            }
        }
        Ok(links)
    }

    /// The directories of layouts.
    fn layouts(&self) -> Result<Vec<PathBuf>, PinError> {
        let is_layout = |path: &PathBuf| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.strip_prefix('v').is_some_and(|number| number.parse::<u16>().is_ok())
        };
        Ok(entries(&self.dir)?.into_iter().filter(is_layout).collect())
    }

    /// Takes away what other layouts have pinned.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn remove_other_layouts(&self) -> Result<(), PinError> {
        let own = self.dir.join(format!("v{}", self.layout));
        self.layouts()?.iter().filter(|layout| **layout != own).try_for_each(|dir| remove_tree(dir))
    }

    /// Takes away everything of ours, and the directory if nothing else is in it.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn remove_all(&self) -> Result<(), PinError> {
        self.layouts()?.iter().try_for_each(|dir| remove_tree(dir))?;
        remove_tree(&self.sockets())?;
        // Something else in it is not ours to judge.
        let _ = fs::remove_dir(&self.dir);
        Ok(())
    }
}

/// Makes a directory if need be, and locks it.
fn lock(dir: &Path) -> Result<File, PinError> {
    fs::create_dir_all(dir).map_err(io_error("make", dir))?;
    let lock = File::open(dir).map_err(io_error("open", dir))?;
    let deadline = Instant::now() + RELEASING;
    loop {
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(lock),
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(PinError::Taken { dir: dir.into(), pid: holder(dir) });
            }
            Err(errno) => return Err(io_error("lock", dir)(errno.into())),
        }
    }
}

/// Maps that are pinned, kept so that they can be pinned again.
#[derive(Debug)]
pub struct PinnedMaps(Vec<(PathBuf, MapData)>);

impl PinnedMaps {
    /// The maps that are pinned at these paths.
    ///
    /// # Errors
    /// When one isn't there.
    pub fn open(paths: impl IntoIterator<Item = PathBuf>) -> Result<PinnedMaps, PinError> {
        let open = |path: PathBuf| match MapData::from_pin(&path) {
            Ok(map) => Ok((path, map)),
            Err(error) => Err(io_error("open", &path)(io::Error::other(error))),
        };
        paths.into_iter().map(open).collect::<Result<_, _>>().map(PinnedMaps)
    }

    /// Pins again what isn't pinned any more.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn mend(&self) -> Result<(), PinError> {
        let PinnedMaps(maps) = self;
        maps.iter().filter(|(path, _)| !path.exists()).try_for_each(|(path, map)| {
            map.pin(path).map_err(|error| io_error("pin", path)(io::Error::other(error)))
        })
    }
}

/// A link and where it is pinned.
#[derive(Debug)]
pub struct PinnedLink {
    /// The pin's name: the program's.
    pub name: OsString,
    /// The pin.
    pub path: PathBuf,
    /// The link.
    pub link: CgroupLink,
}

/// Takes a pin away; one that is absent is no error.
///
/// # Errors
/// When the file system refuses.
pub fn unpin(path: &Path) -> Result<(), PinError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(io_error("remove", path)),
    }
}

fn compare(path: &Path, shape: &MapShape) -> Result<Fit, PinError> {
    if !path.try_exists().map_err(io_error("look at", path))? {
        return Ok(Fit::Absent);
    }
    let expected = described(shape.map_type, shape.key_size, shape.value_size, shape.flags);
    let foreign =
        |found| PinError::Foreign { path: path.into(), found, expected: expected.clone() };
    let info = MapData::from_pin(path).and_then(|map| map.info());
    let info = info.map_err(|error| foreign(format!("no map ({error})")))?;
    let map_type = info.map_type().map_or(0, |map_type| map_type as u32);
    let found = described(map_type, info.key_size(), info.value_size(), info.map_flags());
    if found != expected {
        return Err(foreign(found));
    }
    let same = info.max_entries() == shape.max_entries;
    Ok(if same { Fit::Same } else { Fit::OtherSize })
}

fn described(map_type: u32, key_size: u32, value_size: u32, flags: u32) -> String {
    format!(
        "a map of type {map_type} with keys of {key_size} and values of {value_size} bytes and \
         flags {flags:#x}"
    )
}

/// The process that holds a directory's pins, as it says itself: the one that said so last.
fn holder(dir: &Path) -> Option<u64> {
    let said = |layout: PathBuf| {
        let map = MapData::from_pin(layout.join("maps/DAEMON")).ok()?;
        let daemon: aya::maps::Array<_, [u8; size_of::<Daemon>()]> =
            aya::maps::Map::from_map_data(map).ok()?.try_into().ok()?;
        let value = daemon.get(&0, 0).ok()?;
        let word = |at: usize| u64::from_ne_bytes(std::array::from_fn(|byte| value[at + byte]));
        Some((word(offset_of!(Daemon, heartbeat_ns)), word(offset_of!(Daemon, pid))))
    };
    let said = entries(dir).ok()?.into_iter().filter_map(said);
    said.filter(|&(_, pid)| pid != 0).max().map(|(_, pid)| pid)
}

fn ensure_bpffs(dir: &Path) -> Result<(), PinError> {
    let existing = dir.ancestors().find(|ancestor| ancestor.exists()).unwrap_or(Path::new("/"));
    if is_bpffs(existing) {
        return Ok(());
    }
    let mount_point = Path::new(CONVENTIONAL_MOUNT);
    if !dir.starts_with(mount_point) || !mount_point.is_dir() {
        return Err(PinError::NoBpffs { dir: dir.into() });
    }
    let flags = rustix::mount::MountFlags::NOSUID
        | rustix::mount::MountFlags::NODEV
        | rustix::mount::MountFlags::NOEXEC;
    rustix::mount::mount("bpf", mount_point, "bpf", flags, None)
        .map_err(|errno| PinError::Mount { source: errno.into() })?;
    tracing::info!("mounted a BPF file system at {CONVENTIONAL_MOUNT}");
    let own = Path::new("/proc/self/ns/mnt");
    if is_another_namespace(own, Path::new("/proc/1/ns/mnt")) {
        tracing::warn!(
            "only this process sees it, so the pins go with it, and nohop unload doesn't find them: \
             have the machine mount it at its start, by a line in /etc/fstab: \
             bpf {CONVENTIONAL_MOUNT} bpf defaults 0 0"
        );
    }
    Ok(())
}

/// Whether two links of /proc name different namespaces, as far as that can be seen.
fn is_another_namespace(own: &Path, other: &Path) -> bool {
    match (fs::metadata(own), fs::metadata(other)) {
        (Ok(own), Ok(other)) => (own.dev(), own.ino()) != (other.dev(), other.ino()),
        _ => false,
    }
}

/// Whether a directory is on a BPF file system.
pub fn is_bpffs(dir: &Path) -> bool {
    let magic = rustix::fs::statfs(dir).map(|fs| fs.f_type);
    magic.is_ok_and(|magic| u64::try_from(magic).is_ok_and(|magic| magic == BPF_FS_MAGIC))
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>, PinError> {
    match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        listing => {
            let listing = listing.map_err(io_error("list", dir))?;
            let mut paths = listing
                .map(|entry| entry.map(|entry| entry.path()))
                .collect::<io::Result<Vec<_>>>()
                .map_err(io_error("list", dir))?;
            paths.sort_unstable();
            Ok(paths)
        }
    }
}

fn remove_tree(dir: &Path) -> Result<(), PinError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(io_error("remove", dir)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespaces() {
        let table = [
            ("/proc/self/ns/mnt", "/proc/thread-self/ns/mnt", false),
            ("/proc/self/ns/mnt", "/proc/self/ns/net", true),
            // Who can't see the other one's can't tell.
            ("/proc/self/ns/mnt", "/proc/self/ns/absent", false),
        ];
        for (own, other, expected) in table {
            assert_eq!(is_another_namespace(own.as_ref(), other.as_ref()), expected, "{other}");
        }
    }
}

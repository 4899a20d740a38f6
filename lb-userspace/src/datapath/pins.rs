//! The pins: where the maps and links live in the BPF file system, so that they outlive the daemon.
//!
//! `DIR/vN/maps` and `DIR/vN/links` belong to layout N; `DIR/sockets` has the sockets' storage,
//! whose format never changes. A lock on DIR keeps a second daemon away. What is there is compared
//! before it is used: a name alone says nothing. A directory is ours if it has our mark in it, or,
//! since earlier versions left none, pins of ours; others are never removed, though empty.
//!
//! Whoever can write to DIR can take the hooks away, and whoever can open it can lock it. So DIR is
//! closed to others, and what lies above it must not be another user's to rename.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::mem::offset_of;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use aya::maps::{Array, Map, MapData};
use lb_common::Control;
use rustix::fs::FlockOperation;
use zerocopy::IntoBytes;

use super::bpf::{Link, PinnedObject};
use super::map_specs::{MapShape, SK_STORAGE, socket_shapes};

/// The magic number of a BPF file system; linux/magic.h calls it BPF_FS_MAGIC.
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;
/// Where a BPF file system is by convention, and is mounted if there is none.
const CONVENTIONAL_MOUNT: &str = "/sys/fs/bpf";

/// What marks a directory as ours. A BPF file system has no files but pins, so it is a directory.
/// Every version from 0.1.0 on makes it.
const MARK: &str = "nohop";

/// How many directories deep a layout's pins may lie.
const MAX_DEPTH: usize = 8;

/// How long a daemon that has ended may still have the lock: a child that it was about to start has
/// a copy of the descriptor until it runs its own program.
const RELEASING: Duration = Duration::from_millis(300);

/// How long a daemon that can't be seen may be silent before it counts as ended. It beats every second.
const SILENCE: Duration = Duration::from_secs(30);
/// The inode of the initial process namespace: PROC_PID_INIT_INO of linux/proc_ns.h.
const INITIAL_PID_NAMESPACE: u64 = 0xEFFF_FFFC;

/// What the name of a directory ends in that gives way to another one of its name; a number follows.
const ASIDE: &str = "-aside";

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
    /// A process has locked the directory that doesn't report itself as its daemon.
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
        /// Whose it is.
        uid: u32,
    },
    /// Others could take the pins.
    #[error("{path} {why}, so others could take the pins; {fix}")]
    Unsafe {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
        /// What to do about it.
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

/// How a pin compares with what it has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fit {
    Absent,
    Same,
    /// The same kind of map with another number of entries.
    OtherSize,
    /// A socket storage with other values: a later version's.
    OtherStorage,
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

    fn own_layout(&self) -> PathBuf {
        self.dir.join(format!("v{}", self.layout))
    }

    fn links(&self) -> PathBuf {
        self.own_layout().join("links")
    }

    /// Where a link of this layout is pinned.
    pub fn link(&self, program: &str) -> PathBuf {
        self.links().join(program)
    }

    /// Makes the directories.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn make_directories(&self) -> Result<(), PinError> {
        for dir in [self.sockets(), self.own_layout()] {
            if !is_ours(&dir) && !is_free(&dir) {
                return Err(PinError::ForeignDirectory { dir });
            }
            make_private(&dir.join(MARK))?;
        }
        [self.maps(), self.links()].iter().try_for_each(|dir| make_private(dir))
    }

    /// Pins the sockets' storages by their present names, too: up to layout 2 they had others. The former
    /// pins stay, for a version that is rolled back to.
    fn take_former_names(&self) -> Result<(), PinError> {
        let former = [("SK_REVNAT", "PEERS"), ("SK_REVNAT_PREV", "FORMER_PEERS")];
        for shape in socket_shapes() {
            let Some((_, former)) = former.iter().find(|(name, _)| *name == shape.name) else {
                continue;
            };
            let (path, former) = (self.sockets().join(shape.name), self.sockets().join(former));
            if compare(&path, &shape)? == Fit::Absent && compare(&former, &shape)? == Fit::Same {
                PinnedMaps::open([former])?.pin_at(&path)?;
            }
        }
        Ok(())
    }

    /// Sets the sockets' storages aside that have another version's format: they serve the programs
    /// that have them, but not ours.
    ///
    /// # Errors
    /// When something else has one of the names, or the file system refuses.
    pub fn take_other_storages(&self) -> Result<PinnedMaps, PinError> {
        self.take_former_names()?;
        let mut others = Vec::new();
        for shape in socket_shapes() {
            let path = self.sockets().join(shape.name);
            if compare(&path, &shape)? == Fit::OtherStorage {
                others.push(path);
            }
        }
        let storages = PinnedMaps::open(others)?;
        for (path, _) in &storages.0 {
            tracing::warn!(
                "{} has another version's format: sockets that it knows show their backend",
                path.display()
            );
            unpin(path)?;
        }
        Ok(storages)
    }

    /// Sees to it that the directories are there, and that the lock is on the one that is.
    ///
    /// # Errors
    /// When the file system refuses, or another daemon has a directory that took the place of ours.
    pub fn fix(&mut self) -> Result<(), PinError> {
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
        let has_sockets = self.sockets().exists() && is_ours(&self.sockets());
        Ok(self.layouts()?.is_empty() && !has_sockets)
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
        make_private(&self.maps())
    }

    /// Every link that is pinned under any layout: this one's first. Another version may have links
    /// of other kinds, in directories that this one doesn't know.
    ///
    /// # Errors
    /// When something that isn't a link lies where links are.
    pub fn all_links(&self) -> Result<Vec<PinnedLink>, PinError> {
        let own = self.own_layout();
        let mut layouts = self.layouts()?;
        layouts.sort_by_key(|dir| *dir != own);
        collect_all_links(&layouts)
    }

    fn layouts(&self) -> Result<Vec<PathBuf>, PinError> {
        layouts(&self.dir)
    }

    /// Takes away what other layouts have pinned.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn remove_other_layouts(&self) -> Result<(), PinError> {
        let own = self.own_layout();
        self.layouts()?.iter().filter(|layout| **layout != own).try_for_each(|dir| remove_tree(dir))
    }

    /// Takes away everything of ours, and the directory if nothing else is in it.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn remove_all(&self) -> Result<(), PinError> {
        self.layouts()?.iter().try_for_each(|dir| remove_tree(dir))?;
        if is_ours(&self.sockets()) {
            remove_tree(&self.sockets())?;
        }
        // Something else in it is not ours to judge.
        let _ = fs::remove_dir(&self.dir);
        Ok(())
    }
}

/// Makes a directory if need be, closes it to others and locks it.
fn lock(dir: &Path) -> Result<File, PinError> {
    make_safe(dir)?;
    reclaim(dir)?;
    let mut has_replaced = false;
    'directory: loop {
        let lock = File::open(dir).map_err(io_error("open", dir))?;
        let deadline = Instant::now() + RELEASING;
        loop {
            match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(lock),
                Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    let daemon = holder(dir);
                    let pid = daemon.map(|daemon| daemon.pid);
                    let holders = lock_holders(&lock);
                    let is_daemons = match holders.is_empty() {
                        // It is in another process namespace, or has ended and left its descriptor
                        // to another process.
                        true => daemon.is_some_and(Said::is_live),
                        false => holders.iter().any(|holder| pid == Some(holder.pid.into())),
                    };
                    if is_daemons || holders.is_empty() && has_replaced {
                        return Err(PinError::Taken { dir: dir.into(), pid });
                    }
                    // It opened the directory before it was closed to others: what is locked then
                    // is another directory than the one of this name.
                    let own = rustix::process::geteuid().as_raw();
                    if !has_replaced && holders.iter().all(|holder| ![0, own].contains(&holder.uid))
                    {
                        let who = match holders.first() {
                            Some(Holder { pid, command, uid }) => {
                                format!("process {pid} ({command}, of uid {uid})")
                            }
                            None => "a process that can't be seen, and is no daemon,".to_owned(),
                        };
                        let shown = dir.display();
                        tracing::warn!(
                            "{who} has locked {shown}: the pins move to a new directory of that name"
                        );
                        let place = free_name(dir, ASIDE);
                        fs::rename(dir, place).map_err(io_error("rename", dir))?;
                        make_private(dir)?;
                        reclaim(dir)?;
                        has_replaced = true;
                        continue 'directory;
                    }
                    let Holder { pid, command, uid } = holders[0].clone();
                    return Err(PinError::Locked { dir: dir.into(), pid, command, uid });
                }
                Err(errno) => return Err(io_error("lock", dir)(errno.into())),
            }
        }
    }
}

/// Moves back what is in the directories that gave way; an earlier daemon may have been killed
/// between. Another user may have made others with such names.
fn reclaim(dir: &Path) -> Result<(), PinError> {
    let own = rustix::process::geteuid().as_raw();
    let (Some(parent), Some(name)) = (dir.parent(), dir.file_name()) else { return Ok(()) };
    let prefix = format!("{}{ASIDE}", name.to_string_lossy());
    let is_aside = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let number = name.strip_prefix(&prefix).map(|rest| rest.strip_prefix('-').unwrap_or(rest));
        number.is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
            && fs::symlink_metadata(path).is_ok_and(|found| found.is_dir() && found.uid() == own)
    };
    for aside in entries(parent)?.iter().filter(|path| is_aside(path)) {
        for entry in entries(aside)? {
            let place = dir.join(entry.file_name().unwrap_or_default());
            if !place.exists() {
                fs::rename(&entry, &place).map_err(io_error("rename", &entry))?;
            }
        }
        // What is there twice stays.
        let _ = fs::remove_dir(aside);
    }
    Ok(())
}

/// A process that has locked something.
#[derive(Clone, Debug)]
struct Holder {
    pid: u32,
    command: String,
    uid: u32,
}

/// The processes that have locked a file, as far as this one sees them.
fn lock_holders(file: &File) -> Vec<Holder> {
    let Ok(metadata) = file.metadata() else { return Vec::new() };
    let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
    let holder = |pid: u32| {
        let uid = fs::metadata(format!("/proc/{pid}")).ok()?.uid();
        let command = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        Some(Holder { pid, command: command.trim_end().to_owned(), uid })
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

/// Makes a directory if need be, with all above it, that only this user can use.
fn make_private(dir: &Path) -> Result<(), PinError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io_error("make", dir))
}

/// Whose a directory is, and who may do what there.
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

    /// What is wrong with a directory above the pins, if anything is.
    fn wrong_above(self, own: u32) -> Option<String> {
        const STICKY: u32 = 0o1000;
        if self.is_foreign(own) {
            return Some(format!("is another user's (uid {})", self.uid));
        }
        let is_open = self.mode & 0o022 != 0 && self.mode & STICKY == 0;
        is_open.then(|| format!("may be written to by others (mode {:o})", self.mode & 0o7777))
    }

    /// What is wrong with the directory of the pins, if anything is.
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

/// What can be wrong with the directory of the pins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wrong {
    NoDirectory,
    Foreign,
    Open,
}

/// How safe the pins would be in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Safety {
    /// Only we get there.
    Safe,
    /// Others can make directories in the file system's root: they could take the place first.
    OpenMount(PathBuf),
}

/// Looks whether pins are safe in `dir`, and changes nothing.
///
/// # Errors
/// When they wouldn't be, and the daemon wouldn't start.
pub fn look(dir: &Path) -> Result<Safety, PinError> {
    let root = check_above(dir)?;
    let own = rustix::process::geteuid().as_raw();
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
        let access = Access::of(above).map_err(io_error("look at", above))?;
        if let Some(why) = access.wrong_above(own) {
            let fix = format!("chown root {0} && chmod go-w {0}", above.display());
            return Err(PinError::Unsafe { path: above.into(), why, fix });
        }
    }
    Ok(root)
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

/// Makes a directory if need be, and sees to it that only this user gets there.
fn make_safe(dir: &Path) -> Result<(), PinError> {
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
            access => access.map_err(io_error("look at", dir))?,
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
    let access = Access::of(dir).map_err(io_error("look at", dir))?;
    Err(unsafe_error(dir, Wrong::Foreign, access))
}

/// A name beside `dir` that nothing has: `dir`'s with `suffix` and a number.
fn free_name(dir: &Path, suffix: &str) -> PathBuf {
    let name = |n: u32| {
        let mut name = dir.as_os_str().to_owned();
        name.push(format!("{suffix}-{n}"));
        PathBuf::from(name)
    };
    // Whoever takes them all can't know the last one.
    let mut names = (1..1000).map(name);
    let free = names.find(|name| fs::symlink_metadata(name).is_err());
    free.unwrap_or_else(|| name(fastrand::u32(1000..)))
}

/// Whether a link is pinned anywhere below; what can't be read may be one.
fn has_links(dir: &Path) -> bool {
    let mut links = Vec::new();
    collect_links(dir, 0, &mut links).is_err() || !links.is_empty()
}

/// The directories of layouts in `dir` that are ours.
fn layouts(dir: &Path) -> Result<Vec<PathBuf>, PinError> {
    let is_layout = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.strip_prefix('v').is_some_and(|number| number.parse::<u16>().is_ok()) && is_ours(path)
    };
    Ok(entries(dir)?.into_iter().filter(is_layout).collect())
}

/// Every link that is pinned in `dir` under any layout, without a lock and with nothing made.
///
/// # Errors
/// When something that isn't a link lies where links are, or the file system refuses.
pub fn links_in(dir: &Path) -> Result<Vec<PinnedLink>, PinError> {
    collect_all_links(&layouts(dir)?)
}

fn collect_all_links(layouts: &[PathBuf]) -> Result<Vec<PinnedLink>, PinError> {
    let mut links = Vec::new();
    for layout in layouts {
        collect_links(layout, 0, &mut links)?;
    }
    Ok(links)
}

/// Adds every link that is pinned in a directory or below.
fn collect_links(dir: &Path, depth: usize, links: &mut Vec<PinnedLink>) -> Result<(), PinError> {
    for path in entries(dir)? {
        let kind = fs::symlink_metadata(&path).map_err(io_error("look at", &path))?.file_type();
        if kind.is_dir() {
            // Maps are compared one by one, where they are used.
            let is_maps = depth == 0 && path.ends_with("maps");
            if depth < MAX_DEPTH && !is_maps {
                collect_links(&path, depth + 1, links)?;
            }
            continue;
        }
        // A link of the file system leads to what lies elsewhere.
        if kind.is_symlink() {
            continue;
        }
        match Link::pinned(&path).map_err(io_error("open", &path))? {
            Some(PinnedObject::Link(link)) => {
                let name = path.file_name().unwrap_or_default().to_owned();
                links.push(PinnedLink { name, path, link });
            }
            Some(PinnedObject::Other(found)) if dir.ends_with("links") => {
                let expected = "a link".to_owned();
                let found = format!("a BPF object of {found}");
                return Err(PinError::Foreign { path, found, expected });
            }
            Some(PinnedObject::Other(_)) | None => {}
        }
    }
    Ok(())
}

/// Whether a directory is ours to use and to remove: it has our mark in it, or pins that have names
/// of ours.
fn is_ours(dir: &Path) -> bool {
    // Of layout 2, too.
    const MAPS: [&str; 8] =
        ["FRONTENDS", "SERVICES", "BACKENDS", "CONTROL", "SK_REVNAT", "FLOWS", "DAEMON", "PEERS"];
    let (here, maps, links) = (names(dir), names(&dir.join("maps")), names(&dir.join("links")));
    here.iter().any(|name| name == MARK || MAPS.contains(&name.as_str()))
        || maps.iter().any(|name| MAPS.contains(&name.as_str()))
        || links.iter().any(|name| name.starts_with("nohop_"))
}

/// Whether a directory is free for our pins: nothing is in it but what we would make there.
fn is_free(dir: &Path) -> bool {
    names(dir).iter().all(|name| name == "maps" || name == "links")
        && names(&dir.join("maps")).is_empty()
        && names(&dir.join("links")).is_empty()
}

fn names(dir: &Path) -> Vec<String> {
    let paths = entries(dir).unwrap_or_default();
    let name = |path: PathBuf| path.file_name().unwrap_or_default().to_string_lossy().into();
    paths.into_iter().map(name).collect()
}

fn pin(map: &MapData, path: &Path) -> Result<(), PinError> {
    map.pin(path).map_err(|error| io_error("pin", path)(io::Error::other(error)))
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
    pub fn fix(&self) -> Result<(), PinError> {
        let PinnedMaps(maps) = self;
        maps.iter().filter(|(path, _)| !path.exists()).try_for_each(|(path, map)| pin(map, path))
    }
}

impl PinnedMaps {
    /// Pins these maps at another path, too, where nothing is.
    fn pin_at(&self, path: &Path) -> Result<(), PinError> {
        let PinnedMaps(maps) = self;
        maps.iter().try_for_each(|(_, map)| pin(map, path))
    }

    /// Pins these again, whatever has taken their names.
    ///
    /// # Errors
    /// When the file system refuses.
    pub fn put_back(&self) -> Result<(), PinError> {
        let PinnedMaps(maps) = self;
        maps.iter().try_for_each(|(path, _)| unpin(path))?;
        self.fix()
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
    pub link: Link,
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
        let is_storage = map_type == SK_STORAGE && shape.map_type == SK_STORAGE;
        return if is_storage { Ok(Fit::OtherStorage) } else { Err(foreign(found)) };
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

/// What a daemon says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Said {
    heartbeat_ns: u64,
    pid: u64,
    /// Its number in the kernel, as far as it has learnt that.
    tgid: u64,
}

impl Said {
    /// Whether the daemon still runs, as far as that can be seen.
    fn is_live(self) -> bool {
        let all_are_seen = fs::metadata("/proc/self/ns/pid")
            .is_ok_and(|namespace| namespace.ino() == INITIAL_PID_NAMESPACE);
        let is_seen = || Path::new(&format!("/proc/{}", self.tgid)).exists();
        let age = monotonic_ns().saturating_sub(self.heartbeat_ns);
        u128::from(age) < SILENCE.as_nanos() && (!all_are_seen || is_seen())
    }
}

/// CLOCK_MONOTONIC in nanoseconds, which the programs read too (`bpf_ktime_get_ns`).
pub fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// The daemon that holds a directory's pins, as it says itself: the one that said so last.
fn holder(dir: &Path) -> Option<Said> {
    let said = |layout: PathBuf| {
        let Control { heartbeat_ns, pid, tgid, .. } = control(&layout.join("maps"))?;
        Some(Said { heartbeat_ns, pid, tgid })
    };
    let said = entries(dir).ok()?.into_iter().filter_map(said);
    said.filter(|said| said.pid != 0).max()
}

/// What the daemon of the maps in a directory wrote for the programs. Layout 2 has the first half of it.
fn control(maps: &Path) -> Option<Control> {
    const FORMER_SIZE: usize = offset_of!(Control, bypass_levels);
    let map = |name| Map::from_map_data(MapData::from_pin(maps.join(name)).ok()?).ok();
    let mut control = Control::default();
    if let Some(map) = map("CONTROL") {
        let map = Array::<_, [u8; size_of::<Control>()]>::try_from(map).ok()?;
        control = zerocopy::transmute!(map.get(&0, 0).ok()?);
    } else {
        let map = Array::<_, [u8; FORMER_SIZE]>::try_from(map("DAEMON")?).ok()?;
        control.as_mut_bytes()[..FORMER_SIZE].copy_from_slice(&map.get(&0, 0).ok()?);
    }
    Some(control)
}

/// The directory itself, or the nearest one above it that is there. A symlink in its place counts for
/// nothing: whoever made it chose where it leads.
pub fn nearest(dir: &Path) -> &Path {
    let is_there = |path: &&Path| path.exists() && !(*path == dir && path.is_symlink());
    dir.ancestors().find(is_there).unwrap_or(Path::new("/"))
}

fn ensure_bpffs(dir: &Path) -> Result<(), PinError> {
    if is_bpffs(nearest(dir)) {
        return Ok(());
    }
    let mount_point = Path::new(CONVENTIONAL_MOUNT);
    if !dir.starts_with(mount_point) || !mount_point.is_dir() {
        return Err(PinError::NoBpffs { dir: dir.into() });
    }
    let flags = rustix::mount::MountFlags::NOSUID
        | rustix::mount::MountFlags::NODEV
        | rustix::mount::MountFlags::NOEXEC;
    rustix::mount::mount("bpf", mount_point, "bpf", flags, c"mode=0700")
        .map_err(|errno| PinError::Mount { source: errno.into() })?;
    tracing::info!("mounted a BPF file system at {CONVENTIONAL_MOUNT}");
    let own = Path::new("/proc/self/ns/mnt");
    if is_another_namespace(own, Path::new("/proc/1/ns/mnt")) {
        tracing::warn!(
            "only this process sees it, so the pins go with it, and nohop unload doesn't find them: \
             have the machine mount it at its start, by a line in /etc/fstab: \
             bpf {CONVENTIONAL_MOUNT} bpf mode=0700 0 0"
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
    fn who_has_locked_it() {
        let locks = "1: FLOCK  ADVISORY  WRITE 1234 00:2b:5678 0 EOF\n\
                     1: -> FLOCK  ADVISORY  WRITE 99 00:2b:5678 0 EOF\n\
                     2: POSIX  ADVISORY  WRITE 77 00:2b:5678 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 5 00:2b:56789 0 EOF\n\n4:";
        assert_eq!(lockers(locks, rustix::fs::makedev(0, 0x2b), 5678), [1234]);
        assert_eq!(lockers("", rustix::fs::makedev(0, 0x2b), 5678), [0u32; 0]);
    }

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
            (Access { is_directory: false, ..directory(0, 0o777) }, Some(Wrong::NoDirectory), true),
        ];
        for (access, expected, is_wrong_above) in rows {
            assert_eq!(access.wrong(7), expected, "{access:?}");
            assert_eq!(access.wrong_above(7).is_some(), is_wrong_above, "{access:?}");
        }
    }

    #[test]
    fn ours_by_mark_or_contents() {
        let ours = |paths: &[&str]| {
            let root = tempfile::tempdir().unwrap();
            let dir = root.path().join("v7");
            for path in paths {
                fs::create_dir_all(dir.join(path)).unwrap();
            }
            (is_ours(&dir), is_free(&dir))
        };
        let table: [(&[&str], (bool, bool)); 9] = [
            // Anybody's: it may be used, where our own layout goes, and isn't removed elsewhere.
            (&[], (false, true)),
            (&["maps", "links"], (false, true)),
            (&["nohop", "whatever/precious"], (true, false)),
            (&["maps/CONTROL", "maps/UNKNOWN"], (true, false)),
            (&["links/nohop_edge"], (true, false)),
            (&["PEERS"], (true, false)),
            (&["maps/precious"], (false, false)),
            (&["links/edge"], (false, false)),
            (&["something"], (false, false)),
        ];
        for (paths, expected) in table {
            assert_eq!(ours(paths), expected, "{paths:?}");
        }
    }

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

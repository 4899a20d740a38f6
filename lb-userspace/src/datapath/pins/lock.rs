//! The lock on the directory of the pins, which keeps a second daemon away.

use std::fs::{self, File};
use std::mem::offset_of;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use aya::maps::{Array, Map, MapData};
use lb_common::Control;
use zerocopy::IntoBytes;

use super::directory::{free_name, make_private, make_safe};
use super::error::{PinError, io_error};
use super::layouts::entries;
use crate::file_lock::{LockHolder, holders, try_lock};

/// The age of the heartbeat from which a daemon that isn't visible is taken for dead. Heartbeats come
/// every second.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(30);
/// The inode of the initial process namespace: PROC_PID_INIT_INO of linux/proc_ns.h.
const INITIAL_PID_NAMESPACE: u64 = 0xEFFF_FFFC;

/// The suffix of a directory that was moved aside for another one of its name; a number follows.
const ASIDE: &str = "-aside";

/// Creates a directory where it doesn't exist, closes it to others and locks it.
///
/// # Errors
/// When another daemon or user has locked it, or it can't be closed to others.
pub fn lock(dir: &Path) -> Result<File, PinError> {
    make_safe(dir)?;
    reclaim(dir)?;
    lock_or_replace(dir, false)
}

fn lock_or_replace(dir: &Path, has_replaced: bool) -> Result<File, PinError> {
    let file = File::open(dir).map_err(io_error("open", dir))?;
    if try_lock(&file).map_err(io_error("lock", dir))? {
        return Ok(file);
    }
    let owner = owner(dir);
    let pid = owner.map(|owner| owner.pid);
    let holders = holders(&file);
    let is_daemons = match holders.is_empty() {
        // It is in another process namespace, or has ended and left its descriptor to another
        // process.
        true => owner.is_some_and(Owner::is_live),
        false => holders.iter().any(|holder| pid == Some(holder.pid.into())),
    };
    if is_daemons || holders.is_empty() && has_replaced {
        return Err(PinError::Taken { dir: dir.into(), pid });
    }
    let own = rustix::process::geteuid().as_raw();
    let are_others = holders.iter().all(|holder| ![0, own].contains(&holder.uid));
    let who = match holders.into_iter().next() {
        Some(LockHolder { pid, command, uid }) if has_replaced || !are_others => {
            return Err(PinError::Locked { dir: dir.into(), pid, command, uid });
        }
        Some(LockHolder { pid, command, uid }) => {
            format!("process {pid} ({command}, of uid {uid})")
        }
        None => "a process that isn't visible, and is no daemon,".to_owned(),
    };
    // It opened the directory before that was closed to others. A lock is on the inode, so a new
    // directory of this name isn't locked.
    let shown = dir.display();
    tracing::warn!("{who} has locked {shown}: the pins move to a new directory of that name");
    fs::rename(dir, free_name(dir, ASIDE)).map_err(io_error("rename", dir))?;
    make_private(dir)?;
    reclaim(dir)?;
    lock_or_replace(dir, true)
}

/// Moves the pins back from the directories that were moved aside: an earlier daemon may have been
/// killed in between. Other users may have created others with such names.
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
        // A pin that exists in both places stays.
        let _ = fs::remove_dir(aside);
    }
    Ok(())
}

/// A daemon, by its map `CONTROL`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Owner {
    heartbeat_ns: u64,
    pid: u64,
    /// Its process id in the initial namespace, once that is known.
    tgid: u64,
}

impl Owner {
    /// Whether the daemon still runs, as far as that can be seen.
    fn is_live(self) -> bool {
        let all_are_seen = fs::metadata("/proc/self/ns/pid")
            .is_ok_and(|namespace| namespace.ino() == INITIAL_PID_NAMESPACE);
        let is_seen = || Path::new(&format!("/proc/{}", self.tgid)).exists();
        let age = monotonic_ns().saturating_sub(self.heartbeat_ns);
        u128::from(age) < HEARTBEAT_TIMEOUT.as_nanos() && (!all_are_seen || is_seen())
    }
}

/// CLOCK_MONOTONIC in nanoseconds, which the programs read too (`bpf_ktime_get_ns`).
pub fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// The daemon that the maps name as the owner of a directory's pins: the one with the last heartbeat.
fn owner(dir: &Path) -> Option<Owner> {
    let owner = |layout: PathBuf| {
        let Control { heartbeat_ns, pid, tgid, .. } = control(&layout.join("maps"))?;
        Some(Owner { heartbeat_ns, pid, tgid })
    };
    let owners = entries(dir).ok()?.into_iter().filter_map(owner);
    owners.filter(|owner| owner.pid != 0).max()
}

/// The control block of the maps in a directory. Layout 2 has the first half of it.
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

//! The memory cgroup that maps are charged to.
//!
//! From 5.11 on the kernel charges a map, and the entries of a socket storage with every socket, to
//! the memory cgroup of the process that created the map, as long as the map exists
//! (`bpf_map_save_memcg` in kernel/bpf/syscall.c). A service of systemd has its own cgroup: each
//! connection would cost the accounting, and the service's limit would apply to sockets of the whole
//! node. A map that is created in the root memory cgroup is charged to none. In cgroup v2 only
//! whole processes can enter another memory cgroup, so a child of the daemon enters the root, creates
//! and pins the maps, and exits; the daemon opens the pins.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::linux::fs::MetadataExt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use aya::EbpfLoader;
use rustix::process::{
    Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal, set_parent_process_death_signal,
};

use super::cause::Environment;
use super::map_specs::{CONNECT, EDGE, NAMES};
use crate::config::cgroup;

/// The hidden command by which the binary creates maps from another cgroup.
const COMMAND: &str = "create-maps";
/// The inode of a hierarchy's root; see [`cgroup`].
const ROOT_INODE: u64 = 1;
/// For how long the child may create maps, which takes it milliseconds.
const CHILD_LIMIT: Duration = Duration::from_secs(10);
/// For how long a child that was killed may take to end.
const KILL_LIMIT: Duration = Duration::from_secs(1);

/// Which memory cgroup maps are charged to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Charge {
    /// None, whichever process creates them.
    None,
    /// None, where a process that has entered this directory's cgroup, the root, creates them.
    Avoidable(PathBuf),
    /// This process's memory cgroup, since the root can't be entered for this reason.
    Own(String),
}

impl Charge {
    /// The charge of this process's maps.
    pub fn find() -> Charge {
        if matches!(Environment::read().kernel, kernel if kernel < (5, 11) && kernel != (0, 0)) {
            return Charge::None;
        }
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        let own = read("/proc/self/cgroup");
        let Some(Membership { is_v1, path }) = Membership::parse(&own) else {
            return Charge::None;
        };
        if path == "/" && cgroup::is_namespace_initial() {
            return Charge::None;
        }
        let points: Vec<PathBuf> = match is_v1 {
            true => v1_mounts(&read("/proc/self/mountinfo")).collect(),
            false => cgroup::mounts().into_iter().map(|mount| mount.point).collect(),
        };
        let is_root = |point: &&PathBuf| {
            std::fs::metadata(point).is_ok_and(|found| found.st_ino() == ROOT_INODE)
        };
        let Some(root) = points.iter().find(is_root) else {
            return Charge::Own("the root of its hierarchy isn't visible here".to_owned());
        };
        let controllers = std::fs::read_to_string(root.join("cgroup.controllers"));
        if !is_v1 && controllers.is_ok_and(|all| !all.split_whitespace().any(|one| one == "memory"))
        {
            return Charge::None;
        }
        // With `nsdelegate` the kernel lets none out of its namespace (cgroup_attach_permissions).
        if !is_v1 && !cgroup::is_namespace_initial() {
            return Charge::Own("this process is in a cgroup namespace of its own".to_owned());
        }
        let procs = root.join("cgroup.procs");
        match std::fs::OpenOptions::new().write(true).open(&procs) {
            Ok(_) => Charge::Avoidable(root.clone()),
            Err(error) => Charge::Own(format!("can't write to {}: {error}", procs.display())),
        }
    }
}

/// Where a process is in the hierarchy that has the memory controller.
#[derive(Debug, PartialEq, Eq)]
struct Membership<'a> {
    is_v1: bool,
    path: &'a str,
}

impl Membership<'_> {
    /// From /proc/self/cgroup: `4:memory:/path`, or the line of v2, `0::/path`.
    fn parse(text: &str) -> Option<Membership<'_>> {
        let lines = || {
            text.lines().filter_map(|line| {
                let mut fields = line.splitn(3, ':').skip(1);
                Some((fields.next()?, fields.next()?))
            })
        };
        let is_memory = |controllers: &str| controllers.split(',').any(|one| one == "memory");
        let v1 = lines().find(|(controllers, _)| is_memory(controllers));
        let v2 = || lines().find(|(controllers, _)| controllers.is_empty());
        let (controllers, path) = v1.or_else(v2)?;
        Some(Membership { is_v1: !controllers.is_empty(), path })
    }
}

/// Where the memory hierarchy of cgroup v1 is mounted, by /proc/self/mountinfo.
fn v1_mounts(mountinfo: &str) -> impl Iterator<Item = PathBuf> {
    mountinfo.lines().filter_map(|line| {
        let (mount, fs) = line.split_once(" - ")?;
        let mut fs = fs.split(' ');
        let is_memory =
            fs.next()? == "cgroup" && fs.nth(1)?.split(',').any(|option| option == "memory");
        is_memory.then(|| mount.split(' ').nth(4).map(PathBuf::from))?
    })
}

/// Creates and pins the maps that aren't pinned yet, each given with the path of its pin and its
/// number of entries, so that they are charged to no memory cgroup. `program` has the hidden command;
/// the directory `mark` exists while some are charged.
///
/// # Errors
/// When they are, or would be, charged to this process's memory cgroup; with the reason.
pub fn create_uncharged(
    program: &Path,
    maps: &[(PathBuf, u32)],
    mark: &Path,
) -> Result<(), String> {
    let n_pinned = maps.iter().filter(|(path, _)| path.exists()).count();
    if n_pinned == 0 {
        // What was marked is gone.
        let _ = std::fs::remove_dir(mark);
    }
    if n_pinned < maps.len() {
        // Without the mark only the next start reports less.
        create_missing(program, maps).inspect_err(|_| drop(std::fs::create_dir(mark)))?;
    }
    if mark.exists() { Err("an earlier start created them".to_owned()) } else { Ok(()) }
}

fn create_missing(program: &Path, maps: &[(PathBuf, u32)]) -> Result<(), String> {
    let root = match Charge::find() {
        Charge::None => return Ok(()),
        Charge::Avoidable(root) => root,
        Charge::Own(reason) => return Err(reason),
    };
    let argument = |(path, n_entries): &(PathBuf, u32)| {
        let mut argument = path.clone().into_os_string();
        argument.push(format!("={n_entries}"));
        argument
    };
    let mut command = Command::new(program);
    command.arg(COMMAND).arg(&root).args(maps.iter().map(argument));
    let output = run(&mut command, CHILD_LIMIT)
        .map_err(|error| format!("can't run {}: {error}", program.display()))?
        .ok_or_else(|| format!("the process that creates the maps hung for {CHILD_LIMIT:?}"))?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr);
    let message = message.lines().last().unwrap_or_default();
    Err(format!("the process that creates the maps ended with {}: {message}", output.status))
}

/// Runs a command, and kills it after `limit`; `None` then.
fn run(command: &mut Command, limit: Duration) -> io::Result<Option<Output>> {
    let streams = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let child = streams.spawn()?;
    // A process descriptor can't mean another process of the same number.
    let process = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
    let (sender, receiver) = mpsc::channel();
    // One that the kernel holds doesn't end when it is killed: the thread waits, and the daemon continues.
    let wait = move || sender.send(child.wait_with_output());
    std::thread::Builder::new().name("map-creator".to_owned()).spawn(wait)?;
    if let Ok(output) = receiver.recv_timeout(limit) {
        return output.map(Some);
    }
    // It may have ended just now.
    let _ = pidfd_send_signal(&process, Signal::KILL);
    let _ = receiver.recv_timeout(KILL_LIMIT);
    Ok(None)
}

/// The child's part: enters the cgroup, and creates and pins the maps, each given as `PATH=ENTRIES`.
///
/// # Errors
/// When it can't enter, an argument isn't of this form, or the kernel refuses the maps.
pub fn create_maps(cgroup: &Path, maps: &[OsString]) -> io::Result<()> {
    // In the root it isn't among what systemd kills with the daemon.
    set_parent_process_death_signal(Some(Signal::KILL))?;
    std::fs::write(cgroup.join("cgroup.procs"), "0")?;
    let parsed: Option<Vec<_>> = maps.iter().map(|map| parse_map(map)).collect();
    let maps = parsed.ok_or(io::ErrorKind::InvalidInput)?;
    let mut loader = EbpfLoader::new();
    for (path, n_entries) in &maps {
        let name = path.file_name().and_then(OsStr::to_str).ok_or(io::ErrorKind::InvalidInput)?;
        loader.map_pin_path(name, path);
        if *n_entries > 0 {
            loader.map_max_entries(name, *n_entries);
        }
    }
    // Each takes those of the maps that it has.
    [CONNECT, NAMES, EDGE]
        .into_iter()
        .try_for_each(|object| loader.load(object).map(drop).map_err(io::Error::other))
}

fn parse_map(argument: &OsStr) -> Option<(PathBuf, u32)> {
    let bytes = argument.as_bytes();
    let at = bytes.iter().rposition(|&byte| byte == b'=')?;
    let n_entries = std::str::from_utf8(&bytes[at + 1..]).ok()?.parse().ok()?;
    Some((OsString::from_vec(bytes[..at].to_vec()).into(), n_entries))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_the_memory_controller_is() {
        let table = [
            ("4:memory:/a\n0::/b\n", Some((true, "/a"))),
            ("4:cpu,memory:/a:b\n0::/\n", Some((true, "/a:b"))),
            (
                "9:name=systemd:/\n0::/system.slice/nohop.service\n",
                Some((false, "/system.slice/nohop.service")),
            ),
            ("4:cpu:/a\n", None),
            ("", None),
        ];
        for (text, expected) in table {
            let found = Membership::parse(text).map(|found| (found.is_v1, found.path));
            assert_eq!(found, expected, "{text}");
        }
        let mountinfo = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n\
                         36 31 0:33 / /sys/fs/cgroup/devices rw - cgroup cgroup rw,devices\n\
                         41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        assert!(v1_mounts(mountinfo).eq([PathBuf::from("/sys/fs/cgroup/memory")]));
    }

    #[test]
    fn a_child_that_hangs_is_killed() {
        assert!(run(Command::new("sleep").arg("1000"), Duration::ZERO).unwrap().is_none());
        let output = run(&mut Command::new("true"), Duration::MAX).unwrap();
        assert!(output.unwrap().status.success());
    }

    #[test]
    fn maps_as_arguments() {
        let parsed = |text: &str| parse_map(OsStr::new(text));
        assert_eq!(parsed("/sys/fs/bpf/a=b/SLOTS=7"), Some(("/sys/fs/bpf/a=b/SLOTS".into(), 7)));
        assert_eq!(parsed("/a"), None);
        assert_eq!(parsed("/a=b"), None);
    }
}

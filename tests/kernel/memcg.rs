//! The memory of maps and of sockets' storage is charged to no memory cgroup, although the daemon is in
//! one.

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use lb_userspace::config::cgroup;
use lb_userspace::datapath::{Charge, Datapath, Limit, create_maps};
use lb_userspace::table::Protocols;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, Mode, OFlags, inotify, mkfifoat, open};
use rustix::io::{read, write};
use rustix::process::{
    Pid, PidfdFlags, Resource, Rlimit, Signal, getrlimit, pidfd_open, pidfd_send_signal, setrlimit,
};
use testbed::tempdir::{self, TempDir};

use crate::fixture::{Echo, Place, VIP, connect_udp, service, table};

/// The daemon's hidden command, which it runs from its own executable: here, this one.
const COMMAND: &str = "create-maps";
/// Runs that command in a child and waits for it, as the daemon does.
const PARENT_COMMAND: &str = "create-maps-parent";
const N_SOCKETS: usize = 3_000;

fn own_command(argument: &str) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg(argument);
    command
}

/// Runs a hidden command, if this process was started for one.
pub fn hidden_command() -> Option<ExitCode> {
    let mut arguments = std::env::args_os().skip(1);
    let command = arguments.next()?;
    if command == COMMAND {
        let cgroup = PathBuf::from(arguments.next()?);
        create_maps(&cgroup, &arguments.collect::<Vec<OsString>>()).unwrap();
    } else if command == PARENT_COMMAND {
        let mut child = own_command(COMMAND).args(arguments).spawn().unwrap();
        println!("{}", child.id());
        child.wait().unwrap();
    } else {
        return None;
    }
    Some(ExitCode::SUCCESS)
}

/// A memory cgroup of the test's own, of v1 or v2, with this process in it until it leaves.
struct MemoryCgroup {
    path: PathBuf,
    former: PathBuf,
    usage: &'static str,
    _switch: Option<Switch>,
}

/// The memory controller that was switched on for the children of the root, until this is dropped.
struct Switch(PathBuf);

impl Switch {
    /// `None` where it is on already.
    fn on(root: &Path) -> std::io::Result<Option<Switch>> {
        let control = root.join("cgroup.subtree_control");
        if fs::read_to_string(&control)?.split_whitespace().any(|one| one == "memory") {
            return Ok(None);
        }
        fs::write(&control, "+memory")?;
        Ok(Some(Switch(control)))
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        // Another one's children may use it by now.
        let _ = fs::write(&self.0, "-memory");
    }
}

impl MemoryCgroup {
    /// # Errors
    /// Why there can't be one here.
    fn enter() -> Result<MemoryCgroup, &'static str> {
        const NO_CONTROLLER: &str = "there is no memory controller";
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        let v1 = own.lines().find_map(|line| line.split_once(":memory:")).map(|(_, path)| path);
        let v2 = own.lines().find_map(|line| line.strip_prefix("0::"));
        let (root, former, usage) = match v1 {
            Some(path) => (PathBuf::from("/sys/fs/cgroup/memory"), path, "memory.usage_in_bytes"),
            None => {
                let root = cgroup::find_cgroup2_root().ok_or(NO_CONTROLLER)?;
                (root, v2.ok_or(NO_CONTROLLER)?, "memory.current")
            }
        };
        let switched = if v1.is_some() { Ok(None) } else { Switch::on(&root) };
        let switch = switched.map_err(|_| "the memory controller can't be switched on")?;
        let path = root.join(tempdir::name("memory"));
        let former = root.join(former.trim_start_matches('/'));
        fs::create_dir(&path).map_err(|_| "no cgroup can be created in the memory hierarchy")?;
        let own = MemoryCgroup { path, former, usage, _switch: switch };
        move_to(&own.path);
        Ok(own)
    }

    fn leave(&self) {
        move_to(&self.former);
    }

    /// In bytes.
    fn usage(&self) -> i64 {
        fs::read_to_string(self.path.join(self.usage)).unwrap().trim().parse().unwrap()
    }
}

impl Drop for MemoryCgroup {
    fn drop(&mut self) {
        self.leave();
        let _ = fs::remove_dir(&self.path);
    }
}

fn move_to(cgroup: &Path) {
    fs::write(cgroup.join("cgroup.procs"), "0").unwrap();
}

/// The growth of a memory cgroup's usage by a daemon in it that starts, and then by the sockets of
/// another cgroup, in bytes.
struct Growth {
    by_maps: i64,
    by_sockets: i64,
}

/// # Errors
/// Why there can't be a memory cgroup here.
fn growth(map_creator: Option<PathBuf>) -> Result<Growth, &'static str> {
    let echo = Echo::start(b'a');
    let mut place = Place::new();
    (place.options.datapath.max_services, place.options.datapath.max_backends) = (64, 65_536);
    place.options.map_creator = map_creator;
    let memory = MemoryCgroup::enter()?;
    let before = memory.usage();
    // The kernel refuses nothing, and the sockets' own memory is charged elsewhere.
    let mut datapath = place.start_attached();
    let by_maps = memory.usage() - before;
    memory.leave();
    let limits = datapath.limits();
    assert!(!limits.iter().any(|limit| matches!(limit, Limit::Charged(_))), "{limits:?}");

    let mut web = service("web", VIP, &[(echo.address, 1)]);
    web.protocols = Protocols::Udp;
    datapath.apply(&table(vec![web])).unwrap();
    let vip = SocketAddr::from((VIP, 80));
    assert_eq!(connect_udp(vip).unwrap(), 'a');
    let before = memory.usage();
    let sockets: Vec<UdpSocket> = (0..N_SOCKETS)
        .map(|_| {
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            socket.connect(vip).unwrap();
            socket
        })
        .collect();
    let by_sockets = memory.usage() - before;
    drop(sockets);
    datapath.detach();
    Ok(Growth { by_maps, by_sockets })
}

pub fn maps_are_charged_to_none() {
    let files = getrlimit(Resource::Nofile);
    let wanted = Some(2 * N_SOCKETS as u64);
    let raised = Rlimit { current: wanted, maximum: files.maximum.max(wanted) };
    setrlimit(Resource::Nofile, raised).unwrap();
    let own = match growth(None) {
        Ok(own) => own,
        Err(reason) => {
            setrlimit(Resource::Nofile, files).unwrap();
            return crate::skip(reason);
        }
    };
    let none = growth(Some("/proc/self/exe".into())).unwrap();
    setrlimit(Resource::Nofile, files).unwrap();
    // BACKENDS alone has 4 MB.
    assert!(own.by_maps > none.by_maps + 4_000_000, "{} {}", own.by_maps, none.by_maps);
    assert!(own.by_sockets > none.by_sockets + 500_000, "{} {}", own.by_sockets, none.by_sockets);
    assert!(none.by_sockets < 200_000, "{}", none.by_sockets);
}

/// The growth of a memory cgroup's usage by a daemon in it that creates the maps of the unit `names` alone, in
/// bytes.
///
/// # Errors
/// Why there can't be a memory cgroup here.
fn growth_by_names(map_creator: Option<PathBuf>) -> Result<i64, &'static str> {
    let mut place = Place::new();
    place.options.datapath.max_services = 65_536;
    place.options.map_creator = Some("/proc/self/exe".into());
    drop(place.start_attached());
    for map in ["NAMES", "NAME_RECORDS", "NAMES_CONTROL", "NAMES_COUNTERS"] {
        fs::remove_file(place.pin(&format!("v3/maps/{map}"))).unwrap();
    }
    place.options.map_creator = map_creator;
    let memory = MemoryCgroup::enter()?;
    let before = memory.usage();
    let mut datapath = place.start();
    let growth = memory.usage() - before;
    memory.leave();
    datapath.detach();
    Ok(growth)
}

/// Those of the unit `names` are created by the same program, also where they alone aren't there.
pub fn maps_of_names_are_charged_to_none() {
    let own = match growth_by_names(None) {
        Ok(own) => own,
        Err(reason) => return crate::skip(reason),
    };
    let none = growth_by_names(Some("/proc/self/exe".into())).unwrap();
    // NAME_RECORDS has 4 MB, NAMES 8.
    assert!(own > none + 10_000_000, "{own} {none}");
}

/// A program that fails is no reason not to start: the daemon's own cgroup is charged, and `status`
/// names why.
pub fn a_charge_is_reported() {
    let mut place = Place::new();
    place.options.map_creator = Some("/bin/false".into());
    let memory = match MemoryCgroup::enter() {
        Ok(memory) => memory,
        Err(reason) => return crate::skip(reason),
    };
    assert!(matches!(Charge::find(), Charge::Avoidable(_)), "{:?}", Charge::find());
    let datapath = place.start_attached();
    memory.leave();
    assert_charged(&datapath, "memory cgroup (the process that creates the maps");
    drop(datapath);
    let mut datapath = place.start();
    assert_charged(&datapath, "memory cgroup (an earlier start created them");
    datapath.detach();
}

fn assert_charged(datapath: &Datapath, expected: &str) {
    let limits: Vec<String> = datapath.limits().iter().map(ToString::to_string).collect();
    assert!(limits.iter().any(|limit| limit.contains(expected)), "{limits:?}");
}

/// The daemon is killed while its child, which has left the daemon's cgroup, creates the maps: the
/// child ends as well (PR_SET_PDEATHSIG).
pub fn the_child_ends_with_the_daemon() {
    let dir = TempDir::new("memcg").unwrap();
    let file = dir.path().join("cgroup.procs");
    // The child's write to a full pipe waits until it is killed.
    mkfifoat(CWD, &file, Mode::RUSR | Mode::WUSR).unwrap();
    let pipe = open(&file, OFlags::RDWR | OFlags::NONBLOCK, Mode::empty()).unwrap();
    while write(&pipe, &[0; 4096]).is_ok() {}
    let opens = inotify::init(inotify::CreateFlags::CLOEXEC).unwrap();
    inotify::add_watch(&opens, &file, inotify::WatchFlags::OPEN).unwrap();

    let mut parent =
        own_command(PARENT_COMMAND).arg(dir.path()).stdout(Stdio::piped()).spawn().unwrap();
    let mut number = String::new();
    BufReader::new(parent.stdout.take().unwrap()).read_line(&mut number).unwrap();
    let child = Pid::from_raw(number.trim().parse().unwrap()).unwrap();
    let child = pidfd_open(child, PidfdFlags::empty()).unwrap();
    // It opens the file after its request for the signal.
    wait_for(&opens, "the child opens cgroup.procs");
    read(&opens, &mut [0; 1024]).unwrap();
    parent.kill().unwrap();
    parent.wait().unwrap();
    let ended = std::panic::catch_unwind(|| wait_for(&child, "the child ends with its parent"));
    let _ = pidfd_send_signal(&child, Signal::KILL);
    ended.unwrap();
}

/// Waits for an event of a descriptor, a minute at most.
fn wait_for(descriptor: &impl AsFd, event: &str) {
    let limit = Timespec { tv_sec: 60, tv_nsec: 0 };
    let n = poll(&mut [PollFd::new(descriptor, PollFlags::IN)], Some(&limit)).unwrap();
    assert_eq!(n, 1, "{event}");
}

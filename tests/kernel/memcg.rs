//! What the memory of maps and of sockets' storage is charged to: to no memory cgroup, although the
//! daemon is in one.

use std::ffi::OsString;
use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use lb_userspace::config::cgroup;
use lb_userspace::datapath::{Charge, Limit, create_maps};
use lb_userspace::table::Protocols;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use testbed::tempdir;

use crate::fixture::{Echo, Place, VIP, connect_udp, service, table};

/// The daemon's hidden command, which it runs from its own executable: here, this one.
const COMMAND: &str = "create-maps";
const N_SOCKETS: usize = 3_000;

/// Runs what this process was started for, if it wasn't the tests.
pub fn asked_for() -> Option<ExitCode> {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next()? != COMMAND {
        return None;
    }
    let cgroup = PathBuf::from(arguments.next()?);
    create_maps(&cgroup, &arguments.collect::<Vec<OsString>>()).unwrap();
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
    let mut datapath = place.start_attached();
    memory.leave();
    let limits: Vec<String> = datapath.limits().iter().map(ToString::to_string).collect();
    assert!(
        limits
            .iter()
            .any(|limit| limit.contains("memory cgroup (the process that creates the maps")),
        "{limits:?}"
    );
    datapath.detach();
}

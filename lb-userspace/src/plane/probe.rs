//! The proof that the hooks run: a dial of our own, from a process inside the scope.
//!
//! It goes to the pool's own address, which no service has: the connect hook notes the port and the
//! process, and refuses it. An attachment to the wrong cgroup looks right from everywhere else.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use lb_common::Probe;

use super::kernel::Board;

/// The dial never leaves the machine, so this is plenty.
const TIMEOUT: Duration = Duration::from_secs(2);
/// The hidden command by which the binary dials from inside another cgroup.
const COMMAND: &str = "probe-dial";

/// Dials from inside a cgroup.
#[derive(Debug)]
pub struct Prober {
    board: Board,
    address: Ipv4Addr,
    scope: PathBuf,
}

/// A dial that the hook saw.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// What it saw.
    pub seen: Probe,
    /// Whether this process dialled, and not a child of it.
    pub is_own: bool,
}

/// What a dial showed.
#[derive(Debug)]
pub enum Proof {
    /// The hook saw it.
    Runs(Seen),
    /// The hook didn't.
    Misses,
    /// It couldn't be dialled from inside the scope, for this reason.
    Unknown(String),
}

impl Prober {
    /// A prober that dials `address`, the pool's own, from inside `scope`.
    pub fn new(board: Board, address: Ipv4Addr, scope: &Path) -> Prober {
        Prober { board, address, scope: scope.into() }
    }

    /// Dials once.
    pub fn probe(&self) -> Proof {
        // A port that says which dial this was.
        let port = fastrand::u16(1..);
        self.board.expect_probe(port);
        let target = SocketAddr::from((self.address, port));
        let is_own = self.is_inside();
        if is_own {
            dial(target);
        } else if let Err(error) = self.dial_from_inside(target) {
            return Proof::Unknown(error.to_string());
        }
        let seen = self.board.probe();
        if seen.tgid != 0 { Proof::Runs(Seen { seen, is_own }) } else { Proof::Misses }
    }

    /// Whether this process is in the scope.
    fn is_inside(&self) -> bool {
        let own = || {
            let text = std::fs::read_to_string("/proc/self/cgroup").ok()?;
            let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
            std::fs::canonicalize(crate::config::cgroup::find_cgroup2_root()?.join(path)).ok()
        };
        let scope = std::fs::canonicalize(&self.scope);
        own().is_some_and(|own| scope.is_ok_and(|scope| own.starts_with(scope)))
    }

    /// Lets a child of ours dial from a cgroup below the scope that is made for it.
    fn dial_from_inside(&self, target: SocketAddr) -> io::Result<()> {
        let cgroup = self.scope.join("nohop-probe");
        match std::fs::create_dir(&cgroup) {
            // An earlier daemon was killed while it probed.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            result => result?,
        }
        let status = Command::new("/proc/self/exe")
            .arg(COMMAND)
            .arg(&cgroup)
            .arg(target.to_string())
            .stdin(Stdio::null())
            .status();
        std::fs::remove_dir(&cgroup)?;
        match status? {
            status if status.success() => Ok(()),
            status => Err(io::Error::other(format!("the dialling process ended with {status}"))),
        }
    }
}

/// What the child does: it enters the cgroup and dials.
///
/// # Errors
/// When it can't enter.
pub fn dial_inside(cgroup: &Path, target: SocketAddr) -> io::Result<()> {
    std::fs::write(cgroup.join("cgroup.procs"), "0")?;
    dial(target);
    Ok(())
}

/// The dial is refused, whether the hook runs or not; what the hook saw of it is what counts.
fn dial(target: SocketAddr) {
    let _ = TcpStream::connect_timeout(&target, TIMEOUT);
}

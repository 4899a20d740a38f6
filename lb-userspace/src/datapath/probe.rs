//! Verifies that the hooks run: a probe connection, from a process inside the scope.
//!
//! It goes to the pool's own address, which no service has: the connect hook notes the process, and
//! refuses it. An attachment to the wrong cgroup looks right from everywhere else. The hook
//! recognizes the socket by its cookie, which the kernel gives to each socket of a boot
//! (`sock_gen_cookie`), so a process of the scope that connects to the same address isn't mistaken
//! for the daemon.

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use lb_common::Probe;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketType, connect, socket, sockopt};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::kernel::ControlBlock;

/// How long the child may take: it is another program's start and two system calls, but the cgroup
/// that it enters may be frozen, or out of memory or processor time. Less than the interval of
/// probes, since two at once would expect each other's socket.
const TIMEOUT: Duration = Duration::from_secs(4);
/// The hidden command by which the binary connects from inside another cgroup.
const COMMAND: &str = "probe-connect";
/// The port doesn't matter.
const PORT: u16 = 1;

/// Connects from inside a cgroup.
#[derive(Debug)]
pub struct Prober {
    control_block: ControlBlock,
    address: Ipv4Addr,
    scope: PathBuf,
}

/// A connect() that the hook saw.
#[derive(Clone, Copy, Debug)]
pub struct Observed {
    /// The hook's record of it.
    pub probe: Probe,
    /// Whether this process connected, and not a child of it.
    pub is_own: bool,
}

/// The result of a probe connection.
#[derive(Debug)]
pub enum ProbeResult {
    /// The hook ran.
    Seen(Observed),
    /// The hook didn't run.
    NotSeen,
    /// No connection could be made from inside the scope, for this reason.
    Failed(String),
}

impl Prober {
    /// A prober that connects to `address`, the pool's own, from inside `scope`.
    pub fn new(control_block: ControlBlock, address: Ipv4Addr, scope: &Path) -> Prober {
        Prober { control_block, address, scope: scope.into() }
    }

    /// Connects once.
    pub fn probe(&self) -> ProbeResult {
        let target = SocketAddr::from((self.address, PORT));
        let is_own = self.is_inside();
        let connected =
            if is_own { self.connect(target) } else { self.connect_from_inside(target) };
        if let Err(error) = connected {
            return ProbeResult::Failed(error.to_string());
        }
        let probe = self.control_block.probe();
        if probe.tgid != 0 {
            ProbeResult::Seen(Observed { probe, is_own })
        } else {
            ProbeResult::NotSeen
        }
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

    fn connect(&self, target: SocketAddr) -> io::Result<()> {
        let (socket, cookie) = probe_socket()?;
        self.control_block.expect_probe(cookie);
        connect_to(&socket, target);
        Ok(())
    }

    /// Lets a child of ours connect from a cgroup below the scope that is made for it.
    fn connect_from_inside(&self, target: SocketAddr) -> io::Result<()> {
        let cgroup = self.scope.join("nohop-probe");
        match std::fs::create_dir(&cgroup) {
            // An earlier daemon was killed while it probed.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            result => result?,
        }
        let mut child = Command::new("/proc/self/exe")
            .arg(COMMAND)
            .arg(&cgroup)
            .arg(target.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let done = self.connect_in_child(&mut child, Instant::now() + TIMEOUT);
        if done.is_err() {
            // It may be frozen, but can always be killed.
            let _ = child.kill();
            let _ = child.wait();
        }
        let removed = std::fs::remove_dir(&cgroup);
        done.and(removed)
    }

    fn connect_in_child(&self, child: &mut Child, deadline: Instant) -> io::Result<()> {
        let stdout = child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
        if let Some(cookie) = read_cookie(stdout, deadline)? {
            self.control_block.expect_probe(cookie);
            child.stdin.take().ok_or(io::ErrorKind::BrokenPipe)?.write_all(b"\n")?;
        }
        let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
        wait_for(PollFd::new(&pidfd, PollFlags::IN), deadline)?;
        match child.wait()? {
            status if status.success() => Ok(()),
            status => {
                Err(io::Error::other(format!("the process that connects ended with {status}")))
            }
        }
    }
}

/// The cookie that the child reports; `None` when it ends without one.
fn read_cookie(stdout: ChildStdout, deadline: Instant) -> io::Result<Option<u64>> {
    wait_for(PollFd::new(&stdout, PollFlags::IN), deadline)?;
    let mut line = String::new();
    // It writes the line at once.
    BufReader::new(stdout).read_line(&mut line)?;
    Ok(line.trim().parse().ok().filter(|&cookie| cookie != 0))
}

fn wait_for(fd: PollFd<'_>, deadline: Instant) -> io::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
    match poll(&mut [fd], Some(&timeout)) {
        Ok(0) => Err(io::Error::other(
            "a process that entered the cgroup didn't get to connect within 4 s: is the cgroup \
             frozen (cgroup.freeze), or without processor time?",
        )),
        Ok(_) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// The child's part: enters the cgroup, reports its socket's cookie, and connects once a line arrives.
///
/// # Errors
/// When it can't enter, or make a socket.
pub fn connect_inside(cgroup: &Path, target: SocketAddr) -> io::Result<()> {
    std::fs::write(cgroup.join("cgroup.procs"), "0")?;
    let (socket, cookie) = probe_socket()?;
    writeln!(io::stdout(), "{cookie}")?;
    io::stdin().read_line(&mut String::new())?;
    connect_to(&socket, target);
    Ok(())
}

/// A socket whose connect() sends nothing, and its cookie.
fn probe_socket() -> io::Result<(OwnedFd, u64)> {
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    let cookie = sockopt::socket_cookie(&socket)?;
    Ok((socket, cookie))
}

/// The hook refuses it. Only what the hook saw of it matters.
fn connect_to(socket: &OwnedFd, target: SocketAddr) {
    let _ = connect(socket, &target);
}

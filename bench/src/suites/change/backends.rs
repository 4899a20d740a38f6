//! Instances: servers with names and addresses of their own, many of them started at once.
//!
//! Entering a namespace costs more than the server itself does, so one program enters and starts all.

use std::io::{BufRead, BufReader};
use std::net::SocketAddrV4;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use testbed::cmd;
use testbed::process::Process;

use crate::node::Node;

/// The only service.
pub const SERVICE: &str = "web";

/// The program's output once all listen.
const STARTED: &str = "all listen";

/// Instances that were started together; those alive end with this.
pub struct Batch {
    /// Them, in the order of their numbers.
    pub instances: Vec<Instance>,
    process: Process,
}

/// An instance at work.
#[derive(Clone, Debug)]
pub struct Instance {
    /// Its name, under which it is registered, and by which it answers.
    pub name: String,
    /// Where it listens.
    pub address: SocketAddrV4,
    // Unlike an id, it never comes to mean another process.
    pidfd: Arc<OwnedFd>,
}

impl Batch {
    /// Starts `n` instances, numbered from `first` on, whose work on a request takes so many
    /// milliseconds, and waits until they listen.
    ///
    /// # Errors
    /// When one can't.
    pub fn start(node: &Node, first: usize, n: usize, work_ms: u32) -> Result<Batch> {
        let mut command = node.backend_place().command(std::env::current_exe()?);
        command.args(["instances", &first.to_string(), &n.to_string(), &work_ms.to_string()]);
        let process = Process::spawn("instances", command)?;
        let line = process.wait_for_line(&[STARTED])?;
        let pids = line.trim_start_matches(STARTED).split_whitespace();
        let pids: Vec<Pid> = pids.filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect();
        ensure!(pids.len() == n, "{n} instances were to start: {line}");
        let instance = |(idx, pid)| -> Result<Instance> {
            let pidfd = pidfd_open(pid, PidfdFlags::empty()).context("open a pidfd")?;
            Ok(Instance { name: name(idx), address: address(idx), pidfd: Arc::new(pidfd) })
        };
        let instances = (first..).zip(pids).map(instance).collect::<Result<_>>()?;
        Ok(Batch { instances, process })
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        self.instances.iter().for_each(Instance::kill);
        let _ = self.process.wait_for_exit();
    }
}

impl Instance {
    /// Ends it, as a crash would: its connections are reset, and new ones refused.
    pub fn kill(&self) {
        self.signal(Signal::KILL);
    }

    /// Sends it a signal: `nohop-load hello` says what each does.
    pub fn signal(&self, signal: Signal) {
        let _ = pidfd_send_signal(&self.pidfd, signal);
    }

    /// One that isn't at work: ending it ends nothing.
    #[cfg(test)]
    pub fn fake(name: &str) -> Instance {
        let null = std::fs::File::open("/dev/null").expect("there is one");
        Instance { name: name.into(), address: address(0), pidfd: Arc::new(null.into()) }
    }

    /// The first line of its answers.
    pub fn answer(&self) -> String {
        format!("hello from {}", self.name)
    }
}

fn name(idx: usize) -> String {
    format!("i-{idx:05}")
}

fn address(idx: usize) -> SocketAddrV4 {
    Node::backend(idx, 8080)
}

/// The program `instances FIRST N WORK_MS`: starts them, prints their process ids, and ends after the last one.
///
/// # Errors
/// When one doesn't start.
pub fn program(arguments: &[&str]) -> Result<()> {
    let [first, n, work_ms] = arguments[..] else {
        anyhow::bail!("usage: instances FIRST N WORK_MS");
    };
    let (first, n): (usize, usize) = (first.parse()?, n.parse()?);
    let mut started = Started(Vec::new());
    for idx in first..first + n {
        started.0.push(start(idx, work_ms)?);
    }
    for child in &mut started.0 {
        let stdout = child.stdout.take().context("a server without output")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        ensure!(line.starts_with("listening on "), "a server doesn't listen: {line:?}");
    }
    let pids: Vec<String> = started.0.iter().map(|child| child.id().to_string()).collect();
    println!("{STARTED} {}", pids.join(" "));
    for child in &mut started.0 {
        child.wait()?;
    }
    Ok(())
}

fn start(idx: usize, work_ms: &str) -> Result<Child> {
    let mut command = Command::new(cmd::built("nohop-load")?);
    command.args(["hello", &address(idx).to_string(), "--name", &name(idx), "--work-ms", work_ms]);
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
    child.with_context(|| format!("start {command:?}"))
}

/// Children that end with this, also when it fails half-way.
struct Started(Vec<Child>);

impl Drop for Started {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

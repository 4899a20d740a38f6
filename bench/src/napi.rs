//! Where a host's packets are received: by default in the time of whoever sends them, as veth has no interrupts
//! of its own; in kernel threads an interface's receiving has a processor and a processor time of its own.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, setpriority_process};
use testbed::cmd;
use testbed::net::Host;

/// Has these interfaces of a host receive in a kernel thread each, by NAPI, with GRO. Returns the threads. Urgent ones
/// go before all programs, as interrupts do; others before most, and so before none for ever.
///
/// # Errors
/// When the kernel can't: it is older than 5.12, or veth has no GRO.
pub fn receive_in_threads(host: &Host, interfaces: &[&str], are_urgent: bool) -> Result<Vec<Pid>> {
    let before = threads()?;
    for interface in interfaces {
        // With it veth receives by NAPI, whether a program is attached or not.
        host.outside().run("ethtool", &format!("-K {interface} gro on"))?;
        set_threaded(host, interface, true)?;
    }
    let mut started = threads()?;
    started.retain(|thread| !before.contains(thread));
    ensure!(started.len() == interfaces.len(), "{started:?} receive for {interfaces:?}");
    for thread in &started {
        if are_urgent {
            cmd::words("chrt", &format!("--fifo --pid 1 {}", thread.as_raw_nonzero()))?;
        } else {
            setpriority_process(Some(*thread), -20).context("raise the priority of a thread")?;
        }
    }
    Ok(started)
}

/// Has an interface receive in the time of who sends again; its thread ends.
///
/// # Errors
/// When the kernel refuses.
pub fn receive_at_once(host: &Host, interface: &str) -> Result<()> {
    set_threaded(host, interface, false)
}

fn set_threaded(host: &Host, interface: &str, is_threaded: bool) -> Result<()> {
    let namespace = host.namespace();
    let name = namespace.file_name().and_then(|name| name.to_str()).context("a namespace")?;
    let (file, value) = (format!("/sys/class/net/{interface}/threaded"), u8::from(is_threaded));
    let mut ip = std::process::Command::new("ip");
    // It mounts the /sys of that namespace.
    ip.args(["netns", "exec", name, "sh", "-ec", &format!("echo {value} > {file}")]);
    cmd::stdout(ip).map(drop)
}

/// The processor time of threads so far.
///
/// # Errors
/// When one is gone.
pub fn cpu_time(threads: &[Pid]) -> Result<Duration> {
    let times = threads.iter().map(|thread| {
        let file = format!("/proc/{}/schedstat", thread.as_raw_nonzero());
        let text = fs::read_to_string(&file).with_context(|| format!("read {file}"))?;
        let ns = text.split_whitespace().next().and_then(|ns| ns.parse().ok());
        Ok(Duration::from_nanos(ns.with_context(|| format!("{file}: {text}"))?))
    });
    times.sum()
}

/// All threads of this machine that receive.
fn threads() -> Result<Vec<Pid>> {
    let processes = fs::read_dir("/proc").context("list /proc")?.flatten();
    let receives = |dir: &Path| {
        fs::read_to_string(dir.join("comm")).is_ok_and(|comm| comm.starts_with("napi/"))
    };
    let found = processes.map(|entry| entry.path()).filter(|dir| receives(dir));
    let pid = |dir: &Path| Pid::from_raw(dir.file_name()?.to_str()?.parse().ok()?);
    Ok(found.filter_map(|dir| pid(&dir)).collect())
}

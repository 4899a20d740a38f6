//! The programs that bring Consul's instances to HAProxy, by its configuration and a reload or by its
//! Runtime API, and to Envoy, by a file of endpoints. All wait on the same blocking query.

use std::collections::{BTreeSet, VecDeque};
use std::io::{Read, Write};
use std::net::SocketAddrV4;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use super::backends::SERVICE;
use super::blocking::{Blocking, Instances};
use crate::peers::{ENVOY_ENDPOINTS, HaproxyNotify, Protocol, Services, rendered};

/// The file that is written at each change.
pub const RELOAD_CONFIG: &str = "haproxy-reload.cfg";

/// The slots that `bench/peers/haproxy-runtime.cfg` declares.
const N_SLOTS: usize = 40;

/// How long HAProxy may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// The program `follow reload DIR MASTER_PID`, `follow runtime SOCKET` or `follow eds DIR`; it runs until
/// it is ended.
///
/// # Errors
/// When Consul or HAProxy fails it, or `DIR` can't be written to.
pub fn program(arguments: &[&str]) -> Result<()> {
    match arguments[..] {
        ["reload", dir, master] => {
            let master = Pid::from_raw(master.parse()?).context("0 is no process")?;
            reload(Path::new(dir), master)
        }
        ["runtime", socket] => runtime(Path::new(socket)),
        ["eds", dir] => eds(Path::new(dir)),
        _ => bail!("usage: follow reload DIR MASTER_PID | follow runtime SOCKET | follow eds DIR"),
    }
}

/// Writes the configuration and reloads it, one reload after the other: a master loses a signal that
/// comes while it restarts.
fn reload(dir: &Path, master: Pid) -> Result<()> {
    let notify = HaproxyNotify::bind(dir)?;
    let mut blocking = Blocking::new(SERVICE);
    let mut rendered = None;
    loop {
        let instances = blocking.next()?;
        if rendered.as_ref() == Some(&instances) {
            continue;
        }
        replace(dir, RELOAD_CONFIG, &instances)?;
        kill_process(master, Signal::USR2).context("signal HAProxy's master")?;
        notify.wait_for(&["RELOADING=1", "READY=1"])?;
        rendered = Some(instances);
    }
}

/// Replaces the file of endpoints, which Envoy watches. Where renames come faster than Envoy reads, it
/// reads the newest, so there is nothing to wait for.
fn eds(dir: &Path) -> Result<()> {
    let mut blocking = Blocking::new(SERVICE);
    let mut rendered = None;
    loop {
        let instances = blocking.next()?;
        if rendered.as_ref() != Some(&instances) {
            replace(dir, ENVOY_ENDPOINTS, &instances)?;
            rendered = Some(instances);
        }
    }
}

/// Replaces a file of `bench/peers` in one step: the proxy may be reading it.
fn replace(dir: &Path, file: &str, instances: &Instances) -> Result<()> {
    let mut services = Services::one(Protocol::Tcp, instances.values().copied().collect());
    services.services[0].name = SERVICE.into();
    let text = rendered(file, &services, dir)?;
    let fresh = dir.join("fresh");
    std::fs::write(&fresh, text).and_then(|()| std::fs::rename(&fresh, dir.join(file)))?;
    Ok(())
}

/// Fills slots.
fn runtime(socket: &Path) -> Result<()> {
    let mut blocking = Blocking::new(SERVICE);
    let mut slots = Slots::new(N_SLOTS);
    loop {
        let commands = slots.update(&blocking.next()?.into_values().collect())?;
        if !commands.is_empty() {
            send(socket, &commands)?;
        }
    }
}

/// Has HAProxy do all of these on one connection, and waits until they are done.
fn send(socket: &Path, commands: &[String]) -> Result<()> {
    let connected = UnixStream::connect(socket);
    let mut stream = connected.with_context(|| format!("connect to {}", socket.display()))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    writeln!(stream, "{}", commands.join(";"))?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let is_good = |line: &str| {
        line.is_empty() || line.contains("changed from") || line.starts_with("no need to change")
    };
    let wrong = answer.lines().find(|line| !is_good(line));
    ensure!(wrong.is_none(), "HAProxy answers {:?} to {commands:?}", wrong.unwrap_or_default());
    Ok(())
}

/// HAProxy's slots: which are taken, and by whom.
struct Slots {
    taken: Vec<Option<SocketAddrV4>>,
    /// The one that is free for longest first.
    free: VecDeque<usize>,
}

impl Slots {
    fn new(n: usize) -> Slots {
        Slots { taken: vec![None; n], free: (0..n).collect() }
    }

    /// The commands for HAProxy, so that these serve and no others.
    fn update(&mut self, those: &BTreeSet<SocketAddrV4>) -> Result<Vec<String>> {
        let server = |slot_idx: usize| format!("set server {SERVICE}/s{}", slot_idx + 1);
        let is_taken_by = |address: &SocketAddrV4| self.taken.contains(&Some(*address));
        let new: Vec<_> = those.iter().filter(|address| !is_taken_by(address)).copied().collect();
        let is_left =
            |slot_idx: &usize| self.taken[*slot_idx].is_some_and(|at| !those.contains(&at));
        let left: Vec<_> = (0..self.taken.len()).filter(is_left).collect();
        let mut commands = Vec::new();
        // New ones come first, so that there is always a server.
        for address in new {
            let slot_idx = self.free.pop_front().context("more instances than slots")?;
            let (ip, port, server) = (address.ip(), address.port(), server(slot_idx));
            commands.push(format!("{server} addr {ip} port {port}"));
            commands.push(format!("{server} state ready"));
            self.taken[slot_idx] = Some(address);
        }
        for slot_idx in left {
            commands.push(format!("{} state maint", server(slot_idx)));
            self.taken[slot_idx] = None;
            self.free.push_back(slot_idx);
        }
        Ok(commands)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_filled_and_left() {
        let mut slots = Slots::new(3);
        let at = |d: u8| SocketAddrV4::new([10, 98, 1, d].into(), 8080);
        for (those, expected) in [
            (
                &[1, 2][..],
                Some(
                    &[
                        "s1 addr 10.98.1.1 port 8080",
                        "s1 state ready",
                        "s2 addr 10.98.1.2 port 8080",
                        "s2 state ready",
                    ][..],
                ),
            ),
            (&[1, 2], Some(&[])),
            (&[2], Some(&["s1 state maint"])),
            // The slot that was left is taken last.
            (&[2, 3], Some(&["s3 addr 10.98.1.3 port 8080", "s3 state ready"])),
            (&[3, 4], Some(&["s1 addr 10.98.1.4 port 8080", "s1 state ready", "s2 state maint"])),
            (&[1, 2, 3, 4], None),
        ] {
            let text = slots.update(&those.iter().copied().map(at).collect());
            let expected: Option<Vec<String>> = expected.map(|commands| {
                commands.iter().map(|command| format!("set server web/{command}")).collect()
            });
            assert_eq!(text.ok(), expected, "{those:?}");
        }
    }

    #[test]
    fn the_configuration_declares_the_slots() {
        for file in ["haproxy-runtime.cfg", "haproxy-srv.cfg"] {
            let services = Services::one(Protocol::Tcp, vec![]);
            let text = rendered(file, &services, Path::new("/tmp")).expect(file);
            assert!(text.contains(&format!("server-template s 1-{N_SLOTS} ")), "{text}");
        }
    }

    #[test]
    fn envoy_watches_the_file_that_is_replaced() {
        let services = Services::one(Protocol::Tcp, vec![]);
        let dir = Path::new("/tmp/x");
        let text = rendered("envoy-eds.yaml", &services, dir).expect("filled in");
        let watched =
            format!("path_config_source: {{ path: {}/{ENVOY_ENDPOINTS} }}", dir.display());
        assert!(text.contains(&watched), "{text}");
    }
}

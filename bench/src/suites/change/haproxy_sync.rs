//! The programs that bring Consul's instances to HAProxy, by its configuration and a reload or by its
//! Runtime API, to Envoy, by a file of endpoints, and to nftables. All wait on the same blocking query.

use std::collections::{BTreeSet, VecDeque};
use std::io::{Read, Write};
use std::net::SocketAddrV4;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use testbed::cmd;

use super::backends::SERVICE;
use super::blocking::{Blocking, Instances};
use crate::peers::{ENVOY_ENDPOINTS, HaproxyNotify, Protocol, Services, find, rendered};

/// The file that is written at each change.
pub const RELOAD_CONFIG: &str = "haproxy-reload.cfg";
const NFTABLES: &str = "nftables.nft";

/// The slots that `bench/peers/haproxy-runtime.cfg` declares.
const N_SLOTS: usize = 40;

/// From an error of Consul's to the next request.
const RETRY: Duration = Duration::from_millis(250);

/// How long HAProxy may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// The program `follow reload DIR MASTER_PID SETTINGS`, `follow runtime SOCKET`, `follow eds DIR` or `follow
/// nft DIR`; it runs until it is ended.
///
/// # Errors
/// When the balancer fails it, or `DIR` can't be written to.
pub fn program(arguments: &[&str]) -> Result<()> {
    match arguments[..] {
        ["reload", dir, master, settings] => {
            let master = Pid::from_raw(master.parse()?).context("0 is no process")?;
            reload(Path::new(dir), master, settings)
        }
        ["runtime", socket] => runtime(Path::new(socket)),
        // Where renames come faster than Envoy reads, it reads the newest, so there is nothing to wait for.
        ["eds", dir] => {
            follow(|instances| replace(Path::new(dir), ENVOY_ENDPOINTS, "", instances).map(drop))
        }
        ["nft", dir] => follow(|instances| {
            // A map of no backends is none.
            if instances.is_empty() {
                return Ok(());
            }
            let rules = replace(Path::new(dir), NFTABLES, "", instances)?;
            let mut nft = Command::new(find("nft")?);
            nft.arg("-f").arg(rules);
            cmd::stdout(nft).map(drop)
        }),
        _ => {
            bail!("usage: follow reload|runtime|eds|nft …, as the suites `change` and `failure` do")
        }
    }
}

/// Has the service's instances applied at each change, one after the other.
fn follow(mut apply: impl FnMut(&Instances) -> Result<()>) -> Result<()> {
    let mut blocking = Blocking::new(SERVICE);
    let mut applied = None;
    loop {
        let instances = match blocking.next() {
            Ok(instances) => instances,
            Err(error) => {
                // As consul-template does.
                eprintln!("asks again: {error:#}");
                thread::sleep(RETRY);
                continue;
            }
        };
        if applied.as_ref() != Some(&instances) {
            apply(&instances)?;
            applied = Some(instances);
        }
    }
}

/// Writes the configuration and reloads it, one reload after the other: a master loses a signal that
/// comes while it restarts.
fn reload(dir: &Path, master: Pid, settings: &str) -> Result<()> {
    let notify = HaproxyNotify::bind(dir)?;
    follow(|instances| {
        replace(dir, RELOAD_CONFIG, settings, instances)?;
        kill_process(master, Signal::USR2).context("signal HAProxy's master")?;
        notify.wait_for(&["RELOADING=1", "READY=1"])
    })
}

/// Replaces a file of `bench/peers` in one step: the proxy may be reading it.
fn replace(dir: &Path, file: &str, settings: &str, instances: &Instances) -> Result<PathBuf> {
    let mut services = Services::one(Protocol::Tcp, instances.values().copied().collect());
    services.services[0].name = SERVICE.into();
    services.settings = settings.into();
    let text = rendered(file, &services, dir)?;
    let (fresh, file) = (dir.join("fresh"), dir.join(file));
    std::fs::write(&fresh, text).and_then(|()| std::fs::rename(&fresh, &file))?;
    Ok(file)
}

/// Fills slots.
fn runtime(socket: &Path) -> Result<()> {
    let mut slots = Slots::new(N_SLOTS);
    follow(|instances| {
        let commands = slots.update(&instances.values().copied().collect())?;
        if commands.is_empty() { Ok(()) } else { send(socket, &commands) }
    })
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
        let mut services = Services::one(Protocol::Tcp, vec![]);
        services.settings = "eds".into();
        let dir = Path::new("/tmp/x");
        let text = rendered("envoy.yaml", &services, dir).expect("filled in");
        let watched =
            format!("path_config_source: {{ path: {}/{ENVOY_ENDPOINTS} }}", dir.display());
        assert!(text.contains(&watched), "{text}");
    }
}

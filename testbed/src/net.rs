//! Hosts: network namespaces, joined by veth.

use std::fs::{self, File};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Once};
use std::thread;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::cgroup::Cgroup;
use crate::cleanup::Cleanup;
use crate::cmd;
use crate::tempdir::{self, TempDir};

/// Where `ip netns` keeps the namespaces.
const NAMESPACES: &str = "/run/netns";

/// Within a mount namespace of its own: the host's resolv.conf, the cgroup if any, the program.
const ENTER: &str = concat!(
    r#"mount --bind "$1" /etc/resolv.conf"#,
    r#" && { [ -z "$2" ] || echo $$ > "$2/cgroup.procs"; } && shift 2 && exec "$@""#
);

/// A network namespace with loopback up, and a resolv.conf of its own.
///
/// Its addresses are its own: nothing leaves it but to the hosts that it is joined with.
pub struct Host {
    namespace: String,
    n_interfaces: AtomicU32,
    tempdir: TempDir,
    _cleanup: Cleanup,
}

impl Host {
    /// Makes a host; `role` is for the reader of `ip netns`.
    ///
    /// Its resolv.conf names 127.0.0.1.
    ///
    /// # Errors
    /// Without the right to make namespaces.
    pub fn new(role: &str) -> Result<Arc<Host>> {
        sweep();
        let namespace = tempdir::name(role);
        let tempdir = TempDir::new(role)?;
        let cleanup = Cleanup::new({
            let namespace = namespace.clone();
            move || remove(&namespace)
        });
        cmd::words("ip", &format!("netns add {namespace}"))?;
        let host = Host { namespace, n_interfaces: AtomicU32::new(0), tempdir, _cleanup: cleanup };
        host.ip("link set lo up")?;
        host.set_resolv_conf("nameserver 127.0.0.1\n")?;
        Ok(Arc::new(host))
    }

    /// Has this host forward packets, of IPv4 and IPv6.
    ///
    /// # Errors
    /// When its namespace can't be entered.
    pub fn forward(&self) -> Result<()> {
        self.enter(|| {
            // Those of this thread's network namespace.
            for key in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
                fs::write(format!("/proc/sys/net/{key}"), "1").with_context(|| key.to_owned())?;
            }
            Ok(())
        })
    }

    /// Joins two hosts by a cable, `addresses` (such as `10.99.0.1/24`) at its ends.
    ///
    /// # Errors
    /// When `ip` refuses.
    pub fn connect_veth(&self, other: &Host, addresses: [&str; 2]) -> Result<()> {
        let [here, there] = [self, other]
            .map(|host| format!("eth{}", host.n_interfaces.fetch_add(1, Ordering::Relaxed)));
        let peer = &other.namespace;
        self.ip(&format!("link add {here} type veth peer name {there} netns {peer}"))?;
        for (host, interface, address) in [(self, here, addresses[0]), (other, there, addresses[1])]
        {
            host.ip(&format!("addr add {address} dev {interface}"))?;
            host.ip(&format!("link set {interface} up"))?;
        }
        Ok(())
    }

    /// Makes this host the switch that connects others: see [`Host::attach`].
    ///
    /// # Errors
    /// Without the right to make a bridge.
    pub fn make_bridge(&self) -> Result<()> {
        self.ip("link add br0 type bridge")?;
        self.ip("link set br0 up").map(drop)
    }

    /// Plugs a host with this address into the switch. Returns the switch's end of the cable, which
    /// [`Host::ip`] of the switch can set `down` and `up`.
    ///
    /// # Errors
    /// When `ip` refuses.
    pub fn attach(&self, host: &Host, address: &str) -> Result<String> {
        let [port, interface] = [self, host]
            .map(|host| format!("eth{}", host.n_interfaces.fetch_add(1, Ordering::Relaxed)));
        let peer = &host.namespace;
        self.ip(&format!("link add {port} type veth peer name {interface} netns {peer}"))?;
        self.ip(&format!("link set {port} master br0 up"))?;
        host.ip(&format!("addr add {address} dev {interface}"))?;
        host.ip(&format!("link set {interface} up"))?;
        Ok(port)
    }

    /// The file that stands for its network namespace.
    pub fn namespace(&self) -> PathBuf {
        Path::new(NAMESPACES).join(&self.namespace)
    }

    /// Runs `ip` on this host, with arguments separated by spaces.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn ip(&self, arguments: &str) -> Result<String> {
        cmd::words("ip", &format!("-n {} {arguments}", self.namespace))
    }

    /// Calls a function on this host, in a thread of its own: a socket that it makes is this host's.
    ///
    /// # Errors
    /// When the namespace can't be entered, or as the function's.
    pub fn enter<T: Send>(&self, function: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let namespace = File::open(Path::new(NAMESPACES).join(&self.namespace))?;
        let run = || {
            let network = Some(LinkNameSpaceType::Network);
            move_into_link_name_space(namespace.as_fd(), network).context("enter a namespace")?;
            function()
        };
        thread::scope(|scope| scope.spawn(run).join())
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Replaces what the programs of this host find in /etc/resolv.conf.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn set_resolv_conf(&self, text: &str) -> Result<()> {
        fs::write(self.resolv_conf(), text).context("write a host's resolv.conf")
    }

    fn resolv_conf(&self) -> PathBuf {
        self.tempdir.path().join("resolv.conf")
    }

    /// The host as the processes of a cgroup see it.
    pub fn inside<'a>(&'a self, cgroup: &'a Cgroup) -> ExecContext<'a> {
        ExecContext { host: self, cgroup: Some(cgroup) }
    }

    /// The host as processes outside of every test's cgroup see it.
    pub fn outside(&self) -> ExecContext<'_> {
        ExecContext { host: self, cgroup: None }
    }
}

/// Where a program runs: a host, and a cgroup or none.
#[derive(Clone, Copy)]
pub struct ExecContext<'a> {
    host: &'a Host,
    cgroup: Option<&'a Cgroup>,
}

impl ExecContext<'_> {
    /// A command that runs `program` here; the child's id is the program's.
    ///
    /// `ip netns exec` would mount a fresh /sys and so hide the cgroups.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new("nsenter");
        command.args(self.entry()).arg(program.as_ref());
        command
    }

    /// The same of a program that [`cmd::installed`] finds, with the libraries that `cargo xtask setup`
    /// unpacks with it.
    ///
    /// # Errors
    /// When it isn't installed.
    pub fn installed(&self, program: &str) -> Result<Command> {
        let mut command = self.command(cmd::installed(program)?);
        command.env("LD_LIBRARY_PATH", cmd::UNPACKED);
        Ok(command)
    }

    /// Runs `program` here with arguments separated by spaces; it must succeed.
    ///
    /// # Errors
    /// When it can't be started or fails.
    pub fn run(&self, program: impl AsRef<Path>, arguments: &str) -> Result<String> {
        let mut command = self.command(program);
        command.args(arguments.split_whitespace());
        cmd::stdout(command)
    }

    /// The command line in front of a program that runs it here.
    pub fn shell_prefix(&self) -> String {
        let quoted = self.entry().into_iter().map(|word| {
            let plain = |c: char| c.is_ascii_alphanumeric() || "/.-_=".contains(c);
            if !word.is_empty() && word.chars().all(plain) { word } else { format!("'{word}'") }
        });
        format!("nsenter {}", quoted.collect::<Vec<_>>().join(" "))
    }

    /// The arguments of `nsenter` that lead here.
    fn entry(&self) -> Vec<String> {
        let net = format!("--net={NAMESPACES}/{}", self.host.namespace);
        let resolv_conf = self.host.resolv_conf().display().to_string();
        let cgroup = self.cgroup.map_or(String::new(), |c| c.path().display().to_string());
        let unshare = "-- unshare --mount --propagation private sh -c".split(' ').map(String::from);
        [net]
            .into_iter()
            .chain(unshare)
            .chain([ENTER.into(), "sh".into(), resolv_conf, cgroup])
            .collect()
    }
}

/// Removes the namespaces that killed runs left behind, once in this process.
fn sweep() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| tempdir::sweep(Path::new(NAMESPACES), remove));
}

/// Removes a namespace with the processes in it, if it exists.
fn remove(namespace: &str) {
    if !Path::new(NAMESPACES).join(namespace).exists() {
        return;
    }
    let pids = cmd::words("ip", &format!("netns pids {namespace}")).unwrap_or_default();
    for pid in pids.lines().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)) {
        let _ = kill_process(pid, Signal::KILL);
    }
    if let Err(error) = cmd::words("ip", &format!("netns delete {namespace}")) {
        eprintln!("the network namespace {namespace} stays: {error:#}");
    }
}

//! Two edges in one network, with keepalived by the file in contrib: the VIPs move when the edge that has
//! them is drained, when it isn't ready, and when its link is down. New connections reach backends, old
//! ones are reset at their next packet. An edge that comes back moves nothing.

use std::fs;
use std::io::ErrorKind;
use std::net::SocketAddrV4;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use testbed::TIMEOUT;
use testbed::cgroup::Cgroup;
use testbed::cmd;
use testbed::helloworld::Helloworld;
use testbed::net::Host;
use testbed::nohop::Nohop;
use testbed::process::Process;
use testbed::tempdir::TempDir;

use crate::cluster::Catalog;
use crate::edge::{Flow, cli, echo};

const WEB: [&str; 2] = ["203.0.113.10", "[2001:db8:1::10]"];
const ECHO: SocketAddrV4 = SocketAddrV4::new(std::net::Ipv4Addr::new(203, 0, 113, 11), 7);
const BACKEND: [&str; 2] = ["10.99.0.2", "fd99::2"];

/// A client and two edges at one switch, the edges and a backend's host at another.
struct Site {
    client: Arc<Host>,
    outer: Arc<Host>,
    inner: Arc<Host>,
    backend: Arc<Host>,
}

fn attach(switch: &Host, host: &Host, interface: &str, v4: &str, v6: &str) -> Result<String> {
    let port = switch.attach(host, &format!("{v4}/24"))?;
    host.ip(&format!("addr add {v6}/64 dev {interface} nodad"))?;
    Ok(port)
}

impl Site {
    fn new() -> Result<Site> {
        let (outer, inner) = (Host::new("outer")?, Host::new("inner")?);
        let (client, backend) = (Host::new("client")?, Host::new("backend")?);
        outer.make_bridge()?;
        inner.make_bridge()?;
        attach(&outer, &client, "eth0", "198.51.100.2", "2001:db8:51::2")?;
        attach(&inner, &backend, "eth0", BACKEND[0], BACKEND[1])?;
        for network in ["203.0.113.0/24", "2001:db8:1::/64"] {
            client.ip(&format!("route add {network} dev eth0"))?;
        }
        Ok(Site { client, outer, inner, backend })
    }

    /// Whether a new connection to each public address is answered; not for long, as there may be none who
    /// has it.
    fn is_served(&self) -> bool {
        WEB.iter().all(|vip| {
            let words = format!("-gsS --max-time 1 http://{vip}/");
            self.client.outside().run("curl", &words).is_ok_and(|text| text.starts_with("hello"))
        })
    }
}

/// One of the edges, with its keepalived.
struct Edge {
    host: Arc<Host>,
    /// Of the switch, where clients are.
    port: String,
    nohop: Nohop,
    config: String,
    keepalived: Process,
    _cgroup: Cgroup,
    _dir: TempDir,
}

impl Edge {
    fn start(site: &Site, catalog: &Catalog, nth: usize) -> Result<Edge> {
        let host = Host::new(&format!("edge{nth}"))?;
        let last = 2 + nth;
        let outside = (format!("198.51.100.{last}"), format!("2001:db8:51::{last}"));
        let port = attach(&site.outer, &host, "eth0", &outside.0, &outside.1)?;
        let inside = (format!("10.99.0.{last}"), format!("fd99::{last}"));
        attach(&site.inner, &host, "eth1", &inside.0, &inside.1)?;
        // Of the edge alone.
        let source = (format!("10.99.0.1{last}"), format!("fd99::1{last}"));
        host.ip(&format!("addr add {}/32 dev eth1", source.0))?;
        host.ip(&format!("addr add {}/128 dev eth1 nodad", source.1))?;
        host.forward()?;
        let config = format!(
            "vip.public = [\"203.0.113.0/24\", \"2001:db8:1::/64\"]\n\
             edge.interfaces = [\"eth0\", \"eth1\"]\n\
             edge.source = [{:?}, {:?}]\n{}",
            source.0,
            source.1,
            catalog.config()
        );
        let cgroup = Cgroup::new()?;
        let nohop = Nohop::start(&host, &cgroup, &config)?;

        let dir = TempDir::new("keepalived")?;
        let path = |name: &str| dir.path().join(name);
        let socket = nohop.admin().replace("unix:", "");
        let text = include_str!("../../contrib/keepalived/keepalived.conf");
        let text = text.replace("/run/nohop/admin.sock", &socket);
        let text = if nth == 1 { text } else { text.replace("priority 100", "priority 90") };
        fs::write(path("keepalived.conf"), text)?;
        let mut command = host.outside().installed("keepalived")?;
        command.args("--dont-fork --log-console --log-detail --vrrp --use-file".split(' '));
        command.arg(path("keepalived.conf")).arg("--pid").arg(path("pid"));
        command.arg("--vrrp_pid").arg(path("vrrp_pid"));
        let keepalived = Process::spawn(&format!("keepalived {nth}"), command)?;
        Ok(Edge { host, port, nohop, config, keepalived, _cgroup: cgroup, _dir: dir })
    }

    fn has_vips(&self) -> Result<bool> {
        let all = self.host.ip("-br addr show dev eth0")?;
        let has = ["203.0.113.10/32", "203.0.113.11/32", "2001:db8:1::10/128"]
            .map(|address| all.contains(address));
        Ok(has == [true; 3])
    }

    fn n_times(&self, state: &str) -> usize {
        self.keepalived.n_lines_with(&format!("Entering {state} STATE"))
    }

    /// Waits until it may have the VIPs again, and has none.
    fn wait_until_spare(&self, n_before: usize) -> Result<()> {
        wait_until("it is a backup again", || Ok(self.n_times("BACKUP") > n_before))?;
        ensure!(!self.host.ip("addr show dev eth0")?.contains("203.0.113."), "it has VIPs");
        Ok(())
    }
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    while !is_so()? {
        ensure!(Instant::now() < deadline, "not until {TIMEOUT:?}: {what}");
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// The VIPs go from one edge to the other; what was open is reset, and what is new is served.
fn moves(site: &Site, to: &Edge, flow: &mut Flow, what: &str) -> Result<()> {
    let start = Instant::now();
    wait_until(what, || to.has_vips())?;
    wait_until(what, || Ok(site.is_served()))?;
    // For docs/edge.md.
    println!("{what}: the other edge serves after {:.2} s", start.elapsed().as_secs_f64());
    let Err(error) = flow.goes_on(what) else { bail!("{what}: another edge knows the flow") };
    let kind = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
    let is_reset = matches!(kind, Some(ErrorKind::ConnectionReset | ErrorKind::BrokenPipe));
    ensure!(is_reset, "{what}: {error:#}");
    *flow = Flow::open(&site.client, ECHO)?;
    flow.goes_on(what)
}

pub fn run() -> Result<()> {
    let site = Site::new()?;
    let v4 = Helloworld::start(site.backend.outside(), "v4", &format!("{}:8080", BACKEND[0]))?;
    let mut command = site.backend.outside().command(cmd::built("nohop-load")?);
    command.args(["hello", &format!("[{}]:8080", BACKEND[1]), "--name", "v6"]);
    let v6 = Process::spawn("helloworld v6", command)?;
    v6.wait_for_line(&["listening on "])?;
    let catalog = Catalog::new(&[])?;
    let echo = echo(&site.backend, BACKEND[0])?;
    catalog.write(&format!(
        "[[service]]\nname = \"web\"\npublic = \"203.0.113.10:80,[2001:db8:1::10]:80\"\n\
         backend = [{{ address = \"{}\" }}, {{ address = \"[{}]:8080\" }}]\n\
         [[service]]\nname = \"echo\"\npublic = \"{ECHO}\"\nbackend = [{{ address = \"{echo}\" }}]\n",
        v4.address, BACKEND[1]
    ))?;
    let first = Edge::start(&site, &catalog, 1)?;
    wait_until("the first edge has the VIPs", || first.has_vips())?;
    let second = Edge::start(&site, &catalog, 2)?;
    wait_until("the second edge is a backup", || Ok(second.n_times("BACKUP") == 1))?;
    wait_until("it is served", || Ok(site.is_served()))?;
    let mut flow = Flow::open(&site.client, ECHO)?;
    flow.goes_on("at first")?;

    let n_before = first.n_times("BACKUP");
    cli(&first.nohop, "drain edge")?;
    moves(&site, &second, &mut flow, "drained")?;
    cli(&first.nohop, "undrain edge")?;
    first.wait_until_spare(n_before)?;

    let n_before = second.n_times("BACKUP");
    second.nohop.configure(&format!("{}shadow = true\n", second.config))?;
    cli(&second.nohop, "reload")?;
    moves(&site, &first, &mut flow, "not ready")?;
    second.nohop.configure(&second.config)?;
    cli(&second.nohop, "reload")?;
    second.wait_until_spare(n_before)?;

    let n_before = first.n_times("BACKUP");
    site.outer.ip(&format!("link set {} down", first.port))?;
    moves(&site, &second, &mut flow, "its link is down")?;
    site.outer.ip(&format!("link set {} up", first.port))?;
    first.wait_until_spare(n_before)?;
    flow.goes_on("at last")?;
    ensure!(second.has_vips()?, "both edges are there");
    Ok(())
}

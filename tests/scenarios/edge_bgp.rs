//! Two edges announce the same public VIPs to a router by BGP, one with BIRD and one with FRR, each by its
//! file in contrib. The router spreads connections over both, and each stays on its edge. The route of an
//! edge that is drained goes first, and comes again.

use std::fs;
use std::net::SocketAddrV4;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::TIMEOUT;
use testbed::cgroup::Cgroup;
use testbed::cmd;
use testbed::net::Host;
use testbed::nohop::Nohop;
use testbed::process::Process;
use testbed::tempdir::TempDir;

use crate::cluster::Catalog;
use crate::edge::{Flow, cli, echo};

const ECHO: SocketAddrV4 = SocketAddrV4::new(std::net::Ipv4Addr::new(203, 0, 113, 10), 7);
const VIPS: [&str; 2] = ["203.0.113.10", "2001:db8:1::10"];
const BACKEND: &str = "10.99.0.2";

/// So many that there are some on each edge.
const N_FLOWS: usize = 24;

/// The other side of both files in contrib: the router of both edges, which spreads what several announce.
const ROUTER: &str = "
router id 10.0.0.1;
protocol device {}
protocol kernel { merge paths on; ipv4 { export all; import none; }; }
protocol kernel { merge paths on; ipv6 { export all; import none; }; }
template bgp edge {
    local 10.0.0.1 as 64513;
    graceful restart on;
    ipv4 { import all; export none; };
    ipv6 { import all; export none; };
}
protocol bgp edge1 from edge { neighbor 10.0.0.2 as 64512; }
protocol bgp edge2 from edge { neighbor 10.0.0.3 as 64512; }
";

/// Debian's build wants a group for vtysh's sockets, which its package makes.
const WITH_FRRVTY: &str = r#"mount --bind "$1" /etc/group && shift && exec "$@""#;

/// A client, the edges' router, and a backend's host.
struct Site {
    client: Arc<Host>,
    router: Arc<Host>,
    outer: Arc<Host>,
    inner: Arc<Host>,
    backend: Arc<Host>,
}

impl Site {
    fn new() -> Result<Site> {
        let (outer, inner) = (Host::new("outer")?, Host::new("inner")?);
        let (client, router) = (Host::new("client")?, Host::new("router")?);
        let backend = Host::new("backend")?;
        outer.make_bridge()?;
        inner.make_bridge()?;
        outer.attach(&router, "10.0.0.1/24")?;
        router.ip("addr add fd00::1/64 dev eth0 nodad")?;
        router.connect_veth(&client, ["198.51.100.1/24", "198.51.100.2/24"])?;
        client.ip("route add default via 198.51.100.1")?;
        inner.attach(&backend, &format!("{BACKEND}/24"))?;
        router.forward()?;
        router.enter(|| {
            // A flow's way by its ports, too.
            let key = "/proc/sys/net/ipv4/fib_multipath_hash_policy";
            fs::write(key, "1").context(key)
        })?;
        Ok(Site { client, router, outer, inner, backend })
    }

    /// How many edges the router has a route of, to each VIP.
    fn n_next_hops(&self) -> Result<[usize; 2]> {
        let [v4, v6] = [
            self.router.ip("route show 203.0.113.10")?,
            self.router.ip("-6 route show 2001:db8:1::10")?,
        ];
        let n_hops = |shown: &str| shown.matches("via ").count();
        Ok([n_hops(&v4), n_hops(&v6)])
    }

    fn wait_for_next_hops(&self, n: usize) -> Result<()> {
        let deadline = Instant::now() + TIMEOUT;
        while self.n_next_hops()? != [n, n] {
            let found = self.n_next_hops()?;
            ensure!(Instant::now() < deadline, "{found:?} next hops of the VIPs, not {n}");
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

/// An edge, and what it announces by.
struct Edge {
    host: Arc<Host>,
    nohop: Nohop,
    /// Of its own.
    dir: TempDir,
    speakers: Vec<Process>,
    _cgroup: Cgroup,
}

impl Edge {
    fn start(site: &Site, catalog: &Catalog, nth: usize) -> Result<Edge> {
        let host = Host::new(&format!("edge{nth}"))?;
        let last = 1 + nth;
        site.outer.attach(&host, &format!("10.0.0.{last}/24"))?;
        site.inner.attach(&host, &format!("10.99.0.1{last}/24"))?;
        host.ip(&format!("addr add fd00::{last}/64 dev eth0 nodad"))?;
        // Of the edge alone.
        host.ip(&format!("addr add 10.99.0.2{last}/32 dev eth1"))?;
        host.ip(&format!("addr add fd99::2{last}/128 dev eth1 nodad"))?;
        host.ip("route add 198.51.100.0/24 via 10.0.0.1")?;
        host.forward()?;
        let config = format!(
            "vip.public = [\"203.0.113.0/24\", \"2001:db8:1::/64\"]\n\
             edge.interfaces = [\"eth0\", \"eth1\"]\n\
             edge.source = [\"10.99.0.2{last}\", \"fd99::2{last}\"]\n{}",
            catalog.config()
        );
        let cgroup = Cgroup::new()?;
        let nohop = Nohop::start(&host, &cgroup, &config)?;
        let dir = TempDir::new("bgp")?;
        Ok(Edge { host, nohop, dir, speakers: Vec::new(), _cgroup: cgroup })
    }

    /// Runs BIRD by contrib's file.
    fn run_bird(&mut self) -> Result<()> {
        let text = include_str!("../../contrib/bird/bird.conf");
        self.speakers.push(bird(&self.host, &self.dir, text)?);
        Ok(())
    }

    /// Runs FRR by contrib's file, with the addresses of the second edge.
    fn run_frr(&mut self) -> Result<()> {
        let path = |name: &str| self.dir.path().join(name);
        let text = include_str!("../../contrib/frr/frr.conf").replace("10.0.0.2", "10.0.0.3");
        fs::write(path("frr.conf"), text)?;
        let groups = fs::read_to_string("/etc/group")?;
        fs::write(path("group"), format!("{groups}frrvty:x:64999:root\n"))?;
        for (program, ready) in [("zebra", "zserv"), ("bgpd", "bgpd.vty")] {
            let mut command = self.host.outside().installed("sh")?;
            command
                .args(["-c", WITH_FRRVTY, "sh"])
                .arg(path("group"))
                .arg(cmd::installed(program)?);
            command.args(["--user", "root", "--group", "root", "--log", "stdout"]);
            command.arg("--config_file").arg(path("frr.conf"));
            command.arg("--pid_file").arg(path(&format!("{program}.pid")));
            command.arg("--vty_socket").arg(self.dir.path());
            command.arg("--socket").arg(path("zserv"));
            self.speakers.push(Process::spawn(program, command)?);
            let deadline = Instant::now() + TIMEOUT;
            while !path(ready).exists() {
                let tail = self.speakers.last().map(Process::tail).unwrap_or_default();
                ensure!(Instant::now() < deadline, "{program} isn't there\n{tail}");
                thread::sleep(Duration::from_millis(20));
            }
        }
        Ok(())
    }

    fn n_flows(&self) -> Result<usize> {
        let flows: Value = serde_json::from_str(&cli(&self.nohop, "flows --json")?)?;
        Ok(flows["total"].as_u64().context("a number of flows")? as usize)
    }
}

fn bird(host: &Host, dir: &TempDir, text: &str) -> Result<Process> {
    let path = |name: &str| dir.path().join(name);
    fs::write(path("bird.conf"), text)?;
    let mut command = host.outside().installed("bird")?;
    command.arg("-f").arg("-c").arg(path("bird.conf")).arg("-s").arg(path("bird.ctl"));
    command.arg("-P").arg(path("bird.pid"));
    Process::spawn("bird", command)
}

pub fn run() -> Result<()> {
    let site = Site::new()?;
    let catalog = Catalog::new(&[])?;
    let echo = echo(&site.backend, BACKEND)?;
    let public = format!("{ECHO},[{}]:7", VIPS[1]);
    catalog.write(&format!(
        "[[service]]\nname = \"echo\"\npublic = \"{public}\"\nbackend = [{{ address = \"{echo}\" }}]\n"
    ))?;
    let router_dir = TempDir::new("router")?;
    let _router = bird(&site.router, &router_dir, ROUTER)?;
    let mut first = Edge::start(&site, &catalog, 1)?;
    first.run_bird()?;
    site.wait_for_next_hops(1)?;
    let mut flow = Flow::open(&site.client, ECHO)?;
    flow.goes_on("by BIRD")?;

    let mut second = Edge::start(&site, &catalog, 2)?;
    second.run_frr()?;
    site.wait_for_next_hops(2)?;
    drop(flow);
    let open = |n: usize| -> Result<Vec<Flow>> {
        (0..n).map(|_| Flow::open(&site.client, ECHO)).collect()
    };
    let n_before = first.n_flows()?;
    let mut flows = open(N_FLOWS)?;
    for when in ["at first", "and again"] {
        for flow in &mut flows {
            flow.goes_on(when)?;
        }
    }
    let by_each = [first.n_flows()? - n_before, second.n_flows()?];
    ensure!(by_each.iter().sum::<usize>() == N_FLOWS && !by_each.contains(&0), "{by_each:?}");

    // BIRD: its edge's route goes, and with it what the router sent there.
    cli(&first.nohop, "drain edge")?;
    site.wait_for_next_hops(1)?;
    let goes_on = |flow: &mut Flow| flow.goes_on("with one edge").is_ok();
    let n_kept = flows.iter_mut().map(goes_on).filter(|goes_on| *goes_on).count();
    ensure!(n_kept == by_each[1], "{n_kept} of {by_each:?} are there");
    let n_before = first.n_flows()?;
    for mut flow in open(8)? {
        flow.goes_on("by the edge that is left")?;
    }
    ensure!(first.n_flows()? == n_before, "a drained edge gets connections");
    cli(&first.nohop, "undrain edge")?;
    site.wait_for_next_hops(2)?;

    // FRR.
    cli(&second.nohop, "drain edge")?;
    site.wait_for_next_hops(1)?;
    ensure!(site.router.ip("route show 203.0.113.10")?.contains("via 10.0.0.2"));
    Flow::open(&site.client, ECHO)?.goes_on("by the first edge again")
}

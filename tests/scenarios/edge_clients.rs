//! Programs outside that know nothing of an edge: curl, wrk, dig, iperf3 and a QUIC client, each over IPv4
//! and IPv6. What they have open outlives the daemon and its next start. Links with a smaller MTU on
//! either side of the edge hold nothing up. The edge's commands show what there is.

use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;
use testbed::TIMEOUT;
use testbed::cgroup::Cgroup;
use testbed::cmd;
use testbed::http;
use testbed::net::Host;
use testbed::nohop::Nohop;
use testbed::process::Process;
use testbed::tempdir::TempDir;
use testbed::udp::{Echo, UdpClients};

use crate::cluster::Catalog;
use crate::edge::{Flow, cli};

const CONFIG: &str = "\
vip.public = [\"203.0.113.0/24\", \"2001:db8:1::/64\"]
edge.interfaces = [\"eth0\", \"eth1\"]
edge.source = [\"10.99.9.9\", \"fd99:9::9\"]
";

/// The same addresses have all services, by their ports.
const VIPS: [&str; 2] = ["203.0.113.10", "2001:db8:1::10"];

const CLIENT: [&str; 2] = ["198.51.100.2", "2001:db8:51::2"];

/// Backends' hosts, each in a network of its own.
const BACKENDS: [[&str; 2]; 2] = [["10.99.1.2", "fd99:1::2"], ["10.99.2.2", "fd99:2::2"]];

/// How much a QUIC client fetches.
const QUIC_LEN: usize = 8 << 20;

/// A client, a router, an edge, another router, and two hosts with backends.
struct Site {
    client: Arc<Host>,
    outer: Arc<Host>,
    edge: Arc<Host>,
    inner: Arc<Host>,
    backends: [Arc<Host>; 2],
}

/// Joins two hosts, with addresses of IPv4 and IPv6 at both ends. Returns the names of the interfaces.
fn connect(one: &Host, other: &Host, v4: [&str; 2], v6: [&str; 2]) -> Result<()> {
    one.connect_veth(other, v4.map(|address| format!("{address}/24")).each_ref().map(|it| &**it))?;
    for (host, v4, v6) in [(one, v4[0], v6[0]), (other, v4[1], v6[1])] {
        let shown = host.ip(&format!("-br addr show to {v4}"))?;
        let interface = shown.split('@').next().context("an interface")?;
        host.ip(&format!("addr add {v6}/64 dev {interface} nodad"))?;
    }
    Ok(())
}

fn route(host: &Host, networks: &[&str], via: [&str; 2]) -> Result<()> {
    for network in networks {
        let via = if network.contains(':') { via[1] } else { via[0] };
        host.ip(&format!("route add {network} via {via}"))?;
    }
    Ok(())
}

impl Site {
    fn new() -> Result<Site> {
        let (client, outer) = (Host::new("client")?, Host::new("outer")?);
        let (edge, inner) = (Host::new("edge")?, Host::new("inner")?);
        let backends = [Host::new("backend1")?, Host::new("backend2")?];
        connect(&outer, &client, ["198.51.100.1", CLIENT[0]], ["2001:db8:51::1", CLIENT[1]])?;
        connect(&outer, &edge, ["10.98.0.1", "10.98.0.2"], ["fd98::1", "fd98::2"])?;
        connect(&edge, &inner, ["10.99.0.1", "10.99.0.2"], ["fd99::1", "fd99::2"])?;
        for (nth, (backend, addresses)) in (1..).zip(backends.iter().zip(BACKENDS)) {
            let [v4, v6] = [format!("10.99.{nth}.1"), format!("fd99:{nth}::1")];
            connect(&inner, backend, [&v4, addresses[0]], [&v6, addresses[1]])?;
            route(backend, &["0.0.0.0/0", "::/0"], [&v4, &v6])?;
        }
        route(&client, &["0.0.0.0/0", "::/0"], ["198.51.100.1", "2001:db8:51::1"])?;
        route(&outer, &["203.0.113.0/24", "2001:db8:1::/64"], ["10.98.0.2", "fd98::2"])?;
        route(&edge, &["198.51.100.0/24", "2001:db8:51::/64"], ["10.98.0.1", "fd98::1"])?;
        route(&edge, &["10.99.0.0/16", "fd99::/16"], ["10.99.0.2", "fd99::2"])?;
        // The way back to the edge's sources; there is none to clients.
        route(&inner, &["10.99.9.9", "fd99:9::9"], ["10.99.0.1", "fd99::1"])?;
        edge.ip("addr add 10.99.9.9/32 dev lo")?;
        edge.ip("addr add fd99:9::9/128 dev lo")?;
        for host in [&outer, &edge, &inner] {
            host.forward()?;
        }
        Ok(Site { client, outer, edge, inner, backends })
    }
}

/// What serves, until it is dropped.
struct Servers {
    _processes: Vec<Process>,
    _echo: Echo,
    catalog: Catalog,
    /// Of the QUIC server's.
    document: Vec<u8>,
    _dir: TempDir,
}

impl Servers {
    fn start(site: &Site) -> Result<Servers> {
        let mut processes = Vec::new();
        for (nth, (host, addresses)) in site.backends.iter().zip(BACKENDS).enumerate() {
            for address in addresses {
                let mut command = host.outside().command(cmd::built("nohop-load")?);
                let listen = bracketed(address, 8080);
                command.args(["hello", &listen, "--name", &format!("web-{nth}")]);
                let process = Process::spawn(&format!("web {listen}"), command)?;
                process.wait_for_line(&["listening on "])?;
                processes.push(process);
            }
        }
        let one = site.backends[0].outside();
        let mut command = one.command("dnsmasq");
        command
            .args("--no-daemon --no-resolv --no-hosts --bind-interfaces --log-queries".split(' '));
        command.arg("--conf-file=/dev/null").arg("--host-record=www.example,192.0.2.80");
        command.arg(format!(
            "--txt-record=long.example{}",
            format!(",{}", "x".repeat(250)).repeat(12)
        ));
        command.args(BACKENDS[0].map(|address| format!("--listen-address={address}")));
        let dnsmasq = Process::spawn("dnsmasq", command)?;
        dnsmasq.wait_for_line(&["started"])?;
        let mut command = one.command(cmd::installed("iperf3")?);
        command.args(["--server", "--forceflush"]);
        let iperf = Process::spawn("iperf3 --server", command)?;
        iperf.wait_for_line(&["Server listening"])?;

        let dir = TempDir::new("quic")?;
        let path = |name: &str| dir.path().join(name);
        let document: Vec<u8> = (0..QUIC_LEN).map(|nth| (nth * 7 % 251) as u8).collect();
        fs::create_dir(path("htdocs"))?;
        fs::write(path("htdocs/document"), &document)?;
        let signed = rcgen::generate_simple_self_signed(["www.example".to_owned()])?;
        fs::write(path("key"), signed.signing_key.serialize_pem())?;
        fs::write(path("certificate"), signed.cert.pem())?;
        let two = site.backends[1].outside();
        let mut command = two.installed("gtlsserver")?;
        command.args(["--quiet", "--htdocs"]).arg(path("htdocs")).args(["*", "4433"]);
        command.arg(path("key")).arg(path("certificate"));
        let quic = Process::spawn("gtlsserver", command)?;
        wait_for_listener(&site.backends[1], 4433)?;
        processes.extend([dnsmasq, iperf, quic]);

        let echo = Echo::start(one, "echo", &format!("{}:0", BACKENDS[0][0]))?;
        let tcp_echo = crate::edge::echo(&site.backends[1], BACKENDS[1][0])?;
        let catalog = Catalog::new(&[])?;
        let service = |name: &str, protocol: &str, port: u16, backends: &[String]| {
            let public = VIPS.map(|vip| bracketed(vip, port)).join(",");
            let backends = backends.iter().map(|address| format!("{{ address = \"{address}\" }}"));
            let backends = backends.collect::<Vec<_>>().join(", ");
            format!(
                "[[service]]\nname = \"{name}\"\nprotocol = \"{protocol}\"\npublic = \"{public}\"\n\
                 backend = [{backends}]\n"
            )
        };
        let at = |nth: usize, port| BACKENDS[nth].map(|address| bracketed(address, port));
        catalog.write(
            &[
                service("web", "tcp", 80, &[at(0, 8080), at(1, 8080)].concat()),
                service("dns", "both", 53, &at(0, 53)),
                service("iperf", "both", 5201, &at(0, 5201)),
                service("quic", "udp", 443, &at(1, 4433)),
                service("udp-echo", "udp", 8, &[echo.address.to_string()]),
                service("tcp-echo", "tcp", 7, &[tcp_echo.to_string()]),
            ]
            .concat(),
        )?;
        Ok(Servers { _processes: processes, _echo: echo, catalog, document, _dir: dir })
    }
}

fn bracketed(address: &str, port: u16) -> String {
    if address.contains(':') { format!("[{address}]:{port}") } else { format!("{address}:{port}") }
}

/// Waits until a UDP socket is bound to this port: the server reports nothing.
fn wait_for_listener(host: &Host, port: u16) -> Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    while host.outside().run("ss", &format!("-Hlun sport = :{port}"))?.is_empty() {
        ensure!(Instant::now() < deadline, "none listens on {port}");
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// A QUIC client that fetches the document.
struct Download {
    process: Process,
    dir: TempDir,
}

impl Download {
    fn start(site: &Site, vip: &str) -> Result<Download> {
        let dir = TempDir::new("download")?;
        let mut command: Command = site.client.outside().installed("gtlsclient")?;
        command
            .args("--quiet --no-quic-dump --no-http-dump --exit-on-all-streams-close".split(' '));
        command.args(["--sni", "www.example", "--download"]).arg(dir.path());
        command.args([vip, "443", "https://www.example/document"]);
        Ok(Download { process: Process::spawn(&format!("gtlsclient {vip}"), command)?, dir })
    }

    fn received(&self) -> Vec<u8> {
        fs::read(self.dir.path().join("document")).unwrap_or_default()
    }

    /// One that is stopped while a part of the document is still to come.
    fn stopped_midway(site: &Site, vip: &str) -> Result<Download> {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let download = Download::start(site, vip)?;
            while download.received().is_empty() {
                ensure!(Instant::now() < deadline, "{}", download.process.tail());
                thread::yield_now();
            }
            download.process.signal(Signal::STOP)?;
            // On a busy machine it may have been faster.
            if download.received().len() < QUIC_LEN {
                return Ok(download);
            }
        }
    }

    fn finish(self, servers: &Servers, when: &str) -> Result<()> {
        self.process.signal(Signal::CONT)?;
        let status = self.process.wait_for_exit()?;
        let received = self.received();
        let is_whole = received == servers.document;
        ensure!(status.success() && is_whole, "{when}: {} bytes, {status}", received.len());
        Ok(())
    }
}

fn is_announced(status: &Value) -> bool {
    status["edge"]["announced"].as_array().is_some_and(|all| all.len() == VIPS.len())
}

pub fn run() -> Result<()> {
    let site = Site::new()?;
    let servers = Servers::start(&site)?;
    let cgroup = Cgroup::new()?;
    let config = format!("{CONFIG}{}", servers.catalog.config());
    let mut nohop = Nohop::start(&site.edge, &cgroup, &config)?;
    nohop.wait_for_status(is_announced)?;
    for vip in VIPS {
        web(&site, vip)?;
        dns(&site, vip)?;
        bulk(&site, vip)?;
        Download::start(&site, vip)?.finish(&servers, vip)?;
    }
    commands(&nohop)?;
    checks(&site, &nohop)?;
    restarts(&site, &servers, &mut nohop)?;
    small_mtu(&site, &servers, &nohop)
}

/// curl and wrk.
fn web(site: &Site, vip: &str) -> Result<()> {
    let url = format!("http://{}/", bracketed(vip, 80));
    let client = site.client.outside();
    let answer = client.run("curl", &format!("-gsS --max-time 60 {url}"))?;
    ensure!(answer.starts_with("hello from web-"), "{answer}");
    let report = client.run("wrk", &format!("--threads 1 --connections 16 --duration 1s {url}"))?;
    let is_clean = !report.contains("Socket errors") && !report.contains("Non-2xx");
    ensure!(is_clean && report.contains("Requests/sec"), "{report}");
    Ok(())
}

/// dig: an answer that fits into a datagram, and one that is truncated and asked for again over TCP.
fn dns(site: &Site, vip: &str) -> Result<()> {
    let dig = |words: &str| {
        let words = format!("@{vip} +time=60 +tries=1 +bufsize=1232 {words}");
        site.client.outside().run("dig", &words)
    };
    ensure!(dig("+short www.example A")?.trim() == "192.0.2.80");
    let truncated = dig("+ignore long.example TXT")?;
    ensure!(truncated.contains(" tc ") && truncated.contains("udp: "), "{truncated}");
    let long = dig("long.example TXT")?;
    let whole = format!("{}\"", "x".repeat(250));
    ensure!(long.contains("retrying in TCP") && long.matches(&whole).count() == 12, "{long}");
    Ok(())
}

/// iperf3: both directions at once over TCP, with batches of packets (TSO, GRO), and over UDP.
fn bulk(site: &Site, vip: &str) -> Result<()> {
    let directions = ["sum_received", "sum_received_bidir_reverse"];
    let end = iperf(site, vip, "--bidir --bytes 32M")?;
    for direction in directions {
        ensure!(end[direction]["bytes"].as_u64() > Some(1 << 20), "{direction}: {end:#}");
    }
    let end = iperf(site, vip, "--udp --bidir --bitrate 50M --bytes 1M")?;
    for direction in directions {
        ensure!(end[direction]["packets"].as_u64() > Some(100), "{direction}: {end:#}");
    }
    Ok(())
}

/// The end of iperf3's report, with these options of its client.
fn iperf(site: &Site, vip: &str, options: &str) -> Result<Value> {
    let words = format!("--client {vip} --json {options}");
    let report = site.client.outside().run(cmd::installed("iperf3")?, &words)?;
    let report: Value = serde_json::from_str(&report).context("iperf3's report")?;
    ensure!(report["error"].is_null(), "iperf3 {words}: {}", report["error"]);
    Ok(report["end"].clone())
}

/// What is open loses nothing while the daemon is dead, and by its next start, nor by one after SIGTERM, as
/// an upgrade has it.
fn restarts(site: &Site, servers: &Servers, nohop: &mut Nohop) -> Result<()> {
    let vip: Ipv4Addr = VIPS[0].parse()?;
    let mut flow = Flow::open(&site.client, SocketAddrV4::new(vip, 7))?;
    let datagrams = UdpClients::start(site.client.outside(), SocketAddrV4::new(vip, 8), true, 4)?;
    datagrams.wait_until_answered_by(&["echo"])?;
    let [first, second] = VIPS.map(|vip| Download::stopped_midway(site, vip));
    let (first, second) = (first?, second?);

    nohop.kill()?;
    ensure!(edge_findings(nohop)?.iter().all(|line| line.starts_with("ok ")));
    first.finish(servers, "while the daemon is dead")?;
    flow.goes_on("while the daemon is dead")?;
    web(site, VIPS[1])?;
    datagrams.wait_for_rounds(2)?;

    nohop.start_again()?;
    nohop.wait_for_status(is_announced)?;
    flow.goes_on("with the next daemon")?;
    ensure!(nohop.terminate()?.success());
    datagrams.wait_for_rounds(2)?;
    nohop.start_again()?;
    nohop.wait_for_status(is_announced)?;
    second.finish(servers, "with the daemon after that")?;
    flow.goes_on("with the daemon after that")?;
    let round = datagrams.wait_for_rounds(2)?;
    ensure!(round.n_lost == 0 && round.errors.is_empty(), "{round:?}");
    Ok(())
}

/// A way of 1280 bytes between router and client, then between router and backends: the routers' ICMP errors
/// reach the senders through the edge.
fn small_mtu(site: &Site, servers: &Servers, nohop: &Nohop) -> Result<()> {
    const MTU: &str = "mtu 1280";
    for client in CLIENT {
        site.outer.ip(&format!("route add {client} dev eth0 {MTU}"))?;
    }
    for vip in VIPS {
        let before = n_errors(nohop)?;
        iperf(site, vip, "--reverse --bytes 8M")?;
        ensure!(n_errors(nohop)? > before, "no error about a packet from {vip}");
        Download::start(site, vip)?.finish(servers, "with a small MTU at the client's side")?;
    }
    // Or servers would announce a smaller segment size, by what they have just learnt.
    for client in CLIENT {
        site.outer.ip(&format!("route del {client} dev eth0 {MTU}"))?;
    }
    for backend in &site.backends {
        backend.ip("route flush cache")?;
        backend.ip("-6 route flush cache")?;
    }
    for (nth, addresses) in (1..).zip(BACKENDS) {
        for backend in addresses {
            site.inner.ip(&format!("route add {backend} dev eth{nth} {MTU}"))?;
        }
    }
    for vip in VIPS {
        let before = n_errors(nohop)?;
        iperf(site, vip, "--bytes 8M")?;
        ensure!(n_errors(nohop)? > before, "no error about a packet to {vip}");
        Download::start(site, vip)?.finish(servers, "with a small MTU at the backend's side")?;
        let known = site.client.ip(&format!("route get {vip}"))?;
        ensure!(known.contains(MTU), "{known}");
    }
    Ok(())
}

/// How many ICMP errors were translated.
fn n_errors(nohop: &Nohop) -> Result<u64> {
    let socket: PathBuf = nohop.admin().replace("unix:", "").into();
    let metrics = http::ask(&socket, "GET", "/metrics", "")?;
    let name = "nohop_edge_packets_total{result=\"icmp_errors\"} ";
    let line = metrics.lines().find_map(|line| line.strip_prefix(name)).context("no metric")?;
    line.parse().with_context(|| line.to_owned())
}

/// What the commands show of the flows.
fn commands(nohop: &Nohop) -> Result<()> {
    let flows = |words: &str| -> Result<Vec<Value>> {
        let shown: Value = serde_json::from_str(&cli(nohop, &format!("{words} --json"))?)?;
        ensure!(shown["total"].as_u64() > Some(20), "{shown:#}");
        Ok(shown["flows"].as_array().context("flows")?.clone())
    };
    // The QUIC client of IPv6 was the last, and iperf3 sent the most.
    let latest = flows("flows")?;
    ensure!(latest[0]["service"] == "quic" && latest[0]["state"] == "udp", "{:#}", latest[0]);
    ensure!(latest[0]["vip"] == bracketed(VIPS[1], 443), "{:#}", latest[0]);
    ensure!(latest[0]["backend"] == bracketed(BACKENDS[1][1], 4433), "{:#}", latest[0]);
    let largest = flows("flows --top")?;
    ensure!(largest[0]["service"] == "iperf", "{:#}", largest[0]);
    let [n_packets, n_bytes] = ["packets", "bytes"].map(|key| largest[0][key].as_u64());
    ensure!(n_bytes > Some(16 << 20), "{:#}", largest[0]);
    // Several packets of the network came as one.
    ensure!(n_bytes > n_packets.map(|n| n * 2_000), "{:#}", largest[0]);
    let text = cli(nohop, "flows --top")?;
    ensure!(text.lines().nth(1).is_some_and(|line| line.starts_with("iperf ")), "{text}");
    let explained = cli(nohop, &format!("explain {}", bracketed(VIPS[1], 80)))?;
    let reached = "which only connections to [2001:db8:1::10]:80 reach";
    ensure!(explained.contains("web.service") && explained.contains(reached), "{explained}");
    Ok(())
}

/// The lines of `nohop check` about the edge; with the running daemon, if there is one.
fn edge_findings(nohop: &Nohop) -> Result<Vec<String>> {
    let config = nohop.state_dir().with_file_name("nohop.toml").display().to_string();
    let report = String::from_utf8(nohop.cli(&format!("check --config {config}"))?.stdout)?;
    let is_of_edge = |line: &&str| {
        let words = ["edge", "rp_filter", "forwarding", "source ports"];
        !line.contains("fix: ") && words.iter().any(|word| line.contains(word))
    };
    let lines: Vec<String> = report.lines().filter(is_of_edge).map(str::to_owned).collect();
    ensure!(lines.len() == 11, "{report}");
    Ok(lines)
}

/// What `nohop check` reports of the edge is so.
fn checks(site: &Site, nohop: &Nohop) -> Result<()> {
    let found = edge_findings(nohop)?;
    for expected in [
        "ok    edge interface eth0: attached, tcx",
        "ok    edge interface eth1: attached, tcx",
        "ok    rp_filter of eth0: off",
        "ok    ipv4 forwarding of eth1: on",
        "ok    ipv6 forwarding of eth1: on",
        "ok    edge.source 10.99.9.9: an address of this host",
        "ok    edge.source fd99:9::9: an address of this host",
    ] {
        // Why XDP isn't used comes after the mode.
        ensure!(found.iter().any(|line| line.starts_with(expected)), "no {expected:?}: {found:#?}");
    }
    for (key, bad, expected) in [
        ("ipv4/conf/eth0/rp_filter", "1", "note  rp_filter of eth0: strict"),
        ("ipv4/conf/eth1/forwarding", "0", "FAIL  ipv4 forwarding of eth1: eth1 forwards no ipv4"),
    ] {
        let path = format!("/proc/sys/net/{key}");
        let good = site.edge.enter(|| Ok(fs::read_to_string(&path)?))?;
        let set = |value: &str| site.edge.enter(|| Ok(fs::write(&path, value)?));
        set(bad)?;
        let found = edge_findings(nohop)?;
        ensure!(found.iter().any(|line| line.starts_with(expected)), "no {expected:?}: {found:#?}");
        set(&good)?;
    }
    Ok(())
}

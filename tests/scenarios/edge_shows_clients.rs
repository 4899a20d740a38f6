//! An unmodified server behind an edge, nginx, has its clients' addresses: in its log, its variables and
//! its rules. A server that listened before nohop did sees the edge until it is restarted. The commands
//! of both nodes report who sees clients and who doesn't, and to which backends the edge has no route.

use std::fs;
use std::net::UdpSocket;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::TIMEOUT;
use testbed::cgroup::Cgroup;
use testbed::http;
use testbed::net::Host;
use testbed::nohop::Nohop;
use testbed::process::Process;
use testbed::tempdir::TempDir;

use crate::cluster::Catalog;
use crate::edge::cli;
use crate::openapi;

const CLIENT: &str = "198.51.100.2";
const SOURCE: &str = "10.99.9.9";
const NODE: &str = "10.99.0.2";

const VIPS: &str = "vip.public = [\"203.0.113.0/24\"]\n";
const EDGE: &str = "\
edge.interfaces = [\"eth0\", \"eth1\"]
edge.source = [\"10.99.9.9\"]
edge.client_address = [\"web\", \"old\"]
";
const TRUST: &str = "datapath.client_address_from = [\"10.99.9.9\"]\n";

const CATALOG: &str = r#"
[[service]]
name = "web"
public = "203.0.113.10:80"
backend = [{ address = "10.99.0.2:8080" }]
[[service]]
name = "old"
public = "203.0.113.10:81"
backend = [{ address = "10.99.0.2:8081" }]
[[service]]
name = "nowhere"
protocol = "udp"
public = "203.0.113.10:82"
backend = [{ address = "192.0.2.7:82" }]
"#;

/// A client, an edge, and a node with servers.
struct Site {
    client: Arc<Host>,
    edge: Arc<Host>,
    node: Arc<Host>,
    /// That the node's nohop serves.
    cgroup: Cgroup,
}

impl Site {
    fn new() -> Result<Site> {
        let (client, edge, node) = (Host::new("client")?, Host::new("edge")?, Host::new("node")?);
        client.connect_veth(&edge, [&format!("{CLIENT}/24"), "198.51.100.1/24"])?;
        edge.connect_veth(&node, ["10.99.0.1/24", &format!("{NODE}/24")])?;
        client.ip("route add 203.0.113.0/24 via 198.51.100.1")?;
        node.ip(&format!("route add {SOURCE} via 10.99.0.1"))?;
        edge.ip(&format!("addr add {SOURCE}/32 dev lo"))?;
        edge.forward()?;
        Ok(Site { client, edge, node, cgroup: Cgroup::new()? })
    }

    /// nginx, which answers with the address that it has of a client, and allows no other than this one's.
    fn nginx(&self, dir: &Path, port: u16) -> Result<Process> {
        fs::create_dir_all(dir)?;
        let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|name| format!("{name}_temp_path {name};\n"))
            .concat();
        let text = format!(
            "daemon off;\nuser root;\npid pid;\nworker_processes 1;\nerror_log stderr notice;\n\
             events {{}}\nhttp {{\n{temporary}\
             log_format seen 'seen by {port}: $remote_addr $request_uri';\n\
             access_log /dev/stdout seen;\n\
             server {{\nlisten {port};\n\
             location / {{ return 200 '$remote_addr:$remote_port'; }}\n\
             location /inner {{ allow {SOURCE}; deny all; alias /dev/null; }}\n}}\n}}\n"
        );
        fs::write(dir.join("nginx.conf"), text)?;
        let mut command = self.node.inside(&self.cgroup).installed("nginx")?;
        command.arg("-p").arg(dir).arg("-c").arg(dir.join("nginx.conf")).args(["-e", "stderr"]);
        let nginx = Process::spawn(&format!("nginx {port}"), command)?;
        nginx.wait_for_line(&["start worker process "])?;
        Ok(nginx)
    }

    /// What curl prints of a page by a public VIP.
    fn curl(&self, path: &str) -> Result<String> {
        let words = format!("-sS --max-time 60 -w \\n%{{local_port}} http://203.0.113.10:{path}");
        self.client.outside().run("curl", &words)
    }

    /// The client's address and port, and those that the server has.
    fn seen(&self, path: &str) -> Result<(String, String)> {
        let text = self.curl(path)?;
        let (seen, port) = text.rsplit_once('\n').context("no port")?;
        Ok((format!("{CLIENT}:{port}"), seen.to_owned()))
    }
}

fn metric(nohop: &Nohop, line: &str) -> Result<u64> {
    let socket = nohop.admin().replace("unix:", "");
    let text = http::ask(Path::new(&socket), "GET", "/metrics", "")?;
    let found = text.lines().find_map(|it| it.strip_prefix(line)?.strip_prefix(' '));
    Ok(found.with_context(|| line.to_owned())?.parse()?)
}

/// The line of `nohop check` that begins so.
fn finding(nohop: &Nohop, begin: &str) -> Result<String> {
    let config = nohop.state_dir().with_file_name("nohop.toml").display().to_string();
    let report = String::from_utf8(nohop.cli(&format!("check --config {config}"))?.stdout)?;
    let found = report.lines().find(|line| line.contains(begin)).map(str::to_owned);
    found.with_context(|| report.clone())
}

pub fn run() -> Result<()> {
    let (site, dir) = (Site::new()?, TempDir::new("nginx")?);
    let catalog = Catalog::new(&[])?;
    catalog.write(CATALOG)?;
    let old = site.nginx(&dir.path().join("old"), 8081)?;

    let config = format!("{VIPS}{TRUST}dns.forward = []\n{}", catalog.config());
    let mut node = Nohop::start(&site.node, &site.cgroup, &config)?;
    let edge_cgroup = Cgroup::new()?;
    let edge = Nohop::start(
        &site.edge,
        &edge_cgroup,
        &format!("{VIPS}{EDGE}dns.forward = []\n{}", catalog.config()),
    )?;
    let web = site.nginx(&dir.path().join("web"), 8080)?;
    edge.wait_for_status(|status| {
        status["edge"]["announced"] == serde_json::json!(["203.0.113.10"])
    })?;

    let (client, seen) = site.seen("80/page")?;
    ensure!(seen == client, "nginx has {seen} of {client}");
    web.wait_for_line(&[&format!("seen by 8080: {CLIENT} /page")])?;
    ensure!(site.curl("80/inner")?.contains("403 Forbidden"), "by a rule for the edge alone");
    web.wait_for_line(&[&format!("access forbidden by rule, client: {CLIENT}")])?;

    // One that listened before sees the edge, and is reported, until it is started again.
    let (_, seen) = site.seen("81/")?;
    ensure!(seen.starts_with(&format!("{SOURCE}:")), "{seen}");
    let shown = "nohop_client_addresses_total{result=\"shown\"}";
    let no_syn = "nohop_client_addresses_total{result=\"no_syn\"}";
    ensure!(metric(&node, shown)? == 2 && metric(&node, no_syn)? == 1, "{:#}", node.status()?);
    let found = finding(&node, "addresses of clients")?;
    ensure!(found.starts_with("note") && found.contains("1 connection from 10.99.9.9"), "{found}");
    old.stop()?;
    let _old = site.nginx(&dir.path().join("old"), 8081)?;
    let (client, seen) = site.seen("81/")?;
    ensure!(seen == client, "a server that was started again has {seen} of {client}");

    // The daemon's own restarts change nothing.
    node.kill()?;
    let (client, seen) = site.seen("80/")?;
    ensure!(seen == client, "without the daemon nginx has {seen} of {client}");
    node.start_again()?;
    let (client, seen) = site.seen("80/")?;
    ensure!(seen == client, "with the next daemon nginx has {seen} of {client}");

    commands(&site, &node, &edge)
}

/// What the commands show.
fn commands(site: &Site, node: &Nohop, edge: &Nohop) -> Result<()> {
    let explained = cli(node, "explain web")?;
    ensure!(explained.contains("the client that an edge at 10.99.9.9 sends"), "{explained}");
    let status = cli(node, "status")?;
    ensure!(status.contains("servers see clients' addresses by edges 10.99.9.9"), "{status}");
    ensure!(status.contains("client_shown: 5") && status.contains("client_no_syn: 1"), "{status}");

    let explained = cli(edge, "explain web")?;
    ensure!(explained.contains("datapath.client_address_from = [\"10.99.9.9\"]"), "{explained}");
    let found = finding(edge, "edge.client_address")?;
    ensure!(found.starts_with("ok") && found.contains("the nodes of web, old need"), "{found}");
    let explained = cli(edge, "explain nowhere")?;
    ensure!(explained.contains("this edge has no route to 192.0.2.7:82"), "{explained}");
    site.client.enter(|| {
        let socket = UdpSocket::bind((CLIENT, 0))?;
        Ok(socket.send_to(b"?", "203.0.113.10:82")?)
    })?;
    let start = Instant::now();
    while edge.status()?["edge"]["packets"]["no_route"] != 1 {
        ensure!(start.elapsed() < TIMEOUT, "{:#}", edge.status()?);
        thread::sleep(Duration::from_millis(20));
    }
    let status = cli(edge, "status")?;
    ensure!(status.contains("packets not sent on: 1 no_route"), "{status}");
    let sent = "clients' addresses go to servers of web, old: 6 SYNs with, 0 without";
    ensure!(status.contains(sent), "{status}");
    for nohop in [node, edge] {
        openapi::ensure_documented("/v1/status", &nohop.status()?)?;
        ensure!(nohop.status()?["problems"] == Value::Array(Vec::new()), "{:#}", nohop.status()?);
    }
    Ok(())
}

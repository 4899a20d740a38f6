//! An edge: a client outside, without nohop and without a route to any backend, reaches services by their
//! public VIPs. Its flows outlive the daemon, and a drained edge announces nothing while they go on.

use std::io::{Read, Write};
use std::net::{SocketAddrV4, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use testbed::TIMEOUT;
use testbed::cgroup::Cgroup;
use testbed::consul::{Consul, instance};
use testbed::helloworld::{Helloworld, connect};
use testbed::http;
use testbed::net::Host;
use testbed::nohop::Nohop;

const CONFIG: &str = "\
vip.public = [\"203.0.113.0/24\"]
edge.interfaces = [\"eth0\", \"eth1\", \"eth2\"]
edge.source = [\"10.99.9.9\"]
edge.vips = { echo = \"203.0.113.11:7\" }
";
const VIP: SocketAddrV4 = SocketAddrV4::new(std::net::Ipv4Addr::new(203, 0, 113, 10), 8080);
const ECHO: SocketAddrV4 = SocketAddrV4::new(std::net::Ipv4Addr::new(203, 0, 113, 11), 7);

/// The addresses of the backends' hosts, each in a network of its own behind the edge.
const BACKENDS: [&str; 2] = ["10.99.1.2", "10.99.2.2"];

/// A client outside, an edge, and two hosts with backends.
struct Site {
    client: Arc<Host>,
    edge: Arc<Host>,
    backends: [Arc<Host>; 2],
}

impl Site {
    fn new() -> Result<Site> {
        let (client, edge) = (Host::new("outside")?, Host::new("edge")?);
        client.connect_veth(&edge, ["198.51.100.2/24", "198.51.100.1/24"])?;
        client.ip("route add default via 198.51.100.1")?;
        let backends = [Host::new("backend1")?, Host::new("backend2")?];
        for (nth, backend) in (1..).zip(&backends) {
            let (here, there) = (format!("10.99.{nth}.1"), format!("10.99.{nth}.2"));
            edge.connect_veth(backend, [&format!("{here}/24"), &format!("{there}/24")])?;
            backend.ip(&format!("route add default via {here}"))?;
        }
        // Of the edge alone, so that nothing else uses its ports.
        edge.ip("addr add 10.99.9.9/32 dev lo")?;
        edge.forward()?;
        Ok(Site { client, edge, backends })
    }
}

/// Echoes what each client sends, until it closes, from this address of a host.
pub fn echo(host: &Host, address: &str) -> Result<SocketAddrV4> {
    let address: SocketAddrV4 = format!("{address}:0").parse()?;
    let listener = host.enter(|| Ok(TcpListener::bind(address)?))?;
    let port = listener.local_addr()?.port();
    let serve = |mut stream: TcpStream| {
        let mut buffer = [0; 64];
        while let Ok(n @ 1..) = stream.read(&mut buffer) {
            if stream.write_all(&buffer[..n]).is_err() {
                return;
            }
        }
    };
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || serve(stream));
        }
    });
    Ok(SocketAddrV4::new(*address.ip(), port))
}

/// A connection through the edge, for as long as the scenario lasts.
pub struct Flow(TcpStream);

impl Flow {
    /// Connects to a server of [`echo`].
    pub fn open(client: &Host, vip: SocketAddrV4) -> Result<Flow> {
        let stream = client.enter(|| Ok(TcpStream::connect_timeout(&vip.into(), TIMEOUT)?))?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        Ok(Flow(stream))
    }

    /// Sends and receives.
    pub fn goes_on(&mut self, when: &str) -> Result<()> {
        let mut answer = [0; 4];
        self.0.write_all(b"ping").with_context(|| when.to_owned())?;
        self.0.read_exact(&mut answer).with_context(|| when.to_owned())?;
        ensure!(&answer == b"ping", "{when}: {answer:?}");
        Ok(())
    }
}

fn announced(edge: &Host) -> Result<String> {
    edge.ip("route show proto 110")
}

/// The answer to keepalived, and its text.
fn readiness(nohop: &Nohop) -> Result<String> {
    http::ask(Path::new(&nohop.admin().replace("unix:", "")), "GET", "/readyz/edge", "")
}

fn is_announced(status: &Value) -> bool {
    let interfaces = status["edge"]["interfaces"].as_array();
    interfaces.is_some_and(|all| all.iter().all(|one| one["mode"].is_string()))
        && status["edge"]["announced"] == json!(["203.0.113.10", "203.0.113.11"])
}

/// What a command of `nohop` prints that succeeds.
pub fn cli(nohop: &Nohop, arguments: &str) -> Result<String> {
    let output = nohop.cli(arguments)?;
    ensure!(output.status.success(), "nohop {arguments}: {output:?}");
    Ok(String::from_utf8(output.stdout)?)
}

pub fn run() -> Result<()> {
    let site = Site::new()?;
    let on_backend = (&site.backends[0], "backend", BACKENDS[0]);
    let (server, _agent) =
        Consul::server_and_client(on_backend, (&site.edge, "edge", "10.99.1.1"))?;
    let mut helloworlds = Vec::new();
    for (nth, host) in site.backends.iter().enumerate() {
        let id = format!("helloworld-{nth}");
        let listen = format!("{}:0", BACKENDS[nth]);
        let helloworld = Helloworld::start(host.outside(), &id, &listen)?;
        let mut registration = instance("helloworld", &id, helloworld.address);
        registration["Meta"] = json!({ "nohop-public": VIP.to_string() });
        server.register(&registration)?;
        helloworlds.push(helloworld);
    }
    server.register(&instance("echo", "echo-0", echo(&site.backends[1], BACKENDS[1])?))?;

    let cgroup = Cgroup::new()?;
    let mut nohop = Nohop::start(&site.edge, &cgroup, CONFIG)?;
    nohop.wait_for_backends("helloworld", 2)?;
    nohop.wait_for_backends("echo", 1)?;
    nohop.wait_for_status(is_announced)?;
    ensure!(readiness(&nohop)?.starts_with("ready"));

    let url = format!("http://{VIP}/");
    let curl = || site.client.outside().run("curl", &format!("-sS --max-time 60 {url}"));
    ensure!(curl()?.contains("hello from helloworld-"));
    let reached = |n| connect(site.client.outside(), VIP, n);
    let both = reached(60)?;
    for nth in 0..2 {
        let name = format!("hello from helloworld-{nth}");
        ensure!(!both.all_answered(|answer| answer != name), "{name} has none: {both:?}");
    }
    let mut flow = Flow::open(&site.client, ECHO)?;
    flow.goes_on("at first")?;
    let flows: Value = serde_json::from_str(&cli(&nohop, "flows --json")?)?;
    let all = flows["flows"].as_array().context("flows")?;
    let ours = all.iter().find(|one| one["service"] == "echo").context("no flow of echo")?;
    ensure!(ours["vip"] == ECHO.to_string() && ours["state"] == "established", "{ours:#}");
    ensure!(cli(&nohop, "flows --top")?.contains("203.0.113.11:7"));

    // New flows avoid a drained backend; a process on the edge itself does as well.
    cli(&nohop, "drain helloworld-0")?;
    let avoids = |answer: &str| answer == "hello from helloworld-1";
    let connects = reached(40)?;
    // What became of the packets of one that got no answer.
    let shown = || [cli(&nohop, "status --json"), cli(&nohop, "flows --json")];
    ensure!(connects.all_answered(avoids), "{connects:?}: {:?}", shown());
    let connects = connect(site.edge.inside(&cgroup), VIP, 20)?;
    ensure!(connects.all_answered(avoids), "{connects:?}");
    cli(&nohop, "undrain helloworld-0")?;

    nohop.kill()?;
    flow.goes_on("while the daemon is dead")?;
    ensure!(curl()?.contains("hello from helloworld-"), "without the daemon");
    ensure!(announced(&site.edge)?.contains("unreachable 203.0.113.10"), "without the daemon");
    nohop.start_again()?;
    nohop.wait_for_status(is_announced)?;
    flow.goes_on("with the next daemon")?;

    // The routes go first, and open flows go on.
    cli(&nohop, "drain edge")?;
    let is_withdrawn = |status: &Value| status["edge"]["announced"] == json!([]);
    nohop.wait_for_status(is_withdrawn)?;
    let refused = readiness(&nohop).err().context("a drained edge is ready")?;
    ensure!(refused.to_string().contains("503"), "{refused:#}");
    ensure!(!announced(&site.edge)?.contains("203.0.113"), "the routes stay");
    flow.goes_on("while the edge is drained")?;
    nohop.terminate()?;
    nohop.start_again()?;
    ensure!(cli(&nohop, "drain")?.starts_with("edge  since 20"), "it is forgotten");
    ensure!(!announced(&site.edge)?.contains("203.0.113"), "it is announced after a restart");
    cli(&nohop, "undrain edge")?;
    nohop.wait_for_status(is_announced)?;
    flow.goes_on("at last")
}

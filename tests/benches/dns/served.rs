//! The servers that are compared, each a process on the first core.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use lb_userspace::catalog::Demand;
use lb_userspace::config::{Config, DnsConfig, Forward};
use lb_userspace::dns;
use lb_userspace::table::{Ports, Protocols, Service, Table, Watch};
use tokio::sync::watch;

/// The argument by which this program is the server.
pub const SERVE: &str = "--serve";

/// The first VIP.
const VIP: Ipv4Addr = Ipv4Addr::new(127, 128, 0, 1);

/// A server that is measured.
pub trait Served {
    fn port(&self) -> u16;
}

/// Files for one comparison, gone when it is over.
pub struct Scratch {
    dir: PathBuf,
    pub questions: PathBuf,
    hosts: PathBuf,
}

impl Scratch {
    /// Questions for names that the servers know, and dnsmasq's file of them.
    pub fn new(n_names: u32) -> Scratch {
        Scratch::below("service", n_names)
    }

    /// Questions for names that they forward.
    pub fn of_others(n_names: u32) -> Scratch {
        Scratch::below("example", n_names)
    }

    fn below(domain: &str, n_names: u32) -> Scratch {
        let dir = std::env::temp_dir().join(format!("nohop-bench-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a folder for files");
        let (questions, hosts) = (dir.join("questions"), dir.join("hosts"));
        let (mut asked, mut known) = (String::new(), String::new());
        for idx in 0..n_names {
            let _ = writeln!(asked, "{}.{domain} A", name(idx));
            let _ = writeln!(known, "{} {}.{domain}", vip(idx), name(idx));
        }
        std::fs::write(&questions, asked).expect("the questions are written");
        std::fs::write(&hosts, known).expect("the hosts file is written");
        Scratch { dir, questions, hosts }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// This project's server, without the kernel side.
pub struct Nohop {
    process: Child,
    port: u16,
}

impl Nohop {
    /// A server of so many names, which forwards others to this port.
    pub fn start(n_names: u32, upstream: Option<u16>) -> Nohop {
        let this = std::env::current_exe().expect("this program's path");
        let mut process = on_first_core(&this.to_string_lossy())
            .args([SERVE, &n_names.to_string()])
            .args(upstream.map(|port| port.to_string()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the server starts");
        let stdout = process.stdout.take().expect("it is piped");
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).expect("the server tells its port");
        Nohop { process, port: line.trim().parse().expect("a port") }
    }
}

impl Served for Nohop {
    fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for Nohop {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// dnsmasq with the same names in a hosts file.
pub struct Dnsmasq {
    process: Child,
    port: u16,
}

impl Dnsmasq {
    pub fn start(scratch: &Scratch) -> Dnsmasq {
        let hosts = format!("--addn-hosts={}", scratch.hosts.display());
        let own = ["--local=/service/", "--cache-size=10000", "--local-ttl=30", &hosts];
        Dnsmasq::with(on_first_core("dnsmasq"), &own)
    }

    /// One that asks another at this port, and keeps no answer either.
    pub fn forwarding(upstream: u16) -> Dnsmasq {
        let server = format!("--server=127.0.0.1#{upstream}");
        let own = [&server, "--cache-size=0", "--dns-forward-max=10000"];
        Dnsmasq::with(on_first_core("dnsmasq"), &own)
    }

    /// One that is asked by the others, wherever there is a core.
    pub fn upstream() -> Dnsmasq {
        Dnsmasq::with(Command::new("dnsmasq"), &["--address=/example/192.0.2.7"])
    }

    fn with(mut dnsmasq: Command, own: &[&str]) -> Dnsmasq {
        let port = free_port();
        dnsmasq.args([
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--pid-file=",
            "--listen-address=127.0.0.1",
            "--bind-interfaces",
            "--no-resolv",
            "--no-hosts",
        ]);
        dnsmasq.arg(format!("--port={port}")).args(own);
        let process = dnsmasq.spawn().expect("dnsmasq starts");
        let dnsmasq = Dnsmasq { process, port };
        dnsmasq.await_answer();
        dnsmasq
    }

    /// Asks until it answers: it says nothing when it is ready.
    fn await_answer(&self) {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
        socket.set_read_timeout(Some(Duration::from_millis(50))).expect("a time limit");
        let question = b"\x00\x07\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x02n0\x07service\x00\x00\x01\x00\x01";
        for _ in 0..200 {
            let _ = socket.send_to(question, ("127.0.0.1", self.port));
            if socket.recv(&mut [0; 512]).is_ok() {
                return;
            }
        }
        panic!("dnsmasq doesn't answer");
    }
}

impl Served for Dnsmasq {
    fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for Dnsmasq {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn on_first_core(program: &str) -> Command {
    let mut command = Command::new("taskset");
    command.args(["-c", "0", program]);
    command
}

fn free_port() -> u16 {
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
    socket.local_addr().expect("its address").port()
}

fn name(idx: u32) -> String {
    format!("n{idx}")
}

fn vip(idx: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(VIP) + idx)
}

/// Serves `n_names` names and tells the port, until the standard input is closed; other names go to
/// the port `upstream`.
pub fn serve(n_names: u32, upstream: Option<u16>) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let any_port = vec![SocketAddr::from(([127, 0, 0, 1], 0))];
        let config = Config::default();
        let upstreams = upstream.map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
        let forward = Forward::Servers(upstreams.into_iter().collect());
        let dns_config = DnsConfig { listen: any_port, forward, ..config.dns };
        let sockets = dns::bind(&dns_config).await.expect("a socket");
        let port = sockets.addresses()[0].port();
        let (_table, table) = watch::channel(Arc::new(table(n_names)));
        let (_attached, attached) = watch::channel(true);
        let (vip, demand) = (&config.vip, Demand::default());
        let _server = dns::Server::start(sockets, &dns_config, vip, table, attached, demand)
            .expect("the server starts");
        println!("{port}");
        tokio::task::block_in_place(|| std::io::stdin().read_to_end(&mut Vec::new()))
            .expect("the standard input can be read");
    });
}

fn table(n_names: u32) -> Table {
    let service = |idx| {
        let name: Arc<str> = name(idx).into();
        let service = Service {
            name: name.clone(),
            vip: vip(idx),
            vip6: None,
            ports: Ports::only([80]),
            protocols: Protocols::Tcp,
            pin: None,
            backends: Vec::new(),
            excluded: Vec::new(),
            notes: Vec::new(),
            watch: Watch::Live,
            generation: 1,
        };
        (name, Arc::new(service))
    };
    let services = (0..n_names).map(service).collect();
    Table { generation: 1, services, ..Table::default() }
}

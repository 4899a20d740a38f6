//! The fixture of each trial: a cgroup that this process is in, a datapath attached to it, servers on
//! loopback that send their letter, and tables.

use std::io::{self, Read, Write};
use std::net::{
    IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket,
};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use lb_userspace::config::{Config, cgroup};
use lb_userspace::datapath::probe::{Observed, ProbeResult};
use lb_userspace::datapath::{COUNTERS, Datapath, Options, RejectMethod, UnitHealth};
use lb_userspace::table::{Backend, BackendState, Ports, Protocols, Service, Table};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use testbed::bpffs::Bpffs;
use testbed::tempdir;

/// A cgroup of the test's own, with this process in it until it is dropped.
pub struct OwnCgroup {
    pub path: PathBuf,
    former: PathBuf,
}

impl OwnCgroup {
    fn enter() -> OwnCgroup {
        let root = cgroup::find_cgroup2_root().expect("a cgroup v2 hierarchy is mounted");
        let paths = std::fs::read_to_string("/proc/self/cgroup").unwrap();
        let former = paths.lines().find_map(|line| line.strip_prefix("0::/")).expect("a v2 cgroup");
        let former = root.join(former);
        let path = root.join(tempdir::name("kernel"));
        std::fs::create_dir(&path).unwrap();
        let own = OwnCgroup { path, former };
        std::fs::write(own.path.join("cgroup.procs"), "0").unwrap();
        own
    }
}

impl Drop for OwnCgroup {
    fn drop(&mut self) {
        let _ = std::fs::write(self.former.join("cgroup.procs"), "0");
        let _ = wait_until_empty(&self.path);
        remove(&self.path);
    }
}

/// Waits for threads that have ended but not yet left, which can't be moved; 5 s at most.
fn wait_until_empty(cgroup: &Path) -> io::Result<()> {
    let events = std::fs::File::open(cgroup.join("cgroup.events"))?;
    while !io::read_to_string((&events).take(4096))?.contains("populated 0") {
        let timeout = Timespec { tv_sec: 5, tv_nsec: 0 };
        if poll(&mut [PollFd::new(&events, PollFlags::PRI)], Some(&timeout))? == 0 {
            break;
        }
        io::Seek::rewind(&mut &events)?;
    }
    Ok(())
}

/// Where datapaths live: a cgroup with this process in it, and a directory for pins. Whatever daemons
/// left there goes when this is dropped.
pub struct Place {
    pub options: Options,
    pub cgroup: OwnCgroup,
    _bpffs: Bpffs,
}

impl Place {
    pub fn new() -> Place {
        let (bpffs, cgroup) = (Bpffs::new().unwrap(), OwnCgroup::enter());
        let mut options = Options::of(&Config::default(), &cgroup.path);
        options.bpffs = bpffs.path().join("nohop");
        if is_emulated() {
            // Maps of the full size take seconds there.
            (options.datapath.max_services, options.datapath.max_backends) = (64, 1_024);
        }
        Place { options, cgroup, _bpffs: bpffs }
    }

    /// Starts a daemon's datapath.
    pub fn start(&self) -> Datapath {
        let datapath = self.start_as_daemon();
        // This process is no daemon: its connections are tested.
        datapath.keep();
        datapath
    }

    /// Starts a daemon's datapath for a scope that this process may not be in: it proves nothing.
    pub fn start_attached(&self) -> Datapath {
        let datapath = self.start_attached_or_waiting();
        assert!(datapath.are_hooks_ours());
        datapath
    }

    /// The same, where the hooks may be an earlier daemon's until the first table.
    pub fn start_attached_or_waiting(&self) -> Datapath {
        let datapath = Datapath::start(&self.options).unwrap();
        datapath.keep();
        datapath
    }

    /// The same, and this process passes for the daemon.
    pub fn start_as_daemon(&self) -> Datapath {
        let datapath = Datapath::start(&self.options).unwrap();
        // Before 5.14 only a probe connection shows the network namespace's cookie.
        if self.options.host_netns.is_none() && datapath.are_hooks_ours() {
            datapath.record_probe(proof(&datapath));
        }
        datapath
    }

    /// The path of a pin, such as `v3/links/nohop_connect4`.
    pub fn pin(&self, name: &str) -> PathBuf {
        self.options.bpffs.join(name)
    }
}

/// What the hooks show of a connection from inside the scope. A child that had no turn to connect in
/// time, as on a busy machine, shows nothing, and another one connects.
pub fn proof(datapath: &Datapath) -> Observed {
    let prober = datapath.prober();
    let mut last = None;
    for _ in 0..MAX_PROBES {
        match prober.probe() {
            ProbeResult::Seen(seen) => return seen,
            ProbeResult::NotSeen => {
                panic!("a connection from inside the scope doesn't meet the hooks")
            }
            ProbeResult::Failed(reason) => last = Some(reason),
        }
    }
    panic!("there was no connection from inside the scope: {last:?}");
}

/// How often [`proof`] tries to connect.
const MAX_PROBES: usize = 20;

/// Removes a cgroup, and what a trial that failed left below it.
fn remove(cgroup: &Path) {
    for entry in std::fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|file_type| file_type.is_dir()) {
            remove(&entry.path());
        }
    }
    let _ = std::fs::remove_dir(cgroup);
}

/// A datapath that is attached to this process's own cgroup, with pins of its own. All of it goes when
/// this is dropped, the datapath first.
pub struct Bed {
    pub datapath: Datapath,
    pub options: Options,
    pub cgroup: OwnCgroup,
    _bpffs: Bpffs,
}

impl Bed {
    pub fn new() -> Bed {
        Bed::with(|_| {})
    }

    /// `host_netns` passes for the cookie of the host's network namespace.
    pub fn on_host(host_netns: u64) -> Bed {
        Bed::with(|options| options.host_netns = Some(host_netns))
    }

    /// With maps of a few entries.
    pub fn small() -> Bed {
        Bed::with(|Options { datapath, .. }| {
            (datapath.max_services, datapath.max_backends) = (16, 64);
        })
    }

    pub fn refusing_by(refusal: RejectMethod) -> Bed {
        Bed::with(|options| options.refusal = Some(refusal))
    }

    /// With a pin of the service `web`.
    pub fn with_pin(pin: SocketAddrV4) -> Bed {
        Bed::with(|options| {
            options.vip.pins.insert("web".to_owned(), pin);
        })
    }

    /// A datapath with both pools: [`VIP6`] is of the second.
    pub fn with_pool6() -> Bed {
        Bed::with(|options| options.vip.pool6 = Some(POOL6.parse().unwrap()))
    }

    /// A datapath by the default configuration, but for what `change` does to it.
    pub fn with(change: impl FnOnce(&mut Options)) -> Bed {
        let bed = Bed::as_daemon(change);
        bed.datapath.keep();
        bed
    }

    /// The same, and this process passes for the daemon.
    pub fn as_daemon(change: impl FnOnce(&mut Options)) -> Bed {
        let mut place = Place::new();
        change(&mut place.options);
        let datapath = place.start_as_daemon();
        let Place { options, cgroup, _bpffs } = place;
        Bed { datapath, options, cgroup, _bpffs }
    }

    pub fn apply(&mut self, services: Vec<Service>) {
        let errors = self.datapath.apply(&table(services)).unwrap();
        assert!(errors.is_empty(), "{errors:?}");
    }
}

/// A table of these services.
pub fn table(services: Vec<Service>) -> Table {
    let services =
        services.into_iter().map(|service| (service.name.clone(), Arc::new(service))).collect();
    Table { generation: 1, services, ..Table::default() }
}

/// How often an event was counted that no service owns, by its name.
pub fn event(bed: &Bed, name: &str) -> u64 {
    let counter = COUNTERS.iter().find(|(named, _)| *named == name);
    let (_, counter) = counter.unwrap_or_else(|| panic!("no counter {name}"));
    bed.datapath.counters().event(*counter)
}

impl Drop for Bed {
    fn drop(&mut self) {
        self.datapath.detach();
    }
}

/// A backend with this address and weight.
pub fn backend(address: SocketAddr, weight: u16) -> Backend {
    Backend {
        address: Some(address),
        shown_address: address.to_string(),
        node: String::new(),
        id: address.to_string(),
        weight,
        state: BackendState::Healthy,
        group: 0,
        reason: None,
        host_only: false,
    }
}

/// A service at `vip` port 80, with these backends and weights.
pub fn service(name: &str, vip: Ipv4Addr, backends: &[(SocketAddr, u16)]) -> Service {
    Service {
        name: name.into(),
        vip,
        vip6: None,
        ports: Ports::only([80]),
        protocols: Protocols::Tcp,
        algorithm: Default::default(),
        pin: None,
        public: Vec::new(),
        backends: backends.iter().map(|&(address, weight)| backend(address, weight)).collect(),
        excluded: Vec::new(),
        notes: Vec::new(),
        watch: Default::default(),
        generation: 1,
    }
}

/// The VIPs of the trials: addresses of the default pool.
pub const VIP: Ipv4Addr = Ipv4Addr::new(127, 200, 0, 1);
pub const OTHER_VIP: Ipv4Addr = Ipv4Addr::new(127, 200, 0, 2);

/// The IPv6 pool of the trials that have one, and addresses of it.
const POOL6: &str = "fd77::/64";
pub const VIP6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1);
pub const OTHER_VIP6: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 2);

/// How sockets name an IPv4 address: those of AF_INET, and those of AF_INET6.
pub fn ways(address: Ipv4Addr, port: u16) -> [SocketAddr; 2] {
    [SocketAddr::from((address, port)), SocketAddr::from((address.to_ipv6_mapped(), port))]
}

/// Any port of loopback, of the same family as `address`.
pub fn loopback(address: impl Into<IpAddr>) -> SocketAddr {
    match address.into() {
        IpAddr::V4(_) => SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        IpAddr::V6(_) => SocketAddr::from((Ipv6Addr::LOCALHOST, 0)),
    }
}

/// A server that sends its letter to each client, until it is dropped.
pub struct Server {
    pub address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub fn start(letter: u8) -> Server {
        Server::on(letter, (Ipv4Addr::LOCALHOST, 0))
    }

    pub fn on(letter: u8, address: impl Into<SocketAddr>) -> Server {
        let listener = TcpListener::bind(address.into()).unwrap();
        let address = listener.local_addr().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                if let Ok(mut stream) = stream {
                    let _ = stream.write_all(&[letter]);
                }
            }
        });
        Server { address, stop, thread: Some(thread) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.address);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// How often to connect to for what only many connections show: 10,000 times, or fewer where the processor is
/// emulated, which is slow.
pub fn n_connects() -> usize {
    if is_emulated() { 1_000 } else { 10_000 }
}

/// Sets the flag when it is dropped, also by a panic: other threads run until then.
pub struct End<'a>(pub &'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// The state of a unit, if there is one of this name.
pub fn unit(datapath: &Datapath, name: &str) -> Option<UnitHealth> {
    datapath.unit_status().into_iter().find(|unit| unit.name == name)
}

/// Runs commands of nftables in this network namespace. False where there is no nft, or the kernel lacks
/// what they need, for which it has no other error than that.
pub fn nft(commands: &str) -> bool {
    let mut nft = Command::new("nft");
    nft.args(["-f", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut nft = match nft.spawn() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return false,
        spawned => spawned.unwrap(),
    };
    nft.stdin.take().unwrap().write_all(commands.as_bytes()).unwrap();
    let output = nft.wait_with_output().unwrap();
    let problem = String::from_utf8_lossy(&output.stderr);
    let is_lacking = ["No such file or directory", "not supported"];
    let is_missing = is_lacking.iter().any(|text| problem.contains(text));
    assert!(output.status.success() || is_missing, "{commands}: {problem}");
    output.status.success()
}

/// `n`, or a quarter of it where not all is tried: what only time or number shows is tried longer by
/// `cargo xtask test --full`.
pub fn full_or_quarter(n: u64) -> u64 {
    if std::env::var_os("NOHOP_FULL").is_some() { n } else { n / 4 }
}

/// Whether the processor is emulated, as in `cargo xtask vm`.
pub fn is_emulated() -> bool {
    std::env::var_os("NOHOP_EMULATED").is_some()
}

/// Connects, and returns the letter of the server that answered.
pub fn connect(address: impl Into<SocketAddr>) -> io::Result<char> {
    let mut letter = [0];
    TcpStream::connect(address.into())?.read_exact(&mut letter)?;
    Ok(letter[0].into())
}

/// A server that answers each datagram with its one letter, until it is dropped.
pub struct Echo {
    pub address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    pub fn start(letter: u8) -> Echo {
        Echo::on(letter, (Ipv4Addr::LOCALHOST, 0))
    }

    pub fn on(letter: u8, address: impl Into<SocketAddr>) -> Echo {
        let socket = UdpSocket::bind(address.into()).unwrap();
        let address = socket.local_addr().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            while let Ok((_, client)) = socket.recv_from(&mut [0]) {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let _ = socket.send_to(&[letter], client);
            }
        });
        Echo { address, stop, thread: Some(thread) }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let socket = client(self.address);
        let _ = socket.send_to(b"!", self.address);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// A UDP socket of the family of `address`, which isn't connected. It waits no longer than an
/// answer takes on loopback.
pub fn client(address: SocketAddr) -> UdpSocket {
    let any: IpAddr = match address {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    socket
}

/// Sends a datagram, and returns the letter that comes back, and from where.
pub fn ask(socket: &UdpSocket, address: SocketAddr) -> io::Result<(char, SocketAddr)> {
    socket.send_to(b"?", address)?;
    receive(socket)
}

/// The next datagram's letter, and where it comes from.
pub fn receive(socket: &UdpSocket) -> io::Result<(char, SocketAddr)> {
    let mut letter = [0];
    let (_, sender) = socket.recv_from(&mut letter)?;
    Ok((letter[0].into(), sender))
}

/// Connects a UDP socket, sends a datagram and returns the letter that comes back.
pub fn connect_udp(address: SocketAddr) -> io::Result<char> {
    let socket = client(address);
    socket.connect(address)?;
    socket.send(b"?")?;
    let (letter, sender) = receive(&socket)?;
    assert_eq!(sender, address);
    assert_eq!(socket.peer_addr()?, address);
    Ok(letter)
}

/// An address on loopback that nothing listens on.
pub fn dead() -> SocketAddrV4 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    SocketAddrV4::new(Ipv4Addr::LOCALHOST, listener.local_addr().unwrap().port())
}

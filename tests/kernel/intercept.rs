//! The unit `intercept`: DNS queries of the processes in a cgroup go to nohop, in a network namespace of
//! the trial's own with resolvers of its own.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use lb_userspace::config::Intercepted;
use lb_userspace::datapath::{
    Datapath, InterceptSettings, TraceStep, UnitState, intercept_problems,
};
use rustix::net::{AddressFamily, SocketType, bind, ipproto, socket, sockopt};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
use testbed::TIMEOUT;

use crate::disconnect::Inhabitant;
use crate::fixture::{Echo, Place, Server, VIP, ask, client, receive, table, unit};
use crate::netns::{inside, ip, leave};

const UNIT: &str = "intercept";
const DNS: u16 = 53;
/// The resolvers that applications ask: they answer with `a`, `b` and, by IPv6, `c`.
const A: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 53);
const B: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 54);
const C: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x53);
/// An address of the host, beside loopback.
const HOST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
/// nohop's port.
const PORT: u16 = 5399;

/// A DNS server, by UDP and TCP: it answers with its letter.
struct Resolver {
    _udp: Echo,
    _tcp: Server,
}

fn resolver(letter: char, ip: impl Into<IpAddr>, port: u16) -> Resolver {
    let address = SocketAddr::new(ip.into(), port);
    Resolver { _udp: Echo::on(letter as u8, address), _tcp: Server::on(letter as u8, address) }
}

/// A cgroup below the scope, which this process enters and leaves.
struct Tasks<'a> {
    place: &'a Place,
    path: PathBuf,
}

impl Tasks<'_> {
    fn new(place: &Place) -> Tasks<'_> {
        let path = place.cgroup.path.join("tasks");
        fs::create_dir(&path).unwrap();
        let tasks = Tasks { place, path };
        tasks.enter();
        tasks
    }

    fn enter(&self) {
        enter(&self.path);
    }

    fn leave(&self) {
        enter(&self.place.cgroup.path);
    }
}

impl Drop for Tasks<'_> {
    fn drop(&mut self) {
        self.leave();
    }
}

fn enter(cgroup: &Path) {
    fs::write(cgroup.join("cgroup.procs"), "0").unwrap();
}

fn listen(ips: &[IpAddr]) -> Vec<SocketAddr> {
    ips.iter().map(|&ip| SocketAddr::new(ip, PORT)).collect()
}

fn settings(tasks: &Tasks, listen: Vec<SocketAddr>) -> InterceptSettings {
    InterceptSettings {
        cgroups: Intercepted::Cgroups(vec![tasks.path.clone()]),
        listen,
        upstreams: BTreeSet::new(),
        // This process has threads in other trials' namespaces.
        is_verified: false,
        obstacle: None,
    }
}

fn intercept(datapath: &mut Datapath, settings: InterceptSettings) {
    configure(datapath, settings);
    let unit = unit(datapath, UNIT).unwrap();
    assert_eq!(unit.state, UnitState::Attached, "{:?}", unit.reason);
}

/// Also awaits the search for DNS servers.
fn configure(datapath: &mut Datapath, settings: InterceptSettings) {
    datapath.configure_intercept(Some(settings));
    datapath.finish_search();
}

fn count(datapath: &Datapath, name: &str) -> u64 {
    let counts = datapath.intercept_counts();
    counts.into_iter().find(|(counted, _)| *counted == name).unwrap().1
}

/// What is decided on a query from another network namespace, which leads nowhere, where a server of the
/// same cgroup may be bound.
fn from_container(datapath: &Datapath, server: Option<SocketAddr>) -> &'static str {
    datapath.heartbeat(None);
    let before = datapath.intercept_counts();
    let query = || {
        leave();
        let _server = server.map(|server| UdpSocket::bind(server).unwrap());
        client(at(A)).send_to(b"?", at(A)).unwrap_err();
    };
    std::thread::scope(|scope| scope.spawn(query).join().unwrap());
    decided(datapath, before)
}

/// What was counted since then, which is one decision.
fn decided(datapath: &Datapath, before: Vec<(&'static str, u64)>) -> &'static str {
    let counts = datapath.intercept_counts().into_iter().zip(before);
    let mut counted = counts.filter(|((_, now), (_, before))| now != before);
    let ((name, _), _) = counted.next().unwrap();
    assert!(counted.next().is_none());
    name
}

/// Runs a trial in a network namespace of its own, with resolvers `a`, `b` and `c`.
fn with_resolvers(trial: fn()) {
    inside(move || {
        for address in ["10.0.0.1/32", "10.0.0.53/32", "10.0.0.54/32"] {
            ip(&format!("addr add {address} dev lo"));
        }
        ip("addr add fd00::53/128 dev lo nodad");
        let _resolvers = [resolver('a', A, DNS), resolver('b', B, DNS), resolver('c', C, DNS)];
        trial();
    });
}

fn at(ip: impl Into<IpAddr>) -> SocketAddr {
    SocketAddr::new(ip.into(), DNS)
}

fn mapped(ip: Ipv4Addr) -> SocketAddr {
    at(ip.to_ipv6_mapped())
}

/// A UDP socket that is closed to IPv4.
fn ipv6_only() -> UdpSocket {
    let created = socket(AddressFamily::INET6, SocketType::DGRAM, Some(ipproto::UDP)).unwrap();
    sockopt::set_ipv6_v6only(&created, true).unwrap();
    bind(&created, &SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0))).unwrap();
    UdpSocket::from(created)
}

/// The letter that answers, by one way to ask; the application sees the address that it asked.
fn by_sendto(server: SocketAddr) -> char {
    let (letter, sender) = ask(&client(server), server).unwrap();
    assert_eq!(sender, server);
    letter
}

fn by_connect(server: SocketAddr) -> char {
    let socket = client(server);
    socket.connect(server).unwrap();
    // Each of several.
    let mut letters = Vec::new();
    for _ in 0..3 {
        socket.send(b"?").unwrap();
        let (letter, sender) = receive(&socket).unwrap();
        assert_eq!((sender, socket.peer_addr().unwrap()), (server, server));
        letters.push(letter);
    }
    letters.dedup();
    assert_eq!(letters.len(), 1);
    letters[0]
}

fn by_tcp(server: SocketAddr) -> char {
    let mut stream = TcpStream::connect(server).unwrap();
    assert_eq!(stream.peer_addr().unwrap(), server);
    let mut letter = [0];
    stream.read_exact(&mut letter).unwrap();
    letter[0].into()
}

type Way = fn(SocketAddr) -> char;

const WAYS: [(&str, Way); 3] = [("sendto", by_sendto), ("connect", by_connect), ("tcp", by_tcp)];

/// What answers, by all ways the same.
fn answer(datapath: &Datapath, server: SocketAddr) -> char {
    let mut letters = WAYS.map(|(way, by)| {
        // The daemon lives.
        datapath.heartbeat(None);
        (way, by(server))
    });
    letters.sort_by_key(|(_, letter)| *letter);
    assert_eq!(letters[0].1, letters[2].1, "{server}: {letters:?}");
    letters[0].1
}

pub fn every_way_to_ask() {
    with_resolvers(|| {
        let place = Place::new();
        let loopback = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        let _nohop = loopback.map(|ip| resolver('n', ip, PORT));
        let mut datapath = place.start();
        let tasks = Tasks::new(&place);
        assert_eq!(answer(&datapath, at(A)), 'a', "before");
        intercept(&mut datapath, settings(&tasks, listen(&loopback)));

        for server in [at(A), at(B), mapped(A), at(C)] {
            assert_eq!(answer(&datapath, server), 'n', "{server}");
        }
        // A connection once, datagrams of a socket that isn't connected each.
        assert_eq!(count(&datapath, "intercepted"), 4 * 3);

        // One socket, two resolvers: one after the other, both at once, and by the other family.
        let socket = client(at(A));
        for _ in 0..2 {
            for server in [at(A), at(B)] {
                datapath.heartbeat(None);
                assert_eq!(ask(&socket, server).unwrap(), ('n', server));
            }
        }
        datapath.heartbeat(None);
        for server in [at(A), at(B), at(B), at(A)] {
            socket.send_to(b"?", server).unwrap();
        }
        for server in [at(A), at(B), at(B), at(A)] {
            assert_eq!(receive(&socket).unwrap(), ('n', server));
        }
        let dual = client(at(C));
        for server in [mapped(A), at(C), mapped(B), at(C)] {
            datapath.heartbeat(None);
            assert_eq!(ask(&dual, server).unwrap(), ('n', server));
        }
        let socket = ipv6_only();
        datapath.heartbeat(None);
        assert_eq!(ask(&socket, at(C)).unwrap(), ('n', at(C)));

        // Connected to one, then to another; and to nohop itself, at the usual port.
        let nohop = at(Ipv4Addr::LOCALHOST);
        tasks.leave();
        let _usual = resolver('n', nohop.ip(), DNS);
        tasks.enter();
        intercept(&mut datapath, settings(&tasks, vec![nohop]));
        let socket = client(at(A));
        for server in [at(A), at(B), nohop, at(A)] {
            datapath.heartbeat(None);
            socket.connect(server).unwrap();
            socket.send(b"?").unwrap();
            let expected = ('n', server);
            assert_eq!(
                (receive(&socket).unwrap(), socket.peer_addr().unwrap()),
                (expected, server)
            );
        }
        // Connected, and by sendto() to another.
        datapath.heartbeat(None);
        assert_eq!(ask(&socket, at(B)).unwrap(), ('n', at(B)));
        socket.send(b"?").unwrap();
        assert_eq!(receive(&socket).unwrap(), ('n', at(A)));
        let socket = client(mapped(A));
        socket.connect(mapped(A)).unwrap();
        for _ in 0..6 {
            datapath.heartbeat(None);
            socket.send(b"?").unwrap();
            assert_eq!(receive(&socket).unwrap(), ('n', mapped(A)));
        }

        // Other ports are no DNS, and other cgroups none of ours.
        let other = Echo::on(b'o', (A, 5353));
        assert_eq!(by_sendto(other.address), 'o');
        tasks.leave();
        assert_eq!(answer(&datapath, at(A)), 'a', "outside");
        tasks.enter();
        datapath.configure_intercept(None);
        assert!(unit(&datapath, UNIT).is_none() && datapath.intercept_counts().is_empty());
        assert_eq!(answer(&datapath, at(A)), 'a', "switched off");
    });
}

pub fn only_while_the_daemon_answers() {
    with_resolvers(|| {
        let place = Place::new();
        let loopback = [Ipv4Addr::LOCALHOST.into()];
        let nohop = resolver('n', Ipv4Addr::LOCALHOST, PORT);
        let mut datapath = place.start_as_daemon();
        let tasks = Tasks::new(&place);
        intercept(&mut datapath, settings(&tasks, listen(&loopback)));
        assert_eq!(answer(&datapath, at(A)), 'a', "the daemon's own");
        assert_eq!(count(&datapath, "own"), 3);
        datapath.keep();
        let all = || WAYS.map(|(_, by)| by(at(A)));
        assert_eq!(all(), ['a'; 3], "it has stopped");
        assert_eq!(count(&datapath, "no_daemon"), 3);
        assert_eq!(answer(&datapath, at(A)), 'n');

        datapath.set_shadow(true);
        assert_eq!(answer(&datapath, at(A)), 'a', "shadow mode");
        let shown = unit(&datapath, UNIT).unwrap();
        assert_eq!((shown.state, shown.reason.as_deref()), (UnitState::Off, Some("shadow mode")));
        datapath.set_shadow(false);
        datapath.set_names_detached(true);
        assert_eq!(answer(&datapath, at(A)), 'a', "VIPs lead nowhere");
        datapath.set_names_detached(false);
        let obstacle = Some("no other resolver".to_owned());
        let settings_now = settings(&tasks, listen(&loopback));
        configure(&mut datapath, InterceptSettings { obstacle: obstacle.clone(), ..settings_now });
        assert_eq!(answer(&datapath, at(A)), 'a', "{obstacle:?}");
        assert_eq!(unit(&datapath, UNIT).unwrap().reason, obstacle);
        intercept(&mut datapath, settings(&tasks, listen(&loopback)));
        assert_eq!(answer(&datapath, at(A)), 'n');

        // Nothing listens any more, though its heartbeat is fresh: it was killed.
        tasks.leave();
        drop(nohop);
        tasks.enter();
        assert_eq!(answer(&datapath, at(A)), 'a', "killed");
        // So are its links.
        drop(datapath);
        assert_eq!(all(), ['a'; 3]);
    });
}

pub fn what_is_left_alone() {
    with_resolvers(|| {
        let mut place = Place::new();
        let excluded = place.cgroup.path.join("tasks/excluded");
        place.options.datapath.exclude_cgroups = vec![excluded.clone()];
        let loopback = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        let _nohop = loopback.map(|ip| resolver('n', ip, PORT));
        let mut datapath = place.start();
        datapath.apply(&table(vec![])).unwrap();
        let tasks = Tasks::new(&place);
        // Not twice.
        let below = tasks.path.join("below");
        fs::create_dir(&below).unwrap();
        let cgroups = Intercepted::Cgroups(vec![below.clone(), tasks.path.clone()]);
        intercept(
            &mut datapath,
            InterceptSettings { cgroups, ..settings(&tasks, listen(&loopback)) },
        );
        enter(&below);
        assert_eq!(answer(&datapath, at(A)), 'n');
        assert_eq!(count(&datapath, "intercepted"), 3);

        fs::create_dir(&excluded).unwrap();
        datapath.fix();
        enter(&excluded);
        assert_eq!(answer(&datapath, at(A)), 'a', "excluded");
        assert_eq!(count(&datapath, "excluded"), 3);
        enter(&below);

        // A DNS server in such a cgroup asks on its own, as nohop may forward to it. In a container one
        // on loopback is no server for others.
        let own = UdpSocket::bind((HOST, DNS)).unwrap();
        let again = |datapath: &mut Datapath| {
            datapath.configure_intercept(None);
            let cgroups = Intercepted::Cgroups(vec![tasks.path.clone()]);
            let settings = settings(&tasks, listen(&loopback));
            intercept(datapath, InterceptSettings { cgroups, ..settings });
        };
        again(&mut datapath);
        assert_eq!(answer(&datapath, at(A)), 'a', "a DNS server");
        enter(&tasks.path);
        assert_eq!(answer(&datapath, at(A)), 'n', "another cgroup than the server's");
        enter(&below);
        // In a container the same cgroup is intercepted, as Docker's daemon is that has a docker-proxy.
        assert_eq!(from_container(&datapath, None), "unreachable");
        drop(own);
        again(&mut datapath);
        assert_eq!(answer(&datapath, at(A)), 'n', "it has gone");
        // One that is bound while its cgroup is intercepted is known at once.
        let own = UdpSocket::bind((HOST, DNS)).unwrap();
        assert_eq!(answer(&datapath, at(A)), 'a', "a new DNS server");
        drop(own);
        again(&mut datapath);
        let unspecified = at(Ipv4Addr::UNSPECIFIED);
        assert_eq!(from_container(&datapath, Some(unspecified)), "excluded");
        again(&mut datapath);
        assert_eq!(from_container(&datapath, Some(at(Ipv4Addr::LOCALHOST))), "unreachable");
        // At another port it is one that nohop forwards to.
        let upstream = SocketAddr::from((HOST, 5335));
        let forwards = InterceptSettings {
            cgroups: Intercepted::Cgroups(vec![tasks.path.clone()]),
            upstreams: [upstream].into(),
            ..settings(&tasks, listen(&loopback))
        };
        let own = UdpSocket::bind(upstream).unwrap();
        assert_eq!(answer(&datapath, at(A)), 'n', "a server of something else");
        intercept(&mut datapath, forwards.clone());
        assert_eq!(answer(&datapath, at(A)), 'a', "a resolver that was there");
        drop(own);
        datapath.configure_intercept(None);
        intercept(&mut datapath, forwards);
        assert_eq!(answer(&datapath, at(A)), 'n', "it has gone");
        let own = UdpSocket::bind(upstream).unwrap();
        assert_eq!(answer(&datapath, at(A)), 'a', "a resolver that is new");
        drop(own);
        again(&mut datapath);

        // A VIP leads where it leads, or is refused; this service has no such port.
        let _wrong = TcpListener::bind((VIP, DNS)).unwrap();
        datapath.heartbeat(None);
        let refused = TcpStream::connect((VIP, DNS)).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);

        // What nohop doesn't listen at.
        intercept(&mut datapath, settings(&tasks, listen(&loopback[1..])));
        assert_eq!(answer(&datapath, at(A)), 'a', "nohop listens at no IPv4 address");
        assert_eq!(answer(&datapath, mapped(A)), 'a', "nohop listens at no IPv4 address");
        assert_eq!(answer(&datapath, at(C)), 'n');
        assert_eq!(count(&datapath, "unreachable"), 6);

        // Cgroups come and go.
        tasks.leave();
        for gone in [&excluded, &below, &tasks.path] {
            fs::remove_dir(gone).unwrap();
        }
        configure(&mut datapath, settings(&tasks, listen(&loopback)));
        let shown = unit(&datapath, UNIT).unwrap();
        assert_eq!(shown.state, UnitState::Waiting);
        assert!(shown.reason.unwrap().contains("no cgroup matches"));
        fs::create_dir(&tasks.path).unwrap();
        intercept(&mut datapath, settings(&tasks, listen(&loopback)));
        tasks.enter();
        assert_eq!(answer(&datapath, at(A)), 'n', "created again");
        intercept(&mut datapath, settings(&tasks, listen(&loopback)));
        assert_eq!(answer(&datapath, at(A)), 'n');
    });
}

/// A container whose queries don't reach nohop, as where the host's firewall drops them, asks its own
/// resolver.
pub fn what_reaches_nohop() {
    with_resolvers(|| {
        let place = Place::new();
        let mut datapath = place.start();
        let tasks = Tasks::new(&place);
        tasks.leave();
        let procs = tasks.path.join("cgroup.procs");
        let container = Inhabitant::new();
        fs::write(&procs, container.pid()).unwrap();
        ip(&format!("link add br9 type veth peer name eth0 netns {}", container.pid()));
        ip("addr add 10.9.0.1/24 dev br9");
        ip("link set br9 up");
        for command in ["ip addr add 10.9.0.2/24 dev eth0", "ip link set eth0 up"] {
            container.run(command);
        }
        // How many searches it takes until the unit shows that, and what becomes of a query then.
        let is_reached = |datapath: &mut Datapath, expected: bool| {
            let gateway = Ipv4Addr::new(10, 9, 0, 1);
            let deadline = Instant::now() + TIMEOUT;
            for n_searches in 1.. {
                let settings = settings(&tasks, listen(&[gateway.into()]));
                let settings = InterceptSettings { is_verified: true, ..settings };
                configure(datapath, settings);
                let reason = unit(datapath, UNIT).unwrap().reason.unwrap_or_default();
                if reason.contains("let queries to that port in") == expected {
                    let before = datapath.intercept_counts();
                    let enter = format!("echo $$ > {}", procs.display());
                    container.run(&format!("{enter}; echo 2>/dev/null > /dev/udp/{A}/53 || true"));
                    return (n_searches, decided(datapath, before));
                }
                assert!(Instant::now() < deadline, "{reason}");
                std::thread::sleep(Duration::from_millis(10));
            }
            unreachable!("it ends by its deadline")
        };
        assert_eq!(is_reached(&mut datapath, true), (1, "unreachable"), "nothing listens there");
        let _nohop = Echo::on(b'n', (Ipv4Addr::new(10, 9, 0, 1), PORT));
        let (_, decided) = is_reached(&mut datapath, false);
        assert_eq!(decided, "intercepted");
    });
}

/// While a client traces, each query is an event: who asks whom, where it goes and why.
pub fn traced() {
    with_resolvers(|| {
        let place = Place::new();
        let loopback = [Ipv4Addr::LOCALHOST.into()];
        let _nohop = resolver('n', Ipv4Addr::LOCALHOST, PORT);
        let mut datapath = place.start();
        let mut events = datapath.take_trace_events().unwrap();
        let tasks = Tasks::new(&place);
        let cgroup_id = fs::metadata(&tasks.path).unwrap().ino();
        let mut read = || {
            let mut all = Vec::new();
            events.read(usize::MAX, |event| match event.step {
                TraceStep::Query(query) => {
                    assert_eq!((query.pid, query.cgroup_id), (std::process::id(), cgroup_id));
                    all.push((query.frontend, query.is_tcp, query.backend, query.reason));
                }
                step => panic!("{step:?}"),
            });
            all
        };
        // Twice, as it is loaded again.
        for _ in 0..2 {
            intercept(&mut datapath, settings(&tasks, listen(&loopback)));
            assert_eq!(answer(&datapath, at(A)), 'n');
            assert_eq!(read(), [], "nothing is traced");
            datapath.set_trace(Some((Duration::from_secs(60), u32::MAX)));
            assert_eq!(answer(&datapath, at(A)), 'n');
            datapath.stop_interception();
            assert_eq!(by_sendto(at(C)), 'c');
            let server = Some(SocketAddr::from((Ipv4Addr::LOCALHOST, PORT)));
            let sent = |is_tcp| (at(A), is_tcp, server, "dns.intercept");
            let off = (at(C), false, None, "interception is off, or the daemon doesn't listen");
            assert_eq!(read(), [sent(false), sent(false), sent(true), off]);
            datapath.set_trace(None);
            datapath.configure_intercept(None);
        }
    });
}

/// Where DNS servers can't be found, one of them may be whom nohop forwards to.
pub fn only_where_resolvers_are_found() {
    with_resolvers(|| {
        let place = Place::new();
        let loopback = [Ipv4Addr::LOCALHOST.into()];
        let _nohop = resolver('n', Ipv4Addr::LOCALHOST, PORT);
        let mut datapath = place.start();
        let tasks = Tasks::new(&place);
        intercept(&mut datapath, settings(&tasks, listen(&loopback)));
        assert_eq!(answer(&datapath, at(A)), 'n');

        let upstreams = [at(B)].into();
        let changed = InterceptSettings { upstreams, ..settings(&tasks, listen(&loopback)) };
        without(CapabilitySet::SYS_PTRACE, || configure(&mut datapath, changed));
        assert_eq!(answer(&datapath, at(A)), 'a');
        let shown = unit(&datapath, UNIT).unwrap();
        assert_eq!(shown.state, UnitState::Failed);
        assert!(shown.reason.as_ref().unwrap().contains("CAP_SYS_PTRACE"), "{shown:?}");
        let problems = without(CapabilitySet::SYS_PTRACE, || {
            intercept_problems(&Intercepted::Tasks(true), &[])
        });
        assert!(problems[0].contains("CAP_SYS_PTRACE"), "{problems:?}");

        intercept(&mut datapath, settings(&tasks, listen(&loopback)));
        assert_eq!(answer(&datapath, at(A)), 'n');
    });
}

/// Runs it on a thread that lacks a capability.
pub fn without<T: Send>(capability: CapabilitySet, run: impl FnOnce() -> T + Send) -> T {
    let limited = || {
        let mut sets = capabilities(None).unwrap();
        sets.effective.remove(capability);
        sets.permitted.remove(capability);
        set_capabilities(None, sets).unwrap();
        run()
    };
    std::thread::scope(|scope| scope.spawn(limited).join().unwrap())
}

/// A container with a network namespace of its own reaches no loopback address of the host's.
pub fn in_another_network_namespace() {
    with_resolvers(|| {
        let mut place = Place::new();
        place.options.host_netns = Some(1);
        let ips = [Ipv4Addr::LOCALHOST.into(), IpAddr::from(HOST)];
        let _nohop = [resolver('l', ips[0], PORT), resolver('n', ips[1], PORT)];
        let _own = resolver('d', Ipv4Addr::new(127, 0, 0, 11), DNS);
        let mut datapath = place.start();
        let tasks = Tasks::new(&place);
        intercept(&mut datapath, settings(&tasks, listen(&ips[..1])));
        assert!(unit(&datapath, UNIT).unwrap().reason.unwrap().contains("only loopback addresses"));
        assert_eq!(answer(&datapath, at(A)), 'a');
        intercept(&mut datapath, settings(&tasks, listen(&ips)));
        assert_eq!(answer(&datapath, at(A)), 'n');
        assert_eq!(answer(&datapath, at(C)), 'c', "nohop listens at no IPv6 address");
        assert_eq!(answer(&datapath, at(Ipv4Addr::new(127, 0, 0, 11))), 'd', "Docker's DNS server");
        assert_eq!(count(&datapath, "local"), 3);
        assert_eq!(unit(&datapath, UNIT).unwrap().reason, None);
    });
}

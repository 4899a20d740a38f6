//! The unit `edge`: a client, an edge and a backend, each in a network namespace of its own, joined by veth.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use aya::maps::{Array, Map, MapData};
use lb_common::EdgeControl;
use lb_userspace::datapath::{Datapath, EdgeFlow, EdgeFlowState, EdgeOptions, EdgeTimeouts};
use lb_userspace::table::{Protocols, Service};

use crate::fixture::{Place, VIP, service, table};
use crate::names::Container;
use crate::netns::{inside, ip};

/// For what must come.
pub const LONG: Duration = Duration::from_secs(20);

pub const CLIENT: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
const EDGE_OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
pub const PUBLIC: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
pub const SOURCE: Ipv4Addr = Ipv4Addr::new(10, 7, 0, 1);
pub const BACKEND: Ipv4Addr = Ipv4Addr::new(10, 7, 0, 2);
/// No host has it.
pub const SILENT: Ipv4Addr = Ipv4Addr::new(10, 7, 0, 9);
pub const PORT: u16 = 8_080;

/// The network of a trial. This thread's namespace is the edge's.
pub struct Network {
    pub client: Container,
    pub backend: Container,
}

impl Network {
    pub fn new() -> Network {
        let network = Network { client: Container::start(), backend: Container::start() };
        network.add_out();
        network.add_in();
        network
    }

    /// The interface to the client.
    fn add_out(&self) {
        self.client.add("out", ["198.51.100.1/24", "fd51::1/64"]);
        self.client.run(|| {
            ip("addr add 198.51.100.2/24 dev v1");
            ip("addr add fd51::2/64 dev v1 nodad");
            ip("link set v1 up");
            ip("route add 203.0.113.0/24 via 198.51.100.1");
            ip("route add fd99::/64 via fd51::1");
        });
    }

    /// The interface to the backend, which has no way to the client but by the edge's own address.
    pub fn add_in(&self) {
        self.backend.add("in", ["10.7.0.1/24", "fd07::1/64"]);
        self.backend.run(|| {
            ip("addr add 10.7.0.2/24 dev v1");
            ip("addr add fd07::2/64 dev v1 nodad");
            ip("link set v1 up");
        });
    }
}

impl Container {
    /// Adds an interface of the edge, to this one's `v1`.
    fn add(&self, device: &str, [v4, v6]: [&str; 2]) {
        ip(&format!("link add {device} type veth peer name v1 netns {}", self.tid));
        ip(&format!("addr add {v4} dev {device}"));
        ip(&format!("addr add {v6} dev {device} nodad"));
        ip(&format!("link set {device} up"));
        for family in ["ipv4", "ipv6"] {
            let forwarding = format!("/proc/sys/net/{family}/conf/{device}/forwarding");
            std::fs::write(forwarding, "1").unwrap();
        }
    }
}

pub fn options() -> EdgeOptions {
    EdgeOptions {
        interfaces: vec!["out".to_owned(), "in".to_owned()],
        networks: ["203.0.113.0/24", "fd99::/64"].map(|it| it.parse().unwrap()).into(),
        sources: vec![SOURCE.into(), "fd07::1".parse().unwrap()],
        max_flows: 1_024,
        timeouts: EdgeTimeouts::default(),
        client_address: Vec::new(),
    }
}

pub fn public(name: &str, backends: &[SocketAddr], public: &[SocketAddr]) -> Service {
    let backends: Vec<_> = backends.iter().map(|&address| (address, 1)).collect();
    let public = public.to_vec();
    Service { public, protocols: Protocols::Both, ..service(name, VIP, &backends) }
}

pub fn web() -> Service {
    let ipv6 = |ip: &str, port| SocketAddr::new(ip.parse().unwrap(), port);
    public(
        "web",
        &[(BACKEND, PORT).into(), ipv6("fd07::2", PORT)],
        &[(PUBLIC, 80).into(), ipv6("fd99::10", 80)],
    )
}

pub fn place() -> Place {
    let mut place = Place::new();
    // The hooks have room for IPv6 frontends then.
    place.options.vip.pool6 = Some("fd77::/64".parse().unwrap());
    place
}

/// A datapath whose edge serves `services`.
pub fn serve(place: &Place, services: Vec<Service>) -> Datapath {
    serve_with(place, services, options())
}

pub fn serve_with(place: &Place, services: Vec<Service>, options: EdgeOptions) -> Datapath {
    let mut datapath = place.start();
    datapath.configure_edge(Some(options));
    apply(&mut datapath, services);
    datapath
}

pub fn apply(datapath: &mut Datapath, services: Vec<Service>) {
    let errors = datapath.apply(&table(services)).unwrap();
    assert!(errors.is_empty(), "{errors:?}");
    let status = datapath.edge_status().unwrap();
    assert!(status.interfaces.iter().all(|interface| interface.mode.is_some()), "{status:?}");
    assert_eq!(status.problems, Vec::<String>::new());
}

pub fn count(datapath: &Datapath, name: &str) -> u64 {
    let counts = datapath.edge_counts();
    counts.iter().find(|(named, _)| *named == name).unwrap_or_else(|| panic!("no {name}")).1
}

/// The flows through an edge.
pub fn flows(datapath: &Datapath) -> Vec<EdgeFlow> {
    datapath.edge_flow_reader().unwrap().flows()
}

/// What a backend sends: its letter, who it saw, and what it got. It serves one connection after the other, until one
/// without data.
pub fn start_server(container: &Container, address: IpAddr, letter: char) {
    container.run(move || start_server_here(address, letter));
}

/// The same in this thread's network namespace.
pub fn start_server_here(address: IpAddr, letter: char) {
    let listener = TcpListener::bind((address, PORT)).unwrap();
    let of_datagrams = answer_datagrams(address, letter);
    std::thread::spawn(move || {
        loop {
            let (mut stream, peer) = listener.accept().unwrap();
            let mut request = Vec::new();
            stream.read_to_end(&mut request).unwrap();
            if request.is_empty() {
                of_datagrams.join().unwrap();
                drop(listener);
                // What `end_server` waits for.
                drop(stream);
                break;
            }
            let answer = format!("{letter} {} {}", peer.ip(), request.len());
            stream.write_all(answer.as_bytes()).unwrap();
            stream.write_all(&request).unwrap();
        }
    });
}

/// The part of that for datagrams, until one is empty.
pub fn answer_datagrams(address: IpAddr, letter: char) -> JoinHandle<()> {
    let socket = UdpSocket::bind((address, PORT)).unwrap();
    std::thread::spawn(move || {
        let mut message = [0; 2_048];
        loop {
            let (len, peer) = socket.recv_from(&mut message).unwrap();
            if len == 0 {
                break;
            }
            let answer = format!("{letter} {} {len}", peer.ip());
            socket.send_to(answer.as_bytes(), peer).unwrap();
        }
    })
}

/// Ends the server's threads, soon.
pub fn stop_server(container: &Container, address: IpAddr) {
    container.run(move || stop_server_here(address));
}

/// The same in this thread's network namespace.
pub fn stop_server_here(address: IpAddr) {
    drop(ask_to_stop(address));
}

fn ask_to_stop(address: IpAddr) -> TcpStream {
    let socket = UdpSocket::bind((address, 0)).unwrap();
    socket.send_to(b"", (address, PORT)).unwrap();
    let stream = TcpStream::connect((address, PORT)).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    stream
}

/// Ends a server that no connection is open to; then its ports are free.
pub fn end_server(container: &Container, address: IpAddr) {
    container.run(move || {
        let mut stream = ask_to_stop(address);
        stream.set_read_timeout(Some(LONG)).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    });
}

/// Sends a request and reads the answer.
pub fn request(to: SocketAddr, request: &[u8]) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, LONG)?;
    stream.set_read_timeout(Some(LONG))?;
    assert_eq!(stream.peer_addr()?, to);
    stream.write_all(request)?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let head = answer.strip_suffix(request).unwrap_or_else(|| panic!("other data came back"));
    Ok(String::from_utf8_lossy(head).into_owned())
}

pub fn ask(from: IpAddr, to: SocketAddr, message: &[u8]) -> std::io::Result<String> {
    let socket = UdpSocket::bind((from, 0))?;
    socket.set_read_timeout(Some(LONG))?;
    // Others' replies aren't received.
    socket.connect(to)?;
    socket.send(message)?;
    let mut answer = [0; 2_048];
    let len = socket.recv(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer[..len]).into_owned())
}

/// The addresses of one family.
#[derive(Clone, Copy)]
pub struct Ends {
    pub client: IpAddr,
    pub vip: SocketAddr,
    pub backend: IpAddr,
    pub source: IpAddr,
}

/// Those of a flow to [`web`], by IPv4 and by IPv6.
pub fn ends() -> [Ends; 2] {
    let [client, vip, backend, source] =
        ["fd51::2", "fd99::10", "fd07::2", "fd07::1"].map(|ip| ip.parse::<IpAddr>().unwrap());
    [
        Ends {
            client: CLIENT.into(),
            vip: (PUBLIC, 80).into(),
            backend: BACKEND.into(),
            source: SOURCE.into(),
        },
        Ends { client, vip: (vip, 80).into(), backend, source },
    ]
}

/// Three requests by TCP of each family, of at most `len` octets, and two by UDP.
pub fn exchange(network: &Network, len: usize) {
    for Ends { client, vip, backend, source } in ends() {
        start_server(&network.backend, backend, 'A');
        for len in [1, 1_000, len] {
            let answer = network.client.run(move || request(vip, &vec![7; len]));
            assert_eq!(answer.unwrap(), format!("A {source} {len}"));
        }
        let answers =
            network.client.run(move || [1, 1_001].map(|len| ask(client, vip, &vec![7; len])));
        let expected = [1, 1_001].map(|len| format!("A {source} {len}"));
        assert_eq!(answers.map(Result::unwrap), expected);
        end_server(&network.backend, backend);
    }
}

/// TCP and UDP, of both families, short and long.
pub fn clients_reach_backends() {
    inside(|| {
        let (place, network) = (place(), Network::new());
        let datapath = serve(&place, vec![web()]);
        exchange(&network, 300_000);
        for Ends { client, vip, backend, source } in ends() {
            let flows: Vec<_> =
                flows(&datapath).into_iter().filter(|flow| flow.vip == vip).collect();
            assert_eq!(flows.len(), 5, "{flows:?}");
            for flow in &flows {
                assert_eq!(flow.service.as_deref(), Some("web"));
                assert_eq!((flow.client.ip(), flow.vip), (client, vip));
                assert_eq!(flow.backend, SocketAddr::new(backend, PORT));
                assert_eq!(flow.source.ip(), source);
                let state = match flow.protocol {
                    6 => EdgeFlowState::Closed,
                    _ => EdgeFlowState::Udp,
                };
                assert_eq!(flow.state, state, "{flow:?}");
                assert!(flow.packets >= 2 && flow.bytes > 0, "{flow:?}");
            }
        }
        assert_eq!(count(&datapath, "flows_begun"), 10);
        let counters = datapath.counters();
        let indices = datapath.indices("web").unwrap();
        assert_eq!(counters.service(indices.service).connects, 10);
        let in_flight: Vec<_> =
            indices.backends.values().map(|&idx| counters.outcomes(idx).in_flight).collect();
        assert_eq!(in_flight, [0, 0]);
    });
}

/// What is of no flow: a segment in the middle, a closed port, no backend, what is no VIP.
pub fn what_is_of_no_flow() {
    inside(|| {
        let (place, network) = (place(), Network::new());
        let mut datapath = serve(&place, vec![web()]);
        let vip = SocketAddr::from((PUBLIC, 80));
        // The backend's host answers with a RST.
        let kind = |network: &Network| {
            network.client.run(move || TcpStream::connect_timeout(&vip, LONG).unwrap_err().kind())
        };
        assert_eq!(kind(&network), ErrorKind::ConnectionRefused);
        let indices = datapath.indices("web").unwrap();
        let idx = indices.backends[&SocketAddr::from((BACKEND, PORT))];
        let outcomes = datapath.counters().outcomes(idx);
        assert_eq!((outcomes.in_flight, outcomes.pending), (0, 0));
        assert_eq!(datapath.counters().service(indices.service).failed, 1);

        // The edge answers with one.
        apply(&mut datapath, vec![public("web", &[], &[vip])]);
        assert_eq!(kind(&network), ErrorKind::ConnectionRefused);
        assert_eq!(count(&datapath, "no_backend"), 1);

        // No service has this port.
        let other = SocketAddr::from((PUBLIC, 81));
        let dropped = network.client.run(move || {
            TcpStream::connect_timeout(&other, Duration::from_millis(200)).unwrap_err().kind()
        });
        assert_eq!(dropped, ErrorKind::TimedOut);
        assert!(count(&datapath, "no_frontend") >= 1);

        // An edge without the flow.
        start_server(&network.backend, BACKEND.into(), 'A');
        apply(&mut datapath, vec![web()]);
        let stream = network.client.run(move || TcpStream::connect_timeout(&vip, LONG).unwrap());
        datapath.sweep_edge_after(Duration::from_secs(7_200));
        assert_eq!(
            flows(&datapath).iter().filter(|flow| flow.state == EdgeFlowState::Established).count(),
            0
        );
        let reset = network.client.run(move || {
            let mut stream = stream;
            stream.set_read_timeout(Some(LONG)).unwrap();
            stream.write_all(b"more").unwrap();
            stream.read(&mut [0]).unwrap_err().kind()
        });
        assert_eq!(reset, ErrorKind::ConnectionReset);
        assert!(count(&datapath, "unknown_flow") >= 1);
        let outside = SocketAddr::from((EDGE_OUTSIDE, 99));
        let refused = network
            .client
            .run(move || TcpStream::connect_timeout(&outside, LONG).unwrap_err().kind());
        assert_eq!(refused, ErrorKind::ConnectionRefused, "by the host itself");
    });
}

/// Fragments to a source address are the host's, those to a VIP are dropped; a packet whose hops end here begins no
/// flow, so a backend waits for no answer to it.
pub fn what_is_the_hosts() {
    inside(|| {
        let (place, network) = (place(), Network::new());
        let datapath = serve(&place, vec![web()]);
        let own = UdpSocket::bind((SOURCE, 9_999)).unwrap();
        own.set_read_timeout(Some(LONG)).unwrap();
        network.backend.run(|| {
            let socket = UdpSocket::bind((BACKEND, 0)).unwrap();
            socket.send_to(&[7; 4_000], (SOURCE, 9_999)).unwrap();
        });
        assert_eq!(own.recv(&mut [0; 8_192]).unwrap(), 4_000);

        network.client.run(|| {
            let socket = UdpSocket::bind((CLIENT, 0)).unwrap();
            socket.send_to(&[7; 4_000], (PUBLIC, 80)).unwrap();
            socket.set_ttl(1).unwrap();
            socket.send_to(b"?", (PUBLIC, 80)).unwrap();
        });
        let start = Instant::now();
        while count(&datapath, "hop_limit") == 0 {
            assert!(start.elapsed() < LONG, "{:?}", datapath.edge_counts());
            std::thread::yield_now();
        }
        assert_eq!(count(&datapath, "fragment"), 3);
        assert_eq!(flows(&datapath), []);
    });
}

/// The edge's own link takes shorter packets than the way to it, on either side, batches included: who sends longer
/// ones hears of it. The host at the link's other end advertises the segments of a longer one, as one beyond a router
/// does.
///
/// Both ends have that MTU: a veth drops single packets that are longer than its other end's, without a word, but no
/// batches.
pub fn short_links() {
    // Hosts remember what they hear.
    for (device, routes) in [
        ("in", ["10.7.0.0/24 dev v1", "fd07::/64 dev v1 metric 256"]),
        ("out", ["203.0.113.0/24 via 198.51.100.1", "fd99::/64 via fd51::1"]),
    ] {
        inside(move || {
            let (place, network) = (place(), Network::new());
            start_server(&network.backend, BACKEND.into(), 'a');
            start_server(&network.backend, "fd07::2".parse().unwrap(), 'a');
            let datapath = serve(&place, vec![web()]);
            ip(&format!("link set {device} mtu 1280"));
            let host = if device == "in" { &network.backend } else { &network.client };
            host.run(move || {
                ip("link set v1 mtu 1280");
                for route in routes {
                    ip(&format!("route replace {route} advmss 1440"));
                }
            });
            let mut n_before = 0;
            for vip in [SocketAddr::from((PUBLIC, 80)), "[fd99::10]:80".parse().unwrap()] {
                let answer = network.client.run(move || request(vip, &[0xa5; 200_000]).unwrap());
                assert!(answer.ends_with(" 200000"), "{device}: {answer}");
                let n = count(&datapath, "too_long");
                assert!(n > n_before, "{device}, {vip}");
                n_before = n;
            }
            stop_server(&network.backend, BACKEND.into());
            stop_server(&network.backend, "fd07::2".parse().unwrap());
        });
    }
}

/// A daemon that restarts, and one that is gone: connections go on, and new ones begin.
pub fn flows_outlive_the_daemon() {
    inside(|| {
        let (place, network) = (place(), Network::new());
        let datapath = serve(&place, vec![web()]);
        start_server(&network.backend, BACKEND.into(), 'A');
        let vip = SocketAddr::from((PUBLIC, 80));
        let stream = network.client.run(move || TcpStream::connect_timeout(&vip, LONG).unwrap());
        drop(datapath);
        let answer = network.client.run(move || ask(CLIENT.into(), vip, b"a"));
        assert_eq!(answer.unwrap(), format!("A {SOURCE} 1"), "without a daemon");
        let mut datapath = place.start();
        datapath.configure_edge(Some(options()));
        datapath.fix();
        let answer = network.client.run(move || ask(CLIENT.into(), vip, b"b"));
        assert_eq!(answer.unwrap(), format!("A {SOURCE} 1"), "before its first table");
        apply(&mut datapath, vec![web()]);
        assert_eq!(flows(&datapath).len(), 3);
        let answer = network.client.run(move || {
            let mut stream = stream;
            stream.write_all(b"late").unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).map(|_| answer)
        });
        assert_eq!(answer.unwrap(), format!("A {SOURCE} 4late"));
        // One that has no edge ends it.
        drop(datapath);
        let mut datapath = place.start();
        datapath.configure_edge(None);
        let gone = network.client.run(move || {
            TcpStream::connect_timeout(&vip, Duration::from_millis(200)).unwrap_err().kind()
        });
        assert_ne!(gone, ErrorKind::ConnectionRefused);
        assert!(!place.pin("v3/maps/EDGE_FLOWS").exists());
        stop_server(&network.backend, BACKEND.into());
    });
}

/// A VIP whose service has gone: its connections go on, and new ones are refused by the edge, not by the host.
pub fn a_service_goes() {
    inside(|| {
        let (place, network) = (place(), Network::new());
        let mut datapath = serve(&place, vec![web()]);
        start_server(&network.backend, BACKEND.into(), 'A');
        let vip = SocketAddr::from((PUBLIC, 80));
        let stream = network.client.run(move || TcpStream::connect_timeout(&vip, LONG).unwrap());
        apply(&mut datapath, vec![]);
        let (kind, answer) = network.client.run(move || {
            let mut stream = stream;
            stream.set_read_timeout(Some(LONG)).unwrap();
            let kind = TcpStream::connect_timeout(&vip, LONG).unwrap_err().kind();
            stream.write_all(b"more").unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            let mut answer = String::new();
            (kind, stream.read_to_string(&mut answer).map(|_| answer))
        });
        assert_eq!(answer.unwrap(), format!("A {SOURCE} 4more"));
        assert_eq!(kind, ErrorKind::ConnectionRefused);
        assert_eq!(count(&datapath, "no_backend"), 1);
        // Another daemon doesn't know that it had a service, but by the map.
        drop(datapath);
        let mut datapath = place.start();
        datapath.configure_edge(Some(options()));
        apply(&mut datapath, vec![]);
        let refused =
            network.client.run(move || TcpStream::connect_timeout(&vip, LONG).unwrap_err().kind());
        assert_eq!(refused, ErrorKind::ConnectionRefused);
        assert_eq!(count(&datapath, "no_backend"), 2);
        apply(&mut datapath, vec![web()]);
        let answer = network.client.run(move || request(vip, b"?"));
        assert_eq!(answer.unwrap(), format!("A {SOURCE} 1"));
        stop_server(&network.backend, BACKEND.into());
    });
}

/// Datagrams of a flow go to another backend once theirs has left.
pub fn udp_moves() {
    inside(|| {
        let (place, network) = (place(), Network::new());
        let other = Ipv4Addr::new(10, 7, 0, 3);
        network.backend.run(|| ip("addr add 10.7.0.3/24 dev v1"));
        start_server(&network.backend, BACKEND.into(), 'A');
        start_server(&network.backend, other.into(), 'B');
        let vip = SocketAddr::from((PUBLIC, 80));
        let by = |backend: Ipv4Addr| vec![public("web", &[(backend, PORT).into()], &[vip])];
        let mut datapath = serve(&place, by(BACKEND));
        let socket = network.client.run(move || {
            let socket = UdpSocket::bind((CLIENT, 0)).unwrap();
            socket.set_read_timeout(Some(LONG)).unwrap();
            socket.connect(vip).unwrap();
            socket
        });
        let asked = |socket: &UdpSocket| {
            let mut answer = [0; 64];
            socket.send(b"?").unwrap();
            let len = socket.recv(&mut answer).unwrap();
            String::from_utf8_lossy(&answer[..len]).into_owned()
        };
        assert_eq!(asked(&socket), format!("A {SOURCE} 1"));
        apply(&mut datapath, by(other));
        assert_eq!(asked(&socket), format!("B {SOURCE} 1"));
        assert_eq!(flows(&datapath).len(), 1);
        stop_server(&network.backend, BACKEND.into());
        stop_server(&network.backend, other.into());
    });
}

/// A next hop whose hardware address changes without a word is found again, also where its only packets are those of
/// flows that have begun: one of them leaves by the kernel's own output now and then, which verifies it.
pub fn a_silent_neighbour() {
    inside(|| {
        let (place, network) = (place(), Network::new());
        let vip = SocketAddr::from((PUBLIC, 80));
        let datapath = serve(&place, vec![public("web", &[(BACKEND, PORT).into()], &[vip])]);
        for (name, value) in
            [("delay_first_probe_time", "1"), ("retrans_time_ms", "50"), ("ucast_solicit", "1")]
        {
            std::fs::write(format!("/proc/sys/net/ipv4/neigh/in/{name}"), value).unwrap();
        }
        let received = network.backend.run(|| UdpSocket::bind((BACKEND, PORT)).unwrap());
        received.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let sent = network.client.run(|| UdpSocket::bind((CLIENT, 0)).unwrap());
        let start = Instant::now();
        let arrives = || {
            while received.recv(&mut [0; 8]).is_err() {
                assert!(start.elapsed() < LONG, "{:?}", datapath.edge_counts());
                sent.send_to(b"?", vip).unwrap();
            }
        };
        arrives();
        // As if nothing had shown for a while that the address is right.
        ip("neigh change 10.7.0.2 dev in nud stale");
        let pin = MapData::from_pin(place.pin("v3/maps/EDGE_NEIGHBOURS")).unwrap();
        let mut times: Array<_, u32> = Map::Array(pin).try_into().unwrap();
        (0..times.len()).for_each(|idx| times.set(idx, u32::MAX / 2, 0).unwrap());
        network.backend.run(|| ip("link set v1 address 02:00:00:00:00:99"));
        while received.recv(&mut [0; 8]).is_ok() {}
        arrives();
        assert_eq!(count(&datapath, "flows_begun"), 1);
    });
}

/// A client whose port is in use by flows to two VIPs at once, and one that uses its port again.
pub fn clients_reuse_ports() {
    inside(|| {
        let (place, network) = (place(), Network::new());
        let vips = [10, 11].map(|last| SocketAddr::from(([203, 0, 113, last], 80)));
        let datapath = serve(&place, vec![public("web", &[(BACKEND, PORT).into()], &vips)]);
        let listener = network.backend.run(|| TcpListener::bind((BACKEND, PORT)).unwrap());
        for _ in 0..3 {
            network.client.run(move || {
                let stream = crate::edge_room::bound_stream((CLIENT, 7_008), vips[0]);
                // It ends with a RST, so the port is free at once.
                crate::edge_room::reset(stream);
            });
        }
        assert_eq!((count(&datapath, "flows_begun"), flows(&datapath).len()), (3, 1));
        drop(listener);

        start_server(&network.backend, BACKEND.into(), 'A');
        let answers = network.client.run(move || {
            let socket = UdpSocket::bind((CLIENT, 7_007)).unwrap();
            socket.set_read_timeout(Some(LONG)).unwrap();
            vips.map(|vip| {
                socket.send_to(b"?", vip).unwrap();
                let (len, from) = socket.recv_from(&mut [0; 64]).unwrap();
                (from == vip, len)
            })
        });
        assert_eq!(answers, [(true, format!("A {SOURCE} 1").len()); 2]);
        assert_eq!(flows(&datapath).len(), 3);
        stop_server(&network.backend, BACKEND.into());
    });
}

/// A backend on the edge's own host sees the client's own address. A RST ejects it, and an answer returns it.
pub fn a_backend_is_here() {
    inside(|| {
        let (place, network) = (place(), Network::new());
        let vip = SocketAddr::from((PUBLIC, 80));
        let backend = SocketAddr::from((SOURCE, PORT));
        let datapath = serve(&place, vec![public("web", &[backend], &[vip])]);
        let (counters, indices) = (datapath.counters(), datapath.indices("web").unwrap());
        let is_ejected = || counters.ejected(indices.backends[&backend]).is_some();
        let refused = network.client.run(move || request(vip, b"?").unwrap_err().kind());
        assert_eq!((refused, is_ejected()), (ErrorKind::ConnectionRefused, true));
        start_server_here(SOURCE.into(), 'E');
        for len in [1usize, 100_000] {
            let answer = network.client.run(move || request(vip, &vec![7; len]));
            assert_eq!(answer.unwrap(), format!("E {CLIENT} {len}"));
            assert!(!is_ejected());
        }
        let answer = network.client.run(move || ask(CLIENT.into(), vip, b"?"));
        assert_eq!(answer.unwrap(), format!("E {CLIENT} 1"));
        assert_eq!(count(&datapath, "flows_begun"), 4);
        stop_server_here(SOURCE.into());
    });
}

/// Reverse-path filters, an interface that goes and comes, and one that is renamed.
pub fn interfaces_change() {
    inside(|| {
        let (place, network) = (place(), Network::new());
        let mut datapath = serve(&place, vec![web()]);
        for name in ["all", "out", "in"] {
            std::fs::write(format!("/proc/sys/net/ipv4/conf/{name}/rp_filter"), "1").unwrap();
        }
        start_server(&network.backend, BACKEND.into(), 'A');
        let vip = SocketAddr::from((PUBLIC, 80));
        let answer = |network: &Network| {
            network.client.run(move || request(vip, b"?")).map_err(|error| error.kind())
        };
        let expected = format!("A {SOURCE} 1");
        assert_eq!(answer(&network), Ok(expected.clone()));
        ip("link del in");
        datapath.fix();
        let modes = |datapath: &Datapath| {
            let interfaces = datapath.edge_status().unwrap().interfaces;
            interfaces.into_iter().map(|one| (one.name, one.mode.is_some())).collect::<Vec<_>>()
        };
        assert_eq!(modes(&datapath), [("out".to_owned(), true), ("in".to_owned(), false)]);
        network.add_in();
        datapath.fix();
        assert_eq!(modes(&datapath), [("out".to_owned(), true), ("in".to_owned(), true)]);
        assert_eq!(answer(&network), Ok(expected.clone()));

        let rename = |before: &str, after: &str| {
            ip(&format!("link set {before} down"));
            ip(&format!("link set {before} name {after}"));
            ip(&format!("link set {after} up"));
        };
        rename("out", "other");
        datapath.fix();
        assert_eq!(modes(&datapath), [("out".to_owned(), false), ("in".to_owned(), true)]);
        let n_begun = count(&datapath, "flows_begun");
        answer(&network).unwrap_err();
        assert_eq!(count(&datapath, "flows_begun"), n_begun, "by an interface of another name");
        rename("other", "out");
        datapath.fix();
        assert_eq!(modes(&datapath), [("out".to_owned(), true), ("in".to_owned(), true)]);
        assert_eq!(answer(&network), Ok(expected));
        stop_server(&network.backend, BACKEND.into());
    });
}

/// A source that the host hasn't got has no new flows; without any of an address family none of its VIPs is served.
pub fn sources_come_and_go() {
    inside(|| {
        let (place, network) = (place(), Network::new());
        let sources = ["10.7.0.77", "10.7.0.1", "fd07::77"].map(|it| it.parse().unwrap()).into();
        let mut datapath = place.start();
        datapath.configure_edge(Some(EdgeOptions { sources, ..options() }));
        let errors = datapath.apply(&table(vec![web()])).unwrap();
        assert!(errors.is_empty(), "{errors:?}");
        let status = datapath.edge_status().unwrap();
        assert_eq!((status.problems.len(), status.forwards), (2, [true, false]), "{status:?}");
        assert!(status.problems[0].contains("edge.source 10.7.0.77 is no address of this host"));
        start_server(&network.backend, BACKEND.into(), 'A');
        let vip = SocketAddr::from((PUBLIC, 80));
        let ask_all = |network: &Network| {
            let ask = move || ask(CLIENT.into(), vip, b"?").unwrap();
            network.client.run(move || (0..4).map(|_| ask()).collect::<Vec<_>>())
        };
        let seen = |ip: &str| format!("A {ip} 1");
        assert_eq!(ask_all(&network), vec![seen("10.7.0.1"); 4]);

        ip("addr add 10.7.0.77/24 dev in");
        ip("addr add fd07::77/64 dev in nodad");
        datapath.fix();
        let status = datapath.edge_status().unwrap();
        assert_eq!((status.problems.len(), status.forwards), (0, [true; 2]), "{status:?}");
        let all = ask_all(&network);
        assert!(all.contains(&seen("10.7.0.77")) && all.contains(&seen("10.7.0.1")), "{all:?}");
        stop_server(&network.backend, BACKEND.into());
    });
}

/// While connections are only counted, and after a daemon of another version has run, which doesn't keep the frontends,
/// no flow begins; those that there are go on.
pub fn no_flow_begins() {
    inside(|| {
        let (place, network) = (place(), Network::new());
        let mut datapath = serve(&place, vec![web()]);
        let listener = network.backend.run(|| TcpListener::bind((BACKEND, PORT)).unwrap());
        let vip = SocketAddr::from((PUBLIC, 80));
        let mut stream =
            network.client.run(move || TcpStream::connect_timeout(&vip, LONG).unwrap());
        let (mut accepted, _) = listener.accept().unwrap();
        accepted.set_read_timeout(Some(LONG)).unwrap();
        // The host has no route to the VIP.
        let passes = |network: &Network| {
            let connected =
                network.client.run(move || TcpStream::connect_timeout(&vip, LONG).map(drop));
            connected.is_err_and(|error| error.kind() == ErrorKind::NetworkUnreachable)
        };
        datapath.set_shadow(true);
        assert!(passes(&network));
        datapath.set_shadow(false);
        assert!(!passes(&network));
        datapath.heartbeat(None);
        const LEN: usize = size_of::<EdgeControl>();
        let pin = MapData::from_pin(place.pin("v3/maps/EDGE_CONTROL")).unwrap();
        let mut map: Array<_, [u8; LEN]> = Map::Array(pin).try_into().unwrap();
        let mut control: EdgeControl = zerocopy::transmute!(map.get(&0, 0).unwrap());
        control.settings.heartbeat_ns -= 10_000_000_000;
        let octets: [u8; LEN] = zerocopy::transmute!(control);
        map.set(0, octets, 0).unwrap();
        assert!(passes(&network));
        stream.write_all(b"on").unwrap();
        accepted.read_exact(&mut [0; 2]).unwrap();
        datapath.heartbeat(None);
        assert!(!passes(&network));
    });
}

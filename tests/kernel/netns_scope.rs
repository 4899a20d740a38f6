//! Whom the datapath is for: which network namespace, which cgroup, and for how long.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

use lb_userspace::datapath::Datapath;
use lb_userspace::table::Protocols;
use testbed::bpffs::Bpffs;

use crate::fixture::{
    Bed, Echo, OTHER_VIP, Server, VIP, ask, client, connect, connect_udp, dead, receive, service,
    ways,
};

/// The cookie of a namespace that this process isn't in.
const ANOTHER_NETNS: u64 = u64::MAX;

fn pin_of(address: SocketAddr) -> SocketAddrV4 {
    let SocketAddr::V4(address) = address else { panic!("{address} is no IPv4 address") };
    address
}

pub fn a_pin_applies_on_the_host() {
    let (server, pin) = (Server::start(b'a'), dead());
    let neighbour = Server::start(b'n');
    let mut bed = Bed::with_pin(pin);
    let mut web = service("web", VIP, &[(server.address, 1)]);
    web.pin = Some(pin);
    bed.apply(vec![web]);
    for way in ways(*pin.ip(), pin.port()) {
        assert_eq!(connect(way).unwrap(), 'a', "{way}");
    }
    assert_eq!(connect((VIP, 80)).unwrap(), 'a', "the VIP works as well");
    for way in ways(*pin.ip(), neighbour.address.port()) {
        assert_eq!(connect(way).unwrap(), 'n', "another port of the pinned address");
    }
}

pub fn a_pin_applies_to_datagrams() {
    let [server, shadowed, neighbour] = [b'a', b's', b'n'].map(Echo::start);
    let (pin, other) = (pin_of(shadowed.address), neighbour.address.port());
    let mut bed = Bed::with_pin(pin);
    let mut web = service("web", VIP, &[(server.address, 1)]);
    web.protocols = Protocols::Udp;
    web.pin = Some(pin);
    bed.apply(vec![web]);
    for way in ways(*pin.ip(), pin.port()) {
        assert_eq!(ask(&client(way), way).unwrap(), ('a', way));
        assert_eq!(connect_udp(way).unwrap(), 'a', "{way}");
    }
    for way in ways(*pin.ip(), other) {
        assert_eq!(ask(&client(way), way).unwrap(), ('n', way), "another port");
        assert_eq!(connect_udp(way).unwrap(), 'n', "another port: {way}");
    }
}

/// A pin moves to another service, in either order of their names: a socket that cached the former
/// service's backend is translated to the new one's; a socket connected to it is disconnected.
pub fn no_socket_follows_a_moved_pin() {
    for (from, to) in [("web", "api"), ("api", "web")] {
        let [former, latter] = [b'f', b'l'].map(Echo::start);
        let pin = dead();
        let mut bed = Bed::with(|options| {
            options.vip.pins.insert("web".to_owned(), pin);
        });
        let mut services = |owner: &str| {
            let of = |name, vip, server: &Echo| {
                let mut service = service(name, vip, &[(server.address, 1)]);
                service.protocols = Protocols::Both;
                service.pin = (name == owner).then_some(pin);
                service
            };
            bed.apply(vec![of(from, VIP, &former), of(to, OTHER_VIP, &latter)]);
        };
        services(from);
        let way = SocketAddr::from(pin);
        let (unconnected, connected, by_vip) = (client(way), client(way), client(way));
        assert_eq!(ask(&unconnected, way).unwrap(), ('f', way));
        connected.connect(way).unwrap();
        by_vip.connect((VIP, 80)).unwrap();
        services(to);
        assert_eq!(ask(&unconnected, way).unwrap(), ('l', way), "{from} to {to}");
        assert_eq!(connect_udp(way).unwrap(), 'l');
        let aborted = connected.recv(&mut [0]).unwrap_err();
        assert_eq!(aborted.kind(), ErrorKind::ConnectionAborted, "{from} to {to}");
        by_vip.send(b"?").unwrap();
        assert_eq!(
            receive(&by_vip).unwrap().0,
            'f',
            "{from} keeps its VIP, and who is connected to it"
        );
    }
}

pub fn a_pin_passes_elsewhere() {
    let (server, own) = (Server::start(b'a'), Server::start(b'o'));
    let own_echo = Echo::on(b'o', own.address);
    let pin = pin_of(own.address);
    let mut bed = Bed::with(|options| {
        options.host_netns = Some(ANOTHER_NETNS);
        options.vip.pins.insert("web".to_owned(), pin);
    });
    let mut web = service("web", VIP, &[(server.address, 1)]);
    web.protocols = Protocols::Both;
    web.pin = Some(pin);
    bed.apply(vec![web]);
    for way in ways(Ipv4Addr::LOCALHOST, own_echo.address.port()) {
        assert_eq!(connect(way).unwrap(), 'o', "{way}");
        assert_eq!(connect_udp(way).unwrap(), 'o', "{way}");
        assert_eq!(ask(&client(way), way).unwrap(), ('o', way));
    }
}

pub fn loopback_backends_are_the_hosts() {
    let (near, far) = (Server::start(b'n'), Server::start(b'f'));
    let (near_echo, far_echo) = (Echo::on(b'n', near.address), Echo::on(b'f', far.address));
    let mut web = service("web", VIP, &[(near_echo.address, 1), (far_echo.address, 1)]);
    web.protocols = Protocols::Both;
    web.backends[0].host_only = true;
    let mut bed = Bed::on_host(ANOTHER_NETNS);
    bed.apply(vec![web.clone()]);
    for way in ways(VIP, 80) {
        for _ in 0..32 {
            assert_eq!(connect(way).unwrap(), 'f', "{way}");
            assert_eq!(connect_udp(way).unwrap(), 'f', "{way}");
            assert_eq!(ask(&client(way), way).unwrap(), ('f', way));
        }
    }
    web.backends.truncate(1);
    bed.apply(vec![web]);
    for way in ways(VIP, 80) {
        assert_eq!(connect(way).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        assert_eq!(connect_udp(way).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        assert!(client(way).send_to(b"?", way).is_err());
    }
}

pub fn detached_is_gone() {
    let mut bed = Bed::new();
    bed.apply(vec![]);
    assert!(bed.datapath.fix().is_complete());
    assert_eq!(connect((VIP, 80)).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    bed.datapath.detach();
    let wildcard = Server::on(b'w', (Ipv4Addr::UNSPECIFIED, 0));
    assert_eq!(connect((VIP, wildcard.address.port())).unwrap(), 'w');
}

pub fn no_cgroup_is_an_error() {
    let mut options = Bed::new().options.clone();
    for (scope, fix) in [("/nonexistent", "--cgroup"), ("/tmp", "cgroup v2")] {
        let bpffs = Bpffs::new().unwrap();
        options.bpffs = bpffs.path().join("nohop");
        options.scope = scope.into();
        let error = Datapath::start(&options).unwrap_err().to_string();
        assert!(error.contains(scope) && error.contains(fix), "{error}");
        assert!(!options.bpffs.exists(), "nothing is left behind");
    }
}

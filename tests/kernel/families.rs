//! IPv4 and IPv6: which sockets reach which backends by which VIP, and what is refused.

use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use lb_userspace::datapath::{RejectMethod, ServiceCounters};
use lb_userspace::table::{Protocols, Service};
use rustix::net::sockopt::set_ipv6_v6only;
use rustix::net::{AddressFamily, SocketType, bind};

use crate::fixture::{
    Bed, Echo, OTHER_VIP, OTHER_VIP6, Server, VIP, VIP6, ask, client, connect, connect_udp, event,
    loopback, service, ways,
};

/// How a socket is used.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Use {
    Tcp,
    ConnectedUdp,
    Udp,
}

impl Use {
    pub const ALL: [Use; 3] = [Use::Tcp, Use::ConnectedUdp, Use::Udp];

    /// The letter that answers, from the address that was connected to.
    pub fn connect(self, address: SocketAddr) -> io::Result<char> {
        match self {
            Use::Tcp => {
                let stream = TcpStream::connect(address)?;
                assert_eq!(stream.peer_addr()?, address, "getpeername");
                connect(address)
            }
            Use::ConnectedUdp => connect_udp(address),
            Use::Udp => {
                let (letter, from) = ask(&client(address), address)?;
                assert_eq!(from, address, "the sender of the reply");
                Ok(letter)
            }
        }
    }

    /// Whether that is how this use of a socket is refused.
    fn is_refusal(self, error: &io::Error, refusal: RejectMethod) -> bool {
        match (self, refusal) {
            (Use::Udp, RejectMethod::PortZero) => error.kind() == ErrorKind::PermissionDenied,
            _ => error.kind() == ErrorKind::ConnectionRefused,
        }
    }
}

pub fn dual(name: &str, vip: Ipv4Addr, vip6: Ipv6Addr, backends: &[SocketAddr]) -> Service {
    let backends: Vec<_> = backends.iter().map(|&address| (address, 1)).collect();
    let one = service(name, vip, &backends);
    Service { protocols: Protocols::Both, vip6: Some(vip6), ..one }
}

/// Servers for TCP and UDP at one address, which answer with the same letter.
pub fn servers(letter: u8, on: SocketAddr) -> (Server, Echo) {
    let server = Server::on(letter, on);
    let echo = Echo::on(letter, server.address);
    (server, echo)
}

/// Every kind of socket, way of connecting and set of backends.
pub fn sockets_reach_what_their_family_can() {
    let (ipv4, _ipv4) = servers(b'4', loopback(VIP));
    let (ipv6, _ipv6) = servers(b'6', loopback(VIP6));
    let [plain, mapped] = ways(VIP, 80);
    let by_ipv6 = SocketAddr::from((VIP6, 80));
    // The backends reached by connect() of TCP, and of UDP, and by sendto(): one of each group that has
    // backends, of the first group that has some.
    let reach: [(SocketAddr, [&[&str]; 3]); 3] = [
        (plain, [&["4"], &["4"], &["4"]]),
        (mapped, [&["4", "6"], &["4", "6"], &["4"]]),
        (by_ipv6, [&["46"], &["6", "4"], &["6"]]),
    ];
    let sets = [
        ("4", vec![ipv4.address]),
        ("6", vec![ipv6.address]),
        ("46", vec![ipv4.address, ipv6.address]),
    ];
    let mut bed = Bed::with_pool6();
    let (mut n_refused, mut n_connects_refused) = (0, 0);
    for (letters, backends) in sets {
        bed.apply(vec![dual("web", VIP, VIP6, &backends)]);
        let service = bed.datapath.indices("web").unwrap().service;
        for (address, reached) in reach {
            for (how, groups) in Use::ALL.into_iter().zip(reached) {
                let of = |group: &&str| letters.chars().filter(|l| group.contains(*l)).collect();
                let groups: Vec<String> = groups.iter().map(of).collect();
                let expected = groups.into_iter().find(|group| !group.is_empty());
                let expected = expected.unwrap_or_default();
                let what = format!("{how:?} to {address}, backends {letters}");
                if expected.is_empty() {
                    let error = how.connect(address).expect_err(&what);
                    assert!(how.is_refusal(&error, bed.datapath.refusal()), "{what}: {error}");
                    n_refused += u64::from(how != Use::ConnectedUdp);
                    n_connects_refused += u64::from(how == Use::ConnectedUdp);
                } else {
                    // The chance that one of two doesn't come in 40 connections is 2^-39.
                    let mut seen: Vec<char> =
                        (0..40).map(|_| how.connect(address).expect(&what)).collect();
                    seen.sort_unstable();
                    seen.dedup();
                    assert_eq!(String::from_iter(seen), expected, "{what}");
                }
                let refused = bed.datapath.counters().service(service);
                assert_eq!((refused.refused_family, refused.refused), (n_refused, 0), "{what}");
                assert_eq!(refused.udp_connects.family, n_connects_refused, "{what}");
                assert_eq!(refused.udp_connects.no_backend, 0, "{what}");
            }
        }
    }
    assert_eq!((n_refused, n_connects_refused), (4, 1));
}

pub fn refused_by_errno() {
    refused_by(RejectMethod::Errno);
}

pub fn refused_by_port_zero() {
    refused_by(RejectMethod::PortZero);
}

/// Whatever the socket, a connection into a pool that no frontend matches is refused, and so is one of a
/// service without backends.
fn refused_by(refusal: RejectMethod) {
    // They would accept every connection that passes.
    let wildcard = Server::on(b'w', (Ipv6Addr::UNSPECIFIED, 0));
    let port = wildcard.address.port();
    let _wildcard = Echo::on(b'w', wildcard.address);
    let mut bed = Bed::with(|options| {
        options.refusal = Some(refusal);
        options.vip.pool6 = Some("fd77::/64".parse().unwrap());
    });
    let mut empty = dual("empty", VIP, VIP6, &[]);
    empty.ports = lb_userspace::table::Ports::only([port]);
    bed.apply(vec![empty]);
    let [plain, mapped] = ways(VIP, port);
    let empty = [plain, mapped, SocketAddr::from((VIP6, port))];
    let [plain, mapped] = ways(OTHER_VIP, port);
    let unassigned = [
        plain,
        mapped,
        SocketAddr::from((OTHER_VIP6, port)),
        SocketAddr::from((VIP, port ^ 1)),
        SocketAddr::from((VIP6, port ^ 1)),
    ];
    for how in Use::ALL {
        for address in empty.into_iter().chain(unassigned) {
            let error = how.connect(address).expect_err("it is refused");
            assert!(how.is_refusal(&error, refusal), "{how:?} to {address}: {error:?}");
        }
    }
    assert_eq!(event(&bed, "refused_no_frontend"), 2 * unassigned.len() as u64);
    assert_eq!(event(&bed, "udp_no_frontend"), unassigned.len() as u64);
    let service = bed.datapath.indices("empty").unwrap().service;
    let counted = bed.datapath.counters().service(service);
    assert_eq!(counted.refused, 2 * empty.len() as u64);
    assert_eq!(counted.udp_connects.no_backend, empty.len() as u64);
    let local = SocketAddr::from((Ipv6Addr::LOCALHOST, port));
    assert_eq!(Use::ALL.map(|how| how.connect(local).unwrap()), ['w'; 3], "no VIP passes");
}

/// Without a pool, an IPv6 address has no service.
pub fn without_a_pool_ipv6_passes() {
    let (server, _echo) = servers(b'a', loopback(VIP6));
    let mut bed = Bed::new();
    bed.apply(vec![service("web", VIP, &[])]);
    assert_eq!(Use::ALL.map(|how| how.connect(server.address).unwrap()), ['a'; 3]);
}

/// A plain IPv4 address and its mapped form lead to the same backends: to those at IPv4 addresses
/// while there are any, since IPv6 may not be routed where the socket is.
pub fn a_mapped_connect_stays_with_ipv4() {
    let (ipv4, _ipv4) = servers(b'4', loopback(VIP));
    let (ipv6, _ipv6) = servers(b'6', loopback(VIP6));
    let mut bed = Bed::with_pool6();
    let [_, mapped] = ways(VIP, 80);
    let by_ipv6 = SocketAddr::from((VIP6, 80));
    // The backends, each with its group; where a mapped address leads to; where UDP by an IPv6 one does.
    for (backends, by_mapped, by_udp6) in [
        ([(ipv4.address, 0), (ipv6.address, 0)].as_slice(), '4', '6'),
        (&[(ipv6.address, 0)], '6', '6'),
        (&[(ipv6.address, 0), (ipv4.address, 0)], '4', '6'),
        // A spare set of the socket's family comes before others of the first group.
        (&[(ipv6.address, 0), (ipv4.address, 1)], '4', '6'),
        (&[(ipv4.address, 0), (ipv6.address, 2)], '4', '6'),
    ] {
        let addresses: Vec<_> = backends.iter().map(|(address, _)| *address).collect();
        let mut web = dual("web", VIP, VIP6, &addresses);
        for (backend, (_, group)) in web.backends.iter_mut().zip(backends) {
            backend.group = *group;
        }
        bed.apply(vec![web]);
        for (how, address, expected) in [
            (Use::Tcp, mapped, by_mapped),
            (Use::ConnectedUdp, mapped, by_mapped),
            (Use::ConnectedUdp, by_ipv6, by_udp6),
        ] {
            for _ in 0..20 {
                let answered = how.connect(address).unwrap();
                assert_eq!(answered, expected, "{how:?} to {address}, {backends:?}");
            }
        }
    }
}

/// A socket's bound address.
#[derive(Clone, Copy, Debug)]
enum Bound {
    /// IPV6_V6ONLY.
    V6Only,
    /// `::1`
    Ipv6,
    /// `::ffff:127.0.0.1`
    Mapped,
    /// `::1`, because it is connected to it; by UDP alone.
    Connected,
}

impl Bound {
    /// Connects a socket, and returns the letter that answers.
    fn connect(self, how: Use, address: SocketAddr) -> io::Result<char> {
        let socket_type = if how == Use::Tcp { SocketType::STREAM } else { SocketType::DGRAM };
        let socket = rustix::net::socket(AddressFamily::INET6, socket_type, None)?;
        match self {
            Bound::V6Only => set_ipv6_v6only(&socket, true)?,
            Bound::Ipv6 => bind(&socket, &loopback(VIP6))?,
            Bound::Mapped => bind(&socket, &ways(Ipv4Addr::LOCALHOST, 0)[1])?,
            Bound::Connected if how == Use::Tcp => bind(&socket, &loopback(VIP6))?,
            Bound::Connected => {
                rustix::net::connect(&socket, &SocketAddr::from((Ipv6Addr::LOCALHOST, 9)))?;
            }
        }
        rustix::net::connect(&socket, &address)?;
        let mut letter = [0];
        if how == Use::Tcp {
            io::Read::read_exact(&mut TcpStream::from(socket), &mut letter)?;
        } else {
            let socket = UdpSocket::from(socket);
            socket.set_read_timeout(Some(Duration::from_secs(30)))?;
            // Before 6.1 this is what is refused.
            socket.send(b"?")?;
            socket.recv(&mut letter)?;
            assert_eq!(socket.peer_addr()?, address);
        }
        Ok(letter[0].into())
    }
}

/// A socket that can reach one family alone is sent to backends of that family; where there are
/// none it is refused, and counted as refused for its family.
pub fn sockets_bound_to_a_family_stay_in_it() {
    let (ipv4, _ipv4) = servers(b'4', loopback(VIP));
    let (ipv6, _ipv6) = servers(b'6', loopback(VIP6));
    let mut bed = Bed::with_pool6();
    let by_ipv6 = SocketAddr::from((VIP6, 80));
    let mut n_refused = 0;
    for backends in [[ipv4.address, ipv6.address].as_slice(), &[ipv4.address], &[ipv6.address]] {
        bed.apply(vec![dual("web", VIP, VIP6, backends)]);
        let service = bed.datapath.indices("web").unwrap().service;
        for (bound, reached, letter) in [
            (Bound::V6Only, ipv6.address, '6'),
            (Bound::Ipv6, ipv6.address, '6'),
            (Bound::Mapped, ipv4.address, '4'),
            (Bound::Connected, ipv6.address, '6'),
        ] {
            for how in [Use::Tcp, Use::ConnectedUdp] {
                let what = format!("{bound:?}, {how:?}, {backends:?}");
                if backends.contains(&reached) {
                    for _ in 0..12 {
                        assert_eq!(bound.connect(how, by_ipv6).expect(&what), letter, "{what}");
                    }
                } else {
                    let error = bound.connect(how, by_ipv6).expect_err(&what);
                    // Before 6.1 a program can't name the error, and no address is both within
                    // reach of a UDP socket with an IPv4 source and refused by its kernel.
                    let is_named = how == Use::Tcp
                        || !matches!(bound, Bound::Mapped)
                        || crate::running_kernel() >= (6, 1);
                    let is_refused = error.kind() == ErrorKind::ConnectionRefused;
                    assert!(is_refused || !is_named, "{what}: {error}");
                    n_refused += u64::from(how == Use::Tcp);
                }
                let counted = bed.datapath.counters().service(service);
                assert_eq!((counted.refused_family, counted.refused), (n_refused, 0), "{what}");
            }
        }
    }
    assert_eq!(n_refused, 4);
}

/// getaddrinfo(), musl and Go's resolver connect a UDP socket to each address, to see from which
/// source it is reached, and send nothing.
pub fn address_lookups_are_no_connects() {
    let (server, _echo) = servers(b'4', loopback(VIP));
    let mut bed = Bed::with_pool6();
    let [plain, mapped] = ways(VIP, 80);
    let by_ipv6 = SocketAddr::from((VIP6, 80));
    let look_up = |port: u16| {
        for mut address in [plain, mapped, by_ipv6] {
            address.set_port(port);
            // Refused or not: that makes no difference to a client that needs the source address alone.
            let _ = client(address).connect(address);
        }
    };
    let (mut n_lookups, mut n_before) = (0, 0);
    for protocols in [Protocols::Tcp, Protocols::Udp, Protocols::Both] {
        for backends in [[server.address].as_slice(), &[]] {
            let mut web = dual("web", VIP, VIP6, backends);
            web.protocols = protocols;
            bed.apply(vec![web]);
            let service = bed.datapath.indices("web").unwrap().service;
            let before = bed.datapath.counters().service(service);
            // glibc takes the service's own port, Go 9, musl 65535.
            for port in [80, 9, 65_535] {
                look_up(port);
                n_lookups += if port == 80 && protocols.udp() { 0 } else { 3 };
            }
            let after = bed.datapath.counters().service(service);
            let what = format!("{protocols:?} {backends:?}");
            let counts = |it: ServiceCounters| (it.connects, it.refused, it.refused_family);
            assert_eq!(counts(after), counts(before), "{what}");
            let connects = after.udp_connects;
            let n = connects.connects + connects.no_backend + connects.family;
            assert_eq!(n, if protocols.udp() { 3 } else { 0 } + n_before, "{what}");
            n_before = n;
            assert_eq!(event(&bed, "refused_no_frontend"), 0, "{what}");
            assert_eq!(event(&bed, "udp_no_frontend"), n_lookups, "{what}");
        }
    }
}

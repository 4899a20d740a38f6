//! IPv4 and IPv6: which sockets reach which backends by which VIP, and what is refused.

use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};

use lb_userspace::plane::Refusal;
use lb_userspace::table::{Protocols, Service};

use crate::bed::{
    Bed, Echo, OTHER_VIP, OTHER_VIP6, Server, VIP, VIP6, ask, client, dial, dial_udp, event,
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

    /// The letter that answers. It comes from where it was dialled.
    pub fn dial(self, address: SocketAddr) -> io::Result<char> {
        match self {
            Use::Tcp => {
                let stream = TcpStream::connect(address)?;
                assert_eq!(stream.peer_addr()?, address, "getpeername");
                dial(address)
            }
            Use::ConnectedUdp => dial_udp(address),
            Use::Udp => {
                let (letter, from) = ask(&client(address), address)?;
                assert_eq!(from, address, "the sender of the reply");
                Ok(letter)
            }
        }
    }

    /// Whether that is how this use of a socket is refused.
    fn is_refusal(self, error: &io::Error, refusal: Refusal) -> bool {
        match (self, refusal) {
            (Use::Udp, Refusal::PortZero) => error.kind() == ErrorKind::PermissionDenied,
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

/// Every kind of socket, way of dialling and set of backends.
pub fn sockets_reach_what_their_family_can() {
    let (ipv4, _ipv4) = servers(b'4', loopback(VIP));
    let (ipv6, _ipv6) = servers(b'6', loopback(VIP6));
    let [plain, mapped] = ways(VIP, 80);
    let by_ipv6 = SocketAddr::from((VIP6, 80));
    // What a socket can reach: by connect(), and by sendto().
    let reach = [(plain, "4", "4"), (mapped, "46", "4"), (by_ipv6, "46", "6")];
    let sets = [
        ("4", vec![ipv4.address]),
        ("6", vec![ipv6.address]),
        ("46", vec![ipv4.address, ipv6.address]),
    ];
    let mut bed = Bed::with_pool6();
    let mut n_refused = 0;
    for (letters, backends) in sets {
        bed.apply(vec![dual("web", VIP, VIP6, &backends)]);
        let service = bed.plane.indices("web").unwrap().service;
        for (address, connected, unconnected) in reach {
            for how in Use::ALL {
                let reached = if how == Use::Udp { unconnected } else { connected };
                let expected: String = letters.chars().filter(|l| reached.contains(*l)).collect();
                let what = format!("{how:?} to {address}, backends {letters}");
                if expected.is_empty() {
                    let error = how.dial(address).expect_err(&what);
                    assert!(how.is_refusal(&error, bed.plane.refusal()), "{what}: {error}");
                    n_refused += 1;
                } else {
                    // The chance that one of two doesn't come in 40 dials is 2^-39.
                    let mut seen: Vec<char> =
                        (0..40).map(|_| how.dial(address).expect(&what)).collect();
                    seen.sort_unstable();
                    seen.dedup();
                    assert_eq!(String::from_iter(seen), expected, "{what}");
                }
                let refused = bed.plane.counters().service(service);
                assert_eq!((refused.refused_family, refused.refused), (n_refused, 0), "{what}");
            }
        }
    }
    assert_eq!(n_refused, 5);
}

pub fn refused_by_errno() {
    refused_by(Refusal::Errno);
}

pub fn refused_by_port_zero() {
    refused_by(Refusal::PortZero);
}

/// Whatever the socket, a dial into a pool that no frontend matches is refused, and so is one of a
/// service without backends.
fn refused_by(refusal: Refusal) {
    // They would take whatever is let through.
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
            let error = how.dial(address).expect_err("it is refused");
            assert!(how.is_refusal(&error, refusal), "{how:?} to {address}: {error:?}");
        }
    }
    assert_eq!(event(&bed, "refused_no_frontend"), 3 * unassigned.len() as u64);
    let service = bed.plane.indices("empty").unwrap().service;
    assert_eq!(bed.plane.counters().service(service).refused, 3 * empty.len() as u64);
    let local = SocketAddr::from((Ipv6Addr::LOCALHOST, port));
    assert_eq!(Use::ALL.map(|how| how.dial(local).unwrap()), ['w'; 3], "no VIP passes");
}

/// Without a pool, an IPv6 address is nobody's.
pub fn without_a_pool_ipv6_passes() {
    let (server, _echo) = servers(b'a', loopback(VIP6));
    let mut bed = Bed::new();
    bed.apply(vec![service("web", VIP, &[])]);
    assert_eq!(Use::ALL.map(|how| how.dial(server.address).unwrap()), ['a'; 3]);
}

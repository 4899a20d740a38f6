//! Sockets that are had in other ways than most: with no memory left for what they should remember,
//! with data in their first packet, over several paths.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};

use lb_userspace::datapath::{UNITS, Unit};
use lb_userspace::table::Protocols;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketType, ipproto, sendto, socket};

use crate::fixture::{Bed, Echo, Server, VIP, ask, client, connect, event, service, ways};
use crate::in_flight::in_flight;
use crate::netns::leave;

/// Without memory for a socket's storage a connection works. One that has no record, as those by UDP and
/// without the unit `outcomes`, shows the backend's address.
pub fn connects_go_on_without_storage() {
    assert_eq!(without_storage(&UNITS[..1], false), 6);
    assert_eq!(without_storage(UNITS, true), 2);
}

/// Returns how often there was no memory.
fn without_storage(units: &'static [Unit], has_records: bool) -> u64 {
    let mut bed = Bed::with(|options| options.units = units);
    // A namespace of its own has its own limit.
    std::thread::scope(|scope| {
        let connecting = || {
            leave();
            let server = Server::start(b'a');
            let _echo = Echo::on(b'a', server.address);
            let mut web = service("web", VIP, &[(server.address, 1)]);
            web.protocols = Protocols::Both;
            bed.apply(vec![web]);
            fs::write("/proc/sys/net/core/optmem_max", "0").unwrap();
            for way in ways(VIP, 80) {
                let backend = ways(Ipv4Addr::LOCALHOST, server.address.port());
                let backend = if way.is_ipv4() { backend[0] } else { backend[1] };
                assert_eq!(connect(way).unwrap(), 'a', "{way}");
                let peer = TcpStream::connect(way).unwrap().peer_addr().unwrap();
                assert_eq!(peer, if has_records { way } else { backend }, "{way}");
                assert_eq!(ask(&client(way), way).unwrap(), ('a', backend));
            }
        };
        scope.spawn(connecting).join().unwrap();
    });
    event(&bed, "storage_alloc_failed")
}

/// sendto() with MSG_FASTOPEN connections, too.
pub fn fast_open() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let mut bed = Bed::new();
    bed.apply(vec![service("web", VIP, &[(listener.local_addr().unwrap(), 1)])]);
    for way in ways(VIP, 80) {
        let socket = socket(family(way), SocketType::STREAM, None).unwrap();
        let flags = SendFlags::from_bits_retain(libc::MSG_FASTOPEN as u32);
        assert_eq!(sendto(&socket, b"?", flags, &way), Ok(1), "{way}");
        let (mut accepted, _) = listener.accept().unwrap();
        assert_eq!(letter(&accepted), '?');
        accepted.write_all(b"a").unwrap();
        let stream = TcpStream::from(socket);
        assert_eq!(letter(&stream), 'a');
        assert_eq!(stream.peer_addr().unwrap(), way);
    }
}

/// A socket of MPTCP is made of sockets that the kernel makes.
pub const NO_MPTCP: &str = "this kernel was built without MPTCP";

pub fn mptcp() {
    let server = Server::start(b'a');
    let mut bed = Bed::new();
    bed.apply(vec![service("web", VIP, &[(server.address, 1)])]);
    for way in ways(VIP, 80) {
        let socket = match socket(family(way), SocketType::STREAM, Some(ipproto::MPTCP)) {
            Err(Errno::PROTONOSUPPORT | Errno::NOPROTOOPT) => return crate::skip(NO_MPTCP),
            socket => socket.unwrap(),
        };
        rustix::net::connect(&socket, &way).unwrap_or_else(|error| panic!("{way}: {error}"));
        let stream = TcpStream::from(socket);
        assert_eq!(letter(&stream), 'a', "{way}");
        assert!(in_flight(&bed.datapath, server.address) >= 1, "{way}: it is followed");
        // Before 5.19 no program gets from the subflow, which connects, to the socket that
        // getpeername() is asked about.
        let shows_vip = crate::running_kernel() >= (5, 19);
        assert_eq!(stream.peer_addr().unwrap() == way, shows_vip, "{way}");
    }
    assert_eq!(event(&bed, "bypassed"), 0);
}

/// An MPTCP socket may connect elsewhere after a failure; what it named before doesn't show.
pub fn mptcp_again() {
    let (server, dead) = (Server::start(b'p'), crate::fixture::dead());
    let mut bed = Bed::new();
    bed.apply(vec![service("web", VIP, &[(dead.into(), 1)])]);
    for way in ways(VIP, 80) {
        let socket = match socket(family(way), SocketType::STREAM, Some(ipproto::MPTCP)) {
            Err(Errno::PROTONOSUPPORT | Errno::NOPROTOOPT) => return crate::skip(NO_MPTCP),
            socket => socket.unwrap(),
        };
        assert_eq!(rustix::net::connect(&socket, &way), Err(Errno::CONNREFUSED));
        // The same address, now by itself.
        let listener = TcpListener::bind(dead).unwrap();
        let own = ways(*dead.ip(), dead.port())[usize::from(way.is_ipv6())];
        rustix::net::connect(&socket, &own).unwrap();
        let stream = TcpStream::from(socket);
        assert_eq!(stream.peer_addr().unwrap(), own);
        drop(listener);
    }
    assert_eq!(connect(server.address).unwrap(), 'p');
}

fn family(address: SocketAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 }
}

fn letter(mut stream: &TcpStream) -> char {
    let mut letter = [0];
    stream.read_exact(&mut letter).unwrap();
    letter[0].into()
}

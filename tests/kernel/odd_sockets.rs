//! Sockets that are had in other ways than most: with no memory left for what they should remember,
//! with data in their first packet, over several paths.

use std::fs;
use std::io::Read;
use std::net::{SocketAddr, TcpStream};

use lb_userspace::table::Protocols;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketType, ipproto, sendto, socket};

use crate::bed::{Bed, Echo, Server, VIP, ask, client, dial, event, service, ways};
use crate::disconnect::leave;

/// Without memory for a socket's storage a dial goes on, and the backend shows.
pub fn dials_go_on_without_storage() {
    let mut bed = Bed::new();
    // A namespace of its own has its own limit.
    std::thread::scope(|scope| {
        let dialling = || {
            leave();
            let server = Server::start(b'a');
            let _echo = Echo::on(b'a', server.address);
            let mut web = service("web", VIP, &[(server.address, 1)]);
            web.protocols = Protocols::Both;
            bed.apply(vec![web]);
            fs::write("/proc/sys/net/core/optmem_max", "0").unwrap();
            for way in ways(VIP, 80) {
                let backend = ways([127, 0, 0, 1].into(), server.address.port());
                let backend = if way.is_ipv4() { backend[0] } else { backend[1] };
                assert_eq!(dial(way).unwrap(), 'a', "{way}");
                let peer = TcpStream::connect(way).unwrap().peer_addr().unwrap();
                assert_eq!(peer, backend, "{way}");
                assert_eq!(ask(&client(way), way).unwrap(), ('a', backend));
            }
        };
        scope.spawn(dialling).join().unwrap();
    });
    assert_eq!(event(&bed, "no_socket_storage"), 6);
}

/// sendto() with MSG_FASTOPEN dials, too.
pub fn fast_open() {
    let server = Server::start(b'a');
    let mut bed = Bed::new();
    bed.apply(vec![service("web", VIP, &[(server.address, 1)])]);
    for way in ways(VIP, 80) {
        let socket = socket(family(way), SocketType::STREAM, None).unwrap();
        let flags = SendFlags::from_bits_retain(libc::MSG_FASTOPEN as u32);
        assert_eq!(sendto(&socket, b"?", flags, &way), Ok(1), "{way}");
        let stream = TcpStream::from(socket);
        // sendto() doesn't wait for the connection.
        assert_eq!(letter(&stream), 'a');
        assert_eq!(stream.peer_addr().unwrap(), way);
    }
}

/// A socket of MPTCP is made of sockets that the kernel makes.
pub fn mptcp() {
    let server = Server::start(b'a');
    let mut bed = Bed::new();
    bed.apply(vec![service("web", VIP, &[(server.address, 1)])]);
    for way in ways(VIP, 80) {
        let socket = match socket(family(way), SocketType::STREAM, Some(ipproto::MPTCP)) {
            Err(Errno::PROTONOSUPPORT | Errno::NOPROTOOPT) => return, // this kernel was built without
            socket => socket.unwrap(),
        };
        rustix::net::connect(&socket, &way).unwrap_or_else(|error| panic!("{way}: {error}"));
        assert_eq!(letter(&TcpStream::from(socket)), 'a', "{way}");
    }
    assert_eq!(event(&bed, "left_alone"), 0);
}

fn family(address: SocketAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 }
}

fn letter(mut stream: &TcpStream) -> char {
    let mut letter = [0];
    stream.read_exact(&mut letter).unwrap();
    letter[0].into()
}

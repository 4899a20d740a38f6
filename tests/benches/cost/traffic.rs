//! Connections and datagrams of applications.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, SocketAddrV6, TcpStream, UdpSocket};

use rustix::net::{AddressFamily, SocketType, connect, socket};

/// Connects each address once, on a socket of its own. Whether anybody answers doesn't matter, but no
/// program may forbid it.
pub fn connect_each(addresses: impl Iterator<Item = SocketAddrV4>) {
    for address in addresses {
        let refusal = TcpStream::connect(address).map_err(|error| error.kind()).err();
        assert_ne!(refusal, Some(ErrorKind::PermissionDenied), "{address}");
    }
}

/// The same from IPv6 sockets, which connect `::ffff:a.b.c.d`.
pub fn connect_mapped(addresses: impl Iterator<Item = SocketAddrV4>) {
    let mapped = |address: SocketAddrV4| {
        SocketAddrV6::new(address.ip().to_ipv6_mapped(), address.port(), 0, 0)
    };
    addresses.for_each(|address| drop(TcpStream::connect(mapped(address))));
}

/// Connects an address that refuses, again and again on one socket.
pub fn reconnect(address: SocketAddrV4, n_connects: usize) {
    let socket = socket(AddressFamily::INET, SocketType::STREAM, None).expect("a socket");
    for _ in 0..n_connects {
        let refused = connect(&socket, &address);
        assert_eq!(refused, Err(rustix::io::Errno::CONNREFUSED));
    }
}

/// Calls getpeername() of a connected socket.
pub fn ask(address: SocketAddrV4, n_calls: usize) {
    let stream = TcpStream::connect(address).expect("a server answers");
    for _ in 0..n_calls {
        assert_eq!(stream.peer_addr().ok(), Some(SocketAddr::V4(address)));
    }
}

/// Sends datagrams from one socket that isn't connected, each of which `echo` sends back.
pub fn exchange(address: SocketAddrV4, echo: &UdpSocket, n_datagrams: usize) {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a socket");
    let mut datagram = [7];
    for _ in 0..n_datagrams {
        socket.send_to(&datagram, address).expect("it is sent");
        let (_, sender) = echo.recv_from(&mut datagram).expect("it came");
        echo.send_to(&datagram, sender).expect("it is sent back");
        let (_, sender) = socket.recv_from(&mut datagram).expect("it came back");
        assert_eq!(sender, SocketAddr::V4(address));
    }
}

/// Looks a name up at a DNS server from one socket.
pub fn look_up(name: &str, server: SocketAddrV4, n_queries: usize) {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a socket");
    socket.connect(server).expect("it is connected");
    let mut query = vec![7, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        query.push(label.len() as u8);
        query.extend(label.bytes());
    }
    query.extend([0, 0, 1, 0, 1]);
    let mut answer = [0; 512];
    for _ in 0..n_queries {
        socket.send(&query).expect("it is sent");
        let len = socket.recv(&mut answer).expect("an answer");
        assert_eq!((answer[3] & 15, answer[7]), (0, 1), "an address, in {:?}", &answer[..len]);
    }
}

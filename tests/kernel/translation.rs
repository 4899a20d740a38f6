//! The translation of a connection, and the application's view of it.

use std::collections::BTreeMap;
use std::net::{SocketAddr, SocketAddrV4, TcpStream};

use rustix::net::{AddressFamily, SocketType};

use crate::fixture::{Bed, Server, VIP, connect, dead, n_connects, service};

pub fn a_connect_reaches_a_backend() {
    let server = Server::start(b'a');
    let mut bed = Bed::new();
    bed.apply(vec![service("web", VIP, &[(server.address, 1)])]);
    let stream = TcpStream::connect((VIP, 80)).unwrap();
    assert_eq!(stream.peer_addr().unwrap(), SocketAddr::from((VIP, 80)), "getpeername");
    assert_eq!(connect((VIP, 80)).unwrap(), 'a');
}

pub fn weights_are_shares() {
    let servers = [b'a', b'b', b'c'].map(Server::start);
    let mut bed = Bed::new();
    let backends: Vec<_> = servers.iter().map(|server| server.address).zip([1, 2, 5]).collect();
    bed.apply(vec![service("web", VIP, &backends)]);
    let mut n_answers = BTreeMap::<char, u32>::new();
    let n_connects = n_connects() as u32;
    for _ in 0..n_connects {
        *n_answers.entry(connect((VIP, 80)).unwrap()).or_default() += 1;
    }
    // Of the binomial distribution, 5 standard deviations where they are largest, at one half.
    let tolerance = (5.0 * f64::from(n_connects).sqrt() / 2.0) as u32;
    for (letter, share) in [('a', 1), ('b', 2), ('c', 5)] {
        let (n, expected) = (n_answers[&letter], n_connects * share / 8);
        let off = n.abs_diff(expected);
        assert!(off < tolerance, "{letter}: {n} of {n_connects}, expected {expected}");
    }
}

/// A socket may connect to again after a failure; what it connected before mustn't show.
pub fn an_earlier_peer_is_cleared() {
    let (server, dead) = (Server::start(b'p'), dead());
    let mut bed = Bed::new();
    bed.apply(vec![service("web", VIP, &[(dead.into(), 1)])]);
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    let refused = rustix::net::connect(&socket, &SocketAddrV4::new(VIP, 80));
    assert_eq!(refused, Err(rustix::io::Errno::CONNREFUSED));
    rustix::net::connect(&socket, &server.address).unwrap();
    let peer = TcpStream::from(socket).peer_addr().unwrap();
    assert_eq!(peer, server.address);
}

pub fn other_addresses_pass() {
    let server = Server::start(b'p');
    let mut bed = Bed::new();
    bed.apply(vec![service("web", VIP, &[(dead().into(), 1)])]);
    let stream = TcpStream::connect(server.address).unwrap();
    assert_eq!(stream.peer_addr().unwrap(), server.address);
    assert_eq!(connect(server.address).unwrap(), 'p');
}

pub fn connects_are_counted() {
    let server = Server::start(b'a');
    let mut bed = Bed::new();
    bed.apply(vec![service("web", VIP, &[(server.address, 1)])]);
    for _ in 0..7 {
        connect((VIP, 80)).unwrap();
    }
    let (counters, indices) = (bed.datapath.counters(), bed.datapath.indices("web").unwrap());
    let stats = counters.service(indices.service);
    assert_eq!((stats.connects, stats.refused), (7, 0));
    assert_eq!(counters.backend_connects(indices.backends[&server.address]), 7);
}

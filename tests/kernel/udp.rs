//! Datagrams: where they go, whom their replies come from, and what a change of the table does to
//! sockets that live on.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use lb_userspace::table::{Protocols, Service};
use rustix::net::connect_unspec;

use crate::bed::{
    Bed, Echo, OTHER_VIP, VIP, VIP6, ask, client, dial_udp, event, hear, loopback, service, ways,
};

/// A service that is dialled by UDP at port 80.
fn udp_service(name: &str, vip: Ipv4Addr, servers: &[SocketAddr]) -> Service {
    let backends: Vec<_> = servers.iter().map(|&address| (address, 1)).collect();
    Service { protocols: Protocols::Udp, ..service(name, vip, &backends) }
}

/// A socket that a trial answers from by hand.
fn server(family_of: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind(loopback(family_of.ip())).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    socket
}

fn address(socket: &UdpSocket) -> SocketAddr {
    socket.local_addr().unwrap()
}

pub fn datagrams_reach_a_backend() {
    let server = Echo::start(b'a');
    let mut bed = Bed::new();
    bed.apply(vec![udp_service("web", VIP, &[server.address])]);
    for way in ways(VIP, 80) {
        assert_eq!(dial_udp(way).unwrap(), 'a', "{way}");
        let unconnected = client(way);
        assert_eq!(ask(&unconnected, way).unwrap(), ('a', way));
        assert_eq!(unconnected.peer_addr().unwrap_err().kind(), ErrorKind::NotConnected);
    }
    let direct = client(server.address);
    assert_eq!(ask(&direct, server.address).unwrap(), ('a', server.address), "no VIP passes");
}

/// 200 datagrams to each of four VIPs, in turns, over one socket.
pub fn a_socket_keeps_its_backends() {
    // Each VIP has four backends of its own.
    let servers: Vec<Echo> = (b'a'..b'q').map(Echo::start).collect();
    let addresses: Vec<_> = servers.iter().map(|server| server.address).collect();
    let vips = [1, 2, 3, 4].map(|last| Ipv4Addr::new(127, 200, 0, last));
    for way_of in [0, 1] {
        let mut bed = Bed::new();
        let names = ["one", "two", "three", "four"];
        let services = names.into_iter().zip(vips).zip(addresses.chunks(4));
        bed.apply(services.map(|((name, vip), of)| udp_service(name, vip, of)).collect());
        let vips = vips.map(|vip| ways(vip, 80)[way_of]);
        let socket = client(vips[0]);
        let first: Vec<char> = vips.map(|vip| ask(&socket, vip).unwrap().0).to_vec();
        for _ in 1..200 {
            for (vip, first) in vips.into_iter().zip(&first) {
                assert_eq!(ask(&socket, vip).unwrap(), (*first, vip));
            }
        }
        for name in names {
            let service = bed.plane.indices(name).unwrap().service;
            assert_eq!(bed.plane.counters().service(service).dials, 1, "{name}");
        }
    }
}

pub fn a_datagram_after_a_departure_goes_elsewhere() {
    for way in ways(VIP, 80).into_iter().chain([SocketAddr::from((VIP6, 80))]) {
        let family_of = if way.ip().to_canonical().is_ipv4() { ways(VIP, 80)[0] } else { way };
        let [former, present] = [(); 2].map(|()| server(family_of));
        let mut bed = Bed::with_pool6();
        let apply = |bed: &mut Bed, server: &UdpSocket| {
            let mut web = udp_service("web", VIP, &[address(server)]);
            web.vip6 = Some(VIP6);
            bed.apply(vec![web]);
        };
        apply(&mut bed, &former);
        let socket = client(way);
        let mut buffer = [0];
        socket.send_to(b"1", way).unwrap();
        let (_, at_former) = former.recv_from(&mut buffer).unwrap();
        apply(&mut bed, &present);
        socket.send_to(b"2", way).unwrap();
        let (_, at_present) = present.recv_from(&mut buffer).unwrap();
        former.send_to(b"f", at_former).unwrap();
        assert_eq!(hear(&socket).unwrap(), ('f', way), "a late reply");
        present.send_to(b"p", at_present).unwrap();
        assert_eq!(hear(&socket).unwrap(), ('p', way));
        assert_eq!(event(&bed, "backend_gone"), 1);
    }
}

const OTHER_VIP_80: SocketAddr = SocketAddr::V4(SocketAddrV4::new(OTHER_VIP, 80));

pub fn sockets_of_a_backend_that_left_are_disconnected() {
    let dialled = ways(VIP, 80).into_iter().chain([SocketAddr::from((VIP6, 80))]);
    for (way, on) in dialled.zip([loopback(VIP), loopback(VIP), loopback(VIP6)]) {
        let [former, present] = [Echo::on(b'f', on), Echo::on(b'p', on)];
        let mut bed = Bed::with_pool6();
        let mut web = udp_service("web", VIP, &[former.address]);
        web.vip6 = Some(VIP6);
        // The same backend, of a service that keeps it.
        let other = udp_service("other", OTHER_VIP, &[former.address]);
        bed.apply(vec![web.clone(), other.clone()]);

        let [socket, direct] = [client(way), client(former.address)];
        socket.connect(way).unwrap();
        direct.connect(former.address).unwrap();
        let beside = on.is_ipv4().then(|| {
            let socket = client(OTHER_VIP_80);
            socket.connect(OTHER_VIP_80).unwrap();
            socket
        });

        web.backends = udp_service("web", VIP, &[present.address]).backends;
        bed.apply(vec![web, other]);
        let aborted = socket.recv(&mut [0]).unwrap_err();
        assert_eq!(aborted.kind(), ErrorKind::ConnectionAborted, "{way}: {aborted}");
        for (socket, from) in [(Some(&direct), former.address), (beside.as_ref(), OTHER_VIP_80)] {
            let Some(socket) = socket else { continue };
            socket.send(b"?").unwrap();
            assert_eq!(hear(socket).unwrap(), ('f', from), "another socket stays connected");
        }
        socket.connect(way).unwrap();
        socket.send(b"?").unwrap();
        assert_eq!(hear(&socket).unwrap(), ('p', way));
        assert_eq!(socket.peer_addr().unwrap(), way);
    }
}

/// What a socket did before mustn't show in what it does next.
pub fn a_socket_that_goes_elsewhere_tells_the_truth() {
    let backend = Echo::start(b'b');
    let neighbour = Echo::start(b'n');
    let mut bed = Bed::new();
    bed.apply(vec![udp_service("web", VIP, &[backend.address])]);
    for (way_of, way) in ways(VIP, 80).into_iter().enumerate() {
        let as_is = |server: &Echo| ways(Ipv4Addr::LOCALHOST, server.address.port())[way_of];
        let (backend, neighbour) = (as_is(&backend), as_is(&neighbour));

        let dissolved = client(way);
        dissolved.connect(way).unwrap();
        dissolved.send(b"?").unwrap();
        assert_eq!(hear(&dissolved).unwrap(), ('b', way));
        connect_unspec(&dissolved).unwrap();
        assert_eq!(dissolved.peer_addr().unwrap_err().kind(), ErrorKind::NotConnected);
        assert_eq!(ask(&dissolved, neighbour).unwrap(), ('n', neighbour));
        assert_eq!(ask(&dissolved, backend).unwrap(), ('b', backend), "dialled by itself");
        assert_eq!(ask(&dissolved, way).unwrap(), ('b', way));

        for (elsewhere, letter) in [(neighbour, 'n'), (backend, 'b')] {
            let connected = client(way);
            connected.connect(way).unwrap();
            connected.connect(elsewhere).unwrap();
            assert_eq!(connected.peer_addr().unwrap(), elsewhere);
            connected.send(b"?").unwrap();
            assert_eq!(hear(&connected).unwrap(), (letter, elsewhere));

            let was_unconnected = client(way);
            assert_eq!(ask(&was_unconnected, way).unwrap(), ('b', way));
            was_unconnected.connect(elsewhere).unwrap();
            was_unconnected.send(b"?").unwrap();
            assert_eq!(hear(&was_unconnected).unwrap(), (letter, elsewhere));
            assert_eq!(was_unconnected.peer_addr().unwrap(), elsewhere);
        }
    }
}

/// A datagram that was answered before the socket was connected, and is read after.
pub fn a_reply_from_before_the_connection_comes_from_its_vip() {
    for way in ways(VIP, 80) {
        let [first, second] = [(); 2].map(|()| server(ways(VIP, 80)[0]));
        let mut bed = Bed::new();
        bed.apply(vec![
            udp_service("first", VIP, &[address(&first)]),
            udp_service("second", OTHER_VIP, &[address(&second)]),
        ]);
        let other = if way.is_ipv4() { ways(OTHER_VIP, 80)[0] } else { ways(OTHER_VIP, 80)[1] };
        let socket = client(way);
        socket.send_to(b"?", way).unwrap();
        let (_, sender) = first.recv_from(&mut [0]).unwrap();
        first.send_to(b"1", sender).unwrap();
        socket.connect(other).unwrap();
        assert_eq!(hear(&socket).unwrap(), ('1', way));
        assert_eq!(socket.peer_addr().unwrap(), other);
    }
}

const N_DATAGRAMS: usize = 1_000;

/// Threads that send on one socket, each to a VIP of its own, while the backends of all of them are
/// replaced again and again.
pub fn threads_on_one_socket_never_mix() {
    let letters = [*b"aA", *b"bB", *b"cC", *b"dD"];
    let servers = letters.map(|letters| letters.map(Echo::start));
    let vips = [1, 2, 3, 4].map(|last| Ipv4Addr::new(127, 200, 0, last));
    for way_of in [0, 1] {
        let mut bed = Bed::new();
        let mut apply = |n: usize| {
            let services = vips.into_iter().zip(&servers);
            let services = services.map(|(vip, servers)| {
                udp_service(&vip.to_string(), vip, &[servers[n % 2].address])
            });
            bed.apply(services.collect());
        };
        apply(0);
        let ways = vips.map(|vip| ways(vip, 80)[way_of]);
        let socket = &client(ways[0]);
        let done = &AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (tells, told): (Vec<_>, Vec<_>) = ways.map(|_| mpsc::channel()).into_iter().unzip();
            let sending = ways.into_iter().zip(told).map(|(way, told)| {
                scope.spawn(move || {
                    for _ in 0..N_DATAGRAMS {
                        socket.send_to(b"?", way).unwrap();
                        told.recv().expect("each datagram is answered");
                    }
                })
            });
            let sending: Vec<_> = sending.collect();
            let hearing = scope.spawn(move || {
                for n in 0..N_DATAGRAMS * 4 {
                    let (letter, from) = hear(socket).unwrap();
                    let vip = ways.iter().position(|way| *way == from);
                    let vip = vip.unwrap_or_else(|| panic!("reply {n} comes from {from}"));
                    let of_vip = letters[vip].map(char::from);
                    assert!(of_vip.contains(&letter), "reply {n}: {letter} comes from {from}");
                    tells[vip].send(()).unwrap();
                }
            });
            let changing = scope.spawn(move || {
                let mut n_changes = 0;
                while !done.load(Ordering::Relaxed) {
                    n_changes += 1;
                    apply(n_changes);
                }
            });
            let heard = hearing.join();
            done.store(true, Ordering::Relaxed);
            changing.join().unwrap();
            heard.unwrap();
            sending.into_iter().for_each(|thread| thread.join().unwrap());
        });
    }
}

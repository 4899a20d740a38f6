//! Datagrams: their backends, the sources of their replies, and the effect of a table's change on
//! existing sockets.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use lb_userspace::table::{Protocols, Service};
use rustix::event::{PollFd, PollFlags};
use rustix::net::connect_unspec;

use crate::disconnect::bpf;
use crate::fixture::{
    Bed, Echo, OTHER_VIP, OTHER_VIP6, VIP, VIP6, ask, client, connect_udp, event, loopback,
    receive, service, ways,
};

/// A service that is connected to by UDP at port 80.
fn udp_service(name: &str, vip: Ipv4Addr, servers: &[SocketAddr]) -> Service {
    let backends: Vec<_> = servers.iter().map(|&address| (address, 1)).collect();
    Service { protocols: Protocols::Udp, ..service(name, vip, &backends) }
}

/// A socket that a trial answers from by hand.
fn server(family_of: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind(loopback(family_of.ip())).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
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
        assert_eq!(connect_udp(way).unwrap(), 'a', "{way}");
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
            let service = bed.datapath.indices(name).unwrap().service;
            assert_eq!(bed.datapath.counters().service(service).connects, 1, "{name}");
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
        assert_eq!(receive(&socket).unwrap(), ('f', way), "a late reply");
        present.send_to(b"p", at_present).unwrap();
        assert_eq!(receive(&socket).unwrap(), ('p', way));
        assert_eq!(event(&bed, "stale_backend"), 1);
    }
}

const OTHER_VIP_80: SocketAddr = SocketAddr::V4(SocketAddrV4::new(OTHER_VIP, 80));

pub fn sockets_of_a_backend_that_left_are_disconnected() {
    let connected = ways(VIP, 80).into_iter().chain([SocketAddr::from((VIP6, 80))]);
    for (way, on) in connected.zip([loopback(VIP), loopback(VIP), loopback(VIP6)]) {
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
            assert_eq!(receive(socket).unwrap(), ('f', from), "another socket stays connected");
        }
        socket.connect(way).unwrap();
        socket.send(b"?").unwrap();
        assert_eq!(receive(&socket).unwrap(), ('p', way));
        assert_eq!(socket.peer_addr().unwrap(), way);
    }
}

/// A socket's earlier use doesn't affect its next.
pub fn a_socket_that_goes_elsewhere_names_its_peer() {
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
        assert_eq!(receive(&dissolved).unwrap(), ('b', way));
        connect_unspec(&dissolved).unwrap();
        assert_eq!(dissolved.peer_addr().unwrap_err().kind(), ErrorKind::NotConnected);
        assert_eq!(ask(&dissolved, neighbour).unwrap(), ('n', neighbour));
        assert_eq!(ask(&dissolved, backend).unwrap(), ('b', backend), "connected by itself");
        assert_eq!(ask(&dissolved, way).unwrap(), ('b', way));

        for (elsewhere, letter) in [(neighbour, 'n'), (backend, 'b')] {
            let connected = client(way);
            connected.connect(way).unwrap();
            connected.connect(elsewhere).unwrap();
            assert_eq!(connected.peer_addr().unwrap(), elsewhere);
            connected.send(b"?").unwrap();
            assert_eq!(receive(&connected).unwrap(), (letter, elsewhere));

            let was_unconnected = client(way);
            assert_eq!(ask(&was_unconnected, way).unwrap(), ('b', way));
            was_unconnected.connect(elsewhere).unwrap();
            was_unconnected.send(b"?").unwrap();
            assert_eq!(receive(&was_unconnected).unwrap(), (letter, elsewhere));
            assert_eq!(was_unconnected.peer_addr().unwrap(), elsewhere);
        }
    }
}

/// A reply that is read after the socket was disconnected, and one to a datagram that was sent then.
pub fn a_reply_from_before_a_disconnection_comes_from_its_vip() {
    for way in ways(VIP, 80).into_iter().chain([SocketAddr::from((VIP6, 80))]) {
        let is_ipv4 = way.ip().to_canonical().is_ipv4();
        let backend = server(if is_ipv4 { ways(VIP, 80)[0] } else { way });
        let mut bed = Bed::with_pool6();
        let mut web = udp_service("web", VIP, &[address(&backend)]);
        web.vip6 = Some(VIP6);
        let mut other = udp_service("other", OTHER_VIP, &[address(&backend)]);
        other.vip6 = Some(OTHER_VIP6);
        bed.apply(vec![web, other]);
        let (direct, other) = match way {
            SocketAddr::V4(_) => (address(&backend), ways(OTHER_VIP, 80)[0]),
            _ if is_ipv4 => {
                let port = address(&backend).port();
                (ways(Ipv4Addr::LOCALHOST, port)[1], ways(OTHER_VIP, 80)[1])
            }
            _ => (address(&backend), SocketAddr::from((OTHER_VIP6, 80))),
        };
        let answer = || {
            let (_, sender) = backend.recv_from(&mut [0]).unwrap();
            backend.send_to(b"b", sender).unwrap();
        };
        let socket = client(way);
        for (named, has_flows) in [(way, false), (direct, false), (way, true), (other, true)] {
            if has_flows {
                socket.send_to(b"?", other).unwrap();
                answer();
                assert_eq!(receive(&socket).unwrap(), ('b', other));
            }
            socket.connect(named).unwrap();
            socket.send(b"?").unwrap();
            answer();
            connect_unspec(&socket).unwrap();
            assert_eq!(receive(&socket).unwrap(), ('b', named), "{way}");
            socket.send_to(b"?", direct).unwrap();
            answer();
            assert_eq!(receive(&socket).unwrap(), ('b', direct), "{way}");
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
        assert_eq!(receive(&socket).unwrap(), ('1', way));
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
            let (permits, permitted): (Vec<_>, Vec<_>) =
                ways.map(|_| mpsc::channel()).into_iter().unzip();
            let sending = ways.into_iter().zip(permitted).map(|(way, permitted)| {
                scope.spawn(move || {
                    for _ in 0..N_DATAGRAMS {
                        socket.send_to(b"?", way).unwrap();
                        permitted.recv().expect("each datagram is answered");
                    }
                })
            });
            let sending: Vec<_> = sending.collect();
            let receiving = scope.spawn(move || {
                for n in 0..N_DATAGRAMS * 4 {
                    let (letter, from) = receive(socket).unwrap();
                    let vip = ways.iter().position(|way| *way == from);
                    let vip = vip.unwrap_or_else(|| panic!("reply {n} comes from {from}"));
                    let of_vip = letters[vip].map(char::from);
                    assert!(of_vip.contains(&letter), "reply {n}: {letter} comes from {from}");
                    permits[vip].send(()).unwrap();
                }
            });
            let changing = scope.spawn(move || {
                let mut n_changes = 0;
                while !done.load(Ordering::Relaxed) {
                    n_changes += 1;
                    apply(n_changes);
                }
            });
            let received = receiving.join();
            done.store(true, Ordering::Relaxed);
            changing.join().unwrap();
            received.unwrap();
            sending.into_iter().for_each(|thread| thread.join().unwrap());
        });
    }
}

/// The kernel takes an address although the socket is connected: what goes to the VIP that it is
/// connected to follows the connection.
pub fn a_connected_socket_that_names_its_vip_follows_its_connection() {
    let servers = [b'a', b'b', b'c', b'd'].map(Echo::start);
    let servers6 = [b'e', b'f', b'g', b'h'].map(|letter| Echo::on(letter, loopback(VIP6)));
    let addresses: Vec<_> = servers.iter().chain(&servers6).map(|server| server.address).collect();
    let mut bed = Bed::with_pool6();
    let mut web = udp_service("web", VIP, &addresses);
    web.vip6 = Some(VIP6);
    let mut other = udp_service("other", OTHER_VIP, &addresses);
    other.vip6 = Some(OTHER_VIP6);
    bed.apply(vec![web, other]);
    let others = ways(OTHER_VIP, 80).into_iter().chain([SocketAddr::from((OTHER_VIP6, 80))]);
    for (way, other) in ways(VIP, 80).into_iter().chain([SocketAddr::from((VIP6, 80))]).zip(others)
    {
        // The chance that each is right by accident is 4^-16.
        for _ in 0..16 {
            let socket = client(way);
            socket.connect(way).unwrap();
            socket.send(b"?").unwrap();
            let (letter, from) = receive(&socket).unwrap();
            assert_eq!(from, way);
            for _ in 0..2 {
                // A datagram to another VIP goes there, and its reply is from that VIP.
                socket.send_to(b"?", other).unwrap();
                assert_eq!(ask(&socket, way).unwrap(), (letter, way), "{way}");
                socket.send(b"?").unwrap();
                assert_eq!(receive(&socket).unwrap(), (letter, way), "{way}");
            }
            // The flows that a socket had before give way to the connection.
            let socket = client(way);
            assert_eq!(ask(&socket, way).unwrap().1, way);
            assert_eq!(ask(&socket, other).unwrap().1, other);
            socket.connect(other).unwrap();
            socket.send(b"?").unwrap();
            let (letter, from) = receive(&socket).unwrap();
            assert_eq!(from, other);
            assert_eq!(ask(&socket, other).unwrap(), (letter, other), "not the earlier flow");
            connect_unspec(&socket).unwrap();
            assert_eq!(ask(&socket, way).unwrap().1, way, "a flow again");
        }
    }
}

/// A connect() that fails leaves the kernel's association as it was, and so its name.
pub fn a_connect_that_fails_changes_nothing() {
    // Not to be connected to without SO_BROADCAST; and no address of IPv6 without its interface.
    let unusable = SocketAddr::from(([255, 255, 255, 255], 9));
    let unusable6 = SocketAddr::from((Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1), 9));
    for way in ways(VIP, 80).into_iter().chain([SocketAddr::from((VIP6, 80))]) {
        let is_ipv4 = way.ip().to_canonical().is_ipv4();
        let on = if is_ipv4 { loopback(VIP) } else { loopback(VIP6) };
        let [server, second, present] = [b'a', b'b', b'p'].map(|letter| Echo::on(letter, on));
        let mut bed = Bed::with_pool6();
        let service = |nth: u16, servers: &[SocketAddr]| {
            let vip = Ipv4Addr::new(127, 200, 0, nth as u8);
            let mut service = udp_service(&format!("s{nth}"), vip, servers);
            service.vip6 = Some(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, nth));
            service
        };
        let vip = |nth: u16| match way {
            SocketAddr::V4(_) => ways(Ipv4Addr::new(127, 200, 0, nth as u8), 80)[0],
            _ if is_ipv4 => ways(Ipv4Addr::new(127, 200, 0, nth as u8), 80)[1],
            _ => SocketAddr::from((Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, nth), 80)),
        };
        assert_eq!(vip(1), way);
        let far = if is_ipv4 { unusable } else { unusable6 };
        let services = vec![
            service(1, &[server.address]),
            service(2, &[far]),
            service(3, &[]),
            service(4, &[second.address]),
        ];
        bed.apply(services.clone());
        let as_named = |address: SocketAddr| match (address, way) {
            (SocketAddr::V4(address), SocketAddr::V6(_)) => ways(*address.ip(), address.port())[1],
            (address, _) => address,
        };
        let by_errno = bed.datapath.refusal() == lb_userspace::datapath::RejectMethod::Errno;
        // Before 6.1 a connect() that is refused leads to port 0, and succeeds.
        let failing = [Some(vip(2)), by_errno.then_some(vip(3)), Some(as_named(far))];
        for failing in failing.into_iter().flatten() {
            let socket = client(way);
            let is_connected_to = |named: SocketAddr, letter: char| {
                let what = format!("{way}, after a connect() to {failing}");
                assert_eq!(socket.peer_addr().unwrap(), named, "{what}");
                socket.send(b"?").unwrap();
                assert_eq!(receive(&socket).unwrap(), (letter, named), "{what}");
                assert_eq!(ask(&socket, named).unwrap(), (letter, named), "{what}");
            };
            let fail = || {
                socket.connect(failing).expect_err("it can't be connected to");
            };
            socket.connect(way).unwrap();
            fail();
            is_connected_to(way, 'a');
            fail();
            fail();
            is_connected_to(way, 'a');
            socket.connect(vip(4)).unwrap();
            is_connected_to(vip(4), 'b');
            fail();
            is_connected_to(vip(4), 'b');
            // A backend that it connected to directly keeps its own address.
            socket.connect(as_named(server.address)).unwrap();
            is_connected_to(as_named(server.address), 'a');
            fail();
            is_connected_to(as_named(server.address), 'a');
            socket.connect(way).unwrap();
            fail();
            // The backend leaves, and takes the connection with it.
            let mut services = services.clone();
            services[0] = service(1, &[present.address]);
            bed.apply(services.clone());
            let aborted = socket.recv(&mut [0]).unwrap_err();
            assert_eq!(aborted.kind(), ErrorKind::ConnectionAborted, "{way}: {aborted}");
            socket.connect(way).unwrap();
            is_connected_to(way, 'p');
            services[0] = service(1, &[server.address]);
            bed.apply(services);
        }
    }
}

/// An answer from before a socket was connected elsewhere, which is read after that.
pub fn a_reply_from_before_a_second_connect_comes_from_its_vip() {
    for way_of in [0, 1] {
        let [first, second] = [(); 2].map(|()| server(ways(VIP, 80)[0]));
        let mut bed = Bed::new();
        bed.apply(vec![
            udp_service("first", VIP, &[address(&first)]),
            udp_service("second", OTHER_VIP, &[address(&second)]),
        ]);
        let (way, other) = (ways(VIP, 80)[way_of], ways(OTHER_VIP, 80)[way_of]);
        let socket = client(way);
        socket.connect(way).unwrap();
        socket.send(b"?").unwrap();
        let (_, sender) = first.recv_from(&mut [0]).unwrap();
        first.send_to(b"1", sender).unwrap();
        socket.connect(other).unwrap();
        assert_eq!(receive(&socket).unwrap(), ('1', way));
        assert_eq!(socket.peer_addr().unwrap(), other);
    }
}

/// The last datagram to an address decides the source of its replies.
pub fn a_direct_datagram_is_answered_by_its_own_name() {
    for way in ways(VIP, 80).into_iter().chain([SocketAddr::from((VIP6, 80))]) {
        let is_ipv4 = way.ip().to_canonical().is_ipv4();
        let backend = Echo::on(b'b', if is_ipv4 { loopback(VIP) } else { loopback(VIP6) });
        let mut bed = Bed::with_pool6();
        let mut web = udp_service("web", VIP, &[backend.address]);
        web.vip6 = Some(VIP6);
        let mut other = udp_service("other", OTHER_VIP, &[backend.address]);
        other.vip6 = Some(OTHER_VIP6);
        bed.apply(vec![web, other]);
        let (direct, other) = match way {
            SocketAddr::V4(_) => (backend.address, ways(OTHER_VIP, 80)[0]),
            _ if is_ipv4 => {
                let port = backend.address.port();
                (ways(Ipv4Addr::LOCALHOST, port)[1], ways(OTHER_VIP, 80)[1])
            }
            _ => (backend.address, SocketAddr::from((OTHER_VIP6, 80))),
        };
        let socket = client(way);
        for named in
            [way, direct, direct, way, direct, other, direct, way, other, way, other, direct, other]
        {
            assert_eq!(ask(&socket, named).unwrap(), ('b', named), "{way}");
        }
        // As connected, too, and after it.
        socket.connect(way).unwrap();
        socket.send(b"?").unwrap();
        assert_eq!(receive(&socket).unwrap(), ('b', way));
        connect_unspec(&socket).unwrap();
        for named in [direct, other, way] {
            assert_eq!(ask(&socket, named).unwrap(), ('b', named), "{way}");
        }
    }
}

/// Nine VIPs on one socket: those in use keep their backends and names, the ninth isn't kept. One
/// that rested for a minute gives way.
pub fn flows_in_use_never_give_way() {
    let vips: Vec<Ipv4Addr> = (1..=9).map(|last| Ipv4Addr::new(127, 200, 0, last)).collect();
    let servers: Vec<[Echo; 4]> =
        vips.iter().map(|_| [b'a', b'b', b'c', b'd'].map(Echo::start)).collect();
    for way_of in [0, 1] {
        let mut bed = Bed::new();
        let services = vips.iter().zip(&servers).map(|(vip, servers)| {
            let servers = servers.each_ref().map(|server| server.address);
            udp_service(&vip.to_string(), *vip, &servers)
        });
        bed.apply(services.collect());
        let named: Vec<SocketAddr> = vips.iter().map(|vip| ways(*vip, 80)[way_of]).collect();
        let socket = client(named[0]);
        let first: Vec<char> =
            named[..8].iter().map(|named| ask(&socket, *named).unwrap().0).collect();
        let all_in_use = || {
            for (named, first) in named[..8].iter().zip(&first) {
                assert_eq!(ask(&socket, *named).unwrap(), (*first, *named));
            }
        };
        let own = servers[8]
            .each_ref()
            .map(|server| ways(Ipv4Addr::LOCALHOST, server.address.port())[way_of]);
        for n in 1..=20 {
            all_in_use();
            let (_, from) = ask(&socket, named[8]).unwrap();
            assert!(own.contains(&from), "{from}");
            assert_eq!(event(&bed, "flows_full"), n);
        }
        all_in_use();
        // The third one stays unused.
        Flows::open(&bed).age(&socket, 2, 61);
        let (letter, from) = ask(&socket, named[8]).unwrap();
        assert_eq!(from, named[8]);
        assert_eq!(event(&bed, "flows_full"), 20);
        for _ in 0..20 {
            assert_eq!(ask(&socket, named[8]).unwrap(), (letter, named[8]));
            for nth in [0, 1, 3, 4, 5, 6, 7] {
                assert_eq!(ask(&socket, named[nth]).unwrap(), (first[nth], named[nth]));
            }
        }
        assert!(!named.contains(&ask(&socket, named[2]).unwrap().1), "it isn't kept any more");
        assert_eq!(event(&bed, "flows_full"), 21);
    }
}

/// The map `FLOWS`, by which a test makes a flow old.
struct Flows(OwnedFd);

impl Flows {
    const VALUE: usize = 424;
    /// The offset of the eight words with each flow's last use.
    const USED: usize = 8;

    fn open(bed: &Bed) -> Flows {
        const BPF_OBJ_GET: libc::c_int = 7;
        let path = bed.options.bpffs.join("sockets/FLOWS");
        let path = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
        let map = bpf(BPF_OBJ_GET, &[path.as_ptr() as u64, 0]).unwrap();
        // SAFETY: the kernel has just made this descriptor for us.
        Flows(unsafe { OwnedFd::from_raw_fd(map) })
    }

    /// Makes a flow of `socket` older, by so many of the clock's units, which are about a second.
    fn age(&self, socket: &UdpSocket, nth: usize, by: u32) {
        const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
        const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
        let (key, mut value) = (socket.as_raw_fd(), [0u8; Flows::VALUE]);
        let attr = [self.0.as_raw_fd() as u64, &raw const key as u64, &raw mut value as u64, 0];
        bpf(BPF_MAP_LOOKUP_ELEM, &attr).unwrap();
        let used = &mut value[Flows::USED + 4 * nth..][..4];
        let then = u32::from_ne_bytes(used.try_into().unwrap()).wrapping_sub(by);
        used.copy_from_slice(&then.to_ne_bytes());
        bpf(BPF_MAP_UPDATE_ELEM, &attr).unwrap();
    }
}

/// To the kernel a send on a connected AF_INET6 socket names its peer where that is a mapped address.
/// It isn't looked up again where a service is pinned there.
pub fn a_connections_datagrams_are_translated_once() {
    let [instance, behind] = [b'i', b'b'].map(Echo::start);
    let SocketAddr::V4(pin) = instance.address else { unreachable!() };
    let mut bed = Bed::with_pin(pin);
    let mut web = udp_service("web", VIP, &[behind.address]);
    web.pin = Some(pin);
    bed.apply(vec![web, udp_service("resolver", OTHER_VIP, &[instance.address])]);
    for way in ways(OTHER_VIP, 80) {
        let socket = client(way);
        socket.connect(way).unwrap();
        socket.send(b"?").unwrap();
        assert_eq!(receive(&socket).unwrap(), ('i', way));
        assert_eq!(ask(&socket, way).unwrap(), ('i', way));
    }
    for way in ways(*pin.ip(), pin.port()) {
        assert_eq!(connect_udp(way).unwrap(), 'b', "the pin leads to its service");
        assert_eq!(ask(&client(way), way).unwrap(), ('b', way));
    }
}

/// Waits until a thread of the datapath's has disconnected the socket. `udp_abort()` sets the error, wakes who
/// polls, and only then disconnects.
fn wait_for_abort(socket: &UdpSocket) {
    rustix::event::poll(&mut [PollFd::new(socket, PollFlags::ERR)], None).unwrap();
    let start = Instant::now();
    while socket.peer_addr().is_ok() {
        assert!(start.elapsed() < Duration::from_secs(30), "it has an error and still a peer");
        std::thread::yield_now();
    }
}

/// The results of a connected socket after its backend was removed, call by call, as docs/sockets.md has them.
pub fn what_a_writer_gets_after_its_backend_left() {
    for way in ways(VIP, 80) {
        let [former, present] = [b'f', b'p'].map(Echo::start);
        let mut bed = Bed::new();
        bed.apply(vec![udp_service("web", VIP, &[former.address])]);
        let socket = client(way);
        socket.connect(way).unwrap();
        bed.apply(vec![udp_service("web", VIP, &[present.address])]);
        wait_for_abort(&socket);
        for _ in 0..3 {
            let error = socket.send(b"?").unwrap_err();
            assert_eq!(
                error.raw_os_error(),
                Some(libc::EDESTADDRREQ),
                "each write, until connect()"
            );
        }
        assert_eq!(socket.peer_addr().unwrap_err().kind(), ErrorKind::NotConnected);
        socket.connect(way).unwrap();
        let error = socket.send(b"?").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionAborted, "the pending error, once");
        socket.send(b"?").unwrap();
        assert_eq!(receive(&socket).unwrap(), ('p', way));

        // One that names the VIP each time continues with another backend, after the error.
        bed.apply(vec![udp_service("web", VIP, &[former.address])]);
        wait_for_abort(&socket);
        let error = socket.send_to(b"?", way).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionAborted, "once");
        assert_eq!(ask(&socket, way).unwrap(), ('f', way));
    }
}

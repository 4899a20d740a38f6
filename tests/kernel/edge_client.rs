//! The client's address, shown to servers that ask for their peer's.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};

use lb_userspace::datapath::{COUNTERS, Datapath, EdgeOptions};
use lb_userspace::table::Service;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType, ipproto, socket};

use crate::edge::{
    BACKEND, LONG, Network, PORT, PUBLIC, SOURCE, count, options, place, public, serve_with,
};
use crate::netns::inside;
use crate::odd_sockets::NO_MPTCP;
use crate::sockops::Sockops;

const OTHER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 11);
/// The other service's VIP on nodes.
const SECOND: Ipv4Addr = Ipv4Addr::new(127, 128, 0, 99);
const FORGED: &str = "9.9.9.9:2313";

/// A server as others are: it sends who it was connected by, by accept() and by getpeername(), until that is nothing.
fn start_server(listener: TcpListener) {
    std::thread::spawn(move || {
        loop {
            let (mut stream, accepted) = listener.accept().unwrap();
            let peer = stream.peer_addr().unwrap();
            let mut request = Vec::new();
            stream.read_to_end(&mut request).unwrap();
            if request.is_empty() {
                break;
            }
            assert_eq!(accepted, peer);
            let (ip, port) = (peer.ip().to_canonical(), peer.port());
            stream.write_all(SocketAddr::new(ip, port).to_string().as_bytes()).unwrap();
        }
    });
}

/// A client's own address, and the one that the server has of it.
fn ask(to: SocketAddr) -> (String, String) {
    ask_over(TcpStream::connect_timeout(&to, LONG).unwrap())
}

fn ask_over(mut stream: TcpStream) -> (String, String) {
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream.write_all(b"who?").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut shown = String::new();
    stream.read_to_string(&mut shown).unwrap();
    (stream.local_addr().unwrap().to_string(), shown)
}

/// How many connections of trusted edges showed the client, had no option, and had no SYN.
fn shown(datapath: &Datapath) -> [u64; 3] {
    ["client_shown", "client_no_option", "client_no_syn"].map(|name| {
        let (_, counter) = COUNTERS.into_iter().find(|(named, _)| *named == name).unwrap();
        datapath.counters().event(counter)
    })
}

/// One service asks for it, and another one doesn't; a client forges it, and so does a host that isn't trusted.
pub fn clients_are_shown() {
    inside(|| {
        let (mut place, network) = (place(), Network::new());
        place.options.datapath.client_address_from = vec![SOURCE];
        let backend = SocketAddr::from((BACKEND, PORT));
        let [web, other] = [PUBLIC, OTHER].map(|vip| SocketAddr::from((vip, 80)));
        let options = EdgeOptions { client_address: vec!["web".into()], ..options() };
        let second = Service { vip: SECOND, ..public("other", &[backend], &[other]) };
        let services = vec![public("web", &[backend], &[web]), second];
        let former = network.backend.run(|| TcpListener::bind((BACKEND, PORT)).unwrap());
        let datapath = serve_with(&place, services, options);
        // The kernel keeps no SYN of a server that listened before.
        let (stream, (_, seen)) = (
            network.client.run(move || TcpStream::connect(web).unwrap()),
            former.accept().unwrap(),
        );
        assert_eq!(seen.ip(), SOURCE);
        drop((stream, former));
        assert_eq!(shown(&datapath), [0, 0, 1]);
        // An IPv6 socket, as most servers have.
        network.backend.run(|| start_server(TcpListener::bind("[::]:8080").unwrap()));

        let (client, seen) = network.client.run(move || ask(web));
        assert_eq!(seen, client);
        assert_eq!(count(&datapath, "client_shown"), 2);
        let (_, seen) = network.client.run(move || ask(other));
        assert!(seen.starts_with(&format!("{SOURCE}:")), "{seen}");
        assert_eq!(shown(&datapath), [1, 1, 1]);

        let forger = Sockops::forging(&place.cgroup.path);
        // From the edge's own host it can't be distinguished from the edge's.
        assert_eq!(ask(backend).1, FORGED);
        for vip in [web, other] {
            let (_, seen) = network.client.run(move || ask(vip));
            assert!(seen.starts_with(&format!("{SOURCE}:")), "{vip}: {seen}");
        }
        // The client's options left no room.
        assert_eq!(
            [count(&datapath, "client_shown"), count(&datapath, "client_not_shown")],
            [2, 1]
        );
        let (client, seen) = network.backend.run(move || ask(backend));
        assert_eq!(seen, client, "from a host that isn't trusted");
        drop(forger);

        let (client, seen) = network.client.run(move || ask(web));
        assert_eq!(seen, client);
        network.backend.run(move || drop(TcpStream::connect(backend).unwrap()));
    });
}

/// A server over several paths, as those of Go are by default.
pub fn clients_of_mptcp_are_shown() {
    inside(|| {
        let (mut place, network) = (place(), Network::new());
        let mptcp = |family| match socket(family, SocketType::STREAM, Some(ipproto::MPTCP)) {
            Err(Errno::PROTONOSUPPORT | Errno::NOPROTOOPT) => None,
            socket => Some(socket.unwrap()),
        };
        if mptcp(AddressFamily::INET).is_none() {
            return crate::skip(NO_MPTCP);
        }
        place.options.datapath.client_address_from = vec![SOURCE];
        let backend = SocketAddr::from((BACKEND, PORT));
        let vip = SocketAddr::from((PUBLIC, 80));
        let options = EdgeOptions { client_address: vec!["web".into()], ..options() };
        let datapath = serve_with(&place, vec![public("web", &[backend], &[vip])], options);
        network.backend.run(move || {
            let socket = mptcp(AddressFamily::INET6).unwrap();
            rustix::net::bind(&socket, &SocketAddr::from(([0; 8], PORT))).unwrap();
            rustix::net::listen(&socket, 8).unwrap();
            start_server(socket.into());
        });
        let (client, seen) = network.client.run(move || ask(vip));
        assert_eq!(seen, client, "of a client without MPTCP the server accepts a socket of TCP");
        let (client, seen) = network.client.run(move || {
            let socket = mptcp(AddressFamily::INET).unwrap();
            rustix::net::connect(&socket, &vip).unwrap();
            ask_over(socket.into())
        });
        // Before 5.19 no program gets from the subflow, which has the SYN, to the socket that is accepted.
        let is_shown = crate::running_kernel() >= (5, 19);
        assert_eq!(seen == client, is_shown, "{seen}, {client}");
        assert_eq!(shown(&datapath), [2, 0, 0]);
        network.backend.run(move || drop(TcpStream::connect(backend).unwrap()));
    });
}

//! The client's address, shown to servers that ask for their peer's.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};

use lb_userspace::datapath::EdgeOptions;
use lb_userspace::table::Service;

use crate::edge::{
    BACKEND, LONG, Network, PORT, PUBLIC, SOURCE, count, options, place, public, serve_with,
};
use crate::netns::inside;
use crate::sockops::Sockops;

const OTHER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 11);
/// The other service's VIP on nodes.
const SECOND: Ipv4Addr = Ipv4Addr::new(127, 128, 0, 99);
const FORGED: &str = "9.9.9.9:2313";

/// A server as others are: it sends who it was connected by, by accept() and by getpeername(), until that is nothing.
fn start_server(at: SocketAddr) {
    let listener = TcpListener::bind(at).unwrap();
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
    let mut stream = TcpStream::connect_timeout(&to, LONG).unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    stream.write_all(b"who?").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut shown = String::new();
    stream.read_to_string(&mut shown).unwrap();
    (stream.local_addr().unwrap().to_string(), shown)
}

/// One service asks for it, and another one doesn't; a client forges it, and so does a host that isn't trusted.
pub fn clients_are_shown() {
    inside(|| {
        let (mut place, network) = (place(), Network::new());
        place.options.datapath.client_address_from = vec![SOURCE];
        let backend = SocketAddr::from((BACKEND, PORT));
        let [web, other] = [PUBLIC, OTHER].map(|vip| SocketAddr::from((vip, 80)));
        let shown = EdgeOptions { client_address: vec!["web".into()], ..options() };
        let second = Service { vip: SECOND, ..public("other", &[backend], &[other]) };
        let services = vec![public("web", &[backend], &[web]), second];
        let datapath = serve_with(&place, services, shown);
        // An IPv6 socket, as most servers have.
        network.backend.run(|| start_server("[::]:8080".parse().unwrap()));

        let (client, seen) = network.client.run(move || ask(web));
        assert_eq!(seen, client);
        assert_eq!(count(&datapath, "client_shown"), 1);
        let (_, seen) = network.client.run(move || ask(other));
        assert!(seen.starts_with(&format!("{SOURCE}:")), "{seen}");

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
            [1, 1]
        );
        let (client, seen) = network.backend.run(move || ask(backend));
        assert_eq!(seen, client, "from a host that isn't trusted");
        drop(forger);

        let (client, seen) = network.client.run(move || ask(web));
        assert_eq!(seen, client);
        network.backend.run(move || drop(TcpStream::connect(backend).unwrap()));
    });
}

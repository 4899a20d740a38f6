//! Public VIPs: frontends in the networks of `vip.public`, in every network namespace.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};

use lb_userspace::table::Protocols;

use crate::fixture::{
    Bed, Echo, Server, VIP, ask, client, connect, connect_udp, event, service, ways,
};

/// Networks on loopback, where no packet leaves the host: the configuration takes none such.
const NETWORKS: [&str; 3] = ["127.3.0.0/24", "127.4.0.0/16", "::1/128"];
const PUBLIC: Ipv4Addr = Ipv4Addr::new(127, 4, 7, 1);
const PORT: u16 = 4443;

fn bed(host_netns: Option<u64>) -> Bed {
    Bed::with(|options| {
        options.vip.public = NETWORKS.map(|network| network.parse().unwrap()).into();
        options.host_netns = host_netns;
    })
}

fn public6() -> SocketAddr {
    SocketAddr::from((Ipv6Addr::LOCALHOST, PORT))
}

pub fn vips_lead_to_a_backend() {
    let server = Server::start(b'a');
    let _echo = Echo::on(b'a', server.address);
    // This network namespace passes for the host's, and for another one.
    for host_netns in [None, Some(1)] {
        let mut bed = bed(host_netns);
        let mut web = service("web", VIP, &[(server.address, 1)]);
        web.protocols = Protocols::Both;
        web.public = vec![SocketAddr::from((PUBLIC, PORT)), public6()];
        bed.apply(vec![web]);
        let [plain, mapped] = ways(PUBLIC, PORT);
        for address in [plain, mapped, public6()] {
            let stream = TcpStream::connect(address).unwrap();
            assert_eq!(stream.peer_addr().unwrap(), address);
            assert_eq!(connect(address).unwrap(), 'a', "{address}");
            assert_eq!(connect_udp(address).unwrap(), 'a', "{address}");
            // An IPv4 backend can't be sent to by an IPv6 address.
            if address != public6() {
                assert_eq!(ask(&client(address), address).unwrap(), ('a', address));
            }
        }
    }
}

/// What no service has passes to the host's own servers; what one has never does.
pub fn others_in_their_networks_pass() {
    let backend = Server::start(b'b');
    let on_host = Server::on(b'h', (Ipv4Addr::UNSPECIFIED, 0));
    let port = on_host.address.port();
    let [vip, neighbour] = [PUBLIC, Ipv4Addr::new(127, 3, 0, 9)];
    let mut bed = bed(None);
    let mut web = service("web", VIP, &[(backend.address, 1)]);
    web.public = vec![SocketAddr::from((vip, port))];
    bed.apply(vec![web.clone()]);
    for (address, expected) in [(vip, 'b'), (neighbour, 'h')] {
        for way in ways(address, port) {
            assert_eq!(connect(way).unwrap(), expected, "{way}");
        }
    }
    // No service has another port of it, and nothing listens there.
    let refused = connect(SocketAddr::from((vip, PORT))).unwrap_err();
    assert_eq!(
        (refused.kind(), event(&bed, "refused_no_frontend")),
        (ErrorKind::ConnectionRefused, 0)
    );

    web.backends.clear();
    bed.apply(vec![web.clone()]);
    for way in ways(vip, port) {
        assert_eq!(connect(way).unwrap_err().kind(), ErrorKind::ConnectionRefused, "{way}");
    }
    web.public.clear();
    bed.apply(vec![web]);
    for way in ways(vip, port) {
        assert_eq!(connect(way).unwrap(), 'h', "{way}");
    }
}

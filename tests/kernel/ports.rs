//! A VIP's frontends: its ports and its protocols.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};

use lb_userspace::table::{Ports, Protocols};

use crate::fixture::{
    Bed, Echo, Server, VIP, VIP6, ask, client, connect, connect_udp, event, receive, service, ways,
};

fn vips(port: u16) -> [SocketAddr; 3] {
    let [plain, mapped] = ways(VIP, port);
    [plain, mapped, SocketAddr::from((VIP6, port))]
}

pub fn each_port_leads_to_the_backend() {
    let server = Server::start(b'a');
    let _echo = Echo::on(b'a', server.address);
    let mut bed = Bed::with_pool6();
    let mut web = service("web", VIP, &[(server.address, 1)]);
    (web.protocols, web.vip6) = (Protocols::Both, Some(VIP6));
    for (ports, connected) in [
        (Ports::only([80, 443, 5432]), [80, 443, 5432].as_slice()),
        (Ports::Any, &[1, 80, 53, 8080, u16::MAX]),
    ] {
        web.ports = ports;
        bed.apply(vec![web.clone()]);
        for address in connected.iter().flat_map(|&port| vips(port)) {
            let stream = TcpStream::connect(address).unwrap();
            assert_eq!(stream.peer_addr().unwrap(), address);
            assert_eq!(connect(address).unwrap(), 'a', "{address}");
            assert_eq!(connect_udp(address).unwrap(), 'a', "{address}");
            // An IPv4 backend can't be sent to by an IPv6 address.
            if address.ip().to_canonical().is_ipv4() {
                assert_eq!(ask(&client(address), address).unwrap(), ('a', address));
            }
        }
    }
    web.ports = Ports::only([80]);
    bed.apply(vec![web]);
    for address in vips(443) {
        connect(address).expect_err("the former ports are refused");
    }
}

/// One socket that sends to several ports of a VIP gets each reply from the port it sent to.
pub fn any_port_replies_from_the_connected_one() {
    let servers = [b'a', b'b'].map(Echo::start);
    let mut bed = Bed::new();
    let backends = servers.each_ref().map(|server| (server.address, 1));
    let mut web = service("web", VIP, &backends);
    (web.protocols, web.ports) = (Protocols::Udp, Ports::Any);
    bed.apply(vec![web]);
    for way in ways(VIP, 0) {
        let socket = client(way);
        for port in [53, 80, 443, 53, 80, 443] {
            let connected = SocketAddr::from((way.ip(), port));
            assert_eq!(ask(&socket, connected).unwrap().1, connected);
        }
    }
}

/// Ports change between a list and any: who is connected to a port that stays is left alone.
pub fn a_connected_socket_keeps_a_port_that_stays() {
    let server = Echo::start(b'a');
    let mut bed = Bed::new();
    let mut web = service("web", VIP, &[(server.address, 1)]);
    let mut apply = |ports: Ports| {
        (web.protocols, web.ports) = (Protocols::Udp, ports);
        bed.apply(vec![web.clone()]);
    };
    apply(Ports::only([53, 80]));
    for way in ways(VIP, 53) {
        let (stays, goes) = (client(way), client(way));
        stays.connect(way).unwrap();
        goes.connect(SocketAddr::from((way.ip(), 80))).unwrap();
        apply(Ports::Any);
        apply(Ports::only([53]));
        let aborted = goes.recv(&mut [0]).unwrap_err();
        assert_eq!(aborted.kind(), ErrorKind::ConnectionAborted, "{way}: {aborted}");
        stays.send(b"?").unwrap();
        assert_eq!(receive(&stays).unwrap(), ('a', way));
        apply(Ports::only([53, 80]));
    }
}

pub fn protocols_are_honoured() {
    let server = Server::start(b'a');
    let _echo = Echo::on(b'a', server.address);
    let mut bed = Bed::with_pool6();
    let mut web = service("web", VIP, &[(server.address, 1)]);
    web.vip6 = Some(VIP6);
    let mut n_refused = 0;
    for protocols in [Protocols::Tcp, Protocols::Udp, Protocols::Both] {
        web.protocols = protocols;
        bed.apply(vec![web.clone()]);
        for address in vips(80) {
            let answers = [connect(address), connect_udp(address)];
            for (answer, serves) in answers.into_iter().zip([protocols.tcp(), protocols.udp()]) {
                assert_eq!(answer.is_ok(), serves, "{protocols:?} {address}: {answer:?}");
            }
            // A connect() by UDP is counted apart.
            n_refused += u64::from(!protocols.tcp());
            if !protocols.udp() {
                client(address).send_to(b"?", address).expect_err("UDP isn't served");
                n_refused += 1;
            }
            assert_eq!(event(&bed, "refused_no_frontend"), n_refused);
        }
    }
}

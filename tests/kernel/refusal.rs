//! Connections without a backend are refused with ECONNREFUSED, and never reach a server that listens on
//! every address.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use lb_userspace::datapath::{COUNTERS, RejectMethod};
use lb_userspace::table::{Ports, Protocols};

use crate::fixture::{
    Bed, Echo, OTHER_VIP, Place, Server, VIP, ask, client, connect, connect_udp, service, table,
};

pub fn by_errno() {
    refused_by(RejectMethod::Errno);
}

pub fn by_port_zero() {
    refused_by(RejectMethod::PortZero);
}

fn refused_by(refusal: RejectMethod) {
    let wildcard = Server::on(b'w', (Ipv4Addr::UNSPECIFIED, 0));
    let port = wildcard.address.port();
    assert_eq!(
        connect((VIP, port)).unwrap(),
        'w',
        "without nohop it accepts a connection to any VIP"
    );

    let mut bed = Bed::refusing_by(refusal);
    let mut without_backend = service("web", VIP, &[]);
    without_backend.ports = Ports::only([port]);
    bed.apply(vec![without_backend]);
    for (what, address) in [
        ("a service without a backend", (VIP, port)),
        ("a port that isn't the service's", (VIP, port ^ 1)),
        ("an address that no service has", (OTHER_VIP, port)),
    ] {
        let error = connect(address).expect_err(what);
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{what}");
    }
    assert_eq!(connect((Ipv4Addr::LOCALHOST, port)).unwrap(), 'w', "127.0.0.1 is no VIP");

    let counters = bed.datapath.counters();
    assert_eq!(counters.service(bed.datapath.indices("web").unwrap().service).refused, 1);
    let events = COUNTERS.map(|(name, counter)| (name, counters.event(counter)));
    for (name, n) in events {
        assert_eq!(n, if name == "refused_no_frontend" { 2 } else { 0 }, "{name}");
    }
}

/// While no daemon is alive, once the table is older than it may be; a flow of an unconnected socket as well.
/// A daemon that is alive decides itself, and what an earlier one left holds for none that is.
pub fn by_an_old_table() {
    let backend = Server::on(b'b', (Ipv4Addr::LOCALHOST, 0));
    let _echo = Echo::on(b'b', backend.address);
    let address = SocketAddr::from((VIP, backend.address.port()));
    let place = Place::new();
    let mut web = service("web", VIP, &[(backend.address, 1)]);
    (web.protocols, web.ports) = (Protocols::Both, Ports::only([address.port()]));
    let served = table(vec![web]);
    let mut datapath = place.start();
    datapath.apply(&served).unwrap();
    let socket = client(address);
    let serves = |case: &str| {
        assert_eq!(connect(address).unwrap(), 'b', "{case}");
        assert_eq!(connect_udp(address).unwrap(), 'b', "{case}");
        assert_eq!(ask(&socket, address).unwrap(), ('b', address), "{case}");
    };
    // In a VM the clock began a quarter of a minute ago, and what is older is as old as that.
    let (limit, old) = (Duration::from_secs(5), Duration::from_secs(10));

    datapath.heartbeat(Some(old));
    datapath.set_max_age(Some(limit));
    serves("the daemon is alive");
    datapath.keep();
    assert_eq!(connect(address).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    connect_udp(address).unwrap_err();
    ask(&socket, address).unwrap_err();
    let web = datapath.indices("web").unwrap().service;
    assert!(datapath.counters().service(web).refused >= 2);

    datapath.heartbeat(Some(Duration::ZERO));
    datapath.keep();
    serves("the table was right just now");
    datapath.heartbeat(Some(old));
    datapath.set_max_age(None);
    datapath.keep();
    serves("of any age");

    // The next daemon, of whatever version, begins over what this one left.
    datapath.set_max_age(Some(limit));
    drop(datapath);
    let mut datapath = place.start();
    datapath.heartbeat(Some(Duration::ZERO));
    let refused =
        connect(address).expect_err("a daemon is alive, but the table is the earlier one's");
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    ask(&socket, address).unwrap_err();
    datapath.apply(&served).unwrap();
    datapath.heartbeat(None);
    serves("it has a table of its own");
    // One that doesn't know the age writes when the table was right, as each does.
    datapath.heartbeat(Some(Duration::ZERO));
    datapath.keep();
    serves("what it left is no deadline in the past");
}

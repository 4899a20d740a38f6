//! Connections without a backend are refused with ECONNREFUSED, and never reach a server that listens on
//! every address.

use std::io::ErrorKind;
use std::net::Ipv4Addr;

use lb_userspace::datapath::{COUNTERS, RejectMethod};
use lb_userspace::table::Ports;

use crate::fixture::{Bed, OTHER_VIP, Server, VIP, connect, service};

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

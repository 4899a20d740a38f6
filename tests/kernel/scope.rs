//! Whom the plane is for: which network namespace, which cgroup, and for how long.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddrV4};

use lb_tests::bpffs::Bpffs;
use lb_userspace::plane::Plane;

use crate::bed::{Bed, Server, VIP, dead, dial, service};

/// The cookie of a namespace that this process isn't in.
const ANOTHER_NETNS: u64 = u64::MAX;

pub fn a_pin_counts_on_the_host() {
    let (server, pin) = (Server::start(b'a'), dead());
    let neighbour = Server::start(b'n');
    let mut bed = Bed::new();
    let mut web = service("web", VIP, &[(server.address, 1)]);
    web.pin = Some(pin);
    bed.apply(vec![web]);
    assert_eq!(dial(pin).unwrap(), 'a');
    assert_eq!(dial((VIP, 80)).unwrap(), 'a', "the VIP works beside it");
    assert_eq!(dial(neighbour.address).unwrap(), 'n', "another port of the pinned address");
}

pub fn a_pin_passes_elsewhere() {
    let (server, own) = (Server::start(b'a'), Server::start(b'o'));
    let mut bed = Bed::on_host(ANOTHER_NETNS);
    let mut web = service("web", VIP, &[(server.address, 1)]);
    web.pin = Some(own.address);
    bed.apply(vec![web]);
    assert_eq!(dial(own.address).unwrap(), 'o');
}

pub fn loopback_backends_are_the_hosts() {
    let (near, far) = (Server::start(b'n'), Server::start(b'f'));
    let mut web = service("web", VIP, &[(near.address, 1), (far.address, 1)]);
    web.backends[0].host_only = true;
    let mut bed = Bed::on_host(ANOTHER_NETNS);
    bed.apply(vec![web.clone()]);
    for _ in 0..64 {
        assert_eq!(dial((VIP, 80)).unwrap(), 'f');
    }
    web.backends.truncate(1);
    bed.apply(vec![web]);
    assert_eq!(dial((VIP, 80)).unwrap_err().kind(), ErrorKind::ConnectionRefused);
}

pub fn detached_is_gone() {
    let mut bed = Bed::new();
    bed.apply(vec![]);
    assert!(bed.plane.mend().holds());
    assert_eq!(dial((VIP, 80)).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    bed.plane.detach();
    let wildcard = Server::on(b'w', SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0));
    assert_eq!(dial((VIP, wildcard.address.port())).unwrap(), 'w');
}

pub fn no_cgroup_is_an_error() {
    let mut options = Bed::new().options.clone();
    for (scope, mend) in [("/nonexistent", "--cgroup"), ("/tmp", "cgroup v2")] {
        let bpffs = Bpffs::new().unwrap();
        options.bpffs = bpffs.path().join("nohop");
        options.scope = scope.into();
        let error = Plane::start(&options).unwrap_err().to_string();
        assert!(error.contains(scope) && error.contains(mend), "{error}");
        assert!(!options.bpffs.exists(), "nothing is left behind");
    }
}

//! Whom the plane is for: which network namespace, which cgroup, and for how long.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::Path;

use lb_userspace::plane;

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
    let attachment = bed.plane.attachment();
    assert!(attachment.holds());
    assert_eq!(dial((VIP, 80)).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    bed.plane.detach();
    assert!(!attachment.holds());
    let wildcard = Server::on(b'w', SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0));
    assert_eq!(dial((VIP, wildcard.address.port())).unwrap(), 'w');
}

pub fn unload_detaches_anothers_programs() {
    let mut bed = Bed::new();
    bed.apply(vec![]);
    let attachment = bed.plane.attachment();
    let elsewhere = bed.cgroup.path.parent().unwrap();
    assert_eq!(plane::unload(elsewhere).unwrap(), 0, "another cgroup's programs stay");
    assert!(attachment.holds());
    assert_eq!(plane::unload(&bed.cgroup.path).unwrap(), 2);
    assert!(!attachment.holds());
    assert_eq!(plane::unload(&bed.cgroup.path).unwrap(), 0, "again is no error");
}

pub fn no_cgroup_is_an_error() {
    let mut bed = Bed::new();
    let missing = bed.plane.attach(Path::new("/nonexistent")).unwrap_err().to_string();
    assert!(missing.contains("/nonexistent") && missing.contains("--cgroup"), "{missing}");
    let plain = bed.plane.attach(Path::new("/tmp")).unwrap_err().to_string();
    assert!(plain.contains("/tmp") && plain.contains("cgroup v2"), "{plain}");
}

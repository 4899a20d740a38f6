//! While connections are only counted, each passes untouched, and lands on a server that listens on the
//! VIP itself; earlier connections stay translated.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};

use lb_userspace::datapath::ServiceCounters;
use lb_userspace::table::Ports;

use crate::bypass::Servers;
use crate::families::{Use, dual};
use crate::fixture::{
    Bed, OTHER_VIP, Place, Server, VIP, VIP6, ask, client, connect, event, loopback, service,
    table, ways,
};
use crate::netns::leave;

fn counted(bed: &Bed) -> ServiceCounters {
    bed.datapath.counters().service(bed.datapath.indices("web").unwrap().service)
}

/// TCP and UDP, connected and not, there and back.
pub fn leaves_connects_untouched() {
    let servers = Servers::start();
    let mut bed = Bed::new();
    servers.serve(&mut bed);
    for round in 1..=2 {
        assert_eq!(servers.answer(), 'b');
        let before = counted(&bed);
        let n_shadowed = event(&bed, "shadowed");
        bed.datapath.set_shadow(true);
        assert_eq!(servers.answer(), 'v', "at once");
        let now = counted(&bed);
        // Six sockets connect once each. To the kernel the datagram of the one that is connected to the
        // mapped address names it as well, which is none of our business.
        assert_eq!(now.shadowed, before.shadowed + 6, "round {round}");
        assert_eq!(event(&bed, "shadowed"), n_shadowed + 6);
        assert_eq!(ServiceCounters { shadowed: before.shadowed, ..now }, before);
        bed.datapath.set_shadow(false);
    }
    assert_eq!(servers.answer(), 'b', "and back");
}

pub fn leaves_ipv6_untouched() {
    let mut bed = Bed::with_pool6();
    let backend = Server::on(b'b', loopback(VIP6));
    bed.apply(vec![dual("web", VIP, VIP6, &[backend.address])]);
    let address = SocketAddr::from((VIP6, 80));
    assert_eq!(connect(address).unwrap(), 'b');
    let before = counted(&bed);
    bed.datapath.set_shadow(true);
    let untouched = std::thread::spawn(move || {
        // No route leads there from here, whatever routes the machine has.
        leave();
        for how in Use::ALL {
            let error = how.connect(address).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NetworkUnreachable, "{how:?}: {error}");
        }
    });
    untouched.join().unwrap();
    let now = counted(&bed);
    assert_eq!(now, ServiceCounters { shadowed: before.shadowed + 3, ..before });
    bed.datapath.set_shadow(false);
    assert_eq!(connect(address).unwrap(), 'b');
}

/// Connections that would be refused for lack of a backend or a frontend pass, too.
pub fn refuses_nothing() {
    let wildcard = Server::on(b'w', (Ipv4Addr::UNSPECIFIED, 0));
    let port = wildcard.address.port();
    let mut bed = Bed::new();
    let mut web = service("web", VIP, &[]);
    web.ports = Ports::only([port]);
    bed.apply(vec![web]);
    bed.datapath.set_shadow(true);
    let pools_own = Ipv4Addr::new(127, 128, 0, 0);
    for address in [VIP, OTHER_VIP, pools_own] {
        assert_eq!(connect((address, port)).unwrap(), 'w', "{address}");
    }
    assert_eq!(counted(&bed), ServiceCounters { shadowed: 1, ..ServiceCounters::default() });
    assert_eq!((event(&bed, "shadowed"), event(&bed, "shadowed_no_frontend")), (1, 1));
    assert_eq!(event(&bed, "refused_no_frontend"), 0);
    bed.datapath.set_shadow(false);
    for address in [VIP, OTHER_VIP] {
        connect((address, port)).unwrap_err();
    }
}

/// A connection that was translated, and a socket that has a flow.
pub fn lets_connections_go_on() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let servers = Servers::start();
    let mut bed = Bed::new();
    let stream_service = service("stream", OTHER_VIP, &[(listener.local_addr().unwrap(), 1)]);
    bed.apply(vec![servers.service(), stream_service]);
    let connected = SocketAddr::from((OTHER_VIP, 80));
    let mut stream = TcpStream::connect(connected).unwrap();
    let (mut accepted, _) = listener.accept().unwrap();
    let [vip, _] = ways(VIP, servers.port());
    let socket = client(vip);
    assert_eq!(ask(&socket, vip).unwrap(), ('b', vip));

    bed.datapath.set_shadow(true);
    let mut letter = [0];
    accepted.write_all(b"x").unwrap();
    stream.read_exact(&mut letter).unwrap();
    assert_eq!((letter, stream.peer_addr().unwrap()), (*b"x", connected));
    assert_eq!(ask(&socket, vip).unwrap(), ('v', vip), "its flow isn't followed");
    let behind = servers.behind();
    assert_eq!(ask(&socket, behind).unwrap(), ('b', behind), "a datagram by its own address");
    bed.datapath.set_shadow(false);
    assert_eq!(ask(&socket, vip).unwrap(), ('b', vip), "it is again");
}

/// Neither a restart nor a table changes it, until the next daemon does; one that begins in it
/// translates nothing in between.
pub fn outlives_the_daemon() {
    let servers = Servers::start();
    let mut place = Place::new();
    let apply = |datapath: &mut lb_userspace::datapath::Datapath| {
        assert!(datapath.apply(&table(vec![servers.service()])).unwrap().is_empty());
    };
    let mut datapath = place.start();
    apply(&mut datapath);
    datapath.set_shadow(true);
    drop(datapath);
    assert_eq!(servers.answer(), 'v', "without a daemon");
    let mut datapath = place.start();
    assert!(datapath.is_adopted() && datapath.is_shadow());
    assert_eq!(servers.answer(), 'v');
    apply(&mut datapath);
    datapath.heartbeat(None);
    assert_eq!(servers.answer(), 'v', "with a table");
    datapath.set_shadow(false);
    assert_eq!(servers.answer(), 'b');

    drop(datapath);
    place.options.is_shadow = true;
    for layout in [3, 4] {
        place.options.layout = layout;
        let mut datapath = place.start();
        if datapath.are_hooks_ours() {
            assert_eq!(servers.answer(), 'v', "layout {layout}");
        }
        apply(&mut datapath);
        assert_eq!(servers.answer(), 'v', "layout {layout}");
    }
}

/// In another namespace a pin doesn't apply, and connections to it pass anyway.
pub fn counts_pins_on_the_host_alone() {
    let own = Server::start(b'v');
    let SocketAddr::V4(pin) = own.address else { unreachable!() };
    let behind = Server::start(b'b');
    for (host_netns, n_shadowed) in [(None, 1), (Some(1), 0)] {
        let mut bed = Bed::with(|options| {
            options.vip.pins.insert("web".to_owned(), pin);
            options.host_netns = host_netns;
        });
        let mut web = service("web", VIP, &[(behind.address, 1)]);
        web.pin = Some(SocketAddrV4::new(*pin.ip(), pin.port()));
        bed.apply(vec![web]);
        bed.datapath.set_shadow(true);
        assert_eq!(connect(pin).unwrap(), 'v');
        assert_eq!(counted(&bed).shadowed, n_shadowed);
    }
}

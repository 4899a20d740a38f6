//! The fast path of the unit `edge` at XDP, in the driver of veth. Senders compute checksums themselves
//! (`ethtool -K tx off`), unless a trial is about those that leave it to the network card.

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;

use aya::maps::{Array, Map, MapData};
use lb_common::{EdgeInterface, N_EDGE_INTERFACES};
use lb_userspace::datapath::{Datapath, EdgeMode, EdgeOptions};

use crate::edge::{
    BACKEND, LONG, Network, PORT, PUBLIC, SOURCE, apply, count, ends, exchange, options, place,
    public, request, serve, start_server, stop_server, web,
};
use crate::fixture::Place;
use crate::netns::{inside, ip};
use crate::rollback;

const ETHTOOL_STXCSUM: u32 = 0x17;
const ETHTOOL_SGRO: u32 = 0x2c;
const XDP: (u32, u32) = (6, 37);
const XDP_PASS: u32 = 2;

/// Sets a feature of the interface in this thread's network namespace.
fn ethtool(device: &str, command: u32, is_on: bool) {
    const SIOCETHTOOL: libc::c_ulong = 0x8946;
    // struct ethtool_value, and struct ifreq with its address.
    let mut value = [command, is_on.into()];
    let mut request = [0u64; 5];
    for (nth, octet) in device.bytes().enumerate() {
        request[nth / 8] |= u64::from(octet) << (nth % 8 * 8);
    }
    request[2] = value.as_mut_ptr() as u64;
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    // SAFETY: the request is as long as the kernel's, and what it points to lives until the call ends.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, request.as_mut_ptr()) };
    assert_eq!(done, 0, "{device}: {}", std::io::Error::last_os_error());
}

/// The network whose ends take packets from XDP, and compute checksums themselves or leave it to the card.
pub fn network(has_checksums: bool) -> Network {
    let network = Network::new();
    for container in [&network.client, &network.backend] {
        container.run(move || {
            ip("link set lo up");
            ethtool("v1", ETHTOOL_SGRO, true);
            ethtool("v1", ETHTOOL_STXCSUM, !has_checksums);
        });
    }
    network
}

fn modes(datapath: &Datapath) -> Vec<(EdgeMode, Option<String>)> {
    let status = datapath.edge_status().unwrap();
    let mode = |interface: lb_userspace::datapath::EdgeInterface| {
        (interface.mode.unwrap(), interface.message)
    };
    status.interfaces.into_iter().map(mode).collect()
}

fn by_xdp(datapath: &Datapath) -> [u64; 2] {
    ["xdp_tx", "xdp_redirect"].map(|name| count(datapath, name))
}

/// What is established goes by XDP, from one interface to the other; the receivers verify all checksums.
pub fn established_flows() {
    inside(|| {
        let (place, network) = (place(), network(true));
        let datapath = serve(&place, vec![web()]);
        assert_eq!(modes(&datapath), [(EdgeMode::XdpAndTcx, None), (EdgeMode::XdpAndTcx, None)]);
        exchange(&network, 300_000);
        let [sent_back, redirected] = by_xdp(&datapath);
        assert_eq!(sent_back, 0);
        // Some 210 full segments of each family there, as many back.
        assert!(redirected > 400, "{redirected}: {:?}", datapath.edge_counts());
        let flows = crate::edge::flows(&datapath);
        let packets: u64 = flows.iter().map(|flow| flow.packets).sum();
        assert!(packets >= redirected + count(&datapath, "forwarded"), "{packets}");
        // Without a daemon as with one.
        drop(datapath);
        start_server(&network.backend, BACKEND.into(), 'A');
        let vip = SocketAddr::from((PUBLIC, 80));
        let answer = network.client.run(move || request(vip, &[7; 100_000]));
        assert_eq!(answer.unwrap(), format!("A {SOURCE} 100000"));
        stop_server(&network.backend, BACKEND.into());
        let mut datapath = place.start();
        datapath.configure_edge(Some(options()));
        apply(&mut datapath, vec![web()]);
        assert_eq!(modes(&datapath), [(EdgeMode::XdpAndTcx, None), (EdgeMode::XdpAndTcx, None)]);
        assert!(by_xdp(&datapath)[1] > redirected + 60, "{:?}", datapath.edge_counts());
        datapath.configure_edge(None);
        assert!(
            !place.pin("v3/links").read_dir().unwrap().any(|pin| {
                pin.unwrap().file_name().to_string_lossy().starts_with("nohop_edge_")
            })
        );
    });
}

/// Packets whose checksum a network card is to complete are TC's, which knows of it.
pub fn checksums_left_to_the_card() {
    inside(|| {
        let (place, network) = (place(), network(false));
        let datapath = serve(&place, vec![web()]);
        assert_eq!(modes(&datapath), [(EdgeMode::XdpAndTcx, None), (EdgeMode::XdpAndTcx, None)]);
        exchange(&network, 300_000);
        assert_eq!(by_xdp(&datapath), [0, 0]);
    });
}

/// An edge with clients and backends behind one interface. The backends, each with its VIP.
fn serve_one_arm(place: &Place, network: &Network) -> (Datapath, [(IpAddr, SocketAddr); 2]) {
    network.client.run(|| ip("addr add 198.51.100.3/24 dev v1"));
    let mut datapath = place.start();
    let sources = ["198.51.100.1", "fd51::1"].map(|ip| ip.parse().unwrap()).into();
    let interfaces = vec!["out".to_owned()];
    datapath.configure_edge(Some(EdgeOptions { interfaces, sources, ..options() }));
    let backends: [IpAddr; 2] = ["198.51.100.3", "fd51::2"].map(|ip| ip.parse().unwrap());
    let vips = ends().map(|ends| ends.vip);
    apply(&mut datapath, vec![public("web", &backends.map(|ip| (ip, PORT).into()), &vips)]);
    (datapath, [0, 1].map(|family| (backends[family], vips[family])))
}

/// Sends long requests to both; after each `is_right` has how many packets were sent back, and redirected.
fn request_one_arm(
    network: &Network,
    (datapath, served): &(Datapath, [(IpAddr, SocketAddr); 2]),
    is_right: impl Fn([u64; 2]) -> bool,
) {
    for &(backend, vip) in served {
        start_server(&network.client, backend, 'A');
        let before = by_xdp(datapath);
        let answer = network.client.run(move || request(vip, &[7; 100_000])).unwrap();
        assert!(answer.ends_with(" 100000"), "{answer}");
        let after = by_xdp(datapath);
        let n = [after[0] - before[0], after[1] - before[1]];
        assert!(is_right(n), "{vip}: {:?}", datapath.edge_counts());
        stop_server(&network.client, backend);
    }
}

/// Client and backend behind one interface.
pub fn one_arm() {
    inside(|| {
        let (place, network) = (place(), network(true));
        let served = serve_one_arm(&place, &network);
        // A veth has no way to send back that is sure to arrive.
        request_one_arm(&network, &served, |[n_sent_back, n_redirected]| {
            n_redirected > 130 && n_sent_back == 0
        });
    });
}

/// Packets that XDP sends back by the interface that they came by, where a driver is sure to: a veth is whose other end
/// runs an XDP program, which nohop doesn't rely on.
pub fn sent_back() {
    inside(|| {
        let (place, network) = (place(), network(true));
        let receiver = network.client.run(|| {
            let program = rollback::program(XDP.0, XDP.1, XDP_PASS);
            rollback::link(&program, interface_index("v1"), XDP.1).unwrap()
        });
        let served = serve_one_arm(&place, &network);
        let pin = MapData::from_pin(place.pin("v3/maps/EDGE_INTERFACES")).unwrap();
        let mut entries: Array<_, [u64; 2]> = Map::Array(pin).try_into().unwrap();
        let slot = interface_index("out") % N_EDGE_INTERFACES;
        let mut entry: EdgeInterface = zerocopy::transmute!(entries.get(&slot, 0).unwrap());
        assert_ne!(entry.flags, 0);
        entry.flags = EdgeInterface::SENDS_BACK;
        let entry: [u64; 2] = zerocopy::transmute!(entry);
        entries.set(slot, entry, 0).unwrap();
        request_one_arm(&network, &served, |[n_sent_back, n_redirected]| {
            n_sent_back > 130 && n_redirected == 0
        });
        drop(receiver);
    });
}

/// A program that is detached by hand, an interface that goes and comes, and other programs there.
pub fn attachments() {
    inside(|| {
        let (place, network) = (place(), network(true));
        let (both, tcx) = (EdgeMode::XdpAndTcx, EdgeMode::Tcx);
        let other = rollback::program(XDP.0, XDP.1, XDP_PASS);
        let foreign = rollback::link(&other, interface_index("in"), XDP.1).unwrap();
        let mut datapath = serve(&place, vec![web()]);
        let [(first, None), (second, Some(message))] = &modes(&datapath)[..] else {
            panic!("{:?}", modes(&datapath));
        };
        assert_eq!((*first, *second), (both, tcx));
        assert!(message.contains("another XDP program is attached to it"), "{message}");
        exchange(&network, 300_000);
        // Nothing is redirected to an interface that the program isn't attached to, nor from it.
        assert_eq!(by_xdp(&datapath), [0, 0]);
        drop(foreign);
        until(&mut datapath, [(both, None), (both, None)].into());

        let pin = place.pin(&format!("v3/links/nohop_edge_xdp_{}", interface_index("out")));
        rollback::detach(&pin);
        until(&mut datapath, [(both, None), (both, None)].into());
        exchange(&network, 300_000);
        assert!(by_xdp(&datapath)[1] > 400, "{:?}", datapath.edge_counts());

        // Its other end takes nothing from XDP any more.
        network.client.run(|| ethtool("v1", ETHTOOL_SGRO, false));
        datapath.fix();
        let [(first, Some(message)), _] = &modes(&datapath)[..] else {
            panic!("{:?}", modes(&datapath));
        };
        assert_eq!(*first, tcx);
        assert!(message.contains("neither an XDP program nor GRO"), "{message}");
        exchange(&network, 300_000);

        ip("link del out");
        datapath.fix();
        let status = datapath.edge_status().unwrap();
        assert_eq!(status.interfaces[0].mode, None);
        ip(&format!("link add out type veth peer name v1 netns {}", network.client.tid));
        ip("link set out up");
        network.client.run(|| {
            ip("link set v1 up");
            ethtool("v1", ETHTOOL_SGRO, true);
        });
        until(&mut datapath, [(both, None), (both, None)].into());
    });
}

/// Fixes until the interfaces are attached so: a link without a descriptor ends a moment later.
fn until(datapath: &mut Datapath, wanted: Vec<(EdgeMode, Option<String>)>) {
    let start = std::time::Instant::now();
    loop {
        datapath.fix();
        let status = datapath.edge_status().unwrap();
        let is_attached = status.interfaces.iter().all(|interface| interface.mode.is_some());
        if is_attached && modes(datapath) == wanted {
            return;
        }
        assert!(start.elapsed() < LONG, "{status:?}");
        std::thread::yield_now();
    }
}

fn interface_index(device: &str) -> u32 {
    let name = std::ffi::CString::new(device).unwrap();
    // SAFETY: the name lives until the call ends.
    unsafe { libc::if_nametoindex(name.as_ptr()) }
}

/// The next hop is looked up again where it isn't known any more, and found.
pub fn no_neighbour() {
    inside(|| {
        let (place, network) = (place(), network(true));
        let datapath = serve(&place, vec![web()]);
        start_server(&network.backend, BACKEND.into(), 'A');
        let vip = SocketAddr::from((PUBLIC, 80));
        let stream = network.client.run(move || TcpStream::connect_timeout(&vip, LONG).unwrap());
        ip("neigh flush all");
        let answer = network.client.run(move || {
            let mut stream = stream;
            stream.write_all(&[7; 100_000]).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).map(|_| answer.len())
        });
        assert!(answer.unwrap() > 100_000);
        assert!(by_xdp(&datapath)[1] > 100, "{:?}", datapath.edge_counts());
        stop_server(&network.backend, BACKEND.into());
    });
}

//! Pins that a version with layout 2 left: `fixtures/layout2.o` is its object. What it wrote into the
//! maps is written here by hand, because that layout isn't in lb-common any more.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use aya::maps::{Array, HashMap, Map, MapData};
use aya::programs::CgroupSockAddr;
use aya::{EbpfLoader, include_bytes_aligned};
use lb_userspace::datapath::{AttachType, netns_cookie, unload};
use lb_userspace::table::Protocols;

use crate::connector::Connector;
use crate::fixture::{OTHER_VIP, Place, Server, VIP, service};
use crate::restart::{Echo, N_CONNECTS, Opened, apply, layouts};
use crate::rollback::{detach, link, pin};

static OBJECT: &[u8] = include_bytes_aligned!("fixtures/layout2.o");

const N_SERVICES: u32 = 64;
const MAPS: [(&str, u32); 11] = [
    ("FRONTENDS", 256),
    ("FRONTENDS6", 1),
    ("SERVICES", N_SERVICES),
    ("SLOTS", 4_096),
    ("BACKENDS", 256),
    ("NAMES", N_SERVICES),
    ("UNSENT", N_SERVICES),
    ("COUNTERS", 7),
    ("DAEMON", 1),
    ("PROBE", 1),
    ("EXCLUDED", 16),
];
const STORAGES: [&str; 3] = ["PEERS", "FORMER_PEERS", "FLOWS"];
const HOOKS: [(&str, AttachType); 8] = [
    ("nohop_getpeer4", AttachType::GETPEERNAME4),
    ("nohop_getpeer6", AttachType::GETPEERNAME6),
    ("nohop_recvmsg4", AttachType::RECVMSG4),
    ("nohop_recvmsg6", AttachType::RECVMSG6),
    ("nohop_sendmsg4", AttachType::SENDMSG4),
    ("nohop_sendmsg6", AttachType::SENDMSG6),
    ("nohop_connect4", AttachType::CONNECT4),
    ("nohop_connect6", AttachType::CONNECT6),
];
const TCP: u8 = 6;
const UDP: u8 = 17;

/// Loads, pins and attaches what layout 2's daemon did.
fn start(place: &Place) {
    for dir in ["v2/maps", "v2/links", "sockets"] {
        fs::create_dir_all(place.pin(dir)).unwrap();
    }
    let (layout, network, mask, port_zero) = (2u32, 0x7f80_0000u32, 0xff80_0000u32, 1u32);
    let mut loader = EbpfLoader::new();
    for (map, n_entries) in MAPS {
        loader.map_max_entries(map, n_entries);
        loader.map_pin_path(map, place.pin("v2/maps").join(map));
    }
    for map in STORAGES {
        loader.map_pin_path(map, place.pin("sockets").join(map));
    }
    loader.override_global("MAP_LAYOUT", &layout, true);
    loader.override_global("POOL_NETWORK", &network, true);
    loader.override_global("POOL_MASK", &mask, true);
    loader.override_global("REFUSAL", &port_zero, true);
    let mut ebpf = loader.load(OBJECT).unwrap();
    let cgroup = fs::File::open(&place.cgroup.path).unwrap();
    for (name, attach_type) in HOOKS {
        let program: &mut CgroupSockAddr = ebpf.program_mut(name).unwrap().try_into().unwrap();
        program.load().unwrap();
        let program = program.fd().unwrap().as_fd().try_clone_to_owned().unwrap();
        let link = link(&program, cgroup.as_raw_fd() as u32, attach_type.number).unwrap();
        pin(&link, &place.pin("v2/links").join(name));
    }
}

/// The values of a pinned array.
fn array<const N: usize>(maps: &Path, name: &str) -> Array<MapData, [u8; N]> {
    let map = MapData::from_pin(maps.join(name)).unwrap();
    Map::from_map_data(map).unwrap().try_into().unwrap()
}

/// Makes the `nth` service lead from a VIP's port 80 to one backend.
fn serve(place: &Place, nth: u32, name: &str, vip: Ipv4Addr, protocol: u8, backend: SocketAddr) {
    let maps = place.pin("v2/maps");
    let word = |first: u32, second: u32| [first.to_ne_bytes(), second.to_ne_bytes()].concat();
    // Port, padding, a generation, no connections.
    let SocketAddr::V4(address) = backend else { unreachable!("an IPv4 server") };
    let mapped = address.ip().to_ipv6_mapped().octets();
    let entry = [
        mapped.as_slice(),
        &[address.port().to_ne_bytes(), [0; 2]].concat(),
        &(100 + nth).to_ne_bytes(),
        &[0; 8],
    ];
    array::<32>(&maps, "BACKENDS").set(nth, bytes(&entry.concat()), 0).unwrap();
    // Of the backend's column all is its own.
    let slot = [nth.to_ne_bytes().as_slice(), &[0, 0, 0xff, 0xff]].concat();
    array::<8>(&maps, "SLOTS").set(nth, bytes(&slot), 0).unwrap();
    // For IPv4, IPv6 and all: once for the host's namespace, once for others.
    let regions = [word(nth, 1), word(0, 0), word(nth, 1)].concat();
    let service = [regions.clone(), regions, vec![0; 16]].concat();
    array::<64>(&maps, "SERVICES").set(nth, bytes(&service), 0).unwrap();
    let octets = [name.as_bytes(), &vec![0; 64 - name.len()]].concat();
    array::<64>(&maps, "NAMES").set(nth, bytes(&octets), 0).unwrap();
    let frontends = MapData::from_pin(maps.join("FRONTENDS")).unwrap();
    let mut frontends: HashMap<_, [u8; 8], [u8; 8]> =
        Map::from_map_data(frontends).unwrap().try_into().unwrap();
    let ([a, b, c, d], [e, f]) = (vip.octets(), 80u16.to_ne_bytes());
    frontends.insert([a, b, c, d, e, f, protocol, 0], bytes(&word(nth, 0)), 0).unwrap();
}

fn bytes<const N: usize>(value: &[u8]) -> [u8; N] {
    value.try_into().unwrap()
}

/// The daemon's own state: no heartbeat, the namespace and that the maps are whole.
fn set_daemon(place: &Place, is_shadow: bool) {
    let host_netns = netns_cookie().unwrap_or(0);
    let daemon = [0, 0, 1, host_netns, 0, 0, 1, is_shadow.into()].map(u64::to_ne_bytes).concat();
    array::<64>(&place.pin("v2/maps"), "DAEMON").set(0, bytes(&daemon), 0).unwrap();
}

/// This version takes over: no connection is lost, and sockets that were opened before keep the VIP as
/// their peer.
pub fn pins_are_taken_over() {
    let (old, new, echo) = (Server::start(b'o'), Server::start(b'n'), Echo::start());
    let place = Place::new();
    start(&place);
    serve(&place, 0, "web", VIP, TCP, old.address);
    serve(&place, 1, "mirror", OTHER_VIP, UDP, echo.address.into());
    set_daemon(&place, false);
    let connector = Connector::start((VIP, 80));
    let opened = Opened::open();
    opened.check(|| ());
    assert_eq!(connector.more(N_CONNECTS), "o");

    let mut mirror = service("mirror", OTHER_VIP, &[(echo.address.into(), 1)]);
    mirror.protocols = Protocols::Udp;
    let table = || vec![service("web", VIP, &[(new.address, 1)]), mirror.clone()];
    let mut datapath = place.start();
    assert!(!datapath.is_adopted() && !datapath.are_hooks_ours());
    opened.check(|| ());
    assert_eq!(connector.more(N_CONNECTS), "o", "layout 2's maps serve until the first table");
    opened.check(|| apply(&mut datapath, table()));
    assert!(datapath.are_hooks_ours());
    assert_eq!(connector.more(N_CONNECTS), "n");
    opened.check(|| ());
    assert_eq!(layouts(&place), ["v3"]);
    // The former names of the storages stay for a version that is rolled back to.
    assert!(STORAGES.iter().all(|name| place.pin("sockets").join(name).exists()));

    drop(datapath);
    let mut datapath = place.start();
    assert!(datapath.is_adopted());
    apply(&mut datapath, table());
    opened.check(|| ());
    assert_eq!(connector.more(N_CONNECTS), "n");
    connector.stop();
    datapath.detach();
    assert!(!place.options.bpffs.exists());
}

/// While only the first table is awaited, this version's maps have the mode of the former ones.
pub fn shadow_mode_is_taken_over() {
    let server = Server::start(b'a');
    let place = Place::new();
    start(&place);
    serve(&place, 0, "web", VIP, TCP, server.address);
    set_daemon(&place, true);
    let mut datapath = place.start();
    assert!(!datapath.is_adopted() && datapath.is_shadow());
    apply(&mut datapath, vec![service("web", VIP, &[(server.address, 1)])]);
    assert!(datapath.are_hooks_ours() && datapath.is_shadow());
    datapath.detach();
}

/// Rolled back to layout 2 on a machine that began with this version, UDP sockets keep the VIP as their
/// peer. TCP connections go on and show their backend, because that version doesn't know the records.
pub fn is_rolled_back_to() {
    let (server, echo) = (Server::start(b'a'), Echo::start());
    let place = Place::new();
    let mut datapath = place.start_attached();
    let mut mirror = service("mirror", OTHER_VIP, &[(echo.address.into(), 1)]);
    mirror.protocols = Protocols::Udp;
    apply(&mut datapath, vec![service("web", VIP, &[(server.address, 1)]), mirror]);
    let opened = Opened::open();
    opened.check(|| ());
    drop(datapath);

    start(&place);
    serve(&place, 0, "web", VIP, TCP, server.address);
    serve(&place, 1, "mirror", OTHER_VIP, UDP, echo.address.into());
    set_daemon(&place, false);
    // As layout 2's daemon does it with the hooks of a later version.
    for link in fs::read_dir(place.pin("v3/links")).unwrap() {
        let link = link.unwrap().path();
        if link.is_file() {
            detach(&link);
        }
    }
    fs::remove_dir_all(place.pin("v3")).unwrap();
    opened.check_datagrams(|| ());
    assert_eq!(opened.stream_peer(), server.address);
    assert_eq!(unload(&place.options.bpffs).unwrap(), HOOKS.len());
}

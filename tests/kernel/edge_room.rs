//! The unit `edge` where room, ports or backends are short: what is established loses nothing.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use aya::maps::{Array, HashMap, Map, MapData};
use lb_common::{
    FlowKey4, FlowRecord, FlowRef, FlowWord, IPPROTO_TCP, IPPROTO_UDP, N_EDGE_PORTS, PortCursor,
    PortPlace,
};
use lb_userspace::datapath::{Datapath, EdgeFlowState, EdgeOptions, EdgeTimeouts};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::choice::now_ms;
use crate::edge::{
    BACKEND, CLIENT, LONG, Network, PORT, PUBLIC, SILENT, SOURCE, apply, count, flows, options,
    place, public, request, serve, serve_with, start_server, stop_server,
};
use crate::fixture::table;
use crate::names::Container;
use crate::netns::inside;

/// How many flows there is room for.
const ROOM: usize = 64;

fn small() -> EdgeOptions {
    EdgeOptions { max_flows: ROOM as u32, ..options() }
}

fn socket(flags: SocketFlags) -> OwnedFd {
    let (family, kind) = (AddressFamily::INET, SocketType::STREAM);
    rustix::net::socket_with(family, kind, flags | SocketFlags::CLOEXEC, None).unwrap()
}

/// A connection from an address and port, which may have been used by one before.
pub fn bound_stream(from: (Ipv4Addr, u16), to: SocketAddr) -> TcpStream {
    let socket = socket(SocketFlags::empty());
    sockopt::set_socket_reuseaddr(&socket, true).unwrap();
    rustix::net::bind(&socket, &SocketAddrV4::new(from.0, from.1)).unwrap();
    rustix::net::connect(&socket, &to).unwrap();
    socket.into()
}

/// Ends a connection with a RST.
pub fn reset(stream: TcpStream) {
    sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
}

/// Begins connections, and waits for none.
fn begin(n: usize, to: SocketAddr) -> Vec<OwnedFd> {
    let begun = |_| {
        let socket = socket(SocketFlags::NONBLOCK);
        assert_eq!(rustix::net::connect(&socket, &to), Err(Errno::INPROGRESS));
        socket
    };
    (0..n).map(begun).collect()
}

/// A backend's connections, in pairs of both ends.
struct Connections {
    listener: TcpListener,
    pairs: Vec<(TcpStream, TcpStream)>,
}

impl Connections {
    fn new(network: &Network) -> Connections {
        let listener = network.backend.run(|| TcpListener::bind((BACKEND, PORT)).unwrap());
        Connections { listener, pairs: Vec::new() }
    }

    /// Opens some more. What keeps their places may have to wait for a second.
    fn open(&mut self, client: &Container, vip: SocketAddr, n: usize) {
        let connect = move || TcpStream::connect_timeout(&vip, LONG);
        for _ in 0..n {
            let start = Instant::now();
            let stream = loop {
                match client.run(connect) {
                    Ok(stream) => break stream,
                    Err(error) => assert!(start.elapsed() < LONG, "{error}"),
                }
                std::thread::sleep(Duration::from_millis(50));
            };
            let (accepted, _) = self.listener.accept().unwrap();
            accepted.set_read_timeout(Some(LONG)).unwrap();
            self.pairs.push((stream, accepted));
        }
    }

    fn all_go_on(&mut self) {
        for (stream, accepted) in &mut self.pairs {
            stream.write_all(b"on").unwrap();
            accepted.read_exact(&mut [0; 2]).unwrap();
        }
    }
}

/// A table that is full of established connections refuses new ones; those that are closed make room in seconds,
/// not after a minute.
pub fn a_full_table() {
    inside(|| {
        let (place, network) = (place(), Network::new());
        let vip = SocketAddr::from((PUBLIC, 80));
        let web = public("web", &[(BACKEND, PORT).into()], &[vip]);
        let mut datapath = serve_with(&place, vec![web], small());
        datapath.fix();
        let mut connections = Connections::new(&network);
        connections.open(&network.client, vip, ROOM);
        // What was proved stays so: there is no room for another proof.
        datapath.prove_edge_again();
        assert_eq!(datapath.edge_status().unwrap().proofs[0], Some(Ok(())));
        let refused = move || TcpStream::connect_timeout(&vip, LONG).map_err(|error| error.kind());
        for _ in 0..3 {
            assert_eq!(network.client.run(refused).unwrap_err(), ErrorKind::ConnectionRefused);
        }
        assert_eq!(count(&datapath, "table_full"), 3);
        connections.all_go_on();
        assert_eq!(flows(&datapath).len(), ROOM);

        connections.pairs.truncate(ROOM / 2);
        let start = Instant::now();
        while network.client.run(refused).is_err() {
            assert!(start.elapsed() < LONG, "{:?}", datapath.edge_counts());
            std::thread::sleep(Duration::from_millis(50));
        }
        // As many as have ended, one after the other.
        connections.listener.accept().unwrap();
        connections.open(&network.client, vip, ROOM / 4);
        assert!(count(&datapath, "flows_taken") > ROOM as u64 / 4, "{:?}", datapath.edge_counts());
        assert_eq!(count(&datapath, "flows_expired"), 0);
        connections.all_go_on();
    });
}

/// Flows end by their time without a daemon, too: the programs that need room find them.
pub fn room_without_a_daemon() {
    inside(|| {
        let (place, network) = (place(), Network::new());
        let vip = SocketAddr::from((PUBLIC, 80));
        let web = || public("web", &[(BACKEND, PORT).into()], &[vip]);
        let timeouts =
            EdgeTimeouts { established: Duration::from_secs(2), ..EdgeTimeouts::default() };
        let short = || EdgeOptions { timeouts, ..small() };
        let datapath = serve_with(&place, vec![web()], short());
        let mut connections = Connections::new(&network);
        connections.open(&network.client, vip, ROOM);
        drop(datapath);
        // Those that are established give way to none before.
        connections.open(&network.client, vip, ROOM / 2);
        let mut datapath = place.start();
        datapath.configure_edge(Some(short()));
        assert!(count(&datapath, "flows_expired") >= ROOM as u64 / 2);
        assert_eq!(count(&datapath, "flows_taken"), 0);
        apply(&mut datapath, vec![web()]);
        let idx = datapath.indices("web").unwrap().backends[&(BACKEND, PORT).into()];
        let in_flight = datapath.counters().outcomes(idx).in_flight;
        assert_eq!(in_flight as usize, flows(&datapath).len());
    });
}

/// A sweep of many records, which ends many flows, is done by parts: changes don't wait for all of it.
pub fn a_sweep_in_parts() {
    const N_RECORDS: u32 = 131_072;
    /// Flows that are over, and those that aren't, in the first part and in the last one.
    const OVER: [std::ops::Range<u32>; 2] = [10..2_510, N_RECORDS - 1_000..N_RECORDS];
    const LEFT: [u32; 3] = [5, 3_000, N_RECORDS - 1_001];
    inside(|| {
        let (place, _network) = (place(), Network::new());
        let vip = SocketAddr::from((PUBLIC, 80));
        let web = public("web", &[(BACKEND, PORT).into()], &[vip]);
        let many = EdgeOptions { max_flows: N_RECORDS, ..options() };
        let mut datapath = serve_with(&place, vec![web], many);
        let map = |name: &str| MapData::from_pin(place.pin("v3/maps").join(name)).unwrap();
        let mut records: Array<_, [u64; 8]> = Map::Array(map("EDGE_RECORDS")).try_into().unwrap();
        let mut keys: HashMap<_, [u64; 2], u64> =
            Map::HashMap(map("EDGE_FLOWS")).try_into().unwrap();
        let now_ms = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let now_ms = (now_ms.tv_sec * 1_000) as u32;
        let mut insert = |idx: u32, last_ms: u32| {
            let client = Ipv4Addr::from(u32::from(CLIENT) + (idx >> 15) + 1);
            let (client_port, source_port) = (idx as u16 | 0x8000, idx as u16 & 0x7fff);
            let source = Ipv4Addr::from(u32::from(SOURCE) + (idx >> 15) + 1);
            let record = FlowRecord {
                claims: 1,
                word: FlowWord {
                    client: FlowWord::FIRST,
                    backend: FlowWord::FIRST,
                    flags: 0,
                    protocol: IPPROTO_UDP,
                },
                last_ms,
                client_port,
                vip_port: 80,
                backend_port: PORT,
                source_port,
                client: client.octets(),
                vip: PUBLIC.octets(),
                backend: BACKEND.octets(),
                source: source.octets(),
                ..FlowRecord::default()
            };
            let record: [u64; 8] = zerocopy::transmute!(record);
            records.set(idx, record, 0).unwrap();
            let there = ((client.octets(), client_port), (PUBLIC.octets(), 80));
            let back = ((BACKEND.octets(), PORT), (source.octets(), source_port));
            for (is_back, (from, to)) in [there, back].into_iter().enumerate() {
                let key = FlowKey4::of(from, to, IPPROTO_UDP);
                let flow = FlowRef { record: idx, is_back: is_back as u32 };
                let (key, flow): ([u64; 2], u64) =
                    (zerocopy::transmute!(key), zerocopy::transmute!(flow));
                keys.insert(key, flow, 1).unwrap();
            }
        };
        let an_hour_ago = now_ms.wrapping_sub(3_600_000);
        OVER.into_iter().flatten().for_each(|idx| insert(idx, an_hour_ago));
        LEFT.into_iter().for_each(|idx| insert(idx, now_ms));
        datapath.fix();
        let n_flows = flows(&datapath).len();
        assert!(n_flows > 1_000 && n_flows < 3_503, "a part has ended: {n_flows} are left");
        // That one, and the last.
        let mut n_parts = 2;
        while datapath.sweep_edge_on() {
            n_parts += 1;
        }
        // Twice 1,024 flows, and twice 65,536 records at most.
        assert_eq!(n_parts, 4);
        assert_eq!(flows(&datapath).len(), LEFT.len());
        assert_eq!(keys.keys().count(), 2 * LEFT.len());
        assert_eq!(datapath.edge_status().unwrap().n_flows, LEFT.len() as u32);
        // The next one begins at the first record.
        datapath.sweep_edge_after(Duration::from_secs(3_600));
        assert_eq!(flows(&datapath), []);
        assert_eq!(keys.keys().count(), 0);
    });
}

/// Each processor searches for a place by itself; where another one's flows lie side by side it looks elsewhere.
pub fn room_elsewhere() {
    /// More than one search looks at, fewer than a listener keeps for accept().
    const N: usize = 100;
    inside(|| {
        let (place, network) = (place(), Network::new());
        let vip = SocketAddr::from((PUBLIC, 80));
        let web = public("web", &[(BACKEND, PORT).into()], &[vip]);
        let datapath = serve_with(&place, vec![web], options());
        let mut connections = Connections::new(&network);
        let processors = sched_getaffinity(None).unwrap();
        for processor in (0..CpuSet::MAX_CPU).filter(|&nth| processors.is_set(nth)).take(2) {
            let streams = network.client.run(move || {
                let mut one = CpuSet::new();
                one.set(processor);
                sched_setaffinity(None, &one).unwrap();
                let connect = |_| TcpStream::connect_timeout(&vip, LONG).unwrap();
                (0..N).map(connect).collect::<Vec<_>>()
            });
            let accept = |stream| (stream, connections.listener.accept().unwrap().0);
            connections.pairs.extend(streams.into_iter().map(accept).collect::<Vec<_>>());
        }
        assert_eq!(count(&datapath, "table_full"), 0);
    });
}

/// SYNs and datagrams that nothing answers take no record of an established connection, and don't keep others out.
pub fn a_flood() {
    inside(|| {
        let (place, network) = (place(), Network::new());
        let (vip, other) =
            (SocketAddr::from((PUBLIC, 80)), SocketAddr::from(([203, 0, 113, 11], 80)));
        let services = vec![
            public("web", &[(BACKEND, PORT).into()], &[vip]),
            public("silent", &[(SILENT, PORT).into()], &[other]),
        ];
        let datapath = serve_with(&place, services, small());
        let mut connections = Connections::new(&network);
        connections.open(&network.client, vip, ROOM / 2);
        let begun = network.client.run(move || begin(4 * ROOM, other));
        let refused =
            |datapath: &Datapath| count(datapath, "syn_flood") + count(datapath, "table_full");
        assert!(refused(&datapath) >= ROOM as u64, "{:?}", datapath.edge_counts());
        connections.all_go_on();
        // Those that wait give way.
        connections.open(&network.client, vip, 1);
        drop(begun);
        let n_before = refused(&datapath);
        network.client.run(move || {
            for _ in 0..4 * ROOM {
                let socket = UdpSocket::bind((CLIENT, 0)).unwrap();
                socket.send_to(b"?", other).unwrap();
            }
        });
        assert!(refused(&datapath) > n_before, "{:?}", datapath.edge_counts());
        connections.all_go_on();
        connections.open(&network.client, vip, 1);
        let established = |state| state == EdgeFlowState::Established;
        let n = flows(&datapath).iter().filter(|flow| established(flow.state)).count();
        assert_eq!(n, ROOM / 2 + 2);
    });
}

/// A record of one address family keeps the addresses that an earlier flow of the other one had, to which the cache may
/// still lead.
pub fn a_record_of_another_family() {
    inside(|| {
        let (place, network) = (place(), Network::new());
        let vip = SocketAddr::from((PUBLIC, 80));
        let _datapath = serve(&place, vec![public("web", &[(BACKEND, PORT).into()], &[vip])]);
        let mut connections = Connections::new(&network);
        connections.open(&network.client, vip, 1);
        // The first of these is cached.
        (0..2).for_each(|_| connections.all_go_on());
        let map = |name: &str| MapData::from_pin(place.pin("v3/maps").join(name)).unwrap();
        let mut records: Array<_, [u64; 8]> = Map::Array(map("EDGE_RECORDS")).try_into().unwrap();
        let mut keys: HashMap<_, [u64; 2], u64> =
            Map::HashMap(map("EDGE_FLOWS")).try_into().unwrap();
        let entries: Vec<([u64; 2], u64)> = keys.iter().map(Result::unwrap).collect();
        assert_eq!(entries.len(), 2);
        let FlowRef { record: idx, .. } = zerocopy::transmute!(entries[0].1);
        let mut record: FlowRecord = zerocopy::transmute!(records.get(&idx, 0).unwrap());
        record.word.flags |= FlowWord::IPV6;
        let record: [u64; 8] = zerocopy::transmute!(record);
        records.set(idx, record, 0).unwrap();
        entries.iter().for_each(|(key, _)| keys.remove(key).unwrap());
        let (stream, _) = &mut connections.pairs[0];
        stream.write_all(b"on").unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    });
}

/// A port that is in use is passed over. Where all that are tried are, new flows are refused, unless one is of a flow that
/// is as good as over.
pub fn ports_run_out() {
    const N_TRIES: u32 = 16;
    // The first one that takes a port.
    const TAKES: usize = 4;
    const HOLDER: u32 = 1_000;
    inside(|| {
        let (place, network) = (place(), Network::new());
        let vip = SocketAddr::from((PUBLIC, 80));
        let datapath = serve(&place, vec![public("web", &[(BACKEND, PORT).into()], &[vip])]);
        start_server(&network.backend, BACKEND.into(), 'A');
        let answer = |network: &Network| {
            network.client.run(move || request(vip, b"?")).map_err(|error| error.kind())
        };
        let expected = Ok(format!("A {SOURCE} 1"));
        assert_eq!(answer(&network), expected);
        let idx = datapath.indices("web").unwrap().backends[&(BACKEND, PORT).into()];
        let map = |name: &str| MapData::from_pin(place.pin("v3/maps").join(name)).unwrap();
        let mut ports: Array<_, [u8; 64]> = Map::Array(map("EDGE_PORTS")).try_into().unwrap();
        let mut keys: HashMap<_, [u64; 2], u64> =
            Map::HashMap(map("EDGE_FLOWS")).try_into().unwrap();
        // From the last port but one on.
        let last = N_EDGE_PORTS - 2;
        let mut search_again = || {
            let octets: [u8; 64] = zerocopy::transmute!(PortCursor { last, ..Default::default() });
            ports.set(idx, octets, 0).unwrap();
        };
        let mut place = last;
        let mut next = |nth: u32| {
            let next = PortPlace::of(place + 1 + PortPlace::step(nth), 1);
            place = next.place;
            next.port
        };
        let tried: Vec<u16> = (0..N_TRIES).map(&mut next).collect();
        let key = |port: &u16| -> [u64; 2] {
            let (from, to) = ((BACKEND.octets(), PORT), (SOURCE.octets(), *port));
            zerocopy::transmute!(FlowKey4::of(from, to, IPPROTO_TCP))
        };
        let taken: Vec<[u64; 2]> = tried.iter().map(key).collect();
        let of_others: u64 = zerocopy::transmute!(FlowRef { record: HOLDER, is_back: 1 });
        taken.iter().for_each(|key| keys.insert(key, of_others, 0).unwrap());
        let mut records: Array<_, [u64; 8]> = Map::Array(map("EDGE_RECORDS")).try_into().unwrap();
        let mut set_holder = |shown: u8, idle_ms: u32| {
            let record = FlowRecord {
                claims: 1,
                word: FlowWord { client: shown, backend: shown, flags: 0, protocol: IPPROTO_TCP },
                last_ms: now_ms().wrapping_sub(idle_ms),
                backend_port: PORT,
                backend: BACKEND.octets(),
                source_port: tried[TAKES],
                source: SOURCE.octets(),
                ..FlowRecord::default()
            };
            let record: [u64; 8] = zerocopy::transmute!(record);
            records.set(HOLDER, record, 0).unwrap();
        };
        set_holder(FlowWord::FIRST | FlowWord::ACK, 60_000);
        search_again();
        assert_eq!(answer(&network), Err(ErrorKind::ConnectionRefused));
        assert_eq!(count(&datapath, "no_port"), 1);
        keys.remove(&taken[N_TRIES as usize - 1]).unwrap();
        search_again();
        assert_eq!(answer(&network), expected);
        assert_eq!(count(&datapath, "no_port"), 1);
        // A connection that was closed gives its port away, if it hasn't just been.
        keys.insert(taken[N_TRIES as usize - 1], of_others, 0).unwrap();
        set_holder(FlowWord::FIRST | FlowWord::FIN, 0);
        search_again();
        assert_eq!(answer(&network), Err(ErrorKind::ConnectionRefused));
        set_holder(FlowWord::FIRST | FlowWord::FIN, 3_000);
        search_again();
        assert_eq!(answer(&network), expected);
        assert_eq!((count(&datapath, "no_port"), count(&datapath, "flows_taken")), (2, 1));
        stop_server(&network.backend, BACKEND.into());
    });
}

/// SYNs that are sent again go to another backend, where the first one doesn't answer; without another one they
/// count as its failures when their time is over.
pub fn a_backend_is_silent() {
    inside(|| {
        let (place, network) = (place(), Network::new());
        let vip = SocketAddr::from((PUBLIC, 80));
        let silent = SocketAddr::from((SILENT, PORT));
        let mut datapath = serve(&place, vec![public("web", &[silent], &[vip])]);
        let begun = network.client.run(move || begin(3, vip));
        datapath.sweep_edge_after(Duration::from_secs(3_600));
        let indices = datapath.indices("web").unwrap();
        let (counters, idx) = (datapath.counters(), indices.backends[&silent]);
        assert_eq!(counters.service(indices.service).failed, 3);
        assert_eq!(counters.backend_failures(idx), 3);
        assert_eq!(counters.outcomes(idx).pending, 0);
        assert!(counters.ejected(idx).is_some());
        drop(begun);

        let both = public("other", &[silent, (BACKEND, PORT).into()], &[vip]);
        apply(&mut datapath, vec![both]);
        start_server(&network.backend, BACKEND.into(), 'A');
        for _ in 0..8 {
            let answer = network.client.run(move || request(vip, b"?"));
            assert_eq!(answer.unwrap(), format!("A {SOURCE} 1"));
        }
        // What is measured of a backend that answers decides how long it may take.
        let idx = datapath.indices("other").unwrap().backends[&(BACKEND, PORT).into()];
        let connect_us = counters.connect_us(idx).unwrap();
        assert!(connect_us < 20_000_000, "{connect_us}");
        stop_server(&network.backend, BACKEND.into());
    });
}

/// More VIPs than the map of frontends has room for: services come first, what doesn't fit is a problem in `status`,
/// and nothing of it is left when there are fewer.
pub fn too_many_vips() {
    inside(|| {
        let (mut place, _network) = (place(), Network::new());
        // Those of the hooks have room for all.
        place.options.datapath.max_services = 8_192;
        let mut datapath = serve(&place, Vec::new());
        let many = |n: u32| {
            let first = u32::from(Ipv4Addr::new(203, 0, 0, 0));
            let vips: Vec<SocketAddr> =
                (0..n).map(|nth| (Ipv4Addr::from(first + nth), 80).into()).collect();
            public("web", &[(BACKEND, PORT).into()], &vips)
        };
        let room = |datapath: &Datapath| {
            let pressure = datapath.pressure();
            pressure.into_iter().find(|(map, _)| *map == "EDGE_FRONTENDS").unwrap().1
        };
        let capacity = room(&datapath).capacity;
        // By TCP and UDP, and two of any port.
        let n_vips = capacity / 4 + 10;
        assert!(datapath.apply(&table(vec![many(n_vips)])).unwrap().is_empty());
        let problems = datapath.edge_status().unwrap().problems;
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(problems[0].starts_with("edge: 40 of 16424 public frontends"), "{problems:?}");
        assert_eq!(room(&datapath).used, capacity);
        // What was given up doesn't keep others out.
        let vip = SocketAddr::from((PUBLIC, 80));
        apply(&mut datapath, vec![public("web", &[(BACKEND, PORT).into()], &[vip])]);
        assert_eq!(room(&datapath).used, 4);
        apply(&mut datapath, vec![many(capacity / 4)]);
        assert_eq!(room(&datapath).used, capacity);
    });
}

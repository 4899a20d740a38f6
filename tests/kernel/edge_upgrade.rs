//! The unit `edge` from one version to another, while packets go to and fro.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Instant;

use aya::maps::MapInfo;
use aya::programs::{SchedClassifier, Xdp, loaded_programs};
use aya::{EbpfLoader, include_bytes_aligned};
use lb_common::LAYOUT;

use crate::disconnect::bpf;
use crate::edge::{
    BACKEND, CLIENT, LONG, Network, PORT, PUBLIC, SOURCE, answer_datagrams, apply, count, options,
    place, serve, start_server, stop_server, web,
};
use crate::edge_xdp::network;
use crate::fixture::{End, Place};
use crate::netns::inside;
use crate::pins::bpftool;
use crate::rollback::pinned;

static FORMER: &[u8] = include_bytes_aligned!("fixtures/edge.o");

fn vip() -> SocketAddr {
    (PUBLIC, 80).into()
}

/// A client's UDP socket.
fn client(network: &Network) -> UdpSocket {
    network.client.run(|| {
        let socket = UdpSocket::bind((CLIENT, 0)).unwrap();
        socket.set_read_timeout(Some(LONG)).unwrap();
        socket.connect(vip()).unwrap();
        socket
    })
}

/// Sends a question, and receives its answer.
fn ask_by(socket: &UdpSocket) {
    let mut answer = [0; 64];
    socket.send(b"who").unwrap();
    let len = socket.recv(&mut answer).unwrap();
    assert_eq!(String::from_utf8_lossy(&answer[..len]), format!("A {SOURCE} 3"));
}

/// Runs it while a client asks the backend one question after the other by one UDP socket; each has its answer. It is
/// given what waits for a hundred more answers.
fn while_asked(network: &Network, work: impl FnOnce(&dyn Fn())) {
    let (is_over, n_answered) = (AtomicBool::new(false), AtomicU64::new(0));
    let socket = client(network);
    let ask_on = || {
        while !is_over.load(Relaxed) {
            ask_by(&socket);
            n_answered.fetch_add(1, Relaxed);
        }
    };
    std::thread::scope(|scope| {
        let end = End(&is_over);
        let client = scope.spawn(ask_on);
        let some_more = || {
            let (n, start) = (n_answered.load(Relaxed), Instant::now());
            while n_answered.load(Relaxed) < n + 100 {
                assert!(!client.is_finished() && start.elapsed() < LONG);
                std::thread::yield_now();
            }
        };
        some_more();
        work(&some_more);
        some_more();
        drop(end);
        client.join().unwrap();
    });
}

/// The ids of the programs that have the flows of an edge.
fn programs(place: &Place) -> Vec<u32> {
    let info = MapInfo::from_pin(place.pin("v3/maps/EDGE_RECORDS")).unwrap();
    let has_map = |ids: Option<Vec<u32>>| ids.is_some_and(|ids| ids.contains(&info.id()));
    let all = loaded_programs().filter_map(Result::ok);
    all.filter(|program| program.map_ids().is_ok_and(has_map)).map(|one| one.id()).collect()
}

/// Another version's programs over the pinned maps, each with how the pins of its links begin. They are loaded before
/// packets come: an emulated processor takes long for it.
fn load_former(place: &Place) -> [(&'static str, OwnedFd); 3] {
    let paths = place.pin("v3/maps").read_dir().unwrap().map(|pin| pin.unwrap().path());
    let paths: Vec<_> = paths.collect();
    let mut loader = EbpfLoader::new();
    for path in &paths {
        let name = path.file_name().unwrap().to_str().unwrap();
        let info = MapInfo::from_pin(path).unwrap();
        loader.map_max_entries(name, info.max_entries()).map_pin_path(name, path);
    }
    let mut former = loader.load(FORMER).unwrap();
    let mut classifier = |name| {
        let program: &mut SchedClassifier = former.program_mut(name).unwrap().try_into().unwrap();
        program.load().unwrap();
        program.fd().unwrap().as_fd().try_clone_to_owned().unwrap()
    };
    let (ingress, egress) = (classifier("nohop_edge"), classifier("nohop_edge_out"));
    let xdp: &mut Xdp = former.program_mut("nohop_edge_xdp").unwrap().try_into().unwrap();
    xdp.load().unwrap();
    let xdp = xdp.fd().unwrap().as_fd().try_clone_to_owned().unwrap();
    [("nohop_edge_in_", ingress), ("nohop_edge_out_", egress), ("nohop_edge_xdp_", xdp)]
}

/// Puts another version's programs into the links that are pinned, as that version's daemon did. Returns how many.
fn put_former(place: &Place, former: &[(&str, OwnedFd)]) -> usize {
    const BPF_LINK_UPDATE: libc::c_int = 29;
    let mut n_replaced = 0;
    for (prefix, program) in former {
        for pin in place.pin("v3/links").read_dir().unwrap() {
            let pin = pin.unwrap();
            if pin.file_name().to_string_lossy().starts_with(prefix) {
                let link = pinned(&pin.path());
                bpf(BPF_LINK_UPDATE, &[link.as_raw_fd(), program.as_raw_fd(), 0, 0]).unwrap();
                n_replaced += 1;
            }
        }
    }
    n_replaced
}

/// Sends the last of a connection, and reads what comes back.
fn end(network: &Network, mut stream: TcpStream) -> std::io::Result<String> {
    network.client.run(move || {
        stream.set_read_timeout(Some(LONG))?;
        stream.write_all(b"late")?;
        stream.shutdown(Shutdown::Write)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).map(|_| answer)
    })
}

fn connected(network: &Network) -> TcpStream {
    network.client.run(|| TcpStream::connect_timeout(&vip(), LONG).unwrap())
}

/// A version takes over from an earlier one, whose programs are others, and which lacks maps that only the programs use,
/// or has smaller ones: of the packets that go to and fro meanwhile none is lost.
/// Before Linux 6.6 both have the same programs.
pub fn between_versions() {
    inside(|| {
        let (place, network) = (place(), network(true));
        let mut running = Some(serve(&place, vec![web()]));
        start_server(&network.backend, BACKEND.into(), 'A');
        let ours = programs(&place);
        // Filters of clsact have no links.
        let former = (crate::running_kernel() >= (6, 6)).then(|| load_former(&place));
        while_asked(&network, |some_more| {
            let first = connected(&network);
            if let Some(former) = &former {
                // Each interface has three.
                assert_eq!(put_former(&place, former), 6);
            }
            drop(running.take());
            some_more();
            // The former version began flows that this one has to know.
            let by_former = connected(&network);
            for name in ["EDGE_CACHE", "EDGE_NEIGHBOURS", "EDGE_HOPS"] {
                std::fs::remove_file(place.pin("v3/maps").join(name)).unwrap();
            }
            let other = place.pin("v3/maps/EDGE_HOPS");
            let kind =
                ["type", "array", "key", "4", "value", "64", "entries", "7", "name", "other"];
            bpftool(&[["map", "create", other.to_str().unwrap()].as_slice(), &kind].concat());
            let before = programs(&place);
            drop(former);
            let mut datapath = place.start();
            datapath.configure_edge(Some(options()));
            some_more();
            apply(&mut datapath, vec![web()]);
            some_more();
            datapath.fix();
            some_more();
            let after = programs(&place);
            let is_new = |programs: &[u32]| programs.iter().all(|program| !after.contains(program));
            assert!(!after.is_empty() && is_new(&before) && is_new(&ours), "{before:?}, {after:?}");
            // The server takes one after the other.
            for stream in [first, by_former] {
                assert_eq!(end(&network, stream).unwrap(), format!("A {SOURCE} 4late"));
            }
            running = Some(datapath);
        });
        assert_eq!(count(&running.unwrap(), "flows_begun"), 3);
        stop_server(&network.backend, BACKEND.into());
    });
}

/// A version with another layout takes over from one, whose programs serve until it has a table. It doesn't know the flows:
/// datagrams begin them again, connections are reset at their next packet, and new ones begin.
pub fn over_another_layout() {
    inside(|| {
        let (mut place, network) = (place(), network(true));
        place.options.layout = 9;
        let datapath = serve(&place, vec![web()]);
        let _listener = network.backend.run(|| {
            answer_datagrams(BACKEND.into(), 'A');
            TcpListener::bind((BACKEND, PORT)).unwrap()
        });
        let (stream, socket) = (connected(&network), client(&network));
        ask_by(&socket);
        drop(datapath);
        place.options.layout = LAYOUT;
        let mut datapath = place.start();
        ask_by(&socket);
        datapath.configure_edge(Some(options()));
        ask_by(&socket);
        connected(&network);
        apply(&mut datapath, vec![web()]);
        assert!(!place.pin("v9").exists());
        ask_by(&socket);
        let reset = network.client.run(move || {
            let mut stream = stream;
            stream.set_read_timeout(Some(LONG)).unwrap();
            stream.write_all(b"late").unwrap();
            stream.read(&mut [0]).unwrap_err().kind()
        });
        assert_eq!(reset, ErrorKind::ConnectionReset);
        connected(&network);
        assert_eq!(count(&datapath, "flows_begun"), 2);
        network.backend.run(|| {
            let socket = UdpSocket::bind((BACKEND, 0)).unwrap();
            socket.send_to(b"", (BACKEND, PORT)).unwrap();
        });
    });
}

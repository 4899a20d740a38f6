//! The kernel goes on without the daemon, and with the next one: applications notice nothing.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::thread::JoinHandle;
use std::time::Duration;

use lb_userspace::config::PlaneConfig;
use lb_userspace::datapath::{Indices, Plane, SharedPlane, unload};
use lb_userspace::table::{Protocols, Service};

use crate::fixture::{OTHER_VIP, Place, Server, VIP, backend, dial, service, table};
use crate::connector::Dialler;

/// Sizes that are lowered below what is served take nothing away; lowered to what is served, they come
/// into use, and what is served comes before what is new.
pub fn lower_sizes_take_nothing_away() {
    let server = Server::start(b's');
    let vip = |n: u8| Ipv4Addr::new(127, 200, 0, n);
    let web = |n: u8| service(&format!("s{n}"), vip(n), &[(server.address, 1)]);
    let all = || (1..=6).map(web).collect::<Vec<_>>();
    let are_served = || (1..=6).all(|n| dial((vip(n), 80)).is_ok_and(|letter| letter == 's'));
    let notes = |plane: &Plane| plane.notes().cloned().collect::<Vec<_>>().join("\n");
    // By name it comes before those that are served.
    let new = || service("a", vip(9), &[(server.address, 1)]);
    type Lower = fn(&mut PlaneConfig);
    let lowered: [(Lower, &str); 2] = [
        (|plane| plane.max_services = 4, "plane.max_services = 4 has no room for the 6 services"),
        (|plane| plane.max_backends = 5, "plane.max_backends = 5 has no room for the 6 backends"),
    ];
    for (lower, expected) in lowered {
        let mut place = Place::new();
        (place.options.plane.max_services, place.options.plane.max_backends) = (16, 64);
        let mut plane = place.start();
        apply(&mut plane, all());
        drop(plane);
        lower(&mut place.options.plane);
        let mut plane = place.start();
        assert!(notes(&plane).contains(expected), "{}", notes(&plane));
        assert!(are_served(), "{expected}: before the first table");
        apply(&mut plane, all());
        assert!(are_served(), "{expected}: after the first table");
        plane.mend();
        drop(plane);

        // What is served fits now, and nothing else.
        (place.options.plane.max_services, place.options.plane.max_backends) = (6, 64);
        let mut plane = place.start();
        assert_eq!(notes(&plane), "");
        let errors = plane.apply(&table([vec![new()], all()].concat())).unwrap();
        assert_eq!(errors.keys().map(|name| &**name).collect::<Vec<_>>(), ["a"], "{errors:?}");
        assert!(are_served() && plane.are_hooks_ours());
        plane.detach();
    }
}

/// New maps that turn out to lack room for a service that is served aren't switched to.
pub fn maps_that_hold_less_are_not_used() {
    let server = Server::start(b's');
    let vip = |n: u8| Ipv4Addr::new(127, 200, 0, n);
    let web = |n: u8| service(&format!("s{n}"), vip(n), &[(server.address, 1)]);
    let mut place = Place::new();
    (place.options.plane.max_services, place.options.plane.max_backends) = (16, 64);
    let mut plane = place.start();
    apply(&mut plane, vec![web(1), web(2)]);
    drop(plane);
    place.options.plane.max_backends = 2;
    let mut plane = place.start();
    // It grew while nobody looked: 5 entries, of 4.
    let mut grown = web(2);
    grown.backends.extend((1..=3).map(|port| backend(([10, 0, 0, 1], port).into(), 1)));
    let error = plane.apply(&table(vec![web(1), grown.clone()])).unwrap_err().to_string();
    for part in ["1 of the services that are served", "s2", "raise plane.max_backends"] {
        assert!(error.contains(part), "no {part:?} in {error}");
    }
    assert!(!plane.are_hooks_ours());
    let shared = SharedPlane::new(plane);
    shared.apply(&table(vec![web(1), grown]));
    shared.look_after();
    let hooks = shared.hooks();
    assert!(hooks.attached && hooks.translate, "names are answered: {hooks:?}");
    assert!(hooks.waiting.is_some() && shared.is_behind());
    assert!([1, 2].iter().all(|&n| dial((vip(n), 80)).is_ok()), "the former maps serve");
    // A table that fits is switched to.
    shared.apply(&table(vec![web(1), web(2)]));
    let hooks = shared.hooks();
    assert!(hooks.translate && hooks.waiting.is_none() && !shared.is_behind(), "{hooks:?}");
    assert!(dial((vip(2), 80)).is_ok());
}

/// Enough dials that a gap of a millisecond would be met.
const N_DIALS: u64 = 300;

fn indices(plane: &Plane) -> BTreeMap<String, Indices> {
    let names = plane.names().into_iter();
    names.map(|(name, _)| (name.to_string(), plane.indices(&name).unwrap())).collect()
}

fn apply(plane: &mut Plane, services: Vec<Service>) {
    let errors = plane.apply(&table(services)).unwrap();
    assert!(errors.is_empty(), "{errors:?}");
}

/// The daemon is killed while applications dial, and started again.
pub fn a_restart_loses_no_dial() {
    let servers = [b'a', b'b', b'c'].map(Server::start);
    let [web, other] = [(VIP, "web", &servers[..2]), (OTHER_VIP, "other", &servers[2..])].map(
        |(vip, name, of)| {
            let backends: Vec<_> = of.iter().map(|server| (server.address, 1)).collect();
            service(name, vip, &backends)
        },
    );
    let place = Place::new();
    let mut plane = place.start();
    assert!(!plane.is_adopted());
    apply(&mut plane, vec![web.clone(), other.clone()]);
    let (before, names) = (indices(&plane), plane.names());
    let dialler = Dialler::start((VIP, 80));
    dialler.more(N_DIALS);

    drop(plane);
    dialler.more(N_DIALS);
    let mut plane = place.start();
    dialler.more(N_DIALS);
    assert!(plane.is_adopted() && plane.are_hooks_ours());
    assert_eq!(indices(&plane), before, "the same ids");
    assert_eq!(plane.names(), names, "the same VIPs");
    assert_eq!(dial((OTHER_VIP, 80)).unwrap(), 'c', "nothing is pruned before the first table");

    apply(&mut plane, vec![web.clone()]);
    dialler.more(N_DIALS);
    assert_eq!(indices(&plane)["web"], before["web"], "what stays keeps its ids");
    assert_eq!(plane.names().len(), 1, "what isn't in the table is pruned");
    dial((OTHER_VIP, 80)).unwrap_err();
    plane.mend();
    let pressure: BTreeMap<_, _> = plane.pressure().into_iter().collect();
    assert_eq!(pressure["BACKENDS"].used, 2);
    assert_eq!(pressure["FRONTENDS"].used, 1);
    assert_eq!(dialler.stop(), "ab");
}

/// Answers datagrams with what they say, until one is empty.
struct Echo {
    address: SocketAddrV4,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    fn start() -> Echo {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let SocketAddr::V4(address) = socket.local_addr().unwrap() else { unreachable!() };
        let thread = std::thread::spawn(move || {
            let mut datagram = [0; 16];
            while let Ok((n @ 1.., from)) = socket.recv_from(&mut datagram) {
                let _ = socket.send_to(&datagram[..n], from);
            }
        });
        Echo { address, thread: Some(thread) }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        let _ = UdpSocket::bind("127.0.0.1:0").unwrap().send_to(&[], self.address);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Sockets that were opened through a plane.
struct Opened {
    stream: TcpStream,
    connected: UdpSocket,
    unconnected: UdpSocket,
}

impl Opened {
    fn open() -> Opened {
        let [connected, unconnected] = [(); 2].map(|()| {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            socket
        });
        connected.connect((OTHER_VIP, 80)).unwrap();
        let stream = TcpStream::connect((VIP, 80)).unwrap();
        Opened { stream, connected, unconnected }
    }

    /// What each of them sees of its peer is the VIP. A reply is under way while `meanwhile` runs.
    fn check(&self, meanwhile: impl FnOnce()) {
        let vip = SocketAddr::from((OTHER_VIP, 80));
        self.connected.send(b"c").unwrap();
        self.unconnected.send_to(b"u", vip).unwrap();
        meanwhile();
        for (socket, letter) in [(&self.connected, b'c'), (&self.unconnected, b'u')] {
            let mut reply = [0; 4];
            let (_, from) = socket.recv_from(&mut reply).unwrap();
            assert_eq!((reply[0], from), (letter, vip));
        }
        assert_eq!(self.connected.peer_addr().unwrap(), vip);
        assert_eq!(self.stream.peer_addr().unwrap(), SocketAddr::from((VIP, 80)));
    }
}

/// One daemon takes over from another with maps of its own. `change` is what sets them apart.
fn takes_over(change: fn(&mut Place)) {
    let (old, new, echo) = (Server::start(b'o'), Server::start(b'n'), Echo::start());
    let mut mirror = service("mirror", OTHER_VIP, &[(echo.address.into(), 1)]);
    mirror.protocols = Protocols::Udp;
    let with = |server: &Server| vec![service("web", VIP, &[(server.address, 1)]), mirror.clone()];
    let mut place = Place::new();
    let mut plane = place.start();
    apply(&mut plane, with(&old));
    let dialler = Dialler::start((VIP, 80));
    let opened = Opened::open();
    opened.check(|| ());

    drop(plane);
    change(&mut place);
    let mut plane = place.start();
    assert!(!plane.is_adopted() && !plane.are_hooks_ours());
    opened.check(|| ());
    assert_eq!(dialler.more(N_DIALS), "o", "the old table serves");
    opened.check(|| apply(&mut plane, with(&new)));
    assert!(plane.are_hooks_ours());
    assert_eq!(dialler.more(N_DIALS), "n", "then the new one");
    opened.check(|| ());
    opened.check(|| ());

    // The next one finds what it expects.
    drop(plane);
    let mut plane = place.start();
    assert!(plane.is_adopted());
    apply(&mut plane, with(&new));
    opened.check(|| ());
    dialler.more(N_DIALS);
    dialler.stop();
}

pub fn a_new_layout_takes_over() {
    takes_over(|place| place.options.layout = 3);
}

pub fn other_sizes_take_over() {
    takes_over(|place| place.options.plane.max_services = 100);
}

/// The directories of layouts that are there.
fn layouts(place: &Place) -> Vec<String> {
    let entries = std::fs::read_dir(&place.options.bpffs).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.filter(|name| name.starts_with('v')).collect();
    names.sort();
    names
}

/// A daemon is killed before its first table; the next one has the same layout, or the former.
pub fn a_crash_in_the_middle_serves_on() {
    let (old, new) = (Server::start(b'o'), Server::start(b'n'));
    let web = |server: &Server| vec![service("web", VIP, &[(server.address, 1)])];
    for next_layout in [3, 2] {
        let mut place = Place::new();
        let mut plane = place.start();
        apply(&mut plane, web(&old));
        let before = indices(&plane);
        let dialler = Dialler::start((VIP, 80));
        drop(plane);
        place.options.layout = 3;
        drop(place.start());
        assert_eq!(layouts(&place), ["v2", "v3"]);
        dialler.more(N_DIALS);

        place.options.layout = next_layout;
        let mut plane = place.start();
        assert_eq!(plane.is_adopted(), next_layout == 2);
        assert_eq!(dialler.more(N_DIALS), "o");
        if plane.is_adopted() {
            assert_eq!(indices(&plane), before);
        }
        apply(&mut plane, web(&new));
        assert_eq!(layouts(&place), [format!("v{next_layout}")]);
        assert_eq!(dialler.more(N_DIALS), "n");
        dialler.stop();
    }
}

/// Some of the maps aren't pinned any more, or none is, or no link.
pub fn half_written_pins_serve_on() {
    let remove = |path: &Path| {
        if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) }
    };
    let (old, new) = (Server::start(b'o'), Server::start(b'n'));
    let web = |server: &Server| vec![service("web", VIP, &[(server.address, 1)])];
    for missing in ["v2/maps/BACKENDS", "v2/maps/DAEMON", "v2/maps", "sockets/PEERS", "sockets"] {
        let place = Place::new();
        let mut plane = place.start();
        apply(&mut plane, web(&old));
        let dialler = Dialler::start((VIP, 80));
        drop(plane);
        remove(&place.pin(missing)).unwrap();
        for _ in 0..2 {
            let plane = place.start();
            assert_eq!(plane.is_adopted(), missing.starts_with("sockets"), "{missing}");
            assert_eq!(dialler.more(N_DIALS), "o", "{missing}");
        }
        let mut plane = place.start();
        apply(&mut plane, web(&new));
        assert!(place.pin(missing).exists());
        assert_eq!(dialler.more(N_DIALS), "n", "{missing}");
        dialler.stop();
    }
}

/// Something else wrote to the maps, while no daemon looked.
pub fn spoilt_maps_are_made_anew() {
    let (old, new) = (Server::start(b'o'), Server::start(b'n'));
    let web = |server: &Server| vec![service("web", VIP, &[(server.address, 1)])];
    for (map, value_size) in [("NAMES", 64), ("SERVICES", 64), ("SLOTS", 8), ("BACKENDS", 32)] {
        let place = Place::new();
        let mut plane = place.start();
        apply(&mut plane, web(&old));
        drop(plane);
        let path = place.pin(&format!("v2/maps/{map}"));
        let status = Command::new("bpftool")
            .args(["map", "update", "pinned", path.to_str().unwrap(), "key", "0", "0", "0", "0"])
            .arg("value")
            .args(vec!["255"; value_size])
            .status()
            .unwrap();
        assert!(status.success(), "{map}");
        let mut plane = place.start();
        assert!(!plane.is_adopted(), "{map}");
        assert!(plane.names().is_empty());
        apply(&mut plane, web(&new));
        assert_eq!(dial((VIP, 80)).unwrap(), 'n', "{map}");
    }
}

/// After `nohop unload` nothing of ours is left; while a daemon runs, it does nothing.
pub fn unload_removes_everything() {
    let server = Server::start(b'a');
    let place = Place::new();
    let mut plane = place.start();
    apply(&mut plane, vec![service("web", VIP, &[(server.address, 1)])]);
    let refused = unload(&place.options.bpffs).unwrap_err().to_string();
    assert!(refused.contains("another nohop"), "{refused}");
    assert_eq!(dial((VIP, 80)).unwrap(), 'a');
    drop(plane);
    assert_eq!(unload(&place.options.bpffs).unwrap(), 8);
    assert!(!place.options.bpffs.exists());
    dial((VIP, 80)).unwrap_err();
    assert_eq!(unload(&place.options.bpffs).unwrap(), 0, "a second time");
}

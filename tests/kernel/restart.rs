//! The kernel keeps working without the daemon, and with the next one: applications notice nothing.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::thread::JoinHandle;
use std::time::Duration;

use lb_userspace::config::DatapathConfig;
use lb_userspace::datapath::{Datapath, Indices, SharedDatapath, unload};
use lb_userspace::table::{Protocols, Service};

use crate::connector::Connector;
use crate::fixture::{OTHER_VIP, Place, Server, VIP, backend, connect, service, table};
use crate::pins::programs;

/// Sizes below the entries in use change nothing; sizes that just suffice are used, and present services
/// come before new ones.
pub fn lower_sizes_take_nothing_away() {
    let server = Server::start(b's');
    let vip = |n: u8| Ipv4Addr::new(127, 200, 0, n);
    let web = |n: u8| service(&format!("s{n}"), vip(n), &[(server.address, 1)]);
    let all = || (1..=6).map(web).collect::<Vec<_>>();
    let are_served = || (1..=6).all(|n| connect((vip(n), 80)).is_ok_and(|letter| letter == 's'));
    let notes = |datapath: &Datapath| datapath.notes().cloned().collect::<Vec<_>>().join("\n");
    // By name it comes before those that are served.
    let new = || service("a", vip(9), &[(server.address, 1)]);
    type Lower = fn(&mut DatapathConfig);
    let lowered: [(Lower, &str); 2] = [
        (
            |datapath| datapath.max_services = 4,
            "datapath.max_services = 4 has no room for the 6 services",
        ),
        (
            |datapath| datapath.max_backends = 5,
            "datapath.max_backends = 5 has no room for the 6 backends",
        ),
    ];
    for (lower, expected) in lowered {
        let mut place = Place::new();
        (place.options.datapath.max_services, place.options.datapath.max_backends) = (16, 64);
        let mut datapath = place.start();
        apply(&mut datapath, all());
        drop(datapath);
        lower(&mut place.options.datapath);
        let mut datapath = place.start();
        assert!(notes(&datapath).contains(expected), "{}", notes(&datapath));
        assert!(are_served(), "{expected}: before the first table");
        apply(&mut datapath, all());
        assert!(are_served(), "{expected}: after the first table");
        datapath.fix();
        drop(datapath);

        // The present services fit now, and no other.
        (place.options.datapath.max_services, place.options.datapath.max_backends) = (6, 64);
        let mut datapath = place.start();
        assert_eq!(notes(&datapath), "");
        let errors = datapath.apply(&table([vec![new()], all()].concat())).unwrap();
        assert_eq!(errors.keys().map(|name| &**name).collect::<Vec<_>>(), ["a"], "{errors:?}");
        assert!(are_served() && datapath.are_hooks_ours());
        datapath.detach();
    }
}

/// New maps that turn out to lack room for a service that is served aren't switched to.
pub fn maps_that_hold_less_are_not_used() {
    let server = Server::start(b's');
    let vip = |n: u8| Ipv4Addr::new(127, 200, 0, n);
    let web = |n: u8| service(&format!("s{n}"), vip(n), &[(server.address, 1)]);
    let mut place = Place::new();
    (place.options.datapath.max_services, place.options.datapath.max_backends) = (16, 64);
    let mut datapath = place.start();
    apply(&mut datapath, vec![web(1), web(2)]);
    drop(datapath);
    place.options.datapath.max_backends = 2;
    let mut datapath = place.start();
    // It grew meanwhile: 5 entries, of 4.
    let mut grown = web(2);
    grown.backends.extend((1..=3).map(|port| backend(([10, 0, 0, 1], port).into(), 1)));
    let error = datapath.apply(&table(vec![web(1), grown.clone()])).unwrap_err().to_string();
    for part in ["1 of the services that are served", "s2", "raise datapath.max_backends"] {
        assert!(error.contains(part), "no {part:?} in {error}");
    }
    assert!(!datapath.are_hooks_ours());
    let shared = SharedDatapath::new(datapath);
    shared.apply(&table(vec![web(1), grown]));
    shared.check_hooks();
    let hooks = shared.hooks();
    assert!(hooks.attached && hooks.translate, "names are answered: {hooks:?}");
    assert!(hooks.waiting.is_some() && shared.is_behind());
    assert!([1, 2].iter().all(|&n| connect((vip(n), 80)).is_ok()), "the former maps serve");
    // A table that fits is switched to.
    shared.apply(&table(vec![web(1), web(2)]));
    let hooks = shared.hooks();
    assert!(hooks.translate && hooks.waiting.is_none() && !shared.is_behind(), "{hooks:?}");
    assert!(connect((vip(2), 80)).is_ok());
}

/// `bpffs` names another directory: the former one's programs serve until there is a table, and not after that. While
/// their daemon runs, another one for the same cgroup doesn't start.
pub fn another_directory_takes_over() {
    let servers = [b'a', b'b'].map(Server::start);
    let [former, moved] =
        [0, 1].map(|nth: usize| service("web", VIP, &[(servers[nth].address, 1)]));
    let mut place = Place::new();
    let mut datapath = place.start();
    apply(&mut datapath, vec![former]);
    let former = place.options.bpffs.clone();
    place.options.bpffs = former.with_file_name("moved");
    let error = Datapath::start(&place.options).unwrap_err().to_string();
    assert!(error.contains(&former.display().to_string()), "{error}");
    drop(datapath);
    let connector = Connector::start((VIP, 80));
    let mut datapath = place.start();
    assert_eq!(connect((VIP, 80)).unwrap(), 'a');
    apply(&mut datapath, vec![moved]);
    datapath.fix();
    assert_eq!(connector.more(N_CONNECTS), "b");
    assert_eq!(connector.stop(), "ab");
    assert!(!former.join("v3").exists(), "{former:?} has pins");
}

/// Enough connections that a gap of a millisecond would be met.
pub const N_CONNECTS: u64 = 300;

fn indices(datapath: &Datapath) -> BTreeMap<String, Indices> {
    let names = datapath.names().into_iter();
    names.map(|(name, _)| (name.to_string(), datapath.indices(&name).unwrap())).collect()
}

pub fn apply(datapath: &mut Datapath, services: Vec<Service>) {
    let errors = datapath.apply(&table(services)).unwrap();
    assert!(errors.is_empty(), "{errors:?}");
}

/// The daemon is killed while applications connect, and started again.
pub fn a_restart_loses_no_connect() {
    let servers = [b'a', b'b', b'c'].map(Server::start);
    let [web, other] = [(VIP, "web", &servers[..2]), (OTHER_VIP, "other", &servers[2..])].map(
        |(vip, name, of)| {
            let backends: Vec<_> = of.iter().map(|server| (server.address, 1)).collect();
            service(name, vip, &backends)
        },
    );
    let place = Place::new();
    let mut datapath = place.start();
    assert!(!datapath.is_adopted());
    apply(&mut datapath, vec![web.clone(), other.clone()]);
    let (before, names) = (indices(&datapath), datapath.names());
    let connector = Connector::start((VIP, 80));
    connector.more(N_CONNECTS);

    drop(datapath);
    connector.more(N_CONNECTS);
    let mut datapath = place.start();
    connector.more(N_CONNECTS);
    assert!(datapath.is_adopted() && datapath.are_hooks_ours());
    assert_eq!(indices(&datapath), before, "the same ids");
    assert_eq!(datapath.names(), names, "the same VIPs");
    assert_eq!(connect((OTHER_VIP, 80)).unwrap(), 'c', "nothing is pruned before the first table");

    apply(&mut datapath, vec![web.clone()]);
    connector.more(N_CONNECTS);
    assert_eq!(indices(&datapath)["web"], before["web"], "what stays keeps its ids");
    assert_eq!(datapath.names().len(), 1, "what isn't in the table is pruned");
    connect((OTHER_VIP, 80)).unwrap_err();
    datapath.fix();
    let pressure: BTreeMap<_, _> = datapath.pressure().into_iter().collect();
    assert_eq!(pressure["BACKENDS"].used, 2);
    assert_eq!(pressure["FRONTENDS"].used, 1);
    assert_eq!(connector.stop(), "ab");
}

/// Echoes datagrams, until one is empty.
pub struct Echo {
    pub address: SocketAddrV4,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    pub fn start() -> Echo {
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

/// Sockets that were opened through a datapath.
pub struct Opened {
    stream: TcpStream,
    connected: UdpSocket,
    unconnected: UdpSocket,
}

impl Opened {
    pub fn open() -> Opened {
        let [connected, unconnected] = [(); 2].map(|()| {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
            socket
        });
        connected.connect((OTHER_VIP, 80)).unwrap();
        let stream = TcpStream::connect((VIP, 80)).unwrap();
        Opened { stream, connected, unconnected }
    }

    /// Each of them sees the VIP as its peer. A reply is in flight while `meanwhile` runs.
    pub fn check(&self, meanwhile: impl FnOnce()) {
        self.check_datagrams(meanwhile);
        assert_eq!(self.stream_peer(), SocketAddr::from((VIP, 80)));
    }

    /// The peer that the TCP connection shows.
    pub fn stream_peer(&self) -> SocketAddr {
        self.stream.peer_addr().unwrap()
    }

    /// The same as [`Opened::check`], of the UDP sockets alone.
    pub fn check_datagrams(&self, meanwhile: impl FnOnce()) {
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
    }
}

/// One daemon takes over from another with maps of its own. `change` is what sets them apart.
fn takes_over(change: fn(&mut Place)) {
    let (old, new, echo) = (Server::start(b'o'), Server::start(b'n'), Echo::start());
    let mut mirror = service("mirror", OTHER_VIP, &[(echo.address.into(), 1)]);
    mirror.protocols = Protocols::Udp;
    let with = |server: &Server| vec![service("web", VIP, &[(server.address, 1)]), mirror.clone()];
    let mut place = Place::new();
    let mut datapath = place.start();
    apply(&mut datapath, with(&old));
    let connector = Connector::start((VIP, 80));
    let opened = Opened::open();
    opened.check(|| ());

    drop(datapath);
    change(&mut place);
    let mut datapath = place.start();
    assert!(!datapath.is_adopted() && !datapath.are_hooks_ours());
    opened.check(|| ());
    assert_eq!(connector.more(N_CONNECTS), "o", "the old table serves");
    opened.check(|| apply(&mut datapath, with(&new)));
    assert!(datapath.are_hooks_ours());
    assert_eq!(connector.more(N_CONNECTS), "n", "then the new one");
    opened.check(|| ());
    opened.check(|| ());

    // The next one finds what it expects.
    drop(datapath);
    let mut datapath = place.start();
    assert!(datapath.is_adopted());
    apply(&mut datapath, with(&new));
    opened.check(|| ());
    connector.more(N_CONNECTS);
    connector.stop();
}

pub fn a_new_layout_takes_over() {
    takes_over(|place| place.options.layout = 4);
}

pub fn other_sizes_take_over() {
    takes_over(|place| place.options.datapath.max_services = 100);
}

/// The directories of layouts that are there.
pub fn layouts(place: &Place) -> Vec<String> {
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
    for next_layout in [4, 3] {
        let mut place = Place::new();
        let mut datapath = place.start();
        apply(&mut datapath, web(&old));
        let before = indices(&datapath);
        let connector = Connector::start((VIP, 80));
        drop(datapath);
        place.options.layout = 4;
        drop(place.start());
        assert_eq!(layouts(&place), ["v3", "v4"]);
        connector.more(N_CONNECTS);

        place.options.layout = next_layout;
        let mut datapath = place.start();
        assert_eq!(datapath.is_adopted(), next_layout == 3);
        assert_eq!(connector.more(N_CONNECTS), "o");
        if datapath.is_adopted() {
            assert_eq!(indices(&datapath), before);
        }
        apply(&mut datapath, web(&new));
        assert_eq!(layouts(&place), [format!("v{next_layout}")]);
        assert_eq!(connector.more(N_CONNECTS), "n");
        connector.stop();
    }
}

/// Some of the maps aren't pinned any more, or none is, or no link.
pub fn half_written_pins_serve_on() {
    let remove = |path: &Path| {
        if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) }
    };
    let (old, new) = (Server::start(b'o'), Server::start(b'n'));
    let web = |server: &Server| vec![service("web", VIP, &[(server.address, 1)])];
    for missing in
        ["v3/maps/BACKENDS", "v3/maps/CONTROL", "v3/maps", "sockets/SK_REVNAT", "sockets"]
    {
        let place = Place::new();
        let mut datapath = place.start();
        apply(&mut datapath, web(&old));
        let connector = Connector::start((VIP, 80));
        drop(datapath);
        remove(&place.pin(missing)).unwrap();
        for _ in 0..2 {
            let datapath = place.start();
            assert_eq!(datapath.is_adopted(), missing.starts_with("sockets"), "{missing}");
            assert_eq!(connector.more(N_CONNECTS), "o", "{missing}");
        }
        let mut datapath = place.start();
        apply(&mut datapath, web(&new));
        assert!(place.pin(missing).exists());
        assert_eq!(connector.more(N_CONNECTS), "n", "{missing}");
        connector.stop();
    }
}

/// Something else wrote to the maps, while no daemon looked.
pub fn spoilt_maps_are_made_anew() {
    let (old, new) = (Server::start(b'o'), Server::start(b'n'));
    let web = |server: &Server| vec![service("web", VIP, &[(server.address, 1)])];
    for (map, value_size) in
        [("SERVICE_NAMES", 64), ("SERVICES", 192), ("SLOTS", 8), ("BACKENDS", 64)]
    {
        let place = Place::new();
        let mut datapath = place.start();
        apply(&mut datapath, web(&old));
        let service_idx = datapath.indices("web").unwrap().service;
        let idx = if map.starts_with("SERVICE") { service_idx } else { 0 };
        let key = idx.to_ne_bytes().map(|byte| byte.to_string());
        drop(datapath);
        let path = place.pin(&format!("v3/maps/{map}"));
        let status = Command::new("bpftool")
            .args(["map", "update", "pinned", path.to_str().unwrap(), "key"])
            .args(key)
            .arg("value")
            .args(vec!["255"; value_size])
            .status()
            .unwrap();
        assert!(status.success(), "{map}");
        let mut datapath = place.start();
        assert!(!datapath.is_adopted(), "{map}");
        assert!(datapath.names().is_empty());
        apply(&mut datapath, web(&new));
        assert_eq!(connect((VIP, 80)).unwrap(), 'n', "{map}");
    }
}

/// After `nohop unload` nothing of ours is left; while a daemon runs, it does nothing.
pub fn unload_removes_everything() {
    let server = Server::start(b'a');
    let place = Place::new();
    let mut datapath = place.start();
    apply(&mut datapath, vec![service("web", VIP, &[(server.address, 1)])]);
    let refused = unload(&place.options.bpffs).unwrap_err().to_string();
    assert!(refused.contains("another nohop"), "{refused}");
    assert_eq!(connect((VIP, 80)).unwrap(), 'a');
    drop(datapath);
    assert_eq!(unload(&place.options.bpffs).unwrap(), programs().len());
    assert!(!place.options.bpffs.exists());
    connect((VIP, 80)).unwrap_err();
    assert_eq!(unload(&place.options.bpffs).unwrap(), 0, "a second time");
}

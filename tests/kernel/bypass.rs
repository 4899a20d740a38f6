//! Bypassed sockets: excluded cgroups, the daemon, the kernel's own sockets. Their connections pass
//! untouched, and land on a server that listens on the VIP itself.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use lb_userspace::table::{Ports, Protocols, Service};

use crate::disconnect::bpf;
use crate::fixture::{
    Bed, Echo, Place, Server, VIP, ask, client, connect, connect_udp, event, service, table, ways,
};

/// Servers behind the VIP: `b`; and on the VIP itself: `v`.
pub struct Servers {
    backend: (Server, Echo),
    own: (Server, Echo),
}

impl Servers {
    pub fn start() -> Servers {
        let pair = |letter, address: Ipv4Addr| {
            let server = Server::on(letter, (address, 0));
            let echo = Echo::on(letter, server.address);
            (server, echo)
        };
        let backend = pair(b'b', Ipv4Addr::LOCALHOST);
        let own = pair(b'v', VIP);
        Servers { backend, own }
    }

    pub fn serve(&self, bed: &mut Bed) {
        bed.apply(vec![self.service()]);
    }

    /// The service of both protocols with the servers behind the VIP.
    pub fn service(&self) -> Service {
        let mut web = service("web", VIP, &[(self.backend.0.address, 1)]);
        web.protocols = Protocols::Both;
        web.ports = Ports::only([self.port()]);
        web
    }

    /// The port that they are connected to at.
    pub fn port(&self) -> u16 {
        self.own.0.address.port()
    }

    /// The servers behind the VIP.
    pub fn behind(&self) -> SocketAddr {
        self.backend.0.address
    }

    /// The letter that answers this process now, the same for all sockets.
    pub fn answer(&self) -> char {
        let mut answers = Vec::new();
        for way in ways(VIP, self.port()) {
            answers.extend([connect(way).unwrap(), connect_udp(way).unwrap()]);
            answers.push(ask(&client(way), way).unwrap().0);
        }
        answers.dedup();
        assert_eq!(answers.len(), 1, "{answers:?}");
        answers[0]
    }
}

fn enter(cgroup: &Path) {
    fs::write(cgroup.join("cgroup.procs"), "0").unwrap();
}

pub fn excluded_cgroups() {
    // They end after the hooks, which they would else miss each other by.
    let servers = Servers::start();
    let mut bed = Bed::with(|options| {
        options.datapath.exclude_cgroups =
            vec![options.scope.join("never"), options.scope.join("excluded")];
    });
    let (own, excluded) = (bed.cgroup.path.clone(), bed.cgroup.path.join("excluded"));
    let below = excluded.join("a/b");
    let sibling = own.join("sibling");
    servers.serve(&mut bed);
    fs::create_dir(&sibling).unwrap();
    // A cgroup that is made again is another one by the same name.
    for _ in 0..2 {
        fs::create_dir_all(&below).unwrap();
        assert!(bed.datapath.fix().is_complete());
        for (cgroup, expected) in
            [(&own, 'b'), (&excluded, 'v'), (&below, 'v'), (&sibling, 'b'), (&own, 'b')]
        {
            enter(cgroup);
            let n_bypassed = event(&bed, "bypassed");
            assert_eq!(servers.answer(), expected, "{}", cgroup.display());
            assert_eq!(event(&bed, "bypassed") > n_bypassed, expected == 'v');
        }
        for cgroup in [&below, &excluded.join("a"), &excluded] {
            fs::remove_dir(cgroup).unwrap();
        }
    }
    fs::remove_dir(sibling).unwrap();
}

/// Cgroups that no configuration can name before they are there, as Nomad's are.
pub fn excluded_by_pattern() {
    let servers = Servers::start();
    let mut bed = Bed::with(|options| {
        let patterns = ["*.slice/*/*.envoy-*.scope", "gone"];
        options.datapath.exclude_cgroups =
            patterns.map(|pattern| options.scope.join(pattern)).to_vec();
    });
    servers.serve(&mut bed);
    let own = bed.cgroup.path.clone();
    let share = own.join("nomad.slice/share.slice");
    let [web, envoy, other] = ["39e2.web.scope", "39e2.envoy-web.scope", "17.envoy-api.scope"]
        .map(|scope| share.join(scope));
    for (cgroup, is_excluded) in [(&web, false), (&envoy, true), (&other, true)] {
        fs::create_dir_all(cgroup).unwrap();
        bed.datapath.fix();
        enter(cgroup);
        assert_eq!(servers.answer() == 'v', is_excluded, "{}", cgroup.display());
        enter(&own);
    }
    let notes: Vec<&String> = bed.datapath.notes().collect();
    let named = |note: &String| note.contains("no cgroup matches") && note.contains("/gone'");
    assert!(matches!(notes[..], [note] if named(note)), "{notes:?}");
    for cgroup in [&web, &envoy, &other] {
        fs::remove_dir(cgroup).unwrap();
    }
}

/// Those that stay are excluded throughout, whichever go.
pub fn excluded_come_and_go() {
    let servers = Servers::start();
    let mut bed = Bed::with(|options| {
        options.datapath.exclude_cgroups = vec![options.scope.join("t-*")];
    });
    servers.serve(&mut bed);
    let own = bed.cgroup.path.clone();
    let cgroup = |n: u32| own.join(format!("t-{n}"));
    let answer = |n: u32| {
        enter(&cgroup(n));
        let answer = servers.answer();
        enter(&own);
        answer
    };
    (1..=4).for_each(|n| fs::create_dir(cgroup(n)).unwrap());
    bed.datapath.fix();
    assert_eq!([1, 2, 3, 4].map(answer), ['v'; 4]);
    fs::remove_dir(cgroup(1)).unwrap();
    bed.datapath.fix();
    assert_eq!([2, 3, 4].map(answer), ['v'; 3], "the first is gone");
    fs::remove_dir(cgroup(3)).unwrap();
    bed.datapath.fix();
    assert_eq!([2, 4].map(answer), ['v'; 2], "two are gone");
    assert_eq!(servers.answer(), 'b', "outside of them");
    fs::create_dir(cgroup(5)).unwrap();
    bed.datapath.fix();
    assert_eq!([2, 4, 5].map(answer), ['v'; 3]);
    [2, 4, 5].into_iter().for_each(|n| fs::remove_dir(cgroup(n)).unwrap());
}

/// Many cgroups, at several depths, over a restart.
pub fn many_excluded() {
    let servers = Servers::start();
    let mut place = Place::new();
    let own = place.cgroup.path.clone();
    place.options.datapath.exclude_cgroups = ["t-*", "*/t-*"].map(|path| own.join(path)).to_vec();
    let start = || {
        let mut datapath = place.start();
        assert!(datapath.apply(&table(vec![servers.service()])).unwrap().is_empty());
        datapath
    };
    let mut datapath = start();
    let cgroup = |n: u32| match n % 2 {
        0 => own.join(format!("t-{n:02}")),
        _ => own.join(format!("below-{n}/t-{n}")),
    };
    let answer = |n: u32| {
        enter(&cgroup(n));
        let answer = servers.answer();
        enter(&own);
        answer
    };
    (0..40).for_each(|n| fs::create_dir_all(cgroup(n)).unwrap());
    datapath.fix();
    assert_eq!([0, 1, 17, 38, 39].map(answer), ['v'; 5]);
    assert_eq!(servers.answer(), 'b');
    // The next daemon takes them over.
    drop(datapath);
    let mut datapath = start();
    assert_eq!([0, 1, 17, 38, 39].map(answer), ['v'; 5]);
    // One that is made again is another one.
    [38, 39].into_iter().for_each(|n| fs::remove_dir(cgroup(n)).unwrap());
    datapath.fix();
    [38, 39].into_iter().for_each(|n| fs::create_dir(cgroup(n)).unwrap());
    assert_eq!([1, 38, 39].map(answer), ['v', 'b', 'b']);
    datapath.fix();
    assert_eq!([1, 38, 39].map(answer), ['v'; 3]);
    assert_eq!(datapath.notes().count(), 0);
    (0..40).for_each(|n| fs::remove_dir(cgroup(n)).unwrap());
    (1..40).step_by(2).for_each(|n| fs::remove_dir(own.join(format!("below-{n}"))).unwrap());
}

pub fn the_daemon() {
    let servers = Servers::start();
    let mut bed = Bed::as_daemon(|_| {});
    servers.serve(&mut bed);
    assert_eq!(servers.answer(), 'v');
    assert_ne!(event(&bed, "bypassed"), 0);
    // A daemon that died leaves its number to another process.
    grow_old(&bed.options.bpffs.join("v3/maps/CONTROL"));
    assert_eq!(servers.answer(), 'b');
    bed.datapath.heartbeat(None);
    assert_eq!(servers.answer(), 'v');
}

/// Sets the daemon's heartbeat back by 11 seconds.
fn grow_old(map: &Path) {
    const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
    const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
    const BPF_OBJ_GET: libc::c_int = 7;
    let path = std::ffi::CString::new(map.as_os_str().as_bytes()).unwrap();
    let map = bpf(BPF_OBJ_GET, &[path.as_ptr() as u64, 0]).unwrap();
    // SAFETY: the kernel has just made this descriptor for us.
    let map = unsafe { OwnedFd::from_raw_fd(map) };
    let (key, mut daemon) = (0u32, [0u64; 16]);
    let attr = [map.as_raw_fd() as u64, &raw const key as u64, &raw mut daemon as u64, 0];
    bpf(BPF_MAP_LOOKUP_ELEM, &attr).unwrap();
    let [heartbeat_ns, ..] = &mut daemon;
    *heartbeat_ns -= 11_000_000_000;
    bpf(BPF_MAP_UPDATE_ELEM, &attr).unwrap();
}

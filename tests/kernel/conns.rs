//! The records of TCP connections: each belongs to one socket, for as long as that connection lasts.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use lb_userspace::datapath::{Datapath, UNITS};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with, sockopt};

use crate::fixture::{Place, VIP, dead, is_emulated, service, ways};
use crate::in_flight::{Keeper, agree, agree_recounted, detach_sockops, holder, in_flight, reset};
use crate::pins::bpftool;
use crate::restart::apply;

const N_RECORDS: u64 = 65_536;
const MINUTE: Duration = Duration::from_secs(60);

fn new_socket() -> OwnedFd {
    socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap()
}

fn peer(socket: &OwnedFd) -> SocketAddr {
    rustix::net::getpeername(socket).unwrap().unwrap().try_into().unwrap()
}

fn disconnect(socket: &OwnedFd) {
    let unspecified = [0u8; 16];
    // SAFETY: the kernel reads 16 bytes, which begin with AF_UNSPEC.
    let result = unsafe { libc::connect(socket.as_raw_fd(), unspecified.as_ptr().cast(), 16) };
    assert_eq!(result, 0);
}

/// The record of a socket has what it connected last, and ends with the connection.
pub fn a_record_follows_its_socket() {
    let keeper = Keeper::start();
    let place = Place::new();
    let mut datapath = place.start();
    let address = keeper.address(1);
    let to = |datapath: &mut Datapath, backend: SocketAddr| {
        apply(datapath, vec![service("web", VIP, &[(backend, 1)])]);
    };
    let vip = SocketAddr::from((VIP, 80));
    let socket = new_socket();

    to(&mut datapath, dead().into());
    assert_eq!(connect(&socket, &vip), Err(Errno::CONNREFUSED));
    assert_eq!(datapath.n_records(), 0, "refused");

    // It never sends a SYN, so no callback comes.
    to(&mut datapath, "255.255.255.255:80".parse().unwrap());
    assert!(matches!(connect(&socket, &vip), Err(Errno::NETUNREACH | Errno::ACCESS)));
    assert_eq!(datapath.n_records(), 1, "unreachable");
    assert!(matches!(connect(&socket, &vip), Err(Errno::NETUNREACH | Errno::ACCESS)));
    assert_eq!(datapath.n_records(), 1, "unreachable again");
    to(&mut datapath, address);
    connect(&socket, &vip).unwrap();
    assert_eq!((peer(&socket), datapath.n_records()), (vip, 1));
    assert_eq!(in_flight(&datapath, address), 1);
    disconnect(&socket);
    assert_eq!((in_flight(&datapath, address), datapath.n_records()), (0, 0));

    // The backend itself, with nothing left of the VIP.
    connect(&socket, &address).unwrap();
    assert_eq!((peer(&socket), in_flight(&datapath, address)), (address, 0));
    disconnect(&socket);

    // The same where no callback has released the record: it is another socket's address then.
    to(&mut datapath, "255.255.255.255:80".parse().unwrap());
    connect(&socket, &vip).unwrap_err();
    assert_eq!(datapath.n_records(), 1);
    connect(&socket, &address).unwrap();
    assert_eq!((peer(&socket), datapath.n_records()), (address, 0));
    drop(socket);

    // Of a socket that is gone: after a minute.
    let socket = new_socket();
    connect(&socket, &vip).unwrap_err();
    drop(socket);
    let now = Instant::now();
    for (later, n_records) in [(0, 1), (59, 1), (60, 0)] {
        datapath.recount_at(now + Duration::from_secs(later));
        assert_eq!(datapath.n_records(), n_records, "after {later} s");
    }
    datapath.detach();
}

/// Of two sockets at one record the second has storage, and either is followed to its end.
pub fn two_sockets_at_one_record() {
    let keeper = Keeper::start();
    let place = Place::new();
    let mut datapath = place.start();
    let address = keeper.address(1);
    apply(&mut datapath, vec![service("web", VIP, &[(address, 1)])]);
    let vip = SocketAddr::from((VIP, 80));
    let first = new_socket();
    let cookie = |socket: &OwnedFd| sockopt::socket_cookie(socket).unwrap() % N_RECORDS;
    let its = cookie(&first);
    let at_the_same = || (0..).map(|_| new_socket()).find(|socket| cookie(socket) == its).unwrap();
    let second = at_the_same();
    for [one, other] in [[&first, &second], [&second, &first]] {
        connect(one, &vip).unwrap();
        connect(other, &vip).unwrap();
        assert_eq!((peer(one), peer(other)), (vip, vip));
        assert_eq!((in_flight(&datapath, address), datapath.n_records()), (2, 1));
        assert!(datapath.recount().is_settled);
        // The record goes with the first; what the second has stays.
        disconnect(one);
        assert_eq!((in_flight(&datapath, address), datapath.n_records()), (1, 0));
        assert_eq!(peer(other), vip);
        assert!(datapath.recount().is_settled);
        disconnect(other);
        assert_eq!((in_flight(&datapath, address), datapath.n_records()), (0, 0));
        // Neither what was stored nor what was recorded is another connection's.
        connect(one, &address).unwrap();
        connect(other, &address).unwrap();
        assert_eq!((peer(one), peer(other)), (address, address));
        assert_eq!(in_flight(&datapath, address), 0);
        disconnect(one);
        disconnect(other);
    }

    // The record of a socket that is gone is the next one's.
    apply(&mut datapath, vec![service("web", VIP, &[("255.255.255.255:80".parse().unwrap(), 1)])]);
    connect(&first, &vip).unwrap_err();
    drop(first);
    apply(&mut datapath, vec![service("web", VIP, &[(address, 1)])]);
    let third = at_the_same();
    let now = Instant::now();
    datapath.recount_at(now);
    connect(&third, &vip).unwrap();
    assert_eq!((peer(&third), in_flight(&datapath, address)), (vip, 1));
    datapath.recount_at(now + MINUTE);
    assert_eq!(datapath.n_records(), 0);
    connect(&second, &vip).unwrap();
    assert_eq!((peer(&second), datapath.n_records()), (vip, 1));
    assert_eq!(in_flight(&datapath, address), 2);
    drop((second, third));
    agree(&datapath, "closed");
    datapath.detach();
}

/// Without the unit that releases records, and with one that came and went, storage has what sockets
/// connected.
pub fn none_without_what_releases_them() {
    let keeper = Keeper::start();
    let mut place = Place::new();
    let address = keeper.address(1);
    let web = || vec![service("web", VIP, &[(address, 1)])];
    let mut held = Vec::new();
    for (units, n_records) in [(&UNITS[..1], 0), (UNITS, 2), (&UNITS[..1], 2), (UNITS, 4)] {
        place.options.units = units;
        let mut datapath = place.start();
        apply(&mut datapath, web());
        for way in ways(VIP, 80) {
            held.push((TcpStream::connect(way).unwrap(), way));
        }
        assert_eq!(datapath.n_records(), n_records);
        for (stream, way) in &held {
            assert_eq!(stream.peer_addr().unwrap(), *way);
        }
    }
    let mut datapath = place.start();
    apply(&mut datapath, web());
    datapath.recount();
    assert_eq!(in_flight(&datapath, address), held.len() as u32);
    held.drain(..).for_each(|(stream, _)| reset(stream));
    datapath.recount();
    assert_eq!(in_flight(&datapath, address), 0);
    // Of some, no program saw the end.
    let now = Instant::now();
    datapath.recount_at(now);
    datapath.recount_at(now + MINUTE);
    assert_eq!(datapath.n_records(), 0);
    datapath.detach();
}

/// Accepts connections on every address of loopback, as fast as clients make them, until the test connects
/// to it without a client.
fn accept_all(listener: &TcpListener, stop: &AtomicBool) {
    let mut held = Vec::new();
    for stream in listener.incoming() {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        held.extend(stream);
        if held.len() > 300 {
            held.clear();
        }
    }
}

/// Clients on several processors, in any way that a connection can go, while backends change, hooks are
/// detached and attached again, and the daemon starts again. In the end nothing remains.
pub fn nothing_remains_after_a_storm() {
    const N_THREADS: usize = 4;
    let n_connects = if is_emulated() { 2_000 } else { 100_000 };
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    // What finds the queue full is sent again after a second.
    rustix::net::listen(&listener, 4_096).unwrap();
    let port = listener.local_addr().unwrap().port();
    let address = |nth: u32| {
        let first = u32::from(Ipv4Addr::new(127, 1, 0, 1));
        SocketAddr::from((Ipv4Addr::from(first + nth), port))
    };
    let refusing = dead();
    let mut place = Place::new();
    // A recount looks at all entries.
    place.options.datapath.max_backends = 1_024;
    let mut datapath = place.start();
    let mut n_addresses = 0;
    // An address that was in the table never returns to it: as a backend it would be another one.
    let mut change = |datapath: &mut Datapath| {
        let backends: Vec<_> = (0..5)
            .map(|nth| {
                n_addresses += 1;
                let mut address = address(n_addresses);
                match nth {
                    0 => address.set_port(refusing.port()),
                    1 => address = "255.255.255.255:80".parse().unwrap(),
                    _ => {}
                }
                (address, 1 + (n_addresses % 3) as u16)
            })
            .collect();
        apply(datapath, vec![service("web", VIP, &backends)]);
    };
    change(&mut datapath);
    let n_done = AtomicUsize::new(0);
    let client = |seed: u64| {
        let mut random = fastrand::Rng::with_seed(seed);
        let (vip, direct) = (SocketAddr::from((VIP, 80)), address(0));
        let mut held: Vec<OwnedFd> = Vec::new();
        while n_done.fetch_add(1, Ordering::Relaxed) < n_connects {
            let socket = new_socket();
            if random.u8(..) < 32 {
                rustix::io::ioctl_fionbio(&socket, true).unwrap();
            }
            if connect(&socket, &vip).is_ok() {
                assert_eq!(peer(&socket), vip);
            }
            match random.u8(..) {
                // Elsewhere, and once more.
                0..16 => {
                    disconnect(&socket);
                    if connect(&socket, &direct).is_ok() {
                        assert_eq!(peer(&socket), direct);
                    }
                }
                16..32 => {
                    disconnect(&socket);
                    let _ = connect(&socket, &vip);
                }
                _ => {}
            }
            sockopt::set_socket_linger(&socket, Some(Duration::ZERO)).unwrap();
            if random.u8(..) < 64 {
                held.push(socket);
            }
            // All together stay below 1,024 descriptors, a usual limit.
            if held.len() > 50 {
                held.clear();
            }
        }
    };
    let are_done = AtomicBool::new(false);
    let (n_changes, mut datapath) = std::thread::scope(|scope| {
        scope.spawn(|| accept_all(&listener, &are_done));
        let client = &client;
        let spawn = |seed| scope.spawn(move || client(seed));
        let clients: Vec<_> = (0..N_THREADS as u64).map(spawn).collect();
        let mut next = 0;
        let mut nth = 0;
        // One that panics ends it too.
        while !clients.iter().any(|client| client.is_finished()) {
            if n_done.load(Ordering::Relaxed) < next {
                std::thread::yield_now();
                continue;
            }
            next += n_connects / 40;
            nth += 1;
            change(&mut datapath);
            match nth % 20 {
                1 | 6 | 11 | 16 => detach_sockops(&place),
                2 => {
                    let connect4 = place.pin("v3/links/nohop_connect4");
                    bpftool(&["link", "detach", "pinned", connect4.to_str().unwrap()]);
                }
                3 => drop(datapath.recount()),
                4 => {
                    let (mut child, _) = holder(8);
                    child.kill().unwrap();
                    child.wait().unwrap();
                }
                5 => {
                    drop(datapath);
                    datapath = place.start();
                    change(&mut datapath);
                }
                _ => {}
            }
            assert!(datapath.fix().is_complete());
        }
        // The clients may still be at their last connect: what is accepted late matters to none.
        are_done.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(address(0));
        (nth, datapath)
    });
    assert!(n_changes > 0, "no changes");
    agree_recounted(&datapath, "after the storm");
    let now = Instant::now();
    // Those that were followed are kept for an hour.
    for later in [Duration::ZERO, 60 * MINUTE] {
        datapath.recount_at(now + later);
    }
    let left: BTreeSet<u32> = datapath
        .indices("web")
        .unwrap()
        .backends
        .values()
        .map(|&backend_idx| datapath.counters().in_flight(backend_idx))
        .collect();
    assert_eq!(left, BTreeSet::from([0]));
    assert_eq!(datapath.n_records(), 0);
    datapath.detach();
}

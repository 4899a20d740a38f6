//! The unit `outcomes`: what is in flight is what the kernel lists, and a failure is a backend's.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use aya::maps::{Array, Map, MapData};
use lb_common::Control;
use lb_userspace::datapath::{Datapath, UNITS};
use lb_userspace::table::{Protocols, Service};
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with, sockopt};

use crate::choice;
use crate::fixture::{Bed, Place, VIP, VIP6, n_connects, service};
use crate::pins::bpftool;
use crate::restart::apply;
use crate::sockops::Sockops;
use zerocopy::FromBytes as _;

const FLAG: &str = "--hold";
/// How long the last segments of connections on loopback may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// A server on every address of loopback, which keeps each connection until the client ends it.
pub struct Keeper {
    port: u16,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    pub fn start() -> Keeper {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let mut stream = stream.unwrap();
                std::thread::spawn(move || while let Ok(1..) = stream.read(&mut [0; 16]) {});
            }
        });
        Keeper { port, stop, thread: Some(thread) }
    }

    /// One of its addresses.
    pub fn address(&self, nth: u32) -> SocketAddr {
        (Ipv4Addr::from(u32::from(Ipv4Addr::new(127, 1, 0, 1)) + nth), self.port).into()
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port));
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// The address and number of sockets, if this process was started to hold connections.
pub fn hidden_command() -> Option<(SocketAddr, usize)> {
    let mut arguments = std::env::args().skip(1);
    let is_it = arguments.next()? == FLAG;
    is_it.then(|| Some((arguments.next()?.parse().ok()?, arguments.next()?.parse().ok()?)))?
}

/// Connects, reports that, and holds the connections until stdin ends.
pub fn hold(address: SocketAddr, n_sockets: usize) -> ExitCode {
    let held: Vec<_> = (0..n_sockets).map(|_| TcpStream::connect(address)).collect();
    let n_failed = held.iter().filter(|stream| stream.is_err()).count();
    let reported = std::io::stdout().write_all(&[n_failed as u8]);
    let _ = reported.and_then(|()| std::io::stdout().flush());
    let _ = std::io::stdin().read(&mut [0]);
    ExitCode::SUCCESS
}

/// Another process with `n` connections to the VIP, and how many more failed.
pub fn holder(n: usize) -> (Child, u64) {
    let mut child = Command::new("/proc/self/exe")
        .args([FLAG, &SocketAddr::from((VIP, 80)).to_string(), &n.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut n_failed = [0];
    child.stdout.as_mut().unwrap().read_exact(&mut n_failed).unwrap();
    (child, n_failed[0].into())
}

const SYN_SENT: &str = "02";
const TIME_WAIT: &str = "06";

/// The connections of this network namespace that a process has open, and those of them that are being
/// established, as the kernel lists them for ss and netstat, by their IPv4 destination as it does.
fn listed() -> HashMap<String, (u32, i32)> {
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let mut by_destination = HashMap::<_, (u32, i32)>::new();
    for line in table.lines().skip(1) {
        let mut fields = line.split_ascii_whitespace().skip(2);
        let (destination, state) = (fields.next().unwrap(), fields.next().unwrap());
        // There are thousands of them.
        if state == TIME_WAIT {
            continue;
        }
        let is_pending = state == SYN_SENT;
        // What is in CLOSE has no inode any more either.
        if is_pending || fields.nth(5) != Some("0") {
            let (n_open, n_pending) = by_destination.entry(destination.to_owned()).or_default();
            *n_open += 1;
            *n_pending += i32::from(is_pending);
        }
    }
    by_destination
}

/// An address as a key of [`listed`].
fn as_listed(address: SocketAddr) -> String {
    let SocketAddr::V4(address) = address else { unreachable!("an IPv4 server") };
    let ip = u32::from_ne_bytes(address.ip().octets());
    format!("{ip:08X}:{:04X}", address.port())
}

/// What the programs have counted of a backend.
pub fn in_flight(datapath: &Datapath, address: SocketAddr) -> u32 {
    let indices = datapath.indices("web").unwrap();
    datapath.counters().in_flight(indices.backends[&address])
}

/// The same, and those that are being established.
fn counted(datapath: &Datapath, address: SocketAddr) -> (u32, i32) {
    let backend_idx = datapath.indices("web").unwrap().backends[&address];
    let pending = datapath.counters().outcomes(backend_idx).pending;
    (in_flight(datapath, address), pending)
}

/// Waits until each backend's number in flight is what the kernel lists, which it is once the last
/// segments have arrived. Returns the sum.
pub fn agree(datapath: &Datapath, when: &str) -> u32 {
    agree_after(datapath, when, || ())
}

/// The same, where what ends unseen is recounted.
pub fn agree_recounted(datapath: &Datapath, when: &str) -> u32 {
    agree_after(datapath, when, || {
        datapath.recount();
    })
}

fn agree_after(datapath: &Datapath, when: &str, each_time: impl Fn()) -> u32 {
    let deadline = Instant::now() + PATIENCE;
    loop {
        each_time();
        let backends = datapath.indices("web").unwrap().backends;
        let listed = listed();
        let count = |&address: &SocketAddr| {
            let listed = listed.get(&as_listed(address)).copied().unwrap_or_default();
            (address, counted(datapath, address), listed)
        };
        let counts: Vec<_> = backends.keys().map(count).collect();
        if counts.iter().all(|(_, counted, listed)| counted == listed) {
            return counts.iter().map(|(_, (n_open, _), _)| n_open).sum();
        }
        assert!(Instant::now() < deadline, "{when}: in flight and listed: {counts:?}");
        std::thread::yield_now();
    }
}

fn n_failed(datapath: &Datapath) -> u64 {
    datapath.counters().service(datapath.indices("web").unwrap().service).failed
}

pub fn reset(stream: TcpStream) {
    sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
}

pub fn detach_sockops(place: &Place) {
    let link = place.pin("v3/links/nohop_sockops");
    bpftool(&["link", "detach", "pinned", link.to_str().unwrap()]);
}

/// Connections, resets, refusals, changes of the backends, killed clients, gaps: in any order.
pub fn is_what_the_kernel_lists() {
    const MAX_HELD: usize = 300;
    let keeper = Keeper::start();
    let refusing = crate::fixture::dead().port();
    let mut place = Place::new();
    // A recount looks at all entries.
    place.options.datapath.max_backends = 1_024;
    let mut datapath = place.start();
    let mut random = fastrand::Rng::with_seed(7);
    let (mut held, mut n_addresses, mut expected_failures) = (Vec::new(), 0, 0);
    // An address that was in the table never returns to it: as a backend it would be another one.
    let mut change = |datapath: &mut Datapath, random: &mut fastrand::Rng| {
        let backends: Vec<_> = (0..4)
            .map(|nth| {
                n_addresses += 1;
                let mut address = keeper.address(n_addresses);
                if nth == 0 && random.bool() {
                    address.set_port(refusing);
                }
                (address, random.u16(1..4))
            })
            .collect();
        apply(datapath, vec![service("web", VIP, &backends)]);
    };
    change(&mut datapath, &mut random);
    assert!(datapath.counts_in_flight(), "{:?}", datapath.unit_status());
    let n_rounds = n_connects();
    for nth in 0..n_rounds {
        match TcpStream::connect((VIP, 80)) {
            Ok(stream) => {
                assert_eq!(stream.peer_addr().unwrap(), SocketAddr::from((VIP, 80)));
                held.push(stream);
            }
            Err(error) => {
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
                expected_failures += 1;
            }
        }
        if held.len() > MAX_HELD || held.len() > 10 && random.u8(..) < 100 {
            let stream = held.swap_remove(random.usize(..held.len()));
            // Those that aren't reset stay listed in TIME_WAIT.
            if random.u8(..) < 224 { reset(stream) } else { drop(stream) }
        }
        if nth % (n_rounds / 25) == 17 {
            agree(&datapath, "before a change");
            change(&mut datapath, &mut random);
        }
        if nth % (n_rounds / 10) == 33 {
            let (mut child, n_refused) = holder(8);
            expected_failures += n_refused;
            agree(&datapath, "held by another process");
            child.kill().unwrap();
            child.wait().unwrap();
            agree(&datapath, "after a SIGKILL");
        }
        if nth % (n_rounds / 5) == 99 {
            detach_sockops(&place);
            held.truncate(held.len() / 2);
            held.extend(TcpStream::connect((VIP, 80)));
            assert!(datapath.fix().is_complete());
            agree_recounted(&datapath, "after a gap");
            // What began in the gap ends unseen.
            held.pop();
            agree_recounted(&datapath, "after its end");
        }
    }
    agree(&datapath, "in the end");
    held.drain(..).for_each(reset);
    assert_eq!(agree(&datapath, "when all are closed"), 0);
    assert_eq!(n_failed(&datapath), expected_failures);
    datapath.detach();
}

/// What began or ended while the program was detached is recounted; what is open is shown until then.
pub fn outlives_a_gap() {
    let keeper = Keeper::start();
    let place = Place::new();
    let mut datapath = place.start();
    let address = keeper.address(1);
    apply(&mut datapath, vec![service("web", VIP, &[(address, 1)])]);
    let connect = || TcpStream::connect((VIP, 80)).unwrap();
    let mut held: Vec<_> = (0..5).map(|_| connect()).collect();
    assert_eq!(agree(&datapath, "at first"), 5);
    assert!(datapath.recount().is_settled);

    detach_sockops(&place);
    held.drain(..2).for_each(reset);
    held.extend((0..3).map(|_| connect()));
    assert_eq!(in_flight(&datapath, address), 5, "nothing is seen");
    assert!(datapath.fix().is_after_gap);
    assert_eq!(agree_recounted(&datapath, "after the gap"), 6);
    let recount = datapath.recount();
    assert_eq!((recount.n_connections, recount.n_unseen, recount.is_settled), (6, 3, false));

    // The three that began before are seen to end, the others aren't.
    held.drain(..).for_each(reset);
    assert_eq!(in_flight(&datapath, address), 3);
    assert_eq!(datapath.recount().n_corrected, 1);
    assert_eq!(in_flight(&datapath, address), 0);
    assert!(datapath.recount().is_settled);
    datapath.detach();
}

/// A version without the unit leaves its pins, takes over, and leaves them again.
pub fn after_an_upgrade() {
    let keeper = Keeper::start();
    let mut place = Place::new();
    let address = keeper.address(1);
    let web = || vec![service("web", VIP, &[(address, 1)])];
    let connect = || TcpStream::connect((VIP, 80)).unwrap();
    let is_vip = |stream: &TcpStream| {
        assert_eq!(stream.peer_addr().unwrap(), SocketAddr::from((VIP, 80)));
    };
    let failures = place.pin("v3/maps/BACKEND_FAILURES");
    let sockops = place.pin("v3/links/nohop_sockops");

    place.options.units = &UNITS[..1];
    let mut datapath = place.start();
    apply(&mut datapath, web());
    let mut held = vec![connect(), connect()];
    assert!(!datapath.counts_in_flight() && !sockops.exists());
    drop(datapath);
    std::fs::remove_file(&failures).unwrap();

    place.options.units = UNITS;
    let mut datapath = place.start();
    assert!(datapath.is_adopted() && datapath.counts_in_flight());
    assert!(failures.exists() && sockops.exists());
    held.push(connect());
    assert_eq!(agree_recounted(&datapath, "upgraded"), 3);
    held.iter().for_each(is_vip);
    apply(&mut datapath, web());
    drop(datapath);

    // An upgrade to the same version misses nothing.
    let datapath = place.start();
    reset(held.pop().unwrap());
    assert_eq!(in_flight(&datapath, address), 2);
    held.push(connect());
    drop(datapath);

    place.options.units = &UNITS[..1];
    let mut datapath = place.start();
    assert!(datapath.is_adopted() && !sockops.exists());
    apply(&mut datapath, web());
    reset(held.pop().unwrap());
    held.push(connect());
    held.push(connect());
    held.iter().for_each(is_vip);
    drop(datapath);

    place.options.units = UNITS;
    let mut datapath = place.start();
    assert_eq!(agree_recounted(&datapath, "upgraded again"), 4);
    held.iter().for_each(is_vip);
    held.drain(..).for_each(reset);
    assert_eq!(agree_recounted(&datapath, "closed"), 0);
    datapath.detach();
}

/// A socket that doesn't wait for its connection.
fn begin(address: SocketAddrV4) -> OwnedFd {
    let flags = SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).unwrap();
    assert_eq!(connect(&socket, &address), Err(rustix::io::Errno::INPROGRESS));
    socket
}

/// A listener whose queue is full: it answers nothing. It has the connection that fills it.
fn silent() -> (TcpListener, TcpStream) {
    let flags = SocketFlags::empty();
    let listener = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).unwrap();
    rustix::net::bind(&listener, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let listener = TcpListener::from(listener);
    let fills = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (listener, fills)
}

/// What waits for an answer while the unit is detached ends unseen: silence is judged again once it is
/// attached, and what was pending before is forgotten at once.
pub fn silence_needs_the_unit() {
    let (listener, _fills) = silent();
    let address = listener.local_addr().unwrap();
    let vip = SocketAddrV4::new(VIP, 80);
    let mut place = Place::new();
    let pin = place.pin("v3/maps/CONTROL");
    let silence = || {
        let map = Map::from_map_data(MapData::from_pin(&pin).unwrap()).unwrap();
        let control: Array<_, [u8; size_of::<Control>()]> = map.try_into().unwrap();
        Control::read_from_bytes(&control.get(&0, 0).unwrap()).unwrap().balance.silence
    };
    let configured = place.options.balance.eject.silence;
    let waiting = |datapath: &Datapath| {
        let backend_idx = datapath.indices("web").unwrap().backends[&address];
        let outcomes = datapath.counters().outcomes(backend_idx);
        (outcomes.pending, outcomes.unanswered_since_us != 0)
    };
    let web = || vec![service("web", VIP, &[(address, 1)])];
    let mut datapath = place.start();
    apply(&mut datapath, web());
    let socket = begin(vip);
    assert_eq!((silence(), waiting(&datapath)), (configured, (1, true)));
    drop(datapath);

    // As by a version without the unit.
    place.options.units = &UNITS[..1];
    let mut datapath = place.start();
    apply(&mut datapath, web());
    drop(socket);
    assert_eq!((silence(), waiting(&datapath)), (0, (1, true)));
    datapath.configure_balance(&place.options.balance);
    assert_eq!(silence(), 0, "after a reload");
    drop(datapath);

    place.options.units = UNITS;
    let mut datapath = place.start();
    assert_eq!((silence(), waiting(&datapath)), (configured, (0, false)));
    // As after a command of an operator's.
    let socket = begin(vip);
    detach_sockops(&place);
    drop(socket);
    assert_eq!(waiting(&datapath), (1, true));
    assert!(datapath.fix().is_after_gap);
    assert_eq!((silence(), waiting(&datapath)), (configured, (0, false)));
    datapath.detach();
}

/// A service that loses a UDP frontend gives its backends other generations, by which the programs don't
/// see open connections end.
pub fn after_new_generations() {
    let keeper = Keeper::start();
    let address = keeper.address(1);
    let place = Place::new();
    let mut datapath = place.start();
    let web = |protocols| vec![Service { protocols, ..service("web", VIP, &[(address, 1)]) }];
    apply(&mut datapath, web(Protocols::Both));
    let connect = || TcpStream::connect((VIP, 80)).unwrap();
    let mut held: Vec<_> = (0..3).map(|_| connect()).collect();
    assert_eq!(in_flight(&datapath, address), 3);
    apply(&mut datapath, web(Protocols::Tcp));
    assert_eq!(in_flight(&datapath, address), 0, "none that is seen");
    held.push(connect());
    let recount = datapath.recount();
    assert_eq!((recount.n_connections, recount.n_unseen, recount.is_settled), (4, 3, false));
    assert_eq!(agree_recounted(&datapath, "with other generations"), 4);
    held.drain(..).for_each(reset);
    assert_eq!(in_flight(&datapath, address), 3);
    assert_eq!(agree_recounted(&datapath, "closed"), 0);
    datapath.detach();
}

/// One that is counted as being established and isn't is found while connections are made all the time.
pub fn a_leak_is_found_under_load() {
    let keeper = Keeper::start();
    let address = keeper.address(1);
    let mut bed = Bed::small();
    bed.apply(vec![service("web", VIP, &[(address, 1)])]);
    choice::change(&bed, address, |entry| entry.outcomes.pending = 1);
    let is_done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_done.load(Ordering::Relaxed) {
                reset(TcpStream::connect((VIP, 80)).unwrap());
            }
        });
        let pending = || counted(&bed.datapath, address).1;
        let deadline = Instant::now() + PATIENCE;
        while (0..1_000).all(|_| pending() > 0) && Instant::now() < deadline {
            bed.datapath.recount();
        }
        is_done.store(true, Ordering::Relaxed);
    });
    assert_eq!(agree(&bed.datapath, "without load"), 0);
    assert_eq!(counted(&bed.datapath, address), (0, 0));
}

/// Another program of the hierarchy that takes away the callbacks that a socket asked for: its end isn't
/// seen, and is recounted.
pub fn without_callbacks() {
    let keeper = Keeper::start();
    let address = keeper.address(1);
    let place = Place::new();
    let mut datapath = place.start();
    apply(&mut datapath, vec![service("web", VIP, &[(address, 1)])]);
    let spoiler = Sockops::spoiling(&place.cgroup.path);
    let held: Vec<_> = (0..3).map(|_| TcpStream::connect((VIP, 80)).unwrap()).collect();
    assert_eq!(in_flight(&datapath, address), 3);
    held.into_iter().for_each(reset);
    assert_eq!(counted(&datapath, address), (3, 3), "no change of state is seen");
    drop(spoiler);
    assert_eq!(agree_recounted(&datapath, "recounted"), 0);
    assert_eq!(counted(&datapath, address), (0, 0));
    drop(TcpStream::connect((VIP, 80)).unwrap());
    assert_eq!(agree(&datapath, "with callbacks again"), 0);
    datapath.detach();
}

/// A refusal is a failure; a client that gives up isn't, nor is a connection that a server ends.
pub fn failures_are_the_backends() {
    let keeper = Keeper::start();
    let refusing = crate::fixture::dead();
    let (full, _fills) = silent();
    let silent = full.local_addr().unwrap();
    let mut bed = Bed::with_pool6();
    let vips = |vip6| [SocketAddr::from((VIP, 80)), SocketAddr::from((vip6, 80))];
    let mut web = |backend: SocketAddr| {
        let mut web = service("web", VIP, &[(backend, 1)]);
        web.vip6 = Some(VIP6);
        bed.apply(vec![web]);
        let indices = bed.datapath.indices("web").unwrap();
        (bed.datapath.counters(), indices.service, indices.backends[&backend])
    };

    let (counters, service, backend) = web(refusing.into());
    for vip in vips(VIP6) {
        TcpStream::connect(vip).unwrap_err();
    }
    assert_eq!((counters.backend_failures(backend), counters.in_flight(backend)), (2, 0));
    assert_eq!(counters.service(service).failed, 2);

    let (counters, service, backend) = web(silent);
    let socket = begin(SocketAddrV4::new(VIP, 80));
    assert_eq!(counters.in_flight(backend), 1);
    drop(socket);
    assert_eq!((counters.backend_failures(backend), counters.in_flight(backend)), (0, 0));

    let (counters, service_after, backend) = web(keeper.address(1));
    assert_eq!(service_after, service);
    let stream = TcpStream::connect((VIP, 80)).unwrap();
    assert_eq!(counters.in_flight(backend), 1);
    reset(stream);
    assert_eq!((counters.backend_failures(backend), counters.in_flight(backend)), (0, 0));
    assert_eq!(counters.service(service).failed, 2, "those of backends that left stay");
}

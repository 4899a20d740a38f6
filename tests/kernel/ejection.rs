//! Ejection in the kernel: which outcomes of connections eject a backend, and what ends that. The maps
//! show it, whatever the choice makes of it.

use std::io::{ErrorKind, Read};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lb_common::{Cause, EjectionWord};
use lb_userspace::datapath::{BackendOutcomes, BalanceSettings, Counters, Datapath, Report};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with, sockopt};

use crate::choice;
use crate::fixture::{Bed, Place, VIP, event, service};
use crate::restart::apply;

const PATIENCE: Duration = Duration::from_secs(60);

/// An hour, so that no machine is too slow for what happens in it.
const HOUR_MS: u32 = 3_600_000;

fn ejecting(base_ms: u32) -> BalanceSettings {
    BalanceSettings {
        refused: 1,
        failures: 3,
        silence: 20,
        share: 128,
        base_ms,
        max_ms: base_ms.max(100) * 300,
        ..BalanceSettings::default()
    }
}

/// A backend of the service `web`, as the maps have it.
struct Backend {
    counters: Counters,
    service_idx: u32,
    backend_idx: u32,
}

impl Backend {
    fn of(datapath: &Datapath, address: SocketAddr) -> Backend {
        let indices = datapath.indices("web").unwrap();
        let (service_idx, backend_idx) = (indices.service, indices.backends[&address]);
        Backend { counters: datapath.counters(), service_idx, backend_idx }
    }

    /// The only backend.
    fn only(bed: &mut Bed, address: SocketAddr) -> Backend {
        bed.apply(vec![service("web", VIP, &[(address, 1)])]);
        Backend::of(&bed.datapath, address)
    }

    /// Why it is ejected, without the time; empty where it isn't.
    fn why(&self) -> String {
        let shown = self.counters.ejected(self.backend_idx).map(|ejected| ejected.to_string());
        shown.and_then(|shown| Some(shown.split_once(": ")?.1.to_owned())).unwrap_or_default()
    }

    fn awaits_trial(&self) -> bool {
        let shown = self.counters.ejected(self.backend_idx).map(|ejected| ejected.to_string());
        shown.is_some_and(|shown| shown.starts_with("ejected until the next connection succeeds"))
    }

    fn outcomes(&self) -> BackendOutcomes {
        self.counters.outcomes(self.backend_idx)
    }

    fn n_ejections(&self) -> u64 {
        self.counters.service(self.service_idx).ejections
    }
}

#[track_caller]
fn until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::yield_now();
    }
}

fn vip() -> SocketAddr {
    (VIP, 80).into()
}

fn refused() {
    let error = TcpStream::connect(vip()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
}

/// A connection that isn't waited for.
fn begin() -> OwnedFd {
    let flags = SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).unwrap();
    let connecting = connect(&socket, &SocketAddrV4::new(VIP, 80));
    assert_eq!(connecting, Err(rustix::io::Errno::INPROGRESS));
    socket
}

/// Connections that time out, at once but for the second until a SYN would be sent again.
fn time_out(n: usize) {
    let waiting: Vec<_> = (0..n)
        .map(|_| {
            let flags = SocketFlags::NONBLOCK;
            let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).unwrap();
            sockopt::set_tcp_user_timeout(&socket, 1).unwrap();
            let connecting = connect(&socket, &SocketAddrV4::new(VIP, 80));
            assert_eq!(connecting, Err(rustix::io::Errno::INPROGRESS));
            socket
        })
        .collect();
    for socket in &waiting {
        poll(&mut [PollFd::new(socket, PollFlags::OUT)], None).unwrap();
        let error = sockopt::socket_error(socket).unwrap();
        assert_eq!(error, Err(rustix::io::Errno::TIMEDOUT));
    }
}

fn reset(stream: TcpStream) {
    sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
}

/// A listener whose queue holds one connection, which is there: it answers no other.
fn silent() -> (TcpListener, TcpStream) {
    let flags = SocketFlags::empty();
    let listener = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).unwrap();
    rustix::net::bind(&listener, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let listener = TcpListener::from(listener);
    let fills = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (listener, fills)
}

const KEEPS: u8 = 0;
const RESETS: u8 = 1;
const CLOSES: u8 = 2;
const STOPS: u8 = 3;

/// A server that treats each connection by its present order.
struct Ender {
    address: SocketAddr,
    how: Arc<AtomicU8>,
    thread: Option<JoinHandle<()>>,
}

impl Ender {
    fn start() -> Ender {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let how = Arc::new(AtomicU8::new(KEEPS));
        let asked = how.clone();
        let thread = std::thread::spawn(move || {
            let mut kept = Vec::new();
            for stream in listener.incoming() {
                let stream = stream.unwrap();
                match asked.load(Ordering::Relaxed) {
                    KEEPS => kept.push(stream),
                    RESETS => reset(stream),
                    CLOSES => drop(stream),
                    _ => return,
                }
            }
        });
        Ender { address, how, thread: Some(thread) }
    }

    /// Connects, and returns how that ends.
    fn ends(&self, how: u8) -> std::io::Result<usize> {
        self.how.store(how, Ordering::Relaxed);
        TcpStream::connect(vip())?.read(&mut [0])
    }
}

impl Drop for Ender {
    fn drop(&mut self) {
        self.how.store(STOPS, Ordering::Relaxed);
        let _ = TcpStream::connect(self.address);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// The first refusal ejects, the time ends that for one connection, and an answer for all.
pub fn a_refusal_ejects() {
    let address = SocketAddr::from(crate::fixture::dead());
    let mut bed = Bed::new();
    let mut reports = bed.datapath.take_reports().unwrap();
    let backend = Backend::only(&mut bed, address);
    bed.datapath.set_balance(BalanceSettings::default());
    refused();
    assert_eq!((backend.why(), backend.n_ejections()), (String::new(), 0), "without limits");

    let backend = Backend::only(&mut bed, crate::fixture::dead().into());
    bed.datapath.set_balance(ejecting(HOUR_MS));
    refused();
    assert_eq!((backend.why().as_str(), backend.n_ejections()), ("1 refused connect", 1));
    assert!(!backend.awaits_trial());
    let until_ms = backend.outcomes().ejection.until_ms;
    refused();
    assert_eq!((backend.why().as_str(), backend.n_ejections()), ("2 refused connects", 1));
    assert_eq!(backend.outcomes().ejection.until_ms, until_ms, "one that began before");

    let address = SocketAddr::from(crate::fixture::dead());
    let backend = Backend::only(&mut bed, address);
    bed.datapath.set_balance(ejecting(1));
    refused();
    until("the end of 1 ms", || backend.awaits_trial());
    let listener = TcpListener::bind(address).unwrap();
    let stream = TcpStream::connect(vip()).unwrap();
    assert_eq!((backend.why(), backend.n_ejections()), (String::new(), 2), "two of the service");
    assert_eq!(backend.outcomes().ejection.failures, 0);
    drop((stream, listener));

    let reported: Vec<_> = std::iter::from_fn(|| reports.next_report()).collect();
    let ejections: Vec<_> = reported
        .iter()
        .map(|report| match report {
            Report::Ejection { service, backend, .. } => (&**service, backend.address),
            Report::Connected(name) => panic!("{name} isn't cold"),
        })
        .collect();
    // What is reported of a backend that has left is nothing.
    assert_eq!(ejections, [("web", address); 2], "{reported:?}");
}

/// Connections that nothing answers are pending; those that time out are failures, of which three eject.
pub fn silence_is_seen() {
    let (listener, _fills) = silent();
    let mut bed = Bed::new();
    bed.datapath.set_balance(ejecting(HOUR_MS));
    let backend = Backend::only(&mut bed, listener.local_addr().unwrap());
    let pending = || {
        let BackendOutcomes { in_flight, pending, unanswered_since_us, .. } = backend.outcomes();
        (in_flight, pending, unanswered_since_us)
    };
    assert_eq!(pending(), (0, 0, 0));
    let first = begin();
    let (_, _, since_us) = pending();
    assert!(since_us != 0);
    let second = begin();
    assert_eq!(pending(), (2, 2, since_us));
    // Another one is answered: the two don't count any more, the next one does.
    let _accepted = listener.accept().unwrap();
    let answered = TcpStream::connect(vip()).unwrap();
    assert_eq!(pending(), (3, 2, 0));
    assert!(backend.outcomes().connect_us > 0);
    // Clients that give up are no failure.
    drop((first, second));
    let BackendOutcomes { in_flight, pending: n_pending, ejection, .. } = backend.outcomes();
    assert_eq!((in_flight, n_pending, ejection.failures), (1, 0, 0));
    assert_eq!(backend.why(), "");
    reset(answered);
    assert_eq!(backend.why(), "");

    // Time-outs: with the first retransmission, after a second.
    time_out(3);
    assert_eq!(backend.why(), "3 failed connects in a row");
    assert_eq!(backend.outcomes().pending, 0);
}

/// Has the only pending connections of a backend wait since so long ago; below zero they have just begun.
fn wait_since(bed: &Bed, address: SocketAddr, ago_ms: i32) {
    let since_us = choice::now_ms().wrapping_sub_signed(ago_ms).wrapping_mul(1_000).max(1);
    choice::change(bed, address, |entry| entry.outcomes.unanswered_since_us = since_us);
}

const LONG_MS: i32 = 60_000;

/// A client that gives up after the time of silence shows it, though no other connects. One that gives up
/// sooner shows nothing.
pub fn giving_up_shows_silence() {
    let (listener, _fills) = silent();
    let address = listener.local_addr().unwrap();
    let mut bed = Bed::new();
    bed.datapath.set_balance(ejecting(HOUR_MS));
    let backend = Backend::only(&mut bed, address);
    for (waits_ms, expected) in [(-LONG_MS, ""), (LONG_MS, "connects get no answer")] {
        let socket = begin();
        wait_since(&bed, address, waits_ms);
        drop(socket);
        assert_eq!(backend.why(), expected, "after {waits_ms} ms");
        let BackendOutcomes { in_flight, pending, ejection, .. } = backend.outcomes();
        assert_eq!((in_flight, pending, ejection.failures), (0, 0, 0));
    }
    assert_eq!(backend.n_ejections(), 1);
}

/// A trial that sends no SYN, or whose client gives up early, leaves the ejection as long as it was.
pub fn trials_that_show_nothing() {
    let (listener, _fills) = silent();
    let address = listener.local_addr().unwrap();
    let mut bed = Bed::new();
    bed.datapath.set_balance(ejecting(HOUR_MS));
    let backend = Backend::only(&mut bed, address);
    let is_over = || {
        choice::change(&bed, address, |entry| {
            let until_ms = choice::now_ms().wrapping_sub(1);
            let (failures, ejections, cause) = (3, 3, Cause::Refused as u8);
            entry.outcomes.ejection =
                EjectionWord { until_ms, failures, ejections, cause, resets: 0 };
        });
        assert!(backend.awaits_trial());
    };
    let length = || {
        assert!(!backend.why().is_empty() && !backend.awaits_trial());
        backend.outcomes().ejection.ejections
    };
    // The port is in use, for a connection to the same backend.
    let bound = |port| {
        let flags = SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).unwrap();
        sockopt::set_socket_reuseaddr(&socket, true).unwrap();
        rustix::net::bind(&socket, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)).unwrap();
        socket
    };
    let user = bound(0);
    let port = SocketAddr::try_from(rustix::net::getsockname(&user).unwrap()).unwrap().port();
    assert_eq!(connect(&user, &address), Err(rustix::io::Errno::INPROGRESS));
    is_over();
    let failed = connect(bound(port), &SocketAddrV4::new(VIP, 80));
    assert_eq!(failed, Err(rustix::io::Errno::ADDRNOTAVAIL));
    assert_eq!(length(), 3, "without a SYN");

    is_over();
    let trial = begin();
    assert_eq!(length(), 4, "while its SYN is out");
    wait_since(&bed, address, -LONG_MS);
    drop(trial);
    assert_eq!(length(), 3, "given up early");

    is_over();
    let trial = begin();
    wait_since(&bed, address, LONG_MS);
    drop(trial);
    assert_eq!(length(), 4, "given up after the time of silence");
    assert_eq!(backend.outcomes().pending, 0);
}

/// Without the kernel's type information the socket's error isn't read: a refusal and a time-out are seen
/// all the same, and a segment of an earlier connection is no refusal.
pub fn without_type_information() {
    let address = SocketAddr::from(crate::fixture::dead());
    let mut bed = Bed::with(|options| options.reads_btf = false);
    bed.datapath.set_balance(BalanceSettings { refused: 2, ..ejecting(HOUR_MS) });
    let backend = Backend::only(&mut bed, address);
    refused();
    assert_eq!((backend.why().as_str(), backend.outcomes().ejection.failures), ("", 1));
    refused();
    assert_eq!(backend.why(), "2 refused connects");

    let (listener, _fills) = silent();
    let address = listener.local_addr().unwrap();
    let backend = Backend::only(&mut bed, address);
    time_out(1);
    let n_failures = || backend.outcomes().ejection.failures;
    assert_eq!((n_failures(), backend.why()), (1, String::new()));
    drop(begin());
    assert_eq!(n_failures(), 1, "given up");

    // A connection that this side has forgotten: the other one acknowledges what it has, to any SYN.
    drop(listener.accept().unwrap());
    // Below those that the kernel gives: nobody else gets it meanwhile.
    let port = 19_998;
    let former = crate::edge_room::bound_stream((Ipv4Addr::LOCALHOST, port), address);
    let (_still_open, _) = listener.accept().unwrap();
    let _fills = TcpStream::connect(address).unwrap();
    forget(former);
    let flags = SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).unwrap();
    rustix::net::bind(&socket, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)).unwrap();
    let connecting = connect(&socket, &SocketAddrV4::new(VIP, 80));
    assert_eq!(connecting, Err(rustix::io::Errno::INPROGRESS));
    until("a segment", || tcp_info(&socket).tcpi_segs_in > 0);
    drop(socket);
    assert_eq!((n_failures(), backend.why()), (1, String::new()), "given up after a segment");
}

/// Closes a socket of which the peer learns nothing (TCP_REPAIR of tcp(7)).
fn forget(stream: TcpStream) {
    let repair: libc::c_int = 1;
    // SAFETY: the option takes an int.
    let set = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_REPAIR,
            (&raw const repair).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
}

fn tcp_info(socket: &OwnedFd) -> libc::tcp_info {
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: a `tcp_info` is integers, and the kernel writes no more than `length`.
    unsafe {
        let mut info: libc::tcp_info = std::mem::zeroed();
        let pointer = (&raw mut info).cast();
        let fd = socket.as_raw_fd();
        let got = libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, pointer, &raw mut length);
        assert_eq!(got, 0, "{}", std::io::Error::last_os_error());
        info
    }
}

/// SYNs that are sent again are counted once the connection is established, or has failed.
pub fn retransmitted_syns_are_counted() {
    let (listener, _fills) = silent();
    let address = listener.local_addr().unwrap();
    let mut bed = Bed::new();
    let backend = Backend::only(&mut bed, address);
    let n_counted = || backend.counters.service(backend.service_idx).syn_retransmits;
    let (given_up, answered) = (begin(), begin());
    // The first after a second, the next two seconds later.
    let n_sent = |socket: &OwnedFd| u64::from(tcp_info(socket).tcpi_total_retrans);
    until("a SYN that is sent again", || n_sent(&given_up) > 0 && n_sent(&answered) > 0);
    assert_eq!(n_counted(), 0);
    let n_given_up = n_sent(&given_up);
    drop(given_up);
    assert_eq!(n_counted(), n_given_up);
    drop(listener.accept().unwrap());
    poll(&mut [PollFd::new(&answered, PollFlags::OUT)], None).unwrap();
    assert_eq!(sockopt::socket_error(&answered).unwrap(), Ok(()));
    assert_eq!(n_counted(), n_given_up + n_sent(&answered));
    drop(listener.accept().unwrap());
    drop(TcpStream::connect(vip()).unwrap());
    assert_eq!(n_counted(), n_given_up + n_sent(&answered), "of an answered SYN none");
}

/// Resets by the backend, three in a row, eject for a moment; the client's own never do.
pub fn resets_eject_for_a_moment() {
    let ender = Ender::start();
    let mut bed = Bed::new();
    bed.datapath.set_balance(ejecting(HOUR_MS));
    let backend = Backend::only(&mut bed, ender.address);
    let n_resets = || backend.outcomes().ejection.resets;
    for _ in 0..5 {
        reset(TcpStream::connect(vip()).unwrap());
    }
    assert_eq!((n_resets(), backend.why()), (0, String::new()), "the client's own");
    let is_reset = |result: std::io::Result<usize>| {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::ConnectionReset);
    };
    (0..2).for_each(|_| is_reset(ender.ends(RESETS)));
    assert_eq!((n_resets(), backend.why()), (2, String::new()));
    assert_eq!(ender.ends(CLOSES).unwrap(), 0);
    until("the end of the connection", || n_resets() == 0);
    (0..3).for_each(|_| is_reset(ender.ends(RESETS)));
    assert_eq!(backend.why(), "it reset 3 connections in a row");
    // That it accepts another one is no sign that this is over.
    ender.how.store(KEEPS, Ordering::Relaxed);
    drop(TcpStream::connect(vip()).unwrap());
    assert_eq!(backend.why(), "it reset 3 connections in a row");
    assert_eq!(backend.n_ejections(), 1);
}

/// An ejection whose end is further away than any ejection lasts is over: a clock went back, or the
/// limits changed.
pub fn no_clock_keeps_a_backend_out() {
    let mut bed = Bed::new();
    bed.datapath.set_balance(ejecting(HOUR_MS));
    let backend = Backend::only(&mut bed, crate::fixture::dead().into());
    refused();
    assert!(!backend.why().is_empty() && !backend.awaits_trial());
    bed.datapath.set_balance(ejecting(1));
    assert!(backend.awaits_trial());
    refused();
    let until_ms = backend.outcomes().ejection.until_ms;
    bed.datapath.set_balance(ejecting(HOUR_MS));
    until("the end of the time", || backend.awaits_trial());
    assert_eq!(backend.outcomes().ejection.until_ms, until_ms);
}

/// The daemon dies and another one takes over: the backend stays ejected.
pub fn a_restart_keeps_ejections() {
    let place = Place::new();
    let address = SocketAddr::from(crate::fixture::dead());
    let web = || vec![service("web", VIP, &[(address, 1)])];
    let mut datapath = place.start();
    datapath.set_balance(ejecting(HOUR_MS));
    apply(&mut datapath, web());
    refused();
    let ejection = Backend::of(&datapath, address).outcomes().ejection;
    drop(datapath);

    let mut datapath = place.start();
    assert!(datapath.is_adopted());
    apply(&mut datapath, web());
    let backend = Backend::of(&datapath, address);
    assert_eq!(backend.outcomes().ejection, ejection);
    assert_eq!((backend.why().as_str(), backend.n_ejections()), ("1 refused connect", 1));
    datapath.detach();
}

/// Events that no daemon reads are counted as lost, and the later ones arrive. An ejection whose event was
/// lost is shown all the same.
pub fn events_that_find_no_room_are_counted() {
    let mut bed = Bed::new();
    let mut reports = bed.datapath.take_reports().unwrap();
    bed.datapath.set_balance(ejecting(HOUR_MS));
    let dead = SocketAddr::from(crate::fixture::dead());
    let backend = Backend::only(&mut bed, dead);
    // A refusal of one that isn't ejected.
    let ejected = || {
        choice::change(&bed, dead, |entry| entry.outcomes.ejection = EjectionWord::default());
        refused();
    };
    let deadline = Instant::now() + PATIENCE;
    while event(&bed, "events_lost") == 0 {
        assert!(Instant::now() < deadline, "{} ejections", backend.n_ejections());
        ejected();
    }
    assert_eq!(backend.why(), "1 refused connect");
    let n_reports = std::iter::from_fn(|| reports.next_report()).count() as u64;
    assert_eq!(n_reports + event(&bed, "events_lost"), backend.n_ejections());
    ejected();
    assert!(reports.next_report().is_some());
}

/// Programs of two daemons, one above the other: each follows its own connections.
pub fn another_program_in_the_hierarchy() {
    let address = SocketAddr::from(crate::fixture::dead());
    let (above, mut below) = (Place::new(), Place::new());
    let enter = |cgroup: &Path| std::fs::write(cgroup.join("cgroup.procs"), "0").unwrap();
    below.options.scope = above.cgroup.path.join("below");
    std::fs::create_dir(&below.options.scope).unwrap();
    enter(&below.options.scope);
    let (mut outer, mut inner) = (above.start(), below.start());
    for datapath in [&mut outer, &mut inner] {
        datapath.set_balance(ejecting(HOUR_MS));
        apply(datapath, vec![service("web", VIP, &[(address, 1)])]);
    }
    refused();
    let ejected = [&inner, &outer].map(|datapath| Backend::of(datapath, address).n_ejections());
    assert_eq!(ejected, [1, 0], "the inner one translates, and what it made is no VIP");
    inner.detach();
    refused();
    assert_eq!(Backend::of(&outer, address).n_ejections(), 1);
    outer.detach();
    enter(&above.cgroup.path);
    std::fs::remove_dir(&below.options.scope).unwrap();
}

//! Connected UDP sockets are disconnected from outside: exactly the chosen ones, wherever they are.

use std::fs::File;
use std::io::{self, ErrorKind, IoSlice, Read};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use lb_userspace::datapath::diag::{Connected, DiagError, DiagReport, disconnect};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::{set_socket_reuseport, socket_cookie};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketType, bind, sendmsg,
    socket,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, Pid, gettid};

/// The storage of a socket whose backend is gone, and of one whose backend isn't.
const GONE: u64 = 0x0123_4567_89ab_cdef;
const THERE: u64 = 2;

use crate::intercept::without;
use crate::netns::leave;

/// An answer takes microseconds on loopback.
const TIMEOUT: Duration = Duration::from_secs(30);

/// A socket storage map of the test's own, whose values are u64. It has no name and no other user.
struct Storage(OwnedFd);

impl Storage {
    fn new() -> Storage {
        const BPF_MAP_CREATE: libc::c_int = 0;
        const BPF_BTF_LOAD: libc::c_int = 18;
        const BPF_MAP_TYPE_SK_STORAGE: u32 = 24;
        const BPF_F_NO_PREALLOC: u32 = 1;

        // Before 5.11 map memory counts against this limit. It may not need to be raised.
        let unlimited = Rlimit { current: None, maximum: None };
        let _ = setrlimit(Resource::Memlock, unlimited);

        // struct btf_header, two integers (name, kind, size, bits), strings.
        let (name, value_name, integer) = (1, 5, 1 << 24);
        let header = [0x0001_eb9f, 24, 0, 32, 32, 11];
        let types = [name, integer, 4, 32, value_name, integer, 8, 64];
        let words = header.iter().chain(&types).flat_map(|word: &u32| word.to_ne_bytes());
        let btf: Vec<u8> = words.chain(*b"\0int\0value\0").collect();
        let mut attr = [0u64; 16];
        (attr[0], attr[2]) = (btf.as_ptr() as u64, btf.len() as u64);
        let btf = Storage::descriptor(bpf(BPF_BTF_LOAD, &attr).unwrap());

        let mut attr = [0u32; 32];
        let (key_size, value_size, n_entries) = (4, 8, 0);
        attr[..5].copy_from_slice(&[
            BPF_MAP_TYPE_SK_STORAGE,
            key_size,
            value_size,
            n_entries,
            BPF_F_NO_PREALLOC,
        ]);
        attr[12..15].copy_from_slice(&[btf.as_raw_fd() as u32, 1, 2]);
        Storage(Storage::descriptor(bpf(BPF_MAP_CREATE, &attr).unwrap()))
    }

    fn descriptor(fd: i32) -> OwnedFd {
        // SAFETY: the kernel has just made this descriptor for us.
        unsafe { OwnedFd::from_raw_fd(fd) }
    }

    /// Gives a socket its entry.
    fn put(&self, socket: &UdpSocket, value: u64) {
        const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
        let key = socket.as_raw_fd();
        let (map, key, value) =
            (self.0.as_raw_fd() as u64, &raw const key as u64, &raw const value as u64);
        bpf(BPF_MAP_UPDATE_ELEM, &[map, key, value, 0]).unwrap();
    }

    /// The entry of a socket, if it has one.
    fn get(&self, socket: BorrowedFd<'_>) -> io::Result<Option<u64>> {
        const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
        let (key, mut value) = (socket.as_raw_fd(), 0u64);
        let attr = [self.0.as_raw_fd() as u64, &raw const key as u64, &raw mut value as u64, 0];
        match bpf(BPF_MAP_LOOKUP_ELEM, &attr) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            result => result.map(|_| Some(value)),
        }
    }

    /// Disconnects the sockets to `server` with the value [`GONE`], which are to be `n_gone` of
    /// `n_examined`.
    fn disconnect_gone(&self, server: SocketAddr, n_gone: usize, n_examined: usize) {
        let is_gone = |_: &Connected, socket: BorrowedFd<'_>| Ok(self.get(socket)? == Some(GONE));
        let report = disconnect(|socket| is_to(socket, server), is_gone);
        let DiagReport { n_namespaces, n_examined: examined, n_disconnected, errors } = report;
        assert!(errors.is_empty() && n_namespaces > 0, "{n_namespaces} {errors:?}");
        assert_eq!((n_disconnected, examined), (n_gone, n_examined));
    }
}

fn is_to(socket: &Connected, server: SocketAddr) -> bool {
    let Connected { destination, .. } = socket;
    (destination.ip().to_canonical(), destination.port()) == (server.ip(), server.port())
}

/// The system call, which returns a descriptor or 0.
pub fn bpf<T>(command: libc::c_int, attr: &[T]) -> io::Result<i32> {
    // SAFETY: the attribute is live and of the given size; the caller keeps alive what it points to.
    let done = unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_ptr(), size_of_val(attr)) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(done as i32) }
}

/// A socket that is connected to `server`.
fn client(local: impl Into<SocketAddr>, server: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind(local.into()).unwrap();
    socket.connect(server).unwrap();
    socket
}

fn server(address: &str) -> UdpSocket {
    let socket = UdpSocket::bind(address).unwrap();
    socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    socket
}

/// Whether what the socket sends reaches its server, and what that answers the socket.
fn assert_connected(socket: &UdpSocket, server: &UdpSocket) {
    socket.send(b"ping").unwrap();
    let mut buffer = [0; 8];
    let (_, from) = server.recv_from(&mut buffer).unwrap();
    server.send_to(b"pong", from).unwrap();
    socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    assert_eq!(socket.recv(&mut buffer).unwrap(), 4);
}

/// Whether the socket fails once with the disconnection, and has no destination then.
fn assert_disconnected(socket: &UdpSocket) {
    let aborted = socket.recv(&mut [0]).unwrap_err();
    assert_eq!(aborted.kind(), ErrorKind::ConnectionAborted);
    assert_eq!(socket.take_error().unwrap().map(|error| error.kind()), None, "once");
    assert_eq!(socket.peer_addr().unwrap_err().kind(), ErrorKind::NotConnected);
    let unconnected = socket.send(b"ping").unwrap_err();
    assert_eq!(unconnected.raw_os_error(), Some(libc::EDESTADDRREQ));
}

pub fn only_the_chosen() {
    for (bound, address, destination) in [
        ("127.0.0.1:0", "127.0.0.1:0", "127.0.0.1"),
        ("0.0.0.0:0", "127.0.0.1:0", "127.0.0.1"),
        ("[::1]:0", "[::1]:0", "::1"),
        ("[::]:0", "[::1]:0", "::1"),
        ("[::]:0", "127.0.0.1:0", "::ffff:127.0.0.1"),
        ("[::ffff:127.0.0.1]:0", "127.0.0.1:0", "::ffff:127.0.0.1"),
    ] {
        let storage = Storage::new();
        let server = server(address);
        let server_address = server.local_addr().unwrap();
        let destination = SocketAddr::new(destination.parse().unwrap(), server_address.port());
        let bound: SocketAddr = bound.parse().unwrap();
        let [gone, there, bare] = [(); 3].map(|()| client(bound, destination));
        let unconnected = UdpSocket::bind(bound).unwrap();
        storage.put(&gone, GONE);
        storage.put(&there, THERE);
        storage.put(&unconnected, GONE);

        let mut examined = Vec::new();
        let report = disconnect(
            |socket| is_to(socket, server_address),
            |socket, descriptor| {
                examined.push((socket.clone(), storage.get(descriptor)?));
                Ok(false)
            },
        );
        assert!(report.errors.is_empty() && report.n_disconnected == 0, "{report:?}");
        assert_eq!(examined.len(), 3);
        for (socket, value) in [(&gone, Some(GONE)), (&there, Some(THERE)), (&bare, None)] {
            let cookie = socket_cookie(socket).unwrap();
            let (seen, seen_value) = examined.iter().find(|(s, _)| s.cookie == cookie).unwrap();
            assert_eq!(seen.local, socket.local_addr().unwrap());
            assert_eq!(seen.destination, destination);
            assert_eq!(*seen_value, value);
        }

        let unconnected_was = unconnected.local_addr().unwrap();
        storage.disconnect_gone(server_address, 1, 3);
        assert_disconnected(&gone);
        assert_connected(&there, &server);
        assert_connected(&bare, &server);
        assert_eq!(unconnected.local_addr().unwrap(), unconnected_was);
        assert!(unconnected.take_error().unwrap().is_none());

        storage.disconnect_gone(server_address, 0, 2);
        gone.connect(destination).unwrap();
        assert_connected(&gone, &server);
        storage.disconnect_gone(server_address, 1, 3);
    }
}

pub fn the_application_notices() {
    let storage = Storage::new();
    let server = server("127.0.0.1:0");
    let address = server.local_addr().unwrap();
    let [receiver, poller] = [(); 2].map(|()| client(([127, 0, 0, 1], 0), address));
    receiver.set_read_timeout(Some(TIMEOUT)).unwrap();
    storage.put(&receiver, GONE);
    storage.put(&poller, GONE);
    std::thread::scope(|scope| {
        let (sender, thread_ids) = std::sync::mpsc::channel();
        let sender_too = sender.clone();
        let receiving = scope.spawn(move || {
            sender.send(gettid()).unwrap();
            receiver.recv(&mut [0]).unwrap_err().kind()
        });
        let polling = scope.spawn(move || {
            sender_too.send(gettid()).unwrap();
            let mut polled = [PollFd::new(&poller, PollFlags::IN)];
            let timeout = Timespec { tv_sec: TIMEOUT.as_secs() as i64, tv_nsec: 0 };
            poll(&mut polled, Some(&timeout)).unwrap();
            (polled[0].revents(), poller.take_error().unwrap().unwrap().kind())
        });
        thread_ids.iter().take(2).for_each(wait_until_asleep);
        storage.disconnect_gone(address, 2, 2);
        assert_eq!(receiving.join().unwrap(), ErrorKind::ConnectionAborted);
        let (events, error) = polling.join().unwrap();
        assert!(events.contains(PollFlags::ERR), "{events:?}");
        assert_eq!(error, ErrorKind::ConnectionAborted);
    });
}

/// Waits until a thread of this process waits in a system call.
fn wait_until_asleep(thread: Pid) {
    let stat = format!("/proc/self/task/{}/stat", thread.as_raw_nonzero());
    let deadline = Instant::now() + TIMEOUT;
    while !std::fs::read_to_string(&stat).unwrap().contains(") S ") {
        assert!(Instant::now() < deadline, "thread {thread:?} doesn't wait after {TIMEOUT:?}");
        std::thread::yield_now();
    }
}

/// A process that sits in a network namespace, until it is dropped.
pub struct Inhabitant(Child);

impl Inhabitant {
    /// One with a namespace of its own, and loopback up.
    pub fn new() -> Inhabitant {
        let inside = || {
            leave();
            Inhabitant(Command::new("sleep").arg("600").spawn().unwrap())
        };
        std::thread::scope(|scope| scope.spawn(inside).join()).unwrap()
    }

    pub fn pid(&self) -> String {
        self.0.id().to_string()
    }

    /// Runs a command of bash's in its namespace.
    pub fn run(&self, command: &str) {
        let mut nsenter = Command::new("nsenter");
        nsenter.args(["-t", &self.pid(), "-n", "bash", "-c", command]);
        assert!(nsenter.status().unwrap().success(), "{command}");
    }
}

impl Drop for Inhabitant {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

pub fn in_another_namespace() {
    let storage = Storage::new();
    let here_server = server("127.0.0.1:0");
    let server_address = here_server.local_addr().unwrap();
    let here = client(([127, 0, 0, 1], 0), server_address);
    let here_address = here.local_addr().unwrap();
    let elsewhere = std::thread::spawn(move || {
        leave();
        let inhabitant = Inhabitant(Command::new("sleep").arg("600").spawn().unwrap());
        // The same addresses and ports.
        let server = server(&server_address.to_string());
        (inhabitant, client(here_address, server_address), server)
    });
    let (_inhabitant, elsewhere, elsewhere_server) = elsewhere.join().unwrap();
    storage.put(&here, THERE);
    storage.put(&elsewhere, GONE);
    storage.disconnect_gone(server_address, 1, 2);
    assert_disconnected(&elsewhere);
    assert_connected(&here, &here_server);

    elsewhere.connect(server_address).unwrap();
    storage.put(&elsewhere, THERE);
    storage.put(&here, GONE);
    storage.disconnect_gone(server_address, 1, 2);
    assert_disconnected(&here);
    assert_connected(&elsewhere, &elsewhere_server);
}

pub fn in_another_process() {
    let storage = Storage::new();
    let server_address = SocketAddr::from(([127, 0, 0, 1], 7));
    let inside = || {
        leave();
        let socket = client(([127, 0, 0, 1], 0), server_address);
        storage.put(&socket, GONE);
        let mut cat = Command::new("cat");
        cat.stdin(OwnedFd::from(socket)).stderr(Stdio::piped()).env("LC_ALL", "C");
        Inhabitant(cat.spawn().unwrap())
    };
    let mut cat = std::thread::scope(|scope| scope.spawn(inside).join()).unwrap();
    storage.disconnect_gone(server_address, 1, 1);
    let mut complaint = String::new();
    cat.0.stderr.take().unwrap().read_to_string(&mut complaint).unwrap();
    assert!(complaint.contains("Software caused connection abort"), "{complaint}");
    storage.disconnect_gone(server_address, 0, 0);
}

pub fn in_a_threads_namespace() {
    let storage = Storage::new();
    let inside = || {
        leave();
        let namespace = || std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        let was = namespace();
        let server = server("127.0.0.1:0");
        let socket = client(([127, 0, 0, 1], 0), server.local_addr().unwrap());
        storage.put(&socket, GONE);
        storage.disconnect_gone(server.local_addr().unwrap(), 1, 1);
        assert_disconnected(&socket);
        assert_eq!(namespace(), was, "the caller stays where it is");
    };
    std::thread::scope(|scope| scope.spawn(inside).join()).unwrap();
}

/// Sockets with equal addresses and ports: the kernel finds one of them, and the other behind it
/// once the first is gone.
pub fn same_addresses() {
    let storage = Storage::new();
    let server = server("127.0.0.1:0");
    let server_address = server.local_addr().unwrap();
    let mut local = SocketAddr::from(([127, 0, 0, 1], 0));
    let same_addresses = [(); 3].map(|()| {
        let twin = socket(AddressFamily::INET, SocketType::DGRAM, None).unwrap();
        set_socket_reuseport(&twin, true).unwrap();
        bind(&twin, &local).unwrap();
        let twin = UdpSocket::from(twin);
        local = twin.local_addr().unwrap();
        twin
    });
    for twin in &same_addresses {
        twin.connect(server_address).unwrap();
        storage.put(twin, GONE);
    }
    storage.disconnect_gone(server_address, 3, 3);
    for twin in &same_addresses {
        assert_disconnected(twin);
    }
}

pub fn many() {
    const N_SOCKETS: usize = 2000;
    let former = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: former.maximum, ..former }).unwrap();

    let storage = Storage::new();
    let server = server("127.0.0.1:0");
    let address = server.local_addr().unwrap();
    let sockets: Vec<UdpSocket> =
        (0..N_SOCKETS).map(|_| client(([127, 0, 0, 1], 0), address)).collect();
    for (socket_idx, socket) in sockets.iter().enumerate() {
        storage.put(socket, if socket_idx % 2 == 0 { GONE } else { THERE });
    }
    storage.disconnect_gone(address, N_SOCKETS / 2, N_SOCKETS);
    for (socket_idx, socket) in sockets.iter().enumerate() {
        match socket_idx % 2 {
            0 => assert_disconnected(socket),
            _ => assert_connected(socket, &server),
        }
    }
    drop(sockets);
    setrlimit(Resource::Nofile, former).unwrap();
}

pub fn failure_is_reported() {
    let server = server("127.0.0.1:0");
    let server_address = server.local_addr().unwrap();
    let socket = client(([127, 0, 0, 1], 0), server_address);
    let storage = Storage(File::open("/dev/null").unwrap().into());
    let is_gone = |_: &Connected, socket: BorrowedFd<'_>| Ok(storage.get(socket)? == Some(GONE));
    let report = disconnect(|socket| is_to(socket, server_address), is_gone);
    assert_eq!(report.n_disconnected, 0);
    let cookie = socket_cookie(&socket).unwrap();
    assert!(
        matches!(&report.errors[..], [DiagError::Examine { cookie: of, .. }] if *of == cookie),
        "{report:?}"
    );
    assert_connected(&socket, &server);
    // Namespaces of others may be hidden then.
    let limited = || disconnect(|_| false, |_, _| Ok(false));
    let report = without(CapabilitySet::SYS_PTRACE, limited);
    assert!(matches!(&report.errors[..], [DiagError::Hidden]), "{report:?}");
}

/// A socket that can't be examined doesn't prevent others from being disconnected, in either order.
pub fn one_failure_keeps_no_other() {
    let storage = Storage::new();
    let server = server("127.0.0.1:0");
    let server_address = server.local_addr().unwrap();
    let sockets: Vec<UdpSocket> =
        (0..5).map(|_| client(([127, 0, 0, 1], 0), server_address)).collect();
    sockets.iter().for_each(|socket| storage.put(socket, GONE));
    let mut n_calls = 0;
    let is_gone = |_: &Connected, socket: BorrowedFd<'_>| {
        n_calls += 1;
        match n_calls {
            1 => Err(io::Error::other("it can't be examined")),
            _ => Ok(storage.get(socket)? == Some(GONE)),
        }
    };
    let report = disconnect(|socket| is_to(socket, server_address), is_gone);
    assert_eq!(report.n_disconnected, 4, "{report:?}");
    assert!(matches!(&report.errors[..], [DiagError::Examine { .. }]), "{report:?}");
    assert_eq!(n_calls, 5, "it is called once for each");
}

/// A socket that is under way from one process to another, and in neither.
pub fn unreached_is_reported() {
    let storage = Storage::new();
    let server = server("127.0.0.1:0");
    let server_address = server.local_addr().unwrap();
    let socket = client(([127, 0, 0, 1], 0), server_address);
    let cookie = socket_cookie(&socket).unwrap();
    storage.put(&socket, GONE);
    let (sender, receiver) = UnixStream::pair().unwrap();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut rights = SendAncillaryBuffer::new(&mut space);
    let descriptors = [socket.as_fd()];
    assert!(rights.push(SendAncillaryMessage::ScmRights(&descriptors)));
    sendmsg(&sender, &[IoSlice::new(b"!")], &mut rights, SendFlags::empty()).unwrap();
    drop(socket);

    let is_gone = |_: &Connected, socket: BorrowedFd<'_>| Ok(storage.get(socket)? == Some(GONE));
    let report = disconnect(|socket| is_to(socket, server_address), is_gone);
    assert_eq!((report.n_examined, report.n_disconnected), (0, 0));
    let [
        DiagError::Unreached {
            n_sockets: 1, cookie: unreached, destination, refused: None, ..
        },
    ] = report.errors[..]
    else {
        panic!("{report:?}");
    };
    assert_eq!((unreached, destination), (cookie, server_address));
    drop(receiver);
}

//! Socket options that change what the kernel does with an address, each used on a connection to the
//! backend itself and on one to the VIP: both have the same outcome.

use std::fmt::Write as _;
use std::io::{self, Error, Read, Write as _};
use std::mem::{size_of, zeroed};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketType, bind, connect, connect_unspec, socket};

use crate::families::dual;
use crate::fixture::{Bed, OTHER_VIP, VIP, VIP6, loopback, ways};
use crate::netns::leave;

/// How a socket names the address of a service.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    /// AF_INET.
    Plain,
    /// AF_INET6, with `::ffff:a.b.c.d`.
    Mapped,
    /// AF_INET6, with an address of the IPv6 pool.
    Ipv6,
}

impl Way {
    const ALL: [Way; 3] = [Way::Plain, Way::Mapped, Way::Ipv6];

    fn family(self) -> AddressFamily {
        if self == Way::Plain { AddressFamily::INET } else { AddressFamily::INET6 }
    }

    /// An IPv4 address in the form of these sockets.
    fn address(self, address: Ipv4Addr) -> SocketAddr {
        match self {
            Way::Plain => ways(address, 0)[0],
            _ => ways(address, 0)[1],
        }
    }

    /// A source address of loopback that isn't the one that the kernel would choose, if there is one.
    fn source(self) -> SocketAddr {
        match self {
            Way::Ipv6 => SocketAddr::from((Ipv6Addr::LOCALHOST, 0)),
            _ => self.address(SOURCE),
        }
    }
}

const SOURCE: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 9);

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// TCP, MPTCP.
    Stream,
    /// UDP that connects and sends without an address.
    Connected,
    /// UDP that connects, and sends with the address nevertheless.
    ConnectedNamed,
    /// UDP that only sends.
    Unconnected,
}

impl Kind {
    const ALL: [Kind; 4] = [Kind::Stream, Kind::Connected, Kind::ConnectedNamed, Kind::Unconnected];
    const DATAGRAM: [Kind; 3] = [Kind::Connected, Kind::ConnectedNamed, Kind::Unconnected];
}

type Prepare = fn(&OwnedFd, Way) -> io::Result<()>;
type Send = fn(&OwnedFd, Option<SocketAddr>, Way) -> io::Result<()>;

/// A socket option, and what it is tried on.
struct Row {
    name: &'static str,
    ways: &'static [Way],
    kinds: &'static [Kind],
    /// The protocol of the socket; 0 for the kind's own.
    protocol: i32,
    prepare: Prepare,
    send: Send,
}

const ROW: Row = Row {
    name: "none",
    ways: &Way::ALL,
    kinds: &Kind::ALL,
    protocol: 0,
    prepare: |_, _| Ok(()),
    send: plain,
};

const ROWS: &[Row] = &[
    ROW,
    Row {
        name: "IPV6_V6ONLY",
        ways: &[Way::Mapped, Way::Ipv6],
        prepare: |fd, _| set(fd, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 1),
        ..ROW
    },
    Row { name: "bind() to a source", prepare: |fd, way| bound(fd, way.source()), ..ROW },
    Row {
        name: "bind() to 127.0.0.1",
        ways: &[Way::Plain, Way::Mapped],
        prepare: |fd, way| bound(fd, way.address(Ipv4Addr::LOCALHOST)),
        ..ROW
    },
    Row {
        name: "bind() to ::1",
        ways: &[Way::Ipv6],
        prepare: |fd, _| bound(fd, loopback(VIP6)),
        ..ROW
    },
    Row {
        name: "IP_BIND_ADDRESS_NO_PORT",
        prepare: |fd, way| {
            set(fd, libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1)?;
            bound(fd, way.source())
        },
        ..ROW
    },
    Row {
        name: "IP_FREEBIND",
        prepare: |fd, way| {
            set(fd, libc::IPPROTO_IP, libc::IP_FREEBIND, 1)?;
            bound(fd, way.source())
        },
        ..ROW
    },
    Row {
        name: "IP_TRANSPARENT",
        prepare: |fd, way| {
            match way.family() {
                AddressFamily::INET => set(fd, libc::IPPROTO_IP, libc::IP_TRANSPARENT, 1)?,
                _ => set(fd, libc::IPPROTO_IPV6, libc::IPV6_TRANSPARENT, 1)?,
            }
            bound(fd, way.source())
        },
        ..ROW
    },
    Row { name: "SO_BINDTODEVICE", prepare: |fd, _| bind_to_device(fd, b"lo\0"), ..ROW },
    Row {
        name: "SO_REUSEPORT and a port",
        prepare: |fd, way| {
            set(fd, libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)?;
            set(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
            bound(fd, SocketAddr::new(way.source().ip(), free_port(way)))
        },
        ..ROW
    },
    Row {
        name: "IP_UNICAST_IF",
        prepare: |fd, way| match way.family() {
            AddressFamily::INET => set(fd, libc::IPPROTO_IP, libc::IP_UNICAST_IF, 1i32.to_be()),
            _ => set(fd, libc::IPPROTO_IPV6, libc::IPV6_UNICAST_IF, 1i32.to_be()),
        },
        ..ROW
    },
    Row {
        name: "IP_RECVORIGDSTADDR and IP_PKTINFO",
        kinds: &Kind::DATAGRAM,
        prepare: |fd, way| match way.family() {
            AddressFamily::INET => {
                set(fd, libc::IPPROTO_IP, libc::IP_RECVORIGDSTADDR, 1)?;
                set(fd, libc::IPPROTO_IP, libc::IP_PKTINFO, 1)
            }
            _ => {
                set(fd, libc::IPPROTO_IPV6, libc::IPV6_RECVORIGDSTADDR, 1)?;
                set(fd, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 1)
            }
        },
        ..ROW
    },
    Row {
        name: "a source by pktinfo",
        kinds: &[Kind::Unconnected],
        send: |fd, to, way| from_source(fd, to, way.source()),
        ..ROW
    },
    Row {
        name: "its own source by pktinfo",
        kinds: &Kind::DATAGRAM,
        send: |fd, to, way| match way {
            Way::Ipv6 => from_source(fd, to, loopback(VIP6)),
            _ => from_source(fd, to, way.address(Ipv4Addr::LOCALHOST)),
        },
        ..ROW
    },
    Row {
        name: "IP_RECVERR",
        kinds: &Kind::DATAGRAM,
        prepare: |fd, way| match way.family() {
            AddressFamily::INET => set(fd, libc::IPPROTO_IP, libc::IP_RECVERR, 1),
            _ => set(fd, libc::IPPROTO_IPV6, libc::IPV6_RECVERR, 1),
        },
        ..ROW
    },
    Row {
        name: "UDP_SEGMENT",
        kinds: &Kind::DATAGRAM,
        prepare: |fd, _| set(fd, libc::IPPROTO_UDP, libc::UDP_SEGMENT, 512),
        ..ROW
    },
    Row {
        name: "MSG_CONFIRM",
        kinds: &Kind::DATAGRAM,
        send: |fd, to, _| send(fd, to, libc::MSG_CONFIRM),
        ..ROW
    },
    Row {
        name: "MSG_DONTROUTE",
        kinds: &Kind::DATAGRAM,
        send: |fd, to, _| send(fd, to, libc::MSG_DONTROUTE),
        ..ROW
    },
    Row {
        name: "MSG_MORE",
        kinds: &Kind::DATAGRAM,
        send: |fd, to, _| {
            send(fd, to, libc::MSG_MORE)?;
            send(fd, to, 0)
        },
        ..ROW
    },
    Row { name: "sendmmsg()", kinds: &Kind::DATAGRAM, send: many, ..ROW },
    Row {
        name: "connected twice",
        kinds: &[Kind::Connected, Kind::ConnectedNamed],
        prepare: |fd, way| {
            connect(fd, &SocketAddr::new(way.source().ip(), 9))?;
            connect_unspec(fd)?;
            Ok(())
        },
        ..ROW
    },
    Row {
        name: "SOCK_NONBLOCK",
        kinds: &[Kind::Stream],
        prepare: |fd, _| Ok(rustix::io::ioctl_fionbio(fd, true)?),
        ..ROW
    },
    Row {
        name: "TCP_FASTOPEN_CONNECT",
        kinds: &[Kind::Stream],
        prepare: |fd, _| set(fd, libc::IPPROTO_TCP, libc::TCP_FASTOPEN_CONNECT, 1),
        ..ROW
    },
    Row { name: "MPTCP", kinds: &[Kind::Stream], protocol: libc::IPPROTO_MPTCP, ..ROW },
    Row {
        name: "MPTCP and bind() to a source",
        kinds: &[Kind::Stream],
        protocol: libc::IPPROTO_MPTCP,
        prepare: |fd, way| bound(fd, way.source()),
        ..ROW
    },
];

/// The results of a row for an application.
#[derive(Debug, PartialEq)]
struct Outcome {
    /// The client's address as the server saw it, and whether the reply came from the named address; or
    /// the error.
    answer: Result<(String, bool), i32>,
    /// Whether getpeername() shows the named address; or the error.
    peer: Result<bool, i32>,
}

/// Servers at loopback's two addresses that answer with the client's address.
struct Servers {
    _tcp: [TcpListener; 2],
    addresses: [SocketAddr; 2],
}

impl Servers {
    fn start() -> Servers {
        let (tcp4, udp4) = pair(loopback(VIP));
        let (tcp6, udp6) = pair(loopback(VIP6));
        let addresses = [&tcp4, &tcp6].map(|listener| listener.local_addr().unwrap());
        for socket in [udp4, udp6] {
            std::thread::spawn(move || {
                let mut datagram = [0; 64];
                while let Ok((n, client)) = socket.recv_from(&mut datagram) {
                    if datagram[..n] == *b"end" {
                        return;
                    }
                    let ip = client.ip().to_canonical().to_string();
                    let _ = socket.send_to(ip.as_bytes(), client);
                }
            });
        }
        let kept = [&tcp4, &tcp6].map(|listener| listener.try_clone().unwrap());
        for listener in [tcp4, tcp6] {
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    let Ok(mut stream) = stream else { return };
                    let client = stream.peer_addr().map(|address| address.ip().to_canonical());
                    let mut request = [0];
                    let _ = stream.set_read_timeout(Some(Duration::from_secs(30)));
                    if let (Ok(client), Ok(())) = (client, stream.read_exact(&mut request)) {
                        if request == *b"!" {
                            return;
                        }
                        let _ = stream.write_all(client.to_string().as_bytes());
                    }
                }
            });
        }
        Servers { _tcp: kept, addresses }
    }

    /// The server's own address, as a socket of this family names it.
    fn direct(&self, way: Way) -> SocketAddr {
        let [ipv4, ipv6] = self.addresses;
        match way {
            Way::Plain => ipv4,
            Way::Mapped => ways(Ipv4Addr::LOCALHOST, ipv4.port())[1],
            Way::Ipv6 => ipv6,
        }
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        for address in self.addresses {
            let _ = TcpStream::connect(address).and_then(|mut stream| stream.write_all(b"!"));
            let _ = crate::fixture::client(address).send_to(b"end", address);
        }
    }
}

fn pair(on: SocketAddr) -> (TcpListener, UdpSocket) {
    // The port of one is free for the other, but for another process's bad luck.
    (0..16)
        .find_map(|_| {
            let listener = TcpListener::bind(on).unwrap();
            let socket = UdpSocket::bind(listener.local_addr().unwrap()).ok()?;
            Some((listener, socket))
        })
        .expect("a port that is free for both protocols")
}

/// Every row, on every kind of socket that it is about.
pub fn have_the_same_outcome() {
    let servers = Servers::start();
    let mut bed = Bed::with_pool6();
    bed.apply(vec![dual("web", VIP, VIP6, &servers.addresses)]);
    let mut differences = String::new();
    let mut n_compared = 0;
    let mut unanswered = Vec::new();
    for row in ROWS {
        let (mut n_made, mut n_answered) = (0, 0);
        for (way, kind) in
            row.ways.iter().flat_map(|way| row.kinds.iter().map(move |kind| (*way, *kind)))
        {
            let direct = play(row, way, kind, servers.direct(way));
            n_made += usize::from(make(row, way, kind).is_ok());
            n_answered += usize::from(direct.answer.is_ok());
            let vip = match way {
                Way::Ipv6 => SocketAddr::from((VIP6, 80)),
                _ => SocketAddr::new(way.address(VIP).ip(), 80),
            };
            // One that is sent to an instance of the other family by chance is so within these: the
            // chance that it isn't is 2^-12.
            for _ in 0..12 {
                let mut by_vip = play(row, way, kind, vip);
                // Either of the two families may carry it.
                if let (Way::Ipv6, Ok((by, _)), Ok((own, _))) =
                    (way, &mut by_vip.answer, &direct.answer)
                    && by == "127.0.0.1"
                    && own == "::1"
                    && !row.name.contains("bind")
                    && row.name != "IPV6_V6ONLY"
                {
                    own.clone_into(by);
                }
                n_compared += 1;
                if by_vip != direct {
                    let _ = writeln!(
                        differences,
                        "{}, {way:?}, {kind:?}: by VIP {by_vip:?}, directly {direct:?}",
                        row.name
                    );
                    break;
                }
            }
        }
        // A kernel that was built without the protocol makes no such socket.
        if n_made > 0 && n_answered == 0 {
            unanswered.push(row.name);
        }
    }
    assert!(differences.is_empty(), "\n{differences}");
    // A row that no direct connection is answered in compares nothing but errors.
    assert!(unanswered.is_empty(), "never answered: {unanswered:?}");
    assert!(n_compared > 1_000, "{n_compared}");
}

fn play(row: &Row, way: Way, kind: Kind, target: SocketAddr) -> Outcome {
    let fd = match make(row, way, kind) {
        Ok(fd) => fd,
        // This kernel was built without.
        Err(error) => return Outcome { answer: Err(code(&error)), peer: Ok(false) },
    };
    let answer = exchange(row, &fd, way, kind, target).map_err(|error| code(&error));
    let peer = peer(&fd).map(|peer| peer == target).map_err(|error| code(&error));
    Outcome { answer, peer }
}

fn make(row: &Row, way: Way, kind: Kind) -> io::Result<OwnedFd> {
    let socket_type = if kind == Kind::Stream { libc::SOCK_STREAM } else { libc::SOCK_DGRAM };
    let domain = way.family().as_raw();
    // SAFETY: the call takes no memory of ours.
    let fd = check(unsafe {
        libc::socket(domain.into(), socket_type | libc::SOCK_CLOEXEC, row.protocol)
    })?;
    // SAFETY: the kernel has just made this descriptor for us.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // No answer comes within microseconds where the kernel drops it.
    let patience = libc::timeval { tv_sec: 1, tv_usec: 0 };
    set(&fd, libc::SOL_SOCKET, libc::SO_RCVTIMEO, patience)?;
    Ok(fd)
}

fn exchange(
    row: &Row,
    fd: &OwnedFd,
    way: Way,
    kind: Kind,
    target: SocketAddr,
) -> io::Result<(String, bool)> {
    (row.prepare)(fd, way)?;
    if kind != Kind::Unconnected {
        match connect(fd, &target) {
            Err(rustix::io::Errno::INPROGRESS) => {
                let mut poll = [rustix::event::PollFd::new(fd, rustix::event::PollFlags::OUT)];
                rustix::event::poll(&mut poll, None)?;
                rustix::io::ioctl_fionbio(fd, false)?;
                rustix::net::sockopt::socket_error(fd)??;
            }
            result => result?,
        }
        rustix::io::ioctl_fionbio(fd, false)?;
    }
    let named = matches!(kind, Kind::ConnectedNamed | Kind::Unconnected);
    (row.send)(fd, named.then_some(target), way)?;
    let mut reply = [0; 64];
    let socket = UdpSocket::from(fd.try_clone()?);
    if kind == Kind::Stream {
        let n = TcpStream::from(fd.try_clone()?).read(&mut reply)?;
        return Ok((text(&reply[..n]), true));
    }
    let (_, peeked) = socket.peek_from(&mut reply)?;
    let (n, sender) = socket.recv_from(&mut reply)?;
    Ok((text(&reply[..n]), peeked == target && sender == target))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn peer(fd: &OwnedFd) -> io::Result<SocketAddr> {
    UdpSocket::from(fd.try_clone()?).peer_addr()
}

fn code(error: &Error) -> i32 {
    error.raw_os_error().unwrap_or(-1)
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(Error::last_os_error()) } else { Ok(result) }
}

fn set<T>(fd: &OwnedFd, level: libc::c_int, option: libc::c_int, value: T) -> io::Result<()> {
    let (pointer, length) = ((&raw const value).cast(), size_of::<T>() as libc::socklen_t);
    // SAFETY: the value lives until the call ends.
    check(unsafe { libc::setsockopt(fd.as_raw_fd(), level, option, pointer, length) }).map(drop)
}

fn bind_to_device(fd: &OwnedFd, device: &[u8; 3]) -> io::Result<()> {
    set(fd, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, *device)
}

fn bound(fd: &OwnedFd, address: SocketAddr) -> io::Result<()> {
    Ok(bind(fd, &address)?)
}

fn free_port(way: Way) -> u16 {
    TcpListener::bind(way.source()).unwrap().local_addr().unwrap().port()
}

fn plain(fd: &OwnedFd, to: Option<SocketAddr>, _: Way) -> io::Result<()> {
    send(fd, to, 0)
}

fn send(fd: &OwnedFd, to: Option<SocketAddr>, flags: libc::c_int) -> io::Result<()> {
    message(fd, to, flags, &mut [])
}

/// With a source address in a control message.
fn from_source(fd: &OwnedFd, to: Option<SocketAddr>, source: SocketAddr) -> io::Result<()> {
    // SAFETY: plain data, for which zeros are valid.
    let mut control: [u64; 8] = unsafe { zeroed() };
    let header = control.as_mut_ptr().cast::<libc::cmsghdr>();
    // SAFETY: the buffer is aligned, and has room for a header and either structure.
    let length = unsafe {
        let data = libc::CMSG_DATA(header);
        match source {
            SocketAddr::V4(source) => {
                let spec_dst = libc::in_addr { s_addr: u32::from_ne_bytes(source.ip().octets()) };
                let info = libc::in_pktinfo { ipi_ifindex: 0, ipi_spec_dst: spec_dst, ..zeroed() };
                data.cast::<libc::in_pktinfo>().write_unaligned(info);
                (*header).cmsg_level = libc::IPPROTO_IP;
                (*header).cmsg_type = libc::IP_PKTINFO;
                (*header).cmsg_len = libc::CMSG_LEN(size_of::<libc::in_pktinfo>() as u32) as usize;
                libc::CMSG_SPACE(size_of::<libc::in_pktinfo>() as u32)
            }
            SocketAddr::V6(source) => {
                let ipi6_addr = libc::in6_addr { s6_addr: source.ip().octets() };
                let info = libc::in6_pktinfo { ipi6_addr, ipi6_ifindex: 0 };
                data.cast::<libc::in6_pktinfo>().write_unaligned(info);
                (*header).cmsg_level = libc::IPPROTO_IPV6;
                (*header).cmsg_type = libc::IPV6_PKTINFO;
                (*header).cmsg_len = libc::CMSG_LEN(size_of::<libc::in6_pktinfo>() as u32) as usize;
                libc::CMSG_SPACE(size_of::<libc::in6_pktinfo>() as u32)
            }
        }
    };
    message(fd, to, 0, &mut control[..length as usize / 8])
}

/// sendmsg() of one byte.
fn message(
    fd: &OwnedFd,
    to: Option<SocketAddr>,
    flags: libc::c_int,
    control: &mut [u64],
) -> io::Result<()> {
    let (mut name, name_len) = to.map_or((None, 0), |to| {
        let (storage, length) = raw(to);
        (Some(storage), length)
    });
    let mut byte = [b'?'];
    let mut part = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    // SAFETY: plain data, for which zeros are valid.
    let mut header: libc::msghdr = unsafe { zeroed() };
    header.msg_name = name.as_mut().map_or(std::ptr::null_mut(), |name| (&raw mut *name).cast());
    header.msg_namelen = name_len;
    (header.msg_iov, header.msg_iovlen) = (&raw mut part, 1);
    if !control.is_empty() {
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = size_of_val(control) as _;
    }
    // SAFETY: all that the header points to lives until the call ends.
    let sent =
        unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const header, flags | libc::MSG_NOSIGNAL) };
    if sent < 0 { Err(Error::last_os_error()) } else { Ok(()) }
}

/// Two datagrams by one call.
fn many(fd: &OwnedFd, to: Option<SocketAddr>, _: Way) -> io::Result<()> {
    let (mut name, name_len) = to.map_or((None, 0), |to| {
        let (storage, length) = raw(to);
        (Some(storage), length)
    });
    let mut byte = [b'?'];
    let mut part = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    // SAFETY: plain data, for which zeros are valid.
    let mut messages: [libc::mmsghdr; 2] = unsafe { zeroed() };
    for message in &mut messages {
        message.msg_hdr.msg_name =
            name.as_mut().map_or(std::ptr::null_mut(), |name| (&raw mut *name).cast());
        message.msg_hdr.msg_namelen = name_len;
        (message.msg_hdr.msg_iov, message.msg_hdr.msg_iovlen) = (&raw mut part, 1);
    }
    // SAFETY: all that the headers point to lives until the call ends.
    let sent = check(unsafe { libc::sendmmsg(fd.as_raw_fd(), messages.as_mut_ptr(), 2, 0) })?;
    assert_eq!(sent, 2);
    Ok(())
}

/// An address as the kernel takes it, and its length.
fn raw(address: SocketAddr) -> (libc::sockaddr_in6, libc::socklen_t) {
    // SAFETY: plain data, for which zeros are valid.
    let mut raw: libc::sockaddr_in6 = unsafe { zeroed() };
    match address {
        SocketAddr::V4(address) => {
            let raw4 = (&raw mut raw).cast::<libc::sockaddr_in>();
            // SAFETY: the larger of the two structures has room for the smaller one.
            unsafe {
                (*raw4).sin_family = libc::AF_INET as u16;
                (*raw4).sin_port = address.port().to_be();
                (*raw4).sin_addr.s_addr = u32::from_ne_bytes(address.ip().octets());
            }
            (raw, size_of::<libc::sockaddr_in>() as libc::socklen_t)
        }
        SocketAddr::V6(address) => {
            raw.sin6_family = libc::AF_INET6 as u16;
            raw.sin6_port = address.port().to_be();
            raw.sin6_addr.s6_addr = address.ip().octets();
            (raw, size_of::<libc::sockaddr_in6>() as libc::socklen_t)
        }
    }
}

/// Sources from which a backend on another network can't be reached, and a device that doesn't lead
/// there: the error is the one of a direct connection.
pub fn unusable_sources_fail_alike() {
    let mut bed = Bed::with_pool6();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            leave();
            let far = SocketAddr::from((Ipv4Addr::new(10, 77, 0, 2), 9));
            for arguments in [
                "link add d0 type veth peer name d1",
                "addr add 10.77.0.1/24 dev d0",
                "link set d0 up",
                "link set d1 up",
            ] {
                let ip = std::process::Command::new("ip").args(arguments.split(' ')).status();
                assert!(ip.unwrap().success(), "{arguments}");
            }
            let mut web = dual("web", VIP, VIP6, &[far]);
            web.ports = lb_userspace::table::Ports::only([80]);
            bed.apply(vec![web]);
            let prepares: [(&str, Prepare); 3] = [
                ("bind() to 127.0.0.1", |fd, way| bound(fd, way.address(Ipv4Addr::LOCALHOST))),
                ("bind() to 10.77.0.1", |fd, way| {
                    bound(fd, way.address(Ipv4Addr::new(10, 77, 0, 1)))
                }),
                ("SO_BINDTODEVICE", |fd, _| bind_to_device(fd, b"d1\0")),
            ];
            for (name, prepare) in prepares {
                for way in [Way::Plain, Way::Mapped] {
                    for socket_type in [SocketType::DGRAM, SocketType::STREAM] {
                        let outcome = |target: SocketAddr| {
                            let fd = socket(way.family(), socket_type, None).unwrap();
                            rustix::io::ioctl_fionbio(&fd, true).unwrap();
                            prepare(&fd, way).unwrap();
                            (connect(&fd, &target), peer(&fd).is_ok_and(|peer| peer == target))
                        };
                        let direct = outcome(SocketAddr::new(
                            way.address(Ipv4Addr::new(10, 77, 0, 2)).ip(),
                            9,
                        ));
                        let by_vip = outcome(SocketAddr::new(way.address(VIP).ip(), 80));
                        assert_eq!(by_vip, direct, "{name}, {way:?}, {socket_type:?}");
                    }
                }
            }
        });
    });
}

/// IORING_OP_CONNECT, IORING_OP_SENDMSG: as the system calls.
pub fn a_ring_is_no_way_around() {
    let Some(mut ring) = ring::Ring::new() else {
        return crate::skip("io_uring_setup() isn't there or isn't permitted");
    };
    let servers = Servers::start();
    let mut bed = Bed::with_pool6();
    bed.apply(vec![dual("web", VIP, VIP6, &servers.addresses)]);
    for way in Way::ALL {
        let vip = match way {
            Way::Ipv6 => SocketAddr::from((VIP6, 80)),
            _ => SocketAddr::new(way.address(VIP).ip(), 80),
        };
        let unassigned = SocketAddr::new(
            if way == Way::Ipv6 { VIP6.into() } else { way.address(OTHER_VIP).ip() },
            81,
        );
        for kind in [Kind::Stream, Kind::Connected, Kind::Unconnected] {
            let fd = make(&ROW, way, kind).unwrap();
            if kind != Kind::Unconnected {
                assert_eq!(ring.connect(&fd, vip), 0, "{way:?} {kind:?}");
                assert_eq!(peer(&fd).unwrap(), vip, "{way:?} {kind:?}");
            }
            let to = (kind == Kind::Unconnected).then_some(vip);
            assert_eq!(ring.send(&fd, to), 1, "{way:?} {kind:?}");
            let mut reply = [0; 64];
            if kind == Kind::Stream {
                assert!(TcpStream::from(fd).read(&mut reply).unwrap() > 0);
                let fd = make(&ROW, way, kind).unwrap();
                let refused = ring.connect(&fd, unassigned);
                assert_eq!(refused, -libc::ECONNREFUSED, "{way:?}");
            } else {
                // SAFETY: the descriptor is ours, and given away.
                let socket = unsafe { UdpSocket::from_raw_fd(fd.into_raw_fd()) };
                assert_eq!(socket.recv_from(&mut reply).unwrap().1, vip, "{way:?} {kind:?}");
            }
        }
    }
}

/// The least of io_uring: one request at a time.
mod ring {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    const OP_SENDMSG: u8 = 9;
    const OP_CONNECT: u8 = 16;
    const ENTER_GETEVENTS: u32 = 1;
    const FEAT_SINGLE_MMAP: u32 = 1;

    /// struct io_uring_params of linux/io_uring.h.
    #[repr(C)]
    #[derive(Default)]
    struct Params {
        entries: [u32; 2],
        flags: u32,
        cpu: u32,
        idle: u32,
        features: u32,
        wq_fd: u32,
        reserved: [u32; 3],
        /// head, tail, ring_mask, ring_entries, flags, dropped, array, reserved
        submission: [u32; 8],
        submission_address: u64,
        /// head, tail, ring_mask, ring_entries, overflow, cqes, flags, reserved
        completion: [u32; 8],
        completion_address: u64,
    }

    pub struct Ring {
        fd: OwnedFd,
        rings: *mut u8,
        entries: *mut u64,
        params: Params,
    }

    impl Ring {
        /// `None` where this kernel has none.
        pub fn new() -> Option<Ring> {
            let mut params = Params::default();
            // SAFETY: the kernel fills the structure, which is as large as it takes it for.
            let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, &raw mut params) };
            if fd < 0 || params.features & FEAT_SINGLE_MMAP == 0 {
                return None;
            }
            // SAFETY: the kernel has just made this descriptor for us.
            let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
            let map = |offset| {
                // SAFETY: a fresh mapping, at an address of the kernel's choice, aliases nothing.
                unsafe {
                    let protection = libc::PROT_READ | libc::PROT_WRITE;
                    let address = std::ptr::null_mut();
                    let flags = libc::MAP_SHARED;
                    libc::mmap(address, 4096, protection, flags, fd.as_raw_fd(), offset)
                }
            };
            let (rings, entries) = (map(0), map(0x1000_0000));
            assert!(rings != libc::MAP_FAILED && entries != libc::MAP_FAILED);
            Some(Ring { rings: rings.cast(), entries: entries.cast(), fd, params })
        }

        pub fn connect(&mut self, fd: &OwnedFd, to: SocketAddr) -> i32 {
            let (address, length) = raw(to);
            self.submit(OP_CONNECT, fd, (&raw const address) as u64, 0, length.into())
        }

        pub fn send(&mut self, fd: &OwnedFd, to: Option<SocketAddr>) -> i32 {
            let mut name = to.map(raw);
            let mut byte = [b'?'];
            let mut part = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
            // SAFETY: plain data, for which zeros are valid.
            let mut header: libc::msghdr = unsafe { zeroed() };
            if let Some((name, length)) = &mut name {
                (header.msg_name, header.msg_namelen) = ((&raw mut *name).cast(), *length);
            }
            (header.msg_iov, header.msg_iovlen) = (&raw mut part, 1);
            self.submit(OP_SENDMSG, fd, (&raw const header) as u64, 1, 0)
        }

        /// Submits one request, waits for it and returns its result.
        fn submit(&mut self, op: u8, fd: &OwnedFd, address: u64, length: u32, offset: u64) -> i32 {
            let [_, tail, _, _, _, _, array, _] = self.params.submission;
            let [head, _, mask, _, _, cqes, ..] = self.params.completion;
            let op_flags_fd = u64::from(op) | (fd.as_raw_fd() as u64) << 32;
            // SAFETY: the offsets are the kernel's own, within its one page; nothing else uses it.
            unsafe {
                self.entries.write_bytes(0, 8);
                self.entries.write(op_flags_fd);
                self.entries.add(1).write(offset);
                self.entries.add(2).write(address);
                self.entries.add(3).write(length.into());
                self.rings.add(array as usize).cast::<u32>().write(0);
                let tail = &*self.rings.add(tail as usize).cast::<AtomicU32>();
                tail.fetch_add(1, Ordering::Release);
                let (number, fd) = (libc::SYS_io_uring_enter, self.fd.as_raw_fd());
                let done = libc::syscall(number, fd, 1, 1, ENTER_GETEVENTS, 0, 0);
                assert_eq!(done, 1, "{}", Error::last_os_error());
                let head = &*self.rings.add(head as usize).cast::<AtomicU32>();
                let mask = self.rings.add(mask as usize).cast::<u32>().read();
                let index = head.load(Ordering::Acquire) & mask;
                let entry = self.rings.add(cqes as usize).cast::<u64>().add(index as usize * 2);
                let result = entry.add(1).read() as u32 as i32;
                head.fetch_add(1, Ordering::Release);
                result
            }
        }
    }
}

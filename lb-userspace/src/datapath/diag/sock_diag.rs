//! The kernel's diagnosis of sockets over netlink, as far as connected UDP and what TCP sockets
//! remember need it: sock_diag(7), linux/sock_diag.h, linux/inet_diag.h.

use std::io;
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::net::netlink;

use super::super::netlink::Netlink;
use super::super::netlink::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, attribute, find_attribute, malformed,
};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;

/// The state of a UDP socket that is connected; the others are in TCP_CLOSE.
const TCP_ESTABLISHED: u32 = 1;
const TCP_CLOSE: u32 = 7;

/// Those of a TCP connection that isn't over: SYN_SENT, SYN_RECV, ESTABLISHED, FIN_WAIT1, FIN_WAIT2,
/// CLOSE_WAIT, LAST_ACK, CLOSING. What is in TIME_WAIT is no socket any more.
const TCP_CONNECTIONS: u32 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11;
const TCP_SYN_SENT: u8 = 2;

/// INET_DIAG_REQ_SK_BPF_STORAGES, and SK_DIAG_BPF_STORAGE_REQ_MAP_FD within it.
const REQUEST_STORAGES: u16 = 2;
const REQUEST_MAP_FD: u16 = 1;
/// INET_DIAG_SK_BPF_STORAGES, SK_DIAG_BPF_STORAGE and SK_DIAG_BPF_STORAGE_MAP_VALUE, each within the
/// former.
const STORAGES: [u16; 3] = [20, 1, 3];
/// INET_DIAG_CGROUP_ID
const CGROUP_ID: u16 = 21;
/// struct inet_diag_sockid
const SOCKET_ID_SIZE: usize = 48;
/// struct inet_diag_msg
const SOCKET_SIZE: usize = 72;
/// How often a list that changed while it was made is requested again.
const MAX_LISTS: usize = 4;

/// The family of a socket. One that speaks IPv4 through mapped addresses is [`Family::V6`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Family {
    /// AF_INET
    V4 = libc::AF_INET as u8,
    /// AF_INET6
    V6 = libc::AF_INET6 as u8,
}

/// A connected UDP socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connected {
    /// The number that the kernel gives to no other socket before it is restarted: SO_COOKIE.
    pub cookie: u64,
    /// The number in the links of /proc/[pid]/fd. Once the socket is closed another may have it.
    pub inode: u32,
    /// The socket's own address. IPv6 for an IPv6 socket, also where that is an IPv4 address in its
    /// mapped form: see [`std::net::IpAddr::to_canonical`].
    pub local: SocketAddr,
    /// The socket's destination, in the same form.
    pub destination: SocketAddr,
    family: Family,
    socket_id: [u8; SOCKET_ID_SIZE],
}

/// A netlink socket. It belongs to the network namespace that it was opened in.
#[derive(Debug)]
pub struct SockDiag(Netlink);

impl SockDiag {
    /// Opens one in the calling thread's network namespace.
    ///
    /// # Errors
    /// When the kernel was built without.
    pub fn open() -> io::Result<SockDiag> {
        Netlink::open(Some(netlink::SOCK_DIAG)).map(SockDiag)
    }

    /// The connected UDP sockets of a family. A socket can be missing when its neighbour in the
    /// kernel's table goes while the list is made.
    ///
    /// # Errors
    /// ENOENT without the module udp_diag.
    pub fn connected_udp(&mut self, family: Family) -> io::Result<Vec<Connected>> {
        let mut sockets = Vec::new();
        for _ in 0..MAX_LISTS {
            sockets.clear();
            let mut is_interrupted = false;
            let request = udp_sockets(family, &[0; SOCKET_ID_SIZE]);
            self.0.send(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, &request)?;
            self.0.receive(|message| {
                is_interrupted |= message.flags & NLM_F_DUMP_INTR != 0;
                if message.kind == SOCK_DIAG_BY_FAMILY {
                    sockets.push(Connected::parse(message.payload)?);
                }
                Ok(())
            })?;
            if !is_interrupted {
                break;
            }
        }
        Ok(sockets)
    }

    /// The UDP sockets of a family that are bound to a port, each with its address and the id of its
    /// cgroup. As above, some can be missing. Kernel 5.9 and later.
    ///
    /// # Errors
    /// ENOENT without the module udp_diag.
    pub fn bound_udp(&mut self, family: Family, port: u16) -> io::Result<Vec<(SocketAddr, u64)>> {
        let mut socket_id = [0; SOCKET_ID_SIZE];
        // The kernel lists those that have it.
        socket_id[..2].copy_from_slice(&port.to_be_bytes());
        let states = 1 << TCP_ESTABLISHED | 1 << TCP_CLOSE;
        self.0.send(
            SOCK_DIAG_BY_FAMILY,
            NLM_F_DUMP,
            &sockets(family, libc::IPPROTO_UDP, states, &socket_id),
        )?;
        let mut bound = Vec::new();
        self.0.receive(|message| {
            if message.kind == SOCK_DIAG_BY_FAMILY {
                let attributes = message.payload.get(SOCKET_SIZE..).ok_or_else(malformed)?;
                let cgroup_id = find_attribute(attributes, CGROUP_ID)?;
                if let Some(&cgroup_id) = cgroup_id.and_then(<[u8]>::first_chunk) {
                    let local = Connected::parse(message.payload)?.local;
                    bound.push((local, u64::from_ne_bytes(cgroup_id)));
                }
            }
            Ok(())
        })?;
        Ok(bound)
    }

    /// The TCP connections of a family whose sockets have storage in this map, each with the storage, and
    /// those for whose cookie `has_record` is true. As above, some can be missing.
    ///
    /// # Errors
    /// ENOENT without the module tcp_diag, EPERM without CAP_BPF and CAP_NET_ADMIN.
    pub fn stored_tcp(
        &mut self,
        family: Family,
        storage: BorrowedFd<'_>,
        has_record: impl Fn(u64) -> bool,
    ) -> io::Result<Vec<Stored>> {
        let mut stored = Vec::new();
        let request = sockets(family, libc::IPPROTO_TCP, TCP_CONNECTIONS, &[0; SOCKET_ID_SIZE]);
        let map = attribute(REQUEST_MAP_FD, &storage.as_raw_fd().to_ne_bytes());
        let request = [request, attribute(REQUEST_STORAGES, &map)].concat();
        self.0.send(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, &request)?;
        self.0.receive(|message| {
            if message.kind == SOCK_DIAG_BY_FAMILY {
                let found = Stored::parse(message.payload)?;
                if found.storage.is_some() || has_record(found.cookie) {
                    stored.push(found);
                }
            }
            Ok(())
        })?;
        Ok(stored)
    }

    /// Takes a socket's connection away. Returns false when it was no longer there: when no socket
    /// with these addresses and ports has this cookie.
    ///
    /// # Errors
    /// EPERM without CAP_NET_ADMIN, EOPNOTSUPP when the kernel was built without.
    pub fn destroy(&mut self, socket: &Connected) -> io::Result<bool> {
        self.destroy_by(&udp_sockets(socket.family, &socket.socket_id))
    }

    /// Aborts a TCP connection: its peer gets a RST, and the application ECONNABORTED. Returns and fails
    /// as [`SockDiag::destroy`].
    ///
    /// # Errors
    /// As there.
    pub fn abort_tcp(&mut self, Stored { socket, .. }: &Stored) -> io::Result<bool> {
        let Connected { family, socket_id, .. } = socket;
        self.destroy_by(&sockets(*family, libc::IPPROTO_TCP, TCP_CONNECTIONS, socket_id))
    }

    /// Whether this kernel aborts sockets for this process: it is asked for one that can't exist.
    ///
    /// # Errors
    /// As for [`SockDiag::destroy`].
    pub fn may_abort_tcp(&mut self) -> io::Result<()> {
        let nowhere = [0; SOCKET_ID_SIZE];
        let request = sockets(Family::V4, libc::IPPROTO_TCP, TCP_CONNECTIONS, &nowhere);
        self.destroy_by(&request).map(drop)
    }

    fn destroy_by(&mut self, request: &[u8]) -> io::Result<bool> {
        self.0.send(SOCK_DESTROY, NLM_F_ACK, request)?;
        match self.0.receive(|_| Ok(())) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            result => result.map(|()| true),
        }
    }
}

/// struct inet_diag_req_v2, for connected UDP sockets.
fn udp_sockets(family: Family, socket_id: &[u8; SOCKET_ID_SIZE]) -> Vec<u8> {
    sockets(family, libc::IPPROTO_UDP, 1 << TCP_ESTABLISHED, socket_id)
}

/// struct inet_diag_req_v2, for the sockets of a protocol that are in these states.
fn sockets(family: Family, protocol: i32, states: u32, socket_id: &[u8]) -> Vec<u8> {
    let (extensions, padding) = (0, 0);
    let head = [family as u8, protocol as u8, extensions, padding];
    [&head[..], &states.to_ne_bytes(), socket_id].concat()
}

impl Connected {
    /// Parses struct inet_diag_msg; the attributes behind it don't matter.
    fn parse(payload: &[u8]) -> io::Result<Connected> {
        let ([family, _state, _timer, _retransmits], rest) = split(payload)?;
        let family = match i32::from(family) {
            libc::AF_INET => Family::V4,
            libc::AF_INET6 => Family::V6,
            _ => return Err(malformed()),
        };
        let (socket_id, rest): ([u8; SOCKET_ID_SIZE], _) = split(rest)?;
        let (_expires_rqueue_wqueue_uid, rest) = split::<16>(rest)?;
        let (inode, _) = split(rest)?;

        let (local_port_be, rest) = split(&socket_id)?;
        let (destination_port_be, rest) = split(rest)?;
        let (local, rest) = split(rest)?;
        let (destination, rest) = split(rest)?;
        let (interface, rest) = split(rest)?;
        let (cookie_low, rest) = split(rest)?;
        let (cookie_high, _) = split(rest)?;
        let [low, high] = [cookie_low, cookie_high].map(|half| u64::from(u32::from_ne_bytes(half)));
        let address = |bytes, port_be| {
            address(family, bytes, u16::from_be_bytes(port_be), u32::from_ne_bytes(interface))
        };
        Ok(Connected {
            cookie: high << 32 | low,
            inode: u32::from_ne_bytes(inode),
            local: address(local, local_port_be),
            destination: address(destination, destination_port_be),
            family,
            socket_id,
        })
    }
}

/// A TCP connection, and what its socket's storage has, if it has one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// SO_COOKIE.
    pub cookie: u64,
    /// What the socket is connected to, as in [`Connected::destination`].
    pub destination: SocketAddr,
    /// Whether it waits for an answer to its SYN.
    pub is_pending: bool,
    /// The value in the map that was asked for; the kernel lists sockets without one as well.
    pub storage: Option<Vec<u8>>,
    /// The socket, as it is named to the kernel.
    socket: Connected,
}

impl Stored {
    fn parse(payload: &[u8]) -> io::Result<Stored> {
        let attributes = payload.get(SOCKET_SIZE..).ok_or_else(malformed)?;
        let mut value = Some(attributes);
        for kind in STORAGES {
            value = value.map(|value| find_attribute(value, kind)).transpose()?.flatten();
        }
        let socket = Connected::parse(payload)?;
        let Connected { cookie, destination, .. } = socket;
        let is_pending = payload.get(1) == Some(&TCP_SYN_SENT);
        let storage = value.map(<[u8]>::to_vec);
        Ok(Stored { cookie, destination, is_pending, storage, socket })
    }
}

fn split<const N: usize>(bytes: &[u8]) -> io::Result<([u8; N], &[u8])> {
    bytes.split_first_chunk().map(|(first, rest)| (*first, rest)).ok_or_else(malformed)
}

/// An IPv4 address is in the first four bytes.
fn address(family: Family, bytes: [u8; 16], port: u16, interface: u32) -> SocketAddr {
    match family {
        Family::V4 => {
            let [a, b, c, d, ..] = bytes;
            ([a, b, c, d], port).into()
        }
        Family::V6 => {
            let address = Ipv6Addr::from(bytes);
            let scope_id = if address.is_unicast_link_local() { interface } else { 0 };
            SocketAddrV6::new(address, port, 0, scope_id).into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A connected UDP socket as the kernel lists it.
    fn socket(family: Family, local: [u8; 16], destination: [u8; 16]) -> Vec<u8> {
        let head = [family as u8, 1, 0, 0, 0x9c, 0x40, 0x00, 0x35];
        let interface = 7u32.to_ne_bytes();
        let cookie = [0x5566_7788u32.to_ne_bytes(), 0x1122_3344u32.to_ne_bytes()].concat();
        let inode = 4711u32.to_ne_bytes();
        let attributes = [5, 0, 8, 0, 0, 0, 0, 0];
        let parts = [&head[..], &local, &destination, &interface, &cookie, &[0; 16], &inode];
        [&parts.concat()[..], &attributes].concat()
    }

    fn v4(octets: [u8; 4]) -> [u8; 16] {
        let [a, b, c, d] = octets;
        [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    }

    fn v6(text: &str) -> [u8; 16] {
        text.parse::<Ipv6Addr>().unwrap().octets()
    }

    #[test]
    fn sockets_are_parsed() {
        let v4_local = v4([127, 0, 0, 1]);
        for (family, local, destination, expected_local, expected_destination) in [
            (Family::V4, v4_local, v4([10, 0, 0, 7]), "127.0.0.1:40000", "10.0.0.7:53"),
            (
                Family::V6,
                v6("::ffff:127.0.0.1"),
                v6("::ffff:10.0.0.7"),
                "[::ffff:127.0.0.1]:40000",
                "[::ffff:10.0.0.7]:53",
            ),
            (Family::V6, v6("fd00::1"), v6("fe80::2"), "[fd00::1]:40000", "[fe80::2%7]:53"),
        ] {
            let bytes = socket(family, local, destination);
            let socket = Connected::parse(&bytes).unwrap();
            assert_eq!((socket.cookie, socket.inode), (0x1122_3344_5566_7788, 4711));
            assert_eq!(socket.local, expected_local.parse().unwrap());
            assert_eq!(socket.destination, expected_destination.parse().unwrap());
            assert_eq!(socket.socket_id, bytes[4..52]);
            assert!(Connected::parse(&bytes[..71]).is_err(), "cut short");
        }
    }

    #[test]
    fn storage_is_found_in_its_nest() {
        let nest = |kind: u16, value: &[u8]| attribute(kind | 1 << 15, value);
        let id = attribute(2, &7u32.to_ne_bytes());
        let value = attribute(3, &[1, 2, 3, 4, 5, 6, 7, 8]);
        let storages = nest(20, &nest(1, &[id, value].concat()));
        let mut bytes = socket(Family::V4, v4([127, 0, 0, 1]), v4([10, 0, 0, 7]));
        assert_eq!(Stored::parse(&bytes).unwrap().storage, None);
        bytes[1] = TCP_SYN_SENT;
        bytes.extend(storages);
        let stored = Stored::parse(&bytes).unwrap();
        assert_eq!((stored.cookie, stored.is_pending), (0x1122_3344_5566_7788, true));
        assert_eq!(stored.destination, "10.0.0.7:53".parse().unwrap());
        assert_eq!(stored.storage, Some(vec![1, 2, 3, 4, 5, 6, 7, 8]));
        for length in 0..bytes.len() {
            // Cut short it is no answer, or one without the storage.
            let cut = Stored::parse(&bytes[..length]);
            assert!(!cut.is_ok_and(|stored| stored.storage.is_some()), "{length}");
        }
    }
}

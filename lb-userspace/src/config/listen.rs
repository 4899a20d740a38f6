//! Addresses to listen on, and which of them can't both be had.

use std::net::{IpAddr, SocketAddr};
use std::path::{Component, Path, PathBuf};

use super::AdminAddress;
use super::builder::ConfigBuilder;

/// Whether a socket for `address`, one of those in `listen`, is for IPv6 alone (IPV6_V6ONLY): `[::]` has all IPv4
/// addresses, too, unless the list has one with the same port.
pub fn is_v6_only(address: SocketAddr, listen: impl IntoIterator<Item = SocketAddr>) -> bool {
    let is_any = address.is_ipv6() && address.ip().is_unspecified();
    let has_port = |other: SocketAddr| other.port() == address.port();
    is_any && listen.into_iter().any(|it| it.ip().to_canonical().is_ipv4() && has_port(it))
}

/// The addresses of TCP in a list.
pub fn tcp_addresses(listen: &[AdminAddress]) -> impl Iterator<Item = SocketAddr> {
    listen.iter().filter_map(|address| match address {
        AdminAddress::Tcp(address) => Some(*address),
        AdminAddress::Unix(_) => None,
    })
}

/// A socket that listens with TCP.
struct TcpSocket {
    key: &'static str,
    address: SocketAddr,
    is_v6_only: bool,
}

impl TcpSocket {
    /// Whether no other socket can have `other`, or a part of it, in addition to this one.
    fn includes(&self, other: &TcpSocket) -> bool {
        let [own, others] = [self, other].map(|socket| socket.address.ip().to_canonical());
        self.address.port() == other.address.port()
            && match own {
                IpAddr::V4(own) if own.is_unspecified() => others.is_ipv4(),
                IpAddr::V6(own) if own.is_unspecified() => others.is_ipv6() || !self.is_v6_only,
                _ => self.is_same(other),
            }
    }

    fn is_same(&self, other: &TcpSocket) -> bool {
        let identity = |address: SocketAddr| {
            let scope = match address {
                SocketAddr::V4(_) => 0,
                SocketAddr::V6(v6) => v6.scope_id(),
            };
            (address.ip().to_canonical(), scope, address.port())
        };
        identity(self.address) == identity(other.address)
    }

    /// What keeps both from being listened on, with the fix.
    fn conflict(&self, earlier: &TcpSocket) -> Option<String> {
        let name = |socket: &TcpSocket| match socket.key == self.key {
            true => socket.address.to_string(),
            false => format!("{} of {}", socket.address, socket.key),
        };
        let (own, earlier_name) = (name(self), name(earlier));
        if self.is_same(earlier) {
            return Some(match self.key == earlier.key {
                true => format!("{earlier_name} and {own} are one address; remove one"),
                false => format!("{own} is in {}, too; choose another port", earlier.key),
            });
        }
        let fix = "remove one, or choose another port";
        if self.includes(earlier) {
            return Some(format!("{own} includes {earlier_name}; {fix}"));
        }
        earlier.includes(self).then(|| format!("{earlier_name} includes {own}; {fix}"))
    }
}

/// Notes addresses of which the daemon itself would have one in use when it binds another.
pub(super) fn check(builder: &mut ConfigBuilder) {
    let (dns, admin) = (builder.config.dns.clone(), builder.config.admin.listen.clone());
    let mut sockets: Vec<TcpSocket> = Vec::new();
    for (key, listen) in [
        ("dns.listen", dns.listen),
        ("dns.listen_tls", dns.listen_tls),
        ("admin.listen", tcp_addresses(&admin).collect()),
    ] {
        for &address in &listen {
            let is_v6_only = is_v6_only(address, listen.iter().copied());
            let socket = TcpSocket { key, address, is_v6_only };
            let found =
                sockets.iter().find_map(|it| socket.conflict(it).map(|what| (it.key, what)));
            if let Some((other, what)) = found {
                builder.conflict(&[key, other], what);
            }
            sockets.push(socket);
        }
    }
    check_paths(builder, &admin);
}

fn check_paths(builder: &mut ConfigBuilder, listen: &[AdminAddress]) {
    let mut paths: Vec<(PathBuf, &AdminAddress)> = Vec::new();
    for address in listen {
        let AdminAddress::Unix(path) = address else { continue };
        let path = normalized(path);
        if let Some((_, earlier)) = paths.iter().find(|(other, _)| *other == path) {
            let what = format!("{earlier} and {address} are one path; remove one");
            builder.conflict(&["admin.listen"], what);
        }
        paths.push((path, address));
    }
}

/// An absolute path without `.` and `..`, as it reads: links aren't followed.
fn normalized(path: &Path) -> PathBuf {
    let mut normalized = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(name) => normalized.push(name),
            Component::ParentDir => {
                normalized.pop();
            }
            _ => {}
        }
    }
    normalized
}

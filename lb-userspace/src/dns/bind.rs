//! Binds the sockets that the server listens on; errors name the fix.

use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use tracing::info;

use super::socket_activation::{self, ActivationError};
use super::sockets::{Sockets, Transport, n_sockets};
use super::tls::{self, CertificateError};
use crate::config::{DnsConfig, is_v6_only};

/// How often a port is tried that must be free for both transports, where the kernel may choose.
const PORT_TRIES: usize = 16;

/// The TCP connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// The keys that have the addresses.
const PLAIN: &str = "dns.listen";
const TLS: &str = "dns.listen_tls";

/// Why the server can't listen.
#[derive(Debug, thiserror::Error)]
pub enum DnsError {
    /// An address can't be bound.
    #[error("can't listen on {address} ({transport}): {}", advice(key, *address, *transport, source))]
    Bind {
        /// The key that has the address, such as `dns.listen`.
        key: &'static str,
        /// The address.
        address: SocketAddr,
        /// The transport that was refused.
        transport: Transport,
        /// The kernel's error.
        source: io::Error,
    },
    /// The sockets that systemd passed can't be served.
    #[error(transparent)]
    Activation(#[from] ActivationError),
    /// The certificate of `dns.listen_tls` can't be used.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    /// The kernel has no room for what serving takes.
    #[error("can't serve DNS: {0}; raise the limits on open files and threads")]
    Start(#[source] io::Error),
}

impl DnsError {
    /// Whether another process has the address.
    pub fn is_in_use(&self) -> bool {
        matches!(self, DnsError::Bind { source, .. } if source.kind() == io::ErrorKind::AddrInUse)
    }
}

/// What is wrong and, after a semicolon, the fix.
fn advice(key: &str, address: SocketAddr, transport: Transport, source: &io::Error) -> String {
    match source.kind() {
        io::ErrorKind::AddrInUse => format!(
            "address in use; see who holds it with ss -{}lpn 'sport = :{}', or choose another with \
             {key}",
            transport.letter(),
            address.port()
        ),
        io::ErrorKind::PermissionDenied => format!(
            "permission denied; run nohop as root or give it CAP_NET_BIND_SERVICE (in its systemd \
             unit: AmbientCapabilities=CAP_NET_BIND_SERVICE), or choose a port of 1024 or more with \
             {key}"
        ),
        io::ErrorKind::AddrNotAvailable => format!(
            "this host has no such address; see those it has with ip address, or choose another \
             with {key}"
        ),
        _ => format!("{source}; choose another with {key}"),
    }
}

/// The sockets that systemd passed and, bound here, UDP and TCP on each other address of
/// `dns.listen`; port 0 lets the kernel choose one for both. An address may be one that this host
/// doesn't have yet.
///
/// # Errors
/// When an address can't be bound (the first one, with the fix), or the sockets that were passed
/// can't be served.
pub async fn bind(config: &DnsConfig) -> Result<Sockets, DnsError> {
    let passed = socket_activation::take()?.unwrap_or_default();
    if !passed.addresses.is_empty() {
        let addresses: Vec<_> = passed.addresses.iter().map(ToString::to_string).collect();
        info!("listening on {}, passed by systemd", addresses.join(", "));
    }
    let mut sockets = bind_beside(passed, &config.listen)?;
    sockets.tls_config = tls::server_config(config)?;
    for &address in &config.listen_tls {
        let listener = bind_tls(address, &config.listen_tls)?;
        let address = listener.local_addr().map_err(bind_error(TLS, address, Transport::Tcp))?;
        sockets.tls.push(listener);
        sockets.tls_addresses.push(address);
    }
    Ok(sockets)
}

fn bind_tls(address: SocketAddr, listen: &[SocketAddr]) -> Result<TcpListener, DnsError> {
    let socket = bind_one(address, SocketType::STREAM, is_v6_only(address, listen.iter().copied()));
    socket.and_then(self::listen).map_err(bind_error(TLS, address, Transport::Tcp))
}

fn bind_error(
    key: &'static str,
    address: SocketAddr,
    transport: Transport,
) -> impl Fn(io::Error) -> DnsError {
    move |source| DnsError::Bind { key, address, transport, source }
}

/// Adds sockets for those of the addresses that `sockets` doesn't have.
fn bind_beside(mut sockets: Sockets, listen: &[SocketAddr]) -> Result<Sockets, DnsError> {
    let held = sockets.addresses.clone();
    for &address in listen.iter().filter(|address| !is_held(**address, &held)) {
        let (udp, tcp, address) = bind_both(address, is_v6_only(address, listen.iter().copied()))?;
        sockets.udp.extend(udp);
        sockets.tcp.push(tcp);
        sockets.addresses.push(address);
    }
    Ok(sockets)
}

/// Whether one of the addresses in `held` is this one, or any address of this host.
fn is_held(address: SocketAddr, held: &[SocketAddr]) -> bool {
    let same_port = held.iter().filter(|held| held.port() == address.port());
    same_port.map(SocketAddr::ip).any(|held| {
        // [::] has IPv4 too, unless the socket unit sets BindIPv6Only=.
        held == address.ip() || held.is_unspecified() && (held.is_ipv6() || address.is_ipv4())
    })
}

/// Whether `address`, one of those of `dns.listen`, can be bound now, as [`bind`] does.
///
/// # Errors
/// When it can't: those of [`bind`].
pub fn try_bind(address: SocketAddr, listen: &[SocketAddr]) -> Result<(), DnsError> {
    bind_both(address, is_v6_only(address, listen.iter().copied())).map(drop)
}

/// Whether `address`, one of those of `dns.listen_tls`, can be bound now.
///
/// # Errors
/// When it can't: those of [`bind`].
pub fn try_bind_tls(address: SocketAddr, listen_tls: &[SocketAddr]) -> Result<(), DnsError> {
    bind_tls(address, listen_tls).map(drop)
}

fn bind_both(
    requested: SocketAddr,
    v6_only: bool,
) -> Result<(Vec<UdpSocket>, TcpListener, SocketAddr), DnsError> {
    let denied_udp = bind_error(PLAIN, requested, Transport::Udp);
    let mut n_tries = 0;
    loop {
        n_tries += 1;
        let first = bind_one(requested, SocketType::DGRAM, v6_only).map_err(&denied_udp)?;
        let first = UdpSocket::from(first);
        let address = first.local_addr().map_err(&denied_udp)?;
        match bind_one(address, SocketType::STREAM, v6_only).and_then(listen) {
            Ok(tcp) => {
                let udp = share(first, address, v6_only).map_err(&denied_udp)?;
                return Ok((udp, tcp, address));
            }
            Err(error)
                if requested.port() == 0
                    && error.kind() == io::ErrorKind::AddrInUse
                    && n_tries < PORT_TRIES => {}
            Err(error) => return Err(bind_error(PLAIN, address, Transport::Tcp)(error)),
        }
    }
}

fn bind_one(address: SocketAddr, socket_type: SocketType, v6_only: bool) -> io::Result<OwnedFd> {
    let socket = unbound(address, socket_type, v6_only)?;
    rustix::net::bind(&socket, &address)?;
    Ok(socket)
}

fn unbound(address: SocketAddr, socket_type: SocketType, v6_only: bool) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, socket_type, flags, None)?;
    match address {
        SocketAddr::V4(_) => sockopt::set_ip_freebind(&socket, true)?,
        SocketAddr::V6(_) => {
            sockopt::set_ipv6_freebind(&socket, true)?;
            sockopt::set_ipv6_v6only(&socket, v6_only)?;
        }
    }
    if socket_type == SocketType::STREAM {
        // Connections in TIME_WAIT must not prevent a restart.
        sockopt::set_socket_reuseaddr(&socket, true)?;
    }
    Ok(socket)
}

fn listen(socket: OwnedFd) -> io::Result<TcpListener> {
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// A socket for each core, between which the kernel spreads the clients. The first is bound before
/// it lets others in, so that another process that has the port is detected.
fn share(first: UdpSocket, address: SocketAddr, v6_only: bool) -> io::Result<Vec<UdpSocket>> {
    let n_sockets = n_sockets();
    if n_sockets == 1 {
        return Ok(vec![first]);
    }
    sockopt::set_socket_reuseport(&first, true)?;
    let mut sockets = vec![first];
    for _ in 1..n_sockets {
        let socket = unbound(address, SocketType::DGRAM, v6_only)?;
        sockopt::set_socket_reuseport(&socket, true)?;
        rustix::net::bind(&socket, &address)?;
        sockets.push(socket.into());
    }
    Ok(sockets)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn config(listen: &[SocketAddr]) -> DnsConfig {
        DnsConfig { listen: listen.to_vec(), ..Config::default().dns }
    }

    #[test]
    fn errors_name_the_fix() {
        let table = [
            (
                io::ErrorKind::AddrInUse,
                Transport::Udp,
                "can't listen on 127.0.0.1:53 (udp): address in use; see who holds it with \
                 ss -ulpn 'sport = :53', or choose another with dns.listen",
            ),
            (
                io::ErrorKind::AddrInUse,
                Transport::Tcp,
                "can't listen on 127.0.0.1:53 (tcp): address in use; see who holds it with \
                 ss -tlpn 'sport = :53', or choose another with dns.listen",
            ),
            (
                io::ErrorKind::PermissionDenied,
                Transport::Udp,
                "can't listen on 127.0.0.1:53 (udp): permission denied; run nohop as root or give \
                 it CAP_NET_BIND_SERVICE (in its systemd unit: \
                 AmbientCapabilities=CAP_NET_BIND_SERVICE), or choose a port of 1024 or more with \
                 dns.listen",
            ),
        ];
        for (kind, transport, expected) in table {
            let address = SocketAddr::from(([127, 0, 0, 1], 53));
            let error = bind_error(PLAIN, address, transport)(kind.into());
            assert_eq!(error.to_string(), expected);
        }
    }

    #[tokio::test]
    async fn a_chosen_port_is_the_same_for_both() {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let sockets = bind(&config(&[any, any])).await.unwrap();
        let [first, second] = *sockets.addresses() else { panic!("{sockets:?}") };
        assert_ne!(first, second);
        for (idx, address) in [first, second].into_iter().enumerate() {
            assert_ne!(address.port(), 0);
            assert!(sockets.udp.iter().any(|udp| udp.local_addr().unwrap() == address));
            assert_eq!(sockets.tcp[idx].local_addr().unwrap(), address);
        }
    }

    #[test]
    fn those_that_were_passed_are_not_all() {
        let listen = ["127.0.0.1:0", "127.0.0.2:0"].map(|text| text.parse().unwrap());
        let passed = bind_beside(Sockets::default(), &listen[..1]).unwrap();
        let held = passed.addresses[0];
        let sockets = bind_beside(passed, &[held, listen[1]]).unwrap();
        let [first, second] = *sockets.addresses() else { panic!("{sockets:?}") };
        assert_eq!((first, second.ip()), (held, listen[1].ip()));
        assert_eq!(sockets.tcp.len(), 2);
    }

    #[test]
    fn who_holds_an_address() {
        let table = [
            ("127.0.0.1:53", "127.0.0.1:53", true),
            ("127.0.0.1:53", "127.0.0.1:54", false),
            ("127.0.0.1:53", "127.0.0.2:53", false),
            ("127.0.0.1:53", "0.0.0.0:53", true),
            ("[::1]:53", "0.0.0.0:53", false),
            ("[::1]:53", "[::]:53", true),
            ("127.0.0.1:53", "[::]:53", true),
        ];
        for (address, held, expected) in table {
            let held = ["10.0.0.1:53", held].map(|held| held.parse().unwrap());
            assert_eq!(is_held(address.parse().unwrap(), &held), expected, "{address} {held:?}");
        }
    }

    #[test]
    fn tried_as_it_is_bound() {
        // An address that may come, and a port that somebody has.
        let absent = "192.0.2.1:0".parse().unwrap();
        try_bind(absent, &[absent]).unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let taken = udp.local_addr().unwrap();
        let error = try_bind(taken, &[taken]).unwrap_err();
        assert!(error.is_in_use(), "{error}");
    }

    #[tokio::test]
    async fn a_port_in_use() {
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = udp.local_addr().unwrap();
        let error = bind(&config(&[address])).await.unwrap_err();
        assert!(error.is_in_use() && error.to_string().contains("(udp)"), "{error}");

        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = tcp.local_addr().unwrap();
        let error = bind(&config(&[address])).await.unwrap_err();
        assert!(error.is_in_use() && error.to_string().contains("(tcp)"), "{error}");
    }

    #[tokio::test]
    async fn an_address_that_may_come() {
        // Of documentation (RFC 5737 and 3849).
        let addresses = ["192.0.2.1:0", "[2001:db8::1]:0"].map(|text| text.parse().unwrap());
        let sockets = bind(&config(&addresses)).await.unwrap();
        let ips: Vec<_> = sockets.addresses().iter().map(SocketAddr::ip).collect();
        assert_eq!(ips, addresses.map(|address: SocketAddr| address.ip()));
    }

    #[tokio::test]
    async fn two_servers_never_share_a_port() {
        let sockets = bind(&config(&["127.0.0.1:0".parse().unwrap()])).await.unwrap();
        let error = bind(&config(sockets.addresses())).await.unwrap_err();
        assert!(error.is_in_use() && error.to_string().contains("(udp)"), "{error}");
    }

    #[tokio::test]
    async fn both_families_of_any_address() {
        let v4 = bind(&config(&["0.0.0.0:0".parse().unwrap()])).await.unwrap();
        let port = v4.addresses()[0].port();
        drop(v4);
        let both = ["0.0.0.0", "::"].map(|ip| SocketAddr::new(ip.parse().unwrap(), port));
        let sockets = bind(&config(&both)).await.unwrap();
        assert_eq!(sockets.addresses(), both);
    }
}

//! The sockets that the server listens on, and what to do where they can't be had.

use std::fmt;
use std::io;
use std::net::SocketAddr;

use tokio::net::{TcpListener, UdpSocket};

use crate::config::DnsConfig;

/// How often a port is tried that must be free for both transports, where the kernel may choose.
const PORT_TRIES: usize = 16;

/// Why the server can't listen.
#[derive(Debug, thiserror::Error)]
pub enum DnsError {
    /// Somebody else listens there.
    #[error(
        "can't listen on {address} ({transport}): address in use; see who holds it with \
         ss -{}lpn 'sport = :{}', or choose another with dns.listen",
        transport.letter(), address.port()
    )]
    InUse {
        /// The address of `dns.listen`.
        address: SocketAddr,
        /// The transport that was refused.
        transport: Transport,
        /// What the kernel said.
        source: io::Error,
    },
    /// The process may not have this port.
    #[error(
        "can't listen on {address} ({transport}): permission denied; run nohop as root or give it \
         CAP_NET_BIND_SERVICE (in its systemd unit: AmbientCapabilities=CAP_NET_BIND_SERVICE), or \
         choose a port of 1024 or more with dns.listen"
    )]
    Denied {
        /// The address of `dns.listen`.
        address: SocketAddr,
        /// The transport that was refused.
        transport: Transport,
        /// What the kernel said.
        source: io::Error,
    },
    /// No interface has this address.
    #[error(
        "can't listen on {address} ({transport}): this host has no such address; see those it has \
         with ip address, or choose another with dns.listen"
    )]
    NotHere {
        /// The address of `dns.listen`.
        address: SocketAddr,
        /// The transport that was refused.
        transport: Transport,
        /// What the kernel said.
        source: io::Error,
    },
    /// Anything else.
    #[error("can't listen on {address} ({transport}): {source}; choose another with dns.listen")]
    Io {
        /// The address of `dns.listen`.
        address: SocketAddr,
        /// The transport that was refused.
        transport: Transport,
        /// What the kernel said.
        source: io::Error,
    },
}

impl DnsError {
    fn new(address: SocketAddr, transport: Transport, source: io::Error) -> DnsError {
        match source.kind() {
            io::ErrorKind::AddrInUse => DnsError::InUse { address, transport, source },
            io::ErrorKind::PermissionDenied => DnsError::Denied { address, transport, source },
            io::ErrorKind::AddrNotAvailable => DnsError::NotHere { address, transport, source },
            _ => DnsError::Io { address, transport, source },
        }
    }
}

/// What carries a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// A datagram each.
    Udp,
    /// A stream of messages, each after its length.
    Tcp,
}

impl Transport {
    /// The flag of `ss` that shows such sockets.
    fn letter(self) -> char {
        match self {
            Transport::Udp => 'u',
            Transport::Tcp => 't',
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Transport::Udp => "udp",
            Transport::Tcp => "tcp",
        })
    }
}

/// Sockets that are bound, and wait to be served.
#[derive(Debug)]
pub struct Sockets {
    pub(super) udp: Vec<UdpSocket>,
    pub(super) tcp: Vec<TcpListener>,
    addresses: Vec<SocketAddr>,
}

impl Sockets {
    /// The addresses, in the order of `dns.listen`, with the ports that the kernel chose.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }
}

/// Binds UDP and TCP on each address of `dns.listen`; port 0 lets the kernel choose one for both.
///
/// # Errors
///
/// Says of the first address that can't be had why, and what to do.
pub async fn bind(config: &DnsConfig) -> Result<Sockets, DnsError> {
    let mut sockets = Sockets { udp: Vec::new(), tcp: Vec::new(), addresses: Vec::new() };
    for &address in &config.listen {
        let (udp, tcp, address) = bind_pair(address).await?;
        sockets.udp.push(udp);
        sockets.tcp.push(tcp);
        sockets.addresses.push(address);
    }
    Ok(sockets)
}

async fn bind_pair(wanted: SocketAddr) -> Result<(UdpSocket, TcpListener, SocketAddr), DnsError> {
    let mut n_tries = 0;
    loop {
        n_tries += 1;
        let denied_udp = |source| DnsError::new(wanted, Transport::Udp, source);
        let udp = UdpSocket::bind(wanted).await.map_err(denied_udp)?;
        let address = udp.local_addr().map_err(denied_udp)?;
        match TcpListener::bind(address).await {
            Ok(tcp) => return Ok((udp, tcp, address)),
            Err(error)
                if wanted.port() == 0
                    && error.kind() == io::ErrorKind::AddrInUse
                    && n_tries < PORT_TRIES => {}
            Err(error) => return Err(DnsError::new(address, Transport::Tcp, error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn config(listen: &[SocketAddr]) -> DnsConfig {
        DnsConfig { listen: listen.to_vec(), ..Config::default().dns }
    }

    #[test]
    fn errors_say_the_mend() {
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
            let error = DnsError::new(address, transport, kind.into());
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
            assert_eq!(sockets.udp[idx].local_addr().unwrap(), address);
            assert_eq!(sockets.tcp[idx].local_addr().unwrap(), address);
        }
    }

    #[tokio::test]
    async fn a_port_in_use() {
        let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = udp.local_addr().unwrap();
        let error = bind(&config(&[address])).await.unwrap_err();
        assert!(matches!(error, DnsError::InUse { transport: Transport::Udp, .. }), "{error}");

        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = tcp.local_addr().unwrap();
        let error = bind(&config(&[address])).await.unwrap_err();
        assert!(matches!(error, DnsError::InUse { transport: Transport::Tcp, .. }), "{error}");
    }

    #[tokio::test]
    async fn an_address_of_another_host() {
        // 192.0.2.0/24 is for documentation (RFC 5737).
        let error = bind(&config(&["192.0.2.1:0".parse().unwrap()])).await.unwrap_err();
        assert!(matches!(error, DnsError::NotHere { .. }), "{error}");
    }
}

//! The sockets of the DNS server: what carries a message, and what it listens on.

use std::fmt;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::sync::Arc;

use rustls::ServerConfig;

/// The most UDP sockets for one address: four cores answer more queries than a host has.
const MAX_SOCKETS: usize = 4;

/// What carries a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    /// A datagram each.
    Udp,
    /// A stream of messages, each after its length.
    Tcp,
}

impl Transport {
    /// The flag of `ss` that shows such sockets.
    pub(super) fn letter(self) -> char {
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

/// Bound sockets that aren't served yet.
#[derive(Debug, Default)]
pub struct Sockets {
    /// At least one for each address; first those that were passed.
    pub(super) udp: Vec<UdpSocket>,
    pub(super) tcp: Vec<TcpListener>,
    pub(super) addresses: Vec<SocketAddr>,
    /// The listeners of `dns.listen_tls`, and how their handshakes go.
    pub(super) tls: Vec<TcpListener>,
    pub(super) tls_config: Option<Arc<ServerConfig>>,
    pub(super) tls_addresses: Vec<SocketAddr>,
    /// How many of `udp` were passed: they outlive this process, so questions may have waited in them.
    pub(super) n_passed: usize,
}

impl Sockets {
    /// The addresses, in the order of `dns.listen`, with the ports that the kernel chose.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// The addresses of `dns.listen_tls`, likewise.
    pub fn tls_addresses(&self) -> &[SocketAddr] {
        &self.tls_addresses
    }
}

/// How many UDP sockets there are for one address: one for each core, within bounds.
pub(super) fn n_sockets() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(MAX_SOCKETS)
}

//! The addresses and networks of this host's interfaces.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use nix::net::if_::InterfaceFlags;
use nix::sys::socket::SockaddrStorage;
use tracing::warn;

use crate::config::Allowed;

/// The addresses of this host, as getifaddrs(3) reports them. Binding to an address proves nothing:
/// with `net.ipv4.ip_nonlocal_bind`, which VRRP hosts set, that succeeds for any.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interfaces {
    /// The addresses.
    pub addresses: Vec<IpAddr>,
    /// Those of the addresses.
    pub networks: Vec<IpNet>,
    /// Those on loopback interfaces, of which the kernel takes each address for its own.
    pub loopback: Vec<IpNet>,
}

impl Interfaces {
    /// Reads them; an error is logged, and then there are none.
    pub(super) fn read() -> Interfaces {
        let interfaces = match nix::ifaddrs::getifaddrs() {
            Ok(interfaces) => interfaces,
            Err(error) => {
                warn!(
                    "can't read this host's networks, so \"local\" in dns.allow matches none: {error}"
                );
                return Interfaces::default();
            }
        };
        let mut read = Interfaces::default();
        for interface in interfaces {
            let Some(address) = interface.address.as_ref().and_then(ip) else { continue };
            let netmask = interface.netmask.as_ref().and_then(ip);
            let network = netmask.and_then(|netmask| IpNet::with_netmask(address, netmask).ok());
            read.add(address, network, interface.flags.contains(InterfaceFlags::IFF_LOOPBACK));
        }
        read
    }

    /// Adds an address of an interface, and the network that it is in there.
    pub fn add(&mut self, address: IpAddr, network: Option<IpNet>, is_on_loopback: bool) {
        let network = network.filter(|network| network.prefix_len() > 0);
        if is_on_loopback {
            self.loopback.extend(network);
        }
        self.addresses.push(address);
        self.networks.extend(network);
    }

    /// Whether a message to this address, in canonical form, stays on this host.
    pub(super) fn have(&self, ip: IpAddr) -> bool {
        ip.is_loopback()
            || self.addresses.contains(&ip)
            || ip.is_ipv4() && self.loopback.iter().any(|network| network.contains(&ip))
    }
}

/// The addresses at which a server is reached that listens on these: for an unspecified one, all of this
/// host's.
pub fn reached_at(listen: &[SocketAddr]) -> Vec<SocketAddr> {
    let mut all = Vec::new();
    for address in listen {
        if address.ip().is_unspecified() {
            let addresses = Interfaces::read().addresses.into_iter();
            let same_family = addresses.filter(|ip| ip.is_ipv4() || address.is_ipv6());
            all.extend(same_family.map(|ip| SocketAddr::new(ip, address.port())));
        } else {
            all.push(*address);
        }
    }
    all
}

/// The networks of the clients in `dns.allow`, on a host with these interfaces.
pub fn allowed_networks(allow: &[Allowed], interfaces: &Interfaces) -> Vec<IpNet> {
    let networks = |allowed: &Allowed| match allowed {
        Allowed::Network(network) => vec![*network],
        Allowed::Local => interfaces.networks.clone(),
    };
    allow.iter().flat_map(networks).collect()
}

/// The address of a socket address of the internet.
fn ip(address: &SockaddrStorage) -> Option<IpAddr> {
    socket_address(address).map(|address| address.ip())
}

/// The socket address, where it is one of the internet.
pub(super) fn socket_address(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address.as_sockaddr_in().map(|v4| SocketAddr::V4((*v4).into()));
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| SocketAddr::V6((*v6).into())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stays_on_this_host() {
        let network = |text: &str| -> IpNet { text.parse().unwrap() };
        let interfaces = Interfaces {
            addresses: vec!["10.0.0.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
            networks: vec![network("10.0.0.1/24"), network("192.0.2.1/24")],
            loopback: vec![network("192.0.2.1/24")],
        };
        let rows = [
            ("127.0.0.53", true),
            ("::1", true),
            ("10.0.0.1", true),
            ("10.0.0.2", false),
            ("192.0.2.9", true), // of a network on a loopback interface
            ("2001:db8::1", true),
            ("2001:db8::2", false),
        ];
        for (ip, expected) in rows {
            assert_eq!(interfaces.have(ip.parse().unwrap()), expected, "{ip}");
        }
    }
}

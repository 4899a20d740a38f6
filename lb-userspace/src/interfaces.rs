//! The addresses and networks of this host's interfaces.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use nix::net::if_::InterfaceFlags;
use nix::sys::socket::SockaddrStorage;
use tracing::warn;

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
    pub fn read() -> Interfaces {
        let interfaces = match nix::ifaddrs::getifaddrs() {
            Ok(interfaces) => interfaces,
            Err(error) => {
                warn!(
                    "can't list the addresses of this host's interfaces, so none counts as its own, and \
                     \"local\" in dns.allow matches no network: {error}"
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
    pub fn have(&self, ip: IpAddr) -> bool {
        ip.is_loopback()
            || self.addresses.contains(&ip)
            || ip.is_ipv4() && self.loopback.iter().any(|network| network.contains(&ip))
    }
}

/// Whether a connection to this address stays on this host, in this network namespace. Where the kernel doesn't
/// list its addresses, only loopback's do.
pub fn is_own(address: IpAddr) -> bool {
    Interfaces::read().have(address.to_canonical())
}

/// The address of a socket address of the internet.
pub fn ip(address: &SockaddrStorage) -> Option<IpAddr> {
    socket_address(address).map(|address| address.ip())
}

/// The socket address, where it is one of the internet.
pub fn socket_address(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address.as_sockaddr_in().map(|v4| SocketAddr::V4((*v4).into()));
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| SocketAddr::V6((*v6).into())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_addresses_are_known() {
        for own in ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"] {
            assert!(is_own(own.parse().unwrap()), "{own}");
        }
        for others in ["192.0.2.77", "2001:db8::77", "0.0.0.0"] {
            assert!(!is_own(others.parse().unwrap()), "{others}");
        }
        assert!(Interfaces::read().addresses.into_iter().all(is_own));
    }

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

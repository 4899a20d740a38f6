//! This host's network, as far as it decides where an address leads: its own addresses, and the
//! bridges that no other host is on.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::path::Path;

use futures_util::{Stream, StreamExt, TryStreamExt};
use ipnet::IpNet;
use nix::ifaddrs::{InterfaceAddress, getifaddrs};
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use rtnetlink::{Handle, MulticastGroup};

use crate::table::Bridge;

/// Whether an address is this host's, so that a connection to it stays here.
pub fn is_own(address: IpAddr) -> bool {
    let address = address.to_canonical();
    // Where the system doesn't say, it is taken for another host's.
    address.is_loopback()
        || getifaddrs().is_ok_and(|mut all| all.any(|one| ip(&one.address) == Some(address)))
}

/// This host's addresses, by which its node is known where no agent says which it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Own {
    addresses: BTreeSet<IpAddr>,
    /// The networks of its bridges, whoever else is on them.
    bridges: BTreeSet<IpNet>,
}

impl Own {
    /// Those that it has now; none where the system doesn't say.
    pub fn read() -> Own {
        let mut own = Own::default();
        for one in getifaddrs().into_iter().flatten() {
            let Some(address) = ip(&one.address).filter(|address| is_one_hosts(*address)) else {
                continue;
            };
            own.addresses.insert(address);
            let network = ip(&one.netmask).and_then(|mask| IpNet::with_netmask(address, mask).ok());
            // net/bridge/br_sysfs_br.c
            let sysfs = Path::new("/sys/class/net").join(&one.interface_name).join("bridge");
            own.bridges.extend(network.filter(|_| sysfs.exists()).map(|network| network.trunc()));
        }
        own
    }

    /// Whether the node of this address is this host's.
    pub fn has(&self, node: IpAddr) -> bool {
        self.addresses.contains(&node)
    }

    /// Whether the address is on a bridge of this host that its node isn't on.
    pub fn is_on_bridge(&self, address: IpAddr, node: Option<IpAddr>) -> bool {
        self.bridges.iter().any(|bridge| {
            bridge.contains(&address) && !node.is_some_and(|node| bridge.contains(&node))
        })
    }

    /// One with these addresses, and these networks of bridges.
    #[cfg(test)]
    pub fn of(addresses: &[&str], bridges: &[&str]) -> Own {
        let addresses = addresses.iter().map(|address| address.parse().unwrap()).collect();
        let bridges = bridges.iter().map(|network| network.parse().unwrap()).collect();
        Own { addresses, bridges }
    }
}

/// Whether no two hosts of a network can have the address.
fn is_one_hosts(address: IpAddr) -> bool {
    !address.is_loopback() && !is_link_local(address)
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

fn ip(address: &Option<nix::sys::socket::SockaddrStorage>) -> Option<IpAddr> {
    let address = address.as_ref()?;
    match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
        (Some(address), _) => Some(address.ip().into()),
        (_, Some(address)) => Some(address.ip().into()),
        _ => None,
    }
}

/// Looks at the bridges, and learns when interfaces or addresses change.
pub struct Bridges {
    handle: Handle,
}

impl Bridges {
    /// Listens to the kernel on the current tokio runtime, until both parts are dropped. The stream
    /// has an item for each change of an interface or an address.
    ///
    /// # Errors
    /// No netlink socket.
    pub fn listen() -> std::io::Result<(Bridges, impl Stream<Item = ()> + Send + 'static)> {
        let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
        let (connection, handle, changes) = rtnetlink::new_multicast_connection(&groups)?;
        tokio::spawn(connection);
        Ok((Bridges { handle }, changes.map(drop)))
    }

    /// The networks of the bridges that only this host's own containers and machines are on.
    ///
    /// # Errors
    /// The kernel doesn't list its interfaces.
    pub async fn look(&self) -> Result<Vec<Bridge>, rtnetlink::Error> {
        let links: Vec<LinkMessage> = self.handle.link().get().execute().try_collect().await?;
        let private = private_bridges(links.iter().map(Link::of));
        if private.is_empty() {
            return Ok(Vec::new());
        }
        let addresses =
            getifaddrs().map(|all| networks(all, &private, uplink())).unwrap_or_default();
        Ok(addresses.into_iter().collect())
    }
}

/// What matters of an interface.
#[derive(Clone, Debug)]
struct Link {
    index: u32,
    name: String,
    is_bridge: bool,
    /// Whether it is one end of something within this host: veth, tun or tap, dummy.
    is_virtual: bool,
    /// The bridge that it is a port of.
    controller: Option<u32>,
}

impl Link {
    fn of(message: &LinkMessage) -> Link {
        let mut link = Link {
            index: message.header.index,
            name: String::new(),
            is_bridge: false,
            is_virtual: false,
            controller: None,
        };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::Controller(controller) => link.controller = Some(*controller),
                LinkAttribute::LinkInfo(all) => {
                    for info in all {
                        if let LinkInfo::Kind(kind) = info {
                            link.is_bridge = *kind == InfoKind::Bridge;
                            link.is_virtual =
                                matches!(kind, InfoKind::Veth | InfoKind::Tun | InfoKind::Dummy);
                        }
                    }
                }
                _ => {}
            }
        }
        link
    }
}

/// The names of the bridges all of whose ports end within this host. One with a network card, a
/// bond, a VLAN or a tunnel among its ports is part of a network that others are on.
fn private_bridges(links: impl Iterator<Item = Link>) -> BTreeSet<String> {
    let links: Vec<Link> = links.collect();
    let ports = links.iter().filter_map(|link| Some((link.controller?, link.is_virtual)));
    let mut is_private: BTreeMap<u32, bool> = BTreeMap::new();
    for (bridge, is_virtual) in ports {
        *is_private.entry(bridge).or_insert(true) &= is_virtual;
    }
    let bridges = links.into_iter().filter(|link| link.is_bridge);
    let private = bridges.filter(|link| is_private.get(&link.index).copied().unwrap_or(true));
    private.map(|link| link.name).collect()
}

/// The address that this host has towards the rest of the world, by its default route: nothing is
/// sent. A bridge that has it leads there, whatever its ports are.
fn uplink() -> Option<IpAddr> {
    // TEST-NET-1 (RFC 5737), so that no host's own route is meant.
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9)).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

fn networks(
    addresses: impl Iterator<Item = InterfaceAddress>,
    private: &BTreeSet<String>,
    uplink: Option<IpAddr>,
) -> BTreeSet<Bridge> {
    let on_bridges = addresses.filter(|address| private.contains(&address.interface_name));
    let networks: Vec<(Bridge, IpAddr)> = on_bridges
        .filter_map(|address| {
            let (own, mask) = (ip(&address.address)?, ip(&address.netmask)?);
            let network = IpNet::with_netmask(own, mask).ok()?.trunc();
            Some((Bridge { name: address.interface_name, network }, own))
        })
        .collect();
    let leads_on = |name: &str| {
        networks.iter().any(|(bridge, own)| bridge.name == name && Some(*own) == uplink)
    };
    let private =
        networks.iter().filter(|(bridge, own)| !leads_on(&bridge.name) && !is_link_local(*own));
    private.map(|(bridge, _)| bridge.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, name: &str, is_bridge: bool, is_virtual: bool, controller: u32) -> Link {
        let controller = (controller > 0).then_some(controller);
        Link { index, name: name.into(), is_bridge, is_virtual, controller }
    }

    #[test]
    fn only_bridges_whose_ports_all_end_here_are_private() {
        let links = [
            link(1, "lo", false, false, 0),
            link(2, "eth0", false, false, 7),
            link(3, "docker0", true, false, 0),
            link(4, "veth1", false, true, 3),
            link(5, "nomad", true, false, 0),
            link(6, "veth2", false, true, 7),
            link(7, "br0", true, false, 0),
            link(8, "virbr0", true, false, 0),
            link(9, "tap0", false, true, 8),
            link(10, "vxlan1", false, false, 11),
            link(11, "overlay", true, false, 0),
        ];
        let expected = ["docker0", "nomad", "virbr0"].map(str::to_owned);
        assert_eq!(private_bridges(links.into_iter()), expected.into());
    }

    #[test]
    fn own_addresses_are_known() {
        for own in ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"] {
            assert!(is_own(own.parse().unwrap()), "{own}");
        }
        for others in ["192.0.2.77", "2001:db8::77", "0.0.0.0"] {
            assert!(!is_own(others.parse().unwrap()), "{others}");
        }
    }

    #[test]
    fn loopback_tells_no_host_from_another() {
        let own = Own::read();
        for address in ["127.0.0.1", "::1", "fe80::1", "169.254.1.1"] {
            assert!(!own.has(address.parse().unwrap()), "{address}");
        }
        assert!(own.addresses.iter().all(|address| is_own(*address)));
    }

    #[tokio::test]
    async fn the_kernel_lists_its_bridges() {
        let (bridges, _changes) = Bridges::listen().unwrap();
        bridges.look().await.unwrap();
    }
}

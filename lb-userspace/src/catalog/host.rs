//! This host's network, as far as it decides where an address leads: its own addresses, and the
//! bridges that no other host is on.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;

use futures_util::{Stream, StreamExt, TryStreamExt};
use ipnet::IpNet;
use nix::ifaddrs::{InterfaceAddress, getifaddrs};
use rtnetlink::packet_core::NetlinkPayload;
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage, RouteType};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::{Handle, MulticastGroup};

use crate::interfaces::ip;
use crate::table::Bridge;

/// This host's addresses, by which its node is known where no agent says which it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Own {
    addresses: BTreeSet<IpAddr>,
    /// The networks of its bridges.
    bridges: BTreeSet<IpNet>,
}

impl Own {
    /// Those that it has now; none where the system doesn't say.
    pub fn read() -> Own {
        let mut own = Own::default();
        for one in getifaddrs().into_iter().flatten() {
            let Some(address) =
                one.address.as_ref().and_then(ip).filter(|address| is_one_hosts(*address))
            else {
                continue;
            };
            own.addresses.insert(address);
            let network = one
                .netmask
                .as_ref()
                .and_then(ip)
                .and_then(|mask| IpNet::with_netmask(address, mask).ok());
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

/// Looks at the bridges, and learns when that may show something else.
pub struct Bridges {
    handle: Handle,
}

impl Bridges {
    /// Listens to the kernel on the current tokio runtime, until both parts are dropped. The stream
    /// has an item for each change of an interface, an address or a default route; of other routes a
    /// router has hundreds of changes a second.
    ///
    /// # Errors
    /// No netlink socket.
    pub fn listen() -> std::io::Result<(Bridges, impl Stream<Item = ()> + Send + 'static)> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
        ];
        let (connection, handle, changes) = rtnetlink::new_multicast_connection(&groups)?;
        tokio::spawn(connection);
        let changes = changes.filter_map(|(message, _)| async move {
            let counts = match message.payload {
                NetlinkPayload::InnerMessage(
                    RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route),
                ) => route.header.destination_prefix_length == 0,
                _ => true,
            };
            counts.then_some(())
        });
        Ok((Bridges { handle }, changes))
    }

    /// The networks of the bridges that only this host's own containers and machines are on.
    ///
    /// # Errors
    /// The kernel doesn't list its interfaces or routes.
    pub async fn look(&self) -> Result<Vec<Bridge>, rtnetlink::Error> {
        let links: Vec<LinkMessage> = self.handle.link().get().execute().try_collect().await?;
        let links: Vec<Link> = links.iter().map(Link::of).collect();
        if private_bridges(&links, &BTreeSet::new()).is_empty() {
            return Ok(Vec::new());
        }
        let mut leading_out = BTreeSet::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut question = RouteMessage::default();
            question.header.address_family = family;
            let mut routes = std::pin::pin!(self.handle.route().get(question).execute());
            while let Some(route) = routes.try_next().await? {
                leading_out.extend(leads_out_by(&route));
            }
        }
        // Where the system doesn't say, none is private.
        let addresses: Vec<Address> =
            getifaddrs().into_iter().flatten().filter_map(|one| Address::of(&one)).collect();
        Ok(networks(&links, &addresses, &leading_out).into_iter().collect())
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
    /// The interface that it is on top of, as a VLAN is.
    lower: Option<u32>,
}

impl Link {
    fn of(message: &LinkMessage) -> Link {
        let mut link = Link {
            index: message.header.index,
            name: String::new(),
            is_bridge: false,
            is_virtual: false,
            controller: None,
            lower: None,
        };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::Controller(controller) => link.controller = Some(*controller),
                LinkAttribute::Link(lower) => link.lower = Some(*lower),
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
        // In a container its own uplink is a veth, by the name of a network card.
        link.is_virtual &= !["eth", "en"].iter().any(|card| link.name.starts_with(card));
        // Of a veth it is the other end, in another namespace's numbers.
        link.lower = link.lower.filter(|_| !link.is_virtual);
        link
    }
}

/// An address of an interface.
#[derive(Clone, Debug)]
struct Address {
    interface: String,
    network: IpNet,
}

impl Address {
    /// `None` where it isn't of IP, or link-local: those networks are on every link.
    fn of(one: &InterfaceAddress) -> Option<Address> {
        let (own, mask) = (ip(one.address.as_ref()?)?, ip(one.netmask.as_ref()?)?);
        let network = IpNet::with_netmask(own, mask).ok()?.trunc();
        (!is_link_local(own)).then(|| Address { interface: one.interface_name.clone(), network })
    }
}

/// The interfaces by which a route leads beyond the networks that they are on: by a gateway, or to
/// everywhere.
fn leads_out_by(route: &RouteMessage) -> Vec<u32> {
    if route.header.kind != RouteType::Unicast {
        return Vec::new();
    }
    let is_default = route.header.destination_prefix_length == 0;
    let has_gateway = |attributes: &[RouteAttribute]| {
        let is_one =
            |a: &RouteAttribute| matches!(a, RouteAttribute::Gateway(_) | RouteAttribute::Via(_));
        attributes.iter().any(is_one)
    };
    let leads_out = is_default || has_gateway(&route.attributes);
    let mut interfaces = Vec::new();
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(interface) if leads_out => interfaces.push(*interface),
            RouteAttribute::MultiPath(hops) => {
                let hops = hops.iter().filter(|hop| leads_out || has_gateway(&hop.attributes));
                interfaces.extend(hops.map(|hop| hop.interface_index));
            }
            _ => {}
        }
    }
    interfaces
}

/// The names of the bridges all of whose ports end within this host, and by which no route leads
/// out. One with a network card, a bond, a VLAN or a tunnel among its ports is part of a network
/// that others are on, and so is one that leads to the world, whatever its ports are.
fn private_bridges(links: &[Link], leading_out: &BTreeSet<u32>) -> BTreeSet<String> {
    let ports = links.iter().filter_map(|link| Some((link.controller?, link.is_virtual)));
    let mut is_private: BTreeMap<u32, bool> = BTreeMap::new();
    for (bridge, is_virtual) in ports {
        *is_private.entry(bridge).or_insert(true) &= is_virtual;
    }
    let below = links.iter().filter(|link| leading_out.contains(&link.index));
    let below: BTreeSet<u32> = below.filter_map(|link| link.lower).collect();
    let leads_out = |index: u32| leading_out.contains(&index) || below.contains(&index);
    let bridges = links.iter().filter(|link| link.is_bridge && !leads_out(link.index));
    let private = bridges.filter(|link| is_private.get(&link.index).copied().unwrap_or(true));
    private.map(|link| link.name.clone()).collect()
}

/// The networks of the private bridges.
fn networks(
    links: &[Link],
    addresses: &[Address],
    leading_out: &BTreeSet<u32>,
) -> BTreeSet<Bridge> {
    let private = private_bridges(links, leading_out);
    let on_bridges = addresses.iter().filter(|address| private.contains(&address.interface));
    on_bridges
        .map(|address| Bridge { name: address.interface.clone(), network: address.network })
        .collect()
}

#[cfg(test)]
mod tests {
    use rtnetlink::packet_route::route::RouteNextHop;

    use super::*;

    fn link(index: u32, name: &str, is_bridge: bool, is_virtual: bool, controller: u32) -> Link {
        let controller = (controller > 0).then_some(controller);
        Link { index, name: name.into(), is_bridge, is_virtual, controller, lower: None }
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
        assert_eq!(private_bridges(&links, &BTreeSet::new()), expected.into());
    }

    /// A link as the kernel tells it.
    fn reported(index: u32, name: &str, kind: InfoKind, lower: u32) -> Link {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes = vec![
            LinkAttribute::IfName(name.into()),
            LinkAttribute::Link(lower),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)]),
        ];
        Link::of(&message)
    }

    fn route(kind: RouteType, prefix: u8, attributes: Vec<RouteAttribute>) -> RouteMessage {
        let mut route = RouteMessage::default();
        route.header.kind = kind;
        route.header.destination_prefix_length = prefix;
        route.attributes = attributes;
        route
    }

    #[test]
    fn a_bridge_that_leads_out_is_not_private() {
        let port = |link: Link, bridge: u32| Link { controller: Some(bridge), ..link };
        let (v4, v6) = ("172.17.0.0/16".parse().unwrap(), "fd17::/64".parse().unwrap());
        let addresses = [v4, v6].map(|network| Address { interface: "br0".into(), network });
        let bridge = || reported(3, "br0", InfoKind::Bridge, 0);
        let inner = || port(reported(4, "veth1", InfoKind::Veth, 2), 3);
        let via =
            |address: &str| RouteAttribute::Gateway(address.parse::<IpAddr>().unwrap().into());
        let oif = RouteAttribute::Oif;
        let hop = |interface_index: u32, attributes: Vec<RouteAttribute>| {
            let mut hop = RouteNextHop::default();
            (hop.interface_index, hop.attributes) = (interface_index, attributes);
            hop
        };
        let unicast = RouteType::Unicast;
        // (what it is, its links beside the bridge, its routes, whether it is private)
        for (what, links, routes, is_private) in [
            ("no routes", vec![inner()], vec![], true),
            ("no ports", vec![], vec![], true),
            ("its own network", vec![inner()], vec![route(unicast, 16, vec![oif(3)])], true),
            (
                "the default route elsewhere",
                vec![inner(), reported(2, "eth0", InfoKind::Other("virtio".into()), 0)],
                vec![route(unicast, 0, vec![oif(2), via("10.0.0.254")])],
                true,
            ),
            (
                "a container's uplink",
                vec![inner()],
                vec![route(unicast, 0, vec![oif(3), via("172.17.0.1")])],
                false,
            ),
            (
                "IPv6 alone",
                vec![inner()],
                vec![route(unicast, 0, vec![via("fe80::1"), oif(3)])],
                false,
            ),
            (
                "no default route",
                vec![inner()],
                vec![route(unicast, 8, vec![oif(3), via("172.17.0.1")])],
                false,
            ),
            (
                "a route without a gateway",
                vec![inner()],
                vec![route(unicast, 0, vec![oif(3)])],
                false,
            ),
            (
                "two gateways",
                vec![inner()],
                vec![route(
                    unicast,
                    8,
                    vec![RouteAttribute::MultiPath(vec![
                        hop(2, vec![]),
                        hop(3, vec![via("172.17.0.1")]),
                    ])],
                )],
                false,
            ),
            (
                "two interfaces",
                vec![inner()],
                vec![route(unicast, 8, vec![RouteAttribute::MultiPath(vec![hop(3, vec![])])])],
                true,
            ),
            (
                "nothing is sent",
                vec![inner()],
                vec![route(RouteType::Unreachable, 0, vec![oif(3)])],
                true,
            ),
            (
                "a VLAN on the bridge",
                vec![inner(), reported(9, "br0.7", InfoKind::Vlan, 3)],
                vec![route(unicast, 0, vec![oif(9), via("172.17.0.1")])],
                false,
            ),
            (
                "a veth whose other end has the bridge's number",
                vec![inner(), reported(9, "uplink", InfoKind::Veth, 3)],
                vec![route(unicast, 0, vec![oif(9), via("10.0.0.1")])],
                true,
            ),
            (
                "a container's uplink without any route",
                vec![port(reported(2, "eth0", InfoKind::Veth, 7), 3)],
                vec![],
                false,
            ),
            (
                "a VXLAN among the ports",
                vec![port(reported(2, "v0", InfoKind::Vxlan, 0), 3)],
                vec![],
                false,
            ),
        ] {
            let links: Vec<Link> = links.into_iter().chain([bridge()]).collect();
            let leading_out: BTreeSet<u32> = routes.iter().flat_map(leads_out_by).collect();
            let got = networks(&links, &addresses, &leading_out);
            let expected: BTreeSet<Bridge> = [v4, v6]
                .into_iter()
                .filter(|_| is_private)
                .map(|network| Bridge { name: "br0".into(), network })
                .collect();
            assert_eq!(got, expected, "{what}");
        }
    }

    #[test]
    fn loopback_tells_no_host_from_another() {
        let own = Own::read();
        for address in ["127.0.0.1", "::1", "fe80::1", "169.254.1.1"] {
            assert!(!own.has(address.parse().unwrap()), "{address}");
        }
    }

    #[tokio::test]
    async fn the_kernel_lists_its_bridges() {
        let (bridges, _changes) = Bridges::listen().unwrap();
        bridges.look().await.unwrap();
    }
}

//! The interfaces of this host and their addresses, followed by what the kernel reports of changes.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use futures_util::{FutureExt, StreamExt, TryStreamExt};
use ipnet::IpNet;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::{
    InfoKind, LinkAttribute, LinkInfo, LinkLayerType, LinkMessage,
};
use rtnetlink::{Handle, MulticastGroup};
use tokio::sync::watch;

use crate::datapath::IngressInterface;
use crate::interfaces::Interfaces;

/// How long further changes are awaited after one: they come in groups.
const SETTLE: Duration = Duration::from_millis(50);
/// After how long everything is read again, should the kernel's messages have been lost.
const REREAD: Duration = Duration::from_secs(60);
/// After how long a failure is followed by another attempt.
const RETRY: Duration = Duration::from_secs(1);

/// The interfaces, and their addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostNetwork {
    /// The addresses.
    pub interfaces: Interfaces,
    /// The interfaces that have Ethernet headers and aren't ports of another one.
    pub links: Vec<HostLink>,
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostLink {
    /// The interface.
    pub interface: IngressInterface,
    /// Its kind.
    pub kind: LinkKind,
    /// Its addresses.
    pub addresses: BTreeSet<IpAddr>,
}

/// The kind of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkKind {
    /// A bridge.
    Bridge,
    /// One end of a pair.
    Veth,
    /// A second interface on top of another.
    Macvlan,
    /// Another one, such as a network card.
    Other,
}

/// Publishes the interfaces whenever they change; those of the last reading stay while none succeeds.
pub async fn follow(publish: watch::Sender<Option<HostNetwork>>) {
    let mut is_reported = false;
    loop {
        let Err(error) = follow_once(&publish, &mut is_reported).await;
        if !std::mem::replace(&mut is_reported, true) {
            tracing::warn!(
                "this host's interfaces can't be read, so changes of them don't reach the unit names: \
                 {error}"
            );
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// The same, on one socket, until it fails.
async fn follow_once(
    publish: &watch::Sender<Option<HostNetwork>>,
    is_reported: &mut bool,
) -> Result<std::convert::Infallible, Box<dyn std::error::Error + Send + Sync>> {
    let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
    let (connection, handle, mut changes) = rtnetlink::new_multicast_connection(&groups)?;
    // It ends with the other two.
    tokio::spawn(connection);
    loop {
        let network = read(&handle).await?;
        *is_reported = false;
        publish.send_if_modified(|last| {
            let differs = last.as_ref() != Some(&network);
            if differs {
                *last = Some(network);
            }
            differs
        });
        if let Ok(None) = tokio::time::timeout(REREAD, changes.next()).await {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        tokio::time::sleep(SETTLE).await;
        while let Some(Some(_)) = changes.next().now_or_never() {}
    }
}

/// The interfaces as they are.
///
/// # Errors
/// When the kernel doesn't list them.
async fn read(handle: &Handle) -> Result<HostNetwork, rtnetlink::Error> {
    let links: Vec<LinkMessage> = handle.link().get().execute().try_collect().await?;
    let addresses: Vec<AddressMessage> = handle.address().get().execute().try_collect().await?;
    Ok(network_of(&links, &addresses))
}

fn network_of(links: &[LinkMessage], addresses: &[AddressMessage]) -> HostNetwork {
    let mut network = HostNetwork::default();
    let is_loopback = |link: &&LinkMessage| link.header.link_layer_type == LinkLayerType::Loopback;
    let loopback: BTreeSet<u32> =
        links.iter().filter(is_loopback).map(|link| link.header.index).collect();
    let mut found = links.iter().filter_map(link_of).collect::<Vec<_>>();
    for message in addresses {
        let Some(address) = address_of(message) else { continue };
        let subnet = IpNet::new(address, message.header.prefix_len).ok();
        network.interfaces.add(address, subnet, loopback.contains(&message.header.index));
        let own = found.iter_mut().find(|link| link.interface.index == message.header.index);
        if let Some(link) = own {
            link.addresses.insert(address);
        }
    }
    network.links = found;
    network
}

/// As [`HostNetwork::links`] has it.
fn link_of(message: &LinkMessage) -> Option<HostLink> {
    let (mut name, mut kind) = (None, LinkKind::Other);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(found) => name = Some(found.clone()),
            LinkAttribute::Controller(_) => return None,
            LinkAttribute::LinkInfo(all) => {
                let found = all.iter().find_map(|info| match info {
                    LinkInfo::Kind(InfoKind::Bridge) => Some(LinkKind::Bridge),
                    LinkInfo::Kind(InfoKind::Veth) => Some(LinkKind::Veth),
                    LinkInfo::Kind(InfoKind::MacVlan) => Some(LinkKind::Macvlan),
                    _ => None,
                });
                kind = found.unwrap_or(kind);
            }
            _ => {}
        }
    }
    let index = message.header.index;
    let is_ethernet = message.header.link_layer_type == LinkLayerType::Ether;
    let interface = IngressInterface { name: name.filter(|_| is_ethernet)?, index };
    Some(HostLink { interface, kind, addresses: BTreeSet::new() })
}

/// The host's own address: of a point-to-point link the other attribute is the peer's.
fn address_of(message: &AddressMessage) -> Option<IpAddr> {
    let mut found = None;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => return Some(*address),
            AddressAttribute::Address(address) => found = Some(*address),
            _ => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, layer: LinkLayerType, attributes: Vec<LinkAttribute>) -> LinkMessage {
        let mut message = LinkMessage::default();
        (message.header.index, message.header.link_layer_type) = (index, layer);
        message.attributes = attributes;
        message
    }

    fn address(index: u32, prefix_len: u8, attributes: Vec<AddressAttribute>) -> AddressMessage {
        let mut message = AddressMessage::default();
        (message.header.index, message.header.prefix_len) = (index, prefix_len);
        message.attributes = attributes;
        message
    }

    #[test]
    fn interfaces_and_addresses() {
        let name = |name: &str| LinkAttribute::IfName(name.to_owned());
        let kind = |kind| LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)]);
        let ip = |text: &str| -> IpAddr { text.parse().unwrap() };
        let links = [
            link(1, LinkLayerType::Loopback, vec![name("lo")]),
            link(2, LinkLayerType::Ether, vec![name("eth0")]),
            link(3, LinkLayerType::Ether, vec![name("br0"), kind(InfoKind::Bridge)]),
            link(
                4,
                LinkLayerType::Ether,
                vec![name("v0"), kind(InfoKind::Veth), LinkAttribute::Controller(3)],
            ),
            link(5, LinkLayerType::Ether, vec![name("v1"), kind(InfoKind::Veth)]),
            link(6, LinkLayerType::None, vec![name("wg0")]),
        ];
        let local = |text| AddressAttribute::Local(ip(text));
        let addresses = [
            address(1, 8, vec![AddressAttribute::Address(ip("127.0.0.1")), local("127.0.0.1")]),
            address(3, 16, vec![local("172.17.0.1")]),
            address(6, 32, vec![AddressAttribute::Address(ip("10.9.0.2")), local("10.9.0.1")]),
            address(3, 64, vec![AddressAttribute::Address(ip("fd00::1"))]),
        ];
        let network = network_of(&links, &addresses);
        let shown = network.links.iter().map(|link| {
            let addresses: Vec<String> = link.addresses.iter().map(IpAddr::to_string).collect();
            format!("{} {:?} {}", link.interface.name, link.kind, addresses.join(","))
        });
        assert!(shown.eq(["eth0 Other ", "br0 Bridge 172.17.0.1,fd00::1", "v1 Veth "]));
        let Interfaces { addresses, networks, loopback } = network.interfaces;
        assert_eq!(addresses, ["127.0.0.1", "172.17.0.1", "10.9.0.1", "fd00::1"].map(ip));
        let shown = |networks: &[IpNet]| networks.iter().map(IpNet::to_string).collect::<Vec<_>>();
        assert_eq!(shown(&loopback), ["127.0.0.1/8"]);
        assert_eq!(shown(&networks), ["127.0.0.1/8", "172.17.0.1/16", "10.9.0.1/32", "fd00::1/64"]);
    }
}

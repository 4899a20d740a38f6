//! The routes of public VIPs, which BIRD or FRR announce: `unreachable ADDRESS proto 110` in the table
//! `main`.
//!
//! The edge's programs see packets before any route does. Where they aren't attached, such a route refuses
//! the packets, so that no server of the host gets them and none is sent on.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteType,
};
use rtnetlink::{Handle, RouteMessageBuilder};

use super::route::{RouteError, tolerate, with_handle};

/// The protocol by which the routes are known to be ours: none of /etc/iproute2/rt_protos.
const PROTOCOL: RouteProtocol = RouteProtocol::Other(110);

/// Has these addresses announced, and no others. Returns those that were added, and those removed.
///
/// # Errors
/// When the kernel refuses; what it took before stays.
pub async fn announce(wanted: &BTreeSet<IpAddr>) -> Result<(Vec<IpAddr>, Vec<IpAddr>), RouteError> {
    with_handle(async |handle| {
        let present = announced_by(&handle).await?;
        let removed: Vec<IpAddr> = present.difference(wanted).copied().collect();
        let added: Vec<IpAddr> = wanted.difference(&present).copied().collect();
        for &address in &removed {
            let result = handle.route().del(message(address)).execute().await;
            tolerate(result, libc::ESRCH, "remove", address.into())?;
        }
        for &address in &added {
            let result = handle.route().add(message(address)).execute().await;
            tolerate(result, libc::EEXIST, "add", address.into())?;
        }
        Ok((added, removed))
    })
    .await
}

/// The addresses that are announced.
///
/// # Errors
/// When the routes can't be read.
pub async fn announced() -> Result<BTreeSet<IpAddr>, RouteError> {
    with_handle(async |handle| announced_by(&handle).await).await
}

async fn announced_by(handle: &Handle) -> Result<BTreeSet<IpAddr>, RouteError> {
    let unreadable = |error| RouteError::Unreadable(Box::new(error));
    let mut found = BTreeSet::new();
    for all in [
        RouteMessageBuilder::<Ipv4Addr>::new().build(),
        RouteMessageBuilder::<Ipv6Addr>::new().build(),
    ] {
        // One by one: a router may have a million of them.
        let mut routes = handle.route().get(all).execute();
        while let Some(route) = routes.try_next().await.map_err(unreadable)? {
            found.extend(own_address(&route));
        }
    }
    Ok(found)
}

/// The address of a route of ours.
fn own_address(message: &RouteMessage) -> Option<IpAddr> {
    let header = &message.header;
    if header.protocol != PROTOCOL || header.kind != RouteType::Unreachable {
        return None;
    }
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(IpAddr::V4(*address)),
        RouteAttribute::Destination(RouteAddress::Inet6(address)) => Some(IpAddr::V6(*address)),
        _ => None,
    })?;
    let is_one = header.destination_prefix_length == IpNet::from(address).max_prefix_len();
    is_one.then_some(address)
}

fn message(address: IpAddr) -> RouteMessage {
    match address {
        IpAddr::V4(address) => RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(address, 32)
            .kind(RouteType::Unreachable)
            .protocol(PROTOCOL)
            .build(),
        IpAddr::V6(address) => RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(address, 128)
            .kind(RouteType::Unreachable)
            .protocol(PROTOCOL)
            .build(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_routes_are_recognized() {
        let address: IpAddr = "203.0.113.10".parse().unwrap();
        let ours = message(address);
        assert_eq!(own_address(&ours), Some(address));
        let six: IpAddr = "2001:db8::1".parse().unwrap();
        assert_eq!(own_address(&message(six)), Some(six));
        let mut others = [ours.clone(), ours.clone(), ours];
        others[0].header.protocol = RouteProtocol::Static;
        others[1].header.kind = RouteType::BlackHole;
        others[2].header.destination_prefix_length = 24;
        assert!(others.iter().all(|other| own_address(other).is_none()));
    }
}

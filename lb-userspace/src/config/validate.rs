//! What no value breaks by itself: the rules between keys.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::parse::Draft;
use super::{AdminAddress, ConsulAddress, Forward, Source, consul};

/// Notes every rule between keys that the draft breaks.
pub(super) fn check(draft: &mut Draft) {
    pool_has_room(draft);
    pool6_has_room(draft);
    pool_is_free(draft);
    pool6_is_free(draft);
    pins_are_apart(draft);
    names_go_one_way(draft);
    // A source that isn't asked needs no certificates.
    if draft.config.catalog.source == Source::Consul {
        consul::check_tls(draft);
    }
}

fn pool_has_room(draft: &mut Draft) {
    let (pool, wanted) = (draft.config.vip.pool, draft.config.datapath.max_services);
    // The first address names the network and the last is its broadcast address.
    let usable = (1_u64 << (32 - pool.prefix_len())).saturating_sub(2);
    if usable < u64::from(wanted) {
        draft.contradiction(
            &["vip.pool", "datapath.max_services"],
            format!(
                "{pool} has {usable} usable addresses and datapath.max_services is {wanted}; widen \
                 the pool, or set max_services = {} or less",
                usable.max(1)
            ),
        );
    }
}

fn pool6_has_room(draft: &mut Draft) {
    let Some(pool6) = draft.config.vip.pool6 else { return };
    let wanted = draft.config.datapath.max_services;
    let usable = (1_u128 << (128 - pool6.prefix_len())) - 2;
    if usable < u128::from(wanted) {
        draft.contradiction(
            &["vip.pool6", "datapath.max_services"],
            format!(
                "{pool6} has {usable} usable addresses and datapath.max_services is {wanted}; widen \
                 the pool, or set max_services = {usable} or less"
            ),
        );
    }
}

/// Every address of the pool is refused but for its services, so nothing else may live there.
fn pool_is_free(draft: &mut Draft) {
    let pool = draft.config.vip.pool;
    if pool.contains(&Ipv4Addr::LOCALHOST) {
        draft.contradiction(
            &["vip.pool"],
            format!("{pool} contains 127.0.0.1; choose a pool elsewhere, such as 127.128.0.0/9"),
        );
    }
    for (name, pin) in draft.config.vip.pins.clone() {
        if pool.contains(pin.ip()) {
            draft.contradiction(
                &["vip.pins", "vip.pool"],
                format!(
                    "{name} = \"{pin}\" lies in vip.pool {pool}; pin it to an address outside, or \
                     choose another pool"
                ),
            );
        }
    }
    for (key, address) in own_addresses(draft) {
        if matches!(address.ip(), IpAddr::V4(ip) if pool.contains(&ip) && !ip.eq(&Ipv4Addr::LOCALHOST))
        {
            draft.contradiction(
                &[key, "vip.pool"],
                format!(
                    "{address} lies in vip.pool {pool}; choose an address outside, or another pool"
                ),
            );
        }
    }
}

fn pool6_is_free(draft: &mut Draft) {
    let Some(pool6) = draft.config.vip.pool6 else { return };
    for (key, address) in own_addresses(draft) {
        if matches!(address.ip(), IpAddr::V6(ip) if pool6.contains(&ip)) {
            draft.contradiction(
                &[key, "vip.pool6"],
                format!(
                    "{address} lies in vip.pool6 {pool6}; choose an address outside, or another \
                     pool"
                ),
            );
        }
    }
}

/// A pinned address and port is taken from whatever listens there.
fn pins_are_apart(draft: &mut Draft) {
    let pins: Vec<_> = draft.config.vip.pins.clone().into_iter().collect();
    for (pin_idx, (name, pin)) in pins.iter().enumerate() {
        if let Some((other, _)) = pins[..pin_idx].iter().find(|(_, address)| address == pin) {
            draft.contradiction(
                &["vip.pins"],
                format!("{other} and {name} are both pinned to {pin}; give one another address"),
            );
        }
        for (key, address) in own_addresses(draft) {
            if address == SocketAddr::V4(*pin) {
                draft.contradiction(
                    &["vip.pins", key],
                    format!(
                        "{name} is pinned to {pin}, which {key} needs; give it another address"
                    ),
                );
            }
        }
    }
}

fn names_go_one_way(draft: &mut Draft) {
    let dns = draft.config.dns.clone();
    if dns.routes.contains_key(&dns.domain) {
        draft.contradiction(
            &["dns.routes", "dns.domain"],
            format!("names below {} are nohop's own; remove the route", dns.domain),
        );
    }
    let routes = dns.routes.values().map(|server| ("dns.routes", *server));
    let forward = match &dns.forward {
        Forward::ResolvConf => &[],
        Forward::Servers(servers) => servers.as_slice(),
    };
    let forward = forward.iter().map(|server| ("dns.forward", *server));
    for (key, server) in routes.chain(forward) {
        if dns.listen.contains(&server) {
            draft.contradiction(
                &[key, "dns.listen"],
                format!("{server} is nohop itself, so names would go in a circle; name another"),
            );
        }
    }
}

/// The addresses that the daemon listens on or connections, each with its key.
fn own_addresses(draft: &Draft) -> Vec<(&'static str, SocketAddr)> {
    let config = &draft.config;
    let mut addresses: Vec<(&str, SocketAddr)> = Vec::new();
    addresses.extend(config.dns.listen.iter().map(|address| ("dns.listen", *address)));
    addresses.extend(config.dns.routes.values().map(|address| ("dns.routes", *address)));
    if let Forward::Servers(servers) = &config.dns.forward {
        addresses.extend(servers.iter().map(|address| ("dns.forward", *address)));
    }
    addresses.extend(config.admin.listen.iter().filter_map(|address| match address {
        AdminAddress::Tcp(address) => Some(("admin.listen", *address)),
        AdminAddress::Unix(_) => None,
    }));
    if let ConsulAddress::Http(authority) | ConsulAddress::Https(authority) = &config.consul.address
        && let Ok(address) = authority.parse()
    {
        addresses.push(("consul.address", address));
    }
    addresses
}

//! The rules between keys.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::builder::ConfigBuilder;
use super::{AdminAddress, ConsulAddress, Forward, SourceKind, Unrouted, consul, edge, listen};

/// Notes every rule between keys that is broken.
pub(super) fn check(builder: &mut ConfigBuilder) {
    check_pool_size(builder);
    check_pool6_size(builder);
    check_pool_overlap(builder);
    check_pool6_overlap(builder);
    check_pins(builder);
    check_routes(builder);
    check_dns_tls(builder);
    listen::check(builder);
    check_admin(builder);
    let own_addresses = own_addresses(builder);
    edge::check(builder, &own_addresses);
    // A source that isn't used needs no certificates.
    if builder.config.catalog.sources.contains(&SourceKind::Consul) {
        consul::check_tls(builder);
    }
}

fn check_pool_size(builder: &mut ConfigBuilder) {
    let (pool, wanted) = (builder.config.vip.pool, builder.config.datapath.max_services);
    // The first address names the network and the last is its broadcast address.
    let usable = (1_u64 << (32 - pool.prefix_len())).saturating_sub(2);
    if usable < u64::from(wanted) {
        builder.conflict(
            &["vip.pool", "datapath.max_services"],
            format!(
                "{pool} has {usable} usable addresses and datapath.max_services is {wanted}; widen \
                 the pool, or set max_services = {} or less",
                usable.max(1)
            ),
        );
    }
}

fn check_pool6_size(builder: &mut ConfigBuilder) {
    let Some(pool6) = builder.config.vip.pool6 else { return };
    let wanted = builder.config.datapath.max_services;
    let usable = (1_u128 << (128 - pool6.prefix_len())) - 2;
    if usable < u128::from(wanted) {
        builder.conflict(
            &["vip.pool6", "datapath.max_services"],
            format!(
                "{pool6} has {usable} usable addresses and datapath.max_services is {wanted}; widen \
                 the pool, or set max_services = {usable} or less"
            ),
        );
    }
}

/// Connections to the pool are refused unless they are to a service, so no other address may lie
/// there.
fn check_pool_overlap(builder: &mut ConfigBuilder) {
    let pool = builder.config.vip.pool;
    if pool.contains(&Ipv4Addr::LOCALHOST) {
        builder.conflict(
            &["vip.pool"],
            format!("{pool} contains 127.0.0.1; choose a pool elsewhere, such as 127.128.0.0/9"),
        );
    }
    for (name, pin) in builder.config.vip.pins.clone() {
        if pool.contains(pin.ip()) {
            builder.conflict(
                &["vip.pins", "vip.pool"],
                format!(
                    "{name} = \"{pin}\" lies in vip.pool {pool}; pin it to an address outside, or \
                     choose another pool"
                ),
            );
        }
    }
    for (key, address) in own_addresses(builder) {
        if matches!(address.ip(), IpAddr::V4(ip) if pool.contains(&ip) && !ip.eq(&Ipv4Addr::LOCALHOST))
        {
            builder.conflict(
                &[key, "vip.pool"],
                format!(
                    "{address} lies in vip.pool {pool}; choose an address outside, or another pool"
                ),
            );
        }
    }
}

fn check_pool6_overlap(builder: &mut ConfigBuilder) {
    let Some(pool6) = builder.config.vip.pool6 else { return };
    for (key, address) in own_addresses(builder) {
        if matches!(address.ip(), IpAddr::V6(ip) if pool6.contains(&ip)) {
            builder.conflict(
                &[key, "vip.pool6"],
                format!(
                    "{address} lies in vip.pool6 {pool6}; choose an address outside, or another \
                     pool"
                ),
            );
        }
    }
}

/// A pin hides what listens at its address and port.
fn check_pins(builder: &mut ConfigBuilder) {
    let pins: Vec<_> = builder.config.vip.pins.clone().into_iter().collect();
    for (pin_idx, (name, pin)) in pins.iter().enumerate() {
        if let Some((other, _)) = pins[..pin_idx].iter().find(|(_, address)| address == pin) {
            builder.conflict(
                &["vip.pins"],
                format!("{other} and {name} are both pinned to {pin}; give one another address"),
            );
        }
        for (key, address) in own_addresses(builder) {
            if address == SocketAddr::V4(*pin) {
                builder.conflict(
                    &["vip.pins", key],
                    format!(
                        "{name} is pinned to {pin}, which {key} needs; give it another address"
                    ),
                );
            }
        }
    }
}

fn check_routes(builder: &mut ConfigBuilder) {
    let dns = builder.config.dns.clone();
    if dns.routes.contains_key(&dns.domain) {
        builder.conflict(
            &["dns.routes", "dns.domain"],
            format!("nohop answers names below {} itself; remove the route", dns.domain),
        );
    }
    let routes = dns.routes.values().map(|server| ("dns.routes", *server));
    let forward = match &dns.forward {
        Forward::ResolvConf => &[],
        Forward::Servers(servers) => servers.as_slice(),
    };
    let forward = forward.iter().map(|server| ("dns.forward", *server));
    let has_zone = |route: &String| format!(".{}", dns.domain).ends_with(&format!(".{route}"));
    if dns.unrouted == Unrouted::Forward
        && dns.forward == Forward::Servers(Vec::new())
        && !dns.routes.keys().any(has_zone)
    {
        builder.conflict(
            &["dns.unrouted", "dns.forward"],
            "there is no resolver to forward names of the zone to; write \"nxdomain\", or name one in \
             dns.forward",
        );
    }
    for (key, server) in routes.chain(forward) {
        if dns.listen.contains(&server) {
            builder.conflict(
                &[key, "dns.listen"],
                format!("{server} is nohop itself, so queries would loop; name another"),
            );
        }
    }
}

/// DNS over TLS needs a certificate and its key.
fn check_dns_tls(builder: &mut ConfigBuilder) {
    let dns = builder.config.dns.clone();
    for (key, file) in
        [("dns.tls_cert_file", dns.tls_cert_file), ("dns.tls_key_file", dns.tls_key_file)]
    {
        if !dns.listen_tls.is_empty() && file.is_none() {
            builder.conflict(&["dns.listen_tls", key], format!("needs {key}; name a PEM file"));
        }
    }
}

/// A TCP address beyond loopback and private networks needs the names under which it may be addressed:
/// nothing else distinguishes a page that resolves its own name to it (DNS rebinding).
fn check_admin(builder: &mut ConfigBuilder) {
    let admin = builder.config.admin.clone();
    let open = admin.listen.iter().filter_map(|address| match address {
        AdminAddress::Tcp(address) if !is_private(address.ip()) => Some(address.to_string()),
        _ => None,
    });
    let open: Vec<String> = open.collect();
    if !open.is_empty() && admin.hosts.is_empty() {
        builder.conflict(
            &["admin.listen", "admin.hosts"],
            format!(
                "other hosts may reach {}, and admin.hosts is empty: list there the names and \
                 addresses under which they do, or listen on a loopback or private address",
                open.join(" and ")
            ),
        );
    }
}

/// Whether an address is a loopback, link-local or private one (RFC 1918, 4193 and 6598).
fn is_private(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(ip) => {
            let [first, second, ..] = ip.octets();
            let is_shared = first == 100 && second & 0xc0 == 64;
            ip.is_loopback() || ip.is_private() || ip.is_link_local() || is_shared
        }
        IpAddr::V6(ip) => ip.is_loopback() || ip.is_unique_local() || ip.is_unicast_link_local(),
    }
}

/// The addresses that the daemon listens on or connects to, each with its key.
fn own_addresses(builder: &ConfigBuilder) -> Vec<(&'static str, SocketAddr)> {
    let config = &builder.config;
    let mut addresses: Vec<(&str, SocketAddr)> = Vec::new();
    addresses.extend(config.dns.listen.iter().map(|address| ("dns.listen", *address)));
    let listen_tls = config.dns.listen_tls.iter();
    addresses.extend(listen_tls.map(|address| ("dns.listen_tls", *address)));
    addresses.extend(config.dns.routes.values().map(|address| ("dns.routes", *address)));
    if let Forward::Servers(servers) = &config.dns.forward {
        addresses.extend(servers.iter().map(|address| ("dns.forward", *address)));
    }
    let admin = listen::tcp_addresses(&config.admin.listen);
    addresses.extend(admin.map(|address| ("admin.listen", address)));
    if let ConsulAddress::Http(authority) | ConsulAddress::Https(authority) = &config.consul.address
        && let Ok(address) = authority.parse()
    {
        addresses.push(("consul.address", address));
    }
    addresses
}

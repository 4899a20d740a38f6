//! Public VIPs and the edge in the configuration.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::Serialize;

use super::address::socket_address;
use super::builder::ConfigBuilder;
use super::toml_value::{Parsed, TomlValue};
use super::{MAX_PUBLIC_NETWORKS, WatchPolicy, text};

/// The longest name of an interface, in bytes: the kernel's IFNAMSIZ without the zero at the end.
const MAX_INTERFACE_NAME: usize = 15;

/// Networks that have no address for clients of other hosts: "this network", loopback, link-local,
/// multicast, and reserved ones (RFC 6890); of IPv6 also what stands for an IPv4 address.
const NOT_PUBLIC: [IpNet; 8] = [
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(0, 0, 0, 0), 8)),
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8)),
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 0, 0), 16)),
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(224, 0, 0, 0), 3)),
    // The unspecified address, loopback, and IPv4-mapped and IPv4-compatible addresses.
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 64)),
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0, 0), 96)),
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10)),
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8)),
];

fn overlap(one: &IpNet, other: &IpNet) -> bool {
    one.contains(other) || other.contains(one)
}

/// The first of [`NOT_PUBLIC`] that has an address in common with a network.
fn not_public(network: &IpNet) -> Option<IpNet> {
    NOT_PUBLIC.into_iter().find(|special| overlap(special, network))
}

/// Networks of public VIPs.
pub(super) fn public_networks(value: &TomlValue) -> Parsed<Vec<IpNet>> {
    let networks = value.list_or_none(|it| it.text(public_network))?;
    if networks.len() > MAX_PUBLIC_NETWORKS {
        return value.fault(format!(
            "has {} networks, and {MAX_PUBLIC_NETWORKS} is the most, since each connection is compared \
             to every one; write larger ones",
            networks.len()
        ));
    }
    Ok(networks)
}

fn public_network(text: &str) -> Result<IpNet, String> {
    let network = text.parse().or_else(|_| text.parse().map(|ip: IpAddr| IpNet::from(ip)));
    let network: IpNet = network
        .map_err(|_| format!("'{text}' isn't a network; write one such as 203.0.113.0/24"))?;
    if network.trunc() != network {
        return Err(format!("{network} has bits below its prefix; write {}", network.trunc()));
    }
    if let Some(special) = not_public(&network) {
        return Err(format!(
            "{network} overlaps {special}, whose addresses clients of other hosts can't use; write one \
             such as 203.0.113.0/24"
        ));
    }
    Ok(network)
}

/// The name of an interface (`dev_valid_name()` in the kernel).
pub(super) fn interface(name: &str) -> Result<String, String> {
    let is_bad = |byte: u8| byte == b'/' || byte == b':' || byte.is_ascii_whitespace();
    if name.is_empty()
        || name.len() > MAX_INTERFACE_NAME
        || [".", ".."].contains(&name)
        || name.bytes().any(is_bad)
    {
        return Err(format!("'{name}' isn't the name of an interface; write one such as eth0"));
    }
    if name == "lo" {
        return Err("lo has no packets of other hosts; write one such as eth0".into());
    }
    Ok(name.to_owned())
}

/// The most addresses of one family in `edge.source`: the programs have room for as many.
const MAX_SOURCES: usize = 4;

/// The most addresses in `datapath.client_address_from`, likewise.
const MAX_CLIENT_SOURCES: usize = 8;

/// The addresses of this edge.
pub(super) fn sources(value: &TomlValue) -> Parsed<Vec<IpAddr>> {
    let sources = value.list_or_none(|it| it.text(source))?;
    let n_v4 = sources.iter().filter(|source| source.is_ipv4()).count();
    for (family, n) in [("IPv4", n_v4), ("IPv6", sources.len() - n_v4)] {
        if n > MAX_SOURCES {
            return value.fault(format!(
                "has {n} {family} addresses, and {MAX_SOURCES} is the most; write fewer"
            ));
        }
    }
    Ok(sources)
}

/// The addresses of edges that this node trusts.
pub(super) fn client_sources(value: &TomlValue) -> Parsed<Vec<Ipv4Addr>> {
    let sources = value.list_or_none(|it| it.text(client_source))?;
    if sources.len() > MAX_CLIENT_SOURCES {
        return value.fault(format!(
            "has {} addresses, and {MAX_CLIENT_SOURCES} is the most; write fewer",
            sources.len()
        ));
    }
    Ok(sources)
}

fn client_source(text: &str) -> Result<Ipv4Addr, String> {
    match source(text)? {
        IpAddr::V4(source) => Ok(source),
        IpAddr::V6(source) => {
            Err(format!("{source} is IPv6, which has no clients' addresses; remove it"))
        }
    }
}

/// An address of this edge.
fn source(text: &str) -> Result<IpAddr, String> {
    let usual = "write an address of this host, such as 10.0.0.2";
    let address: IpAddr =
        text.parse().map_err(|_| format!("'{text}' isn't an address; {usual}"))?;
    if let Some(special) = not_public(&address.into()) {
        return Err(format!("{address} lies in {special}, where no backend replies to; {usual}"));
    }
    Ok(address)
}

/// `ADDR:PORT` of a public VIP.
pub(super) fn public_vip(text: &str) -> Result<SocketAddr, String> {
    let usual = "write ADDR:PORT, such as 203.0.113.10:80";
    let vip = socket_address(text).map_err(|_| format!("'{text}' isn't a public VIP; {usual}"))?;
    match not_public(&vip.ip().into()) {
        Some(special) => Err(format!("{vip} lies in {special}, which isn't public; {usual}")),
        None => Ok(vip),
    }
}

/// After how long without a packet flows through an edge end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FlowTimeouts {
    /// An established TCP connection.
    #[serde(serialize_with = "text::write_duration")]
    pub established: Duration,
    /// One that one side has closed.
    #[serde(serialize_with = "text::write_duration")]
    pub half_closed: Duration,
    /// One that both have closed, or that was reset, or that isn't established yet.
    #[serde(serialize_with = "text::write_duration")]
    pub closed: Duration,
    /// UDP.
    #[serde(serialize_with = "text::write_duration")]
    pub udp: Duration,
}

impl Default for FlowTimeouts {
    fn default() -> FlowTimeouts {
        FlowTimeouts {
            established: Duration::from_secs(3_600),
            half_closed: Duration::from_secs(120),
            closed: Duration::from_secs(60),
            udp: Duration::from_secs(60),
        }
    }
}

/// The longest timeout: the programs have times of milliseconds in 31 bits.
const MAX_TIMEOUT: Duration = Duration::from_secs(7 * 86_400);

/// A table of some of [`FlowTimeouts`]' fields; the others have their defaults.
pub(super) fn timeouts(value: &TomlValue) -> Parsed<FlowTimeouts> {
    let mut timeouts = FlowTimeouts::default();
    let mut faults = Vec::new();
    let timeout = |text: &str| match text::duration(text)? {
        time if time <= MAX_TIMEOUT => Ok(time),
        _ => Err(format!("'{text}' is out of range; write 7d or less")),
    };
    for (name, entry) in value.entries()? {
        let place = match &*name {
            "established" => &mut timeouts.established,
            "half_closed" => &mut timeouts.half_closed,
            "closed" => &mut timeouts.closed,
            "udp" => &mut timeouts.udp,
            _ => {
                let known = "unknown entry; established, half_closed, closed and udp are known";
                faults.extend(entry.fault::<()>(known).err().into_iter().flatten());
                continue;
            }
        };
        match entry.text(timeout) {
            Ok(time) => *place = time,
            Err(more) => faults.extend(more),
        }
    }
    if faults.is_empty() { Ok(timeouts) } else { Err(faults) }
}

/// Notes each rule about public VIPs and the edge that is broken. `own_addresses` are those that the
/// daemon listens on or connects to, each with its key.
pub(super) fn check(builder: &mut ConfigBuilder, own_addresses: &[(&'static str, SocketAddr)]) {
    check_networks(builder, own_addresses);
    check_vips(builder);
    let edge = builder.config.edge.clone();
    if edge.is_on() && edge.source.is_empty() {
        builder.conflict(
            &["edge.interfaces", "edge.source"],
            "needs edge.source; write an address of this host that backends can reply to",
        );
    }
    if !edge.is_on() {
        for (key, is_given) in [
            ("edge.source", !edge.source.is_empty()),
            ("edge.vips", !edge.vips.is_empty()),
            ("edge.client_address", !edge.client_address.is_empty()),
        ] {
            if is_given {
                builder.conflict(
                    &[key, "edge.interfaces"],
                    "needs edge.interfaces; name those where packets arrive, such as [\"eth0\"]",
                );
            }
        }
        return;
    }
    // Which services are public isn't known before their instances are.
    if builder.config.catalog.watch == WatchPolicy::Used {
        builder.conflict(
            &["catalog.watch", "edge.interfaces"],
            "an edge watches all services, since clients outside use them; remove catalog.watch, or \
             write \"all\"",
        );
    }
}

fn check_networks(builder: &mut ConfigBuilder, own_addresses: &[(&'static str, SocketAddr)]) {
    let vip = builder.config.vip.clone();
    for (network_idx, network) in vip.public.iter().enumerate() {
        if let Some(other) = vip.public[..network_idx].iter().find(|other| overlap(other, network))
        {
            builder.conflict(
                &["vip.public"],
                format!("{other} and {network} overlap; write one network in place of both"),
            );
        }
        if let Some(pool6) = vip.pool6
            && overlap(&pool6.into(), network)
        {
            builder.conflict(
                &["vip.public", "vip.pool6"],
                format!("{network} overlaps vip.pool6 {pool6}; choose networks apart"),
            );
        }
        for (name, pin) in &vip.pins {
            if network.contains(&IpAddr::V4(*pin.ip())) {
                builder.conflict(
                    &["vip.pins", "vip.public"],
                    format!(
                        "{name} = \"{pin}\" lies in vip.public {network}; remove the pin, and write \
                         nohop-public = \"{pin}\" in the service's Meta"
                    ),
                );
            }
        }
        // Else a service could take what the daemon itself, and others on this host, connect to.
        for (key, address) in own_addresses {
            if network.contains(&address.ip()) {
                builder.conflict(
                    &["vip.public", key],
                    format!(
                        "{network} has {address}, which is {key}; write smaller networks, of public \
                         VIPs alone"
                    ),
                );
            }
        }
    }
    for source in builder.config.edge.source.clone() {
        if let Some(network) = vip.public.iter().find(|network| network.contains(&source)) {
            builder.conflict(
                &["edge.source", "vip.public"],
                format!(
                    "{source} lies in vip.public {network}; write an address of this host outside of it"
                ),
            );
        }
    }
}

fn check_vips(builder: &mut ConfigBuilder) {
    let (public, edge) = (builder.config.vip.public.clone(), builder.config.edge.clone());
    let vips: Vec<_> = edge.vips.iter().collect();
    for (vip_idx, (name, vip)) in vips.iter().enumerate() {
        if !public.iter().any(|network| network.contains(&vip.ip())) {
            builder.conflict(
                &["edge.vips", "vip.public"],
                format!(
                    "{name} = \"{vip}\" lies in no network of vip.public; add {} to it on all nodes",
                    IpNet::from(vip.ip())
                ),
            );
        }
        if let Some((other, _)) = vips[..vip_idx].iter().find(|(_, address)| address == vip) {
            builder.conflict(
                &["edge.vips"],
                format!("{other} and {name} both have {vip}; give one another address or port"),
            );
        }
        if !edge.source.is_empty() && !edge.source.iter().any(|it| it.is_ipv4() == vip.is_ipv4()) {
            builder.conflict(
                &["edge.vips", "edge.source"],
                format!(
                    "{name} = \"{vip}\" needs an {} address in edge.source; add one of this host",
                    if vip.is_ipv4() { "IPv4" } else { "IPv6" }
                ),
            );
        }
    }
}

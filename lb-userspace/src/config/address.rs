//! Addresses, networks and names in the configuration.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Serialize, Serializer};

use super::toml_value::{Parsed, TomlValue};
use super::{AdminAddress, Allowed, ConsulAddress, Forward};
use crate::dns_name;

/// The length of a unix socket's path, in bytes, that the kernel has room for.
const MAX_SOCKET_PATH: usize = 107;

impl FromStr for AdminAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some(path) = text.strip_prefix("unix:") else {
            if socket_address(text).is_err() {
                return Err(format!(
                    "'{text}' isn't an address; write unix:/PATH or ADDR:PORT, port 1 to 65535"
                ));
            }
            return listen_address(text).map(AdminAddress::Tcp);
        };
        if !path.starts_with('/') || path.ends_with('/') {
            return Err(format!("'{text}' isn't an absolute path; write unix:/PATH"));
        }
        if path.len() > MAX_SOCKET_PATH {
            return Err(format!(
                "the path has {} bytes; a unix socket's has at most {MAX_SOCKET_PATH}",
                path.len()
            ));
        }
        Ok(AdminAddress::Unix(PathBuf::from(path)))
    }
}

impl fmt::Display for AdminAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AdminAddress::Unix(path) => write!(f, "unix:{}", path.display()),
            AdminAddress::Tcp(address) => write!(f, "{address}"),
        }
    }
}

impl Serialize for AdminAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// `ADDR:PORT`, with a port to connect to.
pub(super) fn socket_address(text: &str) -> Result<SocketAddr, String> {
    match text.parse::<SocketAddr>() {
        Ok(address) if address.port() != 0 => Ok(address),
        _ => Err(format!("'{text}' isn't an address; write ADDR:PORT, port 1 to 65535")),
    }
}

/// `ADDR:PORT` to listen on.
pub(super) fn listen_address(text: &str) -> Result<SocketAddr, String> {
    let listen = socket_address(text)?;
    let usual = "write an address of this host";
    match listen {
        _ if listen.ip().is_multicast() => Err(format!("{listen} is multicast; {usual}")),
        SocketAddr::V4(v4) if v4.ip().is_broadcast() => {
            Err(format!("{listen} is the broadcast address; {usual}"))
        }
        SocketAddr::V6(v6) if v6.ip().is_unicast_link_local() && v6.scope_id() == 0 => {
            Err(format!(
                "{listen} is link-local, so each interface may have it; write the index of one, as \
                 `ip link` shows it: [{}%2]:{}",
                v6.ip(),
                v6.port()
            ))
        }
        _ => Ok(listen),
    }
}

/// `ADDR[:PORT]` of a nameserver.
pub(super) fn nameserver(text: &str) -> Result<SocketAddr, String> {
    let server = match text.parse() {
        Ok(ip) => Ok(SocketAddr::new(ip, 53)),
        Err(_) => socket_address(text),
    };
    match server {
        Ok(server) if !server.ip().is_unspecified() && !server.ip().is_multicast() => Ok(server),
        _ => Err(format!("'{text}' isn't a nameserver; write ADDR or ADDR:PORT")),
    }
}

/// A nameserver, a list of them, which may be empty, or `resolv.conf`.
pub(super) fn forward(value: &TomlValue) -> Parsed<Forward> {
    if value.is_list() {
        return value.list_or_none(|server| server.text(nameserver)).map(Forward::Servers);
    }
    value.text(|text| match text {
        "resolv.conf" => Ok(Forward::ResolvConf),
        server => nameserver(server)
            .map(|server| Forward::Servers(vec![server]))
            .map_err(|what| format!("{what}, a list of these, or \"resolv.conf\"")),
    })
}

/// A network, or those that this host is in.
pub(super) fn allowed(text: &str) -> Result<Allowed, String> {
    if text == "local" {
        return Ok(Allowed::Local);
    }
    let network = text.parse().or_else(|_| text.parse().map(|ip: IpAddr| ip.into()));
    network.map(|network: IpNet| Allowed::Network(network.trunc())).map_err(|_| {
        format!("'{text}' isn't a network; write one such as 10.0.0.0/8, or \"local\"")
    })
}

/// `IPv4:PORT` of a pin.
pub(super) fn pin(text: &str) -> Result<SocketAddrV4, String> {
    match text.parse::<SocketAddrV4>() {
        Ok(pin) if pin.port() != 0 && is_destination(*pin.ip()) => Ok(pin),
        _ => Err(format!("'{text}' can't be connected to; write IPv4:PORT, such as 127.0.0.1:80")),
    }
}

fn is_destination(ip: Ipv4Addr) -> bool {
    !ip.is_unspecified() && !ip.is_multicast() && !ip.is_broadcast()
}

/// The pool, as a network within 127.0.0.0/8.
pub(super) fn pool(text: &str) -> Result<Ipv4Net, String> {
    let loopback = Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8);
    let pool: Ipv4Net = text
        .parse()
        .map_err(|_| format!("'{text}' isn't a network; write one such as 127.128.0.0/9"))?;
    if !loopback.contains(&pool) {
        return Err(format!("{pool} isn't within {loopback}; write one such as 127.128.0.0/9"));
    }
    if pool.trunc() != pool {
        return Err(format!("{pool} has bits below its prefix; write {}", pool.trunc()));
    }
    Ok(pool)
}

/// The lengths that the prefix of the IPv6 pool may have: a site's local addresses have 64 bits of
/// their own at the end (RFC 4193), and below 8 bits hardly a service has room.
const POOL6_LENGTHS: RangeInclusive<u8> = 64..=120;

/// The IPv6 pool, as a network of unique local addresses; an empty text means none.
pub(super) fn pool6_or_none(text: &str) -> Result<Option<Ipv6Net>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    let local = Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0), 8);
    let usual = "write one such as fd6e:6f68:6f70::/96";
    let pool: Ipv6Net = text
        .parse()
        .map_err(|_| format!("'{text}' isn't an IPv6 network; {usual}, or \"\" for none"))?;
    if !local.contains(&pool) {
        return Err(format!("{pool} isn't within {local}; {usual}"));
    }
    if pool.trunc() != pool {
        return Err(format!("{pool} has bits below its prefix; write {}", pool.trunc()));
    }
    if !POOL6_LENGTHS.contains(&pool.prefix_len()) {
        let (shortest, longest) = (POOL6_LENGTHS.start(), POOL6_LENGTHS.end());
        return Err(format!(
            "{pool} has a prefix of {}; write one from /{shortest} to /{longest}",
            pool.prefix_len()
        ));
    }
    Ok(Some(pool))
}

/// The address of the Consul agent: `[http://]HOST[:PORT]`, `https://HOST[:PORT]` or `unix:///PATH`.
/// Without a port it is that of the scheme, as in Consul's own tools.
pub(super) fn consul(text: &str) -> Result<ConsulAddress, String> {
    let usual = "write http://HOST:PORT, https://HOST:PORT or unix:///PATH";
    let wrong = || format!("'{text}' isn't an address of a Consul agent; {usual}");
    if let Some(path) = text.strip_prefix("unix://") {
        let fits = path.starts_with('/') && !path.ends_with('/') && path.len() <= MAX_SOCKET_PATH;
        return if fits { Ok(ConsulAddress::Unix(path.into())) } else { Err(wrong()) };
    }
    type Scheme = fn(String) -> ConsulAddress;
    let (scheme, usual_port, rest): (Scheme, u16, &str) = match text.strip_prefix("https://") {
        Some(rest) => (ConsulAddress::Https, 443, rest),
        None => (ConsulAddress::Http, 80, text.strip_prefix("http://").unwrap_or(text)),
    };
    let authority = rest.strip_suffix('/').unwrap_or(rest);
    if let Some((_, host)) = authority.rsplit_once('@') {
        return Err(format!(
            "an address can't have a user; write {host} here, and USER:PASSWORD into CONSUL_HTTP_AUTH"
        ));
    }
    let (host, port) = match authority.rsplit_once(':') {
        // The colon is one of the address itself.
        Some(_) if authority.ends_with(']') => (authority, None),
        Some((host, port)) => (host, Some(port)),
        None => (authority, None),
    };
    let port = match port {
        Some(port) => port.parse().ok().filter(|port| *port != 0).ok_or_else(wrong)?,
        None => usual_port,
    };
    let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let is_host = match bracketed {
        Some(ip) => ip.parse::<Ipv6Addr>().is_ok(),
        // A number alone is a port without a host.
        None => domain(host).is_ok() && !host.bytes().all(|byte| byte.is_ascii_digit()),
    };
    if !is_host {
        return Err(wrong());
    }
    if let Err(what) = check_url_host(host) {
        return Err(format!(
            "'{text}' has a host that no URL can have ({what}); write the agent's IP address, or \
             another name of it"
        ));
    }
    Ok(scheme(format!("{host}:{port}")))
}

/// Checks that a host can be in a URL, as each request has one: a name whose last label is a number
/// would be an IPv4 address there (WHATWG URL, 3.5).
pub(super) fn check_url_host(host: &str) -> Result<(), String> {
    let url = reqwest::Url::parse(&format!("http://{host}"));
    url.map(drop).map_err(|error| error.to_string())
}

/// A DNS name, in lower case and without dots at its ends.
pub(super) fn domain(text: &str) -> Result<String, String> {
    let name = text.strip_prefix('.').unwrap_or(text);
    let name = name.strip_suffix('.').unwrap_or(name);
    if !dns_name::is_host_name(name) {
        return Err(format!(
            "'{text}' isn't a DNS name; write labels of letters, digits, - and _ between dots"
        ));
    }
    Ok(name.to_ascii_lowercase())
}

/// A DNS name, or an IP address.
pub(super) fn host(text: &str) -> Result<String, String> {
    match text.parse::<std::net::IpAddr>() {
        Ok(address) => Ok(address.to_canonical().to_string()),
        Err(_) => domain(text).map_err(|_| {
            format!(
                "'{text}' is neither a DNS name nor an IP address; write one without brackets and port"
            )
        }),
    }
}

/// A service's name: one DNS label, in lower case.
pub(super) fn service_name(text: &str) -> Result<String, String> {
    if dns_name::service_name_problem(text).is_some() {
        return Err(format!("'{text}' isn't a DNS label; write 1 to 63 letters, digits, - and _"));
    }
    Ok(text.to_ascii_lowercase())
}

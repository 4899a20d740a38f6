//! Who is asked for a name that isn't ours.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;

use hickory_proto::rr::Name;
use tracing::warn;

use super::loops::Way;
use super::resolv_conf::ResolvConf;
use super::suffix::Suffix;
use crate::config::{DnsConfig, Forward, Unrouted};

/// Where systemd-resolved tells whom it asks, without what belongs to one link.
const RESOLVED_UPLINKS: &str = "/run/systemd/resolve/resolv.conf";

/// The resolvers for each name, never ourselves.
#[derive(Debug)]
pub(super) struct Upstreams {
    /// Where a domain's names go, the longest domain first.
    routes: Vec<Route>,
    /// Our own zone, where names that we don't know are forwarded: resolvers may send its names
    /// elsewhere than those around it, such as back to us.
    zone: Option<(Suffix, Arc<str>)>,
    others: Others,
    /// The addresses that we listen on.
    own: Vec<SocketAddr>,
}

/// Where the names of a domain go.
#[derive(Debug)]
struct Route {
    suffix: Suffix,
    domain: Arc<str>,
    servers: Arc<[SocketAddr]>,
}

/// Where all other names go.
#[derive(Debug)]
enum Others {
    Fixed(Arc<[SocketAddr]>),
    ResolvConf(Box<ResolvConf>),
}

impl Upstreams {
    /// The upstreams of a server that listens on `own`.
    pub(super) fn new(config: &DnsConfig, own: &[SocketAddr], resolv_conf: PathBuf) -> Upstreams {
        let mut routes = Vec::new();
        for (domain, &server) in &config.routes {
            let servers = without_own(&[server], own);
            if servers.is_empty() {
                warn!(
                    "dns.routes sends {domain} to {server}, which is this server, so its names \
                     fail; name the resolver that knows them"
                );
            }
            let domain = domain.trim_matches('.');
            routes.push(Route { suffix: Suffix::new(domain), domain: domain.into(), servers });
        }
        routes.sort_by_key(|route| std::cmp::Reverse(route.suffix.n_labels()));

        let others = match &config.forward {
            Forward::ResolvConf => {
                Others::ResolvConf(ResolvConf::new(resolv_conf, RESOLVED_UPLINKS.into()).into())
            }
            Forward::Servers(servers) => {
                let servers = without_own(servers, own);
                if servers.is_empty() {
                    warn!(
                        "dns.forward names no resolver but this one, so names outside the zone \
                         fail; name one there, or set it to \"resolv.conf\""
                    );
                }
                Others::Fixed(servers)
            }
        };
        let domain = config.domain.trim_matches('.');
        let zone = (config.unrouted == Unrouted::Forward)
            .then(|| (Suffix::new(domain), Arc::from(domain)));
        Upstreams { routes, zone, others, own: own.to_vec() }
    }

    /// The domain of the route for `name`, that of the zone, or an empty one, and the servers to
    /// ask, in order; none where all of them are ourselves.
    pub(super) fn of(&self, name: &Name) -> (Arc<str>, Arc<[SocketAddr]>) {
        let (domain, servers) = self.route(name);
        match &self.zone {
            Some((zone, own)) if own.len() > domain.len() && zone.depth_of(name).is_some() => {
                (Arc::clone(own), servers)
            }
            _ => (domain, servers),
        }
    }

    fn route(&self, name: &Name) -> (Arc<str>, Arc<[SocketAddr]>) {
        match self.routes.iter().find(|route| route.suffix.depth_of(name).is_some()) {
            Some(route) => (Arc::clone(&route.domain), Arc::clone(&route.servers)),
            None => (Arc::default(), self.others()),
        }
    }

    /// Every way that a question may take from here.
    pub(super) fn ways(&self) -> Vec<Way> {
        let routes = self.routes.iter().map(|route| (&route.domain, Arc::clone(&route.servers)));
        let zone = self.zone.iter().filter_map(|(_, domain)| {
            let (of, servers) = self.of(&Name::from_ascii(&**domain).ok()?);
            let has_route = self.routes.iter().any(|route| route.domain == of);
            (of == *domain && !has_route).then_some((domain, servers))
        });
        routes
            .chain(zone)
            .chain([(&Arc::default(), self.others())])
            .flat_map(|(domain, servers)| {
                let way = |&server| Way { domain: Arc::clone(domain), server };
                servers.iter().map(way).collect::<Vec<_>>()
            })
            .collect()
    }

    fn others(&self) -> Arc<[SocketAddr]> {
        match &self.others {
            Others::Fixed(servers) => Arc::clone(servers),
            Others::ResolvConf(file) => file.servers(|server| !is_ourselves(*server, &self.own)),
        }
    }
}

fn without_own(servers: &[SocketAddr], own: &[SocketAddr]) -> Arc<[SocketAddr]> {
    servers.iter().copied().filter(|server| !is_ourselves(*server, own)).collect()
}

/// Whether a message to `server` would come back to one of our own listeners.
fn is_ourselves(server: SocketAddr, own: &[SocketAddr]) -> bool {
    // The kernel takes "any" as a destination for the loopback address.
    let ip = match server.ip().to_canonical() {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    own.iter().filter(|listener| listener.port() == server.port()).any(|listener| {
        match listener.ip().to_canonical() {
            IpAddr::V4(Ipv4Addr::UNSPECIFIED) => ip.is_ipv4() && is_local(server, ip),
            IpAddr::V6(Ipv6Addr::UNSPECIFIED) => is_local(server, ip),
            listener_ip => listener_ip == ip,
        }
    })
}

/// Whether this host has the address: only then can a socket be bound to it.
fn is_local(mut server: SocketAddr, ip: IpAddr) -> bool {
    server.set_ip(ip);
    server.set_port(0);
    UdpSocket::bind(server).is_ok()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::config::Config;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn ourselves() {
        let table = [
            ("127.0.0.1:53", "127.0.0.1:53", true),
            ("127.0.0.1:53", "127.0.0.1:5353", false),
            ("127.0.0.1:53", "127.0.0.2:53", false),
            ("127.0.0.1:53", "0.0.0.0:53", true),
            ("127.0.0.1:53", "[::ffff:127.0.0.1]:53", true),
            ("127.0.0.1:53", "[::1]:53", false),
            ("0.0.0.0:53", "127.0.0.53:53", true),
            ("0.0.0.0:53", "192.0.2.1:53", false),
            ("0.0.0.0:53", "127.0.0.1:54", false),
            ("[::]:53", "127.0.0.1:53", true),
            ("[::]:53", "192.0.2.1:53", false),
        ];
        for (listener, server, expected) in table {
            let is = is_ourselves(address(server), &[address("10.0.0.1:1"), address(listener)]);
            assert_eq!(is, expected, "{server}, listening on {listener}");
        }
    }

    #[test]
    fn the_longest_route_wins() {
        let own = address("127.0.0.1:53");
        let config = DnsConfig {
            forward: Forward::Servers(vec![own, address("192.0.2.1:53"), address("192.0.2.2:53")]),
            routes: BTreeMap::from([
                ("consul".into(), address("127.0.0.1:8600")),
                ("dc2.Consul".into(), address("192.0.2.8:8600")),
                ("loop".into(), own),
            ]),
            ..Config::default().dns
        };
        let upstreams = Upstreams::new(&config, &[own], PathBuf::new());
        let table = [
            ("web.service.consul.", "127.0.0.1:8600"),
            ("CONSUL.", "127.0.0.1:8600"),
            ("web.service.dc2.consul.", "192.0.2.8:8600"),
            ("notconsul.", "192.0.2.1:53 192.0.2.2:53"),
            (".", "192.0.2.1:53 192.0.2.2:53"),
            ("a.loop.", ""),
        ];
        for (name, expected) in table {
            let (_, servers) = upstreams.of(&Name::from_ascii(name).unwrap());
            let shown: Vec<_> = servers.iter().map(ToString::to_string).collect();
            assert_eq!(shown.join(" "), expected, "{name}");
        }

        let ways = upstreams.ways();
        let shown: Vec<_> =
            ways.iter().map(|way| format!("{} {}", way.domain, way.server)).collect();
        assert_eq!(
            shown,
            [
                "dc2.Consul 192.0.2.8:8600",
                "consul 127.0.0.1:8600",
                " 192.0.2.1:53",
                " 192.0.2.2:53"
            ]
        );
    }

    #[test]
    fn the_zone_has_ways_of_its_own_where_its_names_are_forwarded() {
        let shown = |unrouted, domain: &str, routes: &[&str]| {
            let route = |route: &&str| ((*route).to_owned(), address("192.0.2.8:53"));
            let config = DnsConfig {
                domain: domain.into(),
                unrouted,
                forward: Forward::Servers(vec![address("192.0.2.1:53")]),
                routes: routes.iter().map(route).collect(),
                ..Config::default().dns
            };
            let upstreams = Upstreams::new(&config, &[], PathBuf::new());
            let ways = upstreams.ways();
            let name = Name::from_ascii(format!("unknown.{domain}.")).unwrap();
            let (domain, servers) = upstreams.of(&name);
            let way = Way { domain, server: servers[0] };
            assert!(ways.contains(&way), "{way:?}");
            let shown = |way: &Way| format!("{} {}", way.domain, way.server.ip());
            (shown(&way), ways.iter().map(shown).collect::<Vec<_>>().join(", "))
        };
        let rows: [(Unrouted, &str, &[&str], &str, &str); 4] = [
            (Unrouted::Nxdomain, "lb", &[], " 192.0.2.1", " 192.0.2.1"),
            (Unrouted::Forward, "lb", &[], "lb 192.0.2.1", "lb 192.0.2.1,  192.0.2.1"),
            (
                Unrouted::Forward,
                "lb.example",
                &["example"],
                "lb.example 192.0.2.8",
                "example 192.0.2.8, lb.example 192.0.2.8,  192.0.2.1",
            ),
            (Unrouted::Forward, "lb", &["lb"], "lb 192.0.2.8", "lb 192.0.2.8,  192.0.2.1"),
        ];
        for (unrouted, domain, routes, way, ways) in rows {
            let expected = (way.to_owned(), ways.to_owned());
            assert_eq!(shown(unrouted, domain, routes), expected, "{domain} {routes:?}");
        }
    }
}

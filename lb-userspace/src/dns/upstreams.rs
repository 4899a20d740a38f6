//! Routes names to upstream resolvers.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use tracing::warn;

use super::domain::Domain;
use super::loop_detection::UpstreamPath;
use super::message::WireName;
use super::resolv_conf::ResolvConf;
use super::upstream::Upstream;
use crate::config::{DnsConfig, Forward, Unrouted};
use crate::interfaces::Interfaces;

/// The resolvers of this host.
pub(super) const RESOLV_CONF: &str = "/etc/resolv.conf";

/// systemd-resolved's list of its own upstreams, without those of single links.
const RESOLVED_UPLINKS: &str = "/run/systemd/resolve/resolv.conf";

/// The period between two checks of resolv.conf, which isn't checked per query.
const RESOLV_CONF_AGE: Duration = Duration::from_millis(100);

/// All upstreams by address; their state outlives a reload.
#[derive(Clone, Debug, Default)]
pub(super) struct UpstreamRegistry(Arc<Mutex<HashMap<SocketAddr, Arc<Upstream>>>>);

impl UpstreamRegistry {
    fn get(&self, address: SocketAddr) -> Arc<Upstream> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let upstream =
            known.entry(address).or_insert_with(|| Upstream::new(address, Instant::now()).into());
        Arc::clone(upstream)
    }

    /// Drops the upstreams that no route has any more.
    fn keep(&self, plan: &RoutePlan) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|address, _| plan.upstreams().any(|upstream| upstream.address == *address));
    }
}

/// The upstreams of each name, never this server itself.
#[derive(Debug)]
pub(super) struct Upstreams {
    /// `dns.routes`.
    routes: Vec<(Arc<str>, SocketAddr)>,
    /// Our own zone if its unknown names are forwarded: resolvers may forward its names elsewhere
    /// than those around it, such as back to us.
    zone: Option<Arc<str>>,
    others: DefaultUpstreams,
    /// The addresses that we listen on.
    own: Vec<SocketAddr>,
    registry: UpstreamRegistry,
    plan: RwLock<Arc<RoutePlan>>,
    /// Where this server was its own upstream when the plan was made.
    own_problems: RwLock<Vec<String>>,
    /// Of the plan.
    version: AtomicU64,
    created: Instant,
    /// When resolv.conf was last checked, in microseconds since `created`.
    checked_us: AtomicU64,
}

/// `dns.forward`.
#[derive(Debug)]
enum DefaultUpstreams {
    Fixed(Vec<SocketAddr>),
    ResolvConf(Box<ResolvConf>),
}

/// The routes at one moment.
#[derive(Clone, Debug, Default)]
pub(super) struct RoutePlan {
    /// The longest domain first; the last one has all names, where any are forwarded.
    routes: Vec<(Domain, Arc<UpstreamRoute>)>,
}

/// A domain and its upstreams.
#[derive(Clone, Debug)]
pub(super) struct UpstreamRoute {
    /// The domain of `dns.routes`, or the zone; empty for all other names.
    pub(super) domain: Arc<str>,
    /// Whether its names lie in our own zone.
    pub(super) is_in_zone: bool,
    /// In the order in which they are asked.
    pub(super) upstreams: Box<[Arc<Upstream>]>,
}

impl UpstreamRoute {
    /// The path to one of its upstreams.
    pub(super) fn path(&self, upstream: &Upstream) -> UpstreamPath {
        UpstreamPath { domain: Arc::clone(&self.domain), server: upstream.address }
    }
}

impl RoutePlan {
    /// The route for `name`.
    pub(super) fn of(&self, name: &WireName<'_>) -> Option<&Arc<UpstreamRoute>> {
        self.routes.iter().find(|(suffix, _)| suffix.has(name)).map(|(_, route)| route)
    }

    /// Every path that a query may take from here.
    pub(super) fn paths(&self) -> Vec<UpstreamPath> {
        let paths = self
            .routes
            .iter()
            .flat_map(|(_, route)| route.upstreams.iter().map(|upstream| route.path(upstream)));
        paths.collect()
    }

    /// The upstreams of all routes; one that several routes have comes several times.
    pub(super) fn upstreams(&self) -> impl Iterator<Item = &Arc<Upstream>> {
        self.routes.iter().flat_map(|(_, route)| &route.upstreams)
    }

    /// Whether there is an upstream for names that no route is for.
    pub(super) fn has_default(&self) -> bool {
        let is_default = |route: &UpstreamRoute| route.domain.is_empty();
        self.routes.iter().any(|(_, route)| is_default(route) && !route.upstreams.is_empty())
    }

    /// A copy whose reference counts no other thread touches.
    pub(super) fn unshared(&self) -> RoutePlan {
        let copy = |(suffix, route): &(Domain, Arc<UpstreamRoute>)| {
            (suffix.clone(), Arc::new(UpstreamRoute::clone(route)))
        };
        RoutePlan { routes: self.routes.iter().map(copy).collect() }
    }
}

impl Upstreams {
    /// The upstreams of a server that listens on `own`.
    pub(super) fn new(
        config: &DnsConfig,
        own: &[SocketAddr],
        resolv_conf: PathBuf,
        registry: UpstreamRegistry,
    ) -> Upstreams {
        let routes = config.routes.iter();
        let routes = routes.map(|(domain, server)| (Arc::from(domain.trim_matches('.')), *server));
        let others = match &config.forward {
            Forward::ResolvConf => DefaultUpstreams::ResolvConf(
                ResolvConf::new(resolv_conf, RESOLVED_UPLINKS.into()).into(),
            ),
            Forward::Servers(servers) => DefaultUpstreams::Fixed(servers.clone()),
        };
        let zone = (config.unrouted == Unrouted::Forward)
            .then(|| Arc::from(config.domain.trim_matches('.')));
        let upstreams = Upstreams {
            routes: routes.collect(),
            zone,
            others,
            own: own.to_vec(),
            registry,
            plan: RwLock::default(),
            own_problems: RwLock::default(),
            version: AtomicU64::new(0),
            created: Instant::now(),
            checked_us: AtomicU64::new(0),
        };
        upstreams.rebuild();
        let own_problems = upstreams.own_problems.read().unwrap_or_else(PoisonError::into_inner);
        own_problems.iter().for_each(|problem| warn!("{problem}"));
        drop(own_problems);
        upstreams
    }

    /// What keeps names from being forwarded, with the fix.
    pub(super) fn problems(&self) -> Vec<String> {
        self.refresh(Instant::now());
        let mut problems = self.own_problems.read().unwrap_or_else(PoisonError::into_inner).clone();
        if let DefaultUpstreams::ResolvConf(file) = &self.others {
            problems.extend(file.problem());
        }
        problems
    }

    /// Where this server is configured as its own upstream.
    fn own_addresses(&self, interfaces: &Interfaces) -> Vec<String> {
        let is_ours = |server: &SocketAddr| is_ourselves(*server, &self.own, interfaces);
        let own = self.routes.iter().filter(|(_, server)| is_ours(server));
        let problem = |(domain, server): &(Arc<str>, SocketAddr)| {
            format!(
                "dns.routes sends {domain} to {server}, which is this server, so its names fail; name the \
                 resolver that has them"
            )
        };
        let mut problems: Vec<String> = own.map(problem).collect();
        if let DefaultUpstreams::Fixed(servers) = &self.others
            && !servers.is_empty()
            && servers.iter().all(is_ours)
        {
            problems.push(
                "dns.forward names no resolver but this one, so names outside the zone fail; name one there, \
                 set it to \"resolv.conf\", or to [] to forward nothing"
                    .to_owned(),
            );
        }
        problems
    }

    /// The version of the plan, which increases with each change.
    pub(super) fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// The current routes.
    pub(super) fn plan(&self) -> Arc<RoutePlan> {
        self.plan.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Applies a change of resolv.conf, which is checked at most ten times a second.
    pub(super) fn refresh(&self, now: Instant) {
        let DefaultUpstreams::ResolvConf(file) = &self.others else { return };
        let now_us = now.saturating_duration_since(self.created).as_micros() as u64;
        let checked_us = self.checked_us.load(Ordering::Relaxed);
        if now_us.saturating_sub(checked_us) < RESOLV_CONF_AGE.as_micros() as u64 {
            return;
        }
        let order = Ordering::Relaxed;
        if self.checked_us.compare_exchange(checked_us, now_us, order, order).is_ok()
            && file.has_changed()
        {
            self.rebuild();
        }
    }

    /// Whether only names of `dns.routes` are forwarded, by the configuration.
    fn forwards_nothing(&self) -> bool {
        matches!(&self.others, DefaultUpstreams::Fixed(servers) if servers.is_empty())
    }

    fn rebuild(&self) {
        let interfaces = Interfaces::read();
        *self.own_problems.write().unwrap_or_else(PoisonError::into_inner) =
            self.own_addresses(&interfaces);
        let route = |domain: &Arc<str>, servers: &[SocketAddr]| {
            let others =
                servers.iter().filter(|server| !is_ourselves(**server, &self.own, &interfaces));
            let suffix = Domain::new(domain);
            let is_in_zone =
                self.zone.as_ref().is_some_and(|zone| suffix.is_within(&Domain::new(zone)));
            let upstreams = others.map(|server| self.registry.get(*server)).collect();
            (suffix, Arc::new(UpstreamRoute { domain: Arc::clone(domain), is_in_zone, upstreams }))
        };
        let others = match &self.others {
            DefaultUpstreams::Fixed(servers) => servers.clone(),
            DefaultUpstreams::ResolvConf(file) => {
                file.servers(|server| !is_ourselves(*server, &self.own, &interfaces)).to_vec()
            }
        };
        let mut routes: Vec<_> =
            self.routes.iter().map(|(domain, server)| route(domain, &[*server])).collect();
        if !self.forwards_nothing() {
            routes.push(route(&Arc::default(), &others));
        }
        routes.sort_by_key(|(suffix, _)| std::cmp::Reverse(suffix.n_labels()));
        if let Some(zone) = &self.zone {
            let suffix = Domain::new(zone);
            // The zone's names go where those around it do, unless it has a route of its own.
            let around = routes.iter().position(|(around, _)| suffix.is_within(around));
            if let Some(around) = around.filter(|around| routes[*around].0 != suffix) {
                let upstreams = routes[around].1.upstreams.clone();
                let domain = Arc::clone(zone);
                let zone = UpstreamRoute { domain, is_in_zone: true, upstreams };
                routes.insert(around, (suffix, Arc::new(zone)));
                routes.sort_by_key(|(suffix, _)| std::cmp::Reverse(suffix.n_labels()));
            }
        }
        let plan = RoutePlan { routes };
        self.registry.keep(&plan);
        *self.plan.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(plan);
        self.version.fetch_add(1, Ordering::Release);
    }
}

/// The addresses at which a server is reached that listens on these: for an unspecified one, all of this
/// host's.
pub fn reached_at(listen: &[SocketAddr]) -> Vec<SocketAddr> {
    let mut all = Vec::new();
    for address in listen {
        if address.ip().is_unspecified() {
            let addresses = Interfaces::read().addresses.into_iter();
            let same_family = addresses.filter(|ip| ip.is_ipv4() || address.is_ipv6());
            all.extend(same_family.map(|ip| SocketAddr::new(ip, address.port())));
        } else {
            all.push(*address);
        }
    }
    all
}

/// What keeps a server with this configuration from forwarding names outside the zone, with the fix.
pub fn upstream_problems(config: &DnsConfig) -> Vec<String> {
    let registry = UpstreamRegistry::default();
    Upstreams::new(config, &config.listen, RESOLV_CONF.into(), registry).problems()
}

/// Whether a query to `server` would arrive at a server that listens on `own`.
pub fn leads_to_own(server: SocketAddr, own: &[SocketAddr]) -> bool {
    is_ourselves(server, own, &Interfaces::read())
}

fn is_ourselves(server: SocketAddr, own: &[SocketAddr], interfaces: &Interfaces) -> bool {
    // The kernel takes "any" as a destination for the loopback address.
    let ip = match server.ip().to_canonical() {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    own.iter().filter(|listener| listener.port() == server.port()).any(|listener| {
        match listener.ip().to_canonical() {
            IpAddr::V4(Ipv4Addr::UNSPECIFIED) => ip.is_ipv4() && interfaces.have(ip),
            IpAddr::V6(Ipv6Addr::UNSPECIFIED) => interfaces.have(ip),
            listener_ip => listener_ip == ip,
        }
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use hickory_proto::rr::Name;
    use hickory_proto::serialize::binary::BinEncodable;

    use super::*;
    use crate::config::Config;

    /// Who is asked for a name: the route's domain, and its servers.
    fn asked(upstreams: &Upstreams, name: &str) -> (String, Vec<SocketAddr>) {
        let wire = Name::from_ascii(name).unwrap().to_bytes().unwrap();
        let plan = upstreams.plan();
        let route = plan.of(&WireName::read(&wire).unwrap()).unwrap();
        let servers = route.upstreams.iter().map(|upstream| upstream.address);
        (route.domain.to_string(), servers.collect())
    }

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
            let own = [address("10.0.0.1:1"), address(listener)];
            let is = is_ourselves(address(server), &own, &Interfaces::read());
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
        let upstreams =
            Upstreams::new(&config, &[own], PathBuf::new(), UpstreamRegistry::default());
        let table = [
            ("web.service.consul.", "127.0.0.1:8600"),
            ("CONSUL.", "127.0.0.1:8600"),
            ("web.service.dc2.consul.", "192.0.2.8:8600"),
            ("notconsul.", "192.0.2.1:53 192.0.2.2:53"),
            (".", "192.0.2.1:53 192.0.2.2:53"),
            ("a.loop.", ""),
        ];
        for (name, expected) in table {
            let (_, servers) = asked(&upstreams, name);
            let shown: Vec<_> = servers.iter().map(ToString::to_string).collect();
            assert_eq!(shown.join(" "), expected, "{name}");
        }

        let paths = upstreams.plan().paths();
        let shown: Vec<_> =
            paths.iter().map(|path| format!("{} {}", path.domain, path.server)).collect();
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
    fn a_forwarded_zone_has_a_path_of_its_own() {
        let shown = |unrouted, domain: &str, routes: &[&str]| {
            let route = |route: &&str| ((*route).to_owned(), address("192.0.2.8:53"));
            let config = DnsConfig {
                domain: domain.into(),
                unrouted,
                forward: Forward::Servers(vec![address("192.0.2.1:53")]),
                routes: routes.iter().map(route).collect(),
                ..Config::default().dns
            };
            let upstreams =
                Upstreams::new(&config, &[], PathBuf::new(), UpstreamRegistry::default());
            let paths = upstreams.plan().paths();
            let (domain, servers) = asked(&upstreams, &format!("unknown.{domain}."));
            let path = UpstreamPath { domain: domain.into(), server: servers[0] };
            assert!(paths.contains(&path), "{path:?}");
            let shown = |path: &UpstreamPath| format!("{} {}", path.domain, path.server.ip());
            (shown(&path), paths.iter().map(shown).collect::<Vec<_>>().join(", "))
        };
        let rows: [(Unrouted, &str, &[&str], &str, &str); 4] = [
            (Unrouted::Nxdomain, "lb", &[], " 192.0.2.1", " 192.0.2.1"),
            (Unrouted::Forward, "lb", &[], "lb 192.0.2.1", "lb 192.0.2.1,  192.0.2.1"),
            (
                Unrouted::Forward,
                "lb.example",
                &["example"],
                "lb.example 192.0.2.8",
                "lb.example 192.0.2.8, example 192.0.2.8,  192.0.2.1",
            ),
            (Unrouted::Forward, "lb", &["lb"], "lb 192.0.2.8", "lb 192.0.2.8,  192.0.2.1"),
        ];
        for (unrouted, domain, routes, path, paths) in rows {
            let expected = (path.to_owned(), paths.to_owned());
            assert_eq!(shown(unrouted, domain, routes), expected, "{domain} {routes:?}");
        }
    }
}

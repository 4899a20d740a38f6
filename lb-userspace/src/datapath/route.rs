//! The route that keeps a VIP from reaching anything where no hook translates it.
//!
//! Without it, 127.128.0.1 is as much this host as 127.0.0.1 is, and a server on 0.0.0.0:80 accepts
//! a connection to it. An IPv6 VIP would leave by the default route. Hooked connections are
//! rewritten before the kernel looks for a route.
//!
//! The kernel answers EEXIST to a second route of the same destination and metric, whatever its
//! type. So the existing routes are read: one of another type in its place, and more specific ones,
//! let VIPs reach something. So do rules that come before that of the table `local`, which is the first
//! unless somebody moved it: the kernel is asked where addresses of the pool lead.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::TryStreamExt;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteType,
};
use rtnetlink::packet_route::rule::{RuleAttribute, RuleMessage};
use rtnetlink::{Handle, IpVersion, RouteMessageBuilder};

/// Why the route couldn't be changed.
#[derive(Debug, thiserror::Error)]
pub enum RouteError {
    /// No netlink socket.
    #[error("can't open a netlink socket: {0}")]
    Socket(#[source] std::io::Error),
    /// The kernel refused.
    #[error(
        "can't {action} the route `unreachable {pool}`: {source}; run as root, or with CAP_NET_ADMIN"
    )]
    Refused {
        /// `add` or `remove`.
        action: &'static str,
        /// The destination.
        pool: IpNet,
        /// The kernel's error.
        source: Box<rtnetlink::Error>,
    },
    /// The routes couldn't be read.
    #[error("can't read the routes: {0}")]
    Unreadable(#[source] Box<rtnetlink::Error>),
    /// Another route is in its place.
    #[error(
        "the route `{route}` is in the place of `unreachable {pool} table local`, so where no hook \
         runs a VIP would reach it; remove it: {}", route.removal()
    )]
    Taken {
        /// The destination.
        pool: IpNet,
        /// The other route.
        route: Route,
    },
}

/// A route of the table `local`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    kind: Kind,
    destination: IpNet,
    metric: u32,
}

/// The type of a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// They reach something; as `ip route` names the type.
    Reaching(&'static str),
    /// They are refused, with whatever error.
    Refusing(&'static str),
    /// Those that no connection goes by.
    Ignored,
}

impl Kind {
    fn of(kind: RouteType) -> Kind {
        match kind {
            RouteType::Unreachable => Kind::Refusing("unreachable"),
            RouteType::BlackHole => Kind::Refusing("blackhole"),
            RouteType::Prohibit => Kind::Refusing("prohibit"),
            RouteType::Local => Kind::Reaching("local"),
            RouteType::Unicast => Kind::Reaching("unicast"),
            RouteType::Nat => Kind::Reaching("nat"),
            // The answer continues with the next table.
            RouteType::Throw => Kind::Reaching("throw"),
            _ => Kind::Ignored,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Kind::Reaching(name) | Kind::Refusing(name) => name,
            Kind::Ignored => "",
        }
    }
}

impl Route {
    fn of(message: &RouteMessage) -> Option<Route> {
        let table = u32::from(message.header.table);
        let mut found = (None, 0, table);
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Destination(RouteAddress::Inet(address)) => {
                    found.0 = Some(IpAddr::V4(*address));
                }
                RouteAttribute::Destination(RouteAddress::Inet6(address)) => {
                    found.0 = Some(IpAddr::V6(*address));
                }
                RouteAttribute::Priority(metric) => found.1 = *metric,
                RouteAttribute::Table(table) => found.2 = *table,
                _ => {}
            }
        }
        // A default route has no destination, and is never more specific than the pool.
        let (Some(address), metric, table) = found else { return None };
        let destination = IpNet::new(address, message.header.destination_prefix_length).ok()?;
        let kind = Kind::of(message.header.kind);
        (table == u32::from(libc::RT_TABLE_LOCAL)).then_some(Route { kind, destination, metric })
    }

    /// The command that removes it.
    pub fn removal(&self) -> String {
        let Route { destination, metric, .. } = self;
        let (family, kind) = (if is_v6(destination) { "-6 " } else { "" }, self.kind.name());
        let metric = if *metric == 0 { String::new() } else { format!(" metric {metric}") };
        let remove = format!("ip {family}route del {kind} {destination}{metric} table local");
        let is_address = destination.prefix_len() == destination.max_prefix_len();
        if kind == "local" && is_address {
            let address = destination.addr();
            return format!("{remove} (or the address itself: ip addr show to {address})");
        }
        remove
    }
}

fn is_v6(net: &IpNet) -> bool {
    matches!(net, IpNet::V6(_))
}

/// As `ip route` has it.
impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} table local", self.kind.name(), self.destination)
    }
}

/// The problems of a pool's routes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Judged {
    /// The route in the place of the unreachable one.
    in_place: Option<Route>,
    /// More specific routes that reach something.
    holes: Vec<Route>,
}

/// Judges the routes of the table `local`.
fn judge(pool: IpNet, routes: &[Route]) -> Judged {
    let reaches = |route: &&Route| matches!(route.kind, Kind::Reaching(_));
    let here = routes.iter().filter(|route| route.destination == pool);
    let first = here.min_by_key(|route| route.metric).filter(reaches).copied();
    let is_within = |route: &&Route| {
        pool.contains(&route.destination) && route.destination.prefix_len() > pool.prefix_len()
    };
    let holes = routes.iter().filter(is_within).filter(reaches).copied().collect();
    Judged { in_place: first, holes }
}

/// Whether the table `local` has a route that refuses `pool` as a whole.
fn is_refused(pool: IpNet, routes: &[Route]) -> bool {
    let refuses = |route: &Route| matches!(route.kind, Kind::Refusing(_));
    routes.iter().any(|route| route.destination == pool && refuses(route))
}

/// Makes `pool` unreachable in this network namespace. Returns whether the route had to be added.
///
/// # Errors
/// When the kernel refuses, or another route is in its place.
pub async fn add_unreachable(pool: IpNet) -> Result<bool, RouteError> {
    with_handle(async |handle| {
        let added = handle.route().add(message(pool)).execute().await;
        let added = tolerate(added, libc::EEXIST, "add", pool)?;
        match judge(pool, &local_routes(&handle, pool).await?).in_place {
            Some(route) => Err(RouteError::Taken { pool, route }),
            None => Ok(added),
        }
    })
    .await
}

/// The routes that an earlier configuration left: unreachable ones as [`add_unreachable`] adds them, of
/// other pools than these. Only of loopback and unique local addresses: others may be an administrator's.
///
/// # Errors
/// When the routes can't be read.
pub async fn former(pools: &[IpNet]) -> Result<Vec<Route>, RouteError> {
    with_handle(async |handle| {
        let mut found = Vec::new();
        for range in [LOOPBACK, UNIQUE_LOCAL] {
            let routes = local_messages(&handle, range).await?;
            found.extend(routes.iter().filter_map(|route| former_route(route, pools)));
        }
        Ok(found)
    })
    .await
}

const LOOPBACK: IpNet = IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8));
const UNIQUE_LOCAL: IpNet =
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0), 7));

fn former_route(message: &RouteMessage, pools: &[IpNet]) -> Option<Route> {
    let RouteHeader { kind, protocol, .. } = message.header;
    if kind != RouteType::Unreachable || protocol != RouteProtocol::Static {
        return None;
    }
    let is_former = |route: &Route| {
        let ranges = [LOOPBACK, UNIQUE_LOCAL];
        ranges.iter().any(|range| range.contains(&route.destination))
            && !pools.contains(&route.destination)
    };
    Route::of(message).filter(is_former)
}

/// Removes the route again. Returns whether it was there.
///
/// # Errors
/// When the kernel refuses.
pub async fn remove_unreachable(pool: IpNet) -> Result<bool, RouteError> {
    with_handle(async |handle| {
        tolerate(handle.route().del(message(pool)).execute().await, libc::ESRCH, "remove", pool)
    })
    .await
}

/// Routes that let addresses of `pool` reach something where no hook runs, each with the fix.
///
/// # Errors
/// When the routes can't be read.
pub async fn holes(pool: IpNet) -> Result<Vec<String>, RouteError> {
    let (routes, by_rule) = with_handle(async |handle| {
        let routes = local_routes(&handle, pool).await?;
        // Without it (no daemon has run yet) the pool leads where all of 127.0.0.0/8 does.
        let by_rule = match is_refused(pool, &routes) {
            true => led_by_rule(&handle, pool).await?,
            false => None,
        };
        Ok((routes, by_rule))
    })
    .await?;
    let Judged { in_place, holes } = judge(pool, &routes);
    let line = |route: Route| {
        format!(
            "the route `{route}` lets addresses of {pool} reach it where no hook runs; remove it: {}",
            route.removal()
        )
    };
    let mut lines: Vec<String> = in_place.into_iter().chain(holes).map(line).collect();
    // A route above leads it there as well.
    if let Some(address) = by_rule.filter(|_| lines.is_empty()) {
        let family = if is_v6(&pool) { "-6 " } else { "" };
        lines.push(format!(
            "a rule that comes before the table local lets addresses of {pool} reach something where no \
             hook runs ({address} has a route); see ip {family}rule, and have the rule `lookup local` come \
             first: ip {family}rule add pref 0 lookup local"
        ));
    }
    Ok(lines)
}

/// An address of `pool` that the host's rules lead somewhere, whatever the table `local` has: the first one of
/// the pool, and of each part of it that a rule names.
async fn led_by_rule(handle: &Handle, pool: IpNet) -> Result<Option<IpAddr>, RouteError> {
    let unreadable = |error| RouteError::Unreadable(Box::new(error));
    let version = if is_v6(&pool) { IpVersion::V6 } else { IpVersion::V4 };
    let rules: Vec<RuleMessage> = match handle.rule().get(version).execute().try_collect().await {
        // This kernel has no rules, of this family or any (CONFIG_IP_MULTIPLE_TABLES).
        Err(rtnetlink::Error::NetlinkError(message))
            if [-libc::EAFNOSUPPORT, -libc::EOPNOTSUPP].contains(&message.raw_code()) =>
        {
            return Ok(None);
        }
        rules => rules.map_err(unreadable)?,
    };
    let named = rules.iter().filter_map(|rule| destination(rule, pool));
    let samples: BTreeSet<IpAddr> = [pool.network()].into_iter().chain(named).collect();
    for address in samples {
        let question = match address {
            IpAddr::V4(address) => {
                RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(address, 32).build()
            }
            IpAddr::V6(address) => {
                RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(address, 128).build()
            }
        };
        let mut answer = std::pin::pin!(handle.route().get(question).execute());
        // An error is how the kernel reports an IPv4 route that refuses.
        let route = answer.try_next().await.ok().flatten();
        if route.is_some_and(|route| matches!(Kind::of(route.header.kind), Kind::Reaching(_))) {
            return Ok(Some(address));
        }
    }
    Ok(None)
}

/// The first address of the part of `pool` that a rule is for by its destination.
fn destination(rule: &RuleMessage, pool: IpNet) -> Option<IpAddr> {
    let address = rule.attributes.iter().find_map(|attribute| match attribute {
        RuleAttribute::Destination(address) => Some(*address),
        _ => None,
    })?;
    let named = IpNet::new(address, rule.header.dst_len).ok()?.trunc();
    pool.contains(&named).then(|| named.network())
}

async fn local_routes(handle: &Handle, pool: IpNet) -> Result<Vec<Route>, RouteError> {
    Ok(local_messages(handle, pool).await?.iter().filter_map(Route::of).collect())
}

/// The routes of all tables, of the family of `pool`.
async fn local_messages(handle: &Handle, pool: IpNet) -> Result<Vec<RouteMessage>, RouteError> {
    let all = match pool {
        IpNet::V4(_) => RouteMessageBuilder::<Ipv4Addr>::new().build(),
        IpNet::V6(_) => RouteMessageBuilder::<Ipv6Addr>::new().build(),
    };
    let unreadable = |error| RouteError::Unreadable(Box::new(error));
    handle.route().get(all).execute().try_collect().await.map_err(unreadable)
}

/// Does `work` over a netlink socket of its own.
pub(super) async fn with_handle<T>(
    work: impl AsyncFnOnce(Handle) -> Result<T, RouteError>,
) -> Result<T, RouteError> {
    let (connection, handle, _) = rtnetlink::new_connection().map_err(RouteError::Socket)?;
    let connection = tokio::spawn(connection);
    let result = work(handle).await;
    connection.abort();
    result
}
fn message(pool: IpNet) -> RouteMessage {
    match pool {
        IpNet::V4(pool) => RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(pool.network(), pool.prefix_len())
            .table_id(libc::RT_TABLE_LOCAL.into())
            .kind(RouteType::Unreachable)
            .build(),
        IpNet::V6(pool) => RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(pool.network(), pool.prefix_len())
            .table_id(libc::RT_TABLE_LOCAL.into())
            .kind(RouteType::Unreachable)
            .build(),
    }
}

/// Whether a change was made; an error of `errno` means that nothing had to be.
pub(super) fn tolerate(
    result: Result<(), rtnetlink::Error>,
    errno: i32,
    action: &'static str,
    pool: IpNet,
) -> Result<bool, RouteError> {
    match result {
        Err(rtnetlink::Error::NetlinkError(message)) if message.raw_code() == -errno => Ok(false),
        Err(source) => Err(RouteError::Refused { action, pool, source: Box::new(source) }),
        Ok(()) => Ok(true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(kind: RouteType, destination: &str, metric: u32) -> Route {
        Route { kind: Kind::of(kind), destination: destination.parse().unwrap(), metric }
    }

    #[test]
    fn what_lets_vips_reach_something() {
        use RouteType::*;
        let (pool, pool6) = ("127.128.0.0/9", "fd77::/64");
        let ours = route(Unreachable, pool, 0);
        // Routes; which of them is in the place of ours, and which are holes in it.
        type Row<'a> = (&'a str, &'a [Route], Option<usize>, &'a [usize]);
        let rows: [Row<'_>; 10] = [
            (pool, &[], None, &[]),
            (pool, &[ours, route(Local, "127.0.0.0/8", 0)], None, &[]),
            (pool, &[route(Local, pool, 0)], Some(0), &[]),
            (pool, &[ours, route(Local, pool, 5)], None, &[]),
            (pool, &[route(Unreachable, pool, 5), route(Throw, pool, 0)], Some(1), &[]),
            (pool, &[route(BlackHole, pool, 0), route(Prohibit, "127.130.0.0/16", 0)], None, &[]),
            (pool, &[ours, route(Local, "127.128.0.5/32", 0)], None, &[1]),
            (pool, &[ours, route(Unicast, "127.200.0.0/16", 7)], None, &[1]),
            (pool, &[ours, route(Broadcast, "127.255.255.255/32", 0)], None, &[]),
            (pool6, &[route(Unreachable, pool6, 1024), route(Local, pool6, 0)], Some(1), &[]),
        ];
        for (pool, routes, in_place, holes) in rows {
            let expected = Judged {
                in_place: in_place.map(|at| routes[at]),
                holes: holes.iter().map(|&at| routes[at]).collect(),
            };
            assert_eq!(judge(pool.parse().unwrap(), routes), expected, "{routes:?}");
        }
    }

    #[test]
    fn rules_count_where_the_pool_is_refused() {
        use RouteType::*;
        let pool = "127.128.0.0/9";
        for (routes, expected) in [
            (&[][..], false),
            (&[route(Local, "127.0.0.0/8", 0)], false),
            (&[route(Unreachable, "127.200.0.0/16", 0)], false),
            (&[route(Local, "127.0.0.0/8", 0), route(Unreachable, pool, 0)], true),
        ] {
            assert_eq!(is_refused(pool.parse().unwrap(), routes), expected, "{routes:?}");
        }
    }

    #[test]
    fn rules_for_a_part_of_the_pool_are_followed() {
        let pool: IpNet = "127.128.0.0/9".parse().unwrap();
        for (named, expected) in [
            (Some("127.200.7.9/16"), Some("127.200.0.0")),
            (Some("127.128.0.0/9"), Some("127.128.0.0")),
            (Some("127.255.0.1/32"), Some("127.255.0.1")),
            (Some("127.0.0.0/8"), None),
            (Some("10.0.0.0/8"), None),
            (Some("fd00::/8"), None),
            (None, None),
        ] {
            let mut rule = RuleMessage::default();
            if let Some(named) = named {
                let named: IpNet = named.parse().unwrap();
                rule.header.dst_len = named.prefix_len();
                rule.attributes.push(RuleAttribute::Destination(named.addr()));
            }
            let expected = expected.map(|address| address.parse().unwrap());
            assert_eq!(destination(&rule, pool), expected, "{named:?}");
        }
    }

    #[test]
    fn routes_of_former_pools_are_recognized() {
        let pools: [IpNet; 2] = ["127.64.0.0/10", "fd00:1::/96"].map(|pool| pool.parse().unwrap());
        let removal = |message: &RouteMessage| former_route(message, &pools).map(|it| it.removal());
        let ours = |pool: &str| message(pool.parse().unwrap());
        let v4 = "ip route del unreachable 127.128.0.0/9 table local";
        assert_eq!(removal(&ours("127.128.0.0/9")).as_deref(), Some(v4));
        let v6 = "ip -6 route del unreachable fd00:2::/96 table local";
        assert_eq!(removal(&ours("fd00:2::/96")).as_deref(), Some(v6));
        let mut others = [ours("127.128.0.0/9"), ours("127.128.0.0/9")];
        others[0].header.kind = RouteType::BlackHole;
        others[1].header.protocol = RouteProtocol::Kernel;
        let others = others.into_iter().chain(["127.64.0.0/10", "10.1.0.0/16"].map(ours));
        assert!(others.into_iter().all(|other| removal(&other).is_none()));
    }

    #[test]
    fn the_fix_is_named() {
        let table = [
            (
                route(RouteType::Local, "127.128.0.0/9", 0),
                "ip route del local 127.128.0.0/9 table local",
            ),
            (
                route(RouteType::Unicast, "fd77::/64", 1024),
                "ip -6 route del unicast fd77::/64 metric 1024 table local",
            ),
            (
                route(RouteType::Local, "127.128.0.5/32", 0),
                "ip route del local 127.128.0.5/32 table local (or the address itself: ip addr \
                 show to 127.128.0.5)",
            ),
        ];
        for (route, expected) in table {
            assert_eq!(route.removal(), expected);
        }
    }
}

//! The edge: what the datapath is configured to do, and whether public VIPs are announced.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::timers::ticks;
use crate::admin::api;
use crate::config::{Config, FlowTimeouts};
use crate::counted::counted;
use crate::datapath::{
    EdgeFlow, EdgeInterface, EdgeOptions, EdgeStatus, EdgeTimeouts, Mode, SharedDatapath,
    public_routes,
};
use crate::table::{DrainTarget, Drains, Table};

/// How often the routes are compared with what is to be announced.
const TICK: Duration = Duration::from_secs(1);

/// What the datapath is to do; `None` where this node is no edge.
pub fn options(config: &Config) -> Option<EdgeOptions> {
    let edge = &config.edge;
    let &FlowTimeouts { established, half_closed, closed, udp } = &edge.timeouts;
    edge.is_on().then(|| EdgeOptions {
        interfaces: edge.interfaces.clone(),
        networks: config.vip.public.clone(),
        sources: edge.source.clone(),
        max_flows: edge.max_flows,
        timeouts: EdgeTimeouts { established, half_closed, closed, udp },
        client_address: edge.client_address.clone(),
    })
}

/// Whether clients outside are to come to this edge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Announcement {
    /// They are: these are its public VIPs.
    Announce(BTreeSet<IpAddr>),
    /// Those of these are; of others, of another address family, they aren't, for this reason.
    Partly(BTreeSet<IpAddr>, String),
    /// It isn't known yet: what an earlier daemon announced stays, since the kernel keeps working.
    Unknown(String),
    /// They aren't, for this reason.
    Withdraw(String),
}

impl Announcement {
    /// By the table, the unit's state, what is drained, and what connections get on this node.
    pub fn of(table: &Table, edge: &EdgeStatus, drains: &Drains, mode: &Mode) -> Announcement {
        if let Some(drain) = drains.get(&DrainTarget::Edge) {
            return Announcement::Withdraw(format!(
                "this edge is drained by hand since {}",
                drain.since_text()
            ));
        }
        if let Mode::Shadow { why } = mode {
            return Announcement::Withdraw(format!("this node is in shadow mode: {why}"));
        }
        if let Some(interface) = edge.interfaces.iter().find(|interface| interface.mode.is_none()) {
            let why = interface.message.as_deref().unwrap_or("the reason isn't known");
            return Announcement::Withdraw(format!(
                "the programs aren't attached to {}: {why}",
                interface.name
            ));
        }
        let is_served = |address: &IpAddr| {
            let family = usize::from(address.is_ipv6());
            edge.forwards[family] && !matches!(edge.proofs[family], Some(Err(_)))
        };
        let disproof = edge.proof().and_then(Result::err);
        let problem = edge.problems.first().map(String::as_str).or(disproof);
        if let Some(problem) = problem.filter(|_| !edge.sources.iter().any(is_served)) {
            return Announcement::Withdraw(problem.to_owned());
        }
        if drains.is_incomplete() {
            let why = "what is drained isn't read from the state directory yet";
            return Announcement::Unknown(why.to_owned());
        }
        if !table.is_synced() {
            return Announcement::Unknown("discovery has not reported in full yet".to_owned());
        }
        let public = table.services.values().flat_map(|service| &service.public);
        let addresses = public.map(SocketAddr::ip).filter(|address| has_source(edge, address));
        let (served, others): (BTreeSet<_>, BTreeSet<_>) = addresses.partition(is_served);
        match problem.filter(|_| !others.is_empty()) {
            None => Announcement::Announce(served),
            Some(problem) => Announcement::Partly(served, problem.to_owned()),
        }
    }

    /// Why clients aren't to come; `None` where they are.
    pub fn obstacle(&self) -> Option<&str> {
        match self {
            Announcement::Announce(_) => None,
            Announcement::Partly(_, why)
            | Announcement::Unknown(why)
            | Announcement::Withdraw(why) => Some(why),
        }
    }

    /// Why this edge isn't to have traffic; `None` where it is. As long as nothing is known, it keeps what it had: an
    /// earlier daemon announced what these routes show.
    pub fn unready(&self, routes: &PublicRoutes) -> Option<&str> {
        match self {
            Announcement::Unknown(_) if !routes.announced.is_empty() => None,
            _ => self.obstacle(),
        }
    }
}

/// Whether the edge has an address of the family of a VIP: flows aren't translated between families.
fn has_source(edge: &EdgeStatus, vip: &IpAddr) -> bool {
    edge.sources.iter().any(|source| source.is_ipv4() == vip.is_ipv4())
}

/// The routes of public VIPs as they are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PublicRoutes {
    /// The addresses that have one.
    pub announced: BTreeSet<IpAddr>,
    /// Why they aren't as they should be.
    pub problem: Option<String>,
}

/// What the task follows.
pub struct FollowedEdge {
    /// The published tables.
    pub table: watch::Receiver<Arc<Table>>,
    /// What is drained.
    pub drains: watch::Receiver<Arc<Drains>>,
    /// The datapath.
    pub datapath: Arc<SharedDatapath>,
    /// What it has made of the routes.
    pub routes: watch::Sender<PublicRoutes>,
}

/// Keeps the routes of public VIPs as they are to be, for as long as the daemon lives. Where this node is no
/// edge (any more), none is left.
pub async fn follow(mut followed: FollowedEdge) {
    let mut ticks = ticks(TICK, Duration::ZERO);
    let mut was_edge = true;
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            Ok(()) = followed.table.changed() => {}
            // First of all at a drain.
            Ok(()) = followed.drains.changed() => {}
        }
        let datapath = followed.datapath.clone();
        let read = move || (datapath.edge_status(), datapath.mode());
        let Ok((edge, mode)) = tokio::task::spawn_blocking(read).await else { continue };
        let is_edge = edge.is_some();
        if !is_edge && !was_edge {
            continue;
        }
        let wanted = match edge {
            None => Announcement::Withdraw("this node is no edge".to_owned()),
            Some(edge) => {
                let table = followed.table.borrow_and_update().clone();
                let drains = followed.drains.borrow_and_update().clone();
                Announcement::of(&table, &edge, &drains, &mode)
            }
        };
        let none = BTreeSet::new();
        let addresses = match &wanted {
            Announcement::Announce(addresses) | Announcement::Partly(addresses, _) => {
                Some(addresses)
            }
            Announcement::Withdraw(_) => Some(&none),
            Announcement::Unknown(_) => None,
        };
        let result = match addresses {
            Some(addresses) => {
                let changed = public_routes::announce(addresses).await;
                changed.map(|(added, removed)| (addresses.clone(), added, removed))
            }
            None => public_routes::announced().await.map(|there| (there, Vec::new(), Vec::new())),
        };
        let routes = match result {
            Ok((announced, added, removed)) => {
                was_edge = is_edge;
                let why = wanted.obstacle().unwrap_or("no service has them any more");
                if !removed.is_empty() {
                    tracing::info!("public VIPs {removed:?} aren't announced any more: {why}");
                }
                if !added.is_empty() {
                    tracing::info!("public VIPs {added:?} are announced by a route each");
                }
                PublicRoutes { announced, problem: None }
            }
            // A node that is no edge needs no right to its routes.
            Err(_) if !is_edge => {
                was_edge = false;
                PublicRoutes::default()
            }
            Err(error) => PublicRoutes {
                problem: Some(format!("edge: {error}")),
                ..followed.routes.borrow().clone()
            },
        };
        followed.routes.send_if_modified(|last| {
            let differs = *last != routes;
            *last = routes;
            differs
        });
    }
}

/// Removes the routes of public VIPs, before the programs are detached.
pub async fn withdraw() {
    if let Err(error) = public_routes::announce(&BTreeSet::new()).await {
        tracing::warn!("edge: {error}");
    }
}

/// The names in the configuration that are no service's: those of public VIPs, and of `edge.client_address`.
pub fn names_of_none(
    vips: &BTreeMap<String, SocketAddr>,
    edge: Option<&EdgeStatus>,
    table: &Table,
) -> Vec<String> {
    let is_of_none = |name: &str| !table.services.contains_key(name);
    let fix = "which is no service here: correct the name, or register the service";
    let vips = vips.iter().filter(|(name, _)| is_of_none(name));
    let vips = vips.map(|(name, vip)| format!("edge.vips: {vip} is of `{name}`, {fix}"));
    let shown = edge.iter().flat_map(|edge| &edge.client_address);
    let shown = shown.filter(|name| is_of_none(name));
    let shown = shown.map(|name| format!("edge.client_address: it has `{name}`, {fix}"));
    // Before the first table no service is known.
    if table.is_synced() { vips.chain(shown).collect() } else { Vec::new() }
}

/// The public VIPs that this edge doesn't announce because it has no source address of their family.
pub fn vips_without_source(edge: &EdgeStatus, table: &Table) -> Option<String> {
    let public = table.services.values().flat_map(|service| &service.public);
    let vips: BTreeSet<IpAddr> =
        public.map(SocketAddr::ip).filter(|vip| !has_source(edge, vip)).collect();
    let first = vips.first()?;
    let (n, family) = (vips.len(), if first.is_ipv4() { "IPv4" } else { "IPv6" });
    Some(format!(
        "edge.source has no {family} address for {}, such as {first}, so that this edge announces none of \
         them: add one of this host",
        counted(n, "public VIP")
    ))
}

/// As the status shows it.
pub fn document(
    edge: &EdgeStatus,
    announcement: &Announcement,
    routes: &PublicRoutes,
    packets: Vec<(&'static str, u64)>,
) -> api::EdgeDocument {
    let interface = |one: &EdgeInterface| api::EdgeInterfaceDocument {
        name: one.name.clone(),
        mode: one.mode.map(|mode| mode.name().to_owned()),
        message: one.message.clone(),
    };
    api::EdgeDocument {
        interfaces: edge.interfaces.iter().map(interface).collect(),
        proof: edge.proof().map(|proof| match proof {
            Ok(()) => "passed".to_owned(),
            Err(why) => why.to_owned(),
        }),
        flows: edge.n_flows.into(),
        capacity: edge.max_flows.into(),
        announced: routes.announced.iter().copied().collect(),
        withdrawn: announcement.obstacle().map(str::to_owned),
        client_address: edge.client_address.clone(),
        packets: packets.into_iter().map(|(name, n)| (name.to_owned(), n)).collect(),
    }
}

/// A part of the flows, by bytes or by the time of their last packet.
pub fn flows(mut all: Vec<EdgeFlow>, by_bytes: bool, limit: usize) -> api::FlowsDocument {
    let total = all.len() as u64;
    match by_bytes {
        true => all.sort_by_key(|flow| std::cmp::Reverse(flow.bytes)),
        false => all.sort_by_key(|flow| flow.idle),
    }
    all.truncate(limit);
    let flow = |flow: EdgeFlow| api::FlowDocument {
        service: flow.service.map(|name| name.to_string()),
        client: flow.client,
        vip: flow.vip,
        backend: flow.backend,
        source: flow.source,
        protocol: match flow.protocol {
            6 => "tcp".to_owned(),
            17 => "udp".to_owned(),
            other => other.to_string(),
        },
        state: flow.state.name().to_owned(),
        packets: flow.packets,
        bytes: flow.bytes,
        age_seconds: flow.age.as_secs_f64(),
        idle_seconds: flow.idle.as_secs_f64(),
    };
    api::FlowsDocument { total, flows: all.into_iter().map(flow).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::{EdgeFlowState, EdgeInterface, EdgeMode};
    use crate::table::{Drain, Service};

    fn status(mode: Option<EdgeMode>) -> EdgeStatus {
        let message = mode.is_none().then(|| "no such interface".to_owned());
        let interface = EdgeInterface { name: "eth0".to_owned(), mode, message };
        EdgeStatus {
            interfaces: vec![interface],
            sources: vec!["10.0.0.2".parse().unwrap()],
            client_address: Vec::new(),
            n_flows: 0,
            max_flows: 8,
            problems: Vec::new(),
            forwards: [true; 2],
            proofs: Default::default(),
        }
    }

    #[test]
    fn public_vips_are_announced_while_the_edge_can_serve_them() {
        let (attached, detached) = (status(Some(EdgeMode::Tcx)), status(None));
        let (new, synced) = (Table::default(), Table { generation: 1, ..Table::default() });
        let unread = Drains::incomplete();
        let problems = vec!["no".to_owned()];
        let no_forwarding = EdgeStatus { problems, forwards: [false, true], ..attached.clone() };
        let no_ipv6 = EdgeStatus { forwards: [true, false], ..no_forwarding.clone() };
        let failed = || Some(Err("why".to_owned()));
        let disproved = EdgeStatus { proofs: [failed(), None], ..attached.clone() };
        let disproved6 = EdgeStatus { proofs: [Some(Ok(())), failed()], ..attached.clone() };
        let (none, mut drained) = (Drains::default(), Drains::default());
        let drain = Drain { since: 0, boottime_ms: 0 };
        drained.add(DrainTarget::Edge, drain).unwrap();
        let rows = [
            (&synced, &attached, &none, Announcement::Announce(BTreeSet::new())),
            (
                &new,
                &attached,
                &none,
                Announcement::Unknown("discovery has not reported in full yet".to_owned()),
            ),
            (
                &synced,
                &detached,
                &none,
                Announcement::Withdraw(
                    "the programs aren't attached to eth0: no such interface".to_owned(),
                ),
            ),
            (&synced, &disproved, &none, Announcement::Withdraw("why".to_owned())),
            (&synced, &no_forwarding, &none, Announcement::Withdraw("no".to_owned())),
            // VIPs of the other family aren't concerned.
            (&synced, &disproved6, &none, Announcement::Announce(BTreeSet::new())),
            (&synced, &no_ipv6, &none, Announcement::Announce(BTreeSet::new())),
            (
                &synced,
                &attached,
                &unread,
                Announcement::Unknown(
                    "what is drained isn't read from the state directory yet".to_owned(),
                ),
            ),
            (
                &synced,
                &attached,
                &drained,
                Announcement::Withdraw(
                    "this edge is drained by hand since 1970-01-01T00:00:00Z".to_owned(),
                ),
            ),
        ];
        for (table, edge, drains, expected) in rows {
            assert_eq!(Announcement::of(table, edge, drains, &Mode::Translate), expected);
        }
        let shadow = Mode::Shadow { why: "nohop/off is set".to_owned() };
        let expected = "this node is in shadow mode: nohop/off is set".to_owned();
        let announcement = Announcement::of(&synced, &attached, &none, &shadow);
        assert_eq!(announcement, Announcement::Withdraw(expected));
    }

    #[test]
    fn a_restart_leaves_an_edge_ready() {
        let (none, one) = (BTreeSet::new(), BTreeSet::from(["203.0.113.10".parse().unwrap()]));
        let [none, one] = [none, one].map(|announced| PublicRoutes { announced, problem: None });
        let unknown = Announcement::Unknown("not yet".to_owned());
        assert_eq!((unknown.unready(&none), unknown.unready(&one)), (Some("not yet"), None));
        let withdraw = Announcement::Withdraw("drained".to_owned());
        assert_eq!(withdraw.unready(&one), Some("drained"));
    }

    #[test]
    fn vips_of_a_family_without_a_source_are_not_announced() {
        let public = vec!["203.0.113.10:80".parse().unwrap(), "[2001:db8::1]:80".parse().unwrap()];
        let web = Service { public, ..Service::example(Vec::new()) };
        let services = [("web".into(), Arc::new(web))].into_iter().collect();
        let table = Table { generation: 1, services, ..Table::default() };
        let edge = status(Some(EdgeMode::Tcx));
        let announcement = Announcement::of(&table, &edge, &Drains::default(), &Mode::Translate);
        let four = BTreeSet::from(["203.0.113.10".parse().unwrap()]);
        assert_eq!(announcement, Announcement::Announce(four.clone()));
        // With one, but without forwarding, those of the other family are still announced.
        let both = EdgeStatus {
            sources: vec!["10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap()],
            problems: vec!["net.ipv6...".to_owned()],
            forwards: [true, false],
            ..edge.clone()
        };
        let disproved = EdgeStatus {
            problems: Vec::new(),
            forwards: [true; 2],
            proofs: [Some(Ok(())), Some(Err("a proof...".to_owned()))],
            ..both.clone()
        };
        for (edge, why) in [(both, "net.ipv6..."), (disproved, "a proof...")] {
            let announcement =
                Announcement::of(&table, &edge, &Drains::default(), &Mode::Translate);
            let partly = Announcement::Partly(four.clone(), why.to_owned());
            assert_eq!((announcement.obstacle(), &announcement), (Some(why), &partly));
        }
        let problem = vips_without_source(&edge, &table).unwrap();
        assert!(
            problem.contains("no IPv6 address for 1 public VIP, such as 2001:db8::1,"),
            "{problem}"
        );
    }

    #[test]
    fn a_name_of_no_service_is_a_problem() {
        let vips = [("web".to_owned(), "203.0.113.10:80".parse().unwrap())].into();
        let client_address = vec!["api".to_owned()];
        let edge = EdgeStatus { client_address, ..status(Some(EdgeMode::Tcx)) };
        assert!(names_of_none(&vips, Some(&edge), &Table::default()).is_empty());
        let synced = Table { generation: 1, ..Table::default() };
        let problems = names_of_none(&vips, Some(&edge), &synced);
        assert!(problems[0].starts_with("edge.vips: 203.0.113.10:80 is of `web`"), "{problems:?}");
        assert!(
            problems[1].starts_with("edge.client_address: it has `api`, which"),
            "{problems:?}"
        );
    }

    #[test]
    fn flows_are_shown_by_their_last_packet_or_by_their_bytes() {
        let flow = |port: u16, bytes, idle| EdgeFlow {
            service: Some("web".into()),
            client: ([198, 51, 100, 1], port).into(),
            vip: ([203, 0, 113, 10], 80).into(),
            backend: ([10, 0, 0, 7], 8080).into(),
            source: ([10, 0, 0, 2], port).into(),
            protocol: 6,
            state: EdgeFlowState::Established,
            packets: 1,
            bytes,
            age: Duration::from_secs(9),
            idle: Duration::from_secs(idle),
        };
        let all = vec![flow(1, 10, 5), flow(2, 30, 7), flow(3, 20, 1)];
        let ports = |document: api::FlowsDocument| {
            assert_eq!(document.total, 3);
            document.flows.iter().map(|flow| flow.client.port()).collect::<Vec<_>>()
        };
        assert_eq!(ports(flows(all.clone(), false, 9)), [3, 1, 2]);
        assert_eq!(ports(flows(all.clone(), true, 2)), [2, 3]);
        let shown = flows(all, true, 1).flows.remove(0);
        assert_eq!((&*shown.protocol, &*shown.state), ("tcp", "established"));
    }
}

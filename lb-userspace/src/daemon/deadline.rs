//! `balance.drain_deadline`: connections to a backend that left a service may stay open until then, and
//! are closed after it.
//!
//! A task of its own follows the published tables, and walks over the host's sockets on a thread: the
//! loop that carries changes to the kernel waits for neither.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::boot;
use crate::counted::counted;
use crate::datapath::{Mode, SharedDatapath, TcpTerminator, VipConnection, VipConnections};
use crate::ordmap::Diff;
use crate::table::{Backend, Drains, Excluded, Service, Table, Watch};

/// How long after a walk over the sockets the next one begins: one may miss a connection that was being
/// made.
const AGAIN: Duration = Duration::from_secs(1);

/// How long after one that failed.
const RETRY: Duration = Duration::from_secs(30);

/// The walks that close the connections of one backend.
const N_WALKS: u8 = 2;

/// A backend of a service.
type Endpoint = (Arc<str>, SocketAddr);

/// A backend that left, and whose connections may stay open for a while.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Departure {
    /// The service's addresses; port 0 stands for all ports.
    frontends: Vec<SocketAddr>,
    /// When it left, by CLOCK_BOOTTIME.
    since: Duration,
    /// Whether it is still in the table, as drained.
    is_drained: bool,
    /// The walks that have closed its connections.
    n_walks: u8,
    /// When the next walk is due, after the first.
    next_walk: Duration,
}

/// The backends that left. A pure state machine: times are CLOCK_BOOTTIME's, and arguments.
#[derive(Debug, Default)]
struct Departures {
    deadline: Option<Duration>,
    by_endpoint: BTreeMap<Endpoint, Departure>,
    /// When the connections to what left before are listed.
    list_at: Option<Duration>,
}

impl Departures {
    /// Follows the change from one table to the next. What is drained by hand leaves when it was drained;
    /// what is deregistered leaves now. One that is critical hasn't left, as it may come back; one that
    /// comes back keeps its connections. A service that goes as a whole isn't routed any more, by its tag
    /// or its source, which is no news of its instances: their connections stay.
    fn follow(&mut self, last: &Table, next: &Table, drains: &Drains, now: Duration) {
        let Diff { changed, .. } = last.services.diff(&next.services);
        for (name, service) in changed {
            let former = last.services.get(name);
            self.follow_service(former.map(|former| &**former), service, drains, now);
        }
    }

    /// Looks at every service, as after a change of what is drained.
    fn follow_drains(&mut self, table: &Table, drains: &Drains, now: Duration) {
        for service in table.services.values() {
            self.follow_service(None, service, drains, now);
        }
    }

    fn follow_service(
        &mut self,
        former: Option<&Service>,
        service: &Service,
        drains: &Drains,
        now: Duration,
    ) {
        if self.deadline.is_none() {
            return;
        }
        let mut present = BTreeMap::new();
        for backend in &service.backends {
            let Some(address) = backend.address else { continue };
            let drain = drains.find(&backend.node, &backend.id, Some(address));
            present.insert(address, drain.map(|(_, drain)| drain.boottime_ms));
        }
        for (address, drained_ms) in &present {
            let endpoint = (service.name.clone(), *address);
            match drained_ms {
                Some(since_ms) => {
                    self.leave(endpoint, service, Duration::from_millis(*since_ms), true)
                }
                None => drop(self.by_endpoint.remove(&endpoint)),
            }
        }
        let out = |excluded: &Excluded| excluded.address.parse::<SocketAddr>().ok();
        let out_addresses: BTreeSet<SocketAddr> = service.excluded.iter().filter_map(out).collect();
        // Instances that are registered, though not at an address that is known.
        let nowhere = service.backends.iter().filter(|backend| backend.address.is_none());
        let nowhere = nowhere.map(|backend| (&backend.node, &backend.id));
        let unresolved = service.excluded.iter().filter(|excluded| out(excluded).is_none());
        let nowhere: BTreeSet<_> =
            nowhere.chain(unresolved.map(|excluded| (&excluded.node, &excluded.id))).collect();
        let is_registered = |address: &SocketAddr, node: &String, id: &String| {
            present.contains_key(address)
                || out_addresses.contains(address)
                || nowhere.contains(&(node, id))
        };
        let backends = former.into_iter().flat_map(|former| &former.backends);
        let backends = backends.filter_map(|Backend { address, node, id, .. }| {
            Some((address.as_ref().copied()?, node, id))
        });
        let excluded = former.into_iter().flat_map(|former| &former.excluded);
        let excluded =
            excluded.filter_map(|excluded| Some((out(excluded)?, &excluded.node, &excluded.id)));
        // What its source doesn't follow any more has no instances, and none was deregistered.
        let is_known = service.watch != Watch::Cold;
        for (address, node, id) in backends.chain(excluded).filter(|_| is_known) {
            if !is_registered(&address, node, id) {
                self.leave((service.name.clone(), address), service, now, false);
            }
        }
    }

    fn leave(&mut self, endpoint: Endpoint, service: &Service, since: Duration, is_drained: bool) {
        let departure = Departure {
            frontends: frontends(service),
            since,
            is_drained,
            n_walks: 0,
            next_walk: Duration::ZERO,
        };
        // One that was drained before it was deregistered left then.
        let known = self.by_endpoint.entry(endpoint.clone()).or_insert(departure);
        known.since = known.since.min(since);
        known.is_drained = is_drained;
        if known.n_walks >= N_WALKS && !is_drained {
            self.by_endpoint.remove(&endpoint);
        }
    }

    /// Adds the connections to backends that left while no daemon with a deadline lived: these leave now.
    fn adopt(&mut self, table: &Table, connections: &[VipConnection], now: Duration) {
        let mut by_frontend = BTreeMap::new();
        for service in table.services.values() {
            by_frontend.extend(frontends(service).into_iter().map(|frontend| (frontend, service)));
        }
        for VipConnection { frontend, backend } in connections {
            let any_port = SocketAddr::new(frontend.ip(), 0);
            let found = by_frontend.get(frontend).or_else(|| by_frontend.get(&any_port));
            let Some(service) = found else { continue };
            let is_there = service.backends.iter().any(|it| it.address == Some(*backend));
            let text = backend.to_string();
            let is_out = service.excluded.iter().any(|excluded| excluded.address == text);
            // It may be any of these.
            let is_unresolved = service.watch == Watch::Cold
                || service.backends.iter().any(|it| it.address.is_none())
                || service.excluded.iter().any(|it| it.address.parse::<SocketAddr>().is_err());
            if !is_there && !is_out && !is_unresolved {
                self.leave((service.name.clone(), *backend), service, now, false);
            }
        }
    }

    /// Records that listing the connections for [`Departures::adopt`] has failed, or succeeded: it is
    /// repeated until it does.
    fn listed(&mut self, is_done: bool, now: Duration) {
        self.list_at = (!is_done).then(|| now.saturating_add(RETRY));
    }

    /// When the next connections are to be closed, or listed.
    fn due(&self) -> Option<Duration> {
        let deadline = self.deadline?;
        let waiting = self.by_endpoint.values().filter(|departure| departure.n_walks < N_WALKS);
        let due = waiting.map(|it| it.since.saturating_add(deadline).max(it.next_walk));
        due.chain(self.list_at).min()
    }

    /// Those whose connections are to be closed now.
    fn take_due(&self, now: Duration) -> Vec<(Endpoint, VipConnections)> {
        let Some(deadline) = self.deadline else { return Vec::new() };
        let due = self.by_endpoint.iter().filter(|(_, it)| {
            it.n_walks < N_WALKS && it.since.saturating_add(deadline).max(it.next_walk) <= now
        });
        let of = |((name, backend), it): (&Endpoint, &Departure)| {
            let frontends = it.frontends.clone();
            ((name.clone(), *backend), VipConnections { frontends, backend: *backend })
        };
        due.map(of).collect()
    }

    /// Records a walk for these; one that failed is repeated.
    fn walked(&mut self, endpoints: &[Endpoint], is_done: bool, now: Duration) {
        for endpoint in endpoints {
            let Some(departure) = self.by_endpoint.get_mut(endpoint) else { continue };
            departure.next_walk = now.saturating_add(if is_done { AGAIN } else { RETRY });
            departure.n_walks += u8::from(is_done);
            // A drained one stays, so that it isn't walked for again.
            if departure.n_walks >= N_WALKS && !departure.is_drained {
                self.by_endpoint.remove(endpoint);
            }
        }
    }
}

fn frontends(service: &Service) -> Vec<SocketAddr> {
    let vips = [Some(service.vip.into()), service.vip6.map(Into::into)];
    let vips = vips.into_iter().flatten().map(|vip| SocketAddr::new(vip, 0));
    vips.chain(service.pin.map(SocketAddr::V4)).chain(service.public.iter().copied()).collect()
}

/// What the task follows.
pub struct Followed {
    /// The published tables.
    pub table: watch::Receiver<Arc<Table>>,
    /// What is drained.
    pub drains: watch::Receiver<Arc<Drains>>,
    /// The key's value.
    pub deadline: watch::Receiver<Option<Duration>>,
    /// The kernel side.
    pub datapath: Arc<SharedDatapath>,
    /// Why connections can't be closed, for the status.
    pub problem: watch::Sender<Option<String>>,
}

/// Closes connections once their deadline has passed, for as long as the daemon lives.
pub async fn follow(mut followed: Followed) {
    let mut departures = Departures::default();
    let mut last: Arc<Table> = Arc::default();
    let mut last_drains: Arc<Drains> = Arc::default();
    // The problem of listing connections, and that of closing them.
    let (mut listing, mut closing) = (None, None);
    loop {
        let now = boot::time();
        let next = followed.table.borrow_and_update().clone();
        let drains = followed.drains.borrow_and_update().clone();
        let deadline = *followed.deadline.borrow_and_update();
        let begins = departures.deadline.is_none() && deadline.is_some();
        departures.deadline = deadline;
        if deadline.is_none() {
            departures.by_endpoint.clear();
            departures.list_at = None;
            (listing, closing) = (None, None);
            last = Arc::default();
        } else if next.is_synced() {
            departures.follow(&last, &next, &drains, now);
            if !Arc::ptr_eq(&drains, &last_drains) {
                // Every service is looked at.
                tokio::task::block_in_place(|| departures.follow_drains(&next, &drains, now));
                last_drains = drains;
            }
            if !last.is_synced() {
                departures.list_at = Some(now);
            }
            if departures.list_at.is_some_and(|at| at <= now) {
                listing = adopt(&mut departures, &next, &followed).await;
            }
            last = next;
        }
        if begins {
            closing = TcpTerminator::problem();
        }
        if let Some(problem) = close(&mut departures, &followed).await {
            closing = problem;
        }
        report(&followed.problem, listing.clone().or_else(|| closing.clone()));
        let due = departures
            .due()
            .map(|due| due.saturating_sub(boot::time()).max(Duration::from_millis(10)));
        let sleep = async {
            match due {
                Some(left) => tokio::time::sleep(left).await,
                None => std::future::pending().await,
            }
        };
        let changed = tokio::select! {
            changed = followed.table.changed() => changed,
            changed = followed.drains.changed() => changed,
            changed = followed.deadline.changed() => changed,
            () = sleep => Ok(()),
        };
        // The daemon has stopped.
        if changed.is_err() {
            return std::future::pending().await;
        }
    }
}

/// Adds what left before; returns why it couldn't be found.
async fn adopt(departures: &mut Departures, table: &Table, followed: &Followed) -> Option<String> {
    let terminator = followed.datapath.tcp_terminator();
    let listed = tokio::task::spawn_blocking(move || terminator.list()).await;
    let listed = listed.unwrap_or_else(|error| Err(error.to_string()));
    departures.listed(listed.is_ok(), boot::time());
    match listed {
        Ok(connections) => {
            departures.adopt(table, &connections, boot::time());
            None
        }
        Err(error) => Some(error),
    }
}

/// Closes what is due; returns why that failed, or `None` inside, where anything was to be closed.
async fn close(departures: &mut Departures, followed: &Followed) -> Option<Option<String>> {
    let due = departures.take_due(boot::time());
    if due.is_empty() {
        return None;
    }
    // While the kernel has another state of the service it may still send connections there.
    let hooks = followed.datapath.hooks();
    let is_behind = hooks.waiting.is_some() || followed.datapath.mode() != Mode::Translate;
    let is_ready = |(name, _): &Endpoint| !is_behind && followed.datapath.error(name).is_none();
    let (ready, late): (Vec<_>, Vec<_>) =
        due.into_iter().partition(|(endpoint, _)| is_ready(endpoint));
    let late: Vec<Endpoint> = late.into_iter().map(|(endpoint, _)| endpoint).collect();
    departures.walked(&late, false, boot::time());
    if ready.is_empty() {
        return None;
    }
    let (endpoints, chosen): (Vec<Endpoint>, Vec<VipConnections>) = ready.into_iter().unzip();
    let terminator = followed.datapath.tcp_terminator();
    let closed = tokio::task::spawn_blocking(move || terminator.close(&chosen)).await;
    let (n_closed, problem) = closed.unwrap_or_else(|error| (0, Some(error.to_string())));
    if n_closed > 0 {
        let n_backends = endpoints.len();
        let connections = counted(n_closed, "connection");
        tracing::info!(
            n_backends,
            "closed {connections} to backends that left: balance.drain_deadline has passed"
        );
    }
    departures.walked(&endpoints, problem.is_none(), boot::time());
    Some(problem)
}

/// Shows a problem in the status, and logs a new one.
fn report(status: &watch::Sender<Option<String>>, problem: Option<String>) {
    let problem = problem.map(|reason| {
        format!("balance.drain_deadline: connections to backends that left stay open: {reason}")
    });
    status.send_if_modified(|last| {
        let is_new = *last != problem;
        if let (true, Some(problem)) = (is_new, &problem) {
            tracing::warn!("{problem}");
        }
        last.clone_from(&problem);
        is_new
    });
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::config::Config;
    use crate::table::vips::Vips;
    use crate::table::{
        Builder, Catalog, Drain, DrainTarget, HealthStatus, Instance, ServiceId, ServiceRecord,
    };

    const SECOND: Duration = Duration::from_secs(1);

    /// An instance at this address; a `!` before it is one that is critical.
    fn instance(text: &str) -> Instance {
        let (address, health) = match text.strip_prefix('!') {
            Some(address) => (address, HealthStatus::Out("check `web` is critical".into())),
            None => (text, HealthStatus::Serving),
        };
        Instance { id: address.into(), address: address.into(), health, ..Instance::fixture() }
    }

    /// The backends that left, as tables follow each other, with a deadline of 60 s.
    struct Fleet {
        builder: Builder,
        table: Arc<Table>,
        drains: Drains,
        departures: Departures,
    }

    impl Fleet {
        fn new() -> Fleet {
            let vip = Config::default().vip;
            let departures = Departures { deadline: Some(60 * SECOND), ..Departures::default() };
            Fleet {
                builder: Builder::new(&vip, Vips::new((&vip).into())),
                table: Arc::default(),
                drains: Drains::default(),
                departures,
            }
        }

        /// The service web has these instances from now on; none if it has gone.
        fn set(&mut self, now_s: u32, instances: Option<&[&str]>) {
            self.set_watched(now_s, instances, Watch::Live);
        }

        fn set_watched(&mut self, now_s: u32, instances: Option<&[&str]>, watch: Watch) {
            let record = instances.map(|instances| {
                let instances: Vec<Instance> = instances.iter().map(|it| instance(it)).collect();
                (ServiceId::new("web"), ServiceRecord::new(instances.into(), watch))
            });
            let catalog: Catalog = record.into_iter().collect();
            self.builder.set_drains(Arc::new(self.drains.clone()));
            let next = self.builder.next(&self.table, &catalog, SystemTime::UNIX_EPOCH);
            let next = next.map_or(self.table.clone(), |next| next.table);
            let now = now_s * SECOND;
            self.departures.follow(&self.table, &next, &self.drains, now);
            self.departures.follow_drains(&next, &self.drains, now);
            self.table = next;
        }

        /// What is to be closed at this time.
        fn due(&self, now_s: u32) -> Vec<String> {
            let due = self.departures.take_due(now_s * SECOND);
            due.iter().map(|((_, backend), _)| backend.ip().to_string()).collect()
        }

        fn walk(&mut self, now_s: u32, is_done: bool) {
            let now = now_s * SECOND;
            let due = self.departures.take_due(now).into_iter();
            let endpoints: Vec<_> = due.map(|(endpoint, _)| endpoint).collect();
            self.departures.walked(&endpoints, is_done, now);
        }
    }

    /// Its source forgets them after `catalog.max_age`, whatever has become of them.
    #[test]
    fn instances_of_a_service_that_is_cold_havent_left() {
        let mut fleet = Fleet::new();
        fleet.set(0, Some(&["10.0.0.1"]));
        fleet.set_watched(10, Some(&["10.0.0.1"]), Watch::Cold);
        fleet.set_watched(20, Some(&[]), Watch::Cold);
        assert_eq!(fleet.departures.due(), None);
        let connection = VipConnection {
            frontend: SocketAddr::new(fleet.table.services["web"].vip.into(), 80),
            backend: "10.0.0.1:80".parse().unwrap(),
        };
        fleet.departures.adopt(&fleet.table, &[connection], 30 * SECOND);
        assert_eq!(fleet.departures.due(), None);
    }

    #[test]
    fn a_backend_that_is_deregistered_has_until_its_deadline_and_not_less() {
        let mut fleet = Fleet::new();
        fleet.set(0, Some(&["10.0.0.1", "10.0.0.2", "10.0.0.3"]));
        assert_eq!(fleet.departures.due(), None);
        fleet.set(10, Some(&["10.0.0.1", "10.0.0.2"]));
        fleet.set(20, Some(&["10.0.0.1"]));
        assert_eq!(fleet.departures.due(), Some(70 * SECOND));
        assert_eq!(fleet.due(69), [""; 0]);
        assert_eq!(fleet.due(70), ["10.0.0.3"]);
        // Twice, and again where a walk fails.
        fleet.walk(70, false);
        assert_eq!(
            (fleet.due(79), fleet.due(100)),
            (vec![], vec!["10.0.0.2".into(), "10.0.0.3".into()])
        );
        fleet.walk(100, true);
        assert_eq!(fleet.due(101), ["10.0.0.2", "10.0.0.3"]);
        fleet.walk(101, true);
        assert_eq!((fleet.departures.due(), fleet.departures.by_endpoint.len()), (None, 0));
        // Also the last one, and once the name has gone.
        fleet.set(110, Some(&[]));
        fleet.set(120, None);
        assert_eq!((fleet.due(169), fleet.due(170)), (vec![], vec!["10.0.0.1".into()]));
    }

    #[test]
    fn what_comes_back_is_critical_or_is_not_routed_any_more_keeps_its_connections() {
        let mut fleet = Fleet::new();
        fleet.set(0, Some(&["10.0.0.1", "10.0.0.2", "db.example"]));
        // Critical is not gone; gone and critical then is.
        fleet.set(1, Some(&["!10.0.0.1", "10.0.0.2"]));
        assert_eq!(fleet.departures.due(), None);
        fleet.set(2, Some(&["10.0.0.2"]));
        assert_eq!(fleet.departures.due(), Some(62 * SECOND));
        fleet.set(3, Some(&["10.0.0.1", "10.0.0.2"]));
        assert_eq!(fleet.departures.due(), None, "it is back");
        // It comes back as critical.
        fleet.set(4, Some(&["10.0.0.1"]));
        fleet.set(5, Some(&["10.0.0.1", "!10.0.0.2"]));
        assert_eq!(fleet.departures.due(), Some(64 * SECOND), "until it serves it may be another");
        fleet.set(6, Some(&["10.0.0.1", "10.0.0.2"]));
        // A service that goes as a whole has lost its tag.
        fleet.set(7, None);
        assert_eq!(fleet.departures.due(), None);
    }

    #[test]
    fn what_is_drained_left_when_it_was_drained_and_undrained_it_is_back() {
        let mut fleet = Fleet::new();
        fleet.set(100, Some(&["10.0.0.1", "10.0.0.2"]));
        let target = DrainTarget::Address("10.0.0.1".parse().unwrap());
        fleet.drains.add(target.clone(), Drain { since: 0, boottime_ms: 90_500 }).unwrap();
        fleet.set(101, Some(&["10.0.0.1", "10.0.0.2"]));
        assert_eq!(fleet.departures.due(), Some(Duration::from_millis(150_500)));
        fleet.walk(151, true);
        fleet.walk(152, true);
        assert_eq!(fleet.departures.due(), None);
        // Other changes of the service don't begin it again, nor does its end.
        fleet.set(153, Some(&["10.0.0.1", "10.0.0.3"]));
        assert_eq!(fleet.due(212), [""; 0]);
        assert_eq!(fleet.due(213), ["10.0.0.2"]);
        fleet.set(154, Some(&["10.0.0.3"]));
        assert_eq!(fleet.departures.by_endpoint.len(), 1);
        fleet.set(155, Some(&["10.0.0.1", "10.0.0.3"]));
        assert!(fleet.drains.remove(&target));
        fleet.set(156, Some(&["10.0.0.1", "10.0.0.3"]));
        assert_eq!(fleet.departures.by_endpoint.len(), 1);
        // Without a deadline nothing is kept.
        fleet.departures.deadline = None;
        assert_eq!((fleet.departures.due(), fleet.due(9_999)), (None, vec![]));
    }

    #[test]
    fn connections_of_an_earlier_daemon_whose_backend_left_meanwhile_have_the_whole_time() {
        let mut fleet = Fleet::new();
        fleet.set(0, Some(&["10.0.0.1", "!10.0.0.2"]));
        let vip = fleet.table.services["web"].vip;
        let connection = |vip: [u8; 4], backend: &str| VipConnection {
            frontend: (vip, 80).into(),
            backend: backend.parse().unwrap(),
        };
        let vip = vip.octets();
        let connections = [
            connection(vip, "10.0.0.1:80"),
            connection(vip, "10.0.0.2:80"),
            connection(vip, "10.0.0.3:80"),
            // Of a service that isn't routed here any more.
            connection([127, 255, 255, 1], "10.0.0.4:80"),
        ];
        fleet.departures.adopt(&fleet.table, &connections, 9 * SECOND);
        assert_eq!(fleet.departures.due(), Some(69 * SECOND));
        assert_eq!(fleet.due(69), ["10.0.0.3"]);
        // A list that can't be had is tried again.
        fleet.departures.listed(false, 10 * SECOND);
        assert_eq!(fleet.departures.due(), Some(40 * SECOND));
        fleet.departures.listed(true, 40 * SECOND);
        assert_eq!(fleet.departures.due(), Some(69 * SECOND));
        // A name that isn't resolved may be any of them.
        let mut fleet = Fleet::new();
        fleet.set(0, Some(&["10.0.0.1", "db.example"]));
        fleet.departures.adopt(&fleet.table, &connections, SECOND);
        assert_eq!(fleet.departures.due(), None);
    }
}

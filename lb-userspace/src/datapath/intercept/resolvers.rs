//! DNS servers in the cgroups whose queries are intercepted. Their own queries aren't, because nohop may
//! forward to them: then each query would come back. A server that is bound later is found by the
//! programs of bind().

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, channel};

use lb_common::{DNS_PORT, MAX_RESOLVERS, ResolverCgroup};
use tokio::sync::Notify;

use super::super::diag::{BoundUdp, bound_udp};
use super::super::pins::monotonic_ns;
use super::reach::{ReachState, Unreached};

/// How deep cgroups are searched for processes.
const MAX_DEPTH: usize = 8;

/// A search that has ended.
#[derive(Debug)]
pub struct FoundResolvers {
    /// When it began, by CLOCK_MONOTONIC, or earlier: it has seen what was there then.
    pub began_ns: u64,
    /// Who has a DNS server, or why that can't be known.
    pub cgroups: Result<BTreeSet<ResolverCgroup>, String>,
    /// The network namespaces that get no answers; `None` where that wasn't verified.
    pub unreached: Option<Unreached>,
}

/// What a search is for.
#[derive(Clone, Debug)]
pub struct Searched {
    /// The cgroups.
    pub cgroups: Vec<PathBuf>,
    /// The resolvers that nohop forwards to.
    pub upstreams: BTreeSet<SocketAddr>,
    /// Where queries of containers go.
    pub servers: Vec<SocketAddr>,
}

/// Searches on threads of their own, as they visit network namespaces, and may have to wait there.
#[derive(Debug)]
pub struct ResolverSearch {
    running: Option<Receiver<(FoundResolvers, ReachState)>>,
    reach: ReachState,
    /// Notified when a search has ended.
    ended: Arc<Notify>,
}

impl ResolverSearch {
    /// Notifies `ended` when a search has ended.
    pub fn new(ended: Arc<Notify>) -> ResolverSearch {
        ResolverSearch { running: None, reach: ReachState::default(), ended }
    }

    /// Begins a search, if none runs.
    pub fn begin(&mut self, searched: impl FnOnce() -> Searched) {
        if self.running.is_some() {
            return;
        }
        let (sender, running) = channel();
        let (searched, mut reach) = (searched(), std::mem::take(&mut self.reach));
        let (began_ns, ended) = (monotonic_ns(), self.ended.clone());
        let work = move || {
            let cgroups = resolvers_in(&searched, Some(&mut reach));
            // A search that failed has seen only some.
            let unreached = cgroups.is_ok().then(|| reach.unreached());
            // The unit may have gone.
            let _ = sender.send((FoundResolvers { began_ns, cgroups, unreached }, reach));
            ended.notify_one();
        };
        self.running = thread().spawn(work).ok().map(|_| running);
    }

    /// What the search has found that has ended since the last call.
    pub fn found(&mut self) -> Option<FoundResolvers> {
        let received = self.running.as_ref()?.try_recv();
        self.take(received.map_err(|error| error == TryRecvError::Disconnected))
    }

    /// What the search finds that runs.
    pub fn wait(&mut self) -> Option<FoundResolvers> {
        let received = self.running.as_ref()?.recv();
        self.take(received.map_err(|_| true))
    }

    /// Takes over a result, or whether the search has panicked: then it found nothing out, and the next one
    /// may.
    fn take(
        &mut self,
        received: Result<(FoundResolvers, ReachState), bool>,
    ) -> Option<FoundResolvers> {
        if !matches!(received, Err(false)) {
            self.running = None;
        }
        let (found, reach) = received.ok()?;
        self.reach = reach;
        Some(found)
    }
}

/// The DNS servers in these cgroups: what has port 53, or an address that nohop forwards to. Waits for
/// them.
///
/// # Errors
/// Why that can't be known.
pub fn search(searched: Searched) -> Result<BTreeSet<ResolverCgroup>, String> {
    let ended = thread().spawn(move || resolvers_in(&searched, None));
    let search = ended.map_err(|error| error.to_string())?;
    search.join().unwrap_or_else(|_| Err("the search for DNS servers panicked".to_owned()))
}

fn thread() -> std::thread::Builder {
    std::thread::Builder::new().name("resolvers".into())
}

/// The calling thread ends in another network namespace.
fn resolvers_in(
    Searched { cgroups, upstreams, servers }: &Searched,
    mut reach: Option<&mut ReachState>,
) -> Result<BTreeSet<ResolverCgroup>, String> {
    let mut pids = BTreeSet::new();
    cgroups.iter().for_each(|cgroup| collect_processes(cgroup, 0, &mut pids));
    let ports = upstreams.iter().map(SocketAddr::port).chain([DNS_PORT]).collect();
    let visit = |inode, pid: &str| {
        if let Some(reach) = &mut reach {
            reach.verify(inode, pid, servers);
        }
    };
    let bound = bound_udp(&ports, &pids, visit).map_err(|error| {
        format!(
            "DNS servers in these cgroups can't be found, and would be intercepted too: {error}"
        )
    })?;
    Ok(resolver_cgroups(&bound, upstreams))
}

/// The cgroups of those that are DNS servers, as many as there is room for: cgroups, not sockets, of
/// which a process can bind as many as it wants.
fn resolver_cgroups(
    bound: &[BoundUdp],
    upstreams: &BTreeSet<SocketAddr>,
) -> BTreeSet<ResolverCgroup> {
    let of = |bound: &BoundUdp| ResolverCgroup {
        cgroup_id: bound.cgroup_id,
        is_host: bound.is_in_own_namespace.into(),
    };
    let cgroups: BTreeSet<ResolverCgroup> =
        bound.iter().filter(|bound| is_resolver(bound, upstreams)).map(of).collect();
    if cgroups.len() > MAX_RESOLVERS {
        tracing::warn!(
            "dns.intercept: of {} DNS servers {MAX_RESOLVERS} are left out",
            cgroups.len()
        );
    }
    cgroups.into_iter().take(MAX_RESOLVERS).collect()
}

fn is_resolver(bound: &BoundUdp, upstreams: &BTreeSet<SocketAddr>) -> bool {
    let ip = bound.local.ip().to_canonical();
    // In a container a server on loopback serves that container alone, and is one of its own.
    if !bound.is_in_own_namespace && ip.is_loopback() {
        return false;
    }
    let is_upstream = |upstream: &SocketAddr| {
        upstream.port() == bound.local.port()
            && (ip.is_unspecified() || ip == upstream.ip().to_canonical())
    };
    bound.local.port() == DNS_PORT || upstreams.iter().any(is_upstream)
}

fn collect_processes(cgroup: &Path, depth: usize, pids: &mut BTreeSet<u32>) {
    let processes = std::fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    pids.extend(processes.lines().filter_map(|pid| pid.parse::<u32>().ok()).filter(|&pid| pid > 0));
    if depth < MAX_DEPTH {
        let entries = std::fs::read_dir(cgroup).into_iter().flatten().flatten();
        let below = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        below.for_each(|entry| collect_processes(&entry.path(), depth + 1, pids));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_a_dns_server() {
        let upstreams = ["127.0.0.1:5335", "10.0.0.9:53"].map(|it| it.parse().unwrap()).into();
        let table = [
            ("127.0.0.1:53", true, true),
            ("127.0.0.11:53", false, false),
            ("[::]:53", false, true),
            ("127.0.0.1:5335", true, true),
            ("[::ffff:127.0.0.1]:5335", true, true),
            ("0.0.0.0:5335", true, true),
            ("127.0.0.1:5335", false, false),
            ("10.0.0.1:5335", true, false),
        ];
        for (local, is_in_own_namespace, expected) in table {
            let local = local.parse().unwrap();
            let bound = BoundUdp { local, cgroup_id: 1, is_in_own_namespace };
            assert_eq!(is_resolver(&bound, &upstreams), expected, "{bound:?}");
        }
    }

    #[test]
    fn as_many_cgroups_as_there_is_room_for() {
        let bound = |cgroup_id| BoundUdp {
            local: ([127, 0, 0, 1], DNS_PORT).into(),
            cgroup_id,
            is_in_own_namespace: true,
        };
        let none = BTreeSet::new();
        let many = vec![bound(1); 2 * MAX_RESOLVERS];
        let found = resolver_cgroups(&[many, vec![bound(2)]].concat(), &none);
        assert_eq!(found.iter().map(|it| it.cgroup_id).collect::<Vec<_>>(), [1, 2]);
        let too_many: Vec<_> = (0..2 * MAX_RESOLVERS as u64).map(bound).collect();
        assert_eq!(resolver_cgroups(&too_many, &none).len(), MAX_RESOLVERS);
    }
}

//! DNS servers in the cgroups whose queries are intercepted. Their own queries aren't, because nohop may
//! forward to them: then each query would come back. A server that is bound later is found by the
//! programs of bind().

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use lb_common::{DNS_PORT, MAX_RESOLVERS, ResolverCgroup};

use super::super::diag::{BoundUdp, bound_udp};
use super::super::pins::monotonic_ns;
use super::reach::{ReachState, Unreached};

/// How deep cgroups are searched for processes.
const MAX_DEPTH: usize = 8;

/// A search that has ended.
#[derive(Debug)]
pub struct FoundResolvers {
    /// When it began, by CLOCK_MONOTONIC.
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

/// Searches on threads of their own, as they visit network namespaces.
#[derive(Debug, Default)]
pub struct ResolverSearch {
    running: Option<JoinHandle<(FoundResolvers, ReachState)>>,
    reach: ReachState,
}

impl ResolverSearch {
    /// What the last search found, if it has ended; then the next one begins.
    pub fn found(&mut self, searched: impl FnOnce() -> Searched) -> Option<FoundResolvers> {
        let ended = self.running.take_if(|search| search.is_finished());
        // One that has panicked found nothing out, and the next one may.
        let found = ended.and_then(|search| search.join().ok()).map(|(found, reach)| {
            self.reach = reach;
            found
        });
        if self.running.is_none() {
            let (searched, mut reach) = (searched(), std::mem::take(&mut self.reach));
            let work = move || {
                let mut found = search_in(&searched, Some(&mut reach));
                // A search that failed has seen only some.
                found.unreached = found.cgroups.is_ok().then(|| reach.unreached());
                (found, reach)
            };
            self.running = thread().spawn(work).ok();
        }
        found
    }
}

/// The DNS servers in these cgroups: what has port 53, or an address that nohop forwards to. Waits for
/// them.
pub fn search(searched: Searched) -> FoundResolvers {
    let began_ns = monotonic_ns();
    let ended = thread().spawn(move || search_in(&searched, None));
    let panicked = |_| "the search for DNS servers panicked".to_owned();
    let ended = ended.map_err(|error| error.to_string());
    ended
        .and_then(|search| search.join().map_err(panicked))
        .unwrap_or_else(|error| FoundResolvers { began_ns, cgroups: Err(error), unreached: None })
}

fn thread() -> std::thread::Builder {
    std::thread::Builder::new().name("resolvers".into())
}

/// The calling thread ends in another network namespace.
fn search_in(searched: &Searched, reach: Option<&mut ReachState>) -> FoundResolvers {
    let began_ns = monotonic_ns();
    FoundResolvers { began_ns, cgroups: resolvers_in(searched, reach), unreached: None }
}

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

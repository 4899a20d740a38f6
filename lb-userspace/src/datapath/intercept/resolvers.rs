//! DNS servers in the cgroups whose queries are intercepted. Their own queries aren't, because nohop may
//! forward to them: then each query would come back.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use lb_common::{DNS_PORT, MAX_RESOLVERS};

use super::super::diag::{BoundUdp, bound_udp};

/// How deep cgroups are searched for processes.
const MAX_DEPTH: usize = 8;

/// A search on a thread of its own, as it visits network namespaces.
#[derive(Debug, Default)]
pub struct ResolverSearch(Option<JoinHandle<BTreeSet<u64>>>);

impl ResolverSearch {
    /// The ids of the cgroups that have a DNS server, if a search has ended; then the next one begins.
    /// With `waits` it is one that begins now.
    pub fn found(
        &mut self,
        cgroups: impl Iterator<Item = PathBuf>,
        waits: bool,
    ) -> Option<BTreeSet<u64>> {
        if waits {
            self.0 = None;
        }
        let ended = self.0.take_if(|search| search.is_finished());
        // One that has panicked found nothing out, and the next one may.
        let mut found = ended.and_then(|search| search.join().ok());
        if self.0.is_none() {
            let cgroups: Vec<PathBuf> = cgroups.collect();
            let search = std::thread::Builder::new().name("resolvers".into());
            self.0 = search.spawn(move || search_in(&cgroups)).ok();
        }
        if waits {
            found = self.0.take().and_then(|search| search.join().ok());
        }
        found
    }
}

fn search_in(cgroups: &[PathBuf]) -> BTreeSet<u64> {
    let mut pids = BTreeSet::new();
    cgroups.iter().for_each(|cgroup| collect_processes(cgroup, 0, &mut pids));
    let bound = bound_udp(DNS_PORT, &pids);
    let is_resolver = |bound: &&BoundUdp| {
        // In a container a server on loopback serves that container alone, and is one of its own.
        bound.is_in_own_namespace || !bound.local.ip().to_canonical().is_loopback()
    };
    let cgroups: BTreeSet<u64> =
        bound.iter().filter(is_resolver).map(|bound| bound.cgroup_id).collect();
    // Cgroups, not sockets: any process can bind as many of those as it wants.
    if cgroups.len() > MAX_RESOLVERS {
        tracing::warn!(
            "dns.intercept: of {} DNS servers {MAX_RESOLVERS} are left out",
            cgroups.len()
        );
    }
    cgroups.into_iter().take(MAX_RESOLVERS).collect()
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

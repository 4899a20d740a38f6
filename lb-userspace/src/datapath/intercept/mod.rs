//! The unit `intercept`: DNS queries of the processes in certain cgroups are sent to nohop, whatever
//! resolver they are for, and the replies come from the address that was asked.
//!
//! Nothing of it is pinned: its links end with the daemon, even one that is killed, and from then on
//! these processes ask their own resolvers. So there is nothing to take over and nothing to remove.

mod cgroups;
mod reach;
mod resolvers;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::os::linux::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aya::{Ebpf, EbpfLoader, VerifierLogLevel};
use lb_common::{
    Address, DNS_PORT, DnsServer, DnsServers, INTERCEPT_NS, InterceptControl, Interception,
    MAX_UPSTREAM_PORTS, ResolverCgroup,
};
use tokio::sync::Notify;

use super::bpf::{AttachType, Link, ProgramWait};
use super::error::DatapathError;
use super::kernel::{AtomicArray, Hash, Plain, io_error, take_hash, wait_for_programs};
use super::map_specs::{INTERCEPT, Sizes};
use super::object::{PoolConstants, load_program, processed, program_fd};
use super::pins::{Pins, monotonic_ns};
use super::trace::NextRing;
use super::units::{UnitHealth, UnitState};
use crate::causes;
use crate::config::{Intercepted, VipConfig};
use cgroups::FoundCgroups;
use reach::Unreached;
use resolvers::{FoundResolvers, ResolverSearch, Searched, search};

/// The unit's name.
const UNIT: &str = "intercept";

/// The programs, in the order in which they are attached: those that find DNS servers first, then
/// reverse translation, so that no translated socket lacks it.
pub const PROGRAMS: [(&str, AttachType); 10] = [
    ("nohop_dns_bind4", AttachType::BIND4),
    ("nohop_dns_bind6", AttachType::BIND6),
    ("nohop_dns_peer4", AttachType::GETPEERNAME4),
    ("nohop_dns_peer6", AttachType::GETPEERNAME6),
    ("nohop_dns_recv4", AttachType::RECVMSG4),
    ("nohop_dns_recv6", AttachType::RECVMSG6),
    ("nohop_dns_send4", AttachType::SENDMSG4),
    ("nohop_dns_send6", AttachType::SENDMSG6),
    ("nohop_dns_conn4", AttachType::CONNECT4),
    ("nohop_dns_conn6", AttachType::CONNECT6),
];

/// Why nothing is intercepted until a search has ended.
const SEARCHES: &str = "DNS servers in these cgroups are being looked for";

/// The number of the first ones that find DNS servers.
const N_BIND_PROGRAMS: usize = 2;

/// Whose queries are intercepted, and where they go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InterceptSettings {
    /// The cgroups of the processes.
    pub cgroups: Intercepted,
    /// The addresses at which the daemon answers, none unspecified.
    pub listen: Vec<SocketAddr>,
    /// The resolvers that it forwards to: where one is a process of these cgroups, its own queries aren't
    /// intercepted.
    pub upstreams: BTreeSet<SocketAddr>,
    /// Whether it is verified, by a message from inside, that containers get answers.
    pub is_verified: bool,
    /// Why the daemon can't answer these processes now, if it can't: then they ask their own resolvers.
    pub obstacle: Option<String>,
}

/// The unit.
#[derive(Debug)]
pub struct Intercept {
    vip: VipConfig,
    sizes: Sizes,
    /// Loaded when it is first wanted.
    loaded: Option<Result<LoadedIntercept, String>>,
    settings: Option<InterceptSettings>,
    is_shadow: bool,
    is_detached: bool,
    trace_ring: NextRing,
    search_ended: Arc<Notify>,
}

#[derive(Debug)]
struct LoadedIntercept {
    ebpf: Ebpf,
    control: Arc<AtomicArray<InterceptControl>>,
    counters: Arc<AtomicArray<u64>>,
    program_wait: Option<ProgramWait>,
    /// The cgroups that have DNS servers, and when that was found.
    resolvers: Hash<ResolverCgroup, u64>,
    /// Other ports than 53 of the resolvers that the daemon forwards to.
    ports: Hash<u64, u64>,
    /// The cookies of the network namespaces that get no answers.
    unreached: Hash<u64, u64>,
    /// What is wrong with them.
    unreached_note: Option<String>,
    search: ResolverSearch,
    /// When what a search looks for was changed, by CLOCK_MONOTONIC: nothing is intercepted until one that
    /// began after that has ended.
    changed_ns: u64,
    /// When the last search began that found what it looked for.
    searched_ns: u64,
    /// Why DNS servers can't be found: then nothing is intercepted.
    unsafe_reason: Option<String>,
    /// The cgroups that it is attached to, by their ids.
    attached: BTreeMap<u64, AttachedCgroup>,
    /// Those that have the programs that find DNS servers, and wait for a search to find those that were
    /// bound before.
    begun: BTreeMap<u64, BegunCgroup>,
    /// Why it isn't attached somewhere.
    problem: Option<String>,
    /// Why there is less to attach it to than was configured.
    notes: Vec<String>,
}

#[derive(Debug)]
struct AttachedCgroup {
    directory: File,
    /// In the order of [`PROGRAMS`].
    links: Vec<Link>,
}

#[derive(Debug)]
struct BegunCgroup {
    path: PathBuf,
    attached: AttachedCgroup,
    /// Since when it has them, by CLOCK_MONOTONIC.
    since_ns: u64,
}

impl Intercept {
    /// The unit of a datapath with these pools and sizes. Nothing is loaded yet.
    pub fn new(vip: &VipConfig, sizes: &Sizes) -> Intercept {
        Intercept {
            vip: vip.clone(),
            sizes: *sizes,
            loaded: None,
            settings: None,
            is_shadow: false,
            is_detached: false,
            trace_ring: NextRing::default(),
            search_ended: Arc::default(),
        }
    }

    /// Notified when a search for DNS servers has ended: then [`Intercept::take_search`] has something to do.
    pub fn search_ended(&self) -> Arc<Notify> {
        self.search_ended.clone()
    }

    /// Where the reader of traced queries finds their ring buffer, each time the unit is loaded.
    pub(in super::super) fn trace_ring(&self) -> NextRing {
        self.trace_ring.clone()
    }

    /// Sets whose queries are intercepted, `None` for those of no process; finds their cgroups below
    /// `scope`, and attaches the programs to them.
    pub fn configure(&mut self, settings: Option<InterceptSettings>, pins: &Pins, scope: &Path) {
        let Some(wanted) = settings else {
            (self.loaded, self.settings) = (None, None);
            return;
        };
        let (vip, sizes) = (&self.vip, &self.sizes);
        // What failed may have been for lack of memory.
        let earlier = self.loaded.take_if(|loaded| loaded.is_err()).and_then(Result::err);
        let is_new = self.loaded.is_none();
        let loaded = self.loaded.get_or_insert_with(|| {
            let loaded =
                LoadedIntercept::load(vip, sizes, pins, &self.trace_ring, &self.search_ended);
            loaded.inspect_err(|reason| {
                if earlier.as_ref() != Some(reason) {
                    tracing::warn!("the unit {UNIT} doesn't run: {reason}");
                }
            })
        });
        if let Ok(loaded) = loaded {
            let present = self.settings.as_ref().filter(|_| !is_new);
            if present.is_none_or(|present| servers(&present.listen) != servers(&wanted.listen)) {
                loaded.set_servers(&wanted.listen);
            }
            let found = FoundCgroups::of(&wanted.cgroups, scope);
            if present.is_none_or(|present| present.upstreams != wanted.upstreams) {
                loaded.set_ports(&wanted.upstreams);
                loaded.changed_ns = monotonic_ns();
            }
            loaded.begin(found);
            loaded.begin_search(&wanted, scope);
        }
        self.settings = Some(wanted);
        self.take_search(scope);
    }

    /// Takes over what a search has found, and intercepts the queries of cgroups that waited for it.
    pub fn take_search(&mut self, scope: &Path) {
        if let (Some(Ok(loaded)), Some(settings)) = (&mut self.loaded, &self.settings) {
            let (before, found) = (loaded.searched_ns, loaded.search.found());
            loaded.take_over(found);
            // One that failed would fail again at once: the next one begins with the next look at the cgroups.
            if loaded.searched_ns != before && loaded.waits() {
                loaded.begin_search(settings, scope);
            }
        }
        self.heartbeat(monotonic_ns());
    }

    /// Waits until no cgroup waits for a search any more, for a caller without a loop, which may be a test.
    pub fn finish_search(&mut self, scope: &Path) {
        if let (Some(Ok(loaded)), Some(settings)) = (&mut self.loaded, &self.settings) {
            loop {
                let (before, found) = (loaded.searched_ns, loaded.search.wait());
                loaded.take_over(found);
                if !loaded.waits() || loaded.searched_ns == before {
                    break;
                }
                loaded.begin_search(settings, scope);
            }
        }
        self.heartbeat(monotonic_ns());
    }

    /// Intercepts queries for a while, if they are to be.
    pub fn heartbeat(&self, now_ns: u64) {
        let is_on = self.why_off().is_none() && self.settings.is_some();
        self.set_until(if is_on { now_ns + INTERCEPT_NS } else { 0 });
    }

    /// Whether connections are only counted: then nothing is intercepted.
    pub fn set_shadow(&mut self, is_shadow: bool) {
        if std::mem::replace(&mut self.is_shadow, is_shadow) != is_shadow {
            self.heartbeat(monotonic_ns());
        }
    }

    /// Whether a required hook was found detached: VIPs lead nowhere then, and nothing is intercepted.
    pub fn set_detached(&mut self, is_detached: bool) {
        if std::mem::replace(&mut self.is_detached, is_detached) != is_detached {
            self.heartbeat(monotonic_ns());
        }
    }

    /// Intercepts nothing more, until the next heartbeat.
    pub fn stop(&self) {
        self.set_until(0);
    }

    fn set_until(&self, until_ns: u64) {
        if let Some(Ok(loaded)) = &self.loaded {
            loaded.control.store_field(0, 0, &until_ns);
        }
    }

    fn why_off(&self) -> Option<String> {
        if self.is_shadow {
            return Some("shadow mode".to_owned());
        }
        if self.is_detached {
            return Some("hooks of the unit connect aren't attached".to_owned());
        }
        let loaded = self.loaded.as_ref()?.as_ref().ok()?;
        if let Some(reason) = &loaded.unsafe_reason {
            return Some(reason.clone());
        }
        if loaded.searched_ns < loaded.changed_ns {
            return Some(SEARCHES.to_owned());
        }
        self.settings.as_ref()?.obstacle.clone()
    }

    /// The unit's state; `None` while nothing is to be intercepted.
    pub fn status(&self) -> Option<UnitHealth> {
        let settings = self.settings.as_ref()?;
        let (state, reason) = match self.loaded.as_ref()? {
            Err(reason) => (UnitState::Failed, Some(reason.clone())),
            Ok(
                LoadedIntercept { unsafe_reason: Some(problem), .. }
                | LoadedIntercept { problem: Some(problem), .. },
            ) => (UnitState::Failed, Some(problem.clone())),
            Ok(loaded) if loaded.attached.is_empty() && !loaded.begun.is_empty() => {
                (UnitState::Waiting, Some(SEARCHES.to_owned()))
            }
            Ok(loaded) => match self.why_off() {
                Some(reason) => (UnitState::Off, Some(reason)),
                None if loaded.attached.is_empty() => {
                    (UnitState::Waiting, Some(loaded.notes.join("; ")))
                }
                None => {
                    let unreached = unreached(&settings.listen).map(str::to_owned);
                    let notes = loaded.notes.iter().cloned().chain(unreached);
                    let notes: Vec<_> = notes.chain(loaded.unreached_note.clone()).collect();
                    (UnitState::Attached, (!notes.is_empty()).then(|| notes.join("; ")))
                }
            },
        };
        Some(UnitHealth { name: UNIT, is_required: false, state, reason })
    }

    /// What was decided on queries since the unit was loaded, by name: of a connection or a connected
    /// socket once, of other datagrams each time.
    pub fn counts(&self) -> Vec<(&'static str, u64)> {
        let Some(Ok(loaded)) = &self.loaded else { return Vec::new() };
        let count = |decided: Interception| (decided.name(), loaded.counters.load(decided as u32));
        Interception::ALL.into_iter().map(count).collect()
    }

    /// The programs, each with how many instructions the verifier processes.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn processed_instructions(
        &self,
        pins: &Pins,
    ) -> Result<Vec<(&'static str, Option<u32>)>, DatapathError> {
        let mut ebpf = open(VerifierLogLevel::STATS, &self.vip, &self.sizes, pins)?;
        PROGRAMS.into_iter().map(|(program, _)| processed(&mut ebpf, program)).collect()
    }
}

/// Opens the object over the pinned maps of the unit `connect`.
fn open(
    log_level: VerifierLogLevel,
    vip: &VipConfig,
    sizes: &Sizes,
    pins: &Pins,
) -> Result<Ebpf, DatapathError> {
    let pools = PoolConstants::of(vip);
    let mut loader = EbpfLoader::new();
    loader.verifier_log_level(log_level);
    pools.set(&mut loader);
    for name in ["CONTROL", "COUNTERS", "BYPASS", "FRONTENDS"] {
        loader.map_pin_path(name, pins.maps().join(name));
    }
    loader.map_max_entries("FRONTENDS", sizes.frontends);
    loader.load(INTERCEPT).map_err(DatapathError::Load)
}

impl LoadedIntercept {
    fn load(
        vip: &VipConfig,
        sizes: &Sizes,
        pins: &Pins,
        trace_ring: &NextRing,
        search_ended: &Arc<Notify>,
    ) -> Result<LoadedIntercept, String> {
        let load = || -> Result<LoadedIntercept, DatapathError> {
            let mut ebpf = open(VerifierLogLevel::default(), vip, sizes, pins)?;
            for (program, _) in PROGRAMS {
                load_program(&mut ebpf, program)?;
            }
            let trace = ebpf.take_map("TRACE").ok_or(DatapathError::Object { missing: "TRACE" })?;
            trace_ring.set(trace);
            Ok(LoadedIntercept {
                control: AtomicArray::take(&mut ebpf, "INTERCEPT_CONTROL")?,
                counters: AtomicArray::take(&mut ebpf, "INTERCEPT_COUNTERS")?,
                program_wait: ProgramWait::new().ok(),
                resolvers: take_hash(&mut ebpf, "INTERCEPT_RESOLVERS")?,
                ports: take_hash(&mut ebpf, "INTERCEPT_PORTS")?,
                unreached: take_hash(&mut ebpf, "INTERCEPT_UNREACHED")?,
                unreached_note: None,
                search: ResolverSearch::new(search_ended.clone()),
                changed_ns: 0,
                searched_ns: 0,
                unsafe_reason: None,
                ebpf,
                attached: BTreeMap::new(),
                begun: BTreeMap::new(),
                problem: None,
                notes: Vec::new(),
            })
        };
        load().map_err(|error| causes::with_root(&error))
    }

    /// Sets where queries go. Nothing is intercepted from then on until the next heartbeat.
    fn set_servers(&self, listen: &[SocketAddr]) {
        let (on_host, elsewhere) = servers(listen);
        // A program must not see half of an address.
        let until_ns = 0u64;
        self.control.store_field(0, 0, &until_ns);
        wait_for_programs(self.program_wait.as_ref());
        self.control.store(0, &InterceptControl { until_ns, on_host, elsewhere });
    }

    /// Sets at which ports, beside 53, a server is one that the daemon forwards to.
    fn set_ports(&mut self, upstreams: &BTreeSet<SocketAddr>) {
        let ports = upstreams.iter().map(|upstream| u64::from(upstream.port()));
        let ports = ports.filter(|&port| port != u64::from(DNS_PORT));
        // The search finds those that have no room here.
        let ports = ports.collect::<BTreeSet<u64>>().into_iter().take(MAX_UPSTREAM_PORTS).collect();
        if let Err(error) = replace_keys(&mut self.ports, &ports).map_err(io_error) {
            tracing::warn!("dns.intercept: the ports of other resolvers can't be set: {error}");
        }
    }

    /// Begins a search of all these cgroups, if none runs.
    fn begin_search(&mut self, settings: &InterceptSettings, scope: &Path) {
        self.search.begin(|| Searched {
            cgroups: FoundCgroups::of(&settings.cgroups, scope).cgroups.into_values().collect(),
            upstreams: settings.upstreams.clone(),
            servers: if settings.is_verified { elsewhere(&settings.listen) } else { Vec::new() },
        });
    }

    /// Whether something waits for a search that begins from now on.
    fn waits(&self) -> bool {
        !self.begun.is_empty() || self.searched_ns < self.changed_ns
    }

    /// Takes over which cgroups have DNS servers, and has the queries of the others intercepted.
    fn take_over(&mut self, found: Option<FoundResolvers>) {
        let Some(FoundResolvers { began_ns, cgroups, unreached }) = found else { return };
        let Some(resolvers) = self.checked(cgroups) else { return };
        if let Some(unreached) = unreached {
            self.leave_out(unreached);
        }
        let mut set = || -> Result<(), aya::maps::MapError> {
            for entry in self.resolvers.iter().collect::<Vec<_>>() {
                let (Plain(resolver), Plain(since_ns)) = entry?;
                // One that was bound since then may have been missed.
                if !resolvers.contains(&resolver) && since_ns < began_ns {
                    self.resolvers.remove(&Plain(resolver))?;
                }
            }
            self.add_resolvers(&resolvers, began_ns)
        };
        if let Err(error) = set().map_err(io_error) {
            tracing::warn!("dns.intercept: DNS servers can't be left out: {error}");
            return;
        }
        self.searched_ns = began_ns;
        self.complete(began_ns);
    }

    /// Leaves out the network namespaces that get no answers.
    fn leave_out(&mut self, Unreached { cookies, note }: Unreached) {
        if let Some(new) = note.as_ref().filter(|_| note != self.unreached_note) {
            tracing::warn!("dns.intercept: {new}");
        }
        self.unreached_note = note;
        if let Err(error) = replace_keys(&mut self.unreached, &cookies).map_err(io_error) {
            tracing::warn!("dns.intercept: network namespaces can't be left out: {error}");
        }
    }

    fn add_resolvers(
        &mut self,
        resolvers: &BTreeSet<ResolverCgroup>,
        now_ns: u64,
    ) -> Result<(), aya::maps::MapError> {
        resolvers
            .iter()
            .try_for_each(|&resolver| self.resolvers.insert(Plain(resolver), Plain(now_ns), 0))
    }

    /// Remembers whether a search has failed: until one hasn't nothing is intercepted.
    fn checked(
        &mut self,
        found: Result<BTreeSet<ResolverCgroup>, String>,
    ) -> Option<BTreeSet<ResolverCgroup>> {
        let failed = found.as_ref().err().cloned();
        if let Some(new) = failed.as_ref().filter(|_| failed != self.unsafe_reason) {
            tracing::warn!("the unit {UNIT} intercepts nothing: {new}");
        }
        self.unsafe_reason = failed;
        found.ok()
    }

    /// Follows these cgroups. DNS servers in new ones are known before a query is intercepted: those that are
    /// bound from now on by the first programs, others by the next search.
    fn begin(&mut self, FoundCgroups { cgroups, notes }: FoundCgroups) {
        for note in notes.iter().filter(|note| !self.notes.contains(note)) {
            tracing::warn!("{note}");
        }
        self.notes = notes;
        // What is dropped is detached, and what is gone was by the kernel.
        self.attached.retain(|cgroup_id, attached| {
            cgroups.contains_key(cgroup_id) && attached.is_whole(*cgroup_id)
        });
        self.begun.retain(|cgroup_id, begun| {
            cgroups.contains_key(cgroup_id) && begun.attached.is_whole(*cgroup_id)
        });
        let mut problem = None;
        for (cgroup_id, path) in cgroups {
            if self.attached.contains_key(&cgroup_id) || self.begun.contains_key(&cgroup_id) {
                continue;
            }
            match AttachedCgroup::begin(&self.ebpf, cgroup_id, &path) {
                Ok(Some(attached)) => {
                    let since_ns = monotonic_ns();
                    self.begun.insert(cgroup_id, BegunCgroup { path, attached, since_ns });
                }
                // It has gone meanwhile.
                Ok(None) => {}
                Err(error) => problem = problem.or(Some(cant_attach(&path, &error))),
            }
        }
        // Otherwise the end of the search shows it.
        if problem.is_some() || self.begun.is_empty() {
            self.set_problem(problem);
        }
    }

    /// Attaches the other programs to those that a search has seen which began then.
    fn complete(&mut self, began_ns: u64) {
        let seen: Vec<_> =
            self.begun.extract_if(.., |_, begun| begun.since_ns <= began_ns).collect();
        let mut problem = None;
        for (cgroup_id, BegunCgroup { path, mut attached, .. }) in seen {
            match attached.complete(&self.ebpf) {
                Ok(()) => {
                    tracing::info!("DNS queries from {} are intercepted", path.display());
                    self.attached.insert(cgroup_id, attached);
                }
                Err(_) if !path.exists() => {}
                Err(error) => problem = problem.or(Some(cant_attach(&path, &error))),
            }
        }
        if problem.is_some() || self.begun.is_empty() {
            self.set_problem(problem);
        }
    }

    fn set_problem(&mut self, problem: Option<String>) {
        if let Some(new) = problem.as_ref().filter(|_| problem != self.problem) {
            tracing::warn!("the unit {UNIT} doesn't run everywhere: {new}");
        }
        self.problem = problem;
    }
}

fn cant_attach(path: &Path, error: &io::Error) -> String {
    format!("it can't be attached to {}: {error}", path.display())
}

impl AttachedCgroup {
    /// Attaches the programs that find DNS servers; `None` where the cgroup isn't there any more.
    fn begin(ebpf: &Ebpf, cgroup_id: u64, path: &Path) -> io::Result<Option<AttachedCgroup>> {
        let directory = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        if directory.metadata()?.st_ino() != cgroup_id {
            return Ok(None);
        }
        let mut attached = AttachedCgroup { directory, links: Vec::new() };
        match attached.attach(ebpf, &PROGRAMS[..N_BIND_PROGRAMS]) {
            Err(_) if !path.exists() => Ok(None),
            begun => begun.map(|()| Some(attached)),
        }
    }

    /// Attaches the others.
    fn complete(&mut self, ebpf: &Ebpf) -> io::Result<()> {
        self.attach(ebpf, &PROGRAMS[N_BIND_PROGRAMS..])
    }

    fn attach(&mut self, ebpf: &Ebpf, programs: &[(&'static str, AttachType)]) -> io::Result<()> {
        for &(program, attach_type) in programs {
            let program = program_fd(ebpf, program).map_err(io::Error::other)?;
            self.links.push(Link::attach(program, self.directory.as_fd(), attach_type)?);
        }
        Ok(())
    }

    /// Whether nothing has detached a program.
    fn is_whole(&self, cgroup_id: u64) -> bool {
        let is_attached = |link: &Link| {
            let info = link.info().ok().flatten();
            // A kernel that doesn't answer is no reason to attach again.
            info.is_none_or(|info| info.cgroup_id == cgroup_id)
        };
        self.links.iter().all(is_attached)
    }
}

/// Has a hash have these keys, each with 1.
fn replace_keys(
    hash: &mut Hash<u64, u64>,
    keys: &BTreeSet<u64>,
) -> Result<(), aya::maps::MapError> {
    for present in hash.keys().collect::<Vec<_>>() {
        let Plain(key) = present?;
        if !keys.contains(&key) {
            hash.remove(&Plain(key))?;
        }
    }
    keys.iter().try_for_each(|&key| hash.insert(Plain(key), Plain(1), 0))
}

/// Where queries from other network namespaces go.
fn elsewhere(listen: &[SocketAddr]) -> Vec<SocketAddr> {
    let (_, DnsServers { ipv4, ipv6 }) = servers(listen);
    let is_one = |address: &&SocketAddr| [ipv4, ipv6].contains(&dns_server(**address));
    listen.iter().filter(is_one).copied().collect()
}

/// Where queries from the host's network namespace go, and those from others.
fn servers(listen: &[SocketAddr]) -> (DnsServers, DnsServers) {
    let server =
        |found: Option<&SocketAddr>| found.copied().map_or_else(DnsServer::default, dns_server);
    let of = |is_ipv4: bool| {
        let usable = move |address: &&SocketAddr| {
            address.is_ipv4() == is_ipv4 && !is_link_local(&address.ip())
        };
        let is_loopback = |address: &&SocketAddr| address.ip().is_loopback();
        let loopback = listen.iter().filter(usable).find(is_loopback);
        let other = listen.iter().filter(usable).find(|address| !is_loopback(address));
        (server(loopback.or(other)), server(other))
    };
    let ((host4, other4), (host6, other6)) = (of(true), of(false));
    (DnsServers { ipv4: host4, ipv6: host6 }, DnsServers { ipv4: other4, ipv6: other6 })
}

fn dns_server(address: SocketAddr) -> DnsServer {
    let octets = match address.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    };
    DnsServer::new(Address { octets }, address.port())
}

/// Each interface has a network of its own of these, so the address alone leads nowhere.
fn is_link_local(ip: &IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
}

/// Problems of `dns.intercept` for a server that listens on these, a sentence each.
pub fn intercept_problems(wanted: &Intercepted, listen: &[SocketAddr]) -> Vec<String> {
    // Those outside of the served cgroup are known when it is.
    let FoundCgroups { cgroups, notes } = FoundCgroups::of(wanted, Path::new("/"));
    let cgroups = cgroups.into_values().collect();
    let searched = search(Searched { cgroups, upstreams: BTreeSet::new(), servers: Vec::new() });
    let notes = searched.err().into_iter().chain(notes);
    notes.chain(unreached(listen).map(str::to_owned)).collect()
}

/// What processes in other network namespaces than the host's lack, if anything.
fn unreached(listen: &[SocketAddr]) -> Option<&'static str> {
    let (_, elsewhere) = servers(listen);
    (elsewhere == DnsServers::default()).then_some(
        "containers with a network namespace of their own ask their own resolvers, because dns.listen has \
         only loopback addresses, which they don't reach; add an address of an interface of this host",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_queries_go() {
        let shown = |server: DnsServer| match (server.port, server.address.to_v4()) {
            (0, _) => "-".to_owned(),
            (port, Some(octets)) => SocketAddr::from((octets, port)).to_string(),
            (port, None) => SocketAddr::from((server.address.octets, port)).to_string(),
        };
        let table = [
            (&["127.0.0.1:53"][..], ["127.0.0.1:53", "-", "-", "-"]),
            (
                &["169.254.53.53:53", "127.0.0.1:5354", "[::1]:53"],
                ["127.0.0.1:5354", "[::1]:53", "169.254.53.53:53", "-"],
            ),
            (&["10.0.0.1:53"], ["10.0.0.1:53", "-", "10.0.0.1:53", "-"]),
            (&["[fe80::1]:53", "[fd00::1]:53"], ["-", "[fd00::1]:53", "-", "[fd00::1]:53"]),
            (&[], ["-"; 4]),
        ];
        for (listen, expected) in table {
            let listen: Vec<SocketAddr> =
                listen.iter().map(|address| address.parse().unwrap()).collect();
            let (on_host, elsewhere) = servers(&listen);
            let found = [on_host.ipv4, on_host.ipv6, elsewhere.ipv4, elsewhere.ipv6].map(shown);
            assert_eq!(found, expected, "{listen:?}");
        }
    }
}

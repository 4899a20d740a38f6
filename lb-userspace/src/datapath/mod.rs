//! The datapath: the kernel side, kept in step with the table.
//!
//! Only this part knows aya and lb-common, and only here does the order of bytes matter.
//! [`Datapath::start`] brings the programs into the kernel, or takes over what an earlier daemon left
//! there, [`Datapath::apply`] brings the maps to a table, and [`Datapath::fix`] sees to it that the hooks
//! stay where they are.

mod activity;
mod alias;
mod bpf;
mod btf;
mod buddy;
mod bypass;
mod cause;
pub mod diag;
mod events;
mod features;
mod handle;
mod ids;
mod kernel;
mod links;
mod map_specs;
mod maps;
mod object;
mod obstacles;
mod pins;
pub mod probe;
mod prog_stats;
mod reconcile;
pub mod route;
mod socket_terminator;

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use aya::programs::ProgramError;
use aya::{Ebpf, EbpfError};
use lb_common::{Control, Counter, ENTRIES_PER_BACKEND, LAYOUT, N_COUNTERS};

use crate::config::cgroup::{self, ScopeError};
use crate::config::{Config, DatapathConfig, VipConfig};
use crate::table::Table;
use activity::Usage;
use cause::{Machine, Step};
use kernel::{ControlBlock, KernelMaps};
use links::{Links, Scope};
use map_specs::{Sizes, socket_shapes};
use object::load;
use pins::{PinnedMaps, Pins};
use reconcile::{AdoptError, Reconciler, Served};
use socket_terminator::Disconnector;

pub use bpf::netns_cookie;
pub use events::Reports;
pub use features::{Features, Limit};
pub use handle::{Hooks, Mode, SharedDatapath};
pub use kernel::{Counters, ServiceCounters};
pub use lb_common::{RejectMethod, UdpConnects};
pub use links::Attachment;
pub use obstacles::Obstacle;
pub use pins::{PinError, Safety, is_bpffs, look as look_at_pins, nearest as nearest_directory};
pub use prog_stats::{Cost, Measuring};
pub use reconcile::{ApplyError, Indices, Pressure};

/// Why the kernel side can't be had.
#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    /// The kernel didn't take the object.
    #[error("the kernel refused the eBPF object; {fix}", fix = fix_of_load(.0))]
    Load(#[source] EbpfError),
    /// The kernel didn't take a program of a few instructions that shows what it offers.
    #[error("the kernel refused a program that shows what it offers: {source}; {fix}{}", after(.log))]
    Probe {
        /// What the kernel said.
        source: io::Error,
        /// What to do about it.
        fix: String,
        /// What the verifier wrote.
        log: String,
    },
    /// The kernel didn't take a program.
    #[error("the kernel refused the program {program}; {fix}", fix = fix_of_program(source))]
    Program {
        /// The program.
        program: &'static str,
        /// What the kernel said.
        source: ProgramError,
    },
    /// The object isn't the one that this daemon was built with.
    #[error("the eBPF object has no {missing}: build the daemon again")]
    Object {
        /// The map or program.
        missing: &'static str,
    },
    /// A map can't be used.
    #[error("can't use a map: {source}")]
    Map {
        /// What aya said.
        source: aya::maps::MapError,
    },
    /// A map can't be mapped into memory.
    #[error("can't map {map} into memory: {source}")]
    Mmap {
        /// The map.
        map: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// New maps hold less than those that they are to replace, which serve on.
    #[error(
        "the new maps don't hold {n_services} of the services that are served, such as {name}: {reason}"
    )]
    HoldsLess {
        /// How many services they lack.
        n_services: usize,
        /// One of them.
        name: String,
        /// Why it isn't in them.
        reason: String,
    },
    /// The cgroup can't be served.
    #[error(transparent)]
    Scope(#[from] ScopeError),
    /// The pins can't be used.
    #[error(transparent)]
    Pins(#[from] PinError),
    /// The maps of an earlier daemon can't be read.
    #[error(transparent)]
    Adopt(#[from] AdoptError),
    /// The cgroup can't be attached to.
    #[error("can't open the cgroup {cgroup}: {source}; name a cgroup v2 directory with --cgroup")]
    Cgroup {
        /// The directory.
        cgroup: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The directory isn't a cgroup v2 one, or the process may not attach to it.
    #[error("can't attach {program} to {cgroup}: {source}; {fix}")]
    Attach {
        /// The program.
        program: &'static str,
        /// The directory.
        cgroup: PathBuf,
        /// What the kernel said.
        source: io::Error,
        /// What to do about it.
        fix: String,
    },
    /// Another program holds a hook exclusively.
    #[error("{}; {}", .0, .0.fix())]
    Held(Obstacle),
    /// A link can't be pinned or detached.
    #[error("can't {action} the link {link}: {source}")]
    Link {
        /// `pin`, `look at` or `detach`.
        action: &'static str,
        /// The pin.
        link: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

fn fix_of_load(error: &EbpfError) -> String {
    let step = match error {
        EbpfError::MapError(_) => Step::Map,
        _ => Step::Program { has_log: false },
    };
    fix(step, error)
}

fn fix_of_program(error: &ProgramError) -> String {
    let has_log = match error {
        ProgramError::LoadError { verifier_log, .. } => !verifier_log.to_string().is_empty(),
        _ => false,
    };
    fix(Step::Program { has_log }, error)
}

fn fix(step: Step, error: &(dyn std::error::Error + 'static)) -> String {
    match cause::root_cause(error) {
        Some(error) => Machine::look().fix(step, error),
        None => "please report this".to_owned(),
    }
}

fn after(log: &str) -> String {
    if log.is_empty() { String::new() } else { format!("\n{log}") }
}

/// What a datapath is made from.
#[derive(Clone, Debug)]
pub struct Options {
    /// The sizes of the maps, and the cgroups that are left alone.
    pub datapath: DatapathConfig,
    /// The pools.
    pub vip: VipConfig,
    /// The directory for the pins, on a BPF file system.
    pub bpffs: PathBuf,
    /// The cgroup whose processes are served.
    pub scope: PathBuf,
    /// The layout's version. Another than today's is for tests of taking over.
    pub layout: u16,
    /// How to refuse a connection; `None` for the best that this kernel has.
    pub refusal: Option<RejectMethod>,
    /// The cookie of the host's network namespace; `None` for the one of this process.
    pub host_netns: Option<u64>,
    /// Whether connections are only counted from the first one on. If not, what an earlier daemon left
    /// holds until [`Datapath::set_shadow`] says otherwise.
    pub is_shadow: bool,
}

impl Options {
    /// The options of a configuration.
    pub fn of(config: &Config, scope: &Path) -> Options {
        Options {
            datapath: config.datapath.clone(),
            vip: config.vip.clone(),
            bpffs: config.bpffs.clone(),
            scope: scope.into(),
            layout: LAYOUT,
            refusal: None,
            host_netns: None,
            is_shadow: config.shadow,
        }
    }
}

/// The kernel side.
#[derive(Debug)]
pub struct Datapath {
    ebpf: Ebpf,
    reconciler: Reconciler<KernelMaps>,
    counters: Counters,
    usage: Usage,
    board: ControlBlock,
    links: Links,
    pins: Pins,
    pinned_maps: PinnedMaps,
    disconnector: Disconnector,
    features: Features,
    excluded: Vec<PathBuf>,
    /// What an operator should know of what is served and what is left alone.
    notes: Vec<String>,
    exclusions: Vec<String>,
    pool_network: Ipv4Addr,
    is_adopted: bool,
}

impl Datapath {
    /// Loads the programs, over the maps that an earlier daemon pinned or over new ones, and
    /// attaches them: in the place of the earlier ones where there are any. New maps that replace
    /// others count only once [`Datapath::apply`] has filled them.
    ///
    /// Minimum kernel: 5.10.
    ///
    /// # Errors
    /// When another daemon has the pins, something else has their names, the scope is no cgroup v2
    /// directory, or the kernel refuses for lack of a feature or of privileges. Then an earlier
    /// daemon's datapath goes on, and nothing new is left behind.
    pub fn start(options: &Options) -> Result<Datapath, DatapathError> {
        let note = cgroup::inspect(&options.scope)?;
        let scope = links::open_scope(&options.scope)?;
        // Before anything is made. Where the kernel can't be asked, attaching shows it.
        if let Ok(Some(obstacle)) = find_obstacle(&options.scope, &options.bpffs) {
            return Err(DatapathError::Held(obstacle));
        }
        let mut features = Features::probe()?;
        if let Some(refusal) = options.refusal {
            features.refusal = refusal;
        }
        let pins = Pins::open(&options.bpffs, options.layout)?;
        let (was_empty, had_links) = (pins.is_empty()?, !pins.all_links()?.is_empty());
        let storages = pins.take_other_storages()?;
        let started = Datapath::start_over(pins, &scope, options, features).map(|mut datapath| {
            datapath.notes.extend(note);
            datapath
        });
        if started.is_err()
            && let Err(error) = undo_start(options, storages, had_links, was_empty)
        {
            // What the start failed at is what has to be known.
            tracing::warn!("what the failed start has made couldn't be taken away: {error}");
        }
        started
    }

    /// Starts over what is pinned.
    fn start_over(
        pins: Pins,
        scope: &Scope,
        options: &Options,
        features: Features,
    ) -> Result<Datapath, DatapathError> {
        pins.make_directories()?;
        pins.are_there(&pins.sockets(), &socket_shapes())?;
        let is_live = links::are_live(&pins, scope)?;
        let Fitted { sizes, note, served, mut loaded } =
            Fitted::new(options, &pins, &features, is_live)?;

        if loaded.is_none() && pins.are_there(&pins.maps(), &sizes.shapes())? {
            loaded = Loaded::over_earlier(options, &sizes, &pins, &features, is_live)?;
        }
        let is_adopted = loaded.is_some();
        let loaded = match loaded {
            Some(loaded) => loaded,
            None => {
                pins.forget_maps()?;
                Loaded::over_new(load(options, &sizes, &pins, &features)?, &sizes)?
            }
        };
        let Loaded { ebpf, mut reconciler } = loaded;
        if !is_adopted {
            reconciler.prefer_served(served);
        }
        let maps = reconciler.maps_mut();
        let (counters, board) = (maps.counters(), maps.board());
        let usage = Usage::begin(reconciler.services(), counters.clone());
        let maps = reconciler.maps_mut();
        let disconnector = Disconnector::new(maps.generations(), pins.sockets());
        let map_names = sizes.shapes().into_iter().map(|shape| pins.maps().join(shape.name));
        let socket_names = socket_shapes().map(|shape| pins.sockets().join(shape.name));
        let pinned_maps = PinnedMaps::open(map_names.chain(socket_names))?;
        let mut datapath = Datapath {
            ebpf,
            reconciler,
            counters,
            usage,
            board,
            links: Links::new(&options.scope),
            pins,
            pinned_maps,
            disconnector,
            features,
            excluded: options.datapath.exclude_cgroups.clone(),
            notes: note.into_iter().collect(),
            exclusions: Vec::new(),
            pool_network: options.vip.pool.network(),
            is_adopted,
        };
        datapath.introduce(options.host_netns);
        // Before a connection can meet programs of ours.
        if options.is_shadow {
            datapath.set_shadow(true);
        }
        datapath.look_up_excluded();
        // What is empty must not take the place of what works.
        if is_adopted || !is_live {
            let switched = datapath.links.switch(&mut datapath.ebpf, &datapath.pins);
            // The maps may be read on, and another process get our number.
            switched.inspect_err(|_| datapath.keep())?;
        }
        Ok(datapath)
    }

    /// Says who this daemon is.
    fn introduce(&self, host_netns: Option<u64>) {
        let mut daemon = self.board.daemon();
        match host_netns.map_or_else(netns_cookie, Ok) {
            Ok(cookie) => daemon.host_netns = cookie,
            Err(error) => tracing::info!(
                "this kernel doesn't tell the network namespace's cookie ({error}): it is learnt \
                 from a connect"
            ),
        }
        daemon.pid = std::process::id().into();
        daemon.tgid = daemon.pid;
        daemon.heartbeat_ns = monotonic_ns();
        self.board.set_daemon(daemon);
    }

    fn look_up_excluded(&mut self) {
        // Without them the programs don't look either.
        if self.excluded.is_empty() {
            return;
        }
        let mut found = bypass::find(&self.excluded);
        self.board.set_excluded(&found.place(&self.board.excluded()));
        self.exclusions = found.problems;
    }

    /// What an operator should know of whose connections are translated and whose are left alone.
    pub fn notes(&self) -> impl Iterator<Item = &String> {
        self.notes.iter().chain(&self.exclusions)
    }

    /// Brings the maps to `table`. Returns the services that couldn't be brought there, each with
    /// the reason; their former state serves on, and the next call tries them again.
    ///
    /// # Errors
    /// When the maps were new and the hooks couldn't be switched to them, or don't lead to a service
    /// from everywhere that the former ones do ([`DatapathError::HoldsLess`]): the former ones go on.
    pub fn apply(
        &mut self,
        table: &Table,
    ) -> Result<BTreeMap<Arc<str>, ApplyError>, DatapathError> {
        let errors = self.reconciler.apply(table);
        // What holds less must not take the place of what works.
        let unserved = self.reconciler.unserved(table, &errors);
        if let Some((name, error)) = unserved.first_key_value()
            && self.are_others_live()
        {
            return Err(DatapathError::HoldsLess {
                n_services: unserved.len(),
                name: name.to_string(),
                reason: error.to_string(),
            });
        }
        self.disconnector.disconnect(self.reconciler.take_left_udp());
        let daemon = self.board.daemon();
        self.board.set_daemon(Control {
            is_synced: 1,
            table_generation: table.generation,
            ..daemon
        });
        if !self.links.are_ours() {
            self.links.switch(&mut self.ebpf, &self.pins)?;
        }
        self.reconciler.forget_served();
        Ok(errors)
    }

    /// Whether an earlier daemon's hooks serve the scope. Where the pins can't be read they may.
    fn are_others_live(&self) -> bool {
        !self.links.are_ours()
            && links::open_scope(self.links.scope())
                .and_then(|scope| links::are_live(&self.pins, &scope))
                .unwrap_or(true)
    }

    /// Whether the maps are an earlier daemon's.
    pub fn is_adopted(&self) -> bool {
        self.is_adopted
    }

    /// The services that the maps hold, each with its VIPs.
    pub fn names(&self) -> Vec<(Arc<str>, Vec<IpAddr>)> {
        self.reconciler.names().map(|(name, vips)| (name.clone(), vips.collect())).collect()
    }

    /// The services that the kernel has backends for, in lower case.
    pub fn in_use(&self) -> Vec<Arc<str>> {
        let serves =
            |name: &str| self.indices(name).is_some_and(|indices| !indices.backends.is_empty());
        self.reconciler.names().map(|(name, _)| name.clone()).filter(|name| serves(name)).collect()
    }

    /// Looks at every link and pin, and attaches and pins again what somebody took away. Frees what
    /// the last changes gave up.
    pub fn fix(&mut self) -> Attachment {
        self.look_up_excluded();
        self.reconciler.recycle();
        let pinned = self.pins.fix().and_then(|()| self.pinned_maps.fix());
        let mut attachment = self.links.fix(&mut self.ebpf, &self.pins);
        if let Err(error) = pinned {
            attachment.problem.get_or_insert(error.to_string());
        }
        attachment
    }

    /// Says that the daemon lives, and how old the table is, if it is known.
    pub fn beat(&self, table_age: Option<Duration>) {
        let now = monotonic_ns();
        let mut daemon = self.board.daemon();
        daemon.heartbeat_ns = now;
        if let Some(age) = table_age {
            daemon.table_ns = now.saturating_sub(age.as_nanos() as u64);
        }
        self.board.set_daemon(daemon);
    }

    /// The cgroup whose processes are served.
    pub fn scope(&self) -> &Path {
        self.links.scope()
    }

    /// Whether the hooks run this datapath's programs, and not an earlier daemon's.
    pub fn are_hooks_ours(&self) -> bool {
        self.links.are_ours()
    }

    /// What connects to prove that the hooks run.
    pub fn prober(&self) -> probe::Prober {
        probe::Prober::new(self.board.clone(), self.pool_network, self.links.scope())
    }

    /// Takes note of what a connect() of our own showed. The network namespace's cookie that an
    /// earlier daemon learnt gives way to the one that the hook saw now.
    pub fn learn(&self, probe: probe::Seen) {
        let daemon = self.board.daemon();
        // From inside a process namespace our own number isn't the kernel's.
        let tgid = if probe.is_own { probe.seen.tgid } else { daemon.tgid };
        let host_netns = probe.seen.netns;
        if (tgid, host_netns) != (daemon.tgid, daemon.host_netns) {
            self.board.set_daemon(Control { tgid, host_netns, ..daemon });
        }
    }

    /// Has connections only counted from now on, or translated; at once, without a reload.
    pub fn set_shadow(&self, is_shadow: bool) {
        let daemon = Control { is_shadow: is_shadow.into(), ..self.board.daemon() };
        self.board.set_daemon(daemon);
    }

    /// Whether connections are only counted.
    pub fn is_shadow(&self) -> bool {
        self.board.daemon().is_shadow != 0
    }

    /// The services that were connected to since the last call or, at first, since the start; those that
    /// were refused or only counted too. Datagrams of a flow that goes on are no connections.
    pub fn active_since_last(&mut self) -> Vec<Arc<str>> {
        self.usage.active_since_last(self.reconciler.services())
    }

    /// What tells of connections of services that aren't followed, once.
    ///
    /// # Errors
    /// When it was taken already, or can't be mapped into memory.
    pub fn take_reports(&mut self) -> Result<Reports, DatapathError> {
        let names = self.reconciler.maps_mut().names();
        Reports::take(&mut self.ebpf, names)
    }

    /// The indices that the kernel knows a service and its backends by.
    pub fn indices(&self, name: &str) -> Option<Indices> {
        self.reconciler.indices(name)
    }

    /// The index that the kernel knows each service by.
    pub fn service_indices(&self) -> Vec<(Arc<str>, u32)> {
        self.reconciler.service_indices().map(|(name, idx)| (name.clone(), idx)).collect()
    }

    /// How full each map is.
    pub fn pressure(&self) -> Vec<(&'static str, Pressure)> {
        self.reconciler.pressure()
    }

    /// A handle to what the programs count.
    pub fn counters(&self) -> Counters {
        self.counters.clone()
    }

    /// How this kernel refuses a connection.
    pub fn refusal(&self) -> RejectMethod {
        self.features.refusal
    }

    /// What this kernel lacks, without which nohop works all the same.
    pub fn limits(&self) -> &[Limit] {
        &self.features.limits
    }

    /// What reads the programs' log, once.
    pub fn take_voice(&mut self) -> Option<aya_log::EbpfLogger<&'static dyn log::Log>> {
        aya_log::EbpfLogger::init(&mut self.ebpf)
            .inspect_err(|error| tracing::warn!("the programs' log can't be read: {error}"))
            .ok()
    }

    /// Leaves everything as it is, for the next daemon.
    pub fn keep(&self) {
        // Another process may get our number.
        self.board.set_daemon(Control { pid: 0, tgid: 0, ..self.board.daemon() });
    }

    /// Detaches the programs, what translates back last, and takes all pins away. It is no error if
    /// somebody did already.
    pub fn detach(&mut self) {
        self.links.detach(&self.pins);
        if let Err(error) = self.pins.remove_all() {
            tracing::warn!("{error}");
        }
    }
}

/// The sizes of the maps, and what follows from the maps of an earlier daemon.
struct Fitted {
    sizes: Sizes,
    /// Why the sizes aren't the configuration's.
    note: Option<String>,
    /// The services that the earlier maps serve, where these were looked at.
    served: Served,
    /// Over the earlier maps, where those are used on although other sizes are configured.
    loaded: Option<Loaded>,
}

impl Fitted {
    /// As configured, but where that has no room for what earlier maps serve: those keep their sizes.
    fn new(
        options: &Options,
        pins: &Pins,
        features: &Features,
        is_live: bool,
    ) -> Result<Fitted, DatapathError> {
        let wanted = Sizes::of(&options.datapath, &options.vip);
        let as_wanted = Fitted { sizes: wanted, note: None, served: Served::new(), loaded: None };
        let earlier = Sizes::pinned(&pins.maps()).filter(|earlier| is_live && *earlier != wanted);
        let Some(earlier) = earlier else { return Ok(as_wanted) };
        if !pins.are_there(&pins.maps(), &earlier.shapes())? {
            return Ok(as_wanted);
        }
        let Some(loaded) = Loaded::over_earlier(options, &earlier, pins, features, is_live)? else {
            return Ok(as_wanted);
        };
        let (in_use, served) = (loaded.reconciler.in_use(), loaded.reconciler.served());
        let sizes = wanted.with_room_for(&in_use, &earlier);
        let note = too_small(options, &wanted, &sizes, &in_use);
        let loaded = (sizes == earlier).then_some(loaded);
        Ok(Fitted { sizes, note, served, loaded })
    }
}

/// What is wrong with sizes that have no room for what is in use.
fn too_small(options: &Options, wanted: &Sizes, kept: &Sizes, in_use: &Sizes) -> Option<String> {
    let DatapathConfig { max_services, max_backends, .. } = options.datapath;
    let said = |key: &str, value: u32, n: u32, of: &str, kept: u32| {
        format!(
            "datapath.{key} = {value} has no room for the {n} {of} that are served: the kernel keeps room \
             for {kept}, so that none is lost; raise the key, or restart once there are fewer"
        )
    };
    let (services, backends) = (("max_services", max_services), ("max_backends", max_backends));
    // Of backends and slots there is room for those that a change replaces, too.
    let maps = [
        (services, "services", [wanted, kept, in_use].map(|of| of.services), 1),
        (services, "frontends", [wanted, kept, in_use].map(|of| of.frontends), 1),
        (services, "IPv6 frontends", [wanted, kept, in_use].map(|of| of.frontends6), 1),
        (backends, "backends", [wanted, kept, in_use].map(|of| of.backends), ENTRIES_PER_BACKEND),
        (backends, "slots", [wanted, kept, in_use].map(|of| of.slots), 2),
    ];
    maps.into_iter().find(|(_, _, [wanted, kept, _], _)| kept > wanted).map(
        |((key, value), what, [_, kept, in_use], per)| said(key, value, in_use, what, kept / per),
    )
}

/// The object in the kernel, not yet attached.
struct Loaded {
    ebpf: Ebpf,
    reconciler: Reconciler<KernelMaps>,
}

impl Loaded {
    /// Over the pinned maps; `None` when they don't serve: what is new is better made anew then.
    fn over_earlier(
        options: &Options,
        sizes: &Sizes,
        pins: &Pins,
        features: &Features,
        is_live: bool,
    ) -> Result<Option<Loaded>, DatapathError> {
        let mut ebpf = load(options, sizes, pins, features)?;
        let maps = KernelMaps::take(&mut ebpf)?;
        // An earlier daemon died while it filled new maps; the hooks read the former ones.
        if is_live && maps.board().daemon().is_synced == 0 {
            return Ok(None);
        }
        match Reconciler::adopt(maps, sizes, fastrand::u32(..)) {
            Ok(reconciler) => Ok(Some(Loaded { ebpf, reconciler })),
            Err(error @ AdoptError::Inconsistent { .. }) => {
                tracing::warn!("{error}; they are made anew");
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn over_new(mut ebpf: Ebpf, sizes: &Sizes) -> Result<Loaded, DatapathError> {
        let maps = KernelMaps::take(&mut ebpf)?;
        let reconciler = Reconciler::new(maps, sizes, fastrand::u32(..));
        Ok(Loaded { ebpf, reconciler })
    }
}

/// Takes away what a failed start has made, and pins again what it has set aside.
fn undo_start(
    options: &Options,
    storages: PinnedMaps,
    had_links: bool,
    was_empty: bool,
) -> Result<(), DatapathError> {
    let Some(pins) = Pins::open_existing(&options.bpffs)? else { return Ok(()) };
    storages.put_back()?;
    if !had_links {
        links::detach_pinned(&pins)?;
    }
    if was_empty {
        pins.remove_all()?;
    }
    Ok(())
}

/// What keeps our programs from `scope`; `None` where nothing does. Hooks where links pinned in
/// `bpffs` hold need no new one.
///
/// # Errors
/// When the kernel can't be asked, such as for lack of CAP_NET_ADMIN.
pub fn find_obstacle(scope: &Path, bpffs: &Path) -> io::Result<Option<Obstacle>> {
    let live = links::live(bpffs, scope);
    obstacles::find(scope, |hook| !live.contains(hook.program))
}

/// Detaches and removes whatever a daemon left pinned in `bpffs`. Returns the number of links.
///
/// # Errors
/// When a daemon still runs there, or the kernel refuses.
pub fn unload(bpffs: &Path) -> Result<usize, DatapathError> {
    let Some(pins) = Pins::open_existing(bpffs)? else { return Ok(0) };
    let n_links = links::detach_pinned(&pins)?;
    pins.remove_all()?;
    Ok(n_links)
}

/// What keeps `datapath.exclude_cgroups` from excluding what it names: patterns that match nothing now,
/// and cgroups that there is no room for.
pub fn exclusion_problems(patterns: &[PathBuf]) -> Vec<String> {
    let mut found = bypass::find(patterns);
    found.place(&[]);
    found.problems
}

/// The counters that no service owns, with the names they have in `status`.
pub const COUNTERS: [(&str, Counter); N_COUNTERS] = [
    ("refused_no_frontend", Counter::RefusedNoFrontend),
    ("no_socket_storage", Counter::StorageAllocFailed),
    ("inconsistent", Counter::Inconsistent),
    ("bypassed", Counter::Bypassed),
    ("backend_gone", Counter::StaleBackend),
    ("shadowed", Counter::Shadowed),
    ("shadowed_no_frontend", Counter::ShadowedNoFrontend),
    ("udp_no_frontend", Counter::UdpNoFrontend),
    ("flows_full", Counter::FlowsFull),
];

/// CLOCK_MONOTONIC, which is what the programs read too.
fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is short is what the note names.
    #[test]
    fn too_small_names_what_is_short() {
        let config = Config::default();
        let options = Options::of(&config, Path::new("/"));
        let wanted = Sizes { services: 4, frontends: 8, frontends6: 8, slots: 32, backends: 16 };
        let in_use = Sizes { services: 3, frontends: 9, frontends6: 10, slots: 40, backends: 7 };
        let table = [
            (
                Sizes { services: 5, ..wanted },
                "the 3 services that are served: the kernel keeps room for 5",
            ),
            (Sizes { frontends: 16, ..wanted }, "the 9 frontends that"),
            (Sizes { frontends6: 16, ..wanted }, "the 10 IPv6 frontends that"),
            (
                Sizes { slots: 128, ..wanted },
                "datapath.max_backends = 131072 has no room for the 40 slots",
            ),
            (Sizes { backends: 64, ..wanted }, "the 7 backends that"),
        ];
        for (kept, expected) in table {
            let note = too_small(&options, &wanted, &kept, &in_use).unwrap();
            assert!(note.contains(expected), "no {expected:?} in {note}");
        }
        assert_eq!(too_small(&options, &wanted, &wanted, &in_use), None);
    }
}

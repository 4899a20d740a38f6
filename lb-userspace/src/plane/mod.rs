//! The plane: the kernel side, kept in step with the table.
//!
//! Only this part knows aya and lb-common, and only here does the order of bytes matter.
//! [`Plane::start`] brings the programs into the kernel, or takes over what an earlier daemon left
//! there, [`Plane::apply`] brings the maps to a table, and [`Plane::mend`] sees to it that the hooks
//! stay where they are.

mod alias;
mod bpf;
mod btf;
mod cost;
pub mod diag;
mod excluded;
mod forsaken;
mod ids;
mod kernel;
mod links;
mod maps;
mod pins;
pub mod probe;
mod reconcile;
mod regions;
pub mod route;
mod shared;

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use aya::programs::{CgroupSockAddr, ProgramError};
use aya::{Ebpf, EbpfError, EbpfLoader, VerifierLogLevel, include_bytes_aligned};
use lb_common::{
    Address, BackendLine, Counter, Daemon, ENTRIES_PER_BACKEND, ExcludedCgroup,
    FRONTENDS_PER_SERVICE, Flows, Frontend, Frontend6, LAYOUT, MAX_EXCLUDED, MAX_SERVICE_BACKENDS,
    N_COUNTERS, Name, Peer, Probe, Refused, SLOTS_PER_BACKEND, ServiceLine, Slot, Target,
};

use crate::config::{Config, PlaneConfig, VipConfig, cgroup};
use crate::table::Table;
use forsaken::Disconnector;
use kernel::{Board, KernelMaps};
use links::{HOOKS, Links, Scope};
use pins::{MapShape, PinnedMaps, Pins};
use reconcile::{AdoptError, Reconciler};

pub use bpf::netns_cookie;
pub use cost::{Cost, Measuring};
pub use kernel::Counters;
pub use lb_common::Refusal;
pub use links::Attachment;
pub use pins::{PinError, is_bpffs};
pub use reconcile::{ApplyError, Indices, Pressure};
pub use shared::{Hooks, SharedPlane};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/nohop-ebpf"));

/// Why the kernel side can't be had.
#[derive(Debug, thiserror::Error)]
pub enum PlaneError {
    /// The kernel didn't take the object.
    #[error("the kernel refused the eBPF object; {mend}", mend = mend(.0))]
    Load(#[source] EbpfError),
    /// The kernel didn't take a program.
    #[error("the kernel refused the program {program}; {mend}", mend = mend(source))]
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
    #[error(
        "can't attach {program} to {cgroup}: {source}; it has to be a cgroup v2 directory, and \
         attaching needs CAP_NET_ADMIN and CAP_BPF"
    )]
    Attach {
        /// The program.
        program: &'static str,
        /// The directory.
        cgroup: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
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

fn mend(error: &(dyn std::error::Error + 'static)) -> &'static str {
    let denied = std::iter::successors(Some(error), |error| error.source())
        .filter_map(|error| error.downcast_ref::<io::Error>())
        .any(|error| error.kind() == io::ErrorKind::PermissionDenied);
    if denied {
        "run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON"
    } else {
        "`nohop check` says what is missing"
    }
}

/// The sizes of the maps, in entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// `SERVICES`, `REFUSED` and `NAMES`
    pub services: u32,
    /// `FRONTENDS`
    pub frontends: u32,
    /// `FRONTENDS6`
    pub frontends6: u32,
    /// `SLOTS`
    pub slots: u32,
    /// `BACKENDS`
    pub backends: u32,
}

impl Sizes {
    fn of(config: &PlaneConfig, vip: &VipConfig) -> Sizes {
        let slots = config.max_backends.saturating_mul(SLOTS_PER_BACKEND);
        let frontends = config.max_services.saturating_mul(FRONTENDS_PER_SERVICE);
        Sizes {
            services: config.max_services,
            frontends,
            frontends6: if vip.pool6.is_some() { frontends } else { 1 },
            slots: slots.next_multiple_of(MAX_SERVICE_BACKENDS),
            backends: config.max_backends.saturating_mul(ENTRIES_PER_BACKEND),
        }
    }

    /// The maps of this layout, as they have to be.
    fn shapes(&self) -> Vec<MapShape> {
        const HASH: u32 = 1;
        const ARRAY: u32 = 2;
        const MMAPABLE: u32 = 1 << 10;
        let hash = |name, key_size: usize, max_entries| MapShape {
            name,
            map_type: HASH,
            key_size: key_size as u32,
            value_size: size_of::<Target>() as u32,
            max_entries,
            flags: 0,
        };
        let array = |name, value_size: usize, max_entries| MapShape {
            name,
            map_type: ARRAY,
            key_size: 4,
            value_size: value_size as u32,
            max_entries,
            flags: MMAPABLE,
        };
        vec![
            hash("FRONTENDS", size_of::<Frontend>(), self.frontends),
            hash("FRONTENDS6", size_of::<Frontend6>(), self.frontends6),
            array("SERVICES", size_of::<ServiceLine>(), self.services),
            array("SLOTS", size_of::<Slot>(), self.slots),
            array("BACKENDS", size_of::<BackendLine>(), self.backends),
            array("NAMES", size_of::<Name>(), self.services),
            array("REFUSED", size_of::<Refused>(), self.services),
            array("COUNTERS", 8, N_COUNTERS as u32),
            array("DAEMON", size_of::<Daemon>(), 1),
            array("PROBE", size_of::<Probe>(), 1),
            array("EXCLUDED", size_of::<ExcludedCgroup>(), MAX_EXCLUDED as u32),
        ]
    }
}

/// The sockets' storage, which every layout shares.
fn socket_shapes() -> [MapShape; 2] {
    const SK_STORAGE: u32 = 24;
    const NO_PREALLOC: u32 = 1;
    [("PEERS", size_of::<Peer>()), ("FLOWS", size_of::<Flows>())].map(|(name, value_size)| {
        MapShape {
            name,
            map_type: SK_STORAGE,
            key_size: 4,
            value_size: value_size as u32,
            max_entries: 0,
            flags: NO_PREALLOC,
        }
    })
}

/// What a plane is made from.
#[derive(Clone, Debug)]
pub struct Options {
    /// The sizes of the maps, and the cgroups that are left alone.
    pub plane: PlaneConfig,
    /// The pools.
    pub vip: VipConfig,
    /// The directory for the pins, on a BPF file system.
    pub bpffs: PathBuf,
    /// The cgroup whose processes are served.
    pub scope: PathBuf,
    /// The layout's version. Another than today's is for tests of taking over.
    pub layout: u16,
    /// How to refuse a dial; `None` for the best that this kernel has.
    pub refusal: Option<Refusal>,
    /// The cookie of the host's network namespace; `None` for the one of this process.
    pub host_netns: Option<u64>,
}

impl Options {
    /// The options of a configuration.
    pub fn of(config: &Config, scope: &Path) -> Options {
        Options {
            plane: config.plane.clone(),
            vip: config.vip.clone(),
            bpffs: config.bpffs.clone(),
            scope: scope.into(),
            layout: LAYOUT,
            refusal: None,
            host_netns: None,
        }
    }
}

/// The kernel side.
#[derive(Debug)]
pub struct Plane {
    ebpf: Ebpf,
    reconciler: Reconciler<KernelMaps>,
    counters: Counters,
    board: Board,
    links: Links,
    pins: Pins,
    pinned_maps: PinnedMaps,
    disconnector: Disconnector,
    refusal: Refusal,
    excluded: Vec<PathBuf>,
    pool_network: Ipv4Addr,
    is_adopted: bool,
}

impl Plane {
    /// Loads the programs, over the maps that an earlier daemon pinned or over new ones, and
    /// attaches them: in the place of the earlier ones where there are any. New maps that replace
    /// others count only once [`Plane::apply`] has filled them.
    ///
    /// Minimum kernel: 5.10.
    ///
    /// # Errors
    /// When another daemon has the pins, something else has their names, the scope is no cgroup v2
    /// directory, or the kernel refuses for lack of a feature or of privileges. Then an earlier
    /// daemon's plane goes on, and nothing new is left behind.
    pub fn start(options: &Options) -> Result<Plane, PlaneError> {
        // Before 5.11 map memory counts against this limit. Where it can't be raised, loading says so.
        let unlimited = rustix::process::Rlimit { current: None, maximum: None };
        let _ = rustix::process::setrlimit(rustix::process::Resource::Memlock, unlimited);

        let scope = links::open_scope(&options.scope)?;
        let pins = Pins::open(&options.bpffs, options.layout)?;
        let (was_empty, had_links) = (pins.is_empty()?, !pins.all_links()?.is_empty());
        let started = Plane::start_over(pins, &scope, options);
        if started.is_err()
            && let Some(pins) = Pins::open_existing(&options.bpffs)?
        {
            if !had_links {
                links::detach_pinned(&pins)?;
            }
            if was_empty {
                pins.remove_all()?;
            }
        }
        started
    }

    /// Starts over what is pinned.
    fn start_over(pins: Pins, scope: &Scope, options: &Options) -> Result<Plane, PlaneError> {
        let sizes = Sizes::of(&options.plane, &options.vip);
        pins.make_directories()?;
        pins.are_there(&pins.sockets(), &socket_shapes())?;
        let is_live = links::are_live(&pins, scope)?;

        let mut loaded = None;
        if pins.are_there(&pins.maps(), &sizes.shapes())? {
            loaded = Loaded::over_earlier(options, &sizes, &pins, is_live)?;
        }
        let is_adopted = loaded.is_some();
        let loaded = match loaded {
            Some(loaded) => loaded,
            None => {
                pins.forget_maps()?;
                let (ebpf, refusal) = load(options, &sizes, &pins)?;
                Loaded::over_new(ebpf, refusal, &sizes)?
            }
        };
        let Loaded { ebpf, refusal, mut reconciler } = loaded;
        let maps = reconciler.maps_mut();
        let (counters, board) = (maps.counters(), maps.board());
        let disconnector = Disconnector::new(maps.liveness(), pins.sockets().join("PEERS"));
        let map_names = sizes.shapes().into_iter().map(|shape| pins.maps().join(shape.name));
        let socket_names = socket_shapes().map(|shape| pins.sockets().join(shape.name));
        let pinned_maps = PinnedMaps::open(map_names.chain(socket_names))?;
        let mut plane = Plane {
            ebpf,
            reconciler,
            counters,
            board,
            links: Links::new(&options.scope),
            pins,
            pinned_maps,
            disconnector,
            refusal,
            excluded: options.plane.exclude_cgroups.clone(),
            pool_network: options.vip.pool.network(),
            is_adopted,
        };
        plane.introduce(options.host_netns);
        plane.look_up_excluded();
        // What is empty must not take the place of what works.
        if is_adopted || !is_live {
            let switched = plane.links.switch(&mut plane.ebpf, &plane.pins);
            // The maps may be read on, and another process get our number.
            switched.inspect_err(|_| plane.keep())?;
        }
        Ok(plane)
    }

    /// Says who this daemon is.
    fn introduce(&self, host_netns: Option<u64>) {
        let mut daemon = self.board.daemon();
        match host_netns.map_or_else(netns_cookie, Ok) {
            Ok(cookie) => daemon.host_netns = cookie,
            Err(error) => tracing::info!(
                "this kernel doesn't tell the network namespace's cookie ({error}): it is learnt \
                 from a dial"
            ),
        }
        daemon.pid = std::process::id().into();
        daemon.tgid = daemon.pid;
        daemon.heartbeat_ns = monotonic_ns();
        self.board.set_daemon(daemon);
    }

    fn look_up_excluded(&self) {
        let root = cgroup::find_cgroup2_root();
        let present = root.map(|root| excluded::present(&root, &self.excluded));
        self.board.set_excluded(&present.unwrap_or_default());
    }

    /// Brings the maps to `table`. Returns the services that couldn't be brought there, each with
    /// the reason; their former state serves on, and the next call tries them again.
    ///
    /// # Errors
    /// When the maps were new and the hooks couldn't be switched to them: the former ones go on.
    pub fn apply(&mut self, table: &Table) -> Result<BTreeMap<Arc<str>, ApplyError>, PlaneError> {
        let errors = self.reconciler.apply(table);
        self.disconnector.disconnect(self.reconciler.take_left_udp());
        let daemon = self.board.daemon();
        self.board.set_daemon(Daemon {
            is_filled: 1,
            table_generation: table.generation,
            ..daemon
        });
        if !self.links.are_ours() {
            self.links.switch(&mut self.ebpf, &self.pins)?;
        }
        Ok(errors)
    }

    /// Whether the maps are an earlier daemon's.
    pub fn is_adopted(&self) -> bool {
        self.is_adopted
    }

    /// The services that the maps hold, each with its VIPs.
    pub fn names(&self) -> Vec<(Arc<str>, Vec<IpAddr>)> {
        self.reconciler.names().map(|(name, vips)| (name.clone(), vips.collect())).collect()
    }

    /// Looks at every link and pin, and attaches and pins again what somebody took away. Frees what
    /// the last changes gave up.
    pub fn mend(&mut self) -> Attachment {
        self.look_up_excluded();
        self.reconciler.recycle();
        let pinned = self.pins.mend().and_then(|()| self.pinned_maps.mend());
        let mut attachment = self.links.mend(&mut self.ebpf, &self.pins);
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

    /// Whether the hooks run this plane's programs, and not an earlier daemon's.
    pub fn are_hooks_ours(&self) -> bool {
        self.links.are_ours()
    }

    /// What dials to prove that the hooks run.
    pub fn prober(&self) -> probe::Prober {
        probe::Prober::new(self.board.clone(), self.pool_network, self.links.scope())
    }

    /// Takes note of what a dial of our own showed.
    pub fn learn(&self, probe: probe::Seen) {
        let daemon = self.board.daemon();
        // From inside a process namespace our own number isn't the kernel's.
        let tgid = if probe.is_own { probe.seen.tgid } else { daemon.tgid };
        let host_netns = if daemon.host_netns == 0 { probe.seen.netns } else { daemon.host_netns };
        if (tgid, host_netns) != (daemon.tgid, daemon.host_netns) {
            self.board.set_daemon(Daemon { tgid, host_netns, ..daemon });
        }
    }

    /// The indices that the kernel knows a service and its backends by.
    pub fn indices(&self, name: &str) -> Option<Indices> {
        self.reconciler.indices(name)
    }

    /// How full each map is.
    pub fn pressure(&self) -> Vec<(&'static str, Pressure)> {
        self.reconciler.pressure()
    }

    /// A handle to what the programs count.
    pub fn counters(&self) -> Counters {
        self.counters.clone()
    }

    /// How this kernel refuses a dial.
    pub fn refusal(&self) -> Refusal {
        self.refusal
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
        self.board.set_daemon(Daemon { pid: 0, tgid: 0, ..self.board.daemon() });
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

/// The object in the kernel, not yet attached.
struct Loaded {
    ebpf: Ebpf,
    refusal: Refusal,
    reconciler: Reconciler<KernelMaps>,
}

impl Loaded {
    /// Over the pinned maps; `None` when they don't serve: what is new is better made anew then.
    fn over_earlier(
        options: &Options,
        sizes: &Sizes,
        pins: &Pins,
        is_live: bool,
    ) -> Result<Option<Loaded>, PlaneError> {
        let (mut ebpf, refusal) = load(options, sizes, pins)?;
        let maps = KernelMaps::take(&mut ebpf)?;
        // An earlier daemon died while it filled new maps; the hooks read the former ones.
        if is_live && maps.board().daemon().is_filled == 0 {
            return Ok(None);
        }
        match Reconciler::adopt(maps, sizes, fastrand::u32(..)) {
            Ok(reconciler) => Ok(Some(Loaded { ebpf, refusal, reconciler })),
            Err(error @ AdoptError::Inconsistent { .. }) => {
                tracing::warn!("{error}; they are made anew");
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn over_new(mut ebpf: Ebpf, refusal: Refusal, sizes: &Sizes) -> Result<Loaded, PlaneError> {
        let maps = KernelMaps::take(&mut ebpf)?;
        let reconciler = Reconciler::new(maps, sizes, fastrand::u32(..));
        Ok(Loaded { ebpf, refusal, reconciler })
    }
}

/// Detaches and removes whatever a daemon left pinned in `bpffs`. Returns the number of links.
///
/// # Errors
/// When a daemon still runs there, or the kernel refuses.
pub fn unload(bpffs: &Path) -> Result<usize, PlaneError> {
    let Some(pins) = Pins::open_existing(bpffs)? else { return Ok(0) };
    let n_links = links::detach_pinned(&pins)?;
    pins.remove_all()?;
    Ok(n_links)
}

/// The counters that no service owns, with the names they have in `status`.
pub const COUNTERS: [(&str, Counter); N_COUNTERS] = [
    ("refused_no_frontend", Counter::RefusedNoFrontend),
    ("no_socket_storage", Counter::NoStorage),
    ("inconsistent", Counter::Inconsistent),
    ("left_alone", Counter::LeftAlone),
    ("backend_gone", Counter::BackendGone),
];

/// Loads the object over the maps in `pins`, which makes those that aren't there.
fn load(options: &Options, sizes: &Sizes, pins: &Pins) -> Result<(Ebpf, Refusal), PlaneError> {
    if let Some(refusal) = options.refusal {
        return Ok((load_refusing_by(refusal, options, sizes, pins)?, refusal));
    }
    match load_refusing_by(Refusal::Errno, options, sizes, pins) {
        // `bpf_set_retval` came to these programs with 6.1. A probe for it can report it missing
        // where it isn't, so the verifier's word on the program itself counts.
        Err(PlaneError::Program { source: ProgramError::LoadError { io_error, .. }, .. })
            if io_error.kind() != io::ErrorKind::PermissionDenied =>
        {
            let refusal = Refusal::PortZero;
            Ok((load_refusing_by(refusal, options, sizes, pins)?, refusal))
        }
        result => Ok((result?, Refusal::Errno)),
    }
}

fn load_refusing_by(
    refusal: Refusal,
    options: &Options,
    sizes: &Sizes,
    pins: &Pins,
) -> Result<Ebpf, PlaneError> {
    let pool = options.vip.pool;
    let (pins_network, pins_mask) = network_around(options.vip.pins.values().map(|pin| *pin.ip()));
    let (network, mask) = (u32::from(pool.network()), u32::from(pool.netmask()));
    let pool6 = options.vip.pool6.map(|pool| [pool.network().octets(), pool.netmask().octets()]);
    let pool6 = pool6.unwrap_or_default().map(|octets| Address { octets }.words());
    let [[network6_high, network6_low], [mask6_high, mask6_low]] = pool6;
    let sockets = btf::socket_bits().unwrap_or_else(|error| {
        tracing::warn!(
            "the kernel has no BTF ({error}): its own sockets are translated like others"
        );
        btf::SocketBits::default()
    });
    let btf::Bit { offset, mask: kernel_socket_mask } = sockets.kernel.unwrap_or_default();
    let btf::Bit { offset: subflow_offset, .. } = sockets.subflow.unwrap_or_default();
    let layout = u32::from(options.layout);
    let has_excluded = u32::from(!options.plane.exclude_cgroups.is_empty());
    let mut loader = EbpfLoader::new();
    // What a kernel before 6.1 has to say takes it seconds, and nobody reads it.
    if refusal == Refusal::Errno && options.refusal.is_none() {
        loader.verifier_log_level(VerifierLogLevel::DISABLE);
    }
    let refusal = refusal as u32;
    for shape in sizes.shapes() {
        loader.map_max_entries(shape.name, shape.max_entries);
        loader.map_pin_path(shape.name, pins.maps().join(shape.name));
    }
    for shape in socket_shapes() {
        loader.map_pin_path(shape.name, pins.sockets().join(shape.name));
    }
    loader.override_global("MAP_LAYOUT", &layout, true);
    loader.override_global("POOL_NETWORK", &network, true);
    loader.override_global("POOL_MASK", &mask, true);
    loader.override_global("PINS_NETWORK", &pins_network, true);
    loader.override_global("PINS_MASK", &pins_mask, true);
    loader.override_global("POOL6_NETWORK_HIGH", &network6_high, true);
    loader.override_global("POOL6_NETWORK_LOW", &network6_low, true);
    loader.override_global("POOL6_MASK_HIGH", &mask6_high, true);
    loader.override_global("POOL6_MASK_LOW", &mask6_low, true);
    loader.override_global("REFUSAL", &refusal, true);
    loader.override_global("HAS_EXCLUDED", &has_excluded, true);
    loader.override_global("KERNEL_SOCKET_OFFSET", &offset, true);
    loader.override_global("KERNEL_SOCKET_MASK", &kernel_socket_mask, true);
    loader.override_global("SUBFLOW_OFFSET", &subflow_offset, true);
    let mut ebpf = loader.load(OBJECT).map_err(PlaneError::Load)?;
    for hook in &HOOKS {
        let failed = |source| PlaneError::Program { program: hook.program, source };
        program(&mut ebpf, hook.program)?.load().map_err(failed)?;
    }
    Ok(ebpf)
}

fn program<'a>(
    ebpf: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut CgroupSockAddr, PlaneError> {
    let program = ebpf.program_mut(name).ok_or(PlaneError::Object { missing: name })?;
    program.try_into().map_err(|_| PlaneError::Object { missing: name })
}

/// The smallest network that these addresses are in, and its netmask; 0 of 32 bits for none.
fn network_around(addresses: impl Iterator<Item = Ipv4Addr>) -> (u32, u32) {
    let networks = addresses.map(|address| (u32::from(address), u32::MAX));
    let around = networks.reduce(|(network, mask), (address, _)| {
        let n_differing = 32 - (network ^ (address & mask)).leading_zeros();
        let mask = mask & u32::MAX.checked_shl(n_differing).unwrap_or(0);
        (network & mask, mask)
    });
    around.unwrap_or((0, u32::MAX))
}

/// CLOCK_MONOTONIC, which is what the programs read too.
fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_network_around_pins() {
        let around = |addresses: &[[u8; 4]]| {
            let (network, mask) = network_around(addresses.iter().map(|&octets| octets.into()));
            (Ipv4Addr::from(network).octets(), mask.count_ones())
        };
        assert_eq!(around(&[]), ([0; 4], 32));
        assert_eq!(around(&[[127, 0, 0, 1]]), ([127, 0, 0, 1], 32));
        assert_eq!(around(&[[127, 0, 0, 1], [127, 0, 0, 2], [127, 0, 0, 1]]), ([127, 0, 0, 0], 30));
        assert_eq!(around(&[[10, 0, 0, 1], [10, 255, 0, 1], [10, 0, 3, 0]]), ([10, 0, 0, 0], 8));
        assert_eq!(around(&[[10, 0, 0, 1], [200, 0, 0, 1]]), ([0; 4], 0));
    }
}

//! The plane: the kernel side, kept in step with the table.
//!
//! Only this part knows aya and lb-common, and only here does the order of bytes matter.
//! [`Plane::load`] brings the programs into the kernel, [`Plane::attach`] makes them count, and
//! [`Plane::apply`] brings the maps to a table.

mod alias;
mod bpf;
mod cost;
pub mod diag;
mod ids;
mod kernel;
mod maps;
mod reconcile;
mod regions;
pub mod route;
mod shared;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::linux::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aya::programs::{CgroupSockAddr, ProgramError, loaded_programs};
use aya::{Ebpf, EbpfError, EbpfLoader, include_bytes_aligned};
use lb_common::{
    Counter, ENTRIES_PER_BACKEND, FRONTENDS_PER_SERVICE, MAX_SERVICE_BACKENDS, SLOTS_PER_BACKEND,
};

use crate::config::{PlaneConfig, VipConfig};
use crate::table::Table;
use bpf::{AttachType, CgroupLink};
use kernel::KernelMaps;
use reconcile::Reconciler;

pub use bpf::netns_cookie;
pub use cost::{Cost, Measuring};
pub use kernel::Counters;
pub use lb_common::Refusal;
pub use reconcile::{ApplyError, Indices, Pressure};
pub use shared::SharedPlane;

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/nohop-ebpf"));

/// The programs, in the order in which they are attached: what translates back comes first, so that
/// no translated socket is ever without it.
const PROGRAMS: [(&str, AttachType); 2] =
    [("nohop_getpeer4", AttachType::GetPeerName4), ("nohop_connect4", AttachType::Connect4)];

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
    /// The links can't be listed or detached.
    #[error("can't {action} links: {source}; it needs CAP_SYS_ADMIN")]
    Links {
        /// `list` or `detach`.
        action: &'static str,
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
    /// `SERVICES` and `SERVICE_STATS`
    pub services: u32,
    /// `FRONTENDS`
    pub frontends: u32,
    /// `SLOTS`
    pub slots: u32,
    /// `BACKENDS` and `BACKEND_DIALS`
    pub backends: u32,
}

impl Sizes {
    fn of(config: &PlaneConfig) -> Sizes {
        let slots = config.max_backends.saturating_mul(SLOTS_PER_BACKEND);
        Sizes {
            services: config.max_services,
            frontends: config.max_services.saturating_mul(FRONTENDS_PER_SERVICE),
            slots: slots.next_multiple_of(MAX_SERVICE_BACKENDS),
            backends: config.max_backends.saturating_mul(ENTRIES_PER_BACKEND),
        }
    }
}

/// The kernel side.
#[derive(Debug)]
pub struct Plane {
    ebpf: Ebpf,
    reconciler: Reconciler<KernelMaps>,
    counters: Counters,
    links: Arc<[CgroupLink]>,
    refusal: Refusal,
}

impl Plane {
    /// Loads the programs and makes the maps. `host_netns` is the cookie of the host's network
    /// namespace; 0 where it can't be had, and then pins and loopback backends don't count.
    ///
    /// Minimum kernel: 5.10.
    ///
    /// # Errors
    /// When the kernel refuses, for lack of a feature or of privileges.
    pub fn load(
        config: &PlaneConfig,
        vip: &VipConfig,
        host_netns: u64,
    ) -> Result<Plane, PlaneError> {
        match Self::load_refusing_by(Refusal::Errno, config, vip, host_netns) {
            // `bpf_set_retval` came to these programs with 6.1. A probe for it can report it
            // missing where it isn't, so the verifier's word on the program itself counts.
            Err(PlaneError::Program {
                source: ProgramError::LoadError { io_error, .. }, ..
            }) if io_error.kind() != io::ErrorKind::PermissionDenied => {
                Self::load_refusing_by(Refusal::PortZero, config, vip, host_netns)
            }
            result => result,
        }
    }

    /// As [`Plane::load`], with a given way to refuse a dial.
    ///
    /// # Errors
    /// When the kernel refuses, for lack of a feature or of privileges.
    pub fn load_refusing_by(
        refusal: Refusal,
        config: &PlaneConfig,
        vip: &VipConfig,
        host_netns: u64,
    ) -> Result<Plane, PlaneError> {
        // Before 5.11 map memory counts against this limit. Where it can't be raised, loading says so.
        let unlimited = rustix::process::Rlimit { current: None, maximum: None };
        let _ = rustix::process::setrlimit(rustix::process::Resource::Memlock, unlimited);

        let sizes = Sizes::of(config);
        let mut ebpf = load_programs(&sizes, vip, host_netns, refusal)?;
        let maps = KernelMaps::take(&mut ebpf)?;
        let counters = maps.counters();
        let reconciler = Reconciler::new(maps, &sizes);
        Ok(Plane { ebpf, reconciler, counters, links: Arc::new([]), refusal })
    }

    /// Attaches the programs to `cgroup`: dials of the processes in it and below are translated
    /// from now on.
    ///
    /// # Errors
    /// When `cgroup` is no cgroup v2 directory, or the kernel refuses.
    pub fn attach(&mut self, cgroup: &Path) -> Result<(), PlaneError> {
        let directory = File::open(cgroup)
            .map_err(|source| PlaneError::Cgroup { cgroup: cgroup.into(), source })?;
        let mut links = Vec::new();
        for (name, attach_type) in PROGRAMS {
            let loaded = program(&mut self.ebpf, name)?.fd();
            let loaded = loaded.map_err(|source| PlaneError::Program { program: name, source })?;
            let link = CgroupLink::attach(loaded.as_fd(), directory.as_fd(), attach_type);
            links.push(link.map_err(|source| PlaneError::Attach {
                program: name,
                cgroup: cgroup.into(),
                source,
            })?);
        }
        self.links = links.into();
        Ok(())
    }

    /// Brings the maps to `table`. Returns the services that couldn't be brought there, each with
    /// the reason; their former state serves on, and the next call tries them again.
    pub fn apply(&mut self, table: &Table) -> BTreeMap<Arc<str>, ApplyError> {
        self.reconciler.apply(table)
    }

    /// The indices that the kernel knows a service and its backends by.
    pub fn indices(&self, name: &str) -> Option<Indices> {
        self.reconciler.indices(name)
    }

    /// How full each map is.
    pub fn pressure(&self) -> [(&'static str, Pressure); 4] {
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

    /// A handle that tells whether the programs are still attached.
    pub fn attachment(&self) -> Attachment {
        Attachment { links: self.links.clone() }
    }

    /// Detaches the programs, what translates back last. It is no error if somebody did already.
    pub fn detach(&mut self) {
        for link in self.links.iter().rev() {
            if let Err(error) = link.detach() {
                tracing::debug!("a link couldn't be detached: {error}");
            }
        }
        self.links = Arc::new([]);
    }
}

/// Tells whether the programs are attached, as the kernel sees it.
#[derive(Clone, Debug)]
pub struct Attachment {
    links: Arc<[CgroupLink]>,
}

impl Attachment {
    /// Whether every link still has its cgroup. A kernel that doesn't say counts as a yes: that
    /// is no reason to stop answering.
    pub fn holds(&self) -> bool {
        !self.links.is_empty()
            && self.links.iter().all(|link| match link.joined() {
                Ok(joined) => joined.is_some_and(|joined| joined.cgroup_id != 0),
                Err(error) => {
                    tracing::warn!("the kernel doesn't tell of a link: {error}");
                    true
                }
            })
    }
}

/// Detaches every program of nohop's from `cgroup`, whichever process holds its link. Returns how
/// many there were.
///
/// # Errors
/// When the kernel refuses to list or to detach.
pub fn unload(cgroup: &Path) -> Result<usize, PlaneError> {
    let links = |action| move |source| PlaneError::Links { action, source };
    let cgroup_id = std::fs::metadata(cgroup)
        .map_err(|source| PlaneError::Cgroup { cgroup: cgroup.into(), source })?
        .st_ino();
    let ours: BTreeMap<u32, usize> = loaded_programs()
        .flatten()
        .filter_map(|program| {
            let order =
                PROGRAMS.iter().position(|(name, _)| program.name_as_str() == Some(name))?;
            Some((program.id(), order))
        })
        .collect();
    let mut attached = Vec::new();
    for link_id in bpf::link_ids().map_err(links("list"))? {
        let Some(link) = CgroupLink::by_id(link_id).map_err(links("list"))? else { continue };
        if let Some(joined) = link.joined().map_err(links("list"))?
            && let Some(order) = ours.get(&joined.program_id)
            && joined.cgroup_id == cgroup_id
        {
            attached.push((*order, link));
        }
    }
    // What translates back goes last.
    attached.sort_by_key(|(order, _)| std::cmp::Reverse(*order));
    for (_, link) in &attached {
        link.detach().map_err(links("detach"))?;
    }
    Ok(attached.len())
}

/// The counters that no service owns, with the names they have in `status`.
pub const COUNTERS: [(&str, Counter); lb_common::N_COUNTERS] = [
    ("refused_no_frontend", Counter::RefusedNoFrontend),
    ("no_socket_storage", Counter::NoStorage),
    ("inconsistent", Counter::Inconsistent),
];

fn load_programs(
    sizes: &Sizes,
    vip: &VipConfig,
    host_netns: u64,
    refusal: Refusal,
) -> Result<Ebpf, PlaneError> {
    let (network, mask) = (u32::from(vip.pool.network()), u32::from(vip.pool.netmask()));
    let refusal = refusal as u32;
    let mut loader = EbpfLoader::new();
    for (map, n_entries) in [
        ("FRONTENDS", sizes.frontends),
        ("SERVICES", sizes.services),
        ("SERVICE_STATS", sizes.services),
        ("SLOTS", sizes.slots),
        ("BACKENDS", sizes.backends),
        ("BACKEND_DIALS", sizes.backends),
    ] {
        loader.map_max_entries(map, n_entries);
    }
    loader.override_global("POOL_NETWORK", &network, true);
    loader.override_global("POOL_MASK", &mask, true);
    loader.override_global("HOST_NETNS", &host_netns, true);
    loader.override_global("REFUSAL", &refusal, true);
    let mut ebpf = loader.load(OBJECT).map_err(PlaneError::Load)?;
    for (name, _) in PROGRAMS {
        let failed = |source| PlaneError::Program { program: name, source };
        program(&mut ebpf, name)?.load().map_err(failed)?;
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

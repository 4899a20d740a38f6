//! The options of a datapath.

use std::path::{Path, PathBuf};

use lb_common::{LAYOUT, RejectMethod};

use super::units::{UNITS, Unit};
use crate::config::{BalanceConfig, Config, DatapathConfig, VipConfig};

/// The options of a datapath.
#[derive(Clone, Debug)]
pub struct Options {
    /// The sizes of the maps, and the cgroups that are bypassed.
    pub datapath: DatapathConfig,
    /// The pools.
    pub vip: VipConfig,
    /// How backends are chosen.
    pub balance: BalanceConfig,
    /// The directory for the pins, on a BPF file system.
    pub bpffs: PathBuf,
    /// The cgroup whose processes are served.
    pub scope: PathBuf,
    /// The layout's version. Another than today's is for tests of taking over.
    pub layout: u16,
    /// The units. Others than [`UNITS`] are for tests.
    pub units: &'static [Unit],
    /// The program that creates maps by its hidden command where this process is in a limited memory
    /// cgroup; `None` to create them here.
    pub map_creator: Option<PathBuf>,
    /// How to refuse a connection; `None` for the best that this kernel has.
    pub refusal: Option<RejectMethod>,
    /// Whether the kernel's type information is read. Where it isn't, as on a kernel without, programs do
    /// without what it leads to; for tests.
    pub reads_btf: bool,
    /// The cookie of the host's network namespace; `None` for the one of this process.
    pub host_netns: Option<u64>,
    /// Whether connections are only counted from the first one on. If not, an earlier daemon's mode
    /// stays until [`set_shadow`](super::Datapath::set_shadow) changes it.
    pub is_shadow: bool,
}

impl Options {
    /// The options of a configuration.
    pub fn of(config: &Config, scope: &Path) -> Options {
        Options {
            datapath: config.datapath.clone(),
            vip: config.vip.clone(),
            balance: config.balance.clone(),
            bpffs: config.bpffs.clone(),
            scope: scope.into(),
            layout: LAYOUT,
            units: UNITS,
            map_creator: None,
            refusal: None,
            reads_btf: true,
            host_netns: None,
            is_shadow: config.shadow,
        }
    }
}

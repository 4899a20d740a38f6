//! What each map has to be: its type, the sizes of its keys and values, its entries and flags.

use lb_common::{
    BackendLine, Daemon, ENTRIES_PER_BACKEND, ExcludedCgroup, FRONTENDS_PER_SERVICE, Flows,
    Frontend, Frontend6, MAX_EXCLUDED, MAX_SERVICE_BACKENDS, N_PINNED_COUNTERS, Name, Peer, Probe,
    SLOTS_PER_BACKEND, ServiceLine, Slot, Target, Unsent,
};

use super::pins::MapShape;
use crate::config::{PlaneConfig, VipConfig};

/// The sizes of the maps, in entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// `SERVICES`, `UNSENT` and `NAMES`
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
    /// Those of a configuration.
    pub fn of(config: &PlaneConfig, vip: &VipConfig) -> Sizes {
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
    pub fn shapes(&self) -> Vec<MapShape> {
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
            array("UNSENT", size_of::<Unsent>(), self.services),
            array("COUNTERS", 8, N_PINNED_COUNTERS as u32),
            array("DAEMON", size_of::<Daemon>(), 1),
            array("PROBE", size_of::<Probe>(), 1),
            array("EXCLUDED", size_of::<ExcludedCgroup>(), MAX_EXCLUDED as u32),
        ]
    }
}

/// The kernel's number of a socket storage; from linux/bpf.h.
pub const SK_STORAGE: u32 = 24;

/// The sockets' storage, which every layout shares.
pub fn socket_shapes() -> [MapShape; 3] {
    const NO_PREALLOC: u32 = 1;
    let storages = [
        ("PEERS", size_of::<Peer>()),
        ("FORMER_PEERS", size_of::<Peer>()),
        ("FLOWS", size_of::<Flows>()),
    ];
    storages.map(|(name, value_size)| MapShape {
        name,
        map_type: SK_STORAGE,
        key_size: 4,
        value_size: value_size as u32,
        max_entries: 0,
        flags: NO_PREALLOC,
    })
}

//! What each map has to be: its type, the sizes of its keys and values, its entries and flags.

use std::path::Path;

use aya::maps::MapData;
use lb_common::{
    BackendEntry, BypassCgroup, Control, ENTRIES_PER_BACKEND, FRONTENDS_PER_SERVICE, Flows,
    Frontend, Frontend6, MAX_EXCLUDED, MAX_SERVICE_BACKENDS, N_PINNED_COUNTERS, Probe,
    RefusedStats, RevNat, SLOTS_PER_BACKEND, ServiceEntry, ServiceName, ServiceRef, Slot,
};

use crate::config::{DatapathConfig, VipConfig};

/// What a pinned map has to be.
#[derive(Clone, Copy, Debug)]
pub struct MapShape {
    /// Its name, in the object and of the pin.
    pub name: &'static str,
    /// The kernel's number of its type; from linux/bpf.h.
    pub map_type: u32,
    /// In bytes.
    pub key_size: u32,
    /// In bytes.
    pub value_size: u32,
    /// The number of entries.
    pub max_entries: u32,
    /// BPF_F_*.
    pub flags: u32,
}

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
    pub fn of(config: &DatapathConfig, vip: &VipConfig) -> Sizes {
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

    /// Those of the maps that are pinned in `maps`; `None` where one can't be read.
    pub fn pinned(maps: &Path) -> Option<Sizes> {
        let entries = |name| {
            let info = MapData::from_pin(maps.join(name)).and_then(|map| map.info());
            info.ok().map(|info| info.max_entries())
        };
        Some(Sizes {
            services: entries("SERVICES")?,
            frontends: entries("FRONTENDS")?,
            frontends6: entries("FRONTENDS6")?,
            slots: entries("SLOTS")?,
            backends: entries("BACKENDS")?,
        })
    }

    /// The same, but those of `earlier` maps where these have no room for what is in use there. Of
    /// slots and backends twice as much has to fit, so that each can be replaced. IPv6 frontends have
    /// to fit only where there are to be any.
    pub fn with_room_for(&self, in_use: &Sizes, earlier: &Sizes) -> Sizes {
        let choose = |own: u32, in_use: u32, earlier: u32| {
            if in_use > own { earlier.max(own) } else { own }
        };
        let frontends6 = if self.frontends6 > 1 { in_use.frontends6 } else { 0 };
        Sizes {
            services: choose(self.services, in_use.services, earlier.services),
            frontends: choose(self.frontends, in_use.frontends, earlier.frontends),
            frontends6: choose(self.frontends6, frontends6, earlier.frontends6),
            slots: choose(self.slots, in_use.slots.saturating_mul(2), earlier.slots),
            backends: choose(
                self.backends,
                in_use.backends.saturating_mul(ENTRIES_PER_BACKEND),
                earlier.backends,
            ),
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
            value_size: size_of::<ServiceRef>() as u32,
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
            array("SERVICES", size_of::<ServiceEntry>(), self.services),
            array("SLOTS", size_of::<Slot>(), self.slots),
            array("BACKENDS", size_of::<BackendEntry>(), self.backends),
            array("NAMES", size_of::<ServiceName>(), self.services),
            array("UNSENT", size_of::<RefusedStats>(), self.services),
            array("COUNTERS", 8, N_PINNED_COUNTERS as u32),
            array("DAEMON", size_of::<Control>(), 1),
            array("PROBE", size_of::<Probe>(), 1),
            array("EXCLUDED", size_of::<BypassCgroup>(), MAX_EXCLUDED as u32),
        ]
    }
}

/// The kernel's number of a socket storage; from linux/bpf.h.
pub const SK_STORAGE: u32 = 24;

/// The sockets' storage, which every layout shares.
pub fn socket_shapes() -> [MapShape; 3] {
    const NO_PREALLOC: u32 = 1;
    let storages = [
        ("PEERS", size_of::<RevNat>()),
        ("FORMER_PEERS", size_of::<RevNat>()),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_use_fits() {
        let sizes = |services, frontends, frontends6, slots, backends| Sizes {
            services,
            frontends,
            frontends6,
            slots,
            backends,
        };
        let earlier = sizes(100, 400, 400, 8192, 200);
        let small = sizes(10, 40, 40, 4096, 20);
        // What is in use, and which sizes serve it.
        let table = [
            (sizes(10, 40, 40, 2048, 10), small),
            (sizes(11, 40, 40, 2048, 10), Sizes { services: 100, ..small }),
            (sizes(10, 41, 40, 2048, 10), Sizes { frontends: 400, ..small }),
            (sizes(10, 40, 41, 2048, 10), Sizes { frontends6: 400, ..small }),
            (sizes(10, 40, 40, 2049, 11), Sizes { slots: 8192, backends: 200, ..small }),
        ];
        for (in_use, expected) in table {
            assert_eq!(small.with_room_for(&in_use, &earlier), expected, "{in_use:?}");
        }
        // Without a pool there are to be no IPv6 frontends.
        let without = Sizes { frontends6: 1, ..small };
        assert_eq!(without.with_room_for(&sizes(1, 1, 41, 1, 1), &earlier), without);
    }
}

//! The specification of each map: type, sizes of keys and values and flags, from the object, and the
//! number of entries, mostly from the configuration.

use std::collections::HashMap;
use std::path::Path;
use std::sync::LazyLock;

use aya::include_bytes_aligned;
use aya::maps::MapData;
use lb_common::{
    ENTRIES_PER_BACKEND, FRONTENDS_PER_SERVICE, MAX_SERVICE_BACKENDS, SLOTS_PER_BACKEND,
    n_cache_lines,
};

use crate::config::{DatapathConfig, VipConfig};

/// The object of the unit `connect`, which has all maps. The build makes it of lb-ebpf.
pub static CONNECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/nohop-ebpf"));
/// The object of the unit `outcomes`.
pub static OUTCOMES: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/nohop-outcomes"));

/// The object of the unit `names`, with maps of its own.
pub static NAMES: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/nohop-names"));

/// The object of the unit `edge`, with maps of its own.
pub static EDGE: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/nohop-edge"));

/// The object of the unit `intercept`.
pub static INTERCEPT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/nohop-intercept"));

/// The CRC-32 of each unit's object, by the unit's name: what tells builds apart in a bug report.
pub fn fingerprints() -> [(&'static str, u32); 5] {
    let objects = [
        ("connect", CONNECT),
        ("outcomes", OUTCOMES),
        ("names", NAMES),
        ("intercept", INTERCEPT),
        ("edge", EDGE),
    ];
    objects.map(|(unit, object)| (unit, crc32fast::hash(object)))
}

/// The maps that came to this layout after its first version: an earlier version with the same
/// layout leaves none, or one of another size.
const ADDED: [&str; 2] = ["BACKEND_FAILURES", "SYN_RETRANSMITS"];

/// The specification of a pinned map.
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
    /// Whether it is made empty where it is absent or of another size, over the other maps.
    pub is_added: bool,
}

/// The sizes of the maps, in entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// `SERVICES`, `SERVICE_STATS`, `SERVICE_NAMES` and `SYN_RETRANSMITS`
    pub services: u32,
    /// `FRONTENDS`
    pub frontends: u32,
    /// `FRONTENDS6`
    pub frontends6: u32,
    /// `SLOTS`
    pub slots: u32,
    /// `BACKENDS` and `BACKEND_FAILURES`
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
            frontends6: match vip.pool6 {
                Some(_) => frontends,
                // Few services are public, and each has a few addresses.
                None if vip.public.iter().any(|network| network.addr().is_ipv6()) => {
                    config.max_services
                }
                None => 1,
            },
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

    /// The same, but with the sizes of `earlier` maps where these are too small for the entries in use
    /// there. Slots and backends have to fit twice, so that each can be replaced. IPv6 frontends have to
    /// fit only if there are to be any.
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

    /// The maps of this layout that are pinned, as they have to be.
    pub fn shapes(&self) -> Vec<MapShape> {
        let by_services = ["SERVICES", "SERVICE_NAMES", "SERVICE_STATS", "SYN_RETRANSMITS"];
        let sized = by_services.map(|name| (name, self.services)).into_iter().chain([
            ("FRONTENDS", self.frontends),
            ("FRONTENDS6", self.frontends6),
            ("SLOTS", self.slots),
            ("BACKENDS", self.backends),
            ("BACKEND_FAILURES", self.backends),
        ]);
        let sized = sized.filter_map(|(name, max_entries)| {
            shape(name).map(|shape| MapShape { max_entries, ..shape })
        });
        let fixed = ["COUNTERS", "CONTROL", "PROBE", "BYPASS"].into_iter().filter_map(shape);
        sized.chain(fixed).collect()
    }
}

/// The pinned maps of the unit `names`. All came to this layout after its first version.
pub fn names_shapes(sizes: &Sizes) -> Vec<MapShape> {
    // And the probe's.
    let n_names = sizes.services.saturating_add(1);
    let sized = [("NAMES", n_names), ("NAME_RECORDS", n_names)];
    let fixed = [("NAMES_CONTROL", 1), ("NAMES_COUNTERS", 1)];
    let shape = |(name, max_entries)| {
        shape(name).map(|shape| MapShape { max_entries, is_added: true, ..shape })
    };
    sized.into_iter().chain(fixed).filter_map(shape).collect()
}

/// The pinned maps of the unit `edge`, for so many flows, with tables of these sizes. All came to this layout
/// after its first version.
pub fn edge_shapes(sizes: &Sizes, max_flows: u32, has_ipv6: bool) -> Vec<MapShape> {
    let keys = max_flows.saturating_mul(2);
    let of_ipv6 = |size| if has_ipv6 { size } else { 1 };
    let sized = [
        ("EDGE_FLOWS", keys),
        ("EDGE_FLOWS6", of_ipv6(keys)),
        ("EDGE_RECORDS", max_flows),
        ("EDGE_HOPS", max_flows),
        ("EDGE_CACHE", n_cache_lines(max_flows)),
        ("EDGE_ADDRESSES6", of_ipv6(max_flows)),
        ("EDGE_PORTS", sizes.backends),
    ];
    let sized = sized.into_iter().filter_map(|(name, max_entries)| {
        shape(name).map(|shape| MapShape { max_entries, ..shape })
    });
    let fixed = [
        "EDGE_FRONTENDS",
        "EDGE_FRONTENDS6",
        "EDGE_CONTROL",
        "EDGE_COUNTERS",
        "EDGE_INTERFACES",
        "EDGE_NEIGHBOURS",
        "EDGE_PROCESSORS",
    ];
    let all = sized.chain(fixed.into_iter().filter_map(shape));
    all.map(|shape| MapShape { is_added: true, ..shape }).collect()
}

/// The kernel's number of a socket storage; from linux/bpf.h.
pub const SK_STORAGE: u32 = 24;

/// The sockets' storage and records, which every layout shares.
pub fn socket_shapes() -> Vec<MapShape> {
    ["SK_REVNAT", "SK_REVNAT_PREV", "FLOWS", "CONNS"].into_iter().filter_map(shape).collect()
}

/// A map as the object defines it.
fn shape(name: &'static str) -> Option<MapShape> {
    static MAPS: LazyLock<HashMap<String, aya_obj::Map>> = LazyLock::new(|| {
        let maps = |object| aya_obj::Object::parse(object).map(|object| object.maps);
        [EDGE, NAMES, CONNECT]
            .into_iter()
            .flat_map(|object| maps(object).unwrap_or_default())
            .collect()
    });
    MAPS.get(name).map(|map| MapShape {
        name,
        map_type: map.map_type(),
        key_size: map.key_size(),
        value_size: map.value_size(),
        max_entries: map.max_entries(),
        flags: map.map_flags(),
        is_added: ADDED.contains(&name),
    })
}

#[cfg(test)]
mod tests {
    use lb_common::N_CONNS;

    use super::*;

    /// Every map that is pinned is in the object, of the sizes that the layout asserts.
    #[test]
    fn the_object_has_the_maps() {
        let sizes = Sizes { services: 1, frontends: 2, frontends6: 3, slots: 4, backends: 5 };
        let shapes: Vec<_> = sizes.shapes().into_iter().chain(socket_shapes()).collect();
        let shown = shapes.iter().map(|shape| {
            let &MapShape { name, map_type, key_size, value_size, max_entries, flags, .. } = shape;
            (name, (map_type, key_size, value_size, max_entries, flags))
        });
        const MMAPABLE: u32 = 1 << 10;
        let expected = [
            ("SERVICES", (2, 4, 192, 1, MMAPABLE)),
            ("SERVICE_NAMES", (2, 4, 64, 1, MMAPABLE)),
            ("SERVICE_STATS", (2, 4, 64, 1, MMAPABLE)),
            ("SYN_RETRANSMITS", (2, 4, 8, 1, MMAPABLE)),
            ("FRONTENDS", (1, 8, 8, 2, 0)),
            ("FRONTENDS6", (1, 20, 8, 3, 0)),
            ("SLOTS", (2, 4, 8, 4, MMAPABLE)),
            ("BACKENDS", (2, 4, 64, 5, MMAPABLE)),
            ("BACKEND_FAILURES", (2, 4, 8, 5, MMAPABLE)),
            ("COUNTERS", (2, 4, 256, 1, MMAPABLE)),
            ("CONTROL", (2, 4, 128, 1, MMAPABLE)),
            ("PROBE", (2, 4, 24, 1, MMAPABLE)),
            ("BYPASS", (1, 8, 8, 1024, 0)),
            ("SK_REVNAT", (SK_STORAGE, 4, 48, 0, 1)),
            ("SK_REVNAT_PREV", (SK_STORAGE, 4, 48, 0, 1)),
            ("FLOWS", (SK_STORAGE, 4, 424, 0, 1)),
            ("CONNS", (2, 4, 64, N_CONNS, MMAPABLE)),
        ];
        assert_eq!(shown.collect::<Vec<_>>(), expected);
    }

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
        // The entries in use, and the sizes that suffice.
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

//! A service's slots: which backends connections of each kind select from, and what is written for it.

use std::net::{IpAddr, SocketAddr};

use lb_common::{
    Group, MAGLEV_ENTRIES_PER_SLOT, N_GROUPS, Slot, SlotRange, alias_table, maglev_entry_of,
    maglev_slots, maglev_table,
};

use crate::datapath::maps::ServiceRanges;
use crate::table::{Backend, Service};

/// A backend with an entry, as the maps need it.
#[derive(Clone, Copy, Debug)]
pub struct Member {
    pub address: SocketAddr,
    pub weight: u16,
    host_only: bool,
    /// The group that it is in, of [`N_GROUPS`]; `None` for one that no connection selects.
    pub group: Option<usize>,
}

impl Member {
    /// The members of a service. Groups without a backend are left out, so that a service with a
    /// backend has one in the first group, which is all that most connections look at.
    pub fn of(service: &Service) -> Vec<Member> {
        let used = |group: u8| service.healthy().any(|backend| backend.group == group);
        let used: Vec<u8> = (0..=u8::MAX).take(N_GROUPS).filter(|&group| used(group)).collect();
        let with_entry = service.backends.iter().filter(|backend| backend.state.has_entry());
        let member = |backend: &Backend| {
            let &Backend { address, weight, host_only, group, state, .. } = backend;
            let group = state.is_reached().then(|| used.iter().position(|used| *used == group));
            Some(Member { address: address?, weight, host_only, group: group.flatten() })
        };
        with_entry.filter_map(member).collect()
    }
}

/// The members of each range of slots, as positions in the list of members. Ranges with the same
/// members share their slots.
pub struct SlotTables {
    pub distinct: Vec<SlotTable>,
    /// For each range of each group, in the order of [`Group::ranges`], its index in `distinct`.
    which: [[Option<usize>; Group::N_RANGES]; N_GROUPS],
    /// The index of those that no connection selects.
    unselected: Option<usize>,
}

/// Slots with the same members.
pub struct SlotTable {
    members: Vec<usize>,
    has_maglev: bool,
}

impl SlotTables {
    pub fn of(all: &[Member], has_maglev: bool) -> SlotTables {
        let mut slot_tables =
            SlotTables { distinct: Vec::new(), which: Default::default(), unselected: None };
        let scopes = [true, false];
        let reaches: [fn(&Member) -> bool; 3] =
            [|member| member.address.is_ipv4(), |member| member.address.is_ipv6(), |_| true];
        let kinds: Vec<_> = scopes
            .iter()
            .flat_map(|host| reaches.iter().map(move |reach| (*host, reach)))
            .collect();
        for group in 0..N_GROUPS {
            for (kind, &(from_host, reaches)) in kinds.iter().enumerate() {
                let fits = |member: &Member| {
                    member.group == Some(group)
                        && (from_host || !member.host_only)
                        && reaches(member)
                };
                slot_tables.which[group][kind] = slot_tables.table(all, fits, has_maglev);
            }
        }
        slot_tables.unselected = slot_tables.table(all, |member| member.group.is_none(), false);
        slot_tables
    }

    /// The slots of those that fit; `None` where there are none.
    fn table(
        &mut self,
        all: &[Member],
        fits: impl Fn(&Member) -> bool,
        has_maglev: bool,
    ) -> Option<usize> {
        let members = (0..).zip(all).filter(|(_, member)| fits(member));
        let members: Vec<usize> = members.map(|(position, _)| position).collect();
        if members.is_empty() {
            return None;
        }
        self.distinct.iter().position(|other| other.members == members).or_else(|| {
            self.distinct.push(SlotTable { members, has_maglev });
            Some(self.distinct.len() - 1)
        })
    }

    /// The service's ranges, given where the slots of each of `distinct` begin.
    pub fn ranges(&self, first_slots: &[u32]) -> ServiceRanges {
        let range = |which: Option<usize>| {
            let which =
                which.and_then(|which| Some((first_slots.get(which)?, &self.distinct[which])));
            which.map_or(SlotRange::default(), |(&first_slot, table)| SlotRange {
                first_slot,
                n_slots: table.members.len() as u32,
            })
        };
        ServiceRanges {
            groups: self.which.map(|which| Group::of(which.map(range))),
            unselected: range(self.unselected),
        }
    }
}

impl SlotTable {
    /// The number of slots, with those of its Maglev table.
    pub fn n_slots(&self) -> u32 {
        let n_slots = self.members.len() as u32;
        n_slots + if self.has_maglev { maglev_slots(n_slots) } else { 0 }
    }

    /// The slots, given each member's index into `BACKENDS`: an alias table, and behind it the Maglev
    /// table.
    pub fn slots(&self, all: &[Member], backend_idx: impl Fn(SocketAddr) -> u32) -> Vec<Slot> {
        let members = self.members.iter().map(|&member| &all[member]);
        let weighted: Vec<(u32, u16)> = members
            .clone()
            .map(|member| (backend_idx(member.address), member.weight.max(1)))
            .collect();
        let mut slots = alias_table(&weighted);
        if self.has_maglev {
            let numbered: Vec<(u64, u16)> =
                members.map(|member| (number(member.address), member.weight.max(1))).collect();
            slots.extend(maglev_table(&numbered).into_iter().map(table_slot));
        }
        slots
    }
}

/// Entries of a Maglev table, as the slot that they lie in.
fn table_slot(word: u64) -> Slot {
    zerocopy::transmute!(word)
}

/// Whether all entries of a Maglev table that lie in this slot are numbers of a range's slots.
pub fn is_of_table(slot: Slot, n_slots: u32) -> bool {
    let word: u64 = zerocopy::transmute!(slot);
    (0..MAGLEV_ENTRIES_PER_SLOT).all(|entry| maglev_entry_of(word, entry) < n_slots)
}

/// The number by which Maglev knows a backend. All nodes and versions have the same, or a key would
/// have another backend on each: FNV-1a, 64 bits (RFC 9923), of the address, IPv4 as `::ffff:a.b.c.d`,
/// and the port in network byte order.
pub fn number(address: SocketAddr) -> u64 {
    let ip = match address.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    let octets = ip.octets().into_iter().chain(address.port().to_be_bytes());
    octets.fold(0xcbf2_9ce4_8422_2325, |hash, octet| {
        (hash ^ u64::from(octet)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

//! What a socket's storage remembers, and its record. These formats are frozen: they outlive the layout
//! of the other maps, so that a socket opened under an older version keeps its peer's name and its
//! replies.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::Address;

/// The value of `SK_REVNAT`: what a connected socket connected, and what it became. Also a part of
/// [`ConnRecord`], and one entry of [`Flows`].
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct RevNat {
    /// What the application connected.
    pub frontend: Address,
    /// Where it was sent.
    pub backend: Address,
    /// The port that the application connected.
    pub frontend_port: u16,
    /// The port it was sent to.
    pub backend_port: u16,
    /// The layout that the two fields below speak of.
    pub layout: u16,
    /// In [`Flows`], whether replies of the backend bear this flow's name: [`UNDECIDED`], [`NAMES`] or
    /// [`SUPERSEDED`]. Of a TCP socket, whether its connection is among those in flight of its backend:
    /// [`NOT_COUNTED`], [`COUNTED_PENDING`], [`COUNTED_ESTABLISHED`] or [`COUNTED_TRIAL`].
    pub naming: u16,
    /// The index into `BACKENDS`.
    pub backend_idx: u32,
    /// The backend's generation; in [`Flows`], 0 for one that is only remembered for its replies.
    pub generation: u32,
}

impl RevNat {
    /// Whether this was connected to as `address` and `port`.
    #[inline(always)]
    pub fn matches_vip(&self, address: &Address, port: u16) -> bool {
        self.frontend_port == port && self.frontend == *address
    }

    /// Whether this was sent to `address` and `port`. An entry that isn't used was sent nowhere.
    #[inline(always)]
    pub fn matches_backend(&self, address: &Address, port: u16) -> bool {
        port != 0 && self.backend_port == port && self.backend == *address
    }
}

/// The number of records that `CONNS` has room for, a power of two.
pub const N_CONNS: u32 = 65_536;

/// The value of `CONNS`: the record of a TCP connection, by [`ConnRecord::index`] of its socket. What the
/// socket remembers in `SK_REVNAT` otherwise. One cache line. All zero for a record that none has.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct ConnRecord {
    /// The cookie of the socket that has it, which no other socket of this boot has; 0 for none.
    pub cookie: u64,
    /// Who may take it.
    pub claim: ConnClaim,
    /// What the socket connected, and what that became.
    pub revnat: RevNat,
}

/// Who may take a [`ConnRecord`]: one word.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct ConnClaim {
    /// The programs that are about to write the record. One that finds another there doesn't.
    pub claims: u32,
    /// How often it was written; it wraps.
    pub writes: u16,
    /// The same as `writes` where the record is free although it has a cookie: the daemon found that the
    /// socket is gone.
    pub abandoned: u16,
}

impl ConnRecord {
    /// The index into `CONNS` of a socket's record, by its cookie. The kernel counts cookies up, so two
    /// sockets have the same one only if many were made in between.
    #[inline(always)]
    pub const fn index(cookie: u64) -> u32 {
        cookie as u32 & (N_CONNS - 1)
    }
}

/// The number of flows that a socket remembers.
pub const N_FLOWS: usize = 8;

/// [`RevNat::naming`] of a flow that was kept by a version which left it zero: the one used last names the
/// replies, unless another flow of the same backend does.
pub const UNDECIDED: u16 = 0;
/// The last datagram to the backend was this flow's.
pub const NAMES: u16 = 1;
/// The last datagram to the backend went by another name, or by the backend's own.
pub const SUPERSEDED: u16 = 2;

/// [`RevNat::naming`] of a TCP socket whose connection isn't among those in flight: it has ended, or no
/// program of the unit `outcomes` saw it begin.
pub const NOT_COUNTED: u16 = 0;
/// The connection is being established.
pub const COUNTED_PENDING: u16 = 1;
/// The connection was established.
pub const COUNTED_ESTABLISHED: u16 = 2;
/// The connection is being established, and it is the trial of an ejected backend.
pub const COUNTED_TRIAL: u16 = 3;

/// For how long a flow that isn't used counts as in use, in units of [`flow_clock`]: 60 s, which is
/// what connection tracking gives a datagram's flow at least.
pub const FLOW_IDLE: u32 = 56;

/// The time by which flows are dated, of nanoseconds since boot: in units of 2^30 ns, which are 1.07 s.
/// It wraps after 146 years.
#[inline(always)]
pub const fn flow_clock(ns: u64) -> u32 {
    (ns >> 30) as u32
}

/// The kernel's lock. Its name and size are what the verifier looks for.
#[allow(non_camel_case_types)]
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, Immutable, IntoBytes)]
pub struct bpf_spin_lock {
    /// The lock's state.
    pub val: u32,
}

/// The value of `FLOWS`: where a socket's datagrams went, for the last VIPs that it sent to and for
/// the last backends that it left.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, Immutable, IntoBytes)]
pub struct Flows {
    /// Not used any more: the kernel locks the socket while a program reads or writes the rest.
    pub lock: bpf_spin_lock,
    /// When any of them was last used, by [`flow_clock`]. Former versions counted sends here.
    pub clock: u32,
    /// When each flow was last used, by [`flow_clock`]; 0 for one that isn't in use. What former
    /// versions wrote is the clock of that send, which orders flows, and passes for long ago.
    pub used: [u32; N_FLOWS],
    /// The flows.
    pub flows: [RevNat; N_FLOWS],
}

impl Flows {
    /// The flow to a VIP and port that new datagrams follow.
    #[inline(always)]
    pub fn lookup_fwd(&self, address: &Address, port: u16) -> Option<usize> {
        // By index: the verifier can't follow an iterator, which compares pointers.
        let mut index = 0;
        while index < N_FLOWS {
            let flow = self.flow(index);
            if flow.generation != 0 && flow.matches_vip(address, port) {
                break;
            }
            index += 1;
        }
        (index < N_FLOWS).then_some(index)
    }

    /// The flow that a reply from `address` and `port` belongs to: the one that sent there last. `None`
    /// if the socket sent there by itself since.
    #[inline(always)]
    pub fn lookup_rev(&self, address: &Address, port: u16) -> Option<usize> {
        // No `None` yet: the verifier of 5.10 finds that its other half is read and was never written.
        let mut found = N_FLOWS;
        let mut found_age = u32::MAX;
        let mut index = 0;
        while index < N_FLOWS {
            let flow = self.flow(index);
            if flow.matches_backend(address, port) {
                if flow.naming == NAMES {
                    found = index;
                    break;
                }
                let age = self.clock.wrapping_sub(self.used[index]);
                if flow.naming == UNDECIDED && age <= found_age {
                    found_age = age;
                    found = index;
                }
            }
            index += 1;
        }
        (found < N_FLOWS).then_some(found)
    }

    /// A flow by its index. Masked, so that nothing has to be proved of the index.
    #[inline(always)]
    pub fn flow(&self, index: usize) -> &RevNat {
        &self.flows[index & (N_FLOWS - 1)]
    }

    /// The place for a new flow: one that isn't in use, else the oldest that is kept for its replies
    /// only, else the one that was used longest ago, if that was [`FLOW_IDLE`] ago. `None` while all
    /// are in use.
    #[inline(always)]
    pub fn victim(&self, now: u32) -> Option<usize> {
        let mut place = 0;
        let mut dispensable = 0;
        let mut index = 0;
        while index < N_FLOWS {
            let flow = &self.flows[index];
            // One more than it is: another processor's clock may be ahead by a unit.
            let age = now.wrapping_add(1).wrapping_sub(self.used[index]);
            let rank: u64 = if flow.backend_port == 0 {
                3
            } else if flow.generation == 0 {
                2
            } else {
                (age > FLOW_IDLE) as u64
            };
            let this = if rank == 0 { 0 } else { rank << 32 | age as u64 };
            if this > dispensable {
                dispensable = this;
                place = index;
            }
            index += 1;
        }
        (dispensable != 0).then_some(place)
    }

    /// Notes that a flow is used now.
    #[inline(always)]
    pub fn mark_used(&mut self, index: usize, now: u32) {
        let index = index & (N_FLOWS - 1);
        self.clock = now;
        self.used[index] = now;
        let flow = self.flows[index];
        if flow.naming != NAMES {
            self.supersede(&flow.backend, flow.backend_port);
            self.flows[index].naming = NAMES;
        }
    }

    /// Notes that a datagram went to this address by a name that no flow has: replies from there don't
    /// bear a flow's name, until it is used again.
    #[inline(always)]
    pub fn supersede(&mut self, address: &Address, port: u16) {
        let mut index = 0;
        while index < N_FLOWS {
            if self.flows[index].matches_backend(address, port) {
                self.flows[index].naming = SUPERSEDED;
            }
            index += 1;
        }
    }

    /// Keeps a new flow. The former one to the same VIP and port, if any, is kept for its replies.
    /// Returns whether there was room: flows in use don't give way.
    #[inline(always)]
    pub fn insert(&mut self, flow: &RevNat, now: u32) -> bool {
        self.renew(&flow.frontend, flow.frontend_port);
        let Some(place) = self.victim(now) else {
            self.supersede(&flow.backend, flow.backend_port);
            return false;
        };
        self.put(place, flow, now);
        true
    }

    /// From now on the flow to this VIP and port, if there is one, is only kept for its replies.
    #[inline(always)]
    pub fn renew(&mut self, address: &Address, port: u16) {
        let mut index = 0;
        while index < N_FLOWS {
            if self.flows[index].matches_vip(address, port) {
                self.flows[index].generation = 0;
            }
            index += 1;
        }
    }

    /// Keeps a flow in this place ([`Flows::victim`]).
    #[inline(always)]
    pub fn put(&mut self, place: usize, flow: &RevNat, now: u32) {
        self.flows[place & (N_FLOWS - 1)] = *flow;
        self.mark_used(place, now);
    }
}

const _: () = {
    use core::mem::{offset_of, size_of};
    assert!(size_of::<RevNat>() == 48 && offset_of!(RevNat, generation) == 44);
    assert!(size_of::<ConnRecord>() == 64 && offset_of!(ConnRecord, revnat) == 16);
    assert!(size_of::<ConnClaim>() == 8 && N_CONNS.is_power_of_two());
    assert!(size_of::<Flows>() == 424 && offset_of!(Flows, flows) == 40);
    assert!(N_FLOWS.is_power_of_two());
};

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(vip: u8, backend: u8) -> RevNat {
        RevNat {
            frontend: Address::v4([127, 128, 0, vip]),
            backend: Address::v4([10, 0, 0, backend]),
            frontend_port: 53,
            backend_port: 5353,
            generation: u32::from(backend),
            ..RevNat::default()
        }
    }

    fn sent_to(flows: &Flows, vip: u8) -> Option<u8> {
        let index = flows.lookup_fwd(&Address::v4([127, 128, 0, vip]), 53)?;
        Some(flows.flows[index].backend.octets[15])
    }

    fn came_from(flows: &Flows, backend: u8) -> Option<u8> {
        let index = flows.lookup_rev(&Address::v4([10, 0, 0, backend]), 5353)?;
        Some(flows.flows[index].frontend.octets[15])
    }

    fn vip(last: u8) -> Address {
        Address::v4([127, 128, 0, last])
    }

    fn touch(flows: &mut Flows, vip_: u8, now: u32) {
        flows.mark_used(flows.lookup_fwd(&vip(vip_), 53).unwrap(), now);
    }

    const NOW: u32 = 5_000;

    #[test]
    fn a_flow_is_found_both_ways() {
        let mut flows = Flows::default();
        assert_eq!((sent_to(&flows, 1), came_from(&flows, 7)), (None, None));
        assert!(flows.insert(&flow(1, 7), NOW));
        assert_eq!((sent_to(&flows, 1), came_from(&flows, 7)), (Some(7), Some(1)));
        assert_eq!((sent_to(&flows, 2), came_from(&flows, 8)), (None, None));
    }

    #[test]
    fn late_replies_of_a_former_backend_still_come_from_the_vip() {
        let mut flows = Flows::default();
        for backend in 1..=5 {
            assert!(flows.insert(&flow(1, backend), NOW));
        }
        assert_eq!(sent_to(&flows, 1), Some(5));
        for backend in 1..=5 {
            assert_eq!(came_from(&flows, backend), Some(1), "backend {backend}");
        }
    }

    #[test]
    fn former_flows_give_way_first_then_the_one_idle_longest_and_none_in_use() {
        let mut flows = Flows::default();
        for vip in 1..=4 {
            assert!(flows.insert(&flow(vip, 10 + vip), NOW));
        }
        for backend in 20..=90 {
            assert!(flows.insert(&flow(4, backend), NOW));
        }
        for vip in 1..=3 {
            assert_eq!(sent_to(&flows, vip), Some(10 + vip), "the last VIPs stay");
        }
        for vip in 5..=8 {
            assert!(flows.insert(&flow(vip, 10 + vip), NOW + 10));
        }
        assert!(!flows.insert(&flow(9, 19), NOW + FLOW_IDLE - 1), "all are in use");
        for vip in 1..=8 {
            assert!(sent_to(&flows, vip).is_some(), "VIP {vip}");
        }
        // One whose backend left makes room for itself.
        assert!(flows.insert(&flow(3, 33), NOW + FLOW_IDLE - 1));
        assert_eq!(sent_to(&flows, 3), Some(33));
        let later = NOW + FLOW_IDLE;
        touch(&mut flows, 1, later);
        assert!(flows.insert(&flow(9, 19), later));
        assert_eq!(sent_to(&flows, 2), None, "used longest ago");
        assert!(flows.insert(&flow(10, 20), later));
        assert_eq!(sent_to(&flows, 4), None, "the next one");
        assert!(!flows.insert(&flow(11, 21), later), "the others are in use");
        for vip in [1, 3, 5, 6, 7, 8, 9, 10] {
            assert!(sent_to(&flows, vip).is_some(), "VIP {vip}");
        }
    }

    #[test]
    fn of_two_vips_with_one_backend_the_last_used_gets_the_reply() {
        let mut flows = Flows::default();
        flows.insert(&flow(1, 7), NOW);
        flows.insert(&flow(2, 7), NOW);
        assert_eq!(came_from(&flows, 7), Some(2));
        for vip in [1, 2, 2, 1, 1, 2, 1] {
            // Within one unit of the clock.
            touch(&mut flows, vip, NOW);
            assert_eq!(came_from(&flows, 7), Some(vip));
        }
    }

    #[test]
    fn after_a_direct_datagram_the_reply_is_nobodys() {
        let mut flows = Flows::default();
        let direct = Address::v4([10, 0, 0, 7]);
        flows.insert(&flow(1, 7), NOW);
        flows.insert(&flow(2, 7), NOW);
        flows.insert(&flow(3, 8), NOW);
        flows.supersede(&direct, 5353);
        assert_eq!((came_from(&flows, 7), came_from(&flows, 8)), (None, Some(3)));
        flows.supersede(&direct, 53);
        touch(&mut flows, 1, NOW);
        assert_eq!(came_from(&flows, 7), Some(1));
        flows.supersede(&direct, 5353);
        touch(&mut flows, 2, NOW);
        assert_eq!(came_from(&flows, 7), Some(2));
        assert_eq!(sent_to(&flows, 1), Some(7), "which ends no flow");
    }

    #[test]
    fn one_that_finds_no_place_doesnt_borrow_a_name() {
        let mut flows = Flows::default();
        for vip in 1..=8 {
            flows.insert(&flow(vip, 10 + vip), NOW);
        }
        assert!(!flows.insert(&flow(9, 11), NOW));
        assert_eq!(came_from(&flows, 11), None, "the last datagram there was the ninth's");
        touch(&mut flows, 1, NOW);
        assert_eq!(came_from(&flows, 11), Some(1));
    }

    /// The clock that a processor reads may be a unit behind another's; a count of sends of an earlier
    /// version, however far ahead, isn't in use.
    #[test]
    fn a_clock_that_goes_back_ends_no_flow() {
        for ahead in [0, 1, 2, 1_000] {
            let mut flows = Flows::default();
            for nth in 1..=8u8 {
                assert!(flows.insert(&flow(nth, 10 + nth), NOW + ahead));
            }
            assert_eq!(flows.insert(&flow(9, 19), NOW), ahead > 1, "ahead by {ahead}");
        }
    }

    /// What an earlier version kept by a count of sends, near its end or past it, is in order, and idle.
    #[test]
    fn flows_of_an_earlier_version_and_clocks_that_wrap() {
        for clock in [3, 1_000, u32::MAX - 1, 0, 1, u32::MAX / 2] {
            let mut flows = Flows { clock, ..Flows::default() };
            for nth in 1..=8u8 {
                let earlier =
                    RevNat { naming: UNDECIDED, ..flow(nth, if nth < 3 { 7 } else { 10 + nth }) };
                flows.flows[usize::from(nth) - 1] = earlier;
                // The first was used last but one, the second last.
                let age = if nth < 3 { 2 - nth } else { nth };
                flows.used[usize::from(nth) - 1] = clock.wrapping_sub(age.into());
            }
            assert_eq!(came_from(&flows, 7), Some(2), "clock {clock}");
            assert_eq!(came_from(&flows, 13), Some(3), "clock {clock}");
            touch(&mut flows, 1, NOW);
            assert_eq!(came_from(&flows, 7), Some(1), "clock {clock}");
            touch(&mut flows, 2, NOW);
            assert_eq!(came_from(&flows, 7), Some(2), "clock {clock}");
        }
        for start in [0, 1, u32::MAX - 2, u32::MAX] {
            let mut flows = Flows::default();
            for nth in 1..=8u8 {
                assert!(flows.insert(&flow(nth, 10 + nth), start.wrapping_add(nth.into())));
            }
            assert!(!flows.insert(&flow(9, 19), start.wrapping_add(FLOW_IDLE)), "start {start}");
            assert!(flows.insert(&flow(9, 19), start.wrapping_add(1 + FLOW_IDLE)), "start {start}");
            assert_eq!(sent_to(&flows, 1), None, "start {start}");
        }
    }
}

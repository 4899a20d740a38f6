//! What a socket's storage remembers. This format is frozen: it outlives the layout of the other
//! maps, so that a socket opened under an older version keeps its peer's name and its replies.

use crate::Address;

/// The value of `PEERS`: what a connected socket dialled, and what it became. Also one entry of
/// [`Flows`].
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// What the application dialled.
    pub frontend: Address,
    /// Where it was sent.
    pub backend: Address,
    /// The port that the application dialled.
    pub frontend_port: u16,
    /// The port it was sent to.
    pub backend_port: u16,
    /// The layout that the two fields below speak of.
    pub layout: u16,
    /// Zero.
    pub padding: u16,
    /// The index into `BACKENDS`.
    pub backend_idx: u32,
    /// The backend's generation; in [`Flows`], 0 for one that is only remembered for its replies.
    pub generation: u32,
}

impl Peer {
    /// Whether this was dialled as `address` and `port`.
    #[inline(always)]
    pub fn was_dialled_as(&self, address: &Address, port: u16) -> bool {
        self.frontend_port == port && self.frontend == *address
    }

    /// Whether this was sent to `address` and `port`. An entry that isn't used was sent nowhere.
    #[inline(always)]
    pub fn was_sent_to(&self, address: &Address, port: u16) -> bool {
        port != 0 && self.backend_port == port && self.backend == *address
    }
}

/// The number of flows that a socket remembers.
pub const N_FLOWS: usize = 8;

/// The kernel's lock. Its name and size are what the verifier looks for.
#[allow(non_camel_case_types)]
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct bpf_spin_lock {
    /// The lock's state.
    pub val: u32,
}

/// The value of `FLOWS`: where a socket's datagrams went, for the last VIPs that it sent to and for
/// the last backends that it left.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Flows {
    /// Held while the rest is read or written: threads may send on one socket at once.
    pub lock: bpf_spin_lock,
    /// Counts the sends that went elsewhere than the one before.
    pub clock: u32,
    /// The clock when each flow was last used; 0 for one that isn't in use.
    pub used: [u32; N_FLOWS],
    /// The flows.
    pub flows: [Peer; N_FLOWS],
}

impl Flows {
    /// The flow to a VIP and port that new datagrams follow.
    #[inline(always)]
    pub fn current(&self, address: &Address, port: u16) -> Option<usize> {
        // By index: the verifier can't follow an iterator, which compares pointers.
        let mut index = 0;
        while index < N_FLOWS {
            let flow = self.flow(index);
            if flow.generation != 0 && flow.was_dialled_as(address, port) {
                break;
            }
            index += 1;
        }
        (index < N_FLOWS).then_some(index)
    }

    /// The flow that a reply from `address` and `port` belongs to: of several, the one used last.
    #[inline(always)]
    pub fn replied(&self, address: &Address, port: u16) -> Option<usize> {
        // No `None` yet: the verifier of 5.10 finds that its other half is read and was never written.
        let mut found = N_FLOWS;
        let mut newest = 0;
        let mut index = 0;
        while index < N_FLOWS {
            if self.flows[index].was_sent_to(address, port) && self.used[index] >= newest {
                newest = self.used[index];
                found = index;
            }
            index += 1;
        }
        (found < N_FLOWS).then_some(found)
    }

    /// A flow by its index. Masked, so that nothing has to be proved of the index.
    #[inline(always)]
    pub fn flow(&self, index: usize) -> &Peer {
        &self.flows[index & (N_FLOWS - 1)]
    }

    /// The place for a new flow: one that isn't in use, else the oldest that is kept for its replies
    /// only, else the one that was used longest ago.
    #[inline(always)]
    pub fn place(&self) -> usize {
        let age = |index: usize| {
            (u64::from(self.flows[index].generation != 0) << 32) | u64::from(self.used[index])
        };
        let mut place = 0;
        let mut index = 1;
        while index < N_FLOWS {
            if age(index) < age(place) {
                place = index;
            }
            index += 1;
        }
        place
    }

    /// Notes that a flow is used now.
    #[inline(always)]
    pub fn touch(&mut self, index: usize) {
        if self.used[index & (N_FLOWS - 1)] != self.clock || self.clock == 0 {
            self.clock += 1;
            self.used[index & (N_FLOWS - 1)] = self.clock;
        }
    }

    /// Keeps a new flow. The former one to the same VIP and port, if any, is kept for its replies.
    #[inline(always)]
    pub fn keep(&mut self, flow: &Peer) {
        if let Some(former) = self.current(&flow.frontend, flow.frontend_port) {
            self.flows[former & (N_FLOWS - 1)].generation = 0;
        }
        let place = self.place() & (N_FLOWS - 1);
        self.flows[place] = *flow;
        self.used[place] = 0;
        self.touch(place);
    }
}

const _: () = {
    use core::mem::{offset_of, size_of};
    assert!(size_of::<Peer>() == 48 && offset_of!(Peer, generation) == 44);
    assert!(size_of::<Flows>() == 424 && offset_of!(Flows, flows) == 40);
    assert!(N_FLOWS.is_power_of_two());
};

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(vip: u8, backend: u8) -> Peer {
        Peer {
            frontend: Address::v4([127, 128, 0, vip]),
            backend: Address::v4([10, 0, 0, backend]),
            frontend_port: 53,
            backend_port: 5353,
            generation: u32::from(backend),
            ..Peer::default()
        }
    }

    fn sent_to(flows: &Flows, vip: u8) -> Option<u8> {
        let index = flows.current(&Address::v4([127, 128, 0, vip]), 53)?;
        Some(flows.flows[index].backend.octets[15])
    }

    fn came_from(flows: &Flows, backend: u8) -> Option<u8> {
        let index = flows.replied(&Address::v4([10, 0, 0, backend]), 5353)?;
        Some(flows.flows[index].frontend.octets[15])
    }

    #[test]
    fn a_flow_is_found_both_ways() {
        let mut flows = Flows::default();
        assert_eq!((sent_to(&flows, 1), came_from(&flows, 7)), (None, None));
        flows.keep(&flow(1, 7));
        assert_eq!((sent_to(&flows, 1), came_from(&flows, 7)), (Some(7), Some(1)));
        assert_eq!((sent_to(&flows, 2), came_from(&flows, 8)), (None, None));
    }

    #[test]
    fn late_replies_of_a_former_backend_still_come_from_the_vip() {
        let mut flows = Flows::default();
        for backend in 1..=5 {
            flows.keep(&flow(1, backend));
        }
        assert_eq!(sent_to(&flows, 1), Some(5));
        for backend in 1..=5 {
            assert_eq!(came_from(&flows, backend), Some(1), "backend {backend}");
        }
    }

    #[test]
    fn former_flows_give_way_first_then_the_one_used_longest_ago() {
        let mut flows = Flows::default();
        for vip in 1..=4 {
            flows.keep(&flow(vip, 10 + vip));
        }
        for backend in 20..=90 {
            flows.keep(&flow(4, backend));
        }
        for vip in 1..=3 {
            assert_eq!(sent_to(&flows, vip), Some(10 + vip), "the last VIPs stay");
        }
        for vip in 5..=8 {
            flows.keep(&flow(vip, 10 + vip));
        }
        flows.touch(flows.current(&Address::v4([127, 128, 0, 1]), 53).unwrap());
        flows.keep(&flow(9, 19));
        assert_eq!(sent_to(&flows, 2), None, "used longest ago");
        for vip in [1, 3, 4, 5, 6, 7, 8, 9] {
            assert!(sent_to(&flows, vip).is_some(), "VIP {vip}");
        }
    }

    #[test]
    fn of_two_vips_with_one_backend_the_last_used_gets_the_reply() {
        let mut flows = Flows::default();
        flows.keep(&flow(1, 7));
        flows.keep(&flow(2, 7));
        assert_eq!(came_from(&flows, 7), Some(2));
        flows.touch(flows.current(&Address::v4([127, 128, 0, 1]), 53).unwrap());
        assert_eq!(came_from(&flows, 7), Some(1));
    }
}

//! The maps as the reconciler sees them.

use std::io;
use std::net::IpAddr;

use lb_common::{Backend, Group, N_GROUPS, ServiceFlags, ServiceName, ServiceRef, Slot, SlotRange};

/// A service's ranges of slots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServiceRanges {
    /// The groups of backends, in the order in which connections use them.
    pub groups: [Group; N_GROUPS],
    /// Backends that no connection selects, but whose connections are still counted.
    pub unselected: SlotRange,
}

impl ServiceRanges {
    /// The number of ranges.
    pub const N: usize = N_GROUPS * Group::N_RANGES + 1;

    /// The ranges: those of each group, in the order of [`Group::ranges`], and last the unselected one.
    pub fn all(&self) -> [SlotRange; ServiceRanges::N] {
        let mut all = [self.unselected; ServiceRanges::N];
        let grouped = self.groups.iter().flat_map(|group| group.ranges());
        all.iter_mut().zip(grouped).for_each(|(range, grouped)| *range = grouped);
        all
    }
}

/// A service's address and port, as a key of `FRONTENDS` or `FRONTENDS6`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FrontendKey {
    /// The VIP, or a pinned address.
    pub address: IpAddr,
    /// The port; [`lb_common::ANY_PORT`] stands for all that have no key of their own.
    pub port: u16,
    /// The protocol number.
    pub protocol: u8,
}

/// The reconciler's operations on the maps. It is implemented by the kernel's maps and, in tests, by
/// ones that check the invariants after each step and ones that fail.
pub trait Maps {
    /// Inserts a frontend of the service `target`.
    ///
    /// # Errors
    /// When the kernel refuses, such as E2BIG for a full map; then nothing has changed.
    fn insert_frontend(&mut self, frontend: FrontendKey, target: ServiceRef) -> io::Result<()>;

    /// Takes over a frontend that an earlier daemon inserted, before any program reads these maps by the
    /// index.
    fn adopt_frontend(&mut self, frontend: FrontendKey, target: ServiceRef);

    /// Makes `frontend` lead nowhere; one that is absent is no error.
    ///
    /// # Errors
    /// When the kernel refuses; then nothing has changed.
    fn remove_frontend(&mut self, frontend: &FrontendKey) -> io::Result<()>;

    /// Writes the entry of a backend that no reader knows yet, and resets its counters. It ramps up from
    /// `added_ms` on, as [`lb_common::BackendOutcomes::added_ms`] has it.
    fn write_backend(&mut self, backend_idx: u32, backend: Backend, added_ms: u32);

    /// Takes the generation from a backend's entry, so that sockets which remember it know that it
    /// left the table. The rest stays readable.
    fn retire_backend(&mut self, backend_idx: u32);

    /// Gives a backend's entry another generation: sockets that remember the former one know that it
    /// doesn't hold any more. Programs don't see those connections end, so none is in flight; the rest
    /// stays.
    fn renew_backend(&mut self, backend_idx: u32, generation: u32);

    /// Gives a backend's entry another weight, and leaves the rest.
    fn set_weight(&mut self, backend_idx: u32, weight: u16);

    /// Ends the ramp of a backend.
    fn end_ramp(&mut self, backend_idx: u32);

    /// When a backend began to ramp up; 0 where it doesn't.
    fn added_ms(&self, backend_idx: u32) -> u32;

    /// Writes slots that no reader knows yet.
    fn write_slots(&mut self, first_slot: u32, slots: &[Slot]);

    /// Names a service that no reader knows yet, and resets its counters.
    fn set_name(&mut self, service_idx: u32, name: ServiceName);

    /// Lets readers see other slots in one of a service's ranges, the nth of [`ServiceRanges::all`], by one
    /// store.
    fn store_range(&mut self, service_idx: u32, nth: usize, range: SlotRange);

    /// Sets how connections of a service are treated, by one store.
    fn set_flags(&mut self, service_idx: u32, flags: ServiceFlags);

    /// Waits until every program that was running has ended.
    fn synchronize_rcu(&mut self);

    /// All frontends.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn frontends(&self) -> io::Result<Vec<(FrontendKey, ServiceRef)>>;

    /// A service's ranges.
    fn service(&self, service_idx: u32) -> ServiceRanges;

    /// How connections of a service are treated.
    fn flags(&self, service_idx: u32) -> ServiceFlags;

    /// A service's name.
    fn name(&self, service_idx: u32) -> ServiceName;

    /// A slot.
    fn slot(&self, slot_idx: u32) -> Slot;

    /// A backend.
    fn backend(&self, backend_idx: u32) -> Backend;
}

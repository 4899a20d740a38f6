//! The maps as the reconciler sees them.

use std::io;
use std::net::IpAddr;

use lb_common::{Backend, Group, N_GROUPS, ServiceName, ServiceRef, Slot};

/// A service's groups of backends, in the order in which connections use them.
pub type Groups = [Group; N_GROUPS];

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

    /// Makes `frontend` lead nowhere; one that is absent is no error.
    ///
    /// # Errors
    /// When the kernel refuses; then nothing has changed.
    fn remove_frontend(&mut self, frontend: &FrontendKey) -> io::Result<()>;

    /// Writes the entry of a backend that no reader knows yet, and resets its counter.
    fn write_backend(&mut self, backend_idx: u32, backend: Backend);

    /// Takes the generation from a backend's entry, so that sockets which remember it know that it
    /// left the table. The rest stays readable.
    fn retire_backend(&mut self, backend_idx: u32);

    /// Gives a backend's entry another generation, and leaves the rest: sockets that remember the
    /// former one know that it doesn't hold any more.
    fn renew_backend(&mut self, backend_idx: u32, generation: u32);

    /// Writes slots that no reader knows yet.
    fn write_slots(&mut self, first_slot: u32, slots: &[Slot]);

    /// Names a service that no reader knows yet, and resets its counters.
    fn set_name(&mut self, service_idx: u32, name: ServiceName);

    /// Lets readers see a service's new slots: each of its ranges by one store.
    fn publish(&mut self, service_idx: u32, groups: Groups);

    /// Has the next connection of a service reported, or none.
    fn request_event(&mut self, service_idx: u32, report_next: bool);

    /// Waits until every program that was running has ended.
    fn synchronize_rcu(&mut self);

    /// All frontends.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn frontends(&self) -> io::Result<Vec<(FrontendKey, ServiceRef)>>;

    /// A service's groups.
    fn service(&self, service_idx: u32) -> Groups;

    /// A service's name.
    fn name(&self, service_idx: u32) -> ServiceName;

    /// A slot.
    fn slot(&self, slot_idx: u32) -> Slot;

    /// A backend.
    fn backend(&self, backend_idx: u32) -> Backend;
}

//! The maps as the reconciler sees them.

use std::io;

use lb_common::{Backend, Frontend, Service, Slot, Target};

/// What the reconciler does to the maps. The kernel's are behind it, and in tests a reader that
/// checks the invariants after each step, and one that fails.
pub trait Maps {
    /// Makes `frontend` lead to `target`.
    ///
    /// # Errors
    /// When the kernel refuses, such as E2BIG for a full map; then nothing has changed.
    fn insert_frontend(&mut self, frontend: Frontend, target: Target) -> io::Result<()>;

    /// Makes `frontend` lead nowhere; one that is absent is no error.
    ///
    /// # Errors
    /// When the kernel refuses; then nothing has changed.
    fn remove_frontend(&mut self, frontend: &Frontend) -> io::Result<()>;

    /// Writes the entry of a backend that no reader knows yet, and resets its counter.
    fn write_backend(&mut self, backend_idx: u32, backend: Backend);

    /// Writes slots that no reader knows yet.
    fn write_slots(&mut self, first_slot: u32, slots: &[Slot]);

    /// Resets the counters of a service that no reader knows yet.
    fn reset_service(&mut self, service_idx: u32);

    /// Lets readers see a service's new slots: each of the two regions by one store.
    fn publish(&mut self, service_idx: u32, service: Service);

    /// Waits until every program that was running has ended.
    fn wait_for_readers(&mut self);
}

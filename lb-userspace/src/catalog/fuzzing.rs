//! What fuzzers bring in, on its way to a table.

use std::sync::Arc;
use std::time::SystemTime;

use super::{Catalog, cache, consul, file};
use crate::config::Config;
use crate::table::vips::Vips;
use crate::table::{BackendState, Builder, Instance, ServiceId, ServiceRecord, Table, Watch};

/// An answer of Consul.
pub fn consul(bytes: &[u8]) {
    let listed = |(name, instances): (Arc<str>, Vec<Instance>)| {
        (ServiceId::new(name), ServiceRecord::new(instances.into(), Watch::Live))
    };
    tabulate(&consul::fuzzing::read(bytes).into_iter().map(listed).collect());
}

/// A static catalog.
pub fn file(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match file::fuzzing::read(text) {
        Ok(catalog) => tabulate(&catalog),
        Err(n_mistakes) => assert!(n_mistakes > 0, "refused without a reason"),
    }
}

/// The catalog in the state directory.
pub fn cache(bytes: &[u8]) {
    cache::fuzz(bytes);
}

/// Makes a table of the services, and looks whether it is one that the datapath may have.
fn tabulate(catalog: &Catalog) {
    let vip = Config::default().vip;
    let mut builder = Builder::new(&vip, Vips::new((&vip).into()));
    let next = builder.next(&Table::default(), catalog, SystemTime::UNIX_EPOCH);
    let table = next.map(|next| next.table).unwrap_or_default();
    // Names that differ in case are one service.
    assert!(table.services.len() + table.rejected.len() <= catalog.len());
    for (name, service) in table.services.iter() {
        assert!(vip.pool.contains(&service.vip), "{name} is at {}", service.vip);
        for backend in &service.backends {
            let is_connected = backend.state != BackendState::Unroutable;
            assert_eq!(backend.address.is_some(), is_connected, "{name}: {backend:?}");
            let is_draining = backend.state == BackendState::Draining;
            assert!(backend.weight > 0 || is_draining, "{name}: {backend:?}");
            let is_spare = backend.state == BackendState::Spare;
            assert!(!is_spare || backend.group > 0, "{name}: {backend:?}");
        }
    }
}

//! What fuzzers bring in, on its way to a table.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use super::{Catalog, consul, file};
use crate::config::Config;
use crate::table::vips::Vips;
use crate::table::{Builder, Instance, Listing, State, Table, Watch};

/// An answer of Consul.
pub fn consul(bytes: &[u8]) {
    tabulate(consul::fuzzing::read(bytes));
}

/// A static catalog.
pub fn file(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match file::fuzzing::read(text) {
        Ok(services) => tabulate(services),
        Err(n_mistakes) => assert!(n_mistakes > 0, "refused without a reason"),
    }
}

/// Makes a table of the services, and looks whether it is one that the plane may have.
fn tabulate(services: BTreeMap<Arc<str>, impl Into<Arc<[Instance]>>>) {
    let vip = Config::default().vip;
    let mut builder = Builder::new(&vip, Vips::new((&vip).into()));
    let listed = |(name, instances)| (name, Listing { instances, watch: Watch::Live });
    let services = services.into_iter().map(|(name, instances)| (name, instances.into()));
    let catalog: Catalog = services.map(listed).collect();
    let next = builder.next(&Table::default(), &catalog, SystemTime::UNIX_EPOCH);
    let table = next.map(|next| next.table).unwrap_or_default();
    assert_eq!(table.services.len() + table.rejected.len(), catalog.len());
    for (name, service) in &table.services {
        assert!(vip.pool.contains(&service.vip), "{name} is at {}", service.vip);
        for backend in &service.backends {
            let is_dialled = backend.state != State::Unroutable;
            assert_eq!(backend.address.is_some(), is_dialled, "{name}: {backend:?}");
            assert!(backend.weight > 0, "{name}: {backend:?}");
        }
    }
}

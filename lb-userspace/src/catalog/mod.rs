//! Discovery: turns what the sources (Consul, a file) report into the table's input.
//!
//! Each source has a [`Handle`]; [`Sources`] has all of them and merges what they report. An error is not
//! emptiness: a failure, a timeout or a response that can't be parsed leaves the last catalog of the
//! source in place and changes only its [`Health`].

mod cache;
mod consul;
mod declarations;
mod file;
#[cfg(any(fuzzing, test))]
pub(crate) mod fuzzing;
mod handle;
mod host;
mod inspection;
mod merge;
mod published;
mod publisher;
pub mod resolve;
mod snapshot;
mod sources;
mod stats;
mod supervisor;
mod usage;

use std::path::Path;

use crate::config::{Config, SourceKind};
pub use crate::table::Catalog;
pub use handle::{CatalogError, Handle, SupervisorExit};
pub use inspection::{InspectError, InspectedCheck, InspectedInstance, Inspection};
pub use published::{Health, Published};
pub use sources::{SourceEvent, SourceView, Sources};
pub use stats::{Stats, Watches};
pub use usage::{InspectResult, Lookup, UsageSender};
#[cfg(test)]
pub(crate) use usage::{LookupRequest, SourceCommand};

/// Checks whether the configured sources can be started.
///
/// # Errors
/// A static catalog that can't be read, or has errors. Consul need not be up yet.
pub fn check(config: &Config) -> Result<(), CatalogError> {
    static_catalogs(config).try_for_each(|path| Ok(file::check(path)?))
}

/// Checks whether the sources can be started by a new daemon: for a static catalog that can't be used,
/// its last good copy in the state directory is enough.
///
/// # Errors
/// As [`check`], and there is no copy.
pub fn check_first(config: &Config) -> Result<(), CatalogError> {
    static_catalogs(config)
        .try_for_each(|path| Ok(file::check_first(path, &handle::kept(config, path))?))
}

fn static_catalogs(config: &Config) -> impl Iterator<Item = &Path> {
    config.catalog.sources.iter().filter_map(|kind| match kind {
        SourceKind::Consul => None,
        SourceKind::File(path) => Some(&**path),
    })
}

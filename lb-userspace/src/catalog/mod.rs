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
use crate::counted::counted;
pub use crate::table::Catalog;
use crate::table::catalog_problems;
use crate::table::vips::Pools;
pub use handle::{CatalogError, Handle, SupervisorExit};
pub use inspection::{InspectError, InspectedCheck, InspectedInstance, Inspection};
pub use published::{Health, Published};
pub use sources::{SourceEvent, SourceView, Sources};
pub use stats::{Stats, Watches};
pub use usage::{InspectResult, Lookup, UsageSender};
#[cfg(test)]
pub(crate) use usage::{LookupRequest, SourceCommand};

/// The most warnings about a static catalog; a last one has the number of the others.
const MAX_WARNINGS: usize = 20;

/// Checks whether the configured sources can be started, and returns what they have that can't be served: a
/// sentence each.
///
/// # Errors
/// A static catalog that can't be read, or has errors. Consul need not be up yet.
pub fn check(config: &Config) -> Result<Vec<String>, CatalogError> {
    let mut warnings = Vec::new();
    for path in static_catalogs(config) {
        let catalog = file::check(path)?;
        let (n_services, room) = (catalog.len(), config.datapath.max_services as usize);
        let too_many = (n_services > room).then(|| {
            format!(
                "{n_services} services, and datapath.max_services is {room}: raise it, or remove some"
            )
        });
        let pools = Pools::from(&config.vip);
        let mut problems = too_many.into_iter().chain(catalog_problems(&catalog, &pools));
        let first: Vec<String> = problems.by_ref().take(MAX_WARNINGS).collect();
        let n_more = problems.count();
        let more = (n_more > 0).then(|| format!("and {}", counted(n_more, "more problem")));
        let lines = first.into_iter().chain(more);
        warnings.extend(lines.map(|line| format!("{}: {line}", path.display())));
    }
    Ok(warnings)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cant_be_served_is_a_warning() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("catalog.toml");
        let mut config = Config::default();
        config.catalog.sources = vec![SourceKind::File(path.clone())];
        let mut warnings = |text: &str, max_services| {
            std::fs::write(&path, text).unwrap();
            config.datapath.max_services = max_services;
            let start = format!("{}: ", path.display());
            let lines = check(&config).unwrap();
            lines.iter().map(|it| it.strip_prefix(&start).unwrap().to_owned()).collect::<Vec<_>>()
        };
        let service = |name: &str, addresses: &[&str]| {
            let backends = addresses.iter().map(|it| format!("{{ address = '{it}' }}, "));
            let backends: String = backends.collect();
            format!("[[service]]\nname = \"{name}\"\nbackend = [{backends}]\n")
        };
        let well = service("web", &["10.0.0.7:80", "127.0.0.1:80", "[fd00::7]:80"]);
        assert_eq!(warnings(&well, 1), [""; 0]);
        assert_eq!(
            warnings(&(well.clone() + &service("db", &[])), 1),
            ["2 services, and datapath.max_services is 1: raise it, or remove some"]
        );
        let names = ["a.b", &"x".repeat(64), "tab\\t"].map(|name| service(name, &["10.0.0.7:80"]));
        let found = warnings(&names.concat(), 9);
        assert_eq!(found.len(), 3);
        assert!(found.iter().all(|it| it.contains("can't be a DNS name")), "{found:?}");
        let bad = ["0.0.0.0:80", "224.0.0.1:80", "127.200.0.1:80", "[fe80::1]:80"];
        let found = warnings(&service("web", &bad), 9);
        assert_eq!(found.len(), bad.len());
        assert!(found.iter().all(|it| it.starts_with("service `web`: ")), "{found:?}");
        let many: String = (0..30).map(|n| service(&format!("{n}."), &[])).collect();
        let found = warnings(&many, 99);
        assert_eq!((found.len(), &*found[20]), (21, "and 10 more problems"));
    }
}

//! What comes from outside, as fuzzers bring it in: each function takes any bytes, and none may
//! panic, hang, or break what it promises. `cargo xtask fuzz` runs them on what libFuzzer makes up;
//! the test below runs them on the corpus in `fuzz/corpus`.

use std::path::Path;
use std::time::SystemTime;

use crate::table::vips::Vips;
use crate::{catalog, config, dns};

/// Answers of Consul: the list of names, and the instances of a service.
pub fn consul(bytes: &[u8]) {
    catalog::fuzzing::consul(bytes);
}

/// The configuration file.
pub fn config(bytes: &[u8]) {
    let read = config::LoadedConfig::parse(Path::new("c.toml"), bytes, &[], &|_| None);
    if let Err(errors) = read {
        assert!(!errors.to_string().is_empty());
    }
}

/// The static catalog, and the table that comes of it.
pub fn catalog(bytes: &[u8]) {
    catalog::fuzzing::file(bytes);
}

/// A DNS message, from a client or another resolver.
pub fn dns(bytes: &[u8]) {
    dns::fuzzing::question(bytes);
    dns::fuzzing::kernel(bytes);
    dns::fuzzing::upstream(bytes);
}

/// The files of the state directory: the catalog, and the book of VIPs.
pub fn state(bytes: &[u8]) {
    catalog::fuzzing::cache(bytes);
    let vip = config::Config::default().vip;
    let Ok(mut vips) = Vips::parse(bytes, (&vip).into()) else { return };
    // What was read is kept to: a new name gets an address that nobody has.
    let names: Vec<_> = vips.in_use().cloned().collect();
    let new = vips.assign(&"a-new-name".into(), SystemTime::UNIX_EPOCH).ok();
    for name in names.iter().filter(|name| &***name != "a-new-name") {
        let known = vips.assign(name, SystemTime::UNIX_EPOCH).ok();
        assert!(known.is_none() || known != new, "{name} shares {known:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Target = fn(&[u8]);
    const TARGETS: &[(&str, Target)] = &[
        ("consul", consul),
        ("config", config),
        ("catalog", catalog),
        ("dns", super::dns),
        ("state", state),
    ];

    #[test]
    fn the_corpus_finds_nothing() {
        let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
        for (name, target) in TARGETS {
            let corpus = corpora.join(name);
            let mut n_files = 0;
            for entry in std::fs::read_dir(&corpus).unwrap() {
                target(&std::fs::read(entry.unwrap().path()).unwrap());
                n_files += 1;
            }
            assert!(n_files > 0, "{} is empty", corpus.display());
        }
    }
}

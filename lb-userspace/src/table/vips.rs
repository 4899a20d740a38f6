//! VIPs: which address a name has on this node.
//!
//! The place to look first is a hash of the name, so that nodes mostly agree without talking; what
//! is taken is skipped. What a name got it keeps: the book of names is written to the state
//! directory before an address is used.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

/// How long an address that a name gave up goes to no other name.
pub const REST: Duration = Duration::from_secs(24 * 60 * 60);

/// Why a name has no address.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the VIP pool {pool} has no address left: set a larger vip.pool")]
pub struct PoolExhausted {
    pool: Ipv4Net,
}

/// Why the book can't be read or written.
#[derive(Debug, thiserror::Error)]
#[error("can't {action} {path}: {source}")]
pub struct BookError {
    action: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// An entry of the book.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    vip: Ipv4Addr,
    /// When the name gave it up; `None` while the name is in use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    released: Option<SystemTime>,
}

/// The book: every name that has an address, or had one.
#[derive(Debug, PartialEq, Eq)]
pub struct Vips {
    pool: Ipv4Net,
    names: BTreeMap<Arc<str>, Entry>,
    holders: HashMap<Ipv4Addr, Arc<str>>,
}

impl Vips {
    /// An empty book for `pool`.
    pub fn new(pool: Ipv4Net) -> Vips {
        Vips { pool, names: BTreeMap::new(), holders: HashMap::new() }
    }

    /// Reads the book that an earlier run wrote. There being none is fine; one that can't be
    /// understood is set aside under another name, and the hash finds most addresses again.
    /// Addresses that aren't in `pool` any more are dropped.
    ///
    /// # Errors
    /// When the file is there and can't be read.
    pub fn read(path: &Path, pool: Ipv4Net) -> Result<Vips, BookError> {
        let error = |action| move |source| BookError { action, path: path.into(), source };
        let mut vips = Vips::new(pool);
        let text = match std::fs::read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vips),
            result => result.map_err(error("read"))?,
        };
        match serde_json::from_slice::<BTreeMap<Arc<str>, Entry>>(&text) {
            Ok(names) => {
                for (name, entry) in names {
                    if vips.is_usable(entry.vip) && !vips.holders.contains_key(&entry.vip) {
                        vips.holders.insert(entry.vip, name.clone());
                        vips.names.insert(name, entry);
                    }
                }
            }
            Err(problem) => {
                let aside = path.with_extension("corrupt");
                std::fs::rename(path, &aside).map_err(error("set aside"))?;
                tracing::warn!(
                    "{} can't be understood ({problem}): set aside as {}; addresses are found anew",
                    path.display(),
                    aside.display()
                );
            }
        }
        Ok(vips)
    }

    /// Writes the book: whole, or not at all.
    ///
    /// # Errors
    /// When the directory can't be written to.
    pub fn write(&self, path: &Path) -> Result<(), BookError> {
        let error = |source| BookError { action: "write", path: path.into(), source };
        let directory = path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(directory).map_err(error)?;
        let file = tempfile::NamedTempFile::new_in(directory).map_err(error)?;
        serde_json::to_writer(&file, &self.names).map_err(|problem| error(problem.into()))?;
        file.as_file().sync_all().map_err(error)?;
        file.persist(path).map_err(|problem| error(problem.error))?;
        Ok(())
    }

    /// The address of `name`, from the book or new.
    ///
    /// # Errors
    /// When every address of the pool is in use, or was until less than [`REST`] ago.
    pub fn assign(&mut self, name: &Arc<str>, now: SystemTime) -> Result<Ipv4Addr, PoolExhausted> {
        if let Some(entry) = self.names.get_mut(name) {
            entry.released = None;
            return Ok(entry.vip);
        }
        let vip = match self.free(name) {
            Some(vip) => vip,
            None => self.reclaim(now).ok_or(PoolExhausted { pool: self.pool })?,
        };
        self.names.insert(name.clone(), Entry { vip, released: None });
        self.holders.insert(vip, name.clone());
        Ok(vip)
    }

    /// Notes that `name` is not in use any more. It keeps its address unless the pool gets short.
    pub fn release(&mut self, name: &str, now: SystemTime) {
        if let Some(entry) = self.names.get_mut(name) {
            entry.released.get_or_insert(now);
        }
    }

    /// The names that are in use, as far as the book knows.
    pub fn in_use(&self) -> impl Iterator<Item = &Arc<str>> {
        self.names.iter().filter(|(_, entry)| entry.released.is_none()).map(|(name, _)| name)
    }

    /// The name that holds `vip`.
    pub fn holder(&self, vip: Ipv4Addr) -> Option<&Arc<str>> {
        self.holders.get(&vip)
    }

    /// Probes from the name's hash on for an address that no name has.
    fn free(&self, name: &str) -> Option<Ipv4Addr> {
        let n_usable = u64::from(self.last() - self.first()) + 1;
        if self.holders.len() as u64 >= n_usable {
            return None;
        }
        let start = fnv1a(name.as_bytes()) % n_usable;
        (0..n_usable)
            .map(|step| Ipv4Addr::from(self.first() + ((start + step) % n_usable) as u32))
            .find(|vip| !self.holders.contains_key(vip))
    }

    /// Takes the address that was given up longest ago, if that is long enough.
    fn reclaim(&mut self, now: SystemTime) -> Option<Ipv4Addr> {
        let (released, name, vip) = self
            .names
            .iter()
            .filter_map(|(name, entry)| Some((entry.released?, name.clone(), entry.vip)))
            .min()?;
        if now.duration_since(released).unwrap_or_default() < REST {
            return None;
        }
        self.names.remove(&name);
        self.holders.remove(&vip);
        Some(vip)
    }

    fn is_usable(&self, vip: Ipv4Addr) -> bool {
        (self.first()..=self.last()).contains(&u32::from(vip))
    }

    /// The pool's own address and its broadcast address go to nobody.
    fn first(&self) -> u32 {
        u32::from(self.pool.network()) + 1
    }

    fn last(&self) -> u32 {
        u32::from(self.pool.broadcast()) - 1
    }
}

/// FNV-1a, 64 bits (RFC 9923): part of the contract between nodes and versions, so it is spelt out
/// here rather than left to a hasher that may change.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const EPOCH: SystemTime = SystemTime::UNIX_EPOCH;

    fn vips(pool: &str) -> Vips {
        Vips::new(pool.parse().unwrap())
    }

    fn name(name: &str) -> Arc<str> {
        Arc::from(name)
    }

    #[test]
    fn the_hash_is_fnv1a() {
        assert_eq!(fnv1a(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a(b"a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(fnv1a(b"foobar"), 0x8594_4171_f739_67e8);
    }

    #[test]
    fn a_name_keeps_its_address() {
        let mut vips = vips("127.128.0.0/9");
        let vip = vips.assign(&name("web"), EPOCH).unwrap();
        vips.release("web", EPOCH);
        assert_eq!(vips.assign(&name("web"), EPOCH + 9 * REST), Ok(vip));
    }

    #[test]
    fn an_address_rests_for_a_day_and_goes_on_only_when_the_pool_is_short() {
        let mut vips = vips("127.128.0.0/30"); // two usable addresses
        let first = vips.assign(&name("a"), EPOCH).unwrap();
        let second = vips.assign(&name("b"), EPOCH).unwrap();
        assert_ne!(first, second);
        assert!(vips.assign(&name("c"), EPOCH).is_err());
        vips.release("a", EPOCH);
        assert!(vips.assign(&name("c"), EPOCH + REST / 2).is_err());
        assert_eq!(vips.assign(&name("c"), EPOCH + REST), Ok(first));
        assert!(vips.assign(&name("a"), EPOCH + REST).is_err());
    }

    #[test]
    fn the_book_survives_a_restart_and_a_corrupt_one_is_set_aside() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vips.json");
        let pool = "127.128.0.0/9".parse().unwrap();
        let mut vips = Vips::read(&path, pool).unwrap();
        vips.assign(&name("web"), EPOCH).unwrap();
        vips.assign(&name("db"), EPOCH).unwrap();
        vips.release("db", EPOCH);
        vips.write(&path).unwrap();
        assert_eq!(Vips::read(&path, pool).unwrap(), vips);
        let elsewhere = Vips::read(&path, "127.64.0.0/16".parse().unwrap()).unwrap();
        assert_eq!(elsewhere.names.len(), 0, "addresses outside the pool are dropped");

        std::fs::write(&path, "{\"web\":").unwrap();
        assert_eq!(Vips::read(&path, pool).unwrap(), Vips::new(pool));
        assert!(path.with_extension("corrupt").exists());
    }

    proptest! {
        #[test]
        fn no_two_names_share_an_address(
            names in prop::collection::btree_set("[a-z]{1,3}", 1..200)
        ) {
            let mut vips = vips("127.128.0.0/24");
            let mut taken = std::collections::BTreeSet::new();
            for each in &names {
                let vip = vips.assign(&name(each), EPOCH).unwrap();
                prop_assert!(vips.pool.contains(&vip) && taken.insert(vip));
            }
        }
    }
}

//! VIPs: which address a name has on this node.
//!
//! The place to look first is a hash of the name, so that nodes mostly agree without talking; what
//! is taken is skipped. A name keeps what it got: all names are recorded in the state directory, by
//! `daemon::recorder`, before an address is given out.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::config::VipConfig;
use crate::ordmap::OrdMap;

/// How long a released address is in quarantine, and goes to no other name.
pub const COOL_DOWN: Duration = Duration::from_secs(24 * 60 * 60);

/// How long a name that gave its address up is kept: many times what a service is away for, so that one
/// that comes back has the address that it had.
const RETENTION: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// The most names that are kept after their quarantine: otherwise a site with thousands of new names a
/// day would have a file of megabytes, which is written as a whole for each new name.
const MAX_RELEASED: usize = 16_384;

/// Why a name has no address.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the VIP pool {pool} has no address left{}: set a larger vip.pool", quarantine_note(*n_quarantined, *free_in))]
pub struct PoolExhausted {
    pool: Ipv4Net,
    /// The addresses released less than [`COOL_DOWN`] ago.
    n_quarantined: usize,
    /// When the first of them can go to another name.
    free_in: Duration,
}

/// The addresses in quarantine, to the hour, so that the message rarely changes.
fn quarantine_note(n_quarantined: usize, free_in: Duration) -> String {
    match (n_quarantined, free_in.as_secs().div_ceil(60 * 60)) {
        (0, _) => String::new(),
        (n, n_hours) => format!(", {n} in quarantine, the next is free within {n_hours} h"),
    }
}

/// The VIPs at one version, to be recorded.
#[derive(Debug)]
pub struct VipSnapshot {
    /// As [`Vips::version`].
    pub version: u64,
    names: OrdMap<Arc<str>, Entry>,
}

impl VipSnapshot {
    /// The file's contents: one JSON object, an entry a name.
    pub fn to_json(&self) -> Vec<u8> {
        let names: BTreeMap<&str, &Entry> =
            self.names.iter().map(|(name, entry)| (&**name, entry)).collect();
        // Names and addresses are always JSON.
        serde_json::to_vec(&names).unwrap_or_default()
    }
}

/// The pools of VIPs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pools {
    /// The IPv4 ones.
    pub v4: Ipv4Net,
    /// The IPv6 ones, where services have any.
    pub v6: Option<Ipv6Net>,
}

impl From<&VipConfig> for Pools {
    fn from(config: &VipConfig) -> Pools {
        Pools { v4: config.pool, v6: config.pool6 }
    }
}

impl Pools {
    /// The pool that an address is in.
    pub fn around(&self, address: IpAddr) -> Option<IpNet> {
        let pools = [Some(self.v4.into()), self.v6.map(IpNet::from)];
        pools.into_iter().flatten().find(|pool| pool.contains(&address))
    }
}

/// The addresses of a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vip {
    /// The IPv4 one.
    pub v4: Ipv4Addr,
    /// The IPv6 one; `None` without a pool for them, or while that has none left.
    pub v6: Option<Ipv6Addr>,
}

/// How the addresses of the IPv4 pool are used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolUse {
    /// Those of names in use.
    pub used: usize,
    /// Those released less than [`COOL_DOWN`] ago.
    pub quarantined: usize,
    /// All that there are for names.
    pub size: usize,
}

impl PoolUse {
    /// Those that a new name could have.
    pub fn free(&self) -> usize {
        self.size.saturating_sub(self.used + self.quarantined)
    }
}

/// A name's record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    vip: Ipv4Addr,
    /// Kept while there is no pool for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    vip6: Option<Ipv6Addr>,
    /// When the name gave it up; `None` while the name is in use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    released: Option<SystemTime>,
}

/// The entries in a file's text. A later version's file may have further keys, or all entries below a
/// key `names`: anything else is ignored.
fn entries(text: &[u8]) -> Result<BTreeMap<Arc<str>, Entry>, serde_json::Error> {
    use serde_json::{Value, from_slice, from_value};
    let problem = match from_slice(text) {
        Ok(entries) => return Ok(entries),
        Err(problem) => problem,
    };
    let Ok(Value::Object(mut all)) = from_slice(text) else { return Err(problem) };
    // A service may be called `names`, too: then it has an address.
    if let Some(Value::Object(names)) = all.get_mut("names")
        && !names.get("vip").is_some_and(Value::is_string)
    {
        all = std::mem::take(names);
    }
    let entry = |(name, value): (String, Value)| Some((name.into(), from_value(value).ok()?));
    let entries: BTreeMap<_, _> = all.into_iter().filter_map(entry).collect();
    if entries.is_empty() { Err(problem) } else { Ok(entries) }
}

/// The allocator of VIPs: every name that has an address, or had one.
#[derive(Debug, PartialEq, Eq)]
pub struct Vips {
    pools: Pools,
    names: OrdMap<Arc<str>, Entry>,
    /// The name that has each address, of either family.
    holders: HashMap<IpAddr, Arc<str>>,
    version: u64,
    assigned: u64,
}

impl Vips {
    /// One without names, for these pools.
    pub fn new(pools: Pools) -> Vips {
        Vips { pools, names: OrdMap::new(), holders: HashMap::new(), version: 0, assigned: 0 }
    }

    /// One without names that has to be recorded.
    pub fn unrecorded(pools: Pools) -> Vips {
        Vips { version: 1, ..Vips::new(pools) }
    }

    /// Reads a file of an earlier run, as version 0. Addresses outside their pool are dropped.
    ///
    /// # Errors
    /// The text's problem.
    pub(crate) fn parse(text: &[u8], pools: Pools) -> Result<Vips, serde_json::Error> {
        let mut vips = Vips::new(pools);
        entries(text)?.into_iter().for_each(|(name, entry)| vips.admit(name, entry));
        Ok(vips)
    }

    /// Takes over an entry of an earlier run, as far as it still holds.
    fn admit(&mut self, name: Arc<str>, mut entry: Entry) {
        let Pools { v4, v6 } = self.pools;
        let fits = |pool: IpNet, vip: IpAddr| {
            let is_usable = vip != pool.network() && vip != pool.broadcast();
            pool.contains(&vip) && is_usable && !self.holders.contains_key(&vip)
        };
        if !fits(v4.into(), entry.vip.into()) {
            return;
        }
        if let Some(v6) = v6 {
            entry.vip6 = entry.vip6.filter(|&vip6| fits(v6.into(), vip6.into()));
        }
        self.enter(name, entry);
    }

    /// Takes over the addresses that a name has in the kernel, unless some are known for it.
    pub fn claim(&mut self, name: &Arc<str>, addresses: &[IpAddr]) {
        let vip = addresses.iter().find_map(|address| match address {
            IpAddr::V4(vip) => Some(*vip),
            IpAddr::V6(_) => None,
        });
        let vip6 = addresses.iter().find_map(|address| match address {
            IpAddr::V4(_) => None,
            IpAddr::V6(vip6) => Some(*vip6),
        });
        if let (Some(vip), false) = (vip, self.names.contains_key(name)) {
            self.admit(name.clone(), Entry { vip, vip6, released: None });
            // The file lacks it.
            self.version += u64::from(self.names.contains_key(name));
        }
    }

    /// The text to be recorded.
    pub fn snapshot(&self) -> VipSnapshot {
        VipSnapshot { version: self.version, names: self.names.clone() }
    }

    /// A number that grows with every change.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The version that last assigned an address to a name: it has to be recorded before that address is
    /// given out. Releases, and names that come back, can wait.
    pub fn assigned(&self) -> u64 {
        self.assigned
    }

    /// The addresses of `name`, known ones or new ones.
    ///
    /// # Errors
    /// When every IPv4 address of the pool is in use, or was until less than [`COOL_DOWN`] ago.
    pub fn assign(&mut self, name: &Arc<str>, now: SystemTime) -> Result<Vip, PoolExhausted> {
        let known = self.names.get(name).copied();
        let mut entry = match known {
            Some(known) => Entry { released: None, ..known },
            None => {
                let vip = self.free_v4(name).or_else(|| self.reclaim_v4(now));
                let vip = vip.ok_or_else(|| self.exhausted(now))?;
                Entry { vip, vip6: None, released: None }
            }
        };
        if let (Some(pool), None) = (self.pools.v6, entry.vip6) {
            entry.vip6 = self.free_v6(name, pool).or_else(|| self.reclaim_v6(now));
        }
        if known != Some(entry) {
            self.enter(name.clone(), entry);
            self.version += 1;
            if known.map(|known| (known.vip, known.vip6)) != Some((entry.vip, entry.vip6)) {
                self.assigned = self.version;
            }
        }
        Ok(Vip { v4: entry.vip, v6: self.pools.v6.and(entry.vip6) })
    }

    fn exhausted(&self, now: SystemTime) -> PoolExhausted {
        let released = self.names.values().filter_map(|entry| entry.released);
        let free_in =
            |released| COOL_DOWN.saturating_sub(now.duration_since(released).unwrap_or_default());
        PoolExhausted {
            pool: self.pools.v4,
            n_quarantined: released.clone().count(),
            free_in: released.map(free_in).min().unwrap_or_default(),
        }
    }

    /// Notes that `name` is not in use any more. It keeps its addresses unless a pool gets short.
    pub fn release(&mut self, name: &str, now: SystemTime) {
        if let Some((name, &entry @ Entry { released: None, .. })) = self.names.get_key_value(name)
        {
            self.names.insert(name.clone(), Entry { released: Some(now), ..entry });
            self.version += 1;
        }
    }

    /// Removes the names released longer ago than [`RETENTION`], and of those released longer ago than
    /// [`COOL_DOWN`] all but the last [`MAX_RELEASED`]; otherwise new names would make the file grow
    /// without end.
    pub fn expire(&mut self, now: SystemTime) {
        let since = |released: SystemTime| now.duration_since(released).unwrap_or_default();
        let mut ages: Vec<Duration> =
            self.names.values().filter_map(|entry| entry.released.map(since)).collect();
        ages.retain(|age| *age >= COOL_DOWN);
        let limit = if ages.len() > MAX_RELEASED {
            let (_, age, _) = ages.select_nth_unstable(MAX_RELEASED);
            (*age).min(RETENTION)
        } else {
            RETENTION
        };
        let is_old = |entry: &Entry| entry.released.is_some_and(|at| since(at) >= limit);
        let old: Vec<(Arc<str>, Entry)> = (self.names.iter().filter(|(_, entry)| is_old(entry)))
            .map(|(name, entry)| (name.clone(), *entry))
            .collect();
        self.version += u64::from(!old.is_empty());
        for (name, entry) in old {
            self.names.remove(&name);
            self.holders.remove(&entry.vip.into());
            entry.vip6.and_then(|vip6| self.holders.remove(&vip6.into()));
        }
    }

    /// How the IPv4 pool is used.
    pub fn pool_use(&self, now: SystemTime) -> PoolUse {
        let size = n_usable(32 - self.pools.v4.prefix_len());
        let mut pool = PoolUse { size: size as usize, ..PoolUse::default() };
        for entry in self.names.values() {
            match entry.released {
                None => pool.used += 1,
                Some(released) if is_rested(released, now) => {}
                Some(_) => pool.quarantined += 1,
            }
        }
        pool
    }

    /// The names that are in use, as far as is known.
    pub fn in_use(&self) -> impl Iterator<Item = &Arc<str>> {
        self.names.iter().filter(|(_, entry)| entry.released.is_none()).map(|(name, _)| name)
    }

    fn enter(&mut self, name: Arc<str>, entry: Entry) {
        self.holders.insert(entry.vip.into(), name.clone());
        if let Some(vip6) = entry.vip6 {
            self.holders.insert(vip6.into(), name.clone());
        }
        self.names.insert(name, entry);
    }

    fn free_v4(&self, name: &str) -> Option<Ipv4Addr> {
        let first = u32::from(self.pools.v4.network()) + 1;
        let n_usable = n_usable(32 - self.pools.v4.prefix_len());
        self.free(name, n_usable, self.names.len(), |nth| (first + nth as u32).into())
    }

    fn free_v6(&self, name: &str, pool: Ipv6Net) -> Option<Ipv6Addr> {
        let first = u128::from(pool.network()) + 1;
        let n_usable = n_usable(128 - pool.prefix_len());
        // Every name holds one address of IPv4.
        let n_held = self.holders.len() - self.names.len();
        self.free(name, n_usable, n_held, |nth| (first + u128::from(nth)).into())
    }

    /// Probes from the name's hash on for an address that no name has; `n_held` of them have one.
    fn free<A: Copy + Into<IpAddr>>(
        &self,
        name: &str,
        n_usable: u64,
        n_held: usize,
        address: impl Fn(u64) -> A,
    ) -> Option<A> {
        if n_held as u64 >= n_usable {
            return None;
        }
        let start = fnv1a(name.as_bytes()) % n_usable;
        let mut addresses = (start..n_usable).chain(0..start).map(address);
        addresses.find(|&address| !self.holders.contains_key(&address.into()))
    }

    /// Takes the IPv4 address that was released first, if its quarantine is over, and removes its name.
    fn reclaim_v4(&mut self, now: SystemTime) -> Option<Ipv4Addr> {
        let name = self.rested(now, |_| true)?;
        let Entry { vip, vip6, .. } = self.names.remove(&name)?;
        self.holders.remove(&vip.into());
        vip6.and_then(|vip6| self.holders.remove(&vip6.into()));
        Some(vip)
    }

    /// Takes the IPv6 address that was released first, if its quarantine is over.
    fn reclaim_v6(&mut self, now: SystemTime) -> Option<Ipv6Addr> {
        let name = self.rested(now, |entry| entry.vip6.is_some())?;
        let entry = *self.names.get(&name)?;
        self.names.insert(name, Entry { vip6: None, ..entry });
        self.holders.remove(&entry.vip6?.into());
        entry.vip6
    }

    /// The name that released its addresses first, among those that fit, if their quarantine is over.
    fn rested(&self, now: SystemTime, fits: impl Fn(&Entry) -> bool) -> Option<Arc<str>> {
        let fitting = self.names.iter().filter(|(_, entry)| fits(entry));
        let given_up = fitting.filter_map(|(name, entry)| Some((entry.released?, name)));
        let (released, name) = given_up.min()?;
        is_rested(released, now).then(|| name.clone())
    }
}

/// Whether an address released at `released` may go to another name.
fn is_rested(released: SystemTime, now: SystemTime) -> bool {
    now.duration_since(released).unwrap_or_default() >= COOL_DOWN
}

/// How many addresses a pool with this many host bits has for names, 64 bits at most: the first address
/// and the last one, for IPv4 the broadcast address, aren't assigned.
fn n_usable(n_bits: u8) -> u64 {
    u64::try_from((1_u128 << n_bits).saturating_sub(2)).unwrap_or(u64::MAX)
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

    fn pools(v4: &str, v6: Option<&str>) -> Pools {
        Pools { v4: v4.parse().unwrap(), v6: v6.map(|v6| v6.parse().unwrap()) }
    }

    fn vips(pool: &str) -> Vips {
        Vips::new(pools(pool, None))
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
        assert_eq!(vips.assign(&name("web"), EPOCH + 9 * COOL_DOWN), Ok(vip));
    }

    #[test]
    fn an_address_rests_for_a_day_and_goes_on_only_when_the_pool_is_short() {
        let mut vips = vips("127.128.0.0/30"); // two usable addresses
        let first = vips.assign(&name("a"), EPOCH).unwrap();
        let second = vips.assign(&name("b"), EPOCH).unwrap();
        assert_ne!(first, second);
        assert!(vips.assign(&name("c"), EPOCH).is_err());
        assert_eq!(vips.pool_use(EPOCH), PoolUse { used: 2, quarantined: 0, size: 2 });
        vips.release("a", EPOCH);
        assert_eq!(
            vips.pool_use(EPOCH + COOL_DOWN / 2),
            PoolUse { used: 1, quarantined: 1, size: 2 }
        );
        assert_eq!(vips.pool_use(EPOCH + COOL_DOWN).free(), 1);
        let refused = vips.assign(&name("c"), EPOCH + COOL_DOWN / 2).unwrap_err().to_string();
        assert!(
            refused.contains("left, 1 in quarantine, the next is free within 12 h"),
            "{refused}"
        );
        assert_eq!(vips.assign(&name("c"), EPOCH + COOL_DOWN), Ok(first));
        assert!(vips.assign(&name("a"), EPOCH + COOL_DOWN).is_err());
    }

    #[test]
    fn a_name_is_forgotten_a_month_after_its_end() {
        let mut vips = Vips::new(pools("127.128.0.0/30", Some("fd00::/126"))); // two usable addresses
        vips.assign(&name("a"), EPOCH).unwrap();
        vips.assign(&name("b"), EPOCH).unwrap();
        vips.release("a", EPOCH);
        let version = vips.version();
        vips.expire(EPOCH + RETENTION - COOL_DOWN / 24);
        assert_eq!((vips.names.len(), vips.version()), (2, version));
        vips.expire(EPOCH + RETENTION);
        assert_eq!((vips.names.len(), vips.version()), (1, version + 1));
        assert_eq!(vips.holders.len(), 2, "b has its addresses");
        vips.assign(&name("c"), EPOCH + RETENTION).unwrap();
    }

    #[test]
    fn ipv6_addresses_rest_too_and_a_name_without_one_has_its_ipv4_address() {
        let mut vips = Vips::new(pools("127.128.0.0/24", Some("fd00::/126"))); // two of IPv6
        let first = vips.assign(&name("a"), EPOCH).unwrap();
        let second = vips.assign(&name("b"), EPOCH).unwrap();
        assert!(first.v6.is_some() && second.v6.is_some() && first.v6 != second.v6);
        let third = vips.assign(&name("c"), EPOCH).unwrap();
        assert_eq!(third.v6, None);
        vips.release("a", EPOCH);
        assert_eq!(vips.assign(&name("c"), EPOCH + COOL_DOWN / 2), Ok(third));
        let version = vips.version();
        assert_eq!(vips.assign(&name("c"), EPOCH + COOL_DOWN), Ok(Vip { v6: first.v6, ..third }));
        assert!(vips.version() > version);
        // The name that it was taken from has its other address still.
        assert_eq!(vips.assign(&name("a"), EPOCH + COOL_DOWN), Ok(Vip { v6: None, ..first }));
    }

    #[test]
    fn the_largest_ipv6_pool_is_probed_to_its_end() {
        assert_eq!((n_usable(8), n_usable(64)), (254, u64::MAX - 1));
        let mut vips = Vips::new(pools("127.128.0.0/9", Some("fd00::/64")));
        for each in ["", "a", "helloworld"] {
            let vip = vips.assign(&name(each), EPOCH).unwrap();
            let host = u128::from(vip.v6.unwrap()) as u64;
            assert_eq!(host, 1 + fnv1a(each.as_bytes()) % (u64::MAX - 1), "{each}");
        }
    }

    #[test]
    fn what_was_recorded_is_taken_over() {
        let pool = pools("127.128.0.0/9", None);
        let mut vips = Vips::new(pool);
        vips.assign(&name("web"), EPOCH).unwrap();
        vips.assign(&name("db"), EPOCH).unwrap();
        let assigned = vips.assigned();
        vips.release("db", EPOCH);
        assert!(vips.assigned() == assigned && vips.version() > assigned);
        let text = vips.snapshot().to_json();
        let read = Vips::parse(&text, pool).unwrap();
        assert_eq!((&read.names, &read.holders, read.version()), (&vips.names, &vips.holders, 0));
        let elsewhere = Vips::parse(&text, pools("127.64.0.0/16", None)).unwrap();
        assert_eq!(elsewhere.names.len(), 0, "addresses outside the pool are dropped");
    }

    #[test]
    fn a_later_versions_file_keeps_its_addresses() {
        let pool = pools("127.128.0.0/9", None);
        let entry = r#"{"vip":"127.128.0.7","since":3}"#;
        for text in [
            format!(r#"{{"web":{entry}}}"#),
            format!(r#"{{"version":2,"web":{entry},"odd":{{"vips":[]}}}}"#),
            format!(r#"{{"version":2,"names":{{"web":{entry}}},"pools":[1]}}"#),
            format!(r#"{{"version":2,"web":{entry},"names":{{"vip":"127.128.0.8"}}}}"#),
        ] {
            let mut vips = Vips::parse(text.as_bytes(), pool).unwrap();
            let vip = vips.assign(&name("web"), EPOCH).unwrap();
            assert_eq!(vip.v4, Ipv4Addr::new(127, 128, 0, 7), "{text}");
        }
        for text in [r#"{"version":2}"#, "[]", r#"{"names":{"web":7}}"#] {
            Vips::parse(text.as_bytes(), pool).unwrap_err();
        }
    }

    #[test]
    fn what_only_the_kernel_knew_is_recorded() {
        let mut vips = vips("127.128.0.0/9");
        vips.claim(&name("web"), &["127.128.0.9".parse().unwrap()]);
        assert_eq!(vips.version(), 1);
        // What is known already, or is outside the pool, changes nothing.
        vips.claim(&name("web"), &["127.128.0.10".parse().unwrap()]);
        vips.claim(&name("db"), &["127.0.0.1".parse().unwrap()]);
        assert_eq!(vips.version(), 1);
    }

    #[test]
    fn of_many_former_names_the_oldest_of_those_that_cooled_down_are_forgotten() {
        let mut vips = vips("127.128.0.0/9");
        let second = Duration::from_secs(1);
        for nth in 0..MAX_RELEASED as u32 + 100 {
            let each = name(&format!("preview-{nth}"));
            vips.assign(&each, EPOCH).unwrap();
            vips.release(&each, EPOCH + second * nth);
        }
        let last = EPOCH + second * (MAX_RELEASED as u32 + 99);
        vips.expire(last);
        assert_eq!(vips.names.len(), MAX_RELEASED + 100, "none has rested for a day");
        vips.expire(last + COOL_DOWN);
        assert_eq!(vips.names.len(), MAX_RELEASED);
        assert!(!vips.names.contains_key("preview-99") && vips.names.contains_key("preview-100"));
        assert_eq!(vips.holders.len(), MAX_RELEASED);
    }

    #[test]
    fn an_old_file_gets_ipv6_addresses_and_keeps_them_without_a_pool() {
        let mut text = br#"{"web":{"vip":"127.128.0.7"}}"#.to_vec();
        let mut assign = |pool6| {
            let mut vips = Vips::parse(&text, pools("127.128.0.0/9", pool6)).unwrap();
            let vip = vips.assign(&name("web"), EPOCH).unwrap();
            assert_eq!(vip.v4, Ipv4Addr::new(127, 128, 0, 7));
            text = vips.snapshot().to_json();
            (vip.v6, vips.version())
        };
        assert_eq!(assign(None), (None, 0));
        let (with, version) = assign(Some("fd00::/96"));
        assert!(with.is_some() && version == 1);
        assert_eq!(assign(None), (None, 0));
        assert_eq!(assign(Some("fd00::/96")), (with, 0));
        let (elsewhere, _) = assign(Some("fd01::/96"));
        assert!(elsewhere.is_some() && elsewhere != with);
    }

    proptest! {
        #[test]
        fn no_two_names_share_an_address(
            names in prop::collection::btree_set("[a-z]{1,3}", 1..200)
        ) {
            let mut vips = Vips::new(pools("127.128.0.0/24", Some("fd00::/120")));
            let mut taken = std::collections::BTreeSet::new();
            for each in &names {
                let Vip { v4, v6 } = vips.assign(&name(each), EPOCH).unwrap();
                for vip in [v4.into(), v6.unwrap().into()] {
                    prop_assert!(vips.pools.around(vip).is_some() && taken.insert(vip));
                }
            }
        }
    }
}

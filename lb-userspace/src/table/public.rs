//! Public addresses: how services declare them, and which service has one that several declare.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;
use std::sync::Arc;

/// The most public addresses that a service may declare.
const MAX_PUBLIC: usize = 4;

/// Public addresses as a service declares them: `203.0.113.10:443`, several with commas between.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicAddresses(Vec<SocketAddr>);

impl PublicAddresses {
    /// The addresses, sorted; none twice, at least one.
    pub fn into_addresses(self) -> Vec<SocketAddr> {
        self.0
    }
}

impl FromStr for PublicAddresses {
    type Err = String;

    /// Ignores blanks. Errors name the fix.
    fn from_str(text: &str) -> Result<PublicAddresses, String> {
        let address = |text: &str| match text.trim().parse::<SocketAddr>() {
            Ok(address) if address.port() != 0 => {
                Some(SocketAddr::new(address.ip().to_canonical(), address.port()))
            }
            _ => None,
        };
        let Some(mut addresses) = text.split(',').map(address).collect::<Option<Vec<_>>>() else {
            return Err(format!(
                "`{text}` is no public address: write an address and a port, such as \
                 `203.0.113.10:443` or `[2001:db8::10]:443`, several with commas between"
            ));
        };
        addresses.sort_unstable();
        addresses.dedup();
        if addresses.len() > MAX_PUBLIC {
            let n = addresses.len();
            return Err(format!(
                "it lists {n} addresses, and {MAX_PUBLIC} is the most: write fewer"
            ));
        }
        Ok(PublicAddresses(addresses))
    }
}

impl fmt::Display for PublicAddresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let addresses: Vec<String> = self.0.iter().map(SocketAddr::to_string).collect();
        f.write_str(&addresses.join(","))
    }
}

/// The precedence of a claim to an address: the least one holds. It depends on nothing but the
/// configuration and the catalog, so that all nodes agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ClaimRank {
    /// The configuration gives the service the address.
    Configured,
    /// An instance declares it: [`Instance::created`](super::Instance::created) of the oldest that does.
    /// Of equally old ones the service whose name is smallest holds.
    Declared(u64),
}

/// Which services claim which public addresses.
#[derive(Debug, Default)]
pub struct PublicClaims {
    by_address: BTreeMap<SocketAddr, BTreeSet<(ClaimRank, Arc<str>)>>,
    by_service: BTreeMap<Arc<str>, BTreeMap<SocketAddr, ClaimRank>>,
}

impl PublicClaims {
    /// Sets what a service claims. Returns the other services that claim an address whose holder this
    /// changes.
    pub fn set(
        &mut self,
        service: &Arc<str>,
        claims: BTreeMap<SocketAddr, ClaimRank>,
    ) -> BTreeSet<Arc<str>> {
        let former = self.by_service.get(service);
        if former.map_or(claims.is_empty(), |former| *former == claims) {
            return BTreeSet::new();
        }
        let former = former.cloned().unwrap_or_default();
        let addresses: BTreeSet<SocketAddr> = former.keys().chain(claims.keys()).copied().collect();
        let mut affected = BTreeSet::new();
        for address in addresses {
            let claimants = self.by_address.entry(address).or_default();
            let before = claimants.first().cloned();
            if let Some(rank) = former.get(&address) {
                claimants.remove(&(*rank, service.clone()));
            }
            if let Some(rank) = claims.get(&address) {
                claimants.insert((*rank, service.clone()));
            }
            if before != claimants.first().cloned() {
                affected.extend(claimants.iter().map(|(_, name)| name.clone()));
            }
            if claimants.is_empty() {
                self.by_address.remove(&address);
            }
        }
        match claims.is_empty() {
            true => drop(self.by_service.remove(service)),
            false => drop(self.by_service.insert(service.clone(), claims)),
        }
        affected.remove(service);
        affected
    }

    /// The service that has an address, and the rank of its claim.
    pub fn holder(&self, address: SocketAddr) -> Option<&(ClaimRank, Arc<str>)> {
        self.by_address.get(&address)?.first()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_as_text() {
        let rows = [
            ("203.0.113.10:443", Ok("203.0.113.10:443")),
            (" [2001:db8::1]:53 ,203.0.113.10:53", Ok("203.0.113.10:53,[2001:db8::1]:53")),
            ("[::ffff:10.0.0.1]:80,10.0.0.1:80", Ok("10.0.0.1:80")),
            ("203.0.113.10", Err("`203.0.113.10` is no public address")),
            ("443", Err("`443` is no public address")),
            ("203.0.113.10:0", Err("`203.0.113.10:0` is no public address")),
            ("203.0.113.10:80,", Err("`203.0.113.10:80,` is no public address")),
            ("", Err("`` is no public address")),
            ("10.0.0.1:1,10.0.0.1:2,10.0.0.1:3,10.0.0.1:4,10.0.0.1:5", Err("it lists 5 addresses")),
        ];
        for (text, expected) in rows {
            match (text.parse::<PublicAddresses>(), expected) {
                (Ok(addresses), expected) => {
                    assert_eq!(Ok(&*addresses.to_string()), expected, "{text}");
                }
                (Err(what), Err(expected)) => assert!(what.starts_with(expected), "{text}: {what}"),
                (Err(what), Ok(_)) => panic!("{text}: {what}"),
            }
        }
    }

    #[test]
    fn the_oldest_claim_holds() {
        let address: SocketAddr = "203.0.113.10:80".parse().unwrap();
        let mut claims = PublicClaims::default();
        // Who claims, with what rank; who holds the address then, and who else is affected.
        type Row = (&'static str, Option<ClaimRank>, Option<&'static str>, &'static [&'static str]);
        let rows: &[Row] = &[
            ("b", Some(ClaimRank::Declared(8)), Some("b"), &[]),
            ("b", Some(ClaimRank::Declared(7)), Some("b"), &[]),
            ("b", Some(ClaimRank::Declared(7)), Some("b"), &[]),
            ("c", Some(ClaimRank::Declared(9)), Some("b"), &[]),
            ("d", Some(ClaimRank::Declared(5)), Some("d"), &["b", "c"]),
            ("a", Some(ClaimRank::Declared(5)), Some("a"), &["b", "c", "d"]),
            ("e", Some(ClaimRank::Configured), Some("e"), &["a", "b", "c", "d"]),
            ("c", None, Some("e"), &[]),
            ("e", None, Some("a"), &["a", "b", "d"]),
            ("a", Some(ClaimRank::Declared(8)), Some("d"), &["b", "d"]),
            ("d", None, Some("b"), &["a", "b"]),
            ("b", None, Some("a"), &["a"]),
            ("a", None, None, &[]),
        ];
        for (service, rank, holder, affected) in rows {
            let wanted = rank.map(|rank| (address, rank)).into_iter().collect();
            let found = claims.set(&Arc::from(*service), wanted);
            assert!(found.iter().map(|name| &**name).eq(affected.iter().copied()), "{found:?}");
            assert_eq!(
                claims.holder(address).map(|(_, name)| &**name),
                *holder,
                "{service} {rank:?}"
            );
        }
        assert!(claims.by_address.is_empty() && claims.by_service.is_empty());
    }
}

//! Which clients are served (`dns.allow`), and at what rate (`dns.client_rate`).

use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};
use std::time::{Duration, Instant};

use ipnet::IpNet;

use crate::config::{Allowed, DnsConfig};
use crate::interfaces::Interfaces;

/// How long the list of this host's networks is reused for clients that are in none of them.
const NETWORKS_AGE: Duration = Duration::from_secs(1);

/// The number of buckets: a bound on memory, whatever addresses come.
const N_BUCKETS: usize = 4096;

/// The burst of a token bucket: how many seconds' worth of queries a client may send at once.
const BURST: Duration = Duration::from_secs(1);

/// The client that a query or a connection is accounted to, by [`Acl::client_key`]; `None` is this host,
/// whose processes share its addresses.
pub(super) type ClientKey = Option<u64>;

/// The decision about a client's message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Admission {
    Admitted,
    /// The client isn't in `dns.allow`.
    Refused,
    /// The client exceeds `dns.client_rate`.
    Limited,
}

/// The clients that are served. The host itself, by its loopback addresses and those that it listens
/// on, is always among them and never limited, as all its processes share them.
#[derive(Debug)]
pub(super) struct Acl {
    /// The addresses of the listeners, from which this host's own processes query them.
    own: Box<[IpAddr]>,
    /// Whether a listener is bound to the unspecified address: then all addresses of this host are
    /// its.
    is_anywhere: bool,
    networks: Box<[IpNet]>,
    /// Whether `dns.allow` has `"local"`.
    counts_local: bool,
    /// This host's interfaces, and when they were read.
    local: RwLock<(Instant, Interfaces)>,
    buckets: Option<TokenBuckets>,
    start: Instant,
}

impl Acl {
    /// The ACL of `config` for a server that listens on `own`.
    pub(super) fn new(config: &DnsConfig, own: &[SocketAddr]) -> Acl {
        let network = |allowed: &Allowed| match allowed {
            Allowed::Network(network) => Some(*network),
            Allowed::Local => None,
        };
        let start = Instant::now();
        Acl {
            own: own.iter().map(|listener| listener.ip().to_canonical()).collect(),
            is_anywhere: own.iter().any(|listener| listener.ip().is_unspecified()),
            networks: config.allow.iter().filter_map(network).collect(),
            counts_local: config.allow.contains(&Allowed::Local),
            local: RwLock::new((start, Interfaces::read())),
            buckets: TokenBuckets::new(config.client_rate),
            start,
        }
    }

    /// Decides about a message from `client`, which takes a token of its bucket.
    pub(super) fn admit(&self, client: IpAddr) -> Admission {
        let client = client.to_canonical();
        if self.is_own(client) {
            return Admission::Admitted;
        }
        let now = Instant::now();
        // Before the ACL, so that a flood of refusals is limited as well.
        if let Some(buckets) = &self.buckets
            && !buckets.take(client, now.duration_since(self.start))
        {
            return Admission::Limited;
        }
        if self.is_served(client) { Admission::Admitted } else { Admission::Refused }
    }

    /// Whether the client is this host itself.
    pub(super) fn is_own(&self, client: IpAddr) -> bool {
        let client = client.to_canonical();
        client.is_loopback()
            || self.own.contains(&client)
            || self.is_anywhere && self.is_local(|local| local.have(client))
    }

    /// Who the client's queries and connections are accounted to.
    pub(super) fn client_key(&self, client: IpAddr) -> ClientKey {
        (!self.is_own(client)).then(|| address_key(client.to_canonical()))
    }

    /// Whether the client is served at all, at whatever rate.
    pub(super) fn is_served(&self, client: IpAddr) -> bool {
        let client = client.to_canonical();
        let is_in = |networks: &[IpNet]| networks.iter().any(|network| network.contains(&client));
        self.is_own(client)
            || is_in(&self.networks)
            || self.counts_local && self.is_local(|local| is_in(&local.networks))
    }

    /// Whether `is_so` holds for this host's interfaces. They come and go, so they are read again
    /// when it doesn't hold for those read before.
    fn is_local(&self, is_so: impl Fn(&Interfaces) -> bool) -> bool {
        let now = Instant::now();
        {
            let known = self.local.read().unwrap_or_else(PoisonError::into_inner);
            if is_so(&known.1) {
                return true;
            }
            if now.duration_since(known.0) < NETWORKS_AGE {
                return false;
            }
        }
        let local = Interfaces::read();
        let is_local = is_so(&local);
        *self.local.write().unwrap_or_else(PoisonError::into_inner) = (now, local);
        is_local
    }
}

/// The networks of the clients in `dns.allow`, on a host with these interfaces.
pub fn allowed_networks(allow: &[Allowed], interfaces: &Interfaces) -> Vec<IpNet> {
    let networks = |allowed: &Allowed| match allowed {
        Allowed::Network(network) => vec![*network],
        Allowed::Local => interfaces.networks.clone(),
    };
    allow.iter().flat_map(networks).collect()
}

/// One client: an IPv4 address, or an IPv6 /64, all of whose addresses one host may use.
fn address_key(client: IpAddr) -> u64 {
    match client {
        IpAddr::V4(v4) => u64::from(u32::from(v4)),
        IpAddr::V6(v6) => (u128::from(v6) >> 64) as u64,
    }
}

/// A token bucket for each client, as the time at which it will be full again (the generic cell
/// rate algorithm of ITU-T I.371): one number, which any thread may change.
///
/// Clients may share a bucket, and then its rate. The hash is seeded at the start, so a client
/// can't choose to share another's.
#[derive(Debug)]
struct TokenBuckets {
    /// The time in which a bucket regains one token, in nanoseconds.
    interval_ns: u64,
    /// When each is full again, in nanoseconds since the start.
    full_at_ns: Box<[AtomicU64]>,
    hasher: RandomState,
}

impl TokenBuckets {
    /// Buckets for `rate` queries a second; `None` for 0, which is unlimited.
    fn new(rate: u32) -> Option<TokenBuckets> {
        let interval_ns = 1_000_000_000u64.checked_div(rate.into())?;
        let full_at_ns = (0..N_BUCKETS).map(|_| AtomicU64::new(0)).collect();
        Some(TokenBuckets { interval_ns, full_at_ns, hasher: RandomState::new() })
    }

    /// Takes a token of the client's bucket; false if it is empty.
    fn take(&self, client: IpAddr, now: Duration) -> bool {
        let bucket =
            &self.full_at_ns[self.hasher.hash_one(address_key(client)) as usize % N_BUCKETS];
        let now_ns = now.as_nanos() as u64; // 584 years
        let taken = bucket.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |full_at_ns| {
            let after_ns = full_at_ns.max(now_ns) + self.interval_ns;
            (after_ns - now_ns <= BURST.as_nanos() as u64).then_some(after_ns)
        });
        taken.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn who_is_served() {
        let networks = ["10.1.0.0/16", "2001:db8::/32"];
        let rows = [
            ("127.0.0.1", true),
            ("127.9.9.9", true),
            ("::1", true),
            ("::ffff:127.0.0.1", true),
            ("10.1.255.1", true),
            ("::ffff:10.1.0.1", true),
            ("10.2.0.1", false),
            ("2001:db8::9", true),
            ("2001:db9::9", false),
            ("203.0.113.1", false), // of documentation (RFC 5737)
            ("203.0.113.53", true), // our own listener's
        ];
        let network = |text: &&str| Allowed::Network(text.parse().unwrap());
        for local in [false, true] {
            let mut allow: Vec<Allowed> = networks.iter().map(network).collect();
            allow.extend(local.then_some(Allowed::Local));
            let clients = Acl::new(
                &DnsConfig { allow, ..Config::default().dns },
                &["203.0.113.53:53".parse().unwrap()],
            );
            for (client, is_served) in rows {
                let admission = clients.admit(client.parse().unwrap());
                assert_eq!(admission == Admission::Admitted, is_served, "{client}");
            }
        }
    }

    #[test]
    fn the_host_itself_is_never_limited_wherever_it_listens() {
        let (address, other) = ("203.0.113.9".parse().unwrap(), "203.0.113.10".parse().unwrap());
        let rows = [
            ("0.0.0.0:53", address, true),
            ("[::]:53", address, true),
            ("0.0.0.0:53", other, false),
            ("127.0.0.1:53", address, false),
        ];
        for (listener, client, is_own) in rows {
            let config = DnsConfig { allow: Vec::new(), client_rate: 1, ..Config::default().dns };
            let clients = Acl::new(&config, &[listener.parse().unwrap()]);
            // As if an interface had it.
            let local = Interfaces { addresses: vec![address], ..Interfaces::default() };
            *clients.local.write().unwrap() = (Instant::now(), local);
            let n_admitted =
                (0..9).filter(|_| clients.admit(client) == Admission::Admitted).count();
            assert_eq!(n_admitted, if is_own { 9 } else { 0 }, "{client} to {listener}");
        }
    }

    #[test]
    fn a_client_has_its_rate_and_a_second_of_it_at_once() {
        let buckets = TokenBuckets::new(100).unwrap();
        let (one, other) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        let taken = |client, at| (0..1000).filter(|_| buckets.take(client, at)).count();
        let at = Duration::from_millis;
        assert_eq!(taken(one, at(0)), 100);
        assert_eq!(taken(one, at(9)), 0);
        assert_eq!(taken(one, at(10)), 1);
        assert_eq!(taken(one, at(510)), 50);
        assert_eq!(taken(one, at(60_000)), 100);
        // By another's bucket, but for the one chance in 4,096 that they share it.
        let shares = buckets.hasher.hash_one(u64::from(0x0a00_0001u32)) as usize % N_BUCKETS
            == buckets.hasher.hash_one(u64::from(0x0a00_0002u32)) as usize % N_BUCKETS;
        assert_eq!(taken(other, at(60_000)), if shares { 0 } else { 100 });
        assert!(TokenBuckets::new(0).is_none());
    }
}

//! Whether containers get answers from nohop: the host's firewall may drop their queries, and `dns.allow`
//! may lack them. Routed names don't show it, as the unit `names` answers those before the firewall. So a
//! message that only the daemon answers is sent from their network namespaces.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use super::super::bpf::netns_cookie;

/// How long an answer is awaited, which takes less than a millisecond.
const LIMIT: Duration = Duration::from_millis(300);
/// The network namespaces that one search verifies.
const MAX_VERIFIED: usize = 8;
/// After how long one that gets answers is verified again.
const AGAIN: Duration = Duration::from_secs(30);
/// After how long one is that got none once; after several failures in a row so many times longer, up to that.
const RETRY: Duration = Duration::from_secs(1);
/// The failures in a row after which it gets none: a single one may be for lack of processor time.
const N_FAILURES: u32 = 2;

/// What is known of each network namespace, by its inode.
#[derive(Debug, Default)]
pub struct ReachState {
    namespaces: BTreeMap<u64, NamespaceReach>,
    /// Those that this search has seen.
    seen: BTreeSet<u64>,
    n_verified: usize,
}

#[derive(Debug)]
struct NamespaceReach {
    /// `None` on kernels before 5.14.
    cookie: Option<u64>,
    /// A process in it.
    pid: String,
    n_failures: u32,
    failure: Option<String>,
    next: Instant,
}

/// The network namespaces that get no answers.
#[derive(Debug, Default)]
pub struct Unreached {
    /// Their cookies, where the kernel reports them.
    pub cookies: BTreeSet<u64>,
    /// What is wrong, with the fix.
    pub note: Option<String>,
}

impl ReachState {
    /// Verifies the calling thread's network namespace, where that is due.
    pub fn verify(&mut self, inode: u64, pid: &str, servers: &[SocketAddr]) {
        self.seen.insert(inode);
        let now = Instant::now();
        let namespace = self.namespaces.entry(inode).or_insert_with(|| NamespaceReach {
            cookie: None,
            pid: pid.to_owned(),
            n_failures: 0,
            failure: None,
            next: now,
        });
        if namespace.next <= now && self.n_verified < MAX_VERIFIED {
            self.n_verified += 1;
            // It can't be read before loopback is up.
            namespace.cookie = namespace.cookie.or_else(|| netns_cookie().ok());
            namespace.record(servers.iter().find_map(|server| failure(*server)), now);
        }
    }

    /// What has been found when a search ends.
    pub fn unreached(&mut self) -> Unreached {
        let seen = std::mem::take(&mut self.seen);
        self.namespaces.retain(|inode, _| seen.contains(inode));
        self.n_verified = 0;
        let unreached: Vec<_> =
            self.namespaces.values().filter(|it| it.n_failures >= N_FAILURES).collect();
        let note = unreached.first().and_then(|first| {
            let failure = first.failure.as_ref()?;
            let what = match first.cookie {
                Some(_) => "they ask their own resolvers",
                None => "their queries are lost, as this kernel can't leave them out",
            };
            Some(format!(
                "containers in {} network namespaces, such as that of process {}, get no answer: {failure}; \
                 {what}",
                unreached.len(),
                first.pid
            ))
        });
        let cookies = unreached.iter().filter_map(|it| it.cookie).collect();
        Unreached { cookies, note }
    }
}

impl NamespaceReach {
    fn record(&mut self, failure: Option<String>, now: Instant) {
        self.n_failures = if failure.is_some() { self.n_failures + 1 } else { 0 };
        // One that gets none time after time leaves others their turn.
        self.next =
            now + if failure.is_some() { (RETRY * self.n_failures).min(AGAIN) } else { AGAIN };
        self.failure = failure;
    }
}

/// Why a server gives no answer that is of use; `None` also where no query can be sent, as while the
/// container's interfaces aren't there.
fn failure(server: SocketAddr) -> Option<String> {
    let unspecified = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind(SocketAddr::new(unspecified, 0)).ok()?;
    socket.connect(server).ok()?;
    socket.set_read_timeout(Some(LIMIT)).ok()?;
    // A query without a question, which the daemon answers by FORMERR, or by REFUSED (RFC 1035, 4.1.1).
    socket.send(&[0x6e, 0x68, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).ok()?;
    const REFUSED: u8 = 5;
    let mut answer = [0; 512];
    match socket.recv(&mut answer) {
        Ok(4..) if answer[3] & 0xf == REFUSED => {
            Some(format!("the daemon at {server} refuses them; add their network to dns.allow"))
        }
        Ok(_) => None,
        Err(error) => {
            use ErrorKind::{ConnectionRefused, TimedOut, WouldBlock};
            let is_lost = matches!(error.kind(), ConnectionRefused | TimedOut | WouldBlock);
            is_lost.then(|| {
                format!(
                    "nothing at {server} answers them; let queries to that port in from their bridge, in \
                     the host's firewall"
                )
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_failure_is_no_reason() {
        let start = Instant::now();
        let mut state = ReachState::default();
        let namespace = NamespaceReach {
            cookie: Some(7),
            pid: "9".into(),
            n_failures: 0,
            failure: None,
            next: start,
        };
        state.namespaces.insert(1, namespace);
        let mut after = |failure: Option<&str>| {
            state.seen.insert(1);
            let namespace = state.namespaces.get_mut(&1).unwrap();
            namespace.record(failure.map(str::to_owned), start);
            state.unreached()
        };
        assert_eq!(after(Some("why")).cookies, [].into());
        let Unreached { cookies, note } = after(Some("why"));
        assert_eq!(cookies, [7].into());
        assert!(note.unwrap().contains("of process 9, get no answer: why; they ask their own"));
        assert_eq!(after(None).note, None);
        // What has gone is forgotten.
        after(Some("why"));
        after(Some("why"));
        state.seen.clear();
        assert!(state.unreached().cookies.is_empty() && state.namespaces.is_empty());
    }
}

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
/// After how long one is that got none; after several times in a row so many times longer, up to that.
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
            for _ in 0..N_FAILURES {
                let found =
                    servers.iter().map(|server| ask(*server)).max().unwrap_or(Reach::Reached);
                // It costs nothing, and others are to have their turn.
                if found == Reach::Unsent {
                    self.n_verified -= 1;
                }
                let is_failure = matches!(found, Reach::Failed(_));
                namespace.record(found, now);
                if !is_failure {
                    break;
                }
            }
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

/// What a query shows, from the best to the worst.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Reach {
    Reached,
    /// None can be sent, as while the container's interfaces aren't there.
    Unsent,
    /// Why the server gives no answer that is of use.
    Failed(String),
}

impl NamespaceReach {
    fn record(&mut self, found: Reach, now: Instant) {
        // One that gets none time after time leaves others their turn.
        let (n_failures, failure, next) = match found {
            Reach::Reached => (0, None, AGAIN),
            Reach::Unsent => (0, None, Duration::ZERO),
            Reach::Failed(why) => {
                let n_failures = self.n_failures + 1;
                (n_failures, Some(why), (RETRY * (n_failures / N_FAILURES)).min(AGAIN))
            }
        };
        (self.n_failures, self.failure, self.next) = (n_failures, failure, now + next);
    }
}

/// Asks a server.
fn ask(server: SocketAddr) -> Reach {
    let unspecified = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let sent = UdpSocket::bind(SocketAddr::new(unspecified, 0)).and_then(|socket| {
        socket.connect(server)?;
        socket.set_read_timeout(Some(LIMIT))?;
        // A query without a question, which the daemon answers by FORMERR, or by REFUSED (RFC 1035, 4.1.1).
        socket.send(&[0x6e, 0x68, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])?;
        Ok(socket)
    });
    const REFUSED: u8 = 5;
    let mut answer = [0; 512];
    let Ok(socket) = sent else { return Reach::Unsent };
    match socket.recv(&mut answer) {
        Ok(4..) if answer[3] & 0xf == REFUSED => Reach::Failed(format!(
            "the daemon at {server} refuses them; add their network to dns.allow"
        )),
        Ok(_) => Reach::Reached,
        Err(error) => {
            use ErrorKind::{ConnectionRefused, TimedOut, WouldBlock};
            if !matches!(error.kind(), ConnectionRefused | TimedOut | WouldBlock) {
                return Reach::Unsent;
            }
            Reach::Failed(format!(
                "nothing at {server} answers them; let queries to that port in from their bridge, in the \
                 host's firewall"
            ))
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
        let mut after = |found: Reach| {
            state.seen.insert(1);
            let namespace = state.namespaces.get_mut(&1).unwrap();
            namespace.record(found, start);
            state.unreached()
        };
        let failed = || Reach::Failed("why".to_owned());
        assert_eq!(after(failed()).cookies, [].into());
        let Unreached { cookies, note } = after(failed());
        assert_eq!(cookies, [7].into());
        assert!(note.unwrap().contains("of process 9, get no answer: why; they ask their own"));
        assert_eq!(after(Reach::Reached).note, None);
        // What has gone is forgotten.
        after(failed());
        after(failed());
        state.seen.clear();
        assert!(state.unreached().cookies.is_empty() && state.namespaces.is_empty());
    }

    /// Before a container has its interface nothing is known of it, so it is verified again in the next
    /// search, and one that failed once again at once.
    #[test]
    fn when_it_is_verified_again() {
        let now = Instant::now();
        let (cookie, pid) = (Some(7), "9".to_owned());
        let mut namespace = NamespaceReach { cookie, pid, n_failures: 0, failure: None, next: now };
        let failed = || Reach::Failed("why".to_owned());
        for (found, wait) in [
            (Reach::Unsent, Duration::ZERO),
            (failed(), Duration::ZERO),
            (failed(), RETRY),
            (failed(), RETRY),
            (failed(), 2 * RETRY),
            (Reach::Unsent, Duration::ZERO),
            (Reach::Reached, AGAIN),
        ] {
            let what = format!("{found:?}");
            namespace.record(found, now);
            assert_eq!(namespace.next - now, wait, "{what}");
        }
    }
}

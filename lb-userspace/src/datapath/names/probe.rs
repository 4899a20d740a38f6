//! Proves that the kernel's answers arrive on `lo`, by queries about a name that no service has.
//!
//! The answer is the query's own packet. A firewall that lets only established connections and queries in,
//! or NAT of such queries, drops it: conntrack knows the packet by what it was (nf_conntrack_in() isn't run
//! again for it). Then the program lets queries pass, because the daemon's own answers arrive.
//!
//! It isn't decided by conntrack itself: its lookup in programs (bpf_skb_ct_lookup) is a function of the
//! module's since 6.0, which has no rules to show, only entries. Nor is the answer redirected, which costs a
//! sixth of the speed and two sysctls of the host's.

use std::fmt;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lb_common::{NameRecord, NamesControl, PROBE_ADDRESS, PROBE_LABEL};

use super::super::kernel::AtomicArray;
use super::kernel::queries;

/// How long an answer is awaited, which takes microseconds.
const LIMIT: Duration = Duration::from_millis(500);
/// The most addresses of a family that are tried.
const MAX_SERVERS: usize = 4;
/// The address families, each with its bit.
const FAMILIES: [(u64, &str, IpAddr); 2] = [
    (NamesControl::IPV4, "IPv4", IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
    (NamesControl::IPV6, "IPv6", IpAddr::V6(Ipv6Addr::UNSPECIFIED)),
];

/// Sends probes. Independent of the datapath, as an answer may take its time.
#[derive(Debug)]
pub struct NamesProber {
    /// Where the program answers.
    pub(super) servers: Vec<SocketAddr>,
    /// The domain on the wire, the root's length included.
    pub(super) domain: Vec<u8>,
    pub(super) records: Arc<AtomicArray<NameRecord>>,
    /// The index of the probe's record.
    pub(super) record: u32,
}

/// What became of a family's probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProbedAnswer {
    /// The kernel's answer arrived.
    Arrived,
    /// The program answered, and nothing arrived.
    Lost {
        /// Where the query went.
        server: SocketAddr,
    },
    /// The query didn't meet the program.
    Unseen {
        /// Where it went.
        server: SocketAddr,
    },
}

/// For `status`.
impl fmt::Display for ProbedAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProbedAnswer::Arrived => f.write_str("the kernel's answers arrive"),
            ProbedAnswer::Lost { server } => write!(
                f,
                "the kernel's answers at {server} don't arrive, so the daemon answers there: the host's \
                 firewall drops them (let all packets on lo in: `iif lo accept`), or its NAT has rules for \
                 queries to that address"
            ),
            ProbedAnswer::Unseen { server } => write!(
                f,
                "queries at {server} don't meet the program nohop_names, so the daemon answers there: \
                 another program at the ingress of lo has them (`bpftool net show dev lo`), or the host's \
                 firewall"
            ),
        }
    }
}

impl NamesProber {
    /// Sends a probe for each family. Returns what became of it, by the family's bit; a family that can't be
    /// probed is left out. Blocks up to two seconds a family.
    pub fn probe(&self) -> Vec<(u64, ProbedAnswer)> {
        let probe = |(bit, _, from): (u64, &str, IpAddr)| {
            let servers = self.servers.iter().filter(|server| server.is_ipv4() == from.is_ipv4());
            let mut last = None;
            for server in servers.take(MAX_SERVERS) {
                let result = match self.probe_at(from, *server) {
                    Ok(result) => result,
                    Err(error) => {
                        tracing::debug!("no probe at {server}: {error}");
                        continue;
                    }
                };
                let is_over = result == ProbedAnswer::Arrived;
                last = Some((bit, result));
                if is_over {
                    break;
                }
            }
            last
        };
        FAMILIES.into_iter().filter_map(probe).collect()
    }

    fn probe_at(&self, from: IpAddr, server: SocketAddr) -> io::Result<ProbedAnswer> {
        let socket = UdpSocket::bind((from, 0))?;
        socket.connect(server)?;
        let before = queries(&self.records, self.record);
        let id = fastrand::u16(..);
        socket.send(&self.query(id))?;
        let is_answered = is_answered(&socket, id)?;
        let is_seen = queries(&self.records, self.record) != before;
        Ok(match (is_answered, is_seen) {
            (true, _) => ProbedAnswer::Arrived,
            (false, true) => ProbedAnswer::Lost { server },
            (false, false) => ProbedAnswer::Unseen { server },
        })
    }

    fn query(&self, id: u16) -> Vec<u8> {
        // A query with one question, about an address of the internet.
        let mut query = id.to_be_bytes().to_vec();
        query.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0, PROBE_LABEL.len() as u8]);
        query.extend(PROBE_LABEL);
        query.extend(&self.domain);
        query.extend([0, 1, 0, 1]);
        query
    }
}

/// Whether the kernel's answer to the query with this id arrives. The daemon, or another server, has another.
fn is_answered(socket: &UdpSocket, id: u16) -> io::Result<bool> {
    let start = Instant::now();
    let mut answer = [0; 512];
    loop {
        let left = LIMIT.saturating_sub(start.elapsed());
        if left.is_zero() {
            return Ok(false);
        }
        socket.set_read_timeout(Some(left))?;
        match socket.recv(&mut answer) {
            Ok(len) => {
                let answer = answer.get(..len).unwrap_or_default();
                if answer.get(..2) == Some(&id.to_be_bytes()) {
                    return Ok(answer.ends_with(&PROBE_ADDRESS));
                }
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => {
                use ErrorKind::{ConnectionRefused, TimedOut, WouldBlock};
                return match error.kind() {
                    ConnectionRefused | TimedOut | WouldBlock => Ok(false),
                    _ => Err(error),
                };
            }
        }
    }
}

/// What is known of the families.
#[derive(Debug, Default)]
pub struct ProbeState {
    families: [FamilyState; 2],
}

#[derive(Debug, Default)]
struct FamilyState {
    has_arrived: bool,
    n_failures: u32,
    problem: Option<String>,
}

impl ProbeState {
    /// Takes results over. Returns the bits of the families whose queries pass, of those in `passed` before.
    pub fn record(&mut self, results: Vec<(u64, ProbedAnswer)>, mut passed: u64) -> u64 {
        for (bit, result) in results {
            let places = FAMILIES.iter().zip(&mut self.families);
            let Some((_, state)) = places.into_iter().find(|((one, ..), _)| *one == bit) else {
                continue;
            };
            if result == ProbedAnswer::Arrived {
                *state = FamilyState { has_arrived: true, ..FamilyState::default() };
                passed &= !bit;
                continue;
            }
            state.n_failures += 1;
            // A single one may be for lack of processor time.
            if !state.has_arrived || state.n_failures > 1 {
                passed |= bit;
                state.problem = Some(result.to_string());
            }
        }
        passed
    }

    /// Why queries pass.
    pub fn problem(&self) -> Option<&str> {
        self.families.iter().find_map(|state| state.problem.as_deref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_failure_after_a_success_is_no_reason() {
        let server = SocketAddr::from((Ipv4Addr::LOCALHOST, 53));
        let (arrived, lost) = (|| ProbedAnswer::Arrived, || ProbedAnswer::Lost { server });
        let (v4, v6) = (NamesControl::IPV4, NamesControl::IPV6);
        let mut state = ProbeState::default();
        assert_eq!(state.record(vec![(v4, lost()), (v6, arrived())], 0), v4);
        assert!(state.problem().unwrap().contains("127.0.0.1:53 don't arrive"));
        assert_eq!(state.record(vec![(v4, arrived()), (v6, lost())], v4), 0);
        assert_eq!(state.problem(), None);
        assert_eq!(state.record(vec![(v4, lost()), (v6, arrived())], 0), 0);
        assert_eq!(state.record(vec![(v4, lost()), (v6, lost())], 0), v4);
        assert_eq!(state.record(vec![(v6, lost())], v4), v4 | v6);
        assert_eq!(state.record(vec![(v4, arrived())], v4 | v6), v6);
        assert!(state.problem().is_some());
    }
}

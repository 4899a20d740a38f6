//! Recounts the connections in flight against the kernel's own list of sockets.
//!
//! The unit `outcomes` adds one for each connection that begins and takes one off for each that
//! ends, and so for those that are being established. It misses connections that begin or end while its
//! program is detached. So after each such gap, and now and then, the connections whose sockets remember a
//! backend are counted (sock_diag), and the difference is added. Connections come and go meanwhile, so the number at the beginning is known
//! within bounds only, and what lies within them is taken as right. Records of sockets that are gone are
//! freed on that occasion.
//!
//! Those that are being established are too few for such bounds to show that one is counted too many. But
//! most are pending for a moment only. So where the number isn't that of the listing, it is read many
//! times before a second listing: if no connection was pending in one of the two listings alone, the lowest
//! reading is of those that were pending throughout.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lb_common::{ConnRecord, FlowRecord, FlowWord, NOT_COUNTED, RevNat};

use super::conns::{Suspects, TcpConns, canonical};
use super::diag::Stored;
use super::kernel::{AtomicArray, Counters, Tally};

/// How long after a recount that left something open the next one begins.
const AGAIN: Duration = Duration::from_secs(10);
/// How long after one that found everything in order.
const NOW_AND_THEN: Duration = Duration::from_secs(300);
/// A recount takes at most this share of the time.
const SHARE: u32 = 50;
/// How often the number of connections that are being established is read between two listings.
const N_READINGS: u32 = 64;
/// The pause between two readings: most connects take less.
const READING_PAUSE: Duration = Duration::from_millis(1);

/// What a recount found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recount {
    /// The connections to backends that are in the table.
    pub n_connections: usize,
    /// Those of them whose end the programs won't see, because they didn't see the beginning.
    pub n_unseen: usize,
    /// The backends whose number in flight was wrong, and was corrected.
    pub n_corrected: usize,
    /// Whether every number is known to be right, and stays so.
    pub is_settled: bool,
}

/// The flows through this host's edge, which are connections in flight, too.
#[derive(Clone, Debug, Default)]
pub struct EdgeRecords(Arc<Mutex<Option<Arc<AtomicArray<FlowRecord>>>>>);

impl EdgeRecords {
    /// Sets the records; `None` where this host is no edge.
    pub fn set(&self, records: Option<Arc<AtomicArray<FlowRecord>>>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = records;
    }

    /// The backend of each connection, its generation, and whether it is pending.
    fn connections(&self) -> Vec<(u32, u32, bool)> {
        let records = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(records) = records else { return Vec::new() };
        let connection = |idx| {
            let FlowRecord { claims, word, backend_idx, generation, .. } = records.load(idx);
            let FlowWord { client, flags, .. } = word;
            let is_one = claims != 0 && client != 0 && flags & FlowWord::IN_FLIGHT != 0;
            is_one.then_some((backend_idx, generation, flags & FlowWord::PENDING != 0))
        };
        (0..records.len()).filter_map(connection).collect()
    }
}

/// Recounts in a thread of its own, when it is time.
#[derive(Clone, Debug)]
pub struct Recounter {
    counters: Counters,
    conns: TcpConns,
    edge: EdgeRecords,
    /// The layout that the maps have.
    layout: u16,
    plan: Arc<Mutex<Plan>>,
    /// Two recounts at once would correct the same twice.
    recounting: Arc<Mutex<Suspects>>,
}

/// When to recount.
#[derive(Debug)]
struct Plan {
    /// When the next recount is due; `None` while one runs after which none is yet.
    due: Option<Instant>,
    is_running: bool,
    /// Why the sockets couldn't be listed the last time, as the log has it.
    problem: Option<String>,
}

impl Recounter {
    /// A recounter of these connections. The first recount is due at once.
    pub fn new(counters: Counters, conns: TcpConns, layout: u16) -> Recounter {
        let plan = Plan { due: Some(Instant::now()), is_running: false, problem: None };
        Recounter {
            counters,
            conns,
            edge: EdgeRecords::default(),
            layout,
            plan: Arc::new(Mutex::new(plan)),
            recounting: Arc::default(),
        }
    }

    /// Where the flows through the edge are set.
    pub fn edge(&self) -> &EdgeRecords {
        &self.edge
    }

    /// Recounts if that is due, or at once after a gap. Returns at once.
    pub fn work(&self, is_after_gap: bool) {
        let mut plan = self.plan();
        if is_after_gap {
            plan.due = Some(Instant::now());
        }
        if plan.is_running || plan.due.is_none_or(|due| Instant::now() < due) {
            return;
        }
        (plan.due, plan.is_running) = (None, true);
        drop(plan);
        let this = self.clone();
        let thread = std::thread::Builder::new().name("in-flight".to_owned());
        let spawned = thread.spawn(move || {
            let mut one = this.one();
            // Another may have done it meanwhile.
            if this.plan().is_running {
                this.recount_by(&mut one, Instant::now());
            }
        });
        if let Err(error) = spawned {
            tracing::error!("can't start a thread to count connections: {error}");
            self.end(AGAIN);
        }
    }

    /// Has a recount begin with the next [`Recounter::work`].
    pub fn request(&self) {
        self.plan().due = Some(Instant::now());
    }

    /// Counts the connections, corrects what is wrong, and frees the records of sockets that were gone
    /// a minute before `now` already. Blocks: see [`TcpConns::list`].
    pub fn recount(&self, now: Instant) -> Recount {
        self.recount_by(&mut self.one(), now)
    }

    /// The number of records that are in use.
    pub fn n_records(&self) -> usize {
        self.conns.n_records()
    }

    fn plan(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn one(&self) -> MutexGuard<'_, Suspects> {
        self.recounting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn recount_by(&self, unlisted: &mut Suspects, now: Instant) -> Recount {
        let start = Instant::now();
        let recount = self.count(unlisted, now);
        if recount.n_corrected > 0 {
            tracing::info!(
                "the connections in flight of {} backends were corrected, of {} in all",
                recount.n_corrected,
                recount.n_connections
            );
        }
        let pause = if recount.is_settled { NOW_AND_THEN } else { AGAIN };
        self.end(pause.max(start.elapsed() * SHARE));
        recount
    }

    /// The next one is due after this pause, or already, after a gap meanwhile.
    fn end(&self, pause: Duration) {
        let mut plan = self.plan();
        plan.is_running = false;
        plan.due.get_or_insert(Instant::now() + pause);
    }

    fn count(&self, unlisted: &mut Suspects, now: Instant) -> Recount {
        let before = self.counters.tallies();
        let Some((listed, records)) = self.list(&before) else { return Recount::default() };
        let after = self.counters.tallies();
        let mut recount = Recount { is_settled: true, ..Recount::default() };
        let mut counted = BTreeMap::<u32, (i32, i32)>::new();
        for connection in listed.values() {
            let (n, n_pending) = counted.entry(connection.backend_idx).or_default();
            *n += 1;
            *n_pending += i32::from(connection.is_counted_pending());
            recount.n_connections += 1;
            // One that is pending may be about to be counted.
            if !connection.is_seen && !connection.is_pending {
                recount.n_unseen += 1;
                recount.is_settled = false;
            }
        }
        let mut by_edge = BTreeSet::new();
        for (backend_idx, generation, is_pending) in self.edge.connections() {
            if before.get(&backend_idx).is_some_and(|tally| tally.generation == generation) {
                let (n, n_pending) = counted.entry(backend_idx).or_default();
                *n += 1;
                *n_pending += i32::from(is_pending);
                by_edge.insert(backend_idx);
            }
        }
        let mut suspects = Vec::new();
        for (backend_idx, before) in &before {
            let (n_counted, n_pending) = counted.get(backend_idx).copied().unwrap_or_default();
            let after = after.get(backend_idx).filter(|now| now.generation == before.generation);
            let Some(after) = after else { continue };
            let n_connects = after.connects.wrapping_sub(before.connects);
            let Correction { n, is_exact } =
                Correction::of(n_connects, [before.in_flight, after.in_flight], n_counted);
            let pending = Correction::of(n_connects, [before.pending, after.pending], n_pending);
            if (n, pending.n) != (0, 0) {
                self.counters.add_in_flight(*backend_idx, n, pending.n);
                recount.n_corrected += 1;
            } else if !pending.is_exact
                && after.pending != n_pending
                && !by_edge.contains(backend_idx)
            {
                suspects.push(*backend_idx);
            }
            // What was corrected while connections were made may have been corrected wrongly.
            recount.is_settled &= is_exact && pending.is_exact && n == 0 && pending.n == 0;
        }
        if !suspects.is_empty() {
            recount.n_corrected += self.correct_pending(&suspects, &before, &listed);
        }
        self.conns.sweep(&records, unlisted, now);
        recount
    }

    /// Corrects the numbers of connections that are being established, of backends where connections
    /// come and go. Returns how many were wrong.
    fn correct_pending(
        &self,
        suspects: &[u32],
        tallies: &BTreeMap<u32, Tally>,
        first: &Listing,
    ) -> usize {
        let read = |backend_idx: &u32| self.counters.outcomes(*backend_idx).pending;
        let mut least: Vec<i32> = suspects.iter().map(read).collect();
        for _ in 1..N_READINGS {
            std::thread::sleep(READING_PAUSE);
            for (least, backend_idx) in least.iter_mut().zip(suspects) {
                *least = read(backend_idx).min(*least);
            }
        }
        let Some((second, _)) = self.list(tallies) else { return 0 };
        let pending = |listing: &Listing| -> BTreeSet<(u32, u64)> {
            let pending = listing.iter().filter(|(_, connection)| connection.is_counted_pending());
            pending.map(|(&cookie, connection)| (connection.backend_idx, cookie)).collect()
        };
        let (first, second) = (pending(first), pending(&second));
        let mut n_corrected = 0;
        for (&backend_idx, least) in suspects.iter().zip(least) {
            let is_its = |(idx, _): &&(u32, u64)| *idx == backend_idx;
            let n_steady = first.intersection(&second).filter(is_its).count() as i32;
            let is_calm = !first.symmetric_difference(&second).any(|found| is_its(&found));
            let n = pending_correction(least, n_steady, is_calm);
            let generation = tallies.get(&backend_idx).map(|tally| tally.generation);
            if n != 0 && generation == Some(self.counters.generation(backend_idx)) {
                self.counters.add_in_flight(backend_idx, 0, n);
                n_corrected += 1;
            }
        }
        n_corrected
    }

    /// The connections that go to backends in the table, by their sockets' cookies, and the records of
    /// sockets that aren't listed; `None` where they can't be listed, which doesn't mean that they are
    /// gone.
    fn list(&self, tallies: &BTreeMap<u32, Tally>) -> Option<(Listing, Vec<ConnRecord>)> {
        let listed = self.conns.list();
        let mut plan = self.plan();
        let listed = match listed {
            Ok(listed) => listed,
            Err(reason) => {
                if plan.problem.as_ref() != Some(&reason) {
                    tracing::warn!("connections in flight can't be recounted: {reason}");
                    plan.problem = Some(reason);
                }
                return None;
            }
        };
        plan.problem = None;
        drop(plan);
        let connection = |(socket, kept): &(Stored, RevNat)| {
            Some((socket.cookie, self.connection(socket, kept, tallies)?))
        };
        Some((listed.conns.iter().filter_map(connection).collect(), listed.unlisted))
    }

    /// What a socket is to a backend in the table, if it goes to one by a VIP.
    fn connection(
        &self,
        socket: &Stored,
        kept: &RevNat,
        tallies: &BTreeMap<u32, Tally>,
    ) -> Option<Connection> {
        let Tally { generation, .. } = tallies.get(&kept.backend_idx)?;
        // One of a former generation is of the same backend where the address is the same, but the
        // programs don't see its end.
        let is_its = kept.layout == self.layout
            && self
                .counters
                .backend_address(kept.backend_idx, *generation)
                .is_some_and(|address| canonical(address) == canonical(socket.destination));
        is_its.then_some(Connection {
            backend_idx: kept.backend_idx,
            is_seen: kept.generation == *generation && kept.naming != NOT_COUNTED,
            is_pending: socket.is_pending,
        })
    }
}

/// Connections by VIPs, by their sockets' cookies.
type Listing = BTreeMap<u64, Connection>;

/// A connection by a VIP to a backend in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Connection {
    backend_idx: u32,
    /// Whether the programs saw it begin, and will see its end.
    is_seen: bool,
    is_pending: bool,
}

impl Connection {
    /// Whether it is one of those that the programs count as being established. Those that they don't know
    /// as such never end as such.
    fn is_counted_pending(&self) -> bool {
        self.is_seen && self.is_pending
    }
}

/// What has to be added to the number of connections that are being established: by the lowest number
/// that was read between two listings, how many were pending in both, and whether none was in one alone.
fn pending_correction(least: i32, n_steady: i32, is_calm: bool) -> i32 {
    // Those that were pending throughout are part of each reading.
    if least < n_steady || is_calm { n_steady.wrapping_sub(least) } else { 0 }
}

/// What has to be added to a backend's number in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Correction {
    n: i32,
    /// Whether no connection came or went in between.
    is_exact: bool,
}

impl Correction {
    /// By the connects while the sockets were listed, what the programs had counted before and after
    /// that, and the number listed. Those that began in between may be among the latter, and those that
    /// ended may not.
    fn of(n_connects: u64, [before, after]: [i32; 2], n_counted: i32) -> Correction {
        let grown = after.wrapping_sub(before);
        let n_begun = i32::try_from(n_connects).unwrap_or(i32::MAX).max(grown);
        let n_ended = n_begun.saturating_sub(grown).max(0);
        let (least, most) = (n_counted.saturating_sub(n_begun), n_counted.saturating_add(n_ended));
        let n = before.clamp(least, most).wrapping_sub(before);
        Correction { n, is_exact: n_begun == 0 && n_ended == 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pending_is_corrected_while_connections_come_and_go() {
        // The lowest reading, how many were pending throughout, whether none came or went; what is added.
        let table = [
            (0, 0, true, 0),
            (1, 0, true, -1),
            (5, 3, true, -2),
            (3, 3, true, 0),
            // What comes and goes may never have been gone.
            (1, 0, false, 0),
            (4, 3, false, 0),
            // Too few are so for certain.
            (-1, 0, true, 1),
            (-1, 0, false, 1),
            (2, 3, false, 1),
        ];
        for (least, n_steady, is_calm, expected) in table {
            let n = pending_correction(least, n_steady, is_calm);
            assert_eq!(n, expected, "{least} {n_steady} {is_calm}");
        }
    }

    #[test]
    fn what_may_be_right_stays() {
        // Connects and in flight before and after, the number listed; what is added, whether exact.
        let table = [
            ((9, 3), (9, 3), 3, 0, true),
            ((9, 3), (9, 3), 5, 2, true),
            ((9, 3), (9, 3), 0, -3, true),
            ((9, -2), (9, -2), 0, 2, true),
            // Two began, of which none or both may be listed.
            ((9, 3), (11, 5), 3, 0, false),
            ((9, 3), (11, 5), 5, 0, false),
            ((9, 3), (11, 5), 2, -1, false),
            ((9, 3), (11, 5), 6, 1, false),
            // Two ended.
            ((9, 3), (9, 1), 1, 0, false),
            ((9, 3), (9, 1), 3, 0, false),
            ((9, 3), (9, 1), 0, -1, false),
            // Two began and ended.
            ((9, 3), (11, 3), 5, 0, false),
            ((9, 3), (11, 3), 1, 0, false),
            // One was counted whose connect() came before.
            ((9, 3), (9, 4), 4, 0, false),
        ];
        for (before, after, n_counted, n, is_exact) in table {
            let expected = Correction { n, is_exact };
            let found = Correction::of(after.0 - before.0, [before.1, after.1], n_counted);
            assert_eq!(found, expected, "{before:?} {after:?}");
        }
    }
}

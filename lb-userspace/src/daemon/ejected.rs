//! Probes of ejected backends: the daemon connects to them by TCP, and ends the ejection of one that
//! accepts, so that no client has to be the trial.
//!
//! A task of its own: the loop that carries changes to the kernel waits for no backend. Without the daemon
//! an ejection ends by its own time and a trial.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;

use super::prober::connect;
use super::timers::{sleep_until, ticks};
use crate::datapath::{BackendRef, Cause, Counters, EventKind, SharedDatapath, Sign};

/// The backends that are probed; more wait until a scan finds room.
const MAX_BACKENDS: usize = 1_024;

/// The probes under way at once.
const MAX_PROBES: usize = 64;

/// The most of them that aren't the first since the backend was ejected: however many backends don't
/// answer, one that is ejected now is probed in time.
const MAX_RETRIES: usize = 48;

/// How long after an ejection the first probe begins. One for resets is probed at once: that is a hint
/// that the backend has died, which the probe finds out.
const FIRST: Duration = Duration::from_millis(200);
/// For how long a backend that returned is remembered.
const REMEMBERED: Duration = Duration::from_secs(300);

/// How long after the first probe the second one begins. Each further pause is half as long again, so that
/// a backend returns within a good half of the time it was away for.
const SECOND: Duration = Duration::from_secs(1);

/// The longest pause.
const MAX_PAUSE: Duration = Duration::from_secs(30);

/// How often the table's backends are looked through for ejections whose event was lost.
const SCAN_TICK: Duration = Duration::from_secs(30);

/// The changes of ejections that may wait for the task; a scan finds those beyond.
pub const MAX_CHANGES: usize = 1_024;

/// A change of a backend's ejection that the kernel reported.
#[derive(Debug)]
pub struct EjectionChange {
    /// Its service.
    pub service: Arc<str>,
    /// The backend.
    pub backend: BackendRef,
}

/// What the task follows.
pub struct FollowedEjections {
    /// The kernel's reports.
    pub changes: mpsc::Receiver<EjectionChange>,
    /// The kernel side, which knows the table's backends.
    pub datapath: Arc<SharedDatapath>,
    /// The ejections.
    pub counters: Counters,
    /// The ejections that probes ended are counted here.
    pub n_returned: Arc<AtomicU64>,
    /// Notified of each change.
    pub changed: Arc<Notify>,
}

/// Probes what is ejected, for as long as the daemon lives.
pub async fn follow(mut followed: FollowedEjections) {
    let mut ejected = EjectedSet::default();
    let mut probes = JoinSet::new();
    let mut n_retries = 0;
    let mut scan_tick = ticks(SCAN_TICK, Duration::ZERO);
    loop {
        let free = FreeProbes::beside(probes.len(), n_retries);
        for DueProbe { service, backend, is_retry } in ejected.take_due(Instant::now(), free) {
            // It may have returned, or have left the table, without an event.
            if followed.counters.ejection_cause(&backend).is_none() {
                ejected.remove(&backend);
                continue;
            }
            n_retries += usize::from(is_retry);
            probes.spawn(async move {
                let result = connect(backend.address).await;
                (service, backend, is_retry, result)
            });
        }
        let due = ejected.next_due(FreeProbes::beside(probes.len(), n_retries));
        tokio::select! {
            Some(EjectionChange { service, backend }) = followed.changes.recv() => {
                match followed.counters.ejection_cause(&backend) {
                    Some(cause) => ejected.add(service, backend, cause, Instant::now()),
                    None => ejected.remove(&backend),
                }
                followed.changed.notify_one();
            }
            // Neither aborted nor able to panic.
            Some(Ok((service, backend, is_retry, result))) = probes.join_next() => {
                n_retries -= usize::from(is_retry);
                end_probe(&followed, &service, &backend, result);
                let is_ejected = followed.counters.ejection_cause(&backend).is_some();
                ejected.end(&backend, is_ejected, Instant::now());
            }
            _ = scan_tick.tick() => {
                let (datapath, counters) = (followed.datapath.clone(), followed.counters.clone());
                // It may wait for a table that is being applied.
                let found = tokio::task::spawn_blocking(move || scan(&datapath, &counters)).await;
                for (service, backend, cause) in found.unwrap_or_default() {
                    if !ejected.has(&backend) {
                        followed.changed.notify_one();
                    }
                    ejected.add(service, backend, cause, Instant::now());
                }
            }
            () = sleep_until(due) => {}
        }
    }
}

/// The backends in the table that are ejected.
fn scan(datapath: &SharedDatapath, counters: &Counters) -> Vec<(Arc<str>, BackendRef, Cause)> {
    let mut found = Vec::new();
    for (service, _, backends) in datapath.service_indices() {
        let refs = backends.into_iter().filter_map(|(_, idx)| counters.backend_ref(idx));
        found.extend(refs.filter_map(|backend| {
            Some((service.clone(), backend, counters.ejection_cause(&backend)?))
        }));
    }
    found
}

/// Applies what a probe has shown.
fn end_probe(
    followed: &FollowedEjections,
    service: &str,
    backend: &BackendRef,
    result: io::Result<()>,
) {
    let sign = match result {
        Ok(()) => Sign::Probed,
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Sign::Refused,
        Err(_) => return,
    };
    let address: SocketAddr = backend.address;
    match followed.counters.apply_probe(backend, sign) {
        Some(EventKind::Returned) => {
            followed.n_returned.fetch_add(1, Ordering::Relaxed);
            tracing::info!("{service}: {address} returned: it accepts connections again");
        }
        Some(EventKind::Ejected) => {
            tracing::warn!("{service}: {address} is ejected: it refused a probe after resets");
        }
        Some(EventKind::Connected) | None => return,
    }
    followed.changed.notify_one();
}

/// The backends that are to be probed. A pure state machine: times are arguments.
#[derive(Debug, Default)]
struct EjectedSet {
    by_idx: BTreeMap<u32, Entry>,
}

/// A probe to begin.
#[derive(Debug, PartialEq, Eq)]
struct DueProbe {
    service: Arc<str>,
    backend: BackendRef,
    is_retry: bool,
}

/// How many probes may begin.
#[derive(Clone, Copy, Debug)]
struct FreeProbes {
    n: usize,
    /// So many of them may be retries.
    n_retries: usize,
}

impl FreeProbes {
    /// While so many are under way, and so many of them are retries.
    fn beside(n_probes: usize, n_retries: usize) -> FreeProbes {
        let n = MAX_PROBES.saturating_sub(n_probes);
        FreeProbes { n, n_retries: MAX_RETRIES.saturating_sub(n_retries).min(n) }
    }
}

#[derive(Debug)]
struct Entry {
    service: Arc<str>,
    backend: BackendRef,
    /// The time between its last two probes, or before the first one.
    pause: Duration,
    /// When the next probe begins; `None` while one is under way, or once it has returned.
    due: Option<Instant>,
    /// Whether it was probed since it was ejected.
    is_retry: bool,
    /// When it returned: if it is ejected again soon, the pauses go on from where they were, so that a
    /// backend that this host reaches and its clients don't isn't returned several times a second.
    returned: Option<Instant>,
}

impl EjectedSet {
    /// Adds a backend that is ejected, unless it is known, or there are too many.
    fn add(&mut self, service: Arc<str>, backend: BackendRef, cause: Cause, now: Instant) {
        let is_recent = |entry: &Entry| entry.returned.is_none_or(|at| now < at + REMEMBERED);
        self.by_idx.retain(|_, entry| is_recent(entry));
        let is_full = self.by_idx.len() >= MAX_BACKENDS;
        let mut pause = if cause == Cause::Resets { Duration::ZERO } else { FIRST };
        match self.by_idx.get(&backend.backend_idx) {
            Some(known) if known.backend == backend => match known.returned {
                None => return,
                Some(_) => pause = next_pause(known.pause),
            },
            None if is_full => {
                let returned = |(idx, entry): (&u32, &Entry)| entry.returned.map(|_| *idx);
                let Some(idx) = self.by_idx.iter().find_map(returned) else { return };
                self.by_idx.remove(&idx);
            }
            _ => {}
        }
        let due = Some(now + pause);
        let entry = Entry { service, backend, pause, due, is_retry: false, returned: None };
        self.by_idx.insert(backend.backend_idx, entry);
    }

    /// Whether it knows that a backend is ejected.
    fn has(&self, backend: &BackendRef) -> bool {
        let known = self.by_idx.get(&backend.backend_idx);
        known.is_some_and(|known| known.backend == *backend && known.returned.is_none())
    }

    /// Removes a backend that isn't ejected any more.
    fn remove(&mut self, backend: &BackendRef) {
        if self.by_idx.get(&backend.backend_idx).is_some_and(|entry| entry.backend == *backend) {
            self.by_idx.remove(&backend.backend_idx);
        }
    }

    /// When the next of the probes that may begin is due.
    fn next_due(&self, free: FreeProbes) -> Option<Instant> {
        let may_begin =
            |entry: &&Entry| if entry.is_retry { free.n_retries > 0 } else { free.n > 0 };
        self.by_idx.values().filter(may_begin).filter_map(|entry| entry.due).min()
    }

    /// Begins the probes that are due: a backend's first one before all retries, then those that have
    /// waited longest.
    fn take_due(&mut self, now: Instant, free: FreeProbes) -> Vec<DueProbe> {
        let is_due = |entry: &&mut Entry| entry.due.is_some_and(|due| due <= now);
        let mut due: Vec<&mut Entry> = self.by_idx.values_mut().filter(is_due).collect();
        due.sort_by_key(|entry| (entry.is_retry, entry.due));
        let n_first = due.iter().filter(|entry| !entry.is_retry).count();
        let begin = |entry: &mut Entry| {
            let (service, backend, is_retry) =
                (entry.service.clone(), entry.backend, entry.is_retry);
            (entry.due, entry.is_retry) = (None, true);
            DueProbe { service, backend, is_retry }
        };
        let n = free.n.min(n_first + free.n_retries);
        due.into_iter().take(n).map(begin).collect()
    }

    /// Ends a probe: the backend isn't ejected any more, or another probe follows.
    fn end(&mut self, backend: &BackendRef, is_ejected: bool, now: Instant) {
        let Some(entry) = self.by_idx.get_mut(&backend.backend_idx) else { return };
        // Another backend may have the entry by now.
        if entry.backend != *backend {
            return;
        }
        if !is_ejected {
            (entry.due, entry.returned) = (None, Some(now));
            return;
        }
        entry.pause = next_pause(entry.pause);
        entry.due = Some(now + entry.pause);
    }
}

fn next_pause(pause: Duration) -> Duration {
    if pause < FIRST {
        FIRST
    } else if pause < SECOND {
        SECOND
    } else {
        (pause + pause / 2).min(MAX_PAUSE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backend(backend_idx: u32, generation: u32) -> BackendRef {
        let address = SocketAddr::from(([192, 0, 2, 1], 80));
        BackendRef { backend_idx, generation, address }
    }

    fn add(ejected: &mut EjectedSet, backend: BackendRef, cause: Cause, now: Instant) {
        ejected.add("web".into(), backend, cause, now);
    }

    /// While no probe is under way.
    const ALL: FreeProbes = FreeProbes { n: MAX_PROBES, n_retries: MAX_RETRIES };

    fn backends(due: Vec<DueProbe>) -> Vec<BackendRef> {
        due.into_iter().map(|due| due.backend).collect()
    }

    #[test]
    fn a_backend_is_probed_with_growing_pauses_until_it_returns() {
        for (cause, first_ms) in [
            (Cause::Refused, &[200, 1_000, 1_500, 2_250][..]),
            (Cause::Silence, &[200, 1_000]),
            (Cause::Failures, &[200, 1_000]),
            (Cause::Resets, &[0, 200, 1_000, 1_500]),
        ] {
            let mut ejected = EjectedSet::default();
            let mut now = Instant::now();
            let one = backend(1, 7);
            add(&mut ejected, one, cause, now);
            let mut pauses = Vec::new();
            for _ in 0..20 {
                // A second report of the same changes nothing.
                add(&mut ejected, one, Cause::Refused, now);
                let due = ejected.next_due(ALL).unwrap();
                pauses.push(due - now);
                if due > now {
                    let early = due - Duration::from_nanos(1);
                    assert!(ejected.take_due(early, ALL).is_empty(), "{cause:?}");
                }
                now = due;
                assert_eq!(backends(ejected.take_due(now, ALL)), [one]);
                // While a probe is under way no other one begins.
                assert_eq!(ejected.next_due(ALL), None);
                assert!(ejected.take_due(now, ALL).is_empty());
                now += Duration::from_millis(10);
                ejected.end(&one, true, now);
            }
            let expected: Vec<_> = first_ms.iter().map(|ms| Duration::from_millis(*ms)).collect();
            assert_eq!(pauses[..expected.len()], expected, "{cause:?}");
            assert_eq!(pauses.last(), Some(&MAX_PAUSE));
            now += MAX_PAUSE;
            assert_eq!(ejected.take_due(now, ALL).len(), 1);
            ejected.end(&one, false, now);
            assert_eq!(ejected.next_due(ALL), None);
            // If it is ejected again soon, the pauses go on.
            add(&mut ejected, one, cause, now + FIRST);
            assert_eq!(ejected.next_due(ALL), Some(now + FIRST + MAX_PAUSE));
            assert_eq!(ejected.take_due(now + FIRST + MAX_PAUSE, ALL).len(), 1);
            ejected.end(&one, false, now);
            add(&mut ejected, one, cause, now + REMEMBERED);
            assert_eq!(ejected.next_due(ALL), Some(now + REMEMBERED + expected[0]));
        }
    }

    #[test]
    fn a_probe_of_a_former_backend_leaves_its_successor_alone() {
        let mut ejected = EjectedSet::default();
        let now = Instant::now();
        let (former, next) = (backend(1, 7), backend(1, 8));
        add(&mut ejected, former, Cause::Resets, now);
        assert_eq!(ejected.take_due(now, ALL).len(), 1);
        add(&mut ejected, next, Cause::Refused, now);
        let due = ejected.next_due(ALL);
        for is_ejected in [true, false] {
            ejected.end(&former, is_ejected, now);
            assert_eq!(ejected.next_due(ALL), due);
        }
        ejected.remove(&former);
        assert_eq!(backends(ejected.take_due(now + FIRST, ALL)), [next]);
        ejected.remove(&next);
        // It left while it was probed.
        ejected.end(&next, true, now);
        assert!(ejected.by_idx.is_empty());
    }

    #[test]
    fn backends_and_probes_are_bounded() {
        let mut ejected = EjectedSet::default();
        let now = Instant::now();
        for idx in 0..=MAX_BACKENDS as u32 {
            // The later ones wait for less long.
            add(
                &mut ejected,
                backend(idx, 1),
                Cause::Refused,
                now + Duration::from_nanos(idx.into()),
            );
        }
        assert_eq!(ejected.by_idx.len(), MAX_BACKENDS);
        let later = now + SECOND;
        let first = backends(ejected.take_due(later, ALL));
        let indices: Vec<u32> = first.iter().map(|backend| backend.backend_idx).collect();
        assert_eq!(indices, (0..MAX_PROBES as u32).collect::<Vec<_>>());
        assert!(ejected.take_due(later, FreeProbes::beside(MAX_PROBES, 0)).is_empty());
        let next = backends(ejected.take_due(later, FreeProbes::beside(MAX_PROBES - 1, 0)));
        assert_eq!(next[0].backend_idx, MAX_PROBES as u32);
        // There is room again for one that was left out.
        ejected.end(&backend(0, 1), false, later);
        add(&mut ejected, backend(MAX_BACKENDS as u32, 1), Cause::Refused, later);
        assert_eq!(ejected.by_idx.len(), MAX_BACKENDS);
        assert!(ejected.by_idx.contains_key(&(MAX_BACKENDS as u32)));
    }

    /// However many backends don't answer, one that is ejected now is probed in time.
    #[test]
    fn a_first_probe_waits_for_no_retry() {
        let mut ejected = EjectedSet::default();
        let now = Instant::now();
        let many: Vec<_> = (0..1_000).map(|idx| backend(idx, 1)).collect();
        for one in &many {
            add(&mut ejected, *one, Cause::Silence, now);
            ejected.take_due(now + FIRST, ALL);
            ejected.end(one, true, now + FIRST);
        }
        let later = now + MAX_PAUSE;
        let retries = ejected.take_due(later, ALL);
        assert_eq!(retries.len(), MAX_RETRIES);
        let free = FreeProbes::beside(retries.len(), retries.len());
        assert_eq!((ejected.next_due(free), ejected.take_due(later, free).len()), (None, 0));
        let new = backend(1_000, 1);
        add(&mut ejected, new, Cause::Silence, later);
        assert_eq!(ejected.next_due(free), Some(later + FIRST));
        let next = later + FIRST;
        assert_eq!(backends(ejected.take_due(next, free)), [new]);
        // One that returned is tried first when it is ejected again.
        ejected.end(&new, false, next);
        add(&mut ejected, new, Cause::Silence, next);
        assert_eq!(backends(ejected.take_due(next + MAX_PAUSE, free)), [new]);
    }
}

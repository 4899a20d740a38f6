//! One change at a time: from the registration to the first connection that lands on the new backend, and from
//! the deregistration to the last one.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::time::{ClockId, clock_gettime};

use super::site::{Probe, Site};

/// How long an instance is registered once connections land on it, so that changes of one service are some
/// time apart.
pub const LIFE: Duration = Duration::from_millis(300);

/// When an instance was registered and deregistered, in nanoseconds of CLOCK_MONOTONIC.
struct Change {
    answer: String,
    registered_ns: u64,
    deregistered_ns: u64,
}

/// How long each change of a round took, in milliseconds.
#[derive(Debug, Default, PartialEq)]
pub struct Delays {
    /// From the registration sent to the start of the first connection that lands on the new backend.
    pub arrival_ms: Vec<f64>,
    /// From the deregistration sent to the start of the last connection that does; 0 where none came after.
    pub departure_ms: Vec<f64>,
    /// Connects that failed meanwhile.
    pub n_failed: usize,
}

/// Registers and deregisters that many instances, one after the other, beside one that stays.
///
/// # Errors
/// When a change isn't seen in time.
pub fn measure(site: &mut Site, n: usize) -> Result<Delays> {
    let batch = site.start_more(n)?;
    let probe = Probe::start(site)?;
    site.batch.instances.iter().try_for_each(|instance| probe.await_first(instance))?;
    let mut changes = Vec::new();
    for instance in &batch.instances {
        let registered_ns = now_ns();
        site.register(instance)?;
        let came = probe.await_first(instance);
        thread::sleep(LIFE);
        let deregistered_ns = now_ns();
        // Also where it wasn't seen: nothing is to stay behind.
        site.deregister(&instance.name)?;
        came?;
        probe.await_silence(instance)?;
        changes.push(Change { answer: instance.answer(), registered_ns, deregistered_ns });
    }
    delays(&probe.stop()?, &changes)
}

fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Looks for the changes in a probe's log.
fn delays(log: &str, changes: &[Change]) -> Result<Delays> {
    let mut connects = Vec::new();
    let mut n_failed = 0;
    for line in log.lines() {
        let connect = || -> Option<(u64, &str)> {
            let mut parts = line.splitn(3, ' ');
            let start_ns = parts.next()?.parse().ok()?;
            parts.next()?;
            Some((start_ns, parts.next()?))
        };
        // The last line may be half written.
        let Some((start_ns, answer)) = connect() else { continue };
        match answer.starts_with('!') {
            true => n_failed += 1,
            false => connects.push((start_ns, answer)),
        }
    }
    let mut delays = Delays { n_failed, ..Delays::default() };
    let ms = |from_ns: u64, to_ns: u64| to_ns.saturating_sub(from_ns) as f64 / 1e6;
    for change in changes {
        let mut its = connects.iter().filter(|(_, answer)| *answer == change.answer);
        let (first_ns, _) = its.next().with_context(|| format!("no {:?}", change.answer))?;
        let (last_ns, _) =
            its.next_back().context("only one connection landed on a new backend")?;
        ensure!(*last_ns >= *first_ns, "a probe's log goes back in time");
        delays.arrival_ms.push(ms(change.registered_ns, *first_ns));
        delays.departure_ms.push(ms(change.deregistered_ns, *last_ns));
    }
    Ok(delays)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_found_in_the_log() {
        let log = "\
1000000 1100000 hello from i-0
1500000 1600000 hello from i-1
2000000 2100000 !refused
4000000 4100000 hello from i-1
5000000 5100000 hello from i-0
6000000 6100000 hello from i-2
9000000 9100000 hello from i-2
95000";
        let change = |answer: &str, registered_ns, deregistered_ns| Change {
            answer: format!("hello from {answer}"),
            registered_ns,
            deregistered_ns,
        };
        let changes = [change("i-1", 500_000, 3_000_000), change("i-2", 5_500_000, 9_500_000)];
        let expected =
            Delays { arrival_ms: vec![1.0, 0.5], departure_ms: vec![1.0, 0.0], n_failed: 1 };
        assert_eq!(delays(log, &changes).expect("all are there"), expected);
        assert!(delays(log, &[change("i-3", 0, 1)]).is_err());
    }
}

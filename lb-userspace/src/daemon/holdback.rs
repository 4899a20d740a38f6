//! When a table goes to DNS: once the book of VIPs is on disk, or after a bounded wait.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::table::Table;

/// How long a table waits for the disk: many times what a healthy one takes, and less than a
/// resolver's first time-out (5 s by default, resolv.conf(5)).
const PATIENCE: Duration = Duration::from_secs(1);

/// Holds back tables with an address that isn't recorded in the file yet. The kernel has them already.
///
/// The file is what keeps a name's address across a reboot, so it comes first. But a disk that is
/// full or stalls must not take new services away: after [`PATIENCE`] the table proceeds without it,
/// and so do further ones until the file has caught up. The risk is small then: the pinned maps still
/// have the address across a restart of the daemon, and after a reboot no process
/// remembers it.
#[derive(Debug, Default)]
pub struct Holdback {
    held: Option<Held>,
    /// The edition whose wait timed out; while the file lacks it, nothing waits.
    missed: Option<u64>,
}

#[derive(Debug)]
struct Held {
    table: Arc<Table>,
    /// The edition of the book that it needs.
    given: u64,
    until: Instant,
}

impl Holdback {
    /// Takes the next table, which needs edition `given` of the book, where `written` is on disk.
    /// Returns the table if it goes to DNS now; otherwise it takes the place of one that is held, and
    /// inherits its deadline.
    pub fn offer(
        &mut self,
        table: Arc<Table>,
        given: u64,
        written: u64,
        now: Instant,
    ) -> Option<Arc<Table>> {
        self.missed = self.missed.filter(|&missed| written < missed);
        if given <= written || self.missed.is_some() {
            self.held = None;
            return Some(table);
        }
        let until = self.held.as_ref().map_or(now + PATIENCE, |held| held.until);
        self.held = Some(Held { table, given, until });
        None
    }

    /// Notes the version on disk. Returns the table that goes to DNS now.
    pub fn acknowledge(&mut self, written: u64) -> Option<Arc<Table>> {
        self.missed = self.missed.filter(|&missed| written < missed);
        Some(self.held.take_if(|held| held.given <= written)?.table)
    }

    /// When [`Holdback::expire`] is due; `None` while nothing is held.
    pub fn due(&self) -> Option<Instant> {
        self.held.as_ref().map(|held| held.until)
    }

    /// Gives up waiting. Returns the table that goes to DNS now.
    pub fn expire(&mut self, now: Instant) -> Option<Arc<Table>> {
        let held = self.held.take_if(|held| held.until <= now)?;
        self.missed = Some(held.given);
        Some(held.table)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(generation: u64) -> Arc<Table> {
        Arc::new(Table { generation, ..Table::default() })
    }

    fn generation(table: Option<Arc<Table>>) -> Option<u64> {
        table.map(|table| table.generation)
    }

    #[test]
    fn a_table_waits_for_its_edition() {
        let (mut holdback, now) = (Holdback::default(), Instant::now());
        assert_eq!(
            generation(holdback.offer(table(1), 0, 0, now)),
            Some(1),
            "it gives nothing out"
        );
        assert_eq!(holdback.due(), None);
        assert_eq!(generation(holdback.offer(table(2), 5, 4, now)), None);
        assert_eq!(holdback.due(), Some(now + PATIENCE));
        assert_eq!(generation(holdback.acknowledge(4)), None);
        assert_eq!(generation(holdback.acknowledge(5)), Some(2));
        assert_eq!((generation(holdback.acknowledge(6)), holdback.due()), (None, None));
    }

    #[test]
    fn the_wait_is_bounded_however_many_tables_come() {
        let (mut holdback, start) = (Holdback::default(), Instant::now());
        for nth in 0..10 {
            let now = start + PATIENCE / 20 * nth;
            assert_eq!(
                generation(holdback.offer(table(nth.into()), 1 + u64::from(nth), 0, now)),
                None
            );
            assert_eq!(generation(holdback.expire(now)), None);
        }
        assert_eq!(holdback.due(), Some(start + PATIENCE));
        assert_eq!(generation(holdback.expire(start + PATIENCE)), Some(9));
        assert_eq!(holdback.due(), None);
    }

    #[test]
    fn a_disk_that_was_waited_for_in_vain_is_not_waited_for_again() {
        let (mut holdback, now) = (Holdback::default(), Instant::now());
        holdback.offer(table(1), 1, 0, now);
        assert_eq!(generation(holdback.expire(now + PATIENCE)), Some(1));
        assert_eq!(generation(holdback.offer(table(2), 2, 0, now)), Some(2));
        assert_eq!(generation(holdback.offer(table(3), 3, 0, now)), Some(3));
        // It has caught up with what was missed: a healthy disk is worth the wait.
        assert_eq!(generation(holdback.acknowledge(1)), None);
        assert_eq!(generation(holdback.offer(table(4), 4, 1, now)), None);
        // A table that needs nothing goes at once, with all that those held had.
        assert_eq!(generation(holdback.offer(table(5), 4, 4, now)), Some(5));
        assert_eq!(generation(holdback.acknowledge(4)), None);
    }
}

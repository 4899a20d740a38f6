//! Which indices of an array map are free.

use std::collections::BTreeSet;

/// The indices of one map, each free or in use.
#[derive(Debug)]
pub struct Ids {
    /// Those below `next` that are free.
    free: BTreeSet<u32>,
    next: u32,
    capacity: u32,
}

impl Ids {
    /// All of `0..capacity` free.
    pub fn new(capacity: u32) -> Ids {
        Ids { free: BTreeSet::new(), next: 0, capacity }
    }

    /// All of `0..capacity` free except those with `is_used`.
    pub fn with_used(capacity: u32, is_used: impl Fn(u32) -> bool) -> Ids {
        let next = (0..capacity).rev().find(|&id| is_used(id)).map_or(0, |last| last + 1);
        let free = (0..next).filter(|&id| !is_used(id)).collect();
        Ids { free, next, capacity }
    }

    /// The number of indices, free or not.
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// The number of indices in use.
    pub fn used(&self) -> u32 {
        self.next - self.free.len() as u32
    }

    /// The number of indices that are free.
    pub fn available(&self) -> u32 {
        self.capacity - self.used()
    }

    /// Takes a free index; `None` when all are in use.
    pub fn take(&mut self) -> Option<u32> {
        self.free.pop_first().or_else(|| {
            let fresh = self.next;
            (fresh < self.capacity).then(|| {
                self.next += 1;
                fresh
            })
        })
    }

    /// Takes this index, or another one where it is in use or beyond the map.
    pub fn take_at(&mut self, wanted: u32) -> Option<u32> {
        if wanted >= self.capacity || wanted < self.next && !self.free.remove(&wanted) {
            return self.take();
        }
        if wanted >= self.next {
            self.free.extend(self.next..wanted);
            self.next = wanted + 1;
        }
        Some(wanted)
    }

    /// Frees an index.
    pub fn free(&mut self, id: u32) {
        self.free.insert(id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_in_use_are_not_taken() {
        let mut ids = Ids::with_used(6, |id| id == 1 || id == 3);
        assert_eq!((ids.used(), ids.available()), (2, 4));
        let taken: Vec<_> = std::iter::from_fn(|| ids.take()).collect();
        assert_eq!(taken, [0, 2, 4, 5]);
    }

    #[test]
    fn a_wanted_one_is_taken_where_it_is_free() {
        let mut ids = Ids::with_used(6, |id| id == 1);
        // What is wanted, and what is taken.
        for (wanted, taken) in [(4, 4), (4, 0), (1, 2), (3, 3), (6, 5), (u32::MAX, u32::MAX)] {
            assert_eq!(ids.take_at(wanted), Some(taken).filter(|&id| id < 6), "{wanted}");
        }
        assert_eq!((ids.used(), ids.available()), (6, 0));
        ids.free(3);
        ids.free(5);
        assert_eq!([ids.take_at(5), ids.take_at(5), ids.take_at(0)], [Some(5), Some(3), None]);
    }
}

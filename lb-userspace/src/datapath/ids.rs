//! Which indices of an array map are free.

/// The indices of one map, each free or in use.
#[derive(Debug)]
pub struct Ids {
    free: Vec<u32>,
    next: u32,
    capacity: u32,
}

impl Ids {
    /// All of `0..capacity` free.
    pub fn new(capacity: u32) -> Ids {
        Ids { free: Vec::new(), next: 0, capacity }
    }

    /// All of `0..capacity` free except those with `is_used`.
    pub fn with_used(capacity: u32, is_used: impl Fn(u32) -> bool) -> Ids {
        let next = (0..capacity).rev().find(|&id| is_used(id)).map_or(0, |last| last + 1);
        let free = (0..next).rev().filter(|&id| !is_used(id)).collect();
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
        self.free.pop().or_else(|| {
            let fresh = self.next;
            (fresh < self.capacity).then(|| {
                self.next += 1;
                fresh
            })
        })
    }

    /// Frees an index.
    pub fn free(&mut self, id: u32) {
        self.free.push(id);
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
}

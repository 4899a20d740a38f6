//! Which slots are free: a buddy allocator (Knowlton 1965) over `SLOTS`.

use std::collections::BTreeSet;

use lb_common::MAX_SERVICE_BACKENDS;

const MAX_ORDER: u32 = MAX_SERVICE_BACKENDS.ilog2();

/// A run of slots that is in use, 2^order of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// The index of the first slot, a multiple of the run's length.
    pub first_slot: u32,
    order: u32,
}

impl Block {
    /// The run that a region of `n_slots` slots has, if one can begin at `first_slot`.
    pub fn of(first_slot: u32, n_slots: u32) -> Option<Block> {
        let order = n_slots.checked_next_power_of_two()?.ilog2();
        let fits = (1..=MAX_SERVICE_BACKENDS).contains(&n_slots);
        (fits && first_slot.is_multiple_of(1 << order)).then_some(Block { first_slot, order })
    }
}

/// The free runs of slots, by order.
#[derive(Debug)]
pub struct SlotAllocator {
    free: [BTreeSet<u32>; MAX_ORDER as usize + 1],
    capacity: u32,
}

impl SlotAllocator {
    /// All free: as many of `n_slots` slots as make whole runs of the largest order.
    pub fn new(n_slots: u32) -> SlotAllocator {
        let mut free: [BTreeSet<u32>; MAX_ORDER as usize + 1] = Default::default();
        let capacity = n_slots - n_slots % MAX_SERVICE_BACKENDS;
        free[MAX_ORDER as usize] = (0..capacity).step_by(MAX_SERVICE_BACKENDS as usize).collect();
        SlotAllocator { free, capacity }
    }

    /// The number of slots, free or not.
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// The number of slots in use.
    pub fn used(&self) -> u32 {
        let free: u32 =
            (0..).zip(&self.free).map(|(order, blocks)| (blocks.len() as u32) << order).sum();
        self.capacity - free
    }

    /// Takes a run of at least `n_slots` slots, 1..=4096. `None` when no run is long enough.
    pub fn take(&mut self, n_slots: u32) -> Option<Block> {
        let order = n_slots.next_power_of_two().ilog2();
        let mut from = (order..=MAX_ORDER).find(|&order| !self.free[order as usize].is_empty())?;
        let first_slot = self.free[from as usize].pop_first()?;
        while from > order {
            from -= 1;
            self.free[from as usize].insert(first_slot + (1 << from));
        }
        Some(Block { first_slot, order })
    }

    /// Takes this run. Returns whether all of it was free.
    pub fn claim(&mut self, block: Block) -> bool {
        // The free run that it is part of, at whichever order that is.
        let whole = (block.order..=MAX_ORDER).find_map(|order| {
            let first_slot = block.first_slot & !((1 << order) - 1);
            self.free[order as usize].remove(&first_slot).then_some(Block { first_slot, order })
        });
        let Some(Block { mut first_slot, order: mut from }) = whole else { return false };
        while from > block.order {
            from -= 1;
            let upper = first_slot + (1 << from);
            let spare = if block.first_slot >= upper {
                std::mem::replace(&mut first_slot, upper)
            } else {
                upper
            };
            self.free[from as usize].insert(spare);
        }
        true
    }

    /// Frees a run.
    pub fn free(&mut self, block: Block) {
        let Block { mut first_slot, mut order } = block;
        while order < MAX_ORDER && self.free[order as usize].remove(&(first_slot ^ (1 << order))) {
            first_slot &= !(1 << order);
            order += 1;
        }
        self.free[order as usize].insert(first_slot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    impl Block {
        fn len(self) -> u32 {
            1 << self.order
        }
    }

    proptest! {
        #[test]
        fn runs_never_overlap_and_nothing_leaks(
            steps in prop::collection::vec((any::<bool>(), 1..=4096u32, any::<prop::sample::Index>()), 1..300)
        ) {
            let mut regions = SlotAllocator::new(16 * MAX_SERVICE_BACKENDS);
            let mut held: Vec<Block> = Vec::new();
            for (take, n_slots, which) in steps {
                if take {
                    if let Some(block) = regions.take(n_slots) {
                        prop_assert!(block.len() >= n_slots && block.len() < 2 * n_slots);
                        for other in &held {
                            prop_assert!(
                                block.first_slot + block.len() <= other.first_slot
                                    || other.first_slot + other.len() <= block.first_slot
                            );
                        }
                        held.push(block);
                    }
                } else if !held.is_empty() {
                    regions.free(held.swap_remove(which.index(held.len())));
                }
                prop_assert_eq!(regions.used(), held.iter().map(|block| block.len()).sum::<u32>());
            }
            held.drain(..).for_each(|block| regions.free(block));
            prop_assert_eq!(regions.free[MAX_ORDER as usize].len(), 16);
        }
    }

    proptest! {
        #[test]
        fn claimed_runs_are_those_that_were_taken(
            sizes in prop::collection::vec(1..=4096u32, 1..40)
        ) {
            let mut regions = SlotAllocator::new(64 * MAX_SERVICE_BACKENDS);
            let taken: Vec<_> =
                sizes.iter().map(|&n_slots| (regions.take(n_slots).unwrap(), n_slots)).collect();
            let mut again = SlotAllocator::new(64 * MAX_SERVICE_BACKENDS);
            for (block, n_slots) in taken {
                let same = Block::of(block.first_slot, n_slots);
                prop_assert_eq!(same, Some(block));
                prop_assert!(again.claim(block));
                prop_assert!(!again.claim(block), "twice");
            }
            prop_assert_eq!(again.free, regions.free);
        }
    }

    #[test]
    fn full_is_none() {
        let mut regions = SlotAllocator::new(MAX_SERVICE_BACKENDS);
        assert!(regions.take(4096).is_some());
        assert!(regions.take(1).is_none());
    }
}

//! Which slots are free: a buddy allocator (Knowlton 1965) over `SLOTS`.

use std::collections::BTreeSet;

use lb_common::{MAX_SERVICE_BACKENDS, maglev_slots};

/// The longest run is that of the largest service with its Maglev table.
const MAX_ORDER: u32 =
    (MAX_SERVICE_BACKENDS + maglev_slots(MAX_SERVICE_BACKENDS)).next_power_of_two().ilog2();

/// A run of slots that is in use, 2^order of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// The index of the first slot, a multiple of the run's length.
    pub first_slot: u32,
    order: u32,
}

impl Block {
    /// The runs that a region of `n_slots` slots from `first_slot` on has, if one can begin there: one; or
    /// for slots with a Maglev table the lower half of one, and a shorter run right behind it. Such a table
    /// is a power of two, and the slots before it are few, so the whole run would waste nearly half.
    pub fn of(first_slot: u32, n_slots: u32) -> Option<Vec<Block>> {
        let order = n_slots.checked_next_power_of_two()?.ilog2();
        let fits = n_slots > 0 && order <= MAX_ORDER;
        if !fits || !first_slot.is_multiple_of(1 << order) {
            return None;
        }
        let half = (1 << order) / 2;
        let rest = (n_slots - half).checked_next_power_of_two()?;
        Some(if n_slots <= MAX_SERVICE_BACKENDS || rest == half {
            vec![Block { first_slot, order }]
        } else {
            let behind = Block { first_slot: first_slot + half, order: rest.ilog2() };
            vec![Block { first_slot, order: order - 1 }, behind]
        })
    }
}

/// The free runs of slots, by order.
#[derive(Debug)]
pub struct SlotAllocator {
    free: [BTreeSet<u32>; MAX_ORDER as usize + 1],
    capacity: u32,
}

impl SlotAllocator {
    /// `n_slots` slots, all free.
    pub fn new(n_slots: u32) -> SlotAllocator {
        let mut free: [BTreeSet<u32>; MAX_ORDER as usize + 1] = Default::default();
        let mut first_slot = 0;
        for order in (0..=MAX_ORDER).rev() {
            while n_slots - first_slot >= 1 << order {
                free[order as usize].insert(first_slot);
                first_slot += 1 << order;
            }
        }
        SlotAllocator { free, capacity: n_slots }
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

    /// Takes a region of `n_slots` slots, at least one, as [`Block::of`] has it: the first of its runs is
    /// where it begins. `None` when no run is long enough.
    pub fn take(&mut self, n_slots: u32) -> Option<Vec<Block>> {
        let order = n_slots.next_power_of_two().ilog2();
        if order > MAX_ORDER {
            return None;
        }
        let mut from = (order..=MAX_ORDER).find(|&order| !self.free[order as usize].is_empty())?;
        let first_slot = self.free[from as usize].pop_first()?;
        while from > order {
            from -= 1;
            self.free[from as usize].insert(first_slot + (1 << from));
        }
        let blocks = Block::of(first_slot, n_slots)?;
        if let [Block { order: lower, .. }, behind] = blocks[..] {
            for order in behind.order..lower {
                self.free[order as usize].insert(behind.first_slot + (1 << order));
            }
        }
        Some(blocks)
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

    /// A number of slots: of a service, or of one with its Maglev table.
    fn n_slots() -> impl Strategy<Value = u32> {
        let with_table = |n_slots| n_slots + maglev_slots(n_slots);
        prop_oneof![4 => 1..=4096u32, 1 => (1..=4096u32).prop_map(with_table)]
    }

    proptest! {
        #[test]
        fn runs_never_overlap_and_nothing_leaks(
            steps in prop::collection::vec(
                (any::<bool>(), n_slots(), any::<prop::sample::Index>()),
                1..300,
            )
        ) {
            let mut regions = SlotAllocator::new(16 * MAX_SERVICE_BACKENDS);
            let mut held: Vec<Vec<Block>> = Vec::new();
            for (take, n_slots, which) in steps {
                if take {
                    if let Some(blocks) = regions.take(n_slots) {
                        let len = blocks.iter().map(|block| block.len()).sum::<u32>();
                        prop_assert!(len >= n_slots && len < 2 * n_slots);
                        // The run behind has the rounded rest, up to twice 4,096 slots.
                        prop_assert!(n_slots <= MAX_SERVICE_BACKENDS || len - n_slots < 4096);
                        let mut end = blocks[0].first_slot;
                        for block in &blocks {
                            prop_assert_eq!(block.first_slot, end, "a gap");
                            end += block.len();
                            for other in held.iter().flatten() {
                                prop_assert!(
                                    block.first_slot + block.len() <= other.first_slot
                                        || other.first_slot + other.len() <= block.first_slot
                                );
                            }
                        }
                        held.push(blocks);
                    }
                } else if !held.is_empty() {
                    let blocks = held.swap_remove(which.index(held.len()));
                    blocks.into_iter().for_each(|block| regions.free(block));
                }
                let in_use = held.iter().flatten().map(|block| block.len()).sum::<u32>();
                prop_assert_eq!(regions.used(), in_use);
            }
            held.drain(..).flatten().for_each(|block| regions.free(block));
            prop_assert_eq!(regions.free[MAX_ORDER as usize].len(), 2);
        }
    }

    proptest! {
        #[test]
        fn claimed_runs_are_those_that_were_taken(sizes in prop::collection::vec(n_slots(), 1..40)) {
            let mut regions = SlotAllocator::new(400 * MAX_SERVICE_BACKENDS);
            let taken: Vec<_> =
                sizes.iter().map(|&n_slots| (regions.take(n_slots).unwrap(), n_slots)).collect();
            let mut again = SlotAllocator::new(400 * MAX_SERVICE_BACKENDS);
            for (blocks, n_slots) in taken {
                prop_assert_eq!(Block::of(blocks[0].first_slot, n_slots), Some(blocks.clone()));
                for block in blocks {
                    prop_assert!(again.claim(block));
                    prop_assert!(!again.claim(block), "twice");
                }
            }
            prop_assert_eq!(again.free, regions.free);
        }
    }

    #[test]
    fn full_is_none() {
        let mut regions = SlotAllocator::new(MAX_SERVICE_BACKENDS + 3);
        assert_eq!(regions.capacity(), 4099);
        assert!(regions.take(4097).is_none());
        assert!(regions.take(4096).is_some());
        assert!(regions.take(2).is_some() && regions.take(1).is_some());
        assert!(regions.take(1).is_none() && regions.take(u32::MAX / 2).is_none());
    }
}

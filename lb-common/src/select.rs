//! The selection of a backend.

use crate::Slot;

/// Selects a backend's index by weight, in constant time, from a range of `n_slots` slots.
///
/// `random` is uniform over its whole range. Multiplied by `n_slots`, its upper word is a uniform
/// slot and the first 16 bits of its lower word the coin that decides between that slot's own
/// backend and its alias, so one random number serves for both (with up to 4,096 slots at least
/// 2^20 values of it fall to each).
///
/// `None` when there is no slot, or when `slot` has none at an index that is in range.
#[inline(always)]
pub fn select(random: u32, n_slots: u32, slot: impl Fn(u32) -> Option<Slot>) -> Option<u32> {
    let position = u64::from(random) * u64::from(n_slots);
    side((position >> 32) as u32, (position >> 16) as u16, slot)
}

/// The backend of one of a slot's two sides: its own or its alias's, as the coin falls.
#[inline(always)]
pub fn side(slot_idx: u32, coin: u16, slot: impl Fn(u32) -> Option<Slot>) -> Option<u32> {
    let own = slot(slot_idx)?;
    if coin < own.threshold {
        return Some(own.backend);
    }
    Some(slot(u32::from(own.alias))?.backend)
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn slot(backend: u32, threshold: u16, alias: u16) -> Slot {
        Slot { backend, alias, threshold }
    }

    #[test]
    fn a_random_number_selects_a_slot_and_a_side_of_it() {
        // Two slots: the first is three quarters 7 and one quarter 9, the second all 9.
        let slots = [slot(7, 0xC000, 1), slot(9, 0xFFFF, 1)];
        let check = |random, expected| {
            let chosen = select(random, 2, |index| slots.get(index as usize).copied());
            assert_eq!(chosen, Some(expected), "random {random:#x}");
        };
        check(0, 7);
        check(0x5FFF_FFFF, 7);
        check(0x6000_0000, 9);
        check(0x7FFF_FFFF, 9);
        check(0x8000_0000, 9);
        check(0xFFFF_FFFF, 9);
    }

    #[test]
    fn without_slots_nothing_is_selected() {
        assert_eq!(select(5, 0, |_| None), None);
    }

    #[test]
    fn never_reads_a_slot_beyond_the_range() {
        for n_slots in [1, 2, 3, 1000, 4096] {
            for random in [0, 1, u32::MAX / 2, u32::MAX - 1, u32::MAX] {
                let chosen = select(random, n_slots, |index| {
                    assert!(index < n_slots, "slot {index} of {n_slots}");
                    Some(slot(index, 0, (n_slots - 1) as u16))
                });
                assert_eq!(chosen, Some(n_slots - 1));
            }
        }
    }
}

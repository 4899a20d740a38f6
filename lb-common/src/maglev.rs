//! Maglev: a consistent hash of a key by one look-up (Eisenbud and others, "Maglev: A Fast and
//! Reliable Software Network Load Balancer", NSDI 2016, section 3.4), with weights as Envoy has them.
//!
//! A range's table lies in `SLOTS` right behind the range's slots, so that one store swaps both: four
//! entries in the eight bytes of a slot, the first in the lowest bits, each the number of one of the
//! range's slots. What isn't by key (the choice among few that are left) uses the slots themselves.

/// Entries in a slot's eight bytes.
pub const MAGLEV_ENTRIES_PER_SLOT: u32 = 4;

/// Ranges of up to so many backends have the smaller table.
const SMALL_RANGE: u32 = 128;
const SMALL_TABLE: u32 = 1 << 14;
const LARGE_TABLE: u32 = 1 << 16;

/// The number of entries for a range: 16,384 (32 KiB) for up to 128 backends, else 65,536.
///
/// There are but two sizes, because another size moves nearly all keys, once.
#[inline(always)]
pub const fn maglev_entries(n_slots: u32) -> u32 {
    if n_slots <= SMALL_RANGE { SMALL_TABLE } else { LARGE_TABLE }
}

/// The number of slots that a range's table takes, behind the range's own.
pub const fn maglev_slots(n_slots: u32) -> u32 {
    if n_slots == 0 { 0 } else { maglev_entries(n_slots) / MAGLEV_ENTRIES_PER_SLOT }
}

/// The entry for a key's hash, counted from the table's first.
#[inline(always)]
pub const fn maglev_entry(hash: u32, n_slots: u32) -> u32 {
    ((hash as u64 * maglev_entries(n_slots) as u64) >> 32) as u32
}

/// The number that an entry has, of the word in which it lies.
#[inline(always)]
pub const fn maglev_entry_of(word: u64, entry: u32) -> u32 {
    (word >> (16 * (entry % MAGLEV_ENTRIES_PER_SLOT))) as u16 as u32
}

/// The hash of a key (a cgroup's id, a network namespace's cookie, a source address) for the nth
/// attempt to find a backend: the finalizer of SplitMix64 (Steele, Lea, Flood 2014). Attempts are
/// independent, so that the keys of a backend that is ejected spread over all others, and each key
/// goes to the same other one as long as it is.
#[inline(always)]
pub const fn key_hash(key: u64, attempt: u32) -> u32 {
    let word = key.wrapping_add((attempt as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    (mix(word) >> 32) as u32
}

#[inline(always)]
pub(crate) const fn mix(mut word: u64) -> u64 {
    word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ word >> 31
}

#[cfg(not(target_arch = "bpf"))]
pub use table::maglev_table;

#[cfg(not(target_arch = "bpf"))]
mod table {
    use std::vec;
    use std::vec::Vec;

    use super::*;

    /// The table for a range's backends, in the order of its slots: pairs of a number that is the
    /// same backend's on every node and at any time, and a weight of at least 1. The result goes into
    /// [`maglev_slots`] slots, a word each.
    ///
    /// Where two backends have the same number, keys go to them alike in no particular way.
    pub fn maglev_table(backends: &[(u64, u16)]) -> Vec<u64> {
        const FREE: u16 = u16::MAX;
        struct Row {
            /// The permutation: every entry once, because the step is odd and the size a power of two.
            offset: u64,
            step: u64,
            next: u64,
            /// What the backend has to have waited for its next turn, in weights.
            due: u64,
        }
        let n_slots = backends.len() as u32;
        if n_slots == 0 {
            return Vec::new();
        }
        let n_entries = maglev_entries(n_slots);
        let heaviest = backends.iter().map(|&(_, weight)| u64::from(weight)).max().unwrap_or(1);
        let row = |&(number, _): &(u64, u16)| {
            let offset = mix(number.wrapping_add(0x9e37_79b9_7f4a_7c15));
            Row { offset, step: mix(offset ^ number) | 1, next: 0, due: 0 }
        };
        let mut rows: Vec<Row> = backends.iter().map(row).collect();
        // Who comes first in a round mustn't depend on the order of slots, which differs.
        let mut order: Vec<usize> = (0..backends.len()).collect();
        order.sort_by_key(|&idx| rows[idx].offset);
        let mut entries = vec![FREE; n_entries as usize];
        let mut n_free = n_entries;
        let mut round = 0;
        while n_free > 0 {
            round += 1;
            for &idx in &order {
                let row = &mut rows[idx];
                if round * u64::from(backends[idx].1) < row.due {
                    continue;
                }
                row.due += heaviest;
                if n_free == 0 {
                    break;
                }
                let free = loop {
                    let at = row.offset.wrapping_add(row.next.wrapping_mul(row.step));
                    row.next += 1;
                    let entry = &mut entries[(at % u64::from(n_entries)) as usize];
                    if *entry == FREE {
                        break entry;
                    }
                };
                *free = idx as u16;
                n_free -= 1;
            }
        }
        let word = |four: &[u16]| {
            four.iter().rev().fold(0, |word: u64, &entry| word << 16 | u64::from(entry))
        };
        entries.chunks(MAGLEV_ENTRIES_PER_SLOT as usize).map(word).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::vec::Vec;

    use super::*;

    /// Backends of these weights, whose numbers have nothing to do with their order.
    fn backends(weights: impl IntoIterator<Item = u16>) -> Vec<(u64, u16)> {
        (1u64..).zip(weights).map(|(n, weight)| (mix(n * 0x1234_5677), weight)).collect()
    }

    /// The backends' numbers, entry by entry.
    fn entries(backends: &[(u64, u16)]) -> Vec<u64> {
        let words = maglev_table(backends);
        let n_slots = backends.len() as u32;
        assert_eq!(words.len() as u32, maglev_slots(n_slots));
        let number = |entry: u32| {
            let word = words[(entry / MAGLEV_ENTRIES_PER_SLOT) as usize];
            backends[maglev_entry_of(word, entry) as usize].0
        };
        (0..maglev_entries(n_slots)).map(number).collect()
    }

    /// The share of entries that changed and had no need to: neither do they lead to the backend that
    /// was added, nor did they lead to the one that was removed.
    fn needless(before: &[u64], after: &[u64], changed: u64) -> f64 {
        assert_eq!(before.len(), after.len());
        let pairs = before.iter().zip(after);
        let moved =
            pairs.filter(|(one, other)| one != other && ![**one, **other].contains(&changed));
        moved.count() as f64 / before.len() as f64
    }

    #[test]
    fn a_change_moves_at_most_two_percent_of_the_keys_without_need() {
        // The number of backends, and the share of keys in percent, at most, that move without need when
        // one backend is removed or added.
        let rows = [(2u16, 0.1), (3, 0.5), (5, 0.6), (10, 0.8), (32, 1.2), (100, 1.6), (128, 1.7)];
        let large = [(130, 0.8), (500, 1.0), (1_000, 0.7), (4_096, 2.0)];
        for (n, percent) in rows.into_iter().chain(large) {
            let backends = backends((0..n).map(|_| 1));
            let all = entries(&backends);
            for idx in [0, n / 2] {
                let mut fewer = backends.clone();
                let (changed, _) = fewer.remove(idx.into());
                let fewer = entries(&fewer);
                // Which are the same both ways.
                let moved = needless(&all, &fewer, changed) * 100.0;
                std::println!("{n} {moved:.3}");
                assert!(moved <= percent, "{moved}% of {n} backends");
            }
        }
    }

    #[test]
    fn a_change_of_one_weight_moves_what_the_shares_ask_for() {
        let before = backends((0..20).map(|_| 10));
        let mut after = before.clone();
        after[7].1 = 5;
        let (one, other) = (entries(&before), entries(&after));
        let n_moved = one.iter().zip(&other).filter(|(one, other)| one != other).count();
        // From 10/200 to 5/195: 2.4% have to move.
        let moved = n_moved as f64 / one.len() as f64 * 100.0;
        assert!((2.4..4.4).contains(&moved), "{moved}%");
    }

    #[test]
    fn shares_follow_weights() {
        // Weights, and by how many entries a share may differ from what is due.
        let rows: [(Vec<u16>, f64); 5] = [
            ((0..10).map(|_| 1).collect(), 1.0),
            ((1..=100).collect(), 2.0),
            (Vec::from([1, 65_535]), 1.0),
            ((0..1_000).map(|n| 1 + n % 7).collect(), 2.0),
            ((0..4_096).map(|_| 3).collect(), 1.0),
        ];
        for (weights, error) in rows {
            let backends = backends(weights);
            let entries = entries(&backends);
            let mut n_entries = BTreeMap::<u64, u32>::new();
            entries.iter().for_each(|&number| *n_entries.entry(number).or_default() += 1);
            let sum: f64 = backends.iter().map(|&(_, weight)| f64::from(weight)).sum();
            for &(number, weight) in &backends {
                let due = entries.len() as f64 * f64::from(weight) / sum;
                let has = f64::from(n_entries.get(&number).copied().unwrap_or(0));
                assert!((has - due).abs() <= error, "{has} for {due}");
                assert!(has > 0.0);
            }
        }
    }

    #[test]
    fn the_order_of_slots_makes_no_difference() {
        let some = backends([1, 2, 3, 4, 5]);
        let reversed: Vec<_> = some.iter().rev().copied().collect();
        assert_eq!(entries(&some), entries(&reversed));
    }

    #[test]
    fn keys_that_follow_each_other_are_spread() {
        let n_slots = 10;
        let mut n_keys = [0u32; 16];
        for key in 0..16_000 {
            n_keys[(maglev_entry(key_hash(key, 0), n_slots) >> 10) as usize] += 1;
        }
        assert!(n_keys.iter().all(|n| (900..1_100).contains(n)), "{n_keys:?}");
        assert_eq!(maglev_entry(u32::MAX, n_slots), SMALL_TABLE - 1);
        assert_eq!(maglev_entry(u32::MAX, 129), LARGE_TABLE - 1);
        assert_ne!(key_hash(7, 0), key_hash(7, 1));
    }

    #[test]
    fn an_entry_is_a_quarter_of_a_word() {
        let word = 0x0003_0002_0001_0000;
        assert_eq!([4, 5, 6, 7].map(|entry| maglev_entry_of(word, entry)), [0, 1, 2, 3]);
    }

    #[test]
    fn none_gives_none() {
        assert!(maglev_table(&[]).is_empty());
        assert_eq!(maglev_slots(0), 0);
    }
}

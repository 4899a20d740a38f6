//! Alias tables: a choice by weight in constant time.
//!
//! The method is Walker's ("An efficient method for generating discrete random variables with
//! general distributions", 1977) in the linear form of Vose (1991), in integers.

use std::vec::Vec;

use crate::Slot;

/// The alias table for `backends`, pairs of an index into `BACKENDS` and a weight of at least 1.
///
/// Each backend's share of all choices is its share of the weights, to within 1/65536 of a column,
/// and never nothing. There are as many slots as backends.
pub fn alias_table(backends: &[(u32, u16)]) -> Vec<Slot> {
    let n = backends.len() as u64;
    let sum: u64 = backends.iter().map(|&(_, weight)| u64::from(weight)).sum();
    // A column holds `sum`; a backend brings `weight * n`, so that all columns come out full.
    let mut rest: Vec<u64> = backends.iter().map(|&(_, weight)| u64::from(weight) * n).collect();
    let mut slots: Vec<Slot> = (0..)
        .zip(backends)
        .map(|(own, &(backend, _))| Slot { backend, alias: own, threshold: u16::MAX })
        .collect();
    let (mut small, mut large): (Vec<usize>, Vec<usize>) =
        (0..slots.len()).partition(|&slot_idx| rest[slot_idx] < sum);
    while let (Some(&giver), Some(taker)) = (large.last(), small.pop()) {
        slots[taker].alias = giver as u16;
        slots[taker].threshold = ((rest[taker] * 65_536 / sum) as u16).max(1);
        rest[giver] -= sum - rest[taker];
        if rest[giver] < sum {
            large.pop();
            small.push(giver);
        }
    }
    slots
}

#[cfg(test)]
mod tests {
    use std::vec;

    use proptest::prelude::*;

    use super::*;
    use crate::{MAX_SERVICE_BACKENDS, select};

    /// Each backend's share of the choices, exactly: a column is 1/n, a side of it its threshold.
    fn shares(slots: &[Slot]) -> Vec<f64> {
        let mut shares = vec![0.0; slots.len()];
        for (slot_idx, slot) in slots.iter().enumerate() {
            let own = f64::from(slot.threshold) / 65_536.0;
            shares[slot_idx] += own;
            shares[usize::from(slot.alias)] += 1.0 - own;
        }
        shares.iter().map(|share| share / slots.len() as f64).collect()
    }

    proptest! {
        #[test]
        fn shares_follow_weights(weights in prop::collection::vec(1u16.., 1..200)) {
            let backends: Vec<_> = (0u32..).zip(weights.iter().copied()).collect();
            let sum: f64 = weights.iter().map(|&weight| f64::from(weight)).sum();
            for (weight, share) in weights.iter().zip(shares(&alias_table(&backends))) {
                let expected = f64::from(*weight) / sum;
                prop_assert!(share > 0.0);
                prop_assert!((share - expected).abs() < 1.0 / 65_536.0, "{share} for {expected}");
            }
        }
    }

    #[test]
    fn none_gives_none() {
        assert!(alias_table(&[]).is_empty());
    }

    #[test]
    fn the_largest_service_is_spread_evenly() {
        let backends: Vec<_> = (0..MAX_SERVICE_BACKENDS).map(|backend| (backend, 1)).collect();
        let slots = alias_table(&backends);
        let mut chosen = vec![0u32; backends.len()];
        for random in (0..=u32::MAX).step_by(1 << 14) {
            let slot = |index: u32| slots.get(index as usize).copied();
            chosen[select(random, slots.len() as u32, slot).unwrap() as usize] += 1;
        }
        assert!(chosen.iter().all(|&times| times == 64), "{chosen:?}");
    }
}

//! Medians, spreads and ratios of what was measured round by round.

use serde::Serialize;

/// A median with the least and the most beside it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// The median: of an even number, the mean of the middle two.
    pub median: f64,
    /// The least.
    pub least: f64,
    /// The most.
    pub most: f64,
}

impl Spread {
    /// Of these; `None` where there are none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Spread> {
        let mut sorted: Vec<f64> = values.into_iter().filter(|value| !value.is_nan()).collect();
        sorted.sort_by(f64::total_cmp);
        let (least, most) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median = if sorted.len().is_multiple_of(2) {
            f64::midpoint(sorted[middle - 1], sorted[middle])
        } else {
            sorted[middle]
        };
        Some(Spread { median, least, most })
    }

    /// Whether it can be drawn: a ratio or a rate may be infinite.
    pub fn is_finite(&self) -> bool {
        [self.median, self.least, self.most].iter().all(|value| value.is_finite())
    }

    /// Of the ratios of `these` to `those`, round by round: what the machine did to both in one round
    /// cancels out. Rounds that either lacks don't count.
    pub fn of_ratios(these: &[Option<f64>], those: &[Option<f64>]) -> Option<Spread> {
        let pairs = these.iter().zip(those).filter_map(|(this, that)| Some(((*this)?, (*that)?)));
        Spread::of(pairs.filter(|(_, that)| *that != 0.0).map(|(this, that)| this / that))
    }
}

/// The value that so large a part of the others doesn't exceed, by the nearest rank; NaN of none.
pub fn quantile(values: &[f64], part: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (part * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads() {
        let spread = |values: &[f64]| Spread::of(values.iter().copied());
        let found = |median, least, most| Some(Spread { median, least, most });
        for (values, expected) in [
            (&[][..], None),
            (&[f64::NAN], None),
            (&[3.0], found(3.0, 3.0, 3.0)),
            (&[4.0, 1.0], found(2.5, 1.0, 4.0)),
            (&[9.0, 1.0, 2.0], found(2.0, 1.0, 9.0)),
        ] {
            assert_eq!(spread(values), expected, "{values:?}");
        }
    }

    #[test]
    fn ratios_are_taken_round_by_round() {
        let these = [Some(2.0), Some(30.0), None, Some(8.0)];
        let those = [Some(1.0), Some(10.0), Some(5.0), Some(0.0)];
        let expected = Some(Spread { median: 2.5, least: 2.0, most: 3.0 });
        assert_eq!(Spread::of_ratios(&these, &those), expected);
    }

    #[test]
    fn quantiles_by_the_nearest_rank() {
        let values: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!([0.5, 0.99, 1.0].map(|part| quantile(&values, part)), [50.0, 99.0, 100.0]);
        assert!(quantile(&[], 0.5).is_nan());
    }
}

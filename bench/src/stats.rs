//! Medians, spreads and ratios of the rounds' values.

use serde::Serialize;

/// A median, with the minimum and maximum.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// The median: of an even number, the mean of the middle two.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The most.
    pub max: f64,
}

impl Spread {
    /// Of these; `None` where there are none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Spread> {
        let mut sorted: Vec<f64> = values.into_iter().filter(|value| !value.is_nan()).collect();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        Some(Spread { median: middle(&sorted), min, max })
    }

    /// Whether it can be drawn: a ratio or a rate may be infinite.
    pub fn is_finite(&self) -> bool {
        [self.median, self.min, self.max].iter().all(|value| value.is_finite())
    }

    /// Of the ratios of `these` to `those`, round by round: the machine's effect on both in one round
    /// cancels out. Rounds that either lacks are left out.
    pub fn of_ratios(these: &[Option<f64>], those: &[Option<f64>]) -> Option<Spread> {
        Spread::of(ratios(these, those))
    }
}

/// The fewest values whose median has a 95% interval: with five, all of them lie on one side of it in
/// 6% of cases.
pub const MIN_ROUNDS: usize = 6;

/// How often the bootstrap draws, and the seed of its draws: fixed, so that a report's samples give
/// the report's interval again.
const N_RESAMPLES: usize = 4_000;
const SEED: u64 = 95;

/// A median, and the interval that covers the true one in 95% of cases.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Interval {
    /// The values' median.
    pub median: f64,
    /// The interval's lower end.
    pub low: f64,
    /// The interval's upper end.
    pub high: f64,
}

impl Interval {
    /// By the bootstrap's percentiles (Efron 1979): the median of as many values, drawn from these
    /// with replacement, many times. `None` of fewer than [`MIN_ROUNDS`] values, which have none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Interval> {
        let mut sorted: Vec<f64> = values.into_iter().filter(|value| !value.is_nan()).collect();
        if sorted.len() < MIN_ROUNDS {
            return None;
        }
        sorted.sort_by(f64::total_cmp);
        let mut random = fastrand::Rng::with_seed(SEED);
        let mut drawn = vec![0_usize; sorted.len()];
        let mut medians: Vec<f64> = (0..N_RESAMPLES)
            .map(|_| {
                drawn.fill_with(|| random.usize(..sorted.len()));
                let (lower, upper) = ((drawn.len() - 1) / 2, drawn.len() / 2);
                let (_, upper, _) = drawn.select_nth_unstable(upper);
                let upper = *upper;
                let (_, lower, _) = drawn.select_nth_unstable(lower);
                f64::midpoint(sorted[*lower], sorted[upper])
            })
            .collect();
        medians.sort_by(f64::total_cmp);
        let percentile = |part: f64| medians[(part * (N_RESAMPLES - 1) as f64).round() as usize];
        let (low, high) = (percentile(0.025), percentile(0.975));
        Some(Interval { median: middle(&sorted), low, high })
    }

    /// Of a deterministic count: it is its own interval.
    pub fn exact(value: f64) -> Interval {
        Interval { median: value, low: value, high: value }
    }

    /// Whether a value lies within.
    pub fn has(&self, value: f64) -> bool {
        self.low <= value && value <= self.high
    }
}

/// The ratios of the rounds that both have.
pub fn ratios(these: &[Option<f64>], those: &[Option<f64>]) -> impl Iterator<Item = f64> {
    let pairs = these.iter().zip(those).filter_map(|(this, that)| Some(((*this)?, (*that)?)));
    pairs.filter(|(_, that)| *that != 0.0).map(|(this, that)| this / that)
}

/// The median of sorted values, one at least: of an even number, the mean of the middle two.
fn middle(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    if sorted.len().is_multiple_of(2) {
        f64::midpoint(sorted[middle - 1], sorted[middle])
    } else {
        sorted[middle]
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
        let found = |median, min, max| Some(Spread { median, min, max });
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
        let expected = Some(Spread { median: 2.5, min: 2.0, max: 3.0 });
        assert_eq!(Spread::of_ratios(&these, &those), expected);
    }

    #[test]
    fn few_values_have_no_interval() {
        assert_eq!(Interval::of((1..6).map(f64::from)), None);
        assert_eq!(Interval::of([f64::NAN; 20]), None);
        let same = Interval::of([2.0; 6]);
        assert_eq!(same, Some(Interval { median: 2.0, low: 2.0, high: 2.0 }));
        let again = || Interval::of((0..30).map(f64::from));
        assert_eq!(again(), again());
    }

    /// Of many samples of a distribution whose median is known, 95 of 100 intervals have it; and
    /// they get narrower with more values, by the root of their number.
    #[test]
    fn intervals_cover_the_true_median() {
        let mut random = fastrand::Rng::with_seed(1);
        // exp of a sum of uniform numbers around 0: skewed, as times are; its median is 1.
        let mut draw = move || -> f64 {
            let uniform = (0..4).map(|_| random.f64() - 0.5);
            (uniform.sum::<f64>() * 0.3).exp()
        };
        let mut widths = Vec::new();
        for n_values in [10, 40] {
            let mut n_covered = 0;
            let mut width = 0.0;
            for _ in 0..100 {
                let values: Vec<f64> = (0..n_values).map(|_| draw()).collect();
                let interval = Interval::of(values).expect("values enough");
                n_covered += u32::from(interval.has(1.0));
                width += interval.high - interval.low;
            }
            // Binomial, 95 expected: three standard deviations below.
            assert!((88..=100).contains(&n_covered), "{n_values} values: {n_covered} of 100");
            widths.push(width);
        }
        assert!((1.6..2.6).contains(&(widths[0] / widths[1])), "{widths:?}");
    }

    #[test]
    fn quantiles_by_the_nearest_rank() {
        let values: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!([0.5, 0.99, 1.0].map(|part| quantile(&values, part)), [50.0, 99.0, 100.0]);
        assert!(quantile(&[], 0.5).is_nan());
    }
}

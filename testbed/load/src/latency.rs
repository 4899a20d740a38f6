//! Histograms of times.

use anyhow::Context;
use hdrhistogram::Histogram;
use serde_json::{Map, Value};

/// The longest distinguished latency, in nanoseconds: a minute.
const MOST_NS: u64 = 60_000_000_000;

/// Decimal digits that are distinguished.
const DIGITS: u8 = 3;

/// Times, kept in nanoseconds with three digits, up to a minute.
pub struct Latency(Histogram<u64>);

impl Latency {
    /// Of times that matter from a microsecond on.
    ///
    /// # Errors
    /// Never with these bounds.
    pub fn coarse() -> anyhow::Result<Latency> {
        Self::from(1000)
    }

    /// Of times that matter from a nanosecond on.
    ///
    /// # Errors
    /// Never with these bounds.
    pub fn fine() -> anyhow::Result<Latency> {
        Self::from(1)
    }

    fn from(least_ns: u64) -> anyhow::Result<Latency> {
        let histogram = Histogram::new_with_bounds(least_ns, MOST_NS, DIGITS);
        histogram.map(Latency).context("bounds of a histogram")
    }

    /// Counts one time.
    pub fn record(&mut self, ns: u64) {
        self.0.saturating_record(ns);
    }

    /// Counts all times of another one with the same bounds.
    pub fn add(&mut self, other: &Latency) {
        // Both have the same bounds, so none of its values is out of them.
        let _ = self.0.add(&other.0);
    }

    /// In microseconds: `mean`, `p50`, `p90`, `p99`, `p999`, `max`; each null where nothing was counted.
    pub fn to_json_us(&self) -> Value {
        self.to_json(
            1000.0,
            &[("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p999", 0.999), ("max", 1.0)],
        )
    }

    /// In nanoseconds: `mean`, `p50`, `p99`; each null where nothing was counted.
    pub fn to_json_ns(&self) -> Value {
        self.to_json(1.0, &[("p50", 0.5), ("p99", 0.99)])
    }

    fn to_json(&self, unit_ns: f64, quantiles: &[(&str, f64)]) -> Value {
        let in_unit = |ns: f64| {
            if self.0.is_empty() { Value::Null } else { Value::from(ns / unit_ns) }
        };
        let mut times = Map::from_iter([("mean".to_owned(), in_unit(self.0.mean()))]);
        for (name, quantile) in quantiles {
            times.insert((*name).to_owned(), in_unit(self.0.value_at_quantile(*quantile) as f64));
        }
        times.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Within a thousandth.
    fn is_near(value: &Value, expected: f64) -> bool {
        value.as_f64().is_some_and(|value| (value / expected - 1.0).abs() < 0.002)
    }

    #[test]
    fn times_are_reported_in_their_unit() {
        let mut latency = Latency::coarse().unwrap();
        (1..=1000).for_each(|us| latency.record(us * 1000));
        let us = latency.to_json_us();
        let table = [
            ("mean", 500.5),
            ("p50", 500.0),
            ("p90", 900.0),
            ("p99", 990.0),
            ("p999", 999.0),
            ("max", 1000.0),
        ];
        for (name, expected) in table {
            assert!(is_near(&us[name], expected), "{name}: {us}");
        }
        assert!(is_near(&latency.to_json_ns()["p99"], 990_000.0));
    }

    #[test]
    fn of_nothing_there_is_no_time() {
        assert_eq!(Latency::fine().unwrap().to_json_ns()["p50"], Value::Null);
    }
}

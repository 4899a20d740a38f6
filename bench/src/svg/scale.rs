//! From values to places, and which values an axis names.

/// Places labels as near to where they are wanted as they can be with a gap between each two, in their
/// order, between low and high; where they don't all fit, they share the room evenly.
pub fn settle(wanted: &[f64], gap: f64, low: f64, high: f64) -> Vec<f64> {
    let mut order: Vec<usize> = (0..wanted.len()).collect();
    order.sort_by(|a, b| wanted[*a].total_cmp(&wanted[*b]));
    let n_gaps = wanted.len().saturating_sub(1) as f64;
    let gap = if n_gaps > 0.0 { gap.min((high - low) / n_gaps) } else { gap };

    // Clusters of labels that touch: how many, and the sum of where their first one would be.
    let mut clusters: Vec<(usize, f64)> = vec![];
    let first = |(n, sum): (usize, f64)| {
        (sum / n as f64).clamp(low, (high - gap * (n - 1) as f64).max(low))
    };
    for idx in &order {
        let mut last = (1, wanted[*idx]);
        while let Some(before) = clusters.pop() {
            if first(before) + gap * before.0 as f64 <= first(last) {
                clusters.push(before);
                break;
            }
            // Each of the later cluster stands so much further from the first of both.
            last = (before.0 + last.0, before.1 + last.1 - gap * (before.0 * last.0) as f64);
        }
        clusters.push(last);
    }

    let places = clusters.iter().flat_map(|cluster| {
        let first = first(*cluster);
        (0..cluster.0).map(move |n| first + gap * n as f64)
    });
    let mut settled = vec![0.0; wanted.len()];
    for (idx, place) in order.iter().zip(places) {
        settled[*idx] = place;
    }
    settled
}

/// Round values from about low to about high, which lie within the first and the last.
pub fn ticks(low: f64, high: f64) -> Vec<f64> {
    let about = (high - low) / 5.0;
    if !about.is_finite() || about <= 0.0 {
        return vec![low, low + 1.0];
    }
    let decade = 10_f64.powf(about.log10().floor());
    let steps = [1.0, 2.0, 2.5, 5.0, 10.0].map(|step| step * decade);
    let step = steps.into_iter().find(|step| *step >= about * 0.999).unwrap_or(about);
    let (first, last) = ((low / step).floor() as i64, (high / step - 1e-9).ceil() as i64);
    (first..=last).map(|n| n as f64 * step).collect()
}

/// Round values for a logarithmic axis: 1, 2 and 5 of each decade, or 1 alone where there are many.
pub fn log_ticks(low: f64, high: f64) -> Vec<f64> {
    let decades = (low.log10().floor() as i32, high.log10().ceil() as i32);
    let steps: &[f64] = if high / low > 300.0 { &[1.0] } else { &[1.0, 2.0, 5.0] };
    let all: Vec<f64> = (decades.0..=decades.1)
        .flat_map(|decade| steps.iter().map(move |step| step * 10_f64.powi(decade)))
        .collect();
    // Just what low and high lie within.
    let first = all.iter().rposition(|tick| *tick <= low * 1.0001).unwrap_or(0);
    let last = all.iter().position(|tick| *tick >= high * 0.9999).unwrap_or(all.len() - 1);
    all[first..=last].to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_settle() {
        for (wanted, expected) in [
            (&[][..], &[][..]),
            (&[50.0], &[50.0]),
            // Off the edge.
            (&[-5.0], &[0.0]),
            (&[105.0], &[100.0]),
            // Far enough apart.
            (&[80.0, 10.0], &[80.0, 10.0]),
            // Too near: each gives way by half.
            (&[50.0, 54.0], &[47.0, 57.0]),
            (&[54.0, 50.0], &[57.0, 47.0]),
            (&[50.0, 50.0, 50.0], &[40.0, 50.0, 60.0]),
            // A cluster that meets another, and the edge.
            (&[50.0, 52.0, 58.0], &[43.333, 53.333, 63.333]),
            (&[99.0, 100.0], &[90.0, 100.0]),
            (&[0.0, 0.0, 15.0], &[0.0, 10.0, 20.0]),
        ] {
            let settled = settle(wanted, 10.0, 0.0, 100.0);
            let is_near = settled.len() == expected.len()
                && settled.iter().zip(expected).all(|(is, expected)| (is - expected).abs() < 0.01);
            assert!(is_near, "{wanted:?}: {settled:?}, not {expected:?}");
        }
        // More than there is room for.
        assert_eq!(settle(&[5.0, 5.0, 5.0], 10.0, 0.0, 10.0), [0.0, 5.0, 10.0]);
    }

    #[test]
    fn round_ticks() {
        assert_eq!(ticks(0.0, 100.0), [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]);
        assert_eq!(ticks(0.0, 123.0), [0.0, 25.0, 50.0, 75.0, 100.0, 125.0]);
        assert_eq!(ticks(-3.0, 7.0), [-4.0, -2.0, 0.0, 2.0, 4.0, 6.0, 8.0]);
        assert_eq!(ticks(0.0, 0.0), [0.0, 1.0]);
    }

    #[test]
    fn logarithmic_ticks() {
        assert_eq!(log_ticks(3.0, 80.0), [2.0, 5.0, 10.0, 20.0, 50.0, 100.0]);
        assert_eq!(log_ticks(1.0, 10_000.0), [1.0, 10.0, 100.0, 1000.0, 10_000.0]);
        assert_eq!(log_ticks(30.0, 30_000.0), [10.0, 100.0, 1000.0, 10_000.0, 100_000.0]);
    }
}

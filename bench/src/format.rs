//! Numbers as people read them: three significant digits and a prefix.

/// The text in the place of a missing number.
pub const NONE: &str = "–";

/// Units of one kind, least first, and how many of the first each is.
const LADDERS: [&[(&str, f64)]; 2] = [
    &[("ns", 1.0), ("us", 1e3), ("ms", 1e6), ("s", 1e9)],
    &[("B", 1.0), ("KiB", 1024.0), ("MiB", 1048576.0), ("GiB", 1073741824.0)],
];

/// A measured value with three significant digits, in the unit of its kind that suits it: `1.23 ms`
/// of 1230 us. Units that have no such ladder are not written, as in `121k`, but for `%`.
pub fn humane(value: f64, unit: &str) -> String {
    let (number, unit) = split(value, unit);
    format!("{number}{unit}")
}

/// From one value to another, the unit once where it is the same: `820–840 us`.
pub fn range(min: f64, max: f64, unit: &str) -> String {
    let (min, min_unit) = split(min, unit);
    let (max, max_unit) = split(max, unit);
    let min_unit = if min_unit == max_unit { "" } else { &min_unit };
    // Not the unreadable `-5–-3`.
    let dash = if max.starts_with('-') { " to " } else { "–" };
    format!("{min}{min_unit}{dash}{max}{max_unit}")
}

/// A ratio: two decimals around one, three significant digits elsewhere.
pub fn ratio(ratio: f64) -> String {
    match ratio.abs() {
        0.1..9.995 => format!("{ratio:.2}"),
        _ => significant(ratio),
    }
}

/// An exact value, as on an axis: `10k`, `2.5k`, `1`.
pub fn count(value: f64) -> String {
    let text = significant(value);
    let n_digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic()).len();
    let (digits, prefix) = text.split_at(n_digits);
    if digits.contains('.') {
        let digits = digits.trim_end_matches('0').trim_end_matches('.');
        return format!("{digits}{prefix}");
    }
    text
}

/// An exact value with its unit, as on an axis.
pub fn tick(value: f64, unit: &str) -> String {
    let (value, unit) = rescale(value, unit);
    if value == 0.0 { "0".to_owned() } else { format!("{}{unit}", count(value)) }
}

/// The number and the unit behind it, with its space.
fn split(value: f64, unit: &str) -> (String, String) {
    let (value, unit) = rescale(value, unit);
    (significant(value), if value.is_finite() { unit } else { String::new() })
}

/// The value in the greatest unit of its kind that leaves at least one of it.
fn rescale(value: f64, unit: &str) -> (f64, String) {
    let ladder = LADDERS.iter().find(|ladder| ladder.iter().any(|(step, _)| *step == unit));
    let Some(ladder) = ladder else {
        let is_percent = unit == "%" && value.is_finite();
        return (value, if is_percent { "%".to_owned() } else { String::new() });
    };
    let own = ladder.iter().find(|(step, _)| *step == unit).map_or(1.0, |(_, size)| *size);
    let first = value * own;
    // 999.7 us reads 1.00 ms, as three digits round it.
    let fitting = ladder.iter().rev().find(|(_, size)| first.abs() >= size * 0.9995);
    let zero_or_less = (unit, own);
    let (step, size) = match fitting {
        Some((step, size)) => (*step, *size),
        None if first == 0.0 => zero_or_less,
        None => ladder[0],
    };
    (first / size, format!(" {step}"))
}

fn significant(value: f64) -> String {
    if !value.is_finite() {
        return NONE.to_owned();
    }
    let (prefix, size) = match value.abs() {
        999.5e6.. => ("G", 1e9),
        999.5e3.. => ("M", 1e6),
        999.5.. => ("k", 1e3),
        _ => ("", 1.0),
    };
    let scaled = value / size;
    if prefix.is_empty() && scaled.fract() == 0.0 {
        return format!("{}", scaled.abs().copysign(if scaled == 0.0 { 1.0 } else { scaled }));
    }
    let magnitude = scaled.abs();
    if magnitude < 5e-5 {
        return format!("{scaled:.0e}");
    }
    let n_decimals = match magnitude {
        99.95.. => 0,
        9.995.. => 1,
        0.9995.. => 2,
        0.09995.. => 3,
        _ => 4,
    };
    format!("{scaled:.n_decimals$}{prefix}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits_and_a_prefix() {
        for (value, unit, expected) in [
            (121_234.0, "requests/s", "121k"),
            (1_234_567.0, "requests/s", "1.23M"),
            (999.4, "", "999"),
            (999.6, "", "1.00k"),
            (999_600.0, "", "1.00M"),
            (2.5e9, "", "2.50G"),
            (32.0, "", "32"),
            (45.678, "", "45.7"),
            (4.567, "", "4.57"),
            (0.4567, "", "0.457"),
            (0.001234, "", "0.0012"),
            (0.00000123, "", "1e-6"),
            (0.0, "", "0"),
            (-0.0, "", "0"),
            (-5.25, "%", "-5.25%"),
            (12.34, "%", "12.3%"),
            (850.0, "us", "850 us"),
            (1234.0, "us", "1.23 ms"),
            (999.7, "us", "1.00 ms"),
            (0.25, "us", "250 ns"),
            (0.0, "us", "0 us"),
            (0.25, "ns", "0.250 ns"),
            (90_000.0, "ms", "90 s"),
            (1536.0, "KiB", "1.50 MiB"),
            (3e13, "B", "27.9k GiB"),
            (f64::NAN, "us", "–"),
            (f64::INFINITY, "", "–"),
        ] {
            assert_eq!(humane(value, unit), expected, "{value} {unit}");
        }
    }

    #[test]
    fn exact_values_have_no_idle_zeros() {
        for (value, unit, expected) in [
            (1.0, "", "1"),
            (100.0, "", "100"),
            (1000.0, "", "1k"),
            (2500.0, "", "2.5k"),
            (100_000.0, "", "100k"),
            (0.5, "", "0.5"),
            (0.0, "us", "0"),
            (1500.0, "us", "1.5 ms"),
            (50.0, "%", "50%"),
        ] {
            assert_eq!(tick(value, unit), expected, "{value} {unit}");
        }
    }

    #[test]
    fn ratios_and_ranges() {
        for (value, expected) in [
            (0.99, "0.99"),
            (1.0, "1.00"),
            (0.0123, "0.0123"),
            (9.999, "10.0"),
            (12.34, "12.3"),
            (1234.0, "1.23k"),
            (f64::NAN, "–"),
        ] {
            assert_eq!(ratio(value), expected, "{value}");
        }
        for (min, max, unit, expected) in [
            (820.0, 840.0, "us", "820–840 us"),
            (820.0, 1100.0, "us", "820 us–1.10 ms"),
            (118e3, 125e3, "requests/s", "118k–125k"),
            (-5.0, -3.0, "%", "-5 to -3%"),
        ] {
            assert_eq!(range(min, max, unit), expected);
        }
    }
}

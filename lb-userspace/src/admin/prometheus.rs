//! Metrics as text, in the format that Prometheus calls 0.0.4.
//!
//! The libraries for this keep registries of live counters. Here most counters are in the kernel's
//! maps, so encoding them is all there is to do.

use std::fmt::{Display, Write};

/// The media type of the format.
pub const MEDIA_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// The type of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricType {
    /// It only grows, but for restarts.
    Counter,
    /// It goes up and down.
    Gauge,
}

/// A text that grows family by family.
#[derive(Debug, Default)]
pub struct Exposition(String);

/// The samples of a family, all of one name.
#[derive(Debug)]
pub struct MetricFamily<'a> {
    text: &'a mut String,
    name: &'static str,
}

/// The observations of a histogram.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Histogram {
    /// The upper end of each bucket, growing, with the observations in it alone.
    pub buckets: Vec<(f64, u64)>,
    /// The observations above the last bucket.
    pub above: u64,
    /// The sum of all observations.
    pub sum: f64,
}

impl Histogram {
    /// No observations yet, in buckets up to these ends.
    pub fn new(ends: &[f64]) -> Histogram {
        Histogram { buckets: ends.iter().map(|end| (*end, 0)).collect(), above: 0, sum: 0.0 }
    }

    /// Counts an observation.
    pub fn observe(&mut self, value: f64) {
        let bucket = self.buckets.iter_mut().find(|(end, _)| value <= *end);
        *bucket.map_or(&mut self.above, |(_, n)| n) += 1;
        self.sum += value;
    }
}

impl Exposition {
    /// Begins a family. Its name and help are written even without samples, so that a metric without
    /// events can be distinguished from a misspelt one.
    pub fn family(&mut self, name: &'static str, kind: MetricType, help: &str) -> MetricFamily<'_> {
        let kind = match kind {
            MetricType::Counter => "counter",
            MetricType::Gauge => "gauge",
        };
        self.head(name, kind, help);
        MetricFamily { text: &mut self.0, name }
    }

    /// A family of one sample without labels.
    pub fn single(
        &mut self,
        name: &'static str,
        kind: MetricType,
        help: &str,
        value: impl Display,
    ) {
        self.family(name, kind, help).sample(&[], value);
    }

    /// A histogram without labels.
    pub fn histogram(&mut self, name: &'static str, help: &str, histogram: &Histogram) {
        self.head(name, "histogram", help);
        self.buckets(name, "", histogram);
    }

    /// A histogram for each value of `label`; the values need no escapes.
    pub fn histograms(
        &mut self,
        name: &'static str,
        help: &str,
        label: &str,
        histograms: &[(&str, Histogram)],
    ) {
        self.head(name, "histogram", help);
        for (value, histogram) in histograms {
            self.buckets(name, &format!("{label}=\"{value}\""), histogram);
        }
    }

    fn buckets(&mut self, name: &str, label: &str, histogram: &Histogram) {
        let (comma, labels) = match label.is_empty() {
            true => ("", String::new()),
            false => (",", format!("{{{label}}}")),
        };
        let mut n = 0;
        for (upper, n_inside) in &histogram.buckets {
            n += n_inside;
            line(&mut self.0, format_args!("{name}_bucket{{{label}{comma}le=\"{upper}\"}} {n}"));
        }
        n += histogram.above;
        line(&mut self.0, format_args!("{name}_bucket{{{label}{comma}le=\"+Inf\"}} {n}"));
        line(&mut self.0, format_args!("{name}_sum{labels} {}", histogram.sum));
        line(&mut self.0, format_args!("{name}_count{labels} {n}"));
    }

    /// The text.
    pub fn finish(self) -> String {
        self.0
    }

    fn head(&mut self, name: &str, kind: &str, help: &str) {
        let help = help.replace('\\', r"\\").replace('\n', r"\n");
        line(&mut self.0, format_args!("# HELP {name} {help}"));
        line(&mut self.0, format_args!("# TYPE {name} {kind}"));
    }
}

impl MetricFamily<'_> {
    /// Adds a sample; its labels have to differ from those of the others.
    pub fn sample(&mut self, labels: &[(&str, &str)], value: impl Display) {
        self.text.push_str(self.name);
        for (nth, (label, text)) in labels.iter().enumerate() {
            self.text.push(if nth == 0 { '{' } else { ',' });
            self.text.push_str(label);
            self.text.push_str("=\"");
            for character in text.chars() {
                match character {
                    '\\' => self.text.push_str(r"\\"),
                    '"' => self.text.push_str("\\\""),
                    '\n' => self.text.push_str(r"\n"),
                    other => self.text.push(other),
                }
            }
            self.text.push('"');
        }
        let end = if labels.is_empty() { "" } else { "}" };
        line(self.text, format_args!("{end} {value}"));
    }
}

fn line(text: &mut String, line: std::fmt::Arguments<'_>) {
    // Writing to a string can't fail.
    let _ = writeln!(text, "{line}");
}

#[cfg(test)]
pub mod strict {
    //! A reader of the format that lets nothing pass, for tests.

    use std::collections::{BTreeMap, BTreeSet};

    /// The samples, by name and labels as they are written.
    pub type Samples = BTreeMap<String, f64>;

    /// Reads a text, or says what is wrong with it: a family without or with two heads, one in two
    /// parts, a sample of another family or there twice, what isn't a name, a label or a number, and
    /// a histogram that shrinks or doesn't add up.
    pub fn read(text: &str) -> Result<Samples, String> {
        let mut samples = Samples::new();
        let mut families = BTreeSet::new();
        let mut family: Option<(String, String)> = None;
        let mut helped = None;
        let mut bucket = 0.0;
        if !text.ends_with('\n') {
            return Err("the last line doesn't end".into());
        }
        for line in text.lines() {
            let wrong = |what: &str| format!("{what}: {line}");
            if let Some(help) = line.strip_prefix("# HELP ") {
                let (name, help) = help.split_once(' ').ok_or(wrong("no help"))?;
                if !is_name(name) || help.is_empty() || !families.insert(name.to_owned()) {
                    return Err(wrong("a head that isn't one, or is there twice"));
                }
                helped = Some(name.to_owned());
                continue;
            }
            if let Some(kind) = line.strip_prefix("# TYPE ") {
                let (name, kind) = kind.split_once(' ').ok_or(wrong("no type"))?;
                if helped.take().as_deref() != Some(name)
                    || !["counter", "gauge", "histogram"].contains(&kind)
                    || (kind == "counter") != name.ends_with("_total")
                {
                    return Err(wrong("a type that doesn't fit"));
                }
                family = Some((name.to_owned(), kind.to_owned()));
                bucket = 0.0;
                continue;
            }
            let (sample, value) = line.rsplit_once(' ').ok_or(wrong("no sample"))?;
            let value: f64 = value.parse().map_err(|_| wrong("no number"))?;
            let name = sample.split('{').next().unwrap_or_default();
            let (of, kind) = family.as_ref().ok_or(wrong("a sample without a head"))?;
            let part = name.strip_prefix(of.as_str()).ok_or(wrong("of another family"))?;
            let fits = match kind.as_str() {
                "histogram" => ["_bucket", "_sum", "_count"].contains(&part),
                "counter" => part.is_empty() && value >= 0.0,
                _ => part.is_empty(),
            };
            if !fits || !are_labels(&sample[name.len()..]) {
                return Err(wrong("malformed"));
            }
            if part == "_bucket" || part == "_count" {
                if value < bucket {
                    return Err(wrong("a histogram that shrinks"));
                }
                // After the count the next one of the family begins.
                bucket = if part == "_count" { 0.0 } else { value };
            }
            if samples.insert(sample.to_owned(), value).is_some() {
                return Err(wrong("there twice"));
            }
        }
        Ok(samples)
    }

    fn is_name(text: &str) -> bool {
        text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
            && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
    }

    /// Whether a text is `{name="value",…}` or nothing.
    fn are_labels(text: &str) -> bool {
        let Some(mut rest) = text.strip_prefix('{') else { return text.is_empty() };
        loop {
            let Some((name, after)) = rest.split_once("=\"") else { return false };
            if !is_name(name) {
                return false;
            }
            let mut chars = after.char_indices();
            let end = loop {
                match chars.next() {
                    Some((_, '\\')) => match chars.next() {
                        Some((_, '\\' | '"' | 'n')) => {}
                        _ => return false,
                    },
                    Some((at, '"')) => break at,
                    Some(_) => {}
                    None => return false,
                }
            };
            match &after[end + 1..] {
                "}" => return true,
                more => match more.strip_prefix(',') {
                    Some(more) => rest = more,
                    None => return false,
                },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_written_as_the_format_wants_them() {
        let mut exposition = Exposition::default();
        exposition.single("a_ready", MetricType::Gauge, "Whether\nit is \\ ready.", 1);
        let mut family = exposition.family("a_total", MetricType::Counter, "Some.");
        family.sample(&[("name", "a\"b\\c\nd"), ("more", "é}")], 3_u64);
        family.sample(&[("name", "x"), ("more", "")], 0.5);
        exposition.family("b_total", MetricType::Counter, "None yet.");
        let mut histogram = Histogram::new(&[0.0005, 0.25, 10.0]);
        [0.0005, 0.0, 0.5, 20.0].into_iter().for_each(|value| histogram.observe(value));
        exposition.histogram("c_seconds", "How long.", &histogram);
        let each = [("x", Histogram::new(&[1.0])), ("y", Histogram::new(&[1.0]))];
        exposition.histograms("d_seconds", "How long each.", "of", &each);
        let text = exposition.finish();
        let expected = r#"# HELP a_ready Whether\nit is \\ ready.
# TYPE a_ready gauge
a_ready 1
# HELP a_total Some.
# TYPE a_total counter
a_total{name="a\"b\\c\nd",more="é}"} 3
a_total{name="x",more=""} 0.5
# HELP b_total None yet.
# TYPE b_total counter
# HELP c_seconds How long.
# TYPE c_seconds histogram
c_seconds_bucket{le="0.0005"} 2
c_seconds_bucket{le="0.25"} 2
c_seconds_bucket{le="10"} 3
c_seconds_bucket{le="+Inf"} 4
c_seconds_sum 20.5005
c_seconds_count 4
# HELP d_seconds How long each.
# TYPE d_seconds histogram
d_seconds_bucket{of="x",le="1"} 0
d_seconds_bucket{of="x",le="+Inf"} 0
d_seconds_sum{of="x"} 0
d_seconds_count{of="x"} 0
d_seconds_bucket{of="y",le="1"} 0
d_seconds_bucket{of="y",le="+Inf"} 0
d_seconds_sum{of="y"} 0
d_seconds_count{of="y"} 0
"#;
        assert_eq!(text, expected);
        assert_eq!(strict::read(&text).unwrap().len(), 17);
    }

    #[test]
    fn the_strict_reader_is_strict() {
        let head = "# HELP a_total x\n# TYPE a_total counter\n";
        for bad in [
            "a_total 1\n",
            "# HELP a_total x\na_total 1\n",
            &format!("{head}{head}"),
            &format!("{head}a_total 1"),
            &format!("{head}a_total 1\na_total 1\n"),
            &format!("{head}a_total x\n"),
            &format!("{head}b_total 1\n"),
            &format!("{head}a_total{{x=\"\\d\"}} 1\n"),
            &format!("{head}a_total{{x=\"1\"y=\"2\"}} 1\n"),
            &format!("{head}a_total{{x=\"1\" 1\n"),
            "# HELP a x\n# TYPE a histogram\na_bucket{le=\"1\"} 2\na_bucket{le=\"+Inf\"} 1\n",
        ] {
            assert!(strict::read(bad).is_err(), "{bad}");
        }
    }
}

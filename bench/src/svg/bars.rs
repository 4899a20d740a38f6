//! Bars: a group for each condition, and in it a thin bar for each contender.

use super::canvas::{Anchor, Canvas, LABEL, LEFT, RIGHT, short, width, wrap};
use crate::format;
use crate::report::{Chart, Figure, Row};
use crate::stats::Spread;

/// From one bar to the next.
const PITCH: f64 = 18.0;
const THICKNESS: f64 = 10.0;
/// The widest that names may make their column.
const MAX_NAMES: f64 = 190.0;
/// Groups whose longest bars differ by more than this each have a scale of their own.
const MAX_APART: f64 = 12.0;
/// Whiskers end at this many times the greatest median: one wild round shall not flatten the rest.
const MAX_WHISKER: f64 = 1.6;

/// Which values have room, and where.
#[derive(Clone, Copy)]
struct Scale {
    x: f64,
    low: f64,
    high: f64,
    pixels: f64,
}

/// A row's label behind its bar.
struct Label {
    value: String,
    soft: String,
}

/// Draws the groups below y; returns where they end.
pub fn draw(canvas: &mut Canvas, chart: &Chart, mut y: f64) -> f64 {
    let names = chart.contenders.iter().map(|name| width(&short(name, MAX_NAMES), LABEL));
    // Names may be bold.
    let x = LEFT + names.fold(0.0, f64::max) * 1.06 + 10.0;
    let longest: Vec<f64> = chart.figures.iter().map(|figure| high(&[figure])).collect();
    let (min, max) = longest
        .iter()
        .filter(|high| **high > 0.0)
        .fold((f64::INFINITY, 0.0_f64), |(min, max), high| (min.min(*high), max.max(*high)));
    let is_common = max <= min * MAX_APART;
    if !is_common {
        y += 14.0;
        let note = "Each group has its own scale.";
        canvas.text(LEFT, y, "label soft", Anchor::Start, note);
    }
    let common = Scale::of(x, &chart.figures);
    for figure in &chart.figures {
        y += 10.0;
        for line in wrap(&figure.label(), LABEL, (RIGHT - LEFT) * 0.94) {
            y += 16.0;
            canvas.text(LEFT, y, "condition", Anchor::Start, &line);
        }
        y += 5.0;
        let scale = if is_common { common } else { Scale::of(x, &[figure]) };
        y = group(canvas, chart, figure, scale, y);
    }
    y + 4.0
}

fn group(canvas: &mut Canvas, chart: &Chart, figure: &Figure, scale: Scale, y: f64) -> f64 {
    let contenders = chart.contenders.iter().enumerate();
    let rows: Vec<(usize, &Row)> =
        contenders.filter_map(|(idx, name)| Some((idx, figure.row(name)?))).collect();
    let end = y + rows.len() as f64 * PITCH;
    let zero = scale.at(0.0);
    let base = figure.row(&figure.base).and_then(spread).filter(|_| rows.len() > 1);
    if let Some(base) = base {
        let x = scale.at(base.median);
        canvas.line("base", (x, y), (x, end));
    }
    for (row_idx, (contender_idx, row)) in rows.iter().enumerate() {
        let middle = y + (row_idx as f64 + 0.5) * PITCH;
        let baseline = middle + 4.0;
        let class = if row.contender == "nohop" { "label strong" } else { "label" };
        canvas.text(LEFT, baseline, class, Anchor::Start, &short(&row.contender, MAX_NAMES));
        let Some(spread) = spread(row) else {
            canvas.text(zero + 8.0, baseline, "label soft", Anchor::Start, "no sample");
            continue;
        };
        let end = scale.at(spread.median);
        let top = middle - THICKNESS / 2.0;
        canvas.begin(*contender_idx);
        canvas.rect("bar", zero.min(end), top, (end - zero).abs().max(1.0), THICKNESS);
        canvas.end();
        if spread.min < spread.max {
            canvas.path("whisker", &whisker(scale, spread, middle));
        }
        let label = Label::of(row, figure, scale.high);
        let x = zero.max(end).max(scale.at(spread.max)) + 7.0;
        canvas.two_texts(x, baseline, "label", Anchor::Start, &label.value, &label.soft);
    }
    canvas.line("axis", (zero, y), (zero, end));
    end
}

/// A line from the least to the most with a cap at each end; a tip where it leaves the picture.
fn whisker(scale: Scale, spread: Spread, y: f64) -> String {
    let (left, right) = (scale.at(spread.min), scale.at(spread.max));
    let cap = |x: f64| format!("M{x:.1} {:.1}V{:.1}", y - 2.5, y + 2.5);
    let end = if spread.max > scale.high {
        format!(
            "M{:.1} {:.1}L{right:.1} {y:.1}L{:.1} {:.1}",
            right - 4.0,
            y - 3.0,
            right - 4.0,
            y + 3.0
        )
    } else {
        cap(right)
    };
    format!("{}M{left:.1} {y:.1}H{right:.1}{end}", cap(left))
}

fn spread(row: &Row) -> Option<Spread> {
    row.spread.filter(Spread::is_finite)
}

fn spreads(figures: &[&Figure]) -> Vec<Spread> {
    figures.iter().flat_map(|figure| &figure.rows).filter_map(spread).collect()
}

/// The greatest value that has room.
fn high(figures: &[&Figure]) -> f64 {
    let spreads = spreads(figures);
    let median = spreads.iter().map(|spread| spread.median).fold(0.0, f64::max);
    let max = spreads.iter().map(|spread| spread.max).fold(0.0, f64::max);
    if median > 0.0 { max.min(median * MAX_WHISKER) } else { max }
}

impl Scale {
    /// As wide as the labels behind the bars leave it.
    fn of(x: f64, figures: &[&Figure]) -> Scale {
        let min = spreads(figures).iter().map(|spread| spread.min).fold(0.0, f64::min);
        let lowest = spreads(figures).iter().map(|spread| spread.median).fold(0.0, f64::min);
        let low = min.max(lowest * MAX_WHISKER);
        let high = high(figures);
        let mut pixels = f64::INFINITY;
        for figure in figures {
            for (row, spread) in figure.rows.iter().filter_map(|row| Some((row, spread(row)?))) {
                let label = Label::of(row, figure, high);
                let room =
                    RIGHT - x - 9.0 - width(&format!("{}{}", label.value, label.soft), LABEL);
                let span = spread.max.min(high).max(0.0) - low;
                if span > 0.0 {
                    pixels = pixels.min(room / span);
                }
            }
        }
        Scale { x, low, high, pixels: if pixels.is_finite() { pixels.max(0.0) } else { 0.0 } }
    }

    fn at(&self, value: f64) -> f64 {
        self.x + (value.clamp(self.low, self.high.max(self.low)) - self.low) * self.pixels
    }
}

impl Label {
    fn of(row: &Row, figure: &Figure, high: f64) -> Label {
        let Some(spread) = spread(row) else {
            return Label { value: "no sample".to_owned(), soft: String::new() };
        };
        let mut soft = match row.ratio {
            Some(ratio) => format!(" · {}×", format::ratio(ratio.median)),
            None => String::new(),
        };
        if spread.max > high {
            soft += &format!(" · up to {}", format::humane(spread.max, &figure.unit));
        }
        Label { value: format::humane(spread.median, &figure.unit), soft }
    }
}

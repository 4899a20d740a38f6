//! Curves: a line for each contender over the points of an axis.

use super::canvas::{Anchor, Canvas, LABEL, LEFT, RIGHT, short, width, wrap};
use super::palette::Color;
use super::scale::{log_ticks, settle, ticks};
use crate::format;
use crate::report::{Chart, Row};
use crate::stats::Spread;

const HEIGHT: f64 = 300.0;
/// From one label at the lines' ends to the next.
const PITCH: f64 = 17.0;
const MAX_NAMES: f64 = 150.0;
/// Beyond this span of values, the axis is logarithmic.
const MAX_LINEAR: f64 = 20.0;
/// Whiskers end at this many times the greatest median on a linear axis.
const MAX_WHISKER: f64 = 1.6;
/// How far neighbouring contenders stand apart at one point, so that their whiskers do.
const DODGE: f64 = 4.0;

/// One contender's line.
struct Curve<'a> {
    contender_idx: usize,
    name: &'a str,
    points: Vec<Measured<'a>>,
}

struct Measured<'a> {
    x: f64,
    spread: Spread,
    row: &'a Row,
}

/// A vertical axis between two heights.
struct Axis {
    ticks: Vec<f64>,
    is_log: bool,
    top: f64,
    bottom: f64,
}

/// Draws the plot below y; returns where it ends.
pub fn draw(canvas: &mut Canvas, chart: &Chart, axis_name: &str, y: f64) -> f64 {
    let curves = curves(chart);
    let (top, bottom) = (y + 14.0, y + 14.0 + HEIGHT.max(curves.len() as f64 * PITCH));
    let axis = Axis::of(&curves, top, bottom);
    let tick_labels: Vec<String> =
        axis.ticks.iter().map(|tick| format::tick(*tick, chart.unit)).collect();
    let left = LEFT + tick_labels.iter().map(|label| width(label, LABEL)).fold(0.0, f64::max) + 8.0;
    let labels: Vec<(String, String)> =
        curves.iter().map(|curve| label(curve, chart.unit)).collect();
    let label_width =
        |(name, soft): &(String, String)| width(name, LABEL) * 1.06 + width(soft, LABEL);
    let right = RIGHT - labels.iter().map(label_width).fold(0.0, f64::max) - 22.0;

    for (tick, label) in axis.ticks.iter().zip(&tick_labels) {
        let y = axis.at(*tick);
        let class = if *tick == 0.0 && !axis.is_log { "axis" } else { "grid" };
        canvas.line(class, (left, y), (right, y));
        canvas.text(left - 8.0, y + 4.0, "label soft", Anchor::End, label);
    }

    let values = values(chart);
    let places = Places::of(&values, left, right, curves.len());
    x_axis(canvas, &values, &places, bottom);
    let is_log = if places.is_log { ", logarithmic" } else { "" };
    let name = format!("{axis_name}{is_log}");
    canvas.text(f64::midpoint(left, right), bottom + 39.0, "label soft", Anchor::Middle, &name);

    let ends: Vec<f64> = curves
        .iter()
        .map(|curve| curve.points.last().map_or(bottom, |last| axis.at(last.spread.median)))
        .collect();
    let heights = settle(&ends, PITCH, top, bottom);
    // nohop on top of the others.
    let mut order: Vec<usize> = (0..curves.len()).collect();
    order.sort_by_key(|idx| curves[*idx].name == "nohop");
    for idx in &order {
        let curve = &curves[*idx];
        canvas.begin(curve.contender_idx);
        line(canvas, curve, &axis, &places, *idx);
        if let Some(last) = curve.points.last() {
            let (x, y) = (places.at(last.x, *idx) + 7.0, axis.at(last.spread.median));
            let height = heights[*idx];
            let path = format!("M{x:.1} {y:.1}L{right:.1} {y:.1}L{:.1} {height:.1}", right + 12.0);
            canvas.path("leader", &path);
        }
        canvas.end();
    }
    for (idx, (name, soft)) in labels.iter().enumerate() {
        let class = if curves[idx].name == "nohop" { "label strong" } else { "label" };
        let (x, y) = (right + 16.0, heights[idx] + 4.0);
        canvas.two_texts(x, y, class, Anchor::Start, name, soft);
    }
    without_samples(canvas, chart, &curves, bottom + 46.0)
}

/// The contenders that have a line.
fn curves<'a>(chart: &'a Chart) -> Vec<Curve<'a>> {
    let of = |(contender_idx, name): (usize, &&'a str)| {
        let points = chart.figures.iter().filter_map(|figure| {
            let row = figure.row(name)?;
            let spread = row.spread.filter(Spread::is_finite)?;
            Some(Measured { x: figure.point.as_ref()?.value, spread, row })
        });
        let mut points: Vec<Measured> = points.collect();
        points.sort_by(|a, b| a.x.total_cmp(&b.x));
        (!points.is_empty()).then_some(Curve { contender_idx, name, points })
    };
    chart.contenders.iter().enumerate().filter_map(of).collect()
}

/// The measured points, each once.
fn values(chart: &Chart) -> Vec<f64> {
    let points = chart.figures.iter().filter_map(|figure| figure.point.as_ref());
    let mut values: Vec<f64> = points.map(|point| point.value).collect();
    values.sort_by(f64::total_cmp);
    values.dedup();
    values
}

/// The label at a line's end: the name, and its last value.
fn label(curve: &Curve, unit: &str) -> (String, String) {
    let last = curve.points.last().map(|last| {
        let value = format::humane(last.spread.median, unit);
        match last.row.ratio {
            Some(ratio) => format!("  {value} · {}×", format::ratio(ratio.median)),
            None => format!("  {value}"),
        }
    });
    (short(curve.name, MAX_NAMES), last.unwrap_or_default())
}

fn line(canvas: &mut Canvas, curve: &Curve, axis: &Axis, places: &Places, curve_idx: usize) {
    let mut path = String::new();
    let mut last_idx = None;
    for point in &curve.points {
        let (x, y) = (places.at(point.x, curve_idx), axis.at(point.spread.median));
        // No line across a point that lacks a sample.
        let point_idx = places.values.iter().position(|value| *value == point.x);
        let is_next = last_idx.is_some() && last_idx.map(|idx: usize| idx + 1) == point_idx;
        path += &format!("{}{x:.1} {y:.1}", if is_next { "L" } else { "M" });
        last_idx = point_idx;
        if point.spread.min < point.spread.max {
            let (min, max) = (axis.at(point.spread.min), axis.at(point.spread.max));
            let tip = if point.spread.max > axis.high() {
                let (from, to) = (x - 3.0, x + 3.0);
                format!("M{from:.1} {:.1}L{x:.1} {max:.1}L{to:.1} {0:.1}", max + 4.0)
            } else {
                String::new()
            };
            canvas.path("spread", &format!("M{x:.1} {min:.1}V{max:.1}{tip}"));
        }
    }
    let class = if curve.name == "nohop" { "line thick" } else { "line" };
    canvas.path(class, &path);
    for point in &curve.points {
        let (x, y) = (places.at(point.x, curve_idx), axis.at(point.spread.median));
        canvas.path_at(x, y, "marker", Color::of(curve.name).marker);
    }
}

/// Draws the axis with a tick at each point, and a label where it has room.
fn x_axis(canvas: &mut Canvas, values: &[f64], places: &Places, y: f64) {
    canvas.line("axis", (places.left, y), (places.right, y));
    let mut from = f64::NEG_INFINITY;
    let last = values.last().map(|value| (places.middle(*value), format::count(*value)));
    for (idx, value) in values.iter().enumerate() {
        let x = places.middle(*value);
        canvas.line("axis", (x, y), (x, y + 5.0));
        let label = format::count(*value);
        let half = width(&label, LABEL) / 2.0;
        // The last one always has its label.
        let to = match &last {
            Some((x, label)) if idx + 1 < values.len() => x - width(label, LABEL) / 2.0 - 6.0,
            _ => f64::INFINITY,
        };
        if x - half >= from && x + half <= to {
            canvas.text(x, y + 20.0, "label soft", Anchor::Middle, &label);
            from = x + half + 6.0;
        }
    }
}

fn without_samples(canvas: &mut Canvas, chart: &Chart, curves: &[Curve], y: f64) -> f64 {
    let has_line = |name: &str| curves.iter().any(|curve| curve.name == name);
    let without: Vec<&str> =
        chart.contenders.iter().copied().filter(|name| !has_line(name)).collect();
    if without.is_empty() {
        return y;
    }
    let note = format!("No sample of {}.", without.join(", "));
    let lines = wrap(&note, LABEL, RIGHT - LEFT);
    for (line_idx, line) in lines.iter().enumerate() {
        canvas.text(LEFT, y + 14.0 + 16.0 * line_idx as f64, "label soft", Anchor::Start, line);
    }
    y + 16.0 * lines.len() as f64 + 2.0
}

impl Axis {
    fn of(curves: &[Curve], top: f64, bottom: f64) -> Axis {
        let spreads = || curves.iter().flat_map(|curve| &curve.points).map(|point| point.spread);
        let min = spreads().map(|spread| spread.min).fold(f64::INFINITY, f64::min);
        let max = spreads().map(|spread| spread.max).fold(f64::NEG_INFINITY, f64::max);
        let medians = spreads().map(|spread| spread.median);
        let (lowest, highest) = medians.fold((f64::INFINITY, f64::NEG_INFINITY), |span, median| {
            (span.0.min(median), span.1.max(median))
        });
        let is_log = min > 0.0 && highest > lowest * MAX_LINEAR;
        let ticks = if is_log {
            log_ticks(min, max)
        } else if highest > 0.0 {
            ticks(min.min(0.0), max.min(highest * MAX_WHISKER))
        } else {
            ticks(min.min(0.0), max.max(0.0))
        };
        Axis { ticks, is_log, top, bottom }
    }

    fn high(&self) -> f64 {
        self.ticks.last().copied().unwrap_or(0.0)
    }

    fn at(&self, value: f64) -> f64 {
        let low = self.ticks.first().copied().unwrap_or(0.0);
        let part = if self.is_log {
            (value / low).log10() / (self.high() / low).log10()
        } else {
            (value - low) / (self.high() - low)
        };
        self.bottom - part.clamp(0.0, 1.0) * (self.bottom - self.top)
    }
}

/// Where the points stand between two edges.
struct Places {
    values: Vec<f64>,
    is_log: bool,
    left: f64,
    right: f64,
    /// From one curve to the next at the same point.
    dodge: f64,
    n_curves: usize,
}

impl Places {
    fn of(values: &[f64], left: f64, right: f64, n_curves: usize) -> Places {
        let is_log = values.iter().all(|value| *value > 0.0);
        let values = values.to_vec();
        let mut places = Places { values, is_log, left, right, dodge: 0.0, n_curves };
        let middles: Vec<f64> = places.values.iter().map(|value| places.middle(*value)).collect();
        let nearest =
            middles.windows(2).map(|pair| pair[1] - pair[0]).fold(f64::INFINITY, f64::min);
        places.dodge = DODGE.min(nearest * 0.6 / n_curves as f64);
        places
    }

    /// Logarithmic; evenly spaced where a point is zero or less, which has no logarithm.
    fn middle(&self, value: f64) -> f64 {
        let last = self.values.len() - 1;
        let part = if self.is_log {
            (value / self.values[0]).log10() / (self.values[last] / self.values[0]).log10()
        } else {
            let idx = self.values.iter().position(|known| *known == value).unwrap_or(0);
            idx as f64 / last as f64
        };
        let (left, right) = (self.left + 28.0, self.right - 28.0);
        left + part * (right - left)
    }

    fn at(&self, value: f64, curve_idx: usize) -> f64 {
        self.middle(value) + (curve_idx as f64 - (self.n_curves - 1) as f64 / 2.0) * self.dodge
    }
}

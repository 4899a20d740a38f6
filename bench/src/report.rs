//! A suite's report: figures by contender and round, and who was absent and why.

use anyhow::Result;
use serde::Serialize;

use crate::format;
use crate::machine::Machine;
use crate::stats::{self, Interval, Spread};

/// All that one run of a suite found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The suite's name on the command line, such as `http`.
    pub suite: String,
    /// The title, a sentence.
    pub title: String,
    /// The day, as 2026-11-25.
    pub date: String,
    /// Whether it was a quick run: fewer and shorter rounds, fewer conditions.
    pub is_quick: bool,
    /// The number of interleaved rounds.
    pub n_rounds: usize,
    /// The seed of the order in which contenders take turns within a round.
    pub seed: u64,
    /// How long it took, in seconds, preparations included.
    pub took_s: f64,
    /// Where it ran.
    pub machine: Machine,
    /// Who was compared, and who could not be.
    pub contenders: Vec<Contender>,
    /// The figures, in the order in which they are shown.
    pub figures: Vec<Figure>,
    /// The goals.
    pub goals: Vec<Goal>,
    /// Notes for the reader: a failed sample, a load that wasn't reached.
    pub notes: Vec<String>,
}

/// Something that is compared.
#[derive(Clone, Debug, Serialize)]
pub struct Contender {
    /// As in the figures, such as `HAProxy tcp`.
    pub name: String,
    /// Its version as it reports it; empty if it has none.
    pub version: String,
    /// Its configuration in the repository, such as `bench/peers/haproxy-tcp.cfg`; empty where there
    /// is none.
    pub config: String,
    /// Why it could not take part.
    pub absent: Option<String>,
}

/// Whether more of something is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    /// Such as requests a second.
    Higher,
    /// Such as a latency.
    Lower,
}

/// One quantity under one condition, of each contender that could be measured.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// The quantity: figures of the same name belong to one picture.
    pub name: String,
    /// The condition, such as `one host, kept alive, 32 connections`.
    pub condition: String,
    /// Where the condition is a point on an axis; such figures of one name make a curve.
    pub point: Option<Point>,
    /// Such as `requests/s`, `us`, `%`.
    pub unit: String,
    /// Which direction is better.
    pub better: Better,
    /// The contender that the others are compared with; empty where none is.
    pub base: String,
    /// By contender.
    pub rows: Vec<Row>,
}

/// A point on a curve's axis.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Point {
    /// The axis, such as `services`.
    pub axis: String,
    /// How many.
    pub value: f64,
}

/// One contender's results.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Its name.
    pub contender: String,
    /// By round; `None` where the sample failed.
    pub rounds: Vec<Option<f64>>,
    /// Of the rounds.
    pub spread: Option<Spread>,
    /// Of the rounds' ratios to the base; `None` where there is none, and for the base itself.
    pub ratio: Option<Spread>,
    /// The 95% interval of the median of those ratios; `None` of few rounds, too.
    pub interval: Option<Interval>,
}

/// A goal, and what came of it.
#[derive(Clone, Debug, Serialize)]
pub struct Goal {
    /// Such as `keep-alive requests a second, nohop over direct`.
    pub what: String,
    /// Such as `at least 0.99`.
    pub goal: String,
    /// The measured value, with its 95% interval, such as `0.98 (0.95 to 1.01)`.
    pub is: String,
    /// Whether that is as good as the goal.
    pub outcome: Outcome,
}

/// Whether a goal is reached, by the interval.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The whole interval is as good as the goal.
    Reached,
    /// No part of it is.
    Missed,
    /// Some of it is; or there were too few rounds for an interval.
    Undecided,
    /// There is no number.
    NotMeasured,
}

/// The figures of one name: one table, and one picture.
#[derive(Clone, Debug)]
pub struct Chart<'a> {
    /// The quantity.
    pub name: &'a str,
    /// The first figure's unit, which is that of all.
    pub unit: &'a str,
    /// Which direction is better.
    pub better: Better,
    /// By condition, in the order in which they are to be shown.
    pub figures: Vec<&'a Figure>,
    /// The contenders that have a row, in the report's order.
    pub contenders: Vec<&'a str>,
    /// The axis, if the figures are different points on one, two at least.
    pub axis: Option<&'a str>,
}

impl Contender {
    /// One with its version, or the reason why it has none and is absent.
    pub fn new(name: &str, version: Result<String>, config: &str) -> Contender {
        let (version, absent) = match version {
            Ok(version) => (version, None),
            Err(error) => (String::new(), Some(format!("{error:#}"))),
        };
        Contender { name: name.into(), version, config: config.into(), absent }
    }
}

impl Figure {
    /// The condition in words; a point that has none is its own.
    pub fn label(&self) -> String {
        match &self.point {
            Some(point) if self.condition.is_empty() => {
                format!("{} {}", format::count(point.value), point.axis)
            }
            _ => self.condition.clone(),
        }
    }

    /// A contender's results, by its name.
    pub fn row(&self, contender: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.contender == contender)
    }

    /// Adds one round's sample of a contender.
    pub fn add(&mut self, contender: &str, round: usize, value: Option<f64>) {
        let row = match self.rows.iter_mut().position(|row| row.contender == contender) {
            Some(row_idx) => &mut self.rows[row_idx],
            None => {
                let contender = contender.to_owned();
                self.rows.push(Row {
                    contender,
                    rounds: vec![],
                    spread: None,
                    ratio: None,
                    interval: None,
                });
                let last_idx = self.rows.len() - 1;
                &mut self.rows[last_idx]
            }
        };
        if row.rounds.len() <= round {
            row.rounds.resize(round + 1, None);
        }
        row.rounds[round] = value;
    }

    /// Computes spreads and ratios, once all rounds are there.
    pub fn finish(&mut self) {
        let base = self.row(&self.base).map(|row| row.rounds.clone());
        for row in &mut self.rows {
            row.spread = Spread::of(row.rounds.iter().copied().flatten());
            let base = base.as_ref().filter(|_| row.contender != self.base);
            row.ratio = base.and_then(|base| Spread::of_ratios(&row.rounds, base));
            row.interval = base.and_then(|base| Interval::of(stats::ratios(&row.rounds, base)));
        }
    }

    /// The rounds' ratios of one contender to another, whatever the base.
    pub fn ratios(&self, contender: &str, to: &str) -> Vec<f64> {
        let rounds = |name| self.row(name).map_or(&[][..], |row| &row.rounds);
        stats::ratios(rounds(contender), rounds(to)).collect()
    }
}

impl Report {
    /// The figure of a name and condition.
    pub fn figure(&self, name: &str, condition: &str) -> Option<&Figure> {
        self.figures.iter().find(|figure| figure.name == name && figure.condition == condition)
    }

    /// The figures by name, in the order of their first ones.
    pub fn charts(&self) -> Vec<Chart<'_>> {
        let mut names: Vec<&str> = vec![];
        for figure in &self.figures {
            if !names.contains(&figure.name.as_str()) {
                names.push(&figure.name);
            }
        }
        names.into_iter().filter_map(|name| self.chart(name)).collect()
    }

    fn chart<'a>(&'a self, name: &'a str) -> Option<Chart<'a>> {
        let figures: Vec<&Figure> = self.figures.iter().filter(|f| f.name == name).collect();
        let first = *figures.first()?;
        let is_measured = |name: &&str| figures.iter().any(|figure| figure.row(name).is_some());
        let listed = self.contenders.iter().map(|contender| contender.name.as_str());
        let mut contenders: Vec<&str> = listed.filter(is_measured).collect();
        for row in figures.iter().flat_map(|figure| &figure.rows) {
            if !contenders.contains(&row.contender.as_str()) {
                contenders.push(&row.contender);
            }
        }
        let points: Option<Vec<&Point>> = figures.iter().map(|f| f.point.as_ref()).collect();
        let axis = points.as_ref().and_then(|points| {
            let one = points.first()?;
            let mut values: Vec<f64> = points.iter().map(|point| point.value).collect();
            values.sort_by(f64::total_cmp);
            values.dedup();
            let is_axis = points.iter().all(|point| point.axis == one.axis)
                && values.iter().all(|value| value.is_finite())
                && values.len() == points.len()
                && values.len() > 1;
            is_axis.then_some(one.axis.as_str())
        });
        Some(Chart { name, unit: &first.unit, better: first.better, figures, contenders, axis })
    }
}

impl Chart<'_> {
    /// The bases of the ratios, such as `direct`; empty if there are none.
    pub fn bases(&self) -> String {
        let mut bases: Vec<&str> = vec![];
        for figure in &self.figures {
            let has_ratio = figure.rows.iter().any(|row| row.ratio.is_some());
            if has_ratio && !bases.contains(&figure.base.as_str()) {
                bases.push(&figure.base);
            }
        }
        bases.join(" or ")
    }

    /// The unit, and which direction is better.
    pub fn subtitle(&self) -> String {
        let unit = if self.unit.is_empty() { String::new() } else { format!("{}, ", self.unit) };
        format!("{unit}{}", self.better.hint())
    }
}

impl Better {
    /// In words.
    pub fn hint(self) -> &'static str {
        match self {
            Better::Higher => "higher is better",
            Better::Lower => "lower is better",
        }
    }
}

impl Report {
    /// How it was measured, in words.
    pub fn rounds(&self) -> String {
        let rounds = match self.n_rounds {
            1 => "one round".to_owned(),
            n => format!("{n} interleaved rounds in random order (seed {})", self.seed),
        };
        if self.is_quick {
            format!("QUICK RUN of {rounds}, which is for a look and not for quoting")
        } else {
            rounds
        }
    }
}

//! What a suite has to say: figures by contender and round, and who was absent and why.

use serde::Serialize;

use crate::machine::Machine;
use crate::stats::Spread;

/// All that one run of a suite found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The suite's name on the command line, such as `http`.
    pub suite: String,
    /// What it measures, a sentence.
    pub title: String,
    /// The day, as 2026-11-25.
    pub date: String,
    /// Whether it was a quick run: fewer and shorter rounds, fewer conditions.
    pub is_quick: bool,
    /// The number of interleaved rounds.
    pub n_rounds: usize,
    /// How long it took, in seconds, preparations included.
    pub took_s: f64,
    /// Where it ran.
    pub machine: Machine,
    /// Who was compared, and who could not be.
    pub contenders: Vec<Contender>,
    /// What was measured, in the order in which it is to be shown.
    pub figures: Vec<Figure>,
    /// What was aimed at.
    pub goals: Vec<Goal>,
    /// What the reader has to know beside the numbers: a failed sample, a load that wasn't reached.
    pub notes: Vec<String>,
}

/// Something that is compared.
#[derive(Clone, Debug, Serialize)]
pub struct Contender {
    /// As in the figures, such as `HAProxy tcp`.
    pub name: String,
    /// What it says of its version; empty where there is nothing to have one.
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
    /// What the axis counts, such as `services`.
    pub axis: String,
    /// How many.
    pub value: f64,
}

/// What one contender got.
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
}

/// A goal, and what came of it.
#[derive(Clone, Debug, Serialize)]
pub struct Goal {
    /// Such as `keep-alive requests a second, nohop over direct`.
    pub what: String,
    /// Such as `at least 0.99`.
    pub goal: String,
    /// What was measured, such as `0.98 (0.95 to 1.01)`.
    pub is: String,
    /// Whether that is as good as the goal; `None` where it could not be measured.
    pub is_reached: Option<bool>,
}

impl Figure {
    /// What was measured of a contender, by its name.
    pub fn row(&self, contender: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.contender == contender)
    }

    /// Adds one round's sample of a contender.
    pub fn add(&mut self, contender: &str, round: usize, value: Option<f64>) {
        let row = match self.rows.iter_mut().position(|row| row.contender == contender) {
            Some(row_idx) => &mut self.rows[row_idx],
            None => {
                let contender = contender.to_owned();
                self.rows.push(Row { contender, rounds: vec![], spread: None, ratio: None });
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
            row.ratio = base
                .as_ref()
                .filter(|_| row.contender != self.base)
                .and_then(|base| Spread::of_ratios(&row.rounds, base));
        }
    }

    /// The ratio of one contender to another, whatever the base.
    pub fn ratio(&self, contender: &str, to: &str) -> Option<Spread> {
        Spread::of_ratios(&self.row(contender)?.rounds, &self.row(to)?.rounds)
    }
}

impl Report {
    /// The figure of a name and condition.
    pub fn figure(&self, name: &str, condition: &str) -> Option<&Figure> {
        self.figures.iter().find(|figure| figure.name == name && figure.condition == condition)
    }
}

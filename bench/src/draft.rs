//! What a suite fills in while it runs.

use anyhow::Error;

use crate::report::{Better, Contender, Figure, Goal, Point};
use crate::stats::Spread;

/// A suite's findings, not yet a report.
#[derive(Default)]
pub struct Draft {
    /// What it measures, a sentence.
    pub title: String,
    /// The number of interleaved rounds.
    pub n_rounds: usize,
    /// Who was compared, and who could not be.
    pub contenders: Vec<Contender>,
    /// What was measured.
    pub figures: Vec<Figure>,
    /// What was aimed at.
    pub goals: Vec<Goal>,
    /// What the reader has to know beside the numbers.
    pub notes: Vec<String>,
}

/// A quantity, whoever has it.
#[derive(Clone, Copy, Debug)]
pub struct Quantity {
    /// Its name, by which figures belong to one picture.
    pub name: &'static str,
    /// Its unit.
    pub unit: &'static str,
    /// Which direction is better.
    pub better: Better,
    /// The contender that others are compared with.
    pub base: &'static str,
}

/// What a goal demands of a number.
#[derive(Clone, Copy, Debug)]
pub enum Demand {
    /// No less than this.
    AtLeast(f64),
    /// No more than this.
    AtMost(f64),
}

impl Draft {
    /// An empty one.
    pub fn new(title: &str, n_rounds: usize) -> Draft {
        Draft { title: title.into(), n_rounds, ..Draft::default() }
    }

    /// Adds one round's sample of a contender; `None` where it failed.
    pub fn add(
        &mut self,
        quantity: Quantity,
        condition: &str,
        contender: &str,
        round: usize,
        value: Option<f64>,
    ) {
        self.figure(quantity, condition, None).add(contender, round, value);
    }

    /// The same for a point on a curve, such as `("services", 100)`.
    pub fn add_point(
        &mut self,
        quantity: Quantity,
        (axis, at): (&str, usize),
        contender: &str,
        round: usize,
        value: Option<f64>,
    ) {
        let point = Point { axis: axis.into(), value: at as f64 };
        let condition = format!("{at} {axis}");
        self.figure(quantity, &condition, Some(point)).add(contender, round, value);
    }

    /// Notes something, once.
    pub fn note(&mut self, text: impl Into<String>) {
        let text = text.into();
        if !self.notes.contains(&text) {
            self.notes.push(text);
        }
    }

    /// Notes that a sample failed, and why.
    pub fn failed(&mut self, contender: &str, condition: &str, error: &Error) {
        let error = format!("{error:#}");
        let first = error.lines().next().unwrap_or_default();
        self.note(format!("{contender}, {condition}: a sample failed: {first}"));
    }

    /// Lists a contender as absent, because of this.
    pub fn is_absent(&mut self, contender: &str, error: &Error) {
        let found = self.contenders.iter_mut().find(|listed| listed.name == contender);
        if let Some(listed) = found.filter(|listed| listed.absent.is_none()) {
            listed.absent = Some(format!("{error:#}"));
        }
    }

    /// Computes what follows from the samples.
    pub fn finish(&mut self) {
        self.figures.iter_mut().for_each(Figure::finish);
    }

    /// The figure of a quantity and condition, once [`Draft::finish`] was called.
    pub fn find(&self, name: &str, condition: &str) -> Option<&Figure> {
        self.figures.iter().find(|figure| figure.name == name && figure.condition == condition)
    }

    /// Adds a goal for a ratio or a number; `None` where it couldn't be measured. The median counts.
    pub fn goal(&mut self, what: &str, demand: Demand, is: Option<Spread>, unit: &str) {
        let (goal, is_reached) = match demand {
            Demand::AtLeast(goal) => (format!("at least {goal}"), is.map(|is| is.median >= goal)),
            Demand::AtMost(goal) => (format!("at most {goal}"), is.map(|is| is.median <= goal)),
        };
        let unit = if unit.is_empty() { String::new() } else { format!(" {unit}") };
        let is = is.map_or("not measured".to_owned(), |is| {
            let [median, least, most] = [is.median, is.least, is.most].map(short);
            format!("{median}{unit} ({least} to {most})")
        });
        self.goals.push(Goal { what: what.into(), goal: goal + &unit, is, is_reached });
    }

    fn figure(&mut self, quantity: Quantity, condition: &str, point: Option<Point>) -> &mut Figure {
        let is_it = |figure: &Figure| figure.name == quantity.name && figure.condition == condition;
        let figure_idx = self.figures.iter().position(is_it).unwrap_or_else(|| {
            self.figures.push(Figure {
                name: quantity.name.into(),
                condition: condition.into(),
                point,
                unit: quantity.unit.into(),
                better: quantity.better,
                base: quantity.base.into(),
                rows: vec![],
            });
            self.figures.len() - 1
        });
        &mut self.figures[figure_idx]
    }
}

/// A number with as many digits as say something.
fn short(value: f64) -> String {
    let digits = match value.abs() {
        size if size >= 100.0 => 0,
        size if size >= 10.0 => 1,
        _ => 2,
    };
    format!("{value:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: Quantity =
        Quantity { name: "rate", unit: "requests/s", better: Better::Higher, base: "direct" };

    #[test]
    fn samples_become_ratios_and_goals() {
        let mut draft = Draft::new("a test", 2);
        for (round, direct, nohop) in [(0, 100.0, Some(99.0)), (1, 50.0, None)] {
            draft.add(RATE, "kept", "direct", round, Some(direct));
            draft.add(RATE, "kept", "nohop", round, nohop);
        }
        draft.finish();
        let ratio = draft.find("rate", "kept").and_then(|figure| figure.ratio("nohop", "direct"));
        draft.goal("kept", Demand::AtLeast(0.995), ratio, "");
        draft.goal("absent", Demand::AtMost(1.0), None, "ms");
        let goals: Vec<_> = draft.goals.iter().map(|g| (&*g.is, &*g.goal, g.is_reached)).collect();
        let expected = [
            ("0.99 (0.99 to 0.99)", "at least 0.995", Some(false)),
            ("not measured", "at most 1 ms", None),
        ];
        assert_eq!(goals, expected);
    }
}

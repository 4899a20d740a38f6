//! Builds a suite's report while it runs.

use anyhow::Error;

use crate::random;
use crate::report::{Better, Contender, Figure, Goal, Outcome, Point};
use crate::stats::{Interval, Spread};

/// A suite's findings, not yet a report.
#[derive(Default)]
pub struct Draft {
    /// The title, a sentence.
    pub title: String,
    /// The number of interleaved rounds.
    pub n_rounds: usize,
    /// Who was compared, and who could not be.
    pub contenders: Vec<Contender>,
    /// The figures.
    pub figures: Vec<Figure>,
    /// The goals.
    pub goals: Vec<Goal>,
    /// Notes for the reader.
    pub notes: Vec<String>,
    /// The seed of the order within rounds.
    pub seed: u64,
    random: fastrand::Rng,
}

/// A quantity of any contender.
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

/// A goal's limit of a number.
#[derive(Clone, Copy, Debug)]
pub enum Limit {
    /// No less than this.
    AtLeast(f64),
    /// No more than this.
    AtMost(f64),
}

/// The share of the slowest contender's saturation at which latency is measured. Well below the 70%
/// from which on the length of a queue, rather than a path, is what takes time.
const AT_RATE: f64 = 0.6;

/// A rate that everybody who is compared keeps up with.
pub struct FixedRate {
    /// Per second, in whole numbers.
    pub rate: f64,
    /// Each contender's rate, by name.
    saturation: Vec<(String, f64)>,
}

impl Quantity {
    /// One of which more is better, without ratios.
    pub const fn higher(name: &'static str, unit: &'static str) -> Quantity {
        Quantity { name, unit, better: Better::Higher, base: "" }
    }

    /// One of which less is better, without ratios.
    pub const fn lower(name: &'static str, unit: &'static str) -> Quantity {
        Quantity { name, unit, better: Better::Lower, base: "" }
    }

    /// The same with ratios to a contender.
    pub const fn over(self, base: &'static str) -> Quantity {
        Quantity { base, ..self }
    }
}

impl FixedRate {
    /// From what each contender could do under a condition, in the median of its rounds; `None` where that
    /// is nothing.
    pub fn of(draft: &Draft, saturation: Quantity, condition: &str) -> Option<FixedRate> {
        let rows = &draft.find(saturation.name, condition)?.rows;
        let median = |rounds: &[Option<f64>]| Spread::of(rounds.iter().copied().flatten());
        let saturation: Vec<(String, f64)> = rows
            .iter()
            .filter_map(|row| Some((row.contender.clone(), median(&row.rounds)?.median)))
            .collect();
        let slowest = saturation.iter().map(|(_, rate)| *rate).fold(f64::INFINITY, f64::min);
        let rate = (slowest * AT_RATE).round();
        (rate.is_finite() && rate > 0.0).then_some(FixedRate { rate, saturation })
    }

    /// Adds to the draft how much of its own saturation this rate is for each contender, in percent.
    pub fn add_utilisation(&self, draft: &mut Draft, quantity: Quantity, condition: &str) {
        for (contender, saturation) in &self.saturation {
            let percent = 100.0 * self.rate / saturation;
            draft.add(quantity, condition, contender, 0, Some(percent));
        }
    }
}

impl Limit {
    fn text(self) -> String {
        match self {
            Limit::AtLeast(goal) => format!("at least {goal}"),
            Limit::AtMost(goal) => format!("at most {goal}"),
        }
    }

    fn judge(self, Interval { low, high, .. }: Interval) -> Outcome {
        let (all, any) = match self {
            Limit::AtLeast(goal) => (low >= goal, high >= goal),
            Limit::AtMost(goal) => (high <= goal, low <= goal),
        };
        match (all, any) {
            (true, _) => Outcome::Reached,
            (false, true) => Outcome::Undecided,
            (false, false) => Outcome::Missed,
        }
    }
}

impl Draft {
    /// An empty one.
    pub fn new(title: &str, n_rounds: usize) -> Draft {
        let seed = random::run_seed();
        let random = fastrand::Rng::with_seed(seed);
        Draft { title: title.into(), n_rounds, seed, random, ..Draft::default() }
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

    /// Adds a goal for values of rounds, such as ratios: the interval of their median decides.
    pub fn goal(&mut self, what: &str, limit: Limit, rounds: &[f64], unit: &str) {
        let spread = Spread::of(rounds.iter().copied());
        let interval = Interval::of(rounds.iter().copied());
        let unit = if unit.is_empty() { String::new() } else { format!(" {unit}") };
        let is = match (interval, spread) {
            (Some(Interval { median, low, high }), _) => {
                let [median, low, high] = [median, low, high].map(short);
                format!("{median}{unit} ({low} to {high})")
            }
            (None, Some(spread)) => format!("{}{unit}, of few rounds", short(spread.median)),
            (None, None) => "not measured".to_owned(),
        };
        let outcome = match (interval, spread) {
            (Some(interval), _) => limit.judge(interval),
            (None, Some(_)) => Outcome::Undecided,
            (None, None) => Outcome::NotMeasured,
        };
        self.goals.push(Goal { what: what.into(), goal: limit.text() + &unit, is, outcome });
    }

    /// Adds a goal for a deterministic count, such as of failures in all rounds; `None` if it wasn't
    /// counted.
    pub fn goal_of_count(&mut self, what: &str, limit: Limit, count: Option<f64>) {
        let outcome = count.map_or(Outcome::NotMeasured, |n| limit.judge(Interval::exact(n)));
        let is = count.map_or("not measured".to_owned(), |n| format!("{n}"));
        self.goals.push(Goal { what: what.into(), goal: limit.text(), is, outcome });
    }

    /// Contenders in the order of one round, which is random: who comes first meets another machine than
    /// who comes last.
    pub fn shuffled<T>(&mut self, contenders: impl IntoIterator<Item = T>) -> Vec<T> {
        let mut order: Vec<T> = contenders.into_iter().collect();
        self.random.shuffle(&mut order);
        order
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

/// A number with its significant digits.
fn short(value: f64) -> String {
    let digits = match value.abs() {
        size if size >= 100.0 => 0,
        size if size >= 10.0 => 1,
        size if size >= 2.0 => 2,
        // As ratios are, of which a percent may decide.
        _ => 3,
    };
    format!("{value:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: Quantity =
        Quantity { name: "rate", unit: "requests/s", better: Better::Higher, base: "direct" };

    #[test]
    fn the_fixed_rate_is_a_share_of_the_slowests() {
        let mut draft = Draft::new("a test", 3);
        assert!(FixedRate::of(&draft, RATE, "kept").is_none());
        for (round, direct, proxy) in
            [(0, 100.0, None), (1, 90.0, Some(40.0)), (2, 80.0, Some(60.0))]
        {
            draft.add(RATE, "kept", "direct", round, Some(direct));
            draft.add(RATE, "kept", "a proxy", round, proxy);
        }
        let fixed = FixedRate::of(&draft, RATE, "kept").expect("a rate");
        assert_eq!(fixed.rate, 30.0);
        let utilisation = Quantity { name: "utilisation", unit: "%", ..RATE };
        fixed.add_utilisation(&mut draft, utilisation, "kept, 30");
        let figure = draft.find("utilisation", "kept, 30").expect("a figure");
        let percent = |name: &str| figure.row(name).and_then(|row| row.rounds[0]);
        assert_eq!(percent("a proxy"), Some(60.0));
        assert_eq!(percent("direct").map(f64::round), Some(33.0));
    }

    #[test]
    fn samples_become_ratios_and_goals() {
        let mut draft = Draft::new("a test", 2);
        for (round, direct, nohop) in [(0, 100.0, Some(99.0)), (1, 50.0, None)] {
            draft.add(RATE, "kept", "direct", round, Some(direct));
            draft.add(RATE, "kept", "nohop", round, nohop);
        }
        draft.finish();
        let ratios = draft.find("rate", "kept").map(|figure| figure.ratios("nohop", "direct"));
        let ratios = ratios.unwrap_or_default();
        assert_eq!(ratios, [0.99]);
        draft.goal("few", Limit::AtLeast(0.98), &ratios, "");
        draft.goal("absent", Limit::AtMost(1.0), &[], "ms");
        draft.goal_of_count("failures", Limit::AtMost(0.0), Some(1.0));
        // Around 0.99, a percent to either side.
        let rounds: Vec<f64> = (0..21).map(|n| 0.98 + f64::from(n) / 1e3).collect();
        for goal in [0.97, 0.99, 1.01] {
            draft.goal("many", Limit::AtLeast(goal), &rounds, "");
        }
        draft.goal("many", Limit::AtMost(1.01), &rounds, "");
        let goals: Vec<_> = draft.goals.iter().map(|g| (&*g.is, &*g.goal, g.outcome)).collect();
        let many = "0.990 (0.986 to 0.994)";
        let expected = [
            ("0.990, of few rounds", "at least 0.98", Outcome::Undecided),
            ("not measured", "at most 1 ms", Outcome::NotMeasured),
            ("1", "at most 0", Outcome::Missed),
            (many, "at least 0.97", Outcome::Reached),
            (many, "at least 0.99", Outcome::Undecided),
            (many, "at least 1.01", Outcome::Missed),
            (many, "at most 1.01", Outcome::Reached),
        ];
        assert_eq!(goals, expected);
    }
}

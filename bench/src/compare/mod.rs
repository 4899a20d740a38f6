//! Two nohop binaries side by side, such as the last release and the next one: whether the new one is
//! better or worse, quantity by quantity.
//!
//! Each round starts both again, on nodes of their own, and measures both part by part, in turns of
//! random order; its ratio is the median of the turns' ratios. So a round's ratio includes the
//! differences between starts, such as the maps' places in memory, and the rounds are independent. A
//! quantity that is worse is measured again, in further rounds, and is worse only if it is so twice:
//! of nineteen 95% intervals one is expected to miss the true value in each run.

mod quantity;
mod site;
mod verdict;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::builder::TypedValueParser;
use clap::{Args, ValueEnum};
use serde::Serialize;
use testbed::cmd;

use crate::format;
use crate::machine::Machine;
use crate::progress::{Progress, duration};
use crate::random;
use crate::report::Better;
use crate::stats::{Interval, MIN_ROUNDS, Spread};

pub use quantity::Part;
use quantity::{N_TURNS, Quantity, Samples};
use site::Site;
pub use verdict::{TOO_WIDE, Verdict};

/// Exits with 1 where NEW is worse.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// The binary that is compared with
    pub old: PathBuf,
    /// The binary that is judged
    pub new: PathBuf,
    /// Done in about four minutes; else in fifteen to thirty
    #[arg(long = "quick")]
    pub is_quick: bool,
    /// Measure only this; may be given several times
    #[arg(long = "suite", value_enum, value_name = "SUITE", default_values_t = Part::value_variants().to_vec())]
    pub parts: Vec<Part>,
    /// As many rounds as this, however long they take
    #[arg(long = "rounds", value_name = "N", value_parser = range(1, 1_000))]
    pub n_rounds: Option<usize>,
    /// The services of the daemon that has many
    #[arg(long = "services", value_name = "N", default_value = "10000", value_parser = range(1, 12_000))]
    pub n_services: usize,
    /// The seed of the order in which the two take turns; another one each time where none is given
    #[arg(long, default_value_t = random::any_seed(), hide_default_value = true)]
    pub seed: u64,
    /// Where the JSON is written
    #[arg(long, value_name = "DIR", default_value = "bench/results")]
    pub out: PathBuf,
}

/// A parser for a number in a range.
fn range(first: u16, last: u16) -> impl TypedValueParser<Value = usize> {
    clap::value_parser!(u16).range(i64::from(first)..=i64::from(last)).map(usize::from)
}

/// The two binaries, as indices.
const OLD: usize = 0;
const NEW: usize = 1;

/// How long rounds are started, and the least and the greatest number of them.
struct Budget {
    time: Duration,
    rounds: std::ops::RangeInclusive<usize>,
}

/// The first pass, and the second one, of worse quantities. A quick run takes four minutes.
const QUICK: Budget = Budget { time: Duration::from_secs(120), rounds: 7..=25 };
const QUICK_AGAIN: Budget = Budget { time: Duration::from_secs(60), rounds: 6..=25 };
const FULL: Budget = Budget { time: Duration::from_secs(900), rounds: 15..=60 };

/// All that a comparison found.
#[derive(Debug, Serialize)]
pub struct Comparison {
    /// The two binaries.
    pub old: Binary,
    /// See `old`.
    pub new: Binary,
    /// The day, as 2026-11-25.
    pub date: String,
    /// Whether it was a quick run.
    pub is_quick: bool,
    /// The seed of the order within the rounds.
    pub seed: u64,
    /// Where it ran.
    pub machine: Machine,
    /// The load average over a minute at the end, this run's own load included.
    pub load_after: f64,
    /// The compared quantities.
    pub quantities: Vec<Compared>,
    /// Failures.
    pub notes: Vec<String>,
}

/// A binary.
#[derive(Clone, Debug, Serialize)]
pub struct Binary {
    /// Where it is.
    pub path: PathBuf,
    /// Its version as it reports it.
    pub version: String,
}

/// A quantity of both.
#[derive(Debug, Serialize)]
pub struct Compared {
    /// Its name.
    pub name: String,
    /// Its part.
    pub suite: Part,
    /// Its unit.
    pub unit: &'static str,
    /// Which direction is better.
    pub better: Better,
    /// OLD's samples, by round.
    pub old: Vec<Option<f64>>,
    /// NEW's samples, by round.
    pub new: Vec<Option<f64>>,
    /// The median of the rounds' ratios of NEW to OLD, each the median of its turns', and its 95%
    /// interval.
    pub ratio: Option<Interval>,
    /// Where that was worse at first: the interval of the first pass. All else here is of the second.
    pub first: Option<Interval>,
    /// The verdict.
    pub verdict: Verdict,
}

/// Compares, prints, writes the JSON; fails where NEW is worse.
///
/// # Errors
/// When nothing can be measured, or the JSON can't be written.
pub fn run(options: &Options) -> Result<ExitCode> {
    let binary = |path: &PathBuf| -> Result<Binary> {
        let path = fs::canonicalize(path).with_context(|| format!("find {}", path.display()))?;
        let version = cmd::words(&path.display().to_string(), "--version")
            .with_context(|| format!("{} isn't a nohop that runs here", path.display()))?;
        Ok(Binary { path, version: version.trim().to_owned() })
    };
    let binaries = [binary(&options.old)?, binary(&options.new)?];
    let machine = Machine::read();
    let mut run = Run {
        options,
        binaries: &binaries,
        notes: vec![],
        random: fastrand::Rng::with_seed(options.seed),
    };
    let budget = if options.is_quick { QUICK } else { FULL };
    let mut quantities = run.pass(&options.parts, &budget)?;

    let mut again: Vec<Part> =
        quantities.iter().filter(|q| q.verdict.fails()).map(|q| q.suite).collect();
    again.dedup();
    if !again.is_empty() {
        let budget = if options.is_quick { QUICK_AGAIN } else { FULL };
        for second in run.pass(&again, &budget)? {
            let first = quantities.iter_mut().find(|first| first.name == second.name);
            if let Some(first) = first.filter(|first| first.verdict.fails()) {
                *first = Compared { first: first.ratio, ..second };
            }
        }
    }
    let notes = run.notes;
    let [old, new] = binaries;
    let comparison = Comparison {
        old,
        new,
        date: cmd::words("date", "+%F")?.trim().to_owned(),
        is_quick: options.is_quick,
        seed: options.seed,
        machine,
        load_after: Machine::read().load_before,
        quantities,
        notes,
    };
    print!("{}", render(&comparison));
    let file = options.out.join(format!("{}-compare.json", comparison.date));
    let json = serde_json::to_string_pretty(&comparison).context("the comparison as JSON")?;
    fs::write(&file, json + "\n").with_context(|| format!("write {}", file.display()))?;
    println!("{}", file.display());
    let is_worse = comparison.quantities.iter().any(|quantity| quantity.verdict.fails());
    Ok(if is_worse { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

struct Run<'a> {
    options: &'a Options,
    binaries: &'a [Binary; 2],
    notes: Vec<String>,
    random: fastrand::Rng,
}

impl Run<'_> {
    /// Goes through rounds, after one that warms up and isn't counted.
    fn pass(&mut self, parts: &[Part], budget: &Budget) -> Result<Vec<Compared>> {
        let options = Options { parts: parts.to_vec(), ..self.options.clone() };
        let most = options.n_rounds.unwrap_or(*budget.rounds.end());
        let mut progress =
            Progress::new("compare", options.n_rounds.map_or(0, |n_rounds| n_rounds + 1));
        progress.step("warm-up");
        let warm_up = self.round(&options, None)?;
        // Well below what the slower one can do.
        let slowest = warm_up.iter().filter_map(|found| found.median(Quantity::ForwardedRate));
        let slowest = slowest.fold(f64::INFINITY, f64::min);
        let forwarded_rate = slowest.is_finite().then_some(slowest * 0.4);

        let start = Instant::now();
        let mut rounds: Vec<[Samples; 2]> = Vec::new();
        loop {
            let n_rounds = rounds.len();
            let mean = start.elapsed() / n_rounds.max(1) as u32;
            let is_over =
                start.elapsed() + mean > budget.time && n_rounds >= *budget.rounds.start();
            if n_rounds >= most || (options.n_rounds.is_none() && is_over) {
                break;
            }
            let left = duration(budget.time.saturating_sub(start.elapsed()).as_secs_f64());
            progress.step(&if options.n_rounds.is_some() {
                "both binaries".to_owned()
            } else {
                format!("both binaries; rounds begin for {left} more")
            });
            rounds.push(self.round(&options, forwarded_rate)?);
        }
        let of_parts = Quantity::value_variants()
            .iter()
            .filter(|quantity| parts.contains(&quantity.describe().0));
        Ok(of_parts.map(|quantity| compared(*quantity, &rounds, options.n_services)).collect())
    }

    /// Starts both, and measures each part of both, in an order of its own. A part that can't be measured is
    /// noted.
    fn round(&mut self, options: &Options, forwarded_rate: Option<f64>) -> Result<[Samples; 2]> {
        let mut found = [Samples::default(), Samples::default()];
        let mut order = [OLD, NEW];
        let mut sites = [None, None];
        self.random.shuffle(&mut order);
        for which in order {
            match Site::start(&self.binaries[which].path, &options.parts, options.n_services) {
                Ok(site) => sites[which] = Some(site),
                Err(error) => self.note(which, "start", &error),
            }
        }
        ensure!(sites.iter().any(Option::is_some), "neither starts: {}", self.notes.join("; "));
        let turns = options.parts.iter().flat_map(|part| (0..N_TURNS).map(move |n| (*part, n)));
        for (part, turn) in turns {
            self.random.shuffle(&mut order);
            for which in order {
                let Some(site) = &sites[which] else { continue };
                found[which].turn = turn;
                let measured = site.measure(part, turn, forwarded_rate, &mut found[which]);
                if let Err(error) = measured {
                    self.note(which, &format!("{part:?}"), &error);
                }
            }
        }
        Ok(found)
    }

    fn note(&mut self, which: usize, what: &str, error: &anyhow::Error) {
        let (name, text) = (["OLD", "NEW"][which], format!("{error:#}"));
        let note = format!("{name}, {what}: {}", text.lines().next().unwrap_or_default());
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }
}

fn compared(quantity: Quantity, rounds: &[[Samples; 2]], n_services: usize) -> Compared {
    let of = |which: usize| -> Vec<Option<f64>> {
        rounds.iter().map(|round| round[which].median(quantity)).collect()
    };
    let ratio_of = |round: &[Samples; 2]| {
        let [old, new] = [OLD, NEW].map(|which| round[which].turns(quantity));
        Some(Spread::of_ratios(&new, &old)?.median)
    };
    let (old, new) = (of(OLD), of(NEW));
    let n = |samples: &[Option<f64>]| samples.iter().flatten().count();
    let (suite, unit, _) = quantity.describe();
    let ratio = Interval::of(rounds.iter().filter_map(ratio_of));
    let verdict = match (n(&old), n(&new)) {
        (0, _) => Verdict::NotMeasured,
        (_, 0) => Verdict::Failed,
        // As good as none: it fails most of the time.
        (n_old, n_new) if n_old >= MIN_ROUNDS && n_new < n_old / 2 => Verdict::Failed,
        _ => Verdict::of(ratio, quantity.better()),
    };
    let (name, better) = (quantity.name(n_services), quantity.better());
    Compared { name, suite, unit, better, old, new, ratio, first: None, verdict }
}

/// As text for a terminal.
fn render(comparison: &Comparison) -> String {
    let mut text = String::new();
    let path = |path: &Path| path.display().to_string();
    let Comparison { old, new, machine, .. } = comparison;
    let mut line = |words: String| {
        text += &words;
        text.push('\n');
    };
    line(format!("OLD {} ({})", path(&old.path), old.version));
    line(format!("NEW {} ({})", path(&new.path), new.version));
    line(machine.caption());
    line(format!(
        "seed {}; load {:.2} before, {:.2} after",
        comparison.seed, machine.load_before, comparison.load_after
    ));
    line(format!(
        "\n{:<48} {:>10} {:>10}  {:<21} {:>6}  NEW is",
        "", "OLD", "NEW", "NEW/OLD, 95% interval", "rounds"
    ));
    for quantity in &comparison.quantities {
        let median = |samples: &[Option<f64>]| {
            let spread = Spread::of(samples.iter().copied().flatten());
            spread.map_or_else(
                || format::NONE.into(),
                |spread| format::humane(spread.median, quantity.unit),
            )
        };
        let interval = |ratio: Option<Interval>| {
            ratio.map_or_else(
                || format::NONE.to_owned(),
                |ratio| format!("{:.3} ({:.3}-{:.3})", ratio.median, ratio.low, ratio.high),
            )
        };
        let first = match quantity.first {
            Some(first) => format!("; at first {}", interval(Some(first))),
            None => String::new(),
        };
        let better = if quantity.better == Better::Higher { ", higher is better" } else { "" };
        line(format!(
            "{:<48} {:>10} {:>10}  {:<21} {:>6}  {}{first}",
            format!("{}{better}", quantity.name),
            median(&quantity.old),
            median(&quantity.new),
            interval(quantity.ratio),
            quantity.new.iter().flatten().count(),
            quantity.verdict,
        ));
    }
    for note in &comparison.notes {
        line(format!("note: {note}"));
    }
    line(format!(
        "\nundecided: the interval has 1 in it and reaches further than {:.0}% from it, or there are fewer than \
         {MIN_ROUNDS} rounds; run it longer, on a quieter machine",
        TOO_WIDE * 100.0
    ));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounds(new: impl Fn(usize) -> Option<f64>) -> Vec<[Samples; 2]> {
        let samples = |value: Option<f64>| {
            let mut samples = Samples::default();
            value.into_iter().for_each(|value| samples.add(Quantity::Miss, value));
            samples
        };
        (0..20).map(|round| [samples(Some(100.0 + round as f64)), samples(new(round))]).collect()
    }

    #[test]
    fn binaries_are_compared_round_by_round() {
        let verdict = |new: &dyn Fn(usize) -> Option<f64>| {
            compared(Quantity::Miss, &rounds(new), 10_000).verdict
        };
        // The machine gets slower all the time; the ratio within a round is decisive.
        assert_eq!(verdict(&|round| Some(100.0 + round as f64)), Verdict::NoWorse);
        assert_eq!(verdict(&|round| Some((100.0 + round as f64) * 1.05)), Verdict::Worse);
        assert_eq!(verdict(&|round| Some((100.0 + round as f64) * 0.95)), Verdict::Better);
        assert_eq!(verdict(&|_| None), Verdict::Failed);
        assert_eq!(verdict(&|round| (round < 5).then_some(100.0)), Verdict::Failed);
        assert_eq!(compared(Quantity::Miss, &[], 10_000).verdict, Verdict::NotMeasured,);
    }

    #[test]
    fn quantities_have_names_of_their_own() {
        let mut names: Vec<String> = {
            let all = Quantity::value_variants().iter();
            all.map(|quantity| quantity.name(10_000)).collect()
        };
        assert!(names.contains(&"DNS, zone of 10k names".to_owned()), "{names:?}");
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Quantity::value_variants().len());
    }
}

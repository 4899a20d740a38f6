//! Whether the harness can detect a difference, and detects none where there is none: the same contender
//! twice, and one with a known delay in its path.

use std::time::Duration;

use anyhow::Result;
use testbed::process::Process;
use testbed::tempdir::TempDir;

use crate::generators;
use crate::node::{Layout, Node};
use crate::peers::{DIRECT, frontend, start_backend};
use crate::progress::Progress;
use crate::report::{Contender, Goal, Outcome};
use crate::report_builder::{Draft, Limit, Quantity};
use crate::stats::Interval;

const AGAIN: &str = "direct again";
const DELAYED: &str = "delayed";

/// What the delayed path adds to each request.
const DELAY: Duration = Duration::from_millis(2);

/// By how much of it the measured difference may be off: what another program in the path costs by
/// itself comes on top of the delay.
const TOLERANCE: f64 = 0.25;

/// How far from 1 the interval of two equals may reach: the harness has to resolve that.
const RESOLUTION: f64 = 0.05;

const LATENCY: Quantity = Quantity::lower("latency, median", "us").over(DIRECT);
const RATE: Quantity =
    Quantity::higher("requests a second, as many as can be", "requests/s").over(DIRECT);

const AT_RATE: &str = "one host, kept alive, 4 connections, 500 requests/s";
const SATURATED: &str = "one host, kept alive, 32 connections";

/// A contender at work. Dropped in this order.
struct Site {
    name: &'static str,
    address: std::net::SocketAddrV4,
    _delay: Option<Process>,
    _backend: (Process, TempDir),
    node: Node,
}

impl Site {
    fn start(name: &'static str) -> Result<Site> {
        let node = Node::new(Layout::OneHost)?;
        let backend = start_backend(&node)?;
        let mut address = Node::backend(0, 8080);
        let delay = (name == DELAYED).then(|| delay(&node, address)).transpose()?;
        if delay.is_some() {
            address = frontend(0);
        }
        Ok(Site { name, address, _delay: delay, _backend: backend, node })
    }
}

fn delay(node: &Node, backend: std::net::SocketAddrV4) -> Result<Process> {
    node.client_host().ip("addr add 10.96.0.1/16 dev lo")?;
    let mut command = node.hop_place().command(generators::load_program()?);
    let listen = frontend(0).to_string();
    command.args(["delay", &listen, &backend.to_string()]);
    command.args(["--delay-us", &DELAY.as_micros().to_string()]);
    let process = Process::spawn("delay", command)?;
    process.wait_for_line(&["listening on "])?;
    Ok(process)
}

/// Runs the suite.
///
/// # Errors
/// When a contender can't be started, or a sample fails: a harness that can't measure these measures
/// nothing.
pub fn run(is_quick: bool) -> Result<Draft> {
    let (n_rounds, n_saturating) = if is_quick { (7, 6) } else { (15, 15) };
    let mut draft = Draft::new(
        "Can the harness detect a difference, and does it detect none where there is none?",
        n_rounds,
    );
    let n_steps = (n_rounds + 1) * 3 + n_saturating * 2;
    let mut progress = Progress::new("check", n_steps);
    progress.preparing("direct, twice, and a path with a delay");
    let sites = [DIRECT, AGAIN, DELAYED].map(Site::start);
    let sites = sites.into_iter().collect::<Result<Vec<_>>>()?;
    for site in &sites {
        draft.contenders.push(Contender::new(site.name, Ok(String::new()), ""));
    }
    // The first round warms up, and isn't counted.
    for round in 0..=n_rounds {
        for site in draft.shuffled(&sites) {
            progress.step(&format!("{AT_RATE}: {}", site.name));
            let arguments = format!(
                "http {} --rate 500 --seconds 0.25 --connections 4 --warmup-ms 50",
                site.address
            );
            let found = generators::load(site.node.client_place(), &arguments)?;
            let median_us = generators::number(&found, "/latency_us/p50")?;
            if let Some(round) = round.checked_sub(1) {
                draft.add(LATENCY, AT_RATE, site.name, round, Some(median_us));
            }
        }
    }
    for round in 0..n_saturating {
        for site in draft.shuffled(sites.iter().filter(|site| site.name != DELAYED)) {
            progress.step(&format!("{SATURATED}: {}", site.name));
            let found = generators::wrk(site.node.client_place(), site.address, 32, true, 1)?;
            draft.add(RATE, SATURATED, site.name, round, Some(found.rate));
        }
    }
    draft.finish();
    judge(&mut draft);
    Ok(draft)
}

fn judge(draft: &mut Draft) {
    let figure = |name: &str, condition: &str| draft.find(name, condition).cloned();
    let latency = figure(LATENCY.name, AT_RATE);
    let rate = figure(RATE.name, SATURATED);
    let delay_us = DELAY.as_secs_f64() * 1e6;
    let added = latency.as_ref().and_then(|latency| {
        let (delayed, direct) = (latency.row(DELAYED)?, latency.row(DIRECT)?);
        let pairs = delayed.rounds.iter().zip(&direct.rounds);
        Some(pairs.filter_map(|(delayed, direct)| Some((*delayed)? - (*direct)?)).collect())
    });
    let added: Vec<f64> = added.unwrap_or_default();
    let what = format!("a path that is {delay_us} us longer is slower by");
    draft.goal(&what, Limit::AtLeast(delay_us), &added, "us");
    draft.goal(&what, Limit::AtMost(delay_us * (1.0 + TOLERANCE)), &added, "us");
    for (what, figure) in [("latency", latency), ("requests a second", rate)] {
        let ratios = figure.map(|figure| figure.ratios(AGAIN, DIRECT)).unwrap_or_default();
        draft.goals.push(equal(what, Interval::of(ratios)));
    }
}

/// The goal that two equals are equal, and that a difference of a few percent would have been seen.
fn equal(what: &str, ratio: Option<Interval>) -> Goal {
    let (is, outcome) = match ratio {
        None => ("not measured".to_owned(), Outcome::NotMeasured),
        Some(ratio) => {
            let Interval { median, low, high } = ratio;
            let is = format!("{median:.3} ({low:.3} to {high:.3})");
            let is_narrow = low >= 1.0 - RESOLUTION && high <= 1.0 + RESOLUTION;
            match (ratio.has(1.0), is_narrow) {
                (true, true) => (is, Outcome::Reached),
                (true, false) => (is + ", too wide to decide", Outcome::Missed),
                (false, _) => (is + ", equals differ", Outcome::Missed),
            }
        }
    };
    let goal = format!("has 1 in it, and stays within {:.0}% of it", RESOLUTION * 100.0);
    Goal { what: format!("{what}, direct over direct: the interval"), goal, is, outcome }
}

/// Whether a check that has run allows to trust what other suites find.
pub fn is_passed(goals: &[Goal]) -> bool {
    goals.iter().all(|goal| goal.outcome == Outcome::Reached)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_have_to_be_equal_and_the_interval_narrow() {
        for (low, high, expected, text) in [
            (0.99, 1.02, Outcome::Reached, "1.005 (0.990 to 1.020)"),
            (0.90, 1.11, Outcome::Missed, "too wide to decide"),
            (1.01, 1.02, Outcome::Missed, "equals differ"),
        ] {
            let goal = equal("x", Some(Interval { median: f64::midpoint(low, high), low, high }));
            assert_eq!(goal.outcome, expected, "{low} to {high}");
            assert!(goal.is.contains(text), "{}", goal.is);
            assert_eq!(is_passed(&[goal]), expected == Outcome::Reached);
        }
        assert_eq!(equal("x", None).outcome, Outcome::NotMeasured);
        assert!(!is_passed(&[equal("x", None)]));
    }
}

//! How discovery does at size: a real Consul, the daemon as it ships, and the maps that a connection reads.

mod changes;
mod file;
mod many;
mod maps;
mod site;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use testbed::{cleanup, process};

/// Measures and prints; its argument is whether quickly.
type Measure = fn(bool) -> Result<()>;

fn main() -> ExitCode {
    if !rustix::process::geteuid().is_root() {
        eprintln!("can't run: it makes network namespaces, which needs root");
        return ExitCode::FAILURE;
    }
    if let Err(error) = cleanup::on_signals() {
        eprintln!("can't handle signals: {error}");
        return ExitCode::FAILURE;
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let quick = arguments.iter().any(|argument| argument == "--quick");
    let only = arguments.iter().find(|argument| !argument.starts_with("--"));
    let release = rustix::system::uname();
    println!("Linux {}", release.release().to_string_lossy());
    let parts: [(&str, Measure); 4] = [
        ("changes", changes::measure),
        ("file", file::measure),
        ("many", many::five_thousand),
        ("names", many::a_hundred_thousand),
    ];
    for (name, measure) in parts {
        if only.is_some_and(|only| only != name) {
            continue;
        }
        if let Err(error) = measure(quick) {
            eprintln!("{name}: {error:?}\n{}", process::failure_output());
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// Prints a figure, and whether it is at most the goal.
fn print_figure(what: &str, is: f64, unit: &str, goal: Option<f64>) {
    let verdict = goal.map_or(String::new(), |goal| {
        let verdict = if is <= goal { "reached" } else { "NOT reached" };
        format!("; at most {goal}: {verdict}")
    });
    println!("  {what}: {is:.2} {unit}{verdict}");
}

/// The value that so large a part of the others doesn't exceed, by the nearest rank; NaN of none.
fn quantile(values: &[f64], part: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (part * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

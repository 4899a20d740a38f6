//! The harness, which `cargo xtask bench` starts.
#![forbid(unsafe_code)]

mod preflight;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use lb_bench::compare::{self, Options};
use lb_bench::machine::Machine;
use lb_bench::markdown::{self, Links};
use lb_bench::peers::Conntrack;
use lb_bench::progress::duration;
use lb_bench::report::{Goal, Report};
use lb_bench::suites::{PARTS, SUITES, Suite, check};
use lb_bench::{output, random, simulate};
use testbed::{cleanup, cmd, process};

/// nohop side by side with everything that it replaces.
#[derive(Parser)]
#[command(
    name = "nohop-bench",
    disable_version_flag = true,
    args_conflicts_with_subcommands = true
)]
struct Arguments {
    #[command(subcommand)]
    task: Option<Task>,
    /// What to measure: check, http, throughput, connect, udp, change, scale, dns, failure, edge; all
    /// of them where none is named; of edge also a part alone: edge-flood, edge-clients
    #[arg(value_parser = suite)]
    suites: Vec<Suite>,
    /// Fewer and shorter rounds, fewer conditions
    #[arg(long)]
    quick: bool,
    /// Go on though the machine is busy, or `check` failed
    #[arg(long)]
    force: bool,
    /// The seed of the order within rounds; another one each time where none is given
    #[arg(long)]
    seed: Option<u64>,
    /// Where reports are written
    #[arg(long, value_name = "DIR", default_value = "bench/results")]
    out: PathBuf,
}

#[derive(Subcommand)]
enum Task {
    /// Two nohop binaries side by side: whether NEW is better or worse than OLD
    Compare(Options),
    /// The choice of a backend, simulated: no root rights, no network, the same figures for the same seed
    Simulate(simulate::Options),
}

fn suite(name: &str) -> Result<Suite, String> {
    let mut all = SUITES.into_iter().chain(PARTS);
    let names = all.clone().map(|suite| suite.name).collect::<Vec<_>>().join(", ");
    all.find(|suite| suite.name == name).ok_or_else(|| format!("no such suite; there are {names}"))
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let helper = lb_bench::suites::change::helper(&words);
    if let Some(done) = helper.or_else(|| lb_bench::traffic::helper(&words)) {
        return match done {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("error: {error:#}");
                ExitCode::FAILURE
            }
        };
    }
    let arguments = Arguments::parse();
    let done = match &arguments.task {
        Some(Task::Compare(options)) => run_compare(options),
        Some(Task::Simulate(options)) => simulate::print(options).map(|()| ExitCode::SUCCESS),
        None => run_all(&arguments),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            eprintln!("can't run: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run_compare(options: &Options) -> Result<ExitCode> {
    const PROGRAMS: [&str; 5] = ["bpftool", "dig", "dnsmasq", "dnsperf", "taskset"];
    preflight::check(PROGRAMS, &options.out)?;
    preflight::is_idle(true)?;
    cleanup::on_signals().context("handle signals")?;
    compare::run(options)
}

fn run_all(arguments: &Arguments) -> Result<ExitCode> {
    let suites =
        if arguments.suites.is_empty() { SUITES.to_vec() } else { arguments.suites.clone() };
    let programs = suites.iter().flat_map(|suite| suite.programs.iter().copied());
    preflight::check(programs, &arguments.out)?;
    preflight::is_idle(arguments.quick || arguments.force)?;
    if let Some(seed) = arguments.seed {
        random::choose_run_seed(seed);
    }
    cleanup::on_signals().context("handle signals")?;
    let _conntrack = Conntrack::enlarge()?;
    let machine = Machine::read();
    let start = Instant::now();
    let mut n_failed = 0;
    for (idx, suite) in suites.iter().enumerate() {
        let elapsed = duration(start.elapsed().as_secs_f64());
        eprintln!("== {} ({} of {}, {elapsed} so far)", suite.name, idx + 1, suites.len());
        match run_one(suite, arguments.quick, &arguments.out, &machine) {
            Ok(goals) if suite.name != "check" || check::is_passed(&goals) => {}
            Ok(_) => {
                n_failed += 1;
                eprintln!(
                    "check failed: this machine, as it is now, can't resolve the differences that the suites \
                     look for"
                );
                // A quick run goes on. A full one isn't worth its time here.
                if !arguments.quick && !arguments.force && suites.len() > 1 {
                    anyhow::bail!(
                        "the other suites don't run: use a quieter machine, or --force them"
                    );
                }
            }
            Err(error) => {
                eprintln!("{} failed: {error:#}\n{}", suite.name, process::failure_output());
                n_failed += 1;
            }
        }
    }
    let took = duration(start.elapsed().as_secs_f64());
    eprintln!("{} of {} suites in {took}", suites.len() - n_failed, suites.len());
    Ok(if n_failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn run_one(suite: &Suite, is_quick: bool, out: &Path, machine: &Machine) -> Result<Vec<Goal>> {
    let start = Instant::now();
    let draft = (suite.run)(is_quick)?;
    let report = Report {
        suite: suite.name.into(),
        title: draft.title,
        date: cmd::words("date", "+%F")?.trim().to_owned(),
        is_quick,
        n_rounds: draft.n_rounds,
        seed: draft.seed,
        took_s: start.elapsed().as_secs_f64(),
        machine: machine.clone(),
        contenders: draft.contenders,
        figures: draft.figures,
        goals: draft.goals,
        notes: draft.notes,
    };
    print!("{}", markdown::render(&report, &Links::default()));
    for path in output::write(&report, out)? {
        println!("{}", path.display());
    }
    Ok(report.goals)
}

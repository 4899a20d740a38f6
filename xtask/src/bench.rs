//! The benchmarks: the harness, which compares, and programs of lb-tests that measure nohop alone.

use std::fs;
use std::iter;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, ensure};
use clap::{Subcommand, ValueEnum};

use crate::{compile, process};

/// Names the object that nohop is compared with to the suite `cost`.
const MEASURE: &str = "NOHOP_MEASURE";

/// Further commands of the benchmarks.
#[derive(Clone, Debug, Subcommand)]
pub enum Task {
    /// Two nohop binaries side by side: whether NEW is better or worse than OLD (`--help` has more)
    #[command(disable_help_flag = true)]
    Compare {
        /// The harness's own arguments: OLD NEW [--quick] [--suite SUITE]...
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENT")]
        arguments: Vec<String>,
    },
    /// The choice of a backend, simulated, without root rights (`--help` has more)
    #[command(disable_help_flag = true)]
    Simulate {
        /// The harness's own arguments: [SCENE]... [--nodes N] [--backends N] [--seconds N] [--seed N]
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENT")]
        arguments: Vec<String>,
    },
}

/// The suites.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Suite {
    /// Whether the harness can detect a difference
    Check,
    /// HTTP: requests a second, latency, processor time
    Http,
    /// Bulk TCP
    Throughput,
    /// The price of one connection, by the number of services and of backends
    Connect,
    /// Datagrams a second, and their latency
    Udp,
    /// From a change in Consul to the first connection that goes by it
    Change,
    /// Time to load and to change, and memory, by the number of services
    Scale,
    /// Queries a second
    Dns,
    /// How a fault reaches clients: backends that refuse, are silent, reset, are slow, come and go
    Failure,
    /// An edge: packets a second of one processor, HTTP, restarts and floods
    Edge,
    /// Of that floods alone
    EdgeFlood,
    /// Of that the cost of showing servers their clients' addresses alone
    EdgeClients,
    /// nohop alone: where the nanoseconds of a connection and a datagram go
    Cost,
    /// nohop alone: how long a table takes into the kernel, and how much memory it has there
    Apply,
    /// nohop alone: how discovery does at size, with a real Consul
    Discovery,
}

/// Runs setup, then these suites, or all that compare where none is named; of `cost` only these cases, if any are named.
///
/// # Errors
/// Without root rights, on one processor, when setup lacks something, or when a suite fails.
pub fn run(
    suites: &[Suite],
    cases: &[String],
    quick: bool,
    force: bool,
    seed: Option<u64>,
) -> Result<()> {
    ensure!(
        cases.is_empty() || suites.contains(&Suite::Cost),
        "only `cost` has cases that can be named: `cargo xtask bench cost --case PART`"
    );
    look_around()?;
    crate::setup::run(crate::setup::Purpose::Test)?;
    let (alone, compared): (Vec<Suite>, Vec<Suite>) =
        suites.iter().partition(|suite| suite.bench().is_some());
    for suite in &alone {
        run_alone(*suite, quick, cases)?;
    }
    if compared.is_empty() && !alone.is_empty() {
        return Ok(());
    }
    crate::setup::run_for_bench()?;
    let names = compared.iter().filter_map(|suite| suite.to_possible_value());
    let mut arguments: Vec<String> = names.map(|value| value.get_name().to_owned()).collect();
    arguments.extend(quick.then(|| "--quick".to_owned()));
    arguments.extend(force.then(|| "--force".to_owned()));
    arguments.extend(seed.map(|seed| format!("--seed={seed}")));
    let mut harness = Command::new(compile::harness()?);
    let sends = |suite: &Suite| matches!(suite, Suite::Edge | Suite::EdgeFlood);
    if compared.is_empty() || compared.iter().any(sends) {
        harness.env("NOHOP_TRAFFIC", compile::bench_object("nohop-traffic")?);
    }
    become_harness(harness, &arguments)
}

/// Runs setup, then has the harness compare two binaries.
///
/// # Errors
/// As [`run`].
pub fn compare(arguments: &[String]) -> Result<()> {
    look_around()?;
    crate::setup::run(crate::setup::Purpose::Test)?;
    // The harness runs in the repository's root, whatever folder the binaries are named from.
    let whole = |argument: &String| match fs::canonicalize(argument) {
        Ok(path) => path.display().to_string(),
        Err(_) => argument.clone(),
    };
    let arguments = arguments.iter().map(whole);
    let arguments: Vec<_> = iter::once("compare".to_owned()).chain(arguments).collect();
    become_harness(Command::new(compile::harness()?), &arguments)
}

/// Becomes the harness's simulation.
///
/// # Errors
/// When cargo can't be started.
pub fn simulate(arguments: &[String]) -> Result<()> {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["run", "--release", "--package", "lb-bench", "--bin", "nohop-bench", "--"]);
    Err(cargo.arg("simulate").args(arguments).current_dir(crate::repository::root()).exec())
        .context("start cargo")
}

/// Becomes the harness, so that an interrupt reaches it and waits for its cleanup.
fn become_harness(mut harness: Command, arguments: &[String]) -> Result<()> {
    Err(harness.args(arguments).current_dir(crate::repository::root()).exec())
        .context("start the harness")
}

fn look_around() -> Result<()> {
    ensure!(
        process::is_root(),
        "benchmarks make namespaces and load eBPF programs, which needs root: use sudo -E"
    );
    let n_cpus = thread::available_parallelism().map_or(1, usize::from);
    ensure!(
        n_cpus >= 2,
        "only one processor may be used: client and backend would wait for each other; use a machine with two or more"
    );
    Ok(())
}

/// Has the suite `cost` go through all its cases once, to show that each still measures what it should.
///
/// # Errors
/// When a build fails, or a case.
pub fn try_cost() -> Result<()> {
    let compile::CostBench { program, measure } = compile::cost_bench()?;
    let mut bench = if process::is_root() {
        Command::new(program)
    } else {
        let mut sudo = Command::new("sudo");
        sudo.arg("-E").arg(program);
        sudo
    };
    process::stream(bench.arg("--once").env(MEASURE, measure))
}

fn run_alone(suite: Suite, quick: bool, cases: &[String]) -> Result<()> {
    let Some(bench) = suite.bench() else { return Ok(()) };
    let mut cargo = Command::new("cargo");
    cargo.args(["bench", "--package", "lb-tests", "--bench", bench, "--"]);
    cargo.args(quick.then_some("--quick"));
    if suite == Suite::Cost {
        cargo.args(cases).env(MEASURE, compile::bench_object("nohop-measure")?);
    }
    if suite == Suite::Discovery {
        // The daemon as it ships, and the backends, which it finds next to itself.
        compile::build(crate::setup::Purpose::Build, true)?;
    }
    process::stream(cargo.current_dir(crate::repository::root()))
}

impl Suite {
    /// The program of lb-tests, where it measures nohop alone.
    fn bench(self) -> Option<&'static str> {
        match self {
            Suite::Cost => Some("cost"),
            Suite::Apply => Some("apply"),
            Suite::Discovery => Some("discovery"),
            _ => None,
        }
    }
}

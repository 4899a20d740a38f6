//! All that a person or CI runs.
#![forbid(unsafe_code)]

mod bench;
mod compile;
mod demo;
mod dist;
mod fuzz;
#[cfg(test)]
mod imports;
#[cfg(test)]
mod links;
mod machine;
mod process;
mod repository;
mod setup;
mod test;
mod test_report;
#[cfg(test)]
mod type_names;
mod vm;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use setup::Purpose;
use setup::kernels::Version;

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    about = "All that a person or CI runs",
    disable_version_flag = true
)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Make a fresh machine able to build and test
    #[command(after_help = setup::AFTER_HELP)]
    Setup,
    /// Build the kernel object and the binary
    Build {
        /// Optimised
        #[arg(long)]
        release: bool,
    },
    /// Make the packages: .deb, .rpm, a static binary, an OCI image
    #[command(after_help = dist::AFTER_HELP)]
    Dist {
        /// For which architecture; may be repeated
        #[arg(long = "arch", value_enum, default_value = "x86_64")]
        architectures: Vec<dist::Architecture>,
        /// Where to write them
        #[arg(long, value_name = "DIR", default_value_os_t = repository::root().join("target/dist"))]
        out: PathBuf,
        /// Make them twice and try them, as `test --full` does, or only the checks whose name contains FILTER
        #[arg(long, value_name = "FILTER", num_args = 0..=1, conflicts_with_all = ["architectures", "out"])]
        check: Option<Option<String>>,
    },
    /// The main job, in a namespace and cgroup of its own: Consul, three helloworlds, nohop, curl
    Demo {
        /// Leave it running, and print how to enter
        #[arg(long)]
        keep: bool,
        /// It is built already; for the part that sudo runs
        #[arg(long, hide = true)]
        built: bool,
    },
    /// nohop side by side with what it replaces; writes figures and pictures to bench/results
    #[command(args_conflicts_with_subcommands = true)]
    Bench {
        #[command(subcommand)]
        task: Option<bench::Task>,
        /// What to measure; all that compare where none is named
        #[arg(value_enum)]
        suites: Vec<bench::Suite>,
        /// Of `cost` only the cases whose name contains this, and those with "empty"
        #[arg(long = "case", value_name = "PART")]
        cases: Vec<String>,
        /// Fewer and shorter rounds
        #[arg(long)]
        quick: bool,
        /// Continue although the machine is busy or `check` failed
        #[arg(long)]
        force: bool,
        /// The seed of the order within rounds; another one each time where none is given
        #[arg(long)]
        seed: Option<u64>,
    },
    /// Fuzz what reads Consul's answers, the configuration, the static catalog and DNS messages
    Fuzz {
        /// Only this target
        target: Option<String>,
        /// How long each runs
        #[arg(long, value_name = "N", default_value_t = 60)]
        seconds: u64,
    },
    /// A machine with systemd in a VM, a part of `test --full`
    #[command(hide = true)]
    Machine {
        /// The package that is tried; one of a build for tests where none is given
        #[arg(long)]
        deb: Option<PathBuf>,
        /// A shell of root's on it, to find out why a check fails; the machine is left running
        #[arg(long)]
        shell: bool,
    },
    /// Format, lints, unit tests, tests in the kernel and end to end, and in other kernels
    Test {
        /// Run only the tests whose name contains this; without format and lints
        filter: Option<String>,
        /// Everything at length: every trial on every kernel, and what only time or number shows
        #[arg(long)]
        full: bool,
    },
    /// The in-kernel tests on other kernels, in VMs; writes docs/verifier.md
    #[command(after_help = vm::AFTER_HELP)]
    Vm {
        /// Only on this one, such as 6.1
        #[arg(long)]
        kernel: Option<Version>,
        /// Only count the instructions that the verifier goes through, for docs/verifier.md
        #[arg(long)]
        counts: bool,
    },
}

fn main() -> ExitCode {
    match run(Arguments::parse().task) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<ExitCode> {
    match task {
        Task::Setup => setup::run(Purpose::Test)?,
        Task::Build { release } => {
            let built = compile::build(Purpose::Build, release)?;
            println!("object: {}", built.object.display());
            println!("binary: {}", built.nohop.display());
            for helper in built.helpers {
                println!("helper: {}", helper.display());
            }
        }
        Task::Dist { check: Some(filter), .. } => {
            let mut tally = test_report::Tally::default();
            dist::check::run(&mut tally, filter.as_deref());
            return Ok(tally.finish());
        }
        Task::Dist { architectures, out, check: None } => {
            dist::run(&dist::Options { architectures, out })?;
        }
        Task::Demo { keep, built } => {
            if !built {
                compile::build(Purpose::Demo, false)?;
            }
            demo::demo(keep)?;
        }
        Task::Bench { task: Some(bench::Task::Compare { arguments }), .. } => {
            bench::compare(&arguments)?;
        }
        Task::Bench { task: Some(bench::Task::Simulate { arguments }), .. } => {
            bench::simulate(&arguments)?;
        }
        Task::Bench { task: None, suites, cases, quick, force, seed } => {
            bench::run(&suites, &cases, quick, force, seed)?;
        }
        Task::Fuzz { target, seconds } => fuzz::run(target.as_deref(), seconds)?,
        Task::Machine { deb, shell } => {
            let mut tally = test_report::Tally::default();
            machine::run(&mut tally, deb.as_deref(), shell);
            return Ok(tally.finish());
        }
        Task::Test { filter, full } => {
            let extent = if full { vm::Extent::Full } else { vm::Extent::Usual };
            return Ok(test::run(filter.as_deref(), extent));
        }
        Task::Vm { kernel, counts } => return vm::run(kernel, counts),
    }
    Ok(ExitCode::SUCCESS)
}

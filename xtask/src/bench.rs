//! The benchmarks, which are programs of lb-tests.

use std::process::Command;

use anyhow::{Result, ensure};
use clap::ValueEnum;

use crate::process;

/// What can be measured.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Suite {
    /// The connect program's mean run time, for a VIP and for any other address
    Connect,
}

/// Runs setup, then the suite.
///
/// # Errors
/// Without root rights, when setup lacks something, or when the suite fails.
pub fn run(suite: Suite, quick: bool) -> Result<()> {
    ensure!(process::is_root(), "benchmarks load eBPF programs, which needs root: use sudo -E");
    crate::setup::run()?;
    let bench = match suite {
        Suite::Connect => "connect",
    };
    let mut cargo = Command::new("cargo");
    cargo.args(["bench", "--package", "lb-tests", "--bench", bench, "--"]);
    cargo.args(quick.then_some("--quick"));
    process::stream(cargo.current_dir(crate::root()))
}

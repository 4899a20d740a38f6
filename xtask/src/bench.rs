//! The benchmarks, which are programs of lb-tests.

use std::process::Command;

use anyhow::{Result, ensure};
use clap::ValueEnum;

use crate::{compile, process};

/// What can be measured.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Suite {
    /// What the programs cost a dial and a datagram, and other programs beside them
    Connect,
    /// How long a table takes into the kernel, and how much memory it has there
    Apply,
    /// How discovery does at size, beside a real Consul
    Discovery,
    /// How many queries the DNS server answers, and how soon, beside dnsmasq
    Dns,
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
        Suite::Apply => "apply",
        Suite::Discovery => "discovery",
        Suite::Dns => "dns",
    };
    let mut cargo = Command::new("cargo");
    cargo.args(["bench", "--package", "lb-tests", "--bench", bench, "--"]);
    cargo.args(quick.then_some("--quick"));
    if matches!(suite, Suite::Connect) {
        cargo.env("NOHOP_MEASURE", compile::measured_object()?);
    }
    if matches!(suite, Suite::Discovery) {
        // The daemon as it ships, and the backends, which it finds beside itself.
        compile::build(true)?;
    }
    process::stream(cargo.current_dir(crate::root()))
}

//! What happens to a client that opens connections at a fixed rate while a scenario runs.

use std::net::SocketAddrV4;

use anyhow::{Result, ensure};
use testbed::load::{Load, Outcome};

use crate::cluster::Nodes;

/// Connections a second.
pub const RATE: u32 = 2_000;

/// Runs `scenario` while `rate` connections a second are opened to `vip`, until after its end. Each
/// connection has to be answered: the hook chooses once, in connect(), so one that is answered was sent
/// to a server from its first SYN on.
pub fn under_load(
    nodes: &Nodes,
    vip: SocketAddrV4,
    rate: u32,
    scenario: impl FnOnce(&Load) -> Result<()>,
) -> Result<Outcome> {
    let load = Load::start(nodes.inside(), vip, rate)?;
    scenario(&load)?;
    let outcome = load.finish()?;
    eprintln!("{} connections in {:.1} s", outcome.n_requests, outcome.took.as_secs_f64());
    ensure!(outcome.errors.is_empty(), "{outcome:?}");
    ensure!(outcome.answers.len() > 1, "one backend has it all: {outcome:?}");
    ensure!(outcome.answers.keys().all(|answer| answer.starts_with("hello from ")), "{outcome:?}");
    Ok(outcome)
}

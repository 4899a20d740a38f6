//! What happens to a client that opens connections at a fixed rate while a story goes on.

use std::net::SocketAddrV4;

use anyhow::{Result, ensure};
use lb_tests::load::Load;

use crate::cluster::Nodes;

/// Connections a second, and for how long.
pub const RATE: u32 = 2_000;
pub const SECONDS: u32 = 30;

/// Plays `story` under load: each connection that was asked for has to be answered.
pub fn under_load(
    nodes: &Nodes,
    vip: SocketAddrV4,
    rate: u32,
    n_seconds: u32,
    story: impl FnOnce(&Load) -> Result<()>,
) -> Result<()> {
    let load = Load::start(nodes.inside(), vip, rate, n_seconds)?;
    story(&load)?;
    let outcome = load.finish()?;
    eprintln!(
        "{} connections in {:.1} s, {} failed; the slowest took {:?}, the latest was {:?} late",
        outcome.n_asked,
        outcome.took.as_secs_f64(),
        outcome.errors.values().sum::<u64>(),
        outcome.slowest,
        outcome.most_behind,
    );
    ensure!(outcome.errors.is_empty(), "{outcome:?}");
    ensure!(outcome.answers.len() > 1, "one backend has it all: {outcome:?}");
    ensure!(outcome.answers.keys().all(|answer| answer.starts_with("hello from ")), "{outcome:?}");
    Ok(())
}

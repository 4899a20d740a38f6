//! What happens to a client that opens connections at a fixed rate while a scenario runs.

use std::net::SocketAddrV4;
use std::time::Duration;

use anyhow::{Result, ensure};
use lb_tests::load::{Load, Outcome};

use crate::cluster::Nodes;

/// Connections a second.
pub const RATE: u32 = 2_000;

/// Connections a second of the control.
const CONTROL_RATE: u32 = 100;

/// How much longer the slowest connection to a VIP may take than the slowest of the control: less
/// than the 1 s after which the kernel sends a lost SYN again (TCP_TIMEOUT_INIT).
const MAX_DELAY: Duration = Duration::from_millis(900);

/// Runs `scenario` while `rate` connections a second are opened to `vip`, until after its end. Each
/// connection has to be answered, and without delay. A busy machine delays everything: how much, a
/// control shows, which opens connections to a backend of its own directly, all the while.
pub fn under_load(
    nodes: &Nodes,
    vip: SocketAddrV4,
    rate: u32,
    scenario: impl FnOnce(&Load) -> Result<()>,
) -> Result<Outcome> {
    let control_backend = nodes.helloworld("control")?;
    let control = Load::start(nodes.inside(), control_backend.address, CONTROL_RATE)?;
    let load = Load::start(nodes.inside(), vip, rate)?;
    scenario(&load)?;
    let (outcome, control) = (load.finish()?, control.finish()?);
    eprintln!(
        "{} connections in {:.1} s, {} failed; the slowest took {:?} ({:?} directly), the latest \
         was {:?} late",
        outcome.n_asked,
        outcome.took.as_secs_f64(),
        outcome.errors.values().sum::<u64>(),
        outcome.slowest,
        control.slowest,
        outcome.most_behind,
    );
    ensure!(control.errors.is_empty(), "connections without nohop failed: {control:?}");
    ensure!(outcome.errors.is_empty(), "{outcome:?}");
    ensure!(outcome.slowest < control.slowest + MAX_DELAY, "{outcome:?}, directly {control:?}");
    ensure!(outcome.answers.len() > 1, "one backend has it all: {outcome:?}");
    ensure!(outcome.answers.keys().all(|answer| answer.starts_with("hello from ")), "{outcome:?}");
    Ok(outcome)
}

//! What happens to a client that opens connections at a fixed rate while a scenario runs.

use std::net::SocketAddrV4;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use testbed::load::{Load, Outcome};

use crate::cluster::Nodes;

/// Connections a second.
pub const RATE: u32 = 2_000;

/// How long a connection may take on a machine that runs each thread in time: less than the second after
/// which the kernel sends a SYN again.
const LONGEST: Duration = Duration::from_millis(900);

/// How many such delays one connection may meet: client, server and the kernel's threads between them.
const N_DELAYS: u32 = 4;

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
    let is_over = AtomicBool::new(false);
    let (outcome, delay) = thread::scope(|scope| {
        let delay = scope.spawn(|| longest_delay(&is_over));
        let over = SetOnDrop(&is_over); // also where the scenario panics
        let outcome = scenario(&load).and_then(|()| load.finish());
        drop(over);
        (outcome, delay.join().unwrap_or_default())
    });
    let outcome = outcome?;
    eprintln!(
        "{} connections in {:.1} s, the slowest took {:?}, and a thread ran {delay:?} late",
        outcome.n_requests,
        outcome.took.as_secs_f64(),
        outcome.slowest
    );
    ensure!(
        outcome.slowest < LONGEST + N_DELAYS * delay,
        "a thread ran {delay:?} late: {outcome:?}"
    );
    ensure!(outcome.errors.is_empty(), "{outcome:?}");
    ensure!(outcome.answers.len() > 1, "one backend has it all: {outcome:?}");
    ensure!(outcome.answers.keys().all(|answer| answer.starts_with("hello from ")), "{outcome:?}");
    Ok(outcome)
}

/// By how much a thread that sleeps again and again ran late at most: what a busy machine may add to any
/// connection.
fn longest_delay(is_over: &AtomicBool) -> Duration {
    const STEP: Duration = Duration::from_millis(5);
    let mut longest = Duration::ZERO;
    while !is_over.load(Ordering::Relaxed) {
        let began = Instant::now();
        thread::sleep(STEP);
        longest = longest.max(began.elapsed() - STEP);
    }
    longest
}

struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

//! Shared by suites of one service: each peer at work on a node of its own, the processor time
//! that it takes, and its latency at a rate that all keep up with.

use std::thread;
use std::time::Duration;

use anyhow::{Result, anyhow};
use serde_json::Value;

use crate::generators;
use crate::node::{CpuTimes, Layout, Node};
use crate::peers::{DIRECT, Peer, Running, Services};
use crate::pin;
use crate::progress::Progress;
use crate::report_builder::{Draft, FixedRate, Quantity};

/// The quantities of a fixed rate that every suite has.
pub const P50: Quantity =
    Quantity::lower("latency, median, at 60% of the slowest's rate", "us").over(DIRECT);
pub const P99: Quantity =
    Quantity::lower("latency, 99th percentile, at 60% of the slowest's rate", "us").over(DIRECT);
pub const UTILISATION: Quantity = Quantity::lower("utilisation at 60% of the slowest's rate", "%");

/// A peer at work. Dropped in this order.
pub struct Site<B> {
    /// The peer.
    pub peer: Peer,
    /// It, at work.
    pub running: Running,
    _backends: B,
    /// Where it works.
    pub node: Node,
}

impl<B> Site<B> {
    /// Starts each peer on a node of its own, with what `backends` starts there; a peer that can't be
    /// started is listed as absent.
    pub fn start_all(
        able: &[Peer],
        layout: Layout,
        draft: &mut Draft,
        backends: impl Fn(&Node) -> Result<(B, Services)>,
    ) -> Vec<Site<B>> {
        let start = |peer: Peer| -> Result<Site<B>> {
            let node = Node::new(layout)?;
            let (backends, services) = node.pinned(pin::CLIENT, || backends(&node))?;
            let running = node.pinned(pin::SERVER, || peer.start(&node, &services))?;
            Ok(Site { peer, running, _backends: backends, node })
        };
        let mut sites = Vec::new();
        for &peer in able {
            match start(peer) {
                Ok(site) => sites.push(site),
                Err(error) => draft.is_absent(peer.name, &error),
            }
        }
        sites
    }

    /// What `act` found and the processor time that it took; where it fails, that is noted.
    pub fn measure<T>(
        &self,
        draft: &mut Draft,
        condition: &str,
        act: impl FnOnce() -> Result<T>,
    ) -> (Option<T>, CpuTimes) {
        let measured = || -> Result<(T, CpuTimes)> {
            let before = self.node.cpu_times()?;
            let found = self.node.pinned(pin::CLIENT, act)?;
            Ok((found, self.node.cpu_times()?.since(before)))
        };
        match measured() {
            Ok((found, cpu)) => (Some(found), cpu),
            Err(error) => {
                draft.failed(self.peer.name, condition, &error);
                (None, CpuTimes::default())
            }
        }
    }

    /// Adds the processor time of a round: that of all, and the hop's own, which `direct` has on an edge alone.
    pub fn add_cpu(
        &self,
        draft: &mut Draft,
        [all, hop]: [Quantity; 2],
        (condition, round): (&str, usize),
        cpu: CpuTimes,
        per: impl Fn(Duration) -> Option<f64>,
    ) {
        draft.add(all, condition, self.peer.name, round, per(cpu.all()));
        if self.peer.name != DIRECT || self.node.is_edge() {
            draft.add(hop, condition, self.peer.name, round, per(cpu.hop));
        }
    }
}

/// A measurement at a rate.
pub struct AtRate<'a> {
    /// How much each could do, under `saturated`.
    pub saturation: Quantity,
    /// The condition under which that was measured.
    pub saturated: &'a str,
    /// The condition of this one, to which the rate is added.
    pub condition: &'a str,
    /// The added results of a generator, each by its path.
    pub quantities: &'a [(Quantity, &'a str)],
    /// The number of rounds.
    pub n_rounds: usize,
}

impl AtRate<'_> {
    /// Has `ask` ask each site for the rate that all keep up with, round by round. Returns the condition,
    /// and what was found of whom.
    pub fn run<'s, B>(
        &self,
        draft: &mut Draft,
        sites: &'s [Site<B>],
        progress: &mut Progress,
        ask: impl Fn(&Site<B>, usize, f64) -> Result<Value>,
    ) -> (String, Vec<(&'s Site<B>, Value)>) {
        let mut all = Vec::new();
        let Some(fixed) = FixedRate::of(draft, self.saturation, self.saturated) else {
            draft.note(format!("{}: no fixed rate, since no contender has one", self.saturated));
            return (self.condition.to_owned(), all);
        };
        let condition = format!("{}, {} {}", self.condition, fixed.rate, self.saturation.unit);
        fixed.add_utilisation(draft, UTILISATION, &condition);
        for round in 0..self.n_rounds {
            for site in draft.shuffled(sites) {
                progress.step(&format!("{condition}: {}", site.peer.name));
                let (found, _) = site.measure(draft, &condition, || ask(site, round, fixed.rate));
                for (quantity, path) in self.quantities {
                    let value = found.as_ref().and_then(|f| generators::number(f, path).ok());
                    draft.add(*quantity, &condition, site.peer.name, round, value);
                }
                all.extend(found.map(|found| (site, found)));
            }
        }
        (condition, all)
    }
}

/// The results of `act` for each of these, in a thread each.
pub fn at_once<T: Send, U: Send>(
    these: Vec<T>,
    act: impl Fn(T) -> Result<U> + Sync,
) -> Vec<Result<U>> {
    let act = &act;
    thread::scope(|scope| {
        let start = |this: T| scope.spawn(move || act(this));
        let threads: Vec<_> = these.into_iter().map(start).collect();
        let end = |thread: thread::ScopedJoinHandle<'_, Result<U>>| {
            thread.join().unwrap_or_else(|_| Err(anyhow!("its thread panicked")))
        };
        threads.into_iter().map(end).collect()
    })
}

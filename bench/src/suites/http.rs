//! HTTP: requests a second as many as can be, latency at a rate well below what the slowest can do, and the
//! processor time that a million requests cost.

use std::time::Duration;

use anyhow::{Context, Result};
use lb_tests::process::Process;
use lb_tests::tempdir::Scratch;

use crate::generators;
use crate::node::{CpuTimes, Layout, Node};
use crate::peers::{
    self, DIRECT, HAPROXY_TCP, NOHOP, Peer, Protocol, Running, Services, start_backend,
};
use crate::progress::Progress;
use crate::report::Better;
use crate::report_builder::{Demand, Draft, FixedRate, Quantity};

const RATE: Quantity = Quantity {
    name: "requests a second, as many as can be",
    unit: "requests/s",
    better: Better::Higher,
    base: DIRECT,
};
const CPU: Quantity = Quantity {
    name: "processor time for a million requests, both sides and what is between",
    unit: "s",
    better: Better::Lower,
    base: DIRECT,
};
const HOP_CPU: Quantity = Quantity {
    name: "of that the hop's own processes",
    unit: "s",
    better: Better::Lower,
    base: "",
};
const P50: Quantity = Quantity {
    name: "latency, median, at 60% of the slowest's rate",
    unit: "us",
    better: Better::Lower,
    base: DIRECT,
};
const P99: Quantity =
    Quantity { name: "latency, 99th percentile, at 60% of the slowest's rate", ..P50 };
const P999: Quantity =
    Quantity { name: "latency, 99.9th percentile, at 60% of the slowest's rate", ..P50 };
const KEPT_UP: Quantity = Quantity {
    name: "answers a second, where 60% of the slowest's rate is asked for",
    unit: "requests/s",
    better: Better::Higher,
    base: DIRECT,
};

const UTILISATION: Quantity = Quantity {
    name: "utilisation at 60% of the slowest's rate",
    unit: "%",
    better: Better::Lower,
    base: "",
};

/// The number of backends, each at an address of its own.
const N_BACKENDS: usize = 4;

/// The connections by which the fixed rate is asked for.
const N_AT_RATE: usize = 32;

/// How connections are used.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    Kept,
    OneRequest,
}

/// What a run goes through.
struct Plan {
    n_rounds: usize,
    /// Each with the numbers of connections.
    layouts: &'static [(Layout, &'static [usize])],
    rate_seconds: f64,
}

const FULL: Plan = Plan {
    n_rounds: 7,
    layouts: &[(Layout::OneHost, &[1, 32, 256]), (Layout::TwoHosts, &[32])],
    rate_seconds: 1.2,
};
const QUICK: Plan = Plan { n_rounds: 2, layouts: &[(Layout::OneHost, &[32])], rate_seconds: 0.4 };

/// A contender at work. Dropped in this order.
struct Site {
    peer: Peer,
    running: Running,
    _backend: (Process, Scratch),
    node: Node,
}

/// Runs the suite.
///
/// # Errors
/// When nothing can be measured at all.
pub fn run(is_quick: bool) -> Result<Draft> {
    let plan = if is_quick { QUICK } else { FULL };
    let mut draft =
        Draft::new("HTTP: small requests, kept connections and one connection each", plan.n_rounds);
    let (able, contenders) = peers::able(Protocol::Http);
    draft.contenders = contenders;
    let n_conditions: usize = plan.layouts.iter().map(|(_, each)| 2 * (each.len() + 1)).sum();
    let mut progress = Progress::new("http", n_conditions * able.len() * (plan.n_rounds + 1));
    for &(layout, n_connections) in plan.layouts {
        progress.preparing(layout.name());
        let sites = start(&able, layout, &mut draft);
        for uses in [Use::Kept, Use::OneRequest] {
            for &n_connections in n_connections {
                let condition = uses.condition(layout, n_connections);
                saturate(
                    &mut draft,
                    &sites,
                    &condition,
                    (uses, n_connections),
                    plan.n_rounds,
                    &mut progress,
                );
            }
            at_rate(&mut draft, &sites, (layout, uses, n_connections), &plan, &mut progress)?;
        }
    }
    draft.finish();
    judge(&mut draft);
    Ok(draft)
}

/// Starts each contender on a node of its own; who can't is listed as absent from then on.
fn start(able: &[Peer], layout: Layout, draft: &mut Draft) -> Vec<Site> {
    let mut sites = Vec::new();
    for &peer in able {
        match Site::start(peer, layout) {
            Ok(site) => sites.push(site),
            Err(error) => draft.is_absent(peer.name, &error),
        }
    }
    sites
}

impl Site {
    fn start(peer: Peer, layout: Layout) -> Result<Site> {
        let node = Node::new(layout)?;
        let backend = start_backend(&node)?;
        let backends = (0..N_BACKENDS).map(|idx| Node::backend(idx, 8080)).collect();
        let running = peer.start(&node, &Services::one(Protocol::Http, backends))?;
        Ok(Site { peer, running, _backend: backend, node })
    }

    /// What `act` found, and the processor time that it took.
    fn with_cpu<T>(&self, act: impl FnOnce() -> Result<T>) -> Result<(T, CpuTimes)> {
        let before = self.node.cpu_times()?;
        let found = act()?;
        Ok((found, self.node.cpu_times()?.since(before)))
    }
}

fn saturate(
    draft: &mut Draft,
    sites: &[Site],
    condition: &str,
    (uses, n_connections): (Use, usize),
    n_rounds: usize,
    progress: &mut Progress,
) {
    // The first round warms up, and isn't counted.
    for round in 0..=n_rounds {
        for site in draft.shuffled(sites) {
            let name = site.peer.name;
            progress.step(&format!("{condition}: {name}"));
            let address = site.running.address(round);
            let place = site.node.client_place();
            let found = site
                .with_cpu(|| generators::wrk(place, address, n_connections, uses == Use::Kept, 1));
            let (found, cpu) = match found {
                Ok((found, cpu)) => (Some(found), cpu),
                Err(error) => {
                    draft.failed(name, condition, &error);
                    (None, CpuTimes::default())
                }
            };
            let Some(round) = round.checked_sub(1) else { continue };
            // Who fails most requests has no rate: answering 503 is fast.
            let found = found.filter(|found| {
                let is_good = found.n_answered > 0 && found.n_failed * 10 < found.n_answered;
                if !is_good {
                    draft.note(format!("{name}, {condition}: most requests failed in a round"));
                }
                is_good
            });
            if let Some(found) = found.filter(|found| found.n_failed * 1_000 > found.n_answered) {
                let percent =
                    100.0 * found.n_failed as f64 / (found.n_answered + found.n_failed) as f64;
                draft.note(format!("{name}, {condition}: {percent:.1}% failed in a round"));
            }
            let per_million = |time: Duration| {
                found.map(|found| time.as_secs_f64() / found.n_answered as f64 * 1e6)
            };
            draft.add(RATE, condition, name, round, found.map(|found| found.rate));
            draft.add(CPU, condition, name, round, per_million(cpu.all()));
            if name != DIRECT {
                draft.add(HOP_CPU, condition, name, round, per_million(cpu.hop));
            }
        }
    }
}

fn at_rate(
    draft: &mut Draft,
    sites: &[Site],
    (layout, uses, n_connections): (Layout, Use, &[usize]),
    plan: &Plan,
    progress: &mut Progress,
) -> Result<()> {
    // Saturation as it was with as many connections as come closest.
    let n_near = n_connections.iter().copied().filter(|n| *n <= N_AT_RATE).max();
    let condition = uses.condition(layout, n_near.context("a plan without connections")?);
    let Some(fixed) = FixedRate::of(draft, RATE, &condition) else {
        draft.note(format!("{condition}: no fixed rate, since nobody has one"));
        return Ok(());
    };
    let rate = fixed.rate;
    let condition = format!("{}, {rate} requests/s", uses.condition(layout, N_AT_RATE));
    fixed.add_utilisation(draft, UTILISATION, &condition);
    let close = if uses == Use::Kept { "" } else { " --close" };
    for round in 0..plan.n_rounds {
        for site in draft.shuffled(sites) {
            let name = site.peer.name;
            progress.step(&format!("{condition}: {name}"));
            let arguments = format!(
                "http {} --rate {rate} --seconds {} --connections {N_AT_RATE} --warmup-ms 100{close}",
                site.running.address(round),
                plan.rate_seconds
            );
            let found = generators::load(site.node.client_place(), &arguments);
            if let Err(error) = &found {
                draft.failed(name, &condition, error);
            }
            let found = found.ok();
            let number =
                |path: &str| found.as_ref().and_then(|found| generators::number(found, path).ok());
            for (quantity, path) in [
                (P50, "/latency_us/p50"),
                (P99, "/latency_us/p99"),
                (P999, "/latency_us/p999"),
                (KEPT_UP, "/rate"),
            ] {
                draft.add(quantity, &condition, name, round, number(path));
            }
            if let Some(n_failed) = number("/n_failed").filter(|n_failed| *n_failed > 0.0) {
                draft.note(format!("{name}, {condition}: {n_failed} requests failed in a round"));
            }
        }
    }
    Ok(())
}

impl Use {
    fn condition(self, layout: Layout, n_connections: usize) -> String {
        let how = match self {
            Use::Kept => "kept alive",
            Use::OneRequest => "a connection a request",
        };
        let plural = if n_connections == 1 { "" } else { "s" };
        format!("{}, {how}, {n_connections} connection{plural}", layout.name())
    }
}

fn judge(draft: &mut Draft) {
    let condition = |uses: Use| uses.condition(Layout::OneHost, 32);
    let (kept, each) = (condition(Use::Kept), condition(Use::OneRequest));
    let ratio = |draft: &Draft, quantity: Quantity, condition: &str, to: &str| {
        let figure = draft.find(quantity.name, condition);
        figure.map(|figure| figure.ratios(NOHOP, to)).unwrap_or_default()
    };
    let goals = [
        (
            "kept alive, requests a second, nohop over direct",
            RATE,
            &kept,
            DIRECT,
            Demand::AtLeast(0.99),
        ),
        (
            "kept alive, requests a second, nohop over HAProxy tcp",
            RATE,
            &kept,
            HAPROXY_TCP,
            Demand::AtLeast(1.7),
        ),
        ("a connection a request, nohop over direct", RATE, &each, DIRECT, Demand::AtLeast(0.95)),
        (
            "a connection a request, nohop over HAProxy tcp",
            RATE,
            &each,
            HAPROXY_TCP,
            Demand::AtLeast(1.5),
        ),
        (
            "kept alive, processor time a request, nohop over direct",
            CPU,
            &kept,
            DIRECT,
            Demand::AtMost(1.02),
        ),
        (
            "a connection a request, processor time a request, nohop over direct",
            CPU,
            &each,
            DIRECT,
            Demand::AtMost(1.05),
        ),
    ];
    for (what, quantity, condition, to, demand) in goals {
        let is = ratio(draft, quantity, condition, to);
        draft.goal(&format!("{what} (one host, 32 connections)"), demand, &is, "");
    }
}

//! HTTP: requests a second as many as can be, latency at a rate well below what the slowest can do, and the
//! processor time that a million requests cost.

use std::time::Duration;

use anyhow::{Context, Result};
use testbed::process::Process;
use testbed::tempdir::TempDir;

use crate::generators;
use crate::node::{Layout, Node};
use crate::peers::{self, DIRECT, HAPROXY_TCP, NOHOP, Peer, Protocol, Services, start_backend};
use crate::progress::Progress;
use crate::report_builder::{Draft, Limit, Quantity};
use crate::suites::site::{self, AtRate, P50, P99};

/// What [`measure`] adds: how much each can do.
pub(super) const RATE: Quantity =
    Quantity::higher("requests a second, as many as can be", "requests/s").over(DIRECT);
const CPU: Quantity =
    Quantity::lower("processor time for a million requests, both sides and what is between", "s")
        .over(DIRECT);
const HOP_CPU: Quantity = Quantity::lower("of that the hop's own processes", "s");
/// With an edge the receiving of its interfaces as well, in threads of the kernel's own.
const EDGE_CPU: Quantity =
    Quantity::lower("processor time of the edge for a million requests", "s").over(HAPROXY_TCP);
const P999: Quantity =
    Quantity { name: "latency, 99.9th percentile, at 60% of the slowest's rate", ..P50 };
const KEPT_UP: Quantity = Quantity::higher(
    "answers a second, where 60% of the slowest's rate is asked for",
    "requests/s",
)
.over(DIRECT);

type Site = site::Site<(Process, TempDir)>;

/// The number of backends, each at an address of its own.
const N_BACKENDS: usize = 4;

/// The connections by which the fixed rate is asked for.
const N_AT_RATE: usize = 32;

/// How connections are used.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    Kept,
    OneRequest,
}

/// The conditions of a run.
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
        let how = (plan.n_rounds, plan.rate_seconds);
        measure(&mut draft, &able, (layout, n_connections), how, &mut progress)?;
    }
    draft.finish();
    judge(&mut draft);
    Ok(draft)
}

/// Measures these peers on nodes of one layout with each of these numbers of connections: so many rounds, and so
/// many seconds at a rate.
///
/// # Errors
/// When a plan is without connections.
pub(super) fn measure(
    draft: &mut Draft,
    able: &[Peer],
    (layout, n_connections): (Layout, &[usize]),
    (n_rounds, rate_seconds): (usize, f64),
    progress: &mut Progress,
) -> Result<()> {
    progress.preparing(layout.name());
    let sites = Site::start_all(able, layout, draft, backends);
    for uses in [Use::Kept, Use::OneRequest] {
        for &n_connections in n_connections {
            saturate(draft, &sites, (layout, uses, n_connections), n_rounds, progress);
        }
        let how = (n_rounds, rate_seconds);
        at_rate(draft, &sites, (layout, uses, n_connections), how, progress)?;
    }
    Ok(())
}

/// The backends of a node, each at an address of its own.
fn backends(node: &Node) -> Result<((Process, TempDir), Services)> {
    let backends = (0..N_BACKENDS).map(|idx| Node::backend(idx, 8080)).collect();
    Ok((start_backend(node)?, Services::one(Protocol::Http, backends)))
}

fn saturate(
    draft: &mut Draft,
    sites: &[Site],
    (layout, uses, n_connections): (Layout, Use, usize),
    n_rounds: usize,
    progress: &mut Progress,
) {
    let condition = &uses.condition(layout, n_connections);
    let hop_cpu = if layout == Layout::Edge { EDGE_CPU } else { HOP_CPU };
    // The first round warms up, and isn't counted.
    for round in 0..=n_rounds {
        for site in draft.shuffled(sites) {
            let name = site.peer.name;
            progress.step(&format!("{condition}: {name}"));
            let address = site.running.address(round);
            let place = site.node.client_place();
            let act = || generators::wrk(place, address, n_connections, uses == Use::Kept, 1);
            let (found, cpu) = site.measure(draft, condition, act);
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
            site.add_cpu(draft, [CPU, hop_cpu], (condition, round), cpu, per_million);
        }
    }
}

fn at_rate(
    draft: &mut Draft,
    sites: &[Site],
    (layout, uses, n_connections): (Layout, Use, &[usize]),
    (n_rounds, seconds): (usize, f64),
    progress: &mut Progress,
) -> Result<()> {
    // Saturation as it was with as many connections as come closest.
    let n_near = n_connections.iter().copied().filter(|n| *n <= N_AT_RATE).max();
    let at_rate = AtRate {
        saturation: RATE,
        saturated: &uses.condition(layout, n_near.context("a plan without connections")?),
        condition: &uses.condition(layout, N_AT_RATE),
        quantities: &[
            (P50, "/latency_us/p50"),
            (P99, "/latency_us/p99"),
            (P999, "/latency_us/p999"),
            (KEPT_UP, "/rate"),
        ],
        n_rounds,
    };
    let close = if uses == Use::Kept { "" } else { " --close" };
    let (condition, all) = at_rate.run(draft, sites, progress, |site, round, rate| {
        let address = site.running.address(round);
        let arguments = format!(
            "http {address} --rate {rate} --seconds {seconds} --connections {N_AT_RATE} \
             --warmup-ms 100{close}"
        );
        generators::load(site.node.client_place(), &arguments)
    });
    for (site, found) in all {
        if let Some(n_failed) = found["n_failed"].as_u64().filter(|n_failed| *n_failed > 0) {
            let name = site.peer.name;
            draft.note(format!("{name}, {condition}: {n_failed} requests failed in a round"));
        }
    }
    Ok(())
}

impl Use {
    /// The condition of what [`measure`] adds.
    pub(super) fn condition(self, layout: Layout, n_connections: usize) -> String {
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
    use Limit::{AtLeast, AtMost};
    let goals = [
        ("kept alive, requests a second", RATE, &kept, DIRECT, AtLeast(0.99)),
        ("kept alive, requests a second", RATE, &kept, HAPROXY_TCP, AtLeast(1.7)),
        ("a connection a request", RATE, &each, DIRECT, AtLeast(0.95)),
        ("a connection a request", RATE, &each, HAPROXY_TCP, AtLeast(1.5)),
        ("kept alive, processor time a request", CPU, &kept, DIRECT, AtMost(1.02)),
        ("a connection a request, processor time a request", CPU, &each, DIRECT, AtMost(1.05)),
    ];
    for (what, quantity, condition, to, limit) in goals {
        let is = ratio(draft, quantity, condition, to);
        let what = format!("{what}, nohop over {to} (one host, 32 connections)");
        draft.goal(&what, limit, &is, "");
    }
}

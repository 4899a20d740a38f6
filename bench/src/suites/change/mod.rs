//! Change: from Consul's response to the connections that follow it, a rolling deploy under load, and what new
//! instances get of clients that keep their connections.

pub(super) mod backends;
mod blocking;
mod deploy;
mod haproxy_sync;
mod rebalance;
mod single_change;
pub(super) mod site;

use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};

use super::site::at_once;
use crate::generators;
use crate::node::{Layout, Node};
use crate::peers::{ENVOY, HAPROXY_HTTP, HAPROXY_TCP, NFTABLES, NOHOP, PEERS, Protocol};
use crate::progress::Progress;
use crate::report::Contender;
use crate::report_builder::{Draft, Limit, Quantity};
use crate::stats::{Spread, quantile};
use single_change::Delays;
use site::{Kind, Setup, Site};

const SRV: &str = "HAProxy SRV";
const RELOAD: &str = "HAProxy reload";
const RUNTIME: &str = "HAProxy runtime";
const EDS: &str = "Envoy EDS";

/// Who learns of changes in which way. The last two take part in the shares alone.
const ALL: [(&str, Kind, &str); 7] = [
    (NOHOP, Kind::Nohop, ""),
    (SRV, Kind::Srv, "bench/peers/haproxy-srv.cfg"),
    (RELOAD, Kind::Reload, "bench/peers/haproxy-reload.cfg"),
    (RUNTIME, Kind::Runtime(Protocol::Tcp), "bench/peers/haproxy-runtime.cfg"),
    (EDS, Kind::Eds(Protocol::Tcp), "bench/peers/envoy.yaml"),
    (HAPROXY_TCP, Kind::Runtime(Protocol::Tcp), "bench/peers/haproxy-runtime.cfg"),
    (HAPROXY_HTTP, Kind::Runtime(Protocol::Http), "bench/peers/haproxy-runtime.cfg"),
];

const ARRIVAL: Quantity = Quantity::lower(
    "registration to the first connection that lands on the new backend, median",
    "ms",
)
.over(RUNTIME);
const LONGEST_ARRIVAL: Quantity = Quantity {
    name: "registration to the first connection that lands on the new backend, longest of a round",
    ..ARRIVAL
};
const DEPARTURE: Quantity = Quantity {
    name: "deregistration to the last connection that lands on the backend, median",
    ..ARRIVAL
};
const LONGEST_DEPARTURE: Quantity = Quantity {
    name: "deregistration to the last connection that lands on the backend, longest of a round",
    ..ARRIVAL
};
const FAILED: Quantity = Quantity::lower("failed requests during a rolling deploy", "requests");
const RESET: Quantity = Quantity { name: "of those reset or closed without an answer", ..FAILED };
const P99: Quantity =
    Quantity::lower("latency during a rolling deploy, 99th percentile", "us").over(RUNTIME);
const HOP_CPU: Quantity =
    Quantity::lower("processor time of the hop and its follower during a rolling deploy", "s")
        .over(RUNTIME);
const SHARE: Quantity = Quantity::higher(
    "share of the requests that new instances get from pools of connections (fair: 50)",
    "%",
);

const SINGLE: &str = "one host, one instance becomes two and one again, a connection every 0.5 ms";

/// The conditions of a run.
struct Plan {
    n_rounds: usize,
    /// Single changes in a round; of HAProxy by SRV records, each of which takes seconds.
    n_single: usize,
    n_single_srv: usize,
    /// Registrations and deregistrations of a rolling deploy.
    n_deploy: usize,
    /// How long the shares are counted.
    counted: Duration,
}

const FULL: Plan = Plan {
    n_rounds: 7,
    n_single: 6,
    n_single_srv: 1,
    n_deploy: 200,
    counted: Duration::from_millis(2000),
};
const QUICK: Plan = Plan {
    n_rounds: 1,
    n_single: 3,
    n_single_srv: 1,
    n_deploy: 20,
    counted: Duration::from_millis(500),
};

/// Runs a program that this suite starts beside a contender, if `arguments` name one; `None` where they
/// don't.
pub fn helper(arguments: &[String]) -> Option<Result<()>> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.split_first()? {
        (&"follow", rest) => Some(haproxy_sync::program(rest)),
        (&"instances", rest) => Some(backends::program(rest)),
        _ => None,
    }
}

/// Runs the suite.
///
/// # Errors
/// When nothing can be measured at all.
pub fn run(is_quick: bool) -> Result<Draft> {
    let plan = if is_quick { QUICK } else { FULL };
    let title = "change: from Consul's response to the connections that follow it, next to HAProxy by SRV records, \
                 by a reload and by its Runtime API, and Envoy by EDS from a file";
    let mut draft = Draft::new(title, plan.n_rounds);
    draft.contenders =
        ALL.iter().map(|&(name, kind, config)| contender(name, kind, config)).collect();
    let mut progress = Progress::new("change", plan.n_rounds * (5 + 5 + 3));
    progress.preparing("a Consul for each contender");
    // In the shares, the tcp mode is that of the site that takes part in all.
    let others = ALL.iter().filter(|(name, ..)| *name != HAPROXY_TCP);
    let setups = others.map(|&(name, kind, _)| {
        let settings = if kind == Kind::Eds(Protocol::Tcp) { "eds" } else { "" };
        (name, Setup { settings, ..Setup::of(kind) })
    });
    let mut sites = start(&mut draft, setups.collect(), Layout::OneHost)?;
    if !sites.iter().any(|site| site.name == RUNTIME) {
        draft.is_absent(HAPROXY_TCP, &anyhow!("{RUNTIME} is absent"));
    }
    let deploy_condition = format!(
        "one host, {} changes at {} a second among {} instances, which end {} ms after their \
         deregistration; {} requests/s, a connection each",
        plan.n_deploy,
        1000 / deploy::PAUSE.as_millis(),
        deploy::N_INSTANCES,
        deploy::SHUTDOWN_DELAY.as_millis(),
        deploy::RATE,
    );
    let share_condition = format!(
        "one host, {n} instances become {}, {} connections kept alive",
        2 * rebalance::N_INSTANCES,
        rebalance::N_CONNECTIONS,
        n = rebalance::N_INSTANCES,
    );
    for round in 0..plan.n_rounds {
        let others = sites.iter_mut().filter(|site| site.name != HAPROXY_HTTP);
        for site in draft.shuffled(others) {
            progress.step(&format!("{}: single changes", site.name));
            let n = if site.name == SRV { plan.n_single_srv } else { plan.n_single };
            let found =
                note_failure(&mut draft, site.name, SINGLE, single_change::measure(site, n));
            add_single(&mut draft, site.name, round, found.as_ref());
        }
    }
    for round in 0..plan.n_rounds {
        let others = sites.iter_mut().filter(|site| site.name != HAPROXY_HTTP);
        for site in draft.shuffled(others) {
            progress.step(&format!("{}: rolling deploy", site.name));
            let found = deploy::measure(site, plan.n_deploy);
            let found = note_failure(&mut draft, site.name, &deploy_condition, found);
            add_deploy(&mut draft, (site.name, &deploy_condition), round, found.as_ref());
        }
    }
    for round in 0..plan.n_rounds {
        for site in draft.shuffled(&mut sites) {
            let name = match site.name {
                RUNTIME => HAPROXY_TCP,
                NOHOP | HAPROXY_HTTP => site.name,
                _ => continue,
            };
            progress.step(&format!("{name}: shares"));
            let found = rebalance::measure(site, plan.counted);
            let found = note_failure(&mut draft, name, &share_condition, found);
            if let Some((_, n_failed)) = found.filter(|(_, n_failed)| *n_failed > 0.0) {
                draft.note(format!("{name}, {share_condition}: {n_failed} requests failed"));
            }
            let share = found.map(|(share, _)| share);
            draft.add(SHARE, &share_condition, name, round, share);
        }
    }
    draft.finish();
    judge(&mut draft, plan.n_deploy, &deploy_condition);
    explain(&mut draft);
    Ok(draft)
}

/// As a report lists it: HAProxy is the same one each time.
pub(super) fn contender(name: &str, kind: Kind, config: &str) -> Contender {
    let program = match kind {
        Kind::Nohop => NOHOP,
        Kind::Srv | Kind::Reload | Kind::Runtime(_) => HAPROXY_TCP,
        Kind::Eds(_) => ENVOY,
        Kind::Nftables => NFTABLES,
    };
    let peer = PEERS.iter().find(|peer| peer.name == program);
    let version = peer.context("unknown").and_then(|peer| (peer.version)());
    Contender::new(name, version, config)
}

/// Starts those of these who can take part; who can't is listed as absent from then on. Most of it is
/// waiting for each Consul, so they start at the same time.
pub(super) fn start(
    draft: &mut Draft,
    mut setups: Vec<(&'static str, Setup)>,
    layout: Layout,
) -> Result<Vec<Site>> {
    let is_able = |name: &str| {
        draft.contenders.iter().any(|listed| listed.name == name && listed.absent.is_none())
    };
    setups.retain(|(name, _)| is_able(name));
    let start = |(name, setup)| Site::start(name, setup, Node::new(layout)?);
    let mut sites = Vec::new();
    for ((name, _), site) in setups.clone().into_iter().zip(at_once(setups, start)) {
        match site.with_context(|| format!("start {name}")) {
            Ok(site) => sites.push(site),
            Err(error) => draft.is_absent(name, &error),
        }
    }
    let reasons = draft.contenders.iter().filter_map(|listed| listed.absent.as_deref());
    let reasons = reasons.collect::<Vec<_>>().join("; ");
    ensure!(!sites.is_empty(), "no contender can take part: {reasons}");
    Ok(sites)
}

fn note_failure<T>(draft: &mut Draft, name: &str, condition: &str, found: Result<T>) -> Option<T> {
    found.inspect_err(|error| draft.failed(name, condition, error)).ok()
}

fn add_single(draft: &mut Draft, name: &str, round: usize, found: Option<&Delays>) {
    let median = |delays: &[f64]| Spread::of(delays.iter().copied()).map(|spread| spread.median);
    let longest = |delays: &[f64]| Some(quantile(delays, 1.0)).filter(|longest| !longest.is_nan());
    let arrivals = found.map(|found| &found.arrival_ms[..]);
    let departures = found.map(|found| &found.departure_ms[..]);
    draft.add(ARRIVAL, SINGLE, name, round, arrivals.and_then(median));
    draft.add(LONGEST_ARRIVAL, SINGLE, name, round, arrivals.and_then(longest));
    draft.add(DEPARTURE, SINGLE, name, round, departures.and_then(median));
    draft.add(LONGEST_DEPARTURE, SINGLE, name, round, departures.and_then(longest));
    if let Some(found) = found.filter(|found| found.n_failed > 0) {
        draft.note(format!("{name}, {SINGLE}: {} connections failed in a round", found.n_failed));
    }
}

fn add_deploy(
    draft: &mut Draft,
    (name, condition): (&str, &str),
    round: usize,
    found: Option<&deploy::Deploy>,
) {
    let number = |path: &str| found.and_then(|deploy| generators::number(&deploy.found, path).ok());
    let count = |kind: &str| number(&format!("/failed/{kind}")).unwrap_or(0.0);
    draft.add(FAILED, condition, name, round, number("/n_failed"));
    let n_reset = found.map(|_| count("reset") + count("closed"));
    draft.add(RESET, condition, name, round, n_reset);
    draft.add(P99, condition, name, round, number("/latency_us/p99"));
    let cpu = found.map(|deploy| deploy.cpu.hop.as_secs_f64());
    draft.add(HOP_CPU, condition, name, round, cpu);
    let kinds = found.and_then(|deploy| deploy.found["failed"].as_object());
    let seen = kinds.into_iter().flatten().filter(|(_, n)| n.as_u64() != Some(0));
    let seen: Vec<&str> = seen.map(|(kind, _)| kind.as_str()).collect();
    if !seen.is_empty() {
        draft.note(format!("{name}, rolling deploy: requests failed: {}", seen.join(", ")));
    }
}

fn judge(draft: &mut Draft, n_deploy: usize, deploy_condition: &str) {
    let figure = draft.find(ARRIVAL.name, SINGLE);
    let arrival = figure.and_then(|figure| figure.row(NOHOP)).map(|row| row.rounds.clone());
    let arrival: Vec<f64> = arrival.unwrap_or_default().into_iter().flatten().collect();
    let ratios = figure.map(|figure| figure.ratios(NOHOP, RUNTIME)).unwrap_or_default();
    let figure = draft.find(FAILED.name, deploy_condition);
    let rounds = figure.and_then(|figure| figure.row(NOHOP)).map(|row| row.rounds.clone());
    let rounds: Vec<f64> = rounds.unwrap_or_default().into_iter().flatten().collect();
    let failed = (!rounds.is_empty()).then(|| rounds.iter().sum());
    draft.goal(
        "registration to the first connection that lands on the new backend, nohop's median",
        Limit::AtMost(10.0),
        &arrival,
        "ms",
    );
    draft.goal(
        "the same, nohop over HAProxy's Runtime API by the same blocking query",
        Limit::AtMost(1.0),
        &ratios,
        "",
    );
    draft.goal_of_count(
        &format!("nohop's failed requests during {n_deploy} changes, in all rounds together"),
        Limit::AtMost(0.0),
        failed,
    );
}

/// Notes for the reader.
fn explain(draft: &mut Draft) {
    draft.note(
        "Shares: nohop balances connections, not requests, so what was expected is that new instances \
         get nothing from clients that keep their connections until these open new ones; HAProxy in \
         tcp mode does the same. HAProxy in http mode chooses for each request, and is expected to win.",
    );
    draft.note(format!(
        "Single changes of one service are {} ms apart at least. nohop's watch of a service asks Consul \
         twice at once and then every 250 ms, so of changes that come faster, as in the rolling deploy, \
         it applies several together; the followers of HAProxy and Envoy here have no such limit.",
        single_change::LIFE.as_millis()
    ));
    draft.note(
        "Instances are registered with the agent, which is also the server (`consul agent -dev`), with a \
         TTL check that passes. HAProxy asks Consul's DNS once a second (`timeout resolve`, `hold valid`).",
    );
    draft.note(
        "Envoy EDS reads its endpoints from a file, which a follower renames into place; a control plane \
         that streams them to it, as Consul's mesh does for sidecars, is not measured.",
    );
    draft.note(format!(
        "{HAPROXY_TCP} and {HAPROXY_HTTP} are driven by the Runtime API. HAProxy's configurations say \
         `option redispatch 1`: each retry goes to another server."
    ));
}

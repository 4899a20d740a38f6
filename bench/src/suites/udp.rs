//! UDP: datagrams a second as many as can be, latency at a rate that all are to keep up with, and the
//! processor time that a million of them cost.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Result;
use lb_tests::process::Process;
use serde_json::Value;

use crate::generators;
use crate::node::{CpuTimes, Layout, Node};
use crate::peers::{self, DIRECT, Peer, Protocol, Running, Services};
use crate::progress::Progress;
use crate::report::Better;
use crate::report_builder::{Draft, FixedRate, Quantity};

const RATE: Quantity = Quantity {
    name: "datagrams a second, as many as can be",
    unit: "datagrams/s",
    better: Better::Higher,
    base: DIRECT,
};
const CPU: Quantity = Quantity {
    name: "processor time for a million datagrams, both sides and what is between",
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
const KEPT_UP: Quantity = Quantity {
    name: "answers a second, where 60% of the slowest's rate is asked for",
    unit: "datagrams/s",
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

/// The sockets of a client: each one's datagrams go to the same backend, whoever balances. A multiple
/// of the backends, so that all can have as much to do.
const N_SOCKETS: usize = 8;

/// The datagrams that each socket has under way at a time.
const WINDOW: usize = 4;

/// How sockets are used.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    /// Each is connected once.
    Connected,
    /// Each datagram names whom it is for.
    Unconnected,
}

/// What a run goes through.
struct Plan {
    n_rounds: usize,
    layouts: &'static [Layout],
    /// The length of one measurement, in seconds.
    seconds: f64,
}

const FULL: Plan =
    Plan { n_rounds: 7, layouts: &[Layout::OneHost, Layout::TwoHosts], seconds: 1.0 };
const QUICK: Plan = Plan { n_rounds: 2, layouts: &[Layout::OneHost], seconds: 0.2 };

/// A contender at work. Dropped in this order.
struct Site {
    peer: Peer,
    running: Running,
    _backends: Vec<Process>,
    node: Node,
}

/// Runs the suite.
///
/// # Errors
/// When nothing can be measured at all.
pub fn run(is_quick: bool) -> Result<Draft> {
    let plan = if is_quick { QUICK } else { FULL };
    let title = "UDP: small datagrams that are sent back, connected sockets and unconnected ones";
    let mut draft = Draft::new(title, plan.n_rounds);
    let (able, contenders) = peers::able(Protocol::Udp);
    draft.contenders = contenders;
    let n_conditions = plan.layouts.len() * 2 * 2;
    let mut progress = Progress::new("udp", n_conditions * able.len() * (plan.n_rounds + 1));
    for &layout in plan.layouts {
        progress.preparing(layout.name());
        let sites = start(&able, layout, &mut draft);
        for uses in [Use::Connected, Use::Unconnected] {
            let condition = uses.condition(layout);
            saturate(&mut draft, &sites, (layout, uses), &plan, &mut progress);
            match FixedRate::of(&draft, RATE, &condition) {
                Some(rate) => {
                    at_rate(&mut draft, &sites, (&condition, uses, &rate), &plan, &mut progress);
                }
                None => draft.note(format!("{condition}: no fixed rate, since nobody has one")),
            }
        }
    }
    draft.finish();
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
        let addresses: Vec<_> = (0..N_BACKENDS).map(|idx| Node::backend(idx, 8080)).collect();
        // One at 0.0.0.0 would answer unconnected sockets from an address that they didn't ask.
        let mut backends = Vec::new();
        for address in &addresses {
            let mut echo = node.backend_place().command(generators::load_program()?);
            echo.args(["echo", &address.to_string()]);
            backends.push(Process::spawn("echo", echo)?);
        }
        for backend in &backends {
            backend.wait_for_line(&["listening on "])?;
        }
        let running = peer.start(&node, &Services::one(Protocol::Udp, addresses))?;
        Ok(Site { peer, running, _backends: backends, node })
    }

    /// Sends datagrams at a pace, such as `--rate 1000`. Who goes directly uses all backends, as the
    /// balancers do.
    fn ask(&self, uses: Use, pace: &str, seconds: f64) -> Result<Value> {
        let addresses: Vec<String> =
            self.running.addresses.iter().map(ToString::to_string).collect();
        let arguments = format!(
            "udp {} --seconds {seconds} --sockets {N_SOCKETS} {pace}{}",
            addresses.join(" "),
            if uses == Use::Unconnected { " --unconnected" } else { "" }
        );
        generators::load(self.node.client_place(), &arguments)
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
    (layout, uses): (Layout, Use),
    plan: &Plan,
    progress: &mut Progress,
) {
    let condition = uses.condition(layout);
    let mut wrongs = vec![Wrong::default(); sites.len()];
    // The first round warms up, and isn't counted.
    for round in 0..=plan.n_rounds {
        for (site, wrong) in draft.shuffled(sites.iter().zip(&mut wrongs)) {
            let name = site.peer.name;
            progress.step(&format!("{condition}: {name}"));
            let pace = format!("--window {WINDOW}");
            let (found, cpu) = match site.with_cpu(|| site.ask(uses, &pace, plan.seconds)) {
                Ok((found, cpu)) => (Some(found), cpu),
                Err(error) => {
                    draft.failed(name, &condition, &error);
                    (None, CpuTimes::default())
                }
            };
            let Some(round) = round.checked_sub(1) else { continue };
            let number = |path: &str| found.as_ref().and_then(|f| generators::number(f, path).ok());
            let n_answered = number("/answered").filter(|n_answered| *n_answered > 0.0);
            let per_million = |time: Duration| Some(time.as_secs_f64() / n_answered? * 1e6);
            let rate = n_answered.and(number("/rate"));
            draft.add(RATE, &condition, name, round, rate);
            draft.add(CPU, &condition, name, round, per_million(cpu.all()));
            if name != DIRECT {
                draft.add(HOP_CPU, &condition, name, round, per_million(cpu.hop));
            }
            wrong.add(found.as_ref());
        }
    }
    tell(draft, sites, &wrongs, &condition);
}

fn at_rate(
    draft: &mut Draft,
    sites: &[Site],
    (condition, uses, fixed): (&str, Use, &FixedRate),
    plan: &Plan,
    progress: &mut Progress,
) {
    let rate = fixed.rate;
    let condition = format!("{condition}, {rate} datagrams/s");
    fixed.add_utilisation(draft, UTILISATION, &condition);
    let mut wrongs = vec![Wrong::default(); sites.len()];
    for round in 0..plan.n_rounds {
        for (site, wrong) in draft.shuffled(sites.iter().zip(&mut wrongs)) {
            let name = site.peer.name;
            progress.step(&format!("{condition}: {name}"));
            let found = site.ask(uses, &format!("--rate {rate}"), plan.seconds);
            if let Err(error) = &found {
                draft.failed(name, &condition, error);
            }
            let found = found.ok();
            let number = |path: &str| found.as_ref().and_then(|f| generators::number(f, path).ok());
            let has_any = number("/answered").is_some_and(|n_answered| n_answered > 0.0);
            for (quantity, path) in
                [(P50, "/latency_us/p50"), (P99, "/latency_us/p99"), (KEPT_UP, "/rate")]
            {
                draft.add(quantity, &condition, name, round, number(path).filter(|_| has_any));
            }
            wrong.add(found.as_ref());
        }
    }
    tell(draft, sites, &wrongs, &condition);
}

/// What went wrong with a contender's datagrams under a condition, in all rounds.
#[derive(Clone, Default)]
struct Wrong {
    n_sent: u64,
    n_lost: u64,
    n_strange: u64,
    errors: BTreeMap<String, u64>,
}

impl Wrong {
    /// Adds what nohop-load tells of a round.
    fn add(&mut self, found: Option<&Value>) {
        let Some(found) = found else { return };
        let count = |key: &str| found[key].as_u64().unwrap_or(0);
        self.n_sent += count("sent");
        self.n_lost += count("lost");
        self.n_strange += count("strange");
        for (error, n) in found["errors"].as_object().into_iter().flatten() {
            *self.errors.entry(error.clone()).or_default() += n.as_u64().unwrap_or(0);
        }
    }

    /// In words; `None` where nothing did.
    fn text(&self) -> Option<String> {
        let Wrong { n_sent, n_lost, n_strange, errors } = self;
        let mut parts = Vec::new();
        if *n_lost > 0 {
            parts.push(format!("{n_lost} of {n_sent} datagrams lost"));
        }
        if *n_strange > 0 {
            parts.push(format!("{n_strange} answered from an address that wasn't asked"));
        }
        parts.extend(errors.iter().map(|(error, n)| format!("{n} times the error {error}")));
        (!parts.is_empty()).then(|| parts.join(", "))
    }
}

fn tell(draft: &mut Draft, sites: &[Site], wrongs: &[Wrong], condition: &str) {
    for (site, wrong) in sites.iter().zip(wrongs) {
        if let Some(text) = wrong.text() {
            draft.note(format!("{}, {condition}: {text}", site.peer.name));
        }
    }
}

impl Use {
    fn condition(self, layout: Layout) -> String {
        let how = match self {
            Use::Connected => "connected",
            Use::Unconnected => "unconnected",
        };
        format!("{}, {how}, {N_SOCKETS} sockets", layout.name())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_went_wrong() {
        let found = |lost, strange, errors: Value| json!({ "sent": 9, "answered": 9, "lost": lost, "strange": strange, "errors": errors });
        let mut wrong = Wrong::default();
        wrong.add(None);
        wrong.add(Some(&found(0, 0, json!({}))));
        assert_eq!(wrong.text(), None);
        wrong.add(Some(&found(2, 0, json!({ "refused": 3 }))));
        wrong.add(Some(&found(1, 1, json!({ "refused": 1 }))));
        let expected = "3 of 27 datagrams lost, 1 answered from an address that wasn't asked, \
                        4 times the error refused";
        assert_eq!(wrong.text().as_deref(), Some(expected));
    }
}

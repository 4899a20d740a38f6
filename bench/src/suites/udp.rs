//! UDP: datagrams a second as many as can be, latency at a rate that all are to keep up with, and the
//! processor time that a million of them cost.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Result;
use serde_json::Value;
use testbed::process::Process;

use crate::generators;
use crate::node::{Layout, Node};
use crate::peers::{self, DIRECT, Protocol, Services};
use crate::progress::Progress;
use crate::report_builder::{Draft, Quantity};
use crate::suites::site::{self, AtRate, P50, P99};

const RATE: Quantity =
    Quantity::higher("datagrams a second, as many as can be", "datagrams/s").over(DIRECT);
const CPU: Quantity =
    Quantity::lower("processor time for a million datagrams, both sides and what is between", "s")
        .over(DIRECT);
const HOP_CPU: Quantity = Quantity::lower("of that the hop's own processes", "s");
const KEPT_UP: Quantity = Quantity::higher(
    "answers a second, where 60% of the slowest's rate is asked for",
    "datagrams/s",
)
.over(DIRECT);

type Site = site::Site<Vec<Process>>;

/// The number of backends, each at an address of its own.
const N_BACKENDS: usize = 4;

/// The sockets of a client: each one's datagrams go to the same backend with every balancer. A multiple
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

/// The conditions of a run.
struct Plan {
    n_rounds: usize,
    layouts: &'static [Layout],
    /// The length of one measurement, in seconds.
    seconds: f64,
}

const FULL: Plan =
    Plan { n_rounds: 7, layouts: &[Layout::OneHost, Layout::TwoHosts], seconds: 1.0 };
const QUICK: Plan = Plan { n_rounds: 2, layouts: &[Layout::OneHost], seconds: 0.2 };

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
        let sites = Site::start_all(&able, layout, &mut draft, backends);
        for uses in [Use::Connected, Use::Unconnected] {
            let condition = uses.condition(layout);
            saturate(&mut draft, &sites, (&condition, uses), &plan, &mut progress);
            at_rate(&mut draft, &sites, (&condition, uses), &plan, &mut progress);
        }
    }
    draft.finish();
    Ok(draft)
}

/// The backends of a node, each at an address of its own. One at 0.0.0.0 would answer unconnected sockets
/// from an address that they didn't ask.
fn backends(node: &Node) -> Result<(Vec<Process>, Services)> {
    let addresses: Vec<_> = (0..N_BACKENDS).map(|idx| Node::backend(idx, 8080)).collect();
    let mut backends = Vec::new();
    for address in &addresses {
        let mut echo = node.backend_place().command(generators::load_program()?);
        echo.args(["echo", &address.to_string()]);
        backends.push(Process::spawn("echo", echo)?);
    }
    for backend in &backends {
        backend.wait_for_line(&["listening on "])?;
    }
    Ok((backends, Services::one(Protocol::Udp, addresses)))
}

/// Sends datagrams at a pace, such as `--rate 1000`. Who goes directly uses all backends, as the balancers
/// do.
fn ask(site: &Site, uses: Use, pace: &str, seconds: f64) -> Result<Value> {
    let addresses: Vec<String> = site.running.addresses.iter().map(ToString::to_string).collect();
    let arguments = format!(
        "udp {} --seconds {seconds} --sockets {N_SOCKETS} {pace}{}",
        addresses.join(" "),
        if uses == Use::Unconnected { " --unconnected" } else { "" }
    );
    generators::load(site.node.client_place(), &arguments)
}

fn saturate(
    draft: &mut Draft,
    sites: &[Site],
    (condition, uses): (&str, Use),
    plan: &Plan,
    progress: &mut Progress,
) {
    let mut wrongs = Wrongs::default();
    // The first round warms up, and isn't counted.
    for round in 0..=plan.n_rounds {
        for site in draft.shuffled(sites) {
            let name = site.peer.name;
            progress.step(&format!("{condition}: {name}"));
            let pace = format!("--window {WINDOW}");
            let act = || ask(site, uses, &pace, plan.seconds);
            let (found, cpu) = site.measure(draft, condition, act);
            let Some(round) = round.checked_sub(1) else { continue };
            let number = |path: &str| found.as_ref().and_then(|f| generators::number(f, path).ok());
            let n_answered = number("/answered").filter(|n_answered| *n_answered > 0.0);
            let per_million = |time: Duration| Some(time.as_secs_f64() / n_answered? * 1e6);
            draft.add(RATE, condition, name, round, n_answered.and(number("/rate")));
            site.add_cpu(draft, [CPU, HOP_CPU], (condition, round), cpu, per_million);
            if let Some(found) = &found {
                wrongs.entry(name).or_default().add(found);
            }
        }
    }
    note(draft, &wrongs, condition);
}

fn at_rate(
    draft: &mut Draft,
    sites: &[Site],
    (condition, uses): (&str, Use),
    plan: &Plan,
    progress: &mut Progress,
) {
    let at_rate = AtRate {
        saturation: RATE,
        saturated: condition,
        condition,
        quantities: &[(P50, "/latency_us/p50"), (P99, "/latency_us/p99"), (KEPT_UP, "/rate")],
        n_rounds: plan.n_rounds,
    };
    let (condition, all) = at_rate.run(draft, sites, progress, |site, _, rate| {
        ask(site, uses, &format!("--rate {rate}"), plan.seconds)
    });
    let mut wrongs = Wrongs::default();
    for (site, found) in &all {
        wrongs.entry(site.peer.name).or_default().add(found);
    }
    note(draft, &wrongs, &condition);
}

/// Failures, by peer.
type Wrongs = BTreeMap<&'static str, Wrong>;

/// Failures of a contender's datagrams under a condition, in all rounds.
#[derive(Clone, Default)]
struct Wrong {
    n_sent: u64,
    n_lost: u64,
    n_strange: u64,
    errors: BTreeMap<String, u64>,
}

impl Wrong {
    /// Adds what nohop-load reports of a round.
    fn add(&mut self, found: &Value) {
        let count = |key: &str| found[key].as_u64().unwrap_or(0);
        self.n_sent += count("sent");
        self.n_lost += count("lost");
        self.n_strange += count("strange");
        for (error, n) in found["errors"].as_object().into_iter().flatten() {
            *self.errors.entry(error.clone()).or_default() += n.as_u64().unwrap_or(0);
        }
    }

    /// As text; `None` if there were none.
    fn text(&self) -> Option<String> {
        let Wrong { n_sent, n_lost, n_strange, errors } = self;
        let mut parts = Vec::new();
        if *n_lost > 0 {
            parts.push(format!("{n_lost} of {n_sent} datagrams lost"));
        }
        if *n_strange > 0 {
            parts.push(format!("{n_strange} answered from another address"));
        }
        parts.extend(errors.iter().map(|(error, n)| format!("{n} times the error {error}")));
        (!parts.is_empty()).then(|| parts.join(", "))
    }
}

fn note(draft: &mut Draft, wrongs: &Wrongs, condition: &str) {
    for (name, wrong) in wrongs {
        if let Some(text) = wrong.text() {
            draft.note(format!("{name}, {condition}: {text}"));
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
        wrong.add(&found(0, 0, json!({})));
        assert_eq!(wrong.text(), None);
        wrong.add(&found(2, 0, json!({ "refused": 3 })));
        wrong.add(&found(1, 1, json!({ "refused": 1 })));
        let expected = "3 of 27 datagrams lost, 1 answered from another address, \
                        4 times the error refused";
        assert_eq!(wrong.text().as_deref(), Some(expected));
    }
}

//! DNS: queries a second as many as can be, and how long the slowest hundredth waits; of a zone of its
//! own, and of names that another resolver answers. Each server is alone on one processor and asked
//! from another.

pub(crate) mod dnsperf;
pub(crate) mod site;
mod stub;

use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Result, ensure};

use crate::peers::NOHOP;
use crate::pin;
use crate::progress::Progress;
use crate::report::Contender;
use crate::report_builder::{Draft, FixedRate, Limit, Quantity};

use super::site::UTILISATION;
use site::{CONSUL, DAEMON, DNSMASQ, Site, UNBOUND};

const RATE: Quantity =
    Quantity::higher("DNS queries a second, as many as can be", "queries/s").over(DNSMASQ);
const P99: Quantity =
    Quantity::lower("DNS latency, 99th percentile, at 60% of the slowest's rate", "us")
        .over(DNSMASQ);
const P50_CALM: Quantity =
    Quantity::lower("DNS latency, median, at 2,000 queries/s", "us").over(DNSMASQ);
const P99_CALM: Quantity =
    Quantity::lower("DNS latency, 99th percentile, at 2,000 queries/s", "us").over(DNSMASQ);
const LOST: Quantity = Quantity::lower("lost queries", "queries");

/// The rate of a machine that isn't busy with DNS, in queries a second.
const CALM_RATE: f64 = 2_000.0;

/// Who answers less than this share of the rate doesn't keep up with it.
const KEPT_UP: f64 = 0.95;

/// How dnsperf asks: as many clients, and as many queries of theirs without an answer yet.
const CLIENTS: &str = "-c 4 -q 100";

/// The conditions of a run.
struct Plan {
    n_rounds: usize,
    /// How many names the zone has.
    n_names: &'static [usize],
    /// How many of them Consul has at most, to which they have to be summary one by one.
    n_in_consul: usize,
    /// How many names are forwarded, each once in a round.
    n_forwarded: usize,
    /// The length of one measurement, in seconds.
    seconds: f64,
}

const FULL: Plan = Plan {
    n_rounds: 7,
    n_names: &[1, 10_000],
    n_in_consul: 10_000,
    n_forwarded: 50_000,
    seconds: 1.5,
};
const QUICK: Plan = Plan {
    n_rounds: 2,
    n_names: &[1, 10_000],
    n_in_consul: 1_000,
    n_forwarded: 10_000,
    seconds: 0.2,
};

/// Runs the suite.
///
/// # Errors
/// When nothing can be measured at all.
pub fn run(is_quick: bool) -> Result<Draft> {
    let plan = if is_quick { QUICK } else { FULL };
    let n_cpus = thread::available_parallelism()?.get();
    ensure!(n_cpus > 1, "servers and dnsperf need a processor each, and there is one only");
    let title = "DNS: a zone of its own, and names that another resolver answers";
    let mut draft = Draft::new(title, plan.n_rounds);
    draft.contenders = contenders();
    let absent: Vec<String> = draft
        .contenders
        .iter()
        .filter(|contender| contender.absent.is_some())
        .map(|contender| contender.name.clone())
        .collect();
    let able = |names: &[&'static str]| -> Vec<&'static str> {
        names.iter().copied().filter(|name| !absent.iter().any(|absent| absent == name)).collect()
    };
    let of_zone = able(&[NOHOP, DAEMON, DNSMASQ, UNBOUND, CONSUL]);
    let of_forwarding = able(&[NOHOP, DNSMASQ]);
    let n_steps = plan.n_names.len() * of_zone.len() * (5 * plan.n_rounds + 2)
        + of_forwarding.len() * (2 * plan.n_rounds + 1);
    let mut progress = Progress::new("dns", n_steps);
    for &n_names in plan.n_names {
        zone(&mut draft, &of_zone, n_names, &plan, &mut progress);
    }
    forwarding(&mut draft, &of_forwarding, &plan, &mut progress);
    draft.note(
        "each server has the first processor for itself, dnsperf the second one, but for \
         `from both processors`, where it has two threads that share the server's; what the kernel \
         answers takes the client's time; the resolver that is forwarded to shares dnsperf's; at 2,000 \
         queries/s the client is one thread, as an application's resolver, on dnsperf's processor; \
         `processors awake` keeps them from sleeping by a loop of the lowest priority on each",
    );
    draft.finish();
    judge(&mut draft, &plan);
    Ok(draft)
}

fn contenders() -> Vec<Contender> {
    vec![
        Contender::new(NOHOP, site::nohop_version(), "bench/peers/nohop.toml"),
        Contender::new(DAEMON, site::nohop_version(), "bench/peers/nohop.toml"),
        Contender::new(DNSMASQ, site::dnsmasq_version(), "bench/peers/dnsmasq.conf"),
        Contender::new(UNBOUND, site::unbound_version(), "bench/peers/unbound.conf"),
        Contender::new(CONSUL, testbed::consul::version(), ""),
    ]
}

/// Starts those of these names with so many names in their zone.
fn start(draft: &mut Draft, names: &[&'static str], n_names: usize) -> Vec<Site> {
    let mut sites = Vec::new();
    for &name in names {
        match Site::start(name, n_names) {
            Ok(site) => sites.push(site),
            Err(error) => draft.is_absent(name, &error),
        }
    }
    sites
}

/// Queries the names of a zone of this size.
fn zone(
    draft: &mut Draft,
    names: &[&'static str],
    n_names: usize,
    plan: &Plan,
    progress: &mut Progress,
) {
    let condition = zone_condition(n_names);
    progress.preparing(&condition);
    let consul = names.iter().copied().filter(|name| *name == CONSUL).collect::<Vec<_>>();
    let others = names.iter().copied().filter(|name| *name != CONSUL).collect::<Vec<_>>();
    let mut sites = start(draft, &others, n_names);
    let n_in_consul = n_names.min(plan.n_in_consul);
    sites.extend(start(draft, &consul, n_in_consul));
    if n_in_consul < n_names && !consul.is_empty() {
        let of = thousands(n_in_consul);
        draft.note(format!(
            "{CONSUL}, {condition}: it has {of} of them, which are the queried ones"
        ));
    }
    let from_both = from_both(&condition);
    let placements = [(&condition, dnsperf::query as Query), (&from_both, dnsperf::query_from_all)];
    for (condition, query) in placements {
        // The first round warms up, and isn't counted.
        for round in 0..=plan.n_rounds {
            for site in draft.shuffled(&sites) {
                progress.step(&format!("{condition}: {}", site.name));
                let rate = saturate(draft, site, condition, plan, query);
                if let Some(round) = round.checked_sub(1) {
                    draft.add(RATE, condition, site.name, round, rate);
                }
            }
        }
    }
    at_rate(draft, &sites, &condition, plan, progress, |site| Ok(site.questions().to_owned()));
    calm(draft, &sites, &condition, plan, progress);
    match pin::keep_awake() {
        Ok(_loops) => calm(draft, &sites, &awake(&condition), plan, progress),
        Err(error) => draft.note(format!("{}: not measured: {error:#}", awake(&condition))),
    }
}

/// How long queries wait while no server is busy.
fn calm(draft: &mut Draft, sites: &[Site], condition: &str, plan: &Plan, progress: &mut Progress) {
    for round in 0..plan.n_rounds {
        for site in draft.shuffled(sites) {
            progress.step(&format!("{condition}, calm: {}", site.name));
            let waits_us = calm_waits(draft, site, condition, plan);
            draft.add(P50_CALM, condition, site.name, round, waits_us.map(|[p50, _]| p50));
            draft.add(P99_CALM, condition, site.name, round, waits_us.map(|[_, p99]| p99));
        }
    }
}

/// The condition in which processors don't sleep between queries.
fn awake(condition: &str) -> String {
    format!("{condition}, processors awake")
}

/// Queries a server, as dnsperf's functions do.
type Query = fn(dnsperf::At<'_>, &Path, &str) -> Result<dnsperf::Summary>;

fn from_both(condition: &str) -> String {
    format!("{condition}, from both processors")
}

/// How long the slowest hundredth waits at a rate that all of these keep up with.
fn at_rate(
    draft: &mut Draft,
    sites: &[Site],
    condition: &str,
    plan: &Plan,
    progress: &mut Progress,
    questions: impl Fn(&Site) -> Result<PathBuf>,
) {
    let Some(fixed) = FixedRate::of(draft, RATE, condition) else {
        return draft.note(format!("{condition}: no fixed rate, since no contender has one"));
    };
    let condition = format!("{condition}, {:.0} queries/s", fixed.rate);
    fixed.add_utilisation(draft, UTILISATION, &condition);
    for round in 0..plan.n_rounds {
        for site in draft.shuffled(sites) {
            progress.step(&format!("{condition}: {}", site.name));
            let p99_us = p99_at(draft, site, &condition, fixed.rate, plan, &questions);
            draft.add(P99, &condition, site.name, round, p99_us);
        }
    }
}

/// The queries that are answered in a second, as many as can be.
fn saturate(
    draft: &mut Draft,
    site: &Site,
    condition: &str,
    plan: &Plan,
    query: Query,
) -> Option<f64> {
    let arguments = format!("{CLIENTS} -t 2 -l {}", plan.seconds);
    match query(site.at(), site.questions(), &arguments) {
        Ok(summary) => {
            if summary.n_failed() > 0 {
                let (n_failed, n_sent) = (summary.n_failed(), summary.n_sent);
                draft.note(format!(
                    "{}, {condition}: {n_failed} of {n_sent} queries failed in a round",
                    site.name
                ));
            }
            Some(summary.rate())
        }
        Err(error) => {
            draft.failed(site.name, condition, &error);
            None
        }
    }
}

/// How long half of the queries of an application wait at most and the slowest hundredth at least, in
/// microseconds, while it is calm.
fn calm_waits(draft: &mut Draft, site: &Site, condition: &str, plan: &Plan) -> Option<[f64; 2]> {
    let (host, server) = (site.client_host(), site.address);
    match stub::waits_us(host, server, site.questions(), CALM_RATE, plan.seconds) {
        Ok(waits_us) => Some(waits_us),
        Err(error) => {
            draft.failed(site.name, condition, &error);
            None
        }
    }
}

/// How long the slowest hundredth of the queries waits at least, in microseconds, at this rate; `None` for a
/// server that doesn't keep up with it.
fn p99_at(
    draft: &mut Draft,
    site: &Site,
    condition: &str,
    rate: f64,
    plan: &Plan,
    questions: impl Fn(&Site) -> Result<PathBuf>,
) -> Option<f64> {
    let arguments = format!("{CLIENTS} -t 2 -l {} -Q {rate:.0}", plan.seconds);
    let asked = questions(site)
        .and_then(|questions| dnsperf::query_and_list(site.at(), &questions, &arguments));
    match asked {
        Ok((summary, p99_us)) if summary.rate() >= KEPT_UP * rate => Some(p99_us),
        Ok(_) => {
            draft.note(format!(
                "{}, {condition}: too slow in a round, which has no latency",
                site.name
            ));
            None
        }
        Err(error) => {
            draft.failed(site.name, condition, &error);
            None
        }
    }
}

/// Names that another resolver answers, each asked for once in a round: none may be lost.
fn forwarding(draft: &mut Draft, names: &[&'static str], plan: &Plan, progress: &mut Progress) {
    let condition = forwarding_condition(plan);
    progress.preparing(&condition);
    let sites = start(draft, names, 1);
    for round in 0..=plan.n_rounds {
        for site in draft.shuffled(&sites) {
            progress.step(&format!("{condition}: {}", site.name));
            let summary = site.questions_of_others(plan.n_forwarded).and_then(|questions| {
                dnsperf::query(site.at(), &questions, &format!("{CLIENTS} -n 1"))
            });
            if let Err(error) = &summary {
                draft.failed(site.name, &condition, error);
            }
            // The first round warms up, and isn't counted.
            let Some(round) = round.checked_sub(1) else { continue };
            let summary = summary.ok();
            draft.add(RATE, &condition, site.name, round, summary.map(|summary| summary.rate()));
            let n_lost = summary.map(|summary| summary.n_failed() as f64);
            draft.add(LOST, &condition, site.name, round, n_lost);
        }
    }
    let questions = |site: &Site| site.questions_of_others(plan.n_forwarded);
    at_rate(draft, &sites, &condition, plan, progress, questions);
}

fn zone_condition(n_names: usize) -> String {
    format!("{} name{}", thousands(n_names), if n_names == 1 { "" } else { "s" })
}

fn forwarding_condition(plan: &Plan) -> String {
    format!("forwarding, {} names, each asked once", thousands(plan.n_forwarded))
}

/// A number with a comma before each group of three digits.
fn thousands(number: usize) -> String {
    let digits = number.to_string();
    let is_start = |idx: usize| idx > 0 && (digits.len() - idx).is_multiple_of(3);
    let mut text = String::new();
    for (idx, digit) in digits.char_indices() {
        if is_start(idx) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn judge(draft: &mut Draft, plan: &Plan) {
    let zones: Vec<_> = plan.n_names.iter().map(|n_names| zone_condition(*n_names)).collect();
    let of_zones = zones.iter().flat_map(|zone| [(zone.clone(), 1.4), (from_both(zone), 2.0)]);
    for (condition, least) in of_zones.chain([(forwarding_condition(plan), 1.0)]) {
        let figure = draft.find(RATE.name, &condition);
        let ratios = figure.map(|figure| figure.ratios(NOHOP, DNSMASQ)).unwrap_or_default();
        let what = format!("DNS queries a second, nohop over {DNSMASQ} ({condition})");
        draft.goal(&what, Limit::AtLeast(least), &ratios, "");
    }
    for zone in zones.iter().flat_map(|zone| [zone.clone(), awake(zone)]) {
        for (quantity, most) in [(P50_CALM, 6.0), (P99_CALM, 40.0)] {
            let row = draft.find(quantity.name, &zone).and_then(|figure| figure.row(NOHOP));
            let rounds: Vec<f64> =
                row.map(|row| row.rounds.iter().flatten().copied().collect()).unwrap_or_default();
            let what = format!("{}, nohop ({zone})", quantity.name);
            draft.goal(&what, Limit::AtMost(most), &rounds, quantity.unit);
        }
    }
    let lost = draft.find(LOST.name, &forwarding_condition(plan));
    let rounds = lost.and_then(|figure| figure.row(NOHOP)).map(|row| row.rounds.clone());
    // One lost in any round is one too many.
    let rounds = rounds.filter(|rounds| rounds.iter().any(Option::is_some));
    let sum = rounds.map(|rounds| rounds.iter().flatten().sum());
    draft.goal_of_count(
        "forwarded queries that nohop loses, of all rounds",
        Limit::AtMost(0.0),
        sum,
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Outcome;

    #[test]
    fn numbers_are_grouped() {
        for (number, expected) in
            [(1, "1"), (999, "999"), (1_000, "1,000"), (10_000, "10,000"), (1_234_567, "1,234,567")]
        {
            assert_eq!(thousands(number), expected);
        }
    }

    #[test]
    fn conditions() {
        assert_eq!(
            QUICK.n_names.iter().map(|n| zone_condition(*n)).collect::<Vec<_>>(),
            ["1 name", "10,000 names"]
        );
        assert_eq!(forwarding_condition(&FULL), "forwarding, 50,000 names, each asked once");
    }

    #[test]
    fn one_lost_query_is_too_many() {
        let mut draft = Draft::new("a test", 3);
        for (round, n_lost) in [0.0, 1.0, 0.0].into_iter().enumerate() {
            draft.add(LOST, &forwarding_condition(&QUICK), NOHOP, round, Some(n_lost));
        }
        draft.finish();
        judge(&mut draft, &QUICK);
        let outcomes: Vec<_> = draft.goals.iter().map(|goal| goal.outcome).collect();
        let (lost, rest) = outcomes.split_last().expect("there are goals");
        assert_eq!(*lost, Outcome::Missed);
        assert!(rest.iter().all(|outcome| *outcome == Outcome::NotMeasured));
    }
}

//! How a fault reaches clients: backends that refuse, drop packets or reset, instances that are killed,
//! updated or removed, a host that falls silent, and a backend that is slow.

use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::Signal;
use serde_json::Value;
use testbed::capture::{Capture, Connects};
use testbed::cmd;
use testbed::process::Process;

use super::change::site::{Kind, Setup, Site};
use super::change::{self, contender};
use super::site::at_once;
use crate::generators;
use crate::node::Layout;
use crate::peers::{NFTABLES, NOHOP, Protocol, find};
use crate::progress::Progress;
use crate::report_builder::{Draft, Limit, Quantity};

const FAILED: Quantity = Quantity::lower("failed requests", "%");
const SLOW: Quantity =
    Quantity { name: "slow requests, answered after more than 100 ms", ..FAILED };
const TOGETHER: Quantity = Quantity { name: "failed and slow requests together", ..FAILED };
const P50: Quantity = Quantity::lower("latency of what is answered, median", "us");
const P99: Quantity = Quantity { name: "latency of what is answered, 99th percentile", ..P50 };
const LATE: Quantity =
    Quantity::lower("connections to a dead backend after its first sign", "connections");

// Of the others, where one of ten answers 50 times slower.
const SLOW_FAILED: Quantity = Quantity { name: "one of ten is slow: failed requests", ..FAILED };
const SLOW_SHARE: Quantity =
    Quantity { name: "one of ten is slow: requests that it answered", ..FAILED };
const SLOW_P50: Quantity = Quantity { name: "one of ten is slow: latency, median", ..P50 };
const SLOW_P99: Quantity = Quantity { name: "one of ten is slow: latency, 99th percentile", ..P50 };

/// nohop whose daemon ends by SIGKILL before each fault: what the kernel does alone.
const KILLED: &str = "nohop, daemon killed";

/// A contender's name, its setup, and its file in the repository.
type Column = (&'static str, Setup, &'static str);

const RELOAD: Column = ("HAProxy", Setup::of(Kind::Reload), "bench/peers/haproxy-reload.cfg");
const EDS: Column = (
    "Envoy",
    Setup { settings: "eds", ..Setup::of(Kind::Eds(Protocol::Http)) },
    "bench/peers/envoy.yaml",
);
const RULES: Column = (NFTABLES, Setup::of(Kind::Nftables), "bench/peers/nftables.nft");

/// Those who meet the faults.
const COLUMNS: [Column; 10] = [
    (NOHOP, Setup::of(Kind::Nohop), ""),
    (KILLED, Setup::of(Kind::Nohop), ""),
    ("nohop + checks", Setup { are_checked: true, ..Setup::of(Kind::Nohop) }, ""),
    RELOAD,
    with(RELOAD, "HAProxy, no redispatch", "no-redispatch"),
    with(RELOAD, "HAProxy + checks", "check"),
    EDS,
    with(EDS, "Envoy, retries", "eds+retry"),
    with(EDS, "Envoy, retries, outliers", "eds+retry+outlier"),
    RULES,
];

/// Those who meet a slow backend: an algorithm each.
const ALGORITHMS: [Column; 7] = [
    at_work(("nohop least", nohop("balance = { algorithm = \"least\", slow_start = \"\" }\n"), "")),
    at_work((
        "nohop latency",
        nohop("balance = { algorithm = \"latency\", slow_start = \"\" }\n"),
        "",
    )),
    at_work((
        "nohop random",
        nohop("balance = { algorithm = \"random\", slow_start = \"\" }\n"),
        "",
    )),
    at_work(with(RELOAD, "HAProxy leastconn", "leastconn")),
    at_work(with(EDS, "Envoy LEAST_REQUEST", "eds+LEAST_REQUEST")),
    at_work(with(EDS, "Envoy RANDOM", "eds+RANDOM")),
    at_work(RULES),
];

const fn nohop(settings: &'static str) -> Setup {
    Setup { settings, ..Setup::of(Kind::Nohop) }
}

const fn with(column: Column, name: &'static str, settings: &'static str) -> Column {
    (name, Setup { settings, ..column.1 }, column.2)
}

/// Long enough that a backend has a request at hand most of the time.
const fn at_work(column: Column) -> Column {
    (column.0, Setup { work_ms: 20, ..column.1 }, column.2)
}

/// Within which a request is answered or has failed.
const PATIENCE: Duration = Duration::from_secs(3);

/// The requests before the fault, which don't count.
const WARM_UP: Duration = Duration::from_secs(1);

/// How much longer than all that the generator may take to report.
const SPARE: Duration = Duration::from_secs(20);

/// From the first SYN that isn't answered, when a silent backend has given a sign.
const SILENCE: Duration = Duration::from_millis(50);

const NOTES: [&str; 10] = [
    "all contenders meet an event at the same time, each on a node of its own with a Consul and instances of \
     its own: latencies of a few ms are theirs together",
    "a connection a request; 150 requests/s for each contender, 500 where a backend is slow; one that isn't \
     answered within 3 s has failed, one that is answered after more than 100 ms is slow",
    "an event begins after a second of requests that don't count",
    "refuses: the process is killed by SIGKILL. Drops: a rule on its host drops all that is sent to it, open \
     connections included. Resets: it accepts, and resets what it has accepted. Of these three Consul learns \
     nothing, but by its check where there are checks",
    "the rest is what a Nomad of two nodes did: an instance that is killed leaves Consul 400 ms later and isn't \
     replaced; in an update, and when a service is scaled down, an instance leaves Consul and is killed at once \
     (no shutdown_delay), in an update its successor comes 500 ms later; the instances of a silent host become \
     critical after 1 s",
    "daemon killed: by SIGKILL, before the load begins; so nothing of what Consul learns reaches the kernel",
    "connections to a dead backend: those whose first SYN a packet socket on the client's host saw after the \
     first RST of that backend, or where there is none, later than 50 ms after the first SYN that wasn't \
     answered. Checks and probes are among them; so is the connection that was about to begin. The column with \
     checks has one a second by Consul",
    "nohop and nftables are not on the way of a connection: one that fails is the client's to repeat. HAProxy, \
     in tcp mode, repeats up to three times (`retries 3`), by `option redispatch 1` at another server; Envoy's \
     retries: `connect-failure,refused-stream,reset`, two. Envoy's outlier detection has its defaults. Envoy \
     works in HTTP and keeps its connections to instances",
    "HAProxy and nftables follow Consul as consul-template has them do: a file at each change, and a reload \
     without loss; Envoy by a file of endpoints",
    "one of ten is slow: an instance works 20 ms on a request, on any number at a time; the slow one a second. \
     nohop's `slow_start` is off there",
];

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    Refuses,
    Drops,
    Resets,
    Killed,
    Updated,
    ScaledDown,
    HostSilent,
    Slow,
}

const FAULTS: [Event; 7] = [
    Event::Refuses,
    Event::Drops,
    Event::Resets,
    Event::Killed,
    Event::Updated,
    Event::ScaledDown,
    Event::HostSilent,
];

/// A step of an event, with some of the instances that there were before.
enum Act {
    Signal(Range<usize>, Signal),
    Silence(Range<usize>),
    Deregister(Range<usize>),
    Fail(Range<usize>),
    Join,
}

/// What was found of a contender.
struct Found {
    report: Value,
    n_late: usize,
    /// The answers of the first instance.
    n_first: u64,
}

/// Runs the suite.
///
/// # Errors
/// When nothing can be measured at all.
pub fn run(is_quick: bool) -> Result<Draft> {
    let n_rounds = if is_quick { 1 } else { 3 };
    let mut draft =
        Draft::new("how a fault reaches clients: failed and slow requests from then on", n_rounds);
    for (name, setup, config) in COLUMNS.into_iter().chain(ALGORITHMS) {
        if !draft.contenders.iter().any(|listed| listed.name == name) {
            draft.contenders.push(contender(name, setup.kind, config));
        }
    }
    NOTES.iter().for_each(|note| draft.note(*note));
    let mut progress = Progress::new("failure", n_rounds * (FAULTS.len() + 1));
    for (columns, events) in [(&COLUMNS[..], &FAULTS[..]), (&ALGORITHMS, &[Event::Slow])] {
        progress.preparing("a Consul for each contender");
        let setups = columns.iter().map(|&(name, setup, _)| (name, setup)).collect();
        let mut sites = change::start(&mut draft, setups, Layout::TwoHosts)?;
        for round in 0..n_rounds {
            for &event in events {
                let seconds = event.seconds(is_quick);
                let condition = format!("{}, {seconds} s", event.name());
                progress.step(&condition);
                let those: Vec<_> =
                    sites.iter_mut().filter(|site| event.reaches(site.name)).collect();
                let names: Vec<_> = those.iter().map(|site| site.name).collect();
                let ready = at_once(those, |site| prepare(site, event).map(|()| site));
                let found = at_once(ready, |site| measure(site?, event, seconds));
                for (name, found) in names.into_iter().zip(found) {
                    let found = found.inspect_err(|error| draft.failed(name, &condition, error));
                    add(&mut draft, name, (event, &condition), round, found.ok());
                }
            }
        }
    }
    draft.finish();
    if !is_quick {
        judge(&mut draft);
    }
    Ok(draft)
}

/// New instances, which all get requests; and no daemon, where it is to be dead.
fn prepare(site: &mut Site, event: Event) -> Result<()> {
    let is_killed = site.name == KILLED;
    if is_killed && let Some(nohop) = site.nohop() {
        // Before the first event it runs.
        if nohop.process.ends_within(Duration::ZERO)? {
            nohop.start_again()?;
        }
    }
    site.replace(event.n_instances())?;
    if is_killed && let Some(nohop) = site.nohop() {
        nohop.kill()?;
    }
    Ok(())
}

/// Sends requests while it happens.
fn measure(site: &mut Site, event: Event, seconds: u64) -> Result<Found> {
    let first = site.batch.instances[0].answer();
    let dead = &site.batch.instances[..event.n_dead()];
    let dead: Vec<_> = dead.iter().map(|instance| instance.address).collect();
    let capture = Capture::start(site.node.client_host().outside(), &dead)?;
    let mut command = site.node.client_place().command(generators::load_program()?);
    let with_warm_up = seconds + WARM_UP.as_secs();
    let rate = if event == Event::Slow { 500 } else { 150 };
    let arguments = format!(
        "http {} --rate {rate} --close --connections 4096 --seconds {with_warm_up} --warmup-ms {} \
         --timeout-ms {} --slow-ms 100",
        site.address,
        WARM_UP.as_millis(),
        PATIENCE.as_millis(),
    );
    command.args(arguments.split(' '));
    let load = Process::spawn("nohop-load", command)?;
    load.wait_for_line(&["requesting"])?;
    let start = Instant::now() + WARM_UP;
    for (at_ms, act) in event.acts(seconds * 1000) {
        let at = start + Duration::from_millis(at_ms);
        thread::sleep(at.saturating_duration_since(Instant::now()));
        act.play(site)?;
    }
    let limit = Duration::from_secs(with_warm_up) + PATIENCE + SPARE;
    let line = load.wait_for_line_within(limit, &["\"requests\""])?;
    let report: Value = serde_json::from_str(&line).context("read nohop-load's report")?;
    let n_late = capture.finish(&dead)?.iter().map(n_late).sum();
    let n_first = report["servers"][&first].as_u64().unwrap_or(0);
    Ok(Found { report, n_late, n_first })
}

/// The connections that began after the backend's first sign.
fn n_late(connects: &Connects) -> usize {
    let reset = connects.all().iter().filter_map(|connect| connect.reset).min();
    let silent = || connects.first_unanswered().map(|unanswered| unanswered + SILENCE);
    let sign = connects.first_refusal().or(reset).or_else(silent);
    sign.map_or(0, |sign| connects.since(sign).len())
}

impl Act {
    fn play(self, site: &mut Site) -> Result<()> {
        let of = |range: &Range<usize>| site.batch.instances[range.clone()].iter();
        match self {
            Act::Signal(range, signal) => of(&range).for_each(|instance| instance.signal(signal)),
            Act::Deregister(range) => {
                of(&range).try_for_each(|instance| site.deregister(&instance.name))?;
            }
            Act::Fail(range) => of(&range).try_for_each(|instance| site.fail(&instance.name))?,
            Act::Silence(range) => {
                // The rules go with the namespace.
                let mut rules = "add table ip nohop_fault; add chain ip nohop_fault input { type \
                                 filter hook input priority 0; };"
                    .to_owned();
                for ip in of(&range).map(|instance| *instance.address.ip()) {
                    rules += &format!("add rule ip nohop_fault input ip daddr {ip} drop;");
                }
                let mut nft = site.node.backend_place().command(find("nft")?);
                nft.arg(rules);
                cmd::stdout(nft)?;
            }
            Act::Join => site.join()?,
        }
        Ok(())
    }
}

impl Event {
    fn name(self) -> &'static str {
        match self {
            Event::Refuses => "one of ten refuses",
            Event::Drops => "one of ten drops packets",
            Event::Resets => "one of ten accepts and resets",
            Event::Killed => "one of three is killed",
            Event::Updated => "three are updated one by one",
            Event::ScaledDown => "six are scaled down to three",
            Event::HostSilent => "a host with three of six falls silent",
            Event::Slow => "one of ten answers 50 times slower",
        }
    }

    fn n_instances(self) -> usize {
        match self {
            Event::Killed | Event::Updated => 3,
            Event::ScaledDown | Event::HostSilent => 6,
            Event::Refuses | Event::Drops | Event::Resets | Event::Slow => 10,
        }
    }

    /// How many of them die, the first ones.
    fn n_dead(self) -> usize {
        match self {
            Event::Updated | Event::ScaledDown | Event::HostSilent => 3,
            _ => 1,
        }
    }

    fn seconds(self, is_quick: bool) -> u64 {
        match self {
            _ if is_quick => 6,
            Event::Refuses | Event::Drops => 60,
            _ => 30,
        }
    }

    /// Without a daemon, what Consul reports has no effect: there is nothing to see.
    fn reaches(self, contender: &str) -> bool {
        contender != KILLED || !matches!(self, Event::Updated | Event::ScaledDown)
    }

    /// What is done, each so many milliseconds after the start of so long a time.
    fn acts(self, lasts_ms: u64) -> Vec<(u64, Act)> {
        match self {
            Event::Refuses => vec![(0, Act::Signal(0..1, Signal::KILL))],
            Event::Drops => vec![(0, Act::Silence(0..1))],
            Event::Resets => vec![(0, Act::Signal(0..1, Signal::USR1))],
            Event::Slow => vec![(0, Act::Signal(0..1, Signal::USR2))],
            Event::Killed => {
                vec![(0, Act::Signal(0..1, Signal::KILL)), (400, Act::Deregister(0..1))]
            }
            Event::Updated => (0..3)
                .flat_map(|idx| {
                    let (at, range) = (lasts_ms / 3 * idx as u64, idx..idx + 1);
                    let kill = Act::Signal(range.clone(), Signal::KILL);
                    [(at, Act::Deregister(range)), (at, kill), (at + 500, Act::Join)]
                })
                .collect(),
            Event::ScaledDown => {
                vec![(0, Act::Deregister(0..3)), (0, Act::Signal(0..3, Signal::KILL))]
            }
            Event::HostSilent => vec![(0, Act::Silence(0..3)), (1000, Act::Fail(0..3))],
        }
    }
}

/// Adds a contender's results of a round, or that there are none.
fn add(
    draft: &mut Draft,
    contender: &str,
    (event, condition): (Event, &str),
    round: usize,
    found: Option<Found>,
) {
    let number =
        |path: &str| found.as_ref().and_then(|found| generators::number(&found.report, path).ok());
    let percent = |n: Option<f64>| Some(100.0 * n? / number("/requests").filter(|n| *n > 0.0)?);
    let (failed, slow) = (percent(number("/n_failed")), percent(number("/n_slow")));
    let (p50, p99) = (number("/latency_us/p50"), number("/latency_us/p99"));
    let n_first = found.as_ref().map(|found| found.n_first as f64);
    let n_late = found.as_ref().map(|found| found.n_late as f64);
    let together = failed.zip(slow).map(|(failed, slow)| failed + slow);
    let figures = match event {
        Event::Slow => &[
            (SLOW_P99, p99),
            (SLOW_P50, p50),
            (SLOW_SHARE, percent(n_first)),
            (SLOW_FAILED, failed),
        ][..],
        _ => &[
            (TOGETHER, together),
            (FAILED, failed),
            (SLOW, slow),
            (LATE, n_late),
            (P50, p50),
            (P99, p99),
        ],
    };
    for (quantity, value) in figures {
        draft.add(*quantity, condition, contender, round, *value);
    }
}

/// The goals, all of nohop without its daemon.
fn judge(draft: &mut Draft) {
    let rounds = |draft: &Draft, quantity: Quantity, event: Event| -> Vec<f64> {
        let figure = draft.find(quantity.name, &format!("{}, 60 s", event.name()));
        let row = figure.and_then(|figure| figure.row(KILLED));
        row.map(|row| row.rounds.iter().copied().flatten().collect()).unwrap_or_default()
    };
    for event in [Event::Refuses, Event::Drops] {
        let most = |values: Vec<f64>| values.into_iter().reduce(f64::max);
        let what = |what: &str| format!("{}, {KILLED}: {what}, most of a round", event.name());
        let together = most(rounds(draft, TOGETHER, event));
        draft.goal_of_count(&what("failed and slow requests in %"), Limit::AtMost(0.5), together);
        // After 1, 3, 7, 15 and 31 s a trial, and the connection that was about to begin.
        let n_late = most(rounds(draft, LATE, event));
        let text = what("connections after the first sign");
        draft.goal_of_count(&text, Limit::AtMost(6.0), n_late);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_was_found_becomes_shares() {
        let report = json!({
            "requests": 200, "n_failed": 20, "n_slow": 1, "latency_us": { "p50": 90, "p99": 900 },
        });
        let mut draft = Draft::new("a test", 2);
        let found = Found { report, n_late: 3, n_first: 4 };
        add(&mut draft, NOHOP, (Event::Drops, "drops"), 0, Some(found));
        add(&mut draft, NOHOP, (Event::Drops, "drops"), 1, None);
        draft.finish();
        for (quantity, expected) in
            [(FAILED, 10.0), (SLOW, 0.5), (TOGETHER, 10.5), (P50, 90.0), (P99, 900.0), (LATE, 3.0)]
        {
            let row = draft.find(quantity.name, "drops").and_then(|figure| figure.row(NOHOP));
            let rounds = row.map(|row| row.rounds.clone()).unwrap_or_default();
            assert_eq!(rounds, [Some(expected), None], "{}", quantity.name);
        }
    }

    #[test]
    fn acts_come_in_their_order_and_end_in_time() {
        for event in FAULTS.into_iter().chain([Event::Slow]) {
            let acts: Vec<u64> = event.acts(6_000).iter().map(|(at_ms, _)| *at_ms).collect();
            assert!(acts.is_sorted() && acts.iter().all(|at_ms| *at_ms < 6_000), "{event:?}");
        }
    }
}

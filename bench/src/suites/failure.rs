//! One backend of ten fails: the errors that clients see until it is removed, if it is.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::net::SocketAddrV4;
use std::process::{Child, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use testbed::consul::{self, Consul};
use testbed::helloworld::Helloworld;
use testbed::nohop::{self, Nohop};
use testbed::process::Process;
use testbed::tempdir::TempDir;

use crate::generators;
use crate::node::{Layout, Node};
use crate::peers::{
    self, DIRECT, Guard, HAPROXY_HTTP, HAPROXY_TCP, NFTABLES, NGINX, NOHOP, Peer, Protocol,
    Running, Services, start_backend,
};
use crate::progress::Progress;
use crate::report::{Contender, Row};
use crate::report_builder::{Draft, Quantity};
use crate::suites::site::at_once;

const FAILED: Quantity = Quantity::lower("failed requests", "%");
const SLOW: Quantity =
    Quantity { name: "slow requests, answered after more than 100 ms", ..FAILED };
const P99: Quantity =
    Quantity { name: "latency of what is answered, 99th percentile", unit: "us", ..FAILED };

/// The number of backends, of which the first fails.
const N_BACKENDS: usize = 10;

/// Where the others listen, and where the one does that fails: on its own port, so that nothing
/// else listens there.
const PORT: u16 = 8080;
const VICTIM_PORT: u16 = 8081;

/// Requests a second, each by a connection of its own.
const RATE: usize = 50;

/// Within which a request is answered or has failed.
const PATIENCE: Duration = Duration::from_secs(3);

/// The time before the fault: everything has started by then.
const WARM_UP: Duration = Duration::from_secs(1);

/// How much longer than that the generator may take to report.
const SPARE: Duration = Duration::from_secs(20);

/// The seconds after the fault that the curves show: what checks do, they have done by then.
const N_CURVE_SECONDS: usize = 12;

/// How often, and how many times at most, it is looked whether the generator has started.
const LOOK: Duration = Duration::from_millis(1);
const N_LOOKS: u32 = 20_000;

/// The suffix of a contender whose checks are on.
const CHECKS: &str = " + checks";

/// Those whose backends can be checked.
const CHECKED: [&str; 3] = [NOHOP, HAPROXY_TCP, HAPROXY_HTTP];

/// Why others have no checks that could be on.
const UNCHECKED: [(&str, &str); 2] = [
    (
        NGINX,
        "only nginx's commercial edition checks; what it learns from requests is on by default",
    ),
    (NFTABLES, "rules don't check"),
];

const NOTES: [&str; 9] = [
    "all contenders are measured at the same time and with both faults at once, each on a node of its \
     own: latencies of a few ms are theirs together",
    "50 requests/s for each contender and fault, a connection a request; one that isn't answered \
     within 3 s has failed",
    "the fault comes after a second of requests that don't count, within a few ms of the first that \
     does; each round begins with a fresh start of everything",
    "a backend that refuses is a process that was killed; one that drops packets is behind a rule on \
     its host that drops all that is sent to it, open connections included",
    "nine of the ten backends are one nginx at nine addresses",
    "nohop and nftables are not on the way of a connection: a connect that fails is the client's to \
     repeat; proxies repeat it themselves (HAProxy: retries 3, redispatch; nginx: its default)",
    "nohop itself doesn't check, it follows Consul; with checks: a TCP check each second and with a \
     timeout of one at a Consul agent on the client's host, where one failure makes an instance \
     critical, which is Consul's default. An agent beside the backends sees one that refuses alike, \
     but not what is lost on the way to them",
    "HAProxy with checks: `check inter 1s`, where three failures take a server out, which is its \
     default",
    "nginx, by default, doesn't ask a backend for 10 s that has failed once (max_fails=1 \
     fail_timeout=10s, for each worker)",
];

/// What happens to one backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// Its process dies: the kernel refuses connections.
    Refuses,
    /// Packets to it are dropped.
    Drops,
}

const FAULTS: [Fault; 2] = [Fault::Refuses, Fault::Drops];

/// A fault that is prepared.
enum Ready {
    /// The process is to be killed.
    ToKill,
    /// `nft` waits for what it is to add; without that it ends when its stdin does.
    ToDrop(Child),
}

/// The conditions of a run.
struct Plan {
    n_rounds: usize,
    seconds: usize,
}

const FULL: Plan = Plan { n_rounds: 7, seconds: 60 };
const QUICK: Plan = Plan { n_rounds: 1, seconds: 5 };

/// A contender with its defaults, or with its checks on.
#[derive(Clone, Copy)]
struct Variant {
    peer: Peer,
    is_checked: bool,
}

/// A contender at work, whose backends will see one fault. Dropped in this order.
struct Site {
    address: SocketAddrV4,
    fault: Fault,
    _running: Running,
    _consul: Option<Consul>,
    victim: Helloworld,
    _others: (Process, TempDir),
    node: Node,
}

/// Runs the suite.
///
/// # Errors
/// When nothing can be measured at all.
pub fn run(is_quick: bool) -> Result<Draft> {
    let plan = if is_quick { QUICK } else { FULL };
    let title = format!(
        "one backend of ten refuses, or drops packets: failed and slow requests in the {} s from then on",
        plan.seconds
    );
    let mut draft = Draft::new(&title, plan.n_rounds);
    let (variants, contenders) = variants();
    draft.contenders = contenders;
    NOTES.iter().for_each(|note| draft.note(*note));
    let mut progress = Progress::new("failure", plan.n_rounds);
    let mut errors = BTreeMap::new();
    for round in 0..plan.n_rounds {
        progress.step(&format!("{} contenders at once, {} s", variants.len(), plan.seconds));
        for (variant, fault, found) in measure(&variants, plan.seconds) {
            let found = found.map_err(|error| {
                draft.failed(&variant.name(), fault.name(), &error);
                errors.entry(variant.name()).or_insert(error);
            });
            add(&mut draft, &variant.name(), (fault, plan.seconds), round, found.ok().as_ref());
        }
    }
    draft.finish();
    for (contender, error) in errors {
        let is_measured = |row: &Row| row.contender == contender && row.spread.is_some();
        if !draft.figures.iter().flat_map(|figure| &figure.rows).any(is_measured) {
            draft.is_absent(&contender, &error);
        }
    }
    Ok(draft)
}

/// Those who can take part, with their defaults and, where they can, with checks; and the contenders'
/// list.
fn variants() -> (Vec<Variant>, Vec<Contender>) {
    let (able, listed) = peers::able(Protocol::Http);
    let mut variants = Vec::new();
    let mut contenders = Vec::new();
    for mut contender in listed {
        let peer = able.iter().find(|peer| peer.name == contender.name);
        let peer = peer.filter(|peer| peer.name != DIRECT);
        if contender.name == DIRECT {
            contender.absent = Some(
                "nobody is between: which of ten addresses a client tries, and which one next, is its \
                 own affair"
                    .into(),
            );
        }
        variants.extend(peer.map(|&peer| Variant { peer, is_checked: false }));
        let checked = with_checks(&contender);
        contenders.push(contender);
        if let Some(checked) = checked {
            let peer = peer.filter(|_| checked.absent.is_none());
            variants.extend(peer.map(|&peer| Variant { peer, is_checked: true }));
            contenders.push(checked);
        }
    }
    (variants, contenders)
}

/// A contender again, with its checks on, if it has any.
fn with_checks(contender: &Contender) -> Option<Contender> {
    let mut checked = Contender { name: contender.name.clone() + CHECKS, ..contender.clone() };
    if let Some((_, why)) = UNCHECKED.iter().find(|(name, _)| *name == contender.name) {
        checked.absent = Some((*why).into());
    } else if !CHECKED.contains(&&*contender.name) {
        return None;
    }
    if contender.name == NOHOP && checked.absent.is_none() {
        checked.config = String::new(); // its catalog is Consul's
        match consul::version() {
            Ok(version) => checked.version = format!("{}, {version}", checked.version),
            Err(error) => checked.absent = Some(format!("{error:#}")),
        }
    }
    Some(checked)
}

/// A round: what the generator found of each contender with each fault.
fn measure(variants: &[Variant], seconds: usize) -> Vec<(Variant, Fault, Result<Value>)> {
    let of = |fault| variants.iter().map(move |&variant| (variant, fault));
    let cases: Vec<_> = FAULTS.into_iter().flat_map(of).collect();
    let sites = at_once(cases.clone(), |(variant, fault)| Site::start(variant, fault));
    let found = at_once(sites, |site| site?.measure(seconds));
    cases.into_iter().zip(found).map(|((variant, fault), found)| (variant, fault, found)).collect()
}

impl Site {
    fn start(variant: Variant, fault: Fault) -> Result<Site> {
        let node = Node::new(Layout::TwoHosts)?;
        let others = start_backend(&node)?;
        let backends = backends();
        let victim = Helloworld::start(
            node.backend_place(),
            "the one that fails",
            &backends[0].to_string(),
        )?;
        let (running, consul) = if variant.is_checked && variant.peer.name == NOHOP {
            let (running, consul) = start_nohop_by_consul(&node, &backends)?;
            (running, Some(consul))
        } else {
            let services = Services::one(Protocol::Http, backends);
            let services = Services { are_checked: variant.is_checked, ..services };
            (variant.peer.start(&node, &services)?, None)
        };
        let address = running.address(0);
        let (_running, _consul, _others) = (running, consul, others);
        Ok(Site { address, fault, _running, _consul, victim, _others, node })
    }

    /// Sends requests to all ten for a while, and further while one of them fails.
    fn measure(&self, seconds: usize) -> Result<Value> {
        let place = self.node.client_place();
        let before =
            format!("http {} --rate 100 --seconds 0.3 --connections 16 --close", self.address);
        let before = generators::load(place, &before)?;
        let n_failed = generators::number(&before, "/n_failed")?;
        ensure!(n_failed == 0.0, "requests fail before any backend does: {}", before["failed"]);
        let mut command = place.command(generators::load_program()?);
        command.args(["http", &self.address.to_string(), "--rate", &RATE.to_string(), "--close"]);
        let with_warm_up = seconds as u64 + WARM_UP.as_secs();
        command.args(["--seconds", &with_warm_up.to_string(), "--connections", "256"]);
        command.args(["--warmup-ms", &WARM_UP.as_millis().to_string()]);
        command.args(["--timeout-ms", &PATIENCE.as_millis().to_string(), "--slow-ms", "100"]);
        let ready = self.prepare()?;
        let load = Process::spawn("nohop-load", command)?;
        await_program(&load, "nohop-load")?;
        thread::sleep(WARM_UP);
        self.fail(ready)?;
        let limit = Duration::from_secs(with_warm_up) + PATIENCE + SPARE;
        let found = load.wait_for_line_within(limit, &["\"requests\""])?;
        serde_json::from_str(&found).with_context(|| format!("nohop-load's output: {found}"))
    }

    /// Prepares the fault, so that it costs next to nothing at its moment.
    fn prepare(&self) -> Result<Ready> {
        match self.fault {
            Fault::Refuses => Ok(Ready::ToKill),
            Fault::Drops => {
                let mut nft = self.node.backend_place().command("nft");
                nft.args(["-f", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped());
                Ok(Ready::ToDrop(nft.spawn().context("start nft")?))
            }
        }
    }

    /// Has the first backend fail.
    fn fail(&self, ready: Ready) -> Result<()> {
        match ready {
            Ready::ToKill => self.victim.process.signal(Signal::KILL),
            // The rule goes with the namespace.
            Ready::ToDrop(mut nft) => {
                let rule = drop_rule(self.victim.address);
                let mut stdin = nft.stdin.take().context("nft has no stdin")?;
                stdin.write_all(rule.as_bytes()).context("write to nft")?;
                drop(stdin);
                let output = nft.wait_with_output().context("wait for nft")?;
                let text = String::from_utf8_lossy(&output.stderr);
                ensure!(output.status.success(), "nft refuses `{rule}`: {text}");
                Ok(())
            }
        }
    }
}

/// The ten.
fn backends() -> Vec<SocketAddrV4> {
    let port = |idx| if idx == 0 { VICTIM_PORT } else { PORT };
    (0..N_BACKENDS).map(|idx| Node::backend(idx, port(idx))).collect()
}

/// nohop with its defaults, and its Consul, which checks the backends.
fn start_nohop_by_consul(node: &Node, backends: &[SocketAddrV4]) -> Result<(Running, Consul)> {
    const SERVICE: &str = "web";
    let consul = Consul::dev(node.client_host())?;
    for (idx, backend) in backends.iter().enumerate() {
        let mut instance = consul::instance(SERVICE, &format!("{SERVICE}-{idx}"), *backend);
        instance["Check"] = json!({
            "TCP": backend.to_string(),
            "Interval": "1s",
            "Timeout": "1s",
            "Status": "passing",
        });
        consul.register(&instance)?;
    }
    let nohop = Nohop::start(node.client_host(), &node.client, "")?;
    node.adopt_hop(&nohop.process)?;
    let services = nohop.wait_for_backends(SERVICE, backends.len())?;
    let vip = nohop::service(&services, SERVICE).and_then(|service| service["vip"].as_str());
    let vip =
        vip.and_then(|vip| vip.parse().ok()).context("nohop reports no VIP of the service")?;
    let address = SocketAddrV4::new(vip, 80);
    Ok((Running::new(vec![address], vec![Guard::Nohop(Box::new(nohop))]), consul))
}

/// Waits until a process, which first finds its place, is the program that it is to be; there is no event
/// for that.
fn await_program(process: &Process, name: &str) -> Result<()> {
    let comm = format!("/proc/{}/comm", process.pid().as_raw_nonzero());
    for _ in 0..N_LOOKS {
        if fs::read_to_string(&comm).is_ok_and(|comm| comm.trim() == name) {
            return Ok(());
        }
        if process.ends_within(LOOK)? {
            bail!("it ended\n{}", process.tail());
        }
    }
    bail!("{name} doesn't start\n{}", process.tail())
}

/// The rules of `nft` that drop packets to this address, without tracking connections.
fn drop_rule(address: SocketAddrV4) -> String {
    format!(
        "add table ip nohop_fault\n\
         add chain ip nohop_fault input {{ type filter hook input priority 0; }}\n\
         add rule ip nohop_fault input ip daddr {} drop\n",
        address.ip()
    )
}

/// Adds a contender's results of a round, or that there are none.
fn add(
    draft: &mut Draft,
    contender: &str,
    (fault, seconds): (Fault, usize),
    round: usize,
    found: Option<&Value>,
) {
    let condition = format!("{}, the first {seconds} s", fault.name());
    let number = |path: &str| found.and_then(|found| generators::number(found, path).ok());
    let percent =
        |path: &str| Some(100.0 * number(path)? / number("/requests").filter(|n| *n > 0.0)?);
    draft.add(FAILED, &condition, contender, round, percent("/n_failed"));
    draft.add(SLOW, &condition, contender, round, percent("/n_slow"));
    draft.add(P99, &condition, contender, round, number("/latency_us/p99"));
    let by_second = found.map(by_second).unwrap_or_default();
    for second in 0..seconds.min(N_CURVE_SECONDS) {
        let at = ("s after the fault", second + 1);
        let value = by_second.get(second).copied().flatten();
        draft.add_point(fault.curve(), at, contender, round, value);
    }
}

/// The part of each second's requests that failed or were slow, in percent; `None` where none was due.
fn by_second(found: &Value) -> Vec<Option<f64>> {
    let percent = |second: &Value| {
        let n_requests = second["requests"].as_f64().filter(|n_requests| *n_requests > 0.0)?;
        Some(100.0 * (second["failed"].as_f64()? + second["slow"].as_f64()?) / n_requests)
    };
    found["by_second"].as_array().into_iter().flatten().map(percent).collect()
}

impl Variant {
    fn name(&self) -> String {
        format!("{}{}", self.peer.name, if self.is_checked { CHECKS } else { "" })
    }
}

impl Fault {
    fn name(self) -> &'static str {
        match self {
            Fault::Refuses => "one of ten refuses",
            Fault::Drops => "one of ten drops packets",
        }
    }

    /// Its curve over the time.
    fn curve(self) -> Quantity {
        let name = match self {
            Fault::Refuses => "failed and slow requests of each second, one of ten refuses",
            Fault::Drops => "failed and slow requests of each second, one of ten drops packets",
        };
        Quantity { name, ..FAILED }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_ten_has_a_port_of_its_own() {
        let backends = backends();
        assert_eq!(backends.len(), N_BACKENDS);
        let on_port = |port| backends.iter().filter(|backend| backend.port() == port).count();
        assert_eq!([VICTIM_PORT, PORT].map(on_port), [1, N_BACKENDS - 1]);
    }

    #[test]
    fn what_was_found_becomes_shares() {
        let found = json!({
            "requests": 200, "n_failed": 20, "n_slow": 1, "latency_us": { "p99": 900 },
            "by_second": [
                { "requests": 50, "failed": 4, "slow": 1 },
                { "requests": 0, "failed": 0, "slow": 0 },
            ],
        });
        let mut draft = Draft::new("a test", 2);
        add(&mut draft, NGINX, (Fault::Drops, 4), 0, Some(&found));
        add(&mut draft, NGINX, (Fault::Drops, 4), 1, None);
        draft.finish();
        let rounds = |name: &str, condition: &str| {
            let row = draft.find(name, condition).and_then(|figure| figure.row(NGINX));
            row.map(|row| row.rounds.clone()).unwrap_or_default()
        };
        let condition = "one of ten drops packets, the first 4 s";
        assert_eq!(rounds(FAILED.name, condition), [Some(10.0), None]);
        assert_eq!(rounds(SLOW.name, condition), [Some(0.5), None]);
        assert_eq!(rounds(P99.name, condition), [Some(900.0), None]);
        let curve = Fault::Drops.curve().name;
        assert_eq!(rounds(curve, "1 s after the fault"), [Some(10.0), None]);
        for second in 2..=4 {
            let condition = format!("{second} s after the fault");
            assert_eq!(rounds(curve, &condition), [None, None], "{condition}");
        }
    }

    #[test]
    fn checks_are_listed_where_they_can_be_on() {
        let contender = |name: &str, absent: Option<&str>| Contender {
            name: name.into(),
            version: "1".into(),
            config: "a file".into(),
            absent: absent.map(String::from),
        };
        let absent = |name: &str, absent: Option<&str>| {
            with_checks(&contender(name, absent)).map(|checked| (checked.name, checked.absent))
        };
        let of_haproxy = "HAProxy tcp + checks".to_owned();
        assert_eq!(absent(HAPROXY_TCP, None), Some((of_haproxy.clone(), None)));
        let why = Some("not installed".to_owned());
        assert_eq!(absent(HAPROXY_TCP, why.as_deref()), Some((of_haproxy, why)));
        let why = Some("rules don't check".to_owned());
        assert_eq!(absent(NFTABLES, None), Some(("nftables + checks".into(), why)));
        assert_eq!(absent("IPVS", None), None);
    }

    #[test]
    fn packets_to_one_address_are_dropped() {
        let rule = drop_rule(backends()[0]);
        assert!(rule.ends_with("input ip daddr 10.98.1.0 drop\n"), "{rule}");
    }
}

//! What the number of services costs: time to load them and to change one, and memory.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::Signal;
use testbed::cmd;
use testbed::http;
use testbed::nohop::Nohop;
use testbed::tempdir::TempDir;

use crate::bpf;
use crate::node::{Layout, Node};
use crate::peers::{
    self, HAPROXY_TCP, Haproxy, HaproxyNotify, NFTABLES, NOHOP, Protocol, Service, Services,
    render, route_frontends,
};
use crate::progress::Progress;
use crate::report_builder::{Draft, Quantity};

const LOAD: Quantity = Quantity::lower("from nothing to serving all", "ms").over(HAPROXY_TCP);
const CHANGE: Quantity = Quantity { name: "a change of one service", ..LOAD };
const RESIDENT: Quantity = Quantity::lower("resident memory", "MB").over(HAPROXY_TCP);
const FIRST_SYNC: Quantity =
    Quantity { name: "nohop's first sync, from the parsed file to the maps", base: "", ..LOAD };
const KERNEL: Quantity = Quantity { name: "kernel memory of the maps", base: "", ..RESIDENT };

/// The backends of each service.
const N_BACKENDS: usize = 10;

/// Who takes longer than this to load has fewer rounds.
const SLOW: Duration = Duration::from_secs(20);
const N_SLOW_ROUNDS: usize = 2;

/// Who is compared, each by what loads it.
const LOADERS: [(&str, Loader); 3] =
    [(NOHOP, load_nohop), (HAPROXY_TCP, load_haproxy), (NFTABLES, load_nftables)];

type Loader = fn(&Node, [&Services; 2]) -> Result<Loaded>;

/// What one load and one change took.
struct Loaded {
    load: Duration,
    first_sync_ms: Option<f64>,
    change: Duration,
    resident_mb: Option<f64>,
    kernel_mb: Option<f64>,
}

/// Runs the suite.
///
/// # Errors
/// When nothing can be measured at all.
pub fn run(is_quick: bool) -> Result<Draft> {
    let (n_rounds, points): (usize, &[usize]) =
        if is_quick { (1, &[100, 1_000]) } else { (7, &[100, 1_000, 10_000]) };
    let mut draft = Draft::new("What the number of services costs", n_rounds);
    let (able, contenders) = peers::able(Protocol::Tcp);
    let is_ours = |name: &str| LOADERS.iter().any(|(ours, _)| *ours == name);
    draft.contenders =
        contenders.into_iter().filter(|contender| is_ours(&contender.name)).collect();
    for note in [
        "each service has 10 backends of its own, from a file; nohop with a static catalog",
        "from nothing: from the start of the process until nohop, or HAProxy (-Ws), says that it is ready; \
         `nft -f`, as one transaction, until it ends",
        "a change is another port of one backend: nohop from the file's rename until the kernel has it; \
         HAProxy from SIGUSR2 until it says that it is ready again; `nft -f` of that service's chain alone",
        "resident memory: before the change, all processes in sum; nftables has none, and the kernel doesn't report the memory of its rules",
    ] {
        draft.note(note);
    }
    let mut progress = Progress::new("scale", points.len() * n_rounds * LOADERS.len());
    for &n_services in points {
        let both = [services(n_services, 8080), services(n_services, 8081)];
        let condition = format!("{n_services} services");
        let mut are_slow = BTreeSet::new();
        for round in 0..n_rounds {
            for (name, load) in draft.shuffled(LOADERS) {
                if !able.iter().any(|peer| peer.name == name) {
                    continue;
                }
                progress.step(&format!("{condition}: {name}"));
                if round >= N_SLOW_ROUNDS && are_slow.contains(name) {
                    continue;
                }
                let loaded =
                    Node::new(Layout::OneHost).and_then(|node| load(&node, [&both[0], &both[1]]));
                if let Err(error) = &loaded {
                    draft.failed(name, &condition, error);
                }
                let loaded = loaded.ok();
                if loaded.as_ref().is_some_and(|loaded| loaded.load > SLOW)
                    && n_rounds > N_SLOW_ROUNDS
                {
                    are_slow.insert(name);
                    draft.note(format!(
                        "{name}, {condition}: {N_SLOW_ROUNDS} rounds, since a load takes more than \
                         {} s",
                        SLOW.as_secs()
                    ));
                }
                let ms = |time: Duration| time.as_secs_f64() * 1e3;
                let mut add = |quantity, value| {
                    draft.add_point(quantity, ("services", n_services), name, round, value);
                };
                add(LOAD, loaded.as_ref().map(|loaded| ms(loaded.load)));
                add(CHANGE, loaded.as_ref().map(|loaded| ms(loaded.change)));
                if name != NFTABLES {
                    add(RESIDENT, loaded.as_ref().and_then(|loaded| loaded.resident_mb));
                }
                if name == NOHOP {
                    add(FIRST_SYNC, loaded.as_ref().and_then(|loaded| loaded.first_sync_ms));
                    add(KERNEL, loaded.as_ref().and_then(|loaded| loaded.kernel_mb));
                }
            }
        }
    }
    draft.finish();
    Ok(draft)
}

/// So many services; one backend of the one in the middle has this port.
fn services(n_services: usize, port: u16) -> Services {
    let service = |service_idx: usize| {
        let backend = |idx: usize| {
            let is_changed = idx == 0 && service_idx == n_services / 2;
            let port = if is_changed { port } else { 8080 };
            Node::backend((service_idx * N_BACKENDS + idx) % 60_000, port)
        };
        Service {
            name: format!("web-{service_idx}"),
            backends: (0..N_BACKENDS).map(backend).collect(),
        }
    };
    let services = (0..n_services).map(service).collect();
    Services { protocol: Protocol::Tcp, services, settings: String::new() }
}

fn load_nohop(node: &Node, [before, after]: [&Services; 2]) -> Result<Loaded> {
    let (files, edited) = (TempDir::new("catalog")?, TempDir::new("edited")?);
    let catalog = render("nohop.toml", before, files.path())?;
    let edited = render("nohop.toml", after, edited.path())?;
    let config = format!("catalog.sources = [\"file\"]\ncatalog.file = {catalog:?}\n");
    let start = Instant::now();
    let nohop = Nohop::start(node.client_host(), &node.client, &config)?;
    let load = start.elapsed();
    let first_sync_ms = Some(propagation_ms(&nohop)?);
    node.adopt_hop(&nohop.process)?;
    let resident_mb = Some(resident_mb(node)?);
    let generation = nohop.status()?["generation"].as_u64();
    let start = Instant::now();
    fs::rename(edited, catalog).context("rename the edited catalog")?;
    nohop.wait_for_status(|status| status["generation"].as_u64() > generation)?;
    let change = start.elapsed();
    let kernel_mb = Some(bpf::maps_mb(&nohop.pins())?);
    Ok(Loaded { load, first_sync_ms, change, resident_mb, kernel_mb })
}

/// The time that nohop has taken in all to bring what it had parsed into the maps, as it exports it.
pub(crate) fn propagation_ms(nohop: &Nohop) -> Result<f64> {
    let admin = nohop.admin();
    let metrics = http::ask(Path::new(admin.trim_start_matches("unix:")), "GET", "/metrics", "")?;
    let sum_s = read_metric(&metrics, "nohop_propagation_seconds_sum");
    Ok(sum_s.context("nohop exports no nohop_propagation_seconds_sum")? * 1e3)
}

/// The value of a metric without labels.
fn read_metric(metrics: &str, name: &str) -> Option<f64> {
    let mut samples = metrics.lines().filter_map(|line| line.split_once(' '));
    samples.find(|(found, _)| *found == name)?.1.trim().parse().ok()
}

fn load_haproxy(node: &Node, [before, after]: [&Services; 2]) -> Result<Loaded> {
    let tempdir = TempDir::new("haproxy")?;
    let config = render("haproxy-tcp.cfg", before, tempdir.path())?;
    let notify = HaproxyNotify::bind(tempdir.path())?;
    let start = Instant::now();
    let haproxy = Haproxy::start(node, &config, "-Ws")?;
    notify.wait_for(&["READY=1"]).with_context(|| haproxy.process.tail())?;
    let load = start.elapsed();
    let resident_mb = Some(resident_mb(node)?);
    render("haproxy-tcp.cfg", after, tempdir.path())?;
    let start = Instant::now();
    haproxy.process.signal(Signal::USR2)?;
    notify.wait_for(&["RELOADING=1", "READY=1"]).with_context(|| haproxy.process.tail())?;
    let change = start.elapsed();
    Ok(Loaded { load, first_sync_ms: None, change, resident_mb, kernel_mb: None })
}

fn load_nftables(node: &Node, [before, after]: [&Services; 2]) -> Result<Loaded> {
    let (tempdir, edited) = (TempDir::new("nftables")?, TempDir::new("edited")?);
    route_frontends(node)?;
    let rules = render("nftables.nft", before, tempdir.path())?;
    let changed = &after.services[after.services.len() / 2];
    let change = edited.path().join("change.nft");
    let text = fs::read_to_string(render("nftables.nft", after, edited.path())?)?;
    let rule = text.lines().skip_while(|line| line.trim() != format!("chain {} {{", changed.name));
    let rule = rule.skip(1).map(str::trim).next().context("a service without a rule")?;
    let chain = format!("ip nohop_bench {}", changed.name);
    fs::write(&change, format!("flush chain {chain}\nadd rule {chain} {rule}\n"))?;
    let nft = |file: &Path| -> Result<Duration> {
        let mut command = node.hop_place().command(peers::find("bash")?);
        command.args(["-c", TIMED_NFT, "bash"]).arg(peers::find("nft")?).arg(file);
        let text = cmd::stdout(command)?;
        let took_us = text.trim().parse().with_context(|| format!("bash prints {text:?}"))?;
        Ok(Duration::from_micros(took_us))
    };
    let (load, change) = (nft(&rules)?, nft(&change)?);
    Ok(Loaded { load, first_sync_ms: None, change, resident_mb: None, kernel_mb: None })
}

/// Prints how many microseconds `nft -f` takes. Taken from here it would include the way into the node,
/// which costs more than a small change does.
const TIMED_NFT: &str = r#"
    start=${EPOCHREALTIME/[^0-9]/}
    "$1" -f "$2" && echo $((${EPOCHREALTIME/[^0-9]/} - start))
"#;

/// The resident memory of what stands between, in MB.
pub(crate) fn resident_mb(node: &Node) -> Result<f64> {
    let pids = fs::read_to_string(node.hop.path().join("cgroup.procs"))?;
    let mut sum = 0.0;
    for pid in pids.lines() {
        // One that has just ended has none.
        let Ok(status) = fs::read_to_string(format!("/proc/{pid}/status")) else { continue };
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
        sum += kib.unwrap_or_default() * 1024.0 / 1e6;
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_backend_changes() {
        let [before, after] = [8080, 8081].map(|port| services(100, port).services);
        let changed = |idx: &usize| before[*idx].backends != after[*idx].backends;
        assert_eq!((0..100).filter(changed).collect::<Vec<_>>(), [50]);
        let pairs = before[50].backends.iter().zip(&after[50].backends);
        let n_different = pairs.filter(|(before, after)| before != after).count();
        assert_eq!(n_different, 1);
    }

    #[test]
    fn metrics_are_read() {
        let metrics =
            "HTTP/1.0 200 OK\r\n\r\n# TYPE a_sum counter\na_sum_b 1\na_sum 0.25\na{x=\"y\"} 3\n";
        let table = [("a_sum", Some(0.25)), ("a_sum_b", Some(1.0)), ("a", None), ("b", None)];
        for (name, expected) in table {
            assert_eq!(read_metric(metrics, name), expected, "{name}");
        }
    }
}

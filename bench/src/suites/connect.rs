//! The price of one connection, by the number of services and of backends: as the process that connects to sees it,
//! and as the kernel counts nohop's program.

use std::fs;
use std::net::SocketAddrV4;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::Value;
use testbed::process::Process;
use testbed::tempdir::TempDir;

use crate::bpf;
use crate::generators;
use crate::node::{Layout, Node};
use crate::peers::{self, DIRECT, Guard, NOHOP, Peer, Protocol, Running, Service, Services};
use crate::progress::Progress;
use crate::report_builder::{Draft, Limit, Quantity};
use crate::stats::ratios;

/// The quantities of one curve.
struct Quantities {
    connect: Quantity,
    one: Quantity,
    first_byte: Quantity,
    close: Quantity,
    program: Quantity,
}

const fn ns(name: &'static str) -> Quantity {
    Quantity::lower(name, "ns").over(DIRECT)
}

const BY_SERVICES: Quantities = Quantities {
    connect: ns("connect(), all services in turn"),
    one: ns("connect(), one service of them"),
    first_byte: ns("from connect() to the first byte, all services in turn"),
    close: ns("close(), all services in turn"),
    program: Quantity {
        base: "",
        ..ns("nohop's program, by BPF statistics, all services in turn")
    },
};

const BY_BACKENDS: Quantities = Quantities {
    connect: ns("connect(), by backends"),
    one: ns("connect(), one service, by its backends"),
    first_byte: ns("from connect() to the first byte, by backends"),
    close: ns("close(), by backends"),
    program: Quantity { base: "", ..ns("nohop's program, by BPF statistics, by backends") },
};

/// The backends that have an address of their own; more are at further ports of the same addresses.
const N_ADDRESSES: usize = 60_000;
const FIRST_PORT: u16 = 8_080;
const N_PORTS: u16 = 2;

struct Plan {
    n_rounds: usize,
    n_connects: u32,
    n_services: &'static [usize],
    n_backends: &'static [usize],
}

const FULL: Plan = Plan {
    n_rounds: 7,
    n_connects: 2_500,
    n_services: &[10, 100, 1_000, 10_000],
    n_backends: &[1, 10, 100, 1_000],
};
const QUICK: Plan =
    Plan { n_rounds: 3, n_connects: 600, n_services: &[10, 1_000], n_backends: &[1, 100] };

/// The services of the curve by backends, and the backends of the curve by services.
const N_EACH: usize = 10;

/// A contender at work, with as many services and backends as are asked for. Dropped in this order.
struct Site {
    peer: Peer,
    running: Running,
    _servers: Vec<Process>,
    /// The addresses to connect to, a line each.
    targets: PathBuf,
    _files: TempDir,
    node: Node,
}

/// Runs the suite.
///
/// # Errors
/// When nothing can be measured at all.
pub fn run(is_quick: bool) -> Result<Draft> {
    let plan = if is_quick { QUICK } else { FULL };
    let mut draft = Draft::new("The price of one connection", plan.n_rounds);
    let (able, contenders) = peers::able(Protocol::Tcp);
    draft.contenders = contenders;
    draft.note(
        "connect() to a proxy returns when the proxy's kernel has accepted, not when a backend has: \
         the first byte, which the backend sends by itself, is what compares",
    );
    draft.note("in turn: every service is connected to, and as often as any other");
    draft.note(
        "one connect after another, from one process; all on one host; the contenders take turns at each \
         point of a curve, but one point comes after the other",
    );
    let points = plan.n_services.iter().map(|n| ("services", *n, *n, N_EACH, &BY_SERVICES));
    let points =
        points.chain(plan.n_backends.iter().map(|n| ("backends", *n, N_EACH, *n, &BY_BACKENDS)));
    let points: Vec<_> = points.collect();
    let mut progress = Progress::new("connect", points.len() * (plan.n_rounds + 1) * able.len());
    for (axis, at, n_services, n_backends, quantities) in points {
        progress.preparing(&format!("{n_services} services of {n_backends} backends"));
        let services = services(n_services, n_backends);
        let mut sites = Vec::new();
        for &peer in &able {
            match Site::start(peer, &services) {
                Ok(site) => sites.push(site),
                Err(error) => draft.failed(peer.name, &format!("{at} {axis}"), &error),
            }
        }
        // The first round warms up, and isn't counted.
        for round in 0..=plan.n_rounds {
            for site in draft.shuffled(&sites) {
                progress.step(&format!("{at} {axis}: {}", site.peer.name));
                let measured = site.measure(plan.n_connects);
                let Some(round) = round.checked_sub(1) else { continue };
                if let Err(error) = &measured {
                    draft.failed(site.peer.name, &format!("{at} {axis}"), error);
                }
                let measured = measured.ok();
                let mut add = |quantity, value| {
                    draft.add_point(quantity, (axis, at), site.peer.name, round, value);
                };
                add(quantities.connect, measured.as_ref().map(|found| found.connect_ns));
                add(quantities.one, measured.as_ref().map(|found| found.one_ns));
                add(quantities.first_byte, measured.as_ref().map(|found| found.first_byte_ns));
                add(quantities.close, measured.as_ref().map(|found| found.close_ns));
                if site.peer.name == NOHOP {
                    add(quantities.program, measured.and_then(|found| found.program_ns));
                }
            }
        }
    }
    draft.finish();
    judge(&mut draft, plan.n_services);
    Ok(draft)
}

/// How many connections go to all services in turn: so many at least, and each service as often as any other.
fn n_in_turn(n_connects: u32, n_services: u32) -> u32 {
    n_connects.next_multiple_of(n_services.max(1))
}

/// So many services with so many backends each, all different as far as there are addresses.
fn services(n_services: usize, n_backends: usize) -> Services {
    let backend = |idx: usize| {
        let port = FIRST_PORT + (idx / N_ADDRESSES) as u16 % N_PORTS;
        Node::backend(idx % N_ADDRESSES, port)
    };
    let service = |service_idx: usize| Service {
        name: format!("web-{service_idx}"),
        backends: (0..n_backends).map(|idx| backend(service_idx * n_backends + idx)).collect(),
    };
    let services = (0..n_services).map(service).collect();
    Services { protocol: Protocol::Tcp, services, settings: String::new() }
}

/// What one round found, in ns: medians, and of the program the mean.
struct Measured {
    connect_ns: f64,
    one_ns: f64,
    first_byte_ns: f64,
    close_ns: f64,
    program_ns: Option<f64>,
}

impl Site {
    fn start(peer: Peer, services: &Services) -> Result<Site> {
        let node = Node::new(Layout::OneHost)?;
        let mut servers = Vec::new();
        for port in FIRST_PORT..FIRST_PORT + N_PORTS {
            let mut command = node.backend_place().command(generators::load_program()?);
            command.args(["greet", &format!("0.0.0.0:{port}")]);
            let server = Process::spawn("greet", command)?;
            server.wait_for_line(&["listening on "])?;
            servers.push(server);
        }
        let running = peer.start(&node, services)?;
        let files = TempDir::new("targets")?;
        let targets = files.path().join("targets");
        let lines: Vec<String> = running.addresses.iter().map(SocketAddrV4::to_string).collect();
        fs::write(&targets, lines.join("\n")).context("write the addresses to connect to")?;
        Ok(Site { peer, running, _servers: servers, targets, _files: files, node })
    }

    fn measure(&self, n_connects: u32) -> Result<Measured> {
        let n_services = u32::try_from(self.running.addresses.len())?;
        let n_in_turn = n_in_turn(n_connects, n_services);
        let in_turn = self.connect(&format!("@{}", self.targets.display()), n_in_turn)?;
        let one = self.connect(&self.running.addresses[0].to_string(), n_connects / 2)?;
        let program_ns = match self.running.guards() {
            [Guard::Nohop(_), ..] => {
                let targets = format!("@{}", self.targets.display());
                let act = || self.connect(&targets, n_in_turn).map(drop);
                bpf::mean_ns(&self.node.client, &[bpf::CONNECT4], act)?.first().copied()
            }
            _ => None,
        };
        Ok(Measured {
            connect_ns: generators::number(&in_turn, "/connect_ns/p50")?,
            one_ns: generators::number(&one, "/connect_ns/p50")?,
            first_byte_ns: generators::number(&in_turn, "/first_byte_ns/p50")?,
            close_ns: generators::number(&in_turn, "/close_ns/p50")?,
            program_ns,
        })
    }

    /// Connects one after another; a sample in which some of them fail is none.
    fn connect(&self, targets: &str, n_connects: u32) -> Result<Value> {
        generators::connect(self.node.client_place(), targets, n_connects as usize)
    }
}

fn judge(draft: &mut Draft, n_services: &[usize]) {
    let (Some(fewest), Some(most)) = (n_services.first(), n_services.last()) else { return };
    let rounds = |draft: &Draft, quantity: Quantity, n: &usize| {
        let row = draft.find(quantity.name, &format!("{n} services"))?.row(NOHOP)?;
        Some(row.rounds.clone())
    };
    for (what, quantity) in [
        ("connect() of nohop", BY_SERVICES.connect),
        ("nohop's program by BPF statistics", BY_SERVICES.program),
    ] {
        let ratio = rounds(draft, quantity, most)
            .zip(rounds(draft, quantity, fewest))
            .map(|(most, fewest)| ratios(&most, &fewest).collect::<Vec<_>>());
        let what = format!("{what}, {most} services over {fewest}, in turn");
        draft.goal(&what, Limit::AtMost(1.2), &ratio.unwrap_or_default(), "");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generators::STRIDE;

    #[test]
    fn every_service_is_connected_as_often() {
        for (n_connects, n_services, expected) in
            [(2_500, 10_000, 10_000), (2_500, 1_000, 3_000), (600, 10, 600), (600, 1, 600)]
        {
            assert_eq!(n_in_turn(n_connects, n_services), expected);
            let mut counts = vec![0; n_services as usize];
            (0..expected).for_each(|n| counts[(n * STRIDE as u32 % n_services) as usize] += 1);
            assert!(counts.iter().all(|count| *count == expected / n_services), "{n_services}");
        }
    }

    #[test]
    fn services_have_backends_of_their_own() {
        let services = services(10_000, 10).services;
        let mut all: Vec<_> = services.iter().flat_map(|service| &service.backends).collect();
        assert_eq!(all.len(), 100_000);
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 100_000);
    }
}

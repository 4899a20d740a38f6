//! What it costs to show servers their clients' addresses: new connections a second, with an option in each SYN that
//! the backends' node keeps and reads, and without. Both have nohop on both hosts.

use std::net::Ipv4Addr;

use anyhow::{Context, Result};
use testbed::nohop::Nohop;
use testbed::process::Process;
use testbed::tempdir::TempDir;

use crate::generators;
use crate::node::{Layout, Node};
use crate::peers::{self, NOHOP_TC, Protocol, Running, Services, start_backend};
use crate::progress::Progress;
use crate::report_builder::{Draft, Limit, Quantity};

/// The connections of HTTP.
pub const N_CONNECTIONS: usize = 32;

/// As figures name it.
const SHOWN: &str = "nohop, TC, clients are shown";
const RATE: Quantity = Quantity::higher("new connections a second", "connections/s").over(NOHOP_TC);
const CONDITION: &str = "an edge with one processor, HTTP, a connection a request";

struct Site {
    name: &'static str,
    // In the order in which they end.
    running: Running,
    _nohop: Nohop,
    _backend: (Process, TempDir),
    node: Node,
}

impl Site {
    fn start(name: &'static str) -> Result<Site> {
        let node = Node::new(Layout::Edge)?;
        let is_shown = name == SHOWN;
        let (mut on_node, mut on_edge) = (String::new(), "");
        if is_shown {
            let sources: Vec<Ipv4Addr> = peers::edge_sources();
            let sources: Vec<String> = sources.iter().map(Ipv4Addr::to_string).collect();
            on_node = format!("datapath.client_address_from = {sources:?}\n");
            on_edge = "edge.client_address = [\"web\"]\n";
        }
        let files = TempDir::new("catalog")?;
        let catalog = files.path().join("none.toml");
        std::fs::write(&catalog, "service = []\n")?;
        let config = format!("catalog.sources = [\"file\"]\ncatalog.file = {catalog:?}\n{on_node}");
        // Before servers listen.
        let nohop = Nohop::start(node.backend_host(), &node.backend, &config)?;
        let backend = start_backend(&node)?;
        // As many as the suite's other connections have, so that none runs out of ports.
        let backends = (0..4).map(|idx| Node::backend(idx, 8080)).collect();
        let services = Services::one(Protocol::Http, backends);
        let running = peers::start_edge(&node, &services, on_edge)?;
        Ok(Site { name, running, _nohop: nohop, _backend: backend, node })
    }

    fn rate(&self, seconds: u32) -> Result<f64> {
        let place = self.node.client_place();
        let found = generators::wrk(place, self.running.address(0), N_CONNECTIONS, false, seconds)?;
        anyhow::ensure!(found.n_failed == 0, "{} connections failed", found.n_failed);
        Ok(found.rate)
    }
}

pub fn measure(draft: &mut Draft, is_quick: bool) -> Result<()> {
    let (n_rounds, seconds) = (draft.n_rounds, if is_quick { 1 } else { 3 });
    let sites = [NOHOP_TC, SHOWN].map(Site::start);
    let [without, with] = sites;
    let sites = [without.context("without")?, with.context("with clients' addresses")?];
    let mut progress = Progress::new("edge, clients' addresses", sites.len() * (n_rounds + 1));
    // The first round warms up, and isn't counted.
    for round in 0..=n_rounds {
        for site in draft.shuffled(&sites) {
            progress.step(&format!("{CONDITION}: {}", site.name));
            let found = site.rate(seconds);
            let Some(round) = round.checked_sub(1) else { continue };
            if let Err(error) = &found {
                draft.failed(site.name, CONDITION, error);
            }
            draft.add(RATE, CONDITION, site.name, round, found.ok());
        }
    }
    Ok(())
}

pub fn judge(draft: &mut Draft) {
    let figure = draft.find(RATE.name, CONDITION);
    let is = figure.map(|figure| figure.ratios(SHOWN, NOHOP_TC)).unwrap_or_default();
    let what =
        format!("new connections a second with clients' addresses over without ({CONDITION})");
    draft.goal(&what, Limit::AtLeast(0.95), &is, "");
}

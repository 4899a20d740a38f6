//! Packets a second that one processor forwards: flows of small datagrams, more than it can, counted behind the
//! edge; and that each of them arrives whole, by receivers.

use std::collections::BTreeSet;
use std::fs;
use std::net::{Ipv4Addr, UdpSocket};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::net::sockopt::set_socket_recv_buffer_size_force;
use testbed::net::Host;
use testbed::nohop::Nohop;

use crate::node::{Layout, Node};
use crate::peers::{
    self, EDGE_PEERS, NFTABLES, NOHOP_TC, NOHOP_XDP, Peer, Protocol, Running, Services,
};
use crate::pin;
use crate::progress::Progress;
use crate::report_builder::{Draft, Limit, Quantity};
use crate::traffic::{Packets, Sending, Sink};

const RATE: Quantity =
    Quantity::higher("packets a second that one processor forwards", "packets/s").over(NFTABLES);

/// The number of backends, each at an address of its own.
const N_BACKENDS: usize = 4;
/// Where they receive.
const PORT: u16 = 9_000;
/// How fast flows begin, and are checked: all contenders keep up with it.
const EASY_RATE: u32 = 50_000;
/// From the beginning of a load until it is counted.
const SETTLE: Duration = Duration::from_millis(100);

/// A contender at work. Dropped in this order.
pub struct Site {
    pub peer: Peer,
    pub running: Running,
    pub sink: Option<Sink>,
    pub node: Node,
}

impl Site {
    /// Starts a peer on an edge whose receiving has a processor for itself.
    pub fn start(peer: Peer) -> Result<Site> {
        let mut node = Node::new(Layout::Edge)?;
        node.receive_at_once()?;
        let backends = (0..N_BACKENDS).map(|idx| Node::backend(idx, PORT)).collect();
        let mut services = Services::one(Protocol::Udp, backends);
        services.settings = "both".to_owned();
        let running = node.pinned(pin::SERVER, || peer.start(&node, &services))?;
        Ok(Site { peer, running, sink: None, node })
    }

    /// Starts to send `n_flows` flows of datagrams to it.
    pub fn send(&self, n_flows: u32, rate: Option<u32>) -> Result<Sending> {
        let packets = Packets {
            are_syns: false,
            stream: 0,
            to: self.running.address(0),
            from: (Ipv4Addr::new(198, 18, 0, 1), 250),
            ports: (20_000, n_flows / 250),
        };
        let (client, edge) = (self.node.client_host(), self.node.hop_host());
        Sending::start(client, "eth0", (edge, "eth0"), &packets, rate)
    }

    /// The packets so far that the receive queue of the edge had no room for, as veth counts them where they were
    /// sent.
    pub fn n_overflowed(&self) -> Result<u64> {
        let text = self.node.client_host().outside().run("ethtool", "-S eth0")?;
        let errors = text.lines().filter_map(|line| line.trim().split_once("xdp_xmit_errors: "));
        let errors = errors.map(|(_, n)| n.parse::<u64>().with_context(|| text.clone()));
        errors.sum()
    }

    /// How many datagrams have arrived.
    pub fn count(&self) -> Result<u64> {
        self.sink.as_ref().context("nothing counts")?.n_datagrams(0)
    }
}

/// Starts those who can balance datagrams.
pub fn start(draft: &mut Draft) -> Vec<Site> {
    let (able, _) = peers::able_of(&EDGE_PEERS, Protocol::Udp);
    let mut sites = Vec::new();
    for peer in able {
        let started = Site::start(peer).and_then(|site| check(draft, site));
        match started {
            Ok(site) => sites.push(site),
            Err(error) => draft.is_absent(peer.name, &error),
        }
    }
    sites
}

/// Starts those who can balance datagrams, and measures them. Returns them, at work.
pub fn measure(draft: &mut Draft, is_quick: bool) -> Result<Vec<Site>> {
    let (n_rounds, all_flows, length) = match is_quick {
        true => (draft.n_rounds, &[1_000][..], Duration::from_millis(1000)),
        false => (draft.n_rounds, &[1_000, 50_000][..], Duration::from_secs(1)),
    };
    let (able, _) = peers::able_of(&EDGE_PEERS, Protocol::Udp);
    let n_steps = all_flows.len() * able.len() * (n_rounds + 1);
    let mut progress = Progress::new("edge, packets", n_steps);
    progress.preparing("edges");
    let mut sites = start(draft);
    for &n_flows in all_flows {
        let condition = format!("{n_flows} flows of datagrams");
        for round in 0..=n_rounds {
            for site in draft.shuffled(&sites) {
                let name = site.peer.name;
                progress.step(&format!("{condition}: {name}"));
                let found = forwarded(site, n_flows, length);
                let Some(round) = round.checked_sub(1) else { continue };
                let rate = match found {
                    Ok([rate, offered]) => {
                        if rate > 0.97 * offered {
                            draft.note(format!(
                                "{name}, {condition}: it forwards all that is sent; it might more"
                            ));
                        }
                        Some(rate)
                    }
                    Err(error) => {
                        draft.failed(name, &condition, &error);
                        None
                    }
                };
                draft.add(RATE, &condition, name, round, rate);
            }
        }
    }
    for site in &mut sites {
        if let Some(nohop) = site.running.nohop() {
            draft.note(format!("{}: {}", site.peer.name, evidence(nohop)?));
        }
    }
    Ok(sites)
}

/// How nohop's programs are attached, and what they have counted.
fn evidence(nohop: &Nohop) -> Result<String> {
    let modes = peers::edge_modes(&nohop.status()?).join(", ");
    let socket = nohop.admin().replace("unix:", "");
    let metrics = testbed::http::ask(Path::new(&socket), "GET", "/metrics", "")?;
    let counted = counted(&metrics);
    Ok(format!("`nohop status` reports {modes}; `nohop_edge_packets_total` has {counted}"))
}

/// Each result of packets with its number, where that isn't zero, in the metrics' text.
fn counted(metrics: &str) -> String {
    let lines = metrics.lines().filter_map(|line| {
        let (result, n) =
            line.strip_prefix("nohop_edge_packets_total{result=\"")?.split_once("\"} ")?;
        (n != "0").then(|| format!("{result} {n}"))
    });
    lines.collect::<Vec<_>>().join(", ")
}

/// The packets a second that came through, and those that were sent.
fn forwarded(site: &Site, n_flows: u32, length: Duration) -> Result<[f64; 2]> {
    // All flows begin, or go on, before any of their packets is counted.
    let easy = site.send(n_flows, Some(EASY_RATE))?;
    thread::sleep(Duration::from_secs_f64(f64::from(n_flows) / f64::from(EASY_RATE)) + SETTLE);
    easy.stop()?;
    let start = Instant::now();
    let sending = site.send(n_flows, None)?;
    thread::sleep(SETTLE);
    let before = (Instant::now(), site.count()?);
    thread::sleep(length);
    let after = (Instant::now(), site.count()?);
    let n_sent = sending.stop()?;
    let rate = (after.1 - before.1) as f64 / (after.0 - before.0).as_secs_f64();
    Ok([rate, n_sent as f64 / start.elapsed().as_secs_f64()])
}

/// Whether all datagrams of some flows arrive, each once and with a right checksum, which the kernel verifies for the
/// receiver; then they are counted only.
fn check(draft: &mut Draft, mut site: Site) -> Result<Site> {
    const N_FLOWS: u32 = 1_000;
    let host = site.node.backend_host();
    let socket = host.enter(|| {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT))?;
        set_socket_recv_buffer_size_force(&socket, 64 << 20)?;
        socket.set_read_timeout(Some(SETTLE))?;
        Ok(socket)
    })?;
    // A first flow, by which all learn their neighbours.
    let sending = site.send(250, Some(1_000))?;
    thread::sleep(SETTLE);
    sending.stop()?;
    receive(&socket)?;
    let before = n_wrong(host)?;
    let sending = site.send(N_FLOWS, Some(EASY_RATE))?;
    thread::sleep(4 * SETTLE);
    let n_sent = sending.stop()?;
    let n_received = receive(&socket)?.len();
    let n_wrong = n_wrong(host)? - before;
    draft.note(format!(
        "{}: of {n_sent} datagrams of {N_FLOWS} flows receivers got {n_received}, and {n_wrong} with a wrong checksum",
        site.peer.name,
    ));
    ensure!(n_wrong == 0, "{n_wrong} datagrams have a wrong checksum");
    ensure!(n_received > 0, "no datagram arrives");
    drop(socket);
    site.sink = Some(Sink::new(site.node.backend_host(), "eth0")?);
    Ok(site)
}

/// The numbers of the datagrams that have arrived.
fn receive(socket: &UdpSocket) -> Result<BTreeSet<u64>> {
    let mut numbers = BTreeSet::new();
    let mut datagram = [0; 128];
    while let Ok(len) = socket.recv(&mut datagram) {
        let number = datagram[..len].last_chunk::<8>().context("a datagram without a number")?;
        numbers.insert(u64::from_be_bytes(*number));
    }
    Ok(numbers)
}

/// How many datagrams with a wrong checksum a host's receivers have got.
fn n_wrong(host: &Host) -> Result<u64> {
    // /proc/self is the process's first thread.
    let text =
        host.enter(|| fs::read_to_string("/proc/thread-self/net/snmp").context("read snmp"))?;
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Udp: "));
    let (names, values) = lines.next().zip(lines.next()).context("no line Udp in snmp")?;
    let mut both = names.split(' ').zip(values.split(' '));
    let (_, value) = both.find(|(name, _)| *name == "InCsumErrors").context("no InCsumErrors")?;
    value.parse().context("InCsumErrors")
}

pub fn judge(draft: &mut Draft) {
    let conditions: Vec<String> = draft
        .figures
        .iter()
        .filter(|figure| figure.name == RATE.name)
        .map(|figure| figure.condition.clone())
        .collect();
    for condition in conditions {
        for (contender, goal) in [(NOHOP_XDP, 4.0), (NOHOP_TC, 1.5)] {
            let figure = draft.find(RATE.name, &condition);
            let is = figure.map(|figure| figure.ratios(contender, NFTABLES)).unwrap_or_default();
            let what = format!(
                "packets a second of one processor, {contender} over {NFTABLES} ({condition})"
            );
            draft.goal(&what, Limit::AtLeast(goal), &is, "");
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn counters_of_packets_are_read() {
        let metrics = "# TYPE nohop_edge_packets_total counter\n\
            nohop_edge_packets_total{result=\"forwarded\"} 12\n\
            nohop_edge_packets_total{result=\"fragment\"} 0\n\
            nohop_edge_packets_total{result=\"no_route\"} 3\nnohop_edge_flows 4\n";
        assert_eq!(super::counted(metrics), "forwarded 12, no_route 3");
    }
}

//! SYNs at full rate by a cable of their own, from ever new addresses and ports: how many packets of established
//! flows are lost meanwhile, and how many new flows begin.

use std::net::Ipv4Addr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::peers::{DIRECT, NOHOP_TC, NOHOP_XDP};
use crate::progress::Progress;
use crate::report_builder::{Draft, Limit, Quantity};
use crate::suites::edge::packets::Site;
use crate::traffic::{Packets, Sending};

const LOST: Quantity =
    Quantity::lower("packets of established flows lost, of 50,000 a second", "packets");
const BEGUN: Quantity = Quantity::higher("new flows that begin, of 1,000 a second", "%");

const CONDITION: &str = "a flood of SYNs";
const RATE: u32 = 50_000;
const NEW_RATE: u32 = 1_000;
const N_FLOWS: u32 = 1_000;
const SETTLE: Duration = Duration::from_millis(200);

/// What became of packets.
struct Found {
    n_established: u64,
    /// Lost, but for those that the receive queue had no room for.
    n_lost: u64,
    n_overflowed: u64,
    n_new: u64,
    n_begun: u64,
    syns_per_s: f64,
}

pub fn measure(draft: &mut Draft, sites: &[Site], is_quick: bool) {
    let (n_rounds, length) = if is_quick { (1, 1) } else { (3, 3) };
    // Without balancing there are no flows.
    let sites: Vec<&Site> = sites.iter().filter(|site| site.peer.name != DIRECT).collect();
    let mut progress = Progress::new("edge, flood", n_rounds * sites.len());
    for round in 0..n_rounds {
        for site in draft.shuffled(sites.iter().copied()) {
            let name = site.peer.name;
            progress.step(&format!("{CONDITION}: {name}"));
            match flooded(site, Duration::from_secs(length)) {
                Ok(found) => {
                    draft.add(LOST, CONDITION, name, round, Some(found.n_lost as f64));
                    let begun = 100.0 * found.n_begun as f64 / found.n_new.max(1) as f64;
                    draft.add(BEGUN, CONDITION, name, round, Some(begun));
                    draft.note(format!(
                        "{name}, {CONDITION}: {:.1} million a second were sent; of {} packets of established flows \
                         the receive queue had no room for {}",
                        found.syns_per_s / 1e6,
                        found.n_established,
                        found.n_overflowed,
                    ));
                }
                Err(error) => draft.failed(name, CONDITION, &error),
            }
        }
    }
}

fn flooded(site: &Site, length: Duration) -> Result<Found> {
    let (client, edge) = (site.node.client_host(), site.node.hop_host());
    let sink = site.sink.as_ref().context("nothing counts")?;
    let flood = Packets {
        are_syns: true,
        stream: 0,
        to: site.running.address(0),
        from: (Ipv4Addr::new(198, 19, 0, 0), 65_521),
        ports: (1_024, 64_000),
    };
    let new =
        Packets { are_syns: false, stream: 1, from: (Ipv4Addr::new(203, 0, 113, 1), 250), ..flood };
    let before = (site.n_overflowed()?, sink.n_datagrams(0)?, sink.n_datagrams(1)?);
    let established = site.send(N_FLOWS, Some(RATE))?;
    thread::sleep(SETTLE);
    let start = Instant::now();
    let flooding = Sending::start(client, "eth1", (edge, "eth2"), &flood, None)?;
    thread::sleep(SETTLE);
    let beginning = Sending::start(client, "eth0", (edge, "eth0"), &new, Some(NEW_RATE))?;
    thread::sleep(length);
    let n_new = beginning.stop()?;
    let n_syns = flooding.stop()?;
    let took = start.elapsed();
    let n_established = established.stop()?;
    thread::sleep(SETTLE);
    let n_overflowed = site.n_overflowed()? - before.0;
    let n_arrived = sink.n_datagrams(0)? - before.1;
    Ok(Found {
        n_established,
        n_lost: n_established.saturating_sub(n_arrived + n_overflowed),
        n_overflowed,
        n_new,
        n_begun: sink.n_datagrams(1)? - before.2,
        syns_per_s: n_syns as f64 / took.as_secs_f64(),
    })
}

pub fn judge(draft: &mut Draft) {
    for contender in [NOHOP_XDP, NOHOP_TC] {
        let row = draft.find(LOST.name, CONDITION).and_then(|figure| figure.row(contender));
        let lost = row.map(|row| row.rounds.iter().flatten().sum::<f64>());
        let what =
            format!("{contender}, {CONDITION}: packets of established flows lost, in all rounds");
        draft.goal_of_count(&what, Limit::AtMost(0.0), lost);
    }
}

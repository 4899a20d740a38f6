//! Packets that are lost while an edge's daemon is killed, and started again; they are counted where they are sent,
//! and behind the edge.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::peers::{NOHOP_TC, NOHOP_XDP};
use crate::pin;
use crate::progress::Progress;
use crate::report_builder::{Draft, Limit, Quantity};
use crate::suites::edge::packets::Site;

const LOST: Quantity =
    Quantity::lower("packets that the edge lost, of 100,000 a second", "packets");

const RATE: u32 = 100_000;
const N_FLOWS: u32 = 1_000;
/// Before an event, after it, and until the last packet has arrived.
const AROUND: Duration = Duration::from_millis(300);

/// What happens to the daemon. Its successor loads its programs again and puts them in the places of those that are
/// attached, as an upgrade's does.
#[derive(Clone, Copy)]
enum Event {
    Killed,
    Restarted,
}

impl Event {
    const ALL: [Event; 2] = [Event::Killed, Event::Restarted];

    fn name(self) -> &'static str {
        match self {
            Event::Killed => "the daemon is killed (SIGKILL), and started again",
            Event::Restarted => "the daemon is restarted (SIGTERM), as for an upgrade",
        }
    }
}

pub fn measure(draft: &mut Draft, sites: &mut [Site]) {
    let n_rounds = draft.n_rounds;
    let mut progress = Progress::new("edge, restarts", n_rounds * Event::ALL.len() * 2);
    for round in 0..n_rounds {
        for event in Event::ALL {
            for site in sites.iter_mut() {
                let name = site.peer.name;
                if site.running.nohop().is_none() {
                    continue;
                }
                progress.step(&format!("{}: {name}", event.name()));
                let lost = match lost(site, event) {
                    Ok(lost) => {
                        if lost.before > 0 {
                            draft.note(format!(
                                "{name}, {}: {} of {} packets didn't fit into the edge's receive queue (256 packets), \
                                 as its processor was busy",
                                event.name(), lost.before, lost.n_sent
                            ));
                        }
                        Some(lost.within as f64)
                    }
                    Err(error) => {
                        draft.failed(name, event.name(), &error);
                        None
                    }
                };
                draft.add(LOST, event.name(), name, round, lost);
            }
        }
    }
}

/// Where packets were lost.
struct Lost {
    n_sent: u64,
    /// Before the edge had them: veth's queue was full.
    before: u64,
    within: u64,
}

fn lost(site: &mut Site, event: Event) -> Result<Lost> {
    let before = (site.n_overflowed()?, site.count()?);
    let sending = site.send(N_FLOWS, Some(RATE))?;
    thread::sleep(AROUND);
    let nohop = site.running.nohop().context("no daemon")?;
    match event {
        Event::Killed => {
            nohop.kill()?;
            thread::sleep(AROUND);
        }
        Event::Restarted => drop(nohop.terminate()?),
    }
    pin::on(pin::SERVER, || nohop.start_again())?;
    thread::sleep(AROUND);
    let n_sent = sending.stop()?;
    thread::sleep(AROUND);
    let before_it = site.n_overflowed()? - before.0;
    let n_forwarded = site.count()? - before.1;
    Ok(Lost { n_sent, before: before_it, within: n_sent.saturating_sub(before_it + n_forwarded) })
}

pub fn judge(draft: &mut Draft) {
    for event in Event::ALL {
        for contender in [NOHOP_XDP, NOHOP_TC] {
            let figure = draft.find(LOST.name, event.name());
            let row = figure.and_then(|figure| figure.row(contender));
            let lost = row.map(|row| row.rounds.iter().flatten().sum::<f64>());
            let what =
                format!("{contender}, {}: packets lost by the edge, in all rounds", event.name());
            draft.goal_of_count(&what, Limit::AtMost(0.0), lost);
        }
    }
}

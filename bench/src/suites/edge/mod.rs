//! An edge between clients and backends, each in a network namespace of its own: packets a second of one
//! processor, HTTP, what is lost when the daemon is killed, restarted or replaced, or SYNs flood it, and what it costs
//! to show servers their clients' addresses.

mod clients;
mod flood;
mod packets;
mod restarts;

use anyhow::Result;
use clients::N_CONNECTIONS;

use crate::node::Layout;
use crate::peers::{self, EDGE_PEERS, HAPROXY_TCP, NOHOP_TC, NOHOP_XDP, Protocol};
use crate::progress::Progress;
use crate::report_builder::{Draft, Limit};
use crate::suites::http::{self, Use};

/// Runs the suite.
///
/// # Errors
/// When nothing can be measured at all.
pub fn run(is_quick: bool) -> Result<Draft> {
    crate::traffic::object()?;
    let (n_rounds, rate_seconds) = if is_quick { (2, 0.4) } else { (7, 1.2) };
    let title = "an edge: packets a second of one processor, HTTP, restarts and floods";
    let mut draft = Draft::new(title, n_rounds);
    // All of them serve it.
    let (able, contenders) = peers::able_of(&EDGE_PEERS, Protocol::Http);
    draft.contenders = contenders;
    let mut sites = packets::measure(&mut draft, is_quick)?;
    restarts::measure(&mut draft, &mut sites);
    flood::measure(&mut draft, &sites, is_quick);
    drop(sites);
    let mut progress = Progress::new("edge, HTTP", 4 * able.len() * (n_rounds + 1));
    let how = (n_rounds, rate_seconds);
    http::measure(&mut draft, &able, (Layout::Edge, &[N_CONNECTIONS]), how, &mut progress)?;
    if let Err(error) = clients::measure(&mut draft, is_quick) {
        draft.note(format!("what showing clients costs isn't measured: {error:#}"));
    }
    draft.finish();
    packets::judge(&mut draft);
    judge_http(&mut draft);
    restarts::judge(&mut draft);
    flood::judge(&mut draft);
    clients::judge(&mut draft);
    Ok(draft)
}

/// The part about floods alone.
///
/// # Errors
/// As [`run`].
pub fn run_flood(is_quick: bool) -> Result<Draft> {
    crate::traffic::object()?;
    let mut draft = Draft::new("an edge: floods", if is_quick { 1 } else { 3 });
    (_, draft.contenders) = peers::able_of(&EDGE_PEERS, Protocol::Udp);
    let sites = packets::start(&mut draft);
    flood::measure(&mut draft, &sites, is_quick);
    draft.finish();
    flood::judge(&mut draft);
    Ok(draft)
}

/// The part about clients' addresses alone.
///
/// # Errors
/// As [`run`].
pub fn run_clients(is_quick: bool) -> Result<Draft> {
    let mut draft = Draft::new("an edge: clients' addresses", if is_quick { 2 } else { 7 });
    (_, draft.contenders) = peers::able_of(&EDGE_PEERS[1..2], Protocol::Http);
    clients::measure(&mut draft, is_quick)?;
    draft.finish();
    clients::judge(&mut draft);
    Ok(draft)
}

fn judge_http(draft: &mut Draft) {
    for (uses, goal) in [(Use::Kept, 1.7), (Use::OneRequest, 3.0)] {
        let condition = uses.condition(Layout::Edge, N_CONNECTIONS);
        for contender in [NOHOP_XDP, NOHOP_TC] {
            let figure = draft.find(http::RATE.name, &condition);
            let is = figure.map(|figure| figure.ratios(contender, HAPROXY_TCP)).unwrap_or_default();
            let what = format!("requests a second, {contender} over {HAPROXY_TCP} ({condition})");
            draft.goal(&what, Limit::AtLeast(goal), &is, "");
        }
    }
}

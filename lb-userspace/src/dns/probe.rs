//! Probes the upstreams: for loops, and whether a suspect answers at all.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::task::JoinSet;

use super::forward::Forwarder;
use super::loop_detection::{ProbeQuery, UpstreamPath};
use super::mailbox::WorkerWakers;
use super::sockets::Transport;
use super::upstream::{Upstream, UpstreamState};
use super::upstream_query::UpstreamQuery;

/// The period between two probes of an upstream that is out.
const RETRY: Duration = Duration::from_secs(2);

/// How often due probes are checked for.
const TICK: Duration = Duration::from_secs(1);

/// What is probed: an upstream by one transport.
type ProbeTarget = (SocketAddr, Transport);

/// Probes for as long as the forwarder lives: suspects at once, upstreams that are out every 2 s,
/// and each path once a minute for loops. Wakes the threads through `alarm` when an upstream is out
/// or a loop was found, so that no query waits for it any longer.
///
/// # Panics
/// Outside a tokio runtime.
pub(super) fn start(forwarder: &Arc<Forwarder>, alarm: WorkerWakers) {
    let suspicion = forwarder.suspicion();
    tokio::spawn(watch(Arc::downgrade(forwarder), suspicion, alarm));
}

async fn watch(forwarder: Weak<Forwarder>, suspicion: Arc<Notify>, alarm: WorkerWakers) {
    let Some(mut found) = forwarder.upgrade().map(|forwarder| forwarder.loops.found()) else {
        return;
    };
    let mut probes: JoinSet<Option<ProbeTarget>> = JoinSet::new();
    let (mut under_way, mut asked) = (HashSet::new(), HashMap::<ProbeTarget, Instant>::new());
    let mut is_suspicious = false;
    loop {
        {
            let Some(forwarder) = forwarder.upgrade() else { return };
            let now = Instant::now();
            forwarder.upstreams.refresh(now);
            let plan = forwarder.upstreams.plan();
            let paths = plan.paths();
            forwarder.loops.retain_paths(&paths);
            asked.retain(|(address, _), _| paths.iter().any(|path| path.server == *address));
            for upstream in plan.upstreams() {
                for transport in [Transport::Udp, Transport::Tcp] {
                    let target = (upstream.address, transport);
                    let is_due = match upstream.state(transport) {
                        UpstreamState::Up => false,
                        UpstreamState::Suspect => true,
                        UpstreamState::Out => {
                            asked.get(&target).is_none_or(|at| now - *at >= RETRY)
                        }
                    };
                    if is_due && under_way.insert(target) {
                        asked.insert(target, now);
                        let (upstream, alarm) = (Arc::clone(upstream), alarm.clone());
                        let patience = forwarder.limits.patience / 2;
                        probes.spawn(async move {
                            probe_health(&upstream, transport, patience, &alarm).await;
                            Some(target)
                        });
                    }
                }
            }
            for path in paths {
                let upstream = plan.upstreams().find(|upstream| upstream.address == path.server);
                let is_up = upstream
                    .is_some_and(|upstream| upstream.state(Transport::Udp) == UpstreamState::Up);
                if forwarder.loops.is_due(&path, is_suspicious || !is_up, now)
                    && let Some(question) = forwarder.loops.probe(&path, now)
                {
                    let (forwarder, upstream) = (Arc::clone(&forwarder), upstream.cloned());
                    probes.spawn(async move {
                        probe_loop(&forwarder, &path, upstream, &question).await;
                        None
                    });
                }
            }
        }
        is_suspicious = tokio::select! {
            () = suspicion.notified() => true,
            _ = found.changed() => {
                alarm.ring();
                false
            }
            Some(probed) = probes.join_next() => {
                if let Ok(Some(target)) = probed {
                    under_way.remove(&target);
                }
                false
            }
            () = tokio::time::sleep(TICK) => false,
        };
    }
}

/// Probes whether an upstream answers anything: a query that it should resolve, and one that it has
/// to answer itself, as a resolver whose own upstreams fail is still good for the names it has.
async fn probe_health(
    upstream: &Upstream,
    transport: Transport,
    patience: Duration,
    alarm: &WorkerWakers,
) {
    let asked = Instant::now();
    let [recursive, plain] = [true, false]
        .map(|recursion| UpstreamQuery::of(&ProbeQuery::sign_of_life().wire, recursion));
    let exchange = async {
        let (mut recursive, mut plain) = (
            std::pin::pin!(recursive.over(transport, upstream.address)),
            std::pin::pin!(plain.over(transport, upstream.address)),
        );
        // One response is enough; one error isn't a failure.
        tokio::select! {
            answer = &mut recursive => match answer {
                Ok(_) => true,
                Err(_) => plain.await.is_ok(),
            },
            answer = &mut plain => match answer {
                Ok(_) => true,
                Err(_) => recursive.await.is_ok(),
            },
        }
    };
    if tokio::time::timeout(patience, exchange).await == Ok(true) {
        upstream.is_alive(transport, Instant::now());
    } else if upstream.is_unproven(transport, asked) {
        alarm.ring();
    }
}

/// Probes whether a path leads back here: then the query arrives at our own server.
async fn probe_loop(
    forwarder: &Forwarder,
    path: &UpstreamPath,
    upstream: Option<Arc<Upstream>>,
    question: &ProbeQuery,
) {
    let outgoing = UpstreamQuery::of(&question.wire, true);
    let exchange = outgoing.over_udp(path.server);
    if let Ok(Ok(_)) = tokio::time::timeout(forwarder.limits.patience, exchange).await {
        if let Some(upstream) = upstream {
            upstream.is_alive(Transport::Udp, Instant::now());
        }
        forwarder.loops.answered(question);
    }
}

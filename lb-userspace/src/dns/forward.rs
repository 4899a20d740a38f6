//! Forwarding state that all threads share: the upstreams, what probes have found, and the queries
//! over TCP, which are rare enough for a task each. (`relay` has those over UDP.)

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio::sync::Notify;
use tokio::task::JoinSet;
use tracing::debug;

use super::acl::ClientKey;
use super::encode::OUR_PAYLOAD;
use super::loop_detection::LoopDetector;
use super::message::ClientQuery;
use super::relay::{ForwardError, ForwardLimits};
use super::response::UpstreamResponse;
use super::sockets::Transport;
use super::upstream::{QueryOutcome, Upstream, UpstreamState, UpstreamStats};
use super::upstream_query::UpstreamQuery;
use super::upstreams::{UpstreamRoute, Upstreams};

/// The queries over TCP that may be pending, and those of one client other than the host.
const MAX_IN_FLIGHT: usize = 512;
const MAX_IN_FLIGHT_EACH: usize = MAX_IN_FLIGHT / 4;

/// Forwards queries to upstreams; it caches nothing.
#[derive(Debug)]
pub(super) struct Forwarder {
    pub(super) upstreams: Upstreams,
    pub(super) limits: ForwardLimits,
    pub(super) loops: Arc<LoopDetector>,
    in_flight: Arc<TcpInFlight>,
    /// Wakes the prober (`probe`).
    suspicion: Arc<Notify>,
}

/// A query over TCP that is waited for: the task may be dropped at any time.
struct SentOverTcp(Arc<Upstream>);

impl Drop for SentOverTcp {
    fn drop(&mut self) {
        self.0.done(0);
    }
}

/// The pending queries over TCP.
#[derive(Debug, Default)]
struct TcpInFlight(Mutex<HashMap<ClientKey, usize>>);

/// One of them, until this is dropped.
#[derive(Debug)]
struct TcpInFlightGuard(Arc<TcpInFlight>, ClientKey);

impl TcpInFlight {
    /// A place for one more; `None` where there are enough.
    fn place(self: &Arc<Self>, client_key: ClientKey) -> Option<TcpInFlightGuard> {
        let mut client_keys = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let n_all: usize = client_keys.values().sum();
        let n = client_keys.get(&client_key).copied().unwrap_or_default();
        if n_all >= MAX_IN_FLIGHT || client_key.is_some() && n >= MAX_IN_FLIGHT_EACH {
            return None;
        }
        client_keys.insert(client_key, n + 1);
        drop(client_keys);
        Some(TcpInFlightGuard(Arc::clone(self), client_key))
    }
}

impl Drop for TcpInFlightGuard {
    fn drop(&mut self) {
        let mut client_keys = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        match client_keys.get_mut(&self.1) {
            Some(n) if *n > 1 => *n -= 1,
            _ => drop(client_keys.remove(&self.1)),
        }
    }
}

impl Forwarder {
    /// A forwarder to these upstreams; `probe::start` is to be called for it.
    pub(super) fn new(upstreams: Upstreams, limits: ForwardLimits) -> Arc<Forwarder> {
        Arc::new(Forwarder {
            upstreams,
            limits,
            loops: Arc::default(),
            in_flight: Arc::default(),
            suspicion: Arc::default(),
        })
    }

    /// Notified when an upstream should be probed.
    pub(super) fn suspicion(&self) -> Arc<Notify> {
        Arc::clone(&self.suspicion)
    }

    /// Has the prober check the upstreams now.
    pub(super) fn suspect(&self) {
        self.suspicion.notify_one();
    }

    /// Whether the query is a probe of ours that came back, which marks its path as looping.
    pub(super) fn is_probe(&self, query: &ClientQuery<'_>) -> bool {
        self.loops.is_probe(&query.name)
    }

    /// The problems of the upstreams, each with its fix.
    pub(super) fn problems(&self) -> Vec<String> {
        let mut problems = self.upstreams.problems();
        problems.extend(self.loops.problems(&self.upstreams.plan().paths()));
        problems
    }

    /// What is shown of each upstream.
    pub(super) fn readings(&self) -> Vec<UpstreamStats> {
        let plan = self.upstreams.plan();
        let mut readings: Vec<UpstreamStats> = Vec::new();
        for upstream in plan.upstreams() {
            if !readings.iter().any(|known| known.address == upstream.address) {
                readings.push(upstream.read());
            }
        }
        readings
    }

    /// The upstreams' response over TCP, for a client of TCP: over UDP it was truncated.
    ///
    /// The order is that of [`super::relay`]: the next upstream is queried when one hasn't answered
    /// for a while, and a negative response applies once no better upstream may still answer.
    ///
    /// # Errors
    /// When none answers in time.
    pub(super) async fn over_tcp(
        &self,
        query: &ClientQuery<'_>,
        client_key: ClientKey,
    ) -> Result<(UpstreamResponse<'static>, Arc<Upstream>, bool), ForwardError> {
        if self.is_probe(query) {
            return Err(ForwardError::OwnProbe);
        }
        let _place = self.in_flight.place(client_key).ok_or(ForwardError::Busy)?;
        self.upstreams.refresh(Instant::now());
        let plan = self.upstreams.plan();
        let route = plan.of(&query.name).ok_or(ForwardError::NotForwarded)?;
        let mut bytes = Vec::new();
        query.forwarded(OUR_PAYLOAD, &mut bytes);
        let outgoing = Arc::new(UpstreamQuery::new(bytes, query.question().len()));
        let mut n_asked = 0;
        for _ in 0..self.limits.n_rounds {
            let order = self.order(route);
            n_asked = order.len();
            let round = self.round(route, order, &outgoing);
            if let Ok(Some((rank, answer))) =
                tokio::time::timeout(self.limits.patience * 2, round).await
            {
                return Ok((answer, Arc::clone(&route.upstreams[rank]), route.is_in_zone));
            }
        }
        match n_asked {
            0 => Err(ForwardError::NoUpstream),
            n_asked => Err(ForwardError::Unanswered(n_asked)),
        }
    }

    /// The places in the route of those to ask, those that are out last.
    fn order(&self, route: &UpstreamRoute) -> Vec<usize> {
        let mut order: Vec<usize> = (0..route.upstreams.len()).collect();
        order
            .sort_by_key(|rank| route.upstreams[*rank].state(Transport::Tcp) == UpstreamState::Out);
        order.retain(|rank| !self.loops.is_looping(&route.path(&route.upstreams[*rank])));
        order
    }

    /// Asks each upstream once, until one has answered.
    async fn round(
        &self,
        route: &UpstreamRoute,
        order: Vec<usize>,
        outgoing: &Arc<UpstreamQuery>,
    ) -> Option<(usize, UpstreamResponse<'static>)> {
        let (mut next, mut tries) = (order.into_iter(), JoinSet::new());
        let mut waiting: Vec<(usize, Instant)> = Vec::new();
        let mut fallback: Option<(usize, UpstreamResponse<'static>)> = None;
        let state = |rank: usize| route.upstreams[rank].state(Transport::Tcp);
        let hedge = self.limits.hedge(false);
        loop {
            let is_denied = fallback.as_ref().is_some_and(|(_, answer)| answer.is_negative());
            // One that is out has had its time where another one has answered.
            let may_answer = |(other, sent): &(usize, Instant)| {
                let is_better =
                    fallback.as_ref().is_none_or(|(rank, _)| !is_denied || other < rank);
                let is_given_up = fallback.is_some() && state(*other) == UpstreamState::Out;
                is_better && (!is_given_up || sent.elapsed() < hedge)
            };
            if (is_denied || next.as_slice().is_empty()) && !waiting.iter().any(may_answer) {
                return fallback;
            }
            let is_doubtful = waiting.iter().all(|(rank, _)| state(*rank) == UpstreamState::Out);
            let is_suspect = waiting.iter().any(|(rank, _)| state(*rank) == UpstreamState::Suspect);
            if is_doubtful
                && !is_denied
                && let Some(rank) = next.next()
            {
                self.begin(route, rank, outgoing, &mut tries);
                waiting.push((rank, Instant::now()));
                continue;
            }
            tokio::select! {
                Some(Ok((rank, answer))) = tries.join_next() => {
                    waiting.retain(|(other, _)| *other != rank);
                    match answer {
                        Some(answer) if answer.is_failure() => {
                            fallback.get_or_insert((rank, answer));
                        }
                        Some(answer) if answer.is_negative() => {
                            let is_better = fallback
                                .as_ref()
                                .is_none_or(|(known, fallback)| !fallback.is_negative() || rank < *known);
                            if is_better {
                                fallback = Some((rank, answer));
                            }
                        }
                        Some(answer) => return Some((rank, answer)),
                        None => {}
                    }
                }
                () = tokio::time::sleep(self.limits.hedge(is_suspect)) => {
                    // Another one may answer now, and then this query is over before its time.
                    for (rank, sent) in &waiting {
                        let is_late = sent.elapsed() >= hedge;
                        if is_late && route.upstreams[*rank].is_late(Transport::Tcp, *sent) {
                            self.suspect();
                        }
                    }
                    let rank = if is_denied { None } else { next.next() };
                    if let Some(rank) = rank {
                        self.begin(route, rank, outgoing, &mut tries);
                        waiting.push((rank, Instant::now()));
                    }
                }
            }
        }
    }

    /// Asks one upstream; `None` where it gives no answer in time.
    fn begin(
        &self,
        route: &UpstreamRoute,
        rank: usize,
        outgoing: &Arc<UpstreamQuery>,
        tries: &mut JoinSet<(usize, Option<UpstreamResponse<'static>>)>,
    ) {
        let (upstream, path) =
            (Arc::clone(&route.upstreams[rank]), route.path(&route.upstreams[rank]));
        let (outgoing, patience) = (Arc::clone(outgoing), self.limits.patience);
        let (loops, suspicion) = (Arc::clone(&self.loops), Arc::clone(&self.suspicion));
        upstream.sent(0);
        let sent = SentOverTcp(Arc::clone(&upstream));
        tries.spawn(async move {
            let _sent = sent;
            let query = Instant::now();
            let answer = tokio::select! {
                answer = tokio::time::timeout(patience, outgoing.over_tcp(upstream.address)) => answer,
                // Its question may be the one that it waits for itself.
                () = loops.wait_looping(&path) => return (rank, None),
            };
            let now = Instant::now();
            match answer {
                Ok(Ok(answer)) => {
                    let is_failure = answer.is_failure();
                    let outcome = if is_failure { QueryOutcome::Refused } else { QueryOutcome::Answered };
                    upstream.answered(Transport::Tcp, 0, outcome, now, now - query);
                    return (rank, Some(answer));
                }
                Ok(Err(error)) => {
                    debug!(server = %upstream.address, %error, "a resolver gave no answer");
                    upstream.failed(0, QueryOutcome::Unreachable);
                }
                Err(_) => upstream.failed(0, QueryOutcome::TimedOut),
            }
            if upstream.is_late(Transport::Tcp, query) {
                suspicion.notify_one();
            }
            (rank, None)
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_client_leaves_places_for_others() {
        let in_flight = Arc::new(TcpInFlight::default());
        let take =
            |client_key, n| (0..n).filter_map(|_| in_flight.place(client_key)).collect::<Vec<_>>();
        let greedy = take(Some(1), MAX_IN_FLIGHT);
        assert_eq!(greedy.len(), MAX_IN_FLIGHT_EACH);
        let host = take(None, MAX_IN_FLIGHT);
        assert_eq!(host.len(), MAX_IN_FLIGHT - MAX_IN_FLIGHT_EACH);
        assert!(in_flight.place(Some(2)).is_none());
        drop(greedy);
        assert!(in_flight.place(Some(2)).is_some());
        drop(host);
        assert!(in_flight.0.lock().unwrap().is_empty());
    }
}

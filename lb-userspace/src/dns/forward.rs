//! What all threads share of the forwarding: the upstreams, what probes have found, and questions
//! that go over TCP, which are rare enough for a task each. (`relay` has those over UDP.)

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio::sync::Notify;
use tokio::task::JoinSet;
use tracing::debug;

use super::encode::OUR_PAYLOAD;
use super::loop_detection::Loops;
use super::message::Asked;
use super::relay::{ForwardError, Limits, Party};
use super::response::Received;
use super::sockets::Transport;
use super::upstream::{Outcome, Reading, State, Upstream};
use super::upstream_query::Outgoing;
use super::upstreams::{Route, Upstreams};

/// The questions over TCP that may be under way, and those of one client, unless it is this host.
const MAX_IN_FLIGHT: usize = 512;
const MAX_IN_FLIGHT_EACH: usize = MAX_IN_FLIGHT / 4;

/// Carries questions to other resolvers; it keeps no answer.
#[derive(Debug)]
pub(super) struct Forwarder {
    pub(super) upstreams: Upstreams,
    pub(super) limits: Limits,
    pub(super) loops: Arc<Loops>,
    in_flight: Arc<InFlight>,
    /// Wakes the prober.
    suspicion: Arc<Notify>,
}

/// The questions over TCP that are under way.
#[derive(Debug, Default)]
struct InFlight(Mutex<HashMap<Party, usize>>);

/// One of them, until this is dropped.
#[derive(Debug)]
struct Place(Arc<InFlight>, Party);

impl InFlight {
    /// A place for one more; `None` where there are enough.
    fn place(self: &Arc<Self>, party: Party) -> Option<Place> {
        let mut parties = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let n_all: usize = parties.values().sum();
        let n = parties.get(&party).copied().unwrap_or_default();
        if n_all >= MAX_IN_FLIGHT || party.is_some() && n >= MAX_IN_FLIGHT_EACH {
            return None;
        }
        parties.insert(party, n + 1);
        drop(parties);
        Some(Place(Arc::clone(self), party))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut parties = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        match parties.get_mut(&self.1) {
            Some(n) if *n > 1 => *n -= 1,
            _ => drop(parties.remove(&self.1)),
        }
    }
}

impl Forwarder {
    /// One that goes by these upstreams; [`super::probe`] is to probe them.
    pub(super) fn new(upstreams: Upstreams, limits: Limits) -> Arc<Forwarder> {
        Arc::new(Forwarder {
            upstreams,
            limits,
            loops: Arc::default(),
            in_flight: Arc::default(),
            suspicion: Arc::default(),
        })
    }

    /// Waits until something is suspicious.
    pub(super) fn suspicion(&self) -> Arc<Notify> {
        Arc::clone(&self.suspicion)
    }

    /// Has the prober look at what is suspicious.
    pub(super) fn suspect(&self) {
        self.suspicion.notify_one();
    }

    /// Whether a question that isn't going to be forwarded is a probe of ours; then it is noted that
    /// it came back.
    pub(super) fn is_probe(&self, asked: &Asked<'_>) -> bool {
        self.loops.is_probe(&asked.name)
    }

    /// What is wrong with the upstreams, each with the fix.
    pub(super) fn problems(&self) -> Vec<String> {
        self.loops.problems(&self.upstreams.plan().ways())
    }

    /// What is shown of each upstream.
    pub(super) fn readings(&self) -> Vec<Reading> {
        let plan = self.upstreams.plan();
        let mut readings: Vec<Reading> = Vec::new();
        for upstream in plan.upstreams() {
            if !readings.iter().any(|known| known.address == upstream.address) {
                readings.push(upstream.read());
            }
        }
        readings
    }

    /// The upstreams' answer to a question, over TCP, for a client that asked so: over UDP it was
    /// truncated.
    ///
    /// The order is that of [`super::relay`]: the next upstream is asked when one hasn't answered
    /// for a while, and what it denies counts once no better one may still know.
    ///
    /// # Errors
    /// When none answers in time.
    pub(super) async fn over_tcp(
        &self,
        asked: &Asked<'_>,
        party: Party,
    ) -> Result<(Received<'static>, Arc<Upstream>, bool), ForwardError> {
        if self.is_probe(asked) {
            return Err(ForwardError::OwnProbe);
        }
        let _place = self.in_flight.place(party).ok_or(ForwardError::Busy)?;
        self.upstreams.refresh(Instant::now());
        let plan = self.upstreams.plan();
        let route = plan.of(&asked.name).ok_or(ForwardError::NoUpstream)?;
        let mut query = Vec::new();
        asked.forwarded(OUR_PAYLOAD, &mut query);
        let outgoing = Arc::new(Outgoing::new(query, asked.question().len()));
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
    fn order(&self, route: &Route) -> Vec<usize> {
        let mut order: Vec<usize> = (0..route.upstreams.len()).collect();
        order.sort_by_key(|rank| route.upstreams[*rank].state(Transport::Tcp) == State::Out);
        order.retain(|rank| !self.loops.is_circular(&route.way(&route.upstreams[*rank])));
        order
    }

    /// Asks each upstream once, until one has answered.
    async fn round(
        &self,
        route: &Route,
        order: Vec<usize>,
        outgoing: &Arc<Outgoing>,
    ) -> Option<(usize, Received<'static>)> {
        let (mut next, mut tries) = (order.into_iter(), JoinSet::new());
        let mut waiting: Vec<usize> = Vec::new();
        let mut held: Option<(usize, Received<'static>)> = None;
        loop {
            if let Some((rank, answer)) = &held
                && answer.is_negative()
                && !waiting.iter().any(|other| {
                    let state = route.upstreams[*other].state(Transport::Tcp);
                    other < rank && state != State::Out
                })
            {
                return held;
            }
            let is_denied = held.as_ref().is_some_and(|(_, answer)| answer.is_negative());
            if waiting.is_empty() && next.as_slice().is_empty() {
                return held;
            }
            let is_doubtful = waiting
                .iter()
                .all(|rank| route.upstreams[*rank].state(Transport::Tcp) == State::Out);
            let is_suspect = waiting
                .iter()
                .any(|rank| route.upstreams[*rank].state(Transport::Tcp) == State::Suspect);
            if is_doubtful
                && !is_denied
                && let Some(rank) = next.next()
            {
                self.begin(route, rank, outgoing, &mut tries);
                waiting.push(rank);
                continue;
            }
            tokio::select! {
                Some(Ok((rank, answer))) = tries.join_next() => {
                    waiting.retain(|other| *other != rank);
                    match answer {
                        Some(answer) if answer.is_refusal() => {
                            held.get_or_insert((rank, answer));
                        }
                        Some(answer) if answer.is_negative() => {
                            let is_better = held
                                .as_ref()
                                .is_none_or(|(known, held)| !held.is_negative() || rank < *known);
                            if is_better {
                                held = Some((rank, answer));
                            }
                        }
                        Some(answer) => return Some((rank, answer)),
                        None => {}
                    }
                }
                () = tokio::time::sleep(self.limits.hedge(is_suspect)) => {
                    let rank = if is_denied { None } else { next.next() };
                    if let Some(rank) = rank {
                        self.begin(route, rank, outgoing, &mut tries);
                        waiting.push(rank);
                    }
                }
            }
        }
    }

    /// Asks one upstream; `None` where it gives no answer in time.
    fn begin(
        &self,
        route: &Route,
        rank: usize,
        outgoing: &Arc<Outgoing>,
        tries: &mut JoinSet<(usize, Option<Received<'static>>)>,
    ) {
        let (upstream, way) =
            (Arc::clone(&route.upstreams[rank]), route.way(&route.upstreams[rank]));
        let (outgoing, patience) = (Arc::clone(outgoing), self.limits.patience);
        let (loops, suspicion) = (Arc::clone(&self.loops), Arc::clone(&self.suspicion));
        upstream.sent(0);
        tries.spawn(async move {
            let asked = Instant::now();
            let answer = tokio::select! {
                answer = tokio::time::timeout(patience, outgoing.over_tcp(upstream.address)) => answer,
                // Its question may be the one that it waits for itself.
                () = loops.leads_back(&way) => return (rank, None),
            };
            let now = Instant::now();
            match answer {
                Ok(Ok(answer)) => {
                    let is_refusal = answer.is_refusal();
                    let outcome = if is_refusal { Outcome::Refused } else { Outcome::Answered };
                    upstream.answered(Transport::Tcp, 0, outcome, now, now - asked);
                    return (rank, Some(answer));
                }
                Ok(Err(error)) => {
                    debug!(server = %upstream.address, %error, "a resolver gave no answer");
                    upstream.failed(0, Outcome::Unreachable);
                }
                Err(_) => upstream.failed(0, Outcome::TimedOut),
            }
            if upstream.is_late(Transport::Tcp, asked) {
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
        let in_flight = Arc::new(InFlight::default());
        let take = |party, n| (0..n).filter_map(|_| in_flight.place(party)).collect::<Vec<_>>();
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

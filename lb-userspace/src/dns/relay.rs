//! Forwards queries over UDP: a state machine without I/O, one per thread. It sends and answers
//! through a [`RelayIo`]; the time is an argument.
//!
//! A query goes to the first upstream of its route that isn't out, and to the next one if there is
//! no response after [`ForwardLimits::hedge`], without giving up the first (a hedged request).
//! Identical queries share one upstream query (singleflight). A negative response applies once no
//! better upstream may still answer.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hickory_proto::op::ResponseCode;

use super::acl::ClientKey;
use super::encode::OUR_PAYLOAD;
use super::loop_detection::LoopDetector;
use super::message::{ClientEcho, ClientQuery, HEADER_LEN, WireName, is_same_question};
use super::response::{RelayOptions, ResponseError, UpstreamResponse};
use super::sockets::Transport;
use super::upstream::{QueryOutcome, Upstream, UpstreamState};
use super::upstreams::UpstreamRoute;

mod slot;

pub(super) use slot::{SocketId, Waiter};

use slot::{
    Attempt, FallbackAnswer, FlightKey, InFlightQuery, NumberMap, Slot, SlotRef, flight_key,
    socket_of,
};

/// The number of clients of one question from which on a loop is suspected.
const N_SUSPICIOUS: usize = 8;

/// How often a query moves away from a socket with mismatched messages before its clients get TC.
const MAX_MOVES: u8 = 3;

/// One client other than the host has 1/`SHARE` of the slots at most.
const SHARE: usize = 4;

/// The limits of forwarding.
#[derive(Clone, Copy, Debug)]
pub(super) struct ForwardLimits {
    /// How long one round of queries to all upstreams may take.
    pub(super) patience: Duration,
    /// The number of rounds.
    pub(super) n_rounds: u8,
    /// The queries of clients that may wait at a time, in each thread.
    pub(super) max_waiting: usize,
}

impl ForwardLimits {
    /// The delay before the next upstream is asked: 400 ms, and 50 ms after a suspect. That is
    /// enough for one that is up, so that it isn't by chance that a later one answers for this
    /// site's names.
    pub(super) fn hedge(&self, is_suspect: bool) -> Duration {
        self.patience / if is_suspect { 40 } else { 5 }
    }
}

impl Default for ForwardLimits {
    fn default() -> ForwardLimits {
        ForwardLimits { patience: Duration::from_secs(2), n_rounds: 2, max_waiting: 1024 }
    }
}

/// Why a query got no response from an upstream.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ForwardError {
    #[error("too many queries are pending")]
    Busy,
    #[error("it is a loop probe of this server")]
    OwnProbe,
    #[error("there is no resolver to ask but this one")]
    NoUpstream,
    #[error("it isn't in the zone, and dns.forward is empty")]
    NotForwarded,
    #[error("none of {0} resolvers answered")]
    Unanswered(usize),
    #[error("whether it is a service is unknown, and no upstream has it")]
    Unknown,
}

impl ForwardError {
    /// The response's code.
    pub(super) fn code(&self) -> ResponseCode {
        match self {
            // As of a server that is asked for what it isn't meant for.
            ForwardError::NotForwarded => ResponseCode::Refused,
            _ => ResponseCode::ServFail,
        }
    }
}

/// The sockets as the relay needs them.
pub(super) trait RelayIo {
    /// Draws a socket that is connected to `server` for one more query; `None` if none can be
    /// opened.
    fn draw(&mut self, server: SocketAddr) -> Option<SocketId>;
    /// Draws an id.
    fn id(&mut self) -> u16;
    /// Sends a query.
    fn send(&mut self, port: SocketId, message: &[u8]);
    /// One query of the socket is done.
    fn done(&mut self, port: SocketId);
    /// Counts a message that matches no query of the socket. Returns whether there were so many
    /// that they may be guesses of ids: then the socket isn't drawn any more.
    fn mismatch(&mut self, port: SocketId) -> bool;
    /// Answers a client.
    fn answer(&mut self, waiter: &Waiter, question: &[u8], message: &[u8], end: Completion<'_>);
}

/// How a query ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Completion<'a> {
    /// With the response of an upstream and its code.
    Answered(SocketAddr, ResponseCode),
    /// With TC: the client is to retry over TCP.
    Truncated,
    /// Without a response: SERVFAIL.
    Failed(&'a ForwardError),
}

/// The pending queries of one thread.
#[derive(Debug)]
pub(super) struct Relay {
    limits: ForwardLimits,
    loops: Arc<LoopDetector>,
    /// The TTL limits of forwarded names of our own zone, as in [`RelayOptions`].
    max_ttls: (u32, u32),
    /// The thread's shard of the upstreams' counters.
    shard: usize,
    slots: Vec<Slot>,
    free: Vec<u32>,
    flights: NumberMap<InFlightQuery>,
    /// By the hash of the question; if two collide, the second isn't shared.
    by_question: NumberMap<u32>,
    hasher: RandomState,
    /// When each slot is due next: after the hedging delay, after that of a suspect, and at the end
    /// of a round. Each queue has one constant delay, so it is in order.
    hedges: VecDeque<(Instant, SlotRef)>,
    suspects: VecDeque<(Instant, SlotRef)>,
    rounds: VecDeque<(Instant, SlotRef)>,
    /// Queries whose slot was released, until when a response would still be theirs.
    late: VecDeque<(Instant, FlightKey)>,
    n_waiting: usize,
    client_keys: HashMap<ClientKey, usize>,
    is_suspicious: bool,
    out: Vec<u8>,
}

impl Relay {
    /// An empty relay for the thread with this shard.
    pub(super) fn new(
        limits: ForwardLimits,
        loops: Arc<LoopDetector>,
        max_ttls: (u32, u32),
        shard: usize,
    ) -> Relay {
        Relay {
            limits,
            loops,
            max_ttls,
            shard,
            slots: Vec::new(),
            free: Vec::new(),
            flights: HashMap::default(),
            by_question: HashMap::default(),
            hasher: RandomState::new(),
            hedges: VecDeque::new(),
            suspects: VecDeque::new(),
            rounds: VecDeque::new(),
            late: VecDeque::new(),
            n_waiting: 0,
            client_keys: HashMap::new(),
            is_suspicious: false,
            out: Vec::new(),
        }
    }

    /// Applies another configuration. Pending queries keep their route.
    pub(super) fn reconfigure(&mut self, loops: Arc<LoopDetector>, max_ttls: (u32, u32)) {
        (self.loops, self.max_ttls) = (loops, max_ttls);
    }

    /// Whether no client waits.
    pub(super) fn is_idle(&self) -> bool {
        self.n_waiting == 0
    }

    /// Whether a name is that of a loop probe of ours, which isn't forwarded; then its path is
    /// marked as looping.
    pub(super) fn is_probe(&self, name: &WireName<'_>) -> bool {
        self.loops.is_probe(name)
    }

    /// Whether a probe should check the upstreams, since the last call.
    pub(super) fn take_suspicion(&mut self) -> bool {
        std::mem::take(&mut self.is_suspicious)
    }

    /// When [`Relay::expire`] has something to do next.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let fronts = [
            self.hedges.front().map(|(at, _)| *at),
            self.suspects.front().map(|(at, _)| *at),
            self.rounds.front().map(|(at, _)| *at),
            self.late.front().map(|(at, _)| *at),
        ];
        fronts.into_iter().flatten().min()
    }

    /// Forwards a client's query to the upstreams of `route`.
    pub(super) fn ask(
        &mut self,
        query: &ClientQuery<'_>,
        route: &Arc<UpstreamRoute>,
        mut waiter: Waiter,
        now: Instant,
        wire: &mut impl RelayIo,
    ) {
        self.evict_for(waiter.client_key, now, wire);
        let (question, flags) = (query.question(), query.forwarded_flags());
        let hash = self.hash(question, flags);
        if let Some(&idx) = self.by_question.get(&hash) {
            let slot = &mut self.slots[idx as usize];
            let ours = &slot.message[HEADER_LEN..HEADER_LEN + slot.question_len];
            if slot.flags == flags && is_same_question(ours, question) {
                waiter.question = (ours != question).then(|| question.into());
                self.is_suspicious |= slot.waiters.len() + 1 >= N_SUSPICIOUS;
                self.count(waiter.client_key, true);
                self.slots[idx as usize].waiters.push(waiter);
                return;
            }
        }
        self.count(waiter.client_key, true);
        let idx = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::new(now));
            (self.slots.len() - 1) as u32 // one for each place at most
        });
        let slot = &mut self.slots[idx as usize];
        query.forwarded(OUR_PAYLOAD, &mut slot.message);
        (slot.question_len, slot.flags, slot.hash) = (question.len(), flags, hash);
        slot.route = Some(Arc::clone(route));
        slot.waiters.push(waiter);
        self.by_question.entry(hash).or_insert(idx);
        self.start_round(idx, 0, now, wire);
    }

    /// Handles a message that arrived on `port`.
    pub(super) fn receive(
        &mut self,
        port: SocketId,
        bytes: &[u8],
        now: Instant,
        wire: &mut impl RelayIo,
    ) {
        let Some(&[high, low]) = bytes.first_chunk() else {
            return self.mismatch(port, now, wire);
        };
        let key = flight_key(port, u16::from_be_bytes([high, low]));
        let Some(flight) = self.flights.get(&key) else {
            return self.mismatch(port, now, wire);
        };
        let InFlightQuery { slot: idx, generation, rank, sent, .. } = *flight;
        let route = Arc::clone(&flight.route);
        let upstream = &*route.upstreams[usize::from(rank)];
        let took = now.saturating_duration_since(sent);
        let slot = &mut self.slots[idx as usize];
        let is_late = slot.generation != generation
            || !slot.attempts.iter().any(|each| each.key == key && each.is_waiting);
        if is_late {
            // Too late to be used, but the upstream answers.
            let outcome = QueryOutcome::Answered;
            upstream.answered(Transport::Udp, self.shard, outcome, now, took);
            self.forget(key, wire);
            return;
        }
        let question = &slot.message[HEADER_LEN..HEADER_LEN + slot.question_len];
        let received = match UpstreamResponse::read(bytes, question) {
            Ok(received) => Some(received),
            Err(ResponseError::Format) => None,
            Err(ResponseError::Id | ResponseError::Question) => {
                return self.mismatch(port, now, wire);
            }
        };
        let is_failure = received.as_ref().is_none_or(UpstreamResponse::is_failure);
        let outcome = if is_failure { QueryOutcome::Refused } else { QueryOutcome::Answered };
        upstream.answered(Transport::Udp, self.shard, outcome, now, took);
        for each in slot.attempts.iter_mut().filter(|each| each.key == key) {
            each.is_waiting = false;
        }
        let mut hold = |is_negative| {
            let fallback = FallbackAnswer { rank, bytes: bytes.into(), is_negative };
            let is_better = slot.fallback.as_ref().is_none_or(|known| match is_negative {
                true => !known.is_negative || rank < known.rank,
                false => false,
            });
            if is_better {
                slot.fallback = Some(fallback);
            }
        };
        match received {
            Some(_) if is_failure => hold(false),
            Some(received) if received.is_negative() => hold(true),
            Some(received) => {
                self.forget(key, wire);
                return self.finish(idx, &received, upstream, now, wire);
            }
            None => {}
        }
        self.forget(key, wire);
        if !is_failure {
            return self.settle(idx, now, wire);
        }
        let slot = &self.slots[idx as usize];
        let (generation, end) = (slot.generation, slot.round_began + self.limits.patience);
        self.ask_next(idx, now, wire);
        self.schedule(idx, generation, end, now);
    }

    /// Handles that a socket's upstream can't be reached, as the kernel reports of a connected
    /// socket: all its queries go to the next upstream.
    pub(super) fn unreachable(&mut self, port: SocketId, now: Instant, wire: &mut impl RelayIo) {
        for key in self.keys_of(port) {
            let Some(flight) = self.flights.get(&key) else { continue };
            let (idx, generation) = (flight.slot, flight.generation);
            let upstream = &flight.route.upstreams[usize::from(flight.rank)];
            upstream.failed(self.shard, QueryOutcome::Unreachable);
            self.is_suspicious |= upstream.is_late(Transport::Udp, flight.sent);
            self.forget(key, wire);
            if self.cancel_attempt(idx, generation, key) {
                self.ask_next(idx, now, wire);
            }
        }
    }

    /// Handles everything that is due.
    pub(super) fn expire(&mut self, now: Instant, wire: &mut impl RelayIo) {
        while let Some((_, slot)) = pop_due(&mut self.hedges, now) {
            self.hedge(slot, now, wire);
        }
        while let Some((_, slot)) = pop_due(&mut self.suspects, now) {
            self.hedge(slot, now, wire);
        }
        while let Some((_, (idx, generation))) = pop_due(&mut self.rounds, now) {
            let slot = &self.slots[idx as usize];
            let end = slot.round_began + self.limits.patience;
            // It may have reached the next round before.
            if slot.generation == generation && now >= end {
                self.mark_late(idx, now);
                self.end_round(idx, now, wire);
            }
        }
        while let Some((_, key)) = pop_due(&mut self.late, now) {
            // Unless a response came after all, and socket and id were drawn again since.
            let ended = self
                .flights
                .get(&key)
                .filter(|flight| self.slots[flight.slot as usize].generation != flight.generation);
            if let Some(flight) = ended {
                let upstream = &flight.route.upstreams[usize::from(flight.rank)];
                upstream.failed(self.shard, QueryOutcome::TimedOut);
                self.forget(key, wire);
            }
        }
    }

    /// Checks all pending queries again: an upstream is out, or was found to loop.
    pub(super) fn recheck(&mut self, now: Instant, wire: &mut impl RelayIo) {
        for idx in 0..self.slots.len() as u32 {
            let slot = &mut self.slots[idx as usize];
            let Some(route) = slot.route.clone() else { continue };
            if self.loops.any() {
                for each in &mut slot.attempts {
                    let upstream = &route.upstreams[usize::from(each.rank)];
                    // It may wait for its own query.
                    each.is_waiting &= !self.loops.is_looping(&route.path(upstream));
                }
            }
            match slot.attempts.iter().any(|each| each.is_waiting) {
                true => self.settle(idx, now, wire),
                false => self.ask_next(idx, now, wire),
            }
        }
    }

    fn hash(&self, question: &[u8], flags: u8) -> u64 {
        let mut buffer = [0; 260];
        let lower = &mut buffer[..question.len().min(260)]; // 255 for the name, 4
        lower.copy_from_slice(&question[..lower.len()]);
        lower.make_ascii_lowercase();
        self.hasher.hash_one((&*lower, flags))
    }

    fn count(&mut self, client_key: ClientKey, is_more: bool) {
        let n = self.client_keys.entry(client_key).or_default();
        if is_more {
            *n += 1;
            self.n_waiting += 1;
        } else {
            *n -= 1;
            self.n_waiting -= 1;
            if *n == 0 {
                self.client_keys.remove(&client_key);
            }
        }
    }

    /// Makes room for one more query of `client_key`. The query that has waited longest is evicted:
    /// the client's own if it has its share, otherwise one of the client with the most. Queries
    /// that take long for good reasons are rare; those that never end fill any table (unbound does
    /// the same under "jostle").
    fn evict_for(&mut self, client_key: ClientKey, now: Instant, wire: &mut impl RelayIo) {
        let n = self.client_keys.get(&client_key).copied().unwrap_or_default();
        let most = self.limits.max_waiting.max(1);
        let victim = match client_key {
            Some(_) if n >= most.div_ceil(SHARE) => client_key,
            _ if self.n_waiting >= most => {
                let most = self.client_keys.iter().max_by_key(|(_, n)| **n);
                most.map_or(client_key, |(client_key, _)| *client_key)
            }
            _ => return,
        };
        let waiters = self.slots.iter().zip(0u32..).flat_map(|(slot, idx)| {
            slot.waiters.iter().enumerate().map(move |(place, waiter)| (waiter, idx, place))
        });
        let oldest = waiters.filter(|(waiter, ..)| waiter.client_key == victim);
        let Some((_, idx, place)) = oldest.min_by_key(|(waiter, ..)| waiter.since) else { return };
        self.is_suspicious = true;
        let slot = &mut self.slots[idx as usize];
        if slot.waiters.len() == 1 {
            self.mark_late(idx, now);
            return self.fail(idx, &ForwardError::Busy, now, wire);
        }
        let waiter = slot.waiters.swap_remove(place);
        self.answer_error(
            idx,
            &waiter,
            ResponseCode::ServFail,
            Completion::Failed(&ForwardError::Busy),
            wire,
        );
        self.count(waiter.client_key, false);
    }

    fn start_round(&mut self, idx: u32, round: u8, now: Instant, wire: &mut impl RelayIo) {
        let slot = &mut self.slots[idx as usize];
        let Some(route) = &slot.route else { return };
        (slot.round, slot.round_began, slot.next) = (round, now, 0);
        slot.order.clear();
        slot.order.extend(0..route.upstreams.len().min(usize::from(u8::MAX)) as u8);
        let state = |rank: &u8| route.upstreams[usize::from(*rank)].state(Transport::Udp);
        slot.order.sort_by_key(|rank| state(rank) == UpstreamState::Out);
        if self.loops.any() {
            let is_looping =
                |rank: u8| self.loops.is_looping(&route.path(&route.upstreams[usize::from(rank)]));
            slot.order.retain(|rank| !is_looping(*rank));
        }
        let (generation, end) = (slot.generation, now + self.limits.patience);
        self.ask_next(idx, now, wire);
        self.schedule(idx, generation, end, now);
    }

    /// Schedules when a pending query is handled next.
    fn schedule(&mut self, idx: u32, generation: u32, end: Instant, now: Instant) {
        let slot = &mut self.slots[idx as usize];
        let Some(route) = slot.route.as_ref().filter(|_| slot.generation == generation) else {
            return;
        };
        if slot.round_began + self.limits.patience != end {
            return; // it went on to the next round, which has planned
        }
        let is_suspect = |each: &Attempt| {
            let upstream = &route.upstreams[usize::from(each.rank)];
            upstream.state(Transport::Udp) == UpstreamState::Suspect
        };
        let is_suspect = slot.attempts.last().is_some_and(is_suspect);
        let at = now + self.limits.hedge(is_suspect);
        if (slot.next < slot.order.len() || slot.fallback.is_some() || now == slot.round_began)
            && at < end
        {
            slot.next_hedge = at;
            let queue = if is_suspect { &mut self.suspects } else { &mut self.hedges };
            queue.push_back((at, (idx, generation)));
        } else {
            slot.next_hedge = end;
            // A round is planned at different times before its end.
            let place = self.rounds.partition_point(|(other, _)| *other <= end);
            self.rounds.insert(place, (end, (idx, generation)));
        }
    }

    /// Asks the next upstream, and the one after it if that is out.
    fn ask_next(&mut self, idx: u32, now: Instant, wire: &mut impl RelayIo) {
        loop {
            let slot = &mut self.slots[idx as usize];
            let Some(route) = slot.route.clone() else { return };
            if slot.fallback.as_ref().is_some_and(|fallback| fallback.is_negative) {
                break; // those further down would only be asked for names of this site
            }
            let Some(&rank) = slot.order.get(slot.next) else { break };
            slot.next += 1;
            let upstream = &route.upstreams[usize::from(rank)];
            if self.loops.any() && self.loops.is_looping(&route.path(upstream)) {
                continue;
            }
            let is_sent = self.send(idx, rank, now, wire);
            if is_sent && upstream.state(Transport::Udp) != UpstreamState::Out {
                break;
            }
        }
        self.settle(idx, now, wire);
    }

    fn send(&mut self, idx: u32, rank: u8, now: Instant, wire: &mut impl RelayIo) -> bool {
        let slot = &mut self.slots[idx as usize];
        let Some(route) = &slot.route else { return false };
        let upstream = &route.upstreams[usize::from(rank)];
        let Some(port) = wire.draw(upstream.address) else {
            upstream.failed(self.shard, QueryOutcome::Unreachable);
            self.is_suspicious |= upstream.is_late(Transport::Udp, now);
            return false;
        };
        let mut id = wire.id();
        // Of 65,536 ids a port has few hundred at most.
        while self.flights.contains_key(&flight_key(port, id)) {
            id = id.wrapping_add(1);
        }
        let key = flight_key(port, id);
        slot.message[..2].copy_from_slice(&id.to_be_bytes());
        wire.send(port, &slot.message);
        upstream.sent(self.shard);
        slot.attempts.push(Attempt { rank, key, sent: now, is_waiting: true });
        let (generation, route) = (slot.generation, Arc::clone(route));
        self.flights.insert(key, InFlightQuery { slot: idx, generation, route, rank, sent: now });
        true
    }

    /// Handles the end of a hedging delay.
    fn hedge(&mut self, (idx, generation): SlotRef, now: Instant, wire: &mut impl RelayIo) {
        let slot = &self.slots[idx as usize];
        if slot.generation != generation || now < slot.next_hedge {
            return; // it has ended, or gone on to the next round
        }
        let end = slot.round_began + self.limits.patience;
        self.mark_late(idx, now);
        self.ask_next(idx, now, wire);
        self.schedule(idx, generation, end, now);
    }

    fn mark_late(&mut self, idx: u32, now: Instant) {
        let slot = &self.slots[idx as usize];
        let Some(route) = &slot.route else { return };
        for each in slot.attempts.iter().filter(|each| each.is_waiting) {
            if now.saturating_duration_since(each.sent) >= self.limits.hedge(false) {
                let upstream = &route.upstreams[usize::from(each.rank)];
                self.is_suspicious |= upstream.is_late(Transport::Udp, each.sent);
            }
        }
    }

    /// Ends the query if no better response can come.
    fn settle(&mut self, idx: u32, now: Instant, wire: &mut impl RelayIo) {
        let slot = &self.slots[idx as usize];
        let Some(route) = &slot.route else { return };
        let ForwardLimits { patience, .. } = self.limits;
        let hedge = self.limits.hedge(false);
        // One that is out has had its time where another one has answered.
        let may_answer = |each: &Attempt| {
            let age = now.saturating_duration_since(each.sent);
            let state = route.upstreams[usize::from(each.rank)].state(Transport::Udp);
            let is_given_up = slot.fallback.is_some() && state == UpstreamState::Out;
            each.is_waiting && age < if is_given_up { hedge } else { patience }
        };
        if let Some(fallback) = slot.fallback.as_ref().filter(|fallback| fallback.is_negative) {
            // A later upstream may not know what a better one does, such as the names of this site.
            if !slot.attempts.iter().any(|each| each.rank < fallback.rank && may_answer(each)) {
                self.answer_fallback(idx, now, wire);
            }
            return;
        }
        if slot.next >= slot.order.len() && !slot.attempts.iter().any(may_answer) {
            self.end_round(idx, now, wire);
        }
    }

    fn end_round(&mut self, idx: u32, now: Instant, wire: &mut impl RelayIo) {
        let slot = &self.slots[idx as usize];
        if slot.fallback.is_some() {
            return self.answer_fallback(idx, now, wire);
        }
        let n_asked = slot.order.len();
        let round = slot.round + 1;
        match n_asked {
            0 => self.fail(idx, &ForwardError::NoUpstream, now, wire),
            _ if round < self.limits.n_rounds => self.start_round(idx, round, now, wire),
            n_asked => self.fail(idx, &ForwardError::Unanswered(n_asked), now, wire),
        }
    }

    fn answer_fallback(&mut self, idx: u32, now: Instant, wire: &mut impl RelayIo) {
        let slot = &mut self.slots[idx as usize];
        let (Some(fallback), Some(route)) = (slot.fallback.take(), slot.route.clone()) else {
            return;
        };
        let upstream = &route.upstreams[usize::from(fallback.rank)];
        let question: Box<[u8]> = slot.message[HEADER_LEN..HEADER_LEN + slot.question_len].into();
        match UpstreamResponse::read(&fallback.bytes, &question) {
            Ok(received) => self.finish(idx, &received, upstream, now, wire),
            Err(_) => self.fail(idx, &ForwardError::Unanswered(1), now, wire), // it was read before
        }
    }

    /// Answers all waiters with the upstream's response.
    fn finish(
        &mut self,
        idx: u32,
        received: &UpstreamResponse<'_>,
        upstream: &Upstream,
        now: Instant,
        wire: &mut impl RelayIo,
    ) {
        let slot = &mut self.slots[idx as usize];
        let Some(route) = &slot.route else { return };
        let question = &slot.message[HEADER_LEN..HEADER_LEN + slot.question_len];
        let end = Completion::Answered(upstream.address, received.code());
        let keeps_ad = upstream.keeps_ad();
        let max_ttls = route.is_in_zone.then_some(self.max_ttls);
        for waiter in &slot.waiters {
            let client = ClientEcho {
                id: waiter.id,
                recursion_desired: slot.flags & 1 != 0,
                question: waiter.question.as_deref().unwrap_or(question),
                has_edns: slot.flags & 2 != 0,
            };
            if waiter.is_unknown && received.code() == ResponseCode::NXDomain {
                slot.error(waiter, ResponseCode::ServFail, waiter.max_len.into(), &mut self.out);
                let why = Completion::Failed(&ForwardError::Unknown);
                wire.answer(waiter, client.question, &self.out, why);
                continue;
            }
            let how = RelayOptions { max_len: waiter.max_len.into(), keeps_ad, max_ttls };
            received.relay_to(&client, how, &mut self.out);
            wire.answer(waiter, client.question, &self.out, end);
        }
        self.end(idx, now);
    }

    fn fail(&mut self, idx: u32, why: &ForwardError, now: Instant, wire: &mut impl RelayIo) {
        self.answer_error_all(idx, why.code(), Completion::Failed(why), now, wire);
    }

    fn answer_error_all(
        &mut self,
        idx: u32,
        code: ResponseCode,
        end: Completion<'_>,
        now: Instant,
        wire: &mut impl RelayIo,
    ) {
        let waiters = std::mem::take(&mut self.slots[idx as usize].waiters);
        for waiter in &waiters {
            self.answer_error(idx, waiter, code, end, wire);
        }
        self.slots[idx as usize].waiters = waiters;
        self.end(idx, now);
    }

    /// Answers one client without records: with an error, or with TC.
    fn answer_error(
        &mut self,
        idx: u32,
        waiter: &Waiter,
        code: ResponseCode,
        end: Completion<'_>,
        wire: &mut impl RelayIo,
    ) {
        let slot = &self.slots[idx as usize];
        // What doesn't fit is truncated.
        let max_len = if end == Completion::Truncated { 0 } else { waiter.max_len.into() };
        slot.error(waiter, code, max_len, &mut self.out);
        let ours = &slot.message[HEADER_LEN..HEADER_LEN + slot.question_len];
        wire.answer(waiter, waiter.question.as_deref().unwrap_or(ours), &self.out, end);
    }

    /// Releases the slot. Its unanswered queries are kept for a while: a response shows that the
    /// upstream is alive, and isn't taken for a guess.
    fn end(&mut self, idx: u32, now: Instant) {
        let slot = &mut self.slots[idx as usize];
        for each in slot.attempts.drain(..) {
            if self.flights.contains_key(&each.key) {
                self.late.push_back((now + self.limits.patience, each.key));
            }
        }
        slot.generation = slot.generation.wrapping_add(1);
        (slot.route, slot.fallback, slot.n_moves) = (None, None, 0);
        if self.by_question.get(&slot.hash) == Some(&idx) {
            self.by_question.remove(&slot.hash);
        }
        let waiters = std::mem::take(&mut slot.waiters);
        for waiter in &waiters {
            self.count(waiter.client_key, false);
        }
        let slot = &mut self.slots[idx as usize];
        slot.waiters = waiters;
        slot.waiters.clear();
        self.free.push(idx);
    }

    /// Removes a query.
    fn forget(&mut self, key: FlightKey, wire: &mut impl RelayIo) {
        if let Some(flight) = self.flights.remove(&key) {
            flight.route.upstreams[usize::from(flight.rank)].done(self.shard);
            wire.done(socket_of(key));
        }
    }

    fn keys_of(&self, port: SocketId) -> Vec<FlightKey> {
        self.flights.keys().copied().filter(|key| socket_of(*key) == port).collect()
    }

    /// Stops waiting for an attempt. Returns whether its query is still pending.
    fn cancel_attempt(&mut self, idx: u32, generation: u32, key: FlightKey) -> bool {
        let slot = &mut self.slots[idx as usize];
        let mut attempts = slot.attempts.iter_mut();
        slot.generation == generation
            && attempts.find(|each| each.key == key && each.is_waiting).is_some_and(|each| {
                each.is_waiting = false;
                true
            })
    }

    /// Counts a message that matches no query. Many on one socket may be guesses of ids:
    /// its queries are sent again on another.
    fn mismatch(&mut self, port: SocketId, now: Instant, wire: &mut impl RelayIo) {
        if !wire.mismatch(port) {
            return;
        }
        for key in self.keys_of(port) {
            let Some(flight) = self.flights.get(&key) else { continue };
            let (idx, generation, rank) = (flight.slot, flight.generation, flight.rank);
            self.forget(key, wire);
            if !self.cancel_attempt(idx, generation, key) {
                continue;
            }
            let slot = &mut self.slots[idx as usize];
            slot.n_moves += 1;
            if slot.n_moves > MAX_MOVES {
                self.answer_error_all(idx, ResponseCode::NoError, Completion::Truncated, now, wire);
            } else if !self.send(idx, rank, now, wire) {
                self.ask_next(idx, now, wire);
            }
        }
    }
}

fn pop_due<T>(queue: &mut VecDeque<(Instant, T)>, now: Instant) -> Option<(Instant, T)> {
    queue.pop_front_if(|(at, _)| *at <= now)
}

#[cfg(test)]
mod tests;

//! The state and the counters of one upstream resolver.
//!
//! A resolver that leaves a query unanswered becomes a suspect only if it has answered nothing at
//! all since that query: a slow name is no fault of the resolver. A suspect is probed at once, and
//! meanwhile queried together with the next resolver. If it doesn't answer the probe either, it is
//! out: it is asked last, and is back only once it has answered something (a circuit breaker that
//! is half open for probes alone).

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::sockets::Transport;

/// The number of shards of the counters, so that threads don't contend for a cache line.
const N_SHARDS: usize = 8;

/// The ends of the buckets of [`UpstreamStats::seconds`], in microseconds.
pub const BUCKETS_US: [u64; 12] =
    [250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000];

/// The state of an upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpstreamState {
    /// It answers.
    Up,
    /// It left a query unanswered and has answered nothing since: a probe decides.
    Suspect,
    /// It answered no probe either: it is asked after all others until it answers.
    Out,
}

impl UpstreamState {
    /// Its name in status and metrics.
    pub fn word(self) -> &'static str {
        match self {
            UpstreamState::Up => "up",
            UpstreamState::Suspect => "suspect",
            UpstreamState::Out => "out",
        }
    }
}

/// The outcome of a query to an upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum QueryOutcome {
    /// A usable response.
    Answered,
    /// It can't or won't answer: SERVFAIL, REFUSED or the like, or a referral.
    Refused,
    /// No answer came in time.
    TimedOut,
    /// It couldn't be reached, as the kernel or an ICMP message reported.
    Unreachable,
}

/// The words for [`QueryOutcome`] in metrics, in its order.
const OUTCOMES: [&str; 4] = ["answered", "refused", "timeout", "unreachable"];

/// An upstream resolver, shared by all who ask it.
#[derive(Debug)]
pub(super) struct Upstream {
    /// Where it is asked.
    pub(super) address: SocketAddr,
    /// The instant that times are counted from.
    created: Instant,
    udp: TransportHealth,
    tcp: TransportHealth,
    shards: [CounterShard; N_SHARDS],
}

/// By transport, as there are resolvers without TCP.
#[derive(Debug, Default)]
struct TransportHealth {
    state: AtomicU8,
    /// The last answer, in microseconds since `created`, plus one; 0 before the first.
    answered_us: AtomicU64,
}

/// The counters of one thread.
#[derive(Debug, Default)]
#[repr(align(128))] // two cache lines: the prefetcher takes pairs
struct CounterShard {
    sent: AtomicU64,
    /// Of those, what is no longer waited for.
    done: AtomicU64,
    outcomes: [AtomicU64; OUTCOMES.len()],
    /// Of the answers, by the time they took; the last one is beyond all bounds.
    buckets: [AtomicU64; BUCKETS_US.len() + 1],
    sum_us: AtomicU64,
}

/// What status and metrics show of an upstream.
#[derive(Clone, Debug, PartialEq)]
pub struct UpstreamStats {
    /// Where it is asked.
    pub address: SocketAddr,
    /// Whether it answers over UDP.
    pub state: UpstreamState,
    /// Whether it answers over TCP.
    pub tcp_state: UpstreamState,
    /// Queries that were sent.
    pub sent: u64,
    /// Those of them whose answers are still waited for.
    pub in_flight: u64,
    /// Queries by result: `answered`, `refused`, `timeout`, `unreachable`.
    pub results: [(&'static str, u64); 4],
    /// The answers by the time that they took: each bucket's own number, by [`BUCKETS_US`].
    pub buckets: [u64; BUCKETS_US.len() + 1],
    /// The time that all answers took, in seconds.
    pub seconds: f64,
}

impl Upstream {
    /// A new upstream, which is up.
    pub(super) fn new(address: SocketAddr, now: Instant) -> Upstream {
        let (udp, tcp, shards) = Default::default();
        Upstream { address, created: now, udp, tcp, shards }
    }

    /// Whether its AD bit is relayed: only from this host, as on the way from another the bit may
    /// have been changed (RFC 6840, section 5.8).
    pub(super) fn keeps_ad(&self) -> bool {
        self.address.ip().to_canonical().is_loopback()
    }

    /// Whether it answers.
    pub(super) fn state(&self, transport: Transport) -> UpstreamState {
        match self.health(transport).state.load(Ordering::Relaxed) {
            0 => UpstreamState::Up,
            1 => UpstreamState::Suspect,
            _ => UpstreamState::Out,
        }
    }

    /// Counts a query that is sent.
    pub(super) fn sent(&self, shard: usize) {
        self.shard(shard).sent.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a query that was sent and isn't waited for any more, whatever became of it.
    pub(super) fn done(&self, shard: usize) {
        self.shard(shard).done.fetch_add(1, Ordering::Relaxed);
    }

    /// Notes an answer at `now`, to whatever question, after `took`.
    pub(super) fn answered(
        &self,
        transport: Transport,
        shard: usize,
        outcome: QueryOutcome,
        now: Instant,
        took: Duration,
    ) {
        let shard = self.shard(shard);
        shard.outcomes[outcome as usize].fetch_add(1, Ordering::Relaxed);
        let took_us = took.as_micros() as u64;
        let bucket = BUCKETS_US.iter().position(|end| took_us <= *end).unwrap_or(BUCKETS_US.len());
        shard.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        shard.sum_us.fetch_add(took_us, Ordering::Relaxed);
        self.is_alive(transport, now);
    }

    /// Notes a sign of life at `now`, such as the answer to a probe.
    pub(super) fn is_alive(&self, transport: Transport, now: Instant) {
        let health = self.health(transport);
        // A millisecond more or less makes no difference; a write for each answer would.
        let now_us = self.us(now);
        if now_us.saturating_sub(health.answered_us.load(Ordering::Relaxed)) > 1000
            || self.state(transport) != UpstreamState::Up
        {
            health.answered_us.store(now_us, Ordering::Relaxed);
            if health.state.swap(UpstreamState::Up as u8, Ordering::Relaxed)
                == UpstreamState::Out as u8
            {
                tracing::info!("the resolver {} ({transport}) answers again", self.address);
            }
        }
    }

    /// Counts a query that got no answer.
    pub(super) fn failed(&self, shard: usize, outcome: QueryOutcome) {
        self.shard(shard).outcomes[outcome as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Notes that the query sent at `sent_at` has no response after what usually takes one. Returns
    /// whether the resolver becomes a suspect by that, which a probe decides about.
    pub(super) fn is_late(&self, transport: Transport, sent_at: Instant) -> bool {
        let health = self.health(transport);
        // It has answered another query since: this name is slow.
        if health.answered_us.load(Ordering::Relaxed) >= self.us(sent_at) {
            return false;
        }
        let (up, suspect) = (UpstreamState::Up as u8, UpstreamState::Suspect as u8);
        health.state.compare_exchange(up, suspect, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// Notes that the probe sent at `sent_at` got no response in time. Returns whether the resolver
    /// is out by that.
    pub(super) fn is_unproven(&self, transport: Transport, sent_at: Instant) -> bool {
        let health = self.health(transport);
        if health.answered_us.load(Ordering::Relaxed) >= self.us(sent_at) {
            return false;
        }
        let (suspect, out) = (UpstreamState::Suspect as u8, UpstreamState::Out as u8);
        let order = Ordering::Relaxed;
        let is_new = health.state.compare_exchange(suspect, out, order, order).is_ok();
        if is_new {
            tracing::warn!(
                "the resolver {} ({transport}) doesn't answer: it is queried last until it does",
                self.address
            );
        }
        is_new
    }

    /// Its state and counters.
    pub(super) fn read(&self) -> UpstreamStats {
        let sum = |counter: &dyn Fn(&CounterShard) -> &AtomicU64| {
            self.shards.iter().map(|shard| counter(shard).load(Ordering::Relaxed)).sum::<u64>()
        };
        // First, so that what is sent meanwhile can't be done before it was sent.
        let done = sum(&|shard| &shard.done);
        let sent = sum(&|shard| &shard.sent);
        UpstreamStats {
            address: self.address,
            state: self.state(Transport::Udp),
            tcp_state: self.state(Transport::Tcp),
            sent,
            in_flight: sent.saturating_sub(done),
            results: std::array::from_fn(|idx| (OUTCOMES[idx], sum(&|shard| &shard.outcomes[idx]))),
            buckets: std::array::from_fn(|idx| sum(&|shard| &shard.buckets[idx])),
            seconds: sum(&|shard| &shard.sum_us) as f64 / 1e6,
        }
    }

    fn health(&self, transport: Transport) -> &TransportHealth {
        match transport {
            Transport::Udp => &self.udp,
            Transport::Tcp => &self.tcp,
        }
    }

    fn shard(&self, idx: usize) -> &CounterShard {
        &self.shards[idx % N_SHARDS]
    }

    /// Never 0, which means never.
    fn us(&self, at: Instant) -> u64 {
        at.saturating_duration_since(self.created).as_micros() as u64 + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn out_by_silence_and_back_by_an_answer_alone() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let took = Duration::from_millis(1);
        let upstream = Upstream::new(SocketAddr::from(([192, 0, 2, 1], 53)), start);
        let state = || upstream.state(Transport::Udp);
        let answers =
            |ms| upstream.answered(Transport::Udp, 0, QueryOutcome::Answered, at(ms), took);
        let is_late = |ms| upstream.is_late(Transport::Udp, at(ms));
        let is_unproven = |ms| upstream.is_unproven(Transport::Udp, at(ms));

        // Slow names: something else was answered meanwhile, or the probe is.
        answers(10);
        assert!(!is_late(5) && state() == UpstreamState::Up);
        assert!(is_late(20) && state() == UpstreamState::Suspect);
        assert!(!is_late(21), "it is a suspect already");
        upstream.is_alive(Transport::Udp, at(430));
        assert!(!is_unproven(420) && state() == UpstreamState::Up);

        // Dead: no time that passes brings it back.
        assert!(is_late(500) && is_unproven(900) && state() == UpstreamState::Out);
        assert!(!is_late(1000) && !is_unproven(100_000_000) && state() == UpstreamState::Out);
        assert_eq!(upstream.state(Transport::Tcp), UpstreamState::Up);
        answers(100_000_001);
        assert_eq!(state(), UpstreamState::Up);

        let reading = upstream.read();
        assert_eq!(reading.results[0], ("answered", 2));
        assert_eq!((reading.buckets[2], reading.seconds), (2, 0.002));
    }

    #[test]
    fn ad_of_another_hosts_resolver_is_not_relayed() {
        let rows = [
            ("127.0.0.53:53", true),
            ("[::1]:53", true),
            ("[::ffff:127.0.0.1]:53", true),
            ("192.0.2.1:53", false),
            ("[2001:db8::1]:53", false),
        ];
        for (address, expected) in rows {
            let upstream = Upstream::new(address.parse().unwrap(), Instant::now());
            assert_eq!(upstream.keeps_ad(), expected, "{address}");
        }
    }

    #[test]
    fn a_verdict_needs_a_suspect() {
        let start = Instant::now();
        let upstream = Upstream::new(SocketAddr::from(([192, 0, 2, 1], 53)), start);
        // A lost loop probe demotes no upstream.
        assert!(!upstream.is_unproven(Transport::Udp, start + Duration::from_secs(1)));
        assert_eq!(upstream.state(Transport::Udp), UpstreamState::Up);
    }
}

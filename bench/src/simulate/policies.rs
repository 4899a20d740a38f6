//! By what a client chooses a backend: nohop by the code that runs in the kernel, others as they
//! document it.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::Duration;

use lb_common::{
    Algorithm, Backend, BackendWords, BalanceSettings, Candidates, ChoiceReason, Ejection,
    EjectionLimits, EjectionWord, PackedChoice, Sample, Scan, Sign, Slot, SlotRange, SlowStart,
    State, Walk, alias_table, choose, choose_in_order, key_hash, maglev_table, peak_average_us,
    sample, state_at,
};

/// A policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// nohop's, with or without ejection and the ramp of new backends.
    Nohop {
        /// The algorithm.
        algorithm: Algorithm,
        /// Whether backends are ejected, and ramp up.
        is_guarded: bool,
    },
    /// Envoy's `ROUND_ROBIN`: in turn, from a random host on.
    EnvoyRoundRobin,
    /// Envoy's `LEAST_REQUEST` for hosts of equal weight: of two random ones, the one with fewer active
    /// requests. HAProxy's `random(2)` is the same.
    EnvoyLeastRequest,
    /// Envoy's `RING_HASH` by source, with 1,024 points at least.
    EnvoyRingHash,
    /// HAProxy's `leastconn`: the one with the fewest connections, those of as many in turn; an HAProxy on
    /// each node.
    HaproxyLeastconn,
    /// The same with one HAProxy for all clients, which knows all connections.
    HaproxyLeastconnForAll,
}

impl Policy {
    /// All that are compared.
    pub fn all() -> Vec<Policy> {
        let nohop = |algorithm| Policy::Nohop { algorithm, is_guarded: true };
        let bare = Policy::Nohop { algorithm: Algorithm::Least, is_guarded: false };
        let others = [
            Policy::EnvoyRoundRobin,
            Policy::EnvoyLeastRequest,
            Policy::EnvoyRingHash,
            Policy::HaproxyLeastconn,
            Policy::HaproxyLeastconnForAll,
        ];
        Algorithm::ALL.map(nohop).into_iter().chain([bare]).chain(others).collect()
    }

    /// Its name in tables.
    pub fn name(self) -> String {
        match self {
            Policy::Nohop { algorithm, is_guarded: true } => format!("nohop {}", algorithm.name()),
            Policy::Nohop { algorithm, .. } => format!("nohop {}, no ejection", algorithm.name()),
            Policy::EnvoyRoundRobin => "Envoy round robin".to_owned(),
            Policy::EnvoyLeastRequest => "Envoy least request".to_owned(),
            Policy::EnvoyRingHash => "Envoy ring hash".to_owned(),
            Policy::HaproxyLeastconn => "HAProxy leastconn".to_owned(),
            Policy::HaproxyLeastconnForAll => "HAProxy leastconn, one for all".to_owned(),
        }
    }

    /// Whether all clients share one balancer.
    fn is_shared(self) -> bool {
        self == Policy::HaproxyLeastconnForAll
    }
}

/// What a node knows of a backend.
#[derive(Clone, Copy, Debug, Default)]
struct Known {
    in_flight: i32,
    pending: i32,
    unanswered_since_us: u32,
    connect_us: u32,
    srtt_us: u32,
    ejection: Ejection,
    added_ns: u64,
}

impl BackendWords for Known {
    fn backend(self) -> Backend {
        Backend::default()
    }

    fn in_flight(self) -> i32 {
        self.in_flight
    }

    fn pending(self) -> i32 {
        self.pending
    }

    fn unanswered_since_us(self) -> u32 {
        self.unanswered_since_us
    }

    fn connect_us(self) -> u32 {
        self.connect_us
    }

    fn srtt_us(self) -> u32 {
        self.srtt_us
    }

    fn weight(self) -> u16 {
        1
    }

    fn added_ms(self) -> u32 {
        (self.added_ns / 1_000_000) as u32
    }

    fn ejection(self) -> EjectionWord {
        EjectionWord::of(self.ejection)
    }
}

/// What becomes of a connection, in the order in which it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is established, after so many nanoseconds.
    Established(u64),
    /// It ended in order.
    Closed,
    /// It was refused.
    Refused,
    /// The client gave up before it was established.
    GaveUp,
    /// It was established, and reset.
    Reset,
}

/// The balancers of all nodes: one on each, or one for all.
pub struct Balancers {
    policy: Policy,
    algorithm: Algorithm,
    settings: BalanceSettings,
    /// What each balancer knows of each backend.
    known: Vec<Vec<Known>>,
    /// How many connections each balancer made; where it is in turn.
    n_before: Vec<u64>,
    /// The slots, as in the kernel, with Maglev's table behind them.
    slots: Vec<Slot>,
    members: Vec<u32>,
    ring: BTreeMap<u32, u32>,
    random: RefCell<fastrand::Rng>,
}

impl Balancers {
    /// The balancers of so many nodes.
    pub fn new(policy: Policy, n_nodes: usize, n_backends: usize, seed: u64) -> Balancers {
        let (algorithm, is_guarded) = match policy {
            Policy::Nohop { algorithm, is_guarded } => (algorithm, is_guarded),
            _ => (Algorithm::Random, false),
        };
        let never = EjectionLimits { refused: 0, failures: 0, silence: 0, ..Default::default() };
        let slow_start = match is_guarded {
            true => SlowStart::of(Duration::from_secs(10).as_nanos() as u64),
            false => SlowStart::default(),
        };
        let limits = if is_guarded { EjectionLimits::default() } else { never };
        let n_balancers = if policy.is_shared() { 1 } else { n_nodes };
        let mut random = fastrand::Rng::with_seed(seed);
        Balancers {
            policy,
            algorithm,
            settings: BalanceSettings {
                refused: limits.refused,
                failures: limits.failures,
                silence: limits.silence,
                share: limits.share,
                base_ms: (limits.base_ns / 1_000_000) as u32,
                max_ms: (limits.max_ns / 1_000_000) as u32,
                slow_start_per_tick: slow_start.per_tick,
                ..BalanceSettings::default()
            },
            known: vec![vec![Known::default(); n_backends]; n_balancers],
            // They don't all begin with the same backend.
            n_before: (0..n_balancers).map(|_| random.u64(..n_backends as u64)).collect(),
            slots: Vec::new(),
            members: Vec::new(),
            ring: BTreeMap::new(),
            random: RefCell::new(random),
        }
    }

    /// The service has these backends from now on.
    pub fn set_members(&mut self, members: &[u32], now_ns: u64) {
        for added in members.iter().filter(|member| !self.members.contains(member)) {
            // The first ones don't ramp up.
            let added_ns = if self.members.is_empty() { 0 } else { now_ns };
            self.known.iter_mut().for_each(|known| known[*added as usize].added_ns = added_ns);
        }
        self.members = members.to_vec();
        let weights: Vec<_> = members.iter().map(|&member| (member, 1)).collect();
        self.slots = alias_table(&weights);
        if self.algorithm == Algorithm::Maglev {
            let keyed: Vec<_> = members.iter().map(|&member| (u64::from(member), 1)).collect();
            self.slots.extend(maglev_table(&keyed).into_iter().map(slot_of));
        }
        if self.policy == Policy::EnvoyRingHash {
            let points = 1_024u32.div_ceil(members.len() as u32);
            let on_ring = members.iter().flat_map(|&member| {
                (0..points)
                    .map(move |n| (key_hash(u64::from(member) << 32 | u64::from(n), 7), member))
            });
            self.ring = on_ring.collect();
        }
    }

    /// The backend for a connection from a node, by a key; and that it is under way.
    pub fn connect(&mut self, node: usize, key: u64, now_ns: u64) -> u32 {
        let node = self.balancer(node);
        let backend = match self.policy {
            Policy::Nohop { .. } => self.by_nohop(node, key, now_ns),
            Policy::EnvoyRoundRobin => {
                self.members[(self.n_before[node] % self.members.len() as u64) as usize]
            }
            Policy::EnvoyLeastRequest => {
                let (first, second) = (self.any(), self.any());
                let active = |backend: u32| self.known[node][backend as usize].in_flight;
                if active(second) < active(first) { second } else { first }
            }
            Policy::EnvoyRingHash => {
                let hash = key_hash(key, 0);
                let next = self.ring.range(hash..).next().or_else(|| self.ring.iter().next());
                *next.expect("the service has backends").1
            }
            Policy::HaproxyLeastconn | Policy::HaproxyLeastconnForAll => {
                // Those of as many connections come in turn.
                let turn = (self.n_before[node] % self.members.len() as u64) as usize;
                let in_turn = self.members[turn..].iter().chain(&self.members[..turn]);
                let known = &self.known[node];
                let least = in_turn.min_by_key(|&&backend| known[backend as usize].in_flight);
                *least.expect("the service has backends")
            }
        };
        self.n_before[node] += 1;
        let known = &mut self.known[node][backend as usize];
        if known.pending == 0 {
            known.unanswered_since_us = now_us(now_ns);
        }
        known.in_flight += 1;
        known.pending += 1;
        backend
    }

    /// What became of a connection.
    pub fn report(&mut self, node: usize, backend: u32, outcome: Outcome, now_ns: u64) {
        let (node, limits) = (self.balancer(node), self.settings.limits());
        let known = &mut self.known[node][backend as usize];
        let sign = match outcome {
            Outcome::Established(took_ns) => {
                known.connect_us = peak_average_us(known.connect_us, (took_ns / 1_000) as u32);
                Some(Sign::Answered)
            }
            Outcome::Closed => {
                known.srtt_us = peak_average_us(known.srtt_us, known.connect_us);
                Some(Sign::Closed)
            }
            Outcome::Refused => Some(Sign::Refused),
            Outcome::GaveUp => None,
            Outcome::Reset => Some(Sign::Reset),
        };
        if !matches!(outcome, Outcome::Closed | Outcome::Reset) {
            known.pending -= 1;
            let is_answer = outcome != Outcome::GaveUp;
            if known.pending == 0 {
                known.unanswered_since_us = 0;
            } else if is_answer {
                known.unanswered_since_us = now_us(now_ns);
            }
        }
        if !matches!(outcome, Outcome::Established(_)) {
            known.in_flight -= 1;
        }
        debug_assert!(
            (0..=known.in_flight).contains(&known.pending),
            "{outcome:?} was reported out of order: {known:?}"
        );
        if let Some(sign) = sign {
            known.ejection = known.ejection.after(sign, now_ns, &limits);
        }
    }

    /// Whether no connection is open.
    pub fn are_idle(&self) -> bool {
        let mut all = self.known.iter().flatten();
        all.all(|known| known.in_flight == 0 && known.pending == 0)
    }

    fn balancer(&self, node: usize) -> usize {
        if self.policy.is_shared() { 0 } else { node }
    }

    fn any(&self) -> u32 {
        self.members[self.random.borrow_mut().usize(..self.members.len())]
    }

    fn by_nohop(&mut self, node: usize, key: u64, now_ns: u64) -> u32 {
        let view = View {
            balancers: self,
            known: &self.known[node],
            n_before: self.n_before[node],
            key,
            now_ns,
        };
        let choice = choose(&view, 0, view.range(0)).expect("the service has backends");
        let limits = self.settings.limits();
        if let Some(silent) = self.known[node].get_mut(choice.silent as usize) {
            silent.ejection = silent.ejection.after(Sign::Silence, now_ns, &limits);
        }
        if choice.reason == ChoiceReason::TRIAL {
            let trial = &mut self.known[node][choice.backend_idx as usize];
            let claimed = trial.ejection.claim_trial(now_ns, &limits);
            trial.ejection = claimed.begin_trial(now_ns, &limits);
        }
        choice.backend_idx
    }
}

/// A word of Maglev's table, as it lies in a slot.
fn slot_of(word: u64) -> Slot {
    Slot { backend: word as u32, alias: (word >> 32) as u16, threshold: (word >> 48) as u16 }
}

fn now_us(now_ns: u64) -> u32 {
    (now_ns / 1_000) as u32
}

/// What the kernel sees of a service, and of a connection.
struct View<'a> {
    balancers: &'a Balancers,
    known: &'a [Known],
    n_before: u64,
    key: u64,
    now_ns: u64,
}

impl Candidates for View<'_> {
    type Words = Known;

    fn range(&self, group: usize) -> SlotRange {
        let n_slots = if group == 0 { self.balancers.members.len() as u32 } else { 0 };
        SlotRange { first_slot: 0, n_slots }
    }

    fn slot(&self, slot: u32) -> Option<Slot> {
        self.balancers.slots.get(slot as usize).copied()
    }

    fn words(&self, backend_idx: u32) -> Option<Known> {
        self.known.get(backend_idx as usize).copied()
    }

    fn algorithm(&self) -> Algorithm {
        self.balancers.algorithm
    }

    fn settings(&self) -> BalanceSettings {
        self.balancers.settings
    }

    fn n_before(&self) -> u64 {
        self.n_before
    }

    fn key(&self) -> u64 {
        self.key
    }

    fn is_tcp(&self) -> bool {
        true
    }

    fn now_ns(&self) -> u64 {
        self.now_ns
    }

    fn random(&self) -> u32 {
        self.balancers.random.borrow_mut().u32(..)
    }

    fn state_at(&self, backend_idx: u32, now_ns: u64, ramps: bool) -> State {
        let state = |words| state_at(words, &self.balancers.settings, now_ns, ramps);
        self.words(backend_idx).map_or(State::NONE, state)
    }

    fn sample(&self, scan: Scan) -> Sample {
        sample(scan, |slot| self.slot(slot), |idx| self.state_at(idx, scan.now_ns, scan.ramps))
    }

    fn choose_in_order(&self, walk: Walk) -> PackedChoice {
        choose_in_order(self, walk)
    }
}

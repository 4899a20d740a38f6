//! Which services are live, and whose turn it is on the few connections.
//!
//! Pure: time and chance come as arguments. What is asked is told by [`Schedule::next`], what came of
//! it is told to the other methods; the connections themselves are the caller's.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::index::ReadMode;
use super::poller::Poller;
use crate::config::WatchPolicy;

/// How long after its last use a service stays live.
pub const LINGER: Duration = Duration::from_secs(30 * 60);

/// The connections that services don't share: one for the list of names, one for the switch
/// `nohop/off`, and one that is kept free for what can't wait.
const N_RESERVED: usize = 3;

/// The lookups of names out of the list that may wait; more are turned away.
const MAX_LOOKUPS: usize = 32;

/// The names that may be in use; many times what a node uses.
const MAX_USED: usize = 65_536;

/// By which rules.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Which services are followed.
    pub policy: WatchPolicy,
    /// The most connections at any time; at least 4.
    pub max_connections: usize,
    /// How long Consul may hold a question, once the run has lasted as long.
    pub wait: Duration,
    /// The same at the start of a run.
    pub first_wait: Duration,
    /// The same, of a question whose last answer wasn't trusted.
    pub withheld_wait: Duration,
    /// The same, while there are more live services than connections.
    pub turn: Duration,
}

/// What to ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Job {
    /// The agent's own name.
    Agent,
    /// The instances of a live service. The number tells one stint of being live from the next.
    Service(Arc<str>, u64),
    /// Whether there is a service of this name, which isn't in the list.
    Lookup(Arc<str>),
}

/// A question to be asked now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    /// What it is about.
    pub job: Job,
    /// How.
    pub ask: ReadMode,
    /// How long Consul may hold it.
    pub wait: Duration,
    /// Whether it may be held, rather than being answered at once.
    pub is_held: bool,
}

/// What became of the services that are followed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Shift {
    /// Live from now on.
    pub started: Vec<Arc<str>>,
    /// Cold from now on.
    pub ended: Vec<Arc<str>>,
}

/// The schedule.
#[derive(Debug)]
pub struct Schedule {
    rules: Rules,
    started: Instant,
    names: BTreeSet<Arc<str>>,
    /// The last use of names that were used within [`LINGER`].
    used: BTreeMap<Arc<str>, Instant>,
    live: BTreeMap<Arc<str>, Live>,
    /// Whether all are live, used or not.
    has_all: bool,
    n_stints: u64,
    agent_due: Option<Instant>,
    lookups: VecDeque<Arc<str>>,
    /// The questions under way that may be held.
    n_held: usize,
    /// The others.
    n_brief: usize,
}

#[derive(Clone, Copy, Debug)]
struct Live {
    poller: Poller,
    stint: u64,
    since: Instant,
}

impl Schedule {
    /// A schedule without names.
    pub fn new(rules: Rules, now: Instant) -> Self {
        Schedule {
            rules,
            started: now,
            names: BTreeSet::new(),
            used: BTreeMap::new(),
            live: BTreeMap::new(),
            has_all: false,
            n_stints: 0,
            agent_due: Some(now),
            lookups: VecDeque::new(),
            n_held: 0,
            n_brief: 0,
        }
    }

    /// Takes the names that there are.
    pub fn set_names(&mut self, names: BTreeSet<Arc<str>>) {
        self.names = names;
    }

    /// Notes that a service was used at that moment. Whether there is such a name shows later, so
    /// there is an end to it.
    pub fn used(&mut self, name: Arc<str>, at: Instant) {
        if self.used.len() >= MAX_USED && !self.used.contains_key(&name) {
            return;
        }
        let last = self.used.entry(name).or_insert(at);
        *last = at.max(*last);
    }

    /// When the name was last used, if that counts yet.
    pub fn used_at(&self, name: &str) -> Option<Instant> {
        self.used.get(name).copied()
    }

    /// Decides which services are live.
    pub fn shift(&mut self, now: Instant) -> Shift {
        self.used.retain(|name, at| {
            now.saturating_duration_since(*at) < LINGER && self.names.contains(name)
        });
        let all = match self.rules.policy {
            WatchPolicy::All => true,
            WatchPolicy::Auto => self.names.len() <= self.rules.max_connections / 2,
            WatchPolicy::Used => false,
        };
        if std::mem::replace(&mut self.has_all, all) && !all {
            // They end as if they had been used until now, so that a number that goes up and down
            // around the limit takes no service to and fro.
            for name in self.live.keys().filter(|name| self.names.contains(*name)) {
                self.used.entry(name.clone()).or_insert(now);
            }
        }
        let mut shift = Shift::default();
        let (names, used) = (&self.names, &self.used);
        self.live.retain(|name, _| {
            let stays = if all { names.contains(name) } else { used.contains_key(name) };
            if !stays {
                shift.ended.push(name.clone());
            }
            stays
        });
        let wanted: Box<dyn Iterator<Item = &Arc<str>>> =
            if all { Box::new(names.iter()) } else { Box::new(used.keys()) };
        for name in wanted.filter(|name| !self.live.contains_key(*name)) {
            shift.started.push(name.clone());
        }
        for name in &shift.started {
            self.n_stints += 1;
            let live = Live { poller: Poller::new(now), stint: self.n_stints, since: now };
            self.live.insert(name.clone(), live);
        }
        shift
    }

    /// Has the agent asked for its name at that moment.
    pub fn ask_agent(&mut self, at: Instant) {
        self.agent_due = Some(self.agent_due.map_or(at, |due| due.min(at)));
    }

    /// Has a name looked up that isn't in the list. Returns whether there is room for it.
    pub fn look_up(&mut self, name: Arc<str>) -> bool {
        let has_room = self.lookups.len() < MAX_LOOKUPS;
        if has_room {
            self.lookups.push_back(name);
        }
        has_room
    }

    /// The services that are live.
    pub fn n_live(&self) -> usize {
        self.live.len()
    }

    /// The names.
    pub fn names(&self) -> &BTreeSet<Arc<str>> {
        &self.names
    }

    /// How long Consul may hold a question that is asked now, watches that take turns aside: no longer
    /// than the run has lasted, or a second. An agent keeps the connection of a question whose asker
    /// has gone until the wait is over (consul's issue 8524), out of 200 for each client address; so
    /// runs that end soon, of a daemon that crashes again and again or is reloaded, leave hardly more
    /// questions behind than one of them asks.
    pub fn wait(&self, now: Instant) -> Duration {
        let lasted = now.saturating_duration_since(self.started);
        lasted.max(self.rules.first_wait).min(self.rules.wait)
    }

    /// The same, of the question that a poller is about to ask.
    pub fn wait_of(&self, poller: &Poller, now: Instant) -> Duration {
        match poller.is_withheld() {
            true => self.wait(now).min(self.rules.withheld_wait),
            false => self.wait(now),
        }
    }

    /// Has all live services asked about again, since Consul may answer another token otherwise.
    pub fn restart(&mut self, now: Instant) {
        for live in self.live.values_mut() {
            live.poller.restart(now);
        }
        self.ask_agent(now);
    }

    /// The connections that live services share.
    pub fn n_shared(&self) -> usize {
        self.rules.max_connections.saturating_sub(N_RESERVED).max(1)
    }

    /// Whether there are more live services than connections for them, so that they take turns.
    pub fn is_short(&self) -> bool {
        self.live.len() > self.n_shared()
    }

    /// The next question to ask now, if there is one and a connection for it: first what can't wait,
    /// then the live service that was answered longest ago.
    pub fn next(&mut self, now: Instant) -> Option<Turn> {
        let n_shared = self.n_shared();
        if self.n_held + self.n_brief > n_shared {
            return None;
        }
        if self.agent_due.is_some_and(|due| due <= now) {
            self.agent_due = None;
            return Some(self.brief(Job::Agent, ReadMode::Plain));
        }
        let has_shared = self.n_held < n_shared;
        let withheld_wait = self.rules.withheld_wait;
        let wait = match self.is_short() {
            true => self.wait(now).min(self.rules.turn),
            false => self.wait(now),
        };
        let due = self.live.iter_mut().filter(|(_, live)| {
            let is_due = live.poller.due().is_some_and(|due| due <= now);
            is_due && (has_shared || !is_held(live.poller.ask()))
        });
        let first =
            due.min_by_key(|(_, live)| (is_held(live.poller.ask()), live.poller.answered_at()));
        let is_urgent = |live: &Live| !is_held(live.poller.ask());
        match first {
            Some((name, live)) if self.lookups.is_empty() || is_urgent(live) => {
                let (job, ask) = (Job::Service(name.clone(), live.stint), live.poller.ask());
                let wait = match is_held(ask) {
                    false => Duration::ZERO,
                    true if live.poller.is_withheld() => wait.min(withheld_wait),
                    true => wait,
                };
                live.poller.begin(now, wait);
                Some(match is_held(ask) {
                    false => self.brief(job, ask),
                    true => self.held(job, ask, wait),
                })
            }
            _ => {
                let name = self.lookups.pop_front()?;
                Some(self.brief(Job::Lookup(name), ReadMode::Plain))
            }
        }
    }

    fn brief(&mut self, job: Job, ask: ReadMode) -> Turn {
        self.n_brief += 1;
        Turn { job, ask, wait: Duration::ZERO, is_held: false }
    }

    fn held(&mut self, job: Job, ask: ReadMode, wait: Duration) -> Turn {
        self.n_held += 1;
        Turn { job, ask, wait, is_held: true }
    }

    /// When the next question may be due, should nothing end until then.
    pub fn next_due(&self) -> Option<Instant> {
        if self.n_held + self.n_brief > self.n_shared() {
            return None;
        }
        let has_shared = self.n_held < self.n_shared();
        let due = self
            .live
            .values()
            .filter(|live| has_shared || !is_held(live.poller.ask()))
            .filter_map(|live| live.poller.due());
        due.chain(self.agent_due).min()
    }

    /// Notes that a question has ended, answered or not, so that its connection is free.
    pub fn ended(&mut self, is_held: bool) {
        let n = if is_held { &mut self.n_held } else { &mut self.n_brief };
        *n = n.saturating_sub(1);
    }

    /// The watch of a service that a job was about, if it is of this stint.
    pub fn poller(&mut self, name: &str, stint: u64) -> Option<&mut Poller> {
        self.live.get_mut(name).filter(|live| live.stint == stint).map(|live| &mut live.poller)
    }

    /// How long ago the live service was answered that waits longest; `None` where there is none.
    /// One that never was counts from when it went live.
    pub fn oldest_age(&self, now: Instant) -> Option<Duration> {
        let answered = self.live.values();
        let answered = answered.map(|live| live.poller.answered_at().unwrap_or(live.since));
        answered.min().map(|at| now.saturating_duration_since(at))
    }
}

fn is_held(ask: ReadMode) -> bool {
    matches!(ask, ReadMode::Blocking(_))
}

/// Whether so many that serve, of so many before, are a loss too large to be believed unconfirmed.
///
/// Consul may answer with little or nothing during an election (consul-template's issue 1131).
pub fn is_shrink(n_before: usize, n_after: usize) -> bool {
    n_after.saturating_mul(2) < n_before
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn schedule(policy: WatchPolicy, max_connections: usize, now: Instant) -> Schedule {
        let rules = Rules {
            policy,
            max_connections,
            wait: 60 * S,
            first_wait: 60 * S,
            withheld_wait: 10 * S,
            turn: 2 * S,
        };
        let mut schedule = Schedule::new(rules, now);
        // The agent has been asked.
        assert_eq!(schedule.next(now).unwrap().job, Job::Agent);
        schedule.ended(false);
        schedule
    }

    fn names(n: usize) -> BTreeSet<Arc<str>> {
        (0..n).map(|n| format!("s{n:04}").into()).collect()
    }

    #[test]
    fn what_is_live_follows_policy_number_and_use() {
        use WatchPolicy::*;
        let start = Instant::now();
        // (policy, names, the seconds ago at which s0000 was used, how many are live)
        let table = [
            (All, 100, None, 100),
            (Auto, 5, None, 5),
            (Auto, 6, None, 0),
            (Auto, 6, Some(0), 1),
            (Auto, 6, Some(1799), 1),
            (Auto, 6, Some(1800), 0),
            (Used, 1, None, 0),
            (Used, 1, Some(0), 1),
        ];
        for (policy, n_names, used_ago, n_live) in table {
            let now = start + 3600 * S;
            let mut schedule = schedule(policy, 10, start);
            schedule.set_names(names(n_names));
            if let Some(ago) = used_ago {
                schedule.used("s0000".into(), now - ago * S);
            }
            schedule.shift(now);
            assert_eq!(schedule.n_live(), n_live, "{policy:?} {n_names} {used_ago:?}");
        }
    }

    #[test]
    fn too_many_names_for_all_take_nothing_away_at_once() {
        let start = Instant::now();
        let mut schedule = schedule(WatchPolicy::Auto, 10, start);
        schedule.set_names(names(5));
        assert_eq!(schedule.shift(start).started.len(), 5);
        for n_names in [6, 5] {
            schedule.set_names(names(n_names));
            assert_eq!(schedule.shift(start), Shift::default(), "{n_names} names");
        }
        schedule.set_names(names(8));
        schedule.shift(start);
        assert_eq!(schedule.n_live(), 5);
        schedule.shift(start + LINGER);
        assert_eq!(schedule.n_live(), 0);
    }

    #[test]
    fn a_name_that_goes_is_live_no_more() {
        let now = Instant::now();
        let mut schedule = schedule(WatchPolicy::All, 10, now);
        schedule.set_names(names(2));
        assert_eq!(schedule.shift(now).started.len(), 2);
        schedule.set_names(names(1));
        assert_eq!(schedule.shift(now), Shift { started: vec![], ended: vec!["s0001".into()] });
    }

    #[test]
    fn a_cold_service_finds_a_connection_where_all_others_are_held() {
        let now = Instant::now();
        let mut schedule = schedule(WatchPolicy::Used, 5, now);
        schedule.set_names(names(5));
        for name in ["s0000", "s0001"] {
            schedule.used(name.into(), now);
            schedule.shift(now);
            let turn = schedule.next(now).unwrap();
            let Job::Service(name, stint) = &turn.job else { panic!("{turn:?}") };
            assert_eq!(turn.ask, ReadMode::Plain);
            schedule.ended(turn.is_held);
            schedule.poller(name, *stint).unwrap().answered(Some(7), now, 0.0);
            let turn = schedule.next(now).unwrap();
            assert_eq!((turn.ask, turn.wait), (ReadMode::Blocking(7), 60 * S));
        }
        assert_eq!(schedule.next(now), None, "both connections are held");
        schedule.used("s0002".into(), now);
        schedule.shift(now);
        assert!(schedule.is_short());
        let turn = schedule.next(now).unwrap();
        assert_eq!((turn.ask, turn.is_held), (ReadMode::Plain, false));
        assert!(schedule.look_up("made-up".into()));
        assert_eq!(schedule.next(now), None, "the last connection is in use");
        schedule.ended(false);
        assert_eq!(schedule.next(now).unwrap().job, Job::Lookup("made-up".into()));
    }

    #[test]
    fn runs_that_end_soon_leave_hardly_more_questions_than_one_of_them_asks() {
        let start = Instant::now();
        let mut schedule = schedule(WatchPolicy::All, 64, start);
        (schedule.rules.wait, schedule.rules.first_wait) = (45 * S, S);
        for (lasted, wait) in [(0, 1), (1, 1), (2, 2), (44, 44), (45, 45), (1_000_000, 45)] {
            assert_eq!(schedule.wait(start + lasted * S), wait * S, "after {lasted} s");
        }
        // However long each run of a loop lasts, from one question a connection at its very end:
        // Consul adds up to 1/16.
        for lasted in 1..300 {
            let held = schedule.wait(start + lasted * S).mul_f64(17.0 / 16.0);
            let n_former = held.as_secs_f64() / f64::from(lasted);
            assert!(n_former < 2.0, "{n_former} former runs, each of {lasted} s");
        }
    }

    #[test]
    fn the_oldest_age_of_a_newcomer_is_that_of_its_stint() {
        let start = Instant::now();
        let mut schedule = schedule(WatchPolicy::All, 10, start);
        assert_eq!(schedule.oldest_age(start), None);
        schedule.set_names(names(1));
        schedule.shift(start + 3600 * S);
        assert_eq!(schedule.oldest_age(start + 3607 * S), Some(7 * S));
    }

    #[test]
    fn a_loss_is_doubted_from_more_than_half_on() {
        let table = [
            (0, 0, false),
            (0, 5, false),
            (1, 0, true),
            (1, 1, false),
            (2, 1, false),
            (3, 1, true),
            (4, 2, false),
            (100, 49, true),
        ];
        for (before, after, expected) in table {
            assert_eq!(is_shrink(before, after), expected, "{before} to {after}");
        }
    }

    proptest! {
        /// However answers and failures come, no more questions are under way than connections,
        /// and of services in want of turns each is answered once before any is answered twice.
        #[test]
        fn turns_are_fair_and_within_the_limit(
            n_names in 1..40usize,
            max_connections in 4..12usize,
            picks in prop::collection::vec((any::<prop::sample::Index>(), 0..4u8), 400),
        ) {
            let start = Instant::now();
            let mut now = start;
            let mut schedule = schedule(WatchPolicy::All, max_connections, now);
            schedule.set_names(names(n_names));
            schedule.shift(now);
            let mut under_way: Vec<Turn> = Vec::new();
            for (pick, what) in picks {
                while let Some(turn) = schedule.next(now) {
                    prop_assert!(!under_way.iter().any(|other| other.job == turn.job));
                    under_way.push(turn);
                }
                prop_assert!(under_way.len() + 2 <= max_connections);
                now += S;
                if under_way.is_empty() {
                    continue;
                }
                // The longest held ends first, unless something fails.
                let idx = if what == 0 { pick.index(under_way.len()) } else { 0 };
                let turn = under_way.remove(idx);
                schedule.ended(turn.is_held);
                let Job::Service(name, stint) = turn.job else { continue };
                let poller = schedule.poller(&name, stint).unwrap();
                match what {
                    0 => poller.failed(now, 1.0),
                    1 => poller.doubt_after_answer(now),
                    _ => drop(poller.answered(Some(7), now, 0.0)),
                }
            }
            // Turns come round: nobody waits for much longer than a round, and the pauses after
            // failures, take.
            let round = u32::try_from(n_names + 1).unwrap() * S;
            let ages = schedule.live.values().map(|live| match live.poller.answered_at() {
                Some(at) => now - at,
                None => now - start,
            });
            let oldest = ages.max().unwrap();
            prop_assert!(oldest <= 3 * round + 60 * S, "{:?} of {:?}", oldest, round);
        }
    }

    impl Poller {
        fn doubt_after_answer(&mut self, now: Instant) {
            self.answered(Some(7), now, 0.0);
            self.doubt(now, Duration::ZERO);
        }
    }
}

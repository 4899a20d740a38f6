//! Brings the questions, the schedule and the model together.

mod persist;
mod service_list;
mod switch;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tokio::task::{self, AbortHandle, JoinError, JoinSet};

use super::backoff::Backoff;
use super::client::Client;
use super::doubt::{Assessment, Evidence};
use super::index::{IndexCheck, ReadMode};
use super::model::{Model, Node, ServiceAnswer, Subject};
use super::negative_cache::NegativeCache;
use super::poller::Poller;
use super::query::{Answer, Query, QueryFailure, QueryOptions, Response, ask};
use super::schedule::{Job, Rules, Schedule, Turn};
use super::token::TokenWatch;
use super::{Settings, Timing};
use crate::catalog::cache::suspended;
use crate::catalog::host::Own;
use crate::catalog::snapshot::SavedCatalog;
use crate::catalog::usage::{Lookup, SourceCommand, UsageReceiver};
use crate::catalog::{Publisher, Watches};

/// How often a token that may not read the switch is tried again.
const DENIED_PAUSE: Duration = Duration::from_secs(60);

/// How often what has grown old is looked for.
const TIDY: Duration = Duration::from_secs(10);

/// How often one of the questions that Consul may hold for long gives way, once watches take turns:
/// all of them at once would be a burst for Consul.
const YIELDING: Duration = Duration::from_millis(250);

/// A question under way.
struct UnderWay {
    purpose: Purpose,
    is_held: bool,
}

/// A question that Consul may hold.
struct HeldQuestion {
    handle: AbortHandle,
    wait: Duration,
}

#[derive(Clone, Debug)]
enum Purpose {
    Names,
    Switch,
    Turn(Job),
}

type Asked = Result<Answer, QueryFailure>;

pub struct Supervisor {
    client: Arc<Client>,
    settings: Settings,
    output: Publisher,
    tasks: JoinSet<Asked>,
    under_way: HashMap<task::Id, UnderWay>,
    /// The questions about services that Consul may hold.
    held: BTreeMap<Arc<str>, HeldQuestion>,
    /// When the next of them may give way.
    yields_at: Instant,
    names: Poller,
    /// The questions about the names and the switch that are under way.
    of_all: [Option<AbortHandle>; 2],
    has_failed: bool,
    /// The bytes of the list of names when it was last read.
    names_bytes: usize,
    switch: Poller,
    is_off: bool,
    agent_backoff: Backoff,
    schedule: Schedule,
    model: Model,
    /// The names of the list; empty before it came.
    listed: BTreeSet<Arc<str>>,
    /// Names that were looked up and found, and that the list doesn't have yet.
    unlisted: BTreeSet<Arc<str>>,
    /// Names that have gone from the list a moment ago, and until when they are known yet.
    gone: BTreeMap<Arc<str>, Instant>,
    /// Whether Consul's own service was in the list.
    lists_consul: bool,
    /// The services that have been answered for, and aren't reported yet.
    answered: Vec<(Arc<str>, Instant)>,
    /// The names that have upper case in them, by how DNS knows them: to DNS all of them, and the one
    /// in lower case, are one service.
    folded: BTreeMap<String, Vec<Arc<str>>>,
    absent: NegativeCache,
    waiting: BTreeMap<Arc<str>, Vec<oneshot::Sender<Lookup>>>,
    /// The names that are being looked up.
    looking_up: BTreeSet<Arc<str>>,
    started: Instant,
    has_memory: bool,
    give_up_at: Option<Instant>,
    news_at: Option<Instant>,
    last_answer: Option<Instant>,
    /// How long the machine has been suspended, when that was last noticed.
    suspended: Duration,
    token: TokenWatch,
    tidied: Instant,
    saved: Instant,
    is_unsaved: bool,
    saving: Option<task::JoinHandle<()>>,
    /// Those who wait for all of it to be written.
    leaving: Vec<oneshot::Sender<()>>,
}

impl Supervisor {
    /// One that begins with what an earlier life left.
    pub fn new(settings: Settings, output: Publisher, memory: SavedCatalog) -> Self {
        let now = Instant::now();
        let rules = Rules {
            policy: settings.catalog.watch,
            max_connections: settings.consul.max_connections,
            wait: settings.timing.wait,
            first_wait: settings.timing.first_wait,
            withheld_wait: settings.timing.withheld,
            turn: settings.timing.turn,
        };
        // What is known first is left at once.
        let saved = now.checked_sub(settings.timing.save).unwrap_or(now);
        let in_use = settings.in_use.iter().cloned().collect();
        let mut this = Supervisor {
            client: Arc::new(Client::new(
                &settings.consul,
                settings.timing.connect,
                output.clone(),
            )),
            output,
            tasks: JoinSet::new(),
            under_way: HashMap::new(),
            held: BTreeMap::new(),
            yields_at: now,
            names: Poller::new(now),
            of_all: [None, None],
            has_failed: false,
            names_bytes: 0,
            switch: Poller::new(now),
            is_off: false,
            agent_backoff: Backoff::default(),
            schedule: Schedule::new(rules, now),
            model: Model::new(in_use, settings.timing.distrust),
            listed: BTreeSet::new(),
            unlisted: BTreeSet::new(),
            gone: BTreeMap::new(),
            lists_consul: false,
            answered: Vec::new(),
            folded: BTreeMap::new(),
            absent: NegativeCache::new(now),
            waiting: BTreeMap::new(),
            looking_up: BTreeSet::new(),
            started: now,
            has_memory: false,
            give_up_at: None,
            news_at: None,
            last_answer: None,
            suspended: suspended(),
            token: TokenWatch::start(settings.consul.token.as_ref(), settings.timing.token),
            tidied: now,
            saved,
            is_unsaved: false,
            saving: None,
            leaving: Vec::new(),
            settings,
        };
        for name in std::mem::take(&mut this.settings.in_use) {
            this.schedule.used(name, now);
        }
        this.begin_with(memory);
        this
    }

    fn begin_with(&mut self, memory: SavedCatalog) {
        for (name, remembered) in &memory.services {
            if let Some(at) = remembered.used_at {
                self.schedule.used(name.clone(), at);
            }
        }
        let Some(names_at) = memory.names_at else { return };
        if memory.origin != self.settings.origin() {
            return;
        }
        self.has_memory = true;
        self.is_off = memory.off;
        self.output.set_off(memory.off);
        self.output.answered_earlier(names_at);
        self.model.seed(&memory);
        let answered = memory.services.iter();
        let answered =
            answered.filter_map(|(name, known)| Some((name.clone(), known.answered_at?)));
        self.answered.extend(answered);
        self.listed = memory.services.keys().cloned().collect();
    }

    pub async fn run(mut self, mut wishes: UsageReceiver) {
        loop {
            self.ask_what_is_due();
            let wake_at = tokio::time::Instant::from_std(self.wake_at());
            tokio::select! {
                Some(ended) = self.tasks.join_next_with_id() => {
                    self.take(ended);
                    // What comes together is published together.
                    while let Some(ended) = self.tasks.try_join_next_with_id() {
                        self.take(ended);
                    }
                }
                Some(wish) = wishes.recv() => self.hear(wish),
                () = self.token.changed() => self.ask_again(),
                () = tokio::time::sleep_until(wake_at) => {}
            }
            // Before anything is published, so that who is in it counts as used.
            while let Some(wish) = wishes.try_recv() {
                self.hear(wish);
            }
            self.settle();
        }
    }

    fn timing(&self) -> Timing {
        self.settings.timing
    }

    fn ask_what_is_due(&mut self) {
        let now = Instant::now();
        let is_due = |poller: &Poller| poller.due().is_some_and(|due| due <= now);
        if is_due(&self.names) {
            let wait = self.schedule.wait_of(&self.names, now);
            self.names.begin(now, wait);
            let question = self.start(Purpose::Names, Query::Names, self.names.ask(), wait, false);
            self.of_all[0] = Some(question);
        }
        if is_due(&self.switch) {
            let wait = self.schedule.wait_of(&self.switch, now);
            self.switch.begin(now, wait);
            let question =
                self.start(Purpose::Switch, Query::Switch, self.switch.ask(), wait, false);
            self.of_all[1] = Some(question);
        }
        while let Some(Turn { job, ask, wait, is_held }) = self.schedule.next(now) {
            let about = match &job {
                Job::Agent => Query::Agent,
                Job::Service(name, _) => Query::Service(name.clone()),
                Job::Lookup(name) => Query::Lookup(name.clone()),
            };
            self.start(Purpose::Turn(job), about, ask, wait, is_held);
        }
    }

    /// Asks everything again, since the token that was asked with so far isn't the one that counts: a
    /// question that Consul holds would be answered for the old one. Up to that many connections more
    /// than usual stay open at the agent until the waits of those questions are over.
    fn ask_again(&mut self) {
        let now = Instant::now();
        for question in std::mem::take(&mut self.held).into_values() {
            question.handle.abort();
        }
        for question in self.of_all.iter().flatten() {
            question.abort();
        }
        self.names.restart(now);
        self.switch.restart(now);
        self.schedule.restart(now);
        self.absent = NegativeCache::new(now);
    }

    fn start(
        &mut self,
        purpose: Purpose,
        about: Query,
        at: ReadMode,
        wait: Duration,
        is_held: bool,
    ) -> AbortHandle {
        let (client, catalog) = (self.client.clone(), self.settings.catalog.clone());
        let how = QueryOptions { ask: at, wait, limit: self.timing().answer };
        let name = match (&about, is_held) {
            (Query::Service(name), true) => Some(name.clone()),
            _ => None,
        };
        let handle = self.tasks.spawn(async move { ask(&client, &about, how, &catalog).await });
        self.under_way.insert(handle.id(), UnderWay { purpose, is_held });
        if let Some(name) = name {
            self.held.insert(name, HeldQuestion { handle: handle.clone(), wait });
        }
        handle
    }

    /// When there is something to do, should nothing come until then.
    fn wake_at(&self) -> Instant {
        let mut at = vec![self.tidied + TIDY];
        at.extend(self.names.due());
        at.extend(self.switch.due());
        at.extend(self.schedule.next_due());
        at.extend(self.model.next_release());
        at.extend(self.gone.values().min());
        if !self.model.is_synced() {
            at.extend(self.give_up_at);
            if self.has_memory {
                at.push(self.started + self.timing().patience);
            }
        }
        at.extend(self.held_too_long().map(|_| self.yields_at));
        if self.is_unsaved && self.can_save() {
            at.push(self.saved + self.timing().save);
        }
        at.into_iter().min().unwrap_or(self.tidied)
    }

    /// Makes what was heard before the machine was suspended older by that.
    fn wake_up(&mut self) {
        let suspended = suspended();
        let asleep = suspended.saturating_sub(self.suspended);
        // The two clocks aren't read at the same moment.
        if asleep > Duration::from_secs(1) {
            self.suspended = suspended;
            self.model.slept(asleep);
            self.last_answer = self.last_answer.map(|at| at.checked_sub(asleep).unwrap_or(at));
        }
    }

    fn take(&mut self, ended: Result<(task::Id, Asked), JoinError>) {
        // Before its answer counts as one of now.
        self.wake_up();
        let now = Instant::now();
        let (id, asked) = match ended {
            Ok((id, asked)) => (id, Some(asked)),
            Err(error) if error.is_panic() => {
                tracing::error!("a question to Consul panicked ({error})");
                let problem = "reading Consul's answer failed in nohop itself: see the log".into();
                (error.id(), Some(Err(QueryFailure { problem, is_denied: false })))
            }
            Err(error) => (error.id(), None),
        };
        let Some(UnderWay { purpose, is_held }) = self.under_way.remove(&id) else { return };
        if let Purpose::Turn(_) = purpose {
            self.schedule.ended(is_held);
        }
        // What the agent says of itself it says without a server.
        if let Some(Ok(answer)) = &asked
            && !matches!(answer.said, Response::Agent(_))
        {
            self.news_at.get_or_insert(answer.news_at);
        }
        match (purpose, asked) {
            (Purpose::Names, Some(asked)) => self.take_names(asked, now),
            (Purpose::Switch, Some(asked)) => self.take_switch(asked, now),
            (Purpose::Turn(Job::Agent), Some(asked)) => self.take_agent(asked, now),
            (Purpose::Turn(Job::Lookup(name)), Some(asked)) => self.take_lookup(name, asked, now),
            (Purpose::Turn(Job::Service(name, stint)), asked) => {
                if is_held {
                    self.held.remove(&name);
                }
                match asked {
                    Some(asked) => self.take_service(name, stint, asked, now),
                    None => {
                        if let Some(poller) = self.schedule.poller(&name, stint) {
                            poller.dropped(now);
                        }
                    }
                }
            }
            (Purpose::Names, None) => self.names.dropped(now),
            (Purpose::Switch, None) => self.switch.dropped(now),
            (Purpose::Turn(Job::Agent | Job::Lookup(_)), None) => {} // never dropped
        }
    }

    /// Notes how one of the questions fares that are asked all the time.
    fn note(&mut self, subject: Subject, problem: Option<String>, now: Instant) {
        if problem.is_some() {
            self.has_failed = true;
            if subject == Subject::Switch && !self.model.is_failing() {
                // They tell whether it is all of Consul that fails, but are read every ten seconds.
                self.names.hurry(now);
            }
        } else if std::mem::take(&mut self.has_failed) {
            // Perhaps it is another agent that answers now.
            self.schedule.ask_agent(now);
        }
        self.model.set_problem(subject, problem);
    }

    fn take_agent(&mut self, asked: Asked, now: Instant) {
        let problem = match asked {
            Ok(Answer { said: Response::Agent(node), .. }) => {
                self.agent_backoff.reset();
                let fact = match &node {
                    Node::Elsewhere { why, may_be_here } => Some(format!(
                        "Consul's agent isn't this host's ({why}): instances on loopback addresses \
                         are unroutable; ask the agent of this host{}",
                        match may_be_here {
                            Some(_) => {
                                ", or, where it is, give it an advertise_addr that this host has \
                                 (that of NAT is for advertise_addr_wan)"
                            }
                            None => "",
                        }
                    )),
                    _ => None,
                };
                if fact.is_some() {
                    // An address may come later: of a VPN, of keepalived.
                    self.schedule.ask_agent(now + self.timing().agent);
                }
                self.output.set_notice("agent", fact);
                self.model.set_node(node);
                None
            }
            Ok(_) => return,
            Err(QueryFailure { is_denied: true, .. }) => {
                self.output.set_notice("agent", None);
                self.model.set_node(Node::Denied(Own::read()));
                self.schedule.ask_agent(now + self.timing().agent);
                None
            }
            Err(QueryFailure { problem, .. }) => {
                self.schedule.ask_agent(now + self.agent_backoff.pause(fastrand::f64()));
                Some(problem)
            }
        };
        self.model.set_problem(Subject::Agent, problem);
    }

    fn take_service(&mut self, name: Arc<str>, stint: u64, asked: Asked, now: Instant) {
        let doubt = self.timing().doubt;
        let Some(poller) = self.schedule.poller(&name, stint) else { return };
        let problem = match asked {
            Ok(Answer { index, said: Response::Service(heard), n_bytes, is_filtered, news_at }) => {
                self.model.set_size(&name, n_bytes);
                let is_sure = poller.ask() == ReadMode::Consistent;
                match poller.answered(index, now, fastrand::f64()) {
                    IndexCheck::Apply => {
                        let signs = Evidence { now, is_sure, is_filtered, moved: poller.moved() };
                        match self.model.weigh(&name, &heard, signs) {
                            Assessment::Apply => {
                                poller.applied();
                                self.answered.push((name.clone(), news_at));
                                self.believe(news_at);
                                self.apply(&name, heard, now);
                            }
                            Assessment::Confirm => {
                                // Whether anything serves is worth a burst of a fleet's questions.
                                let is_all = heard.n_serving() == 0;
                                let doubt = if is_all { doubt } else { doubt * 10 };
                                poller.doubt(now, doubt.mul_f64(fastrand::f64()));
                                self.output.stats().count_shrink_held();
                            }
                            Assessment::Withhold => {
                                poller.withhold();
                                self.model.withhold(&name, heard, now);
                                self.tell(&name, Lookup::Unknown);
                            }
                        }
                    }
                    IndexCheck::Confirm => tracing::info!(
                        %name,
                        index,
                        "Consul's index went backwards; asking again before believing it"
                    ),
                }
                None
            }
            Ok(_) => return,
            Err(failure) => {
                poller.failed(now, fastrand::f64());
                // They can't be told, and need not wait for that.
                self.waiting.remove(&name);
                Some(failure.problem)
            }
        };
        self.model.set_problem(Subject::Service(name), problem);
    }

    /// Notes that Consul has answered about the catalog, and is believed.
    fn believe(&mut self, news_at: Instant) {
        self.output.answered(news_at);
        self.last_answer = Some(news_at);
    }

    fn apply(&mut self, name: &Arc<str>, heard: ServiceAnswer, now: Instant) {
        let is_gone = heard.instances.as_ref().is_none_or(Vec::is_empty);
        self.model.set_service(name, heard, now);
        if is_gone && self.unlisted.remove(name) {
            self.linger(name, now);
            self.set_names(self.listed.clone());
        }
    }

    fn hear(&mut self, wish: SourceCommand) {
        match wish {
            SourceCommand::Lookup(wanted) => self.want(wanted),
            SourceCommand::Flush(done) => self.leaving.push(done),
        }
    }

    /// Draws the conclusions: who is live, what is published, and who is told.
    fn settle(&mut self) {
        let now = Instant::now();
        if self.model.has_names() {
            self.shift(now);
        }
        self.model.release(now);
        self.end_lingering(now);
        if now.saturating_duration_since(self.tidied) >= TIDY {
            self.tidied = now;
            if let Some(last_answer) = self.last_answer {
                self.model.forget(last_answer, self.settings.catalog.max_age);
            }
        }
        if !self.model.is_synced() {
            let is_late = now >= self.started + self.timing().patience;
            if self.has_memory && (is_late || self.model.is_failing()) {
                tracing::info!("Consul doesn't answer yet: what was known before serves");
                self.model.serve_memory();
            }
            if self.give_up_at.is_some_and(|at| at <= now) {
                let in_use = self.timing().in_use;
                self.model.stop_waiting(now >= self.started + in_use);
                self.give_up_at = Some(now + self.timing().stragglers.min(in_use));
            }
        }
        let news_at = self.news_at.take();
        let catalog = self.model.take();
        self.is_unsaved |= catalog.is_some();
        // What was answered for is young once the answers are published, and no sooner.
        if self.model.is_synced() {
            let answered = std::mem::take(&mut self.answered);
            self.output.publish_aged(catalog, news_at.unwrap_or(now), answered);
        }
        if self.model.is_synced() {
            let answered: Vec<_> = self
                .waiting
                .keys()
                .filter(|name| self.schedule.names().contains(*name))
                .filter_map(|name| Some((name.clone(), self.model.exists(name)?)))
                .collect();
            for (name, exists) in answered {
                self.tell(&name, if exists { Lookup::Exists } else { Lookup::Absent });
            }
        }
        self.release_waiting();
        self.model.report_doubts(now);
        self.output.set_problem(self.model.problem(), self.model.is_failing());
        self.output.stats().set_watches(self.watches(now));
        self.save(now);
    }

    fn shift(&mut self, now: Instant) {
        let shift = self.schedule.shift(now);
        for name in &shift.ended {
            self.model.set_live(name, false);
            if let Some(question) = self.held.remove(name) {
                question.handle.abort();
            }
        }
        let n_unlisted = self.unlisted.len();
        self.unlisted.retain(|name| !shift.ended.contains(name));
        if self.unlisted.len() != n_unlisted {
            self.set_names(self.listed.clone());
        }
        for name in &shift.started {
            self.model.set_live(name, true);
        }
        self.is_unsaved |= !shift.started.is_empty() || !shift.ended.is_empty();
        self.share_connections(now);
    }

    /// Lets watches take turns once there are more of them than connections.
    fn share_connections(&mut self, now: Instant) {
        let is_short = self.schedule.is_short();
        let (n_live, n_shared) = (self.schedule.n_live(), self.schedule.n_shared());
        let turn = self.timing().turn;
        let problem = is_short.then(|| {
            let n_turns = u32::try_from(n_live.div_ceil(n_shared)).unwrap_or(u32::MAX);
            let delay = turn.saturating_mul(n_turns);
            format!(
                "{n_live} services share {n_shared} connections to Consul, so a change may take \
                 {delay:?}: raise consul.max_connections, and the agent's \
                 limits.http_max_conns_per_client (200 by default) with it"
            )
        });
        if self.yields_at <= now
            && let Some(name) = self.held_too_long().cloned()
            && let Some(question) = self.held.remove(&name)
        {
            question.handle.abort();
            self.yields_at = now + YIELDING;
        }
        self.model.set_problem(Subject::Connections, problem);
    }

    /// A service whose question Consul may hold for longer than its turn.
    fn held_too_long(&self) -> Option<&Arc<str>> {
        let turn = self.timing().turn;
        let mut held = self.held.iter().filter(|(_, question)| question.wait > turn);
        let (name, _) = held.next().filter(|_| self.schedule.is_short())?;
        Some(name)
    }

    fn watches(&self, now: Instant) -> Watches {
        let timing = self.timing();
        let an_hour = |every: Duration| 3600.0 / every.as_secs_f64().max(0.001);
        let (n_live, n_shared) = (self.schedule.n_live(), self.schedule.n_shared());
        let n_reads = match self.schedule.is_short() {
            false => n_live as f64 * an_hour(timing.wait),
            true => n_shared as f64 * an_hour(timing.turn),
        };
        let (n_names, n_switch) = (an_hour(timing.names), an_hour(timing.switch));
        let n_bytes = n_names * self.names_bytes as f64 + n_reads * self.model.mean_size();
        Watches {
            live: n_live,
            cold: self.schedule.names().len().saturating_sub(n_live),
            connections: self.under_way.len(),
            max_connections: self.settings.consul.max_connections,
            oldest_age: self.schedule.oldest_age(now),
            budget_requests: (n_names + n_switch + n_reads) as u64,
            budget_bytes: n_bytes as u64,
        }
    }
}

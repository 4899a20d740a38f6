//! Brings the questions, the schedule and the model together.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};
use tokio::task::{self, AbortHandle, JoinError, JoinSet};

use super::absent::{Absent, Decision};
use super::ask::{About, Answer, Failure, How, Said, ask};
use super::backoff::Backoff;
use super::client::Client;
use super::index::{Ask, Verdict};
use super::model::{Heard, Model, Node, Subject};
use super::off;
use super::schedule::{Job, Rules, Schedule, Turn, is_shrink};
use super::tracker::Tracker;
use super::{Settings, Timing};
use crate::catalog::demand::{Wanted, Wish};
use crate::catalog::memory::Memory;
use crate::catalog::{Output, Watches, cache};

/// How often a token that may not read the agent's name, or the switch, is tried again.
const DENIED_PAUSE: Duration = Duration::from_secs(60);

/// The least time between two reads of the switch.
const SWITCH_PAUSE: Duration = Duration::from_secs(1);

/// How often what has grown old is looked for.
const TIDY: Duration = Duration::from_secs(10);

/// How often the times of answers and uses are written, where nothing else has changed.
const SAVE_TIMES: Duration = Duration::from_secs(60);

/// Those who wait for a name, at most; more are told nothing.
const MAX_WAITING: usize = 4096;

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

type Asked = Result<Answer, Failure>;

pub struct Supervisor {
    client: Arc<Client>,
    settings: Settings,
    output: Output,
    tasks: JoinSet<Asked>,
    under_way: HashMap<task::Id, UnderWay>,
    /// The questions about services that Consul may hold.
    held: BTreeMap<Arc<str>, HeldQuestion>,
    /// When the next of them may give way.
    yields_at: Instant,
    names: Tracker,
    has_failed: bool,
    /// The bytes of the list of names when it was last read.
    names_bytes: usize,
    switch: Tracker,
    is_off: bool,
    agent_backoff: Backoff,
    schedule: Schedule,
    model: Model,
    /// The names of the list; empty before it came.
    listed: BTreeSet<Arc<str>>,
    /// Names that were looked up and found, and that the list doesn't have yet.
    unlisted: BTreeSet<Arc<str>>,
    /// The names that have upper case in them, by how DNS knows them.
    folded: BTreeMap<String, Arc<str>>,
    absent: Absent,
    waiting: BTreeMap<Arc<str>, Vec<oneshot::Sender<bool>>>,
    started: Instant,
    has_memory: bool,
    give_up_at: Option<Instant>,
    heard_at: Option<Instant>,
    last_answer: Option<Instant>,
    tidied: Instant,
    saved: Instant,
    is_unsaved: bool,
    saving: Option<task::JoinHandle<()>>,
    /// Those who wait for all of it to be written.
    leaving: Vec<oneshot::Sender<()>>,
}

impl Supervisor {
    /// One that begins with what an earlier life left.
    pub fn new(settings: Settings, output: Output, memory: Memory) -> Self {
        let now = Instant::now();
        let rules = Rules {
            policy: settings.catalog.watch,
            max_connections: settings.consul.max_connections,
            wait: settings.timing.wait,
            turn: settings.timing.turn,
        };
        let mut this = Supervisor {
            client: Arc::new(Client::new(
                &settings.consul,
                settings.timing.connect,
                output.clone(),
            )),
            settings,
            output,
            tasks: JoinSet::new(),
            under_way: HashMap::new(),
            held: BTreeMap::new(),
            yields_at: now,
            names: Tracker::new(now),
            has_failed: false,
            names_bytes: 0,
            switch: Tracker::new(now),
            is_off: false,
            agent_backoff: Backoff::default(),
            schedule: Schedule::new(rules, now),
            model: Model::default(),
            listed: BTreeSet::new(),
            unlisted: BTreeSet::new(),
            folded: BTreeMap::new(),
            absent: Absent::new(now),
            waiting: BTreeMap::new(),
            started: now,
            has_memory: false,
            give_up_at: None,
            heard_at: None,
            last_answer: None,
            tidied: now,
            saved: now,
            is_unsaved: false,
            saving: None,
            leaving: Vec::new(),
        };
        for name in std::mem::take(&mut this.settings.in_use) {
            this.schedule.used(name, now);
        }
        this.begin_with(memory);
        this
    }

    fn begin_with(&mut self, memory: Memory) {
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
        self.listed = memory.services.keys().cloned().collect();
    }

    pub async fn run(mut self, mut wishes: mpsc::Receiver<Wish>) {
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
                () = tokio::time::sleep_until(wake_at) => {}
            }
            // Before anything is published, so that who is in it counts as used.
            while let Ok(wish) = wishes.try_recv() {
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
        let is_due = |tracker: &Tracker| tracker.due().is_some_and(|due| due <= now);
        let wait = self.timing().wait;
        if is_due(&self.names) {
            self.names.begin(now);
            self.start(Purpose::Names, About::Names, self.names.ask(), wait, false);
        }
        if is_due(&self.switch) {
            self.switch.begin(now);
            self.start(Purpose::Switch, About::Switch, self.switch.ask(), wait, false);
        }
        while let Some(Turn { job, ask, wait, is_held }) = self.schedule.next(now) {
            let about = match &job {
                Job::Agent => About::Agent,
                Job::Service(name, _) => About::Service(name.clone()),
                Job::Lookup(name) => About::Lookup(name.clone()),
            };
            self.start(Purpose::Turn(job), about, ask, wait, is_held);
        }
    }

    fn start(&mut self, purpose: Purpose, about: About, at: Ask, wait: Duration, is_held: bool) {
        let (client, catalog) = (self.client.clone(), self.settings.catalog.clone());
        let how = How { ask: at, wait, limit: self.timing().answer };
        let name = match (&about, is_held) {
            (About::Service(name), true) => Some(name.clone()),
            _ => None,
        };
        let handle = self.tasks.spawn(async move { ask(&client, &about, how, &catalog).await });
        self.under_way.insert(handle.id(), UnderWay { purpose, is_held });
        if let Some(name) = name {
            self.held.insert(name, HeldQuestion { handle, wait });
        }
    }

    /// When there is something to do, should nothing come until then.
    fn wake_at(&self) -> Instant {
        let mut at = vec![self.tidied + TIDY];
        at.extend(self.names.due());
        at.extend(self.switch.due());
        at.extend(self.schedule.next_due());
        at.extend(self.model.next_release());
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

    fn take(&mut self, ended: Result<(task::Id, Asked), JoinError>) {
        let now = Instant::now();
        let (id, asked) = match ended {
            Ok((id, asked)) => (id, Some(asked)),
            Err(error) if error.is_panic() => {
                tracing::error!("a question to Consul panicked ({error})");
                let problem = "reading Consul's answer failed in nohop itself: see the log".into();
                (error.id(), Some(Err(Failure { problem, is_denied: false })))
            }
            Err(error) => (error.id(), None),
        };
        let Some(UnderWay { purpose, is_held }) = self.under_way.remove(&id) else { return };
        if let Purpose::Turn(_) = purpose {
            self.schedule.ended(is_held);
        }
        if let Some(Ok(answer)) = &asked {
            self.output.answered(answer.heard_at);
            self.last_answer = Some(answer.heard_at);
            self.heard_at.get_or_insert(answer.heard_at);
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
                        if let Some(tracker) = self.schedule.tracker(&name, stint) {
                            tracker.dropped(now);
                        }
                    }
                }
            }
            // Only questions about services are ever dropped.
            (_, None) => {}
        }
    }

    fn take_names(&mut self, asked: Asked, now: Instant) {
        let problem = match asked {
            Ok(Answer { index, said: Said::Names(names), n_bytes, .. }) => {
                let is_sure = self.names.ask() == Ask::Consistently;
                let verdict = self.names.answered(index, now, fastrand::f64());
                let n_kept = names.iter().filter(|name| self.listed.contains(*name)).count();
                let is_doubtful =
                    verdict == Verdict::Apply && !is_sure && is_shrink(self.listed.len(), n_kept);
                match verdict {
                    Verdict::Apply if is_doubtful => {
                        self.output.stats().count_shrink_held();
                        self.names.doubt(now, self.timing().doubt.mul_f64(fastrand::f64()));
                    }
                    Verdict::Apply => self.set_names(names),
                    Verdict::Unchanged | Verdict::Confirm => {}
                }
                if !is_doubtful && verdict != Verdict::Confirm {
                    let jitter = 1.0 + fastrand::f64() / 5.0;
                    self.names.hold_until(now + self.timing().names.mul_f64(jitter));
                }
                self.names_bytes = n_bytes;
                None
            }
            Ok(_) => return,
            Err(failure) => {
                self.names.failed(now, fastrand::f64());
                Some(failure.problem)
            }
        };
        self.note(Subject::Names, problem, now);
    }

    fn set_names(&mut self, names: BTreeSet<Arc<str>>) {
        self.unlisted.retain(|name| !names.contains(name));
        let folded = names.iter().chain(&self.unlisted);
        let folded = folded.filter(|name| name.chars().any(char::is_uppercase));
        self.folded = folded.map(|name| (name.to_lowercase(), name.clone())).collect();
        for (folded, name) in &self.folded {
            if let Some(at) = self.schedule.used_at(folded) {
                self.schedule.used(name.clone(), at);
            }
        }
        self.listed.clone_from(&names);
        let all: BTreeSet<_> = names.into_iter().chain(self.unlisted.iter().cloned()).collect();
        self.model.set_names(&all);
        self.schedule.set_names(all);
        if self.give_up_at.is_none() {
            self.give_up_at = Some(Instant::now() + self.timing().stragglers);
        }
    }

    fn take_switch(&mut self, asked: Asked, now: Instant) {
        let problem = match asked {
            Ok(Answer { index, said: Said::Switch(is_off), .. }) => {
                self.switch.answered(index, now, fastrand::f64());
                self.switch.hold_until(now + SWITCH_PAUSE);
                if std::mem::replace(&mut self.is_off, is_off) != is_off {
                    let what = if is_off { "off" } else { "on again" };
                    tracing::warn!("Consul's key nohop/off switches translation {what}");
                    self.is_unsaved = true;
                }
                self.output.set_off(is_off);
                self.output.set_fact(off::PATH, None);
                None
            }
            Ok(_) => return,
            Err(Failure { problem, is_denied }) => {
                self.switch.failed(now, fastrand::f64());
                if is_denied {
                    // Whoever gives no right to the key doesn't use it, but should know that.
                    let fact = "Consul's key nohop/off can't switch this node, since the token may \
                                not read it: it needs key:read for nohop/off";
                    self.output.set_fact(off::PATH, Some(fact.into()));
                    self.switch.hold_until(now + DENIED_PAUSE);
                }
                (!is_denied).then_some(problem)
            }
        };
        self.note(Subject::Switch, problem, now);
    }

    /// Notes how one of the questions fares that are asked all the time.
    fn note(&mut self, subject: Subject, problem: Option<String>, now: Instant) {
        if problem.is_some() {
            self.has_failed = true;
        } else if std::mem::take(&mut self.has_failed) {
            // Perhaps it is another agent that answers now.
            self.schedule.ask_agent(now);
        }
        self.model.set_problem(subject, problem);
    }

    fn take_agent(&mut self, asked: Asked, now: Instant) {
        let problem = match asked {
            Ok(Answer { said: Said::Agent(name), .. }) => {
                self.agent_backoff.reset();
                self.model.set_node(Node::Named(name));
                None
            }
            Ok(_) => return,
            Err(Failure { is_denied: true, .. }) => {
                self.model.set_node(Node::Denied);
                self.schedule.ask_agent(now + DENIED_PAUSE);
                None
            }
            Err(Failure { problem, .. }) => {
                self.schedule.ask_agent(now + self.agent_backoff.pause(fastrand::f64()));
                Some(problem)
            }
        };
        self.model.set_problem(Subject::Agent, problem);
    }

    fn take_service(&mut self, name: Arc<str>, stint: u64, asked: Asked, now: Instant) {
        let doubt = self.timing().doubt;
        let Some(tracker) = self.schedule.tracker(&name, stint) else { return };
        let problem = match asked {
            Ok(Answer { index, said: Said::Service(heard), n_bytes, .. }) => {
                self.model.set_size(&name, n_bytes);
                let is_sure = tracker.ask() == Ask::Consistently;
                match tracker.answered(index, now, fastrand::f64()) {
                    Verdict::Apply if !is_sure && self.model.is_shrink(&name, &heard) => {
                        tracker.doubt(now, doubt.mul_f64(fastrand::f64()));
                        self.output.stats().count_shrink_held();
                    }
                    Verdict::Apply => self.apply(&name, heard, now),
                    Verdict::Unchanged => self.model.confirm(&name, now),
                    Verdict::Confirm => tracing::info!(
                        %name,
                        index,
                        "Consul's index went backwards; asking again before believing it"
                    ),
                }
                None
            }
            Ok(_) => return,
            Err(failure) => {
                tracker.failed(now, fastrand::f64());
                // They can't be told, and need not wait for that.
                self.waiting.remove(&name);
                Some(failure.problem)
            }
        };
        self.model.set_problem(Subject::Service(name), problem);
    }

    fn apply(&mut self, name: &Arc<str>, heard: Heard, now: Instant) {
        let is_gone = heard.instances.as_ref().is_none_or(Vec::is_empty);
        if is_gone && self.unlisted.remove(name) {
            return self.set_names(self.listed.clone());
        }
        self.model.set_service(name, heard, now);
    }

    fn take_lookup(&mut self, name: Arc<str>, asked: Asked, now: Instant) {
        match asked {
            Ok(Answer { said: Said::Lookup(None), .. }) => {
                self.absent.note(name.clone(), now);
                self.tell(&name, false);
            }
            Ok(Answer { said: Said::Lookup(Some(registered)), .. }) => {
                let waiting = self.waiting.remove(&name).unwrap_or_default();
                self.waiting.entry(registered.clone()).or_default().extend(waiting);
                if !self.listed.contains(&registered) {
                    self.unlisted.insert(registered.clone());
                    self.set_names(self.listed.clone());
                }
                self.schedule.used(registered, now);
            }
            _ => drop(self.waiting.remove(&name)),
        }
    }

    fn hear(&mut self, wish: Wish) {
        match wish {
            Wish::Service(wanted) => self.want(wanted),
            Wish::Leave(done) => self.leaving.push(done),
        }
    }

    /// Hears that a name is in use.
    fn want(&mut self, wish: Wanted) {
        let now = Instant::now();
        let known = self.schedule.names();
        let name = known.get(&wish.name).or_else(|| self.folded.get(&*wish.name)).cloned();
        if let Some(name) = name {
            self.schedule.used(name.clone(), now);
            if wish.done.is_some() && !self.model.is_failing() {
                self.wait(name, wish);
            }
            return;
        }
        if !self.model.has_names() {
            // It counts once the names are there.
            self.schedule.used(wish.name, now);
            return;
        }
        if self.model.is_failing() {
            // What was known last is all there is to say, and is said at once.
            return;
        }
        if self.waiting.contains_key(&wish.name) {
            return self.wait(wish.name.clone(), wish);
        }
        match self.absent.decide(&wish.name, now) {
            Decision::Absent => {
                if let Some(done) = wish.done {
                    let _ = done.send(false);
                }
            }
            Decision::TooMany => {}
            Decision::LookUp => {
                if self.schedule.look_up(wish.name.clone()) {
                    self.waiting.entry(wish.name.clone()).or_default();
                    self.wait(wish.name.clone(), wish);
                }
            }
        }
    }

    fn wait(&mut self, name: Arc<str>, wish: Wanted) {
        let n_waiting: usize = self.waiting.values().map(Vec::len).sum();
        if let (Some(done), true) = (wish.done, n_waiting < MAX_WAITING) {
            let waiting = self.waiting.entry(name).or_default();
            waiting.retain(|done| !done.is_closed());
            waiting.push(done);
        }
    }

    fn tell(&mut self, name: &str, exists: bool) {
        for done in self.waiting.remove(name).into_iter().flatten() {
            let _ = done.send(exists);
        }
    }

    /// Draws the conclusions: who is live, what is published, and who is told.
    fn settle(&mut self) {
        let now = Instant::now();
        if self.model.has_names() {
            self.shift(now);
        }
        self.model.release(now);
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
                self.model.stop_waiting();
            }
        }
        let heard_at = self.heard_at.take();
        if let Some(catalog) = self.model.take() {
            self.output.publish(catalog, heard_at.unwrap_or(now));
            self.is_unsaved = true;
        }
        if self.model.is_synced() {
            let answered: Vec<_> = self
                .waiting
                .keys()
                .filter(|name| self.schedule.names().contains(*name))
                .filter_map(|name| Some((name.clone(), self.model.exists(name)?)))
                .collect();
            for (name, exists) in answered {
                self.tell(&name, exists);
            }
        }
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
        let n_names = an_hour(timing.names);
        let n_bytes = n_names * self.names_bytes as f64 + n_reads * self.model.mean_size();
        Watches {
            live: n_live,
            cold: self.schedule.names().len().saturating_sub(n_live),
            connections: self.under_way.len(),
            max_connections: self.settings.consul.max_connections,
            oldest_age: self.schedule.oldest_age(now, self.started),
            budget_requests: (n_names + an_hour(timing.wait) + n_reads) as u64,
            budget_bytes: n_bytes as u64,
        }
    }

    /// Whether there is more to leave than an earlier life left, and nothing is being written.
    fn can_save(&self) -> bool {
        let is_saving = self.saving.as_ref().is_some_and(|saving| !saving.is_finished());
        self.model.has_names() && !is_saving
    }

    /// Leaves what the next life begins with, and has it written.
    fn save(&mut self, now: Instant) {
        let leaving = std::mem::take(&mut self.leaving);
        if !leaving.is_empty() && self.model.has_names() {
            let former = self.saving.take();
            return self.write(now, former, leaving);
        }
        let since = now.saturating_duration_since(self.saved);
        let is_due = since >= SAVE_TIMES || self.is_unsaved && since >= self.timing().save;
        if is_due && self.can_save() {
            self.write(now, None, Vec::new());
        }
    }

    /// Has all of it written once a `former` write has ended, and tells those who wait for it.
    fn write(
        &mut self,
        now: Instant,
        former: Option<task::JoinHandle<()>>,
        waiting: Vec<oneshot::Sender<()>>,
    ) {
        (self.saved, self.is_unsaved) = (now, false);
        let mut memory = self.model.memory();
        memory.origin = self.settings.origin();
        memory.off = self.is_off;
        memory.names_at = self.names.answered_at();
        for (name, remembered) in &mut memory.services {
            remembered.used_at = self.schedule.used_at(name);
        }
        let memory = Arc::new(memory);
        self.output.remember(memory.clone());
        let Some(path) = self.settings.cache.clone() else { return };
        let write = move || {
            if let Err(error) = cache::write(&path, &memory) {
                tracing::error!("{error}; until it is mended, a restart needs Consul");
            }
        };
        self.saving = Some(task::spawn(async move {
            if let Some(former) = former {
                let _ = former.await;
            }
            let _ = task::spawn_blocking(write).await;
            for waits in waiting {
                let _ = waits.send(());
            }
        }));
    }
}

//! Discovery by Consul as a state machine without I/O: events in, effects out. The caller has the
//! clock, and runs the effects in their order.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::backoff::Backoff;
use super::doubt::{Assessment, Evidence};
use super::index::{IndexCheck, ReadMode};
use super::kill_switch;
use super::lookups::{Lookups, Waiting};
use super::model::{Model, Node, ServiceAnswer, Subject};
use super::names::{Names, Presence};
use super::negative_cache::LookupDecision;
use super::poller::Poller;
use super::query::{Answer, List, Query, QueryFailure, QueryOptions, Response};
use super::schedule::{Job, Rules, Schedule, Turn, is_shrink};
use super::settings::{Settings, Timing};
use crate::catalog::snapshot::SavedCatalog;
use crate::catalog::stats::Watches;
use crate::catalog::usage::{Lookup, LookupRequest, SourceCommand};
use crate::table::Catalog;

/// The time between two attempts of a token that may not read the kill switch.
const DENIED_PAUSE: Duration = Duration::from_secs(60);

/// The least time between two reads of the kill switch.
const SWITCH_PAUSE: Duration = Duration::from_secs(1);

/// The time between two searches for what has grown old.
const HOUSEKEEPING: Duration = Duration::from_secs(10);

/// The time between two long polls that are dropped once watches take turns: dropping all at once
/// would be a burst for Consul.
const YIELD_INTERVAL: Duration = Duration::from_millis(250);

/// How often the times of answers and uses are saved, where nothing else has changed.
const SAVE_TIMES: Duration = Duration::from_secs(60);

/// The name under which Consul's servers are listed themselves.
const CONSUL: &str = "consul";

/// Identifies a request.
pub type RequestId = u64;

/// What happens to the machine.
#[derive(Debug)]
pub enum Event {
    /// A request has ended; without a result where it was aborted.
    Ended(RequestId, Option<Result<Answer, QueryFailure>>),
    /// A service is used or looked up here, or the state is to be saved.
    Command(SourceCommand),
    /// The token file holds another token.
    TokenChanged,
    /// The machine was suspended for so long, for which the clock of an [`Instant`] stands still.
    Suspended(Duration),
    /// What was to be saved last is written.
    Saved,
}

/// What the caller is to do.
#[derive(Debug)]
pub enum Effect {
    /// Send a request; its end is an event.
    Ask(RequestId, Query, QueryOptions),
    /// Abort a request; its end is an event all the same.
    Abort(RequestId),
    /// Publish a catalog, if there is a new one, whose news came at that moment; and the times at
    /// which Consul answered for services.
    Publish(Option<Catalog>, Instant, Vec<(Arc<str>, Instant)>),
    /// Answer lookups.
    Reply(Waiting, Lookup),
    /// Report that Consul answered about the catalog.
    MarkSuccess(Instant),
    /// Report that Consul answered an earlier run, whose catalog serves.
    MarkEarlierSuccess(Instant),
    /// Report whether nothing is to be translated.
    SetOff(bool),
    /// Report what is no problem and should be known of a subject.
    SetNotice(&'static str, Option<String>),
    /// Report what is wrong, and whether Consul doesn't answer.
    SetProblem(Option<String>, bool),
    /// Report the watches.
    SetWatches(Watches),
    /// Count an answer that is confirmed before it takes so much away.
    CountShrinkHeld,
    /// Save the state for the next run, and report to these when it is written.
    Save(Arc<SavedCatalog>, Vec<oneshot::Sender<()>>),
    /// Log a line.
    Log(tracing::Level, String),
}

/// A request under way.
#[derive(Debug)]
struct InFlight {
    query: Query,
    /// Which watch of a service it belongs to.
    epoch: u64,
    /// Whether Consul may hold it, on one of the connections that services share.
    is_blocking: bool,
    wait: Duration,
    is_aborted: bool,
}

/// The state of discovery.
pub struct Machine {
    settings: Settings,
    rng: fastrand::Rng,
    effects: Vec<Effect>,
    in_flight: BTreeMap<RequestId, InFlight>,
    n_requests: RequestId,
    /// When the next long poll may be dropped.
    yields_at: Instant,
    list: Poller,
    /// The bytes of the list of names when it was last read.
    list_bytes: usize,
    /// Whether Consul's own service was in the list.
    lists_consul: bool,
    switch: Poller,
    is_off: bool,
    has_failed: bool,
    agent_backoff: Backoff,
    schedule: Schedule,
    model: Model,
    names: Names,
    lookups: Lookups,
    /// The services that Consul has answered for, and that aren't reported yet.
    answered: Vec<(Arc<str>, Instant)>,
    started: Instant,
    has_memory: bool,
    give_up_at: Option<Instant>,
    news_at: Option<Instant>,
    last_answer: Option<Instant>,
    last_housekeeping: Instant,
    saved_at: Instant,
    is_unsaved: bool,
    is_saving: bool,
    /// The flushes that wait for all of it to be written.
    flushing: Vec<oneshot::Sender<()>>,
}

impl Machine {
    /// A machine that begins with what an earlier run saved.
    pub fn new(settings: Settings, saved: SavedCatalog, rng: fastrand::Rng, now: Instant) -> Self {
        let timing = settings.timing;
        let rules = Rules {
            policy: settings.catalog.watch,
            max_connections: settings.consul.max_connections,
            wait: timing.wait,
            first_wait: timing.first_wait,
            withheld_wait: timing.withheld,
            turn: timing.turn,
        };
        let in_use = settings.in_use.iter().cloned().collect();
        let mut machine = Machine {
            rng,
            effects: Vec::new(),
            in_flight: BTreeMap::new(),
            n_requests: 0,
            yields_at: now,
            list: Poller::new(now),
            list_bytes: 0,
            lists_consul: false,
            switch: Poller::new(now),
            is_off: false,
            has_failed: false,
            agent_backoff: Backoff::default(),
            schedule: Schedule::new(rules, now),
            model: Model::new(in_use, timing.distrust),
            names: Names::default(),
            lookups: Lookups::new(now),
            answered: Vec::new(),
            started: now,
            has_memory: false,
            give_up_at: None,
            news_at: None,
            last_answer: None,
            last_housekeeping: now,
            // What is known first is saved at once.
            saved_at: now.checked_sub(timing.save).unwrap_or(now),
            is_unsaved: false,
            is_saving: false,
            flushing: Vec::new(),
            settings,
        };
        for name in std::mem::take(&mut machine.settings.in_use) {
            machine.schedule.used(name, now);
        }
        machine.restore(&saved);
        machine
    }

    fn restore(&mut self, saved: &SavedCatalog) {
        for (name, service) in &saved.services {
            if let Some(at) = service.used_at {
                self.schedule.used(name.clone(), at);
            }
        }
        let Some(names_at) = saved.names_at else { return };
        if saved.origin != self.settings.origin() {
            return;
        }
        self.has_memory = true;
        self.is_off = saved.off;
        self.effects.push(Effect::SetOff(saved.off));
        self.effects.push(Effect::MarkEarlierSuccess(names_at));
        self.model.seed(saved);
        let answered = saved.services.iter();
        let answered =
            answered.filter_map(|(name, service)| Some((name.clone(), service.answered_at?)));
        self.answered.extend(answered);
        self.names.add_listed(saved.services.keys().cloned());
    }

    fn timing(&self) -> Timing {
        self.settings.timing
    }

    /// Takes in an event. What follows from it is for [`Machine::settle`] to decide: events that come
    /// together are published together.
    pub fn handle(&mut self, event: Event, now: Instant) {
        match event {
            Event::Ended(id, result) => self.ended(id, result, now),
            Event::Command(SourceCommand::Lookup(request)) => self.look_up(request, now),
            Event::Command(SourceCommand::Flush(done)) => self.flushing.push(done),
            Event::TokenChanged => self.restart(now),
            Event::Suspended(asleep) => {
                self.model.slept(asleep);
                self.last_answer = self.last_answer.map(|at| at.checked_sub(asleep).unwrap_or(at));
            }
            Event::Saved => self.is_saving = false,
        }
    }

    /// Draws the conclusions of all events so far: which services are live, what is published, which
    /// lookups are answered, and what is asked next.
    pub fn settle(&mut self, now: Instant) -> Vec<Effect> {
        if self.model.has_names() {
            self.rebalance(now);
        }
        self.model.release(now);
        self.end_lingering(now);
        if now.saturating_duration_since(self.last_housekeeping) >= HOUSEKEEPING {
            self.last_housekeeping = now;
            if let Some(last_answer) = self.last_answer {
                self.model.forget(last_answer, self.settings.catalog.max_age);
            }
        }
        if !self.model.is_synced() {
            self.give_up_waiting(now);
        }
        self.publish(now);
        self.model.report_doubts(now);
        let (problem, is_failing) = (self.model.problem(), self.model.is_failing());
        self.effects.push(Effect::SetProblem(problem, is_failing));
        let watches = self.watches(now);
        self.effects.push(Effect::SetWatches(watches));
        self.save(now);
        self.ask_what_is_due(now);
        std::mem::take(&mut self.effects)
    }

    /// When to settle next, should no event come until then.
    pub fn next_wake(&self) -> Instant {
        let mut at = vec![self.last_housekeeping + HOUSEKEEPING];
        at.extend(self.list.due());
        at.extend(self.switch.due());
        at.extend(self.schedule.next_due());
        at.extend(self.model.next_release());
        at.extend(self.names.next_end());
        if !self.model.is_synced() {
            at.extend(self.give_up_at);
            if self.has_memory {
                at.push(self.started + self.timing().patience);
            }
        }
        at.extend(self.overlong_poll().map(|_| self.yields_at));
        if self.is_unsaved && self.can_save() {
            at.push(self.saved_at + self.timing().save);
        }
        at.into_iter().min().unwrap_or(self.last_housekeeping)
    }

    // What is asked.

    fn ask_what_is_due(&mut self, now: Instant) {
        let is_due = |poller: &Poller| poller.due().is_some_and(|due| due <= now);
        if is_due(&self.list) {
            let wait = self.schedule.wait_of(&self.list, now);
            self.list.begin(now, wait);
            self.ask(Query::Names, 0, self.list.ask(), wait, false);
        }
        if is_due(&self.switch) {
            let wait = self.schedule.wait_of(&self.switch, now);
            self.switch.begin(now, wait);
            self.ask(Query::Switch, 0, self.switch.ask(), wait, false);
        }
        while let Some(Turn { job, ask, wait, is_held }) = self.schedule.next(now) {
            let (query, epoch) = match job {
                Job::Agent => (Query::Agent, 0),
                Job::Service(name, epoch) => (Query::Service(name), epoch),
                Job::Lookup(name) => (Query::Lookup(name), 0),
            };
            self.ask(query, epoch, ask, wait, is_held);
        }
    }

    fn ask(&mut self, query: Query, epoch: u64, ask: ReadMode, wait: Duration, is_blocking: bool) {
        self.n_requests += 1;
        let options = QueryOptions { ask, wait, limit: self.timing().answer };
        self.effects.push(Effect::Ask(self.n_requests, query.clone(), options));
        let in_flight = InFlight { query, epoch, is_blocking, wait, is_aborted: false };
        self.in_flight.insert(self.n_requests, in_flight);
    }

    fn abort(&mut self, is_meant: impl Fn(&InFlight) -> bool) {
        let meant = |(_, request): &(&RequestId, &mut InFlight)| is_meant(request);
        for (id, request) in self.in_flight.iter_mut().filter(meant) {
            if !std::mem::replace(&mut request.is_aborted, true) {
                self.effects.push(Effect::Abort(*id));
            }
        }
    }

    /// Asks everything again, since another token may see more, or less; a request that Consul holds
    /// would be answered for the old one. Until the waits of those are over, up to that many
    /// connections more than usual stay open at the agent.
    fn restart(&mut self, now: Instant) {
        self.abort(|request| {
            request.is_blocking || matches!(request.query, Query::Names | Query::Switch)
        });
        self.list.restart(now);
        self.switch.restart(now);
        self.schedule.restart(now);
        self.lookups.restart(now);
    }

    // What is answered.

    fn ended(&mut self, id: RequestId, result: Option<Result<Answer, QueryFailure>>, now: Instant) {
        let Some(InFlight { query, epoch, is_blocking, .. }) = self.in_flight.remove(&id) else {
            return;
        };
        if !matches!(query, Query::Names | Query::Switch) {
            self.schedule.ended(is_blocking);
        }
        // The agent needs no server to report its own name.
        if let (Some(Ok(answer)), false) = (&result, query == Query::Agent) {
            self.news_at.get_or_insert(answer.news_at);
        }
        match (query, result) {
            (Query::Names, Some(result)) => self.take_list(result, now),
            (Query::Switch, Some(result)) => self.take_switch(result, now),
            (Query::Agent, Some(result)) => self.take_agent(result, now),
            (Query::Lookup(name), Some(result)) => self.take_lookup(&name, result, now),
            (Query::Service(name), Some(result)) => self.take_service(name, epoch, result, now),
            (Query::Service(name), None) => {
                if let Some(poller) = self.schedule.poller(&name, epoch) {
                    poller.dropped(now);
                }
            }
            (Query::Names, None) => self.list.dropped(now),
            (Query::Switch, None) => self.switch.dropped(now),
            (Query::Agent | Query::Lookup(_), None) => {} // never aborted
        }
    }

    /// Notes the outcome of a request that is repeated all the time.
    fn note(&mut self, subject: Subject, problem: Option<String>, now: Instant) {
        if problem.is_some() {
            self.has_failed = true;
            if subject == Subject::Switch && !self.model.is_failing() {
                // The list shows whether all of Consul fails, but is read every ten seconds only.
                self.list.hurry(now);
            }
        } else if std::mem::take(&mut self.has_failed) {
            // Perhaps it is another agent that answers now.
            self.schedule.ask_agent(now);
        }
        self.model.set_problem(subject, problem);
    }

    fn take_agent(&mut self, result: Result<Answer, QueryFailure>, now: Instant) {
        let problem = match result {
            Ok(Answer { response: Response::Agent(node), .. }) => {
                self.agent_backoff.reset();
                let is_certain = matches!(node, Node::Named(_));
                if !is_certain {
                    // The host may get the agent's address later, and the token may get the right.
                    self.schedule.ask_agent(now + self.timing().agent);
                }
                self.effects.push(Effect::SetNotice("agent", node.notice()));
                self.model.set_node(node);
                None
            }
            Ok(_) => return,
            Err(QueryFailure { problem, .. }) => {
                let pause = self.agent_backoff.pause(self.rng.f64());
                self.schedule.ask_agent(now + pause);
                Some(problem)
            }
        };
        self.model.set_problem(Subject::Agent, problem);
    }

    fn take_switch(&mut self, result: Result<Answer, QueryFailure>, now: Instant) {
        let problem = match result {
            Ok(Answer { index, response: Response::Switch(is_off), .. }) => {
                let is_sure = self.switch.ask() == ReadMode::Consistent;
                // What this run hasn't read itself an earlier one may have, perhaps of another Consul.
                let may_be_off = self.is_off || !self.model.has_switch();
                match self.switch.answered(index, now, self.rng.f64()) {
                    // One stale answer during an election must not switch translation on again; that
                    // one switches it off does no harm.
                    IndexCheck::Apply if may_be_off && !is_off && !is_sure => {
                        self.switch.doubt(now, self.timing().doubt.mul_f64(self.rng.f64()));
                    }
                    IndexCheck::Apply => self.apply_switch(is_off, now),
                    IndexCheck::Confirm => self.log_backwards("the key nohop/off", index),
                }
                self.effects.push(Effect::SetNotice(kill_switch::PATH, None));
                None
            }
            Ok(_) => return,
            Err(QueryFailure { problem, is_denied }) => {
                self.switch.failed(now, self.rng.f64());
                if is_denied {
                    // A site that doesn't grant the right doesn't use the key, but should know.
                    let notice = "Consul's key nohop/off can't switch this node, since the token may \
                                  not read it: it needs key:read for nohop/off";
                    self.effects.push(Effect::SetNotice(kill_switch::PATH, Some(notice.into())));
                    self.switch.hold_until(now + DENIED_PAUSE);
                    // What another Consul's key says doesn't apply to this one.
                    self.effects.push(Effect::SetOff(self.is_off));
                    self.model.hear_switch();
                }
                (!is_denied).then_some(problem)
            }
        };
        self.note(Subject::Switch, problem, now);
    }

    fn apply_switch(&mut self, is_off: bool, now: Instant) {
        let is_news = std::mem::replace(&mut self.is_off, is_off) != is_off;
        if is_news {
            let what = if is_off { "off" } else { "on again" };
            let line = format!("Consul's key nohop/off switches translation {what}");
            self.effects.push(Effect::Log(tracing::Level::WARN, line));
            self.is_unsaved = true;
        }
        // A blocking query on an absent key returns at every write of any other key.
        let pause = if is_news { SWITCH_PAUSE } else { self.timing().switch };
        self.switch.hold_until(now + pause.mul_f64(1.0 + self.rng.f64() / 5.0));
        self.effects.push(Effect::SetOff(is_off));
        self.model.hear_switch();
    }

    fn take_service(
        &mut self,
        name: Arc<str>,
        epoch: u64,
        result: Result<Answer, QueryFailure>,
        now: Instant,
    ) {
        let doubt = self.timing().doubt;
        let Some(poller) = self.schedule.poller(&name, epoch) else { return };
        let problem = match result {
            Ok(Answer {
                index,
                response: Response::Service(answer),
                n_bytes,
                is_filtered,
                news_at,
            }) => {
                self.model.set_size(&name, n_bytes);
                let is_sure = poller.ask() == ReadMode::Consistent;
                match poller.answered(index, now, self.rng.f64()) {
                    IndexCheck::Apply => {
                        let moved = poller.moved();
                        let evidence = Evidence { now, is_sure, is_filtered, moved };
                        match self.model.weigh(&name, &answer, evidence) {
                            Assessment::Apply => {
                                poller.applied();
                                self.answered.push((name.clone(), news_at));
                                self.mark_success(news_at);
                                self.apply(&name, answer, now);
                            }
                            Assessment::Confirm => {
                                // Only a loss of all that serves is worth a burst of a fleet's
                                // requests.
                                let is_all = answer.n_serving() == 0;
                                let doubt = if is_all { doubt } else { doubt * 10 };
                                poller.doubt(now, doubt.mul_f64(self.rng.f64()));
                                self.effects.push(Effect::CountShrinkHeld);
                            }
                            Assessment::Withhold => {
                                poller.withhold();
                                self.model.withhold(&name, answer, now);
                                let waiting = self.lookups.take(&name);
                                self.effects.push(Effect::Reply(waiting, Lookup::Unknown));
                            }
                        }
                    }
                    IndexCheck::Confirm => self.log_backwards(&format!("`{name}`"), index),
                }
                None
            }
            Ok(_) => return,
            Err(failure) => {
                poller.failed(now, self.rng.f64());
                let waiting = self.lookups.take(&name);
                self.effects.push(Effect::Reply(waiting, Lookup::Unknown));
                Some(failure.problem)
            }
        };
        self.model.set_problem(Subject::Service(name), problem);
    }

    fn apply(&mut self, name: &Arc<str>, answer: ServiceAnswer, now: Instant) {
        let is_gone = answer.instances.as_ref().is_none_or(Vec::is_empty);
        self.model.set_service(name, answer, now);
        if is_gone && self.names.presence(name) == Some(Presence::Found) {
            let until = self.model.empty(name, now).then(|| now + self.timing().linger);
            self.names.linger(name, until);
            self.names_changed(now);
        }
    }

    fn mark_success(&mut self, news_at: Instant) {
        self.effects.push(Effect::MarkSuccess(news_at));
        self.last_answer = Some(news_at);
    }

    fn log_backwards(&mut self, what: &str, index: Option<u64>) {
        let line = format!(
            "Consul's index of {what} went backwards, to {}: asking again before it applies",
            index.unwrap_or(0)
        );
        self.effects.push(Effect::Log(tracing::Level::INFO, line));
    }

    // The names.

    fn take_list(&mut self, result: Result<Answer, QueryFailure>, now: Instant) {
        let problem = match result {
            Ok(Answer {
                index,
                response: Response::Names(list),
                n_bytes,
                is_filtered,
                news_at,
            }) => {
                let is_sure = self.list.ask() == ReadMode::Consistent;
                if self.list.answered(index, now, self.rng.f64()) == IndexCheck::Apply {
                    let moved = self.list.moved();
                    let evidence = Evidence { now, is_sure, is_filtered, moved };
                    self.assess_list(list, evidence, news_at);
                }
                self.list_bytes = n_bytes;
                None
            }
            Ok(_) => return,
            Err(failure) => {
                self.list.failed(now, self.rng.f64());
                Some(failure.problem)
            }
        };
        self.note(Subject::Names, problem, now);
    }

    fn assess_list(&mut self, list: List, evidence: Evidence, news_at: Instant) {
        let (listed, unlisted) = (self.names.listed(), self.names.unlisted());
        let n_kept = list.tagged.iter().filter(|name| listed.contains(*name)).count();
        // What was found by a lookup, or is registered again, stays until its own answer.
        let stays = match unlisted.is_empty() {
            true => self.model.would_lose(&list.tagged),
            false => self.model.would_lose(&list.tagged.union(&unlisted).cloned().collect()),
        };
        let is_loss = is_shrink(listed.len(), n_kept) || stays;
        let is_hidden = self.lists_consul && !list.has(CONSUL);
        let there = |name: &Arc<str>| list.has(name);
        match self.model.weigh_names(&listed, &there, is_loss, is_hidden, evidence) {
            Assessment::Apply => {
                self.list.applied();
                self.lists_consul = list.has(CONSUL);
                self.mark_success(news_at);
                let (model, now) = (&mut self.model, evidence.now);
                let until = now + self.settings.timing.linger;
                self.names.apply(list, |name| model.empty(name, now).then_some(until));
                self.names_changed(now);
            }
            Assessment::Confirm => {
                self.effects.push(Effect::CountShrinkHeld);
                let pause = self.timing().doubt.mul_f64(self.rng.f64());
                return self.list.doubt(evidence.now, pause);
            }
            // A new name is no loss.
            Assessment::Withhold => {
                self.list.withhold();
                self.names.add_listed(list.tagged);
                self.names_changed(evidence.now);
            }
        }
        let jitter = 1.0 + self.rng.f64() / 5.0;
        self.list.hold_until(evidence.now + self.timing().names.mul_f64(jitter));
    }

    /// Lets go of the names whose time is over, unless their loss is doubted. One that is registered
    /// again, and not listed yet, is as one that a lookup found.
    fn end_lingering(&mut self, now: Instant) {
        let model = &self.model;
        let has_changed = self.names.end_lingering(now, |name| {
            if model.is_doubted(name, now) {
                return Some(Presence::Lingering { until: now + HOUSEKEEPING });
            }
            model.is_back(name).then_some(Presence::Found)
        });
        if has_changed {
            self.names_changed(now);
        }
    }

    fn names_changed(&mut self, now: Instant) {
        // A use of one is a use of all that DNS regards as one.
        for (folded, group) in self.names.groups() {
            let used = group.iter().map(|name| &**name).chain([folded]);
            let Some(at) = used.filter_map(|name| self.schedule.used_at(name)).max() else {
                continue;
            };
            for name in group {
                self.schedule.used(name, at);
            }
        }
        let all = self.names.all();
        self.model.set_names(&all);
        self.schedule.set_names(all);
        if self.give_up_at.is_none() {
            self.give_up_at = Some(now + self.timing().stragglers);
        }
    }

    // Lookups and uses.

    fn look_up(&mut self, request: LookupRequest, now: Instant) {
        if !self.model.has_names() {
            // It applies once the names are there.
            return self.schedule.used(request.name, now);
        }
        let names = self.names.of(&request.name);
        if let Some(name) = names.first().cloned() {
            for name in names {
                self.schedule.used(name, now);
            }
            if !self.model.is_cut_off() {
                self.lookups.wait(name, request.reply);
            }
            return;
        }
        if self.model.is_cut_off() {
            // It is unknown, at once: an answer would take until the request times out.
            return;
        }
        if self.lookups.is_asked(&request.name) {
            return self.lookups.wait(request.name, request.reply);
        }
        match self.lookups.decide(&request.name, now) {
            LookupDecision::Absent if !self.model.has_doubts(now) => {
                let waiting = request.reply.into_iter().collect();
                self.effects.push(Effect::Reply(waiting, Lookup::Absent));
            }
            LookupDecision::Absent | LookupDecision::TooMany => {}
            LookupDecision::LookUp => {
                if self.schedule.look_up(request.name.clone()) {
                    self.lookups.ask(request);
                }
            }
        }
    }

    fn take_lookup(&mut self, name: &Arc<str>, result: Result<Answer, QueryFailure>, now: Instant) {
        let has_doubts = self.model.has_doubts(now);
        let lookup = match result {
            Ok(Answer { response: Response::Lookup(Some(registered)), .. }) => {
                self.lookups.answered(name, false, now);
                self.lookups.rename(name, &registered);
                if self.names.add_found(&registered) {
                    self.names_changed(now);
                }
                return self.schedule.used(registered, now);
            }
            // One that is left out for the token's sake may well exist.
            Ok(Answer { response: Response::Lookup(None), is_filtered: false, .. })
                if !has_doubts =>
            {
                Lookup::Absent
            }
            // Not knowing is not "no".
            _ => Lookup::Unknown,
        };
        self.lookups.answered(name, lookup == Lookup::Absent, now);
        let waiting = self.lookups.take(name);
        self.effects.push(Effect::Reply(waiting, lookup));
    }

    // What follows.

    fn rebalance(&mut self, now: Instant) {
        let shift = self.schedule.shift(now);
        for name in &shift.ended {
            self.model.set_live(name, false);
            self.abort(|request| {
                request.is_blocking && matches!(&request.query, Query::Service(of) if of == name)
            });
        }
        let is_found = |name: &&Arc<str>| self.names.presence(name) == Some(Presence::Found);
        let cold: Vec<Arc<str>> = shift.ended.iter().filter(is_found).cloned().collect();
        if !cold.is_empty() {
            self.names.remove(&cold);
            self.names_changed(now);
        }
        for name in &shift.started {
            self.model.set_live(name, true);
        }
        self.is_unsaved |= !shift.started.is_empty() || !shift.ended.is_empty();
        self.share_connections(now);
    }

    /// Lets watches take turns once there are more of them than connections.
    fn share_connections(&mut self, now: Instant) {
        let (n_live, n_shared) = (self.schedule.n_live(), self.schedule.n_shared());
        let problem = self.schedule.is_short().then(|| {
            let n_turns = u32::try_from(n_live.div_ceil(n_shared)).unwrap_or(u32::MAX);
            let delay = self.timing().turn.saturating_mul(n_turns);
            format!(
                "{n_live} services share {n_shared} connections to Consul, so a change may take \
                 {delay:?}: raise consul.max_connections, and the agent's \
                 limits.http_max_conns_per_client (200 by default) with it"
            )
        });
        if self.yields_at <= now
            && let Some(id) = self.overlong_poll()
            && let Some(request) = self.in_flight.get_mut(&id)
        {
            request.is_aborted = true;
            self.effects.push(Effect::Abort(id));
            self.yields_at = now + YIELD_INTERVAL;
        }
        self.model.set_problem(Subject::Connections, problem);
    }

    /// The oldest request that Consul may hold for longer than a turn, while watches take turns.
    fn overlong_poll(&self) -> Option<RequestId> {
        let turn = self.timing().turn;
        let is_overlong =
            |request: &InFlight| request.is_blocking && !request.is_aborted && request.wait > turn;
        let mut overlong = self.in_flight.iter().filter(|(_, request)| is_overlong(request));
        overlong.next().filter(|_| self.schedule.is_short()).map(|(id, _)| *id)
    }

    /// Decides whether the first catalog still waits for what isn't answered.
    fn give_up_waiting(&mut self, now: Instant) {
        let is_late = now >= self.started + self.timing().patience;
        if self.has_memory && (is_late || self.model.is_failing()) {
            let line = "Consul doesn't answer yet: the saved catalog serves";
            self.effects.push(Effect::Log(tracing::Level::INFO, line.into()));
            self.model.serve_memory();
        }
        if self.give_up_at.is_some_and(|at| at <= now) {
            let in_use = self.timing().in_use;
            self.model.stop_waiting(now >= self.started + in_use);
            self.give_up_at = Some(now + self.timing().stragglers.min(in_use));
        }
    }

    fn publish(&mut self, now: Instant) {
        let news_at = self.news_at.take();
        let catalog = self.model.take();
        self.is_unsaved |= catalog.is_some();
        let is_synced = self.model.is_synced();
        if is_synced {
            // A service's age is reset once its answer is published, and no sooner.
            let answered = std::mem::take(&mut self.answered);
            self.effects.push(Effect::Publish(catalog, news_at.unwrap_or(now), answered));
        }
        let (model, names) = (&self.model, &self.names);
        let answered = self.lookups.take_answered(|name, is_asked| {
            match (names.presence(name), is_asked) {
                (Some(_), _) if !is_synced => None,
                (Some(_), _) => {
                    let exists = model.exists(name)?;
                    Some(if exists { Lookup::Exists } else { Lookup::Absent })
                }
                (None, true) => None,
                // It has gone, and Consul isn't asked about it.
                (None, false) => Some(Lookup::Absent),
            }
        });
        let replies = answered.into_iter().map(|(waiting, lookup)| Effect::Reply(waiting, lookup));
        self.effects.extend(replies);
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
        let n_bytes = n_names * self.list_bytes as f64 + n_reads * self.model.mean_size();
        Watches {
            live: n_live,
            cold: self.schedule.names().len().saturating_sub(n_live),
            connections: self.in_flight.len(),
            max_connections: self.settings.consul.max_connections,
            oldest_age: self.schedule.oldest_age(now),
            budget_requests: (n_names + n_switch + n_reads) as u64,
            budget_bytes: n_bytes as u64,
        }
    }

    /// Whether there is more to save than an earlier run saved, and nothing is being written.
    fn can_save(&self) -> bool {
        self.model.has_names() && !self.is_saving
    }

    fn save(&mut self, now: Instant) {
        let is_flushed = !self.flushing.is_empty() && self.model.has_names();
        let since = now.saturating_duration_since(self.saved_at);
        let is_due = since >= SAVE_TIMES || self.is_unsaved && since >= self.timing().save;
        let flushing = std::mem::take(&mut self.flushing);
        if !(is_flushed || is_due && self.can_save()) {
            return;
        }
        (self.saved_at, self.is_unsaved, self.is_saving) = (now, false, true);
        let mut saved = self.model.memory();
        saved.origin = self.settings.origin();
        saved.off = self.is_off;
        saved.names_at = self.list.answered_at();
        for (name, service) in &mut saved.services {
            service.used_at = self.schedule.used_at(name);
        }
        self.effects.push(Effect::Save(Arc::new(saved), flushing));
    }
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;

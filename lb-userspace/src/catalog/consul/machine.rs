//! Discovery by Consul as a state machine without I/O: events in, effects out. The caller has the
//! clock, and runs the effects in their order.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::index::{IndexCheck, ReadMode};
use super::inspections::Inspections;
use super::kill_switch;
use super::lookups::{LookupDecision, Lookups, Replies};
use super::node::Node;
use super::poller::{Backoff, Poller};
use super::query::{
    Answer, List, Query, QueryFailure, QueryOptions, RequestId, Response, ServiceAnswer,
};
use super::service::Presence;
use super::settings::{Settings, Timing};
use super::store::{ServiceStore, Subject};
use super::suspicion::{Assessment, Evidence};
use crate::catalog::inspection::InspectError;
use crate::catalog::snapshot::SavedCatalog;
use crate::catalog::stats::Watches;
use crate::catalog::usage::{InspectRequest, InspectResult, Lookup, LookupRequest, SourceCommand};
use crate::config::WatchPolicy;
use crate::table::Catalog;

/// The connections that live services don't share: one for the list of names, one for the kill switch,
/// and one that is kept free for requests that can't wait.
const N_RESERVED: usize = 3;

/// The pause between two reads of the kill switch with a token that may not read it.
const DENIED_PAUSE: Duration = Duration::from_secs(60);

/// The least pause between two reads of the kill switch.
const SWITCH_PAUSE: Duration = Duration::from_secs(1);

/// The interval at which old instances are discarded.
const HOUSEKEEPING: Duration = Duration::from_secs(10);

/// The interval at which blocking queries are aborted once watches take turns: to abort all at once would
/// be a burst for Consul.
const YIELD_INTERVAL: Duration = Duration::from_millis(250);

/// The interval at which the times of answers and uses are saved, where nothing else has changed.
const SAVE_TIMES: Duration = Duration::from_secs(60);

/// The name of Consul's own service, of which the servers are the instances.
const CONSUL: &str = "consul";

/// An input of the machine.
#[derive(Debug)]
pub enum MachineEvent {
    /// A request has ended; without a result where it was aborted.
    Ended(RequestId, Option<Result<Answer, QueryFailure>>),
    /// A service is used or looked up on this node, or the state is to be saved.
    Command(SourceCommand),
    /// The token file has another token.
    TokenChanged,
    /// The machine was suspended for so long, for which the clock of an [`Instant`] stands still.
    Suspended(Duration),
    /// The last save has ended.
    Saved,
}

/// An output of the machine.
#[derive(Debug)]
pub enum Effect {
    /// Send a request; its end is an event.
    Send(RequestId, Query, QueryOptions),
    /// Abort a request; its end is an event all the same.
    Abort(RequestId),
    /// Publish a catalog, if there is a new one, whose news arrived at that moment; and the times at
    /// which Consul answered about services.
    Publish(Option<Catalog>, Instant, Vec<(Arc<str>, Instant)>),
    /// Answer lookups.
    Reply(Replies, Lookup),
    /// Report what is registered under a name.
    ReplyInspection(Vec<oneshot::Sender<InspectResult>>, InspectResult),
    /// Report that Consul answered about the catalog.
    MarkSuccess(Instant),
    /// Report that Consul answered an earlier run, whose catalog serves.
    MarkEarlierSuccess(Instant),
    /// Report whether translation is switched off.
    SetOff(bool),
    /// Report information about a subject that is no problem.
    SetNotice(&'static str, Option<String>),
    /// Report the problem, and whether Consul doesn't answer.
    SetProblem(Option<String>, bool),
    /// Report the watches.
    SetWatches(Watches),
    /// Count an answer that has to be confirmed because it removes so much.
    CountShrinkHeld,
    /// Save the state for the next run, and notify these when it is written.
    Save(Arc<SavedCatalog>, Vec<oneshot::Sender<()>>),
    /// Log a line.
    Log(tracing::Level, String),
}

/// A request under way.
#[derive(Debug)]
struct SentRequest {
    query: Query,
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
    requests: BTreeMap<RequestId, SentRequest>,
    n_requests: RequestId,
    /// The requests of services under way that Consul may hold, and the other ones, the agent's and
    /// lookups among them.
    n_blocking: usize,
    n_plain: usize,
    /// When the next blocking query may be aborted for others.
    yields_at: Instant,
    list: Poller,
    /// The size of the list of names when it was last read.
    list_bytes: usize,
    /// Whether the list had Consul's own service.
    lists_consul: bool,
    switch: Poller,
    is_off: bool,
    has_failed: bool,
    agent_due: Option<Instant>,
    agent_backoff: Backoff,
    store: ServiceStore,
    lookups: Lookups,
    inspections: Inspections,
    /// The services that Consul has answered about, and that aren't reported yet.
    answered: Vec<(Arc<str>, Instant)>,
    started: Instant,
    /// Whether an earlier run saved a catalog of this Consul.
    has_saved: bool,
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
        let in_use = settings.in_use.iter().cloned().collect();
        let mut machine = Machine {
            rng,
            effects: Vec::new(),
            requests: BTreeMap::new(),
            n_requests: 0,
            n_blocking: 0,
            n_plain: 0,
            yields_at: now,
            list: Poller::new(now),
            list_bytes: 0,
            lists_consul: false,
            switch: Poller::new(now),
            is_off: false,
            has_failed: false,
            agent_due: Some(now),
            agent_backoff: Backoff::default(),
            store: ServiceStore::new(in_use, timing.distrust),
            lookups: Lookups::new(now),
            inspections: Inspections::default(),
            answered: Vec::new(),
            started: now,
            has_saved: false,
            give_up_at: None,
            news_at: None,
            last_answer: None,
            last_housekeeping: now,
            // The first save is due at once.
            saved_at: now.checked_sub(timing.save).unwrap_or(now),
            is_unsaved: false,
            is_saving: false,
            flushing: Vec::new(),
            settings,
        };
        for name in std::mem::take(&mut machine.settings.in_use) {
            machine.store.record_use(&name, now);
        }
        machine.restore(&saved);
        machine
    }

    fn restore(&mut self, saved: &SavedCatalog) {
        for (name, service) in &saved.services {
            if let Some(at) = service.used_at {
                self.store.record_use(name, at);
            }
        }
        let Some(names_at) = saved.names_at else { return };
        if saved.origin != self.settings.origin() {
            return;
        }
        self.has_saved = true;
        self.list = Poller::resumed(saved.names_index, self.started);
        self.lists_consul = saved.lists_consul;
        self.is_off = saved.off;
        self.effects.push(Effect::SetOff(saved.off));
        self.effects.push(Effect::MarkEarlierSuccess(names_at));
        self.store.restore(saved, self.started + self.timing().linger);
        let answered = saved.services.iter();
        let answered =
            answered.filter_map(|(name, service)| Some((name.clone(), service.answered_at?)));
        self.answered.extend(answered);
    }

    fn timing(&self) -> Timing {
        self.settings.timing
    }

    /// Handles an event. What follows from it is for [`Machine::settle`] to decide: events that come
    /// together are published together.
    pub fn handle(&mut self, event: MachineEvent, now: Instant) {
        match event {
            MachineEvent::Ended(id, result) => self.handle_end(id, result, now),
            MachineEvent::Command(SourceCommand::Lookup(request)) => self.look_up(request, now),
            MachineEvent::Command(SourceCommand::Inspect(request)) => self.inspect(request),
            MachineEvent::Command(SourceCommand::Flush(done)) => self.flushing.push(done),
            MachineEvent::TokenChanged => self.restart(now),
            MachineEvent::Suspended(asleep) => {
                self.store.suspended(asleep);
                self.last_answer = self.last_answer.map(|at| at.checked_sub(asleep).unwrap_or(at));
            }
            MachineEvent::Saved => self.is_saving = false,
        }
    }

    /// Draws the conclusions of all events so far: which services are live, what is published, which
    /// lookups are answered, and which requests are sent.
    pub fn settle(&mut self, now: Instant) -> Vec<Effect> {
        self.store.expire(now);
        if self.store.has_names() {
            self.rebalance(now);
        }
        if now.saturating_duration_since(self.last_housekeeping) >= HOUSEKEEPING {
            self.last_housekeeping = now;
            if let Some(last_answer) = self.last_answer {
                self.store.discard_old(last_answer, self.settings.catalog.max_age);
            }
        }
        if !self.store.is_synced() {
            self.give_up_waiting(now);
        }
        self.publish(now);
        let (problem, is_failing) = (self.store.problem(now), self.store.is_failing(now));
        self.effects.push(Effect::SetProblem(problem, is_failing));
        let watches = self.watches(now);
        self.effects.push(Effect::SetWatches(watches));
        self.save(now);
        self.send_due(now);
        std::mem::take(&mut self.effects)
    }

    /// When to settle next, if no event comes before.
    pub fn next_wake(&self) -> Instant {
        let mut at = vec![self.last_housekeeping + HOUSEKEEPING];
        at.extend(self.list.due());
        at.extend(self.switch.due());
        if self.has_connection() {
            at.extend(self.agent_due);
            at.extend(self.store.next_due(self.can_block()));
        }
        at.extend(self.store.next_deadline());
        if !self.store.is_synced() {
            at.extend(self.give_up_at);
            if self.has_saved {
                at.push(self.started + self.timing().patience);
            }
        }
        at.extend(self.overlong_query().map(|_| self.yields_at));
        if self.is_unsaved && self.can_save() {
            at.push(self.saved_at + self.timing().save);
        }
        at.into_iter().min().unwrap_or(self.last_housekeeping)
    }

    // Requests.

    /// The connections that live services share.
    fn n_shared(&self) -> usize {
        self.settings.consul.max_connections.saturating_sub(N_RESERVED).max(1)
    }

    /// Whether there are more live services than connections for them, so that they take turns.
    fn is_short(&self) -> bool {
        self.store.n_live() > self.n_shared()
    }

    /// Whether there is a connection for another request, and for one that Consul may hold.
    fn has_connection(&self) -> bool {
        self.n_blocking + self.n_plain <= self.n_shared()
    }

    fn can_block(&self) -> bool {
        self.n_blocking < self.n_shared()
    }

    /// How long Consul may hold a request: no longer than the run has lasted, or a second. An agent keeps
    /// the connection of a request whose client has gone until the wait is over (consul's issue 8524), out
    /// of 200 for each client address; so runs that end soon, of a daemon that crashes again and again or
    /// is reloaded, leave hardly more requests behind than one of them sends.
    fn wait(&self, is_withheld: bool, now: Instant) -> Duration {
        let Timing { wait, first_wait, withheld, .. } = self.timing();
        let wait = now.saturating_duration_since(self.started).max(first_wait).min(wait);
        if is_withheld { wait.min(withheld) } else { wait }
    }

    fn send_due(&mut self, now: Instant) {
        let is_due = |poller: &Poller| poller.due().is_some_and(|due| due <= now);
        if is_due(&self.list) {
            let wait = self.wait(self.list.is_withheld(), now);
            self.list.begin(now, wait);
            self.send(Query::Names, self.list.mode(), wait);
        }
        if is_due(&self.switch) {
            let wait = self.wait(self.switch.is_withheld(), now);
            self.switch.begin(now, wait);
            self.send(Query::Switch, self.switch.mode(), wait);
        }
        // First what can't wait, then blocking queries.
        while self.has_connection() {
            if self.agent_due.take_if(|due| *due <= now).is_some() {
                self.send(Query::Agent, ReadMode::Plain, Duration::ZERO);
                continue;
            }
            match self.store.next_query(self.can_block(), now) {
                Some((name, mode)) if !(mode.is_blocking() && self.lookups.is_queued()) => {
                    self.send_service(&name, mode, now);
                }
                _ => {
                    let lookup = self.lookups.dequeue().map(Query::Lookup);
                    let query = lookup.or_else(|| self.inspections.dequeue().map(Query::Inspect));
                    let Some(query) = query else { return };
                    self.send(query, ReadMode::Plain, Duration::ZERO);
                }
            }
        }
    }

    fn send_service(&mut self, name: &Arc<str>, mode: ReadMode, now: Instant) {
        let turn = if self.is_short() { self.timing().turn } else { Duration::MAX };
        let (wait, withheld_wait) = (self.wait(false, now), self.wait(true, now));
        let id = self.n_requests + 1;
        let wait = self.store.edit_live(name, |live| {
            let wait = match (mode.is_blocking(), live.poller.is_withheld()) {
                (false, _) => Duration::ZERO,
                (true, true) => withheld_wait.min(turn),
                (true, false) => wait.min(turn),
            };
            live.poller.begin(now, wait);
            live.request = Some(id);
            wait
        });
        self.send(Query::Service(name.clone()), mode, wait.unwrap_or_default());
    }

    fn send(&mut self, query: Query, mode: ReadMode, wait: Duration) {
        self.n_requests += 1;
        let options = QueryOptions { mode, wait, limit: self.timing().answer };
        self.effects.push(Effect::Send(self.n_requests, query.clone(), options));
        let is_blocking = mode.is_blocking() && matches!(query, Query::Service(_));
        if let Some(n) = self.n_of(&query, is_blocking) {
            *n += 1;
        }
        let request = SentRequest { query, is_blocking, wait, is_aborted: false };
        self.requests.insert(self.n_requests, request);
    }

    /// The counter of such requests, of those that share connections.
    fn n_of(&mut self, query: &Query, is_blocking: bool) -> Option<&mut usize> {
        match (query, is_blocking) {
            (Query::Names | Query::Switch, _) => None,
            (_, true) => Some(&mut self.n_blocking),
            (_, false) => Some(&mut self.n_plain),
        }
    }

    fn abort(&mut self, id: RequestId) {
        if let Some(request) = self.requests.get_mut(&id)
            && !std::mem::replace(&mut request.is_aborted, true)
        {
            self.effects.push(Effect::Abort(id));
        }
    }

    /// Reads everything again, since another token may read more, or less; a request that Consul holds
    /// would be answered for the former one. Until the waits of those are over, up to that many
    /// connections more than usual stay open at the agent.
    fn restart(&mut self, now: Instant) {
        let is_held = |request: &SentRequest| {
            request.is_blocking || matches!(request.query, Query::Names | Query::Switch)
        };
        let held = self.requests.iter().filter(|(_, request)| is_held(request));
        held.map(|(id, _)| *id).collect::<Vec<_>>().into_iter().for_each(|id| self.abort(id));
        self.list.restart(now);
        self.switch.restart(now);
        self.store.restart(now);
        self.ask_agent(now);
        self.lookups.restart(now);
    }

    /// Has the agent asked for its node at that moment, or before.
    fn ask_agent(&mut self, at: Instant) {
        self.agent_due = Some(self.agent_due.map_or(at, |due| due.min(at)));
    }

    // Responses.

    fn handle_end(
        &mut self,
        id: RequestId,
        result: Option<Result<Answer, QueryFailure>>,
        now: Instant,
    ) {
        let Some(SentRequest { query, is_blocking, .. }) = self.requests.remove(&id) else {
            return;
        };
        if let Some(n) = self.n_of(&query, is_blocking) {
            *n = n.saturating_sub(1);
        }
        // The agent answers about itself without a server.
        let is_of_catalog = !matches!(query, Query::Agent | Query::Inspect(_));
        if let (Some(Ok(answer)), true) = (&result, is_of_catalog) {
            self.news_at.get_or_insert(answer.news_at);
        }
        match (query, result) {
            (Query::Names, Some(result)) => self.take_list(result, now),
            (Query::Switch, Some(result)) => self.take_switch(result, now),
            (Query::Agent, Some(result)) => self.take_agent(result, now),
            (Query::Lookup(name), Some(result)) => self.take_lookup(&name, result, now),
            (Query::Service(name), result) => {
                // The response to an earlier watch of the service isn't used.
                let is_own = self.store.edit_live(&name, |live| {
                    let is_own = live.request == Some(id);
                    live.request = live.request.filter(|_| !is_own);
                    if is_own && result.is_none() {
                        live.poller.aborted(now);
                    }
                    is_own
                });
                if let (Some(true), Some(result)) = (is_own, result) {
                    self.take_service(name, result, now);
                }
            }
            (Query::Names, None) => self.list.aborted(now),
            (Query::Switch, None) => self.switch.aborted(now),
            (Query::Inspect(name), Some(result)) => self.take_inspection(&name, result),
            (Query::Agent | Query::Lookup(_) | Query::Inspect(_), None) => {} // never aborted
        }
    }

    /// Records the outcome of a request that is repeated all the time.
    fn record(&mut self, subject: Subject, problem: Option<String>, now: Instant) {
        if problem.is_some() {
            self.has_failed = true;
            if subject == Subject::Switch && !self.store.is_failing(now) {
                // The list shows whether all of Consul fails, but is read every ten seconds only.
                self.list.hurry(now);
            }
        } else if std::mem::take(&mut self.has_failed) {
            // Perhaps it is another agent that answers now.
            self.ask_agent(now);
        }
        self.store.set_problem(subject, problem);
    }

    fn take_agent(&mut self, result: Result<Answer, QueryFailure>, now: Instant) {
        let problem = match result {
            Ok(Answer { response: Response::Agent(node), .. }) => {
                self.agent_backoff.reset();
                let is_certain = matches!(node, Node::Named(_));
                if !is_certain {
                    // The host may get the agent's address later, and the token the permission.
                    self.ask_agent(now + self.timing().agent);
                }
                self.effects.push(Effect::SetNotice("agent", node.notice()));
                self.store.set_node(node);
                None
            }
            Ok(_) => return,
            Err(QueryFailure { problem, .. }) => {
                let pause = self.agent_backoff.pause(self.rng.f64());
                self.ask_agent(now + pause);
                Some(problem)
            }
        };
        self.store.set_problem(Subject::Agent, problem);
    }

    fn take_switch(&mut self, result: Result<Answer, QueryFailure>, now: Instant) {
        let problem = match result {
            Ok(Answer { index, response: Response::Switch(is_off), .. }) => {
                let is_consistent = self.switch.mode() == ReadMode::Consistent;
                // An earlier run may have read it, perhaps of another Consul.
                let may_be_off = self.is_off || !self.store.has_switch();
                match self.switch.answered(index, now, self.rng.f64()) {
                    // A stale answer during an election must not switch translation on again; switching
                    // it off does no harm.
                    IndexCheck::Apply if may_be_off && !is_off && !is_consistent => {
                        self.switch.confirm(now, self.timing().confirm.mul_f64(self.rng.f64()));
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
                    // A site that doesn't grant it doesn't use the key, but should know.
                    let notice = "Consul's key nohop/off can't switch this node, since the token may \
                                  not read it: it needs key:read for nohop/off";
                    self.effects.push(Effect::SetNotice(kill_switch::PATH, Some(notice.into())));
                    self.switch.delay_until(now + DENIED_PAUSE);
                    // The value of another Consul's key doesn't apply to this one.
                    self.effects.push(Effect::SetOff(self.is_off));
                    self.store.set_has_switch();
                }
                (!is_denied).then_some(problem)
            }
        };
        self.record(Subject::Switch, problem, now);
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
        self.switch.delay_until(now + pause.mul_f64(1.0 + self.rng.f64() / 5.0));
        self.effects.push(Effect::SetOff(is_off));
        self.store.set_has_switch();
    }

    fn take_service(&mut self, name: Arc<str>, result: Result<Answer, QueryFailure>, now: Instant) {
        let random = self.rng.f64();
        let problem = match result {
            Ok(Answer {
                index,
                response: Response::Service(answer),
                n_bytes,
                is_filtered,
                news_at,
            }) => {
                let checked = self.store.edit_live(&name, |live| {
                    live.n_bytes = Some(n_bytes);
                    let is_consistent = live.poller.mode() == ReadMode::Consistent;
                    let check = live.poller.answered(index, now, random);
                    let moved = live.poller.moved();
                    (check, Evidence { now, is_consistent, is_filtered, moved })
                });
                match checked {
                    Some((IndexCheck::Apply, evidence)) => {
                        self.assess_service(&name, answer, evidence, news_at);
                    }
                    Some((IndexCheck::Confirm, _)) => {
                        self.log_backwards(&format!("`{name}`"), index);
                    }
                    None => {}
                }
                None
            }
            Ok(_) => return,
            Err(failure) => {
                self.store.edit_live(&name, |live| live.poller.failed(now, random));
                let waiting = self.lookups.take(&name);
                self.effects.push(Effect::Reply(waiting, Lookup::Unknown));
                Some(failure.problem)
            }
        };
        self.store.edit_live(&name, |live| live.problem = problem);
    }

    fn assess_service(
        &mut self,
        name: &Arc<str>,
        answer: ServiceAnswer,
        evidence: Evidence,
        news_at: Instant,
    ) {
        let now = evidence.now;
        match self.store.assess(name, &answer, evidence) {
            Assessment::Apply => {
                self.answered.push((name.clone(), news_at));
                self.mark_success(news_at);
                let is_gone = answer.instances.as_ref().is_none_or(Vec::is_empty);
                if is_gone && self.store.is_serving(name) {
                    // Only the list shows whether others have vanished with it.
                    let pause = self.timing().confirm.mul_f64(self.rng.f64());
                    self.list.hurry(now + pause);
                }
                self.store.apply(name, answer, now);
                if is_gone && self.store.presence(name) == Some(Presence::Found) {
                    self.store.empty(name, now + self.timing().linger, now);
                }
            }
            Assessment::Confirm => {
                // Only a loss of all that serves is worth a burst of a fleet's requests.
                let is_all = answer.n_serving() == 0;
                let pause = self.timing().confirm * if is_all { 1 } else { 10 };
                let pause = pause.mul_f64(self.rng.f64());
                self.store.edit_live(name, |live| live.poller.confirm(now, pause));
                self.effects.push(Effect::CountShrinkHeld);
            }
            Assessment::Withhold => {
                self.store.edit_live(name, |live| live.poller.withhold());
                self.store.withhold(name, answer, now);
                let waiting = self.lookups.take(name);
                self.effects.push(Effect::Reply(waiting, Lookup::Unknown));
            }
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
                let is_consistent = self.list.mode() == ReadMode::Consistent;
                if self.list.answered(index, now, self.rng.f64()) == IndexCheck::Apply {
                    let moved = self.list.moved();
                    let evidence = Evidence { now, is_consistent, is_filtered, moved };
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
        self.record(Subject::Names, problem, now);
    }

    fn assess_list(&mut self, list: List, evidence: Evidence, news_at: Instant) {
        let now = evidence.now;
        let is_hidden = self.lists_consul && !list.has(CONSUL);
        match self.store.assess_list(&list, is_hidden, evidence) {
            Assessment::Apply => {
                self.list.applied();
                self.lists_consul = list.has(CONSUL);
                self.mark_success(news_at);
                self.store.apply_list(list, now + self.timing().linger, now);
            }
            Assessment::Confirm => {
                self.effects.push(Effect::CountShrinkHeld);
                let pause = self.timing().confirm.mul_f64(self.rng.f64());
                return self.list.confirm(now, pause);
            }
            // A new name is no loss.
            Assessment::Withhold => {
                self.list.withhold();
                self.store.add_listed(list.tagged);
            }
        }
        self.give_up_at.get_or_insert(now + self.timing().stragglers);
        let jitter = 1.0 + self.rng.f64() / 5.0;
        self.list.delay_until(now + self.timing().names.mul_f64(jitter));
    }

    // Lookups and uses.

    fn look_up(&mut self, request: LookupRequest, now: Instant) {
        self.store.record_use(&request.name, now);
        if !self.store.has_names() {
            // The use applies once the names are there; the result is unknown.
            return;
        }
        let is_cut_off = self.store.is_cut_off();
        if let Some(name) = self.store.of(&request.name).into_iter().next() {
            if !is_cut_off {
                self.lookups.wait(name, request.reply);
            }
            return;
        }
        if request.reply.is_none() {
            // A use of a name that only another source has.
            return;
        }
        if is_cut_off {
            // It is unknown at once: an answer would take until the request times out.
            return;
        }
        if self.lookups.is_asked(&request.name) {
            return self.lookups.wait(request.name, request.reply);
        }
        match self.lookups.decide(&request.name, now) {
            LookupDecision::Absent if !self.store.has_suspicions(now) => {
                let waiting = request.reply.into_iter().collect();
                self.effects.push(Effect::Reply(waiting, Lookup::Absent));
            }
            LookupDecision::Absent | LookupDecision::TooMany => {}
            LookupDecision::LookUp => self.lookups.enqueue(request),
        }
    }

    fn take_lookup(&mut self, name: &Arc<str>, result: Result<Answer, QueryFailure>, now: Instant) {
        let has_suspicions = self.store.has_suspicions(now);
        let lookup = match result {
            Ok(Answer { response: Response::Lookup(Some(registered)), .. }) => {
                self.lookups.answered(name, false, now);
                self.lookups.rename(name, &registered);
                self.store.add_found(&registered);
                return self.store.record_use(&registered, now);
            }
            // One that ACLs filtered may well exist.
            Ok(Answer { response: Response::Lookup(None), is_filtered: false, .. })
                if !has_suspicions =>
            {
                Lookup::Absent
            }
            // A failure is no negative answer.
            _ => Lookup::Unknown,
        };
        self.lookups.answered(name, lookup == Lookup::Absent, now);
        let waiting = self.lookups.take(name);
        self.effects.push(Effect::Reply(waiting, lookup));
    }

    // Inspections. They change nothing of what is known.

    fn inspect(&mut self, InspectRequest { name, reply }: InspectRequest) {
        if let Some(reply) = self.inspections.add(name, reply) {
            self.effects.push(Effect::ReplyInspection(vec![reply], Err(InspectError::Busy)));
        }
    }

    fn take_inspection(&mut self, name: &Arc<str>, result: Result<Answer, QueryFailure>) {
        let result = match result {
            Ok(Answer { response: Response::Inspection(inspection), .. }) => Ok(inspection.into()),
            Ok(_) => Err(InspectError::Busy),
            Err(QueryFailure { problem, .. }) => Err(InspectError::Failed(problem.into())),
        };
        let waiting = self.inspections.take(name);
        self.effects.push(Effect::ReplyInspection(waiting, result));
    }

    // Conclusions.

    fn rebalance(&mut self, now: Instant) {
        let max_connections = self.settings.consul.max_connections;
        let follows_all = match self.settings.catalog.watch {
            WatchPolicy::All => true,
            WatchPolicy::Auto => self.store.n_names() <= max_connections / 2,
            WatchPolicy::Used => false,
        };
        self.is_unsaved |= self.store.rebalance(follows_all, now);
        for id in self.store.take_ended() {
            if self.requests.get(&id).is_some_and(|request| request.is_blocking) {
                self.abort(id);
            }
        }
        self.share_connections(now);
    }

    /// Lets watches take turns once there are more of them than connections.
    fn share_connections(&mut self, now: Instant) {
        let (n_live, n_shared) = (self.store.n_live(), self.n_shared());
        let problem = self.is_short().then(|| {
            let n_turns = u32::try_from(n_live.div_ceil(n_shared)).unwrap_or(u32::MAX);
            let delay = self.timing().turn.saturating_mul(n_turns);
            format!(
                "{n_live} services share {n_shared} connections to Consul, so a change may take \
                 {delay:?}: raise consul.max_connections, and the agent's \
                 limits.http_max_conns_per_client (200 by default) with it"
            )
        });
        if self.yields_at <= now
            && let Some(id) = self.overlong_query()
        {
            self.abort(id);
            self.yields_at = now + YIELD_INTERVAL;
        }
        self.store.set_problem(Subject::Connections, problem);
    }

    /// The oldest request that Consul may hold for longer than a turn, while watches take turns.
    fn overlong_query(&self) -> Option<RequestId> {
        let turn = self.timing().turn;
        let is_overlong = |request: &SentRequest| {
            request.is_blocking && !request.is_aborted && request.wait > turn
        };
        let mut overlong = self.requests.iter().filter(|(_, request)| is_overlong(request));
        overlong.next().filter(|_| self.is_short()).map(|(id, _)| *id)
    }

    /// Decides whether the first catalog still waits for answers.
    fn give_up_waiting(&mut self, now: Instant) {
        let is_late = now >= self.started + self.timing().patience;
        if self.has_saved && (is_late || self.store.is_failing(now)) {
            let line = "Consul doesn't answer yet: the saved catalog serves";
            self.effects.push(Effect::Log(tracing::Level::INFO, line.into()));
            self.store.serve_saved();
        }
        if self.give_up_at.is_some_and(|at| at <= now) {
            let in_use = self.timing().in_use;
            self.store.stop_waiting(now >= self.started + in_use);
            self.give_up_at = Some(now + self.timing().stragglers.min(in_use));
        }
    }

    fn publish(&mut self, now: Instant) {
        let news_at = self.news_at.take();
        let catalog = self.store.publish();
        self.is_unsaved |= catalog.is_some();
        let is_synced = self.store.is_synced();
        if is_synced {
            // A service's age is reset once its answer is published, and no sooner.
            let answered = std::mem::take(&mut self.answered);
            self.effects.push(Effect::Publish(catalog, news_at.unwrap_or(now), answered));
        }
        let store = &self.store;
        let answered = self.lookups.take_answered(|name, is_asked| {
            match (store.presence(name), is_asked) {
                (Some(_), _) if !is_synced => None,
                (Some(_), _) => {
                    let exists = store.exists(name)?;
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
        let (n_live, n_shared) = (self.store.n_live(), self.n_shared());
        let n_reads = match self.is_short() {
            false => n_live as f64 * an_hour(timing.wait),
            true => n_shared as f64 * an_hour(timing.turn),
        };
        let (n_names, n_switch) = (an_hour(timing.names), an_hour(timing.switch));
        let n_bytes = n_names * self.list_bytes as f64 + n_reads * self.store.mean_size();
        Watches {
            live: n_live,
            cold: self.store.n_names().saturating_sub(n_live),
            connections: self.requests.len(),
            max_connections: self.settings.consul.max_connections,
            oldest_age: self.store.oldest_age(now),
            budget_requests: (n_names + n_switch + n_reads) as u64,
            budget_bytes: n_bytes as u64,
        }
    }

    /// Whether there is more to save than an earlier run saved, and nothing is being written.
    fn can_save(&self) -> bool {
        self.store.has_names() && !self.is_saving
    }

    fn save(&mut self, now: Instant) {
        let is_flushed = !self.flushing.is_empty() && self.store.has_names();
        let since = now.saturating_duration_since(self.saved_at);
        let is_due = since >= SAVE_TIMES || self.is_unsaved && since >= self.timing().save;
        let flushing = std::mem::take(&mut self.flushing);
        if !(is_flushed || is_due && self.can_save()) {
            return;
        }
        (self.saved_at, self.is_unsaved, self.is_saving) = (now, false, true);
        let mut saved = self.store.saved();
        saved.origin = self.settings.origin();
        saved.off = self.is_off;
        saved.names_at = self.list.answered_at();
        saved.names_index = self.list.applied_index();
        saved.lists_consul = self.lists_consul;
        self.effects.push(Effect::Save(Arc::new(saved), flushing));
    }
}

#[cfg(test)]
mod tests;

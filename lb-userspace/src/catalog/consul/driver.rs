//! Drives the machine: it has the clock and the tasks, and decides nothing.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tokio::task::{self, AbortHandle, JoinError, JoinSet};

use super::client::Client;
use super::machine::{Effect, Machine, MachineEvent};
use super::query::{Answer, QueryFailure, RequestId, fetch};
use super::settings::Settings;
use super::token::TokenWatch;
use crate::boot::suspended;
use crate::catalog::cache;
use crate::catalog::publisher::Publisher;
use crate::catalog::snapshot::SavedCatalog;
use crate::catalog::usage::UsageReceiver;

type Fetched = (RequestId, Result<Answer, QueryFailure>);

/// The tasks of one run.
pub struct Driver {
    client: Arc<Client>,
    settings: Settings,
    output: Publisher,
    machine: Machine,
    requests: JoinSet<Fetched>,
    by_task: HashMap<task::Id, RequestId>,
    handles: HashMap<RequestId, AbortHandle>,
    /// Writes the last save; at most one at a time.
    saving: JoinSet<()>,
    /// The total time in suspension, when last checked.
    suspended: Duration,
}

impl Driver {
    /// A run that begins with what an earlier run saved.
    pub fn new(settings: Settings, output: Publisher, saved: SavedCatalog) -> Self {
        let client = Client::new(&settings.consul, settings.timing.connect, output.clone());
        let rng = fastrand::Rng::new();
        Driver {
            client: Arc::new(client),
            machine: Machine::new(settings.clone(), saved, rng, Instant::now()),
            settings,
            output,
            requests: JoinSet::new(),
            by_task: HashMap::new(),
            handles: HashMap::new(),
            saving: JoinSet::new(),
            suspended: suspended(),
        }
    }

    /// Follows Consul forever.
    pub async fn run(mut self, mut commands: UsageReceiver) {
        let (token, every) = (self.settings.consul.token.as_ref(), self.settings.timing.token);
        let mut token = TokenWatch::start(token, every);
        loop {
            for effect in self.machine.settle(Instant::now()) {
                self.apply(effect);
            }
            let wake_at = tokio::time::Instant::from_std(self.machine.next_wake());
            tokio::select! {
                Some(ended) = self.requests.join_next_with_id() => {
                    self.ended(ended);
                    // Responses that come together are published together.
                    while let Some(ended) = self.requests.try_join_next_with_id() {
                        self.ended(ended);
                    }
                }
                Some(command) = commands.recv() => self.handle(MachineEvent::Command(command)),
                Some(_) = self.saving.join_next() => {
                    if self.saving.is_empty() {
                        self.handle(MachineEvent::Saved);
                    }
                }
                () = token.changed() => self.handle(MachineEvent::TokenChanged),
                () = tokio::time::sleep_until(wake_at) => {}
            }
            // Before anything is published, so that a service in it counts as used.
            while let Some(command) = commands.try_recv() {
                self.handle(MachineEvent::Command(command));
            }
        }
    }

    fn handle(&mut self, event: MachineEvent) {
        self.machine.handle(event, Instant::now());
    }

    fn ended(&mut self, ended: Result<(task::Id, Fetched), JoinError>) {
        // Before the answer is dated with the present time.
        self.check_suspension();
        let (task, result) = match ended {
            Ok((task, (_, result))) => (task, Some(result)),
            Err(error) if error.is_panic() => {
                tracing::error!("a request to Consul panicked ({error})");
                let problem = "reading Consul's answer failed in nohop itself: see the log".into();
                (error.id(), Some(Err(QueryFailure { problem, is_denied: false })))
            }
            Err(error) => (error.id(), None),
        };
        let Some(id) = self.by_task.remove(&task) else { return };
        self.handles.remove(&id);
        self.handle(MachineEvent::Ended(id, result));
    }

    fn check_suspension(&mut self) {
        let suspended = suspended();
        let asleep = suspended.saturating_sub(self.suspended);
        // The two clocks aren't read at the same moment.
        if asleep > Duration::from_secs(1) {
            self.suspended = suspended;
            self.handle(MachineEvent::Suspended(asleep));
        }
    }

    fn apply(&mut self, effect: Effect) {
        let output = &self.output;
        match effect {
            Effect::Send(id, query, options) => {
                let (client, rules) = (self.client.clone(), self.settings.catalog.clone());
                let request = async move { (id, fetch(&client, &query, options, &rules).await) };
                let handle = self.requests.spawn(request);
                self.by_task.insert(handle.id(), id);
                self.handles.insert(id, handle);
            }
            Effect::Abort(id) => {
                if let Some(handle) = self.handles.get(&id) {
                    handle.abort();
                }
            }
            Effect::Publish(catalog, news_at, answered) => {
                output.publish_aged(catalog, news_at, answered);
            }
            Effect::Reply(waiting, lookup) => {
                for reply in waiting {
                    let _ = reply.send(lookup);
                }
            }
            Effect::ReplyInspection(waiting, result) => {
                for reply in waiting {
                    let _ = reply.send(result.clone());
                }
            }
            Effect::MarkSuccess(at) => output.mark_success(at),
            Effect::MarkEarlierSuccess(at) => output.mark_earlier_success(at),
            Effect::SetOff(is_off) => output.set_off(is_off),
            Effect::SetNotice(subject, notice) => output.set_notice(subject, notice),
            Effect::SetProblem(problem, is_failing) => output.set_problem(problem, is_failing),
            Effect::SetWatches(watches) => output.stats().set_watches(watches),
            Effect::CountShrinkHeld => output.stats().count_shrink_held(),
            Effect::Save(saved, flushing) => self.save(saved, flushing),
            Effect::Log(tracing::Level::WARN, line) => tracing::warn!("{line}"),
            Effect::Log(_, line) => tracing::info!("{line}"),
        }
    }

    /// Keeps the state for the next run, and writes it for the next daemon once an earlier write has
    /// ended.
    fn save(&mut self, saved: Arc<SavedCatalog>, flushing: Vec<oneshot::Sender<()>>) {
        self.output.remember(saved.clone());
        let path = self.settings.cache.clone();
        let mut former = std::mem::take(&mut self.saving);
        self.saving.spawn(async move {
            while former.join_next().await.is_some() {}
            let Some(path) = path else { return };
            let write = move || {
                if let Err(error) = cache::write(&path, &saved) {
                    tracing::error!("{error}; until it is fixed, a restart needs Consul");
                }
            };
            let _ = task::spawn_blocking(write).await;
            for done in flushing {
                let _ = done.send(());
            }
        });
    }
}

//! Consul as a source: one blocking query on the names, one on each service that has the tag.
//!
//! Watches only report; the supervisor here owns the model, starts and stops watches as names come
//! and go, and publishes. An error takes nothing out of the model.

mod address;
mod backoff;
mod client;
#[cfg(test)]
mod fake;
#[cfg(any(fuzzing, test))]
pub mod fuzzing;
mod health;
mod index;
mod model;
#[cfg(test)]
mod tests;
mod watch;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Deserialize;
use tokio::sync::{Notify, mpsc, watch::Sender};
use tokio::task::{self, AbortHandle, JoinSet};

use super::Output;
use crate::config::{CatalogConfig, ConsulConfig};
use backoff::Backoff;
use client::{Client, QueryError, Question, percent_encode};
use health::Record;
use index::Ask;
use model::{Model, Node, Subject};
use watch::{Report, Watched};

/// How long everything may take.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// A connection.
    pub connect: Duration,
    /// An answer that isn't held back for news.
    pub answer: Duration,
    /// A question that Consul holds back for news. Consul's own default is 5 minutes; an agent that
    /// hangs is found out after one and a half of these.
    pub wait: Duration,
    /// The same, where there are more services than connections, so that watches take turns. A
    /// service is then asked about every `turn` x services / connections. Shorter turns would be
    /// more questions to Consul's servers (31 a second from each node, at 2 s and 63 connections).
    pub turn: Duration,
    /// How long the first catalog waits for services that don't answer.
    pub stragglers: Duration,
    /// How long a task that panicked stays down.
    pub restart: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Timing {
            connect: Duration::from_secs(2),
            answer: Duration::from_secs(10),
            wait: Duration::from_secs(60),
            turn: Duration::from_secs(2),
            stragglers: Duration::from_secs(10),
            restart: Duration::from_secs(1),
        }
    }
}

/// How often a token that may not read the agent's name is tried again.
const DENIED_PAUSE: Duration = Duration::from_secs(60);

/// What the watches tell the supervisor.
enum Event {
    Names(Report<BTreeSet<Arc<str>>>),
    Service(Arc<str>, Report<Option<Vec<crate::table::Instance>>>),
    Agent(Result<Node, QueryError>),
}

/// What a task is for.
#[derive(Clone, Debug)]
enum Job {
    Names,
    Agent,
    Service(Arc<str>),
}

/// Follows Consul for ever.
pub async fn run(config: ConsulConfig, rules: CatalogConfig, timing: Timing, output: Output) {
    let (events, inbox) = mpsc::unbounded_channel();
    let supervisor = Supervisor {
        client: Arc::new(Client::new(&config, timing.connect, output.clone())),
        n_shared: config.max_connections.saturating_sub(1).max(1),
        rules: Arc::new(rules),
        timing,
        output,
        events,
        wait: Sender::new(timing.wait),
        recovered: Arc::default(),
        tasks: JoinSet::new(),
        jobs: HashMap::new(),
        watches: BTreeMap::new(),
        model: Model::default(),
    };
    supervisor.run(inbox).await;
}

struct Supervisor {
    client: Arc<Client>,
    /// The connections that services share; the names have one of their own.
    n_shared: usize,
    rules: Arc<CatalogConfig>,
    timing: Timing,
    output: Output,
    /// Bounded in practice: each watch is bound to four questions a second.
    events: mpsc::UnboundedSender<Event>,
    wait: Sender<Duration>,
    /// Says that Consul answers again, perhaps as another node.
    recovered: Arc<Notify>,
    tasks: JoinSet<()>,
    jobs: HashMap<task::Id, Job>,
    watches: BTreeMap<Arc<str>, AbortHandle>,
    model: Model,
}

impl Supervisor {
    async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Event>) {
        self.start(Job::Agent, Duration::ZERO);
        self.start(Job::Names, Duration::ZERO);
        let mut give_up_at = None;
        loop {
            if self.model.has_names() && give_up_at.is_none() {
                give_up_at = Some(tokio::time::Instant::now() + self.timing.stragglers);
            }
            let stragglers = give_up_at.filter(|_| !self.model.is_synced());
            tokio::select! {
                Some(event) = inbox.recv() => {
                    self.take(event);
                    // What comes together is published together.
                    while let Ok(event) = inbox.try_recv() {
                        self.take(event);
                    }
                }
                Some(ended) = self.tasks.join_next_with_id() => {
                    let (id, panic) = match ended {
                        Ok((id, ())) => (id, None),
                        Err(error) => (error.id(), error.is_panic().then_some(error)),
                    };
                    self.restart(id, panic);
                }
                () = until(stragglers) => self.model.stop_waiting(),
            }
            if let Some(catalog) = self.model.take() {
                self.output.publish(catalog, Instant::now());
            }
            self.output.set_problem(self.model.problem(), self.model.is_failing());
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Names(report) => {
                if let Some(names) = self.note(Subject::Names, report) {
                    self.follow(names);
                }
            }
            Event::Service(name, report) => {
                if let Some(instances) = self.note(Subject::Service(name.clone()), report) {
                    self.model.set_service(&name, instances);
                }
            }
            Event::Agent(Ok(node)) => {
                self.output.answered(Instant::now());
                self.model.set_problem(Subject::Agent, None);
                self.model.set_node(node);
            }
            Event::Agent(Err(error)) => {
                self.model.set_problem(Subject::Agent, Some(error.to_string()));
            }
        }
    }

    /// Notes how a watch fares, and returns its news.
    fn note<T>(&mut self, subject: Subject, report: Report<T>) -> Option<T> {
        let (news, problem) = match report {
            Report::News(news) => (Some(news), None),
            Report::Alive => (None, None),
            Report::Failed(error) => (None, Some(error.to_string())),
        };
        if problem.is_none() {
            self.output.answered(Instant::now());
        }
        self.model.set_problem(subject, problem);
        news
    }

    /// Watches these names and no others.
    fn follow(&mut self, names: BTreeSet<Arc<str>>) {
        let renamed = self.model.set_names(names);
        for name in &renamed.gone {
            if let Some(watch) = self.watches.remove(name) {
                watch.abort();
            }
        }
        // Before new watches start, so that they know how long they may ask.
        self.share_connections();
        for name in renamed.appeared {
            self.start(Job::Service(name), Duration::ZERO);
        }
    }

    /// Lets watches take turns once there are more of them than connections.
    fn share_connections(&mut self) {
        let (n_services, n_shared) = (self.model.n_services(), self.n_shared);
        let is_short = n_services > n_shared;
        let wait = if is_short { self.timing.turn } else { self.timing.wait };
        let problem = is_short.then(|| {
            let n_turns = u32::try_from(n_services.div_ceil(n_shared)).unwrap_or(u32::MAX);
            let delay = self.timing.turn.saturating_mul(n_turns);
            format!(
                "{n_services} services share {n_shared} connections to Consul, so a change may \
                 take {delay:?}: raise consul.max_connections, and the agent's \
                 limits.http_max_conns_per_client (200 by default) with it"
            )
        });
        let was_short = self.wait.send_replace(wait) < self.timing.wait;
        if let Some(problem) = &problem
            && !was_short
        {
            tracing::warn!("{problem}");
        }
        self.model.set_problem(Subject::Connections, problem);
    }

    fn start(&mut self, job: Job, after: Duration) {
        let (client, events) = (self.client.clone(), self.events.clone());
        let wait = self.wait.subscribe();
        let answer_limit = self.timing.answer;
        // The supervisor owns both ends of the channel, so none of the sends below fails while it
        // lives.
        let handle = match job.clone() {
            Job::Agent => {
                let recovered = self.recovered.clone();
                self.tasks.spawn(async move {
                    tokio::time::sleep(after).await;
                    follow_agent(&client, &recovered, answer_limit, |node| {
                        let _ = events.send(Event::Agent(node));
                    })
                    .await;
                })
            }
            Job::Names => {
                let recovered = self.recovered.clone();
                let rules = self.rules.clone();
                let path = "/v1/catalog/services".into();
                let watched = Watched { path, is_reserved: true, answer_limit };
                let mut has_failed = false;
                self.tasks.spawn(async move {
                    tokio::time::sleep(after).await;
                    watch::run(client, watched, wait, |report: Report<Names>| {
                        let failed = matches!(report, Report::Failed(_));
                        if std::mem::replace(&mut has_failed, failed) && !failed {
                            recovered.notify_one();
                        }
                        let report = report.map(|names| tagged(names, &rules.tag));
                        let _ = events.send(Event::Names(report));
                    })
                    .await;
                })
            }
            Job::Service(name) => {
                let rules = self.rules.clone();
                let path = format!("/v1/health/service/{}", percent_encode(&name));
                let watched = Watched { path, is_reserved: false, answer_limit };
                let handle = self.tasks.spawn({
                    let name = name.clone();
                    async move {
                        tokio::time::sleep(after).await;
                        watch::run(client, watched, wait, |report: Report<Vec<Record>>| {
                            let report = report.map(|records| health::instances(records, &rules));
                            let _ = events.send(Event::Service(name.clone(), report));
                        })
                        .await;
                    }
                });
                self.watches.insert(name, handle.clone());
                handle
            }
        };
        self.jobs.insert(handle.id(), job);
    }

    /// Starts a task again that ended, unless it was told to.
    fn restart(&mut self, id: task::Id, panic: Option<task::JoinError>) {
        let Some(job) = self.jobs.remove(&id) else { return };
        if let Some(panic) = panic {
            tracing::error!(?job, "a task of the Consul source panicked ({panic}); restarting it");
            self.start(job, self.timing.restart);
        }
    }
}

impl<T> Report<T> {
    fn map<U>(self, f: impl FnOnce(T) -> U) -> Report<U> {
        match self {
            Report::News(news) => Report::News(f(news)),
            Report::Alive => Report::Alive,
            Report::Failed(error) => Report::Failed(error),
        }
    }
}

/// The body of `/v1/catalog/services`: the tags that any instance of a name has.
type Names = BTreeMap<Arc<str>, Option<Vec<String>>>;

fn tagged(names: Names, tag: &str) -> BTreeSet<Arc<str>> {
    names
        .into_iter()
        .filter(|(_, tags)| tags.iter().flatten().any(|has| has == tag))
        .map(|(name, _)| name)
        .collect()
}

/// The part of `/v1/agent/self` that says which node this is.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct AgentSelf {
    config: AgentConfig,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct AgentConfig {
    node_name: String,
}

/// Asks which node the agent is, and again each time that Consul has recovered from a failure.
async fn follow_agent(
    client: &Client,
    recovered: &Notify,
    answer_limit: Duration,
    mut report: impl FnMut(Result<Node, QueryError>),
) {
    let question = Question {
        path: "/v1/agent/self".into(),
        ask: Ask::Now,
        wait: Duration::ZERO,
        is_reserved: false,
    };
    let mut backoff = Backoff::default();
    loop {
        match client.get::<AgentSelf>(&question, answer_limit).await {
            Ok(answer) => {
                backoff.reset();
                report(Ok(Node::Named(answer.body.config.node_name)));
                recovered.notified().await;
            }
            Err(QueryError::Denied { .. }) => {
                report(Ok(Node::Denied));
                let _ = tokio::time::timeout(DENIED_PAUSE, recovered.notified()).await;
            }
            Err(error) => {
                report(Err(error));
                tokio::time::sleep(backoff.pause(fastrand::f64())).await;
            }
        }
    }
}

async fn until(instant: Option<tokio::time::Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

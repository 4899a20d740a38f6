//! What is configured about Consul as a source, and how long everything may take.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::catalog::cache;
use crate::config::{CatalogConfig, Config, ConsulConfig};

/// How long everything may take.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// A connection.
    pub connect: Duration,
    /// An answer that isn't held back for news.
    pub answer: Duration,
    /// A question that Consul holds back for news, once the run has lasted as long. Consul's own
    /// default is 5 minutes, but proxies and load balancers give up after one, and it adds up to
    /// 1/16; an agent that hangs is found out after one and a half of these.
    pub wait: Duration,
    /// The same at the start of a run.
    pub first_wait: Duration,
    /// The same, where there are more live services than connections, so that watches take turns. A
    /// service is then asked about every `turn` x services / connections. Shorter turns would be
    /// more questions to Consul's servers (31 a second from each node, at 2 s and 61 connections).
    pub turn: Duration,
    /// Between two reads of the list of names, which wakes at every registration in the datacenter;
    /// up to a fifth more, so that nodes spread.
    pub names: Duration,
    /// Between two reads of the switch, where the first brought nothing new; up to a fifth more.
    pub switch: Duration,
    /// Up to this long an answer that takes too much away waits until it is confirmed, by a read
    /// that costs Consul's leader a round: a whole fleet would ask at once.
    pub doubt: Duration,
    /// Up to this long what takes too much away isn't applied though it was confirmed, where something
    /// speaks against it.
    pub distrust: Duration,
    /// How long Consul may hold a question meanwhile: that its ACLs changed wakes none.
    pub withheld: Duration,
    /// How long a service whose name has gone from the list is still known, without instances: as
    /// long as Nomad takes to start its task again.
    pub linger: Duration,
    /// Between two questions to the agent which node this is, while that isn't known for certain.
    pub agent: Duration,
    /// How often the token file is read for another token.
    pub token: Duration,
    /// How long Consul has to answer a new daemon, before what the last one knew is published.
    pub patience: Duration,
    /// How long the first catalog waits for services that don't answer.
    pub stragglers: Duration,
    /// How long it waits for those that the kernel serves, and of which nothing else is known: a
    /// catalog without them takes them away.
    pub in_use: Duration,
    /// Between two writes of what the next daemon begins with.
    pub save: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Timing {
            connect: Duration::from_secs(2),
            answer: Duration::from_secs(10),
            wait: Duration::from_secs(45),
            first_wait: Duration::from_secs(1),
            turn: Duration::from_secs(2),
            names: Duration::from_secs(10),
            switch: Duration::from_secs(5),
            doubt: Duration::from_millis(100),
            distrust: Duration::from_secs(5 * 60),
            withheld: Duration::from_secs(10),
            linger: Duration::from_secs(5 * 60),
            agent: Duration::from_secs(60),
            token: Duration::from_secs(1),
            patience: Duration::from_secs(2),
            stragglers: Duration::from_secs(10),
            in_use: Duration::from_secs(60),
            save: Duration::from_secs(3),
        }
    }
}

/// All that is chosen of how Consul is followed.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How to reach it.
    pub consul: ConsulConfig,
    /// What to follow.
    pub catalog: Arc<CatalogConfig>,
    /// The services that are known to be in use at the start.
    pub in_use: Vec<Arc<str>>,
    /// Where the last good catalog is kept, if anywhere.
    pub cache: Option<PathBuf>,
    /// How long everything may take.
    pub timing: Timing,
}

impl Settings {
    /// As the configuration has it; `is_cached` says whether the state directory counts.
    pub fn of(config: &Config, in_use: Vec<Arc<str>>, is_cached: bool) -> Self {
        Settings {
            in_use,
            consul: config.consul.clone(),
            catalog: Arc::new(config.catalog.clone()),
            cache: is_cached.then(|| config.state_dir.join(cache::FILE_NAME)),
            timing: Timing::default(),
        }
    }

    /// What tells one catalog's source from another's.
    pub(super) fn origin(&self) -> String {
        let ConsulConfig { address, datacenter, namespace, partition, .. } = &self.consul;
        let CatalogConfig { tag, meta, health, address: choice, .. } = &*self.catalog;
        format!(
            "{address} {datacenter} {namespace} {partition} {tag} {meta:?} {health:?} {choice:?}"
        )
    }
}

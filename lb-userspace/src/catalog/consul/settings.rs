//! The settings of Consul as a source.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::catalog::cache;
use crate::config::{CatalogConfig, Config, ConsulConfig, WatchPolicy};

/// All durations of the source.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// The timeout of a connection.
    pub connect: Duration,
    /// The timeout of a response that Consul doesn't hold.
    pub answer: Duration,
    /// The wait of a blocking query, once the run has lasted as long. Consul's own default is 5 minutes,
    /// but proxies and load balancers give up after one, and it adds up to 1/16; an agent that hangs is
    /// detected after one and a half of these.
    pub wait: Duration,
    /// The wait at the start of a run.
    pub first_wait: Duration,
    /// The longest wait while there are more live services than connections, so that watches take turns.
    /// A service is then read every `turn` x services / connections. Shorter turns would be more requests
    /// to Consul's servers (31 a second from each node, at 2 s and 61 connections).
    pub turn: Duration,
    /// Between two reads of the list of names, which wakes at every registration in the datacenter;
    /// up to a fifth more, so that nodes spread.
    pub names: Duration,
    /// Between two reads of the kill switch, where the first brought no news; up to a fifth more.
    pub switch: Duration,
    /// The longest pause before an answer that removes too much is confirmed, at random: a consistent
    /// read costs Consul's leader a round, and a whole fleet would send it at once.
    pub confirm: Duration,
    /// How long a suspicious answer is withheld, where Consul doesn't report the reason itself.
    pub distrust: Duration,
    /// The longest wait after a withheld answer: a change of Consul's ACLs ends no blocking query.
    pub withheld: Duration,
    /// How long a name that has vanished from the list stays known, without instances: as long as Nomad
    /// takes to start its task again.
    pub linger: Duration,
    /// Between two requests for the agent's node, while that isn't known for certain.
    pub agent: Duration,
    /// How often the token file is read.
    pub token: Duration,
    /// How long a new daemon waits for Consul before it publishes what the last one saved.
    pub patience: Duration,
    /// How long the first catalog waits for services without an answer.
    pub stragglers: Duration,
    /// How long it waits for those that the kernel serves, and of which nothing else is known: a
    /// catalog without them removes them.
    pub in_use: Duration,
    /// Between two saves.
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
            confirm: Duration::from_millis(100),
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

/// The configuration of one run.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How to connect.
    pub consul: ConsulConfig,
    /// Which instances are routed, and which services are live.
    pub catalog: Arc<CatalogConfig>,
    /// The services in use at the start, in lower case.
    pub in_use: Vec<Arc<str>>,
    /// The file of the saved catalog, if there is one.
    pub cache: Option<PathBuf>,
    /// All durations.
    pub timing: Timing,
}

impl Settings {
    /// As configured; `is_cached` is whether the state directory is used.
    ///
    /// An edge follows all services, whatever their number: clients outside ask no name, and Consul's list
    /// of names has no Meta, so which services are public isn't known before their instances are read.
    pub fn of(config: &Config, in_use: Vec<Arc<str>>, is_cached: bool) -> Self {
        let mut catalog = config.catalog.clone();
        if config.edge.is_on() {
            catalog.watch = WatchPolicy::All;
        }
        Settings {
            in_use,
            consul: config.consul.clone(),
            catalog: Arc::new(catalog),
            cache: is_cached.then(|| config.state_dir.join(cache::FILE_NAME)),
            timing: Timing::default(),
        }
    }

    /// Identifies the Consul that is asked, and what it is asked for.
    pub(super) fn origin(&self) -> String {
        let ConsulConfig { address, datacenter, namespace, partition, .. } = &self.consul;
        let CatalogConfig { tag, meta, health, address: choice, .. } = &*self.catalog;
        format!(
            "{address} {datacenter} {namespace} {partition} {tag} {meta:?} {health:?} {choice:?}"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_edge_follows_all_services() {
        let mut config = Config::default();
        let watch = |config: &Config| Settings::of(config, Vec::new(), false).catalog.watch;
        assert_eq!(watch(&config), WatchPolicy::Auto);
        config.edge.interfaces.push("eth0".to_owned());
        assert_eq!(watch(&config), WatchPolicy::All);
    }
}

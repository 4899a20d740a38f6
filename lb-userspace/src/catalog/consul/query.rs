//! The queries: the request for each, and what its response reports.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;

use super::client::{ApiRequest, Client, QueryError, percent_encode};
use super::health::{self, Record, Records, inspection};
use super::hold_down::{self, InstanceKey};
use super::index::ReadMode;
use super::kill_switch;
use super::node::{AgentSelf, Node};
use crate::catalog::host::Own;
use crate::catalog::inspection::Inspection;
use crate::config::CatalogConfig;
use crate::interfaces::is_own;
use crate::table::Instance;

/// Identifies a request.
pub type RequestId = u64;

/// What a request is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Query {
    /// The list of names.
    Names,
    /// The kill switch.
    Switch,
    /// The agent's own name.
    Agent,
    /// The instances of the service of this name.
    Service(Arc<str>),
    /// Whether a service of this name is registered.
    Lookup(Arc<str>),
    /// All that is registered under this name, for a person.
    Inspect(Arc<str>),
}

/// The content of an answer.
#[derive(Debug)]
pub enum Response {
    /// The names.
    Names(List),
    /// Whether translation is switched off.
    Switch(bool),
    /// The node that this host is.
    Agent(Node),
    /// The instances of the service.
    Service(ServiceAnswer),
    /// The service's name as it was registered; `None` where there is no such service.
    Lookup(Option<Arc<str>>),
    /// All that is registered under the name.
    Inspection(Inspection),
}

/// The answer about one service.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ServiceAnswer {
    /// Its instances; `None` where the name isn't a routed service's.
    pub instances: Option<Vec<Instance>>,
    /// The instances without a check of their own, where others have one.
    pub unchecked: Vec<InstanceKey>,
}

impl ServiceAnswer {
    /// The number of its instances that serve.
    pub fn n_serving(&self) -> usize {
        self.instances.as_deref().map_or(0, n_serving)
    }
}

/// The number of instances that serve.
pub fn n_serving(instances: &[Instance]) -> usize {
    instances.iter().filter(|instance| instance.health.serves()).count()
}

/// The list of names.
#[derive(Clone, Debug, Default)]
pub struct List {
    /// The names with the tag.
    pub tagged: BTreeSet<Arc<str>>,
    /// The names without it.
    pub others: BTreeSet<Arc<str>>,
}

impl List {
    /// Whether it has the name, with the tag or without.
    pub fn has(&self, name: &str) -> bool {
        self.tagged.contains(name) || self.others.contains(name)
    }
}

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    /// X-Consul-Index.
    pub index: Option<u64>,
    /// Its content.
    pub response: Response,
    /// The size of its body.
    pub n_bytes: usize,
    /// Whether Consul reports that ACLs filtered it.
    pub is_filtered: bool,
    /// When it arrived.
    pub news_at: Instant,
}

/// The reason why there is no answer.
#[derive(Debug)]
pub struct QueryFailure {
    /// The cause, with the fix.
    pub problem: String,
    /// Whether Consul denied permission.
    pub is_denied: bool,
}

impl From<QueryError> for QueryFailure {
    fn from(error: QueryError) -> Self {
        let is_denied = matches!(error, QueryError::Denied { .. });
        QueryFailure { problem: error.to_string(), is_denied }
    }
}

/// The options of a request.
#[derive(Clone, Copy, Debug)]
pub struct QueryOptions {
    /// The consistency mode, or the index of a blocking query.
    pub mode: ReadMode,
    /// How long Consul may hold a blocking query.
    pub wait: Duration,
    /// The timeout of another request. That of a blocking query is 1.5 times its wait: Consul adds up
    /// to 1/16.
    pub limit: Duration,
}

/// Sends a query. `rules` decide which instances are routed.
///
/// # Errors
/// As the client's.
pub async fn fetch(
    client: &Client,
    query: &Query,
    options: QueryOptions,
    rules: &CatalogConfig,
) -> Result<Answer, QueryFailure> {
    match query {
        Query::Names => {
            let response = |names, _| Response::Names(tagged(names, &rules.tag));
            get(client, "/v1/catalog/services".into(), options, response).await
        }
        Query::Switch => {
            get(client, kill_switch::PATH.into(), options, |entries, _| {
                Response::Switch(kill_switch::is_off(&entries))
            })
            .await
        }
        Query::Agent => {
            let is_on_bridge = |address| Own::read().is_on_bridge(address, None);
            let response =
                |agent: AgentSelf, peer| Response::Agent(agent.node(peer, is_own, is_on_bridge));
            match get(client, "/v1/agent/self".into(), options, response).await {
                Err(QueryFailure { is_denied: true, .. }) => Ok(Answer {
                    index: None,
                    response: Response::Agent(Node::Denied(Own::read())),
                    n_bytes: 0,
                    is_filtered: false,
                    news_at: Instant::now(),
                }),
                result => result,
            }
        }
        Query::Service(name) => {
            get(client, health_path(name), options, |Records(records), _| {
                Response::Service(service(records, rules))
            })
            .await
        }
        Query::Lookup(name) => {
            let response = |Records(records), _| Response::Lookup(registered(records, rules, name));
            get(client, health_path(name), options, response).await
        }
        Query::Inspect(name) => {
            let response = |records, _| Response::Inspection(inspection(records, rules));
            let mut result = get(client, health_path(name), options, response).await;
            if let Ok(Answer { response: Response::Inspection(inspection), is_filtered, .. }) =
                &mut result
            {
                inspection.is_filtered = *is_filtered;
            }
            result
        }
    }
}

fn health_path(name: &str) -> String {
    format!("/v1/health/service/{}", percent_encode(name))
}

async fn get<T: DeserializeOwned>(
    client: &Client,
    path: String,
    options: QueryOptions,
    response: impl FnOnce(T, Option<IpAddr>) -> Response,
) -> Result<Answer, QueryFailure> {
    // The machine keeps to the limit on connections, so no request waits for one here.
    let request = ApiRequest { path, mode: options.mode, wait: options.wait };
    let limit = match options.mode.is_blocking() {
        true => (options.wait * 3 / 2).max(options.limit),
        false => options.limit,
    };
    let answer = client.get::<T>(&request, limit).await?;
    Ok(Answer {
        index: answer.index,
        response: response(answer.body, answer.peer),
        n_bytes: answer.n_bytes,
        is_filtered: answer.is_filtered,
        news_at: Instant::now(),
    })
}

/// The registered name of the routed service that was looked up as `asked`, in lower case, as DNS has
/// it.
fn registered(records: Vec<Record>, rules: &CatalogConfig, asked: &Arc<str>) -> Option<Arc<str>> {
    let tagged = records.iter().filter(|record| record.has_tag(&rules.tag));
    let names = tagged.map(Record::service_name);
    let name = names.filter(|name| name.to_lowercase() == **asked).max().map(Arc::from);
    let instances = service(records, rules).instances?;
    (!instances.is_empty()).then(|| name.unwrap_or_else(|| asked.clone()))
}

/// The answer from an agent's records. A name without a tagged instance isn't a routed service's; one
/// without any instance may be, until the list of names decides.
fn service(records: Vec<Record>, rules: &CatalogConfig) -> ServiceAnswer {
    if !records.is_empty() && !records.iter().any(|record| record.has_tag(&rules.tag)) {
        return ServiceAnswer::default();
    }
    let unchecked =
        hold_down::unchecked(records.iter().map(|record| (record.key(), record.has_own_check())));
    ServiceAnswer { instances: health::instances(records, rules), unchecked }
}

/// The body of `/v1/catalog/services`: the tags that any instance of a name has.
pub(super) type ServiceTags = BTreeMap<Arc<str>, Option<Vec<String>>>;

/// Divides the names of `/v1/catalog/services` by the tag.
pub(super) fn tagged(names: ServiceTags, tag: &str) -> List {
    let mut list = List::default();
    for (name, tags) in names {
        match tags.iter().flatten().any(|has| has == tag) {
            true => list.tagged.insert(name),
            false => list.others.insert(name),
        };
    }
    list
}

//! The queries: the request for each, and what its answer means.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::client::{ApiRequest, Client, QueryError, percent_encode};
use super::health::{self, Record, Records};
use super::hold_down;
use super::index::ReadMode;
use super::kill_switch;
use super::model::{Node, ServiceAnswer};
use crate::catalog::host::{self, Own};
use crate::catalog::snapshot::Agent;
use crate::config::CatalogConfig;
use crate::table::{NodeIdentity, parse_ip};

/// What a question is about.
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
    /// Whether there is a service of this name.
    Lookup(Arc<str>),
}

/// What the answer said, with its index.
#[derive(Debug)]
pub enum Response {
    /// The names.
    Names(List),
    /// Whether nothing is to be translated.
    Switch(bool),
    /// Which node this is, by the agent.
    Agent(Node),
    /// What there is of the service.
    Service(ServiceAnswer),
    /// The service's name as it was registered; `None` where there is no such service.
    Lookup(Option<Arc<str>>),
}

/// The list of names.
#[derive(Clone, Debug, Default)]
pub struct List {
    /// Those that have the tag.
    pub tagged: BTreeSet<Arc<str>>,
    /// The others.
    pub others: BTreeSet<Arc<str>>,
}

impl List {
    /// Whether the name is there, with the tag or without.
    pub fn has(&self, name: &str) -> bool {
        self.tagged.contains(name) || self.others.contains(name)
    }
}

/// An answer that counts.
#[derive(Debug)]
pub struct Answer {
    /// X-Consul-Index.
    pub index: Option<u64>,
    /// What it is.
    pub response: Response,
    /// The bytes of its body.
    pub n_bytes: usize,
    /// Whether Consul left something out of it for the token's sake, and said so.
    pub is_filtered: bool,
    /// When it was there.
    pub news_at: Instant,
}

/// Why there is none.
#[derive(Debug)]
pub struct QueryFailure {
    /// The cause, with the fix.
    pub problem: String,
    /// Whether the token isn't allowed to know.
    pub is_denied: bool,
}

impl From<QueryError> for QueryFailure {
    fn from(error: QueryError) -> Self {
        let is_denied = matches!(error, QueryError::Denied { .. });
        QueryFailure { problem: error.to_string(), is_denied }
    }
}

/// How to ask.
#[derive(Clone, Copy, Debug)]
pub struct QueryOptions {
    /// Where in Consul's history.
    pub ask: ReadMode,
    /// How long Consul may hold the question.
    pub wait: Duration,
    /// How long an answer that isn't held may take. One that is counts as lost after 1.5 times its
    /// wait: Consul adds up to 1/16.
    pub limit: Duration,
}

/// Sends a query. `rules` say what an instance needs.
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
            let response = |agent, peer| Response::Agent(node(agent, peer, host::is_own));
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
            get(client, health(name), options, |Records(records), _| {
                Response::Service(heard(records, rules))
            })
            .await
        }
        Query::Lookup(name) => {
            let response = |Records(records), _| Response::Lookup(registered(records, rules, name));
            get(client, health(name), options, response).await
        }
    }
}

fn health(name: &str) -> String {
    format!("/v1/health/service/{}", percent_encode(name))
}

async fn get<T: DeserializeOwned>(
    client: &Client,
    path: String,
    options: QueryOptions,
    response: impl FnOnce(T, Option<IpAddr>) -> Response,
) -> Result<Answer, QueryFailure> {
    // The schedule keeps to the connections that there are, so no question waits for one here.
    let request = ApiRequest { path, ask: options.ask, wait: options.wait };
    let limit = match options.ask {
        ReadMode::Blocking(_) => (options.wait * 3 / 2).max(options.limit),
        ReadMode::Plain | ReadMode::Consistent => options.limit,
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

/// The name of the routed service that was asked for as `asked`, in lower case, as DNS has it.
fn registered(records: Vec<Record>, rules: &CatalogConfig, asked: &Arc<str>) -> Option<Arc<str>> {
    let tagged = records.iter().filter(|record| record.has_tag(&rules.tag));
    let names = tagged.map(Record::service_name);
    let name = names.filter(|name| name.to_lowercase() == **asked).max().map(Arc::from);
    let instances = heard(records, rules).instances?;
    (!instances.is_empty()).then(|| name.unwrap_or_else(|| asked.clone()))
}

/// A name that none of whose instances has the tag is no routed service's; one without any
/// instances may be, until the list of names says otherwise.
fn heard(records: Vec<Record>, rules: &CatalogConfig) -> ServiceAnswer {
    if !records.is_empty() && !records.iter().any(|record| record.has_tag(&rules.tag)) {
        return ServiceAnswer::default();
    }
    let unchecked =
        hold_down::unchecked(records.iter().map(|record| (record.key(), record.has_own_check())));
    ServiceAnswer { instances: health::instances(records, rules), unchecked }
}

/// The body of `/v1/catalog/services`: the tags that any instance of a name has.
pub(super) type Names = BTreeMap<Arc<str>, Option<Vec<String>>>;

pub(super) fn tagged(names: Names, tag: &str) -> List {
    let mut list = List::default();
    for (name, tags) in names {
        match tags.iter().flatten().any(|has| has == tag) {
            true => list.tagged.insert(name),
            false => list.others.insert(name),
        };
    }
    list
}

/// The part of `/v1/agent/self` that says which node this is.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct AgentSelf {
    config: AgentConfig,
    #[serde(default)]
    member: Option<Member>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct AgentConfig {
    node_name: String,
    #[serde(default, rename = "NodeID")]
    node_id: Option<String>,
    #[serde(default)]
    datacenter: Option<String>,
    /// Consul Enterprise has it.
    #[serde(default)]
    partition: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Member {
    /// Where other agents reach this one.
    #[serde(default)]
    addr: Option<String>,
}

/// Which node this is. The agent is this host's where it is asked over a unix socket or at an address
/// of this host, and has one itself: behind a tunnel, a proxy or a container's published port is
/// another network namespace, whose loopback isn't ours. Behind NAT it may be this host's all the
/// same.
fn node(agent: AgentSelf, peer: Option<IpAddr>, is_own: impl Fn(IpAddr) -> bool) -> Node {
    let AgentConfig { node_name, node_id, datacenter, partition } = agent.config;
    if let Some(peer) = peer.filter(|peer| !is_own(*peer)) {
        let why = format!("{peer}, where it is asked, is another host's");
        return Node::Elsewhere { why, may_be_here: None };
    }
    let text = |text: Option<String>| text.unwrap_or_default();
    let node_identity = NodeIdentity::new(&text(node_id), &text(datacenter), &text(partition));
    let named = Agent { name: node_name, node_identity };
    let address = agent.member.and_then(|member| parse_ip(&member.addr?));
    let address = address.filter(|address| !address.is_unspecified());
    if let Some(address) = address.filter(|address| !is_own(*address)) {
        let why = format!("its advertise_addr, {address}, is none of this host's addresses");
        return Node::Elsewhere { why, may_be_here: Some(named) };
    }
    Node::Named(named)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_agent_of_this_host_says_which_node_this_is() {
        let is_own = |address: IpAddr| {
            address.is_loopback()
                || ["10.0.0.1", "fd00::1"].iter().any(|own| own.parse() == Ok(address))
        };
        // (where it is asked, what its member's address is, whether it is this host's)
        for (peer, member, is_here) in [
            (None, None, true),
            (None, Some("10.0.0.1"), true),
            (None, Some("172.17.0.2"), false),
            (Some("127.0.0.1"), None, true),
            (Some("127.0.0.1"), Some(""), true),
            (Some("127.0.0.1"), Some("127.0.0.1"), true),
            (Some("127.0.0.1"), Some("0.0.0.0"), true),
            (Some("127.0.0.1"), Some("10.0.0.1"), true),
            (Some("::1"), Some("fd00::1"), true),
            // A tunnel, or a container whose port is published.
            (Some("127.0.0.1"), Some("10.0.0.2"), false),
            (Some("10.0.0.1"), Some("10.0.0.1"), true),
            (Some("10.0.0.2"), Some("10.0.0.2"), false),
            (Some("10.0.0.2"), None, false),
        ] {
            let member = json_member(member);
            let json = format!(r#"{{"Config":{{"NodeName":"n1","NodeID":"9d75"}}{member}}}"#);
            let agent = serde_json::from_str(&json).unwrap();
            let got = node(agent, peer.map(|peer| peer.parse().unwrap()), is_own);
            let expected =
                Agent { name: "n1".into(), node_identity: NodeIdentity::new("9d75", "", "") };
            match is_here {
                true => assert_eq!(got, Node::Named(expected), "{peer:?} {json}"),
                false => {
                    let is_asked_here = peer.is_none_or(|peer| peer != "10.0.0.2");
                    let may_be_here = is_asked_here.then_some(expected);
                    assert!(
                        matches!(&got, Node::Elsewhere { may_be_here: got, .. } if *got == may_be_here),
                        "{peer:?} {json}: {got:?}"
                    );
                }
            }
        }
    }

    fn json_member(address: Option<&str>) -> String {
        address.map(|address| format!(r#","Member":{{"Addr":"{address}"}}"#)).unwrap_or_default()
    }
}

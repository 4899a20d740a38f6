//! Which node this host is, by the agent's answer, and which instances run on it.

use std::net::IpAddr;

use serde::Deserialize;

use crate::catalog::host::Own;
use crate::catalog::snapshot::Agent;
use crate::table::{Instance, NodeIdentity, parse_ip};

/// The node that this host is: that of the agent, where the agent runs on this host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Node {
    /// The agent hasn't answered yet.
    #[default]
    Unknown,
    /// The agent's node.
    Named(Agent),
    /// The agent runs on another host.
    Elsewhere {
        /// The evidence.
        why: String,
        /// The agent's node, where it may be this host all the same: behind NAT.
        may_be_here: Option<Agent>,
    },
    /// The token may not read it: it is the node whose address this host has.
    Denied(Own),
}

impl Node {
    /// What an operator should know about it.
    pub fn notice(&self) -> Option<String> {
        let Node::Elsewhere { why, may_be_here } = self else { return None };
        let fix = match may_be_here {
            Some(_) => {
                ", or, where it is, give it an advertise_addr that this host has (that of NAT is for \
                 advertise_addr_wan)"
            }
            None => "",
        };
        Some(format!(
            "Consul's agent isn't this host's ({why}): instances on loopback addresses are \
             unroutable; ask the agent of this host{fix}"
        ))
    }

    /// Sets for each instance whether it runs on this node.
    pub fn mark_local(&self, instances: &mut [Instance]) {
        for instance in instances {
            instance.local = match self {
                // The value that an earlier run found applies until the agent has answered.
                Node::Unknown => instance.local,
                Node::Named(agent) => agent.has(instance),
                Node::Elsewhere { .. } => false,
                Node::Denied(own) => instance.node_address.is_some_and(|node| own.has(node)),
            };
            instance.may_be_local = match self {
                Node::Unknown => instance.may_be_local,
                Node::Elsewhere { may_be_here: Some(agent), .. } => agent.has(instance),
                Node::Named(_) | Node::Elsewhere { .. } | Node::Denied(_) => false,
            };
        }
    }

    /// Whether an instance is unroutable that might be routable if the token could read the agent's
    /// node.
    pub fn is_needed(&self, instances: &[Instance]) -> bool {
        let Node::Denied(own) = self else { return false };
        instances.iter().filter(|instance| !instance.local).any(|instance| {
            instance.ip().is_some_and(|address| {
                address.is_loopback() || own.is_on_bridge(address, instance.node_address)
            })
        })
    }
}

/// The part of `/v1/agent/self` that has the node.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct AgentSelf {
    config: AgentConfig,
    #[serde(default)]
    member: Option<Member>,
    /// The agent's settings, without a promise of their form.
    #[serde(default)]
    debug_config: serde_json::Value,
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

impl AgentSelf {
    /// The node that this host is. The agent runs on this host where it was asked over a unix socket or
    /// at an address of this host (`peer`), and where its own address is one of this host: behind a
    /// tunnel, a proxy or a container's published port is another network namespace with another
    /// loopback. Behind NAT the agent may run on this host all the same, unless it listens at an address
    /// that this host has neither itself nor on a bridge, in a container.
    pub fn node(
        self,
        peer: Option<IpAddr>,
        is_own: impl Fn(IpAddr) -> bool,
        is_on_bridge: impl FnOnce(IpAddr) -> bool,
    ) -> Node {
        let bind = self.debug_config["BindAddr"].as_str().and_then(parse_ip);
        let bind = bind.filter(|bind| !bind.is_unspecified());
        let AgentConfig { node_name, node_id, datacenter, partition } = self.config;
        if let Some(peer) = peer.filter(|peer| !is_own(*peer)) {
            let why = format!("{peer}, where it is asked, is another host's");
            return Node::Elsewhere { why, may_be_here: None };
        }
        let text = |text: Option<String>| text.unwrap_or_default();
        let node_identity = NodeIdentity::new(&text(node_id), &text(datacenter), &text(partition));
        let named = Agent { name: node_name, node_identity };
        let address = self.member.and_then(|member| parse_ip(&member.addr?));
        let address = address.filter(|address| !address.is_unspecified());
        if let Some(address) = address.filter(|address| !is_own(*address)) {
            let is_elsewhere = bind.filter(|bind| !is_own(*bind) && !is_on_bridge(*bind));
            let (why, may_be_here) = match is_elsewhere {
                None => (format!("its advertise_addr, {address}, is none"), Some(named)),
                Some(bind) if bind == address => (format!("its address, {address}, is none"), None),
                Some(bind) => (
                    format!(
                        "neither its advertise_addr, {address}, nor its bind_addr, {bind}, is one"
                    ),
                    None,
                ),
            };
            return Node::Elsewhere { why: format!("{why} of this host's addresses"), may_be_here };
        }
        Node::Named(named)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_agent_of_this_host_names_the_node() {
        let is_own = |address: IpAddr| {
            address.is_loopback()
                || ["10.0.0.1", "fd00::1"].iter().any(|own| own.parse() == Ok(address))
        };
        // (where it is asked, its member's address, whether it is this host's)
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
            let member = member
                .map(|address| format!(r#","Member":{{"Addr":"{address}"}}"#))
                .unwrap_or_default();
            let json = format!(r#"{{"Config":{{"NodeName":"n1","NodeID":"9d75"}}{member}}}"#);
            let agent: AgentSelf = serde_json::from_str(&json).unwrap();
            let is_on_bridge = |_| panic!("no bind_addr is known");
            let got = agent.node(peer.map(|peer| peer.parse().unwrap()), is_own, is_on_bridge);
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
    /// Behind a proxy the agent may be anywhere, and its instances on bridges as well: an address that
    /// it listens at, and this host lacks, distinguishes that from NAT.
    #[test]
    fn an_agent_that_listens_elsewhere_is_not_behind_nat() {
        let is = |known: &'static str| move |address: IpAddr| address.to_string() == known;
        for (bind, may_be_here, expected) in [
            ("", true, "its advertise_addr, 192.0.2.7, is none of"),
            ("0.0.0.0", true, "its advertise_addr, 192.0.2.7, is none of"),
            ("::", true, "its advertise_addr, 192.0.2.7, is none of"),
            ("10.0.0.1", true, "its advertise_addr, 192.0.2.7, is none of"),
            ("172.17.0.2", true, "its advertise_addr, 192.0.2.7, is none of"),
            (
                "10.0.0.2",
                false,
                "neither its advertise_addr, 192.0.2.7, nor its bind_addr, 10.0.0.2",
            ),
            ("192.0.2.7", false, "its address, 192.0.2.7, is none of"),
            ("no address", true, "its advertise_addr, 192.0.2.7, is none of"),
        ] {
            let json = format!(
                r#"{{"Config":{{"NodeName":"n1"}},"Member":{{"Addr":"192.0.2.7"}},
                    "DebugConfig":{{"BindAddr":"{bind}"}}}}"#
            );
            let agent: AgentSelf = serde_json::from_str(&json).unwrap();
            let got = agent.node(None, is("10.0.0.1"), is("172.17.0.2"));
            let Node::Elsewhere { why, may_be_here: got } = got else { panic!("{bind}: {got:?}") };
            assert_eq!(got.is_some(), may_be_here, "{bind}");
            assert!(why.contains(expected), "{bind}: {why}");
        }
    }
}

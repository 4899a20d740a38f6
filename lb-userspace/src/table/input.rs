//! What a source of discovery says of one instance, before the table judges it.

use std::net::IpAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Says;

/// What a source says of one service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    /// Its instances, fit or not. What didn't change is the same allocation from one catalog to the
    /// next.
    pub instances: Arc<[Instance]>,
    /// Whether the source follows them.
    pub watch: Watch,
}

/// Whether a source follows the instances of a service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Watch {
    /// Every change arrives.
    #[default]
    Live,
    /// Nobody here used it lately, so what is known of it may be old, or nothing: a lookup or a connection
    /// makes it live.
    Cold,
}

/// One instance of a service, in the source's words.
///
/// The values are as the source gave them, in range or not: it is the table that says what can be
/// routed to, in one place and for all sources.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Instance {
    /// The node that the instance runs on; empty where the source knows of no nodes.
    pub node: String,
    /// The instance's name, unique within its node.
    pub id: String,
    /// An address, as text: IPv4, IPv6, a host name, or empty.
    pub address: String,
    /// The port; 1..=65535 is routable.
    pub port: i64,
    /// The weight, 1 by default.
    pub weight: i64,
    /// Whether the instance runs on this node, so that its loopback address is this host's.
    pub local: bool,
    /// What tells its node from others of the same name.
    #[serde(default)]
    pub home: Home,
    /// Its node's own address, where it is known: where that is on a bridge of this host, so is the
    /// instance.
    #[serde(default)]
    pub node_address: Option<IpAddr>,
    /// Whether it may run on this node, though that isn't certain enough for its loopback address.
    #[serde(default)]
    pub may_be_local: bool,
    /// Whether the source's own rules let it serve.
    pub standing: Standing,
    /// What it says of the service as a whole.
    pub says: Says,
}

/// What tells nodes of one name apart: checksums of the node's id, its datacenter and its admin
/// partition, since the texts would take more memory than the rest of an instance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Home {
    /// 0 where it isn't known.
    id: u32,
    /// 0 where it isn't known.
    datacenter: u32,
    /// 0 for the default one.
    partition: u32,
}

impl Home {
    /// That of a node; empty texts aren't known, and the empty partition is the default one.
    pub fn new(id: &str, datacenter: &str, partition: &str) -> Home {
        let sum = |text: &str| match text {
            "" => 0,
            text => crc32fast::hash(text.to_ascii_lowercase().as_bytes()).max(1),
        };
        let partition = if partition.eq_ignore_ascii_case("default") { "" } else { partition };
        Home { id: sum(id), datacenter: sum(datacenter), partition: sum(partition) }
    }

    /// Whether both can be the same node, where their names are the same.
    pub fn agrees_with(self, other: Home) -> bool {
        let agrees = |one: u32, other: u32| one == other || one == 0 || other == 0;
        agrees(self.id, other.id)
            && agrees(self.datacenter, other.datacenter)
            && self.partition == other.partition
    }
}

impl Instance {
    /// The address, where it is one rather than a name, as [`parse_ip`] reads it.
    pub fn ip(&self) -> Option<IpAddr> {
        parse_ip(&self.address)
    }
}

/// An IP address in a text: IPv4, or IPv6 with brackets or without. An IPv4-mapped one is the IPv4
/// address that it stands for; a zone is dropped, since it means something on its own node alone.
pub fn parse_ip(text: &str) -> Option<IpAddr> {
    let bracketed = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
    let without_zone = |text: &str| text.split('%').next().and_then(|ip| ip.parse().ok());
    let address = match (bracketed, text.parse()) {
        (None, Ok(IpAddr::V4(address))) => IpAddr::V4(address),
        (bracketed, _) => IpAddr::V6(without_zone(bracketed.unwrap_or(text))?),
    };
    Some(address.to_canonical())
}

/// A source's own verdict on an instance.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Standing {
    /// It may serve.
    Serving,
    /// It may serve, with the weight that it has for this (such as ``check `web` is warning``).
    Warning(String),
    /// It may not, for this reason (such as ``check `web` is critical``).
    Out(String),
}

impl Standing {
    /// Whether it may serve.
    pub fn serves(&self) -> bool {
        matches!(self, Standing::Serving | Standing::Warning(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_of_one_name_are_told_apart_by_what_both_say() {
        let here = Home::new("9D75-1", "dc1", "");
        // (id, datacenter, partition, whether it can be the same node)
        for (id, datacenter, partition, expected) in [
            ("9d75-1", "dc1", "", true),
            ("9d75-1", "dc1", "default", true),
            ("", "", "", true),
            ("", "dc1", "", true),
            ("9d75-1", "", "", true),
            ("9d75-2", "dc1", "", false),
            ("9d75-1", "dc2", "", false),
            ("", "dc2", "", false),
            ("9d75-1", "dc1", "team", false),
            ("", "", "team", false),
        ] {
            let other = Home::new(id, datacenter, partition);
            assert_eq!(here.agrees_with(other), expected, "{id} {datacenter} {partition}");
            assert_eq!(other.agrees_with(here), expected, "{id} {datacenter} {partition}");
        }
    }
}

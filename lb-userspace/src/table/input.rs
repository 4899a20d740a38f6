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
    /// Nobody here used it lately, so what is known of it may be old, or nothing: a lookup or a dial
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
    /// Whether the source's own rules let it serve.
    pub standing: Standing,
    /// What it says of the service as a whole.
    pub says: Says,
}

impl Instance {
    /// The address, where it is one rather than a name: IPv4, or IPv6 with brackets or without. An
    /// IPv4-mapped one is the IPv4 address that it stands for; a zone is dropped, since it means
    /// something on its own node alone.
    pub fn ip(&self) -> Option<IpAddr> {
        let text = self.address.as_str();
        let bracketed = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
        let without_zone = |text: &str| text.split('%').next().and_then(|ip| ip.parse().ok());
        let address = match (bracketed, text.parse()) {
            (None, Ok(IpAddr::V4(address))) => IpAddr::V4(address),
            (bracketed, _) => IpAddr::V6(without_zone(bracketed.unwrap_or(text))?),
        };
        Some(address.to_canonical())
    }
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

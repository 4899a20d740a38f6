//! What outlives one run of a source: its last good catalog, and how old each part of it is.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::table::{Instance, NodeIdentity};

/// What a source knew, for the next one to begin with.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SavedCatalog {
    /// Whom it asked, and for what. Of another origin only the uses count.
    pub origin: String,
    /// Which node this is, where the source has it.
    pub agent: Option<Agent>,
    /// Whether nothing was to be translated.
    pub off: bool,
    /// When the list of names was answered last; `None` where it never was.
    pub names_at: Option<Instant>,
    /// Whether that answer left something out for the token's sake.
    pub names_filtered: bool,
    /// The index of the list of names that was applied last; 0 for none.
    pub names_index: u64,
    /// Whether that list had Consul's own service.
    pub lists_consul: bool,
    /// Every known name, and what is known of it.
    pub services: BTreeMap<Arc<str>, SavedService>,
}

/// The node whose agent is asked, where that agent is this host's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agent {
    /// The node's name.
    pub name: String,
    /// What tells it from others of the same name.
    #[serde(rename = "home")]
    pub node_identity: NodeIdentity,
}

impl Agent {
    /// Whether the instance runs on this node.
    pub fn has(&self, instance: &Instance) -> bool {
        self.name == instance.node && self.node_identity.agrees_with(instance.node_identity)
    }
}

#[cfg(test)]
impl From<&str> for Agent {
    fn from(name: &str) -> Agent {
        Agent { name: name.into(), node_identity: NodeIdentity::default() }
    }
}

/// What is remembered of one service.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SavedService {
    /// Its instances; none where they were never known.
    pub instances: Arc<[Instance]>,
    /// When the source last answered for them.
    pub answered_at: Option<Instant>,
    /// Whether the answer that brought them left something out for the token's sake.
    pub filtered: bool,
    /// The index of that answer; 0 for none.
    pub index: u64,
    /// Whether the list of names lacked the service.
    pub unlisted: bool,
    /// When somebody on this node last used it.
    pub used_at: Option<Instant>,
}

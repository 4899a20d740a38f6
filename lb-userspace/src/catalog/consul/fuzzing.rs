//! Parsing of Consul's responses, for fuzzers.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::health::{self, Records};
use super::query::{ServiceTags, tagged};
use crate::config::Config;
use crate::table::Instance;

/// The services in a response: the names of a list without instances, or the instances of one service as
/// `web`.
pub fn read(body: &[u8]) -> BTreeMap<Arc<str>, Vec<Instance>> {
    let rules = Config::default().catalog;
    if let Ok(names) = serde_json::from_slice::<ServiceTags>(body) {
        return tagged(names, &rules.tag)
            .tagged
            .into_iter()
            .map(|name| (name, Vec::new()))
            .collect();
    }
    let records = serde_json::from_slice(body).map_or_else(|_| Vec::new(), |Records(all)| all);
    let instances = health::instances(records, &rules).unwrap_or_default();
    BTreeMap::from([("web".into(), instances)])
}

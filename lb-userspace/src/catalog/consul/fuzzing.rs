//! Answers of Consul, for fuzzers.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::health::{self, Records};
use super::query::{Names, tagged};
use crate::config::Config;
use crate::table::Instance;

/// The services of an answer: of a list of names without their instances, of the instances of one
/// under the name `web`.
pub fn read(body: &[u8]) -> BTreeMap<Arc<str>, Vec<Instance>> {
    let rules = Config::default().catalog;
    if let Ok(names) = serde_json::from_slice::<Names>(body) {
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

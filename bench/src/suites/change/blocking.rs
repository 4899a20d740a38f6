//! Consul's blocking queries.

use std::collections::BTreeMap;
use std::net::SocketAddrV4;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;
use ureq::Agent;

/// Consul's HTTP interface.
const CONSUL: &str = "http://127.0.0.1:8500";

/// How long an answer may take: the requested wait, and the sixteenth part that Consul adds.
const PATIENCE: Duration = Duration::from_secs(70);

/// A service's instances that pass their checks, by id.
pub type Instances = BTreeMap<String, SocketAddrV4>;

/// Requests a service repeatedly, each time what is newer than the answer before.
pub struct Blocking {
    service: String,
    index: u64,
    /// Keeps the connection.
    agent: Agent,
}

impl Blocking {
    /// Of this service.
    pub fn new(service: &str) -> Blocking {
        let agent = Agent::config_builder().timeout_global(Some(PATIENCE)).build().new_agent();
        Blocking { service: service.into(), index: 0, agent }
    }

    /// The instances, at once the first time, later once they have changed or a minute has passed.
    ///
    /// # Errors
    /// When Consul doesn't answer with 200.
    pub fn next(&mut self) -> Result<Instances> {
        let Blocking { service, index, agent } = self;
        let path = format!("/v1/health/service/{service}?passing=1&index={index}&wait=60s");
        let mut answer =
            agent.get(format!("{CONSUL}{path}")).call().with_context(|| path.clone())?;
        let newer = answer.headers().get("X-Consul-Index").and_then(|value| value.to_str().ok());
        let newer: u64 = newer.context("no X-Consul-Index")?.parse().context("X-Consul-Index")?;
        // An index that goes back, or is 0, means to start over.
        *index = if newer < *index { 0 } else { newer.max(1) };
        instances(&serde_json::from_str(&answer.body_mut().read_to_string()?).context(path)?)
    }
}

fn instances(body: &Value) -> Result<Instances> {
    let entries = body.as_array().context("Consul's answer is no list")?;
    let instance = |entry: &Value| -> Option<(String, SocketAddrV4)> {
        let service = &entry["Service"];
        let port = service["Port"].as_u64()?.try_into().ok()?;
        let address = service["Address"].as_str()?.parse().ok()?;
        Some((service["ID"].as_str()?.to_owned(), SocketAddrV4::new(address, port)))
    };
    let read = |entry| instance(entry).with_context(|| format!("no instance: {entry}"));
    entries.iter().map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instances_by_id() {
        let body = serde_json::json!([
            { "Node": {}, "Service": { "ID": "a", "Address": "10.98.1.0", "Port": 8080 } },
            { "Service": { "ID": "b", "Address": "10.98.1.1", "Port": 1 } },
        ]);
        let read = instances(&body).expect("it can be read");
        let read: Vec<String> = read.iter().map(|(id, at)| format!("{id} {at}")).collect();
        assert_eq!(read, ["a 10.98.1.0:8080", "b 10.98.1.1:1"]);
        for wrong in [serde_json::json!({}), serde_json::json!([{ "Service": { "ID": "a" } }])] {
            assert!(instances(&wrong).is_err(), "{wrong}");
        }
    }
}

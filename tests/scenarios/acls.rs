//! ACLs: a token that sees too little shows less, which is a fact to report; one that is revoked takes
//! nothing away; a new one in its file counts without a restart.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use testbed::consul::{Consul, instance};
use testbed::nohop::n_healthy;
use testbed::tempdir::TempDir;

use crate::ha_cluster::{HaCluster, Setup, is_failing, is_live};

/// The token of the agents and of this scenario.
const ROOT: &str = "5ca1ab1e-0000-4000-8000-000000000001";

const ALL: &str = r#"service_prefix "" { policy = "read" } node_prefix "" { policy = "read" }
    agent_prefix "" { policy = "read" } key_prefix "nohop/" { policy = "read" }"#;
const NARROW: &str = r#"service "helloworld" { policy = "read" } node_prefix "" { policy = "read" }
    agent_prefix "" { policy = "read" }"#;

pub fn run() -> Result<()> {
    let tempdir = TempDir::new("token")?;
    let file = tempdir.path().join("token");
    let setup = setup(&file);
    let mut narrow_id = String::new();
    let mut cluster = HaCluster::with(&setup, |consul| {
        let (accessor, secret) = token(consul, "narrow", NARROW)?;
        narrow_id = accessor;
        fs::write(&file, secret).context("write the token")
    })?;
    // What the token may not see isn't there.
    let hidden = cluster.nodes.helloworld("hidden-0")?;
    cluster.backend_agent.register(&instance("hidden", "hidden-0", hidden.address))?;
    cluster.assert_no_failures(|cluster, load| {
        load.wait_until_second(1)?;
        let answer = cluster.nodes.dig_unknown("@127.0.0.1 +noall +comments hidden.service")?;
        ensure!(answer.contains("NXDOMAIN"), "{answer}");
        let facts = cluster.nohop.status()?["sources"][0]["facts"].to_string();
        ensure!(facts.contains("key:read"), "{facts}");

        // Revoked.
        let server = &cluster.servers[0];
        server.delete(&format!("/v1/acl/token/{narrow_id}"))?;
        // Earlier blocking queries still wait.
        cluster.backend_agent.deregister("hidden-0")?;
        cluster.backend_agent.register(&instance("hidden", "hidden-0", hidden.address))?;
        cluster.nohop.wait_for_status(is_failing)?;
        let status = cluster.nohop.status()?;
        ensure!(status["ready"] == true, "{status:#}");
        let problems = status["problems"].to_string();
        ensure!(problems.contains("403"), "{problems}");
        ensure!(n_healthy(&cluster.nohop.services()?, "helloworld") == 2);

        // Another one, which sees everything.
        let (_, secret) = token(server, "wide", ALL)?;
        fs::write(&file, secret).context("write the token")?;
        cluster.nohop.wait_for_status(is_live)?;
        cluster.nohop.wait_for_backends("hidden", 1)?;
        cluster.expect_update("newcomer-1")
    })
}

/// The rules of one token change, and nothing else does: Consul's indexes stand still (consul#5651).
/// Services that it may not read any more keep serving, and are reported; newly readable ones appear.
pub fn policies() -> Result<()> {
    let tempdir = TempDir::new("token")?;
    let file = tempdir.path().join("token");
    let mut policy_id = String::new();
    let mut cluster = HaCluster::with(&setup(&file), |consul| {
        let (_, secret) = token(consul, "changing", NARROW)?;
        let policies = consul.get("/v1/acl/policies")?;
        let mut policies = policies.as_array().into_iter().flatten();
        let changing = policies.find(|policy| policy["Name"] == "changing");
        let id = changing.and_then(|policy| policy["ID"].as_str());
        policy_id = id.context("no policy `changing`")?.to_owned();
        fs::write(&file, secret).context("write the token")
    })?;
    let hidden = cluster.nodes.helloworld("hidden-0")?;
    cluster.backend_agent.register(&instance("hidden", "hidden-0", hidden.address))?;
    let rules = |cluster: &HaCluster, rules: &str| {
        let policy = json!({ "ID": policy_id, "Name": "changing", "Rules": rules });
        cluster.servers[0].put(&format!("/v1/acl/policy/{policy_id}"), &policy)
    };
    cluster.assert_no_failures(|cluster, _| {
        // Another service becomes visible, without a DNS query, which would look it up.
        rules(cluster, ALL)?;
        let has_hidden = |services: &Value| n_healthy(services, "hidden") == 1;
        cluster.nohop.wait_until(has_hidden)?;

        // A query waits no longer than its source has run, so a young daemon notices the next change soon.
        cluster.nohop.kill()?;
        cluster.nohop.start_again()?;
        cluster.nohop.wait_for_status(is_live)?;

        // Nodes become invisible, and with them all instances.
        rules(cluster, r#"service_prefix "" { policy = "read" }"#)?;
        let lacks = |status: &Value| status["problems"].to_string().contains("answers lack");
        let status = cluster.nohop.wait_for_status(lacks)?;
        ensure!(status["ready"] == true, "{status:#}");
        let services = cluster.nohop.services()?;
        ensure!(n_healthy(&services, "helloworld") == 2 && has_hidden(&services), "{services:#}");

        rules(cluster, ALL)?;
        cluster.nohop.wait_for_status(|status| !lacks(status) && is_live(status))?;
        cluster.expect_update("newcomer-1")
    })
}

/// A cluster with ACLs, and nohop with the token in `file`.
fn setup(file: &Path) -> Setup {
    Setup {
        consul: json!({ "acl": {
            "enabled": true,
            "default_policy": "deny",
            "down_policy": "extend-cache",
            "token_ttl": "1s",
            "policy_ttl": "1s",
            "tokens": { "master": ROOT, "agent": ROOT },
        }}),
        agent: Value::Null,
        token: Some(ROOT.into()),
        nohop: format!("consul.token_file = {file:?}\n"),
    }
}

/// Makes a token with these rules. Returns its accessor's id, and the secret.
fn token(consul: &Consul, name: &str, rules: &str) -> Result<(String, String)> {
    // Servers begin with the ACLs of before 1.4 (`legacy`), until each knows that all can do without.
    let is_enabled = |agent: &Value| agent["Stats"]["consul"]["acl"] == "enabled";
    consul.wait_for("/v1/agent/self", is_enabled)?;
    let made = consul.put_for("/v1/acl/policy", &json!({ "Name": name, "Rules": rules }))?;
    let policy = json!({ "Policies": [{ "ID": made["ID"] }] });
    let token = consul.put_for("/v1/acl/token", &policy)?;
    let text = |key: &str| token[key].as_str().map(String::from).context(format!("{token:#}"));
    Ok((text("AccessorID")?, text("SecretID")?))
}

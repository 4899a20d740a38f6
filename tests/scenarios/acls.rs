//! ACLs: a token that sees too little shows less, which is a fact to report; one that is revoked takes
//! nothing away; a new one in its file counts without a restart.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use lb_tests::consul::{Consul, instance};
use lb_tests::nohop::n_healthy;
use lb_tests::tempdir::Scratch;
use serde_json::{Value, json};

use crate::ha_cluster::{Servers, Setup, is_failing, is_live};

/// The token of the agents and of this story.
const ROOT: &str = "5ca1ab1e-0000-4000-8000-000000000001";

const ALL: &str = r#"service_prefix "" { policy = "read" } node_prefix "" { policy = "read" }
    agent_prefix "" { policy = "read" } key_prefix "nohop/" { policy = "read" }"#;
const NARROW: &str = r#"service "helloworld" { policy = "read" } node_prefix "" { policy = "read" }
    agent_prefix "" { policy = "read" }"#;

pub fn story() -> Result<()> {
    let scratch = Scratch::new("token")?;
    let file = scratch.path().join("token");
    let setup = setup(&file);
    let mut narrow_id = String::new();
    let mut servers = Servers::with(&setup, |consul| {
        let (accessor, secret) = token(consul, "narrow", NARROW)?;
        narrow_id = accessor;
        fs::write(&file, secret).context("write the token")
    })?;
    // What the token may not see isn't there.
    let hidden = servers.nodes.helloworld("hidden-0")?;
    servers.backend_agent.register(&instance("hidden", "hidden-0", hidden.address))?;
    servers.none_lost(|servers, load| {
        load.wait_until_second(1)?;
        let answer = servers.nodes.dig("@127.0.0.1 +noall +comments hidden.service")?;
        ensure!(answer.contains("NXDOMAIN"), "{answer}");
        let facts = servers.nohop.status()?["sources"][0]["facts"].to_string();
        ensure!(facts.contains("key:read"), "{facts}");

        // Revoked.
        let server = &servers.servers[0];
        server.delete(&format!("/v1/acl/token/{narrow_id}"))?;
        // Questions that were asked before wait for news.
        servers.backend_agent.deregister("hidden-0")?;
        servers.backend_agent.register(&instance("hidden", "hidden-0", hidden.address))?;
        servers.nohop.wait_for_status(is_failing)?;
        let status = servers.nohop.status()?;
        ensure!(status["ready"] == true, "{status:#}");
        let problems = status["problems"].to_string();
        ensure!(problems.contains("403"), "{problems}");
        ensure!(n_healthy(&servers.nohop.services()?, "helloworld") == 2);

        // Another one, which sees everything.
        let (_, secret) = token(server, "wide", ALL)?;
        fs::write(&file, secret).context("write the token")?;
        servers.nohop.wait_for_status(is_live)?;
        servers.nohop.wait_for_backends("hidden", 1)?;
        servers.news_arrive("newcomer-1")
    })
}

/// The rules of one token change, and nothing else does: Consul's indexes stand still (consul#5651).
/// What it may read no more goes on serving, and is told; what it may read from then on is there.
pub fn policies() -> Result<()> {
    let scratch = Scratch::new("token")?;
    let file = scratch.path().join("token");
    let mut policy_id = String::new();
    let mut servers = Servers::with(&setup(&file), |consul| {
        let (_, secret) = token(consul, "changing", NARROW)?;
        let policies = consul.get("/v1/acl/policies")?;
        let mut policies = policies.as_array().into_iter().flatten();
        let changing = policies.find(|policy| policy["Name"] == "changing");
        let id = changing.and_then(|policy| policy["ID"].as_str());
        policy_id = id.context("no policy `changing`")?.to_owned();
        fs::write(&file, secret).context("write the token")
    })?;
    let hidden = servers.nodes.helloworld("hidden-0")?;
    servers.backend_agent.register(&instance("hidden", "hidden-0", hidden.address))?;
    let rules = |servers: &Servers, rules: &str| {
        let policy = json!({ "ID": policy_id, "Name": "changing", "Rules": rules });
        servers.servers[0].put(&format!("/v1/acl/policy/{policy_id}"), &policy)
    };
    servers.none_lost(|servers, _| {
        // Another service becomes visible. Nobody asks DNS for it, which would have it looked up.
        rules(servers, ALL)?;
        let has_hidden = |services: &Value| n_healthy(services, "hidden") == 1;
        servers.nohop.wait_until(has_hidden)?;

        // Nodes become invisible, and with them all instances.
        rules(servers, r#"service_prefix "" { policy = "read" }"#)?;
        let lacks = |status: &Value| status["problems"].to_string().contains("answers lack");
        let status = servers.nohop.wait_for_status(lacks)?;
        ensure!(status["ready"] == true, "{status:#}");
        let services = servers.nohop.services()?;
        ensure!(n_healthy(&services, "helloworld") == 2 && has_hidden(&services), "{services:#}");

        rules(servers, ALL)?;
        servers.nohop.wait_for_status(|status| !lacks(status) && is_live(status))?;
        servers.news_arrive("newcomer-1")
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
    let made = consul.put_for("/v1/acl/policy", &json!({ "Name": name, "Rules": rules }))?;
    let policy = json!({ "Policies": [{ "ID": made["ID"] }] });
    let token = consul.put_for("/v1/acl/token", &policy)?;
    let text = |key: &str| token[key].as_str().map(String::from).context(format!("{token:#}"));
    Ok((text("AccessorID")?, text("SecretID")?))
}

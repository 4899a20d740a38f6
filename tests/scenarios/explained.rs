//! `nohop explain`: each check with its output, a name without the tag, a VIP, and the address of an
//! instance.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use testbed::consul::instance;

use crate::cluster::{BACKEND, Cluster};

pub fn run() -> Result<()> {
    let cluster = Cluster::new(2)?;
    let (nohop, server) = (&cluster.nohop, &cluster.server);
    let vip = cluster.vip("helloworld")?;
    server.put(
        "/v1/agent/check/update/service:helloworld-1",
        &json!({ "Status": "critical", "Output": "disk full \u{1b}[2J\nsecond line" }),
    )?;
    nohop.wait_for_backends("helloworld", 1)?;

    // By its name, and by its VIP.
    for what in ["helloworld".to_owned(), vip.to_string(), vip.ip().to_string()] {
        let explanation = nohop.explain(&what)?;
        ensure!(explanation["name"] == "helloworld", "{explanation:#}");
        let healthy = of(&explanation, "helloworld-0")?;
        ensure!(healthy["state"] == "healthy", "{explanation:#}");
        ensure!(statuses(healthy).iter().all(|status| *status == "passing"), "{explanation:#}");
        let critical = of(&explanation, "helloworld-1")?;
        ensure!(critical["state"] == "out", "{explanation:#}");
        let reason = critical["reason"].to_string();
        ensure!(reason.contains("is critical"), "{explanation:#}");
        let mut checks = critical["checks"].as_array().into_iter().flatten();
        let check = checks.find(|check| check["status"] == "critical").context("no check")?;
        ensure!(check["output"] == r"disk full \u{1b}[2J", "{explanation:#}");
    }
    let text = cli(&cluster, "helloworld", 0)?;
    ensure!(text.contains(r"critical: disk full \u{1b}[2J") && !text.contains("second"), "{text}");
    let other_port = nohop.explain(&format!("{}:81", vip.ip()))?;
    let connect = other_port["connect"].to_string();
    ensure!(connect.contains(":81 is refused with ECONNREFUSED"), "{other_port:#}");
    for (what, expected) in [
        ("helloworld:80", "at port 80 by TCP goes to its one healthy backend"),
        ("helloworld.service:81", "helloworld.service:81 is refused with ECONNREFUSED"),
    ] {
        let text = cli(&cluster, what, 0)?;
        ensure!(text.contains(expected) && text.contains("helloworld-0"), "{what}: {text}");
    }

    // A name without the tag, and one that Consul doesn't have.
    let mut untagged = instance("plain", "plain-1", cluster.helloworlds[0].address);
    untagged["Tags"] = json!(["blue"]);
    server.register(&untagged)?;
    server.wait_for("/v1/health/service/plain", |all| {
        all.as_array().is_some_and(|all| all.len() == 1)
    })?;
    let text = cli(&cluster, "plain", 1)?;
    let note = "Consul has `plain` with 1 instance, none with the tag `routed`: add it to the tags";
    ensure!(text.contains(note) && text.contains("lacks the tag `routed`"), "{text}");
    ensure!(nohop.explain("plain")?["service"].is_null());
    let text = cli(&cluster, "nothing", 1)?;
    ensure!(text.contains("Consul has no service `nothing`"), "{text}");

    // By the address of instances, in or out.
    let [first, second] = &cluster.helloworlds[..] else { unreachable!("there are two") };
    let at = nohop.explain(&first.address.to_string())?;
    ensure!(ids(&at) == ["helloworld-0"] && at["service"].is_null(), "{at:#}");
    let at = nohop.explain(BACKEND)?;
    ensure!(ids(&at) == ["helloworld-0", "helloworld-1"], "{at:#}");
    cli(&cluster, &first.address.to_string(), 0)?;
    let text = cli(&cluster, &second.address.to_string(), 1)?;
    ensure!(text.contains("is the address of an instance of `helloworld`"), "{text}");
    let text = cli(&cluster, "10.9.9.9:80", 1)?;
    ensure!(text.contains("no service has an instance there: `nohop services` lists"), "{text}");
    Ok(())
}

/// What the command prints; it has to exit with this code.
fn cli(cluster: &Cluster, what: &str, code: i32) -> Result<String> {
    let output = cluster.nohop.cli(&format!("explain {what}"))?;
    ensure!(output.status.code() == Some(code), "explain {what}: {output:?}");
    Ok(String::from_utf8(output.stdout)?)
}

fn instances(explanation: &Value) -> impl Iterator<Item = &Value> {
    explanation["instances"].as_array().into_iter().flatten()
}

fn of<'a>(explanation: &'a Value, id: &str) -> Result<&'a Value> {
    let found = instances(explanation).find(|it| it["instance"] == id);
    found.with_context(|| format!("no {id} in {explanation:#}"))
}

fn ids(explanation: &Value) -> Vec<&str> {
    instances(explanation).filter_map(|it| it["instance"].as_str()).collect()
}

fn statuses(instance: &Value) -> Vec<&str> {
    let checks = instance["checks"].as_array().into_iter().flatten();
    checks.filter_map(|check| check["status"].as_str()).collect()
}

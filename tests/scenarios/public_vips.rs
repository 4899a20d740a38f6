//! Public VIPs as services declare them in Consul: a process on a node reaches a backend by them, and of
//! two services that declare one the older registration has it.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use testbed::consul::instance;
use testbed::nohop::service;

use crate::cluster::Cluster;

const CONFIG: &str = "vip.public = [\"203.0.113.0/24\"]\n";

/// The public addresses of a service.
fn public<'a>(services: &'a Value, name: &str) -> Option<&'a Value> {
    Some(&service(services, name)?["public"])
}

pub fn run() -> Result<()> {
    let mut cluster = Cluster::with_config(1, CONFIG)?;
    let helloworld = cluster.helloworlds[0].address;
    let register = |cluster: &Cluster, name: &str, public: &str| {
        let mut registration = instance(name, &format!("{name}-0"), helloworld);
        registration["Meta"] = json!({ "nohop-public": public });
        cluster.server.register(&registration)
    };
    register(&cluster, "helloworld", "203.0.113.10:8080,10.99.0.2:22")?;
    let is_public =
        |services: &Value| public(services, "helloworld") == Some(&json!(["203.0.113.10:8080"]));
    cluster.nohop.wait_until(is_public)?;

    let inside = cluster.nodes.inside();
    let curl = |url: &str| inside.run("curl", &format!("-sS --max-time 60 {url}"));
    let answer = curl("http://203.0.113.10:8080/")?;
    ensure!(answer.contains("hello from helloworld-0"), "{answer}");
    // What no service has passes, to no route at all here.
    let error = curl("http://203.0.113.11:8080/").err().context("another address is reached")?;
    ensure!(!format!("{error:#}").contains("refused"), "{error:#}");
    let explained = cluster.nohop.explain("203.0.113.10:8080")?;
    ensure!(explained["name"] == "helloworld", "{explained:#}");
    let note = "its public address 10.99.0.2:22 is ignored: it lies in no network of vip.public";
    ensure!(explained["service"]["notes"].to_string().contains(note), "{explained:#}");

    // The one that came later gets it once the first gives it up.
    register(&cluster, "another", "203.0.113.10:8080")?;
    let note = "its public address 203.0.113.10:8080 is ignored: `helloworld` has it, whose \
                registration is older";
    let is_told = |explained: &Value| explained["service"]["notes"].to_string().contains(note);
    cluster.nohop.wait_until_explained("another", is_told)?;
    cluster.server.register(&instance("helloworld", "helloworld-0", helloworld))?;
    let services = cluster.nohop.wait_until(|services| {
        public(services, "another") == Some(&json!(["203.0.113.10:8080"]))
    })?;
    ensure!(public(&services, "helloworld") == Some(&json!([])), "{services:#}");
    cluster.nodes.inside().run("curl", "-sS --max-time 60 http://203.0.113.10:8080/")?;

    // This node is no edge, so none asks it for flows or announces anything.
    let nohop = &mut cluster.nohop;
    ensure!(nohop.status()?["edge"].is_null());
    ensure!(!nohop.cli("flows")?.status.success());
    Ok(())
}

//! An operator drains what a node of its own is about to lose: an instance, an address, a node. New
//! connections from here avoid it at once, also after a restart, until it is undrained.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::nohop::{Nohop, service};

use crate::cluster::Cluster;
use crate::load::{RATE, under_load};

/// The backends of a service that are in this state, by instance.
fn in_state(services: &Value, name: &str, state: &str) -> Vec<String> {
    let backends = service(services, name).and_then(|service| service["backends"].as_array());
    let backends = backends.into_iter().flatten().filter(|backend| backend["state"] == state);
    backends.map(|backend| backend["instance"].as_str().unwrap_or_default().to_owned()).collect()
}

/// What a command prints, where it exits with this code.
fn cli(nohop: &Nohop, arguments: &str, code: i32) -> Result<String> {
    let output = nohop.cli(arguments)?;
    let [stdout, stderr] = [output.stdout, output.stderr].map(String::from_utf8);
    let text = stdout? + &stderr?;
    ensure!(output.status.code() == Some(code), "nohop {arguments}: {}: {text}", output.status);
    Ok(text)
}

pub fn by_hand() -> Result<()> {
    let mut cluster = Cluster::new(3)?;
    let vip = cluster.vip("helloworld")?;
    let nohop = &cluster.nohop;
    under_load(&cluster.nodes, vip, RATE, |load| {
        load.wait_until_second(1)?;
        let text = cli(nohop, "drain helloworld-0", 0)?;
        let expected = "instance backend/helloworld-0 is drained: 1 backend of 1 service get no new \
                        connections from here\n";
        ensure!(text == expected, "{text}");
        let drained = in_state(&nohop.services()?, "helloworld", "draining");
        ensure!(drained == ["helloworld-0"], "{drained:?}");
        let connects = cluster.nodes.connect(vip, 100)?;
        let avoids = |answer: &str| answer != "hello from helloworld-0";
        ensure!(connects.all_answered(avoids), "{connects:?}");
        load.wait_until_second(2)
    })?;

    // Twice is no mistake; what is unknown or ambiguous changes nothing.
    let again = cli(nohop, "drain backend/helloworld-0", 0)?;
    ensure!(again.contains("is drained already, since 20"), "{again}");
    let unknown = cli(nohop, "drain helloworld-9", 1)?;
    ensure!(unknown.contains("the closest names are `instance:backend/helloworld-"), "{unknown}");
    let unknown = cli(nohop, "undrain helloworld-9", 1)?;
    ensure!(unknown.contains("3 instances on 1 nodes are known"), "{unknown}");
    ensure!(cli(nohop, "drain edge", 1)?.contains("this node is no edge"));
    ensure!(cli(nohop, "undrain helloworld-1", 0)?.ends_with("helloworld-1 isn't drained\n"));
    ensure!(nohop.status()?["drains"] == 1);

    // The next daemon has it in its first table.
    let explained = nohop.explain("helloworld")?;
    let reason = |explained: &Value| -> Result<String> {
        let backends = explained["service"]["backends"].as_array().context("backends")?;
        let drained = backends.iter().find(|backend| backend["state"] == "draining");
        Ok(drained.context("none is draining")?["reason"].to_string())
    };
    let before = reason(&explained)?;
    ensure!(before.contains("drained by hand since 20"), "{before}");
    nohop.kill()?;
    cluster.nohop.start_again()?;
    let nohop = &cluster.nohop;
    ensure!(reason(&nohop.explain("helloworld")?)? == before);
    let connects = cluster.nodes.connect(vip, 100)?;
    ensure!(connects.all_answered(|answer| answer != "hello from helloworld-0"), "{connects:?}");

    // A whole node, though nothing is left then.
    let node = cli(nohop, "drain backend", 0)?;
    ensure!(node.contains("warning: helloworld has no backend left here"), "{node}");
    let connects = cluster.nodes.connect(vip, 10)?;
    ensure!(connects.all_failed_with("ConnectionRefused"), "{connects:?}");
    let listed: Value = serde_json::from_str(&cli(nohop, "drain --json", 0)?)?;
    let of = |nth: usize| (&listed[nth]["kind"], &listed[nth]["name"], &listed[nth]["backends"]);
    ensure!(of(0) == (&"node".into(), &"backend".into(), &3.into()), "{listed:#}");
    ensure!(of(1).1 == "backend/helloworld-0", "{listed:#}");

    let still = cli(nohop, "undrain helloworld-0", 0)?;
    ensure!(still.contains("is still drained, by node:backend"), "{still}");
    cli(nohop, "undrain node:backend", 0)?;
    ensure!(cli(nohop, "drain", 0)? == "nothing is drained by hand\n");
    let connects = cluster.nodes.connect(vip, 100)?;
    ensure!(connects.errors.is_empty() && connects.answers.len() == 3, "{connects:?}");

    // By address and port.
    let address = cluster.helloworlds[1].address;
    cli(nohop, &format!("drain {address}"), 0)?;
    let drained = in_state(&nohop.services()?, "helloworld", "draining");
    ensure!(drained == ["helloworld-1"], "{drained:?}");
    Ok(())
}

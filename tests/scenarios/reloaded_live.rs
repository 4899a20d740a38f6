//! The configuration is edited while the daemon runs and a client opens connections: what can
//! change does, without a lost connection, what can't keeps all of it back, and a file with
//! mistakes changes nothing. The metrics show it all.

use std::process::Output;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use testbed::nohop::Nohop;

use crate::cluster::{Catalog, Nodes, vip};
use crate::load::{RATE, under_load};

pub fn run() -> Result<()> {
    let nodes = Nodes::new()?;
    let (one, two) = (nodes.helloworld("1")?, nodes.helloworld("2")?);
    let both = [one.address, two.address];
    let first = Catalog::new(&[("helloworld", &both)])?;
    let second = Catalog::new(&[("helloworld", &both), ("second", &both[1..])])?;
    let nohop = nodes.nohop(&first.config())?;
    let vip = vip(&nohop, "helloworld")?;

    let outcome = under_load(&nodes, vip, RATE, |load| {
        load.wait_until_second(2)?;
        nohop.configure(&(second.config() + "dns.ttl = 7\nvip.ports = [80, 8080]\n"))?;
        let (code, text) = outcome_of(&nohop.cli("reload")?);
        ensure!(code == Some(0), "{text}");
        for part in ["dns.ttl: 30 -> 7", "vip.ports: [80] -> [80, 8080]", "catalog.file: "] {
            ensure!(text.contains(part), "no {part:?} in:\n{text}");
        }
        nohop.wait_for_backends("second", 1).map(drop)
    })?;
    ensure!(crate::cluster::vip(&nohop, "helloworld")? == vip);
    ensure!(nodes.curl("second")? == "hello from 2\n");
    let new_port = nodes.inside().run("curl", "-sS --max-time 60 http://second.service:8080/")?;
    ensure!(new_port == "hello from 2\n", "{new_port}");
    ensure!(ttl(&nodes)? == "7");

    nohop.configure(&(second.config() + "dns.ttl = 9\ndatapath.max_services = 7\n"))?;
    let (code, text) = outcome_of(&nohop.cli("reload")?);
    ensure!(code == Some(1) && text.contains("datapath.max_services: 16384 -> 7 needs"), "{text}");
    nohop.configure(&(second.config() + "dns.ttl = 9\ndns.tll = 9\nvip.ports = [0]\n"))?;
    let (code, text) = outcome_of(&nohop.cli("reload")?);
    ensure!(code == Some(2) && text.contains("nothing was changed"), "{text}");
    for part in [": dns.tll: unknown key; did you mean dns.ttl?", ": vip.ports: ", "nohop.toml:"] {
        ensure!(text.contains(part), "no {part:?} in:\n{text}");
    }
    ensure!(ttl(&nodes)? == "7", "a refused reload changes nothing");

    nohop.configure(&(second.config() + "dns.ttl = 9\nvip.ports = [80, 8080]\n"))?;
    nohop.process.signal(Signal::HUP)?;
    nohop.process.wait_for_line(&["reload: dns.ttl: 7 -> 9"])?;
    ensure!(ttl(&nodes)? == "9");

    let metrics = metrics(&nodes, &nohop)?;
    let value = |sample: &str| -> Result<f64> {
        let line = metrics.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
        line.with_context(|| format!("no {sample} in:\n{metrics}"))?.parse().context("a number")
    };
    for sample in ["nohop_ready", "nohop_datapath_attached{unit=\"connect\"}"] {
        ensure!(value(sample)? == 1.0, "{sample}");
    }
    ensure!(value("nohop_connects_total{service=\"helloworld\"}")? >= outcome.n_requests as f64);
    ensure!(value("nohop_propagation_seconds_count")? >= 2.0);
    ensure!(value("nohop_dns_queries_total{rcode=\"NOERROR\"}")? >= 3.0);
    ensure!(value("nohop_map_entries{map=\"SERVICES\"}")? == 2.0);
    ensure!(value("nohop_vip_pool_addresses{state=\"used\"}")? == 2.0);
    Ok(())
}

/// A command's exit code, and its output on both streams.
fn outcome_of(output: &Output) -> (Option<i32>, String) {
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    (output.status.code(), String::from_utf8_lossy(&text).into_owned())
}

fn ttl(nodes: &Nodes) -> Result<String> {
    let answer = nodes.dig("@127.0.0.1 helloworld.service A +noall +answer +nottlunits")?;
    Ok(answer.split_whitespace().nth(1).unwrap_or_default().to_owned())
}

/// What a scrape gets.
fn metrics(nodes: &Nodes, nohop: &Nohop) -> Result<String> {
    let socket = nohop.admin().replace("unix:", "");
    nodes.client.outside().run("curl", &format!("-sS --unix-socket {socket} http://nohop/metrics"))
}

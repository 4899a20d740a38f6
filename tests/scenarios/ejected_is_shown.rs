//! A backend dies unannounced: its refusals eject it in the kernel, and the daemon shows that. Once it
//! listens again, the daemon's probe ends the ejection, long before its time is over.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::helloworld::Helloworld;
use testbed::{TIMEOUT, http};

use crate::cluster::{Catalog, Nodes, vip};

pub fn run() -> Result<()> {
    let nodes = Nodes::new()?;
    let (one, two) = (nodes.helloworld("one")?, nodes.helloworld("two")?);
    let catalog = Catalog::new(&[("helloworld", &[one.address, two.address])])?;
    let config = catalog.config() + "balance.eject = { base = \"5m\" }\n";
    let nohop = nodes.nohop(&config)?;
    nohop.wait_for_backends("helloworld", 2)?;
    let vip = vip(&nohop, "helloworld")?;
    let address = two.address.to_string();
    let backend = || -> Result<Value> {
        let explained = nohop.explain("helloworld")?;
        let backends = explained["service"]["backends"].as_array().context("no backends")?;
        let found = backends.iter().find(|backend| backend["address"] == address.as_str());
        Ok(found.context("it isn't listed")?.clone())
    };
    let until = |state: &str, n_connects: u32| -> Result<Value> {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            if n_connects > 0 {
                nodes.connect(vip, n_connects)?;
            }
            let backend = backend()?;
            if backend["state"] == state {
                return Ok(backend);
            }
            ensure!(Instant::now() < deadline, "not {state}: {backend:#}");
        }
    };
    ensure!(backend()?["state"] == "healthy", "{:#}", backend()?);

    drop(two);
    let ejected = until("ejected", 20)?;
    let reason = ejected["reason"].as_str().unwrap_or_default();
    ensure!(reason.starts_with("ejected ") && reason.contains("refused connect"), "{ejected:#}");
    let explained = nohop.explain("helloworld")?;
    let connect = explained["connect"].as_str().unwrap_or_default();
    ensure!(connect.contains("1 of them is ejected for now"), "{connect}");
    let socket = nohop.admin().replace("unix:", "");
    let count = |series: &str| -> Result<u64> {
        let metrics = http::ask(Path::new(&socket), "GET", "/metrics", "")?;
        let value = metrics.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        Ok(value.with_context(|| format!("no {series}"))?.parse()?)
    };
    ensure!(count("nohop_ejections_total{service=\"helloworld\"}")? > 0, "no ejection is counted");
    ensure!(count("nohop_probed_returns_total")? == 0, "nothing listens, and a probe ended it");

    let _two = Helloworld::start(nodes.backend.outside(), "two", &address)?;
    // No client connects, so it can only be the daemon's probe.
    let returned = until("healthy", 0)?;
    ensure!(returned["reason"].is_null(), "{returned:#}");
    // It is counted just after.
    let deadline = Instant::now() + TIMEOUT;
    while count("nohop_probed_returns_total")? == 0 {
        ensure!(Instant::now() < deadline, "it returned without a probe");
    }
    Ok(())
}

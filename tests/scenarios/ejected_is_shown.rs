//! A backend dies unannounced: its refusals eject it in the kernel, and the daemon shows that, also to
//! clients that wait for changes. Once it listens again, the daemon's probe ends the ejection, long
//! before its time is over.

use std::path::{Path, PathBuf};
use std::thread;
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
    let socket = nohop.admin().replace("unix:", "");
    let follow = |state: &'static str| {
        let (socket, address) = (PathBuf::from(&socket), address.clone());
        thread::spawn(move || wait_for(state, &address, &socket))
    };

    let waits = follow("ejected");
    drop(two);
    let ejected = until("ejected", 20)?;
    end(waits)?;
    let reason = ejected["reason"].as_str().unwrap_or_default();
    ensure!(reason.starts_with("ejected ") && reason.contains("refused connect"), "{ejected:#}");
    let explained = nohop.explain("helloworld")?;
    let connect = explained["connect"].as_str().unwrap_or_default();
    ensure!(connect.contains("1 of them is ejected for now"), "{connect}");
    let count = |series: &str| -> Result<u64> {
        let metrics = http::ask(Path::new(&socket), "GET", "/metrics", "")?;
        let value = metrics.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        Ok(value.with_context(|| format!("no {series}"))?.parse()?)
    };
    ensure!(count("nohop_ejections_total{service=\"helloworld\"}")? > 0, "no ejection is counted");
    ensure!(count("nohop_probed_returns_total")? == 0, "nothing listens, and a probe ended it");

    let waits = follow("healthy");
    let _two = Helloworld::start(nodes.backend.outside(), "two", &address)?;
    // No client connects, so it can only be the daemon's probe.
    let returned = until("healthy", 0)?;
    ensure!(returned["reason"].is_null(), "{returned:#}");
    end(waits)?;
    // It is counted just after.
    let deadline = Instant::now() + TIMEOUT;
    while count("nohop_probed_returns_total")? == 0 {
        ensure!(Instant::now() < deadline, "it returned without a probe");
    }
    Ok(())
}

/// Waits until the backend is shown in this state, by changes of the revision alone.
fn wait_for(state: &str, address: &str, socket: &Path) -> Result<()> {
    let mut wait = String::new();
    loop {
        let answer = http::exchange(socket, "GET", &format!("/v1/services{wait}"), "")
            .with_context(|| format!("no change was reported before it was {state}"))?;
        let head = answer.head.to_lowercase();
        let revision = head.lines().find_map(|line| line.strip_prefix("x-nohop-revision: "));
        wait = format!("?after={}&wait=600", revision.context("no revision")?);
        let services: Value = serde_json::from_str(&answer.body)?;
        let backends = services[0]["backends"].as_array().context("no backends")?;
        if backends.iter().any(|it| it["address"] == address && it["state"] == state) {
            return Ok(());
        }
    }
}

fn end(waits: thread::JoinHandle<Result<()>>) -> Result<()> {
    waits.join().map_err(|_| anyhow::anyhow!("it panicked"))?
}

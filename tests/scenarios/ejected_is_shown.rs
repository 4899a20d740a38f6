//! A backend dies unannounced: its refusals eject it in the kernel, and the daemon shows that until it
//! answers again.

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
    let nohop = nodes.nohop(&catalog.config())?;
    nohop.wait_for_backends("helloworld", 2)?;
    let vip = vip(&nohop, "helloworld")?;
    let address = two.address.to_string();
    let backend = || -> Result<Value> {
        let explained = nohop.explain("helloworld")?;
        let backends = explained["service"]["backends"].as_array().context("no backends")?;
        let found = backends.iter().find(|backend| backend["address"] == address.as_str());
        Ok(found.context("it isn't listed")?.clone())
    };
    let until = |state: &str| -> Result<Value> {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            nodes.connect(vip, 20)?;
            let backend = backend()?;
            if backend["state"] == state {
                return Ok(backend);
            }
            ensure!(Instant::now() < deadline, "not {state}: {backend:#}");
        }
    };
    ensure!(backend()?["state"] == "healthy", "{:#}", backend()?);

    drop(two);
    let ejected = until("ejected")?;
    let reason = ejected["reason"].as_str().unwrap_or_default();
    ensure!(reason.starts_with("ejected ") && reason.contains("refused connect"), "{ejected:#}");
    let socket = nohop.admin().replace("unix:", "");
    let metrics = http::ask(Path::new(&socket), "GET", "/metrics", "")?;
    let count = metrics
        .lines()
        .find_map(|line| line.strip_prefix("nohop_ejections_total{service=\"helloworld\"} "));
    ensure!(count.is_some_and(|count| count != "0"), "{count:?}");

    let _two = Helloworld::start(nodes.backend.outside(), "two", &address)?;
    let returned = until("healthy")?;
    ensure!(returned["reason"].is_null(), "{returned:#}");
    Ok(())
}

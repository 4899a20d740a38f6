//! The page and its connection to the daemon: one that is silent is shown as lost, and a page that no one
//! sees asks for nothing.

use std::time::Instant;

use anyhow::{Result, ensure};
use rustix::process::Signal;
use testbed::TIMEOUT;
use testbed::chromium::Chromium;

use crate::cluster::{Catalog, Nodes, vip};
use crate::page;

const SERVICE: &str = "http://127.0.0.1:9153/?view=service&name=helloworld";

/// How long a page that asks is asked about, in milliseconds: the daemon reports every two seconds.
const WHILE_HIDDEN: u32 = 5_000;

pub fn run() -> Result<()> {
    let nodes = Nodes::new()?;
    let helloworld = nodes.helloworld("helloworld")?;
    let catalog = Catalog::new(&[("helloworld", &[helloworld.address])])?;
    let nohop = nodes.nohop(&(catalog.config() + page::LISTEN))?;
    let address = vip(&nohop, "helloworld")?;
    let mut browser = Chromium::start(&nodes.client)?;
    browser.open(SERVICE, "document.querySelectorAll('tbody tr').length == 1")?;

    // Its connections stay, and nothing comes.
    let is_lost = "document.querySelector('[role=alert]')?.textContent.includes('is lost')";
    nohop.process.signal(Signal::STOP)?;
    let shown = browser.wait_for(is_lost);
    nohop.process.signal(Signal::CONT)?;
    shown?;
    browser.wait_for("!document.querySelector('[role=alert]')")?;

    hide(&mut browser, true)?;
    let connections =
        || nodes.inside().run("ss", "--no-header --tcp --numeric state established sport = :9153");
    let deadline = Instant::now() + TIMEOUT;
    while !connections()?.trim().is_empty() {
        ensure!(Instant::now() < deadline, "a hidden page is still connected");
    }
    let n_requests = "performance.getEntriesByType('resource').length";
    let before = browser.evaluate(n_requests)?;
    browser.evaluate(&format!("new Promise(done => setTimeout(done, {WHILE_HIDDEN}))"))?;
    ensure!(connections()?.trim().is_empty(), "a hidden page has connected");
    ensure!(browser.evaluate(n_requests)? == before, "a hidden page has sent requests");

    hide(&mut browser, false)?;
    nodes.connect(address, 50)?;
    browser.wait_for("document.querySelector('tbody').textContent.includes('50')")?;
    ensure!(browser.complaints().is_empty(), "{:?}", browser.complaints());
    Ok(())
}

/// Makes the page think that its tab is in the background: without a window there is none.
fn hide(browser: &mut Chromium, is_hidden: bool) -> Result<()> {
    browser.evaluate(&format!(
        "Object.defineProperty(document, 'hidden', {{ value: {is_hidden}, configurable: true }}); \
         document.dispatchEvent(new Event('visibilitychange'))"
    ))?;
    Ok(())
}

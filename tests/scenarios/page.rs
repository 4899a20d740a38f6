//! The page in a real browser, with 10,000 services: what it shows, by keyboard, for screen readers, in
//! both colour schemes and on a narrow screen, and how long it keeps a person waiting.
//!
//! With NOHOP_SCREENSHOTS=FOLDER it leaves pictures there, relative to the repository.

use std::net::SocketAddrV4;
use std::path::{Path, PathBuf};
use std::{env, fs};

use anyhow::{Context, Result, ensure};
use data_encoding::BASE64;
use serde_json::Value;
use testbed::chromium::Chromium;

use crate::cluster::{BACKEND, Catalog, Nodes, vip};

const PAGE: &str = "http://127.0.0.1:9153/";

/// The configuration of the page's address.
pub const LISTEN: &str = "admin.listen = [\"{admin}\", \"127.0.0.1:9153\"]\n";

/// The node is an edge as well, for its view.
const EDGE: &str = "edge.interfaces = [\"eth0\"]\nedge.source = [\"10.99.0.1\"]\n\
                    edge.vips = { helloworld = \"203.0.113.10:80\" }\nvip.public = [\"203.0.113.0/24\"]\n";

/// The services, besides the one that is tried: as many as there can be.
const N_SERVICES: usize = 16_000 - 1;

/// The longest that the page's thread may be busy with one thing, in seconds of processor time.
const MAX_PAUSE_S: f64 = 0.1;

/// A view, its address, and what has to be there before it is looked at.
const VIEWS: [(&str, &str, &str); 7] = [
    ("overview", "", "document.querySelectorAll('.figures dd')[4]?.textContent !== ''"),
    ("services", "?view=services", "document.querySelectorAll('a[data-row]').length > 10"),
    (
        "service",
        "?view=service&name=helloworld",
        "document.querySelectorAll('tbody tr').length == 4",
    ),
    ("connections", "?view=connections", "document.querySelector('button.main')"),
    ("dns", "?view=dns", "document.querySelector('.facts')"),
    ("edge", "?view=edge", "document.querySelector('.facts')?.textContent.includes('passed')"),
    ("config", "?view=config", "document.querySelectorAll('tbody tr').length > 40"),
];

/// Schemes and widths in which each view is looked at.
const LOOKS: [(&str, u32); 4] = [("light", 1280), ("dark", 1280), ("light", 320), ("dark", 320)];

pub fn run() -> Result<()> {
    let axe = env::var_os("NOHOP_AXE").context(
        "NOHOP_AXE names no file: `cargo xtask test --full` fetches axe-core and sets it",
    )?;
    let axe = fs::read_to_string(&axe).with_context(|| format!("read {}", axe.display()))?;
    let nodes = Nodes::new()?;
    let helloworlds = [0, 1, 2].map(|nth| nodes.helloworld(&format!("helloworld-{nth}")));
    let helloworlds = helloworlds.into_iter().collect::<Result<Vec<_>>>()?;
    let live: Vec<_> = helloworlds.iter().map(|it| it.address).collect();
    let catalog = Catalog::new(&[])?;
    catalog.write(&services(&live, N_SERVICES)?)?;
    // What is ejected stays so: nothing here fails by a trial.
    let config = catalog.config() + LISTEN + EDGE + "balance.eject = { base = \"5m\" }\n";
    nodes.client.forward()?;
    let mut nohop = nodes.nohop(&config)?;
    // One of four backends refuses, until it is ejected.
    let helloworld = vip(&nohop, "helloworld")?;
    nodes.connect(helloworld, 50)?;

    let mut browser = Chromium::start(&nodes.client)?;
    looks(&mut browser, &axe)?;
    pictures(&mut browser, &nodes, helloworld)?;
    filters(&mut browser)?;
    typed_addresses(&mut browser)?;
    by_keyboard(&mut browser)?;
    pauses(&mut browser, &nodes, helloworld)?;

    // Live: counts move, and the connection to the daemon is lost and found again.
    browser.open(
        &format!("{PAGE}?view=service&name=helloworld"),
        "document.querySelector('.spark')",
    )?;
    nodes.connect(helloworld, 100)?;
    browser.wait_for("document.querySelector('.spark strong').textContent !== '0'")?;
    // Flows show clients, so they are refused over TCP: once, each time that the view is opened.
    let of_flows = |complaint: &&Value| complaint["entry"]["url"].to_string().contains("/v1/flows");
    let (refused, others): (Vec<_>, Vec<_>) = browser.complaints().iter().partition(of_flows);
    ensure!(others.is_empty(), "{others:?}");
    ensure!(refused.len() == LOOKS.len(), "{refused:?}");
    // What is shown stays when it can't be fetched again, with the reason.
    browser.evaluate("fetch = () => Promise.reject(new Error('too many requests'))")?;
    browser.wait_for(
        "document.querySelector('main [role=alert]')?.textContent.includes('refresh: too many')",
    )?;
    ensure!(browser.evaluate("document.querySelectorAll('tbody tr').length")? == 4);
    nohop.kill()?;
    browser.wait_for(
        "document.querySelector('.banner.bad[role=alert]')?.textContent.includes('is lost')",
    )?;
    nohop.configure(&(config + "admin.trace = \"tcp\"\n"))?;
    nohop.start_again()?;
    browser.wait_for("!document.querySelector('.banner.bad[role=alert]')")?;

    // Connections as they happen, now that they may be shown over TCP.
    let start = "document.querySelector('button.main')";
    browser.open(&format!("{PAGE}?view=connections"), start)?;
    browser.evaluate(&format!("{start}.click()"))?;
    browser.wait_for("document.body.textContent.includes('Waiting for a connection')")?;
    nodes.curl("helloworld")?;
    browser.wait_for("document.querySelector('tbody .state')?.textContent === 'established'")?;
    let row = browser.evaluate("document.querySelector('tbody tr').textContent")?;
    ensure!(row.as_str().is_some_and(|row| row.contains("curl")), "{row}");
    for name in ["helloworld", "billing-api-00040", "helloworld", "cart-api-00001"] {
        nodes.curl(name)?;
    }
    browser.look(1200, 560, "dark")?;
    browser.wait_for("document.querySelectorAll('tbody tr').length >= 5")?;
    picture(&mut browser, "connections")?;
    trace_ends(&mut browser)
}

/// A trace doesn't go on while the page is paused, nor behind others: the daemon has few places for those
/// who follow connections.
fn trace_ends(browser: &mut Chromium) -> Result<()> {
    let start = "document.querySelector('button.main')";
    let pause = "document.querySelector('.link button').click()";
    let shows = |text: &str| format!("document.querySelector('form').innerText.includes({text:?})");
    browser.evaluate(pause)?;
    browser.wait_for(&shows("Stopped by Pause."))?;
    ensure!(browser.evaluate(&format!("{start}.disabled"))? == true, "it can be started");
    browser.evaluate(pause)?;
    browser.wait_for(&format!("!{start}.disabled"))?;
    browser.evaluate(&format!("{start}.click()"))?;
    browser.wait_for(&format!("{start}.textContent === 'Stop'"))?;
    // Its timers don't wait.
    browser.evaluate(
        "const wait = setTimeout; setTimeout = then => wait(then); \
         Object.defineProperty(document, 'hidden', { get: () => true }); \
         document.dispatchEvent(new Event('visibilitychange'))",
    )?;
    browser.wait_for(&shows("the page was in the background"))
}

/// A static catalog: many services that are well, and some that aren't.
pub fn services(live: &[SocketAddrV4], n_services: usize) -> Result<String> {
    const AREAS: [&str; 8] =
        ["billing", "cart", "catalog", "checkout", "ledger", "mail", "payments", "search"];
    const ROLES: [&str; 5] = ["api", "cache", "db", "web", "worker"];
    let backend = |address: &SocketAddrV4, weight: u16| {
        format!("[[service.backend]]\naddress = \"{address}\"\nweight = {weight}\n")
    };
    let refuses: SocketAddrV4 = format!("{BACKEND}:9").parse()?;
    let mut text = "[[service]]\nname = \"helloworld\"\n".to_owned();
    live.iter().chain([&refuses]).for_each(|address| text += &backend(address, 1));
    for nth in 0..n_services {
        let (area, role) = (AREAS[nth % AREAS.len()], ROLES[nth / AREAS.len() % ROLES.len()]);
        text += &format!("[[service]]\nname = \"{area}-{role}-{nth:05}\"\n");
        text += &backend(&live[nth % live.len()], u16::from(nth % 397 != 0));
    }
    Ok(text)
}

/// Each view in both schemes, wide and narrow: without a complaint of axe-core, and without scrolling
/// sideways.
fn looks(browser: &mut Chromium, axe: &str) -> Result<()> {
    for (scheme, width) in LOOKS {
        browser.look(width, 800, scheme)?;
        for (name, query, is_there) in VIEWS {
            browser.open(&format!("{PAGE}{query}"), is_there)?;
            let what = format!("{name}, {scheme}, {width} pixels");
            let beyond =
                "document.documentElement.scrollWidth - document.documentElement.clientWidth";
            ensure!(browser.evaluate(beyond)? == 0, "{what}: it scrolls sideways");
            browser.evaluate(&format!("{axe}; 0"))?;
            let violations = browser.evaluate(
                "axe.run().then(found => found.violations.map(it => \
                 it.id + ': ' + it.nodes[0].html + ' ' + it.nodes[0].failureSummary))",
            )?;
            ensure!(violations == Value::Array(vec![]), "{what}: {violations:#}");
        }
    }
    Ok(())
}

/// Pictures for the docs, where they are asked for.
fn pictures(browser: &mut Chromium, nodes: &Nodes, helloworld: SocketAddrV4) -> Result<()> {
    if env::var_os("NOHOP_SCREENSHOTS").is_none() {
        return Ok(());
    }
    let spark = "document.querySelector('.spark strong').textContent > '0'";
    for (file, query, is_there, (width, height), scheme) in [
        ("overview", "", VIEWS[0].2, (1200, 900), "light"),
        ("services", "?view=services&sort=-failed", VIEWS[1].2, (1200, 720), "dark"),
        ("service", "?view=service&name=helloworld", spark, (1200, 900), "light"),
        ("narrow", "?view=services&state=broken", VIEWS[1].2, (320, 640), "light"),
    ] {
        browser.look(width, height, scheme)?;
        browser.open(&format!("{PAGE}{query}"), "document.querySelector('h1')")?;
        for _ in 0..3 {
            // A few reports with connections in them.
            nodes.connect(helloworld, 200)?;
            browser.evaluate("new Promise(done => setTimeout(done, 1500))")?;
        }
        browser.wait_for(is_there)?;
        picture(browser, file)?;
    }
    Ok(())
}

fn picture(browser: &mut Chromium, name: &str) -> Result<()> {
    let Some(folder) = env::var_os("NOHOP_SCREENSHOTS") else { return Ok(()) };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(PathBuf::from(folder));
    fs::create_dir_all(&folder)?;
    let picture = BASE64.decode(browser.screenshot()?.as_bytes())?;
    Ok(fs::write(folder.join(format!("page-{name}.png")), picture)?)
}

/// What is searched for is in the address, and an address shows it again.
fn filters(browser: &mut Chromium) -> Result<()> {
    browser.look(1280, 800, "light")?;
    let n_all = format!("{} of", thousands(N_SERVICES + 1));
    let shows =
        |n: &str| format!("document.querySelector('#n-services')?.textContent.startsWith('{n}')");
    browser.open(&format!("{PAGE}?view=services"), &shows(&n_all))?;
    let n_rows = browser.evaluate("document.querySelectorAll('tbody tr').length")?;
    ensure!(n_rows.as_u64().is_some_and(|n| n < 100), "{n_rows} rows are in the document");
    browser.evaluate("document.querySelector('input[name=q]').focus()")?;
    browser.type_text("payments-api")?;
    browser.wait_for(&shows("400 of"))?;
    ensure!(browser.evaluate("location.search")? == "?view=services&q=payments-api");
    browser.type_text(" -payments")?;
    browser.wait_for(&shows("0 of"))?;
    let address = format!("{PAGE}?view=services&state=broken&sort=-name");
    // Those without weight, and the one with a backend that refuses.
    browser.open(&address, &shows("42 of"))?;
    let first = browser.evaluate("document.querySelector('a[data-row]').textContent")?;
    ensure!(first.as_str().is_some_and(|name| name.starts_with("search-")), "{first}");
    let sorted = "document.querySelector('th[aria-sort]').ariaSort + document.querySelector('th[aria-sort]').innerText";
    let sorted = browser.evaluate(sorted)?;
    ensure!(sorted.as_str().is_some_and(|it| it.starts_with("descendingService")), "{sorted}");
    browser.evaluate("document.querySelector('th.c-name button').click()")?;
    browser.wait_for("document.querySelector('th[aria-sort]').ariaSort === 'ascending'")
}

/// What an address asks for that there isn't.
fn typed_addresses(browser: &mut Chromium) -> Result<()> {
    let all = format!("'{0} of {0}'", thousands(N_SERVICES + 1));
    let all = format!("document.querySelector('#n-services')?.textContent.startsWith({all})");
    let shows = |text: &str| format!("document.querySelector('main').innerText.includes({text:?})");
    for (query, is_there) in [
        ("?view=nope", "document.querySelector('h1').textContent === 'Overview'".to_owned()),
        ("?view=services&state=nope&sort=nope", all),
        ("?view=service&name=..", shows("names no service")),
    ] {
        browser.open(&format!("{PAGE}{query}"), &is_there)?;
    }
    Ok(())
}

/// Everything without a pointer.
fn by_keyboard(browser: &mut Chromium) -> Result<()> {
    browser.open(&format!("{PAGE}?view=services"), VIEWS[1].2)?;
    let focus = "document.activeElement";
    browser.press("Tab")?;
    ensure!(browser.evaluate(&format!("{focus}.className"))? == "skip");
    browser.evaluate("document.querySelector('.scroller').focus()")?;
    browser.press("ArrowDown")?;
    browser.wait_for(&format!("{focus}.dataset.row === '0'"))?;
    browser.press("ArrowDown")?;
    browser.wait_for(&format!("{focus}.dataset.row === '1'"))?;
    browser.press("End")?;
    browser.wait_for(&format!("{focus}.dataset.row === '{}'", N_SERVICES))?;
    let is_in_sight = "(({ top, bottom }) => top >= 0 && bottom <= innerHeight)(document.activeElement.getBoundingClientRect())";
    ensure!(browser.evaluate(is_in_sight)? == true, "the last row isn't in sight");
    browser.press("Home")?;
    browser.wait_for(&format!("{focus}.dataset.row === '0'"))?;
    browser.press("Enter")?;
    browser.wait_for("location.search.startsWith('?view=service&name=')")?;
    browser.wait_for(&format!("{focus}.tagName === 'H1'"))?;
    browser.evaluate("history.back()")?;
    browser.wait_for("location.search === '?view=services'")
}

/// Nothing that a person does, and nothing that the daemon reports, keeps the page busy for long.
fn pauses(browser: &mut Chromium, nodes: &Nodes, helloworld: SocketAddrV4) -> Result<()> {
    browser.call("Performance.enable", serde_json::json!({ "timeDomain": "threadTicks" }))?;
    browser.open(&format!("{PAGE}?view=services"), VIEWS[1].2)?;
    // Again after a pause the first event has every service, a later one those that changed.
    let pause = "document.querySelector('.link button').click()";
    browser.evaluate("import('/store.mjs').then(it => { store = it.store; return 0 })")?;
    for (what, is_first) in [("the first event", true), ("a later event", false)] {
        if is_first {
            browser.evaluate(pause)?;
        }
        let before = busy(browser)?;
        browser.evaluate("version = store.version")?;
        match is_first {
            true => drop(browser.evaluate(pause)?),
            false => drop(nodes.connect(helloworld, 10)?),
        }
        browser.wait_for("store.version > version")?;
        let pause = busy(browser)? - before;
        eprintln!("{what} of {N_SERVICES} services: {:.0} ms", pause * 1e3);
        // The limit is meant for 10,000, and the first event has all.
        let limit = if is_first { MAX_PAUSE_S * N_SERVICES as f64 / 1e4 } else { MAX_PAUSE_S };
        ensure!(pause < limit, "{what} takes {pause} s");
    }
    browser.evaluate("document.querySelector('input[name=q]').focus()")?;
    let drawn =
        "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))";
    for (what, act) in [
        ("a search", "document.execCommand('insertText', false, 'a')"),
        ("a sort", "document.querySelector('th.c-vip button').click()"),
        ("a scroll", "document.querySelector('.scroller').scrollTop = 100000"),
        ("a view", "document.querySelector('nav a').click()"),
        ("the view of all services", "document.querySelectorAll('nav a')[1].click()"),
    ] {
        let before = busy(browser)?;
        browser.evaluate(act)?;
        browser.evaluate(drawn)?;
        let pause = busy(browser)? - before;
        eprintln!("{what} among {N_SERVICES} services: {:.0} ms", pause * 1e3);
        ensure!(pause < MAX_PAUSE_S, "{what} takes {pause} s");
    }
    Ok(())
}

/// The processor time that the page's thread has taken for all its tasks, in seconds.
fn busy(browser: &mut Chromium) -> Result<f64> {
    let metrics = browser.call("Performance.getMetrics", serde_json::json!({}))?;
    let metrics = metrics["metrics"].as_array().cloned().unwrap_or_default();
    let busy = metrics.iter().find(|metric| metric["name"] == "TaskDuration");
    busy.and_then(|busy| busy["value"].as_f64()).context("no TaskDuration")
}

/// A number as the page writes it.
fn thousands(n: usize) -> String {
    format!("{},{:03}", n / 1000, n % 1000)
}

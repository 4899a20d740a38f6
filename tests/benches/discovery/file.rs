//! A static catalog of 10,000 services with 10 backends each: the first sync, changes, memory.

use std::fmt::Write;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use testbed::cgroup::Cgroup;
use testbed::net::Host;
use testbed::nohop::Nohop;
use testbed::tempdir::TempDir;

use crate::maps::{Maps, Watcher};
use crate::site::{cpu_s, memory_mb, propagation};
use crate::{ms, print_figure, quantile};

const N_SERVICES: u32 = 10_000;
const N_BACKENDS: u32 = 10;

pub fn measure(quick: bool) -> Result<()> {
    let n_changes = if quick { 5 } else { 15 };
    println!("a file with {N_SERVICES} services of {N_BACKENDS} backends, {n_changes} changes:");
    let (host, cgroup, tempdir) = (Host::new("site")?, Cgroup::new()?, TempDir::new("catalog")?);
    let path = tempdir.path().join("catalog.toml");
    fs::write(&path, text(0))?;
    let config = format!("catalog.sources = [\"file\"]\ncatalog.file = {path:?}\n");
    let start = Instant::now();
    let nohop = Nohop::start(&host, &cgroup, &config)?;
    print_figure("process started -> ready", ms(start.elapsed()), "ms", None);
    print_figure("first full sync, parsed -> maps", propagation(&nohop)?.0, "ms", Some(1000.0));
    print_figure("processor time of the start", cpu_s(&nohop)?, "s", None);
    print_figure("resident memory at first", memory_mb(&nohop, "VmRSS")?, "MB", Some(150.0));

    let service = name(N_SERVICES / 2);
    let (mut whole, mut own) = (Vec::new(), Vec::new());
    for nth in 1..=n_changes {
        let watcher = Watcher::start(Maps::open(&nohop)?, vec![service.clone()])?;
        let (before, generation) = (propagation(&nohop)?, nohop.status()?["generation"].take());
        let edited = tempdir.path().join("edited");
        fs::write(&edited, text(nth))?;
        let start = Instant::now();
        fs::rename(&edited, &path)?;
        // It counts a table once that is in the maps.
        nohop.wait_for_status(|status| status["generation"].as_u64() > generation.as_u64())?;
        let after = propagation(&nohop)?;
        own.push((after.0 - before.0) / (after.1 - before.1));
        let seen = watcher.stop()?;
        let (_, at) = seen.first().context("the maps didn't change")?;
        whole.push(ms(*at - start));
        thread::sleep(Duration::from_millis(100));
    }
    print_figure("one change, parsed -> map, median", quantile(&own, 0.5), "ms", Some(2.0));
    print_figure("the same, most", quantile(&own, 1.0), "ms", None);
    print_figure("one change, file renamed -> map, median", quantile(&whole, 0.5), "ms", None);
    print_figure("resident memory after them", memory_mb(&nohop, "VmRSS")?, "MB", Some(150.0));
    print_figure("of that not mapped from files or BPF", memory_mb(&nohop, "RssAnon")?, "MB", None);
    print_figure("most ever resident", memory_mb(&nohop, "VmHWM")?, "MB", None);
    Ok(())
}

/// The catalog after so many changes of one backend of one service.
fn text(n_changes: u32) -> String {
    let mut text = String::new();
    for idx in 0..N_SERVICES {
        let _ = writeln!(text, "[[service]]\nname = \"{}\"", name(idx));
        for nth in 0..N_BACKENDS {
            let [_, b, c, d] = idx.to_be_bytes();
            let port = if nth == 0 { port(idx, n_changes) } else { 8000 };
            let address = format!("10.{}.{c}.{d}:{port}", 10 * u32::from(b) + nth + 1);
            let _ = writeln!(text, "[[service.backend]]\naddress = \"{address}\"");
        }
    }
    text
}

fn name(idx: u32) -> String {
    format!("service-{idx}")
}

fn port(idx: u32, n_changes: u32) -> u32 {
    if idx == N_SERVICES / 2 { 8000 + n_changes } else { 8000 }
}

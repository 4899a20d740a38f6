//! A disk that is full, a disk that doesn't answer, a log that isn't read: none of them keeps the
//! daemon down, holds a change back from the kernel, or takes a name away. The status reports what is
//! wrong.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat, open};
use serde_json::Value;
use testbed::consul::{Consul, instance};
use testbed::nohop::Nohop;
use testbed::tempdir::TempDir;
use testbed::tmpfs::Tmpfs;

use crate::cluster::{CLIENT, Catalog, Nodes, vip};

pub fn full() -> Result<()> {
    let nodes = Nodes::new()?;
    let (one, two) = (nodes.helloworld("one")?, nodes.helloworld("two")?);
    let catalog = Catalog::new(&[("one", &[one.address])])?;
    let disk = Tmpfs::new("64k")?;
    let filler = disk.path().join("filler");
    fill(&filler)?;

    // It starts, and routes.
    let state = format!("state_dir = {:?}\ndns.forward = []\n", disk.path());
    let nohop = nodes.nohop(&(catalog.config() + &state))?;
    ensure!(nodes.curl("one")? == "hello from one\n");
    let names_it = |status: &Value| {
        let problems = status["problems"].to_string();
        problems.contains("vips.json") && problems.contains("No space left")
    };
    let status = nohop.wait_for_status(names_it)?;
    ensure!(status["ready"] == true, "{status:#}");

    // A new name is answered, a backend that leaves is left.
    catalog.set(&[("one", &[two.address]), ("two", &[two.address])])?;
    nohop.wait_for_backends("two", 1)?;
    ensure!(nodes.curl("two")? == "hello from two\n" && nodes.curl("one")? == "hello from two\n");

    // Once there is room, the addresses are written by themselves.
    fs::remove_file(&filler)?;
    nohop.wait_for_status(|status| {
        status["problems"].as_array().is_some_and(|problems| problems.is_empty())
    })?;
    let book = fs::read_to_string(disk.path().join("vips.json"))?;
    for name in ["one", "two"] {
        ensure!(book.contains(&vip(&nohop, name)?.ip().to_string()), "no {name} in {book}");
    }
    Ok(())
}

pub fn stalled() -> Result<()> {
    let nodes = Nodes::new()?;
    let (one, two) = (nodes.helloworld("one")?, nodes.helloworld("two")?);
    let catalog = Catalog::new(&[("one", &[one.address])])?;
    // To open a FIFO for writing takes as long as a frozen disk: until another comes to read.
    let state = TempDir::new("state")?;
    let temporary = state.path().join(".vips.json.tmp");
    fifo(&temporary)?;
    let config = catalog.config() + &format!("state_dir = {:?}\n", state.path());
    let mut nohop = nodes.nohop(&config)?;
    ensure!(nodes.curl("one")? == "hello from one\n");

    for round in 0..3 {
        let name = format!("new-{round}");
        let backend = if round % 2 == 0 { two.address } else { one.address };
        catalog.set(&[("one", &[backend]), (&name, &[backend])])?;
        nohop.wait_for_backends(&name, 1)?;
        let connects = nodes.connect(vip(&nohop, "one")?, 20)?;
        let expected = if round % 2 == 0 { "two" } else { "one" };
        ensure!(connects.errors.is_empty() && connects.answers.len() == 1, "{connects:?}");
        ensure!(nodes.curl(&name)? == format!("hello from {expected}\n"));
    }
    let names_it = |status: &Value| status["problems"].to_string().contains("doesn't answer");
    let status = nohop.wait_for_status(names_it)?;
    ensure!(status["ready"] == true, "{status:#}");

    // It stops all the same, and the next one finds the addresses in the kernel.
    let before = vip(&nohop, "new-2")?;
    ensure!(nohop.terminate()?.success());
    nohop.start_again()?;
    ensure!(vip(&nohop, "new-2")? == before);

    // Neither a book nor a last catalog that can't be read keeps it down.
    ensure!(nohop.terminate()?.success());
    fifo(&state.path().join("vips.json"))?;
    nohop.start_again()?;
    ensure!(vip(&nohop, "new-2")? == before && nodes.curl("new-2")? == "hello from two\n");
    ensure!(nohop.terminate()?.success());
    let consul = Consul::server(&nodes.client, "client", CLIENT)?;
    consul.register(&instance("one", "one", one.address))?;
    fifo(&state.path().join("catalog.json"))?;
    fifo(&state.path().join(".catalog.json.tmp"))?;
    nohop.configure(&format!("state_dir = {:?}\n", state.path()))?;
    nohop.start_again()?;
    nohop.wait_for_backends("one", 1)?;
    ensure!(nodes.curl("one")? == "hello from one\n" && nohop.terminate()?.success());
    Ok(())
}

pub fn unread_log() -> Result<()> {
    let nodes = Nodes::new()?;
    let (one, two) = (nodes.helloworld("one")?, nodes.helloworld("two")?);
    let catalog = Catalog::new(&[("web", &[one.address])])?;
    let mut nohop = Nohop::start(&nodes.client, &nodes.cgroup, &catalog.config())?;
    ensure!(nohop.terminate()?.success());

    let tempdir = TempDir::new("log")?;
    let log = tempdir.path().join("stderr");
    fifo(&log)?;
    // It is open, so that a writer isn't refused, and never read.
    let _reader = open(&log, OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?;
    nohop.start_again_with_stderr(&log)?;
    // Many times what a pipe and the daemon's own queue hold: each table names all its services.
    let names: Vec<String> = (0..90).map(|nth| format!("{}-{nth}", "x".repeat(50))).collect();
    let lost =
        |status: &Value| status["problems"].to_string().contains("of the log since the start");
    let mut is_lost = false;
    for round in 0..400 {
        let backends = [if round % 2 == 0 { two.address } else { one.address }];
        let mut services: Vec<_> =
            names.iter().map(|name| (name.as_str(), &backends[..])).collect();
        services.push(("web", &backends));
        catalog.set(&services)?;
        let expected = backends[0].to_string();
        nohop.wait_until(|services| {
            let web = testbed::nohop::service(services, "web");
            web.is_some_and(|web| web["backends"][0]["address"] == *expected)
        })?;
        is_lost = lost(&nohop.status()?);
        if is_lost {
            let connects = nodes.connect(vip(&nohop, "web")?, 20)?;
            let answer = if round % 2 == 0 { "hello from two\n" } else { "hello from one\n" };
            ensure!(connects.errors.is_empty(), "{connects:?}");
            ensure!(nodes.curl("web")? == answer);
            break;
        }
    }
    ensure!(is_lost, "the log never filled up: this scenario shows nothing");
    ensure!(nohop.terminate()?.success());
    Ok(())
}

/// Makes a FIFO: to open it takes as long as a frozen disk, until another opens its other end.
pub fn fifo(path: &Path) -> Result<()> {
    // In the place of the existing one.
    let _ = fs::remove_file(path);
    mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
        .with_context(|| format!("make the FIFO {}", path.display()))
}

/// Writes until there is no room left.
fn fill(path: &Path) -> Result<()> {
    let mut file = File::create(path)?;
    while file.write(&[0; 1024]).is_ok_and(|n| n > 0) {}
    Ok(())
}

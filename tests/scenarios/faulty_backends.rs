//! Backends that reset, flap or refuse all at once. The kernel alone avoids them, and uses them again. The
//! bounds grow with the time that a scenario takes, so they hold on a slow machine as well.

use std::net::SocketAddrV4;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use testbed::helloworld::{Connects, Helloworld, connect_in_turn};
use testbed::nohop::is_healthy;
use testbed::{TIMEOUT, http};

use crate::cluster::{Catalog, Nodes, vip};
use crate::server::Behaviour;

/// How many resets in a row eject, and for how long.
const N_RESETS: u64 = 3;
const RESET_EJECTION: Duration = Duration::from_millis(100);

/// The time of a first ejection, less what clocks differ by.
const BASE: Duration = Duration::from_millis(990);

/// A backend resets connections, at once or after the request, with a daemon and without one: few
/// connections reach it, no other backend is ejected, and it serves once it answers again.
pub fn resets() -> Result<()> {
    let nodes = Nodes::new()?;
    let (one, two) = (nodes.helloworld("one")?, nodes.helloworld("two")?);
    let odd = nodes.server("odd", 0)?;
    let addresses = [odd.address()?, one.address, two.address];
    let catalog = Catalog::new(&[("helloworld", &addresses)])?;
    let nohop = nodes.nohop(&catalog.config())?;
    nohop.wait_for_backends("helloworld", addresses.len())?;
    let vip = vip(&nohop, "helloworld")?;
    let resets_and_answers = || -> Result<()> {
        for behaviour in [Behaviour::ResetsAtOnce, Behaviour::ResetsAfterRequest] {
            odd.set(behaviour);
            let start = Instant::now();
            let connects = connect_in_turn(nodes.inside(), vip, 1_000)?;
            // One more, by what clocks differ by.
            let n_ejections = 2 + start.elapsed().div_duration_f64(RESET_EJECTION) as u64;
            let (n_reset, most) = (n_failed(&connects), n_ejections * N_RESETS);
            eprintln!("{n_reset} reset, of at most {most}");
            ensure!((1..=most).contains(&n_reset), "at most {most}: {connects:?}");
            ensure!(!connects.errors.contains_key("ConnectionRefused"), "{connects:?}");
            let answers = connects.answers.keys().map(String::as_str);
            ensure!(answers.eq(["hello from one", "hello from two"]), "{connects:?}");
            odd.set(Behaviour::Answers);
            until(&nodes, vip, |connects| n_failed(connects) == 0 && connects.answers.len() == 3)?;
        }
        Ok(())
    };
    resets_and_answers()?;
    let services = nohop.services()?;
    for other in [one.address, two.address] {
        ensure!(is_healthy(&services, "helloworld", &other.to_string()), "{other}: {services:#}");
    }
    let socket = nohop.admin().replace("unix:", "");
    let metrics = http::ask(Path::new(&socket), "GET", "/metrics", "")?;
    let none = "nohop_ejections_total{service=\"helloworld\"} 0\n";
    ensure!(!metrics.contains(none), "no ejection is counted");
    nohop.kill()?;
    resets_and_answers()
}

/// A backend that refuses, listens and refuses again, with the daemon killed: after the first sign only
/// trials reach it, the second one after twice the time, and it serves each time it listens.
pub fn flaps() -> Result<()> {
    let nodes = Nodes::new()?;
    let steady = nodes.helloworld("steady")?;
    let flapping = nodes.server("flapping", 0)?;
    let address = flapping.address()?;
    let catalog = Catalog::new(&[("helloworld", &[steady.address, address])])?;
    let nohop = nodes.nohop(&(catalog.config() + "balance.eject = { max = \"2s\" }\n"))?;
    nohop.wait_for_backends("helloworld", 2)?;
    let vip = vip(&nohop, "helloworld")?;
    nohop.kill()?;
    let serves = |connects: &Connects| connects.answers.contains_key("hello from flapping");
    until(&nodes, vip, serves)?;

    let mut flapping = Some(flapping);
    // In the first phase there would be two trials, were the second ejection as short as the first.
    for least in [BASE * 5 / 2, Duration::ZERO] {
        drop(flapping.take());
        let start = Instant::now();
        let mut n_refused = 0;
        while n_refused == 0 || start.elapsed() < least {
            let connects = connect_in_turn(nodes.inside(), vip, 50)?;
            let errors = connects.errors.keys().map(String::as_str);
            ensure!(errors.eq((n_failed(&connects) > 0).then_some("ConnectionRefused")));
            ensure!(!serves(&connects), "{connects:?}");
            n_refused += n_failed(&connects);
            ensure!(start.elapsed() < TIMEOUT, "no connection met the backend");
        }
        let most = 1 + n_trials(start.elapsed());
        eprintln!("{n_refused} refused in {:?}, of at most {most}", start.elapsed());
        ensure!(n_refused <= most, "{n_refused} refused, of at most {most}");
        flapping = Some(nodes.server("flapping", address.port())?);
        until(&nodes, vip, serves)?;
    }
    let connects = connect_in_turn(nodes.inside(), vip, 100)?;
    ensure!(n_failed(&connects) == 0 && connects.answers.len() == 2, "{connects:?}");
    Ok(())
}

/// All backends refuse, with the daemon killed and ejections of five minutes: each connection is refused
/// at once, and none reaches a server that listens on every address. Once one backend listens it gets all
/// connections.
pub fn all_refuse() -> Result<()> {
    let nodes = Nodes::new()?;
    let outside = nodes.client.outside();
    let _wildcard = Helloworld::start(outside, "wildcard", "0.0.0.0:80")?;
    let mut servers = ["a", "b", "c"]
        .map(|name| nodes.server(name, 0))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    let addresses = servers.iter().map(|server| server.address()).collect::<Result<Vec<_>>>()?;
    let catalog = Catalog::new(&[("helloworld", &addresses)])?;
    let config = catalog.config() + "balance.eject = { base = \"5m\" }\n";
    let nohop = nodes.nohop(&config)?;
    nohop.wait_for_backends("helloworld", addresses.len())?;
    let vip = vip(&nohop, "helloworld")?;
    nohop.kill()?;
    until(&nodes, vip, |connects| connects.answers.len() == addresses.len())?;

    servers.clear();
    let connects = connect_in_turn(nodes.inside(), vip, 200)?;
    ensure!(connects.all_failed_with("ConnectionRefused"), "{connects:?}");
    let _again = nodes.server("b", addresses[1].port())?;
    until(&nodes, vip, |connects| !connects.answers.is_empty())?;
    let connects = connect_in_turn(nodes.inside(), vip, 100)?;
    ensure!(connects.all_answered(|answer| answer == "hello from b"), "{connects:?}");
    Ok(())
}

/// Connects until this holds of a number of connections.
fn until(nodes: &Nodes, vip: SocketAddrV4, predicate: impl Fn(&Connects) -> bool) -> Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let connects = connect_in_turn(nodes.inside(), vip, 50)?;
        if predicate(&connects) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "it isn't so: {connects:?}");
    }
}

fn n_failed(connects: &Connects) -> u64 {
    connects.errors.values().sum()
}

/// The most trials of a backend that refuses, within this time after its first refusal: the first one
/// after [`BASE`], each later one after twice as long, the longest ejection.
fn n_trials(within: Duration) -> u64 {
    (within + BASE).div_duration_f64(BASE * 2) as u64
}

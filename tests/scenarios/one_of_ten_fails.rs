//! One of ten backends fails under load, with the daemon killed before: the kernel alone takes it out at
//! its first sign, and lets one connection try it after 1, 3, 7, 15 s and so on. A packet capture has the
//! numbers. A connect chooses before its SYN is sent, so the one that is just doing that may come too late;
//! the client has a single thread.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::capture::{Capture, Connects};
use testbed::cmd;
use testbed::helloworld::Helloworld;
use testbed::process::Process;

use crate::cluster::{Catalog, Nodes, vip};

/// The address of the one that fails, also the backend node's.
const VICTIM: &str = "10.99.0.3";

/// Connections a second; [`RATE_VARIABLE`] has another number, for measurements.
const RATE: u32 = 500;
const RATE_VARIABLE: &str = "NOHOP_CONNECTS_PER_SECOND";
/// How long: until the second trial.
const LOAD: &str = "--seconds 5 --close --connections 4096 --timeout-ms 1000";

/// The first ejection's time, less what clocks differ by.
const BASE: Duration = Duration::from_millis(990);

/// When silence ejects: after so many connect times, and within these limits. Twice what the kernel does,
/// as it measures from connect() on, and 50 ms at least.
const SILENCE: u32 = 2 * 20;
const SILENCE_MIN: Duration = Duration::from_millis(50);
const SILENCE_MAX: Duration = Duration::from_secs(1);

pub fn refuses() -> Result<()> {
    let (connects, report) =
        play(|_, victim| victim.process.signal(rustix::process::Signal::KILL))?;
    let sign = connects.first_refusal().context("no SYN was refused")?;
    let later = connects.since(sign);
    check_trials(&later)?;
    let last = later.iter().filter(|since| **since < BASE).max().copied().unwrap_or_default();
    eprintln!("the last SYN before the first trial: {} us after the first RST", last.as_micros());
    let n_refused = connects.all().iter().filter(|connect| connect.is_refused).count();
    eprintln!("{n_refused} refused, of those after the first RST {later:?}");
    // The client's own report has no more of them.
    ensure!(
        report["failed"]["refused"].as_u64() <= Some(n_refused as u64),
        "{n_refused}: {report}"
    );
    Ok(())
}

pub fn is_silent() -> Result<()> {
    // The host drops what is sent to an address that it has no more.
    let (connects, report) =
        play(|nodes, _| nodes.backend.ip(&format!("addr del {VICTIM}/24 dev eth0")).map(drop))?;
    let sign = connects.first_unanswered().context("no SYN is unanswered")?;
    let handshakes =
        connects.all().iter().filter_map(|connect| Some(connect.answered? - connect.syn));
    let longest = handshakes.max().context("the backend never answered")?;
    let silence = (longest * SILENCE).clamp(SILENCE_MIN, SILENCE_MAX);
    let since = connects.since(sign);
    let later: Vec<Duration> = since.iter().copied().filter(|since| *since > silence).collect();
    eprintln!("{} begun within {silence:?}, then {later:?}", since.len() - later.len());
    check_trials(&later)?;
    ensure!(report["failed"]["refused"] == 0, "{report}");
    Ok(())
}

/// Ten backends and a killed daemon under load, while one backend fails: the connections to that one, and
/// the client's report.
fn play(fail: impl FnOnce(&Nodes, &Helloworld) -> Result<()>) -> Result<(Connects, Value)> {
    let nodes = Nodes::new()?;
    nodes.backend.ip(&format!("addr add {VICTIM}/24 dev eth0"))?;
    let victim = Helloworld::start(nodes.backend.outside(), "0", &format!("{VICTIM}:0"))?;
    let others: Vec<Helloworld> =
        (1..10).map(|n| nodes.helloworld(&n.to_string())).collect::<Result<_>>()?;
    let addresses: Vec<_> = [&victim].into_iter().chain(&others).map(|b| b.address).collect();
    let catalog = Catalog::new(&[("helloworld", &addresses)])?;
    let nohop = nodes.nohop(&catalog.config())?;
    let vip = vip(&nohop, "helloworld")?;
    nohop.kill()?;
    let capture = Capture::start(nodes.client.outside(), &[victim.address])?;
    // From here on the kernel knows how long a connect takes.
    let connects = nodes.connect(vip, 200)?;
    ensure!(connects.answers.len() == addresses.len(), "{connects:?}");

    let mut command = nodes.inside().command(cmd::built("nohop-load")?);
    let rate = std::env::var(RATE_VARIABLE).unwrap_or_else(|_| RATE.to_string());
    command.arg("http").arg(vip.to_string()).args(["--rate", &rate]).args(LOAD.split(' '));
    let load = Process::spawn("nohop-load", command)?;
    load.wait_for_line(&["requesting"])?;
    fail(&nodes, &victim)?;
    let report: Value = serde_json::from_str(&load.wait_for_line(&["\"requests\""])?)?;
    let connects = capture.finish(&[victim.address])?.pop().context("no connects")?;
    Ok((connects, report))
}

/// Each of these is a trial, by its time after the backend's first sign; but the first may be the one
/// that was about to begin.
fn check_trials(later: &[Duration]) -> Result<()> {
    let n_begun = usize::from(later.first().is_some_and(|first| *first < BASE));
    for (trial, at) in later[n_begun..].iter().enumerate() {
        let earliest = BASE * ((1 << (trial + 1)) - 1);
        ensure!(*at >= earliest, "trial {trial} came after {at:?}, before {earliest:?}: {later:?}");
    }
    Ok(())
}

//! `nohop top` at a terminal: what it shows of a daemon, of one that dies and comes back, and the
//! terminal's modes afterwards. Without a terminal it names what to use.

use anyhow::{Result, ensure};
use rustix::process::Signal;
use serde_json::Value;
use testbed::terminal::Terminal;

use crate::cluster::Cluster;

pub fn run() -> Result<()> {
    let mut cluster = Cluster::new(2)?;
    let vip = cluster.vip("helloworld")?;

    let output = cluster.nohop.cli("top")?;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.code() == Some(1) && error.contains("nohop services"), "{output:?}");
    let figures: Value = serde_json::from_slice(&cluster.nohop.cli("top --json")?.stdout)?;
    let service = &figures["services"][0];
    ensure!(figures["ready"] == true && service["connects_per_second"] == 0.0, "{figures:#}");

    let command = cluster.nohop.command("top")?;
    let mut terminal = Terminal::spawn(&command)?;
    terminal.wait_for(|screen| {
        let text = screen.contents();
        screen.alternate_screen() && text.contains("ready  generation") && row(&text).is_some()
    })?;
    ensure!(!terminal.has_initial_modes()?, "the terminal isn't in raw mode");
    let mut text = terminal.wait_for(|screen| column(&screen.contents(), 0) == Some("2/2"))?;
    // Connections until an interval with some is shown.
    while column(&text, 1).is_none_or(|rate| rate == "-" || rate == "0") {
        let connects = cluster.nodes.connect(vip, 20)?;
        ensure!(connects.errors.is_empty(), "{connects:?}");
        let before = text.clone();
        text = terminal.wait_for(|screen| screen.contents() != before)?;
    }
    ensure!(terminal.has_colour(), "no colour:\n{text}");
    terminal.press("\r")?;
    let address = cluster.helloworlds[1].address.to_string();
    terminal.wait_for(|screen| {
        let text = screen.contents();
        text.contains("RTT") && text.contains(&address) && text.contains("helloworld-0")
    })?;
    terminal.press("\u{1b}")?;
    terminal.wait_for(|screen| row(&screen.contents()).is_some())?;

    cluster.nohop.kill()?;
    terminal.wait_for(|screen| screen.contents().contains("NO ANSWER  as of "))?;
    cluster.nohop.start_again()?;
    terminal.wait_for(|screen| {
        let text = screen.contents();
        text.contains("ready") && !text.contains("NO ANSWER") && row(&text).is_some()
    })?;
    terminal.press("q")?;
    is_restored(&mut terminal)?;

    // Without colours, and ended by a signal.
    let mut command = cluster.nohop.command("top")?;
    command.env("NO_COLOR", "1");
    let mut terminal = Terminal::spawn(&command)?;
    terminal.wait_for(|screen| row(&screen.contents()).is_some())?;
    ensure!(!terminal.has_colour(), "colours");
    terminal.signal(Signal::TERM)?;
    is_restored(&mut terminal)
}

fn is_restored(terminal: &mut Terminal) -> Result<()> {
    let (status, screen) = terminal.wait_for_exit()?;
    ensure!(status.success(), "{status}:\n{}", screen.contents());
    ensure!(!screen.alternate_screen() && !screen.hide_cursor(), "the screen isn't restored");
    ensure!(terminal.has_initial_modes()?, "the modes aren't restored");
    Ok(())
}

/// The row of the service.
fn row(text: &str) -> Option<&str> {
    text.lines().find(|line| line.starts_with("helloworld "))
}

/// A column of it, from 0, after the name.
fn column(text: &str, nth: usize) -> Option<&str> {
    row(text)?.split_whitespace().nth(nth + 1)
}

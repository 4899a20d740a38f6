//! The operator's view: exit codes of `nohop status`, text from Consul that would command a
//! terminal, and requests that wait for a change, whatever it is that changes.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::cmd;
use testbed::consul::{Consul, instance};
use testbed::nohop::Nohop;
use testbed::terminal::Terminal;

use crate::cluster::{CLIENT, Nodes};

/// An id that forges a line, clears the screen, and turns the direction of what follows.
const FORGED: &str = "web-1\n  healthy    10.9.9.9:1\u{1b}[2J\u{9b}31m\u{202e}";

pub fn run() -> Result<()> {
    let nodes = Nodes::new()?;
    let mut nohop = Nohop::start_unready(&nodes.client, &nodes.cgroup, "")?;
    for arguments in ["status", "status --json", "status --wait-ready --timeout 0"] {
        let output = nohop.cli(arguments)?;
        ensure!(output.status.code() == Some(1), "{arguments}: {output:?}");
    }
    let mut consul = Consul::server(&nodes.client, "client", CLIENT)?;
    let helloworld = nodes.helloworld("helloworld")?;
    consul.register(&instance("helloworld", FORGED, helloworld.address))?;
    let output = nohop.cli("status --wait-ready --timeout 120 --json")?;
    ensure!(output.status.success(), "{output:?}");
    ensure!(serde_json::from_slice::<Value>(&output.stdout)?["ready"] == true);
    nohop.wait_for_backends("helloworld", 1)?;
    ensure!(nohop.cli("status")?.status.success());

    shows_nothing_forged(&nohop)?;
    let json = String::from_utf8(nohop.cli("services --json")?.stdout)?;
    ensure!(!json.contains(['\u{1b}', '\u{9b}', '\u{202e}']), "{json:?}");
    let services: Value = serde_json::from_str(&json)?;
    ensure!(services[0]["backends"][0]["instance"] == FORGED, "{services:#}");

    // A request that waits is answered after each kind of change, none of which is the table's.
    let link = nohop.pin("links/nohop_connect4")?;
    let before = revision(&nohop.status()?)?;
    cmd::words("bpftool", &format!("link detach pinned {}", link.display()))?;
    let before = wait_for(&nohop, before, |status| {
        status["problems"].to_string().contains("something detached")
    })?;
    let off = nohop.state_dir().join("off");
    fs::write(&off, "")?;
    let before = wait_for(&nohop, before, |status| status["datapath"]["mode"] == "shadow")?;
    fs::remove_file(&off)?;
    let before = wait_for(&nohop, before, |status| status["datapath"]["mode"] == "translate")?;
    consul.kill();
    wait_for(&nohop, before, |status| status["sources"][0]["state"] == "failing")?;

    // An earlier daemon's revision is past at once.
    let earlier = revision(&nohop.status()?)?;
    ensure!(nohop.terminate()?.success());
    nohop.start_again_unready()?;
    let later = revision(&nohop.document(&format!("/v1/status?after={earlier}&wait=600"))?)?;
    ensure!(later > earlier, "{later} after {earlier}");
    Ok(())
}

/// Each command shows an instance whose id would command a terminal, and arguments that would.
fn shows_nothing_forged(nohop: &Nohop) -> Result<()> {
    let escaped = r"web-1\n  healthy    10.9.9.9:1\u{1b}[2J\u{9b}31m\u{202e}";
    let target = format!("instance:{FORGED}");
    for (arguments, is_shown) in [
        (&["status"][..], false),
        (&["services"], true),
        (&["services", FORGED], false),
        (&["explain", "helloworld"], true),
        (&["explain", FORGED], false),
        (&["dns", "query", FORGED], true),
        (&["drain", FORGED], true),
        (&["drain"], true),
        (&["undrain", &target], true),
        (&["undrain", &target], true),
        (&["log", FORGED], true),
        (&["top", "--json"], false),
        (&["check"], false),
        (&["debug", FORGED], false),
    ] {
        let mut command = nohop.command("")?;
        // `debug` would make a file of that name.
        command.args(arguments).current_dir(nohop.state_dir());
        let output = cmd::output(command)?;
        let text = String::from_utf8([output.stdout, output.stderr].concat())?;
        ensure!(text.contains(escaped) || !is_shown, "{arguments:?}: {text}");
        let is_plain = |c: char| c == '\n' || !c.is_control() && c != '\u{202e}';
        ensure!(text.chars().all(is_plain), "{arguments:?}: {text:?}");
    }
    let mut terminal = Terminal::spawn(&nohop.command("top")?)?;
    terminal.wait_for(|screen| screen.contents().contains("helloworld "))?;
    terminal.press("\r")?;
    terminal.wait_for(|screen| screen.contents().contains(r"web-1\n  healthy"))?;
    terminal.press("q")?;
    terminal.wait_for_exit()?;
    Ok(())
}

/// Follows the status from a revision on until something holds of it, and returns the revision then.
/// The requests would wait for ten minutes, which is more than the client does.
fn wait_for(nohop: &Nohop, mut after: u64, holds: impl Fn(&Value) -> bool) -> Result<u64> {
    loop {
        let status = nohop.document(&format!("/v1/status?after={after}&wait=600"))?;
        after = revision(&status)?;
        if holds(&status) {
            return Ok(after);
        }
    }
}

fn revision(status: &Value) -> Result<u64> {
    status["revision"].as_u64().with_context(|| format!("no revision in {status:#}"))
}

//! Resolvers of different libraries, by lists of domains to search, while the daemon runs, is dead, and
//! hangs: which of them find a service. What they don't find docs/dns.md notes.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use testbed::consul;
use testbed::nohop::Nohop;
use testbed::{cmd, tempdir::TempDir};

use crate::cluster::{Catalog, Nodes, unit, vip};
use crate::resolvers;

/// What the daemon does.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Daemon {
    Runs,
    IsDead,
    /// It holds its sockets, and reads nothing.
    Hangs,
}

/// What is in resolv.conf beside the nameserver, the name that is looked up, and who doesn't find it when
/// names before it get SERVFAIL from the kernel, and when they get no answer.
const LISTS: [(&str, &str, [&[&str]; 2]); 4] = [
    ("", "helloworld.service", [&[], &[]]),
    ("search service", "helloworld", [&[], &[]]),
    ("search outside.example service", "helloworld", [&["musl"], &["glibc", "musl"]]),
    ("search service.example\noptions ndots:2", "helloworld.service", [&["musl"], &["musl"]]),
];

pub fn run() -> Result<()> {
    let programs = TempDir::new("lookup")?;
    let musl = resolvers::build_musl(&programs)?;
    let nodes = Nodes::new()?;
    // The resolver of all other names, which knows none.
    let _others = resolvers::dnsmasq_on(&nodes, "--listen-address=127.0.0.2 --local=/#/")?;
    let one = nodes.helloworld("one")?;
    let catalog = Catalog::new(&[("helloworld", &[one.address])])?;
    // So that the kernel answers when it takes the daemon for dead, and not before.
    let standby = "dns.kernel_mode = \"standby\"\n";
    let config = catalog.config() + "dns.forward = [\"127.0.0.2:53\"]\n" + standby;
    let mut nohop = nodes.nohop(&config)?;
    nohop.wait_for_status(|status| unit(status, "names")["state"] == "attached")?;
    let vip = vip(&nohop, "helloworld")?.ip().to_string();

    let found = |name: &str, resolver: &str| -> Result<String> {
        let mut command: Command = match resolver {
            "glibc" => nodes.inside().command("getent"),
            "Go" => nodes.inside().command(consul::program()?),
            _ => nodes.inside().command(&musl),
        };
        match resolver {
            "glibc" => command.args(["ahostsv4", name]),
            // It doesn't understand the answer, and quotes it.
            "Go" => command
                .args(["members", &format!("-http-addr=http://{name}:80")])
                .env("GODEBUG", "netdns=go"),
            _ => command.arg(name),
        };
        let output = cmd::output(command)?;
        Ok(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
    };
    for daemon in [Daemon::Runs, Daemon::Hangs, Daemon::IsDead] {
        become_so(&nodes, &nohop, daemon)?;
        for (list, name, [when_dead, when_silent]) in LISTS {
            let without = match daemon {
                Daemon::Runs => &[],
                Daemon::IsDead => when_dead,
                Daemon::Hangs => when_silent,
            };
            for resolver in ["glibc", "Go", "musl"] {
                let is_expected = !without.contains(&resolver);
                // As short as can be, where it ends in a time-out.
                let times_out = daemon == Daemon::Hangs || !is_expected;
                let timeout = if times_out { 1 } else { 30 };
                let options = format!("options timeout:{timeout} attempts:1");
                let resolv_conf = format!("nameserver 127.0.0.1\n{list}\n{options}\n");
                nodes.client.set_resolv_conf(&resolv_conf)?;
                let text = found(name, resolver)?;
                let is_found = match resolver {
                    "Go" => text.contains("invalid character 'h'"),
                    _ => text.contains(&vip),
                };
                let what = format!("{resolver} of {name}, {list:?}, {daemon:?}");
                ensure!(is_found == is_expected, "{what}: {text}");
            }
        }
        // c-ares, which has no lists.
        let script =
            "require('dns').resolve4('helloworld.service', (e, a) => console.log(e || a[0]))";
        let mut node = nodes.inside().command("node");
        node.args(["-e", script]);
        let text = cmd::stdout(node)?;
        ensure!(text.trim() == vip, "c-ares, {daemon:?}: {text}");
    }
    nohop.start_again().context("at the end")
}

fn become_so(nodes: &Nodes, nohop: &Nohop, daemon: Daemon) -> Result<()> {
    match daemon {
        Daemon::Runs => Ok(()),
        Daemon::Hangs => {
            nohop.process.signal(Signal::STOP)?;
            // It asks each second until the kernel answers.
            let answer = nodes.inside().run("dig", "+time=1 +tries=60 helloworld.service")?;
            ensure!(answer.contains("status: NOERROR"), "{answer}");
            Ok(())
        }
        Daemon::IsDead => nohop.kill(),
    }
}

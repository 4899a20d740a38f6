//! Names outside of nohop's domain are answered by the upstream.

use anyhow::{Result, ensure};
use testbed::process::Process;

use crate::cluster::{BACKEND, Catalog, Nodes, vip};

pub fn run() -> Result<()> {
    let nodes = Nodes::new()?;
    let mut dnsmasq = nodes.backend.outside().command("dnsmasq");
    dnsmasq
        .args("--keep-in-foreground --log-facility=- --conf-file=/dev/null --pid-file=".split(' '));
    dnsmasq
        .args("--user=root --no-resolv --no-hosts --bind-interfaces --interface=eth0".split(' '));
    dnsmasq.args(["--address=/outside.example/192.0.2.7", "--txt-record=txt.example,found"]);
    let dnsmasq = Process::spawn("dnsmasq", dnsmasq)?;
    dnsmasq.wait_for_line(&["started, version"])?;

    let helloworld = nodes.helloworld("helloworld")?;
    let catalog = Catalog::new(&[("helloworld", &[helloworld.address])])?;
    let forward = format!("dns.forward = [\"{BACKEND}:53\"]\n");
    let nohop = nodes.nohop(&(catalog.config() + &forward))?;

    for words in ["+short outside.example", "+short +tcp outside.example"] {
        let answer = nodes.dig(words)?;
        ensure!(answer == "192.0.2.7\n", "{words}: {answer}");
    }
    let answer = nodes.dig("+short txt.example TXT")?;
    ensure!(answer == "\"found\"\n", "{answer}");
    let recursion = nodes.dig("outside.example")?;
    ensure!(recursion.contains(" ra;"), "recursion isn't offered: {recursion}");
    let own = nodes.dig("+short helloworld.service")?;
    ensure!(own.trim() == vip(&nohop, "helloworld")?.ip().to_string(), "{own}");
    Ok(())
}

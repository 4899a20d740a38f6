//! A service with instances at IPv4 and IPv6 addresses, and an IPv6 VIP: curl reaches it by name over
//! either family, and a client that can't reach an IPv6 instance gets the other one.

use anyhow::{Result, ensure};
use testbed::cmd;
use testbed::nohop::service;
use testbed::process::Process;

use crate::cluster::{Catalog, Nodes};

const POOL6: &str = "fd6e:6f68:6f70::/96";

pub fn run() -> Result<()> {
    let nodes = Nodes::new()?;
    for (host, address) in [(&nodes.client, "fd99::1/64"), (&nodes.backend, "fd99::2/64")] {
        host.ip(&format!("addr add {address} dev eth0 nodad"))?;
    }
    let over_v4 = nodes.helloworld("v4")?;
    let mut command = nodes.backend.outside().command(cmd::built("nohop-load")?);
    command.args(["hello", "[fd99::2]:8080", "--name", "v6"]);
    let over_v6 = Process::spawn("helloworld v6", command)?;
    over_v6.wait_for_line(&["listening on "])?;
    let catalog = Catalog::new(&[])?;
    catalog.write(&format!(
        "[[service]]\nname = \"both\"\n[[service.backend]]\naddress = \"{}\"\n\
         [[service.backend]]\naddress = \"[fd99::2]:8080\"\n\
         [[service]]\nname = \"only6\"\n[[service.backend]]\naddress = \"[fd99::2]:8080\"\n",
        over_v4.address
    ))?;
    let nohop = nodes.nohop(&format!("vip.pool6 = {POOL6:?}\n{}", catalog.config()))?;

    ensure!(nodes.dig("+short AAAA both.service")?.starts_with("fd6e:6f68:6f70::"));
    let curl = |family: &str, name: &str| {
        let mut curl = nodes.inside().command("curl");
        curl.args([family, "-sS", "--max-time", "60"]).arg(format!("http://{name}.service/"));
        cmd::output(curl)
    };
    let mut answers: Vec<String> = Vec::new();
    for _ in 0..32 {
        let output = curl("-4", "both")?;
        ensure!(output.stdout == b"hello from v4\n", "by IPv4: {output:?}");
        let output = curl("-6", "both")?;
        answers.push(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    answers.sort_unstable();
    answers.dedup();
    ensure!(answers == ["hello from v4\n", "hello from v6\n"], "by IPv6: {answers:?}");

    let output = curl("-6", "only6")?;
    ensure!(output.stdout == b"hello from v6\n", "{output:?}");
    let output = curl("-4", "only6")?;
    ensure!(output.status.code() == Some(7), "curl reports that it can't connect: {output:?}");
    let services = nohop.services()?;
    let only6 = service(&services, "only6");
    ensure!(only6.is_some_and(|service| service["refused_family"] == 1), "{services:#}");
    let explained = nohop.cli("explain only6")?;
    let text = String::from_utf8_lossy(&explained.stdout);
    ensure!(text.contains("AF_INET") && text.contains("IPv6 address"), "{text}");

    // Where no hook runs, a VIP leads nowhere, and not out by some route.
    let vip6 = only6.and_then(|service| service["vip6"].as_str()).unwrap_or_default();
    let mut curl = nodes.client.outside().command("curl");
    curl.args(["-gsS", "--max-time", "60"]).arg(format!("http://[{vip6}]/"));
    let output = cmd::output(curl)?;
    ensure!(!output.status.success() && output.stdout.is_empty(), "{output:?}");
    let route = nodes.client.ip("-6 route show table local type unreachable")?;
    ensure!(route.contains(POOL6), "{route}");
    Ok(())
}

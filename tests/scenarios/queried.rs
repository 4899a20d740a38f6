//! Where answers come from, by `nohop dns query`; and the log of queries, which has a line for each response of the
//! daemon and, for what the kernel answers, how often it did.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::nohop::Nohop;

use crate::cluster::{CLIENT, Catalog, Nodes, unit, vip};
use crate::resolvers;

/// The resolver of other names, on the client node.
const OTHERS: &str = "127.0.0.2:53";

pub fn run() -> Result<()> {
    let nodes = Nodes::new()?;
    let one = nodes.helloworld("one")?;
    let catalog = Catalog::new(&[("helloworld", &[one.address])])?;
    // More than fits into a datagram.
    let long = format!("--txt-record=long.example{}", format!(",{}", "x".repeat(250)).repeat(6));
    let names = format!("--listen-address=127.0.0.2 --address=/other.example/192.0.2.9 {long}");
    let _others = resolvers::dnsmasq_on(&nodes, &names)?;
    nodes.client.set_resolv_conf("nameserver 127.0.0.1\n")?;
    let listen = format!("dns.listen = [\"127.0.0.1:53\", \"{CLIENT}:53\"]\n");
    let config = |more: &str| format!("{}{listen}dns.log = true\n{more}", catalog.config());
    let forwards = format!("dns.forward = [{OTHERS:?}]\n");
    let nohop = nodes.nohop(&config(&forwards))?;
    nohop.wait_for_status(|status| unit(status, "names")["state"] == "attached")?;
    let vip = vip(&nohop, "helloworld")?.ip().to_string();

    let kernel = query(&nohop, "helloworld.service")?;
    ensure!(kernel["origin"] == "kernel" && kernel["answers"].to_string().contains(&vip));
    ensure!(query(&nohop, "helloworld.service AAAA")?["origin"] == "kernel");
    for (words, code, origin, line) in [
        ("helloworld.service SRV", "NOERROR", "table", "udp name=helloworld.service. kind=SRV"),
        ("nothing.service", "NXDOMAIN", "table", "udp name=nothing.service. kind=A"),
        ("other.example", "NOERROR", "upstream", "udp name=other.example. kind=A"),
        ("long.example TXT", "NOERROR", "upstream", "tcp name=long.example. kind=TXT"),
    ] {
        let found = query(&nohop, words)?;
        ensure!(found["code"] == code && found["origin"] == origin, "{words}: {found:#}");
        ensure!((found["upstream"] == OTHERS) == (origin == "upstream"), "{words}: {found:#}");
        let n_answers = found["answers"].as_array().context("answers")?.len();
        let line = format!("{line} rcode={code} answers={n_answers} duration_ms=");
        nohop.process.wait_for_line(&[&format!("query client=127.0.0.1 transport={line}")])?;
    }
    let text = nohop.cli("dns query helloworld.service")?;
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    ensure!(text.contains("from        the kernel, from the table"), "{text}");

    // resolv.conf has no resolver but nohop; and what the kernel leaves to the daemon comes from its table.
    reload(&nohop, &config("dns.kernel = false\ndns.allow = []\n"))?;
    let nowhere = query(&nohop, "other.example")?;
    ensure!(nowhere["origin"] == "nowhere" && nowhere["code"] == "SERVFAIL", "{nowhere:#}");
    ensure!(nowhere["reason"] == "there is no resolver to ask but this one", "{nowhere:#}");
    ensure!(query(&nohop, "helloworld.service")?["origin"] == "table");
    let refused = nodes.backend.outside();
    let refused = refused.run("dig", &format!("+time=60 +tries=1 @{CLIENT} helloworld.service"))?;
    ensure!(refused.contains("status: REFUSED"), "{refused}");
    for line in [
        "transport=udp name=other.example. kind=A rcode=SERVFAIL answers=0",
        "transport=udp name=helloworld.service. kind=A rcode=NOERROR answers=1",
        "transport=udp name=helloworld.service. kind=A rcode=REFUSED answers=0",
    ] {
        nohop.process.wait_for_line(&[line])?;
    }

    // The kernel's answers of each minute, and the last ones: A, AAAA, A.
    ensure!(nohop.terminate()?.success());
    nohop.process.wait_for_line(&["stopping: "])?;
    let start = "answered by the kernel name=helloworld.service. queries=";
    let mut n_queries = 0;
    for line in nohop.process.lines_with(start) {
        n_queries += line.split(start).last().context("queries")?.trim().parse::<u32>()?;
    }
    ensure!(n_queries == 3, "{n_queries} queries");
    Ok(())
}

fn query(nohop: &Nohop, words: &str) -> Result<Value> {
    let output = nohop.cli(&format!("dns query {words} --json"))?;
    ensure!(output.status.success(), "{words}: {output:?}");
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn reload(nohop: &Nohop, config: &str) -> Result<()> {
    nohop.configure(config)?;
    let output = nohop.cli("reload")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    Ok(())
}

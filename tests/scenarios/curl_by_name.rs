//! An unmodified curl requests `http://helloworld.service/`, and each of three backends answers.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use testbed::cmd;

use crate::cluster::Cluster;

pub fn run() -> Result<()> {
    let cluster = Cluster::new(3)?;
    let nodes = &cluster.nodes;
    let vip = cluster.vip("helloworld")?;

    let mut curl = nodes.inside().command("curl");
    curl.args(["-sS", "--max-time", "60", "--header", "Connection: close"]);
    let answers = cmd::stdout({
        curl.arg("http://helloworld.service/?[1-60]");
        curl
    })?;
    ensure!(answers.lines().count() == 60, "60 curls brought {answers}");
    let answered: BTreeSet<_> = answers.lines().collect();
    let expected =
        ["hello from helloworld-0", "hello from helloworld-1", "hello from helloworld-2"];
    ensure!(answered == BTreeSet::from(expected), "{answered:?}");

    // The application sees the address that it connected.
    let connects = nodes.connect(vip, 20)?;
    ensure!(connects.peers.keys().eq([&vip.to_string()]), "{connects:?}");

    let by_udp = nodes.dig("+short helloworld.service")?;
    let by_tcp = nodes.dig("+short +tcp HelloWorld.service")?;
    ensure!(by_udp.trim() == vip.ip().to_string() && by_tcp == by_udp, "{by_udp} and {by_tcp}");
    let misspelt = nodes.dig_unknown("heloworld.service")?;
    ensure!(misspelt.contains("status: NXDOMAIN"), "{misspelt}");
    let aaaa = nodes.dig("helloworld.service AAAA")?;
    ensure!(aaaa.contains("status: NOERROR") && aaaa.contains("ANSWER: 0"), "{aaaa}");
    Ok(())
}

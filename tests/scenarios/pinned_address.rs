//! `127.0.0.1:80` is one service's address, too; the rest of 127.0.0.1 stays what it is.

use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::{Result, ensure};
use testbed::helloworld::{Helloworld, connect};

use crate::cluster::Cluster;

const PIN: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 80);

pub fn run() -> Result<()> {
    let cluster = Cluster::with_config(1, "vip.pins = { helloworld = \"127.0.0.1:80\" }")?;
    let (nodes, outside) = (&cluster.nodes, cluster.nodes.client.outside());

    for address in [PIN, cluster.vip("helloworld")?] {
        let connects = nodes.connect(address, 20)?;
        ensure!(
            connects.all_answered(|answer| answer == "hello from helloworld-0"),
            "{connects:?}"
        );
        ensure!(connects.peers.keys().eq([&address.to_string()]), "{connects:?}");
    }
    let connects = connect(outside, PIN, 5)?;
    ensure!(connects.all_failed_with("ConnectionRefused"), "outside of the cgroup: {connects:?}");

    let leader = nodes.inside().run("curl", "-sS http://127.0.0.1:8500/v1/status/leader")?;
    ensure!(leader.contains("10.99.0.2:"), "{leader}");
    let neighbour = Helloworld::start(outside, "neighbour", "127.0.0.1:0")?;
    let connects = nodes.connect(neighbour.address, 20)?;
    ensure!(connects.all_answered(|answer| answer == "hello from neighbour"), "{connects:?}");
    Ok(())
}

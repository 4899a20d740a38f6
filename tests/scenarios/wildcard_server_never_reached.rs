//! A server of the client host that listens on every address never gets a connection to a VIP.

use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::{Result, ensure};
use testbed::cmd;
use testbed::helloworld::{Helloworld, connect};

use crate::cluster::{Catalog, Nodes, vip};

pub fn run() -> Result<()> {
    let nodes = Nodes::new()?;
    let outside = nodes.client.outside();
    let _wildcards = [
        Helloworld::start(outside, "wildcard", "0.0.0.0:80")?,
        Helloworld::start(outside, "wildcard", "0.0.0.0:81")?,
    ];
    let helloworld = nodes.helloworld("helloworld")?;
    let catalog = Catalog::new(&[("helloworld", &[helloworld.address]), ("empty", &[])])?;
    let nohop = nodes.nohop(&catalog.config())?;

    let full = vip(&nohop, "helloworld")?;
    let empty = vip(&nohop, "empty")?;
    let other_port = SocketAddrV4::new(*full.ip(), 81);
    let mut pool = (1..).map(|i| SocketAddrV4::new(Ipv4Addr::new(127, 222, 0, i), 80));
    let unassigned = pool.find(|address| ![full, empty].contains(address)).unwrap_or(empty);

    let reached = nodes.connect(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 80), 5)?;
    ensure!(reached.all_answered(|answer| answer == "hello from wildcard"), "{reached:?}");
    let served = nodes.connect(full, 20)?;
    ensure!(served.all_answered(|answer| answer == "hello from helloworld"), "{served:?}");
    for address in [empty, unassigned, other_port] {
        let connects = nodes.connect(address, 20)?;
        ensure!(connects.all_failed_with("ConnectionRefused"), "{address}, inside: {connects:?}");
    }
    let mut curl = nodes.inside().command("curl");
    curl.args(["-sS", "-g", "--max-time", "60"]).arg(format!("http://[::ffff:{}]/", full.ip()));
    let output = cmd::output(curl)?;
    ensure!(output.stdout == b"hello from helloworld\n", "a dual-stack socket: {output:?}");
    for address in [empty, unassigned, other_port, full] {
        let connects = connect(outside, address, 20)?;
        ensure!(connects.all_failed_with("HostUnreachable"), "{address}, outside: {connects:?}");
    }
    Ok(())
}

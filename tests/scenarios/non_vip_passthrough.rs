//! A connection to an address that is no VIP works as without nohop.

use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::{Result, ensure};
use testbed::helloworld::Helloworld;

use crate::cluster::{Catalog, Nodes};

pub fn run() -> Result<()> {
    let nodes = Nodes::new()?;
    let routed = nodes.helloworld("routed")?;
    let remote = nodes.helloworld("remote")?;
    let local = Helloworld::start(nodes.client.outside(), "local", "127.0.0.1:0")?;
    let catalog = Catalog::new(&[("helloworld", &[routed.address])])?;
    let nohop = nodes.nohop(&catalog.config())?;

    for (address, answer) in [
        (routed.address, "hello from routed"),
        (remote.address, "hello from remote"),
        (local.address, "hello from local"),
    ] {
        let connects = nodes.connect(address, 20)?;
        ensure!(connects.all_answered(|a| a == answer), "{address}: {connects:?}");
        ensure!(connects.peers.keys().eq([&address.to_string()]), "{address}: {connects:?}");
    }
    // Where no server listens.
    for ip in [Ipv4Addr::new(10, 99, 0, 2), Ipv4Addr::LOCALHOST] {
        let connects = nodes.connect(SocketAddrV4::new(ip, 80), 5)?;
        ensure!(connects.all_failed_with("ConnectionRefused"), "{ip}: {connects:?}");
    }
    let services = nohop.services()?;
    ensure!(services[0]["connects"] == 0 && services[0]["refused"] == 0, "{services:#}");
    Ok(())
}

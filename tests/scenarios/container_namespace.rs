//! A container has a network namespace of its own and is served all the same; what means
//! something else there, the host's loopback and a pinned address, isn't translated.

use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::{Result, ensure};
use testbed::helloworld::{Helloworld, connect};
use testbed::net::Host;

use crate::cluster::{Catalog, Nodes, vip};

const PIN: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 80);

pub fn run() -> Result<()> {
    let nodes = Nodes::new()?;
    let container = Host::new("container")?;
    container.connect_veth(&nodes.backend, ["10.99.1.1/24", "10.99.1.2/24"])?;
    container.ip("route add 10.99.0.0/24 via 10.99.1.2")?;
    let inside = container.inside(&nodes.cgroup);

    let remote = nodes.helloworld("remote")?;
    let local = Helloworld::start(nodes.client.outside(), "local", "127.0.0.1:0")?;
    // Traps: the container's own servers, where a careless translation would lead.
    let _same_port = Helloworld::start(inside, "container", &local.address.to_string())?;
    let _at_pin = Helloworld::start(inside, "container", &PIN.to_string())?;
    let catalog = Catalog::new(&[("remote", &[remote.address]), ("local", &[local.address])])?;
    let pins = "vip.pins = { remote = \"127.0.0.1:80\" }\n";
    let nohop = nodes.nohop(&(catalog.config() + pins))?;
    let (remote_vip, local_vip) = (vip(&nohop, "remote")?, vip(&nohop, "local")?);

    for (address, answer) in [
        (remote_vip, "hello from remote"),
        (local_vip, "hello from local"),
        (PIN, "hello from remote"),
    ] {
        let connects = nodes.connect(address, 20)?;
        ensure!(connects.all_answered(|a| a == answer), "host, {address}: {connects:?}");
    }
    for (address, answer) in [(remote_vip, "hello from remote"), (PIN, "hello from container")] {
        let connects = connect(inside, address, 20)?;
        ensure!(connects.all_answered(|a| a == answer), "container, {address}: {connects:?}");
    }
    let connects = connect(inside, local_vip, 20)?;
    ensure!(connects.all_failed_with("ConnectionRefused"), "container, {local_vip}: {connects:?}");
    Ok(())
}

//! While every backend is critical a connection is refused and the name still answers; a backend that
//! recovers serves again.

use anyhow::{Result, ensure};

use crate::cluster::Cluster;

pub fn run() -> Result<()> {
    let cluster = Cluster::new(2)?;
    let (nohop, nodes) = (&cluster.nohop, &cluster.nodes);
    let vip = cluster.vip("helloworld")?;

    cluster.server.fail("helloworld-0")?;
    cluster.server.fail("helloworld-1")?;
    nohop.wait_for_backends("helloworld", 0)?;
    let connects = nodes.connect(vip, 50)?;
    ensure!(connects.all_failed_with("ConnectionRefused"), "{connects:?}");
    let answer = nodes.dig("+short helloworld.service")?;
    ensure!(answer.trim() == vip.ip().to_string(), "{answer}");

    cluster.server.pass("helloworld-1")?;
    nohop.wait_for_backends("helloworld", 1)?;
    let connects = nodes.connect(vip, 50)?;
    ensure!(connects.all_answered(|answer| answer == "hello from helloworld-1"), "{connects:?}");
    Ok(())
}

//! A backend that becomes critical gets no connection once nohop knows of it, which it learns from Consul
//! by itself. How soon, `cargo xtask bench change` measures.

use anyhow::{Result, ensure};
use testbed::nohop::n_healthy;

use crate::cluster::Cluster;

pub fn run() -> Result<()> {
    let cluster = Cluster::new(2)?;
    let vip = cluster.vip("helloworld")?;
    let both = cluster.nodes.connect(vip, 100)?;
    ensure!(both.answers.len() == 2 && both.errors.is_empty(), "{both:?}");

    cluster.server.fail("helloworld-0")?;
    // Without a lookup, which would have nohop ask Consul.
    cluster.nohop.wait_until(|services| n_healthy(services, "helloworld") == 1)?;

    let connects = cluster.nodes.connect(vip, 200)?;
    ensure!(connects.all_answered(|answer| answer == "hello from helloworld-1"), "{connects:?}");
    Ok(())
}

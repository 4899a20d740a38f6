//! A backend that becomes critical gets no dial one second after Consul knows of it.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::cluster::{Cluster, SOON};

pub fn story() -> Result<()> {
    let cluster = Cluster::new(2)?;
    let vip = cluster.vip("helloworld")?;
    let both = cluster.nodes.dial(vip, 100)?;
    ensure!(both.answers.len() == 2 && both.errors.is_empty(), "{both:?}");

    cluster.server.fail("helloworld-0")?;
    let consul_knows = Instant::now();
    cluster.nohop.wait_for_backends("helloworld", 1, SOON)?;
    let took = consul_knows.elapsed();
    ensure!(took < Duration::from_secs(1), "the critical backend left after {took:?}");

    let dials = cluster.nodes.dial(vip, 200)?;
    ensure!(dials.all_answered(|answer| answer == "hello from helloworld-1"), "{dials:?}");
    Ok(())
}

//! Two services churn while each is dialled 10,000 times: every dial is answered, by its own.

use std::thread;

use anyhow::{Context, Result, ensure};
use lb_tests::consul::instance;
use lb_tests::helloworld::Dials;

use crate::cluster::Cluster;

const N_DIALS: u32 = 10_000;

pub fn story() -> Result<()> {
    let mut cluster = Cluster::new(0)?;
    cluster.serve("a", 3)?;
    cluster.serve("b", 3)?;
    let (a_vip, b_vip) = (cluster.vip("a")?, cluster.vip("b")?);
    let generation = || Ok::<_, anyhow::Error>(cluster.nohop.status()?["generation"].as_u64());
    let before = generation()?.context("a status without a generation")?;

    let (a_dials, b_dials) = thread::scope(|scope| -> Result<(Dials, Dials)> {
        let dialers = [a_vip, b_vip].map(|vip| {
            let nodes = &cluster.nodes;
            scope.spawn(move || nodes.dial(vip, N_DIALS))
        });
        // The last two of each service come and go, the first one stays.
        let ids = ["a-1", "b-1", "a-2", "b-2"].into_iter().cycle();
        for id in ids.take_while(|_| dialers.iter().any(|dialer| !dialer.is_finished())) {
            let i: usize = if id.starts_with('a') { 0 } else { 3 };
            let address = cluster.helloworlds[i + usize::from(id.as_bytes()[2] - b'0')].address;
            cluster.server.deregister(id)?;
            cluster.server.register(&instance(&id[..1], id, address))?;
        }
        let [a, b] = dialers.map(|dialer| dialer.join().expect("a dialer panicked"));
        Ok((a?, b?))
    })?;

    let after = generation()?.context("a status without a generation")?;
    ensure!(after >= before + 10, "it churned too little: generation {before} to {after}");
    for (dials, own) in [(a_dials, "hello from a-"), (b_dials, "hello from b-")] {
        ensure!(dials.all_answered(|answer| answer.starts_with(own)), "{own}: {dials:?}");
        ensure!(dials.answers.values().sum::<u64>() == u64::from(N_DIALS), "{dials:?}");
    }
    Ok(())
}

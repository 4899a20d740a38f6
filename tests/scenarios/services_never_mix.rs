//! Two services churn while each is connected to 10,000 times: every connection is answered, by its own.

use std::net::SocketAddrV4;
use std::thread;

use anyhow::{Context, Result, ensure};
use testbed::consul::instance;
use testbed::helloworld::Connects;

use crate::cluster::Cluster;

/// Connects to each service, at least this many rounds of them, and on until the table has changed
/// this often.
const N_CONNECTS_A_ROUND: u32 = 1_000;
const N_ROUNDS: usize = 10;
const N_CHANGES: u64 = 20;

/// After this many rounds without those changes something is stuck.
const MAX_ROUNDS: usize = 200;

pub fn run() -> Result<()> {
    let mut cluster = Cluster::new(0)?;
    cluster.serve("a", 3)?;
    cluster.serve("b", 3)?;
    let (a_vip, b_vip) = (cluster.vip("a")?, cluster.vip("b")?);
    let cluster = &cluster;

    thread::scope(|scope| -> Result<()> {
        let clients = [(a_vip, "hello from a-"), (b_vip, "hello from b-")]
            .map(|(vip, own)| scope.spawn(move || connect_through(cluster, vip, own)));
        // The last two of each service come and go, the first one stays.
        let churned = [("a", 1), ("b", 4), ("a", 2), ("b", 5)].into_iter().cycle();
        for (name, i) in churned.take_while(|_| !clients.iter().all(|d| d.is_finished())) {
            let id = format!("{name}-{}", i % 3);
            cluster.server.deregister(&id)?;
            cluster.server.register(&instance(name, &id, cluster.helloworlds[i].address))?;
        }
        clients.into_iter().try_for_each(|client| client.join().expect("a client panicked"))
    })
}

/// Connects a service while the table changes; each answer has to begin with `own`.
fn connect_through(cluster: &Cluster, vip: SocketAddrV4, own: &str) -> Result<()> {
    let generation = || -> Result<u64> {
        cluster.nohop.status()?["generation"].as_u64().context("a status without a generation")
    };
    let enough = generation()? + N_CHANGES;
    let mut n_rounds = 0;
    while n_rounds < N_ROUNDS || generation()? < enough {
        let connects: Connects = cluster.nodes.connect(vip, N_CONNECTS_A_ROUND)?;
        ensure!(connects.all_answered(|answer| answer.starts_with(own)), "{own}: {connects:?}");
        let n_answers: u64 = connects.answers.values().sum();
        ensure!(n_answers == u64::from(N_CONNECTS_A_ROUND), "{own}: {connects:?}");
        n_rounds += 1;
        ensure!(n_rounds < MAX_ROUNDS, "the table doesn't change while it is connected to");
    }
    Ok(())
}

//! Programs in other languages, unmodified and with their defaults, fetch
//! `http://helloworld.service/`: their own resolvers, and sockets of both families.

use anyhow::{Result, ensure};

use crate::cluster::Cluster;

/// A JVM connects from IPv6 sockets by default.
pub fn java() -> Result<()> {
    each_is_answered("java", "-XX:TieredStopAtLevel=1", "Main.java", 2)
}

pub fn node() -> Result<()> {
    each_is_answered("node", "", "main.js", 2)
}

pub fn python() -> Result<()> {
    each_is_answered("python3", "", "main.py", 3)
}

/// Runs a program that prints `WAY: ANSWER` for each way in which it asks.
fn each_is_answered(program: &str, options: &str, source: &str, n_ways: usize) -> Result<()> {
    let cluster = Cluster::new(3)?;
    let source = format!("{}/clients/{source}", env!("CARGO_MANIFEST_DIR"));
    let inside = cluster.nodes.inside();
    let answers = inside.run(program, &format!("{options} {source} helloworld.service"))?;
    ensure!(answers.lines().count() >= n_ways, "{answers}");
    ensure!(answers.lines().all(|line| line.contains(": hello from helloworld-")), "{answers}");
    Ok(())
}

//! A simulation of the choice of a backend, by the code that runs in the kernel, for fleets that
//! don't fit here: what each algorithm does to the spread of load, to waiting times and to
//! connections. It is deterministic.

mod engine;
mod policies;
mod scenes;

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::Args;

pub use engine::{Figures, run};
pub use policies::Policy;
pub use scenes::{Scene, all as all_scenes};

/// Simulates the choice of a backend; without root rights, in seconds.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Only these scenes: equal, gateways, slow, refuses, silent, restart, new, far
    scenes: Vec<String>,
    /// Client nodes
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    nodes: u32,
    /// Backends
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(2..=4_096))]
    backends: u32,
    /// How long clients connect, in simulated seconds; the first two aren't measured
    #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u64).range(10..=3_600))]
    seconds: u64,
    /// The seed
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Simulates, and prints a table for each scene.
///
/// # Errors
/// For a scene that isn't there.
pub fn print(options: &Options) -> Result<()> {
    let lasts = Duration::from_secs(options.seconds);
    let scenes = all_scenes(options.nodes as usize, options.backends as usize, lasts);
    let names: Vec<_> = scenes.iter().map(|scene| scene.name).collect();
    for name in &options.scenes {
        let is_known = names.contains(&name.as_str());
        ensure!(is_known, "there is no scene {name}; there are {}", names.join(", "));
    }
    let start = Instant::now();
    let is_wanted = |scene: &&Scene| {
        options.scenes.is_empty() || options.scenes.iter().any(|name| name == scene.name)
    };
    for scene in scenes.iter().filter(is_wanted) {
        print!("{}", table(scene, options.seed));
    }
    eprintln!("{:.1} s", start.elapsed().as_secs_f64());
    Ok(())
}

/// A scene's table, in Markdown.
pub fn table(scene: &Scene, seed: u64) -> String {
    let policies = Policy::all();
    let rows = std::thread::scope(|scope| {
        let runs: Vec<_> =
            policies.iter().map(|&policy| scope.spawn(move || run(scene, policy, seed))).collect();
        let rows: Vec<Figures> =
            runs.into_iter().map(|run| run.join().expect("a simulation ends")).collect();
        rows
    });
    let n_connections = rows.first().map_or(0, |figures| figures.n_connections);
    let [n_nodes, n_backends, n_connections] =
        [scene.n_nodes, scene.n_backends, n_connections].map(thousands);
    let mut table = format!(
        "### {}\n\n{n_nodes} clients, {n_backends} backends, {n_connections} connections.\n\n",
        scene.title
    );
    let is_odd_shown = rows.iter().any(|figures| figures.odd_share.is_some());
    let (odd_head, odd_rule) = if is_odd_shown { (" odd share |", "---|") } else { ("", "") };
    table.push_str(&format!(
        "| policy | busiest | most open |{odd_head} p50 ms | p99 ms | p99.9 ms | failed |\n\
         |---|---|---|{odd_rule}---|---|---|---|\n"
    ));
    for (policy, figures) in policies.iter().zip(rows) {
        let [p50, p99, p999] = figures.waiting.map(|time| thousands(time.as_millis() as usize));
        let odd = figures.odd_share.map_or(String::new(), |share| format!(" {share:.2} |"));
        table.push_str(&format!(
            "| {} | {:.2} | {} |{odd} {p50} | {p99} | {p999} | {} |\n",
            policy.name(),
            figures.busiest,
            thousands(figures.most_open),
            thousands(figures.n_failed)
        ));
    }
    table.push('\n');
    table
}

/// With separators of thousands.
fn thousands(number: usize) -> String {
    match number {
        below @ 0..1_000 => below.to_string(),
        above => format!("{},{:03}", thousands(above / 1_000), above % 1_000),
    }
}

#[cfg(test)]
mod tests;

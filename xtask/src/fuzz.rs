//! Fuzzing what comes from outside: one target after the other, each for a bounded time.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process;
use crate::setup;

/// The targets: what they read is said in lb-userspace/src/fuzzing.rs.
const TARGETS: [&str; 5] = ["consul", "config", "catalog", "dns", "state"];

/// Inputs longer than this find nothing that shorter ones don't.
const MAX_LEN: usize = 64 << 10;

/// Runs every target, or only `target`, for so many seconds each.
///
/// # Errors
/// When a target finds something; it is said how to see it again. Or when cargo-fuzz can't be had.
pub fn run(target: Option<&str>, seconds: u64) -> Result<()> {
    let targets: Vec<&str> =
        TARGETS.into_iter().filter(|name| target.is_none_or(|wanted| wanted == *name)).collect();
    if targets.is_empty() {
        bail!("there is no target {:?}: there are {}", target.unwrap_or(""), TARGETS.join(", "));
    }
    setup::run(setup::Purpose::Test)?;
    let cargo_fuzz = setup::fuzz::provide()?;
    for (n_done, name) in targets.iter().enumerate() {
        let left = seconds * (targets.len() - n_done) as u64;
        println!("\n== fuzzing {name} for {seconds} s; {left} s left in all");
        // What is found interesting stays beside the target's build; the corpus in the repository
        // is small and chosen by hand.
        let found = crate::root().join("fuzz/target/found").join(name);
        fs::create_dir_all(&found).with_context(|| format!("can't make {}", found.display()))?;
        let mut fuzz = Command::new("rustup");
        fuzz.args(["run", &setup::toolchain::name()])
            .arg(&cargo_fuzz)
            .args(["run", name])
            .arg(&found);
        fuzz.arg(crate::root().join("fuzz/corpus").join(name));
        fuzz.arg("--").arg(format!("-max_total_time={seconds}"));
        fuzz.arg(format!("-max_len={MAX_LEN}")).args(["-timeout=10", "-rss_limit_mb=2048"]);
        fuzz.args(["-print_final_stats=1", "-verbosity=0"]);
        fuzz.current_dir(crate::root());
        process::stream(&mut fuzz).with_context(|| format!("the target {name} found something"))?;
    }
    println!("\nNothing found.");
    Ok(())
}

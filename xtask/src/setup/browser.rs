//! A browser, and what checks pages in it.

use std::path::PathBuf;

use anyhow::Result;

use super::system;
use super::wheel::Wheel;

/// Chromium from the system's packages, and axe-core's script, as a package of PyPI has it.
///
/// # Errors
/// When one of them can't be had, with the way to get it.
pub fn provide() -> Result<PathBuf> {
    system::provide_program("chromium", "chromium fonts-dejavu-core")?;
    let folder = "axe_playwright_python".to_owned();
    Wheel { package: "axe-playwright-python", version: "0.1.8", folder, program: "axe.min.js" }
        .provide()
}

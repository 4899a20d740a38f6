//! What all packages share: the version, the time, where they go.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::process;
use crate::repository;

/// An architecture that packages are made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Architecture {
    #[value(name = "x86_64")]
    X86_64,
    Aarch64,
}

impl Architecture {
    pub fn name(self) -> &'static str {
        match self {
            Architecture::X86_64 => "x86_64",
            Architecture::Aarch64 => "aarch64",
        }
    }

    /// As Debian, Go and OCI call it.
    pub fn debian(self) -> &'static str {
        match self {
            Architecture::X86_64 => "amd64",
            Architecture::Aarch64 => "arm64",
        }
    }
}

/// What all packages share.
pub struct Release {
    pub version: String,
    /// The time of the commit, in seconds since 1970: that of every file.
    pub epoch: String,
    pub commit: String,
    pub out: PathBuf,
    /// What is made on the way, kept for the next time.
    pub work: PathBuf,
}

impl Release {
    pub fn path(&self, name: &str) -> PathBuf {
        self.out.join(name)
    }
}

/// Of the commit that is checked out.
pub fn release(out: &Path) -> Result<Release> {
    let git = |arguments: &[&str]| {
        let mut git = Command::new("git");
        let printed = process::output(git.args(arguments).current_dir(repository::root()))?;
        Ok::<_, anyhow::Error>(printed.trim().to_owned())
    };
    let manifest = fs::read_to_string(repository::root().join("Cargo.toml"))?;
    let version = manifest
        .lines()
        .find_map(|line| line.strip_prefix("version = \"")?.strip_suffix('"'))
        .context("Cargo.toml has no version")?;
    let out = std::path::absolute(out)?;
    let work = repository::root().join("target/dist-work");
    for folder in [&out, &work] {
        fs::create_dir_all(folder).with_context(|| format!("can't make {}", folder.display()))?;
    }
    Ok(Release {
        version: version.to_owned(),
        epoch: git(&["log", "-1", "--format=%ct"])?,
        commit: git(&["rev-parse", "HEAD"])?,
        out,
        work,
    })
}

/// The SHA-256 of a file, in hexadecimal digits.
pub fn sha256(file: &Path) -> Result<String> {
    let printed = process::output(Command::new("sha256sum").arg(file))?;
    let digits = printed.split_whitespace().next().context("sha256sum prints a sum")?;
    // Of a name with a backslash it escapes the line.
    Ok(digits.trim_start_matches('\\').to_owned())
}

/// An archive of a folder whose bytes depend on what is in it alone.
pub fn tar(folder: &Path, to: &Path, epoch: &str) -> Result<()> {
    let mut tar = Command::new("tar");
    tar.args([
        "--format=ustar",
        "--sort=name",
        "--owner=0",
        "--group=0",
        "--numeric-owner",
        "--mode=u=rwX,go=rX",
    ]);
    tar.arg(format!("--mtime=@{epoch}")).arg("-cf").arg(to).arg("-C").arg(folder).arg(".");
    process::output(&mut tar).map(drop)
}

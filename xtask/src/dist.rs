//! Packages: what a person installs who has neither a compiler nor this repository.

mod aarch64;
mod bill;
mod build;
pub mod check;
mod image;
mod package;
mod release;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::process;
use crate::setup::{self, Purpose};
use build::Target;
use package::Format;
pub use release::Architecture;
use release::{Release, release};

pub const AFTER_HELP: &str = "\
Written to target/dist (the same bytes from any folder, with the same tools):
  nohop_VERSION_ARCH.deb, nohop-VERSION.ARCH.rpm   linked with glibc; with units, configuration, manual pages,
                                                   completions, alert rules
  nohop-VERSION-ARCH-static.tar.gz                 one binary, linked with musl, for any distribution
  nohop-VERSION-ARCH-oci.tar                       an OCI image layout with that binary
  nohop-VERSION.cdx.json                           all crates in it (CycloneDX)
  nohop-VERSION-licenses.txt                       their licences
  SHA256SUMS                                       signed (SHA256SUMS.minisig) where NOHOP_SIGN_KEY names a
                                                   secret key of minisign";

/// How the packages are made.
pub struct Options {
    /// The architectures, such as `x86_64`.
    pub architectures: Vec<Architecture>,
    /// Where they are written.
    pub out: PathBuf,
}

/// Makes all packages.
///
/// # Errors
/// When something that they need isn't there, with the way to get it, or a build fails.
pub fn run(options: &Options) -> Result<()> {
    setup::run(Purpose::Build)?;
    setup::dist::provide()?;
    let release = release(&options.out)?;
    let mut files = Vec::new();
    // The commands' manual pages and completions are the same for all architectures.
    let own = Target::glibc(Architecture::X86_64);
    let native = build::build(own, &release)?;
    let written = release.work.join("files");
    process::output(Command::new(&native).arg("package-files").arg(&written))?;
    let licenses = bill::licenses(&release)?;
    for &architecture in &options.architectures {
        let glibc = match architecture {
            Architecture::X86_64 => native.clone(),
            other => build::build(Target::glibc(other), &release)?,
        };
        let stage = package::stage(architecture, &glibc, &written, &licenses, &release)?;
        for format in [Format::Deb, Format::Rpm] {
            files.push(package::pack(format, architecture, &stage, &release)?);
        }
        if architecture == Architecture::X86_64 {
            let binary = build::build(Target::musl(architecture), &release)?;
            files.push(package::tarball(architecture, &binary, &written, &licenses, &release)?);
            files.push(image::layout(architecture, &binary, &licenses, &release)?);
        }
    }
    files.push(bill::sbom(&release)?);
    files.push(licenses);
    sums(&files, &release)?;
    for file in &files {
        println!("{}", file.display());
    }
    Ok(())
}

/// A .deb of a binary that was built already, as this version; all in `folder`.
///
/// # Errors
/// When nfpm can't be had, or a step fails.
pub fn package_of(binary: &Path, version: &str, folder: &Path) -> Result<PathBuf> {
    let release = Release { version: version.to_owned(), ..release(folder)? };
    let release = Release { work: folder.join("work"), ..release };
    let written = release.work.join("files");
    process::output(Command::new(binary).arg("package-files").arg(&written))?;
    let licenses = bill::licenses(&release)?;
    package::deb(binary, &written, &licenses, &release)
}

/// SHA256SUMS, and its signature where NOHOP_SIGN_KEY names a key.
fn sums(files: &[PathBuf], release: &Release) -> Result<()> {
    let mut names: Vec<_> = files.iter().filter_map(|file| file.file_name()).collect();
    names.sort_unstable();
    let mut sha256sum = Command::new("sha256sum");
    let sums = process::output(sha256sum.args(names).current_dir(&release.out))?;
    let file = release.path("SHA256SUMS");
    fs::write(&file, sums).with_context(|| format!("can't write {}", file.display()))?;
    let Some(key) = std::env::var_os("NOHOP_SIGN_KEY") else { return Ok(()) };
    ensure!(Path::new(&key).is_file(), "NOHOP_SIGN_KEY is {}, which is no file", key.display());
    sign(&file, Path::new(&key), &release.version)
}

/// Signs a file with a secret key of minisign's: FILE.minisig.
fn sign(file: &Path, key: &Path, version: &str) -> Result<()> {
    let comment = format!("nohop {version}");
    let mut minisign = Command::new("minisign");
    minisign.args(["-S", "-t", &comment, "-s"]).arg(key).arg("-m").arg(file);
    process::stream(&mut minisign).context("minisign signs; Debian's package has that name")
}

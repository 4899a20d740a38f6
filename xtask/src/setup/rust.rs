//! The nightly compiler, and the standard library's source: the object's `core` is built from it.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Error, Result, bail};

use super::common::{Draft, announce, with_fix};
use super::toolchain::{self, Compiler};
use crate::process;

const SOURCE_FIX: &str = "set NOHOP_RUST_SRC to a rust-src tarball, a folder that holds one, or \
                           a folder that holds library/";

/// The nightly compiler that builds the object.
pub struct Nightly {
    pub sysroot: PathBuf,
    pub compiler: Compiler,
}

impl Nightly {
    /// # Errors
    /// When there is no rustup, it has no nightly, or the nightly can't build the object.
    pub fn find() -> Result<Self> {
        if process::find("rustup").is_none() {
            bail!("rustup isn't on PATH: install it from https://rustup.rs");
        }
        let name = toolchain::name();
        let version = with_fix(
            process::output(toolchain::command("rustc").arg("-vV")),
            &format!("rustup has no `{name}` that works"),
            &format!("rustup toolchain install {name} --profile minimal --component rust-src"),
        )?;
        let compiler = Compiler::read(&name, &version).map_err(Error::msg)?;
        let sysroot = process::output(toolchain::command("rustc").args(["--print", "sysroot"]))?;
        Ok(Self { sysroot: PathBuf::from(sysroot.trim()), compiler })
    }

    /// The first nine digits of the commit, as `rustc -V` has them.
    pub fn short_commit(&self) -> &str {
        self.compiler.commit.get(..9).unwrap_or(&self.compiler.commit)
    }
}

pub fn provide_source(nightly: &Nightly) -> Result<String> {
    let home = nightly.sysroot.join("lib/rustlib/src/rust");
    let library = home.join("library");
    // Source that setup unpacked bears the compiler it was for; rustup keeps its own up to date.
    let stamp = home.join(".nohop-nightly");
    let stamped = fs::read_to_string(&stamp).ok();
    let stale = stamped.as_ref().is_some_and(|commit| *commit != nightly.compiler.commit);
    if is_library(&library) && !stale {
        return Ok(library.display().to_string());
    }

    if let Some(given) = env::var_os("NOHOP_RUST_SRC").map(PathBuf::from) {
        announce(&format!("unpacking the standard library's source from {}", given.display()));
        fs::create_dir_all(&home).with_context(|| format!("can't create {}", home.display()))?;
        let stopped = format!("NOHOP_RUST_SRC={} doesn't serve", given.display());
        with_fix(unpack(&given, &library), &stopped, SOURCE_FIX)?;
        fs::write(&stamp, &nightly.compiler.commit)
            .with_context(|| format!("can't write {}", stamp.display()))?;
        return Ok(format!("unpacked {}", given.display()));
    }

    let name = toolchain::name();
    announce(&format!("rustup component add rust-src --toolchain {name}"));
    if stamped.is_some() {
        // rustup refuses to install over files that aren't its own.
        fs::remove_dir_all(&home).with_context(|| format!("can't remove {}", home.display()))?;
    }
    let add = ["component", "add", "rust-src", "--toolchain", &name];
    let added = process::output(Command::new("rustup").args(add));
    with_fix(added, "rustup can't provide it", SOURCE_FIX)?;
    if !is_library(&library) {
        bail!(
            "rustup reports that rust-src is installed, but {} isn't there: run `rustup component \
             remove rust-src --toolchain {name}`, then setup again",
            library.display()
        );
    }
    Ok("installed by rustup".to_owned())
}

fn is_library(dir: &Path) -> bool {
    dir.join("core/Cargo.toml").is_file()
}

/// Puts the `library` folder that `given` is or holds at `library`.
fn unpack(given: &Path, library: &Path) -> Result<()> {
    let draft = Draft::beside(library)?;
    if let Some(folder) = find_library(given, 2) {
        let copy = draft.path().join("library");
        process::output(Command::new("cp").arg("-r").arg(&folder).arg(&copy))?;
        return draft.publish(&copy, library);
    }

    let tarball = find_tarball(given)?;
    let extract = ["--extract", "--no-same-owner", "--file"];
    process::output(Command::new("tar").args(extract).arg(&tarball).arg("-C").arg(draft.path()))?;
    // rustup's own tarball holds it at rust-src-nightly/rust-src/lib/rustlib/src/rust/library.
    let folder = find_library(draft.path(), 8)
        .with_context(|| format!("{} holds no library/core", tarball.display()))?;
    draft.publish(&folder, library)
}

/// The `library` folder that `dir` is, or that lies at most `depth` levels below it.
fn find_library(dir: &Path, depth: u32) -> Option<PathBuf> {
    if is_library(dir) {
        return Some(dir.to_owned());
    }
    let below = depth.checked_sub(1)?;
    let entries = fs::read_dir(dir).ok()?;
    let folders = entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path.is_dir());
    folders.into_iter().find_map(|folder| find_library(&folder, below))
}

fn find_tarball(given: &Path) -> Result<PathBuf> {
    if given.is_file() {
        return Ok(given.to_owned());
    }
    let entries = fs::read_dir(given).with_context(|| format!("can't read {}", given.display()))?;
    let mut tarballs: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with("rust-src") && name.contains(".tar")
        })
        .collect();
    tarballs.sort_unstable();
    tarballs.pop().with_context(|| {
        format!("{} holds neither library/ nor rust-src-*.tar.xz", given.display())
    })
}

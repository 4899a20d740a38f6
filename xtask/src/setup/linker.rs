//! bpf-linker, built against the nightly's own LLVM: it reads that compiler's bitcode, which an
//! older LLVM can't.

use std::env;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::common::{announce, cache_dir, link_tool, with_fix};
use super::rust::Nightly;
use crate::process;

const VERSION: &str = "0.13.0";

pub fn provide(nightly: &Nightly) -> Result<String> {
    let place = cache_dir()?.join(format!("bpf-linker-{VERSION}-{}", nightly.short_commit()));
    let cached = place.join("bin/bpf-linker");
    if works(&cached) {
        link_tool("bpf-linker", &cached)?;
        return Ok(format!(
            "{VERSION} for LLVM {}, {}",
            nightly.compiler.llvm_major,
            cached.display()
        ));
    }
    if let Some(found) = process::find("bpf-linker")
        && works(&found)
        && linked_llvm_major(&found).is_some_and(|major| major >= nightly.compiler.llvm_major)
    {
        link_tool("bpf-linker", &found)?;
        return Ok(format!("{VERSION} from PATH, {}", found.display()));
    }

    announce(&format!(
        "building bpf-linker {VERSION} against the nightly's LLVM {} (about a minute)",
        nightly.compiler.llvm_major
    ));
    let fix = format!(
        "follow the message above and run setup again, or put a bpf-linker {VERSION} on PATH that \
         links to a shared LLVM {} or later",
        nightly.compiler.llvm_major
    );
    with_fix(build(nightly, &place), "it didn't build", &fix)?;
    if !works(&cached) {
        bail!("{} was built but doesn't run: remove {}", cached.display(), place.display());
    }
    link_tool("bpf-linker", &cached)?;
    Ok(format!("built {}", cached.display()))
}

/// Whether `linker` starts (it may lack its LLVM) and is of the version that setup builds.
fn works(linker: &Path) -> bool {
    process::output(Command::new(linker).arg("--version"))
        .is_ok_and(|printed| printed.trim() == format!("bpf-linker {VERSION}"))
}

/// The major version of the LLVM library that `linker` loads; none when LLVM is part of it, as
/// the version can't be determined then.
fn linked_llvm_major(linker: &Path) -> Option<u32> {
    let libraries = process::output(Command::new("ldd").arg(linker)).ok()?;
    llvm_major(&libraries)
}

/// The major version in the first `libLLVM.so.22.1` or `libLLVM-22.so` of `text`.
fn llvm_major(text: &str) -> Option<u32> {
    let (_, rest) = text.split_once("libLLVM")?;
    let rest = rest.strip_prefix(".so.").or_else(|| rest.strip_prefix('-'))?;
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

fn build(nightly: &Nightly, place: &Path) -> Result<()> {
    let lib = nightly.sysroot.join("lib");
    let prefix = place.join("llvm");
    let link = prefix.join("lib/libLLVM.so");
    fs::create_dir_all(prefix.join("lib"))
        .and_then(|()| if link.is_symlink() { fs::remove_file(&link) } else { Ok(()) })
        .and_then(|()| symlink(shared_llvm(&lib)?, &link))
        .with_context(|| format!("can't create {}", link.display()))?;

    let mut cargo = Command::new("cargo");
    cargo.args(["install", "bpf-linker", "--version", VERSION, "--locked", "--force"]);
    cargo.args([
        "--no-default-features",
        "--features",
        &format!("llvm-{}", nightly.compiler.llvm_major),
    ]);
    cargo.arg("--root").arg(place);
    for inherited in ["CARGO_BUILD_TARGET", "CARGO_ENCODED_RUSTFLAGS", "CARGO_TARGET_DIR"] {
        cargo.env_remove(inherited);
    }
    // cargo warns of a folder that isn't on PATH, but this one needn't be.
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = env::split_paths(&path).chain([place.join("bin")]);
    cargo.env("PATH", env::join_paths(folders).context("the cache's path holds a colon")?);
    cargo.env("LLVM_PREFIX", &prefix);
    cargo.env("RUSTFLAGS", format!("-Clink-arg=-Wl,-rpath,{}", lib.display()));
    process::stream(&mut cargo)
}

/// The nightly's LLVM library. Next to it is a linker script of a similar name, a line long.
fn shared_llvm(lib: &Path) -> std::io::Result<PathBuf> {
    let mut libraries = Vec::new();
    for entry in fs::read_dir(lib)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if llvm_major(&name).is_some() && name.contains(".so") {
            libraries.push((entry.metadata()?.len(), entry.path()));
        }
    }
    let largest = libraries.into_iter().max().map(|(_, path)| path);
    largest.ok_or_else(|| std::io::Error::other(format!("no libLLVM in {}", lib.display())))
}

#[cfg(test)]
mod tests {
    use super::llvm_major;

    #[test]
    fn llvm_major_is_read_from_the_library_name() {
        let table = [
            ("\tlibLLVM.so.22.1-rust-1.97.0-nightly => /x/lib (0x0)\n", Some(22)),
            ("libLLVM-22-rust-1.97.0-nightly.so", Some(22)),
            ("libLLVM-19.so.1", Some(19)),
            ("libLLVM.so", None),
            ("libc.so.6", None),
        ];
        for (text, expected) in table {
            assert_eq!(llvm_major(text), expected, "{text}");
        }
    }
}

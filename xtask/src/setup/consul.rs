//! A real Consul for the demo and the scenarios; it is unpacked, never installed, so that no
//! package starts an agent on this machine.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail};

use super::apt::Apt;
use super::common::{Draft, announce, cache_dir, link_tool, with_fix};
use crate::process::{self, find, is_executable};

const FIX: &str = "set NOHOP_CONSUL to a consul binary, a .deb of it or a folder that holds one \
                    of the two, or put consul on PATH (https://developer.hashicorp.com/consul)";

pub fn provide() -> Result<String> {
    let (consul, version) = match env::var_os("NOHOP_CONSUL").map(PathBuf::from) {
        Some(given) => {
            let stopped = format!("NOHOP_CONSUL={} doesn't serve", given.display());
            with_fix(given_consul(&given).and_then(with_version), &stopped, FIX)?
        }
        None => ordinary_consul()?,
    };
    link_tool("consul", &consul)?;
    Ok(format!("{version}, {}", consul.display()))
}

/// The consul that `given` is, or that can be unpacked from it.
fn given_consul(given: &Path) -> Result<PathBuf> {
    let given = given.canonicalize().context("it can't be read")?;
    if given.is_file() {
        return if is_deb(&given) { unpack(&given) } else { Ok(given) };
    }
    let binary = given.join("consul");
    if is_executable(&binary) {
        return Ok(binary);
    }
    let deb = newest_deb(&given).context("it holds neither consul nor consul*.deb")?;
    unpack(&deb)
}

/// From PATH, from what an earlier setup unpacked, from the packages that this machine knows, from
/// the last Debian that has one.
fn ordinary_consul() -> Result<(PathBuf, String)> {
    let mut tried = Vec::new();
    for (way, look) in [
        ("PATH", on_path as fn() -> Result<PathBuf>),
        ("cache", unpacked_before),
        ("apt", from_apt),
        ("Debian 11", from_debian_11),
    ] {
        match look().and_then(with_version) {
            Ok(found) => return Ok(found),
            Err(error) => tried.push(format!("{way}: {error:#}")),
        }
    }
    with_fix(Err(anyhow!("{}", tried.join("; "))), "nothing serves", FIX)
}

fn with_version(consul: PathBuf) -> Result<(PathBuf, String)> {
    let printed = process::output(Command::new(&consul).arg("version"))?;
    let version = printed.lines().next().unwrap_or_default();
    if !version.starts_with("Consul v") {
        bail!("`{} version` prints {version:?}", consul.display());
    }
    Ok((consul, version.to_owned()))
}

fn on_path() -> Result<PathBuf> {
    find("consul").context("isn't there")
}

fn unpacked_before() -> Result<PathBuf> {
    let cache = cache_dir()?.join("consul");
    let mut unpacked: Vec<_> = fs::read_dir(&cache)
        .with_context(|| format!("nothing in {}", cache.display()))?
        .filter_map(|entry| Some(entry.ok()?.path().join("consul")))
        .filter(|binary| is_executable(binary))
        .collect();
    unpacked.sort_unstable();
    unpacked.pop().with_context(|| format!("nothing in {}", cache.display()))
}

fn from_apt() -> Result<PathBuf> {
    let policy = process::output(Command::new("apt-cache").args(["policy", "consul"]))?;
    if !policy.lines().any(|line| line.contains("Candidate:") && !line.contains("(none)")) {
        bail!("knows no package consul");
    }
    announce("downloading consul with apt-get");
    unpack(&Apt::of_system()?.download("consul")?)
}

/// Debian dropped consul after Debian 11.
fn from_debian_11() -> Result<PathBuf> {
    announce("downloading consul from Debian 11 with apt-get");
    unpack(&Apt::of_debian("bullseye", None)?.download("consul")?)
}

fn is_deb(file: &Path) -> bool {
    file.extension().is_some_and(|extension| extension == "deb")
}

fn newest_deb(folder: &Path) -> Option<PathBuf> {
    let named = |path: &Path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        is_deb(path) && name.starts_with("consul")
    };
    let entries = fs::read_dir(folder).ok()?;
    entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| named(path)).max()
}

/// Unpacks the binary of `deb` to the cache, once.
fn unpack(deb: &Path) -> Result<PathBuf> {
    let place = cache_dir()?.join("consul").join(deb.file_stem().unwrap_or_default());
    let binary = place.join("consul");
    if is_executable(&binary) {
        return Ok(binary);
    }
    announce(&format!("unpacking {}", deb.display()));
    let draft = Draft::beside(&place)?;
    process::output(Command::new("dpkg-deb").arg("-x").arg(deb).arg(draft.path()))?;
    let bin = draft.path().join("usr/bin");
    if !is_executable(&bin.join("consul")) {
        bail!("{} holds no usr/bin/consul", deb.display());
    }
    draft.publish(&bin, &place)?;
    Ok(binary)
}

//! A real Consul for the demo and the scenarios; it is unpacked, never installed, so that no
//! package starts an agent on this machine.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail};

use super::{Draft, announce, cache_dir, link_tool, with_mend};
use crate::process::{self, find, is_executable};

const MEND: &str = "set NOHOP_CONSUL to a consul binary, a .deb of it or a folder that holds one \
                    of the two, or put consul on PATH (https://developer.hashicorp.com/consul)";

pub fn provide() -> Result<String> {
    let (consul, version) = match env::var_os("NOHOP_CONSUL").map(PathBuf::from) {
        Some(given) => {
            let stopped = format!("NOHOP_CONSUL={} doesn't serve", given.display());
            with_mend(given_consul(&given).and_then(with_version), &stopped, MEND)?
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
    with_mend(Err(anyhow!("{}", tried.join("; "))), "nothing serves", MEND)
}

fn with_version(consul: PathBuf) -> Result<(PathBuf, String)> {
    let said = process::output(Command::new(&consul).arg("version"))?;
    let version = said.lines().next().unwrap_or_default();
    if !version.starts_with("Consul v") {
        bail!("`{} version` says {version:?}", consul.display());
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
    let draft = Draft::beside(&cache_dir()?.join("apt"))?;
    download(&draft, &[])
}

/// Debian dropped consul after Debian 11. Where this machine's packages come from a Debian mirror,
/// asks that mirror for it: through an apt of its own, so that signatures are checked and the
/// system's lists stay as they are.
fn from_debian_11() -> Result<PathBuf> {
    let sources = debian_sources(&apt_sources());
    if sources.is_empty() {
        bail!("no Debian mirror among the apt sources");
    }
    announce("downloading consul from Debian 11 with apt-get");
    let draft = Draft::beside(&cache_dir()?.join("apt"))?;
    let dir = draft.0.display();
    let options = [
        format!("Dir::Etc::sourcelist={dir}/sources.list"),
        "Dir::Etc::sourceparts=/dev/null".to_owned(),
        format!("Dir::State::lists={dir}/lists"),
        format!("Dir::Cache={dir}/cache"),
        "Acquire::Languages=none".to_owned(),
        // An archived release is no longer signed anew.
        "Acquire::Check-Valid-Until=false".to_owned(),
        // These folders belong to whoever runs setup, not to apt's user.
        "APT::Sandbox::User=root".to_owned(),
    ];
    let mut tried = Vec::new();
    for source in sources {
        let update = || -> Result<PathBuf> {
            fs::write(draft.0.join("sources.list"), source + "\n")?;
            fs::create_dir_all(draft.0.join("lists/partial"))?;
            fs::create_dir_all(draft.0.join("cache/archives/partial"))?;
            let mut apt_get = Command::new("apt-get");
            apt_get.args(options.iter().flat_map(|option| ["-o", option]));
            process::output(apt_get.args(["-qq", "--error-on=any", "update"]))?;
            download(&draft, &options)
        };
        match update() {
            Ok(consul) => return Ok(consul),
            Err(error) => tried.push(format!("{error:#}")),
        }
    }
    bail!("{}", tried.join("; "));
}

fn download(draft: &Draft, options: &[String]) -> Result<PathBuf> {
    let mut apt_get = Command::new("apt-get");
    apt_get.args(options.iter().flat_map(|option| ["-o", option]));
    process::output(apt_get.args(["-qq", "download", "consul"]).current_dir(&draft.0))?;
    unpack(&newest_deb(&draft.0).context("apt-get downloaded no consul*.deb")?)
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
    process::output(Command::new("dpkg-deb").arg("-x").arg(deb).arg(&draft.0))?;
    let bin = draft.0.join("usr/bin");
    if !is_executable(&bin.join("consul")) {
        bail!("{} holds no usr/bin/consul", deb.display());
    }
    draft.publish(&bin, &place)?;
    Ok(binary)
}

/// The text of all files that tell apt where packages come from.
fn apt_sources() -> String {
    let parts = fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten();
    let files = parts.filter_map(|entry| Some(entry.ok()?.path()));
    std::iter::once(PathBuf::from("/etc/apt/sources.list"))
        .chain(files)
        .filter_map(|file| fs::read_to_string(file).ok())
        .collect::<Vec<_>>()
        .join("\n\n")
}

/// One line a Debian mirror of `sources` (of either format), asking it for Debian 11.
fn debian_sources(sources: &str) -> Vec<String> {
    let mut lines = Vec::new();
    for stanza in sources.split("\n\n") {
        let field = |name: &str| stanza.lines().find_map(|line| line.strip_prefix(name));
        let of_field = field("URIs:").unwrap_or_default().split_whitespace();
        let key = field("Signed-By:").map(str::trim);
        let of_lines = stanza
            .lines()
            .filter(|line| line.starts_with("deb "))
            .filter_map(|line| line.split_whitespace().find(|word| word.contains(":/")));
        for uri in of_field.chain(of_lines) {
            let archive = uri.trim_end_matches('/').rsplit('/').next();
            if !matches!(archive, Some("debian" | "debian.list")) {
                continue;
            }
            let key = key.filter(|key| key.starts_with('/'));
            let options = key.map(|key| format!("[signed-by={key}] ")).unwrap_or_default();
            let line = format!("deb {options}{uri} bullseye main");
            if !lines.contains(&line) {
                lines.push(line);
            }
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::debian_sources;

    #[test]
    fn mirrors_of_debian_are_found_in_both_formats() {
        let sources = "\
Types: deb
URIs: http://mirror.example/debian
Suites: bookworm
Signed-By: /usr/share/keyrings/debian.gpg

Types: deb
URIs: http://mirror.example/debian-security

deb [arch=amd64] https://other.example/pub/debian/ bookworm main
deb-src https://other.example/src/debian bookworm main
deb https://packages.example/apt stable main
# deb https://commented.example/debian bookworm main
";
        let expected = [
            "deb [signed-by=/usr/share/keyrings/debian.gpg] http://mirror.example/debian bullseye main",
            "deb https://other.example/pub/debian/ bullseye main",
        ];
        assert_eq!(debian_sources(sources), expected);
    }
}

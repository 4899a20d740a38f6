//! .deb and .rpm, by nfpm, and the archive with the static binary.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::release::{Architecture, Release, tar};
use crate::process;
use crate::repository;
use crate::setup;

/// A file of a package: where it lies, and its mode.
fn place(root: &Path, to: &str, contents: &[u8], mode: u32) -> Result<()> {
    let file = root.join(to);
    let folder = file.parent().context("files have folders")?;
    fs::create_dir_all(folder)
        .and_then(|()| fs::write(&file, contents))
        .and_then(|()| fs::set_permissions(&file, fs::Permissions::from_mode(mode)))
        .with_context(|| format!("can't write {}", file.display()))
}

fn place_copy(root: &Path, to: &str, from: &Path, mode: u32) -> Result<()> {
    let contents = fs::read(from).with_context(|| format!("can't read {}", from.display()))?;
    place(root, to, &contents, mode)
}

/// A folder that had nothing else in it.
fn fresh(folder: PathBuf) -> Result<PathBuf> {
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(&folder).with_context(|| format!("can't make {}", folder.display()))?;
    Ok(folder)
}

fn in_contrib(name: &str) -> PathBuf {
    repository::root().join("contrib").join(name)
}

/// The tree of files that packages install: usr/, and what lies elsewhere in each format beside it (nfpm.yaml).
pub fn stage(
    architecture: Architecture,
    binary: &Path,
    written: &Path,
    licenses: &Path,
    release: &Release,
) -> Result<PathBuf> {
    let root = fresh(release.work.join(format!("stage-{}", architecture.name())))?;
    place_copy(&root, "usr/bin/nohop", binary, 0o755)?;
    place_copy(&root, "usr/share/nohop/nohop.toml", &written.join("nohop.toml"), 0o644)?;
    for unit in ["nohop.service", "nohop.socket"] {
        let text = fs::read_to_string(in_contrib("systemd").join(unit))?;
        let text = text.replace("/usr/local/bin/", "/usr/bin/");
        place(&root, &format!("usr/lib/systemd/system/{unit}"), text.as_bytes(), 0o644)?;
    }
    for (from, to) in [
        ("nohop.bash", "usr/share/bash-completion/completions/nohop"),
        ("_nohop", "zsh/_nohop"),
        ("nohop.fish", "usr/share/fish/vendor_completions.d/nohop.fish"),
    ] {
        place_copy(&root, to, &written.join("completions").join(from), 0o644)?;
    }
    for entry in fs::read_dir(written.join("man"))? {
        let page = entry?.path();
        let name = page.file_name().and_then(|name| name.to_str()).context("a page has a name")?;
        let section = page.extension().and_then(|n| n.to_str()).context("a page has a section")?;
        let to = format!("usr/share/man/man{section}/{name}");
        place_copy(&root, &to, &page, 0o644)?;
        // -n: without the name and the time.
        process::output(Command::new("gzip").args(["-9n"]).arg(root.join(to)))?;
    }
    let rules = in_contrib("prometheus/nohop.rules.yml");
    place_copy(&root, "usr/share/nohop/prometheus/nohop.rules.yml", &rules, 0o644)?;
    let openapi = repository::root().join("docs/openapi.json");
    place_copy(&root, "usr/share/nohop/openapi.json", &openapi, 0o644)?;
    let dashboard = in_contrib("grafana/nohop.json");
    place_copy(&root, "usr/share/nohop/grafana/nohop.json", &dashboard, 0o644)?;
    for example in [
        "bird/bird.conf",
        "frr/frr.conf",
        "keepalived/keepalived.conf",
        "systemd/no-udp-aborts.conf",
    ] {
        let name = example.rsplit('/').next().unwrap_or(example);
        let to = format!("usr/share/doc/nohop/examples/{name}");
        place_copy(&root, &to, &in_contrib(example), 0o644)?;
    }
    let copyright = fs::read(in_contrib("packages/copyright"))?;
    place(&root, "usr/share/doc/nohop/copyright", &copyright, 0o644)?;
    place_copy(&root, "usr/share/doc/nohop/THIRD-PARTY-LICENSES.txt", licenses, 0o644)?;
    let changes = repository::root().join("CHANGELOG.md");
    place_copy(&root, "usr/share/doc/nohop/changelog", &changes, 0o644)?;
    let changes = root.join("usr/share/doc/nohop/changelog");
    process::output(Command::new("gzip").args(["-9n"]).arg(changes))?;
    // nfpm takes the times of files, and the modes of folders.
    let mut chmod = Command::new("find");
    chmod.arg(&root).args(["-type", "d", "-exec", "chmod", "755", "{}", "+"]);
    process::output(&mut chmod)?;
    let mut touch = Command::new("find");
    touch.arg(&root).args(["-exec", "touch", "--date", &format!("@{}", release.epoch), "{}", "+"]);
    process::output(&mut touch)?;
    Ok(root)
}

/// A format of packages.
#[derive(Clone, Copy)]
pub enum Format {
    Deb,
    Rpm,
}

/// Packs a tree.
pub fn pack(
    format: Format,
    architecture: Architecture,
    stage: &Path,
    release: &Release,
) -> Result<PathBuf> {
    let Release { version, work, .. } = release;
    for script in ["postinstall.sh", "preremove.sh", "postremove.sh"] {
        let to = format!("scripts/{script}");
        place_copy(work, &to, &in_contrib("packages").join(script), 0o755)?;
    }
    let (packager, name) = match format {
        Format::Deb => ("deb", format!("nohop_{version}_{}.deb", architecture.debian())),
        Format::Rpm => ("rpm", format!("nohop-{version}.{}.rpm", architecture.name())),
    };
    let file = release.path(&name);
    let mut nfpm = Command::new(setup::dist::provide()?);
    nfpm.args(["package", "--packager", packager, "--config"]);
    nfpm.arg(in_contrib("packages/nfpm.yaml")).arg("--target").arg(&file);
    nfpm.current_dir(stage).env("SOURCE_DATE_EPOCH", &release.epoch);
    nfpm.env("VERSION", version).env("ARCH", architecture.debian());
    process::output(&mut nfpm)?;
    Ok(file)
}

/// The .deb of a binary for this architecture.
pub fn deb(binary: &Path, written: &Path, licenses: &Path, release: &Release) -> Result<PathBuf> {
    fs::create_dir_all(&release.work)?;
    let stage = stage(Architecture::X86_64, binary, written, licenses, release)?;
    pack(Format::Deb, Architecture::X86_64, &stage, release)
}

/// An archive with the static binary and what goes with it.
pub fn tarball(
    architecture: Architecture,
    binary: &Path,
    written: &Path,
    licenses: &Path,
    release: &Release,
) -> Result<PathBuf> {
    let name = format!("nohop-{}-{}-static", release.version, architecture.name());
    let parent = fresh(release.work.join(format!("static-{}", architecture.name())))?;
    let root = parent.join(&name);
    place_copy(&root, "nohop", binary, 0o755)?;
    place_copy(&root, "nohop.toml", &written.join("nohop.toml"), 0o644)?;
    place_copy(&root, "THIRD-PARTY-LICENSES.txt", licenses, 0o644)?;
    for license in ["LICENSE", "LICENSE-APACHE", "LICENSE-MIT"] {
        place_copy(&root, license, &repository::root().join(license), 0o644)?;
    }
    for unit in ["nohop.service", "nohop.socket"] {
        place_copy(&root, &format!("systemd/{unit}"), &in_contrib("systemd").join(unit), 0o644)?;
    }
    for folder in ["man", "completions"] {
        for entry in fs::read_dir(written.join(folder))? {
            let file = entry?.path();
            let name = file.file_name().and_then(|n| n.to_str()).context("a file has a name")?;
            place_copy(&root, &format!("{folder}/{name}"), &file, 0o644)?;
        }
    }
    let archive = release.work.join(format!("{name}.tar"));
    tar(&parent, &archive, &release.epoch)?;
    let to = release.path(&format!("{name}.tar.gz"));
    process::output(Command::new("gzip").args(["-9nf"]).arg(&archive))?;
    fs::rename(archive.with_extension("tar.gz"), &to)?;
    Ok(to)
}

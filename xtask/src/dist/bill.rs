//! What the binary is made of: a software bill of materials (CycloneDX 1.5) and the licences of all crates.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::ValueEnum as _;
use serde_json::{Value, json};

use super::release::{Architecture, Release};
use crate::process;
use crate::repository;

/// A crate that is a part of the binary, or of an object for the kernel; or a script of the page.
struct Crate {
    name: String,
    version: String,
    /// An SPDX expression.
    license: String,
    /// Where its source is kept; empty where it doesn't name that.
    repository: String,
    /// Its folder.
    folder: PathBuf,
    /// Whether it comes from a registry.
    is_published: bool,
    /// The registry, as package URLs have it: `cargo` or `npm`.
    registry: &'static str,
}

/// The scripts of others that the page has, and their licences.
const SCRIPTS: [(&str, &str, &str); 2] =
    [("htm", "3.1.1", "Apache-2.0"), ("preact", "11.2.0", "MIT")];
/// What compilers add to a binary, the last two to the static one, by SPDX expressions.
const RUNTIMES: [(&str, &str); 3] = [
    ("rust-std", "MIT OR Apache-2.0"),
    ("musl", "MIT"),
    ("libgcc", "GPL-3.0-or-later WITH GCC-exception-3.1"),
];
const SCRIPTS_FOLDER: &str = "lb-userspace/src/admin/page/vendor";

/// All crates and scripts: by name and version.
fn crates() -> Result<BTreeMap<(String, String), Crate>> {
    let mut all = BTreeMap::new();
    for (manifest, root) in [("Cargo.toml", "lb-userspace"), ("lb-ebpf/Cargo.toml", "lb-ebpf")] {
        let mut cargo = Command::new("cargo");
        cargo.args(["metadata", "--format-version", "1", "--locked", "--manifest-path", manifest]);
        if root == "lb-userspace" {
            for architecture in Architecture::value_variants() {
                let triple = format!("{}-unknown-linux-gnu", architecture.name());
                cargo.args(["--filter-platform", &triple]);
            }
        }
        let metadata = process::output(cargo.current_dir(repository::root()))?;
        let metadata = serde_json::from_str(&metadata).context("can't parse cargo's metadata")?;
        for found in linked(&metadata, root)? {
            all.insert((found.name.clone(), found.version.clone()), found);
        }
    }
    for (name, version, license) in SCRIPTS {
        let [name, version, license] = [name, version, license].map(str::to_owned);
        let folder = repository::root().join(SCRIPTS_FOLDER).join(&name);
        let key = (name.clone(), version.clone());
        let (repository, is_published, registry) = (String::new(), true, "npm");
        let script = Crate { name, version, license, repository, folder, is_published, registry };
        all.insert(key, script);
    }
    Ok(all)
}

/// The crates that `root` is linked with.
fn linked(metadata: &Value, root: &str) -> Result<Vec<Crate>> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let packages = list(&metadata["packages"]);
    let by_id: BTreeMap<String, &Value> =
        packages.iter().map(|package| (text(&package["id"]), package)).collect();
    let dependencies: BTreeMap<String, Vec<String>> = list(&metadata["resolve"]["nodes"])
        .iter()
        .map(|node| {
            // Of kind null are those that aren't for builds or tests alone.
            let is_linked =
                |dep: &Value| list(&dep["dep_kinds"]).iter().any(|k| k["kind"].is_null());
            let linked = list(&node["deps"]).into_iter().filter(is_linked);
            (text(&node["id"]), linked.map(|dep| text(&dep["pkg"])).collect())
        })
        .collect();
    let root = packages.iter().find(|package| package["name"] == root);
    let mut left = vec![text(&root.with_context(|| format!("there is no {root:?}"))?["id"])];
    let mut seen = BTreeSet::new();
    while let Some(id) = left.pop() {
        if seen.insert(id.clone()) {
            left.extend(dependencies.get(&id).into_iter().flatten().cloned());
        }
    }
    let read = |id: &String| {
        let package = by_id.get(id)?;
        let folder = Path::new(package["manifest_path"].as_str()?).parent()?.to_owned();
        Some(Crate {
            name: text(&package["name"]),
            version: text(&package["version"]),
            // Before SPDX, a slash was cargo's sign for it.
            license: text(&package["license"]).replace('/', " OR "),
            repository: text(&package["repository"]),
            folder,
            is_published: package["source"].is_string(),
            registry: "cargo",
        })
    };
    Ok(seen.iter().filter_map(read).collect())
}

/// Writes the bill.
pub fn sbom(release: &Release) -> Result<PathBuf> {
    let component = |it: &Crate| {
        let purl = format!("pkg:{}/{}@{}", it.registry, it.name, it.version);
        json!({
            "type": "library", "bom-ref": purl, "purl": purl,
            "name": it.name, "version": it.version,
            "licenses": [{ "expression": it.license }],
        })
    };
    let runtime = |(name, license): &(&str, &str)| {
        let purl = format!("pkg:generic/{name}");
        json!({
            "type": "library", "bom-ref": purl, "purl": purl,
            "name": name, "licenses": [{ "expression": license }],
        })
    };
    let crates = crates()?;
    let crates = crates.values().filter(|it| it.is_published).map(component);
    let components: Vec<Value> = crates.chain(RUNTIMES.iter().map(runtime)).collect();
    let own = format!("pkg:generic/nohop@{}", release.version);
    let bill = json!({
        "bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1,
        "metadata": { "component": {
            "type": "application", "bom-ref": own, "purl": own,
            "name": "nohop", "version": release.version,
            "licenses": [{ "expression": "MIT OR Apache-2.0" }],
        } },
        "components": components,
    });
    let file = release.path(&format!("nohop-{}.cdx.json", release.version));
    fs::write(&file, serde_json::to_string_pretty(&bill)? + "\n")
        .with_context(|| format!("can't write {}", file.display()))?;
    Ok(file)
}

/// Writes the licences: each text once, with the crates that it is of.
pub fn licenses(release: &Release) -> Result<PathBuf> {
    let mut texts: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut list = String::new();
    let crates = crates()?;
    for it in crates.values().filter(|it| it.is_published) {
        list += &format!("{} {}: {}\n", it.name, it.version, it.license);
        for text in texts_of(it, &crates)? {
            texts.entry(text).or_default().insert(format!("{} {}", it.name, it.version));
        }
    }
    let mut document =
        format!("nohop {} contains these crates and scripts:\n\n{list}", release.version);
    let [std, musl, libgcc] = RUNTIMES.map(|(_, license)| license);
    document += &format!(
        "\nIt also contains Rust's standard library ({std}), and the static binary musl ({musl}; Copyright \
         © 2005-2020 Rich Felker, et al.) and GCC's unwinder ({libgcc}).\n"
    );
    // The text that most crates have comes first.
    let mut texts: Vec<_> = texts.into_iter().collect();
    texts.sort_by_key(|(text, crates)| (std::cmp::Reverse(crates.len()), text.clone()));
    for (text, crates) in texts {
        let crates = crates.into_iter().collect::<Vec<_>>().join(", ");
        document += &format!("\n{}\nOf {crates}:\n\n{}\n", "-".repeat(80), text.trim_end());
    }
    let file = release.path(&format!("nohop-{}-licenses.txt", release.version));
    fs::write(&file, document).with_context(|| format!("can't write {}", file.display()))?;
    Ok(file)
}

/// The texts of a crate's licence: some crates have theirs beside another one of their repository.
fn texts_of(it: &Crate, crates: &BTreeMap<(String, String), Crate>) -> Result<Vec<String>> {
    let is_beside = |other: &&Crate| !it.repository.is_empty() && other.repository == it.repository;
    for it in std::iter::once(it).chain(crates.values().filter(is_beside)) {
        let texts = license_texts(&it.folder)?;
        if !texts.is_empty() {
            return Ok(texts);
        }
    }
    bail!("{} {} ({}) has no text of its licence", it.name, it.version, it.license)
}

/// The files of a crate that are about its licence.
fn license_texts(folder: &Path) -> Result<Vec<String>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_uppercase();
        let is_about =
            ["LICENSE", "LICENCE", "COPYING", "NOTICE"].iter().any(|n| name.starts_with(n));
        if is_about && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    let read = |path: &PathBuf| Ok(String::from_utf8_lossy(&fs::read(path)?).replace("\r\n", "\n"));
    files.iter().map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crates_have_their_licences() {
        let crates = crates().unwrap();
        for name in ["aya", "aya-ebpf", "preact", "tokio"] {
            assert!(crates.keys().any(|(it, _)| it == name), "{name} isn't among them");
        }
        for it in crates.values().filter(|it| it.is_published) {
            assert!(!it.license.is_empty() && !it.license.contains('/'), "{}", it.name);
            texts_of(it, &crates).unwrap();
        }
    }

    #[test]
    fn scripts_are_as_they_were_published() {
        let folder = repository::root().join(SCRIPTS_FOLDER);
        let mut sums = Command::new("sha256sum");
        process::output(sums.args(["--check", "--strict", "SHA256SUMS"]).current_dir(&folder))
            .unwrap();
        let list = fs::read_to_string(folder.join("README.md")).unwrap();
        for (name, version, license) in SCRIPTS {
            assert!(list.contains(&format!("{name} {version}, ")), "{name}");
            assert!(list.contains(&format!("({license})")), "{license}");
            assert!(!license_texts(&folder.join(name)).unwrap().is_empty(), "{name}");
        }
    }
}

//! The kernels of `cargo xtask vm`: those of NOHOP_KERNELS, or else Debian's cloud kernels, which
//! are unpacked and never installed.

use std::env;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;

use anyhow::{Context, Result, bail};

use super::apt::Apt;
use super::common::{Draft, announce, cache_dir, with_fix};
use crate::process;

const FIX: &str =
    "set NOHOP_KERNELS to a folder of VERSION/vmlinuz and VERSION/modules/, or unset it";

/// The releases whose newest cloud kernels are taken: 5.10, 6.1, 6.12, and what is new.
const DEBIAN_RELEASES: [&str; 4] = ["bullseye", "bookworm", "trixie", "sid"];

/// A kernel's version, without the patch level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    pub major: u32,
    pub minor: u32,
}

impl FromStr for Version {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut numbers = text.split(|c: char| !c.is_ascii_digit()).map(str::parse);
        match (numbers.next(), numbers.next()) {
            (Some(Ok(major)), Some(Ok(minor))) => Ok(Self { major, minor }),
            _ => bail!("{text:?} is no kernel's version, such as 6.1"),
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// A kernel that can be booted.
#[derive(Debug)]
pub struct Kernel {
    pub version: Version,
    pub vmlinuz: PathBuf,
    pub modules: PathBuf,
}

/// The kernels there are, oldest first, and why others can't be had.
#[derive(Debug, Default)]
pub struct Kernels {
    pub found: Vec<Kernel>,
    pub missing: Vec<String>,
}

/// Looks at NOHOP_KERNELS.
pub fn look(folder: &Path) -> Result<String> {
    let kernels = given(folder)?;
    let versions: Vec<_> = kernels.iter().map(|kernel| kernel.version.to_string()).collect();
    Ok(versions.join(", "))
}

/// Finds the kernels, and downloads Debian's where NOHOP_KERNELS is unset.
///
/// # Errors
/// When NOHOP_KERNELS is set and doesn't serve.
pub fn provide() -> Result<Kernels> {
    if let Some(folder) = env::var_os("NOHOP_KERNELS") {
        return Ok(Kernels { found: given(Path::new(&folder))?, missing: Vec::new() });
    }
    let mut kernels = Kernels::default();
    for release in DEBIAN_RELEASES {
        match of_debian(release) {
            Ok(found) => kernels.found.extend(found),
            Err(error) => kernels.missing.push(format!("Debian's {release}: {error:#}")),
        }
    }
    kernels.found.sort_by_key(|kernel| kernel.version);
    kernels.found.dedup_by_key(|kernel| kernel.version);
    Ok(kernels)
}

fn given(folder: &Path) -> Result<Vec<Kernel>> {
    let stopped = format!("NOHOP_KERNELS={} doesn't serve", folder.display());
    let found = in_folder(folder).and_then(|found| {
        if found.is_empty() {
            bail!("it holds no VERSION/vmlinuz with VERSION/modules/");
        }
        Ok(found)
    });
    with_fix(found, &stopped, FIX)
}

/// The kernels that lie in `folder` as VERSION/vmlinuz and VERSION/modules/.
pub fn in_folder(folder: &Path) -> Result<Vec<Kernel>> {
    let mut kernels = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("can't read {}", folder.display()))? {
        let dir = entry?.path();
        let (vmlinuz, modules) = (dir.join("vmlinuz"), dir.join("modules"));
        if vmlinuz.is_file() && modules.is_dir() {
            let version = dir.file_name().unwrap_or_default().to_string_lossy().parse()?;
            kernels.push(Kernel { version, vmlinuz, modules });
        }
    }
    kernels.sort_by_key(|kernel| kernel.version);
    Ok(kernels)
}

/// The newest cloud kernel of a release, once downloaded kept in the cache.
fn of_debian(release: &str) -> Result<Vec<Kernel>> {
    let place = cache_dir()?.join("kernels").join(release);
    if let Ok(kernels) = in_folder(&place)
        && !kernels.is_empty()
    {
        return Ok(kernels);
    }
    announce(&format!("downloading the cloud kernel of Debian's {release} with apt-get"));
    let apt = Apt::of_debian(release, Some("amd64"))?;
    let parent = place.parent().context("the cache has no folder")?;
    fs::create_dir_all(parent).with_context(|| format!("can't create {}", parent.display()))?;
    let draft = Draft::beside(&place)?;
    download(&apt, "amd64", &draft)?;
    draft.publish(&draft.path().join("kernels"), &place)?;
    in_folder(&place)
}

/// The newest cloud kernel of an architecture, as kernels/VERSION/ in the draft.
pub fn download(apt: &Apt, architecture: &str, draft: &Draft) -> Result<()> {
    let packages = apt.packages("linux-")?;
    let package = newest_cloud_kernel(&packages, architecture)
        .with_context(|| format!("it has no linux-image-*-cloud-{architecture}"))?;
    let name = package.trim_start_matches("linux-image-");
    let version: Version = name.parse()?;
    let unpacked = draft.path().join("packages");
    // Since Debian 14 the image depends on two packages that hold the files.
    let parts = ["image", "binary", "modules"].map(|part| format!("linux-{part}-{name}"));
    for part in parts.iter().filter(|part| packages.contains(part)) {
        let deb = apt.download(part)?;
        process::output(Command::new("dpkg-deb").arg("-x").arg(deb).arg(&unpacked))?;
    }
    let find = |paths: [String; 2]| {
        let mut found = paths.iter().map(|path| unpacked.join(path));
        found.find(|path| path.exists()).with_context(|| format!("{package} holds no {}", paths[0]))
    };
    let (boot, lib) = (format!("boot/vmlinuz-{name}"), format!("lib/modules/{name}"));
    let modules = find([lib.clone(), format!("usr/{lib}")])?;
    let vmlinuz = find([boot, format!("usr/{lib}/vmlinuz")])?;

    let kernel = draft.path().join("kernels").join(version.to_string());
    fs::create_dir_all(&kernel)
        .and_then(|()| fs::rename(vmlinuz, kernel.join("vmlinuz")))
        .and_then(|()| fs::rename(modules, kernel.join("modules")))
        .with_context(|| format!("can't fill {}", kernel.display()))
}

/// The newest of packages such as `linux-image-6.1.0-41-cloud-amd64`.
fn newest_cloud_kernel<'a>(packages: &'a [String], architecture: &str) -> Option<&'a str> {
    let release = |package: &&str| -> Option<Vec<u32>> {
        let release = package.strip_prefix("linux-image-")?.strip_suffix(architecture)?;
        let release = release.strip_suffix("-cloud-")?;
        let numbers = release.split(|c: char| !c.is_ascii_digit()).filter(|n| !n.is_empty());
        let numbers = numbers.map(|n| n.parse().ok()).collect::<Option<Vec<_>>>()?;
        // A shorter name, such as `6.12`, is a package that only depends on the kernel.
        (numbers.len() >= 3).then_some(numbers)
    };
    let named = packages.iter().map(String::as_str).filter(|package| release(package).is_some());
    named.max_by_key(release)
}

#[cfg(test)]
mod tests {
    use super::{Version, newest_cloud_kernel};

    #[test]
    fn versions_are_read_and_ordered() {
        let version = |text: &str| text.parse::<Version>().unwrap();
        assert_eq!(version("6.1.0-41-cloud-amd64"), version("6.1"));
        assert!(version("5.10") < version("6.1") && version("6.1") < version("6.12"));
        for text in ["", "6", "six.one", ".git"] {
            assert!(text.parse::<Version>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_newest_cloud_kernel_is_chosen() {
        let packages = [
            "linux-image-6.1.0-9-cloud-amd64",
            "linux-image-6.1.0-41-cloud-amd64",
            "linux-image-6.1.0-42-amd64",
            "linux-image-6.1.0-43-cloud-amd64-dbg",
            "linux-image-6.1.0-43-cloud-amd64-unsigned",
            "linux-image-6.12-cloud-amd64",
            "linux-image-cloud-amd64",
        ];
        let packages = packages.map(str::to_owned);
        let newest = newest_cloud_kernel(&packages, "amd64");
        assert_eq!(newest, Some("linux-image-6.1.0-41-cloud-amd64"));
        assert_eq!(newest_cloud_kernel(&packages, "arm64"), None);
        assert_eq!(newest_cloud_kernel(&[], "amd64"), None);
    }
}
